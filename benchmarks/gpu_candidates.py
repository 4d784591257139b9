# SPDX-License-Identifier: Apache-2.0
"""What the benchmark of a GPU's speed runs: Adam by adamfn, optax, torch and those in 8 bits."""

from collections.abc import Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
from ahead_of_time.candidates import Candidate
from lean_peers import moments_in
from step_candidates import Run

TORCH: dict[str, tuple[str, str, dict[str, Any]]] = {
    "torch fused": ("torch.optim", "AdamW", {"fused": True}),
    "torchao 8bit": ("torchao.optim", "AdamW8bit", {}),
    "bitsandbytes 8bit": ("bitsandbytes.optim", "AdamW8bit", {}),
    "flashoptim": ("flashoptim", "FlashAdamW", {}),
}


IN_A_CALL = 10
"""Updates that a compiled call of JAX's takes: its arrays are passed once for all of them, as once
for a training step. For hundreds of leaves that takes longer than an update."""


class Timed(NamedTuple):
    """An update that can be taken so many times, and what it has to move."""

    run: Run
    """Takes `IN_A_CALL` updates for each that is asked for."""
    least: int
    """Bytes: parameters and state read and written once, gradients read once."""


def normal(shapes: Any, dtype: str, seed: int) -> Any:
    """Normal numbers for a tree of shapes, made on the GPU."""
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda node: isinstance(node, tuple))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
    return treedef.unflatten(
        [draw(key, shape, dtype) for key, shape in zip(keys, leaves, strict=True)]
    )


def by_jax(candidates: dict[str, Candidate], shapes: Any, dtype: str) -> dict[str, Timed]:
    """Jitted updates of parameters that they hand on to one another; each keeps a state."""
    params, grads = normal(shapes, dtype, 0), normal(shapes, dtype, 1)

    def timed(candidate: Candidate) -> Timed:
        @partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, grads):
            def one(_, before):
                # Behind a barrier: nothing of it is to be computed before the loop.
                return candidate.step(*before, jax.lax.optimization_barrier(grads))

            return jax.lax.fori_loop(0, IN_A_CALL, one, (params, state))

        state = candidate.init(params)

        def run(times: int) -> None:
            nonlocal params, state
            for _ in range(times):
                params, state = step(params, state, grads)
            jax.block_until_ready((params, state))

        return Timed(run, 2 * size((params, state)) + size(grads))

    return {name: timed(candidate) for name, candidate in candidates.items()}


def size(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def by_torch(shapes: Any, dtype: str) -> dict[str, Timed]:
    """The same for torch's optimizers that are installed, on one list of parameters."""
    peers = {name: peer for name, peer in TORCH.items() if find_spec(peer[0].partition(".")[0])}
    if not peers:
        return {}
    import torch

    leaves = jax.tree.leaves(shapes, is_leaf=lambda node: isinstance(node, tuple))
    like = {"dtype": getattr(torch, dtype), "device": "cuda"}
    params = [torch.randn(leaf, **like, requires_grad=True) for leaf in leaves]
    for param in params:
        param.grad = torch.randn_like(param)

    def timed(name: str) -> Timed:
        module, peer, options = peers[name]
        if name == "flashoptim" and dtype == "float32":
            options = options | {"master_weight_bits": None}
        optimizer = getattr(import_module(module), peer)(
            params, lr=1e-3, weight_decay=0.0, **options
        )

        def run(times: int) -> None:
            for _ in range(IN_A_CALL * times):
                optimizer.step()
            torch.cuda.synchronize()

        run(1)  # makes the state
        kept = sum(bytes_of(optimizer.state[param]) for param in params)
        own = sum(param.nbytes for param in params)
        return Timed(run, 2 * (own + kept) + own)

    return {name: timed(name) for name in peers}


def bytes_of(state: dict) -> int:
    return sum(x.numel() * x.element_size() for x in tensors_in(state))


def tensors_in(state: dict) -> Iterator:
    """What a torch optimizer keeps of one parameter, wrapped by some in classes of their own."""
    for value in state.values():
        if hasattr(value, "_quantized"):  # flashoptim's
            parts = (value._quantized, value._scales, value._data)
            yield from (part for part in parts if part is not None)
        else:
            yield from moments_in({"value": value})
