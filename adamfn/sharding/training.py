"""`sharded`: an optimizer that steps the shards of leaves."""

from typing import Any

import jax
from jax.sharding import AxisType

from adamfn.chains.chain import Chain, Wrapped, chain_of
from adamfn.chains.packed import packed_chain_of
from adamfn.chains.segment import Wanted
from adamfn.chains.transform import (
    GradientTransformation,
    check_transformation,
    summary,
)
from adamfn.core.placement import Path, Shards, place
from adamfn.sharding.states import shardings_of
from adamfn.trees import PyTree, as_array, check_inexact


def sharded(
    tx: GradientTransformation, shardings: PyTree, zero_axis: str | None = None
) -> GradientTransformation:
    """The same optimizer on a mesh of devices, each of which steps its shards of the leaves.

    XLA cannot partition native code and kernels. So the fused program of each leaf runs inside
    `jax.shard_map`, on the part of the leaf's moments that a device has and the same part of
    gradient and parameter; XLA then gathers the results where the parameter belongs. The codes are
    those of one device: random bits are made from an element's index in the whole leaf.

    The norm of `clip_by_global_norm` is that of the global gradients, and its factor a scalar of
    the program on the shards. XLA partitions the formulas that need a statistic of their leaf
    (`clip_updates`, `cautious_updates`, `lazy_adam`), and all programs of a leaf whose format does
    not say how it is cut, or on a mesh of which some axes are explicit and some are not. Inside
    `jax.shard_map` a shard is a leaf, and this does nothing.

    With `zero_axis` moments are split further along that axis. `init` places the state as
    `state_shardings` of the same arguments says, which is for `in_shardings` of `jax.jit` and for
    checkpoints. Without `sharded`, every optimizer of ours steps on shards if all axes of the mesh
    are explicit.

    Args:
      tx: a recipe, or a chain; parts of it that are not ours run as always.
      shardings: a `NamedSharding` for each parameter, or for each subtree of them; one serves all.
      zero_axis: the name of a mesh axis, usually the one that the batch is split along.

    Returns:
      A `GradientTransformation` with the same state. In a `chain` it is not fused with others.

    Raises:
      TypeError, ValueError: `tx` is of another library, or `packed`; at `init` and `update` as
        `state_shardings`, and if a shard would cut a block, which `whole_blocks` mends; names the
        leaf.

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
            " inside. Leave `packed` out."
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

    def adjusted(self, wanted: Wanted, like: PyTree) -> Wanted:
        return wanted if _inside_shard_map() else wanted._replace(shards=self._laid_out(like)[0])

    def _laid_out(self, params: PyTree) -> tuple[dict[Path, Shards], PyTree]:
        """How the leaves are split, and the shardings of the state."""
        check_inexact(params, "sharded: params")
        leaves, treedef = jax.tree.flatten(params)
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in map(as_array, leaves)]
        key = treedef, *((x.shape, x.dtype) for x in shapes)
        if key not in self._known:
            like = treedef.unflatten(shapes)
            # There are shardings of leaves that a wrapper has masked, too.
            placed, mesh = place("sharded", like, self._shardings, all_used=False)
            state = jax.eval_shape(self.inner.init, like)
            laid_out, split = shardings_of("sharded", state, placed, mesh, self._zero_axis)
            shards = {path: Shards(mesh, split[path], placed[path].axes) for path in placed}
            self._known[key] = shards, laid_out
        return self._known[key]


def _inside_shard_map() -> bool:
    return AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types
