# SPDX-License-Identifier: Apache-2.0
"""A statistic of a leaf ends the fused run: XLA takes it from the update in memory."""

import math

import pytest

import adamfn

STAGES = {"cautious": adamfn.cautious_updates, "clipped": adamfn.clip_updates}
LEAVES = {
    "matrix": ((16384, 16384), None),
    "rows that no tile divides": ((16387, 16384), None),
    "a last axis that no block divides": ((4096, 50257), None),
    "layers in a stack": ((24, 1024, 8192), True),
    "layers of convolutions": ((16, 3, 3, 1024, 2048), True),
}
AIM = {
    "cautious": {"float32": (38, 1), "bfloat16": (28, 0), "8bit": (34.2, 5), "4bit": (32.3, 5)},
    "clipped": {"float32": (36, 0), "bfloat16": (26, 0), "8bit": (29.3, 4.1), "4bit": (27.5, 4.1)},
}
"""Bytes moved and temporary for each parameter, as measured on H100. The run before the statistic
writes the update in float32, and the statistic and the last run read it."""
REACHED_ON_TPU = {
    # XLA for TPU recomputes bfloat16 moments, and decodes nu by blocks through copies of the leaf.
    ("cautious", "bfloat16"): (36.1, 4.1),
    ("clipped", "bfloat16"): (30.1, 2.1),
    ("clipped", "8bit"): (77.5, 24.1),
    ("clipped", "4bit"): (75.5, 24.1),
}
REACHED_ON_GPU = {("cautious", "bfloat16"): (38, 5)}  # XLA makes two kernels of the first run


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("moments", AIM["cautious"])
@pytest.mark.parametrize(
    "leaf",
    [
        "matrix",
        "rows that no tile divides",
        "a last axis that no block divides",
        pytest.param("layers in a stack", marks=pytest.mark.quick),
        "layers of convolutions",
    ],
)
def test_the_update_goes_through_memory(measure_chain, machine, name, moments, leaf):
    shape, stacked = LEAVES[leaf]
    tx = adamfn.chain(
        adamfn.scale_by_moments(moments=moments),
        adamfn.bias_correct(),
        STAGES[name](stacked=stacked),
        adamfn.scale_by_lr(1e-3),
    )
    found = measure_chain(tx, {"leaf": shape})
    moved, temporary = (x / math.prod(shape) for x in (found.moved, found.temporary))
    aim = reached = AIM[name][moments]
    if machine.platform == "tpu":
        reached = REACHED_ON_TPU.get((name, moments), aim)
    else:
        reached = REACHED_ON_GPU.get((name, moments), aim)
    assert moved <= reached[0] + 0.02
    assert temporary <= reached[1] + 0.05
    if moved > aim[0] + 0.02 or temporary > aim[1] + 0.05:
        pytest.xfail(f"{moved:.1f} bytes moved and {temporary:.1f} temporary; the aim is {aim}")
