# SPDX-License-Identifier: Apache-2.0
"""`load`: what `torch.save` wrote, as NumPy arrays and without torch."""
# pyright: reportPrivateUsage=false

import io
import math
import os
import pickle
import pickletools
import reprlib
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO, NoReturn

import jax.numpy as jnp
import numpy as np

from adamfn.interop.torch.parameters import Array

_FLOATS = {"Double": "f8", "Float": "f4", "Half": "f2", "BFloat16": jnp.bfloat16, "Bool": "?"}
_INTEGERS = {"Long": "i8", "Int": "i4", "Short": "i2", "Char": "i1", "Byte": "u1"}
_INSTRUCTIONS = """
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT
    BINFLOAT UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT BINPUT LONG_BINPUT
    MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL BINPERSID REDUCE
"""
_PLAIN = (int, str, float, bool, bytes, type(None))
_DEPTH, _SIZE = 100, 10**7
"""How deep containers may be nested; how many elements there may be, repeated ones repeatedly."""


def load(path: str | os.PathLike[str]) -> Any:
    """Reads a file that `torch.save` wrote, without torch.

    Args:
      path: the file, of torch 1.6 or later.

    Returns:
      The saved object, with NumPy arrays in place of tensors: `load("run.pt")["optimizer"]` is what
      `from_state_dict` takes. Tensors that share memory in torch share it here. No code of the file
      is run.

    Raises:
      ValueError: an older or a damaged file, or one with more than containers, numbers, text and
        dense tensors.
      OSError: there is no such file, or it cannot be opened.
    """
    with open(path, "rb") as file:
        try:
            return _read(file)
        except Exception as error:  # zipfile and pickle raise any kind
            found = error if type(error) is ValueError else repr(error)
            raise ValueError(
                f"load: in {os.fspath(path)}, found {found}; expected what torch.save writes of"
                " containers, numbers, text and dense tensors. Save optimizer.state_dict() alone,"
                " by torch 1.6 or later; copy a damaged file again."
            ) from error


def _read(file: BinaryIO) -> Any:
    if not zipfile.is_zipfile(file):
        raise ValueError("no zip archive")
    archive = zipfile.ZipFile(file)
    members = {member.filename: member for member in archive.infolist()}
    folder = next(iter(members), "").split("/")[0]
    if f"{folder}/data.pkl" not in members:
        raise ValueError("no data.pkl in the folder of the archive's first member")
    if len(members) < len(archive.infolist()):
        raise ValueError("two members of one name")
    # torch compresses nothing. Other members could expand to more than there is memory.
    sizes = [member.file_size for member in members.values()]
    stored = all(member.compress_type == zipfile.ZIP_STORED for member in members.values())
    if not stored or sum(sizes) > os.fstat(file.fileno()).st_size:
        raise ValueError("compressed or overlapping members")
    given = members.get(f"{folder}/byteorder")
    order = archive.read(given) if given else b"little"
    if order not in (b"little", b"big"):
        raise ValueError(f"the byte order {order!r:.20}")
    storages: dict[str, Array] = {}

    def storage(key: str, dtype: np.dtype[Any], count: int) -> Array:
        if key not in storages:
            data = bytearray(archive.read(f"{folder}/data/{key}"))
            words = np.frombuffer(data, f"u{dtype.itemsize}")
            words = words if order.decode() == sys.byteorder else words.byteswap()
            storages[key] = words != 0 if dtype.kind == "b" else words.view(dtype)
        found = storages[key]
        if (found.dtype, found.size) != (dtype, count):
            raise ValueError(
                f"{found.size} elements of {found.dtype} in a storage of {count} of {dtype}"
            )
        return found

    result = _Reader(archive.read(f"{folder}/data.pkl"), storage).load()
    _measure(result)
    return result


class _Instructions(dict[int, Callable[[Any], None]]):
    def __missing__(self, code: int) -> NoReturn:
        names = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
        raise ValueError(f"the pickle instruction {names.get(code, code)}")


class _Reader(pickle._Unpickler):
    """A pickle is a program: this runs the instructions that data need, and no others.

    What the program names is compared with a few names, and never looked up. pickle by itself would
    set the attributes of any object, and hash tuples of tuples for ever; in C, it takes the memory
    that a file asks for.
    """

    def __init__(self, data: bytes, read: Callable[[str, np.dtype[Any], int], Array]) -> None:
        super().__init__(io.BytesIO(data))
        self._read = read

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _NAMED:
            raise ValueError(f"a {module}.{name}"[:100])
        return _NAMED[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> Any:
        match pid:
            case ("storage", np.dtype() as dtype, str() as key, _, int() as count):
                return self._read(key, dtype, count)
            case _:
                raise ValueError("a storage that is not described as torch does")


def _build(reader: Any) -> None:
    reader.stack.pop()  # a module's state_dict() has its versions as attributes
    if not isinstance(reader.stack[-1], OrderedDict):
        raise ValueError("attributes of an object")


def _set_items(reader: Any, items: list[Any]) -> None:
    if not all(type(key) in _PLAIN for key in items[::2]):
        raise ValueError("a key that is neither a number nor text")
    if not isinstance(reader.stack[-1], dict):
        raise ValueError(f"items of a {type(reader.stack[-1]).__name__}")
    reader.stack[-1].update(zip(items[::2], items[1::2], strict=True))


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *more: Any) -> Array:
    arrays = isinstance(storage, np.ndarray) and type(shape) is type(strides) is tuple
    if any(more[2:]) or not arrays:
        raise ValueError("a tensor with other arguments than torch's")
    sizes = (offset, *shape, *strides)
    fits = len(shape) == len(strides) and all(type(n) is int and n >= 0 for n in sizes)
    if fits and 0 in shape:
        return np.empty(shape, storage.dtype)
    if fits:
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        fits = last < storage.size and math.prod(shape) <= storage.size
    if not fits:
        shape, strides, offset = map(reprlib.repr, (shape, strides, offset))
        raise ValueError(
            f"a tensor of the shape {shape}, strides {strides} and offset {offset} in a storage of"
            f" {storage.size} elements"
        )
    steps = [stride * storage.itemsize for stride in strides]
    return np.ndarray(shape, storage.dtype, storage, offset * storage.itemsize, steps)


_codes: list[int] = [getattr(pickle, name)[0] for name in _INSTRUCTIONS.split()]
_Reader.dispatch = _Instructions((code, pickle._Unpickler.dispatch[code]) for code in _codes)
_Reader.dispatch |= {
    pickle.BUILD[0]: _build,
    pickle.SETITEM[0]: lambda reader: _set_items(reader, [reader.stack.pop(k) for k in (-2, -1)]),
    pickle.SETITEMS[0]: lambda reader: _set_items(reader, reader.pop_mark()),
}
_NAMED: dict[str, Any] = {
    "collections.OrderedDict": lambda: OrderedDict[Any, Any](),
    "torch.Size": lambda shape: shape,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_tensor_v2": _tensor,
    **{f"torch.{kind}Storage": np.dtype(x) for kind, x in (_FLOATS | _INTEGERS).items()},
}


def _measure(result: Any) -> None:
    """Checks that walks over the result end, such as those of `jax.tree`."""
    known: dict[int, tuple[int, int]] = {}

    def measured(node: Any, depth: int) -> tuple[int, int]:
        if not isinstance(node, dict | list | tuple):
            if type(node) not in (*_PLAIN, np.ndarray):
                raise ValueError(f"a {type(node).__name__}, which is no value")
            return 0, 1
        if depth <= _DEPTH and id(node) not in known:
            parts = node.values() if isinstance(node, dict) else node
            inner = [(0, 0), *(measured(part, depth + 1) for part in parts)]
            known[id(node)] = 1 + max(h for h, _ in inner), 1 + sum(n for _, n in inner)
        height, size = known.get(id(node), (depth, 0))
        if height > _DEPTH or size > _SIZE:
            raise ValueError(f"containers in {_DEPTH} others, or with {_SIZE} elements")
        return height, size

    measured(result, 0)
