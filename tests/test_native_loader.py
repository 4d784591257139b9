# SPDX-License-Identifier: Apache-2.0
"""Loading the native code: missing, refused by XLA, twice in a process, and its variants."""

import ctypes
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adamfn
from adamfn.backends.cpu import loader

LIBRARY = Path(loader.__file__).with_name("adamfn_native.so")
STEP = """
import jax, jax.numpy as jnp, adamfn
tx, params = adamfn.adam(0.5), jnp.ones(3)
step = jax.jit(lambda p, s: adamfn.step(tx, p, s, p)[0])
def steps_right():
    assert jnp.allclose(step(params, tx.init(params)), 0.5)
"""
ONE_WARNING = """
import threading, warnings
shown = []
def show(message, *_):
    if "adamfn" in str(message):
        shown.append(str(message))
        adamfn.backend()  # what shows a warning may ask
warnings.simplefilter("always")
warnings.showwarning = show
threads = [threading.Thread(target=adamfn.backend) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
steps_right()
(warning,) = shown
assert "with_backend" in warning
assert adamfn.backend().name == "xla" and adamfn.backend().reason in warning
print(warning)
"""


def python(*program, **environment):
    """Runs a program in a process of its own, and returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", "".join(map(textwrap.dedent, program))],
        env={**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def copy(tmp_path):
    """A copy of the package without its library, which Python finds before the package."""
    where = tmp_path / "copy"
    shutil.copytree(
        Path(adamfn.__file__).parent, where / "adamfn", ignore=shutil.ignore_patterns("*.so")
    )
    return where


def test_the_first_step_runs_no_other_program():
    python(
        STEP,
        """
        import os, subprocess
        def refuse(*_, **__):
            raise AssertionError
        subprocess.Popen = os.posix_spawn = os.system = refuse
        steps_right()
        assert adamfn.backend().name == "native"
        """,
        PATH="",
    )


def test_without_the_library_there_is_one_warning_and_xla(copy):
    said = python(f"import sys; sys.path.insert(0, {str(copy)!r})", STEP, ONE_WARNING)
    assert "adamfn was built without native code" in said
    assert "C++ compiler" in said


def test_without_the_library_one_of_several_processes_refuses(monkeypatch):
    # Its steps would differ in last bits from those of processes that have it.
    monkeypatch.setattr(loader, "_native", loader.Native(None, "not built"))
    monkeypatch.setattr(jax, "process_count", lambda *_: 2)
    params = jnp.ones(5)
    for wrapped in (adamfn.adam(0.5), adamfn.adam(0.5, moments="bfloat16")):
        step = jax.jit(lambda p, s, tx=wrapped: adamfn.step(tx, p, s, p)[0])
        with pytest.raises(
            RuntimeError, match=r"process 0 of 2 has no native code: not built.*xla"
        ):
            step(params, wrapped.init(params))
    xla = adamfn.with_backend(adamfn.adam(0.5), "xla")
    assert jnp.allclose(adamfn.step(xla, params, xla.init(params), params)[0], 0.5)


def test_a_library_that_cannot_be_loaded(copy):
    (copy / "adamfn/backends/cpu/adamfn_native.so").write_bytes(b"of another system")
    assert "OSError" in python(f"import sys; sys.path.insert(0, {str(copy)!r})", STEP, ONE_WARNING)


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_a_library_for_a_newer_xla_leaves_the_cpu_backend_alone(copy, tmp_path):
    include = tmp_path / "include"
    shutil.copytree(Path(jax.ffi.include_dir(), "xla/ffi/api"), include / "xla/ffi/api")
    versions = include / "xla/ffi/api/c_api.h"
    versions.write_text(versions.read_text().replace("XLA_FFI_API_MINOR ", "XLA_FFI_API_MINOR 9"))
    source = tmp_path / "newer.cc"
    source.write_text(
        """
        #include "xla/ffi/api/ffi.h"
        namespace ffi = xla::ffi;
        extern "C" int adamfn_ffi_version() { return XLA_FFI_API_MINOR; }
        ffi::Error Run(ffi::RemainingArgs, ffi::RemainingRets) { return ffi::Error::Success(); }
        XLA_FFI_DEFINE_HANDLER_SYMBOL(
            adamfn_step, Run, ffi::Ffi::Bind().RemainingArgs().RemainingRets());
        """
    )
    built = copy / "adamfn/backends/cpu/adamfn_native.so"
    flags = ["-std=c++17", "-shared", "-fPIC", f"-I{include}", "-o", built]
    subprocess.run(["g++", *flags, source], check=True)
    said = python(f"import sys; sys.path.insert(0, {str(copy)!r})", STEP, ONE_WARNING)
    assert "API version" in said
    assert "incompatible" in said


def test_a_jaxlib_yet_unknown_gets_it_at_the_first_step():
    python(
        "import jaxlib.version; jaxlib.version.__version_info__ = (0, 99, 0)",
        STEP,
        """
        from adamfn.backends.cpu import loader
        assert loader._native is None
        steps_right()
        assert loader._native.reason is None
        """,
    )


def test_two_copies_in_a_process(tmp_path):
    # XLA would see a name that has two handlers when its CPU backend starts, and not start it.
    for path in (LIBRARY, Path(loader.__file__)):
        shutil.copy(path, tmp_path)
    python(
        STEP,
        f"""
        import importlib.util
        from adamfn.backends.cpu import loader
        spec = importlib.util.spec_from_file_location("other", {str(tmp_path / "loader.py")!r})
        other = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(other)
        assert other._LIBRARY != loader._LIBRARY
        assert other.native() == loader.native() and other.native().reason is None
        steps_right()
        """,
    )


def test_a_process_forked_before_the_first_step():
    python(
        """
        import os, signal, adamfn
        child = os.fork()
        signal.alarm(60)
        """,
        STEP,
        """
        steps_right()
        assert adamfn.backend().name == "native"
        if child == 0:
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        """,
    )


def test_an_executable_of_another_process(tmp_path):
    kept = str(tmp_path / "executable")
    python(
        STEP,
        f"""
        import pickle
        from jax.experimental.serialize_executable import serialize
        lowered = step.lower(params, tx.init(params))
        assert "adamfn_step" in lowered.as_text()
        with open({kept!r}, "wb") as file:
            pickle.dump(serialize(lowered.compile()), file)
        """,
    )
    python(
        STEP,
        f"""
        import pickle
        from jax.experimental.serialize_executable import deserialize_and_load
        with open({kept!r}, "rb") as file:
            run = deserialize_and_load(*pickle.load(file))
        assert jnp.allclose(run(params, tx.init(params)), 0.5)
        """,
    )


@pytest.mark.parametrize("moments", ["float32", "bfloat16", "8bit"])
def test_the_kernels_for_every_kind_of_processor(moments):
    choose = ctypes.CDLL(str(LIBRARY)).adamfn_variant
    choose.restype = ctypes.c_char_p
    best = choose(None)
    assert choose(b"abacus") == best == loader.native().variant.encode()
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 300)), jnp.float32)
    tx = adamfn.adamw(0.1, moments=moments)
    step = jax.jit(lambda s: adamfn.step(tx, x, s, x))
    expected = step(tx.init(x))
    try:
        for name in (b"sse4", b"avx2", b"avx512"):
            if choose(name) != name:
                continue  # not on this processor
            for a, b in zip(*map(jax.tree.leaves, (step(tx.init(x)), expected)), strict=True):
                a, b = np.asarray(a), np.asarray(b)
                if a.dtype.itemsize < 4:  # roundings of sums, which turn few codes
                    assert np.mean(np.float32(a) != np.float32(b)) < 1e-3
                else:
                    np.testing.assert_allclose(a, b, rtol=5e-6, atol=3e-8)
    finally:
        choose(None)
