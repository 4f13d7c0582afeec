# SPDX-License-Identifier: Apache-2.0
"""`lvjax convert` as the tests of the command line call it."""

import numpy as np

from lvjax.cli.main import main
from tests.checkpoints_convert.tiny_checkpoints import (
    bits,
    draw,
    tiny,
)

DIT, VAE = "wan2.1-t2v-1.3b.official", "wan2.1-vae.official"


def weights(name: str = DIT, seed: int = 0, dtype: str = "float32") -> dict[str, np.ndarray]:
    return draw(tiny(name)[0], dtype, seed)


def convert(*arguments) -> int:
    return main(["convert", *map(str, arguments)])


def fails(capsys, code: int, *arguments) -> str:
    """The one line of an exit with this code."""
    capsys.readouterr()
    assert convert(*arguments) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("lvjax: ")
    return lines[0]


def listing(folder) -> dict:
    """Everything below a folder, and when and how it changed."""
    found = sorted(folder.rglob("*"))
    return {p: (p.lstat().st_mtime_ns, p.lstat().st_size, p.lstat().st_ino) for p in found}


def plain(stored) -> dict:
    """The arrays of a part, whatever its format."""
    return bits(dict(stored))
