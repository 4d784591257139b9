"""`sharded`: an optimizer whose steps run on the shards of leaves."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jax
from jax.sharding import AxisType

from adamfn.backends.shards import Shards
from adamfn.chains.chain import structure_of
from adamfn.chains.segment import Wanted
from adamfn.chains.step import assemble, own_of
from adamfn.chains.transform import GradientTransformation, check_transformation, where_updated
from adamfn.core.placement import Path, place
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
    own = own_of(tx)
    if own is None:
        raise ValueError(
            f"sharded: found {tx!r}; expected a transformation of adamfn's. Put what is not ours"
            " around it: optax.MultiSteps(sharded(adamw(), shardings), 4)."
        )
    if hasattr(tx.update, "repacked"):
        raise ValueError(
            "sharded: found what `packed` made, whose buffers lie whole on one device; expected the"
            " chain that it was made of. Leave `packed` out."
        )

    @lru_cache(maxsize=8)
    def known(treedef: Any, leaves: tuple[Any, ...]) -> tuple[dict[Path, Shards], PyTree]:
        params = treedef.unflatten(leaves)
        # Leaves that a wrapper has masked have shardings all the same.
        placed, mesh = place("sharded", params, shardings, all_used=False)
        state = jax.eval_shape(tx.init, params)
        owners, split = with_zero("sharded", state, placed, zero_axis, mesh)
        shards = {path: Shards(mesh, split[path].axes, placed[path].axes) for path in placed}
        return shards, shardings_of(state, owners, split, mesh)

    def laid_out(params: PyTree) -> tuple[dict[Path, Shards], PyTree]:
        """How the leaves are split, and the shardings of the state."""
        check_inexact(params, "sharded: params")
        leaves, treedef = jax.tree.flatten(params)
        arrays = map(as_array, leaves)
        return known(treedef, tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays))

    def init(params: PyTree) -> PyTree:
        if _inside_shard_map():
            return tx.init(params)
        return jax.jit(tx.init, out_shardings=laid_out(params)[1])(params)

    def advance(
        updates: PyTree, state: PyTree, params: PyTree, extra: Mapping[str, Any], wanted: Wanted
    ) -> tuple[PyTree, PyTree, PyTree]:
        if not _inside_shard_map():
            like = updates if params is None else where_updated(params, updates)
            wanted = wanted._replace(shards=laid_out(like)[0])
        return own.advance(updates, state, params, extra, wanted)

    return assemble(init, advance, own.takes, made_of=structure_of(tx))


def _inside_shard_map() -> bool:
    return AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types
