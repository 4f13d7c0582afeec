# SPDX-License-Identifier: Apache-2.0
"""Two runs of the same shapes share all that is compiled."""

import jax
import numpy as np

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


def test_a_second_run_compiles_no_encoder_either():
    """Weights are arguments of every program: a session that closed over them would compile its
    own.
    """
    bundle, image = tiny_bundle(), np.zeros((16, 16, 3), np.uint8)
    compiled = []

    def listen(event, seconds, **_):
        compiled.append(event)

    def run(prompt, seed):
        lvjax.generate(bundle, prompt, num_frames=17, image=image, seed=seed)

    run("the camera pans left", 0)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        run("a red circle moves up", 3)
        assert compiled.count("/jax/core/compile/backend_compile_duration") == 0
        jax.jit(lambda x: x + 1)(np.float32(1))  # a new program is heard
        assert compiled.count("/jax/core/compile/backend_compile_duration") == 1
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
