# SPDX-License-Identifier: Apache-2.0
"""The kernel by Mosaic GPU: in place, without temporary memory, and all of a tile in registers."""

import math
import re

import pytest

import adamfn
from adamfn.backends.gpu import mosaic


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("moments", "shape"),
    [
        pytest.param("8bit", (16384, 16384), marks=pytest.mark.quick),
        ("4bit", (16384, 16384)),
        ("8bit", (16384, 8000)),  # blocks of 160
        ("4bit", (16384, 8160)),  # of 96
        ("8bit", (250003, 768)),  # some are left over
    ],
)
def test_a_tile_is_in_registers(measure_chain, machine, monkeypatch, capfd, moments, dtype, shape):
    if machine.platform == "tpu" or not mosaic.fits_jax():
        pytest.skip("for GPU, and jax 0.12")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    tx = adamfn.with_backend(adamfn.adamw(1e-3, moments=moments), "mosaic_gpu")
    found = measure_chain(tx, {"leaf": shape}, dtype)
    said = "".join(capfd.readouterr())
    assert {int(n) for n in re.findall(r"(\d+) bytes spill", said)} == {0}
    assert all(int(n) <= 128 for n in re.findall(r"Used (\d+) registers", said))
    assert found.kernels == 1 + (shape[0] % 4 > 0)
    # Of the second kernel, which takes four blocks, the whole leaf is counted.
    assert found.moved <= found.kernels * 1.05 * found.least
    assert found.temporary <= 1e-4 * math.prod(shape)
