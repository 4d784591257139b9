# SPDX-License-Identifier: Apache-2.0
"""adamfn.sharding's whole_blocks and sharded: choices, errors. `eight_devices` runs the steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType

import adamfn
from adamfn.formats import BlockMean, EightBit, FourBit, Linear, Pair, get
from adamfn.sharding import sharded, whole_blocks

P = jax.P
MESH = AbstractMesh((4, 2), ("data", "model"))


def abstract(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def on(spec):
    return jax.NamedSharding(MESH, spec)


@pytest.mark.parametrize(
    ("moments", "shape", "spec", "zero_axis", "expected"),
    [
        ("8bit", (64, 1024), P("data", "model"), None, EightBit()),
        ("8bit", (64, 256), P(None, "model"), None, EightBit(128)),
        ("8bit", (64, 384), P(None, "data"), None, EightBit(96)),
        ("4bit", (64, 256), P(None, ("data", "model")), None, FourBit(32)),
        ("8bit", (64, 256), P(), "data", EightBit()),  # rows are split
        ("8bit", (99, 640), P(), "data", EightBit(160)),
        ("4bit", (99, 640), P(), "data", FourBit(80)),
        ("8bit", (64, 200), P(None, "model"), None, get("bfloat16")),  # 100 is no multiple of 16
        ("blockmean", (64, 256), P(None, "model"), None, Pair(Linear(128), BlockMean())),
        ("bfloat16", (64, 256), P(None, "model"), None, get("bfloat16")),
        ("8bit", (256,), P("model"), None, EightBit()),  # which does not hold it
    ],
)
def test_blocks_that_no_shard_cuts(moments, shape, spec, zero_axis, expected):
    params = {"layers": [{"w": abstract(*shape)}]}
    chosen = whole_blocks(moments, params, on(spec), zero_axis)
    assert chosen("layers/0/w", abstract(*shape)) == expected
    assert chosen("another", abstract(*shape)) == get(moments)


def test_formats_chosen_by_a_function():
    def moments(path, leaf):
        return "8bit" if path == "a" else "float32"

    params = {"a": abstract(64, 256), "b": abstract(64, 256)}
    chosen = whole_blocks(moments, params, on(P(None, "model")))
    assert chosen("a", params["a"]) == EightBit(128)
    assert chosen("b", params["b"]) == get("float32")


ONE = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sharded(optax.adam(1e-3), on(P())), ValueError, "sharded: .* of adamfn's"),
        (lambda: sharded(adamfn.packed(adamfn.adam()), on(P())), ValueError, "Leave `packed` out"),
        (lambda: sharded(adamfn.adam, on(P())), TypeError, "Call the factory first"),
        (lambda: init(adamfn.adam(), on(P()), "rows"), ValueError, "zero_axis is 'rows'; .*data=4"),
        (lambda: init(adamfn.adam(), {"v": on(P())}), ValueError, "no sharding .* at \\['w'\\]"),
        (
            lambda: init(adamfn.adam(), {"w": P()}),
            TypeError,
            "sharded: .* is P.*; expected a .*NamedSharding",
        ),
        (lambda: whole_blocks("9bit", {}, on(P())), ValueError, "moments is '9bit'"),
        (lambda: whole_blocks("8bit", {}, on(P()), "rows"), ValueError, "zero_axis is 'rows'"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def init(tx, shardings, zero_axis=None):
    return jax.eval_shape(sharded(tx, shardings, zero_axis).init, {"w": abstract(8, 8)})


def test_a_block_that_is_cut_is_refused_by_name():
    tx = sharded(adamfn.adam(moments="8bit"), on(P(None, "model")))
    params = {"w": abstract(64, 256)}
    state = jax.eval_shape(adamfn.adam(moments="8bit").init, params)
    expected = (
        r"leaf at w is float32\[64,256\].*has 128 elements of its last .*blocks of 256"
        r".*whole_blocks"
    )
    with pytest.raises(ValueError, match=expected):
        jax.eval_shape(functools.partial(adamfn.step, tx), params, state, params)


@pytest.mark.parametrize("wrap", ["masked", "multi_steps", "chain", "clipped"])
def test_wrappers_take_it(wrap):
    everywhere = jax.NamedSharding(ONE, P())
    params = {"w": np.ones((64, 256), np.float32), "frozen": np.ones(3, np.float32)}

    def wrapped(inner):
        return {
            "masked": lambda: optax.masked(inner, {"w": True, "frozen": False}),
            "multi_steps": lambda: optax.MultiSteps(inner, 1),
            "chain": lambda: adamfn.chain(optax.clip(0.5), inner),
            "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.1), inner),
        }[wrap]()

    tx = adamfn.adamw(1e-2, moments="8bit")
    moved = [
        jax.jit(functools.partial(adamfn.step, own))(params, own.init(params), params)
        for own in (wrapped(tx), wrapped(sharded(tx, dict.fromkeys(params, everywhere), "data")))
    ]
    for a, b in zip(*map(jax.tree.leaves, moved), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
