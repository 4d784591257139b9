"""Loads the native code, which the package was built with, and registers it with XLA."""

import contextlib
import ctypes
import itertools
import warnings
from pathlib import Path
from typing import NamedTuple

import jax
import jaxlib.version

TARGET = "adamfn_step_v2"
"""XLA's name for the native code. Its version changes with the operands and attributes of a call."""
_LIBRARY = Path(__file__).with_name("adamfn_native.so")
_FFI_VERSION = 1  # 0.1, which every jaxlib takes that is older than
_NOT_KNOWN = (0, 13)


class Native(NamedTuple):
    """The native code of this process, or why it has none."""

    variant: str | None
    """The kind of processor whose kernels run; None without native code."""
    reason: str | None
    """Why there is no native code; None if it is loaded."""


_native: Native | None = None
_calls = itertools.count()


def load() -> Native:
    """Loads the library, unless this process has done so. If it fails, the first call warns."""
    global _native
    if _native is None:
        # Threads that come here at once do the same, which XLA allows.
        try:
            _native = _register(late=True)
        except Exception as error:
            _native = Native(None, f"{type(error).__name__}: {error}")
    if _native.reason is not None and next(_calls) == 0:
        warnings.warn(
            "adamfn: steps run through XLA on CPU, not in native code, and take about twice as"
            f" long: {_native.reason}. To reinstall adamfn where a C++ compiler is found makes them"
            " native; adamfn.with_backend(tx, 'xla') ends this warning.",
            stacklevel=2,
        )
    return _native


def _register(*, late: bool) -> Native | None:
    if not _LIBRARY.exists():
        return Native(None, "adamfn was built without native code")
    # XLA takes one handler of a name: copies of adamfn in one process share that of the first.
    library = ctypes.CDLL(vars(jax.ffi).setdefault(TARGET, str(_LIBRARY)))
    # What XLA refuses when its CPU backend starts, keeps the backend from starting. Afterwards it is
    # an error of the registration alone.
    known = jaxlib.version.__version_info__[:2] < _NOT_KNOWN
    if library.adamfn_ffi_version() != _FFI_VERSION or not known:
        if not late:
            return None
        jax.devices("cpu")
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(library.adamfn_step), platform="cpu")
    library.adamfn_variant.restype = ctypes.c_char_p
    return Native(library.adamfn_variant(None).decode(), None)


# Executables that another process serialized look for the native code when they are loaded.
with contextlib.suppress(Exception):
    _native = _register(late=False)
