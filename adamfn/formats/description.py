"""`describe`: how every leaf's moments are stored."""

import math

import jax

from adamfn.formats.arrangement import kept_leaves, states_of_moments
from adamfn.trees import PyTree, path_name
from adamfn.trees import describe as describe_array


def describe(state: PyTree) -> str:
    """A table of how every leaf's moments are stored, with bytes and fractions of the total.

    The state is any tree with states of moments in it, such as a recipe's. An abstract one, from
    `jax.eval_shape(tx.init, params)`, costs no memory.

    Raises:
      ValueError: there are no moments in it.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> params = {"embedding": jnp.zeros((512, 64)), "kernel": jnp.zeros((64, 256))}
    >>> def choose(path, leaf):
    ...     return "float32" if path == "embedding" else "8bit"
    >>> state = adamfn.adam(moments=choose).init(params)
    >>> print(adamfn.formats.describe(state))  # doctest: +ELLIPSIS
    embedding         262,144 bytes  88.7%  mu float32[512,64]; nu float32[512,64]
    kernel             33,536 bytes  11.3%  mu int8[64,256]; nu uint8[64,256]; scales...
                      295,680 bytes in all
    """
    rows: list[tuple[str, int, str]] = []
    for node in states_of_moments(state):
        for path, parts, scales in kept_leaves(node):
            stored = {**parts, "scales": scales}
            arrays = {name: jax.tree.leaves(part) for name, part in stored.items()}
            size = sum(
                math.prod(x.shape) * x.dtype.itemsize for part in arrays.values() for x in part
            )
            fields = [
                f"{name} {' + '.join(map(describe_array, part))}"
                for name, part in arrays.items()
                if part
            ]
            rows.append((path_name(path) or "the leaf", size, "; ".join(fields)))
    if not rows:
        raise ValueError(
            f"describe: found no moments in {describe_array(state)}; expected a state of adamfn's,"
            " with mu and nu, by itself or inside a chain or a wrapper."
        )
    whole = max(sum(size for _, size, _ in rows), 1)
    width = max(len(path) for path, _, _ in rows)
    lines = [
        f"{path:<{width}} {size:>15,} bytes {size / whole:>6.1%}  {stored}"
        for path, size, stored in rows
    ]
    return "\n".join([*lines, f"{'':<{width}} {whole:>15,} bytes in all"])
