"""The native code is built by the system's C++ compiler."""

import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
from importlib import resources
from pathlib import Path

import jax

SOURCES = (
    "handler.cc",
    "tasks.h",
    "group.h",
    "step.h",
    "angle.h",
    "weights.h",
    "eight_bit.h",
    "rounding.h",
)
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math")
_SAY_AFTER = 5.0  # seconds; most builds take three
_GIVE_UP_AFTER = 60.0


class BuildError(Exception):
    """Why no library was built."""


def source(name: str) -> bytes:
    """The text of one of the sources."""
    return resources.files("adamfn.backends.native").joinpath(name).read_bytes()


def flags() -> list[str]:
    """The flags of the compiler: adamfn's own, then those of ADAMFN_CXXFLAGS."""
    return [*_FLAGS, *shlex.split(os.environ.get("ADAMFN_CXXFLAGS", ""))]


def find_compiler() -> list[str]:
    """The system's C++ compiler: CXX, or the first in PATH of c++, g++ and clang++.

    Returns:
      The words of a command, such as `["/usr/bin/ccache", "g++"]`.

    Raises:
      BuildError: there is none.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    for first, *others in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        path = shutil.which(first)
        if path:
            return [os.path.abspath(path), *others]
    raise BuildError(f"found no C++ compiler ({shlex.join(named) or 'c++, g++, clang++'})")


def build(compiler: list[str], directory: Path) -> Path:
    """Builds the library.

    Args:
      compiler: as `find_compiler` gives it.
      directory: where the sources, the library and what the compiler says are put.

    Returns:
      The library.

    Raises:
      BuildError: the compiler failed, or did not finish within a minute.
    """
    for name in SOURCES:
        (directory / name).write_bytes(source(name))
    built, said = directory / "built.so", directory / "said"
    command = [*compiler, *flags(), "-shared", "-fPIC", "-isystem", jax.ffi.include_dir()]
    if platform.system() == "Darwin":
        command += ["-undefined", "dynamic_lookup"]
    # Not in that directory: a relative path in CXX or in the flags is the user's.
    code = _run([*command, str(directory / "handler.cc"), "-o", str(built)], said)
    if code or not built.exists():
        lines = said.read_text("utf-8", errors="replace").splitlines()
        errors = [line for line in lines if "error" in line] or lines or [f"exit status {code}"]
        raise BuildError(f"{shlex.join(compiler)} could not compile it: {errors[0]}")
    return built


def _run(command: list[str], said: Path) -> int:
    """Runs a command, and ends it with its children if it takes too long or is interrupted."""
    # What it says goes to a file: the end of a pipe would wait for every child that holds it.
    with (
        said.open("wb") as output,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        ) as process,
    ):
        try:
            try:
                return process.wait(_SAY_AFTER)
            except subprocess.TimeoutExpired:
                print(f"adamfn waits for {command[0]} to compile its step.", file=sys.stderr)
            return process.wait(_GIVE_UP_AFTER - _SAY_AFTER)
        except subprocess.TimeoutExpired as error:
            message = f"{command[0]} did not finish within {_GIVE_UP_AFTER:g} seconds"
            raise BuildError(message) from error
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
