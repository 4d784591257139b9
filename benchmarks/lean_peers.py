# SPDX-License-Identifier: Apache-2.0
"""Other libraries' moments in fewer bytes, for `lean_fidelity.py`: those that are installed."""

from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

B1, B2, EPS = 0.9, 0.999, 1e-8

Leaves = dict[str, np.ndarray]
Storage = Callable[[Iterator[Leaves]], tuple[Leaves, float]]
"""From the gradients of every step to the last update and the bytes kept for a parameter."""


def by_torch(module: str, name: str) -> Storage:
    """A torch optimizer: a step of rate 1 from 0 leaves minus the update in the parameter."""

    def run(steps: Iterator[Leaves]) -> tuple[Leaves, float]:
        import torch

        params: dict[str, Any] = {}
        optimizer: Any = None
        for g in steps:
            if not params:
                params = {d: torch.zeros(leaf.shape, requires_grad=True) for d, leaf in g.items()}
                optimizer = getattr(import_module(module), name)(
                    list(params.values()), lr=1.0, betas=(B1, B2), eps=EPS, weight_decay=0.0
                )
            for d, param in params.items():
                param.data.zero_()
                param.grad = torch.from_numpy(g[d])
            optimizer.step()
        kept = [x for param in params.values() for x in moments_in(optimizer.state[param])]
        stored = sum(x.numel() * x.element_size() for x in kept)
        entries = sum(param.numel() for param in params.values())
        return {d: -param.detach().numpy() for d, param in params.items()}, stored / entries

    return run


def moments_in(state: dict) -> Iterator:
    """The arrays that a torch optimizer keeps of one parameter's moments.

    Not the tables of levels (qmap), which could be one for all parameters.
    """
    for name, value in state.items():
        if hasattr(value, "tensor_attrs"):  # torchao's quantized tensors
            yield from (getattr(value, part) for part in value.tensor_attrs if part != "qmap")
        elif hasattr(value, "numel") and value.numel() > 1 and "qmap" not in name:
            yield value


def by_flashoptim(steps: Iterator[Leaves]) -> tuple[Leaves, float]:
    """FlashOptim's moments under float32 weights, without its kernel, which is written for GPU.

    A step of rate 1 from 0, as torch's.
    """
    from flashoptim_jax import flash_adam

    tx = flash_adam(1.0, B1, B2, EPS, master_weight_bits=None, fused=False)
    step = jax.jit(tx.step, donate_argnums=1)
    zeros: dict[str, jax.Array] = {}
    params = state = None
    for g in steps:
        if not zeros:
            zeros = {d: jnp.zeros(leaf.shape) for d, leaf in g.items()}
            state = tx.init(zeros)
        params, state = step(zeros, state, g)
    kept = jax.tree.leaves((state.mu, state.nu))
    entries = sum(leaf.size for leaf in zeros.values())
    stored = sum(leaf.nbytes for leaf in kept)
    return {d: -np.asarray(param) for d, param in params.items()}, stored / entries


PEERS: dict[str, Storage] = {
    f"{module.partition('.')[0]} {moments}": by_torch(module, name)
    for module, moments, name in (
        ("torchao.optim", "8bit", "AdamW8bit"),
        ("torchao.optim", "fp8", "AdamWFp8"),
        ("torchao.optim", "4bit", "AdamW4bit"),
        ("bitsandbytes.optim", "8bit", "AdamW8bit"),
    )
    if find_spec(module.partition(".")[0])
}
if find_spec("flashoptim_jax"):
    PEERS["flashoptim-jax 8bit"] = by_flashoptim
