# SPDX-License-Identifier: Apache-2.0
"""Adam in every format, by `update` and by `step`, and its peers."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import optax

import adamfn

from .cost import Step

FORMATS = ("float32", "bfloat16", "8bit", "4bit", "factored", "blockmean")
OPTAX, FLASHOPTIM = "optax", "flashoptim-jax"
RATE = 1e-3


class Candidate(NamedTuple):
    """An optimizer, and how it moves the parameters."""

    init: Callable[[Any], Any]
    step: Step


def by_update(tx: Any) -> Candidate:
    """By `update` and `apply_updates`, as any transformation."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return Candidate(tx.init, step)


def by_step(tx: adamfn.GradientTransformation) -> Candidate:
    """By `adamfn.step`."""
    return Candidate(tx.init, lambda params, state, grads: adamfn.step(tx, grads, state, params))


def candidates(dtype: str, platform: str) -> dict[str, Candidate]:
    """All of them, by name.

    flashoptim-jax takes part where it is installed, as it is by default: it keeps bfloat16 weights
    in three bytes. Its kernel is written for GPU; on TPU its own way without a kernel runs.
    """
    found = {OPTAX: by_update(optax.adam(RATE))}
    for moments in FORMATS:
        tx = adamfn.adam(RATE, moments=moments)
        found[f"update {moments}"] = by_update(tx)
        found[f"step {moments}"] = by_step(tx)
    if dtype == "bfloat16":
        tx = adamfn.chain(adamfn.adam(RATE, moments="8bit"), adamfn.round_weights(24))
        found["step 8bit, weights of 24 bits"] = by_step(tx)
    if find_spec("flashoptim_jax"):
        from flashoptim_jax import flash_adam

        bits = {} if dtype == "bfloat16" else {"master_weight_bits": None}
        flash = flash_adam(RATE, fused=platform != "tpu", **bits)
        found[FLASHOPTIM] = Candidate(flash.init, flash.step)
    return found
