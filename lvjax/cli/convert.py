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
import sys
from pathlib import Path

from tqdm import tqdm

from checkpoints_convert.convert import TYPES, part_meta, source_files, write_part
from checkpoints_convert.export import export_part
from checkpoints_convert.sources import PARTS, Source, find_sources
from lvjax.core.checkpoint import write_atomic
from lvjax.core.errors import CheckpointError, InputError
from lvjax.core.streaming import TARGETS, open_stored
from lvjax.data.tokenizer import load_tokenizer
from lvjax.run import lock
from lvjax.run.bundle import describe, part_path
from lvjax.run.fingerprint import check_fingerprint


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
    parser.add_argument("--format", choices=tuple(TARGETS), default="safetensors")
    parser.add_argument("--weights", metavar="NAME", help="which weights of a .pt file to take")
    parser.add_argument(
        "--to",
        choices=("official", "diffusers"),
        help="the way back: SRC is what `lvjax convert` wrote, DST gets this naming",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="run each part once at a small size; compare with its report, or note it there",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace other weights in DST")


def run(args) -> int:
    src, dst = Path(args.src), Path(args.dst)
    if not src.exists():
        raise CheckpointError(f"no such file or folder: {src}; give a checkpoint or its folder")
    if args.to is not None:
        return _back(src, dst, args)
    sources, left = find_sources(src, args.part, args.weights)
    for line in left:
        print(f"lvjax: {line}", file=sys.stderr)
    for source in sources:
        source.model.plan()  # what does not fit is said before anything is written
    with lock.hold(dst, "DST"):
        for source in sources:
            _part(source, dst, args)
        text = [s.model.cfg for s in sources if s.part == "text"]
        if text and src.is_dir():
            _tokenizer(src, dst, text[0].vocab)
        describe(dst)
    return 0


def _part(source: Source, dst: Path, args) -> None:
    """One part of a model, unless it is there already."""
    path = part_path(dst, source.part, TARGETS[args.format].suffix)
    report = dst / f"{source.part}.report.json"
    if not _is_there(source, path, report, args):
        sizes = sum(source.model.tensors.nbytes(name) for name in source.model.tensors)
        title = f"{source.part} {source.path.name}"
        with tqdm(total=sizes, unit="B", unit_scale=True, desc=title, disable=None) as bar:
            write_part(
                source.model,
                path,
                part=source.part,
                dtype=args.dtype,
                fmt=args.format,
                progress=bar.update,
                tell=lambda facts: _save(report, facts),
            )
    facts = json.loads(report.read_text())
    if args.verify:
        _save(report, facts | {"fingerprint": check_fingerprint(open_stored(path), facts)})
    n = facts["source"]
    rest = f", {len(n['unused'])} not needed" if n["unused"] else ""
    print(
        f"{source.part} ({facts['naming']} naming, {facts['parameters'] / 1e6:.1f} M parameters, "
        f"{n['arrays']} of {n['arrays']} arrays accounted for{rest}): {source.path} -> {path}",
        file=sys.stderr,
    )


def _tokenizer(src: Path, dst: Path, vocab: int) -> None:
    """The text encoder's tokenizer, if it lies beside it."""
    try:
        tokenizer = load_tokenizer(src, vocab)
    except CheckpointError as e:
        print(f"lvjax: the text encoder has no tokenizer yet: {e}", file=sys.stderr)
        return
    write_atomic(dst / "tokenizer.json", tokenizer.to_str().encode())


def _save(report: Path, facts: dict) -> None:
    report.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(report, (json.dumps(facts, indent=1) + "\n").encode())


def _is_there(source: Source, path: Path, report: Path, args) -> bool:
    """Whether the part has been converted before; its arrays are then read and checked.

    Raises: InputError when something else is in its place, and may not be replaced.
    """
    other = [p for t in TARGETS.values() if (p := part_path(path.parent, source.part, t.suffix))]
    found = [p for p in other if p.exists()]
    if not found:
        return False
    if found == [path] and _same(source, path, report, args.dtype):
        open_stored(path).check()
        return True
    if not args.overwrite:
        raise InputError(
            f"{found[0]} is there and is not of this conversion; use --overwrite, or another DST"
        )
    return False


def _same(source: Source, path: Path, report: Path, dtype: str) -> bool:
    """Whether `path` is what this conversion writes, as its report says."""
    try:
        facts, stored = json.loads(report.read_text()), open_stored(path)
        sums = {name: int(a["crc32"], 16) for name, a in facts["arrays"].items()}
        files = facts["source"]["files"]
    except (OSError, ValueError, KeyError, TypeError, CheckpointError):
        return False
    wanted = json.loads(json.dumps(part_meta(source.model, source.part)))
    same = stored.meta == wanted and facts.get("dtype") == dtype
    same = same and files == source_files(source.model.tensors)
    return same and sums == {name: slot.crc for name, slot in stored.slots.items()}


def _back(src: Path, dst: Path, args) -> int:
    """From lvjax's parts to a checkpoint in another naming."""
    if src.is_dir() and not (src / "lvjax.json").is_file():
        found = [
            p
            for part in PARTS
            for t in TARGETS.values()
            if (p := part_path(src, part, t.suffix)).exists() and args.part in (None, part)
        ]
    else:
        found = [src]
    if not found:
        raise CheckpointError(f"{src} holds no part that `lvjax convert` wrote; give its folder")
    with lock.hold(dst, "DST"):
        for path in found:
            files = export_part(open_stored(path), dst, args.to)
            print(f"{path} -> {', '.join(map(str, files))}", file=sys.stderr)
    return 0
