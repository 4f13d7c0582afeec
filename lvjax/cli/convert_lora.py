# SPDX-License-Identifier: Apache-2.0
"""`lvjax convert --base`: a LoRA of any family as a file that ComfyUI, diffusers and others read.

What it holds is what lvjax would put beside the model, under official names; nothing is rounded.
"""

import os
import sys
from pathlib import Path

from checkpoints_convert.export_lora import lora_arrays, write_lora
from checkpoints_convert.read import find
from lvjax.cli.drive import note
from lvjax.core.errors import InputError
from lvjax.models.parts import EXPERTS
from lvjax.run import lock
from lvjax.run.adapters import Adapter, Asked, open_adapter
from lvjax.run.bundle import MODEL, transformer

OTHERS = {"part": None, "dtype": "keep", "format": "safetensors", "weights": None, "to": None}
OTHERS |= {"verify": False, "keep_unused": False, "preset": None}
"""Options of `lvjax convert` that say nothing of a LoRA, and what they are when not given."""


def convert_lora(src: Path, dst: Path, args) -> int:
    """Write the LoRA `src` into the folder `dst`: one file, or one for each expert that it is for,
    where it is not the same for all.

    Raises: CheckpointError when it does not belong to the model; InputError for options of other
      conversions, and where a file is that may not be replaced; StorageError.
    """
    if wrong := [name for name, usual in OTHERS.items() if getattr(args, name) != usual]:
        option = wrong[0].replace("_", "-")
        raise InputError(f"--{option} is not for LoRAs; leave it out with --base")
    cfg, experts = transformer(args.base)
    adapter = open_adapter(Asked(src), cfg, experts)
    source = find(src)
    files = _files(adapter, experts, dst, src.resolve().name if src.is_dir() else src.stem)
    if (dst / MODEL).exists():
        raise InputError(f"DST {dst} is a model; give a folder for LoRAs")
    with lock.hold(dst, "DST", inside=True):
        for path in files:
            if os.path.realpath(path) == os.path.realpath(source):
                raise InputError(f"{path} is SRC; choose another DST")
            if path.exists() and not args.overwrite:
                raise InputError(f"{path} is there; use --overwrite, or another DST")
        dst.mkdir(parents=True, exist_ok=True)
        for path, (lora, expert) in files.items():
            write_lora(path, lora_arrays(lora, cfg), expert)
    if adapter.notice is not None:
        note(adapter.notice)
    used = adapter.arrays - len(adapter.unmatched)
    made = ", ".join(map(str, files))
    print(f"LoRA ({used} of {adapter.arrays} arrays): {src} -> {made}", file=sys.stderr)
    return 0


def _files(adapter: Adapter, experts: tuple[str, ...], dst: Path, stem: str) -> dict:
    """What is written where: adapters, and the expert that they alone are for, else None."""
    (first, *others), parts = adapter.parts.values(), adapter.parts
    if len(parts) == len(experts) and all(lora is first for lora in others):
        return {dst / f"{stem}.safetensors": (first, None)}
    names = {name: part for name, part in EXPERTS.items() if part in parts}
    return {
        dst / f"{stem.removesuffix(f'.{name}')}.{name}.safetensors": (parts[part], name)
        for name, part in names.items()
    }
