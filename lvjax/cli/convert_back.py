# SPDX-License-Identifier: Apache-2.0
"""`lvjax convert --to`: lvjax's parts laid out as Wan's own code, or diffusers, has them."""

import sys
from pathlib import Path

from tqdm import tqdm

from checkpoints_convert.export import (
    PICKLED,
    TOKENIZERS,
    check_free,
    export_part,
    other_texts,
    plan_export,
)
from checkpoints_convert.pipeline_json import INDEX, pipeline_texts, tokenizer_texts
from lvjax.cli.drive import note
from lvjax.core.checkpoint import Stored, write_atomic
from lvjax.core.errors import CheckpointError, InputError
from lvjax.core.streaming import open_stored
from lvjax.data.tokenizer import load_tokenizer
from lvjax.models.parts import EXPERTS, PARTS, stored_part
from lvjax.run import lock
from lvjax.run.bundle import (
    MODEL,
    TOKENIZER,
    described,
    is_own,
    open_parts,
    part_places,
    transformers,
)
from lvjax.run.presets import PRESETS, preset_of


def bar(size: int, title: str) -> tqdm:
    """A progress bar of `size` bytes on stderr."""
    return tqdm(total=size, unit="B", unit_scale=True, desc=title, disable=None)


def convert_back(src: Path, dst: Path, args) -> int:
    """Write what `lvjax convert` wrote into `src`, a folder or one of its parts, as `args.to` has
    it; of a whole model also what lies beside the parts.

    Raises: InputError for options of the way there, and where something else is in the place;
      CheckpointError when a part is damaged, or there is none; StorageError.
    """
    given = {"--dtype": args.dtype != "keep", "--format": args.format != "safetensors"}
    given |= {"--weights": args.weights, "--keep-unused": args.keep_unused, "--verify": args.verify}
    given |= {"--preset": args.preset}
    if wrong := [option for option, is_given in given.items() if is_given]:
        raise InputError(f"{wrong[0]} is not for the way back; leave it out with --to")
    one = not src.is_dir() or is_own(src)
    parts = [open_stored(src)] if one else _chosen(src, args.part)
    if one and args.part not in (None, name := stored_part(parts[0])[0]):
        raise InputError(f"{src} is the part {name}; leave --part {args.part} out")
    low = part_places(src.parent if one else src, EXPERTS["low"])
    experts = len(transformers((EXPERTS["low"],) if low else ()))
    plans = [plan_export(stored, dst, args.to, experts=experts) for stored in parts]
    texts = {} if one else {dst / name: text for name, text in _beside(src, parts, args).items()}
    if there := next((p for part in PARTS for p in part_places(dst, part) if is_own(p)), None):
        raise InputError(f"{there} is a part of a model of lvjax's; choose another DST")
    with lock.hold(dst, "DST", inside=True):
        check_free(other_texts(texts), args.overwrite)
        for stored, plan in zip(parts, plans, strict=True):
            if plan.left_out:
                note(f"{len(plan.left_out)} unused arrays of {stored.path} have no place in this "
                     "naming")  # fmt: skip
            with bar(plan.size, stored.path.name) as shown:
                files = export_part(stored, plan, overwrite=args.overwrite, progress=shown.update)
            print(f"{stored.path} -> {', '.join(map(str, files))}", file=sys.stderr)
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, text)
    _say(args.to, {stored_part(s)[0]: p.stem for s, p in zip(parts, plans, strict=True)}, texts)
    return 0


def _say(layout: str, stems: dict[str, str], texts: dict) -> None:
    """What the user has to do where lvjax's files are not enough.  stems: of the files by part."""
    if layout == "official" and (pickled := [stems[part] for part in PICKLED if part in stems]):
        note(
            f"Wan's own code reads {', '.join(f'{stem}.pth' for stem in pickled)}, PyTorch files, "
            "which lvjax does not write: load these with safetensors.torch.load_file and save them "
            "with torch.save"
        )
    if any(path.name == INDEX for path in texts) and "text" not in stems:
        note(
            "there is no text encoder: give text_encoder=None, tokenizer=None to from_pretrained, "
            "and prompt_embeds to the pipeline"
        )


def _chosen(src: Path, part: str | None) -> list[Stored]:
    """The parts in a folder that are asked for.  Raises: CheckpointError when there is none."""
    found = open_parts(src)
    chosen = [found[name] for name in PARTS if name in found and part in (None, name)]
    if not chosen:
        raise CheckpointError(f"{src} holds no part that `lvjax convert` wrote; give its folder")
    return chosen


def _beside(src: Path, parts: list[Stored], args) -> dict[str, bytes]:
    """The small files of a model, by path: of its text encoder the tokenizer, and of a pipeline of
    diffusers what ties its parts together.
    """
    configs, texts = dict(map(stored_part, parts)), {}
    if "text" in configs and (src / TOKENIZER).is_file():
        text = load_tokenizer(src / TOKENIZER, configs["text"].vocab).to_str()
        texts = tokenizer_texts(text, TOKENIZERS[args.to], configs["text"].length)
    if args.to == "diffusers" and {"dit", "vae"} <= configs.keys():
        if (src / MODEL).is_file():
            d = described(src).defaults
        else:
            d = PRESETS[preset_of(configs["dit"], len(transformers(configs)))]
        texts |= pipeline_texts(configs, bool(texts), d.shift, d.boundary, d.impose)
    return texts
