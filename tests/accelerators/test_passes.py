# SPDX-License-Identifier: Apache-2.0
"""XLA alone, for moments in blocks on a GPU without kernels."""

import math

import pytest

import adamfn
from adamfn.backends import kernels, passes

SHAPE = (16384, 16384)


@pytest.mark.parametrize(("moments", "moved"), [("8bit", 32.7), ("4bit", 30.2)])
def test_a_leaf_is_read_four_times_and_not_kept(
    measure_chain, machine, monkeypatch, moments, moved
):
    if machine.platform == "tpu":
        pytest.skip("XLA for TPU has a kernel")
    monkeypatch.setattr(kernels, "kernels_on", lambda *_: [passes])
    found = measure_chain(adamfn.adam(1e-3, moments=moments), {"leaf": SHAPE})
    assert found.moved <= moved * math.prod(SHAPE)
    assert found.temporary <= 0.25 * math.prod(SHAPE)
