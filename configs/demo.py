# SPDX-License-Identifier: Apache-2.0
"""A minute of video from a real photograph and four prompts, with the pocket model.

Run:      lvjax generate --config demo --out demo.mp4        (`make demo` does this)
Expects:  481 frames at 8 frames/s: a pan over the mountains, a red circle crossing, a pan upwards,
  a zoom out with a blue square.
"""

from importlib import resources

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "image": str(resources.files("lvjax") / "assets" / "photos" / "mountains.jpg"),
            "prompt": [
                "the camera pans left over a landscape",
                "the camera is still over a landscape, a red circle moves right",
                "the camera pans up over a landscape",
                "the camera zooms out over a landscape, a blue square moves down",
            ],
            "seconds": 60.0,
            "seed": 1,
        }
    )
