"""`load`: what `torch.save` wrote, as NumPy arrays and without torch."""

import os
import sys
import zipfile
from typing import Any, BinaryIO

import numpy as np

from adamfn.interop.torch.parameters import Array
from adamfn.interop.torch.pickles import unpickled


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
        except Exception as error:  # zipfile raises any kind
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
    given = f"{folder}/byteorder" in members
    order = archive.read(f"{folder}/byteorder") if given else b"little"
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

    return unpickled(archive.read(f"{folder}/data.pkl"), storage)
