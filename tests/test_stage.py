# SPDX-License-Identifier: Apache-2.0
"""A stage of the user's own: in update, in step, in chains, beside moments in 8 bits."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adamfn

PARAMS = {"kernel": jnp.full((64, 256), 0.5), "bias": jnp.full(3, -0.5)}


def gradients(step):
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), PARAMS)


def where_signs_agree(u, g):
    return jnp.where(u * g > 0, u, 0)


def agree():
    return adamfn.from_stage(adamfn.Stage("agree", where_signs_agree, reads=("grads",)))


def careful(moments="float32"):
    return adamfn.chain(
        adamfn.scale_by_moments(moments=moments),
        adamfn.bias_correct(),
        agree(),
        adamfn.scale_by_lr(0.1),
    )


@pytest.mark.parametrize("moments", ["float32", "8bit"])
@pytest.mark.parametrize("how", ["update", "step"])
def test_it_masks_what_adam_does(moments, how):
    tx, plain = careful(moments), adamfn.adam(0.1, moments=moments)
    state, own = tx.init(PARAMS), plain.init(PARAMS)
    for k in range(4):
        g = gradients(k)
        adam, own = plain.update(g, own, PARAMS)
        if how == "update":
            found, state = tx.update(g, state, PARAMS)
        else:
            moved, state = adamfn.step(tx, g, state, PARAMS)
            found = jax.tree.map(jnp.subtract, moved, PARAMS)
        for name in PARAMS:
            # u has the sign of the ratio, and an update the other.
            expected = np.where(np.asarray(adam[name]) * np.asarray(g[name]) < 0, adam[name], 0)
            if name == "kernel":
                assert (0.1 if k else 0) <= np.mean(expected == 0) < 0.6
            # Parameters of 1/2 round a step of 0.1 by 6e-8.
            np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-7)
    # Codes are the same; some XLA rounds a scale otherwise in one of the two programs.
    jax.tree.map(partial(np.testing.assert_allclose, rtol=5e-7), state[0], own[0])


class SlowState(NamedTuple):
    count: Any
    slow: Any
    pull: Any


def towards_slow(u, p, slow, pull):
    slow = slow + pull * (p - slow)
    return u + 0.1 * (slow - p), slow


def pull_back(**more):
    def scalars(count, state, extra):
        pull = extra.get("pull", 1.0) / count
        return (pull,), {"pull": pull}

    attributes = {
        "reads": ("params",),
        "keeps": {"slow": jnp.zeros_like},
        "scalars": scalars,
        "start": {"pull": lambda: jnp.zeros(())},
        "state": SlowState,
        "takes": ("pull",),
    }
    return adamfn.from_stage(adamfn.Stage("pull_back", towards_slow, **(attributes | more)))


def test_what_a_stage_keeps_and_remembers():
    tx = adamfn.chain(adamfn.adam(0.1), pull_back())
    params, state = PARAMS, tx.init(PARAMS)
    slow = {name: np.zeros(p.shape) for name, p in PARAMS.items()}
    expected = {name: np.asarray(p, np.float64) for name, p in PARAMS.items()}
    plain = adamfn.adam(0.1)
    own = plain.init(PARAMS)
    for k in range(1, 4):
        g = gradients(k)
        u, own = plain.update(g, own)
        params, state = adamfn.step(tx, g, state, params, pull=0.5)
        for name, p in expected.items():
            slow[name] += 0.5 / k * (p - slow[name])
            expected[name] = p + np.asarray(u[name]) + 0.1 * (slow[name] - p)
            np.testing.assert_allclose(params[name], expected[name], rtol=1e-5)
            np.testing.assert_allclose(state[1].slow[name], slow[name], rtol=1e-5, atol=1e-8)
    assert state[1].count == 3
    np.testing.assert_allclose(state[1].pull, 0.5 / 3)


def test_a_mask_leaves_a_leaf_and_what_is_kept_of_it_alone():
    tx = pull_back(mask={"kernel": True, "bias": False})
    updates, state = tx.update(gradients(0), tx.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(updates["bias"], gradients(0)["bias"])
    np.testing.assert_array_equal(state.slow["bias"], 0)
    np.testing.assert_array_equal(state.slow["kernel"], 0.5)


def test_nested_chains_keep_their_state_and_give_the_flat_ones_updates():
    parts = (adamfn.scale_by_moments(), adamfn.bias_correct(), agree(), adamfn.scale_by_lr(0.1))
    a, b, c, d = parts
    flat = adamfn.chain(*parts)
    own = flat.init(PARAMS)
    for nested in (
        adamfn.chain(adamfn.chain(a, b), adamfn.chain(c, d)),
        adamfn.chain(a, adamfn.chain(b, adamfn.chain(c)), d),
    ):
        state = nested.init(PARAMS)
        assert [type(part) for part in jax.tree.leaves(state, is_leaf=is_named)] == [
            type(part) for part in own
        ]
        assert jax.tree.structure(state) != jax.tree.structure(own)
        updates, after = nested.update(gradients(0), state, PARAMS)
        jax.tree.map(
            np.testing.assert_array_equal, updates, flat.update(gradients(0), own, PARAMS)[0]
        )
        assert jax.tree.structure(after) == jax.tree.structure(state)


def is_named(node):
    return hasattr(node, "_fields")


def test_stages_that_do_not_count_count_together_once():
    tx = adamfn.chain(adamfn.bias_correct(), adamfn.scale_by_lr(lambda count: 1.0 + count))
    state = tx.init(PARAMS)
    assert (state[0]._fields, state[1]._fields) == (("count",), ("learning_rate", "written"))
    for k in range(3):
        _, state = tx.update(PARAMS, state)
        assert (state[0].count, state[1].learning_rate) == (k + 1, k + 1)


def test_nothing_is_rounded_between_joined_stages():
    # 1 + 2^-9 is no bfloat16. Rounded between the two factors, 255 would come out as 255.
    g = jnp.array([255.0, 3.0], jnp.bfloat16)
    factor = 1 + 2**-9
    scale = adamfn.from_stage(
        adamfn.Stage("scale", jnp.multiply, scalars=lambda *_: ((-factor,), {}))
    )
    tx = adamfn.chain(adamfn.scale_by_lr(factor), scale)
    updates, _ = tx.update(g, tx.init(g))
    exact = (np.asarray(g, np.float64) * factor**2).astype(np.float32)
    np.testing.assert_array_equal(updates, jnp.asarray(exact).astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (lambda: adamfn.Stage("x", "no function"), "Stage x: formula is 'no function'; expected"),
        (
            lambda: adamfn.Stage("x", Unhashable()),
            "Stage x: formula is .*; expected one that can be hashed",
        ),
        (lambda: adamfn.Stage("x", agree, reads=("weights",)), "reads is .*'weights'.*; expected"),
        (lambda: adamfn.Stage("x", agree, state=dict), "state is <class 'dict'>; expected a Named"),
        (
            lambda: adamfn.Stage("x", agree, keeps={"slow": jnp.zeros_like}),
            "state is .*EmptyState'>; expected the fields slow, those of",
        ),
        (
            lambda: adamfn.Stage("x", agree, moments="8bit"),
            "moments is '8bit'; expected 'float32', or mu and nu in",
        ),
        (lambda: adamfn.Stage("x", agree, moments="9bit"), "moments is '9bit'; expected one of"),
        (lambda: adamfn.from_stage(agree), "from_stage: the argument is <function agree"),
    ],
)
def test_mistakes_in_a_stage_are_named_when_it_is_made(stage, message):
    with pytest.raises((TypeError, ValueError), match=message):
        stage()


class Unhashable:
    __hash__ = None

    def __call__(self, u):
        return u


def too_few(u, p, slow, pull):
    return u


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: adamfn.from_stage(adamfn.Stage("x", jnp.sum)),
            r"x: .* returned float32\[\] for u",
        ),
        (
            lambda: adamfn.from_stage(adamfn.Stage("x", lambda u: u * 1j)),
            r"x: its formula returned complex64\[3\] for u; expected float32\[3\]",
        ),
        (
            lambda: adamfn.from_stage(adamfn.Stage("x", lambda u: (u, u))),
            "x: its formula returned 2 results; expected 1",
        ),
        (
            lambda: adamfn.from_stage(
                adamfn.Stage("x", jnp.multiply, scalars=lambda *_: ((jnp.ones(3),), {}))
            ),
            r"x: found float32\[3\] among its scalars; expected numbers",
        ),
    ],
)
@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_mistakes_in_a_formula_are_named_when_it_is_traced(make, message, wrap):
    tx, g = make(), jnp.ones(3)
    with pytest.raises(ValueError, match=message):
        wrap(tx.update)(g, tx.init(g))


def test_a_formula_that_forgets_what_the_stage_keeps():
    stage = adamfn.Stage(
        "x",
        too_few,
        reads=("params",),
        keeps={"slow": jnp.zeros_like},
        scalars=lambda *_: ((1.0,), {"pull": 1.0}),
        start={"pull": lambda: jnp.zeros(())},
        state=SlowState,
    )
    tx = adamfn.from_stage(stage)
    with pytest.raises(ValueError, match="x: its formula returned 1 results; expected 2"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


def test_a_stage_that_reads_parameters_asks_for_them():
    tx = pull_back()
    with pytest.raises(ValueError, match="pull_back: update got no params, and it needs them"):
        tx.update(PARAMS, tx.init(PARAMS))


@pytest.mark.parametrize("result", [3.0, (3.0,), (3.0, {}), ((3.0,), 3.0)])
def test_scalars_that_are_no_pair_are_refused(result):
    def scaled(u, x):
        return u * x

    tx = adamfn.from_stage(adamfn.Stage("scaled", scaled, scalars=lambda *_: result))
    with pytest.raises(TypeError, match=r"scaled: its scalars returned .*; expected the formula's"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


class Moving(NamedTuple):
    slow: Any


def towards(g, slow):
    moves = jnp.any(g != 0, axis=-1, keepdims=True)
    new = jnp.where(moves, 0.9 * slow + g, slow)
    return jnp.where(moves, new, 0), new


@pytest.mark.parametrize("backend", ["xla", "pallas"])
def test_rows_that_ones_own_stage_keeps(backend):
    stage = adamfn.Stage(
        "towards", towards, keeps={"slow": jnp.zeros_like}, state=Moving, elementwise=False
    )
    tx = adamfn.with_backend(adamfn.from_stage(stage), backend)
    params = jnp.ones((3, 2))
    state = tx.init(params)
    first = jnp.array([[1.0, 0.0], [2.0, 2.0], [0.0, 0.0]])
    second = jnp.array([[0.0, 0.0], [0.0, 3.0], [0.0, jnp.nan]])
    moved, state = adamfn.step(tx, first, state, params)
    np.testing.assert_array_equal(moved, params + first)
    updates, after = tx.update(second, state, moved)
    expected = np.float32([[0, 0], [1.8, 4.8], [0, np.nan]])
    np.testing.assert_allclose(updates, expected, rtol=1e-6)
    kept = next(x for x in jax.tree.leaves(after) if jnp.shape(x) == (3, 2))
    np.testing.assert_allclose(kept, [[1, 0], [1.8, 4.8], [0, np.nan]], rtol=1e-6)
