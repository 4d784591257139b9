"""`step` for any transformation, and the fused steps against the formulas and the chain."""

import os
import subprocess
import sys
import textwrap
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import adamfn
from adamfn.fused import from_chain, to_chain
from adamfn.fused.packing import SMALL
from adamfn.interop.optax import to_state

FUSED = {"native": "auto", "xla": "xla"}
MOMENTS = ("float32", "bfloat16", "8bit", "4bit")


def tree(seed=0, dtype=jnp.float32):
    """Leaves of every kind of path: packed, alone, odd, empty, scalar, large enough for 8 bits."""
    rng = np.random.default_rng(seed)
    shapes = {"large": (160, 300), "vectors": [(1,), (33,), (0,), (1000,)], "scalar": ()}
    leaves = jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape), dtype),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    return {**leaves, "nothing": None}


def run(tx, steps=6, params=None, wrap=jax.jit, **extra):
    params = tree() if params is None else params
    state = tx.init(params)
    one = wrap(lambda p, s, g: adamfn.step(tx, g, s, p, **extra))
    for seed in range(1, steps + 1):
        params, state = one(params, state, jax.tree.map(partial(cycle, seed=seed), params))
    return params, state


def cycle(p, seed):
    """A gradient of another size in every element and step."""
    return (jnp.cos(jnp.arange(p.size) * 0.7 + seed).reshape(p.shape) * 10.0 ** (seed % 3)).astype(
        p.dtype
    )


def assert_same_params(found, expected):
    """Within two float32 roundings of the chain's, of the parameter or of all its updates."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2 * 2**-23, atol=2 * 2**-23),
        found,
        expected,
    )


@pytest.mark.parametrize("tx", [adamfn.adam(0.1), optax.adam(0.1)], ids=["adamfn", "optax"])
def test_step_of_an_ordinary_transformation_is_update_and_apply_updates(tx):
    params = tree()
    state = tx.init(params)
    updates, expected_state = tx.update(params, state, params)
    found, found_state = adamfn.step(tx, params, state, params)
    jax.tree.map(np.testing.assert_array_equal, found, adamfn.apply_updates(params, updates))
    jax.tree.map(np.testing.assert_array_equal, found_state, expected_state)


def test_step_hands_on_extra_arguments():
    for tx in (adamfn.adam(), adamfn.fused_adam()):
        params = jnp.ones(3)
        params, state = adamfn.step(tx, params, tx.init(params), params, learning_rate=0.25)
        np.testing.assert_allclose(params, 0.75, rtol=1e-6)
        last = state if hasattr(state, "learning_rate") else state[-1]
        assert last.learning_rate == 0.25


def test_step_of_what_is_no_transformation():
    with pytest.raises(TypeError, match=r"expected a transformation.*adamfn.adam\(\)"):
        adamfn.step(adamfn.adam, {}, (), {})


@pytest.mark.parametrize("backend", FUSED.values(), ids=FUSED)
@pytest.mark.parametrize(
    ("hyperparameters", "tolerance"),
    [({}, 4e-7), ({"nesterov": True}, 5e-7), ({"b1": 0.1, "b2": 0.1, "eps_root": 1e-6}, 5e-7)],
)
def test_updates_against_the_formulas(backend, hyperparameters, tolerance):
    # The chain's bounds, of test_exactness, on its gradients. From zero, a step is its update.
    rng = np.random.default_rng(0)
    grads = rng.standard_normal((60, 4096)) * 10 ** rng.uniform(-8, 1, (1, 4096))
    tx = adamfn.fused_adam(backend=backend, **hyperparameters)
    zeros = jnp.zeros(4096)
    state, found = tx.init(zeros), []
    one = jax.jit(lambda g, s: adamfn.step(tx, g, s, zeros))
    for g in grads.astype(np.float32):
        moved, state = one(g, state)
        found.append(np.float64(moved))
    expected = reference.updates(grads.astype(np.float32), **hyperparameters)
    assert reference.worst_error(found, expected) < tolerance


@pytest.mark.parametrize("backend", FUSED.values(), ids=FUSED)
def test_without_memory_a_large_gradient_is_forgotten_at_once(backend):
    tx = adamfn.fused_adam(0.25, b1=0.0, b2=0.0, backend=backend)
    params = jnp.zeros(8)
    state = tx.init(params)
    for g in (1e8, 1e-3):
        moved, state = jax.jit(lambda s, g: adamfn.step(tx, jnp.full(8, g), s, params))(state, g)
    np.testing.assert_allclose(moved, -0.25, rtol=2e-5)  # eps beside 1e-3


@pytest.mark.parametrize("backend", FUSED.values(), ids=FUSED)
@pytest.mark.parametrize("moments", MOMENTS)
def test_step_is_the_chain(backend, moments):
    mask = {**jax.tree.map(lambda _: True, tree()), "scalar": False, "large": True}
    mask["vectors"][1] = False
    kwargs = {
        "learning_rate": lambda count: 0.1 / (1 + count),
        "weight_decay": lambda count: 0.1 * (1 + count),
        "mask": mask,
        "moments": moments,
    }
    chain, fused = adamfn.adamw(**kwargs), adamfn.fused_adamw(**kwargs, backend=backend)
    expected, chain_state = run(chain)
    found, state = run(fused)
    assert_same_params(found, expected)
    assert state.learning_rate == chain_state[-1].learning_rate
    in_chain = to_chain(state, chain_state, found)
    for a, b in zip(jax.tree.leaves(in_chain), jax.tree.leaves(chain_state), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jnp.integer) and a.size > 1:
            # A code flips where a sum rounded otherwise falls on the other side of its noise.
            assert np.mean(a != b) < 1e-3
        else:
            np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("backend", FUSED.values(), ids=FUSED)
def test_bfloat16_parameters_are_rounded_once(backend):
    params = tree(dtype=jnp.bfloat16)
    found, _ = run(adamfn.fused_adam(0.1, backend=backend), steps=1, params=params)
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


@pytest.mark.parametrize("backend", FUSED.values(), ids=FUSED)
def test_mixed_dtypes_in_one_buffer(backend):
    params = {"a": jnp.ones(5), "b": jnp.ones(7, jnp.bfloat16), "c": jnp.ones((2, 3))}
    tx = adamfn.fused_adam(0.5, backend=backend)
    state = tx.init(params)
    assert len(state.mu.buffers) == 1
    grads = {"a": jnp.ones(5, jnp.bfloat16), "b": jnp.ones(7), "c": -jnp.ones((2, 3))}
    moved, _ = jax.jit(lambda s, p: adamfn.step(tx, grads, s, p))(state, params)
    assert [x.dtype for x in jax.tree.leaves(moved)] == [jnp.float32, jnp.bfloat16, jnp.float32]
    for leaf, expected in zip(jax.tree.leaves(moved), (0.5, 0.5, 1.5), strict=True):
        np.testing.assert_allclose(np.float32(leaf), expected, rtol=1e-6)


def test_numbers_and_empty_trees():
    tx = adamfn.fused_adam(0.5)
    params = {"number": 1.0, "numpy": np.ones(3, np.float32), "nothing": {}}
    moved, state = adamfn.step(tx, params, tx.init(params), params)
    np.testing.assert_allclose(moved["number"], 0.5, rtol=1e-6)
    np.testing.assert_allclose(moved["numpy"], 0.5, rtol=1e-6)
    moved, state = jax.jit(lambda s: adamfn.step(tx, {}, s, {}))(tx.init({}))
    assert moved == {}
    assert state.count == 1
    with pytest.raises(ValueError, match="fused_adam: grads and params differ"):
        adamfn.step(tx, params, tx.init(params), None)


def test_other_dtypes_go_through_xla():
    params = {"half": jnp.ones(3, jnp.float16), "complex": jnp.ones(3, jnp.complex64)}
    found, state = run(adamfn.fused_adam(0.1), params=params)
    expected, _ = run(adamfn.adam(0.1), params=params)
    assert state.mu.buffers == ()
    assert found["complex"].dtype == jnp.complex64
    # The chain rounds an update to float16 at each of its stages, the fused step once.
    np.testing.assert_allclose(found["half"], expected["half"], rtol=4e-3)
    np.testing.assert_allclose(found["complex"], expected["complex"], rtol=1e-6)


def test_float64():
    with jax.enable_x64(True):
        params = {"w": jnp.ones(5, jnp.float64)}
        found, state = run(adamfn.fused_adam(0.1), params=params)
        expected, _ = run(adamfn.adam(0.1), params=params)
        assert state.mu.leaves["w"].dtype == jnp.float64
        np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-14)


def test_update_is_the_chains_and_keeps_the_fused_state():
    fused, chain = adamfn.fused_adamw(0.1), adamfn.adamw(0.1)
    params = tree()
    found, state = jax.jit(fused.update)(params, fused.init(params), params)
    expected, chain_state = jax.jit(chain.update)(params, chain.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    moved = to_chain(state, chain_state, params)
    jax.tree.map(np.testing.assert_array_equal, moved, chain_state)
    jax.tree.map(np.testing.assert_array_equal, from_chain(moved, state, params), state)


def test_it_composes_with_optax():
    tx = optax.chain(optax.clip_by_global_norm(1.0), adamfn.fused_adam(0.1))
    expected = optax.chain(optax.clip_by_global_norm(1.0), adamfn.adam(0.1))
    jax.tree.map(np.testing.assert_array_equal, run(tx)[0], run(expected)[0])


def test_a_new_rate_compiles_nothing():
    tx, params = adamfn.fused_adam(), tree()
    traces = []

    @jax.jit
    def one(params, state, rate):
        traces.append(1)
        return adamfn.step(tx, params, state, params, learning_rate=rate)

    state = tx.init(params)
    for rate in (0.1, 0.2):
        params, state = one(params, state, rate)
    assert len(traces) == 1
    assert state.learning_rate == np.float32(0.2)


@pytest.mark.parametrize("moments", ["float32", "8bit"])
def test_vmap_scan_grad_and_donation(moments):
    tx = adamfn.fused_adam(0.1, moments=moments)
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
        expected = jax.jit(jax.grad(partial(loss, adamfn.adam(0.1, eps_root=1e-6))))(params)
        slope = jax.jit(jax.grad(partial(loss, adamfn.fused_adam(0.1, eps_root=1e-6))))(params)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), slope, expected)
        assert jax.eval_shape(partial(loss, tx), params).shape == ()

    params = {"w": jnp.copy(w[0])}
    state = tx.init(params)
    step = jax.jit(lambda p, s: adamfn.step(tx, p, s, p), donate_argnums=(0, 1))
    kept = jax.jit(lambda p, s: adamfn.step(tx, p, s, p))(params, state)
    jax.tree.map(np.testing.assert_array_equal, step(params, state), kept)


@pytest.mark.parametrize("moments", ["float32", "bfloat16", "8bit"])
def test_a_donated_step_is_in_place(moments):
    params = {"w": jnp.ones((256, 512)), "v": jnp.ones((256, 512)), "b": jnp.ones(256)}
    tx = adamfn.fused_adam(0.1, moments=moments)
    step = jax.jit(lambda p, s, g: adamfn.step(tx, g, s, p), donate_argnums=(0, 1))
    compiled = step.lower(params, tx.init(params), params).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4096  # the scalars


def test_gradients_and_parameters_that_are_one_array():
    x = jnp.linspace(0.5, 1.0, 40000)
    tx = adamfn.fused_adam(0.25)
    moved, _ = jax.jit(lambda x, s: adamfn.step(tx, x, s, x))(x, tx.init(x))
    np.testing.assert_allclose(moved, x - 0.25, rtol=1e-6)


def test_what_is_packed():
    params = {
        "small": jnp.ones(SMALL - 1),
        "large": jnp.ones(SMALL),
        "half": jnp.ones(3, jnp.float16),
        "many": [jnp.ones(2) for _ in range(70)],
    }
    state = adamfn.fused_adam().init(params)
    assert [b.size for b in state.mu.buffers] == [128, 12 + SMALL - 1]
    assert state.mu.leaves["small"] is None
    assert state.nu.leaves["large"].shape == (SMALL,)
    assert state.mu.leaves["half"].dtype == jnp.float32
    assert adamfn.fused_adam(packed=False).init(params).mu.buffers == ()
    lean = adamfn.fused_adam(moments="8bit").init({"w": jnp.ones((64, 128)), "b": jnp.ones(3)})
    assert [b.size for b in lean.mu.buffers] == [3]


def test_describe_shows_the_state_of_a_fused_step():
    text = adamfn.formats.describe(adamfn.fused_adam().init({"a": jnp.ones(3), "b": jnp.ones(4)}))
    assert "56 bytes in all" in text


def test_many_devices():
    """Sharded leaves are not packed, steps gather nothing, and every shard has the same numbers."""
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
            tx = adamfn.fused_adamw(0.1, moments=moments)
            state = tx.init(sharded)
            assert state.mu.buffers == () == jax.eval_shape(tx.init, sharded).mu.buffers
            if moments == "float32":
                assert state.mu.leaves["w"].sharding == sharded["w"].sharding
            step = jax.jit(lambda p, s: adamfn.step(tx, p, s, p))
            alone, _ = step(params, tx.init(params))
            if moments == "float32":
                text = step.lower(sharded, state).compile().as_text()
                assert "all-gather" not in text and "all-to-all" not in text, text
            moved, state = step(sharded, state)
            for k in params:
                assert moved[k].sharding.is_equivalent_to(sharded[k].sharding, moved[k].ndim)
                np.testing.assert_allclose(moved[k], alone[k], **two_roundings)

        tx = adamfn.fused_adamw(0.1)
        state = tx.init(sharded)
        of_state = jax.tree.map(lambda x: P(), state)
        for field in ("mu", "nu"):
            moment = getattr(of_state, field)._replace(leaves=specs)
            of_state = of_state._replace(**{field: moment})
        step = jax.jit(jax.shard_map(
            lambda p, s: adamfn.step(tx, p, s, p), mesh=mesh,
            in_specs=(specs, of_state), out_specs=(specs, of_state)))
        compiled = step.lower(sharded, state).compile().as_text()
        assert "all-gather" not in compiled
        assert ("adamfn_step" in compiled) == (adamfn.fused.backend().name == "native")
        moved, _ = step(sharded, state)
        alone, _ = jax.jit(lambda p, s: adamfn.step(tx, p, s, p))(params, tx.init(params))
        for k in params:
            np.testing.assert_allclose(moved[k], alone[k], **two_roundings)
        one = jax.device_put(params, jax.devices()[3])
        moved, _ = jax.jit(lambda p, s: adamfn.step(tx, p, s, p))(one, tx.init(one))
        assert tx.init(one).mu.buffers[0].devices() == {jax.devices()[3]}
        np.testing.assert_array_equal(moved["w"], alone["w"])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]


PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.ones(4)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grads": {"w": jnp.ones((2, 3))}}, ValueError, "grads and params differ at ..b..: found"),
        ({"grads": {**PARAMS, "b": jnp.ones(5)}}, ValueError, r"\['b'\]: found float32\[5\]"),
        ({"grads": {**PARAMS, "b": jnp.ones(4, int)}}, TypeError, r"\['b'\] is int32\[4\]"),
        ({"params": {**PARAMS, "b": 1j * jnp.ones(4)}}, ValueError, "complex64"),
        ({"state": adamfn.adam().init(PARAMS)}, TypeError, "expected FusedAdamState"),
        (
            {"state": adamfn.fused_adam().init({"w": jnp.ones(2), "b": jnp.ones(4)})},
            ValueError,
            "packed buffers of .6. elements; expected .10.",
        ),
        ({"state": adamfn.fused_adam().init({"w": jnp.ones(2)})}, ValueError, "structure"),
        (
            {"state": adamfn.fused_adam(packed=False).init({**PARAMS, "w": jnp.ones(2)})},
            ValueError,
            r"params and mu differ at \['w'\]: found float32\[2,3\], expected float32\[2\]",
        ),
        ({"learning_rate": -1.0}, ValueError, "learning_rate is -1"),
    ],
)
def test_errors(change, error, message):
    arguments = {"grads": PARAMS, "state": adamfn.fused_adam().init(PARAMS), "params": PARAMS}
    with pytest.raises(error, match=message):
        adamfn.step(adamfn.fused_adam(), **{**arguments, **change})


def test_errors_of_the_recipes():
    with pytest.raises(ValueError, match="backend is 'cuda'; expected one of"):
        adamfn.fused_adam(backend="cuda")
    with pytest.raises(ValueError, match=r"b1 is 1\.0"):
        adamfn.fused_adamw(b1=1)
    lean = adamfn.fused_adam(moments="8bit")
    params = {"w": jnp.ones((64, 128))}
    state = adamfn.fused_adam(packed=False).init(params)
    with pytest.raises(ValueError, match="mu at w is stored as float32"):
        adamfn.step(lean, params, state, params)


def test_other_libraries_states_go_by_way_of_the_chains():
    state = adamfn.fused_adam().init(PARAMS)
    with pytest.raises(ValueError, match=r"is a fused step's.*adamfn.fused.to_chain makes it"):
        to_state(state, optax.adam(0.1).init(PARAMS))
    in_chain = to_chain(state, adamfn.adam().init(PARAMS), PARAMS)
    to_state(in_chain, optax.adam(0.1).init(PARAMS))


def test_errors_of_moving_states():
    fused, chain = adamfn.fused_adam(), adamfn.adam()
    state, in_chain = fused.init(PARAMS), chain.init(PARAMS)
    with pytest.raises(TypeError, match="expected the state of adam or adamw"):
        to_chain(state, optax.adam(0.1).init(PARAMS), PARAMS)
    with pytest.raises(TypeError, match="expected FusedAdamState"):
        to_chain(in_chain, in_chain, PARAMS)
    with pytest.raises(TypeError, match="expected the state of adam or adamw"):
        from_chain(adamfn.amsgrad().init(PARAMS), state, PARAMS)
    with pytest.raises(ValueError, match="packed buffers"):
        to_chain(state, in_chain, {**PARAMS, "b": jnp.ones(9)})
    with pytest.raises(ValueError, match=r"mu at b is float32\[9\]; expected float32 of shape"):
        from_chain(chain.init({**PARAMS, "b": jnp.ones(9)}), state, PARAMS)
