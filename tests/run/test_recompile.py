# SPDX-License-Identifier: Apache-2.0
"""Two runs of the same shapes share one compiled step."""

import lvjax
from lvjax.rollout.method import _step
from tests.tiny import tiny_bundle


def test_a_second_run_compiles_nothing():
    bundle = tiny_bundle()
    lvjax.generate(bundle, "the camera pans left", num_frames=41)
    compiled = _step._cache_size()
    lvjax.generate(bundle, "a red circle moves up", num_frames=41, seed=3)
    assert _step._cache_size() == compiled
    lvjax.generate(bundle, "a red circle moves up", num_frames=17, num_inference_steps=3)
    assert _step._cache_size() > compiled
