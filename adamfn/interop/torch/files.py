"""`load`: what `torch.save` wrote, as NumPy arrays and without torch."""

import collections
import os
import pickle
import zipfile
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from adamfn.interop.torch.parameters import Array


def load(path: str | os.PathLike[str]) -> Any:
    """Reads a file that `torch.save` wrote, without torch.

    Args:
      path: the file, of torch 1.6 or later: a zip archive, little-endian.

    Returns:
      The saved object, with NumPy arrays in place of tensors: `load("run.pt")["optimizer"]` is what
      `from_state_dict` takes. No code of the file is run.

    Raises:
      ValueError: an older file, or one with more than containers, numbers, text and tensors.
    """
    name = None
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            name = next((n for n in archive.namelist() if n.endswith("data.pkl")), None)
            if name is not None:
                with archive.open(name) as file:
                    return _Unpickler(file, archive, name.removesuffix("data.pkl")).load()
    raise ValueError(
        f"load: {os.fspath(path)} is no zip archive with a data.pkl; expected torch.save's. A file"
        " of torch before 1.6 must be loaded and saved again by a later torch."
    )


def _tensor(
    storage: Array, offset: int, shape: Sequence[int], strides: Sequence[int], *_: Any
) -> Array:
    steps = [stride * storage.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps).copy()


_FLOATS = {"Double": "f8", "Float": "f4", "Half": "f2", "BFloat16": jnp.bfloat16, "Bool": "?"}
_INTEGERS = {"Long": "i8", "Int": "i4", "Short": "i2", "Char": "i1", "Byte": "u1"}
_KNOWN: dict[str, Any] = {
    "collections.OrderedDict": collections.OrderedDict,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch.Size": tuple,
} | {f"torch.{kind}Storage": np.dtype(x) for kind, x in (_FLOATS | _INTEGERS).items()}
"""What a file may name, and what stands for it here."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self._archive, self._folder = archive, folder

    def find_class(self, module: str, name: str, /) -> Any:
        if f"{module}.{name}" not in _KNOWN:
            raise ValueError(
                f"load: the file has a {module}.{name}; expected containers, numbers, text and"
                " dense tensors. Save the optimizer's state_dict() alone."
            )
        return _KNOWN[f"{module}.{name}"]

    def persistent_load(self, pid: Any, /) -> Array:
        _, dtype, key, _, number = pid
        data = self._archive.read(f"{self._folder}data/{key}")
        return np.frombuffer(data, dtype, count=number)
