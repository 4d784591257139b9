# SPDX-License-Identifier: Apache-2.0
"""Pallas kernels: interpreted on CPU beside XLA's program, and lowered for GPU and TPU."""

import warnings
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from programs import call_of

import adamfn
from adamfn import formats
from adamfn.backends import chunks, kernels, passes
from adamfn.backends.gpu import mosaic as gpu_mosaic
from adamfn.backends.gpu import triton
from adamfn.backends.tile import LeafCall
from adamfn.backends.tpu import kernel as mosaic
from adamfn.backends.xla import run_call
from adamfn.formats.noise import strides_of

DEVICES = {
    "tpu": {"platform": "tpu", "device_kind": "TPU v5e", "num_cores": 1},
    "cuda": {"platform": "gpu", "device_kind": "NVIDIA H100 80GB HBM3", "num_cores": None},
    "rocm": {"platform": "gpu", "device_kind": "gfx942", "num_cores": None},
}
has_mosaic = pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="GPU's Mosaic kernels run from jax 0.12 on"
)
before_0_9_1 = pytest.mark.skipif(
    jax.__version_info__ < (0, 9, 1),
    reason="Mosaic of before jax 0.9.1 casts no scalar of double precision",
)
TWO = jnp.float32(2.0)
LEAVES = {
    "scalar": jax.ShapeDtypeStruct((), jnp.float32),
    "empty": jax.ShapeDtypeStruct((0, 256), jnp.float32),
    "vector": jax.ShapeDtypeStruct((2048,), jnp.bfloat16),
    "edges": jax.ShapeDtypeStruct((70, 1100), jnp.float32),  # blocks of 160, seven to a row
    "cube": jax.ShapeDtypeStruct((3, 32, 200), jnp.bfloat16),
    "odd cube": jax.ShapeDtypeStruct((3, 31, 150), jnp.float32),
    "blocks": jax.ShapeDtypeStruct((24, 768), jnp.float32),
    "half blocks": jax.ShapeDtypeStruct((8, 1024), jnp.bfloat16),
}


def mesh_of(platform):
    """A mesh of one device that is not at hand, which kernels are lowered for."""
    # Only jax 0.10 and later have `platform`.
    known = signature(AbstractDevice).parameters
    device = AbstractDevice(**{k: v for k, v in DEVICES[platform].items() if k in known})
    return AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)


def tree(seed, leaves):
    rng, of = np.random.default_rng(seed), LEAVES
    return {name: rng.standard_normal(of[name].shape).astype(of[name].dtype) for name in leaves}


def counted(monkeypatch):
    """The shapes that kernels were made for from here on."""
    shapes, run = [], LeafCall.run_kernel

    def run_kernel(leaf, *args, **options):
        shapes.append(leaf.u.shape)
        return run(leaf, *args, **options)

    monkeypatch.setattr(LeafCall, "run_kernel", run_kernel)
    return shapes


def trained(backend, moments, leaves, *, nesterov):
    """Parameters and state after three steps."""
    params = tree(0, leaves)
    mask = {name: name != "blocks" for name in params}
    tx = adamfn.adamw(0.01, moments=moments, mask=mask, nesterov=nesterov, seed=3)
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


@pytest.mark.optimized  # bits of two programs
@pytest.mark.parametrize(
    ("moments", "nesterov"), [("float32", False), ("bfloat16", True), ("8bit", True)]
)
def test_same_as_the_reference(monkeypatch, moments, nesterov):
    made = counted(monkeypatch)
    # Without blocks, shapes differ less.
    leaves = sorted(LEAVES) if moments == "8bit" else ["blocks", "cube", "empty", "scalar"]
    found = trained("pallas", moments, leaves, nesterov=nesterov)
    shapes = {LEAVES[name].shape for name in leaves} - {LEAVES["empty"].shape}
    assert set(made) == shapes
    check_close(found, trained("xla", moments, leaves, nesterov=nesterov))


def special(rng, shape, dtype):
    """Numbers of all sizes, denormals, zeros, infinities, NaN, the largest."""
    x = rng.standard_normal(shape) * 10.0 ** rng.integers(-12, 3, shape)
    odd = [0.0, -0.0, 1e-42, -1e-40, 1.2e-38, 3e38, np.inf, -np.inf, np.nan, 1e-20, 1e-19]
    x.reshape(-1)[::97] = rng.choice(odd, x.reshape(-1)[::97].shape)
    x[..., :1] = 0
    return jnp.asarray(np.float32(x), dtype)


def check_same(found, expected, bfloat16):
    """Equal to the bit, but for a few whose rounding hung on a product contracted into a sum."""
    for a, b in zip(found, expected, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        differ = ~((a == b) | ((a != a) & (b != b)))
        if a.dtype in (np.int8, np.uint8):
            assert differ.mean() < 1e-4
        else:
            assert differ.mean() < 0.1
            a, b = (np.float64(x[differ]) for x in (a, b))
            # Of the update and the parameter, of which little may be left.
            np.testing.assert_allclose(a, b, rtol=2.0**-7 if bfloat16 else 2.0**-22, atol=1e-7)


def interpreted(kernel, call, operands):
    return kernel.run_leaf(LeafCall(call, operands), "cpu")


@pytest.mark.parametrize(
    ("kernel", "moments", "shape"),
    [
        (mosaic, "8bit", (64, 300)),  # blocks of 160, the second one not full
        (mosaic, "4bit", (3, 2, 9, 300)),  # slabs, bfloat16
        (mosaic, "8bit", (3, 31, 150)),  # the rows are its first axis
        (mosaic, "4bit", (130, 4, 128)),
        (mosaic, "8bit", (2, 32, 256)),  # slabs are so many more rows
        (mosaic, "8bit", (128, 150)),  # lies the other way round
        # Two tiles to a row; in the second scales lie by rows too.
        pytest.param(mosaic, "4bit", (8, 2500), marks=pytest.mark.optimized),
        pytest.param(mosaic, formats.FourBit(block=16), (10, 4096), marks=pytest.mark.optimized),
        (mosaic, "8bit", (40000,)),  # blocks of 160 end to end, two tiles and a half
        (mosaic, "4bit", (300 * 128,)),
        (mosaic, "8bit", (300003,)),  # no rows of 128 lanes, two steps of the grid
        (mosaic, "bfloat16", (5000,)),
        (triton, "8bit", (64, 300)),
        (triton, "4bit", (3, 2, 9, 300)),
        (triton, "8bit", (5000,)),
        (triton, "bfloat16", (77, 130)),
        # The second tile has two blocks that are left over.
        pytest.param(gpu_mosaic, "8bit", (7, 768), marks=has_mosaic),
        pytest.param(gpu_mosaic, "4bit", (3, 2, 11, 384), marks=has_mosaic),
        (passes, "8bit", (15, 320)),
        (passes, "4bit", (3, 2, 11, 384)),
    ],
)
def test_codes_are_those_of_xla_to_the_bit(kernel, moments, shape):
    rng = np.random.default_rng(0)
    dtype = jnp.bfloat16 if len(shape) == 4 else jnp.float32
    tx = adamfn.adamw(0.1, moments=moments)
    p = special(rng, shape, dtype)
    call, operands = call_of(tx, p, p)
    run, reference = jax.jit(partial(interpreted, kernel, call)), jax.jit(partial(run_call, call))
    for count in (1, 2**31 - 1):
        operands = operands._replace(count=jnp.int32(count), updates=[special(rng, shape, dtype)])
        found, expected = run(operands), reference(operands)
        check_same(found, jax.tree.leaves(expected), dtype == jnp.bfloat16)
        operands = operands._replace(kept=expected.kept, params=expected.params)


@pytest.mark.parametrize(
    ("platform", "moments", "number", "x64"),
    [
        ("cuda", "float32", 2, False),
        ("cuda", "bfloat16", 2, True),
        ("cuda", "8bit", 2, True),
        ("rocm", "bfloat16", 2, False),
        ("tpu", "float32", 2, False),
        pytest.param("tpu", "bfloat16", 2, True, marks=before_0_9_1),
        ("tpu", "8bit", 2, False),
        pytest.param("tpu", "4bit", 2, True, marks=before_0_9_1),
    ],
)
def test_lowers_without_the_device(platform, moments, number, x64):
    params = {
        "kernel": jax.ShapeDtypeStruct((64, 768), jnp.float32),
        "filter": jax.ShapeDtypeStruct((3, 64, 256), jnp.bfloat16),
        "half": jax.ShapeDtypeStruct((64, 768), jnp.float16),
    }
    target = "tpu_custom_call" if platform == "tpu" else "__gpu$xla.gpu.triton"
    arrays = {"8bit": 6, "4bit": 5}.get(moments, 3)  # of the moments, and the parameter
    unasked = number if moments in ("8bit", "4bit") else 0
    with jax.enable_x64(x64), jax.sharding.use_abstract_mesh(mesh_of(platform)):
        for backend, expected in (("pallas", number), ("auto", unasked)):
            tx = adamfn.with_backend(adamfn.adam(moments=moments), backend)
            state = jax.eval_shape(tx.init, params)
            traced = jax.jit(partial(adamfn.step, tx)).trace(params, state, params)
            text = traced.lower(lowering_platforms=(platform,)).as_text()
            assert text.count(target) == expected
            assert text.count("output_operand_alias<") == expected * arrays  # in place


def test_a_vector_that_no_lanes_divide_is_lowered_where_no_device_is_named_too():
    """Pallas would ask what TPU it is for."""
    params = jax.ShapeDtypeStruct((5003,), jnp.float32)
    tx = adamfn.adam(moments="8bit")
    assert lowered(tx, params, "tpu").count("tpu_custom_call") == 1
    state = jax.eval_shape(tx.init, params)
    traced = jax.jit(partial(adamfn.step, tx)).trace(params, state, params)
    traced.lower(lowering_platforms=("tpu",))


def where_signs_agree(u, g):
    return jnp.where(u * g > 0, u, 0)


def with_a_stage_of_ones_own(moments):
    own = adamfn.from_stage(adamfn.Stage("agree", where_signs_agree, reads=("grads",)))
    return adamfn.chain(adamfn.scale_by_moments(moments=moments), own, adamfn.scale_by_lr(0.1))


def lowered(tx, params, platform):
    with jax.sharding.use_abstract_mesh(mesh_of(platform)):
        state = jax.eval_shape(tx.init, params)
        traced = jax.jit(partial(adamfn.step, tx)).trace(params, state, params)
        return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("moments", ["8bit", "4bit"])
def test_every_recipe_and_a_stage_of_ones_own_has_a_kernel(moments):
    params = jax.ShapeDtypeStruct((200, 768), jnp.float32)
    recipes = [adamfn.amsgrad]
    if moments == "8bit":
        recipes += [adamfn.adam, adamfn.adamw, adamfn.nadam, adamfn.radam, adamfn.adamax]
        recipes += [adamfn.ademamix, adamfn.adopt]
    for make in (*(partial(recipe, 0.1) for recipe in recipes), with_a_stage_of_ones_own):
        tx = make(moments=moments)
        assert lowered(tx, params, "tpu").count("tpu_custom_call") == 1
        assert lowered(tx, params, "cuda").count("__gpu$xla.gpu.triton") == 1


def test_a_statistic_of_the_leaf_is_between_two_runs_of_the_kernel():
    """Moments in one kernel, which writes the update; the rest, without moments, is XLA's."""
    params = jax.ShapeDtypeStruct((200, 768), jnp.float32)
    own = [adamfn.scale_by_moments(moments="8bit"), adamfn.bias_correct()]
    tx = adamfn.chain(*own, adamfn.clip_updates(), adamfn.scale_by_lr(0.1))
    assert lowered(tx, params, "tpu").count("tpu_custom_call") == 1
    assert lowered(tx, params, "cuda").count("__gpu$xla.gpu.triton") == 1
    assert (
        lowered(adamfn.lazy_adam(0.1, moments="8bit"), params, "tpu").count("tpu_custom_call") == 0
    )


@pytest.mark.parametrize(("platform", "lent"), [("cuda", True), ("rocm", False)])
def test_kernels_divide_by_an_instruction_where_it_is_known(platform, lent):
    params = jax.ShapeDtypeStruct((200, 768), jnp.float32)
    text = lowered(adamfn.adam(0.1, moments="8bit"), params, platform)
    for instruction in ("rcp.approx.ftz.f32", "sqrt.approx.ftz.f32"):
        assert (instruction in text) == lent


@pytest.mark.parametrize(
    ("kernel", "moments"),
    [
        (mosaic, "8bit"),
        (triton, "4bit"),
        pytest.param(gpu_mosaic, "8bit", marks=has_mosaic),
    ],
)
def test_a_gate_skips_the_step(kernel, moments):
    shape = (2, 131, 320 if kernel is gpu_mosaic else 300)
    p, g = np.float32(np.random.default_rng(0).standard_normal(shape))
    gate = adamfn.skip_outliers(["grad_norm"])
    call, operands = call_of(adamfn.chain(gate, adamfn.adamw(0.1, moments=moments)), g, p)
    assert call.program.gated
    run, reference = jax.jit(partial(interpreted, kernel, call)), jax.jit(partial(run_call, call))
    for taken, u in ((True, g), (False, np.full_like(g, np.nan))):
        scalars = operands.scalars.at[-1].set(taken)
        operands = operands._replace(scalars=scalars, updates=[u])
        found = run(operands)
        check_close(found, jax.tree.leaves(reference(operands)))
    for before, after in zip((*jax.tree.leaves(operands.kept), p), found, strict=True):
        np.testing.assert_array_equal(before, after)


class OnesOwn(formats.EightBit):
    stores_rows = True

    def encode(self, mu, nu, noise):
        return super().encode(mu, nu, noise)

    def decode(self, stored):
        return super().decode(stored)


class ScalesWithAnAxis(formats.EightBit):
    stores_rows = True

    def encode(self, mu, nu, noise):
        stored = super().encode(mu, nu, noise)
        return stored._replace(scales=jax.tree.map(lambda x: x[..., None], stored.scales))

    def decode(self, stored):
        scales = jax.tree.map(lambda x: x[..., 0], stored.scales)
        return super().decode(stored._replace(scales=scales))


@pytest.mark.parametrize(
    ("moments", "shape"),
    [
        (OnesOwn(), (64, 300)),
        (ScalesWithAnAxis(), (3, 31, 300)),
        (OnesOwn(), (3, 5, 31, 300)),
        (OnesOwn(), (2, 128, 160)),
        (OnesOwn(), (31, 9000)),  # a row is longer than a chunk
        ("factored", (200, 256)),
        ("factored", (3, 128, 128)),
        ("blockmean", (3, 64, 128)),
        (formats.Pair(formats.Linear(), formats.BlockMean(axis=-2)), (3, 64, 128)),
    ],
)
def test_chunks_are_the_whole_to_the_bit(monkeypatch, moments, shape):
    monkeypatch.setattr(chunks, "ELEMENTS", 5000)
    p, g = (special(np.random.default_rng(seed), shape, jnp.float32) for seed in (0, 1))
    call, operands = call_of(adamfn.adamw(0.1, moments=moments), g, p)
    # As of a shard, which begins at an element of a leaf twice as wide.
    call = replace(call, strides=((*(2 * n for n in strides_of(shape)[:-1]), 1),))
    operands = operands._replace(indices=jnp.array([[0, 150]], jnp.uint32))
    run = jax.jit(partial(kernels.run_leaf, (mosaic, triton), "tpu", True, call))
    assert "while" in run.lower(operands).as_text()
    whole = jax.jit(partial(run_call, call))(operands)
    for a, b in zip(*map(jax.tree.leaves, (run(operands), whole)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_large_leaves_without_a_kernel_are_cut():
    tx, params = adamfn.adam(moments=OnesOwn()), jax.ShapeDtypeStruct((4096, 1024), jnp.float32)
    for platform in ("tpu", "cuda"):
        assert "stablehlo.while" in lowered(tx, params, platform)
    state = jax.eval_shape(tx.init, params)
    text = jax.jit(partial(adamfn.step, tx)).lower(params, state, params).as_text()
    assert "stablehlo.while" not in text  # on CPU


@dataclass(frozen=True)
class ByTheLargestOfAll:
    """A user's format: a scale a row, which the largest of the whole leaf bounds."""

    def encode(self, mu, nu, noise):
        scale = jnp.maximum(jnp.max(jnp.abs(mu), -1, keepdims=True), jnp.max(jnp.abs(mu)) / 8)
        codes = jnp.round(mu / jnp.where(scale > 0, scale, 1) * 127).astype(jnp.int8)
        return formats.Stored(codes, nu, scale)

    def decode(self, stored):
        return stored.mu.astype(jnp.float32) / 127 * stored.scales, stored.nu

    def holds(self, shape, dtype):
        return len(shape) > 1


def test_a_format_that_does_not_say_that_it_stores_rows_is_left_whole():
    """Until 0.2.0 chunks asked its shapes alone, and 44 % of its codes differed."""
    tx = adamfn.adam(moments=ByTheLargestOfAll())
    for platform in ("tpu", "cuda"):
        text = lowered(tx, jax.ShapeDtypeStruct((4096, 1024), jnp.float32), platform)
        assert "stablehlo.while" not in text


def without_triton(monkeypatch):
    find = kernels.find_spec
    monkeypatch.setattr(kernels, "find_spec", lambda name: "triton" not in name and find(name))


def test_a_jax_without_triton_has_its_other_kernels(monkeypatch):
    without_triton(monkeypatch)
    params = jax.ShapeDtypeStruct((4096, 1024), jnp.float32)
    tx = adamfn.adam(moments="8bit")
    by_mosaic = gpu_mosaic.fits_jax()
    text = lowered(tx, params, "cuda")
    assert text.count("custom_call @mosaic_gpu") == by_mosaic
    assert ("stablehlo.reduce" in text) != by_mosaic  # by XLA, in passes
    assert "stablehlo.reduce" in lowered(tx, params, "rocm")
    assert "tpu_custom_call" in lowered(tx, params, "tpu")


@pytest.mark.parametrize(("kind", "runs"), [("Tesla T4", "xla"), ("NVIDIA A100", "Triton")])
def test_a_kernel_is_for_gpus_that_can_run_it(monkeypatch, kind, runs):
    """XLA refuses Triton on a T4; LLVM ends the process where Mosaic's instructions are missing."""
    monkeypatch.setitem(DEVICES, "cuda", {**DEVICES["cuda"], "device_kind": kind})
    tx, params = adamfn.adam(moments="8bit"), jax.ShapeDtypeStruct((4096, 1024), jnp.float32)
    tx = adamfn.with_backend(tx, "mosaic_gpu")
    with jax.sharding.use_abstract_mesh(mesh_of("cuda")):
        assert runs in str(adamfn.backend("gpu"))
    text = lowered(tx, params, "cuda")
    assert "mosaic_gpu" not in text
    assert ("triton" in text) == (runs == "Triton")
    assert ("stablehlo.reduce" in text) == (runs == "xla")


@pytest.mark.skipif(not gpu_mosaic.fits_jax(), reason="written for Mosaic GPU of jax 0.12")
@pytest.mark.parametrize("moments", ["8bit", "4bit"])
def test_mosaic_gpu_where_it_is_asked_for(moments):
    """In place; for blocks that its warps do not divide, a second kernel takes the last ones."""
    tx = adamfn.with_backend(adamfn.adamw(moments=moments), "mosaic_gpu")
    for rows, kernels_of_it in ((64, 1), (63, 2)):
        text = lowered(tx, jax.ShapeDtypeStruct((rows, 768), jnp.float32), "cuda")
        assert text.count("custom_call @mosaic_gpu") == kernels_of_it
    for shape in ((64, 300), (5003,)):  # a block that is not full: by Triton
        text = lowered(tx, jax.ShapeDtypeStruct(shape, jnp.float32), "cuda")
        assert "mosaic_gpu" not in text
        assert "triton" in text


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="a lowering that fails leaves half a kernel behind"
)
@pytest.mark.parametrize("formula", [jax.lax.digamma, lambda u: u * TWO])
def test_a_formula_that_no_kernel_takes_is_left_to_xla(formula):
    own = adamfn.from_stage(adamfn.Stage("own", formula))
    tx = adamfn.chain(adamfn.scale_by_moments(moments="8bit"), own, adamfn.scale_by_lr(0.1))
    params = jax.ShapeDtypeStruct((64, 768), jnp.float32)
    for backend, platform in (("auto", "cuda"), ("mosaic_gpu", "cuda"), ("auto", "tpu")):
        text = lowered(adamfn.with_backend(tx, backend), params, platform)
        assert not any(kernel in text for kernel in ("triton", "mosaic_gpu", "tpu_custom_call"))


def test_a_fault_of_a_kernel_is_not_hidden_by_xla(monkeypatch):
    def broken(leaf, platform):
        raise TypeError("a fault in the kernel")

    monkeypatch.setattr(triton, "run_leaf", broken)
    params = jax.ShapeDtypeStruct((64, 768), jnp.float32)
    with pytest.raises(TypeError, match="a fault in the kernel"):
        lowered(adamfn.adam(moments="8bit"), params, "cuda")


def test_a_users_run_has_no_warnings_of_jax():
    """Pallas' Triton is deprecated since jax 0.11."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lowered(adamfn.adam(moments="8bit"), jax.ShapeDtypeStruct((64, 768), jnp.float32), "cuda")


def test_sharded_leaves_go_through_xla():
    """XLA would gather a leaf for a kernel."""
    mesh = AbstractMesh((2,), ("x",), (AxisType.Auto,))
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
    with pytest.raises(ValueError, match="'auto', 'xla', 'pallas', 'mosaic_gpu'"):
        adamfn.with_backend(adamfn.adam(), "triton")


def test_an_unknown_platform_is_refused():
    with pytest.raises(ValueError, match=r"expected one of cpu, gpu, cuda, rocm, tpu\."):
        adamfn.backend("abacus")
