# SPDX-License-Identifier: Apache-2.0
"""The native code under the compiler's sanitizers."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def test_under_sanitizers(tmp_path):
    """Address and undefined-behaviour sanitizers over leaves of every kind."""
    cmake = shutil.which("cmake", path=f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")
    if cmake is None or shutil.which("g++") is None:
        pytest.skip("needs CMake and g++")
    flags = "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all"
    defined = [
        f"-DPython_EXECUTABLE={sys.executable}",
        "-DCMAKE_BUILD_TYPE=Sanitized",  # one that adds no flags
        "-DCMAKE_CXX_COMPILER=g++",
        f"-DCMAKE_CXX_FLAGS={flags}",
    ]
    subprocess.run(
        [cmake, "-S", ROOT / "cmake", "-B", tmp_path, "-DSKBUILD_STATE=wheel", *defined],
        check=True,
        capture_output=True,
    )
    subprocess.run([cmake, "--build", tmp_path], check=True, capture_output=True)
    libraries = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    program = """
        import os, jax
        # As if another copy of adamfn had loaded this library.
        vars(jax.ffi)["adamfn_step_v2"] = os.environ["LIBRARY"]
        import jax.numpy as jnp, adamfn
        assert adamfn.backend().name == "native"
        odd = jnp.tile(jnp.array([0.0, 1e-42, 3e38, jnp.inf, -jnp.inf, jnp.nan, 1e-19]), 1300)
        params = {
            "blocks": odd[:8450].reshape(65, 130), "vector": jnp.ones(3), "none": jnp.ones((0,)),
            "alone": jnp.ones(40_000), "half": jnp.ones((64, 100), jnp.bfloat16), "scalar": odd[1],
        }
        for moments in ("float32", "bfloat16", "8bit"):
            tx = adamfn.adamw(moments=moments, nesterov=moments != "8bit")
            step = jax.jit(lambda p, s: adamfn.step(tx, p, s, p))
            p, state = step(params, tx.init(params))
            jax.block_until_ready(step(p, state))
        print("sound")
    """
    environment = {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "LIBRARY": str(tmp_path / "adamfn_native.so"),
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "sound\n", done.stderr[-3000:]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_threads_share_no_memory_without_order(tmp_path):
    """ThreadSanitizer over the tasks of a call, with threads that it sees."""
    kernels = ROOT / "adamfn/backends/cpu"
    sources = (
        ROOT / "tests/native/stress.cc",
        ROOT / "benchmarks/native/workload.cc",
        kernels / "kernels.cc",
    )
    built = tmp_path / "stress"
    flags = [
        "-std=c++17",
        "-O1",
        "-g",
        "-fsanitize=thread",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-pthread",
    ]
    names = [f"-I{kernels}", "-DADAMFN_VARIANT=workload", "-o", built]
    subprocess.run(["g++", *flags, *names, *sources], check=True)
    done = subprocess.run([built], capture_output=True, text=True)
    assert done.stdout == "sound\n", done.stdout + done.stderr[-3000:]
