# SPDX-License-Identifier: Apache-2.0
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
"""XLA's name for the native code. Its version changes with what a call is given."""
_LIBRARY = Path(__file__).with_name("adamfn_native.so")
_FFI_VERSION = 1  # 0.1, which every jaxlib before _UNKNOWN takes
_UNKNOWN = (0, 13)


class Native(NamedTuple):
    """The native code of this process, or why it has none."""

    variant: str | None
    """The kind of processor whose kernels run; None without native code."""
    reason: str | None
    """Why there is no native code; None if it is loaded."""


_native: Native | None = None
_calls = itertools.count()


def native() -> Native:
    """Loads the library once. Without it the first call warns; beside other processes it raises."""
    global _native
    if _native is None:  # threads that come here at once do the same, which XLA allows
        try:
            _native = _register(first_use=True)
        except Exception as error:
            _native = Native(None, f"{type(error).__name__}: {error}")
    if _native.reason is not None and jax.process_count() > 1:
        raise RuntimeError(
            f"adamfn: process {jax.process_index()} of {jax.process_count()} has no native code:"
            f" {_native.reason}. XLA's steps differ from it in the last bits, so copies of a model"
            " would drift apart. Reinstall adamfn where there is a C++ compiler, such as g++, or"
            " pass adamfn.with_backend(tx, 'xla') in all processes."
        )
    if _native.reason is not None and next(_calls) == 0:
        warnings.warn(
            "adamfn: steps run through XLA on CPU, not in native code, and take about twice as"
            f" long: {_native.reason}. Reinstall adamfn where there is a C++ compiler, such as g++,"
            " to have it; adamfn.with_backend(tx, 'xla') ends this warning.",
            stacklevel=2,
        )
    return _native


def _register(*, first_use: bool) -> Native:
    if not _LIBRARY.exists():
        return Native(None, "adamfn was built without native code")
    # XLA takes one handler of a name: copies of adamfn in a process share the library of the first.
    library = ctypes.CDLL(jax.ffi.__dict__.setdefault(TARGET, str(_LIBRARY)))
    known = jaxlib.version.__version_info__[:2] < _UNKNOWN
    if library.adamfn_ffi_version() != _FFI_VERSION or not known:
        # If XLA refused this before its CPU backend starts, the backend would not start.
        if not first_use:
            raise RuntimeError("not yet")
        jax.devices("cpu")
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(library.adamfn_step), platform="cpu")
    library.adamfn_variant.restype = ctypes.c_char_p
    return Native(library.adamfn_variant(None).decode(), None)


# Executables that another process serialized look for the native code when they are loaded.
with contextlib.suppress(Exception):
    _native = _register(first_use=False)
