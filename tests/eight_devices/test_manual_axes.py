# SPDX-License-Identifier: Apache-2.0
"""Inside `jax.shard_map`: what varies over the mesh, what loops accept, and the same numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import adamfn
from adamfn import formats

P = jax.P
MESH = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
BACKENDS = ("auto", "xla", "pallas")
RECIPES = {
    "adam": adamfn.adam,
    "adamw": adamfn.adamw,
    "adamax": adamfn.adamax,
    "amsgrad": adamfn.amsgrad,
    "lazy_adam": adamfn.lazy_adam,
    "nadam": adamfn.nadam,
    "radam": adamfn.radam,
}
WAYS = ("step", "update")
PARAMS = {"kernel": np.full((128, 256), 0.5, np.float32), "bias": np.zeros(8, np.float32)}


def advance(way, tx, grads, state, params, **extra):
    if way == "step":
        return adamfn.step(tx, grads, state, params, **extra)
    updates, state = tx.update(grads, state, params, **extra)
    return adamfn.apply_updates(params, updates), state


def varying(tree):
    """The tree, of a type that may vary over the mesh."""
    return jax.tree.map(lambda x: x if varies(x) else jax.lax.pcast(x, "data", to="varying"), tree)


def varies(x):
    kind = jax.typeof(x)
    manual = getattr(kind, "mat", None)  # jax 0.8 calls it vma
    return "data" in (kind.vma if manual is None else manual.varying)


EVERYWHERE = P()


def in_shards(function, in_specs=EVERYWHERE, out_specs=EVERYWHERE):
    return jax.shard_map(function, mesh=MESH, in_specs=in_specs, out_specs=out_specs)


def whole_numbers(steps, shapes=PARAMS):
    """A gradient for each step and device: small whole numbers, whose sums are exact."""
    random = np.random.default_rng(0)
    return {
        name: random.integers(-3, 4, (steps, 8, *np.shape(x))).astype(np.float32)
        for name, x in shapes.items()
    }


def train(way, tx, summed, params, state, grads):
    """A step for each of the gradients of this device: leading axes of steps, and of one."""

    def step(carry, own):
        own = jax.tree.map(lambda g: jax.lax.psum(g[0], "data") if summed else g[0], own)
        return advance(way, tx, own, carry[1], carry[0]), None

    return jax.lax.scan(step, (params, state), grads)[0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", [*BACKENDS, "optax"])
def test_without_a_sum_of_gradients_jax_refuses(backend, way):
    tx = optax.adamw(1e-3) if backend == "optax" else adamfn.with_backend(adamfn.adamw(), backend)

    def one_step(summed, params, state, grads):
        grads = jax.tree.map(lambda g: jax.lax.psum(g[0], "data") if summed else g[0], grads)
        return advance(way, tx, grads, state, params)

    arguments = PARAMS, tx.init(PARAMS), jax.tree.map(lambda g: g[0], whole_numbers(1))
    specs = (P(), P(), P("data"))
    jax.eval_shape(in_shards(functools.partial(one_step, True), specs), *arguments)
    with pytest.raises(ValueError, match="out_specs which require replication"):
        jax.eval_shape(in_shards(functools.partial(one_step, False), specs), *arguments)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operand", ["grads", "params", "mu", "nu", "learning_rate"])
def test_results_vary_with_any_operand(operand, backend, way):
    tx = adamfn.with_backend(adamfn.adamw(), backend)

    def one_step(leaf):
        given = {"grads": leaf * 2, "params": leaf, "learning_rate": jnp.sum(leaf)}
        state = tx.init(leaf)
        moments = {"mu": state[0].mu, "nu": state[0].nu}
        if operand in given:
            given[operand] = varying(given[operand])
        else:
            moments[operand] = varying(moments[operand])
        state = (state[0]._replace(**moments), *state[1:])
        rate = {"learning_rate": given["learning_rate"]} if operand == "learning_rate" else {}
        params, state = advance(way, tx, given["grads"], state, given["params"], **rate)
        assert all(map(varies, (params, state[0].mu, state[0].nu)))
        return params[None]

    jax.eval_shape(in_shards(one_step, out_specs=P("data")), PARAMS["kernel"])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", [*BACKENDS, "optax"])
def test_a_leaf_does_not_vary_for_its_neighbour(backend, way):
    tx = optax.adamw(1e-3) if backend == "optax" else adamfn.with_backend(adamfn.adamw(), backend)
    params = {"own": PARAMS["kernel"], "shared": PARAMS["kernel"]}

    def one_step(params, state):
        grads = {"own": varying(params["own"]), "shared": params["shared"]}
        params, state = advance(way, tx, grads, state, params)
        moments = state[0].mu, state[0].nu
        assert all(varies(tree["own"]) for tree in (params, *moments))
        return [tree["shared"] for tree in (params, *moments)]

    jax.eval_shape(in_shards(one_step), params, tx.init(params))  # JAX checks that none varies


LOOPS = {
    "scan": lambda step, carry: jax.lax.scan(lambda c, _: (step(c), None), carry, length=3)[0],
    "fori_loop": lambda step, carry: jax.lax.fori_loop(0, 3, lambda _, c: step(c), carry),
    "cond": lambda step, carry: jax.lax.cond(
        jnp.sum(carry[0]["bias"]) == 0, step, lambda c: c, carry
    ),
}


LOOPED = {
    **{
        f"{recipe} {moments}": RECIPES[recipe](1e-3, moments=moments)
        for recipe in RECIPES
        for moments in (formats.FORMATS if recipe == "adamw" else ("float32", "8bit"))
    },
    "schedule": adamfn.adamw(lambda count: 0.1 / count),
    "packed": adamfn.packed(adamfn.adamw(1e-3)),
    "lone stage": adamfn.scale_by_lr(1e-3),
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", LOOPED)
def test_loops_take_the_state(name, loop):
    """JAX compares the types of what goes into a step and of what comes out of it."""
    tx = LOOPED[name]

    def run(kind, params):
        params = params if kind == "replicated" else varying(params)
        state = tx.init(params)
        state = varying(state) if kind == "varying" else state

        def step(carry):
            return adamfn.step(tx, carry[0], carry[1], carry[0])

        params, state = LOOPS[loop](step, (params, state))
        assert all(varies(p) == (kind != "replicated") for p in jax.tree.leaves(params))
        assert kind == "made inside" or all(
            varies(x) == (kind == "varying") for x in jax.tree.leaves(state)
        )
        return params if kind == "replicated" else jax.tree.map(lambda x: x[None], params)

    # All of the state varies, or what init has made inside of parameters that vary.
    for kind in ("replicated", "varying", "made inside"):
        spec = P() if kind == "replicated" else P("data")
        jax.eval_shape(in_shards(functools.partial(run, kind), out_specs=spec), PARAMS)


@pytest.mark.parametrize("moments", ["float32", "8bit"])
def test_the_other_axes_of_a_mesh_are_left_to_jax(moments):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    tx = adamfn.adamw(1e-2, moments=moments)
    kernel, grads = PARAMS["kernel"], whole_numbers(1)["kernel"][0, :4]

    def one_step(params, state, grads):
        return adamfn.step(tx, jax.lax.psum(grads[0], "data"), state, params)

    run = jax.shard_map(
        one_step, mesh=mesh, axis_names={"data"}, in_specs=(P(), P(), P("data")), out_specs=P()
    )
    placed = jax.device_put(kernel, jax.NamedSharding(mesh, P(None, "model")))
    found = jax.jit(run)(placed, tx.init(placed), grads)
    tx = adamfn.with_backend(tx, "xla")  # as on the mesh: native code may round otherwise
    expected = jax.jit(functools.partial(adamfn.step, tx))(grads.sum(0), tx.init(kernel), kernel)
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        if b.dtype in (jnp.int8, jnp.uint8):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        else:
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_twenty_steps_with_the_sum_equal_one_devices(backend, way):
    tx, steps = adamfn.with_backend(adamfn.adamw(1e-2), backend), 20
    grads = whole_numbers(steps)

    def run(params, grads):
        return train(way, tx, True, params, tx.init(params), grads)

    params, state = jax.jit(in_shards(run, (P(), P(None, "data"))))(PARAMS, grads)
    expected, kept = alone("float32")
    assert state[0].count == steps
    for name in PARAMS:
        np.testing.assert_allclose(params[name], expected[name], rtol=0, atol=1e-6)
        np.testing.assert_allclose(state[0].mu[name], kept[0].mu[name], rtol=0, atol=1e-6)


@functools.cache
def alone(moments):
    """The same on one device, from the sums of all devices' gradients."""
    tx, params = adamfn.adamw(1e-2, moments=moments), jax.tree.map(jnp.asarray, PARAMS)
    sums = jax.tree.map(lambda g: g.sum(1, keepdims=True), whole_numbers(20))
    return jax.jit(functools.partial(train, "step", tx, False))(params, tx.init(params), sums)


@pytest.mark.parametrize("moments", ["bfloat16", "8bit", "4bit", "factored"])
def test_codes_of_twenty_steps_equal_one_devices(moments):
    tx, grads = adamfn.adamw(1e-2, moments=moments), whole_numbers(20)
    run = in_shards(functools.partial(train, "step", tx, True), (P(), P(), P(None, "data")))
    params, state = jax.jit(run)(PARAMS, tx.init(PARAMS), grads)
    expected, kept = alone(moments)
    for name in PARAMS:
        np.testing.assert_allclose(params[name], expected[name], rtol=0, atol=1e-6)
    codes = [
        (a, b)
        for a, b in zip(*map(jax.tree.leaves, (state, kept)), strict=True)
        if a.dtype in (jnp.int8, jnp.uint8, jnp.bfloat16)
    ]
    assert len(codes) == (2 if moments in ("bfloat16", "8bit") else 1)
    for a, b in codes:
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("moments", ["bfloat16", "8bit", "factored"])
def test_a_shard_is_a_leaf_by_itself(moments):
    """Shards that are made inside: each has the codes that it would have alone."""
    tx = adamfn.adamw(1e-2, moments=moments)
    whole = np.random.default_rng(1).normal(size=(8 * 128, 256)).astype(np.float32)
    grads = np.random.default_rng(2).integers(-3, 4, (5, 1, *whole.shape)).astype(np.float32)

    def run(shard, grads):
        _, state = train("step", tx, False, shard, tx.init(shard), grads)
        return [x for x in (state[0].mu, state[0].nu) if x is not None]

    specs = (P("data"), P(None, None, "data"))
    found = jax.jit(in_shards(run, specs, P("data")))(whole, grads)
    single = jax.jit(run)
    for k in (0, 5):
        rows = slice(k * 128, (k + 1) * 128)
        for a, b in zip(found, single(whole[rows], grads[:, :, rows]), strict=True):
            np.testing.assert_array_equal(np.asarray(a)[rows], np.asarray(b))
