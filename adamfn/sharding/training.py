"""`sharded`: an optimizer whose steps run on the shards of leaves."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AxisType

from adamfn.chains.chain import Chain, Moved, Wrapped, chain_of
from adamfn.chains.packed import packed_chain_of
from adamfn.chains.segment import Wanted
from adamfn.chains.transform import (
    GradientTransformation,
    check_transformation,
    summary,
    where_updated,
)
from adamfn.core.placement import Path, Shards, place
from adamfn.sharding.states import shardings_of, with_zero
from adamfn.trees import PyTree, as_array, check_inexact


def sharded(
    tx: GradientTransformation, shardings: PyTree, zero_axis: str | None = None
) -> GradientTransformation:
    """The same optimizer on a mesh of devices, each of which steps its own shards of the leaves.

    XLA partitions its own operations, and cannot partition native code and kernels. So each leaf's
    program runs inside `jax.shard_map`, on whatever part of the leaf's moments a device keeps. Of
    gradient and parameter it takes the same part, and XLA gathers what it makes of them where the
    parameter belongs. What is stored is what one device would store: the noise of rounding is made
    from an element's number in the whole leaf.

    With `zero_axis` moments are split along that axis further, as `state_shardings` does it.
    `init` lays the state out so; `state_shardings` of the same arguments says how, for
    `in_shardings` of `jax.jit` and for checkpoints.

    A leaf goes through XLA as without this where a stage looks at all of it, as `clip_updates` and
    `cautious_updates` do, or a format is not one of ours. So does everything inside of
    `jax.shard_map`, and on a mesh of which some axes are explicit and some are not.

    Where all axes of the mesh are explicit, every optimizer of ours takes its steps so by itself.

    Args:
      tx: a recipe, or a chain; parts of it that are not ours run as always.
      shardings: a `NamedSharding` for each parameter, or for each subtree of them; one serves all.
      zero_axis: the name of a mesh axis, usually the one that the batch is split along.

    Returns:
      A `GradientTransformation` with the same state. In a `chain` it is not joined with others.

    Raises:
      TypeError, ValueError: `tx` is of another library, or `packed`; at `init` and `update` as
        `state_shardings`, and where a device would have a part of a block, which `whole_blocks`
        mends; names the leaf.

    References:
      As `state_shardings`, for the axis.

    >>> from functools import partial
    >>> import adamfn
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jax.sharding import AxisType
    >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    >>> everywhere = jax.NamedSharding(mesh, jax.P())
    >>> tx = adamfn.adamw(1e-3, moments="8bit")
    >>> tx = adamfn.sharding.sharded(tx, everywhere, zero_axis="data")
    >>> params = jax.device_put({"w": jnp.ones((512, 1024))}, everywhere)
    >>> state = tx.init(params)
    >>> print(tuple(state[0].mu["w"].sharding.spec))
    ('data',)
    >>> grads = params
    >>> params, state = jax.jit(partial(adamfn.step, tx))(grads, state, params)
    """
    check_transformation("sharded: the first argument", tx)
    inner = chain_of(tx)
    if inner is None:
        raise ValueError(
            f"sharded: found {summary(tx)}; expected a transformation of adamfn's. Put other"
            " transformations around it: optax.MultiSteps(sharded(adamw(), shardings), 4)."
        )
    if packed_chain_of(tx) is not None:
        raise ValueError(
            "sharded: found a packed chain, whose long leaves are on one device; expected the chain"
            " that it was made of. Leave `packed` out."
        )
    return _Sharded(inner, shardings, zero_axis).transformation


class _Sharded(Wrapped):
    def __init__(self, inner: Chain, shardings: PyTree, zero_axis: str | None) -> None:
        super().__init__(inner)
        self._shardings, self._zero_axis = shardings, zero_axis
        self._known: dict[Any, tuple[dict[Path, Shards], PyTree]] = {}

    def init(self, params: PyTree) -> PyTree:
        if _inside_shard_map():
            return self.inner.init(params)
        return jax.jit(self.inner.init, out_shardings=self._laid_out(params)[1])(params)

    def advance(
        self,
        updates: PyTree,
        state: PyTree,
        params: PyTree,
        extra: Mapping[str, Any],
        wanted: Wanted,
    ) -> Moved:
        if not _inside_shard_map():
            like = updates if params is None else where_updated(params, updates)
            wanted = wanted._replace(shards=self._laid_out(like)[0])
        return self.inner.advance(updates, state, params, extra, wanted)

    def _laid_out(self, params: PyTree) -> tuple[dict[Path, Shards], PyTree]:
        """How the leaves are split, and the shardings of the state."""
        check_inexact(params, "sharded: params")
        leaves, treedef = jax.tree.flatten(params)
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in map(as_array, leaves)]
        key = treedef, *((x.shape, x.dtype) for x in shapes)
        if key not in self._known:
            like = treedef.unflatten(shapes)
            # Leaves that a wrapper has masked have shardings all the same.
            placed, mesh = place("sharded", like, self._shardings, all_used=False)
            state = jax.eval_shape(self.inner.init, like)
            owners, split = with_zero("sharded", state, placed, self._zero_axis, mesh)
            shards = {path: Shards(mesh, split[path].axes, placed[path].axes) for path in placed}
            self._known[key] = shards, shardings_of(state, owners, split, mesh)
        return self._known[key]


def _inside_shard_map() -> bool:
    return AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types
