# SPDX-License-Identifier: Apache-2.0
"""The monitor on a mesh of eight: nothing is sent but sums."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import adamfn
from adamfn import monitor
from adamfn.sharding import state_shardings

SHAPES = {"blocks": (2, 512, 256), "kernel": (128, 1024), "bias": (1024,)}
SPECS = {"blocks": (None, "data"), "kernel": ("data", "model"), "bias": ("model",)}


def looked_at(moments, kind=AxisType.Auto):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    random = np.random.default_rng(0)
    params = {name: random.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    params["kernel"] = params["kernel"].astype(jnp.bfloat16)
    shardings = {name: jax.NamedSharding(mesh, jax.P(*spec)) for name, spec in SPECS.items()}
    tx = adamfn.adamw(1e-3, moments=moments)
    grads = jax.tree.map(lambda p: p * p - 0.3 * p, params)
    given = (grads, tx.init(params), params)

    def look(grads, state, params):
        return monitor.observe(tx, grads, state, params, layers={"blocks": 0}, every=10)

    where = state_shardings(tx, params, shardings)
    placed = jax.device_put(given, (shardings, where, shardings))
    if kind == AxisType.Explicit:
        with jax.set_mesh(mesh):
            compiled = jax.jit(look).lower(*placed).compile()
    else:
        compiled = jax.jit(look).lower(*placed).compile()
    return compiled.as_text(), compiled(*placed), jax.jit(look)(*given)


@pytest.mark.parametrize("moments", ["float32", "8bit", "factored"])
def test_only_sums_are_sent_and_they_are_one_devices(moments):
    program, found, expected = looked_at(moments)
    sent = re.findall(
        r"= (.*?) (all-gather|all-to-all|collective-permute|all-reduce)\S*\(", program
    )
    assert sent
    for shapes, operation in sent:
        sizes = [
            np.prod([int(n) for n in shape.split(",") if n])
            for shape in re.findall(r"\w+\[([\d,]*)\]", shapes)
        ]
        # One for each layer, or what stands for a whole row of the factored format.
        assert operation == "all-reduce", (operation, shapes)
        assert max(sizes) <= (1024 if moments == "factored" else 2), shapes
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5)  # sums in another order


def test_explicit_axes_are_as_automatic_ones():
    _, found, expected = looked_at("float32", AxisType.Explicit)
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_layers_that_a_mesh_splits_are_measured_each(kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    params = jnp.arange(1.0, 33.0).reshape(8, 4)
    placed = jax.device_put(params, jax.NamedSharding(mesh, jax.P("data")))
    tx = adamfn.adam(1e-3)

    def look(p):
        return monitor.observe(tx, p, tx.init(p), p, layers={"": 0}).leaves[""]["gradient"]

    with jax.set_mesh(mesh):
        found = jax.jit(look)(placed)
    np.testing.assert_allclose(found, np.sqrt(np.mean(np.square(params), 1)), rtol=1e-6)


@pytest.mark.parametrize("way", ["observe", "step"])
def test_inside_shard_map_the_figures_are_of_the_shards(way):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tx = adamfn.adam(1e-3)
    params = jnp.arange(1.0, 17.0)

    def step(p):
        seen = getattr(monitor, way)(tx, p, tx.init(p), p, every=10)
        leaves = (seen if way == "observe" else seen[2]).leaves
        return jax.tree.map(lambda x: x[None], leaves)

    split = {"in_specs": jax.P("data"), "out_specs": jax.P("data")}
    leaves = jax.jit(jax.shard_map(step, mesh=mesh, **split))
    expected = np.sqrt(np.mean(np.arange(1.0, 17.0).reshape(8, 2) ** 2, 1))
    np.testing.assert_allclose(leaves(params)[""]["gradient"], expected, rtol=1e-6)
