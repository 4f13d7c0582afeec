# SPDX-License-Identifier: Apache-2.0
"""`lvjax convert --base`: a LoRA of any family as a file that ComfyUI, diffusers and others read.

What it holds is what lvjax would put beside the model, under official names; nothing is rounded.
"""

import os
import sys
from pathlib import Path

from checkpoints_convert.export_lora import lora_arrays, write_lora
from lvjax.cli.drive import note
from lvjax.core.errors import InputError
from lvjax.run import lock
from lvjax.run.adapters import Adapter, Asked, open_adapter
from lvjax.run.bundle import outline

OTHERS = {"part": None, "dtype": "keep", "format": "safetensors", "weights": None, "to": None}
OTHERS |= {"verify": False, "keep_unused": False}
"""Options of `lvjax convert` that say nothing of a LoRA, and what they are when not given."""
NAMES = {"dit": "high", "dit_low": "low"}


def convert_lora(src: Path, dst: Path, args) -> int:
    """Write the LoRA `src` into the folder `dst`: one file, or one for each expert where `src` has
    one for each.

    Raises: CheckpointError when it does not belong to the model; InputError for options of other
      conversions, and where a file is that may not be replaced; StorageError.
    """
    if wrong := [name for name, usual in OTHERS.items() if getattr(args, name) != usual]:
        option = wrong[0].replace("_", "-")
        raise InputError(f"--{option} is not for LoRAs; leave it out with --base")
    sizes = outline(args.base)
    adapter = open_adapter(Asked(src), sizes.dit, sizes.experts)
    files = _files(adapter, dst, src.name if src.is_dir() else src.stem)
    with lock.hold(dst, "DST"):
        for path in files:
            if os.path.realpath(path) == os.path.realpath(src):
                raise InputError(f"{path} is SRC; choose another DST")
            if path.exists() and not args.overwrite:
                raise InputError(f"{path} is there; use --overwrite, or another DST")
        dst.mkdir(parents=True, exist_ok=True)
        for path, lora in files.items():
            write_lora(path, lora_arrays(lora, sizes.dit))
    if adapter.notice is not None:
        note(adapter.notice)
    used = adapter.arrays - len(adapter.unmatched)
    made = ", ".join(map(str, files))
    print(f"LoRA ({used} of {adapter.arrays} arrays): {src} -> {made}", file=sys.stderr)
    return 0


def _files(adapter: Adapter, dst: Path, stem: str) -> dict:
    """What is written where; both experts have the same adapters unless the file has two."""
    loras = {id(lora): lora for lora in adapter.parts.values()}
    if len(loras) == 1:
        return {dst / f"{stem}.safetensors": lora for lora in loras.values()}
    parts = adapter.parts.items()
    return {dst / f"{stem}.{NAMES[part]}.safetensors": lora for part, lora in parts}
