# SPDX-License-Identifier: Apache-2.0
"""adamfn among the libraries it is used with, each the real one, by the numbers they arrive at.

Tolerances, relative to the largest entry:
- `ROUNDING`: the same float32 formula, fused by XLA in another order, over a few steps.
- `OPTAX`: optax takes 1 - b2^t in float32 as a difference, and is up to 2e-5 off in early steps.
"""

import subprocess
import sys
import warnings
from functools import cache

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import nnx
from flax.training.train_state import TrainState

import adamfn

ROUNDING = 1e-6
OPTAX = 3e-5

PARAMS = {"w": np.linspace(-1, 2, 6, dtype=np.float32).reshape(2, 3), "b": np.float32([0.5, -3])}
NORMAL = np.random.default_rng(0).standard_normal
GRADS = [{"w": np.float32(NORMAL((2, 3))), "b": np.float32(NORMAL(2) * 1e-3)} for _ in range(6)]


@pytest.fixture(autouse=True)
def _own_trace_counts():
    chex.clear_trace_counter()  # chex counts by a function's name and line, over all tests


def params():
    return jax.tree.map(jnp.array, PARAMS)


def grads():
    return [jax.tree.map(jnp.array, g) for g in GRADS]


def train(tx, gradients=None, start=None, **extra):
    """The parameters and the state after one jitted step for each of the gradients."""
    start = params() if start is None else start
    update = jax.jit(tx.update)
    state = tx.init(start)
    for g in grads() if gradients is None else gradients:
        updates, state = update(g, state, start, **extra)
        start = optax.apply_updates(start, updates)
    return start, state


@cache
def alone():
    """Adam as it is without whatever a test puts around it."""
    return train(adamfn.adam(0.1))


def assert_close(found, expected, tolerance=ROUNDING):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        scale = np.max(np.abs(b), initial=1e-30)
        np.testing.assert_allclose(
            a, b, rtol=0, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path)
        )


def avals(tree):
    """What jit keys its cache by, leaf by leaf."""
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


def adam64(start, gradients, **hyperparameters):
    """Parameters after Adam in float64, leaf by leaf."""
    return {
        name: leaf + reference.updates([g[name] for g in gradients], **hyperparameters).sum(0)
        for name, leaf in start.items()
    }


# Chains with optax


def clipped64(gradients, bound):
    for g in gradients:
        norm = np.sqrt(sum(np.sum(np.float64(leaf) ** 2) for leaf in g.values()))
        yield {name: leaf * min(1, bound / norm) for name, leaf in g.items()}


@pytest.mark.parametrize("chain", [optax.chain, adamfn.chain])
def test_chain_with_optax_clipping(chain):
    found, _ = train(chain(optax.clip_by_global_norm(0.5), adamfn.adam(0.1)))
    clipped = list(clipped64(GRADS, 0.5))
    assert any(np.any(c["w"] != g["w"]) for c, g in zip(clipped, GRADS, strict=True))
    assert_close(found, adam64(PARAMS, clipped, learning_rate=0.1))


def test_optax_stages_after_ours_in_adamfn_chain():
    tx = adamfn.chain(
        adamfn.scale_by_moments(),
        adamfn.bias_correct(),
        optax.add_decayed_weights(0.3),
        optax.scale_by_learning_rate(0.1),
    )
    assert_close(train(tx)[0], train(adamfn.adamw(0.1, weight_decay=0.3))[0])


def test_our_rate_after_optax_stages():
    tx = optax.chain(optax.scale_by_adam(), adamfn.scale_by_lr(0.1))
    assert_close(train(tx)[0], train(optax.adam(0.1))[0])


def test_the_whole_chain_agrees_with_optax():
    ours = train(adamfn.adamw(0.1, weight_decay=0.3, eps_root=1e-6, nesterov=True))
    theirs = train(optax.nadamw(0.1, weight_decay=0.3, eps_root=1e-6))
    assert_close(ours[0], theirs[0], OPTAX)
    for moment in ("mu", "nu"):
        assert_close(optax.tree.get(ours[1], moment), optax.tree.get(theirs[1], moment))


def as_optax(tx):
    return optax.GradientTransformationExtraArgs(*tx)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: tx,
        lambda tx: adamfn.chain(optax.clip(9.0), tx),
        lambda tx: adamfn.chain(adamfn.chain(optax.clip(9.0)), adamfn.chain(adamfn.chain(tx))),
        lambda tx: optax.chain(optax.clip(9.0), as_optax(tx)),
        lambda tx: adamfn.chain(optax.chain(optax.clip(9.0), as_optax(tx))),
        lambda tx: optax.apply_if_finite(as_optax(tx), 3),
    ],
    ids=["alone", "chain", "nested", "optax.chain", "optax.chain in chain", "apply_if_finite"],
)
def test_learning_rate_at_update_reaches_through(wrap):
    found, state = train(wrap(adamfn.adam(5.0)), learning_rate=0.1)
    assert_close(found, alone()[0])
    assert optax.tree.get(state, "learning_rate") == np.float32(0.1)


def test_chain_passes_extra_arguments_to_optax_stages_that_take_them():
    plateau = optax.contrib.reduce_on_plateau(factor=0.25, patience=1)
    tx = adamfn.chain(adamfn.scale_by_lr(1.0), plateau, optax.clip(9.0))
    start = params()
    state = tx.init(start)
    scales = []
    for _ in range(4):  # a loss that does not fall
        updates, state = tx.update(start, state, start, value=1.0)
        scales.append(float(-updates["b"][0] / start["b"][0]))
    assert scales == [1.0, 0.25, 0.0625, 0.015625]


def test_chain_passes_extra_arguments_to_a_stage_that_takes_only_its_own():
    def scale_by_value(updates, state, params=None, *, value):
        return jax.tree.map(lambda u: value * u, updates), state

    own = optax.GradientTransformationExtraArgs(optax.init_empty_state, scale_by_value)
    found, _ = train(adamfn.chain(own, adamfn.scale_by_lr(9.0)), value=4.0, learning_rate=0.5)
    assert_close(found, {name: PARAMS[name] - 2 * sum(g[name] for g in GRADS) for name in PARAMS})


# Wrappers of optax


def test_multi_steps_averages_gradients():
    wrapped = optax.MultiSteps(adamfn.adam(0.1), every_k_schedule=3)
    update = jax.jit(wrapped.update)
    found, state = params(), wrapped.init(params())
    for step, g in enumerate(grads()):
        updates, state = update(g, state, found)
        moved = [bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(updates)]
        assert moved == [step % 3 == 2] * 2
        found = optax.apply_updates(found, updates)
    means = [
        jax.tree.map(lambda *g: np.mean(g, axis=0), *GRADS[first : first + 3]) for first in (0, 3)
    ]
    expected, alone = train(adamfn.adam(0.1), means)
    assert_close(found, expected)
    assert_close(state.inner_opt_state, alone)


def test_masked_leaves_pass_untouched():
    tx = optax.masked(adamfn.adam(0.1), {"w": True, "b": False})
    found, state = train(tx)
    assert_close(found["w"], alone()[0]["w"])
    assert_close(found["b"], PARAMS["b"] + sum(g["b"] for g in GRADS))
    assert [x.shape for x in jax.tree.leaves(optax.tree.get(state, "mu"))] == [(2, 3)]


def test_partition_gives_each_group_its_own():
    start = {**params(), "frozen": jnp.ones(2)}
    gradients = [{**g, "frozen": jnp.ones(2)} for g in grads()]
    labels = {"w": "fast", "b": "slow", "frozen": "none"}
    tx = optax.partition(
        {
            "fast": adamfn.adam(0.1),
            "slow": adamfn.adamw(0.01, weight_decay=0.5),
            "none": optax.set_to_zero(),
        },
        labels,
    )
    found, _ = train(tx, gradients, start)
    assert_close(found["w"], alone()[0]["w"])
    assert_close(found["b"], train(adamfn.adamw(0.01, weight_decay=0.5))[0]["b"])
    np.testing.assert_array_equal(found["frozen"], start["frozen"])


def test_apply_if_finite_skips_a_nan():
    tx = optax.apply_if_finite(adamfn.adamw(optax.linear_schedule(0.1, 0.0, 10)), 5)
    update = jax.jit(tx.update)
    before, state = train(tx, grads()[:3])
    broken = jax.tree.map(lambda g: g.at[0].set(jnp.nan), grads()[3])
    updates, skipped = update(broken, state, before)
    chex.assert_trees_all_equal(optax.apply_updates(before, updates), before)
    chex.assert_trees_all_equal(skipped.inner_state, state.inner_state)
    assert skipped.total_notfinite == 1
    # From there on as if the broken step had never been.
    resumed = update(grads()[3], skipped, before)
    straight = update(grads()[3], state, before)
    chex.assert_trees_all_equal(resumed[0], straight[0])
    chex.assert_trees_all_equal(resumed[1].inner_state, straight[1].inner_state)


def test_injected_learning_rate_is_set_in_the_state_without_retrace():
    tx = optax.inject_hyperparams(adamfn.adamw, static_args="mask")(
        learning_rate=5.0, weight_decay=0.0, mask=lambda p: {"w": True, "b": False}
    )
    update = jax.jit(chex.assert_max_traces(tx.update, n=1))
    start = params()
    state = tx.init(start)
    for rate in (0.1, 0.2, 0.4):
        state.hyperparams["learning_rate"] = jnp.float32(rate)
        state.hyperparams["weight_decay"] = jnp.float32(rate / 4)
        updates, state = update(grads()[0], state, start)
        # The same gradient again and again: its direction is its sign, up to eps over |g|.
        direction = -np.sign(GRADS[0]["w"]) - rate / 4 * PARAMS["w"]
        assert_close(updates["w"], rate * direction, tolerance=1e-5)
        assert optax.tree.get(state, "learning_rate") == np.float32(rate)


def test_map_params_labels_and_places_the_state():
    tx = adamfn.adamw(0.1)
    mesh = jax.make_mesh((1,), ("x",))
    replicated = jax.NamedSharding(mesh, jax.P())
    specs = {"w": jax.NamedSharding(mesh, jax.P(None, "x")), "b": replicated}
    state = tx.init(params())
    labels = optax.tree.map_params(
        tx, lambda leaf, spec: spec, state, specs, transform_non_params=lambda leaf: replicated
    )
    assert labels[0].mu == labels[0].nu == specs
    assert {labels[0].count, labels[3].learning_rate} == {replicated}
    placed = jax.device_put(state, labels)
    moved, after = jax.jit(tx.update, out_shardings=(specs, labels))(
        grads()[0], placed, jax.device_put(params(), specs)
    )
    assert_close(moved, tx.update(grads()[0], state, params())[0])
    assert after[0].mu["w"].sharding == specs["w"]


def test_optax_tree_tools_find_fields():
    _, state = train(adamfn.adam(0.125), grads()[:1])
    assert_close(optax.tree.get(state, "mu"), jax.tree.map(lambda g: 0.1 * g, GRADS[0]))
    assert_close(optax.tree.get(state, "nu"), jax.tree.map(lambda g: 0.001 * g * g, GRADS[0]))
    assert optax.tree.get(state, "learning_rate") == 0.125
    assert optax.tree.get(state, "count") == 1
    emptied = optax.tree.set(state, mu=optax.tree.zeros_like(params()))
    assert not np.any(emptied[0].mu["w"])


def test_schedule_free():
    # With a constant rate, evaluation is at the mean of the iterates z of the base optimizer, and
    # gradients are taken at y, 0.9 of the way to it. y is kept, and x had by division by 0.9.
    base = adamfn.adam(0.1, b1=0)
    found, state = train(optax.contrib.schedule_free(base, 0.1, b1=0.9))
    average = optax.contrib.schedule_free_eval_params(state, found)
    for name, start in PARAMS.items():
        moves = reference.updates([g[name] for g in GRADS], 0.1, b1=0)
        z = start + np.cumsum(moves, axis=0)
        assert_close(state.z[name], z[-1])
        assert_close(average[name], z.mean(axis=0), 5 * ROUNDING)
        assert_close(found[name], 0.9 * z.mean(axis=0) + 0.1 * z[-1], 5 * ROUNDING)


@pytest.mark.parametrize("reset_state", [False, True])
def test_lookahead(reset_state):
    tx = optax.lookahead(adamfn.adam(0.1), 3, slow_step_size=0.5, reset_state=reset_state)
    found, _ = train(tx, start=optax.LookaheadParams.init_synced(params()))
    for name, slow in PARAMS.items():
        gradients = [g[name] for g in GRADS]
        if reset_state:
            periods = [reference.updates(part, 0.1) for part in (gradients[:3], gradients[3:])]
        else:
            periods = np.split(reference.updates(gradients, 0.1), 2)
        for moves in periods:
            slow = slow + 0.5 * moves.sum(0)
        assert_close(found.slow[name], slow)
        assert_close(found.fast[name], slow)


SCHEDULES = {
    "constant": optax.constant_schedule(0.3),
    "linear": optax.linear_schedule(1.0, 0.1, 4, transition_begin=1),
    "exponential": optax.exponential_decay(1.0, 2, 0.5, staircase=True),
    "piecewise": optax.piecewise_constant_schedule(1.0, {2: 0.5, 4: 0.1}),
    "warmup cosine": optax.warmup_cosine_decay_schedule(0.0, 1.0, 2, 6),
    "joined": optax.join_schedules(
        [lambda count: 0.5 * count, optax.cosine_decay_schedule(1, 4)], [2]
    ),
}


UNIT = adamfn.adam(1.0)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_schedules_are_taken_at_the_count_from_zero(schedule):
    scheduled = adamfn.adam(schedule)
    state, unit_state = scheduled.init(params()), UNIT.init(params())
    assert optax.tree.get(state, "learning_rate") == schedule(0)
    for step, g in enumerate(grads()):
        updates, state = jax.jit(scheduled.update)(g, state)
        direction, unit_state = jax.jit(UNIT.update)(g, unit_state)
        rate = schedule(jnp.int32(step))
        assert_close(optax.tree.get(state, "learning_rate"), rate)
        assert_close(updates, jax.tree.map(lambda d, rate=rate: rate * d, direction))


# Flax


def loss_of(apply, weights, x):
    return jnp.mean((apply(weights, x) - 1) ** 2)


X = np.float32(np.random.default_rng(2).standard_normal((8, 3)))


def train_by_hand(tx, weights, steps, **extra):
    """Trains `x @ kernel + bias` towards 1 with plain pytrees."""
    state = tx.init(weights)
    for _ in range(steps):
        g = jax.grad(lambda w: loss_of(lambda w, x: x @ w["kernel"] + w["bias"], w, X))(weights)
        updates, state = tx.update(g, state, weights, **extra)
        weights = adamfn.apply_updates(weights, updates)
    return weights


@pytest.mark.parametrize("extra", [{}, {"learning_rate": 0.05}], ids=["own rate", "given rate"])
def test_nnx_optimizer(extra):
    tx = adamfn.adamw(0.1, weight_decay=0.1)
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    weights = {"kernel": model.kernel[...], "bias": model.bias[...]}
    expected = train_by_hand(tx, weights, 5, **extra)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda m: jnp.mean((m(X) - 1) ** 2))(model), **extra)

    for _ in range(5):
        step(model, optimizer)
    # Gradients of another compilation differ by roundings, which nearly cancelled sums magnify.
    assert_close({"kernel": model.kernel[...], "bias": model.bias[...]}, expected, 1e-5)
    assert optax.tree.get(optimizer.opt_state, "learning_rate")[...] == np.float32(
        extra.get("learning_rate", 0.1)
    )


def test_linen_train_state():
    tx = adamfn.adamw(0.1, weight_decay=0.1)
    model = nn.Dense(2)
    variables = model.init(jax.random.key(0), X)
    state = TrainState.create(apply_fn=model.apply, params=variables["params"], tx=tx)

    @jax.jit
    def step(state):
        g = jax.grad(lambda p: loss_of(lambda p, x: state.apply_fn({"params": p}, x), p, X))(
            state.params
        )
        return state.apply_gradients(grads=g)

    for _ in range(5):
        state = step(state)
    # As above.
    assert_close(dict(state.params), train_by_hand(tx, variables["params"], 5), 1e-5)
    assert state.step == optax.tree.get(state.opt_state[0], "count") == 5


# Equinox


class Model(eqx.Module):
    kernel: jax.Array
    bias: jax.Array
    absent: jax.Array | None
    steps: jax.Array  # an integer
    activation: object  # a leaf that is no array
    name: str = eqx.field(static=True)

    def __call__(self, x):
        return self.activation(x @ self.kernel + self.bias)


def test_equinox_modules_with_filtered_leaves():
    weights = {"kernel": jnp.array(NORMAL((3, 2)), jnp.float32), "bias": jnp.zeros(2)}
    model = Model(**weights, absent=None, steps=jnp.array(7), activation=lambda x: x, name="line")
    tx = adamfn.adamw(0.1, weight_decay=0.1)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    assert len(jax.tree.leaves(state[0].mu)) == 2

    @eqx.filter_jit
    def step(model, state):
        g = eqx.filter_grad(lambda m: jnp.mean((m(X) - 1) ** 2))(model)
        updates, state = tx.update(g, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), adamfn.apply_updates(model, updates), state

    for _ in range(5):
        model, ours, state = step(model, state)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(model), strict=True):
            assert a is b or np.array_equal(a, b)
    expected = train_by_hand(tx, weights, 5)
    assert_close({"kernel": model.kernel, "bias": model.bias}, expected, 1e-5)  # as above
    assert (model.absent, int(model.steps), model.name) == (None, 7, "line")


# JAX


def stacked(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def test_scan_over_steps():
    tx = adamfn.adamw(optax.linear_schedule(0.1, 0.0, 10))

    def step(carry, g):
        p, state = carry
        updates, state = tx.update(g, state, p)
        return (adamfn.apply_updates(p, updates), state), None

    found, _ = jax.lax.scan(step, (params(), tx.init(params())), stacked(grads()))
    assert_close(found, train(tx))


def test_vmap_over_learning_rates():
    rates = jnp.array([0.5, 0.1, 0.003])
    found = jax.vmap(lambda rate: train(adamfn.adam(rate))[0])(rates)
    given = jax.vmap(lambda rate: train(adamfn.adam(9.0), learning_rate=rate)[0])(rates)
    for i, rate in enumerate((0.5, 0.1, 0.003)):
        expected = train(adamfn.adam(rate))[0]
        assert_close(jax.tree.map(lambda x, i=i: x[i], found), expected)
        assert_close(jax.tree.map(lambda x, i=i: x[i], given), expected)


def test_vmap_over_stacked_parameters():
    tx = adamfn.adamw(0.1, weight_decay=0.3)
    starts = [params(), jax.tree.map(lambda p: 2 * p, params())]
    state = jax.vmap(tx.init)(stacked(starts))
    found = stacked(starts)
    for g, h in zip(grads(), reversed(grads()), strict=True):
        updates, state = jax.vmap(tx.update)(stacked([g, h]), state, found)
        found = jax.vmap(adamfn.apply_updates)(found, updates)
    expected = [
        train(tx, gradients, start)
        for gradients, start in zip((grads(), grads()[::-1]), starts, strict=True)
    ]
    assert_close((found, state), stacked(expected))


def test_meta_gradient_of_the_learning_rate():
    curvature, start = np.array([1.0, 3.0, 0.2]), np.array([1.0, -2.0, 0.5])

    def loss64(rate):
        p, seen = start, []
        for _ in range(4):
            seen.append(2 * curvature * p)
            p = p + reference.updates(seen, rate)[-1]
        return np.sum(curvature * p**2)

    def loss(rate):
        tx = adamfn.adam(rate)
        p = jnp.float32(start)
        state = tx.init(p)
        for _ in range(4):
            updates, state = tx.update(2 * jnp.float32(curvature) * p, state)
            p = adamfn.apply_updates(p, updates)
        return jnp.sum(jnp.float32(curvature) * p**2)

    slope = (loss64(0.1 + 1e-6) - loss64(0.1 - 1e-6)) / 2e-6  # right to 1e-9
    # Four float32 steps and their derivative: some dozens of roundings of 6e-8.
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(0.1), slope, rtol=1e-5)


@pytest.mark.parametrize("nesterov", [False, True])
def test_derivative_at_a_zero_gradient_is_finite_with_eps_root(nesterov):
    tx = adamfn.adam(0.1, eps=1e-3, eps_root=1e-6, nesterov=nesterov)
    slope = jax.grad(lambda g: tx.update(g, tx.init(g))[0])(jnp.float32(0))
    # u = -0.1 k g / (sqrt(g^2 + 1e-6) + 1e-3), and k = 1 without a look ahead.
    k = 0.9 * 0.1 / (1 - 0.9**2) + 1 if nesterov else 1
    np.testing.assert_allclose(slope, -0.1 * k / 2e-3, rtol=1e-6)


@pytest.mark.parametrize("make_state", [lambda tx: tx.init, lambda tx: jax.jit(tx.init)])
def test_donation(make_state):
    tx = adamfn.adamw(optax.linear_schedule(0.1, 0.0, 10))

    def step(p, state, g):
        updates, state = tx.update(g, state, p)
        return adamfn.apply_updates(p, updates), state

    donating = jax.jit(step, donate_argnums=(0, 1))
    p, state = params(), make_state(tx)(params())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # JAX warns of donated buffers that it cannot use
        for g in grads():
            given = jax.tree.leaves((p, state[:3]))  # the rate of the step before is not read
            p, state = donating(p, state, g)
            assert all(leaf.is_deleted() for leaf in given)
    assert_close((p, state), train(tx))


@pytest.mark.parametrize(
    "tx", [adamfn.adam(), adamfn.adamw(optax.linear_schedule(1, 0, 9))], ids=["adam", "adamw"]
)
def test_eval_shape_tells_what_comes(tx):
    state = tx.init(params())
    shapes = jax.eval_shape(tx.init, params())
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, state)
    found = jax.eval_shape(tx.update, grads()[0], shapes, params())
    updates = tx.update(grads()[0], state, params())
    chex.assert_trees_all_equal_shapes_and_dtypes(found, updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(found[1], state)


@pytest.mark.parametrize(
    "tx",
    [
        adamfn.adam(),
        adamfn.adam(np.float32(1e-3), b2=np.float64(0.99)),
        adamfn.adam(jnp.asarray(1e-3), b1=jnp.asarray(0.9)),
        adamfn.adamw(optax.cosine_decay_schedule(1.0, 9), weight_decay=lambda count: 0.1),
        optax.inject_hyperparams(adamfn.adamw)(1e-3),
    ],
    ids=["numbers", "numpy", "weak arrays", "schedules", "injected"],
)
def test_second_step_is_not_traced(tx):
    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(p, state, g):
        updates, state = tx.update(g, state, p)
        return adamfn.apply_updates(p, updates), state

    p, state = params(), tx.init(params())
    for g in grads():
        p, state = step(p, state, g)
    assert np.any(p["w"] != PARAMS["w"])


@pytest.mark.parametrize("rate", [0.1, np.float32(0.1), jnp.asarray(0.1), jnp.bfloat16(0.1)])
def test_weakly_typed_scalars(rate):
    weak, strong = jnp.asarray(1.0), jnp.float32(1)
    assert weak.weak_type
    tx = adamfn.adamw(0.1)
    state = tx.init(weak)
    assert avals(state) == avals(tx.init(strong))
    # A weak gradient and a rate of any kind leave the state as jit knows it.
    updates, after = tx.update(jnp.asarray(0.5), state, weak, learning_rate=rate)
    assert avals(after) == avals(state)
    assert avals(updates) == avals(strong)
    assert avals(adamfn.apply_updates(weak, updates)) == avals(strong)
    expected = -float(rate) * (1 + 0.01)  # adamw's first step, with its decay of 1e-2
    np.testing.assert_allclose(updates, expected, rtol=1e-6)


def test_import_loads_no_optional_library():
    code = (
        "import sys, adamfn; print(sorted({'optax', 'flax', 'torch', 'equinox', 'orbax',"
        " 'sklearn', 'matplotlib'} & {name.split('.')[0] for name in sys.modules}),"
        " 'jax.experimental.pallas' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[] False"
