# SPDX-License-Identifier: Apache-2.0
"""Meshes whose axes are explicit: twenty steps in one loop, with one device's codes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import adamfn

P = jax.P
MESH = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
SPECS = {"rows": P("data"), "blocks": P(None, "data"), "everywhere": P(), "bias": P("data")}
SHAPES = {"rows": (128, 256), "blocks": (128, 2048), "everywhere": (16, 512), "bias": (8,)}
STEPS = 20


def drawn():
    """Parameters, and a gradient for each step."""
    random = np.random.default_rng(0)
    params, grads = (
        {k: random.normal(size=(*first, *shape)).astype(np.float32) for k, shape in SHAPES.items()}
        for first in ((), (STEPS,))
    )
    return params, grads


def train(tx, params, grads):
    """A loop, which takes a state only if a step keeps its type: how it is split counts to it."""

    def step(carry, own):
        return adamfn.step(tx, own, carry[1], carry[0]), None

    return jax.lax.scan(step, (params, tx.init(params)), grads)[0]


@pytest.mark.parametrize(
    ("moments", "backend"),
    [*((name, "auto") for name in ("float32", "8bit", "4bit", "factored")), ("8bit", "xla")],
)
def test_twenty_steps_equal_one_devices(moments, backend):
    tx = adamfn.with_backend(adamfn.adamw(1e-2, moments=moments), backend)
    params, grads = drawn()
    expected, kept = jax.jit(functools.partial(train, tx))(params, grads)
    with jax.set_mesh(MESH):
        for name, spec in SPECS.items():
            params[name] = jax.device_put(params[name], jax.NamedSharding(MESH, spec))
            grads[name] = jax.device_put(grads[name], jax.NamedSharding(MESH, P(None, *spec)))
        found, state = jax.jit(functools.partial(train, tx))(params, grads)
    # XLA's two programs of means of nu differ in last bits, so a code in a million comes out as its
    # neighbour: mu's fades within ten steps, which move the weight by less than 1e-2 * 10 / 127.
    # All other programs agree to the bit.
    apart = 1e-4 if moments == "factored" else 0
    for name, spec in SPECS.items():
        assert np.mean(np.abs(found[name] - expected[name]) > 1e-6) <= apart
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=8e-4)
        moments_of = [tree[name] for tree in (state[0].mu, state[0].nu) if tree[name] is not None]
        for x in (found[name], *moments_of):
            assert x.sharding.is_equivalent_to(jax.NamedSharding(MESH, spec), x.ndim)
    codes = 0
    for a, b in zip(*map(jax.tree.leaves, (state, kept)), strict=True):
        if b.dtype in (jnp.int8, jnp.uint8, jnp.bfloat16):
            assert np.mean(np.asarray(a) != np.asarray(b)) <= apart
            codes += 1
    # Of three large leaves; "everywhere" has too few rows to be factored.
    assert codes == {"float32": 0, "8bit": 6, "4bit": 3, "factored": 2}[moments]


@pytest.mark.parametrize("way", ["step", "update"])
def test_a_state_that_is_split_further(way):
    """ZeRO: parameters and gradients everywhere, moments split."""
    tx = adamfn.adamw(1e-2, moments="8bit")
    params, grads = drawn()
    params, own = params["rows"], grads["rows"][0]
    expected = jax.jit(functools.partial(advance, way, tx))(own, tx.init(params), params)
    with jax.set_mesh(MESH):
        placed = jax.device_put((params, own), jax.NamedSharding(MESH, P()))
        split = jax.NamedSharding(MESH, P("data"))
        state = jax.tree.map(
            lambda x: jax.device_put(x, split) if x.ndim else x, tx.init(placed[0])
        )
        found = jax.jit(functools.partial(advance, way, tx))(placed[1], state, placed[0])
    assert found[0].sharding.is_fully_replicated
    for a, b in zip(*map(jax.tree.leaves, (found[1], state)), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def advance(way, tx, grads, state, params):
    if way == "step":
        return adamfn.step(tx, grads, state, params)
    return tx.update(grads, state, params)


def test_scales_are_split_where_no_block_is_cut():
    tx = adamfn.adamw(moments="8bit")
    with jax.set_mesh(MESH):
        params = {
            k: jax.device_put(drawn()[0][k], jax.NamedSharding(MESH, SPECS[k])) for k in SPECS
        }
        state = jax.jit(tx.init)(params)
    for name, scales in state[0].scales.items():
        expected = P(*SPECS[name], *(None,) * (2 - len(SPECS[name])))
        for x in jax.tree.leaves(scales):
            assert x.sharding.is_equivalent_to(jax.NamedSharding(MESH, expected), x.ndim)


def test_a_block_that_is_cut_is_refused():
    """What `docs/many_devices.md` says of blocks of 256 of which a device has 128."""
    tx = adamfn.adamw(moments="8bit")
    with jax.set_mesh(MESH):
        params = jax.device_put(
            np.ones((99, 1024), np.float32), jax.NamedSharding(MESH, P(None, "data"))
        )
        state = jax.jit(tx.init)(params)
        with pytest.raises(
            ValueError, match=r"at the root .* 128 elements of its last axis, .* of 256\. "
        ):
            jax.jit(functools.partial(adamfn.step, tx))(params, state, params)


def eight_bit(rate):
    return adamfn.adamw(rate, moments="8bit")


def with_statistics(rate):
    cautious = adamfn.scale_by_moments(), adamfn.cautious_updates(), adamfn.scale_by_lr(rate)
    return adamfn.chain(adamfn.clip_by_global_norm(1.0), *cautious)


def with_two_gates(rate):
    gates = adamfn.skip_outliers(["grad_norm"]), adamfn.skip_outliers(["loss", "grad_norm"])
    return adamfn.chain(*gates, adamfn.adam(rate))


@pytest.mark.parametrize("make", [eight_bit, with_statistics, with_two_gates])
def test_a_population_with_a_rate_for_each_member(make):
    """Members along one axis of the mesh, each of them split over the other."""

    def two_steps(rate, params, grads):
        tx, extra = make(rate), {"loss": 1.0} if make is with_two_gates else {}
        state = tx.init(params)
        for _ in range(2):
            params, state = adamfn.step(tx, grads, state, params, **extra)
        return params, state

    random = np.random.default_rng(1)
    params, grads = (random.normal(size=(4, 64, 512)).astype(np.float32) for _ in range(2))
    rates = np.array([0.01, 0.02, 0.03, 0.04], np.float32)
    train = jax.jit(jax.vmap(two_steps))
    expected = train(rates, params, grads)
    mesh = jax.make_mesh((4, 2), ("members", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        split = jax.NamedSharding(mesh, P("members", None, "model"))
        rates = jax.device_put(rates, jax.NamedSharding(mesh, P("members")))
        found = train(rates, *jax.device_put((params, grads), split))
    assert found[0].sharding.is_equivalent_to(split, 3)
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        # Sums over devices are of another order; codes are equal.
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-6)
