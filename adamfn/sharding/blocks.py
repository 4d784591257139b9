"""`whole_blocks`: blocks that no shard of a leaf cuts."""

from typing import Any, cast

import jax
import jax.numpy as jnp

from adamfn.core.placement import place, size
from adamfn.formats import Format, Moments, check_moments, get
from adamfn.formats.blocks import cut_block, size_for
from adamfn.formats.format import answer
from adamfn.sharding.states import split_further
from adamfn.trees import PyTree, path_name


def whole_blocks(
    moments: Moments, params: PyTree, shardings: PyTree, zero_axis: str | None = None
) -> Moments:
    """The same formats, in blocks that no shard of a leaf has only a part of.

    Where a device's part of the last axis is no multiple of a block, the largest smaller block
    that divides it is taken, down to 16; a block costs 12 bytes in `"8bit"` and `"4bit"`, 4 in
    `"factored"` and `"blockmean"`. Where none does, the leaf is kept in `"bfloat16"`.

    Args:
      moments: as recipes take it.
      params: the parameters, or their shapes and dtypes.
      shardings: as `state_shardings` and `sharded` take them.
      zero_axis: likewise.

    Returns:
      What `moments=` takes: a function of a leaf's path and the leaf.

    Raises:
      TypeError, ValueError: as `state_shardings`, and as recipes do of `moments`.

    >>> import adamfn
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jax.sharding import AbstractMesh
    >>> mesh = AbstractMesh((4,), ("model",))
    >>> params = {"w": jax.ShapeDtypeStruct((512, 768), jnp.float32)}
    >>> split = jax.NamedSharding(mesh, jax.P(None, "model"))  # 192 of a row on a device
    >>> moments = adamfn.sharding.whole_blocks("8bit", params, split)
    >>> print(moments("w", params["w"]))
    EightBit(block=192)
    """
    moments = check_moments(moments)
    placed, mesh = place("whole_blocks", params, shardings)
    chosen: dict[str, Format] = {}
    leaves = cast("list[tuple[Any, Any]]", jax.tree.leaves_with_path(params))
    for path, leaf in leaves:
        format = _format(moments, path_name(path), leaf)
        block = answer(format, "block")
        if not block or not format.holds(leaf.shape, leaf.dtype):
            continue
        for smaller in range(block, 15, -16):
            exact = size_for(leaf.shape[-1], smaller)
            candidate, axes = answer(format, "resized")(exact), placed[path].axes
            if zero_axis is not None:
                arrays = _stored(candidate, leaf.shape)
                axes = split_further(placed[path], zero_axis, arrays, mesh)
            if cut_block(exact, leaf.shape, size(axes[-1], mesh)) is None:
                chosen[path_name(path)] = candidate
                break
        else:
            chosen[path_name(path)] = get("bfloat16")
    return lambda path, leaf: chosen[path] if path in chosen else _format(moments, path, leaf)


def _format(moments: Moments, path: str, leaf: Any) -> Format:
    return get(moments(path, leaf) if callable(moments) else moments)


def _stored(format: Format, shape: tuple[int, ...]) -> list[Any]:
    """The shapes of what a format keeps of a leaf."""
    moment = jax.ShapeDtypeStruct(shape, jnp.float32)
    noise = jax.ShapeDtypeStruct(shape, jnp.uint32)
    stored = jax.tree.leaves(jax.eval_shape(format.encode, moment, moment, noise))
    return [x for x in stored if len(x.shape) == len(shape)]
