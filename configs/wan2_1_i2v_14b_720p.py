# SPDX-License-Identifier: Apache-2.0
"""Wan 2.1 I2V-14B-720P, a picture to video, with its official settings.

Run:      lvjax generate --config wan2_1_i2v_14b_720p --model FOLDER \
            --image photo.jpg --prompt "..."
Expects:  in FOLDER the files of Wan-AI/Wan2.1-I2V-14B-720P or its -Diffusers twin, or what
  `lvjax convert` made of them.  81 frames at 16 frames/s, in the picture's shape, with about as
  many pixels as 1280x720.
"""

from ml_collections import ConfigDict

from lvjax.run.presets import run_settings


def get_config() -> ConfigDict:
    return ConfigDict(run_settings("wan2.1-i2v-14b"))
