# SPDX-License-Identifier: Apache-2.0
"""adamfn.interop.optax: a run goes on in the other library."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamfn
from adamfn.interop.optax import from_state, to_state

PARAMS = {
    "a": jnp.linspace(-1, 1, 6).reshape(2, 3),
    "b": {"mu": jnp.ones(3), "count": jnp.ones(())},
}
MASK = {"a": True, "b": False}
SCHEDULE = optax.linear_schedule(0.1, 0.01, 12)

# The pairs do the same, each within rounding; the second is ours.
PAIRS = {
    "adam": (optax.adam(0.01), adamfn.adam(0.01)),
    "adamw": (optax.adamw(0.01, weight_decay=0.1), adamfn.adamw(0.01, weight_decay=0.1)),
    "nadam": (optax.nadam(0.01), adamfn.adam(0.01, nesterov=True)),
    "schedule": (optax.adam(SCHEDULE), adamfn.adam(SCHEDULE)),
    "chain": (
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(SCHEDULE, weight_decay=0.1)),
        adamfn.chain(
            optax.clip(9.0),
            optax.clip_by_global_norm(1.0),
            adamfn.adamw(SCHEDULE, weight_decay=0.1),
        ),
    ),
    "injected": (
        optax.inject_hyperparams(optax.adam)(SCHEDULE),
        optax.inject_hyperparams(adamfn.adam)(SCHEDULE),
    ),
    "masked": (
        optax.masked(optax.adam(0.01), MASK),
        optax.masked(adamfn.adam(0.01), MASK),
    ),
    "partition": (
        optax.partition({"x": optax.adam(0.01), "y": optax.adamw(0.03)}, {"a": "x", "b": "y"}),
        optax.partition(
            {"x": adamfn.adam(0.01), "y": adamfn.adamw(0.03, weight_decay=1e-4)},
            {"a": "x", "b": "y"},
        ),
    ),
    "multi_steps": (
        optax.MultiSteps(optax.adam(0.01), 1),
        optax.MultiSteps(adamfn.adam(0.01), 1),
    ),
    "lookalike": (optax.adam(0.01, mu_dtype=jnp.bfloat16), adamfn.adam(0.01)),
}


@cache
def training_step(update):
    """Compiled once for each transformation, to be shared by the tests."""

    @jax.jit
    def step(params, state, count):
        def gradient(x):  # of the squared distance to a place that moves
            return 2 * (x - jnp.sin(7 * count + jnp.arange(x.size)).reshape(x.shape))

        updates, state = update(jax.tree.map(gradient, params), state, params)
        return adamfn.apply_updates(params, updates), state

    return step


def train(tx, params, state, first, last):
    for count in range(first, last):
        params, state = training_step(tx.update)(params, state, np.float32(count))
    return params, state


@pytest.mark.parametrize("pair", PAIRS)
def test_a_run_goes_on(pair):
    theirs, ours = PAIRS[pair]
    for source, target, move in ((theirs, ours, from_state), (ours, theirs, to_state)):
        params, state = train(source, PARAMS, source.init(PARAMS), 0, 6)
        whole, _ = train(source, params, state, 6, 12)
        found, _ = train(target, params, move(state, like=target.init(params)), 6, 12)
        # optax's corrections are 1e-5 off; with mu in bfloat16 its averages are 4e-3 off.
        tolerance = 1e-2 if pair == "lookalike" else 2e-5
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(a, b, atol=tolerance * 0.1, rtol=tolerance * 0.1)
        # Without the state it would not.
        fresh, _ = train(target, params, target.init(params), 6, 12)
        assert max(np.abs(fresh["a"] - whole["a"]).ravel()) > 1e-3


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair != "lookalike"])
def test_there_and_back_is_the_same_to_the_bit(pair):
    theirs, ours = PAIRS[pair]
    _, state = train(theirs, PARAMS, theirs.init(PARAMS), 0, 5)
    here = from_state(state, like=ours.init(PARAMS))
    back = to_state(here, like=theirs.init(PARAMS))
    moments = {"mu", "nu", "count"}
    for (path, a), b in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(back), strict=True):
        if moments & {getattr(key, "name", None) for key in path}:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


STEPPED = ["adam", "adamw", "schedule", "chain", "injected", "masked", "partition"]


def train_by_step(tx, params, state, first, last):
    """As `train`, by `adamfn.step`, in which our own move the parameters themselves."""

    @jax.jit
    def step(params, state, count):
        def gradient(x):
            return 2 * (x - jnp.sin(7 * count + jnp.arange(x.size)).reshape(x.shape))

        return adamfn.step(tx, jax.tree.map(gradient, params), state, params)

    for count in range(first, last):
        params, state = step(params, state, np.float32(count))
    return params, state


@pytest.mark.parametrize("pair", STEPPED)
def test_what_step_returns_needs_no_conversion(pair):
    theirs, ours = PAIRS[pair]
    params, state = train(theirs, PARAMS, theirs.init(PARAMS), 0, 4)
    whole, _ = train(theirs, params, state, 4, 12)
    state = from_state(state, like=ours.init(params))
    params, state = train_by_step(ours, params, state, 4, 8)
    state = to_state(state, like=theirs.init(params))
    found, _ = train(theirs, params, state, 8, 12)
    for a, b in zip(*map(jax.tree.leaves, (found, whole)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6, rtol=2e-6)  # as in a run that goes on


def test_packed_states_go_by_way_of_plain_ones():
    theirs, ours = PAIRS["adamw"]
    packed = adamfn.packed(ours)
    params, state = train_by_step(packed, PARAMS, packed.init(PARAMS), 0, 3)
    like = theirs.init(params)
    with pytest.raises(ValueError, match=r"to_state: state is packed.*adamfn\.repack"):
        to_state(state, like=like)
    with pytest.raises(ValueError, match=r"from_state: like is packed.*adamfn\.repack"):
        from_state(like, like=packed.init(params))
    plain = adamfn.repack(packed, state, params)
    moved = to_state(plain, like=like)
    _, expected = train_by_step(ours, PARAMS, ours.init(PARAMS), 0, 3)
    for field in ("mu", "nu"):
        jax.tree.map(
            np.testing.assert_array_equal, getattr(moved[0], field), getattr(expected[0], field)
        )
    back = adamfn.repack(packed, from_state(moved, like=ours.init(params)), params)
    jax.tree.map(np.testing.assert_array_equal, back[0], state[0])


def test_the_count_of_a_lone_stage_goes_on():
    tx = optax.chain(optax.scale_by_adam(), adamfn.scale_by_lr(SCHEDULE))
    _, state = train(optax.adam(0.1), PARAMS, optax.adam(0.1).init(PARAMS), 0, 5)
    assert from_state(state, like=tx.init(PARAMS))[1].count == 5


def test_every_count_goes_on():
    theirs, ours = PAIRS["chain"]
    _, state = train(theirs, PARAMS, theirs.init(PARAMS), 0, 5)
    here = from_state(state, like=ours.init(PARAMS))
    assert [x.item() for x in jax.tree.leaves(here) if x.dtype == jnp.int32] == [5]
    back = to_state(here, like=theirs.init(PARAMS))
    counts = [x.item() for x in jax.tree.leaves(back) if x.dtype == jnp.int32]
    assert counts == [5, 5]  # the moments' and the schedule's


def test_the_count_of_an_older_optaxs_injection_goes_on():
    def wrapped(count):
        state = adamfn.adam().init(PARAMS)
        return optax.InjectHyperparamsState(jnp.int32(count), {"learning_rate": 0.1}, state)

    moved = to_state(wrapped(0), like=optax.adam(0.1).init(PARAMS))
    _, later = train(optax.adam(0.1), PARAMS, moved, 0, 3)
    assert from_state(later, like=wrapped(0)).count == 3


def test_moments_keep_the_dtypes_of_the_target():
    theirs, ours = PAIRS["lookalike"]
    _, state = train(theirs, PARAMS, theirs.init(PARAMS), 0, 2)
    assert from_state(state, like=ours.init(PARAMS))[0].mu["a"].dtype == jnp.float32
    _, state = train(ours, PARAMS, ours.init(PARAMS), 0, 2)
    assert to_state(state, like=theirs.init(PARAMS))[0].mu["a"].dtype == jnp.bfloat16


def test_states_of_many_runs_at_once_and_under_jit():
    theirs, ours = PAIRS["adam"]
    batch = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), PARAMS)
    states = jax.vmap(theirs.init)(batch)
    _, states = jax.vmap(theirs.update)(batch, states)
    moved = from_state(states, like=jax.vmap(ours.init)(batch))
    assert moved[0].count.tolist() == [1, 1]
    jitted = jax.jit(from_state)(states, jax.vmap(ours.init)(batch))
    jax.tree.map(np.testing.assert_array_equal, jitted, moved)


def test_what_the_target_holds_besides_stays():
    tx = optax.MultiSteps(adamfn.adam(0.01), 4)
    like = tx.init(PARAMS)
    _, like = tx.update(PARAMS, like)
    moved = from_state(optax.adam(0.01).init(PARAMS), like=like)
    assert moved.mini_step == 1
    jax.tree.map(np.testing.assert_array_equal, moved.acc_grads, like.acc_grads)


@pytest.mark.parametrize(
    ("move", "state", "like", "message"),
    [
        (from_state, optax.sgd(0.1), adamfn.adam(), "from_state: state: found no moments"),
        (from_state, optax.adam(0.1), adamfn.scale_by_lr(), "from_state: like: found no moments"),
        (from_state, optax.amsgrad(0.1), adamfn.adam(), "state holds a ScaleByAmsgradState"),
        (to_state, adamfn.amsgrad(), optax.adam(0.1), "state holds a ScaleByMaxMomentsState"),
        (to_state, adamfn.nadam(), optax.adam(0.1), "holds a ScaleByNesterovMomentsState"),
        (
            from_state,
            optax.masked(optax.adam(0.1), MASK),
            adamfn.adam(),
            r"\['b/count'\]\['mu'\]: found nothing, expected float32\[\]",
        ),
        (
            to_state,
            adamfn.adam(),
            optax.masked(optax.adam(0.1), MASK),
            r"\['b/count'\]\['mu'\]: found float32.*, expected nothing",
        ),
        (
            from_state,
            optax.chain(optax.adam(0.1), optax.adam(0.1)),
            adamfn.adam(),
            "two states with moments of the leaf at a",
        ),
    ],
    ids=lambda x: x.__name__ if callable(x) else "",
)
def test_what_does_not_fit_is_named(move, state, like, message):
    with pytest.raises(ValueError, match=message):
        move(state.init(PARAMS), like.init(PARAMS))


def test_adabelief_and_adamax_are_no_adam():
    with pytest.raises(ValueError, match="state holds a ScaleByBeliefState"):
        from_state(optax.adabelief(0.1).init(PARAMS), adamfn.adam().init(PARAMS))
    with pytest.raises(ValueError, match="state holds a ScaleByInfinityMomentsState"):
        to_state(adamfn.adamax().init(PARAMS), optax.adam(0.1).init(PARAMS))


def test_the_counts_of_other_transformations_stay():
    tx = optax.chain(adamfn.adam(), optax.ema(0.9))
    _, state = train(optax.adam(0.1), PARAMS, optax.adam(0.1).init(PARAMS), 0, 5)
    moved = from_state(state, like=tx.init(PARAMS))
    assert moved[0][0].count == 5
    assert moved[1].count == 0


def test_a_moved_state_can_be_donated():
    _, state = train(optax.adam(0.1), PARAMS, optax.adam(0.1).init(PARAMS), 0, 5)
    ours = adamfn.adamw()
    moved = from_state(state, like=ours.init(PARAMS))
    _, after = jax.jit(ours.update, donate_argnums=1)(PARAMS, moved, PARAMS)
    assert after[0].count == 6


def test_partitions_under_jit():
    theirs, ours = PAIRS["partition"]
    _, state = train(theirs, PARAMS, theirs.init(PARAMS), 0, 3)
    expected = from_state(state, like=ours.init(PARAMS))
    found = jax.jit(from_state)(state, ours.init(PARAMS))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_shapes_that_differ_are_named():
    other = PARAMS | {"a": jnp.ones((3, 2))}
    with pytest.raises(
        ValueError, match=r"\['a'\]\['mu'\]: found float32\[3,2\], expected float32\[2,3\]"
    ):
        from_state(optax.adam(0.1).init(other), adamfn.adam().init(PARAMS))


def test_abstract_states_are_refused():
    theirs, ours = (tx.init(PARAMS) for tx in PAIRS["adam"])
    shapes = jax.eval_shape(lambda: (theirs, ours))
    with pytest.raises(TypeError, match="from_state: like has a shape without values"):
        from_state(theirs, like=shapes[1])
    with pytest.raises(TypeError, match="from_state: state has a shape without values"):
        from_state(shapes[0], like=ours)
    with pytest.raises(ValueError, match=r"\['a'\]\['mu'\]: found nothing, expected float32"):
        from_state(optax.adam(0.1).init(jnp.ones(3)), like=ours)


def test_leaves_after_different_numbers_of_steps_are_refused():
    tx = PAIRS["partition"][0]
    state = tx.init(PARAMS)
    _, later = train(tx, PARAMS, state, 0, 3)
    mixed = state._replace(inner_states={**state.inner_states, "x": later.inner_states["x"]})
    with pytest.raises(ValueError, match="after 0 and 3 steps"):
        from_state(mixed, PAIRS["partition"][1].init(PARAMS))
