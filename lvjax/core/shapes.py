# SPDX-License-Identifier: Apache-2.0
"""Readable shape checks at public entry points."""

from lvjax.core.errors import InputError


def expect(x, axes: str, name: str = "array", **sizes: int) -> dict[str, int]:
    """Check the rank of `x` against `axes` ("B T H W C") and the sizes that are named; return all
    sizes by letter.

    Raises: InputError with the shape given, the axes expected and the offending axis.
    """
    letters = axes.split()
    shape = tuple(x.shape)
    wanted = " ".join(f"{a}={sizes[a]}" if a in sizes else a for a in letters)
    if len(shape) != len(letters):
        raise InputError(f"{name} has shape {shape}; expected {len(letters)} axes [{wanted}]")
    found = dict(zip(letters, shape, strict=True))
    for axis, size in sizes.items():
        if found[axis] != size:
            raise InputError(f"{name} has shape {shape}; axis {axis} must be {size}: [{wanted}]")
    return found


def expect_tokens(ids, mask, longest: int) -> None:
    """Check a text encoder's input: ids and mask [B, M], of at most `longest` tokens.

    Raises: InputError for other shapes and for a text that is too long.
    """
    sizes = expect(ids, "B M", "ids")
    expect(mask, "B M", "mask", **sizes)
    if sizes["M"] > longest:
        raise InputError(
            f"ids have {sizes['M']} tokens, the encoder takes {longest}; shorten the text"
        )
