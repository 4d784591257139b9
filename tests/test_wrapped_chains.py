# SPDX-License-Identifier: Apache-2.0
"""What wrappers of ours, pickles and reloads do to a chain."""

import copy
import importlib

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamfn

PARAMS = {"w": jnp.ones(3), "b": jnp.ones(2)}


def test_contradictions_are_found_in_wrappers():
    wrapped = adamfn.with_backend(adamfn.adam(), "xla")
    with pytest.raises(ValueError, match="add_decayed_weights stands after scale_by_lr"):
        adamfn.chain(wrapped, adamfn.add_decayed_weights(0.1))


def test_a_packed_chain_is_repacked_in_a_wrapper():
    tx = adamfn.adam()
    packed = adamfn.with_backend(adamfn.packed(tx), "xla")
    state = adamfn.repack(packed, tx.init(PARAMS), PARAMS)
    assert jax.tree.structure(state) == jax.tree.structure(packed.init(PARAMS))


def test_adamfn_can_be_reloaded():
    assert importlib.reload(adamfn).adam is not None


@pytest.mark.parametrize(
    "make", [copy.deepcopy, lambda tx: cloudpickle.loads(cloudpickle.dumps(tx))]
)
def test_a_copy_and_a_pickle_beside_optax_take_the_same_step(make):
    tx = adamfn.adamw(0.1)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    hash(tx)
    found, expected = (own.update(PARAMS, own.init(PARAMS), PARAMS)[0] for own in (make(tx), tx))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
