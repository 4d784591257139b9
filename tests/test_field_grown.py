# SPDX-License-Identifier: Apache-2.0
"""Runs that go on with more or fewer parameters, or with moments in another format.

Fairseq issue 140 (layers added to a loaded model), DeepSpeed pull 8471 (one count for parameters
that came at different times), optax issue 1371 (a part of a state begun anew).
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import adamfn
from adamfn.interop import carry_over, convert

FORMATS = ["float32", "bfloat16", "8bit", "4bit", "factored", "blockmean"]
# What a maximum is stored by is what nu is stored by.
PAIRS = [*(("adamw", moments) for moments in FORMATS[:-1]), ("amsgrad", "8bit")]
RNG = np.random.default_rng(0)
STEPS, LATE = 6, 5


def gradients(steps, *shape):
    return jnp.asarray(RNG.normal(size=(steps, *shape)), jnp.float32)


# The late leaf comes first: what is listed by number moves.
SHAPES = {"k": (32, 128), "m": (16, 256), "z": (3,)}
OLD = {name: gradients(STEPS + LATE, *shape) for name, shape in SHAPES.items() if name != "k"}
GRADS = OLD | {"k": gradients(LATE, *SHAPES["k"])}
PARAMS = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
FEWER = {name: PARAMS[name] for name in OLD}


@cache
def compiled(update):
    return jax.jit(update)


def run(tx, params, state, grads, **extra):
    """The state after some steps, and the updates of each."""
    update, moves = compiled(tx.update), []
    for count in range(len(jax.tree.leaves(grads)[0])):
        g = jax.tree.map(lambda x, count=count: x[count], grads)
        updates, state = update(g, state, params, **extra)
        moves.append(updates)
    return state, jax.tree.map(lambda *xs: np.stack(xs), *moves)


@cache
def first(tx):
    return run(tx, FEWER, tx.init(FEWER), {n: g[:STEPS] for n, g in OLD.items()})


@cache
def lean(member, moments):
    return getattr(adamfn, member)(0.1, moments=moments)


ADAM = adamfn.adam(0.1)


def later(names=SHAPES):
    return {n: GRADS[n][-LATE:] for n in names}


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_late_leaf_is_corrected_for_its_own_steps():
    """As in torch: its first step is one rate long, and it goes on as if it had run alone."""
    tx = ADAM
    state, _ = first(tx)
    carried = carry_over(tx, state, PARAMS)
    assert (carried.new, carried.dropped) == (("k",), ())
    _, moves = run(carried.tx, PARAMS, carried.state, later())
    np.testing.assert_allclose(np.abs(moves["k"][0]), 0.1, rtol=1e-3)  # eps beside a small gradient
    expected = reference.updates(GRADS["k"], 0.1)
    np.testing.assert_allclose(moves["k"], expected, rtol=1e-5, atol=1e-7)
    for name in OLD:  # and the others never notice
        expected = reference.updates(GRADS[name], 0.1)[STEPS:]
        np.testing.assert_allclose(moves[name], expected, rtol=1e-5, atol=1e-6)


def test_with_one_count_a_late_leaf_is_corrected_for_all_steps():
    tx = ADAM
    state, _ = first(tx)
    after, state, new, _ = carry_over(tx, state, PARAMS, one_count=True)
    assert after is tx
    assert new == ("k",)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(PARAMS))
    _, moves = run(tx, PARAMS, state, later())
    t = STEPS + 1
    rates = (1 - 0.9) / np.sqrt(1 - 0.999) * np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
    np.testing.assert_allclose(np.abs(moves["k"][0]), 0.1 * rates, rtol=1e-3)
    assert (1 - 0.9) / np.sqrt(1 - 0.999) == pytest.approx(3.2, abs=0.05)


@pytest.mark.parametrize(("member", "moments"), PAIRS)
def test_what_fits_is_carried_to_the_bit(member, moments):
    tx = lean(member, moments)
    state, _ = first(tx)
    grown = carry_over(tx, state, PARAMS, one_count=True).state
    assert jax.tree.structure(grown) == jax.tree.structure(tx.init(PARAMS))
    shrunk, back, new, dropped = carry_over(tx, grown, FEWER)
    assert (new, dropped) == ((), ("k",))
    assert shrunk is tx
    same(back, state)
    # The run with fewer leaves, and the same leaves of the grown one: a format's noise goes by a
    # leaf's number, which has changed, so the formats that round agree within their rounding.
    tx, state, *_ = carry_over(tx, state, PARAMS)
    same(state[0][0].mu["m"], back[0].mu["m"])
    after, _ = run(tx, PARAMS, state, later())
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_a_run_may_grow_twice_and_shrink():
    tx = ADAM
    state, _ = first(tx)
    tx, state, *_ = carry_over(tx, state, PARAMS)
    state, _ = run(tx, PARAMS, state, later())
    more = PARAMS | {"q": jnp.ones(2)}
    tx, state, new, _ = carry_over(tx, state, more)
    assert new == ("q",)
    grads = later() | {"q": gradients(LATE, 2)}
    state, moves = run(tx, more, state, grads)
    np.testing.assert_allclose(moves["q"], reference.updates(grads["q"], 0.1), rtol=1e-5, atol=1e-7)
    expected = reference.updates(np.concatenate([GRADS["k"]] * 2), 0.1)[LATE:]
    np.testing.assert_allclose(moves["k"], expected, rtol=1e-5, atol=1e-6)
    less = {name: more[name] for name in ("m", "q")}
    tx, state, new, dropped = carry_over(tx, state, less)
    assert (new, sorted(dropped)) == ((), ["k", "z"])
    run(tx, less, state, {name: grads[name] for name in less})


def test_late_leaves_follow_the_rate_of_the_others():
    schedule = optax.linear_schedule(0.1, 0.2, STEPS + LATE)
    tx = adamfn.adam(schedule)
    state, _ = first(tx)
    tx, state, *_ = carry_over(tx, state, PARAMS)
    _, moves = run(tx, PARAMS, state, later())
    rates = [float(schedule(STEPS + count)) for count in range(LATE)]
    unit = reference.updates(GRADS["k"], 1.0)
    expected = np.array(rates)[:, None, None] * unit
    np.testing.assert_allclose(moves["k"], expected, rtol=1e-5, atol=1e-7)
    _, moves = run(tx, PARAMS, state, later(), learning_rate=0.5)
    np.testing.assert_allclose(moves["k"], 0.5 * unit, rtol=1e-5, atol=1e-6)


def test_late_leaves_follow_a_rate_that_counts_by_itself():
    schedule = optax.linear_schedule(0.1, 0.2, STEPS + LATE)
    tx = optax.chain(optax.scale_by_adam(), adamfn.scale_by_lr(schedule))
    state, _ = first(tx)
    tx, state, *_ = carry_over(tx, state, PARAMS)
    state, _ = run(tx, PARAMS, state, later())
    assert [part[1].learning_rate for part in state] == [schedule(STEPS + LATE - 1)] * 2


def test_late_leaves_may_have_a_transformation_of_their_own():
    """As they must after `from_state_dict` with several groups, none of which is theirs."""
    tx = adamfn.adam(optax.constant_schedule(0.1))
    state, _ = first(tx)
    tx, state, *_ = carry_over(tx, state, PARAMS, late=adamfn.adamw(0.01, weight_decay=0.5))
    _, moves = run(tx, PARAMS, state, later())
    expected = reference.updates(GRADS["k"], 0.01, weight_decay=0.5, params=1.0)
    np.testing.assert_allclose(moves["k"], expected, rtol=1e-5, atol=1e-7)


def test_a_leaf_of_another_shape_begins_afresh():
    tx = ADAM
    state, _ = first(tx)
    params = FEWER | {"z": jnp.ones(5)}
    _, state, new, dropped = carry_over(tx, state, params)
    assert new == dropped == ("z",)
    assert state[1][0].mu["z"].shape == (5,)
    assert state[1][0].count == 0


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.chain(optax.trace(0.9), tx),
        lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
        lambda tx: optax.masked(tx, lambda tree: {name: name != "z" for name in tree}),
        lambda tx: optax.partition(
            {"ours": tx, "still": optax.set_to_zero()},
            lambda tree: {name: "still" if name == "z" else "ours" for name in tree},
        ),
    ],
    ids=["chain", "MultiSteps", "masked", "partition"],
)
def test_states_inside_wrappers(wrap):
    tx = wrap(adamfn.adam(0.1, moments="8bit"))
    state, _ = first(tx)
    _, grown, new, dropped = carry_over(tx, state, PARAMS, one_count=True)
    assert (new, dropped) == (("k",), ())
    assert jax.tree.structure(grown) == jax.tree.structure(tx.init(PARAMS))
    found = carry_over(tx, grown, FEWER)
    assert found.dropped == ("k",)
    same(found.state, state)


def test_what_cannot_be_carried_over_is_named():
    tx = adamfn.adam()
    state = tx.init(FEWER)
    with pytest.raises(ValueError, match=r"at 0/mu/m the state has float32.*; expected int8"):
        carry_over(adamfn.adam(moments="8bit"), state, PARAMS)
    with pytest.raises(ValueError, match=r"at 3/learning_rate"):
        carry_over(adamfn.adamw(), state, PARAMS)
    with pytest.raises(
        ValueError, match=r"at 2/learning_rate the state has float32..; expected nothing"
    ):
        carry_over(adamfn.chain(adamfn.scale_by_moments(), adamfn.bias_correct()), state, PARAMS)
    with pytest.raises(ValueError, match="carry_over: state: found no moments"):
        carry_over(adamfn.scale_by_lr(), adamfn.scale_by_lr().init(FEWER), PARAMS)
    packed = adamfn.packed(tx)
    with pytest.raises(ValueError, match=r"carry_over: state is packed.*adamfn\.repack"):
        carry_over(packed, packed.init(FEWER), PARAMS)
    with pytest.raises(TypeError, match=r"carry_over: params: the leaf at .* is int32"):
        carry_over(tx, state, FEWER | {"n": jnp.ones(2, int)})


@pytest.mark.parametrize(("member", "moments"), PAIRS)
def test_a_float32_state_goes_over_into_a_format_and_back(member, moments):
    exact, stored_by = lean(member, "float32"), lean(member, moments)
    state, _ = first(exact)
    stored = convert(state, "float32", to=moments)
    expected = stored_by.init(FEWER)
    assert jax.tree.structure(stored) == jax.tree.structure(expected)
    for a, b in zip(*map(jax.tree.leaves, (stored, expected)), strict=True):
        assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)
    back = convert(stored, moments, to="float32")
    assert back[0].count == STEPS
    same(back[0].mu["z"], state[0].mu["z"])  # small leaves are float32 everywhere
    same(jax.jit(lambda s: convert(s, moments, to="float32"))(stored), back)
    g = {name: x[STEPS] for name, x in OLD.items()}
    moved, after = compiled(stored_by.update)(g, stored, FEWER)
    assert jax.tree.structure(after) == jax.tree.structure(expected)
    whole, _ = compiled(exact.update)(g, state, FEWER)
    a, b = (np.ravel(x["m"]).astype(float) for x in (moved, whole))
    # Cosines of formats that keep every nu, and of those that keep means, on random gradients.
    least = 0.9 if moments in ("factored", "blockmean") else 0.99
    assert a @ b >= least * np.linalg.norm(a) * np.linalg.norm(b)


def test_a_format_goes_over_into_another_inside_wrappers():
    def of(path, leaf):
        return "8bit" if path == "m" else "4bit"

    wraps = [optax.MultiSteps(adamfn.adam(moments=m), 2) for m in ("8bit", of)]
    params = PARAMS | {"frozen": None}
    state = wraps[0].init(params)
    found = convert(state, "8bit", to=of)
    assert jax.tree.structure(found) == jax.tree.structure(wraps[1].init(params))
    same(convert(found, of, to="float32"), convert(state, "8bit", to="float32"))


def test_what_cannot_be_converted_is_named():
    state = adamfn.adam().init(PARAMS)
    with pytest.raises(
        ValueError, match=r"convert: at k the state has mu float32.* expected mu int8"
    ):
        convert(state, "8bit", to="4bit")
    with pytest.raises(ValueError, match="moments is '9bit'"):
        convert(state, "float32", to="9bit")
    with pytest.raises(ValueError, match="convert: state: found no moments"):
        convert(adamfn.scale_by_lr().init(PARAMS), "float32", to="8bit")
    with pytest.raises(ValueError, match="found a ScaleByAdamState; expected a state of adamfn's"):
        convert(optax.adam(0.1).init(PARAMS), "float32", to="8bit")
    with pytest.raises(ValueError, match="convert: state is packed"):
        convert(adamfn.packed(adamfn.adam()).init(PARAMS), "float32", to="8bit")
