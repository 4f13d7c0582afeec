# SPDX-License-Identifier: Apache-2.0
"""`lvjax convert`: published Wan weights to lvjax weights, and back.

SRC is a checkpoint (.safetensors, a sharded index, .pth, .pt) or the folder of a whole model, as
its publishers or diffusers lay it out.  In DST each part has its weights (dit.safetensors, or a
folder dit for --format orbax) and a report that proves the conversion (dit.report.json); together
they are a model that `lvjax.load` and `lvjax generate --model DST` take.  A run that was
interrupted goes on when it is started again.
"""

import argparse
import json
import os
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

from checkpoints_convert.convert import TYPES, part_kinds, report, source_facts, write_part
from checkpoints_convert.read import read_json
from checkpoints_convert.recognise import check_together
from checkpoints_convert.sources import Source, find_sources
from checkpoints_convert.unused import unused_path, write_unused
from lvjax.cli.convert_back import bar, convert_back
from lvjax.cli.convert_lora import convert_lora
from lvjax.core.checkpoint import Stored, write_atomic
from lvjax.core.errors import CheckpointError, InputError
from lvjax.core.orbax_layout import OWN
from lvjax.core.streaming import TARGETS, clean, open_stored, remove, total_bytes
from lvjax.data.tokenizer import load_tokenizer
from lvjax.models.parts import PARTS, stored_part
from lvjax.run import lock
from lvjax.run.bundle import MODEL, TOKENIZER, describe, part_path, part_places, transformers
from lvjax.run.fingerprint import check_fingerprint
from lvjax.run.presets import PRESETS, presets_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", metavar="SRC", help="a checkpoint, or the folder of a model")
    parser.add_argument("dst", metavar="DST", help="folder for the weights and their reports")
    parser.add_argument("--part", choices=PARTS, help="only this part; dit_low: the second expert")
    parser.add_argument(
        "--dtype",
        choices=("keep", *TYPES),
        default="keep",
        help="of the weights (default: as stored); a half precision leaves out norms, modulation, "
        "time embedding, head and autoencoder, as the published runs do",
    )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="the official settings that the model is used with (default: what its structure "
        "tells; some models differ only in these)",
    )
    parser.add_argument("--format", choices=tuple(TARGETS), default="safetensors")
    parser.add_argument("--weights", metavar="NAME", help="which weights of a .pt file to take")
    parser.add_argument(
        "--keep-unused",
        action="store_true",
        help="write what the model does not use into a file of its own, for the way back",
    )
    parser.add_argument(
        "--to",
        choices=("official", "diffusers"),
        help="the way back: SRC is what `lvjax convert` wrote, DST gets this layout",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="run each part once at a small size; compare with its report, or note it there",
    )
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="SRC is a LoRA for this model; DST gets it under the names that most programs read",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace other weights in DST")


def run(args) -> int:
    for name, text in (("SRC", args.src), ("DST", args.dst), ("--base", args.base)):
        if text == "":
            raise InputError(f"{name} is empty; give a name, . for the current folder")
    src, dst = Path(args.src), Path(args.dst)
    if os.path.islink(dst) and not dst.exists():
        raise InputError(f"DST {dst} is a link to nothing; give a folder")
    if not os.path.lexists(src):
        raise CheckpointError(f"no such file or folder: {src}; give a checkpoint or its folder")
    if dst.exists() and not dst.is_dir():
        raise InputError(f"DST {dst} is a file; give a folder")
    if args.base is not None:
        return convert_lora(src, dst, args)
    if args.to is not None:
        return convert_back(src, dst, args)
    sources, left = find_sources(src, args.part, args.weights)
    for line in left:
        print(f"lvjax: {line}", file=sys.stderr)
    kinds = {s.part: part_kinds(s.model, s.model.plan(), args.dtype) for s in sources}
    with _new(dst), lock.hold(dst, "DST", inside=True):
        beside = _check_place(dst, sources)
        _check_preset(args.preset, beside)
        done = {s.part for s in sources if _is_there(s, dst, args)}
        tokenizer, lacks = _tokenizer(src, dst, sources, args.overwrite)
        for source in sources:
            _part(source, dst, args, source.part in done, total_bytes(kinds[source.part]))
        if tokenizer is not None:
            write_atomic(dst / TOKENIZER, tokenizer.encode())
        describe(dst, args.preset)
    if lacks:
        print(f"lvjax: the text encoder has no tokenizer yet: {lacks}", file=sys.stderr)
    return 0


@contextmanager
def _new(dst: Path):
    """A folder that was not there, and stays empty inside, is gone afterwards."""
    made = not dst.exists()
    try:
        yield
    finally:
        if made:
            with suppress(OSError):
                dst.rmdir()


def _check_preset(preset: str | None, configs: dict) -> None:
    """Raises: InputError for a preset that the model which DST becomes does not have."""
    if preset is None:
        return
    if "dit" not in configs:
        raise InputError("--preset is for a model with its transformer; leave it out")
    fits = presets_of(configs["dit"], len(transformers(configs)))
    if preset not in fits:
        raise InputError(f"--preset {preset} is of another structure; give {' or '.join(fits)}")


def _check_place(dst: Path, sources: list[Source]) -> dict:
    """Whether DST may get these parts, whatever --overwrite says; the sizes of all that it will
    have, by part.

    Raises: InputError when that would replace SRC, or what lvjax did not write; CheckpointError
      when the parts do not belong to those that are there.
    """
    if (model := dst / MODEL).exists():
        keys = _keys_of(model)
        if not {"name", "defaults"} <= keys or "dit" in keys:
            raise InputError(f"{model} is not of a converted model; choose another DST")
    taken = [os.path.realpath(file) for s in sources for file, _ in s.model.tensors.files()]
    ours = {s.part: s.model.cfg for s in sources}
    beside = {}
    for part in PARTS:
        for path in part_places(dst, part):
            real = os.path.realpath(path)
            if any(file == real or file.startswith(real + os.sep) for file in taken):
                raise InputError(f"{path} is part of SRC; choose another DST")
            if path.is_dir() and not (path / OWN).is_file():
                raise InputError(f"{path} is a folder of others; choose another DST")
            if part not in ours:
                beside[part] = stored_part(open_stored(path))[1]
    check_together(beside | ours)
    return beside | ours


def _keys_of(model: Path) -> set[str]:
    """What a model.json in DST says something of.

    Raises: CheckpointError when it is damaged.
    """
    try:
        return set(read_json(model))
    except CheckpointError as e:
        raise CheckpointError(f"{model} is damaged; remove it, it is written again") from e


def _is_there(source: Source, dst: Path, args) -> bool:
    """Whether the part has been converted before; nothing but its metadata is read.

    Raises: InputError when something else is in its place, and may not be replaced.
    """
    path = part_path(dst, source.part, TARGETS[args.format].suffix)
    there = part_places(dst, source.part)
    same = path in there and _same(source, path, args.dtype)
    other = [p for p in there if p != path or not same]
    if other and not args.overwrite:
        raise InputError(
            f"{other[0]} is there and is not of this conversion; use --overwrite, or another DST"
        )
    return same


def _same(source: Source, path: Path, dtype: str) -> bool:
    """Whether `path` is what this conversion writes, as its report says."""
    try:
        facts, stored = read_json(_report(path.parent, source.part)), open_stored(path)
        sums = {name: int(a["crc32"], 16) for name, a in facts["arrays"].items()}
        known = source_facts(source.model.tensors)
        files = {name: facts["source"][name] for name in known}
        same = stored_part(stored) == (source.part, source.model.cfg)
    except (ValueError, KeyError, TypeError, AttributeError, CheckpointError):
        return False
    same = same and facts.get("dtype") == dtype and files == known
    return same and sums == {name: slot.crc for name, slot in stored.slots.items()}


def _report(dst: Path, part: str) -> Path:
    return dst / f"{part}.report.json"


def _facts(source: Source, stored: Stored, args) -> dict:
    """The report of a part that is there: what `_same` has compared tells all of it but the
    fingerprint.  Whatever else the file says is written again.
    """
    path, known = _report(stored.path.parent, source.part), source_facts(source.model.tensors)
    sums, found = {name: slot.crc for name, slot in stored.slots.items()}, read_json(path)
    kept = {name: found[name] for name in ("lvjax", "finite", "fingerprint") if name in found}
    facts = report(source.model, source.part, args.dtype, sums, known)
    facts = json.loads(json.dumps(facts)) | kept
    if facts != found:
        _save(path, facts)
    return facts


def _part(source: Source, dst: Path, args, done: bool, size: int) -> None:
    """One part of a model; `done`: it is there, and is checked only."""
    part = source.part
    path = part_path(dst, part, TARGETS[args.format].suffix)
    title = f"{part} {source.path.name}"
    if done and not _is_sound(path, args.overwrite):
        done = False
    if not done:
        with bar(size, title) as shown:
            write_part(
                source.model,
                path,
                part=part,
                dtype=args.dtype,
                fmt=args.format,
                progress=shown.update,
                tell=lambda facts: _save(_report(dst, part), facts),
            )
        remove(unused_path(dst, part))  # of the weights before
    clean(path)
    for target in TARGETS.values():
        if (other := part_path(dst, part, target.suffix)) != path:
            remove(other)
    stored = open_stored(path)
    facts = _facts(source, stored, args)
    kept = write_unused(source.model, stored, dst) if args.keep_unused else None
    if args.verify:
        noted = check_fingerprint(stored, facts)
        _save(_report(dst, part), facts | {"fingerprint": noted})
    _tell(source, path, facts, kept)


def _is_sound(path: Path, overwrite: bool) -> bool:
    """Whether every array of a part is what its checksum says.

    Raises: CheckpointError when one is not, unless it may be written again.
    """
    try:
        open_stored(path).check()
    except CheckpointError:
        if not overwrite:
            raise
        return False
    return True


def _tell(source: Source, path: Path, facts: dict, kept: Path | None) -> None:
    n = facts["source"]
    rest = len(n["unused"]) + len(n["copies"])
    where = f", {rest} of them not needed" if rest else ""
    where += f" and kept in {kept.name}" if kept else ""
    chosen = "" if source.expert is None else f"the {source.expert}-noise expert by its name, "
    chosen += "" if n["weights"] is None else f"weights {n['weights']!r}, "
    print(
        f"{source.part} ({chosen}{facts['naming']} naming, {facts['parameters'] / 1e6:.1f} M "
        f"parameters, {n['used'] + rest} of {n['arrays']} arrays accounted for{where}): "
        f"{source.path} -> {path}",
        file=sys.stderr,
    )


def _tokenizer(src: Path, dst: Path, sources: list[Source], overwrite: bool):
    """The text encoder's tokenizer, if it lies beside it and is not in DST yet, else None; and why
    there will be none, if so.

    Raises: InputError when another one is in DST, and may not be replaced.
    """
    vocab = [s.model.cfg.vocab for s in sources if s.part == "text"]
    if not vocab:
        return None, ""
    try:
        text = load_tokenizer(src if src.is_dir() else src.parent, vocab[0]).to_str()
    except CheckpointError as e:
        return None, "" if (dst / TOKENIZER).exists() else str(e)
    path = dst / TOKENIZER
    with suppress(CheckpointError):
        if path.exists() and load_tokenizer(path, vocab[0]).to_str() == text:
            return None, ""
    if path.exists() and not overwrite:
        raise InputError(f"{path} is there and is another; use --overwrite, or another DST")
    return text, ""


def _save(report: Path, facts: dict) -> None:
    write_atomic(report, (json.dumps(facts, indent=1) + "\n").encode())
