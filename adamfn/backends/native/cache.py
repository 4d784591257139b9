"""Libraries are kept in the user's cache, for the processes that follow.

A library's name is the hash of what it is made of. The compiler is no part of it, so that a library
serves machines without one. It ends in the compiler's name and in its own SHA-256: what was cut
short or altered is not loaded, nor is what others could have written.
"""

import contextlib
import hashlib
import os
import platform
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jaxlib.version

from adamfn.backends.native.build import SOURCES, flags, source

_UNUSED_FOR = 90 * 24 * 3600.0  # seconds after which a library is removed


def directory() -> Path | None:
    """Where libraries are kept, whether or not it exists; None if the user has no home."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    base = named if os.path.isabs(named) else os.path.expanduser("~/.cache")
    return Path(base, "adamfn") if os.path.isabs(base) else None


def name() -> str:
    """The name of this process's library: it changes with whatever changes the library."""
    parts = [source(name) for name in SOURCES]
    parts.append(repr((jaxlib.version.__version__, flags(), _processor())).encode())
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]
    return f"adamfn-{key}.so"


def find(name: str) -> tuple[Path, str] | None:
    """The library of a name, marked as used.

    Returns:
      Its path and what built it, or None if there is none that is sound.
    """
    cache = directory()
    if cache is None or not _is_ours(cache, stat.S_ISDIR):
        return None
    path = cache / name
    built_by = compiler_of(path)
    if built_by is None:
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return path, built_by


def keep(library: Path, name: str, built_by: str) -> Path | None:
    """Copies a library into the cache, and removes those that have not been used for long.

    Returns:
      Where it is; None if the cache is not the user's, cannot be written to, or is full.
    """
    cache = directory()
    if cache is None:
        return None
    content = library.read_bytes() + b"\0" + os.fsencode(built_by)
    try:
        for missing in [p for p in (cache, *cache.parents) if not p.exists()][::-1]:
            missing.mkdir(mode=0o700, exist_ok=True)  # whatever the umask is
        if not _is_ours(cache, stat.S_ISDIR):
            return None
        handle, new = tempfile.mkstemp(dir=cache, prefix="adamfn-", suffix=".new")
        try:
            with open(handle, "wb") as file:
                file.write(content + hashlib.sha256(content).digest())
            os.replace(new, cache / name)  # in one go: a process that races this one wins too
        finally:
            Path(new).unlink(missing_ok=True)
        for old in cache.glob("adamfn-*"):
            with contextlib.suppress(OSError):  # another process may have removed it
                if time.time() - old.stat().st_mtime > _UNUSED_FOR:
                    old.unlink()
    except OSError:
        return None
    return cache / name


def compiler_of(path: Path) -> str | None:
    """What built a library; None if it is not sound: not as it was built, or not ours."""
    try:
        content = path.read_bytes() if _is_ours(path, stat.S_ISREG) else b""
    except OSError:
        return None
    sealed, digest = content[:-32], content[-32:]
    if hashlib.sha256(sealed).digest() != digest:
        return None
    return os.fsdecode(sealed.rpartition(b"\0")[2])


def _is_ours(path: Path, is_kind: Callable[[int], bool]) -> bool:
    """Whether a path is of a kind, no link, and only this user or root can write to it."""
    try:
        status = path.lstat()
    except OSError:
        return False
    if not is_kind(status.st_mode) or status.st_mode & 0o022:
        return False
    return status.st_uid in (0, os.getuid())


def _processor() -> tuple[str, ...]:
    """What -march=native depends on."""
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    found: list[str] = []
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if not line.strip():
                break  # the first processor stands for all, and the kernel is slow to list them
            if line.partition(":")[0].strip() in wanted:
                found.append(line)
    return platform.system(), platform.machine(), *found
