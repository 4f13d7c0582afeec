# SPDX-License-Identifier: Apache-2.0
"""PyTorch files with impossible tensors, unclear sets of weights, and damaged or hostile zips."""

import struct
import zipfile
from collections.abc import Callable

import numpy as np

from tests.checkpoints_convert.bad_pickles import (
    DATA,
    EMPTY,
    GOOD,
    NAMES,
    WEIGHTS,
    archive,
    call,
    named,
    num,
    one,
    pairs,
    patched,
    program,
    storage,
    tensor,
    text,
    tup,
    with_value,
)

BEYOND = "reaches beyond its storage"
LONG = "is not as long as it says"
ODD = "impossible shape, strides or offset"
TENSORS: dict[str, tuple[bytes | Callable[[], bytes], str]] = {
    "shape past the storage": (one(0, (3, 3)), BEYOND),
    "stride past the storage": (one(0, (2, 3), (4, 1)), BEYOND),
    "offset past the storage": (one(1), BEYOND),
    "offset past the file": (one(2**40), BEYOND),
    "offset of nothing past the storage": (one(7, (0,), (1,)), BEYOND),
    "offset is negative": (one(-1), ODD),
    "offset is a boolean": (one(b"\x88", (2,), (1,)), ODD),
    "offset is text": (one(text("0")), ODD),
    "stride is negative": (one(3, (2, 3), (-3, 1)), ODD),
    "stride of 2^80": (one(0, (2, 3), (2**80, 1)), ODD),
    "shape is negative": (one(0, (-2, 3)), ODD),
    "shape is a fraction": (one(0, tup(b"G" + struct.pack(">d", 2.0)), (1,)), ODD),
    "shape is a boolean": (one(0, tup(b"\x88"), (1,)), ODD),
    "shape is a list": (one(0, b"]"), "without a shape"),
    "shape and strides differ": (one(0, (2, 3), (1,)), "without a shape"),
    "shape of nine axes": (one(0, (1,) * 9, (1,) * 9), "more than is read"),
    "shape without elements, and huge": (one(0, (0, 2**61), (1, 1)), "more than is read"),
    "a number stretched to 4 TB": (one(0, (2**40,), (0,)), "more than is read"),
    "a number stretched to 4 GB": (one(0, (2**30,), (0,)), "overlaps itself"),
    "windows that overlap": (one(0, (4, 3), (1, 1)), "overlaps itself"),
    "no storage": (one(where=num(0)), "without a storage"),
    "storage is missing": (one(where=storage("7")), "storage '7' is missing"),
    "storage outside": (one(where=storage("../version")), "storage '../version' is missing"),
    "storage longer than it is": (one(where=storage(size=7)), LONG),
    "storage shorter than it is": (one(where=storage(size=5)), LONG),
    "storage of -6 elements": (one(where=storage(size=-6)), LONG),
    "storage of another type": (one(where=storage(kind="HalfStorage")), LONG),
    "storage in eight bits": (one(where=storage(kind="QInt8Storage")), NAMES),
    "storage of no type": (
        one(where=storage(size=24, kind="UntypedStorage", module="torch.storage")),
        "a tensor without a type",
    ),
    "storage of a dtype": (one(where=storage(kind="float32")), "storage of no known type"),
    "storage cut short": (archive(storages={"0": DATA[:-4]}), LONG),
    "storage with a bit flipped": (
        archive().replace(DATA, b"\1" + DATA[1:]),
        "array 'w' does not match its checksum",
    ),
    "too few arguments": (
        with_value(call(named("torch._utils", "_rebuild_tensor_v2"), storage())),
        "without a storage",
    ),
    "a parameter of text": (
        with_value(call(named("torch._utils", "_rebuild_parameter"), text("w"), b"\x88", EMPTY)),
        "a parameter without a tensor",
    ),
    "a size of a list": (with_value(call(named("torch", "Size"), b"]")), "a size that is none"),
    "NaN": (
        archive(storages={"0": np.full(6, np.nan, np.float32).tobytes()}),
        "array 'w' is not finite",
    ),
    "infinity seen through strides": (
        archive(
            program(pairs(("w", tensor(0, (3, 2), (1, 3))))),
            {"0": np.array([0, 0, 0, 0, -np.inf, 0], np.float32).tobytes()},
        ),
        "array 'w' is not finite",
    ),
    "40 arrays of the same bytes": (
        lambda: archive(
            program(
                pairs(
                    *(
                        (f"w{i}", tensor(0, (6000,), (1,), where=storage(size=6000)))
                        for i in range(40)
                    )
                )
            ),
            {"0": bytes(24_000)},
        ),
        "use the bytes of the file more than 16 times",
    ),
}

# ---------------------------------------------------------------------------------- sets of weights

SETS: dict[str, tuple[bytes, str]] = {
    "a tensor alone": (archive(program(tensor())), "holds no dict of tensors"),
    "a list of tensors": (archive(program(b"](" + tensor() + b"e")), "holds no dict of tensors"),
    "numbers alone": (archive(program(pairs(("step", num(3))))), "holds no dict of tensors"),
    "an empty dict": (archive(program(b"}")), "holds no dict of tensors"),
    "an optimiser alone": (
        archive(program(pairs(("optimizer", pairs(("exp_avg", tensor())))))),
        "holds no dict of tensors",
    ),
    "a number among the tensors": (with_value(num(3)), "'x' is no tensor, but stands among them"),
    "text among the tensors": (with_value(text("F")), "'x' is no tensor, but stands among them"),
    "options among the tensors": (
        with_value(call(named("argparse", "Namespace"))),
        "'x' is no tensor, but stands among them",
    ),
    "two sets without a preference": (
        archive(program(pairs(("model", WEIGHTS), ("ema", WEIGHTS)))),
        "several sets of weights: 'ema', 'model'",
    ),
    "two sets with one name": (
        archive(program(pairs(("model", WEIGHTS), ("model", WEIGHTS)))),
        "two dicts 'model'",
    ),
    "a name twice": (
        archive(program(pairs(("w", tensor()), ("w", tensor())))),
        "two arrays with the name 'w'",
    ),
    "a name that is a number": (
        archive(program(b"}" + num(1) + tensor() + b"s")),
        "without a name",
    ),
    "a name that is a tuple": (archive(program(b"})" + tensor() + b"s")), "without a name"),
    "an empty name": (archive(program(pairs(("", tensor())))), "without a name"),
    "a name of 600 characters": (
        archive(program(pairs(("w" * 600, tensor())))),
        "without a name",
    ),
    "two wrapped names are one": (
        archive(program(pairs(("a.w", tensor()), ("a._checkpoint_wrapped_module.w", tensor())))),
        "are the same name 'a.w'",
    ),
}

# ------------------------------------------------------------------------------------- zip archives

WHOLE = archive()
NOT_SAVED = "is not as torch.save writes it"
CUT = "cut short, or bytes after its end"
_EXTRA = (("archive/extra", b""),)
ZIPS: dict[str, tuple[bytes | Callable[[], bytes], str]] = {
    "cut after four bytes": (WHOLE[:4], f"{NOT_SAVED} (cut short)"),
    "cut in the pickle": (WHOLE[:60], CUT),
    "cut in the middle": (WHOLE[: len(WHOLE) // 2], CUT),
    "cut in the directory": (WHOLE[:-30], CUT),
    "one byte short": (WHOLE[:-1], CUT),
    "one byte more": (WHOLE + b"\0", CUT),
    "a comment": (WHOLE[:-2] + b"\4\0evil", CUT),
    "bytes before it": (b"PK\3\4" + bytes(60) + WHOLE, "its directory is not where it should be"),
    "an entry that is not in the directory": (
        archive(before=WHOLE[: WHOLE.index(b"PK\3\4", 4)]),
        "bytes before its first entry",
    ),
    "an empty pickle, says the directory": (
        patched(0, 20, bytes(8)),
        "does not match its checksum",
    ),
    "compressed": (archive(method=zipfile.ZIP_DEFLATED), "'archive/data.pkl' is compressed"),
    "50 MB of zeros, compressed": (
        lambda: archive(storages={"0": bytes(50_000_000)}, method=zipfile.ZIP_DEFLATED),
        "is compressed",
    ),
    "50 MB of pickle, compressed": (
        lambda: archive(program(b"N0" * 25_000_000), method=zipfile.ZIP_DEFLATED),
        "is compressed",
    ),
    "packed with LZMA": (archive(method=zipfile.ZIP_LZMA), "is compressed"),
    "sizes that differ": (patched(2, 20, struct.pack("<L", 12)), "is compressed"),
    "a zip in a zip": (archive(WHOLE), "opcode PERSID"),
    "a zip that holds the file": (
        archive(root="x/").replace(b"data.pkl", b"inner.zi"),
        "but not of torch.save",
    ),
    "an empty zip": (archive()[:4] + b"PK\5\6" + bytes(18), "its directory is not where"),
    "no pickle": (archive().replace(b"data.pkl", b"data.txt"), "but not of torch.save"),
    "two pickles": (archive(more=(("other/data.pkl", GOOD),)), "but not of torch.save"),
    "a pickle two folders deep": (archive(root="a/b/"), "but not of torch.save"),
    "TorchScript": (archive(more=(("archive/constants.pkl", b""),)), "is a TorchScript program"),
    "a storage twice": (
        archive(more=(("archive/data/0", DATA),)),
        "'archive/data/0' is in it twice",
    ),
    "the pickle twice": (archive(more=(("archive/data.pkl", GOOD),)), "is in it twice"),
    "a name in the folder above": (archive(more=(("../evil", b""),)), "which leaves its folder"),
    "a name inside out": (archive(more=(("archive/../../evil", b""),)), "which leaves its folder"),
    "a whole path": (archive(more=(("/etc/evil", b""),)), "which leaves its folder"),
    "a name with a backslash": (
        archive(more=_EXTRA).replace(b"archive/extra", b"..\\evil\\extra"),
        "an entry with the name",
    ),
    "a name with a line break": (
        archive(more=_EXTRA).replace(b"archive/extra", b"archive/ex\nra"),
        "an entry with the name",
    ),
    "a name that is not UTF-8": (
        archive(more=_EXTRA).replace(b"archive/extra", b"archive/\xff\xffira"),
        NOT_SAVED,
    ),
    "encrypted": (patched(0, 8, b"\1\0"), "'archive/data.pkl' is encrypted"),
    "encrypted in its own header": (
        patched(0, 6, b"\1\0", b"PK\3\4"),
        "is not what the directory says",
    ),
    "another name in its own header": (
        patched(2, 30, b"archive/data/9", b"PK\3\4"),
        "is not what the directory says",
    ),
    "compressed in its own header": (
        patched(2, 8, b"\x08\0", b"PK\3\4"),
        "is not what the directory says",
    ),
    "a storage longer than its place": (
        patched(2, 20, struct.pack("<2L", 9999, 9999)),
        "is longer than its place",
    ),
    "a storage of 4 GB": (patched(2, 20, b"\xfe\xff\xff\xff" * 2), "is longer than its place"),
    "a ZIP64 storage without its numbers": (
        patched(2, 20, b"\xff" * 8),
        "is longer than its place",
    ),
    "two entries in one place": (patched(3, 42, struct.pack("<L", 0)), "overlaps another entry"),
    "an entry past the end": (patched(3, 42, struct.pack("<L", 2**31)), "overlaps another entry"),
    "on another disk": (patched(2, 34, b"\1\0"), "its directory is damaged"),
    "more entries than it has": (
        patched(0, 8, b"\x05\0\x05\0", b"PK\5\6"),
        NOT_SAVED,
    ),
    "fewer entries than it has": (
        patched(0, 8, b"\3\0\3\0", b"PK\5\6"),
        "another number of entries than it says",
    ),
    "a directory of 4 GB": (
        patched(0, 12, b"\xff\xff\xff\xff", b"PK\5\6"),
        "its directory is not where it should be",
    ),
    "a pickle with a bit flipped": (
        WHOLE.replace(b"(X\1\0\0\0w", b"(X\1\0\0\0v"),
        "its pickle does not match its checksum",
    ),
    "big-endian": (archive(order=b"big"), "is big-endian"),
}


def zip64(change: dict[int, bytes]) -> bytes:
    """The good file with a ZIP64 end, bytes of which are changed."""
    body, end = WHOLE[:-22], WHOLE[-22:]
    count, size, start = struct.unpack("<H2L", end[10:20])
    wide = bytearray(
        struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start)
        + struct.pack("<4sLQL", b"PK\6\7", 0, len(body), 1)
    )
    for at, value in change.items():
        wide[at : at + len(value)] = value
    return body + bytes(wide) + end[:8] + b"\xff" * 12 + b"\0\0"


WIDE = {
    "ZIP64: an entry count of 2^60": (
        zip64({24: struct.pack("<2Q", 2**60, 2**60)}),
        "more than are read",
    ),
    "ZIP64: a directory of 2^60 bytes": (
        zip64({40: struct.pack("<Q", 2**60)}),
        "its directory is not where it should be",
    ),
    "ZIP64: a directory past the end": (
        zip64({48: struct.pack("<Q", 2**60)}),
        "its directory is not where it should be",
    ),
    "ZIP64: a place that is not its own": (
        zip64({64: struct.pack("<Q", 4)}),
        "its ZIP64 end is damaged",
    ),
    "ZIP64: two disks": (zip64({72: struct.pack("<L", 2)}), "its ZIP64 end is damaged"),
}
