# SPDX-License-Identifier: Apache-2.0
"""`whole_blocks`: formats whose blocks no shard cuts."""

from typing import Any

import jax
import jax.numpy as jnp

from adamfn.core.placement import Path, place, size
from adamfn.formats import Format, Moments, check_moments, get
from adamfn.formats.blocks import cut_block, size_for
from adamfn.formats.format import answer
from adamfn.sharding.state_shardings import split_further
from adamfn.trees import PyTree, path_name


def whole_blocks(
    moments: Moments, params: PyTree, shardings: PyTree, zero_axis: str | None = None
) -> Moments:
    """Makes blocks of formats so small that each is on one device.

    If a shard's last axis is no multiple of a block, the largest smaller block that divides it is
    taken, down to 16. A block costs 12 bytes in `"8bit"` and `"4bit"`, 4 in `"factored"` and
    `"blockmean"`. If none divides it, the leaf is stored in `"bfloat16"`.

    `moments` is as recipes take it; other arguments and errors are those of `state_shardings`.
    Returns a function of a leaf's path and the leaf, for `moments=`.

    >>> import adamfn, jax, jax.numpy as jnp
    >>> mesh = jax.sharding.AbstractMesh((4,), ("model",))
    >>> params = {"w": jax.ShapeDtypeStruct((512, 768), jnp.float32)}
    >>> split = jax.NamedSharding(mesh, jax.P(None, "model"))  # a device has 192 of a row
    >>> moments = adamfn.sharding.whole_blocks("8bit", params, split)
    >>> print(moments("w", params["w"]))
    EightBit(block=192)
    """
    moments = check_moments(moments)
    placed, mesh = place("whole_blocks", params, shardings, zero_axis)
    chosen: dict[str, Format] = {}

    def choose(path: str, leaf: Any) -> Format:
        return chosen.get(path) or get(moments(path, leaf) if callable(moments) else moments)

    leaves: list[tuple[Path, Any]] = jax.tree.leaves_with_path(params)
    for path, leaf in leaves:
        name, axes = path_name(path), placed[path].axes
        format = choose(name, leaf)
        if not answer(format, "block") or not format.holds(leaf.shape, leaf.dtype):
            continue
        chosen[name] = get("bfloat16")
        moment = jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
        for block in range(answer(format, "block"), 15, -16):
            exact = size_for(leaf.shape[-1], block)
            candidate = answer(format, "resized")(exact)
            if zero_axis is not None:
                stored = jax.tree.leaves(jax.eval_shape(candidate.encode, moment, moment, None))
                stored = [x for x in stored if x.ndim == leaf.ndim]
                axes = split_further(placed[path], zero_axis, stored, mesh)
            if cut_block(exact, leaf.shape, size(axes[-1], mesh)) is None:
                chosen[name] = candidate
                break
    return choose
