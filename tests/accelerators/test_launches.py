"""How many kernels an update launches on a GPU, over a model of which most leaves are small."""

import optax
import pytest
from model_trees import gpt2_small, resnet50

import adamfn

MODELS = {"GPT-2 small": gpt2_small, "ResNet-50": resnet50}


@pytest.mark.parametrize(
    ("name", "moments"),
    [
        pytest.param("GPT-2 small", "8bit", marks=pytest.mark.quick),
        ("GPT-2 small", "4bit"),
        ("GPT-2 small", "float32"),
        ("ResNet-50", "8bit"),
    ],
)
def test_half_as_many_as_optax_launches(measure_chain, machine, name, moments):
    if machine.platform == "tpu":
        pytest.skip("a TPU launches a program once")
    shapes = MODELS[name]()
    found = measure_chain(adamfn.adam(1e-3, moments=moments), shapes)
    assert found.launches <= measure_chain(optax.adam(1e-3), shapes, way="update").launches / 2
    assert found.temporary <= 0.001 * found.least
