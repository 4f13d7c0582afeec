# SPDX-License-Identifier: Apache-2.0
"""PyTorch's files (.pth, .pt, .bin, .ckpt) without PyTorch: where their arrays are.

A file is a zip with a pickle and the bytes of each storage.  The pickle is read as data
(read_pickle.py); of the names in it `FUNCTIONS` have a meaning, `STORAGES` and `TYPES` are types,
and those in `TOLERATED`, which training scripts keep beside weights, become values without content.
Every other name is refused, wherever it stands: a tensor of an unknown kind must not be passed
over, and a file that names what has no business in it is not to be trusted with the rest.  Files of
several sets of weights (`generator_ema`, `critic`, ...) give one set: each value in it is an array.
Big-endian files, and the format before PyTorch 1.6, are not read.
Source: pytorch/pytorch, torch/serialization.py, torch/_utils.py, torch/_tensor.py (what is saved).
"""

import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_convert.files import opened, shown, size_of, take
from checkpoints_convert.read_pickle import PICKLE_MAX, Machine, Opaque, Pairs, Refused
from checkpoints_convert.read_zip import Record, read_directory
from checkpoints_convert.tensors import TENSORS_MAX, Entry, possible
from lvjax.core.dtypes import DTYPES
from lvjax.core.errors import CheckpointError

PREFERRED = ("generator_ema", "generator")  # of a file with several sets of weights
LORAS = ("generator_lora", "generator_ema_lora")  # of a file with several LoRAs
DEPTH = 3  # dicts within dicts that are searched for weights
VISITS_MAX = 2_000_000  # pairs looked at in that search
SHARES_MAX = 16  # times that the bytes of a file may be used
LITTLE = b"little"

STORAGES = {
    "torch.DoubleStorage": "F64",
    "torch.FloatStorage": "F32",
    "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16",
    "torch.LongStorage": "I64",
    "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16",
    "torch.CharStorage": "I8",
    "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL",
    "torch.ComplexFloatStorage": "C64",
    "torch.storage.UntypedStorage": "U8",
}
TYPES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint64": "U64",
    "torch.uint32": "U32",
    "torch.uint16": "U16",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
    "torch.complex64": "C64",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
}
CLASSES = {"torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}
TOLERATED = {
    "torch.device",
    "argparse.Namespace",
    "types.SimpleNamespace",
    "easydict.EasyDict",
    "ml_collections.config_dict.config_dict.ConfigDict",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.nodes.AnyNode",
    "collections.defaultdict",
    "collections.Counter",
    "datetime.datetime",
    "datetime.timedelta",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib.PurePosixPath",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "typing.Any",
    "_codecs.encode",  # bytes, in protocol 2
    *(
        f"{module}.{name}"
        for module in ("builtins", "__builtin__")
        for name in ("set", "frozenset")
    ),
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("dict", "list")),
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("int", "float")),
}
"""Their values are not looked at, and none of them is imported or called."""


@dataclass(frozen=True, eq=False, slots=True)
class Global:
    """A name in the pickle."""

    name: str


@dataclass(frozen=True, eq=False, slots=True)
class Storage:
    """Bytes in the file: `size` elements of `dtype`; untyped ones get their type from a tensor."""

    record: Record
    dtype: str
    size: int
    typed: bool


@dataclass(frozen=True, eq=False, slots=True)
class Tensor:
    """A view of a storage; offset and strides in elements of `dtype`."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def entry(self, path: Path) -> Entry:
        """Its place in the file."""
        itemsize = np.dtype(DTYPES[self.dtype]).itemsize
        record = self.storage.record
        size, dense = 1, True
        for n, stride in zip(self.shape[::-1], self.strides[::-1], strict=True):
            dense &= n == 1 or stride == size
            size *= n
        dense |= size == 0
        whole = dense and size * itemsize == record.size
        # the stride of an axis of length 1 is any number: none is used
        steps = tuple(s if n > 1 else 0 for n, s in zip(self.shape, self.strides, strict=True))
        return Entry(
            path,
            self.dtype,
            self.shape,
            record.start + self.offset * itemsize,
            None if dense else steps,
            record.crc if whole and record.crc else None,
        )


def read_torch(
    path: Path, weights: str | None = None, lora: bool = False
) -> tuple[dict[str, Entry], str | None]:
    """The arrays of one file, and which of its sets of weights they are (None: it has one).

    weights: the set to take, as error messages list them; by default the first of `PREFERRED` and
      `LORAS`, or the only one.  lora: whether `LORAS` come first.
    Raises: CheckpointError for what is damaged, is no state dict, or would have to be executed.
    """
    with opened(path) as f:
        size = size_of(f)
        records = read_directory(f, path)
        root = _root(path, records)
        order = records.get(f"{root}/byteorder")  # older files have none and are little-endian
        if order is not None and take(f, path, order.start, min(order.size, 10)) != LITTLE:
            raise CheckpointError(f"{path} is big-endian; save it again on a little-endian machine")
        pickle = records[f"{root}/data.pkl"]
        data = take(f, path, pickle.start, min(pickle.size, PICKLE_MAX + 1))
    if pickle.crc and len(data) == pickle.size and zlib.crc32(data) != pickle.crc:
        raise CheckpointError(f"{path}: its pickle does not match its checksum; download it again")
    try:
        tree = Machine(data, TorchObjects(records, root)).run()
        name, found = choose(tree, weights, lora)
        entries = {key: value.entry(path) for key, value in _checked(name, found)}
        if sum(entry.nbytes for entry in entries.values()) > SHARES_MAX * size:
            raise Refused(f"its arrays use the bytes of the file more than {SHARES_MAX} times")
    except Refused as e:
        raise CheckpointError(f"{path}: {e}") from e
    except (ValueError, IndexError, KeyError, struct.error) as e:
        what = f"{path} is damaged (its pickle makes no sense: {type(e).__name__})"
        raise CheckpointError(f"{what}; download it again") from e
    return entries, name


def _root(path: Path, records: dict[str, Record]) -> str:
    """The folder that everything in the zip is in."""
    roots = [n.removesuffix("/data.pkl") for n in records if n.endswith("/data.pkl")]
    if len(roots) != 1 or "/" in roots[0]:
        raise CheckpointError(f"{path} is a zip file, but not of torch.save; give the checkpoint")
    if f"{roots[0]}/constants.pkl" in records:
        raise CheckpointError(f"{path} is a TorchScript program; save its state_dict() instead")
    return roots[0]


class TorchObjects:
    """What the names in a pickle of `torch.save` mean."""

    def __init__(self, records: dict[str, Record], root: str):
        self.records, self.root = records, root

    def named(self, module: str, name: str) -> Global:
        """A name that may stand in a checkpoint.  Raises: Refused."""
        whole = f"{module}.{name}"
        if "." in name or not any(
            whole in known for known in (FUNCTIONS, STORAGES, TYPES, CLASSES, TOLERATED)
        ):
            raise Refused(
                f"it names {shown(whole)}, which is no part of weights (nothing was run); save the "
                "state_dict() alone, or as safetensors"
            )
        return Global(whole)

    def called(self, function: Any, arguments: tuple) -> Any:
        """What the function would give: a container or a tensor.  Raises: Refused."""
        name = function.name if isinstance(function, Global) else None
        if name in FUNCTIONS:
            return FUNCTIONS[name](*arguments)
        if name in TOLERATED or isinstance(function, Opaque):
            return Opaque()
        raise Refused(f"it calls {shown(name or 'a value')}, which is no function of torch.save")

    def stored(self, place: tuple) -> Storage:
        """A storage.  Raises: Refused unless its bytes are there."""
        if len(place) != 5 or place[0] != "storage" or not isinstance(place[1], Global):
            raise Refused("its pickle has a persistent id that is no storage")
        _, kind, key, _, size = place
        if kind.name not in STORAGES or not isinstance(key, str):
            raise Refused("its pickle has a storage of no known type")
        if (record := self.records.get(f"{self.root}/data/{key}")) is None:
            raise Refused(f"its storage {shown(key)} is missing; download it again")
        dtype = STORAGES[kind.name]
        itemsize = np.dtype(DTYPES[dtype]).itemsize
        if type(size) is not int or size * itemsize != record.size:
            raise Refused(f"its storage {shown(key)} is not as long as it says; download it again")
        return Storage(record, dtype, size, kind.name != "torch.storage.UntypedStorage")


def ordered_dict(*arguments) -> Pairs:
    """`collections.OrderedDict`; its items follow."""
    if arguments:
        raise Refused("it makes a dict from arguments")
    return Pairs()


def rebuild_tensor(*arguments) -> Tensor:
    """`_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks, [metadata])`."""
    if not 6 <= len(arguments) <= 7 or not isinstance(arguments[0], Storage):
        raise Refused("it has a tensor without a storage")
    storage, offset, shape, strides = arguments[:4]
    if not storage.typed:
        raise Refused("it has a tensor without a type")
    return view(storage, storage.dtype, offset, shape, strides)


def rebuild_typed(*arguments) -> Tensor:
    """`_rebuild_tensor_v3`: as above, the storage untyped, and the type after the hooks."""
    if not 7 <= len(arguments) <= 8 or not isinstance(arguments[0], Storage):
        raise Refused("it has a tensor without a storage")
    storage, offset, shape, strides, _, _, dtype = arguments[:7]
    if storage.typed or not isinstance(dtype, Global) or dtype.name not in TYPES:
        raise Refused("it has a tensor of no known type")
    return view(storage, TYPES[dtype.name], offset, shape, strides)


def view(storage: Storage, dtype: str, offset, shape, strides) -> Tensor:
    """A tensor in its storage.

    Raises: Refused when it reaches beyond it, or uses an element twice (it could be of any size).
    """
    if type(shape) is not tuple or type(strides) is not tuple or len(shape) != len(strides):
        raise Refused("it has a tensor without a shape")
    numbers = (offset, *shape, *strides)
    if not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
        raise Refused("it has a tensor of impossible shape, strides or offset")
    if not possible("tensor", dtype, shape):
        raise Refused(f"it has a tensor of the shape {list(shape)[:10]}, more than is read")
    reach = 0  # elements from the first to the last one, so far
    for stride, n in sorted((s, n) for s, n in zip(strides, shape, strict=True) if n > 1):
        if stride <= reach:
            raise Refused(f"it has a tensor that overlaps itself ({list(shape)}, {list(strides)})")
        reach += (n - 1) * stride
    last = offset + (reach + 1 if math.prod(shape) else 0)
    if last * np.dtype(DTYPES[dtype]).itemsize > storage.record.size:
        raise Refused("it has a tensor that reaches beyond its storage; download it again")
    return Tensor(storage, dtype, offset, shape, strides)


def rebuild_parameter(*arguments) -> Tensor:
    """`_rebuild_parameter(tensor, requires_grad, hooks)`."""
    if len(arguments) != 3 or not isinstance(arguments[0], Tensor):
        raise Refused("it has a parameter without a tensor")
    return arguments[0]


def rebuild_from_type(*arguments) -> Tensor:
    """`_rebuild_from_type_v2(function, class, arguments, attributes)`: a plain tensor."""
    function, kind, inner = arguments[:3] if len(arguments) == 4 else (None, None, None)
    known = isinstance(kind, Global) and kind.name in CLASSES and isinstance(function, Global)
    if not known or function.name not in REBUILD or type(inner) is not tuple:
        raise Refused("it has a tensor of a class of its own")
    return REBUILD[function.name](*inner)


def size(*arguments) -> tuple:
    """`torch.Size(tuple)`."""
    if len(arguments) != 1 or type(arguments[0]) is not tuple:
        raise Refused("it has a size that is none")
    return arguments[0]


REBUILD = {
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": rebuild_typed,
    "torch._utils._rebuild_parameter": rebuild_parameter,
}
FUNCTIONS = {
    **REBUILD,
    "torch._tensor._rebuild_from_type_v2": rebuild_from_type,
    "torch.Size": size,
    "collections.OrderedDict": ordered_dict,
}


def choose(tree: Any, weights: str | None, lora: bool) -> tuple[str | None, Pairs]:
    """The set of weights to take, and its name (None: the file is one set).

    A set is a dict whose values are all tensors.  Dicts of tensors and other things are no set, but
    where there is no other, or one is asked for by name, it is an error that says so.
    """
    if not isinstance(tree, Pairs):
        raise Refused("it holds no dict of tensors; save the state_dict()")
    sets, mixed = {}, {}
    for name, found in _dicts(tree):
        tensors = sum(isinstance(value, Tensor) for _, value in found)
        if tensors:
            kind = sets if tensors == len(found) else mixed
            if name in kind:
                raise Refused(f"it has two dicts {shown(name)}; save the weights alone")
            kind[name] = found
    names = ", ".join(shown(name) for name in sorted(sets)[:10] if name)
    if weights is not None:
        if weights not in sets | mixed or not weights:
            held = f"it holds {names}" if names else "it is one set of weights; name none"
            raise Refused(f"no weights {shown(weights)} in it; {held}")
        return weights, (sets | mixed)[weights]
    candidates = sets or mixed
    for wanted in (*LORAS, *PREFERRED) if lora else (*PREFERRED, *LORAS):
        fits = [name for name in candidates if name.split(".")[-1] == wanted]
        if len(fits) == 1:
            return fits[0], candidates[fits[0]]
    if not candidates:
        raise Refused("it holds no dict of tensors; save the state_dict()")
    if len(candidates) > 1:
        remedy = "save one of them alone" if lora else "name one with lvjax convert --weights"
        raise Refused(f"it holds several sets of weights: {names}; {remedy}")
    (name, found), *_ = candidates.items()
    return name or None, found


def _dicts(tree: Pairs) -> Iterator[tuple[str, Pairs]]:
    """The dict itself, named "", and those in it, named by their keys with dots between; optimiser
    states are left out.
    """
    level, visits = [("", tree)], 0
    for _ in range(DEPTH):
        below = []
        for prefix, found in level:
            visits += len(found)
            if visits > VISITS_MAX:
                raise Refused("it has too many dicts to look for weights; save the weights alone")
            yield prefix, found
            for key, value in found:
                if isinstance(value, Pairs) and isinstance(key, str) and "optim" not in key:
                    below.append((f"{prefix}.{key}" if prefix else key, value))
        level = below


def _checked(name: str | None, found: Pairs) -> Iterator[tuple[str, Tensor]]:
    """The weights of a set.  Raises: Refused unless it is names and tensors."""
    where = f"in {shown(name)} " if name else ""
    if len(found) > TENSORS_MAX:
        raise Refused(f"it has {len(found)} arrays {where}, more than {TENSORS_MAX}")
    seen = set()
    for key, value in found:
        if not isinstance(key, str) or not possible(key, "U8", ()):
            raise Refused(f"it has an array {where}without a name; save the state_dict()")
        if key in seen:
            raise Refused(f"it has two arrays {where}with the name {shown(key)}; keep one")
        seen.add(key)
        if not isinstance(value, Tensor):
            what = f"{shown(key)} {where}is no tensor, but stands among them"
            raise Refused(f"{what}; save the weights alone")
        yield key, value
