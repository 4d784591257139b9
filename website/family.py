# SPDX-License-Identifier: Apache-2.0
r"""The pages of `docs/family/`: from the fields at the top of each, by one template.

A page's fields are its title, purpose, algorithm (KaTeX, with `\diff{...}` around what differs from
Adam), b2, eps, rate, torch, optax, paper, and the optimizer as an expression of `moments`. Below
them it has an example, which the tests run. The bytes are those of the optimizer's state.
"""

import jax
import jax.numpy as jnp

import adamfn

TEMPLATE = r"""# {title}

{purpose}

{example}

## Algorithm

m and v begin at zero; g is the gradient at step t, p the parameter, $\alpha$ the learning rate.
What differs from [Adam](adam.md) is in colour.

$$
\begin{{aligned}}
{algorithm}
\end{{aligned}}
$$

## Advice

- **b2**: {b2}
- **eps**: {eps}
- **Learning rate**: {rate}

## Differences from torch and optax

- **torch**: {torch}
- **optax**: {optax}

## Memory

Bytes per parameter of a matrix of 1024 by 1024. The gradient has the dtype of its weight.

| weights | moments | weight | gradient | state | total |
|---|---|---|---|---|---|
{memory}

## Source

{paper}
"""
STORAGES = (
    ("float32", "float32", 4, 4),
    ("float32", "bfloat16", 4, 4),
    ("float32", "8bit", 4, 4),
    ("float32", "4bit", 4, 4),
    ("bfloat16 with `round_weights(24)`", "8bit", 3, 2),
)


def page(example, fields):
    """The Markdown of a page from its example and the fields above it."""
    algorithm = fields["algorithm"].strip().replace(r"\diff{", r"\textcolor{#d81b60}{")
    memory = "\n".join(filter(None, (_row(fields["optimizer"], *kind) for kind in STORAGES)))
    texts = fields | {"algorithm": algorithm, "memory": memory, "example": example.strip()}
    return TEMPLATE.format_map(texts)


def _row(optimizer, weights, moments, weight, gradient):
    try:
        tx = eval(optimizer, {"adamfn": adamfn, "moments": moments})
    except ValueError:  # it refuses this format
        return None
    param = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    state = jax.eval_shape(tx.init, param)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / param.size
    total = f"{weight + gradient + size:.2f}"
    return f'| {weights} | `"{moments}"` | {weight} | {gradient} | {size:.2f} | {total} |'
