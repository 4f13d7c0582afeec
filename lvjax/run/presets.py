# SPDX-License-Identifier: Apache-2.0
"""The official settings of each released Wan, and which of them a model is, by its structure.

Source: Wan-Video/Wan2.1 and Wan-Video/Wan2.2: wan/configs/*.py, generate.py.
"""

from dataclasses import replace

from lvjax.models.config import DiTConfig
from lvjax.run.defaults import Defaults

SIZES = {
    "480p": (480, 832),
    "480p-portrait": (832, 480),
    "704p": (704, 1280),
    "704p-portrait": (1280, 704),
    "720p": (720, 1280),
    "720p-portrait": (1280, 720),
}
"""Named picture sizes, (height, width) in pixels."""

NEGATIVE = (
    "overexposed, washed-out colours, a still picture, frozen motion, blurred details, low "
    "quality, compression artefacts, subtitles, captions, watermark, deformed hands, fused "
    "fingers, deformed face, extra limbs, crowded background, walking backwards"
)
"""In the spirit of the official negative prompt, a list of the same faults in Chinese."""

WAN = Defaults(
    fps=16,
    size=SIZES["720p"],
    clip_latents=21,
    overlap=1,
    steps=50,
    shift=5.0,
    guidance=5.0,
    positions="absolute",
    fill="pixel",
    upscale=1,
    method="wan",
    negative=NEGATIVE,
)
PRESETS = {
    "wan2.1-t2v-1.3b": replace(WAN, size=SIZES["480p"]),
    "wan2.1-t2v-14b": WAN,
    "wan2.1-i2v-14b": replace(WAN, steps=40),
    "wan2.1-i2v-14b-480p": replace(WAN, steps=40, size=SIZES["480p"], shift=3.0),
    "wan2.1-flf2v-14b": replace(WAN, shift=16.0),
    "wan2.2-t2v-a14b": replace(WAN, steps=40, shift=12.0, guidance=(3.0, 4.0), boundary=0.875),
    "wan2.2-i2v-a14b": replace(WAN, steps=40, guidance=(3.5, 3.5), boundary=0.9),
    "wan2.2-ti2v-5b": replace(WAN, fps=24, size=SIZES["704p"], clip_latents=31, impose=True),
}
SMALL = 2048  # widths up to here have the settings of the 1.3B model
TI2V_CHANNELS = 48


def preset_of(dit: DiTConfig, experts: int) -> str:
    """The preset for a model with this transformer, and as many of them.

    Width and depth do not matter but for text to video, so that small models of the same structure
    have their preset too.
    """
    image = dit.condition_channels > 0
    if experts == 2:
        return "wan2.2-i2v-a14b" if image else "wan2.2-t2v-a14b"
    if dit.in_channels == TI2V_CHANNELS:
        return "wan2.2-ti2v-5b"
    if dit.image_pos_len:
        return "wan2.1-flf2v-14b"
    if image:
        return "wan2.1-i2v-14b"
    return "wan2.1-t2v-1.3b" if dit.dim <= SMALL else "wan2.1-t2v-14b"
