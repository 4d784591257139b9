# SPDX-License-Identifier: Apache-2.0
"""What the benchmark of a step's speed runs: Adam by optax, torch and adamfn, and the limits."""

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adamfn

Run = Callable[[int], None]
"""Takes so many updates one after the other, and returns when the last is done."""

COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
"""For the loop that streams memory."""

OPTAX, TORCH, EMPTY, STREAMS = "optax", "torch fused", "empty call", "seven streams"
UPDATE, STEP, PACKED = "adamfn update", "adamfn step", "adamfn packed"
STEP_BFLOAT16, STEP_8BIT, STEP_XLA = (f"{STEP}, {more}" for more in ("bfloat16", "8bit", "XLA"))


class Candidate(NamedTuple):
    """An optimizer in JAX."""

    init: Callable[[Any], Any]
    step: Callable[[Any, Any, Any], tuple[Any, Any]]
    """From parameters, state and gradients to the next parameters and state."""


def by_update(tx: Any) -> Candidate:
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return Candidate(tx.init, step)


def by_step(tx: adamfn.GradientTransformation) -> Candidate:
    return Candidate(tx.init, lambda params, state, grads: adamfn.step(tx, grads, state, params))


CANDIDATES = {
    OPTAX: by_update(optax.adam(1e-3)),
    UPDATE: by_update(adamfn.adam(1e-3)),
    STEP: by_step(adamfn.adam(1e-3)),
    PACKED: by_step(adamfn.packed(adamfn.adam(1e-3))),
    STEP_BFLOAT16: by_step(adamfn.adam(1e-3, moments="bfloat16")),
    STEP_8BIT: by_step(adamfn.adam(1e-3, moments="8bit")),
    STEP_XLA: by_step(adamfn.with_backend(adamfn.adam(1e-3), "xla")),
}


def gradients(shapes: dict) -> dict:
    """Normal ones for a tree of shapes, float32."""
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda shape: jnp.asarray(1e-3 * random.standard_normal(shape, np.float32)),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def start(candidate: Candidate, grads: dict) -> tuple[dict, Any]:
    """Parameters of its own, and its state."""
    params = jax.tree.map(jnp.zeros_like, grads)
    return jax.block_until_ready((params, candidate.init(params)))


def by_jax(candidate: Candidate, grads: dict) -> Run:
    """Updates in a jitted call that parameters and state are donated to."""
    return _repeated(
        jax.jit(candidate.step, donate_argnums=(0, 1)), *start(candidate, grads), grads
    )


@functools.partial(jax.jit, donate_argnums=(0, 1), keep_unused=True)
def empty_step(params, state, grads):
    """Takes the arrays of a step, gives them back and does nothing."""
    return params, state


def empty_call(grads: dict) -> Run:
    """What passing the arrays of the step costs."""
    return _repeated(empty_step, *start(CANDIDATES[STEP], grads), grads)


def training(candidate: Candidate, shapes: dict, batch: int = 32) -> Run:
    """Whole training steps of a multilayer perceptron: forward, backward, update."""
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 30 * leaf, gradients(shapes))
    first, *_, last = shapes.values()
    x = jnp.asarray(random.standard_normal((batch, first["kernel"][0]), np.float32))
    labels = jnp.asarray(random.integers(last["kernel"][1], size=batch))

    def loss(params):
        *hidden, last = params.values()
        h = x
        for layer in hidden:
            h = jax.nn.relu(h @ layer["kernel"] + layer["bias"])
        logits = h @ last["kernel"] + last["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, state):
        return candidate.step(params, state, jax.grad(loss)(params))

    return _repeated(train_step, params, candidate.init(params))


def _repeated(step: Callable, params: dict, state: Any, *grads: dict) -> Run:
    def run(times: int) -> None:
        nonlocal params, state
        for _ in range(times):
            params, state = step(params, state, *grads)
        jax.block_until_ready((params, state))

    return run


def has_torch() -> bool:
    return find_spec("torch") is not None


def by_torch(grads: dict) -> Run:
    """The fused kernel of torch, with as many threads as XLA has."""
    import torch

    torch.set_num_threads(os.cpu_count())
    params = [torch.zeros(leaf.shape, requires_grad=True) for leaf in jax.tree.leaves(grads)]
    for param, leaf in zip(params, jax.tree.leaves(grads), strict=True):
        param.grad = torch.tensor(np.asarray(leaf))
    optimizer = torch.optim.Adam(params, lr=1e-3, fused=True)

    def run(times: int) -> None:
        for _ in range(times):
            optimizer.step()

    return run


def seven_streams(elements: int) -> Run:
    """The machine's limit: what a step reads and writes, in C++, in one thread for each core."""
    buffers = [jnp.full(elements, 0.5) for _ in range(4)]  # in the memory that JAX takes
    jax.block_until_ready(buffers)
    function = _streams_library().seven_streams

    def run(times: int) -> None:
        pointers = [ctypes.c_void_p(buffer.unsafe_buffer_pointer()) for buffer in buffers]
        function(*pointers, *map(ctypes.c_int64, (elements, times, os.cpu_count())))

    return run


@functools.cache
def _streams_library() -> ctypes.CDLL:
    source = Path(__file__).parent / "seven_streams.cc"
    flags = ("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread")
    with tempfile.TemporaryDirectory() as directory:
        built = Path(directory, "seven_streams.so")
        subprocess.run([COMPILER, *flags, str(source), "-o", str(built)], check=True)
        return ctypes.CDLL(str(built))
