# SPDX-License-Identifier: Apache-2.0
"""The pickle of a checkpoint, read as data.

A pickle is a program for a stack machine; this is a machine that can build containers and nothing
else.  It knows the opcodes that `torch.save` emits (protocols 2 to 5), it imports nothing, and the
three opcodes that would call something (REDUCE, NEWOBJ, BUILD) ask `Objects`, which decides from
the names alone what comes out.  All else is refused: opcodes, missing operands, too many of them.
Source: CPython, Lib/pickletools.py (the opcodes and their operands).
"""

import pickletools
import struct
from collections.abc import Callable
from typing import Any, Protocol

PICKLE_MAX = 8_000_000  # bytes; a tensor takes about 200
STEPS_MAX = 500_000  # opcodes; a tensor takes about 35


class Refused(ValueError):
    """The pickle holds what is no part of weights; says what."""


class Pairs(list):
    """A dict of the pickle: its (key, value) pairs in order, so that no key is hashed."""

    __slots__ = ()


class Opaque:
    """Something whose value nobody needs; whatever is put into it is dropped."""

    __slots__ = ()


class Objects(Protocol):
    """What names in the pickle mean."""

    def named(self, module: str, name: str) -> Any:
        """A class or function; it is not imported.  Raises: Refused."""

    def called(self, function: Any, arguments: tuple) -> Any:
        """What `function(*arguments)` would be.  Raises: Refused."""

    def stored(self, place: tuple) -> Any:
        """What is outside the pickle.  Raises: Refused."""


class Machine:
    """Runs one pickle.  `run` returns its value, made of None, bool, int, float, str, bytes, list,
    tuple, `Pairs`, `Opaque` and what `objects` returns.

    Raises: Refused; ValueError, IndexError, KeyError or struct.error for a damaged pickle.
    """

    def __init__(self, data: bytes, objects: Objects):
        self.data, self.at, self.objects = data, 0, objects
        self.stack: list = []
        self.below: list[list] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The value of the pickle."""
        if len(self.data) > PICKLE_MAX:
            raise Refused(f"its pickle has more than {PICKLE_MAX} bytes")
        for _ in range(STEPS_MAX):
            code = self.data[self.at]
            self.at += 1
            if code == STOP:
                return self.end()
            if (step := STEPS.get(code)) is None:
                raise Refused(f"its pickle has the opcode {NAMES.get(code, hex(code))}")
            step(self)
        raise Refused(f"its pickle has more than {STEPS_MAX} opcodes")

    def end(self) -> Any:
        """The one value that is left."""
        if self.at != len(self.data) or self.below or len(self.stack) != 1:
            raise Refused("its pickle goes on after its end")
        return self.stack[0]

    def number(self, form: struct.Struct) -> Any:
        """An operand of fixed size."""
        (value,) = form.unpack_from(self.data, self.at)
        self.at += form.size
        return value

    def counted(self, form: struct.Struct) -> bytes:
        """An operand behind its length."""
        size = self.number(form)
        raw = self.data[self.at : self.at + size]
        if len(raw) != size:
            raise ValueError(f"cut short at byte {self.at}")
        self.at += size
        return raw

    def line(self) -> str:
        """An operand up to the end of the line."""
        end = self.data.index(b"\n", self.at)
        text = self.data[self.at : end].decode()
        self.at = end + 1
        return text

    def above(self) -> list:
        """What is above the last mark, which goes."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def take(self, count: int) -> tuple:
        """The last values, which go."""
        if len(self.stack) < count:
            raise IndexError("too few values")
        values = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        return values


U1, U2, U4, U8 = (struct.Struct(form) for form in ("<B", "<H", "<I", "<Q"))
I4, F8 = struct.Struct("<i"), struct.Struct(">d")


def _push(value: Callable[[Machine], Any]) -> Callable[[Machine], None]:
    return lambda m: m.stack.append(value(m))


def _proto(m: Machine) -> None:
    if not 2 <= (protocol := m.number(U1)) <= 5:
        raise Refused(f"its pickle has the protocol {protocol}")


def _mark(m: Machine) -> None:
    m.below.append(m.stack)
    m.stack = []


def _tuple(m: Machine) -> None:
    items = m.above()  # before `m.stack` is looked up: it changes it
    m.stack.append(tuple(items))


def _put(index: int, m: Machine) -> None:
    if index >= STEPS_MAX:
        raise Refused(f"its pickle keeps a value under the number {index}")
    m.memo[index] = m.stack[-1]


def _global(m: Machine) -> None:
    module = m.line()
    m.stack.append(m.objects.named(module, m.line()))


def _stack_global(m: Machine) -> None:
    module, name = m.take(2)
    if not isinstance(module, str) or not isinstance(name, str):
        raise Refused("its pickle has a global without a name")
    m.stack.append(m.objects.named(module, name))


def _call(m: Machine) -> None:
    function, arguments = m.take(2)
    if type(arguments) is not tuple:
        raise Refused("its pickle has a call without arguments")
    m.stack.append(m.objects.called(function, arguments))


def _persistent(m: Machine) -> None:
    (place,) = m.take(1)
    if type(place) is not tuple:
        raise Refused("its pickle has a persistent id that is no tuple")
    m.stack.append(m.objects.stored(place))


def _append(items: list, m: Machine) -> None:
    target = m.stack[-1]
    if type(target) is list:
        target.extend(items)
    elif not isinstance(target, Opaque):
        raise Refused("its pickle appends to what is no list")


def _set(items: list, m: Machine) -> None:
    target = m.stack[-1]
    if len(items) % 2:
        raise Refused("its pickle has a key without a value")
    if isinstance(target, Pairs):
        target.extend(zip(items[::2], items[1::2], strict=True))
    elif not isinstance(target, Opaque):
        raise Refused("its pickle sets items of what is no dict")


def _build(m: Machine) -> None:
    """Attributes: of a state dict only `_metadata`, which PyTorch adds and nobody reads."""
    (state,) = m.take(1)
    target = m.stack[-1]
    plain = isinstance(target, Pairs) and isinstance(state, Pairs)
    if not (plain and [key for key, _ in state] == ["_metadata"]):
        if not isinstance(target, Opaque):
            raise Refused("its pickle sets the state of an object")


def _int(m: Machine) -> int:
    return int.from_bytes(m.counted(U1), "little", signed=True)


STEPS: dict[int, Callable[[Machine], None]] = {
    ord(code): step
    for code, step in {
        "\x80": _proto,
        "\x95": lambda m: m.number(U8),  # FRAME
        "(": _mark,
        "0": lambda m: m.stack.pop() if m.stack else m.above(),
        "1": lambda m: m.above(),
        "N": _push(lambda m: None),
        "\x88": _push(lambda m: True),
        "\x89": _push(lambda m: False),
        "K": _push(lambda m: m.number(U1)),
        "M": _push(lambda m: m.number(U2)),
        "J": _push(lambda m: m.number(I4)),
        "\x8a": _push(_int),
        "G": _push(lambda m: m.number(F8)),
        "X": _push(lambda m: m.counted(U4).decode()),
        "\x8c": _push(lambda m: m.counted(U1).decode()),
        "\x8d": _push(lambda m: m.counted(U8).decode()),
        "B": _push(lambda m: m.counted(U4)),
        "C": _push(lambda m: m.counted(U1)),
        "\x8e": _push(lambda m: m.counted(U8)),
        "]": _push(lambda m: []),
        "}": _push(lambda m: Pairs()),
        ")": _push(lambda m: ()),
        "\x85": _push(lambda m: m.take(1)),
        "\x86": _push(lambda m: m.take(2)),
        "\x87": _push(lambda m: m.take(3)),
        "t": _tuple,
        "a": lambda m: _append(list(m.take(1)), m),
        "e": lambda m: _append(m.above(), m),
        "s": lambda m: _set(list(m.take(2)), m),
        "u": lambda m: _set(m.above(), m),
        "q": lambda m: _put(m.number(U1), m),
        "r": lambda m: _put(m.number(U4), m),
        "\x94": lambda m: _put(len(m.memo), m),
        "h": _push(lambda m: m.memo[m.number(U1)]),
        "j": _push(lambda m: m.memo[m.number(U4)]),
        "c": _global,
        "\x93": _stack_global,
        "R": _call,
        "\x81": _call,  # NEWOBJ: a class and its arguments
        "Q": _persistent,
        "b": _build,
    }.items()
}
STOP = ord(".")
NAMES = {ord(op.code): op.name for op in pickletools.opcodes}
