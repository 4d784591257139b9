"""A mean over a leaf is found in a pass that reads, and writes next to nothing."""

import math

import pytest

import adamfn

MEANS = {"cautious": adamfn.cautious_updates, "clipped": adamfn.clip_updates}
LEAVES = {
    "matrix": ((16384, 16384), None),
    "rows that no tile divides": ((16387, 16384), None),
    "a last axis that no block divides": ((4096, 50257), None),
    "layers in a stack": ((24, 1024, 8192), True),
    "layers of convolutions": ((16, 3, 3, 1024, 2048), True),
}
READ = {"float32": 12, "bfloat16": 8, "8bit": 6.1, "4bit": 5.2}
"""By the pass before the step of a parameter: the gradient, and what is kept."""


@pytest.mark.parametrize("name", MEANS)
@pytest.mark.parametrize("moments", READ)
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
def test_one_more_pass_that_reads(measure_chain, name, moments, leaf):
    shape, stacked = LEAVES[leaf]
    tx = adamfn.chain(
        adamfn.scale_by_moments(moments=moments),
        adamfn.bias_correct(),
        MEANS[name](stacked=stacked),
        adamfn.scale_by_lr(1e-3),
    )
    found = measure_chain(tx, {"leaf": shape})
    parameters = math.prod(shape)
    assert found.moved <= 1.05 * (found.least + READ[moments] * parameters)
    assert found.temporary <= 0.05 * parameters
