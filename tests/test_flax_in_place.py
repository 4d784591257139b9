# SPDX-License-Identifier: Apache-2.0
"""Flax's classes with a donated step: compiled as a user's is, it is in place."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from flax_networks import TRANSFORMATIONS, Network, linen_state, linen_step, train_step

import adamfn
from adamfn.interop.flax import Optimizer, TrainState

pytestmark = pytest.mark.optimized  # memory of compiled programs

native = pytest.mark.skipif(adamfn.backend().name != "native", reason="there is no native code")


def compiled_nnx(cls, name):
    model = Network(1024)
    optimizer = cls(model, TRANSFORMATIONS[name](), wrt=nnx.Param)
    lowered = nnx.jit(train_step, donate_argnums=(0, 1)).lower(model, optimizer)
    return lowered.compile().compiled, nnx.state((model, optimizer))


def compiled_linen(cls, name):
    state = linen_state(cls, TRANSFORMATIONS[name]())
    return jax.jit(linen_step, donate_argnums=0).lower(state).compile(), state


@native
@pytest.mark.parametrize("name", ["8bit", "clipped"])
def test_a_donated_step_needs_memory_for_gradients_alone(name):
    gradients = 4 * 1024**2  # the inner layer's; the others are a hundredth of it
    ours, carried = compiled_nnx(Optimizer, name)
    assert "adamfn_step" in ours.as_text()
    assert ours.memory_analysis().temp_size_in_bytes < 1.1 * gradients
    if name == "8bit":  # in float32 XLA folds the update into the sum
        theirs, _ = compiled_nnx(nnx.Optimizer, name)
        assert theirs.memory_analysis().temp_size_in_bytes > 2 * gradients  # updates too
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(carried))
    assert ours.memory_analysis().alias_size_in_bytes == held


@native
@pytest.mark.parametrize("name", ["8bit", "clipped"])
def test_a_donated_train_state_is_written_in_place(name):
    ours, carried = compiled_linen(TrainState, name)
    assert "adamfn_step" in ours.as_text()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(carried.replace(step=jnp.zeros((), int))))
    assert ours.memory_analysis().alias_size_in_bytes == held
