# SPDX-License-Identifier: Apache-2.0
"""Leaves without a kernel go through XLA in chunks of rows, and need little temporary memory."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import pytest

from adamfn import formats

MIB = 2**20
SHAPE = (16384, 8192)


@dataclass(frozen=True)
class TwiceRounded(formats.BaseFormat):
    """A user's format: blocks of 32 along the last axis, each with its largest."""

    stores_rows = True

    def encode(self, mu, nu, noise):
        blocks = mu.reshape(*mu.shape[:-1], -1, 32)
        scale = jnp.max(jnp.abs(blocks), -1, keepdims=True)
        codes = jnp.round(blocks / jnp.where(scale > 0, scale, 1) * 127).astype(jnp.int8)
        return formats.Stored(codes.reshape(mu.shape), jnp.sqrt(nu).astype(jnp.bfloat16), scale)

    def decode(self, stored):
        blocks = stored.mu.reshape(*stored.mu.shape[:-1], -1, 32).astype(jnp.float32)
        mu = (blocks / 127 * stored.scales).reshape(stored.mu.shape)
        return mu, stored.nu.astype(jnp.float32) ** 2

    def holds(self, shape, dtype):
        return len(shape) > 1 and shape[-1] % 32 == 0


def check_memory(found, leaf, updates=0):
    assert found.temporary - updates <= max(64 * MIB, 0.05 * leaf)


@pytest.mark.parametrize("shape", [SHAPE, (16, 1024, 8192), (16387, 8192)], ids=str)
@pytest.mark.parametrize("way", ["step", "update"])
def test_a_users_format(measure, way, shape):
    leaf = 4 * math.prod(shape)
    # With `update` the updates are there until they are applied.
    check_memory(measure(way, TwiceRounded(), shape), leaf, leaf if way == "update" else 0)


@pytest.mark.parametrize("moments", ["8bit", "4bit", "factored"])
def test_float64(measure, machine, moments):
    leaf = 8 * SHAPE[0] * SHAPE[1]
    with jax.enable_x64(True):
        found = measure("step", moments, {"leaf": SHAPE}, "float64")
    if machine.platform == "tpu":
        assert found.temporary <= 4.6 * leaf
        pytest.xfail("XLA for TPU splits float64 in halves: x + 1 alone takes 1.5 leaves of memory")
    check_memory(found, leaf)
