# SPDX-License-Identifier: Apache-2.0
"""Wan 2.1 FLF2V-14B-720P, from one picture to another, with its official settings.

Run:      lvjax generate --config wan2_1_flf2v_14b --model FOLDER \
            --image first.jpg --last-image last.jpg --prompt "..."
Expects:  in FOLDER the files of Wan-AI/Wan2.1-FLF2V-14B-720P or its -diffusers twin, or what
  `lvjax convert` made of them.  81 frames at 16 frames/s, in the first picture's shape, with
  about as many pixels as 1280x720.
"""

from ml_collections import ConfigDict

from lvjax.run.presets import run_settings


def get_config() -> ConfigDict:
    return ConfigDict(run_settings("wan2.1-flf2v-14b"))
