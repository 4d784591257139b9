# SPDX-License-Identifier: Apache-2.0
"""round_weights: bfloat16 weights that train, under whatever applies the updates."""

from functools import cache, partial

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import adamfn
from adamfn.core.weights import Weights

BITS = [16, 24, 32]
BFLOAT16 = jnp.bfloat16
MANY = (64, 128)


def rounding(bits, rate=1e-6, moments="float32"):
    return adamfn.chain(adamfn.adam(rate, moments=moments), adamfn.round_weights(bits))


# The words


def some_words(n=1 << 16):
    words = np.random.default_rng(0).integers(0, 2**32, n, np.uint32).view(np.float32)
    return np.where(np.isfinite(words) & (np.abs(words) > 2e-38), words, 1.0).astype(np.float32)


def test_32_bits_are_the_word_and_the_bfloat16_is_the_nearest():
    x = some_words()
    weight, correction = Weights(32).split(jnp.asarray(x))
    narrow = weight.astype(BFLOAT16)
    np.testing.assert_array_equal(narrow.astype(jnp.float32), weight)
    back = Weights(32).decode(weight, correction.astype(jnp.int16))
    np.testing.assert_array_equal(back, x)
    distance = np.abs(np.asarray(weight, np.float64) - x)
    with np.errstate(over="ignore"):
        nearest = np.abs(np.asarray(x.astype(BFLOAT16), np.float64) - x)
    finite = np.isfinite(distance) & np.isfinite(nearest)
    np.testing.assert_array_equal(distance[finite], nearest[finite])


def test_24_bits_are_within_one_of_theirs_and_right_on_average():
    x = jnp.full((1 << 16,), np.float32(1 + 77 * 2.0**-23))  # 77 256ths of the way to the next
    noise = adamfn.formats.noise(1, 0, x.shape)
    weight, correction = Weights(24)._split_sum(x, jnp.zeros_like(x), noise)
    back = np.asarray(Weights(24).decode(weight, correction.astype(jnp.int8)), np.float64)
    assert set(np.unique(back)) == {1.0, 1 + 2.0**-15}
    share = np.mean(back > 1)
    assert abs(share - 77 / 256) < 5 * np.sqrt(77 / 256 * 179 / 256 / x.size)
    to_nearest = Weights(24).decode(*Weights(24).split(x))
    np.testing.assert_array_equal(to_nearest, 1.0)


@partial(jax.jit, static_argnums=0)
def many_sums(bits, p, u):
    shape = (1 << 20,)
    noise = adamfn.formats.noise(1, 0, shape)
    weight, correction = Weights(bits)._split_sum(jnp.full(shape, p), jnp.full(shape, u), noise)
    return Weights(24).decode(weight, correction.astype(jnp.int8)) if bits == 24 else weight


@pytest.mark.parametrize("u", [1e-8, 3e-9, -1e-8, -3e-8, 5e-6])
@pytest.mark.parametrize("p", [1.0, -1.0, 1.5, 0.999, -2.0])
@pytest.mark.parametrize("bits", [16, 24])
def test_a_sum_is_right_on_average_whatever_float32_makes_of_it(bits, p, u):
    p32, u32 = np.float32(p), np.float32(u)
    moved = np.asarray(many_sums(bits, p32, u32), np.float64) - float(p32)
    # Two neighbours on the grid, 2^-7 or 2^-15 of the power of two below the weight apart or half.
    unit = 2.0 ** (9 - bits)
    share = min(abs(float(u32)) / unit * 2 + 2.0 ** (bits - 24), 0.5)
    assert np.ptp(moved) <= 2 * unit
    assert abs(moved.mean() - float(u32)) < 5 * unit * np.sqrt(share / moved.size)


def test_a_sum_just_below_a_power_of_two_is_rounded_in_the_smaller_units_there():
    noise = jnp.arange(1 << 16, dtype=jnp.uint32) << 8  # the lowest random bits are 0
    ones = jnp.ones(noise.shape)
    weight, correction = Weights(24)._split_sum(ones, -1e-8 * ones, noise)
    below = Weights(24).decode(weight, correction.astype(jnp.int8)) < 1
    np.testing.assert_allclose(np.mean(below), 1e-8 * 2**24, atol=2.0**-15)


@pytest.mark.parametrize("bits", BITS)
def test_what_is_not_finite_stays(bits):
    x, ones = jnp.array([np.inf, -np.inf, np.nan]), jnp.full(3, 0xFFFFFFFF, jnp.uint32)
    weight, correction = (
        Weights(32).split(x) if bits == 32 else Weights(bits)._split_sum(x, jnp.ones(3), ones)
    )
    np.testing.assert_array_equal(weight, x)
    np.testing.assert_array_equal(correction, 0)


# It does not stall


@cache
def compiled_loop(tx, apply):
    g = jnp.ones(MANY, BFLOAT16)

    def body(_, carry):
        params, state, extra = carry
        updates, state = tx.update(g, state, params, **extra)
        return apply(params, updates), state, extra

    return jax.jit(lambda steps, *carry: jax.lax.fori_loop(0, steps, body, carry)[:2])


def constant_gradient(tx, steps, apply=adamfn.apply_updates, **extra):
    """Parameters and state after so many steps; numbers that are `extra` compile nothing anew."""
    params = jnp.ones(MANY, BFLOAT16)
    extra = jax.tree.map(np.float32, extra)
    return compiled_loop(tx, apply)(steps, params, tx.init(params), extra)


ROUNDING = {bits: rounding(bits) for bits in BITS}


@pytest.mark.optimized  # a long loop
@pytest.mark.optimized  # a long loop
@pytest.mark.parametrize(
    "apply", [adamfn.apply_updates, optax.apply_updates], ids=["ours", "optax"]
)
@pytest.mark.parametrize("rate", [1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8])
@pytest.mark.parametrize("bits", BITS)
def test_a_weight_moves_as_far_as_it_should(bits, rate, apply):
    steps = 2000 if rate < 1e-3 else 200
    params, state = constant_gradient(ROUNDING[bits], steps, apply, learning_rate=rate)
    assert params.dtype == BFLOAT16
    whole = np.asarray(adamfn.whole_weights(params, state), np.float64)
    # Each step rounds by less than a unit in the last of the bits below 1: 2^-8, 2^-16, 2^-24.
    unit = 2.0 ** (8 - bits)
    if bits == 32:
        # Float32's own sums, of which each rounds to nearest by half a unit at most.
        assert np.ptp(whole) == 0
        assert abs(whole[0, 0] - (1 - rate * steps)) <= steps * unit / 2 + rate * steps * 1e-6
        return
    # A step moves by a unit or not at all, with a probability of `share` at most: that of the
    # update, and the tail of float32's, by which the very update of 1e-3 is off.
    share = min(rate / unit + 2.0 ** (bits - 24), 0.5)
    error = unit * np.sqrt(steps * share / whole.size)
    assert abs(whole.mean() - (1 - rate * steps)) < 5 * error + rate * steps * 1e-6


def test_optaxs_own_bfloat16_stays_where_it_was():
    params, _ = constant_gradient(optax.adam(1e-6), 2000, optax.apply_updates)
    np.testing.assert_array_equal(params, 1.0)
    params, _ = constant_gradient(adamfn.adam(1e-6), 2000)
    np.testing.assert_array_equal(params, 1.0)


# 32 bits are float32


def decayed(*last):
    schedule = optax.cosine_decay_schedule(1e-2, 1000)
    return adamfn.chain(adamfn.adamw(schedule, weight_decay=0.1), *last)


def random_gradient(k):
    return jax.random.normal(jax.random.fold_in(jax.random.key(0), k), MANY).astype(BFLOAT16)


START = np.asarray(jax.random.normal(jax.random.key(1), MANY).astype(BFLOAT16))


@pytest.mark.optimized  # bits
def test_32_bits_are_float32_to_the_bit_in_native_code():
    def run(tx, params):
        def body(carry, k):
            params, state = carry
            return adamfn.step(tx, random_gradient(k), state, params), None

        carry = params, tx.init(params)
        return jax.jit(lambda carry: jax.lax.scan(body, carry, jnp.arange(1000))[0])(carry)

    wide, _ = run(decayed(), jnp.asarray(START, jnp.float32))
    params, state = run(decayed(adamfn.round_weights(32)), jnp.asarray(START))
    np.testing.assert_array_equal(adamfn.whole_weights(params, state), wide)
    np.testing.assert_array_equal(params, Weights(32).split(wide)[0].astype(BFLOAT16))


@pytest.mark.optimized  # bits
def test_32_bits_are_float32_to_the_bit_operation_by_operation():
    # Not in one program: there, XLA on CPU takes a product and its sum in one rounding or in two.
    tx, plain = decayed(adamfn.round_weights(32)), decayed()
    params, wide = jnp.asarray(START), jnp.asarray(START, jnp.float32)
    state, other = tx.init(params), plain.init(wide)
    with jax.disable_jit():
        for k in range(20):
            updates, state = tx.update(random_gradient(k), state, params)
            params = optax.apply_updates(params, updates)
            updates, other = plain.update(random_gradient(k).astype(jnp.float32), other, wide)
            wide = optax.apply_updates(wide, updates)
    np.testing.assert_array_equal(adamfn.whole_weights(params, state), wide)


def test_32_bits_by_xla_are_float32_but_for_a_rounding_of_each_step():
    # In one program XLA takes a product and its sum in one rounding or in two.
    rounded = adamfn.with_backend(decayed(adamfn.round_weights(32)), "xla")
    plain = adamfn.with_backend(decayed(), "xla")

    @jax.jit
    def both(g, params, state):
        whole = adamfn.whole_weights(params, state)
        updates, after = rounded.update(g, state, params)
        params = adamfn.apply_updates(params, updates)
        exact, _ = plain.update(g.astype(jnp.float32), state[:1], whole)
        return (
            params,
            after,
            adamfn.apply_updates(whole, exact),
            adamfn.whole_weights(params, after),
        )

    params = jnp.asarray(START)
    state = rounded.init(params)
    for k in range(20):
        params, state, expected, found = both(random_gradient(k), params, state)
        unit = np.spacing(np.maximum(np.abs(expected), np.float32(1e-2)))  # or of the update
        assert np.all(np.abs(found - expected) <= unit)


@pytest.mark.optimized  # bits
@pytest.mark.parametrize(
    ("bits", "moments"), [(16, "8bit"), (24, "bfloat16"), (32, "float32"), (32, "8bit")]
)
def test_native_code_is_xlas_program_and_step_is_update_and_apply_updates(bits, moments):
    tx = adamfn.chain(
        adamfn.adamw(1e-3, weight_decay=0.1, moments=moments), adamfn.round_weights(bits)
    )
    reference = adamfn.with_backend(tx, "xla")
    params = jnp.asarray(START)
    state = tx.init(params)
    step, other = (jax.jit(partial(adamfn.step, own)) for own in (tx, reference))
    update, other_update = jax.jit(tx.update), jax.jit(reference.update)
    for k in range(5):
        g = random_gradient(k)
        found, expected = step(g, state, params), other(g, state, params)
        np.testing.assert_array_equal(found[0], expected[0])
        # A product and its sum rounded once or twice: a unit of the last bit here and there, of the
        # update, a thousandth, where the weight is smaller.
        np.testing.assert_allclose(
            adamfn.whole_weights(*found),
            adamfn.whole_weights(*expected),
            rtol=2.0 ** (9 - bits),
            atol=1e-3 * 2**-21,
        )
        updates, after = update(g, state, params)
        other_updates, other_after = other_update(g, state, params)
        np.testing.assert_array_equal(updates, other_updates)
        chex.assert_trees_all_equal(after[-1], found[1][-1])
        assert updates.dtype == other_updates.dtype == jnp.float32
        by_update = optax.apply_updates(params, other_updates), other_after
        chex.assert_trees_all_equal(by_update, expected)
        params, state = found


@pytest.mark.parametrize("bits", BITS)
def test_native_code_is_xlas_program_where_updates_stray(bits):
    """No numbers, and jumps in which the difference of two weights is rounded."""
    jumps = [3e-8, -3e-8, 2e-8, 1e-7, 1e30, -1e38, 3.3e38, 0.0, 1.0]
    params = jnp.array([*jumps, np.nan, np.inf, -np.inf] * 12, BFLOAT16)
    g = jnp.repeat(jnp.array([1.0, -1.0, np.inf, np.nan]), len(params) // 4)
    for rate in (1.0, 1e30):
        tx = adamfn.chain(adamfn.adam(rate, eps=0.0), adamfn.round_weights(bits))
        reference = adamfn.with_backend(tx, "xla")
        state = tx.init(params)
        found, expected = (
            jax.jit(partial(adamfn.step, own))(g, state, params) for own in (tx, reference)
        )
        np.testing.assert_array_equal(np.float32(found[0]), np.float32(expected[0]))
        if bits != 16:
            # Of 32 bits the last one is the step's: its product and sum are rounded once or twice.
            corrections = [state[-1].correction for _, state in (found, expected)]
            np.testing.assert_allclose(*corrections, rtol=0, atol=1 if bits == 32 else 0)


def test_a_jump_in_which_the_sum_loses_the_weight():
    # From 1 to 3e-9: no float32 update lands there, and no correction belongs to where it lands.
    tx = adamfn.chain(adamfn.scale_by_lr(1.0), adamfn.round_weights(32))
    params = jnp.array([1.0, 2.0], BFLOAT16)
    updates, state = tx.update(jnp.array([1 - 2.0**-24, 1.0]), tx.init(params), params)
    params = optax.apply_updates(params, updates)
    whole = adamfn.whole_weights(params, state)
    np.testing.assert_allclose(whole, [0, 1], atol=1e-7)


# Decay sees the whole weight


def test_other_stages_see_the_weight_with_its_correction():
    tx = adamfn.chain(
        adamfn.add_decayed_weights(1.0), adamfn.scale_by_lr(1.0), adamfn.round_weights(32)
    )
    whole = jnp.array([1.001, -3.3333])
    params, state = adamfn.narrow_weights(whole, whole.astype(BFLOAT16), tx)
    updates, state = tx.update(jnp.zeros(2), state, params)  # u = -p: the sum is zero
    np.testing.assert_array_equal(optax.apply_updates(params, updates), 0)
    np.testing.assert_array_equal(adamfn.whole_weights(params * 0, state), 0)


# In and out


@pytest.mark.parametrize("bits", BITS)
def test_there_and_back(bits):
    tree = {"a": jnp.asarray(some_words(64)), "b": [jnp.float32(1.2345), jnp.ones(3)]}
    dtypes = {"a": BFLOAT16, "b": [BFLOAT16, jnp.float32]}
    params = jax.tree.map(lambda w, dtype: w.astype(dtype), tree, dtypes)
    params, state = adamfn.narrow_weights(tree, params, rounding(bits))
    assert [p.dtype for p in jax.tree.leaves(params)] == [BFLOAT16, BFLOAT16, jnp.float32]
    back = adamfn.whole_weights(params, state)
    rtol = {16: 2.0**-8, 24: 2.0**-16, 32: 0}[bits]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol), back, tree)
    again = adamfn.narrow_weights(back, params, state)
    chex.assert_trees_all_equal(again, (params, state))


def test_scalars_there_and_back():
    whole = {"a": jnp.float32(1.2345), "b": jnp.float32(1.2345)}
    wanted = {"a": jnp.bfloat16(0), "b": jnp.float32(0)}
    params, state = adamfn.narrow_weights(whole, wanted, rounding(32))
    assert jax.tree.map(jnp.result_type, params) == {"a": BFLOAT16, "b": jnp.float32}
    chex.assert_trees_all_equal(adamfn.whole_weights(params, state), whole)


def test_first_states_and_float32_leaves():
    params = {"w": jnp.ones((2, 3), BFLOAT16), "norm": jnp.ones(3), "frozen": None}
    tx = rounding(24, 0.5)
    state = tx.init(params)
    correction = state[1].correction
    assert (correction["w"].shape, correction["w"].dtype) == ((2, 3), jnp.int8)
    assert correction["norm"] is None
    chex.assert_trees_all_equal(jax.jit(tx.init)(params), state)
    params, state = adamfn.step(tx, params, state, params)
    np.testing.assert_allclose(params["norm"], 0.5, rtol=1e-6)
    assert params["norm"].dtype == jnp.float32
    assert state[1].correction["norm"] is None
    assert rounding(16).init(params)[1] == adamfn.EmptyState()


# Everyone's loop: 300 steps of a tenth of a unit each, in whatever applies them


RATE, STEPS = 1e-4, 300


def assert_moved(params, state):
    assert all(p.dtype == BFLOAT16 for p in jax.tree.leaves(params))
    for whole in jax.tree.leaves(adamfn.whole_weights(params, state)):
        # Five standard errors of 300 roundings to 2^-16 are 3e-6, and half a step is 5e-5.
        assert abs(np.asarray(whole, np.float64).mean() - (1 - RATE * STEPS)) < 2e-5


WRAPPERS = {
    "alone": lambda tx: tx,
    "after clipping": lambda tx: optax.chain(optax.clip_by_global_norm(1e9), tx),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1),
    "masked": lambda tx: optax.masked(tx, True),
    "partition": lambda tx: optax.partition({"all": tx}, "all"),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_inside_of_wrappers(wrap):
    params, state = constant_gradient(wrap(rounding(24, RATE)), STEPS, optax.apply_updates)
    assert_moved(params, state)


def test_apply_if_finite():
    # It wants updates of the gradients' dtype, which are float32: so it is given such gradients.
    widen = optax.stateless_with_tree_map(lambda g, _: g.astype(jnp.float32))
    tx = optax.chain(widen, optax.apply_if_finite(rounding(24, RATE), 3))
    params = jnp.ones(MANY, BFLOAT16)
    state, update = tx.init(params), jax.jit(tx.update)
    for k in range(STEPS + 1):
        g = jnp.full(MANY, np.nan if k == 7 else 1.0, BFLOAT16)
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    assert_moved(params, state)


def test_multi_steps_of_several():
    tx = optax.MultiSteps(rounding(24, RATE), 3)
    params, state = constant_gradient(tx, 3 * STEPS, optax.apply_updates)
    assert_moved(params, state)


def test_nnx_optimizer():
    class Model(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones(MANY, BFLOAT16))

    model = Model()
    optimizer = nnx.Optimizer(model, rounding(24, RATE), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: jnp.sum(m.w[...].astype(jnp.float32)))(model)
        optimizer.update(model, grads)

    for _ in range(STEPS):
        step(model, optimizer)
    assert_moved(nnx.as_pure(nnx.state(model, nnx.Param)), nnx.as_pure(optimizer.opt_state))


def test_train_state():
    params = {"w": jnp.ones(MANY, BFLOAT16)}
    state = TrainState.create(apply_fn=None, params=params, tx=rounding(24, RATE))
    step = jax.jit(lambda state: state.apply_gradients(grads=params))
    for _ in range(STEPS):
        state = step(state)
    assert_moved(state.params, state.opt_state)


def test_equinox_with_optaxs_apply_updates():
    class Model(eqx.Module):
        w: jax.Array
        name: str = eqx.field(static=True, default="model")

    model, tx = Model(jnp.ones(MANY, BFLOAT16)), rounding(24, RATE)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        grads = eqx.filter_grad(lambda m: jnp.sum(m.w.astype(jnp.float32)))(model)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return adamfn.apply_updates(model, updates), state

    for _ in range(STEPS):
        model, state = step(model, state)
    assert_moved(model, state)


# Bad input


def test_other_narrow_dtypes_are_refused_by_name():
    for dtype in (jnp.float16, jnp.float8_e4m3fn, jnp.float8_e5m2):
        params = {"layer": {"w": jnp.ones(3, dtype)}}
        for bits in BITS:
            with pytest.raises(
                TypeError, match=rf"leaf at layer/w is {jnp.dtype(dtype).name}\[3\]"
            ):
                rounding(bits).init(params)


@pytest.mark.parametrize("bits", [8, 15, 23, "24", None, True])
def test_other_bits(bits):
    with pytest.raises(ValueError, match=r"round_weights: bits is .*; expected 16, 24 or 32"):
        adamfn.round_weights(bits)


def test_it_stands_last():
    for after in (adamfn.scale_by_lr(0.1), optax.scale(2.0)):
        with pytest.raises(ValueError, match=r"round_weights stands before .* Put it last"):
            adamfn.chain(adamfn.round_weights(24), after)


def test_parameters_are_needed():
    tx = rounding(24)
    params = jnp.ones(2, BFLOAT16)
    with pytest.raises((TypeError, ValueError), match="round_weights: update got no params"):
        tx.update(params, tx.init(params))


def test_a_state_of_other_parameters():
    tx = rounding(24)
    narrow, wide = {"w": jnp.ones(2, BFLOAT16)}, {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match="at w the state has no correction"):
        tx.update(narrow, tx.init(wide), narrow)
    with pytest.raises(ValueError, match="at w the state has a correction"):
        tx.update(wide, tx.init(narrow), wide)
    short = tx.init({"w": jnp.ones(1, BFLOAT16)})
    with pytest.raises(ValueError, match=r"differ at \['w'\]: found bfloat16\[2\], expected int8"):
        tx.update(narrow, (tx.init(narrow)[0], short[1]), narrow)
    with pytest.raises(ValueError, match=r"whole_weights: at w the weight is bfloat16\[2\]"):
        adamfn.whole_weights(narrow, short)
    with pytest.raises(ValueError, match=r"narrow_weights: whole and params differ at \['w'\]"):
        adamfn.narrow_weights({"v": jnp.ones(2)}, narrow, tx)


def test_it_cannot_be_packed():
    with pytest.raises(ValueError, match="packed: round_weights keeps bits of each weight"):
        adamfn.packed(rounding(24))


@pytest.mark.parametrize("moments", ["float32", "8bit"])
@pytest.mark.parametrize("bits", BITS)
def test_float64_gradients(bits, moments):
    """NumPy's gradients, with x64: the weights' words have 32 bits."""
    tx, params = rounding(bits, 0.5, moments), jnp.full(MANY, 1.5, BFLOAT16)
    state = tx.init(params)
    with jax.enable_x64(True):
        updates, after = tx.update(np.full(MANY, 0.25), state, params)
    np.testing.assert_allclose(np.asarray(updates), -0.5, rtol=1e-6)
    chex.assert_trees_all_equal_dtypes(after, state)
