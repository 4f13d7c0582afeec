# SPDX-License-Identifier: Apache-2.0
"""An assembler of PyTorch files, and pickles that would run something or never end.

Payloads are functions of the path of a canary, a file that they would make if anything ran them.
"""

import io
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

DATA = np.arange(6, dtype=np.float32).tobytes()
STORAGES = {"0": DATA}
EMPTY = b"ccollections\nOrderedDict\n)R"


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return b"X" + struct.pack("<I", len(raw)) + raw


def num(value: int) -> bytes:
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def tup(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def numbers(*values: int) -> bytes:
    return tup(*map(num, values))


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + tup(*arguments) + b"R"


def pairs(*items: tuple[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items) + b"u"


def storage(key: str = "0", size: int = 6, kind: str = "FloatStorage", module="torch") -> bytes:
    return tup(text("storage"), named(module, kind), text(key), text("cpu"), num(size)) + b"Q"


def tensor(offset=0, shape=(2, 3), strides=(3, 1), *, where: bytes | None = None) -> bytes:
    """A tensor; offset, shape and strides are numbers, or pickles of other things."""
    offset = offset if isinstance(offset, bytes) else num(offset)
    shape, strides = (v if isinstance(v, bytes) else numbers(*v) for v in (shape, strides))
    where = storage() if where is None else where
    rebuild = named("torch._utils", "_rebuild_tensor_v2")
    return call(rebuild, where, offset, shape, strides, b"\x89", EMPTY)


def program(value: bytes, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + value + b"."


GOOD = program(pairs(("w", tensor())))


def archive(
    pickle: bytes = GOOD,
    storages: dict[str, bytes] = STORAGES,
    more: tuple[tuple[str, bytes], ...] = (),
    method=zipfile.ZIP_STORED,
    root: str = "archive/",
    order: bytes = b"little",
    before: bytes = b"",
) -> bytes:
    """A file as `torch.save` makes it; before: bytes in front of it; more: entries at its end."""
    out = io.BytesIO(before)
    with zipfile.ZipFile(out, "a" if before else "w", method) as z, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # entries with one name
        for name, data in {"data.pkl": pickle, "byteorder": order}.items():
            z.writestr(root + name, data)
        for key, data in storages.items():
            z.writestr(f"{root}data/{key}", data)
        z.writestr(root + "version", b"3\n")
        for name, data in more:
            z.writestr(name, data)
    return out.getvalue()


def with_value(value: bytes) -> bytes:
    """A good state dict with one value more."""
    return archive(program(pairs(("w", tensor()), ("x", value))))


def one(*arguments, **options) -> bytes:
    return archive(program(pairs(("w", tensor(*arguments, **options)))))


def after(body: bytes) -> bytes:
    """A good state dict, made after other opcodes."""
    return archive(program(body + pairs(("w", tensor()))))


def patched(number: int, offset: int, value: bytes, mark: bytes = b"PK\1\2") -> bytes:
    """The good file with other bytes in a record of its directory."""
    data, at = bytearray(archive()), -1
    for _ in range(number + 1):
        at = data.index(mark, at + 1)
    data[at + offset : at + offset + len(value)] = value
    return bytes(data)


# --------------------------------------------------------------------------- what would be executed


def _python(canary: str) -> bytes:
    return text(f"open({canary!r}, 'w').close()")


def _shell(canary: str) -> bytes:
    return text(f": > '{canary}'")


def _partial(canary: str) -> bytes:
    made = call(named("functools", "partial"), named("builtins", "exec"), _python(canary))
    return made + b")R"


LIVE: dict[str, Callable[[str], bytes]] = {
    "os.system": lambda c: call(named("os", "system"), _shell(c)),
    "posix.system": lambda c: call(named("posix", "system"), _shell(c)),
    "builtins.eval": lambda c: call(named("builtins", "eval"), _python(c)),
    "builtins.exec": lambda c: call(named("builtins", "exec"), _python(c)),
    "__builtin__.eval": lambda c: call(named("__builtin__", "eval"), _python(c)),
    "subprocess.call": lambda c: call(
        named("subprocess", "call"), b"](" + text("touch") + text(c) + b"e"
    ),
    "os.system in text opcodes": lambda c: b"cos\nsystem\n(S\": > '" + c.encode() + b"'\"\ntR",
    "os.system by INST": lambda c: b"(" + _shell(c) + b"ios\nsystem\n",
    "os.system by OBJ": lambda c: b"(" + named("os", "system") + _shell(c) + b"o",
    "os.system by STACK_GLOBAL": lambda c: call(b"\x8c\x02os\x8c\x06system\x93", _shell(c)),
    "a call of what a call gave": _partial,
    "getattr of a module": lambda c: call(
        call(
            named("builtins", "getattr"),
            call(named("importlib", "import_module"), text("os")),
            text("system"),
        ),
        _shell(c),
    ),
    "operator.methodcaller": lambda c: call(
        call(named("operator", "methodcaller"), text("write_text"), text("")),
        call(named("pathlib", "Path"), text(c)),
    ),
    "os.mkdir": lambda c: call(named("os", "mkdir"), text(c)),
}
"""Pickles that make the canary when Python's own unpickler loads them, protocol 2."""
LIVE_4: dict[str, Callable[[str], bytes]] = {
    "os.system by a name with dots": lambda c: call(named("os", "path.os.system"), _shell(c)),
    "os.system by dots and STACK_GLOBAL": lambda c: call(
        b"\x8c\x02os\x8c\x0epath.os.system\x93", _shell(c)
    ),
}
"""The same in protocol 4."""
NAMES = "which is no part of weights (nothing was run)"
OTHER: dict[str, tuple[Callable[[str], bytes], str]] = {
    "torch.load": (lambda c: call(named("torch.serialization", "load"), text(c)), NAMES),
    "torch.hub.load": (lambda c: call(named("torch.hub", "load"), text("x/y"), text("z")), NAMES),
    "torch.jit.load": (lambda c: call(named("torch.jit._serialization", "load"), text(c)), NAMES),
    "a pickle in a storage": (
        lambda c: call(named("torch.storage", "_load_from_bytes"), b"B\4\0\0\0\x80\2N."),
        NAMES,
    ),
    "numpy.load": (lambda c: call(named("numpy", "load"), text(c)), NAMES),
    "copyreg._reconstructor": (
        lambda c: call(named("copyreg", "_reconstructor"), named("builtins", "object")),
        NAMES,
    ),
    "a class by NEWOBJ": (lambda c: named("subprocess", "Popen") + tup(text(c)) + b"\x81", NAMES),
    "a class by NEWOBJ_EX": (
        lambda c: named("pathlib", "Path") + tup(text(c)) + b"}\x92",
        "opcode NEWOBJ_EX",
    ),
    "a module of the script": (lambda c: call(named("__main__", "Trainer")), NAMES),
    "state of an object": (lambda c: b"]" + pairs(("x", b"N")) + b"b", "sets the state"),
    "attributes of a dict": (
        lambda c: EMPTY + pairs(("__class__", named("argparse", "Namespace"))) + b"b",
        "sets the state",
    ),
    "extension registry, one byte": (lambda c: b"\x82\x01", "opcode EXT1"),
    "extension registry, two bytes": (lambda c: b"\x83\x01\x00", "opcode EXT2"),
    "extension registry, four bytes": (lambda c: b"\x84\x01\x00\x00\x00", "opcode EXT4"),
    "persistent id as text": (lambda c: b"P../../secret\n", "opcode PERSID"),
    "persistent id of one text": (lambda c: text(c) + b"Q", "persistent id that is no tuple"),
    "persistent id of a module": (
        lambda c: tup(text("module"), text(c), text("x"), text("y"), num(1)) + b"Q",
        "persistent id that is no storage",
    ),
    "a buffer from outside": (lambda c: b"\x97", "opcode NEXT_BUFFER"),
    "a call of a number": (lambda c: call(num(1)), "calls 'a value'"),
    "a call of a type": (lambda c: call(named("torch", "FloatStorage")), "calls 'torch.FloatSt"),
    "a call of a tensor": (lambda c: call(tensor()), "calls 'a value'"),
    "a call without arguments": (lambda c: EMPTY + b"]R", "a call without arguments"),
    "a dict from arguments": (
        lambda c: call(named("collections", "OrderedDict"), b"]"),
        "makes a dict from arguments",
    ),
    "a tensor by os.system": (
        lambda c: call(
            named("torch._tensor", "_rebuild_from_type_v2"),
            named("os", "system"),
            named("torch", "Tensor"),
            tup(_shell(c)),
            b"}",
        ),
        NAMES,
    ),
    "a tensor by a tolerated name": (
        lambda c: call(
            named("torch._tensor", "_rebuild_from_type_v2"),
            named("pathlib", "Path"),
            named("torch", "Tensor"),
            tup(text(c)),
            b"}",
        ),
        "a tensor of a class of its own",
    ),
    "a tensor in eight bits": (
        lambda c: call(named("torch._utils", "_rebuild_qtensor"), storage()),
        NAMES,
    ),
    "a sparse tensor": (
        lambda c: call(named("torch._utils", "_rebuild_sparse_tensor"), num(1)),
        NAMES,
    ),
    "a sharded tensor": (
        lambda c: call(named("torch.distributed.tensor", "DTensor"), num(1)),
        NAMES,
    ),
}


def payload(make: Callable[[str], bytes], protocol: int = 2) -> Callable[[Path], Path]:
    """Makes a state dict that holds a payload beside good weights."""

    def write(folder: Path) -> Path:
        value = make(str(folder / "canary"))
        data = archive(program(pairs(("w", tensor()), ("x", value)), protocol))
        (folder / "model.pth").write_bytes(data)
        return folder / "model.pth"

    return write


def hidden(make: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    """Makes a file around the payload os.system."""

    def write(folder: Path) -> Path:
        (folder / "model.pth").write_bytes(make(LIVE["os.system"](str(folder / "canary"))))
        return folder / "model.pth"

    return write


WEIGHTS = pairs(("w", tensor()))
HIDDEN = {
    "payload in the optimiser": (
        hidden(lambda p: archive(program(pairs(("model", WEIGHTS), ("optimizer", p))))),
        NAMES,
    ),
    "payload in an argument": (
        hidden(lambda p: with_value(call(named("argparse", "Namespace"), p))),
        NAMES,
    ),
    "payload that is dropped": (hidden(lambda p: after(p + b"0")), NAMES),
    "payload in a tensor's hooks": (
        hidden(lambda p: archive(program(pairs(("w", tensor()[: -len(EMPTY) - 2] + p + b"tR"))))),
        NAMES,
    ),
    "payload behind the end": (
        hidden(lambda p: archive(GOOD + program(p))),
        "its pickle goes on after its end",
    ),
    "payload in a bare pickle": (hidden(program), "is a bare pickle"),
    "payload in a file of PyTorch 1.5": (
        hidden(lambda p: program(num(0x1950A86A20F9469CFC6C)) + program(num(1001)) + program(p)),
        "is a bare pickle",
    ),
    "payload in a pickle of protocol 0": (hidden(lambda p: archive(p + b".")), NAMES),
}

# ----------------------------------------------------------------------------- pickles that overrun

MACHINE: dict[str, tuple[bytes | Callable[[], bytes], str]] = {
    "a million dicts": (lambda: after(b"}" * 1_000_000), "more than 500000 opcodes"),
    "200,000 dicts, kept": (lambda: after(b"}\x940" * 200_000), "more than 500000 opcodes"),
    "a million marks": (lambda: after(b"(" * 1_000_000), "more than 500000 opcodes"),
    "a million lists in each other": (
        lambda: after(b"]" * 500_000 + b"a" * 500_000),
        "more than 500000 opcodes",
    ),
    "200,000 tuples in each other": (
        lambda: with_value(b")" + b"\x85" * 200_000),
        "'x' is no tensor",
    ),
    "2^100 tuples in each other": (
        lambda: with_value(b")\x94" + b"h\0h\0\x86q\0" * 100),
        "'x' is no tensor",
    ),
    "a dict in itself": (
        lambda: archive(program(b"}q\0" + text("a") + b"h\0s")),
        "it holds no dict of tensors",
    ),
    "10 MB of text": (
        lambda: after(text(b"a" * 10_000_000) + b"0"),
        "has more than 8000000 bytes",
    ),
    "8 MB of wide text": (
        lambda: after(text("a" * 3_000_000 + "\U0001f600") * 2),
        "goes on after its end",
    ),
    "text longer than the file": (after(b"\x8d" + b"\xff" * 7 + b"\x0f"), "is damaged"),
    "bytes longer than the file": (after(b"B\xff\xff\xff\xff"), "is damaged"),
    "text that is not UTF-8": (after(text(b"\xff\xfe")), "is damaged"),
    "a number of 2 GB": (after(b"\x8b\xff\xff\xff\x7f"), "opcode LONG4"),
    "a number as text": (after(b"I" + b"9" * 100_000 + b"\n"), "opcode INT"),
    "a bytearray": (after(b"\x96" + struct.pack("<Q", 2**60)), "opcode BYTEARRAY8"),
    "a set": (after(b"\x8f"), "opcode EMPTY_SET"),
    "a copy of the last value": (after(b"}2"), "opcode DUP"),
    "an unknown opcode": (after(b"\xff"), "opcode 0xff"),
    "kept under 2^32 - 1": (after(b"}r\xff\xff\xff\xff"), "keeps a value under the number"),
    "a value that was not kept": (after(b"h\x07"), "is damaged"),
    "more taken than there is": (after(b"R"), "is damaged"),
    "a mark that is not there": (after(b"t"), "is damaged"),
    "a key without a value": (archive(program(b"}(" + text("w") + b"u")), "a key without a value"),
    "a key for a list": (archive(program(b"](" + text("w") + tensor() + b"u")), "what is no dict"),
    "a value into a dict": (archive(program(b"}" + tensor() + b"a")), "what is no list"),
    "no end": (archive(GOOD[:-1]), "is damaged"),
    "no value": (archive(b"\x80\2."), "goes on after its end"),
    "two values": (after(b"}"), "goes on after its end"),
    "empty pickle": (archive(b""), "is damaged"),
    "protocol 9": (archive(program(WEIGHTS, 9)), "has the protocol 9"),
    "protocol 0": (archive(b"(dp0\nS'w'\nNs."), "opcode DICT"),
    "a global without a name": (after(b"NN\x93"), "a global without a name"),
    "a global of 5 MB": (lambda: after(b"c" + b"a" * 5_000_000 + b"\nb\n"), NAMES),
}
