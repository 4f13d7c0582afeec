# SPDX-License-Identifier: Apache-2.0
"""A LoRA on the disk: the arrays, the settings that lie with them, and whose they are.

Owns: finding the settings (in a safetensors header, or PEFT's adapter_config.json beside the file),
telling the LoRAs of two experts in one file apart.  Does not own: what arrays and settings mean
(lora.py).
Sources: huggingface/diffusers, src/diffusers/loaders/lora_base.py; huggingface/peft,
src/peft/utils/constants.py; huggingface/finetrainers, finetrainers/trainer/sft_trainer/trainer.py.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints_convert.files import decode
from checkpoints_convert.lora import METADATA, read_lora
from checkpoints_convert.read import Tensors, beside, find, open_tensors
from lvjax.core.errors import CheckpointError, InputError
from lvjax.models.config import DiTConfig
from lvjax.models.lora import Lora
from lvjax.models.parts import EXPERTS

BESIDE = "adapter_config.json"  # PEFT's, in the folder of the arrays
TRAINER = "lora_config"  # finetrainers' entry in a safetensors header
META, KIND, EXPERT = "meta", "kind", "expert"  # what lvjax writes into a safetensors header
SECOND = "transformer_2."  # what diffusers puts before the names of the low-noise expert


class LoraFile(NamedTuple):
    """path: of the arrays.  files: all that decide what it is.  config: its settings."""

    path: Path
    files: tuple[Path, ...]
    tensors: Tensors
    config: Mapping[str, Any]

    @property
    def expert(self) -> str | None:
        """Which of two experts it is for: "low" or "high" noise, or "both", with a LoRA for each;
        None where neither its names nor its header says it.

        Raises: CheckpointError for a header that is damaged.
        """
        if any(name.startswith(SECOND) for name in self.tensors):
            return "both" if any(n.startswith("transformer.") for n in self.tensors) else "low"
        try:
            said = json.loads(self.tensors.metadata.get(META, "{}"))
        except ValueError as e:
            raise CheckpointError(f"{self.path}: its entry {META!r} is damaged") from e
        said = said.get(EXPERT) if isinstance(said, dict) and said.get(KIND) == "lora" else None
        return said if said in tuple(EXPERTS) else None


def open_lora(source) -> LoraFile:
    """A LoRA: a file, or a folder with one.  Settings in the file come before those beside it.

    Raises: CheckpointError saying what is wrong with it.
    """
    path = find(Path(source))
    tensors = open_tensors(path, lora=True)
    files = tuple(file for file, _ in tensors.files())
    header = tensors.metadata
    if METADATA in header:
        return LoraFile(path, files, tensors, {METADATA: header[METADATA]})
    if TRAINER in header:
        try:
            return LoraFile(path, files, tensors, decode(header[TRAINER].encode()))
        except ValueError as e:
            raise CheckpointError(f"{path}: its entry {TRAINER} is damaged; download it") from e
    if "lora_alpha" in header:
        return LoraFile(path, files, tensors, {"lora_alpha": header["lora_alpha"]})
    if config := beside(path, BESIDE):
        return LoraFile(path, (*files, path.parent / BESIDE), tensors, config)
    return LoraFile(path, files, tensors, {})


def read_parts(
    file: LoraFile, cfg: DiTConfig, parts: tuple[str, ...], expert: str | None = None
) -> dict[str, Lora]:
    """The adapters for each part of a model.

    parts: ("dit",), or ("dit", "dit_low") for two experts.  expert: the one that all of the file is
      for, "high" or "low"; None for what the file says, and both where it says nothing.  A file
      with a LoRA for each gives each its own.
    Raises: CheckpointError as `read_lora`, and when the file is for one or each of two experts and
      the model has one; InputError for an expert that the model does not have.
    """
    if expert is not None and (expert not in tuple(EXPERTS) or len(parts) == 1):
        allowed = "'high' or 'low'" if len(parts) > 1 else "none: the model has one transformer"
        raise InputError(f"the expert of a LoRA is {expert!r}; allowed is {allowed}")
    own = file.expert
    if own is not None and len(parts) == 1:
        which = {"both": "each", "high": "the first", "low": "the second"}[own]
        what = f"for {which} of two experts"
        raise CheckpointError(
            f"{file.path} holds a LoRA {what}, the model has one transformer; give a LoRA of this "
            "model"
        )
    named = EXPERTS.get(own if expert is None else expert)
    wanted = parts if named is None else (named,)
    if own == "both":
        return {part: _half(file, cfg, part == EXPERTS["low"]) for part in wanted}
    lora = read_lora(file.tensors, file.config, cfg, str(file.path))
    return dict.fromkeys(wanted, lora)


def _half(file: LoraFile, cfg: DiTConfig, low: bool) -> Lora:
    """The LoRA of one expert out of a file for both."""
    arrays = {n: file.tensors[n] for n in file.tensors if n.startswith(SECOND) == low}
    config = file.config
    if METADATA in config:
        try:
            packed = decode(config[METADATA].encode())
        except ValueError as e:
            raise CheckpointError(f"{file.path}: its entry {METADATA} is damaged") from e
        own = {key: v for key, v in packed.items() if key.startswith(SECOND) == low}
        config = {METADATA: json.dumps(own)}
    return read_lora(arrays, config, cfg, str(file.path))
