"""The Pallas backend: its kernels interpreted on CPU, and lowered for GPU and TPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from programs import call_of

import adamfn
from adamfn import formats
from adamfn.backends import pallas
from adamfn.program import run_call

TPU = AbstractDevice(device_kind="TPU v5e", num_cores=1, platform="tpu")
LEAVES = {
    "scalar": jax.ShapeDtypeStruct((), jnp.float32),
    "empty": jax.ShapeDtypeStruct((0, 256), jnp.float32),
    "vector": jax.ShapeDtypeStruct((2048,), jnp.bfloat16),
    "edges": jax.ShapeDtypeStruct((70, 1100), jnp.float32),  # four tiles of 64 by 1024
    "cube": jax.ShapeDtypeStruct((3, 32, 200), jnp.bfloat16),
    "odd cube": jax.ShapeDtypeStruct((3, 31, 50), jnp.float32),
    "blocks": jax.ShapeDtypeStruct((24, 768), jnp.float32),
    "half blocks": jax.ShapeDtypeStruct((8, 1024), jnp.bfloat16),
}
KERNELS = {"vector", "edges", "cube", "blocks", "half blocks"}
"""What of these is cut into tiles on CPU."""


def tree(seed, leaves):
    keys = zip(jax.random.split(jax.random.key(seed), len(leaves)), leaves, strict=True)
    return {
        name: jax.random.normal(key, LEAVES[name].shape, LEAVES[name].dtype) for key, name in keys
    }


def counted(monkeypatch):
    """The shapes that kernels were made for from here on."""
    shapes, make = [], pallas.run_leaf

    def run_leaf(call, platform, *operands, **options):
        shapes.append(operands[-1].shape)
        return make(call, platform, *operands, **options)

    monkeypatch.setattr(pallas, "run_leaf", run_leaf)
    return shapes


def trained(backend, moments, leaves, *, nesterov):
    """Parameters and state after three steps."""
    params = tree(0, leaves)
    mask = {name: name != "blocks" for name in params}
    tx = adamfn.adamw(0.01, moments=moments, mask=mask, nesterov=nesterov)
    tx = adamfn.with_backend(tx, backend)
    state = tx.init(params)
    step = jax.jit(partial(adamfn.step, tx))
    for seed in range(1, 4):
        grads = tree(seed, leaves)
        grads["blocks"] = grads["blocks"].astype(jnp.bfloat16)
        params, state = step(grads, state, params)
    return params, state


def check_close(found, expected):
    """Floats to two roundings of the largest; codes but for one in a thousand.

    The formulas are the same. Where a compiler contracts a product and a sum into one rounding, the
    two may differ in the last bit, and a code by one level if its rounding hung on that bit.
    """
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if a.dtype in (jnp.int8, jnp.uint8):
            assert np.mean(np.asarray(a) != np.asarray(b)) < 1e-3
            continue
        bits = {jnp.float32: 23, jnp.bfloat16: 7}.get(a.dtype.type, 23)
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=2 * 2.0**-bits * np.max(np.abs(b), initial=0))


@pytest.mark.parametrize(
    ("moments", "leaves", "kernels", "nesterov"),
    [
        ("float32", LEAVES.keys(), KERNELS, False),
        ("bfloat16", LEAVES.keys(), KERNELS, True),
        # A vector of 2048 stays float32; the cube's rows of 200 are no whole blocks.
        ("8bit", KERNELS - {"edges"}, KERNELS - {"edges", "cube"}, True),
    ],
)
def test_same_as_the_reference(monkeypatch, moments, leaves, kernels, nesterov):
    made, leaves = counted(monkeypatch), sorted(leaves)
    found = trained("pallas", moments, leaves, nesterov=nesterov)
    assert sorted(made) == sorted(LEAVES[name].shape for name in kernels)
    check_close(found, trained("xla", moments, leaves, nesterov=nesterov))


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_tiles_for_gpu(moments):
    format = None if moments == "float32" else formats.get(moments)
    shape = 50, 3, 128  # 19200 elements: 75 rows of 256
    assert pallas.tiling(shape, format, "cuda") == ((75, 256), (1, 256))
    keys = jax.random.split(jax.random.key(0), 4)
    mu, nu, g, p = (jax.random.normal(key, shape) for key in keys)
    call, operands = call_of(adamfn.adamw(0.01, moments=moments), g, p)
    operands[3:5] = (x.astype(operands[3].dtype) for x in (mu, nu**2))
    found = jax.jit(partial(pallas.run_leaf, call, "cuda", interpret=True))(*operands)
    check_close(found, jax.jit(partial(run_call, call))(*operands))


def test_tiles_never_reach_over_the_edge_on_gpu():
    for shape in [(128,), (1024, 3), (50257, 768), (7, 11, 512), (3, 3, 64, 128)]:
        for format in (None, formats.EightBit(), formats.EightBit(block=1024)):
            cut = pallas.tiling(shape, format, "cuda")
            if cut is not None:
                (rows, columns), (height, width) = cut
                assert (rows % height, columns % width) == (0, 0), shape
                assert (height * width).bit_count() == 1, shape
                assert height * width <= 1024, shape


@pytest.mark.parametrize(
    ("platform", "moments", "kernels", "x64"),
    [
        ("cuda", "float32", 2, False),
        ("cuda", "bfloat16", 2, True),
        ("cuda", "8bit", 2, True),
        ("rocm", "bfloat16", 2, False),
        ("tpu", "float32", 2, False),
        ("tpu", "bfloat16", 2, True),
        ("tpu", "8bit", 0, False),
    ],
)
def test_lowers_without_the_device(platform, moments, kernels, x64):
    params = {
        "kernel": jax.ShapeDtypeStruct((64, 768), jnp.float32),
        "filter": jax.ShapeDtypeStruct((3, 64, 256), jnp.bfloat16),
        "odd": jax.ShapeDtypeStruct((33, 125), jnp.float32),
        "half": jax.ShapeDtypeStruct((64, 768), jnp.float16),
    }
    mesh = AbstractMesh((1,), ("x",), abstract_device=TPU if platform == "tpu" else None)
    target = "tpu_custom_call" if platform == "tpu" else "__gpu$xla.gpu.triton"
    arrays = 6 if moments == "8bit" else 3  # of the moments, and the parameter
    with jax.enable_x64(x64), jax.sharding.use_abstract_mesh(mesh):
        for backend, expected in (("pallas", kernels), ("auto", 0)):
            tx = adamfn.with_backend(adamfn.adam(moments=moments), backend)
            state = jax.eval_shape(tx.init, params)
            traced = jax.jit(partial(adamfn.step, tx)).trace(params, state, params)
            text = traced.lower(lowering_platforms=(platform,)).as_text()
            assert text.count(target) == expected
            assert text.count("output_operand_alias<") == expected * arrays  # in place


def test_sharded_leaves_go_through_xla():
    """XLA would gather a leaf for a kernel."""
    mesh = AbstractMesh((2,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    params = jax.ShapeDtypeStruct((64, 768), jnp.float32, sharding=sharding)
    tx = adamfn.with_backend(adamfn.adam(), "pallas")
    state = jax.eval_shape(tx.init, params)
    text = jax.jit(partial(adamfn.step, tx)).trace(params, state, params)
    assert "triton" not in text.lower(lowering_platforms=("cuda",)).as_text()


def test_vmap_and_jvp_go_through_the_reference():
    tx = adamfn.with_backend(adamfn.adam(0.1, eps_root=1e-8), "pallas")
    params = jnp.ones((2, 8, 1024))
    moved, _ = jax.vmap(lambda p: adamfn.step(tx, p, tx.init(p), p))(params)
    np.testing.assert_allclose(moved, 0.9, rtol=1e-6)

    def moves(scale):
        return adamfn.step(tx, scale * params[0], tx.init(params[0]), params[0])[0].sum()

    assert np.isfinite(jax.jit(jax.grad(moves))(1.0))


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="'auto', 'xla', 'pallas'"):
        adamfn.with_backend(adamfn.adam(), "triton")
