"""The library is loaded and XLA is told of it, once a process."""

import contextlib
import ctypes
import os
import shlex
import shutil
import tempfile
import threading
import warnings
from pathlib import Path
from typing import NamedTuple

import jax

from adamfn.backends.native import cache
from adamfn.backends.native.build import BuildError, build, find_compiler

_TARGET = "adamfn_step"


class Native(NamedTuple):
    """What this process has of native code."""

    path: Path | None
    """The library; None if there is none, or if it serves this process alone."""
    built_by: str | None
    """The command that compiled it."""
    reason: str | None
    """Why there is none; None if it is loaded."""


_native: Native | None = None
_lock = threading.Lock()


def load() -> Native:
    """Loads the library, which is built if the cache has none.

    Whatever fails is one warning. What the first call of a process finds stays so.

    Returns:
      What is loaded, or why nothing is.
    """
    global _native
    with _lock:
        if _native is not None:
            return _native
        try:
            native = _find() or _build()
        except Exception as error:
            name = "" if isinstance(error, BuildError) else f"{type(error).__name__}: "
            native = Native(None, None, f"{name}{error}")
        _native = native
    if native.reason is not None:  # without the lock: what shows the warning may call this
        warnings.warn(
            "adamfn: steps run through XLA on CPU, not in native code, and take about twice"
            f" as long: {native.reason}. A C++ compiler such as g++ or clang++, in PATH or named by"
            " CXX, makes them native; adamfn.with_backend(tx, 'xla') ends this warning.",
            stacklevel=2,
        )
    return native


def load_kept() -> None:
    """Loads the library if the cache has it: nothing is built, and nothing is said.

    Executables from another process, such as those of `jax.experimental.serialize_executable`, can
    then be run.
    """
    global _native
    with _lock, contextlib.suppress(Exception):
        _native = _native or _find()


def _find() -> Native | None:
    name = cache.name()
    # XLA takes one handler of a name, and may refuse another only when it starts. So what another
    # copy of this module has registered is noted where both find it.
    registered = jax.ffi.__dict__.get(_TARGET)
    if registered is not None:
        if registered[0] != name:
            raise BuildError("another copy of adamfn, which is not the same, has loaded its own")
        return Native(registered[1], registered[2], None)
    found = cache.find(name)
    if found is None:
        return None
    try:
        return _register(name, found[0], *found)
    except (OSError, AttributeError):
        return None  # it is of another system: build it anew


def _build() -> Native:
    compiler, name = find_compiler(), cache.name()
    # A TemporaryDirectory would be removed by the exit of a process forked meanwhile.
    directory = tempfile.mkdtemp(prefix="adamfn-")
    try:
        built, built_by = build(compiler, Path(directory)), shlex.join(compiler)
        path = cache.keep(built, name, built_by)
        # From the cache if it can be: programs may not be run from where temporary files lie.
        return _register(name, path or built, path, built_by)
    finally:
        shutil.rmtree(directory, ignore_errors=True)  # once loaded, a library needs no file


def _register(name: str, library: Path, path: Path | None, built_by: str) -> Native:
    capsule = jax.ffi.pycapsule(ctypes.CDLL(str(library)).adamfn_step)
    jax.ffi.register_ffi_target(_TARGET, capsule, platform="cpu")
    jax.ffi.__dict__[_TARGET] = name, path, built_by
    return Native(path, built_by, None)


def _after_fork() -> None:
    """A lock that another thread of the parent held is held for ever in the child."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
