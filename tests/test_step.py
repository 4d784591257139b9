# SPDX-License-Identifier: Apache-2.0
"""`step` for any transformation, and a chain's own step against the formulas and `update`."""

import os
import subprocess
import sys
import textwrap
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import adamfn

BACKENDS = {"native": "auto", "xla": "xla"}
MOMENTS = ("float32", "bfloat16", "8bit", "4bit")


def tree(seed=0, dtype=jnp.float32):
    """Leaves of every kind of path: small, alone, odd, empty, scalar, large enough for 8 bits."""
    rng = np.random.default_rng(seed)
    shapes = {"large": (160, 300), "vectors": [(1,), (33,), (0,), (1000,)], "scalar": ()}
    leaves = jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape), dtype),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    return {**leaves, "nothing": None}


def by_hand(tx):
    """`step` of a transformation that has `update` alone."""

    def advance(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return adamfn.apply_updates(params, updates), state

    return advance


def run(tx, steps=6, params=None, advance=None):
    params = tree() if params is None else params
    state = tx.init(params)
    advance = advance or partial(adamfn.step, tx)
    one = jax.jit(lambda p, s, g: advance(g, s, p))
    for seed in range(1, steps + 1):
        params, state = one(params, state, jax.tree.map(partial(cycle, seed=seed), params))
    return params, state


def cycle(p, seed):
    """A gradient of another size in every element and step."""
    g = np.cos(np.arange(p.size) * 0.7 + seed).reshape(p.shape) * 10.0 ** (seed % 3)
    return g.astype(p.dtype)


def assert_same_params(found, expected):
    """Within two float32 roundings, of the parameter or of all its updates."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2 * 2**-23, atol=2 * 2**-23),
        found,
        expected,
    )


@pytest.mark.parametrize(
    "tx", [optax.adam(0.1), optax.chain(adamfn.adam(0.1))], ids=["optax", "inside optax"]
)
def test_step_of_an_ordinary_transformation_is_update_and_apply_updates(tx):
    params = tree()
    state = tx.init(params)
    updates, expected_state = tx.update(params, state, params)
    found, found_state = adamfn.step(tx, params, state, params)
    jax.tree.map(np.testing.assert_array_equal, found, adamfn.apply_updates(params, updates))
    jax.tree.map(np.testing.assert_array_equal, found_state, expected_state)


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_step_hands_on_extra_arguments(backend):
    tx = adamfn.with_backend(adamfn.adam(), backend)
    params = jnp.ones(3)
    params, state = adamfn.step(tx, params, tx.init(params), params, learning_rate=0.25)
    np.testing.assert_allclose(params, 0.75, rtol=1e-6)
    assert state[-1].learning_rate == 0.25


def test_step_of_what_is_no_transformation():
    with pytest.raises(TypeError, match=r"expected a transformation.*adamfn.adam\(\)"):
        adamfn.step(adamfn.adam, {}, (), {})


@pytest.mark.optimized  # roundings near their bounds
@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize(
    ("hyperparameters", "tolerance"),
    [({}, 4e-7), ({"nesterov": True}, 5e-7), ({"b1": 0.1, "b2": 0.1, "eps_root": 1e-6}, 5e-7)],
)
def test_updates_against_the_formulas(backend, hyperparameters, tolerance):
    # The bounds of `update`, of test_exactness, on its gradients. From zero, a step is its update.
    rng = np.random.default_rng(0)
    grads = rng.standard_normal((60, 4096)) * 10 ** rng.uniform(-8, 1, (1, 4096))
    tx = adamfn.with_backend(adamfn.adam(**hyperparameters), backend)
    zeros = jnp.zeros(4096)
    state, found = tx.init(zeros), []
    one = jax.jit(lambda g, s: adamfn.step(tx, g, s, zeros))
    for g in grads.astype(np.float32):
        moved, state = one(g, state)
        found.append(np.float64(moved))
    expected = reference.updates(grads.astype(np.float32), **hyperparameters)
    assert reference.worst_error(found, expected) < tolerance


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_without_memory_a_large_gradient_is_forgotten_at_once(backend):
    tx = adamfn.with_backend(adamfn.adam(0.25, b1=0.0, b2=0.0), backend)
    params = jnp.zeros(8)
    state = tx.init(params)
    step = jax.jit(lambda s, g: adamfn.step(tx, jnp.full(8, g), s, params))
    for g in (1e8, 1e-3):
        moved, state = step(state, g)
    np.testing.assert_allclose(moved, -0.25, rtol=2e-5)  # eps beside 1e-3


def scheduled_and_masked(moments):
    mask = {**jax.tree.map(lambda _: True, tree()), "scalar": False, "large": True}
    mask["vectors"][1] = False
    return adamfn.adamw(
        lambda count: 0.1 / (1 + count),
        weight_decay=lambda count: 0.1 * (1 + count),
        mask=mask,
        moments=moments,
    )


@cache
def moved_by_hand(moments):
    tx = adamfn.with_backend(scheduled_and_masked(moments), "xla")
    return run(tx, advance=by_hand(tx))


@pytest.mark.optimized  # as in native code, a product and its sum are rounded once
@pytest.mark.parametrize(
    ("moments", "backend"),  # in 4 bits "auto" is XLA
    [*((moments, "auto") for moments in MOMENTS), *((moments, "xla") for moments in MOMENTS[:3])],
)
def test_step_is_update_and_apply_updates(backend, moments):
    expected, expected_state = moved_by_hand(moments)
    found, state = run(adamfn.with_backend(scheduled_and_masked(moments), backend))
    assert_same_params(found, expected)
    assert state[-1].learning_rate == expected_state[-1].learning_rate == np.float32(0.1 / 6)
    assert jax.tree.structure(state) == jax.tree.structure(expected_state)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected_state), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jnp.integer) and a.size > 1:
            # A code flips where a sum rounded otherwise falls on the other side of its noise.
            assert np.mean(a != b) < 1e-3
        else:
            np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_bfloat16_parameters_are_rounded_once(backend):
    params = tree(dtype=jnp.bfloat16)
    found, _ = run(adamfn.with_backend(adamfn.adam(0.1), backend), steps=1, params=params)
    expected = jax.tree.map(
        lambda p: (
            p.astype(jnp.float32)
            + np.float32(reference.updates(np.float64(cycle(p, 1))[None], 0.1)[0])
        ).astype(jnp.bfloat16),
        params,
    )
    assert found["large"].dtype == jnp.bfloat16
    different = [
        np.mean(a != b)
        for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=False)
        if a.size
    ]
    # A sum within a rounding of the middle between two may go either way.
    assert np.mean(different) < 2e-3


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_mixed_dtypes(backend):
    params = {"a": jnp.ones(5), "b": jnp.ones(7, jnp.bfloat16), "c": jnp.ones((2, 3))}
    tx = adamfn.with_backend(adamfn.adam(0.5), backend)
    grads = {"a": jnp.ones(5, jnp.bfloat16), "b": jnp.ones(7), "c": -jnp.ones((2, 3))}
    moved, _ = jax.jit(lambda s, p: adamfn.step(tx, grads, s, p))(tx.init(params), params)
    assert [x.dtype for x in jax.tree.leaves(moved)] == [jnp.float32, jnp.bfloat16, jnp.float32]
    for leaf, expected in zip(jax.tree.leaves(moved), (0.5, 0.5, 1.5), strict=True):
        np.testing.assert_allclose(np.float32(leaf), expected, rtol=1e-6)


def test_numbers_and_empty_trees():
    tx = adamfn.adam(0.5)
    params = {"number": 1.0, "numpy": np.ones(3, np.float32), "nothing": {}}
    moved, state = adamfn.step(tx, params, tx.init(params), params)
    np.testing.assert_allclose(moved["number"], 0.5, rtol=1e-6)
    np.testing.assert_allclose(moved["numpy"], 0.5, rtol=1e-6)
    moved, state = jax.jit(lambda s: adamfn.step(tx, {}, s, {}))(tx.init({}))
    assert moved == {}
    assert state[0].count == 1
    with pytest.raises(TypeError, match="step: found no params; expected"):
        adamfn.step(tx, params, tx.init(params), None)


def test_other_dtypes_go_through_xla():
    params = {"half": jnp.ones(3, jnp.float16), "complex": jnp.ones(3, jnp.complex64)}
    tx = adamfn.adam(0.1)
    text = jax.jit(partial(adamfn.step, tx)).lower(params, tx.init(params), params).as_text()
    assert "adamfn_step" not in text
    found, _ = run(tx, params=params)
    expected, _ = run(tx, params=params, advance=by_hand(tx))
    assert found["complex"].dtype == jnp.complex64
    # By hand an update is rounded to float16 before it is added, in a step the sum alone.
    np.testing.assert_allclose(found["half"], expected["half"], rtol=4e-3)
    np.testing.assert_allclose(found["complex"], expected["complex"], rtol=1e-6)


def test_float64():
    with jax.enable_x64(True):
        params = {"w": jnp.ones(5, jnp.float64)}
        found, state = run(adamfn.adam(0.1), params=params)
        grads = np.stack([np.float64(cycle(params["w"], seed)) for seed in range(1, 7)])
        assert state[0].mu["w"].dtype == found["w"].dtype == jnp.float64
        # Six float64 steps of some roundings each.
        expected = 1 + np.sum(reference.updates(grads, 0.1), axis=0)
        np.testing.assert_allclose(found["w"], expected, rtol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_it_composes_with_optax(backend):
    inner = adamfn.with_backend(adamfn.adam(0.1), backend)
    found = run(optax.chain(optax.clip_by_global_norm(1.0), inner))[0]
    # Clipped here as in optax, the steps are adamfn's alone.
    params = tree()
    state = inner.init(params)
    one = jax.jit(partial(adamfn.step, inner))
    for seed in range(1, 7):
        grads = jax.tree.map(partial(cycle, seed=seed), params)
        norm = np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in jax.tree.leaves(grads)))
        params, state = one(jax.tree.map(lambda g, n=norm: g / n, grads), state, params)
    # A gradient that rounds otherwise moves an update by as much, a few times 1e-7 of 0.1.
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), found, params)


def test_a_new_rate_compiles_nothing():
    tx, params = adamfn.adam(), tree()
    traces = []

    @jax.jit
    def one(params, state, rate):
        traces.append(1)
        return adamfn.step(tx, params, state, params, learning_rate=rate)

    state = tx.init(params)
    for rate in (0.1, 0.2):
        params, state = one(params, state, rate)
    assert len(traces) == 1
    assert state[-1].learning_rate == np.float32(0.2)


@pytest.mark.parametrize("moments", ["float32", "8bit"])
def test_vmap_scan_grad_and_donation(moments):
    tx = adamfn.adam(0.1, moments=moments)
    w = jnp.stack([jnp.full((64, 128), x) for x in (1.0, 2.0)])
    b = jnp.ones((2, 7))

    def loss(tx, params):
        def one(carry, _):
            params, state = carry
            return adamfn.step(tx, params, state, params), None

        (params, _), _ = jax.lax.scan(one, (params, tx.init(params)), length=3)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params))

    of_tx = jax.jit(partial(loss, tx))
    each = [of_tx({"w": w[i], "b": b[i]}) for i in (0, 1)]
    np.testing.assert_allclose(
        jax.jit(jax.vmap(partial(loss, tx)))({"w": w, "b": b}), each, rtol=1e-6
    )
    if moments == "float32":
        params = {"w": w[0], "b": b[0]}
        of_optax = partial(loss, optax.adam(0.1, eps_root=1e-6))
        expected = jax.jit(jax.grad(of_optax))(params)
        slope = jax.jit(jax.grad(partial(loss, adamfn.adam(0.1, eps_root=1e-6))))(params)
        # Optax's corrections of the first steps are wrong in the fifth digit.
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4), slope, expected)
        assert jax.eval_shape(partial(loss, tx), params).shape == ()

    params = {"w": jnp.copy(w[0])}
    state = tx.init(params)
    step = jax.jit(lambda p, s: adamfn.step(tx, p, s, p), donate_argnums=(0, 1))
    kept = jax.jit(lambda p, s: adamfn.step(tx, p, s, p))(params, state)
    jax.tree.map(np.testing.assert_array_equal, step(params, state), kept)


@pytest.mark.optimized  # memory of a compiled program
@pytest.mark.parametrize("moments", ["float32", "bfloat16", "8bit"])
def test_a_donated_step_is_in_place(moments):
    params = {"w": jnp.ones((256, 512)), "v": jnp.ones((256, 512)), "b": jnp.ones(256)}
    tx = adamfn.adam(0.1, moments=moments)
    step = jax.jit(lambda p, s, g: adamfn.step(tx, g, s, p), donate_argnums=(0, 1))
    compiled = step.lower(params, tx.init(params), params).compile()
    # The scalars, and the thousand numbers behind them by which XLA counts the cost: no leaf.
    assert compiled.memory_analysis().temp_size_in_bytes < 4096 + 4 * 1000


@pytest.mark.optimized  # memory of a compiled program
@pytest.mark.parametrize("moments", ["float32", "8bit", "4bit", "factored"])
def test_temporary_memory_of_a_compiled_update(moments):
    # GPT-2's proportions: a third of it is one leaf.
    shapes = [(2048, 512), (1000,)] + [(256, 2368)] * 4
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    tx = adamfn.adamw(moments=moments)
    state = jax.eval_shape(tx.init, params)
    compiled = jax.jit(tx.update, donate_argnums=1).lower(params, state, params).compile()
    # Measured: 0.7 to 2.9.
    assert compiled.memory_analysis().temp_size_in_bytes <= 4 * (4 * 2048 * 512)


def test_gradients_and_parameters_that_are_one_array():
    x = jnp.linspace(0.5, 1.0, 40000)
    tx = adamfn.adam(0.25)
    moved, _ = jax.jit(lambda x, s: adamfn.step(tx, x, s, x))(x, tx.init(x))
    np.testing.assert_allclose(moved, x - 0.25, rtol=1e-6)


def test_many_devices():
    """Steps of sharded leaves gather nothing, and every shard has the same numbers."""
    program = """
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        import adamfn
        mesh = jax.make_mesh((4, 2), ("data", "model"))
        two_roundings = {"atol": 2.4e-8, "rtol": 2.4e-7}  # of an update of 0.1, and of a parameter
        rng = np.random.default_rng(0)
        params = {"w": rng.standard_normal((64, 256)), "b": rng.standard_normal(256)}
        params = jax.tree.map(jnp.float32, params)
        specs = {"w": P("data", "model"), "b": P("model")}
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        sharded = jax.device_put(params, shardings)
        for moments in ("float32", "8bit"):
            tx = adamfn.adamw(0.1, moments=moments)
            state = tx.init(sharded)
            if moments == "float32":
                assert state[0].mu["w"].sharding == sharded["w"].sharding
            step = jax.jit(lambda p, s: adamfn.step(tx, p, s, p))
            alone, _ = step(params, tx.init(params))
            if moments == "float32":
                text = step.lower(sharded, state).compile().as_text()
                assert "all-gather" not in text and "all-to-all" not in text, text
            moved, state = step(sharded, state)
            for k in params:
                assert moved[k].sharding.is_equivalent_to(sharded[k].sharding, moved[k].ndim)
                np.testing.assert_allclose(moved[k], alone[k], **two_roundings)

        tx = adamfn.adamw(0.1)
        state = tx.init(sharded)
        of_state = jax.tree.map(lambda x: P(), state)
        of_state = (of_state[0]._replace(mu=specs, nu=specs), *of_state[1:])
        step = jax.jit(jax.shard_map(
            lambda p, s: adamfn.step(tx, p, s, p), mesh=mesh,
            in_specs=(specs, of_state), out_specs=(specs, of_state)))
        compiled = step.lower(sharded, state).compile().as_text()
        assert "all-gather" not in compiled
        assert ("adamfn_step" in compiled) == (adamfn.backend().name == "native")
        moved, _ = step(sharded, state)
        alone, _ = jax.jit(lambda p, s: adamfn.step(tx, p, s, p))(params, tx.init(params))
        for k in params:
            np.testing.assert_allclose(moved[k], alone[k], **two_roundings)
        one = jax.device_put(params, jax.devices()[3])
        moved, _ = jax.jit(lambda p, s: adamfn.step(tx, p, s, p))(one, tx.init(one))
        assert tx.init(one)[0].mu["w"].devices() == {jax.devices()[3]}
        np.testing.assert_array_equal(moved["w"], alone["w"])
    """
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]


PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.ones(4)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"grads": {"w": jnp.ones((2, 3))}},
            ValueError,
            r"updates and params differ at \['b'\]: found nothing, expected float32\[4\]",
        ),
        ({"grads": {**PARAMS, "b": jnp.ones(5)}}, ValueError, r"\['b'\]: found float32\[5\]"),
        ({"grads": {**PARAMS, "b": jnp.ones(4, int)}}, TypeError, r"\['b'\] is int32\[4\]"),
        ({"params": {**PARAMS, "b": 1j * jnp.ones(4)}}, ValueError, r"expected complex64\[4\]"),
        ({"state": adamfn.adamw().init(PARAMS)}, ValueError, "a tuple of 4 as the state, expected"),
        ({"state": adamfn.amsgrad().init(PARAMS)}, TypeError, "type ScaleByMaxMomentsState"),
        ({"state": adamfn.adam().init({"w": PARAMS["w"]})}, ValueError, r"mu differ at \['b'\]"),
        (
            {"state": adamfn.adam().init({**PARAMS, "w": jnp.ones(2)})},
            ValueError,
            r"updates and mu differ at \['w'\]: found float32\[2,3\], expected float32\[2\]",
        ),
        ({"learning_rate": -1.0}, ValueError, "learning_rate is -1"),
    ],
)
def test_errors(change, error, message):
    arguments = {"grads": PARAMS, "state": adamfn.adam().init(PARAMS), "params": PARAMS}
    with pytest.raises(error, match=message):
        adamfn.step(adamfn.adam(), **{**arguments, **change})


def test_errors_of_backends_and_formats():
    with pytest.raises(ValueError, match="backend is 'cuda'; expected one of"):
        adamfn.with_backend(adamfn.adam(), "cuda")
    with pytest.raises(ValueError, match="expected a transformation of adamfn's"):
        adamfn.with_backend(optax.adam(0.1), "xla")
    lean = adamfn.adam(moments="8bit")
    params = {"w": jnp.ones((64, 128))}
    state = adamfn.adam().init(params)
    with pytest.raises(ValueError, match=r"at w the state has mu float32\[64,128\].*mu int8"):
        adamfn.step(lean, params, state, params)
