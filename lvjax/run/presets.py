# SPDX-License-Identifier: Apache-2.0
"""The official settings of each released Wan, and which of them a model is, by its structure.

Source: Wan-Video/Wan2.1 and Wan-Video/Wan2.2: wan/configs/*.py, generate.py.
"""

import math
from dataclasses import asdict, replace
from typing import Any

from lvjax.models.config import (
    WAN_2_2_I2V_A14B,
    WAN_2_2_TI2V_5B,
    WAN_FLF2V_14B,
    WAN_I2V_14B,
    WAN_T2V_1_3B,
    WAN_T2V_14B,
    DiTConfig,
)
from lvjax.rollout.condition import pixel_frames
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

SHAKE, CUT = "camera shake", "scene cut"  # what the officials put before it for some models

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
WAN_I2V = replace(WAN, steps=40, negative=f"{SHAKE}, {NEGATIVE}")
PRESETS = {
    "wan2.1-t2v-1.3b": replace(WAN, size=SIZES["480p"]),
    "wan2.1-t2v-14b": WAN,
    "wan2.1-i2v-14b": WAN_I2V,
    "wan2.1-i2v-14b-480p": replace(WAN_I2V, size=SIZES["480p"], shift=3.0),
    "wan2.1-flf2v-14b": replace(WAN, shift=16.0, negative=f"{CUT}, {SHAKE}, {NEGATIVE}"),
    "wan2.2-t2v-a14b": replace(WAN, steps=40, shift=12.0, guidance=(3.0, 4.0), boundary=0.875),
    "wan2.2-i2v-a14b": replace(WAN, steps=40, guidance=(3.5, 3.5), boundary=0.9),
    "wan2.2-ti2v-5b": replace(WAN, fps=24, size=SIZES["704p"], clip_latents=31, impose=True),
}
"""Wan 2.1's image-to-video weights for 480p and for 720p have the same shapes: only a name or a
config tells them apart."""

FOR_480P = "-480p"  # the end of the name of a preset for smaller pictures

MODELS = {
    "wan2.1-t2v-1.3b": WAN_T2V_1_3B,
    "wan2.1-t2v-14b": WAN_T2V_14B,
    "wan2.1-i2v-14b": WAN_I2V_14B,
    "wan2.1-flf2v-14b": WAN_FLF2V_14B,
    "wan2.2-t2v-a14b": WAN_T2V_14B,
    "wan2.2-i2v-a14b": WAN_2_2_I2V_A14B,
    "wan2.2-ti2v-5b": WAN_2_2_TI2V_5B,
}
"""The transformers that were released; those of A14B are two experts each."""

_BOTH = tuple(SIZES[name] for name in ("720p", "720p-portrait", "480p", "480p-portrait"))
OFFICIAL_SIZES = {
    "wan2.1-t2v-1.3b": _BOTH[2:],
    "wan2.1-t2v-14b": _BOTH,
    "wan2.1-i2v-14b": _BOTH,
    "wan2.1-i2v-14b-480p": _BOTH,
    "wan2.1-flf2v-14b": _BOTH,
    "wan2.2-t2v-a14b": _BOTH,
    "wan2.2-i2v-a14b": _BOTH,
    "wan2.2-ti2v-5b": (SIZES["704p"], SIZES["704p-portrait"]),
}
"""What the official command line takes, (height, width); with a picture, any shape of these areas.
"""

NEAR = 0.15  # how far from such an area a size may be: its sides are rounded down
SMALL = 2048  # widths up to here have the settings of the 1.3B model
TI2V_CHANNELS = 48


def preset_of(dit: DiTConfig, experts: int) -> str:
    """The preset for a model with this transformer, and as many of them.

    Width and depth do not matter but for text to video, so that small models of the same structure
    have their preset too.
    """
    image = dit.condition_channels > 0
    if experts == 2 or (image and dit.image_dim is None):  # also one of the experts, alone
        return "wan2.2-i2v-a14b" if image else "wan2.2-t2v-a14b"
    if dit.in_channels == TI2V_CHANNELS:
        return "wan2.2-ti2v-5b"
    if dit.image_pos_len:
        return "wan2.1-flf2v-14b"
    if image:
        return "wan2.1-i2v-14b"
    return "wan2.1-t2v-1.3b" if dit.dim <= SMALL else "wan2.1-t2v-14b"


def presets_of(dit: DiTConfig, experts: int) -> tuple[str, ...]:
    """Every preset that fits such a model; the first is the one that its structure tells."""
    name = preset_of(dit, experts)
    return (name, *(other for other in PRESETS if other == f"{name}{FOR_480P}"))


def run_settings(name: str) -> dict[str, Any]:
    """What a config of `lvjax generate` says for a preset: its defaults, the length and size of the
    official run, and what else is often set.

    Where there is a picture no size is said, so that the video has the picture's shape.
    """
    d = PRESETS[name]
    image = d.impose or "i2v" in name or "flf2v" in name
    named = next(word for word, size in SIZES.items() if size == d.size)
    return {
        "model": None,
        "prompt": None,
        "image": None,
        "last_image": None,
        "size": None if image else named,
        "frames": pixel_frames(d.clip_latents),
        "seed": 0,
        "defaults": asdict(d),
    }


def size_notices(name: str, dit: DiTConfig, d: Defaults, size: tuple[int, int]) -> list[str]:
    """What the user should know about pictures of this (height, width) by a released model."""
    known = OFFICIAL_SIZES.get(name)
    if known is None:
        return []

    def near(other: tuple[int, int]) -> bool:
        return abs(math.prod(size) / math.prod(other) - 1) <= NEAR

    any_shape = dit.condition_channels > 0 or d.impose
    if size not in known and not (any_shape and any(map(near, known))):
        sizes = " or ".join(f"{w}x{h}" for h, w in known)
        shapes = ", or other shapes of such areas" if any_shape else ""
        return [f"{name} was made for {sizes}{shapes}; {size[1]}x{size[0]} may look worse"]
    small = PRESETS.get(f"{name}{FOR_480P}")
    if small is not None and near(small.size) and d.shift != small.shift:
        return [
            f"{name} is officially sampled with shift {small.shift:g} at this size, here with "
            f"{d.shift:g}; add --set defaults.shift={small.shift:g}, or use the 480p config"
        ]
    return []
