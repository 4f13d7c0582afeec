# SPDX-License-Identifier: Apache-2.0
"""Wan 2.1 T2V-14B, text to video, with its official settings.

Run:      lvjax generate --config wan2_1_t2v_14b --model FOLDER --prompt "..."
Expects:  in FOLDER the files of Wan-AI/Wan2.1-T2V-14B or its -Diffusers twin, or what `lvjax
  convert` made of them.  81 frames of 1280x720 at 16 frames/s; --size 480p is official too.
"""

from ml_collections import ConfigDict

from lvjax.run.presets import run_settings


def get_config() -> ConfigDict:
    return ConfigDict(run_settings("wan2.1-t2v-14b"))
