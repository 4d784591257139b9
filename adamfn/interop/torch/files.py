"""`load`: what `torch.save` wrote, as arrays of NumPy and without torch."""

import collections
import os
import pickle
import zipfile
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from adamfn.interop.torch.layouts import Array

_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


def load(path: str | os.PathLike[str]) -> Any:
    """Reads a file that `torch.save` wrote, where torch is not installed.

    Args:
      path: the file, of torch 1.6 or later: a zip archive, little-endian.

    Returns:
      What was saved, with arrays of NumPy in place of tensors. Containers, numbers, text and
      tensors are read, and no code of the file is run.

    Raises:
      ValueError: an older file, or one that holds something else: names it.

    `load("run.pt")["optimizer"]` is then what `from_state_dict` takes.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"load: {os.fspath(path)} is no zip archive; expected a file that torch.save wrote. One"
            " of torch before 1.6 is to be loaded and saved again by a later torch."
        )
    with zipfile.ZipFile(path) as archive:
        name = next((n for n in archive.namelist() if n.endswith("data.pkl")), None)
        if name is None:
            raise ValueError(f"load: {os.fspath(path)} has no data.pkl; expected torch.save's.")
        with archive.open(name) as file:
            return _Unpickler(file, archive, name.removesuffix("data.pkl")).load()


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self._archive, self._folder = archive, folder

    def find_class(self, module: str, name: str, /) -> Any:
        known = {
            "collections.OrderedDict": collections.OrderedDict,
            "torch._utils._rebuild_tensor_v2": _tensor,
            "torch._utils._rebuild_parameter": _parameter,
            "torch.Size": tuple,
        } | {f"torch.{storage}": np.dtype(dtype) for storage, dtype in _STORAGES.items()}
        if f"{module}.{name}" not in known:
            raise ValueError(
                f"load: the file has a {module}.{name}; expected containers, numbers, text and"
                " dense tensors. Save the optimizer's state_dict() alone."
            )
        return known[f"{module}.{name}"]

    def persistent_load(self, pid: Any, /) -> Array:
        _, dtype, key, _, number = pid
        data = self._archive.read(f"{self._folder}data/{key}")
        return np.frombuffer(data, dtype, count=number)


def _tensor(
    storage: Array, offset: int, shape: Sequence[int], strides: Sequence[int], *_: Any
) -> Array:
    steps = [stride * storage.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps).copy()


def _parameter(data: Array, *_: Any) -> Array:
    return data
