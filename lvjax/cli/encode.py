# SPDX-License-Identifier: Apache-2.0
"""`lvjax encode`: prompts read once, for machines that have no text encoder; or, with --videos, a
dataset for training (encode_videos.py).

In FOLDER the text encoder and its tokenizer suffice.  The file holds the prompts, the negative
prompts that Wan's models have by default, and --negative-prompt; it serves every model of the same
text encoder, which is every released Wan: `lvjax generate --embeddings FILE`.
"""

import argparse
import sys
from pathlib import Path

from lvjax.cli import encode_videos
from lvjax.cli.drive import note
from lvjax.cli.names import check_names
from lvjax.core.checkpoint import load_meta
from lvjax.core.compat import enable_compilation_cache
from lvjax.core.errors import CheckpointError, InputError, one_line
from lvjax.data.captions import read_lines
from lvjax.run import lock
from lvjax.run.encoders import encode_prompts, notices, save_embeddings
from lvjax.run.text_folder import open_text

SHOWN = 8  # prompts whose tokens are told


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", metavar="FOLDER", required=True, help="of prompts, its text encoder suffices")
    add("--prompt", action="append", default=[], metavar="TEXT", help="repeat it for several")
    add("--prompt-file", metavar="FILE", help="prompts, one per line")
    add("--negative-prompt", metavar="TEXT", help="what guidance leads away from, if not as usual")
    add("--out", metavar="PLACE", help="default: prompts.safetensors; of videos, a folder")
    add("--overwrite", action="store_true", help="replace prompts that are already there")
    encode_videos.add_arguments(parser)


def run(args) -> int:
    enable_compilation_cache()
    encode_videos.check_alone(args)
    if args.videos is not None:
        return encode_videos.run(args)
    check_names(**{"--model": args.model, "--prompt-file": args.prompt_file, "--out": args.out})
    output = Path("prompts.safetensors" if args.out is None else args.out)
    prompts = args.prompt + (read_lines(args.prompt_file) if args.prompt_file is not None else [])
    if not prompts or not all(text.strip() for text in prompts):
        what = "a prompt is empty" if prompts else "no prompt is given"
        raise InputError(f"{what}; give --prompt TEXT, or --prompt-file FILE with one per line")
    _check_output(output, args.overwrite)
    model = open_text(Path(args.model))
    negative = [] if args.negative_prompt is None else [args.negative_prompt]
    texts = list(dict.fromkeys([*prompts, *negative, *model.negatives]))
    with lock.hold(output):
        for notice in notices(model, texts):
            note(notice)
        rows = encode_prompts(model, texts)
        _check_output(output, args.overwrite)
        save_embeddings(output, rows, model.name, model.parts["text"])
    tokens = [str(len(rows[text])) for text in prompts]
    shown = ", ".join(tokens[:SHOWN]) + ", ..." * (len(tokens) > SHOWN)
    said = (
        f"{len(prompts)} prompt{'s' * (len(prompts) > 1)} ({shown} tokens) and "
        f"{len(texts) - len(set(prompts))} negative ones, {model.text.dim} wide: {output}"
    )
    print(one_line(said), file=sys.stderr)
    return 0


def _check_output(output: Path, overwrite: bool) -> None:
    """Raises: InputError when something is there that may not be replaced, or cannot be written."""
    if output.suffix != ".safetensors":
        raise InputError(f"--out is {output}; it must end in .safetensors")
    if not output.parent.is_dir():
        raise InputError(f"{output.parent} is no folder; make it, or choose another --out")
    if not output.exists():
        return
    try:
        kind = load_meta(output).get("kind")
    except CheckpointError:
        kind = None
    if kind != "embeddings":
        raise InputError(f"{output} is there and holds no prompts of ours; choose another --out")
    if not overwrite:
        raise InputError(f"{output} already exists; choose another --out or add --overwrite")
