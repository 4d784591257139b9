# SPDX-License-Identifier: Apache-2.0
"""The parameters that are measured, as shapes.

What matters is one leaf: larger than the nearer memory of a TPU (128 MiB), or it would never be
read from device memory, and of about 2^28 elements, so that what the worst of the candidates needs
besides it still fits a chip.
"""

from typing import Any

import jax
import jax.numpy as jnp

Shapes = dict[str, tuple[int, ...]]

TREES: dict[str, Shapes] = {
    "large matrix": {"kernel": (16384, 16384)},
    "stacked transformer": {
        "norm": (24, 1024),
        "qkv": (24, 1024, 3072),
        "qkv_bias": (24, 3072),
        "out": (24, 1024, 1024),
        "up": (24, 1024, 4096),
        "down": (24, 4096, 1024),
    },
    "convolutions": {
        "stem": (7, 7, 3, 64),
        "scale": (64,),
        "middle": (3, 3, 2048, 4096),
        "middle_bias": (4096,),
        "expand": (1, 1, 4096, 16384),
        "expand_bias": (16384,),
    },
    "embedding": {"embedding": (250002, 1024)},
    "head": {"kernel": (4096, 50257)},
}

LLAMA_8B: Shapes = {
    "embedding": (128256, 4096),
    "attention_norm": (32, 4096),
    "query": (32, 4096, 4096),
    "key": (32, 4096, 1024),
    "value": (32, 4096, 1024),
    "out": (32, 4096, 4096),
    "mlp_norm": (32, 4096),
    "gate": (32, 4096, 14336),
    "up": (32, 4096, 14336),
    "down": (32, 14336, 4096),
    "norm": (4096,),
    "head": (4096, 128256),
}
"""Llama 3's 8B, its 32 layers stacked for a scan (Grattafiori et al., 2024, table 3)."""

LLAMA_8B_SPLIT = {
    "embedding": (None, "model"),
    "query": (None, None, "model"),
    "key": (None, None, "model"),
    "value": (None, None, "model"),
    "out": (None, "model", None),
    "gate": (None, None, "model"),
    "up": (None, None, "model"),
    "down": (None, "model", None),
    "head": (None, "model"),
}
"""Which dimensions lie along the mesh's axis `model`; of the others, none."""

LLAMA_8B_FULLY_SPLIT = {
    "embedding": ("data", "model"),
    "query": (None, "data", "model"),
    "key": (None, "data", "model"),
    "value": (None, "data", "model"),
    "out": (None, "model", "data"),
    "gate": (None, "data", "model"),
    "up": (None, "data", "model"),
    "down": (None, "model", "data"),
    "head": ("data", "model"),
}
"""Likewise where parameters are split along the batches' axis too."""


def abstract(shapes: Any, dtype: str) -> Any:
    """A tree of shapes as `ShapeDtypeStruct`s of one dtype."""
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
