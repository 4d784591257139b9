# SPDX-License-Identifier: Apache-2.0
"""The guide's figures of a model of 70 billion parameters are those of the state itself."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, NamedSharding

import adamfn
from adamfn import formats
from adamfn.sharding import state_shardings

GUIDE = Path(__file__).parent.parent / "docs" / "many_devices.md"
DEVICES, P, G = 64, 2, 2
LAYERS, WIDTH, HIDDEN, KEYS, TOKENS = 80, 8192, 28672, 1024, 128256  # Llama 3's 70B
SHAPES = {
    "embedding": (TOKENS, WIDTH),
    "layers": {
        "query": (LAYERS, WIDTH, WIDTH),
        "key_value": (LAYERS, WIDTH, 2 * KEYS),
        "attention_out": (LAYERS, WIDTH, WIDTH),
        "gate_up": (LAYERS, WIDTH, 2 * HIDDEN),
        "down": (LAYERS, HIDDEN, WIDTH),
        "norms": (LAYERS, 2, WIDTH),
    },
    "norm": (WIDTH,),
    "out": (WIDTH, TOKENS),
}


def is_shape(node):
    return type(node) is tuple


def total(tree, shardings=None):
    """Bytes of a tree, or of what a device has of it."""
    leaves = jax.tree.leaves(tree)
    shapes = [leaf.shape for leaf in leaves]
    if shardings is not None:
        shapes = [s.shard_shape(x) for s, x in zip(jax.tree.leaves(shardings), shapes, strict=True)]
    return sum(math.prod(x) * leaf.dtype.itemsize for x, leaf in zip(shapes, leaves, strict=True))


def along_rows(shape):
    """The axis before the last, whose shards cut no block, if it divides."""
    axis = next(axis for axis in (-2, -1) if len(shape) >= -axis and shape[axis] % DEVICES == 0)
    return jax.P(*[None] * (len(shape) + axis), "data")


def row(moments):
    """What the guide's table says of a format: from shapes, without an array."""
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x, jnp.bfloat16), SHAPES, is_leaf=is_shape)
    everywhere = NamedSharding(AbstractMesh((DEVICES,), ("data",)), jax.P())
    tx = adamfn.adamw(moments=moments)
    state = jax.eval_shape(tx.init, params)
    n = sum(leaf.size for leaf in jax.tree.leaves(params))
    whole = total(state)
    part = total(state, state_shardings(tx, params, everywhere, zero_axis="data"))
    split = jax.tree.map(lambda x: NamedSharding(everywhere.mesh, along_rows(x.shape)), params)
    fully = total(state, state_shardings(tx, params, split))
    kept = (P + G) * n + whole, (P + G) * n + part, (P + G) * n / DEVICES + fully
    moved = (3 * G + 2 * P) * n + 2 * whole, (2 * G * n / DEVICES + 2 * part) + (G + 2 * P) * n
    billions = [x / 1e9 for x in (whole, part, *kept, *moved)]
    return f'| `"{moments}"` | {whole / n:.3f} | ' + " | ".join(f"{x:.1f}" for x in billions) + " |"


def test_seventy_billion_it_is():
    n = sum(math.prod(shape) for shape in jax.tree.leaves(SHAPES, is_leaf=is_shape))
    assert f"{n / 1e9:.1f}" == "70.6"
    text = GUIDE.read_text()
    assert f"2 g N = {2 * G * n / 1e9:.1f} GB" in text
    assert f"(2 p + g) N = {(2 * P + G) * n / 1e9:.1f} GB" in text


@pytest.mark.parametrize("moments", formats.FORMATS)
def test_the_guides_bytes_are_the_states(moments):
    table = GUIDE.read_text().split("<!-- seventy_billion -->")[1].split("<!-- end")[0]
    assert row(moments) in table.splitlines()


def test_what_is_counted_is_what_is_kept():
    # The shapes counted above, beside the bytes of arrays of a small model.
    params = {"kernel": jnp.zeros((64, 512), jnp.bfloat16), "norm": jnp.zeros(64, jnp.bfloat16)}
    for moments in formats.FORMATS:
        tx = adamfn.adamw(moments=moments)
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(tx.init(params)))
        assert held == total(jax.eval_shape(tx.init, params))
