# SPDX-License-Identifier: Apache-2.0
"""Wan 2.2 I2V-A14B, a picture to video by two experts, with its official settings.

Run:      lvjax generate --config wan2_2_i2v_a14b --model FOLDER \
            --image photo.jpg --prompt "..."
Expects:  in FOLDER the files of Wan-AI/Wan2.2-I2V-A14B or its -Diffusers twin, or what `lvjax
  convert` made of them.  81 frames at 16 frames/s, in the picture's shape, with about as many
  pixels as 1280x720.
"""

from ml_collections import ConfigDict

from lvjax.run.presets import run_settings


def get_config() -> ConfigDict:
    return ConfigDict(run_settings("wan2.2-i2v-a14b"))
