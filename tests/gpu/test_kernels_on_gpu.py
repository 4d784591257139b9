# SPDX-License-Identifier: Apache-2.0
"""What the kernels store and move on a GPU, beside XLA's program on it and on CPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import call_of
from test_pallas import check_close, check_same, special

import adamfn
from adamfn import formats
from adamfn.backends import kernels
from adamfn.backends.tile import LeafCall
from adamfn.backends.xla import run_call

SHAPES = [
    (300,),
    (5000,),
    (300003,),
    (2**20,),
    (64, 300),
    (77, 130),
    (1000, 1),
    (1, 1000),
    (2048, 1024),
    (501, 1023),
    (3, 31, 150),
    (24, 128, 512),
    (3, 3, 64, 128),
    (7, 7, 3, 64),
]
FORMATS = ["bfloat16", "8bit", "4bit", formats.FourBit(block=16), formats.EightBit(block=1024)]


def finite(rng, shape, dtype):
    return jnp.nan_to_num(special(rng, shape, dtype), nan=1e-3, posinf=1e-9, neginf=-1.0)


@pytest.fixture(params=["triton", "mosaic"])
def kernel(request):
    """Each kernel that this device has with this JAX."""
    found = {own.__name__.split(".")[-1]: own for own in kernels.kernels_on("cuda")}
    if request.param not in found:
        pytest.skip(f"{request.param} has no kernels here")
    return found[request.param]


def check(kernel, tx, shape, dtype, draw=finite):
    """Two steps by the kernel and by XLA, from the same numbers."""
    rng = np.random.default_rng(0)
    draw = partial(draw, rng, shape, dtype)
    p = draw()
    call, operands = call_of(tx, p, p)
    run = jax.jit(lambda operands: kernel.run_leaf(LeafCall(call, operands), "cuda"))
    if jax.eval_shape(run, operands) is None:
        pytest.skip("this kernel takes whole blocks")
    reference = jax.jit(partial(run_call, call))
    for count in (1, 2**31 - 1):
        operands = operands._replace(count=jnp.int32(count), updates=[draw()])
        found, expected = run(operands), reference(operands)
        pairs = list(zip(found, jax.tree.leaves(expected), strict=True))
        if draw.func is special:  # codes beside a scale that is NaN mean nothing
            pairs = [own for own in pairs if own[0].dtype.itemsize > 1]
        check_same(*zip(*pairs, strict=True), dtype == jnp.bfloat16)
        operands = operands._replace(kept=expected.kept, params=expected.params)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("moments", FORMATS, ids=str)
def test_codes_are_those_of_xla_to_the_bit(kernel, moments, shape, dtype):
    check(kernel, adamfn.adamw(0.1, moments=moments), shape, dtype)


@pytest.mark.parametrize("moments", ["bfloat16", "8bit", "4bit"])
@pytest.mark.parametrize("shape", [(501, 1023), (503, 768)])
def test_what_is_not_finite_stays_visible(kernel, moments, shape):
    check(kernel, adamfn.adamw(0.1, moments=moments), shape, jnp.float32, special)


@pytest.mark.parametrize("moments", ["8bit", "4bit"])
def test_xla_stores_the_codes_that_it_computes(moments):
    """Of the last byte of a sum, ptxas has stored the sum converted to a byte."""
    rng = np.random.default_rng(0)
    g = np.float32(rng.standard_normal((501, 1023)))

    @jax.jit
    def encode(g):
        noise = formats.noise(1, 0, g.shape)
        return formats.get(moments).encode(0.1 * g, 0.001 * g * g, noise)

    found, expected = (
        jax.tree.leaves(encode(jax.device_put(g, jax.devices(kind)[0]))) for kind in ("gpu", "cpu")
    )
    check_close(found, expected)


RECIPES = {
    "nadam": adamfn.nadam,
    "radam": adamfn.radam,
    "adamax": adamfn.adamax,
    "amsgrad": adamfn.amsgrad,
    "24 bits": lambda rate, moments: adamfn.chain(
        adamfn.adam(rate, moments=moments), adamfn.round_weights(24)
    ),
}


@pytest.mark.parametrize("moments", ["8bit", "4bit"])
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("shape", [(501, 1023), (503, 768)])
def test_every_recipe(kernel, name, moments, shape):
    if kernel.__name__.endswith("mosaic") and name in ("radam", "24 bits"):
        pytest.skip("Mosaic does not know their operations")
    dtype = jnp.bfloat16 if name == "24 bits" else jnp.float32
    check(kernel, RECIPES[name](0.1, moments=moments), shape, dtype)


@pytest.mark.parametrize("backend", ["auto", "mosaic_gpu"])
@pytest.mark.parametrize("moments", ["float32", "bfloat16", "8bit", "4bit"])
def test_a_run_is_that_of_a_cpu(moments, backend):
    """The noise is the same, so codes are but for a few whose rounding hung on a last bit."""
    rng = np.random.default_rng(0)
    shapes = {"kernel": (200, 768), "bias": (768,), "filter": (3, 3, 32, 64)}
    params, *grads = (
        {name: np.float32(rng.standard_normal(shape)) for name, shape in shapes.items()}
        for _ in range(6)
    )
    tx = adamfn.with_backend(adamfn.adamw(0.01, moments=moments), backend)

    def trained(device):
        with jax.default_device(device):
            p = jax.tree.map(jnp.asarray, params)
            # On CPU, kernels would be interpreted.
            own = tx if device.platform == "gpu" else adamfn.with_backend(tx, "auto")
            state, step = own.init(p), jax.jit(partial(adamfn.step, own))
            for g in grads:
                p, state = step(jax.tree.map(jnp.asarray, g), state, p)
            return jax.tree.map(np.asarray, (p, state))

    found, expected = trained(jax.devices("gpu")[0]), trained(jax.devices("cpu")[0])
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if a.dtype in (np.int8, np.uint8):
            assert np.mean(a != b) < 2e-3
    for name in shapes:
        # A code that differs moves a weight by a hundredth of a step less or more; one of a block's
        # largest or smallest, all of the block.
        off = np.abs(found[0][name] - expected[0][name])
        assert np.mean(off > 1e-4) < 2e-3
        assert np.max(off) < 1e-3
