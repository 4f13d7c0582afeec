# SPDX-License-Identifier: Apache-2.0
"""Wan 2.2 TI2V-5B, text or a picture to video, with its official settings.

Run:      lvjax generate --config wan2_2_ti2v_5b --model FOLDER --prompt "..."
Expects:  in FOLDER the files of Wan-AI/Wan2.2-TI2V-5B or its -Diffusers twin, or what `lvjax
  convert` made of them.  121 frames of 1280x704 at 24 frames/s; with --image photo.jpg it
  starts from the picture, in its shape, with about as many pixels.
"""

from ml_collections import ConfigDict

from lvjax.run.presets import run_settings


def get_config() -> ConfigDict:
    return ConfigDict(run_settings("wan2.2-ti2v-5b"))
