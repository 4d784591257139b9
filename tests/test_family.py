# SPDX-License-Identifier: Apache-2.0
"""The members of the family against their formulas in float64, and optax."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import adamfn

MEMBERS = ["amsgrad", "nadam", "radam", "adamax", "lazy_adam", "ademamix", "adopt"]
STAGES = {
    "amsgrad": adamfn.scale_by_max_moments,
    "nadam": adamfn.scale_by_nesterov_moments,
    "radam": adamfn.scale_by_rectified_moments,
    "adamax": adamfn.scale_by_infinity_moments,
    "lazy_adam": adamfn.scale_by_lazy_moments,
    "ademamix": adamfn.scale_by_ademamix,
    "adopt": adamfn.scale_by_adopt,
}
LAST = 2**31 - 1


def gradients(steps, seed, side=64):
    """Rows of scales over nine decades, which grow and shrink over time; some rows are zero."""
    rng = np.random.default_rng(seed)
    scales = 10 ** rng.uniform(-6, 3, (side, side)) * 2 ** np.sin(np.arange(steps))[:, None, None]
    rows = rng.random((steps, side, 1)) < 0.9
    return (scales * rng.standard_normal((steps, side, side)) * rows).astype(np.float32)


@cache
def transformation(member, **hyperparameters):
    return getattr(adamfn, member)(**hyperparameters)


@cache
def compiled(update):
    """Once for all gradients of a shape."""
    return jax.jit(update)


def run(tx, grads):
    """The updates of all steps."""
    state, found = tx.init(grads[0]), []
    for g in grads:
        updates, state = compiled(tx.update)(g, state)
        found.append(np.asarray(updates))
    return np.stack(found)


def run_in_a_loop(tx, grads):
    """The same in one program."""

    def step(state, g):
        updates, state = tx.update(g, state)
        return state, updates

    return jax.jit(lambda grads: jax.lax.scan(step, tx.init(grads[0]), grads)[1])(grads)


def worst_error(member, grads, **hyperparameters):
    found = run(transformation(member, **hyperparameters), grads)
    expected = np.stack(list(getattr(reference, member)(grads, **hyperparameters)))
    return reference.worst_error(found, expected)


@pytest.mark.optimized  # roundings near their bounds
@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_its_formula(member, seed):
    # Measured: 2.8e-7 to 3.8e-7. Adamax rounds v at each of the 60 steps, and no root halves that:
    # 4.9e-7 to 7.8e-7.
    assert worst_error(member, gradients(60, seed)) < (9e-7 if member == "adamax" else 5e-7)


@pytest.mark.optimized  # roundings near their bounds
@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize(("b1", "b2"), [(0.0, 0.9), (0.9, 0.0)])
def test_agrees_with_its_formula_for_other_decays(member, b1, b2):
    assert worst_error(member, gradients(60, 3), b1=b1, b2=b2, eps=1e-3) < 6e-7


@pytest.mark.parametrize("momentum_decay", [0.0, 0.5, 1000.0])
def test_nadam_with_other_momenta(momentum_decay):
    assert worst_error("nadam", gradients(60, 4), momentum_decay=momentum_decay) < 7e-7


@pytest.mark.optimized  # roundings near their bounds
@pytest.mark.parametrize("member", MEMBERS)
def test_many_steps(member):
    # Averages forget their roundings; b2^t and the products of momenta must be right. Measured:
    # 0.9e-6 to 1.5e-6.
    grads = gradients(3000, 5, side=8)
    found = run_in_a_loop(transformation(member), jnp.asarray(grads))
    expected = np.stack(list(getattr(reference, member)(grads)))
    assert reference.worst_error(found, expected) < 3e-6


def test_adamax_does_not_drift_after_a_large_gradient():
    # 0.999 as a float32 is 1.3e-8 too large: 3000 products with it are 4e-5 off.
    grads = np.full((3000, 1, 1), 1e-6, np.float32)
    grads[0] = 1.0
    tx = adamfn.scale_by_infinity_moments()
    state = tx.init(grads[0])
    state, _ = jax.lax.scan(lambda s, g: (tx.update(g, s)[1], 0), state, jnp.asarray(grads))
    np.testing.assert_allclose(state.nu, 0.999**2999, rtol=1e-5)


@pytest.mark.parametrize("b2", [0.7, 0.9, 0.99, 0.999, 0.9999, 0.999999])
def test_radam_counts_gradients_exactly(b2):
    # The terms of rho = rho_inf - 2 t b2^t / (1 - b2^t) cancel for small t: digits of float64.
    from fractions import Fraction

    from adamfn.core.averages import decay
    from adamfn.stages.variants import _gradients_in

    b, steps = Fraction(b2), [1, 2, 5, 6, 7, 10, 31, 100, 316, 1000]
    for t in steps:
        exact = 2 / (1 - b) - 1 - 2 * t * b**t / (1 - b**t)
        found = _gradients_in(decay("b2", b2), jnp.int32(t))
        np.testing.assert_allclose(found, float(exact), rtol=5e-7, err_msg=f"step {t}")


def test_radam_begins_to_divide_at_its_sixth_step():
    # rho is 4.99 at the fifth and 5.99 at the sixth.
    updates = run(adamfn.radam(learning_rate=1.0), np.full((6, 1), 100.0, np.float32))[:, 0]
    np.testing.assert_allclose(updates[:5], -100, rtol=1e-6)
    assert -0.1 < updates[5] < 0


def test_amsgrad_does_not_speed_up_when_gradients_shrink():
    grads = np.float32([[10.0]] * 20 + [[0.1]] * 200)
    found = {m: run(getattr(adamfn, m)(b2=0.9), grads) for m in ("adam", "amsgrad")}
    assert abs(found["adam"][-1, 0]) > 9e-4
    assert abs(found["amsgrad"][-1, 0]) < 2e-5


def test_adam_with_dozats_momentum_is_not_nadam():
    grads = gradients(5, 6)
    simple = run(adamfn.adam(2e-3, nesterov=True), grads)
    assert reference.worst_error(run(optax.nadam(2e-3), grads), simple) < 5e-5
    assert reference.worst_error(run(adamfn.nadam(), grads), simple) > 0.01


@pytest.mark.parametrize(
    ("shape", "moved"),
    [
        ((), ["", "1"]),
        ((3,), ["000", "111"]),
        ((2, 3), ["000 000", "000 111", "111 000"]),
        ((2, 2, 2), ["00 00 00 11", "11 00 00 00"]),
    ],
    ids=str,
)
def test_a_row_of_lazy_adam_is_the_last_axis(shape, moved):
    tx = adamfn.lazy_adam(learning_rate=1.0)
    params = jnp.ones(shape)
    state = tx.init(params)
    _, state = tx.update(params, state)
    for pattern in moved:
        rows = np.array([c == "1" for c in pattern.replace(" ", "")] or [False]).reshape(shape)
        # One element is enough to wake a row.
        g = jnp.asarray(rows & (np.arange(rows.size).reshape(shape) % max(rows.shape or (1,)) == 0))
        awake = np.broadcast_to(np.any(g, axis=-1, keepdims=True), shape) if shape else rows
        updates, after = tx.update(g.astype(jnp.float32), state)
        assert np.all((updates != 0) == awake)
        for before, now in ((state[0].mu, after[0].mu), (state[0].nu, after[0].nu)):
            np.testing.assert_array_equal(np.asarray(before)[~awake], np.asarray(now)[~awake])
            assert np.all(np.asarray(before)[awake] != np.asarray(now)[awake])


def test_a_nan_wakes_a_row():
    tx = adamfn.lazy_adam()
    updates, _ = tx.update(jnp.array([[jnp.nan, 0], [0, 0]]), tx.init(jnp.ones((2, 2))))
    assert np.isnan(updates[0, 0])
    np.testing.assert_array_equal(updates[1], 0)


@pytest.mark.parametrize("member", MEMBERS)
def test_zero_gradients_give_zero_updates(member):
    tx = transformation(member)
    params = {x: np.zeros(3, x) for x in (np.float16, jnp.bfloat16, np.float32, np.complex64)}
    params = {jnp.dtype(dtype).name: zeros for dtype, zeros in params.items()}
    state = tx.init(params)
    for _ in range(8):
        updates, state = compiled(tx.update)(params, state, params)
        for dtype, u in updates.items():
            assert u.dtype == dtype
            np.testing.assert_array_equal(np.asarray(u), 0, err_msg=dtype)


@pytest.mark.parametrize("member", MEMBERS)
def test_a_complex_leaf_is_scaled_by_its_modulus(member):
    tx = getattr(adamfn, member)(learning_rate=1.0)
    g = np.array([[3 + 4j, -1j], [2, 5 - 12j]], np.complex64)
    angle = np.exp(np.complex64(0.7j))
    straight, turned, real = (run(tx, np.stack([x] * 9)) for x in (g, g * angle, np.abs(g)))
    np.testing.assert_allclose(turned, straight * angle, rtol=2e-6)
    np.testing.assert_allclose(np.abs(straight), np.abs(real), rtol=2e-6)


@pytest.mark.parametrize("member", MEMBERS)
def test_traced_hyperparameters(member):
    grads = gradients(30, 7)

    @jax.jit
    def with_traced(b1, b2, eps):
        return run_in_a_loop(getattr(adamfn, member)(1e-3, b1, b2, eps=eps), grads)

    hyperparameters = (np.float32(0.9), np.float32(0.99), np.float32(1e-6))
    expected = getattr(reference, member)(
        grads, 1e-3, **dict(zip(("b1", "b2", "eps"), map(float, hyperparameters), strict=True))
    )
    error = reference.worst_error(with_traced(*hyperparameters), np.stack(list(expected)))
    assert error < 8e-7


@pytest.mark.parametrize("member", MEMBERS)
def test_the_count_stops_at_its_last(member):
    tx = STAGES[member]()
    state = tx.init(jnp.zeros(1))._replace(count=jnp.int32(LAST))
    updates, state = tx.update(jnp.ones(1), state)
    assert state.count == LAST
    assert np.all(np.isfinite(updates))


@pytest.mark.parametrize("member", MEMBERS)
def test_a_stage_refuses_what_it_cannot_use(member):
    tx = STAGES[member]()
    name = STAGES[member].__name__
    with pytest.raises(TypeError, match=f"{name}: params: the leaf at .* is int32"):
        tx.init({"w": jnp.arange(3)})
    state = tx.init({"w": jnp.zeros(3)})
    with pytest.raises(ValueError, match=rf"{name}: updates and mu differ at \['w'\]"):
        tx.update({"w": jnp.zeros(4)}, state)
    with pytest.raises(TypeError, match=f"{name}: found a state of type tuple"):
        tx.update({"w": jnp.zeros(3)}, ())
    for argument in ("b1", "b2", "eps"):
        with pytest.raises(ValueError, match=f"{argument} is -1"):
            STAGES[member](**{argument: -1})


def test_nadam_refuses_a_negative_momentum_decay():
    with pytest.raises(ValueError, match="momentum_decay is -1"):
        adamfn.nadam(momentum_decay=-1)


@pytest.mark.parametrize("member", MEMBERS)
def test_schedules_decay_and_masks_go_round_any_member(member):
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        adamfn.add_decayed_weights(0.1),
        optax.masked(getattr(adamfn, member)(lambda count: 0.5**count), {"a": True, "b": False}),
    )
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones(2)}
    state = tx.init(params)
    updates, state = jax.jit(tx.update)(params, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert np.all(np.isfinite(updates["a"]))
    assert optax.tree.get(state, "mu")["a"].shape == (2, 2)
    assert optax.tree.get(state, "learning_rate") == 1.0


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("use_clipping", [False, True])
def test_adopt_is_optaxs(nesterov, use_clipping):
    grads = gradients(20, 8)
    kwargs = {"nesterov": nesterov, "use_clipping": use_clipping, "eps": 1e-4}
    kwargs |= {"b1": 1 - 2**-3, "b2": 1 - 2**-10}  # of which optax takes 1 - b exactly
    found, expected = (f(1e-3, **kwargs) for f in (adamfn.adopt, optax.contrib.adopt))
    assert reference.worst_error(run(found, grads), run(expected, grads)) < 1e-6


def test_ademamix_is_optaxs():
    grads = gradients(20, 9)
    schedules = {"alpha": lambda t: 0.3 * t, "b3": lambda t: 1 - 0.1 / (1 + t)}
    for more in ({}, {"b3": 0.99, "eps": 1e-4, "eps_root": 1e-6}, schedules):
        tx, params = adamfn.ademamix(1e-3, **more), grads[0]
        found = run(tx, grads)
        theirs = optax.contrib.ademamix(1e-3, **more)
        state, expected = theirs.init(params), []
        for g in grads:
            updates, state = compiled(theirs.update)(g, state, params)
            expected.append(np.asarray(updates))
        # optax corrects by a 1 - b2^t of float32: 1.0e-5 in the first steps.
        assert reference.worst_error(found, np.stack(expected)) < 1.2e-5
    decayed = adamfn.ademamix(1.0, weight_decay=0.5, mask={"a": True, "b": False})
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = decayed.update(zeros, decayed.init(params), params)
    assert [updates[k][0] for k in "ab"] == [-0.5, 0]


def test_no_correction_belongs_after_members_that_correct_themselves():
    for stage in (adamfn.scale_by_ademamix(), adamfn.scale_by_adopt()):
        with pytest.raises(ValueError, match=r"bias_correct stands after .*Leave it out"):
            adamfn.chain(stage, adamfn.bias_correct())
