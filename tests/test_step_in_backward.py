# SPDX-License-Identifier: Apache-2.0
"""The example that takes each layer's step in the backward pass: its steps, and what it saves."""

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adamfn

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def found(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    names = runpy.run_path(str(EXAMPLES / "step_in_backward.py"))
    return names | {"init": jax.jit(names["init"], static_argnums=(1, 2))}


def deepened(params, times):
    """More layers, each unlike the others, without a program that draws them all."""
    factors = 1 + 0.01 * np.arange(times, dtype=np.float32)
    blocks = jax.tree.map(
        lambda leaf: jnp.asarray(np.concatenate([factor * np.asarray(leaf) for factor in factors])),
        params["blocks"],
    )
    return params | {"blocks": blocks}


def assert_same_weights(found, expected, rate):
    wholes = [adamfn.whole_weights(*own) for own in (found, expected)]
    for a, b in zip(*map(jax.tree.leaves, wholes), strict=True):
        # Two programs of one arithmetic: a gradient is summed in another order here and there.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-2 * rate)


@pytest.mark.optimized  # memory
def test_step_in_backward_is_the_ordinary_step_without_its_gradients(found):
    tx = found["optimizer"](lean=False)
    params = deepened(found["init"](jax.random.key(0), 2, "float32"), 16)
    plain, in_backward = found["compiled"](tx, params)
    grads = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    temporary = [step.memory_analysis().temp_size_in_bytes for step in (plain, in_backward)]
    # One layer's gradients, and its slices of weights and moments, are 4 of 32.
    assert temporary[0] - temporary[1] > 0.8 * grads
    windows = jax.random.randint(jax.random.key(1), (found["BATCH"], 65), 0, 128)
    other = jax.tree.map(lambda leaf: leaf + 0, params)  # they are donated
    state = jax.jit(lambda params: found["init_by_layers"](tx, params))(params)
    expected = plain(other, jax.jit(tx.init)(other), windows)
    moved = in_backward(params, state, windows)
    assert float(moved[2]) == pytest.approx(float(expected[2]), rel=1e-6)
    assert_same_weights(moved[:2], expected[:2], found["RATE"])


def test_step_in_backward_with_rounding_is_each_layers_own_step(found):
    layers = 2
    tx = found["optimizer"](lean=True)
    params = found["init"](jax.random.key(0), layers, "bfloat16")
    state = jax.jit(lambda params: found["init_by_layers"](tx, params))(params)
    windows = jax.random.randint(jax.random.key(1), (2, 9), 0, 128)

    @jax.jit
    def layer_by_layer(params, state):
        """All gradients first. Each layer has a state of its own, and so the noise of its own."""
        grads = jax.grad(found["ordinary_loss"])(params, windows)
        ends = adamfn.step(tx, *(tree["ends"] for tree in (grads, state, params)))
        rows = [
            adamfn.step(tx, *found["at"](number, [t["blocks"] for t in (grads, state, params)]))
            for number in range(layers)
        ]
        blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
        return tuple({"ends": a, "blocks": b} for a, b in zip(ends, blocks, strict=True))

    expected, in_backward = (params, state), jax.jit(found["in_backward"](tx))
    for _ in range(3):
        expected = layer_by_layer(*expected)
        params, state, _ = in_backward(params, state, windows)
    assert jax.tree.structure(state) == jax.tree.structure(expected[1])
    assert_same_weights((params, state), expected, found["RATE"])
