"""Native code of the step on CPU: built by the system's compiler at first use, and kept.

The built library lies in the user's cache, under a name made of the source's hash, the jaxlib
version, the compiler and the processor: a change of any builds anew. It ends in its own SHA-256, so
what was cut short or altered is not loaded; nor is what another user owns or could write to.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import threading
import warnings
from importlib import resources
from importlib.metadata import version
from pathlib import Path

import jax

_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math")
_SOURCES = ("handler.cc", "group.h", "step.h", "eight_bit.h", "rounding.h")
_TARGET = "adamfn_step"
_lock = threading.Lock()


class NativeCodeError(Exception):
    """Why there is no native code."""


def load() -> str | None:
    """Builds the library if need be, loads it and tells XLA of it, once a process.

    Returns:
      None, or why there is none: then a warning has said so.
    """
    with _lock:
        return _load()


@functools.cache
def _load() -> str | None:
    try:
        path = library_path()
        library = ctypes.CDLL(str(path))
        if path.parent != cache_directory():
            shutil.rmtree(path.parent, ignore_errors=True)  # once loaded, it needs no file
        capsule = jax.ffi.pycapsule(library.adamfn_step)
        jax.ffi.register_ffi_target(_TARGET, capsule, platform="cpu")
    except (NativeCodeError, OSError, AttributeError) as error:
        reason = str(error)
        warnings.warn(
            f"adamfn: fused steps run through XLA on CPU, not in native code, and take about twice"
            f" as long: {reason}. A C++ compiler such as g++ or clang++, in PATH or named by CXX,"
            " makes them native; fused_adam(backend='xla') asks for XLA and ends this warning.",
            stacklevel=2,
        )
        return reason
    return None


def library_path() -> Path:
    """The library, from the cache or newly built.

    Raises:
      NativeCodeError: it cannot be built.
    """
    compiler = find_compiler()
    name = f"adamfn-{_key(compiler)}.so"
    cache = cache_directory()
    if cache is not None and is_sound(cache / name):
        return cache / name
    # Where the cache is not ours alone, the library serves this process only.
    directory = cache or Path(tempfile.mkdtemp(prefix="adamfn-"))
    return _build(compiler, directory / name)


def find_compiler() -> str:
    """The system's C++ compiler: CXX, or the first in PATH of c++, g++ and clang++.

    Raises:
      NativeCodeError: there is none.
    """
    named = os.environ.get("CXX", "").split()[:1]
    for candidate in named or ("c++", "g++", "clang++"):
        path = shutil.which(candidate)
        if path:
            return path
    raise NativeCodeError(f"found no C++ compiler ({' '.join(named) or 'c++, g++, clang++'})")


def cache_directory() -> Path | None:
    """The directory that libraries are kept in, or None if it cannot be ours alone."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    directory = Path(base, "adamfn")
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.lstat()
    except OSError:
        return None
    private = stat.S_ISDIR(status.st_mode) and not status.st_mode & 0o022
    return directory if private and _is_ours(status) and os.access(directory, os.W_OK) else None


def is_sound(path: Path) -> bool:
    """Whether a library is a file of ours alone, and as it was when it was built."""
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_mode & 0o022 or not _is_ours(status):
            return False
        content = path.read_bytes()
    except OSError:
        return False
    return len(content) > 32 and hashlib.sha256(content[:-32]).digest() == content[-32:]


def _is_ours(status: os.stat_result) -> bool:
    return not hasattr(os, "getuid") or status.st_uid == os.getuid()


def _build(compiler: str, target: Path) -> Path:
    """Builds beside the target and moves it there in one go, so that who races another wins too."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as directory:
        for source in _SOURCES:
            Path(directory, source).write_bytes(_source(source))
        command = [compiler, *_FLAGS, "-shared", "-fPIC", "-isystem", jax.ffi.include_dir()]
        if platform.system() == "Darwin":
            command += ["-undefined", "dynamic_lookup"]
        command += [*os.environ.get("ADAMFN_CXXFLAGS", "").split(), "handler.cc", "-o", "built.so"]
        built = Path(directory, "built.so")
        try:
            done = subprocess.run(
                command, cwd=directory, capture_output=True, text=True, timeout=300, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NativeCodeError(f"{compiler} did not finish: {error}") from error
        if done.returncode or not built.exists():
            said = next((x for x in done.stderr.splitlines() if "error" in x), done.stderr.strip())
            raise NativeCodeError(f"{compiler} could not compile it: {said}")
        content = built.read_bytes()
        with built.open("ab") as file:
            file.write(hashlib.sha256(content).digest())
            file.flush()
            os.fsync(file.fileno())
        built.chmod(0o700)
        os.replace(built, target)
    return target


def _key(compiler: str) -> str:
    parts = [_source(name) for name in _SOURCES]
    flags = (*_FLAGS, os.environ.get("ADAMFN_CXXFLAGS", ""))
    parts += [repr((version("jaxlib"), compiler, flags, _processor())).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]


def _processor() -> tuple[str, ...]:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    found = {line for line in lines if line.split("\t")[0].split(":")[0].strip() in wanted}
    return platform.system(), platform.machine(), platform.processor(), *sorted(found)


def _source(name: str) -> bytes:
    return resources.files(__name__).joinpath(name).read_bytes()
