# SPDX-License-Identifier: Apache-2.0
"""What people's tools do to an optimizer: wrappers, trainers, files, and names of elsewhere.

Optax issue 1148 (wrappers under nnx), flax issue 4423 (files of an nnx.Optimizer), flax issue 5172
(its placement); keras pull 13577 and pytorch issue 67105 (no bias correction).
"""

import pickle
from functools import cache

import chex
import equinox as eqx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import adamfn

FORMATS = ["float32", "8bit", "factored"]  # as arrays, as codes and scales, and without a nu
MEMBERS = ["amsgrad", "nadam", "lazy_adam"]
SHAPE = (128, 128)
STEPS = 20


@cache
def by_leaf(name="adamw"):
    """A member that keeps every leaf in the format that the leaf is named after."""
    return getattr(adamfn, name)(1e-2, moments=lambda path, leaf: path.split("/")[-1])


def leaves_of(name="adamw"):
    return FORMATS if name == "adamw" else ["8bit"]


def weights(name="adamw"):
    return dict.fromkeys(leaves_of(name), jnp.ones(SHAPE))


def gradient(step, name="adamw"):
    noise = np.random.default_rng(step).normal(size=SHAPE)
    return dict.fromkeys(leaves_of(name), jnp.asarray(noise, jnp.float32))


@cache
def by_hand(tx, name="adamw"):
    params = weights(name)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for k in range(STEPS):
        updates, state = update(gradient(k, name), state, params)
        params = adamfn.apply_updates(params, updates)
    return params


def assert_ends_alike(found, expected):
    # Weights near 1, and at each step a sum that is rounded in a program of its own.
    chex.assert_trees_all_close(found, expected, rtol=0, atol=STEPS * 2**-24)


# Wrappers


WRAPPERS = {
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1),
    "partition": lambda tx: optax.partition({"all": tx}, "all"),
    "masked": lambda tx: optax.masked(tx, True),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "named_chain": lambda tx: optax.named_chain(("adam", tx)),
    "chain": lambda tx: optax.chain(optax.clip(1e9), tx),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, lambda step: True),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, lambda step: True),
    "skip_not_finite": lambda tx: optax.MultiSteps(
        tx, 1, should_skip_update_fn=optax.skip_not_finite
    ),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(lambda unused: tx)(unused=1.0),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_twenty_updates_in_a_wrapper(wrap):
    assert_ends_alike(by_hand(wrap(by_leaf())), by_hand(by_leaf()))


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("tx", [adamfn.adam(1e-3), adamfn.scale_by_lr(1e-3)], ids=["adam", "stage"])
def test_a_rate_given_to_update_is_never_dropped(tx, wrap):
    wrapped = wrap(tx)
    params = jnp.array([1.0, 2.0])
    given, _ = wrapped.update(params, wrapped.init(params), params, learning_rate=0.5)
    direct, _ = tx.update(params, tx.init(params), params, learning_rate=0.5)
    np.testing.assert_array_equal(given, direct)
    assert np.all(np.abs(direct) > 0.4)


def test_flatten_hands_on_the_rate():
    tx = optax.flatten(adamfn.adam(1e-3))
    params = {"a": jnp.array([1.0]), "b": jnp.array([2.0])}
    updates, _ = tx.update(params, tx.init(params), params, learning_rate=0.5)
    np.testing.assert_allclose(updates["b"], -0.5, rtol=1e-6)


def test_schedule_free_and_lookahead():
    params = weights()
    free = optax.contrib.schedule_free(by_leaf(), learning_rate=1e-2, b1=0.9)
    ahead = optax.lookahead(by_leaf(), sync_period=5, slow_step_size=1.0)  # takes the fast ones
    pair, state = optax.LookaheadParams(params, params), free.init(params)
    ahead_state, step_free, step_ahead = (
        ahead.init(pair),
        jax.jit(free.update),
        jax.jit(ahead.update),
    )
    for k in range(STEPS):
        updates, ahead_state = step_ahead(gradient(k), ahead_state, pair)
        pair = optax.apply_updates(pair, updates)
        updates, state = step_free(gradient(k), state, params)
        params = optax.apply_updates(params, updates)
    assert_ends_alike(pair.fast, by_hand(by_leaf()))
    for leaf in params.values():  # the average of twenty steps of a hundredth each, at most
        assert np.isfinite(leaf).all()
        assert 0 < np.abs(leaf - 1).max() < 0.2


def test_ours_is_optaxs_class_only_where_it_takes_extra_arguments():
    def update(updates, state, params=None):
        return updates, state

    assert isinstance(adamfn.adam(), optax.GradientTransformationExtraArgs)
    assert isinstance(adamfn.adam(), adamfn.GradientTransformation)
    without = adamfn.GradientTransformation(lambda params: (), update)
    assert not isinstance(without, optax.GradientTransformationExtraArgs)
    wrapped = optax.with_extra_args_support(without)
    assert wrapped.update(1.0, (), 1.0, learning_rate=0.5) == (1.0, ())


# Trainers


class Weights(nnx.Module):
    def __init__(self, values):
        for name, value in values.items():
            setattr(self, "w_" + name, nnx.Param(value))


def in_nnx(values):
    return {"w_" + name: nnx.Param(value) for name, value in values.items()}


def chosen(name):
    return getattr(adamfn, name)(1e-2, moments=lambda path, leaf: path.split("w_")[1].split("/")[0])


@pytest.mark.parametrize(
    ("name", "jit"), [("adamw", False), ("adamw", True), *((name, True) for name in MEMBERS)]
)
def test_twenty_updates_in_an_nnx_optimizer(name, jit):
    model = Weights(weights(name))
    optimizer = nnx.Optimizer(model, chosen(name), wrt=nnx.Param)

    def step(model, optimizer, grads):
        optimizer.update(model, nnx.State(in_nnx(grads)))

    step = nnx.jit(step) if jit else step
    for k in range(STEPS):
        step(model, optimizer, gradient(k, name))
    found = {key: getattr(model, "w_" + key)[...] for key in leaves_of(name)}
    assert_ends_alike(found, by_hand(by_leaf(name), name))


def test_twenty_updates_in_a_model_and_optimizer():
    optimizer = nnx.ModelAndOptimizer(Weights(weights()), chosen("adamw"))
    step = nnx.jit(lambda optimizer, grads: optimizer.update(nnx.State(in_nnx(grads))))
    for k in range(STEPS):
        step(optimizer, gradient(k))
    found = {key: getattr(optimizer.model, "w_" + key)[...] for key in leaves_of()}
    assert_ends_alike(found, by_hand(by_leaf()))


@pytest.mark.parametrize("name", ["adamw", "amsgrad"])
def test_twenty_updates_in_a_train_state(name):
    state = TrainState.create(apply_fn=None, params=weights(name), tx=by_leaf(name))
    step = jax.jit(lambda state, g: state.apply_gradients(grads=g))
    for k in range(STEPS):
        state = step(state, gradient(k, name))
    assert_ends_alike(state.params, by_hand(by_leaf(name), name))


def test_twenty_updates_in_equinox():
    class Model(eqx.Module):
        weights: dict
        activation: object = jax.nn.relu

    model, tx = Model(weights()), by_leaf()
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state, g):
        grads = eqx.tree_at(lambda m: m.weights, eqx.filter(model, eqx.is_inexact_array), g)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state

    for k in range(STEPS):
        model, state = step(model, state, gradient(k))
    assert_ends_alike(model.weights, by_hand(tx))


def test_wrappers_step_a_module_with_leaves_that_are_not_trained():
    class Model(eqx.Module):
        weight: jax.Array
        activation: object = jax.nn.relu

    def everywhere(label):
        return lambda tree: jax.tree.map(lambda _: label, tree)

    model = Model(jnp.ones(2))
    grads = eqx.filter(model, eqx.is_inexact_array)
    for tx in (
        optax.MultiSteps(adamfn.adam(0.5), 1),
        optax.masked(adamfn.adam(0.5), everywhere(True)),
        optax.partition({"all": adamfn.adam(0.5)}, everywhere("all")),
        optax.inject_hyperparams(adamfn.adamw)(0.5, weight_decay=0.0),
    ):
        moved, _ = adamfn.step(tx, grads, tx.init(grads), model)
        np.testing.assert_allclose(moved.weight, 0.5, rtol=1e-6)
        assert moved.activation is jax.nn.relu


# Files


def to_msgpack(tx, state, path):
    path.write_bytes(flax.serialization.to_bytes(state))
    return flax.serialization.from_bytes(tx.init(weights()), path.read_bytes())


def to_pickle(tx, state, path):
    path.write_bytes(pickle.dumps(jax.device_get(state)))
    return pickle.loads(path.read_bytes())


def to_numpy(tx, state, path):
    """A flat file by names, as safetensors is; npz knows no bfloat16, so of the bytes it has."""
    with_paths, treedef = jax.tree.flatten_with_path(state)
    named = {jax.tree_util.keystr(key): np.asarray(x) for key, x in with_paths}
    np.savez(path, **{name: x.reshape(-1).view(np.uint8) for name, x in named.items()})
    with np.load(path.with_suffix(".npz")) as file:
        back = [file[name].view(x.dtype).reshape(x.shape) for name, x in named.items()]
    return treedef.unflatten(map(jnp.asarray, back))


def to_orbax(tx, state, path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path, tx.init(weights()))


@pytest.mark.parametrize("there_and_back", [to_msgpack, to_pickle, to_numpy, to_orbax])
def test_a_state_goes_through_a_file_to_the_bit(there_and_back, tmp_path):
    tx = by_leaf()
    params = weights()
    _, state = tx.update(gradient(0), tx.init(params), params)
    back = there_and_back(tx, state, tmp_path / "state")
    chex.assert_trees_all_equal(back, state)
    chex.assert_trees_all_equal_dtypes(back, state)
    expected, _ = tx.update(gradient(1), state, params)
    found, _ = tx.update(gradient(1), back, params)
    chex.assert_trees_all_equal(found, expected)


# Names of elsewhere


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        ((), {"lr": 1e-3}, r"found the argument lr=0.001; the rate is learning_rate="),
        ((), {"betas": (0.9, 0.99)}, r"the decays are b1= and b2="),
        ((), {"amsgrad": True}, r"amsgrad\(\.\.\.\)"),
        ((), {"bias_correction": False}, r"chain\(scale_by_moments"),
        ((), {"epsilom": 1e-8}, r"it takes learning_rate, b1, b2, eps, "),
        ((1e-3, *[0.9] * 8), {}, r"0.9 as the \dth; expected at most \d: learning_rate"),
    ],
)
@pytest.mark.parametrize("name", ["adamw", *MEMBERS])
def test_other_libraries_names_are_explained(name, arguments, keywords, message):
    with pytest.raises(TypeError, match=rf"^{name}: .*{message}"):
        getattr(adamfn, name)(*arguments, **keywords)


def test_adam_says_where_decay_is():
    with pytest.raises(TypeError, match=r"adam: .*weight_decay=0.1; decoupled decay is adamw\("):
        adamfn.adam(weight_decay=0.1)


@pytest.mark.parametrize(
    ("moments", "name"),
    [
        (None, "float32"),
        (jnp.float32, "float32"),
        (np.float32, "float32"),
        (jnp.bfloat16, "bfloat16"),
        (jnp.dtype("bfloat16"), "bfloat16"),
        (lambda path, leaf: jnp.bfloat16, "bfloat16"),
        (lambda path, leaf: None, "float32"),
    ],
)
def test_moments_may_be_a_dtype_or_none(moments, name):
    state = adamfn.adam(moments=moments).init(jnp.zeros(SHAPE))
    chex.assert_trees_all_equal(state, adamfn.adam(moments=name).init(jnp.zeros(SHAPE)))


def test_a_forgotten_first_argument_of_step():
    tx = adamfn.adam()
    params = {"w": jnp.ones(SHAPE)}
    with pytest.raises(
        TypeError, match=r"^step\(tx, grads, state, params\): tx is a dict; expected"
    ):
        adamfn.step(params, tx.init(params), params)
    with pytest.raises(TypeError, match=r"step: found no params; expected step\(tx, grads"):
        adamfn.step(tx, params, tx.init(params))


# Without the correction (transformers' correct_bias=False, apex's bias_correction=False)


def test_without_the_bias_correction():
    tx = adamfn.chain(adamfn.scale_by_moments(eps=0.0), adamfn.scale_by_lr(0.1))
    params = jnp.zeros(4)
    state = tx.init(params)
    mu = nu = np.zeros(4)
    for k in range(10):
        g = np.random.default_rng(k).normal(size=4)
        mu, nu = 0.9 * mu + 0.1 * g, 0.999 * nu + 0.001 * g * g
        updates, state = tx.update(jnp.asarray(g, jnp.float32), state, params)
        np.testing.assert_allclose(updates, -0.1 * mu / np.sqrt(nu), rtol=1e-5)
