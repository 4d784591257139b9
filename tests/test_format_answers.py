# SPDX-License-Identifier: Apache-2.0
"""What formats say of themselves, and how a state of moments is read leaf by leaf."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adamfn import formats
from adamfn.formats import BlockMean, EightBit, Exact, Factored, FourBit, Linear, Pair, Rounded
from adamfn.formats.arrangement import kept_leaves, scales_key
from adamfn.formats.blocks import along
from adamfn.formats.format import InTile, answer

NEAREST = Rounded(stochastic=False)


class Another:
    """Any object with the three methods, and an attribute that happens to be called `block`."""

    block = 64

    def encode(self, mu, nu, noise):
        return formats.Stored(mu, nu)

    def decode(self, stored):
        return stored[:2]

    def holds(self, shape, dtype):
        return True


class Other(EightBit):
    def encode(self, mu, nu, noise):
        return super().encode(mu, 2 * nu, noise)


class OtherBlocks(EightBit):
    def encode_blocks(self, mu, nu, noise, largest):
        return super().encode_blocks(mu, 2 * nu, noise, largest)


class OtherCodec(Linear):
    def decode(self, codes, scales):
        return 2 * super().decode(codes, scales)


@dataclass(frozen=True)
class Talkative(formats.BaseFormat, Another):
    block = 0

    def encode(self, mu, nu, noise):
        return formats.Stored(mu, nu)


@pytest.mark.parametrize(
    ("format", "block", "rows", "kernel", "native"),
    [
        (None, 0, True, 0, 0),
        (formats.get("float32"), 0, True, 0, 0),
        (formats.get("bfloat16"), 0, True, 0, 1),
        (Pair(NEAREST, NEAREST), 0, True, 0, 2),
        (Pair(Rounded(), NEAREST), 0, True, 0, None),
        (EightBit(), 256, True, 256, 3),
        (EightBit(2048), 2048, True, 2048, None),
        (FourBit(), 128, True, 128, None),
        (formats.get("factored"), 256, False, None, None),
        (Pair(Linear(64), BlockMean()), 64, True, None, None),
        (Pair(Linear(64), BlockMean(-2)), 64, False, None, None),
        (Pair(Rounded(), Factored()), 0, False, None, None),
        (Pair(Exact(), Linear(64)), 64, True, None, None),
        (Pair(Linear(64), Linear(128)), None, True, None, None),
        (Pair(Linear(), Rounded()), 256, True, None, None),
        (Pair(OtherCodec(), Factored()), None, False, None, None),
        (Another(), None, False, None, None),
        (Other(), None, False, None, None),
        (OtherBlocks(), 256, True, 256, None),
        (Talkative(), 0, False, None, None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_answers(format, block, rows, kernel, native):
    names = ("block", "stores_rows", "kernel_block", "native_code")
    assert tuple(answer(format, name) for name in names) == (block, rows, kernel, native)
    assert format is None or answer(format, "on_shards")(()) == format
    assert (answer(format, "factors") is not None) == (
        bool(block) and "nu=" in repr(format) and isinstance(format.nu, Factored | BlockMean)
    )


def test_the_same_in_other_blocks_and_on_shards():
    assert answer(EightBit(), "resized")(96) == EightBit(96)
    resized = answer(Pair(Linear(), BlockMean()), "resized")(128)
    assert resized == Pair(Linear(128), BlockMean())
    split = ((), ("data",))
    found = answer(Pair(Linear(), Factored()), "on_shards")(split)
    assert found == Pair(Linear(), Factored(split))


@pytest.mark.parametrize("name", ["8bit", "4bit", "bfloat16"])
def test_a_tile_stores_the_codes_of_the_leaf(name):
    format, shape = formats.get(name), (128, 256)
    mu, nu = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    nu, noise = nu**2, formats.noise(1, 2, shape)
    whole = jax.jit(format.encode)(mu, nu, noise)
    size = 128 if name == "4bit" else 256
    inside = np.arange(512)[:, None] < 300  # the rows beyond are no part of the leaf
    by_blocks = [x.reshape(-1, size) for x in (mu, nu, noise)]
    tile = format
    if answer(format, "kernel_block"):
        tile = InTile(format, inside[: len(by_blocks[0])], along(1))
    stored = jax.jit(tile.encode)(*by_blocks)
    for codes, expected in zip(stored[:2], whole[:2], strict=True):
        if codes is not None and expected is not None:
            found = np.asarray(codes).reshape(shape)[:128]
            np.testing.assert_array_equal(found, np.asarray(expected).astype(found.dtype))


def test_ends_of_codes():
    g = np.array([1.0, -0.1, 0.01, 0.0] * 64, np.float32)
    stored = jax.jit(EightBit().encode)(0.5 * g, g**2, None)
    ends = answer(EightBit(), "ends")(stored.mu, stored.nu)
    found = {name: int(where.sum()) for name, where in ends.items()}
    assert found == {"lowest": 64, "highest": 64, "largest": int((abs(stored.mu) == 127).sum())}
    stored = jax.jit(FourBit().encode)(0.5 * g, g**2, None)
    ends = answer(FourBit(), "ends")(stored.mu, stored.nu)
    found = {name: int(where.sum()) for name, where in ends.items()}
    assert found == {"lowest": 64, "highest": 64, "largest": 192}
    pair = formats.get("factored")
    assert list(answer(pair, "ends")(jnp.array([127, 0]), None)) == ["largest"]
    assert answer(Another(), "ends")(None, None) == answer(None, "ends")(None, None) == {}


class State(NamedTuple):
    count: Any
    mu: Any
    nu: Any
    nu_max: Any
    scales: Any


def test_kept_leaves():
    codes = jnp.ones((4, 4), jnp.uint8)
    mu = {"a": None, "b": [codes, None], "none": None, "scalar": jnp.zeros(())}
    nu = {"a": codes, "b": [None, None], "none": None, "scalar": jnp.zeros(())}
    found = list(kept_leaves(State(0, mu, nu, nu, {"a": (1, 2), "b/0": 3})))
    assert [scales_key(leaf.path) for leaf in found] == ["a", "b/0", "scalar"]
    assert [leaf.scales for leaf in found] == [(1, 2), 3, ()]
    present = [[part is not None for part in leaf.parts.values()] for leaf in found]
    assert present == [[False, True, True], [True, False, False], [True] * 3]
    (leaf,) = kept_leaves(State(0, codes, codes, codes, {"leaf": "entry"}))
    assert leaf.scales == "entry"
