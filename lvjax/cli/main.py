# SPDX-License-Identifier: Apache-2.0
"""The `lvjax` command: subcommands, and how errors end.

Exit codes: 0 done, 2 bad input, 3 bad checkpoint, 4 does not fit in memory, 5 stopped on NaN, 6
disk, 7 in use by another run, 130/143 interrupted with the state saved.  One line on stderr;
tracebacks only with --debug.
"""

import argparse
import importlib
import os
import signal
import sys
import traceback

from lvjax.core.errors import (
    DoesNotFitError,
    LvjaxError,
    of_system,
    one_line,
)
from lvjax.core.signals import interruptible

COMMANDS = {
    "generate": "make a video from prompts, a photo or a video",
    "replay": "make a video again from its run card",
    "info": "what is here, or what a checkpoint, LoRA or video is",
    "train": "train a model from a config",
    "convert": "turn PyTorch Wan weights into lvjax weights",
    "encode": "prompts for machines without a text encoder, or videos for training",
    "lab": "run the experiments of a paper on the pocket world",
    "tune-trflow": "find the lower threshold of T-RFlow for a model",
}


class _Parser(argparse.ArgumentParser):
    """argparse, with errors as one line and exit code 2."""

    def error(self, message: str):
        self.exit(2, f"lvjax: {message}; see `{self.prog} --help`\n")


def build_parser(argv: list[str]) -> argparse.ArgumentParser:
    """The parser; only the command that `argv` names is imported."""
    parser = _Parser(prog="lvjax", description="Long video from the Wan family, in JAX.")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    for name, text in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks"
        )
        if name in argv:
            _module(name).add_arguments(sub)
    return parser


def _module(command: str):
    return importlib.import_module(f"lvjax.cli.{command.replace('-', '_')}")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    for stream in (sys.stdout, sys.stderr):  # a terminal may lack a letter of a prompt or a name
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with interruptible():
            args = build_parser(argv).parse_args(argv)
            return _module(args.command).run(args) or 0
    except LvjaxError as e:
        return _end(e, e.code, debug)
    except MemoryError:
        return _end(
            DoesNotFitError("out of memory; use a smaller --size, --num-videos or --steps"),
            4,
            debug,
        )
    except BrokenPipeError:  # nobody reads what is printed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as e:
        error = of_system(e)
        return _end(error, error.code, debug)
    except KeyboardInterrupt as e:
        print("lvjax: interrupted", file=sys.stderr)
        return 128 + (e.args[0] if e.args else signal.SIGINT)
    except Exception as e:  # noqa: BLE001  the edge of the program: device errors have no common type
        if "RESOURCE_EXHAUSTED" in str(e) or "Out of memory" in str(e):
            return _end(
                DoesNotFitError(
                    "the device ran out of memory; use a smaller --size, --num-videos or --steps"
                ),
                4,
                debug,
            )
        if debug:
            raise
        print(
            f"lvjax: unexpected {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}; "
            "rerun with --debug and report it",
            file=sys.stderr,
        )
        return 1


def _end(error: Exception, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    print(f"lvjax: {one_line(error)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
