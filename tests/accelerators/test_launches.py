# SPDX-License-Identifier: Apache-2.0
"""What an update of a whole model needs: launches on a GPU, and temporary memory."""

import math

import jax
import optax
import pytest
from ahead_of_time.trees import TREES
from model_trees import gpt2_small, mixture_of_experts, resnet50

import adamfn

MODELS = {
    "GPT-2 small": gpt2_small(),
    "ResNet-50": resnet50(),
    "stacked transformer": TREES["stacked transformer"],
    "mixture of experts": mixture_of_experts(),
}
models = pytest.mark.parametrize(
    ("name", "moments"),
    [
        pytest.param("GPT-2 small", "8bit", marks=pytest.mark.quick),
        ("GPT-2 small", "4bit"),
        ("GPT-2 small", "float32"),
        ("ResNet-50", "8bit"),
        ("stacked transformer", "8bit"),
        ("mixture of experts", "8bit"),
    ],
)


def sizes(name):
    leaves = jax.tree.leaves(MODELS[name], is_leaf=lambda node: isinstance(node, tuple))
    return [math.prod(shape) for shape in leaves]


@models
def test_small_leaves_share_kernels(measure_chain, machine, name, moments):
    if machine.platform == "tpu":
        pytest.skip("a TPU launches a program once")
    found = measure_chain(adamfn.adam(1e-3, moments=moments), MODELS[name])
    if name in ("GPT-2 small", "ResNet-50"):  # most of their leaves are small
        optax_launches = measure_chain(optax.adam(1e-3), MODELS[name], way="update").launches
        assert found.launches <= optax_launches / 2
    else:
        assert found.launches <= sum(size >= 2**18 for size in sizes(name)) + 10


@models
def test_a_step_needs_no_temporary_memory(measure_chain, name, moments):
    found = measure_chain(adamfn.adam(1e-3, moments=moments), MODELS[name])
    assert found.temporary <= 0.05 * sum(sizes(name))
