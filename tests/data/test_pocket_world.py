# SPDX-License-Identifier: Apache-2.0
"""The TFDS builder works without TensorFlow and gives what the plain generator gives."""

import sys
import warnings

import numpy as np

from lvjax.data.world import Video


def test_builder_round_trip(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lvjax.data.pocket_world import PocketWorld

        builder = PocketWorld(data_dir=tmp_path, config="tiny")
        builder.download_and_prepare()
        source = builder.as_data_source("held_out")
        example = source[0]
    assert len(source) == 1 and "tensorflow" not in sys.modules
    video = Video(0, split="held_out")
    np.testing.assert_array_equal(example["video"], video.frames(0, 17))
    assert example["prompts"][0].decode() == video.action(0).prompt()
    assert example["view"].shape == (17, 3)
