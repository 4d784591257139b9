# SPDX-License-Identifier: Apache-2.0
"""`adamfn.sharding.sharded`: steps on the shards of leaves, with one device's codes to the bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import adamfn
from adamfn import formats
from adamfn.backends import kernels as pallas
from adamfn.backends import passes
from adamfn.backends.gpu import mosaic as gpu_mosaic
from adamfn.backends.gpu import triton
from adamfn.backends.tpu import kernel as mosaic
from adamfn.sharding import sharded, state_shardings, whole_blocks

P = jax.P
MESH = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
SHAPES = {
    "rows": (128, 512),
    "columns": (16, 2048),
    "both": (128, 2048),
    "stacked": (3, 64, 512),
    "whole": (99, 640),
    "bias": (512,),
}
SPECS = {
    "rows": P("model"),
    "columns": P(None, "model"),
    "both": P("data", "model"),
    "stacked": P(None, None, "model"),
    "whole": P(),
    "bias": P("model"),
}
STEPS = 5


FEWER = ("columns", "both", "bias")


def drawn(dtype=np.float32, names=tuple(SHAPES)):
    random, shapes = np.random.default_rng(0), {name: SHAPES[name] for name in names}
    params = {k: random.normal(size=shape).astype(dtype) for k, shape in shapes.items()}
    grads = {k: random.normal(size=(STEPS, *shape)).astype(dtype) for k, shape in shapes.items()}
    return params, grads


def on(spec):
    return jax.NamedSharding(MESH, spec)


WHERE = {name: on(spec) for name, spec in SPECS.items()}


def train(way, tx, params, state, grads):
    """A loop, which takes a state only if a step keeps its type."""

    def step(carry, own):
        params, state = carry
        if way == "step":
            return adamfn.step(tx, own, state, params)[:2], None
        updates, state = tx.update(own, state, params)
        return (adamfn.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), grads)[0]


def check_equal(found, expected, apart=0):
    """All that is kept in fewer bits than float32 to the bit, and the rest within rounding.

    Args:
      apart: the share of elements that may differ.
    """
    for (path, a), b in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        a, b = np.asarray(a), np.asarray(b)
        if apart:
            assert np.mean(np.abs(np.float32(a) - np.float32(b)) > 1e-6) <= apart, path
        elif a.dtype == np.float32:
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6, err_msg=str(path))
        else:
            np.testing.assert_array_equal(a, b, err_msg=str(path))


@pytest.mark.parametrize(
    ("moments", "way", "zero_axis"),
    [
        *((name, "step", "data") for name in formats.FORMATS),
        ("8bit", "step", None),
        ("bfloat16", "update", None),
    ],
)
def test_codes_equal_one_devices(moments, way, zero_axis):
    params, grads = drawn(names=SHAPES if moments == "8bit" else FEWER)
    where = {name: WHERE[name] for name in params}
    tx = adamfn.adamw(1e-2, moments=whole_blocks(moments, params, where, zero_axis))
    run = functools.partial(train, way)
    expected = jax.jit(functools.partial(run, tx))(params, tx.init(params), grads)
    on_mesh = sharded(tx, where, zero_axis)
    placed = jax.device_put(params, where)
    state, laid = on_mesh.init(placed), state_shardings(tx, params, where, zero_axis)
    for x, place in zip(*map(jax.tree.leaves, (state, laid)), strict=True):
        assert x.sharding.is_equivalent_to(place, x.ndim)
    run = jax.jit(functools.partial(run, on_mesh), out_shardings=(where, laid))
    # XLA's two programs of means of nu differ in last bits, on which a code in a million hangs.
    apart = 1e-4 if moments in ("factored", "blockmean") else 0
    check_equal(run(placed, state, grads), expected, apart)


@pytest.mark.parametrize(
    ("moments", "bits", "averages"),
    [("bfloat16", 16, False), ("8bit", 24, False), ("8bit", 32, True)],
)
def test_weights_of_16_bits_too(moments, bits, averages):
    """With a second average of gradients, and one of the weights, or without."""
    params, grads = drawn(jnp.bfloat16, FEWER)
    where = {name: WHERE[name] for name in params}
    recipe = adamfn.ademamix if averages else adamfn.adamw
    last = [adamfn.average_weights()] if averages else []
    tx = recipe(1e-4, moments=moments, seed=1)
    tx = adamfn.chain(tx, adamfn.round_weights(bits, seed=2), *last)
    run = functools.partial(train, "step")
    expected = jax.jit(functools.partial(run, tx))(params, tx.init(params), grads)
    on_mesh, laid = sharded(tx, where, "data"), state_shardings(tx, params, where, "data")
    run = jax.jit(functools.partial(run, on_mesh), out_shardings=(where, laid))
    placed = jax.device_put(params, where)
    check_equal(run(placed, on_mesh.init(placed), grads), expected)


def firsts(grads):
    return {name: g[0] for name, g in grads.items()}


def one_step(tx, params, grads):
    return adamfn.step(tx, grads, tx.init(params), params)


@pytest.mark.parametrize("kernel", [mosaic, triton, gpu_mosaic, passes])
def test_kernels_run_on_shards(kernel, monkeypatch):
    """Interpreted: their noise is that of the element in the whole leaf, however it is cut."""
    monkeypatch.setattr(pallas, "kernels_on", lambda *_: [kernel])
    shapes = {"columns": (16, 2048), "slabs": (3, 256, 128)}
    random, where = np.random.default_rng(0), on(P(None, "model"))
    params = {k: random.normal(size=shape).astype(np.float32) for k, shape in shapes.items()}
    tx = adamfn.adamw(1e-2, moments="4bit")
    expected = jax.jit(functools.partial(one_step, adamfn.with_backend(tx, "xla")))(params, params)
    on_mesh = adamfn.with_backend(sharded(tx, where), "pallas")
    found = jax.jit(functools.partial(one_step, on_mesh))(jax.device_put(params, where), params)
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        if a.dtype == np.uint8:
            assert np.mean(a != b) < 1e-3  # as in tests/test_pallas.py
        else:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_native_code_runs_and_no_moment_is_gathered():
    params, _ = drawn()
    tx = sharded(adamfn.adamw(1e-2, moments="8bit"), on(P()), "data")
    state = jax.eval_shape(tx.init, params)
    laid = state_shardings(tx, params, on(P()), "data")
    program = jax.jit(
        functools.partial(adamfn.step, tx), in_shardings=(on(P()), laid, on(P()))
    ).lower(params, state, params)
    assert "adamfn_step" in program.as_text() or adamfn.backend("cpu").name != "native"
    compiled = program.compile()
    moved, after = compiled.output_shardings
    assert all(x.is_fully_replicated for x in jax.tree.leaves(moved))
    for x, where, like in zip(*map(jax.tree.leaves, (after, laid, state)), strict=True):
        assert x.is_equivalent_to(where, like.ndim)
    for line in compiled.as_text().splitlines():
        if " all-gather" in line.split("(")[0]:
            assert "f32" in line.split(" all-gather")[0]
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * 4 * sum(
        p.size for p in params.values()
    )


def test_a_stage_that_looks_at_whole_leaves_is_xlas():
    params, grads = drawn()
    grads = firsts(grads)
    own = [f(b2=0.99) for f in (adamfn.scale_by_moments, adamfn.bias_correct, adamfn.clip_updates)]
    tx = adamfn.chain(*own, adamfn.scale_by_lr(1e-2))
    expected = jax.jit(functools.partial(one_step, tx))(params, grads)
    on_mesh = sharded(tx, WHERE, "data")
    found = jax.jit(functools.partial(one_step, on_mesh))(jax.device_put(params, WHERE), grads)
    check_equal(found, expected)


def test_inside_shard_map_a_shard_is_a_leaf():
    params, _ = drawn()
    params = {"rows": params["rows"]}
    tx = adamfn.adamw(1e-2, moments="8bit")

    def run(tx):
        step = functools.partial(one_step, tx)
        specs = P(("data", "model"))
        state = jax.tree.map(lambda x: specs if x.ndim else P(), jax.eval_shape(tx.init, params))
        out_specs = ({"rows": specs}, state)
        on_shards = jax.shard_map(
            step, mesh=MESH, in_specs=(specs, specs), out_specs=out_specs, check_vma=False
        )
        return jax.jit(on_shards)(params, params)

    for a, b in zip(
        *(jax.tree.leaves(run(own)) for own in (tx, sharded(tx, on(P())))), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
