# SPDX-License-Identifier: Apache-2.0
"""`sharded`: an optimizer that steps the shards of leaves."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from adamfn.chains.chain import Chain, Wrapped, chain_of
from adamfn.chains.leaves import Request
from adamfn.chains.packed import packed_chain_of
from adamfn.chains.transform import GradientTransformation, check_transformation
from adamfn.core.placement import Path, Shards
from adamfn.sharding.state_shardings import lay_out
from adamfn.trees import PyTree, check_inexact, shown


def sharded(
    tx: GradientTransformation, shardings: PyTree, zero_axis: str | None = None
) -> GradientTransformation:
    """The same optimizer on a mesh of devices, each of which steps its shards of the leaves.

    XLA cannot partition native code and kernels. So the fused program of each leaf runs inside
    `jax.shard_map`, on a device's part of moments, gradient and parameter; XLA then gathers the
    results where the parameter belongs. The codes are those of one device. Without `sharded` this
    happens where all axes of the mesh are explicit.

    `clip_by_global_norm` takes the norm of the global gradients. XLA partitions formulas that need
    a statistic of their leaf (`clip_updates`, `cautious_updates`, `lazy_adam`), and all programs of
    a leaf whose format does not say how it is cut, or on a mesh with axes of several types. Inside
    `jax.shard_map` a shard is a leaf, and this does nothing.

    `tx` is a recipe, or a chain, whose parts that are not ours run as always. Other arguments are
    those of `state_shardings`, which says how `init` places the state. In a `chain` it is not fused
    with others.

    Raises:
      TypeError, ValueError: `tx` is of another library, or `packed`; at `init` and `update` as
        `state_shardings`, and if a shard would cut a block, which `whole_blocks` mends.

    >>> from functools import partial
    >>> import adamfn, jax, jax.numpy as jnp
    >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> everywhere = jax.NamedSharding(mesh, jax.P())
    >>> tx = adamfn.sharding.sharded(adamfn.adamw(moments="8bit"), everywhere, zero_axis="data")
    >>> params = jax.device_put({"w": jnp.ones((512, 1024))}, everywhere)
    >>> state = tx.init(params)
    >>> print(tuple(state[0].mu["w"].sharding.spec))
    ('data',)
    >>> params, state = jax.jit(partial(adamfn.step, tx))(params, state, params)
    """
    check_transformation("sharded: the first argument", tx)
    inner = chain_of(tx)
    if inner is None or packed_chain_of(tx) is not None:
        raise ValueError(
            f"sharded: found {'a packed chain' if inner else shown(tx)}; expected another"
            " transformation of adamfn's. Leave `packed` out: a long leaf is on one device. Put"
            " others around it: optax.MultiSteps(sharded(adamw(), shardings), 4)."
        )
    return _Sharded(inner, shardings, zero_axis).transformation


class _Sharded(Wrapped):
    def __init__(self, inner: Chain, shardings: PyTree, zero_axis: str | None) -> None:
        super().__init__(inner)
        self._shardings, self._zero_axis = shardings, zero_axis

    def init(self, params: PyTree) -> PyTree:
        if _inside_shard_map():
            return self.inner.init(params)
        return jax.jit(self.inner.init, out_shardings=self._laid_out(params)[0])(params)

    def adjusted(self, request: Request, updates: PyTree) -> Request:
        if _inside_shard_map():
            return request
        like = updates if request.params is None else request.params
        return request._replace(shards=self._laid_out(like)[1])

    def _laid_out(self, params: PyTree) -> tuple[PyTree, dict[Path, Shards]]:
        """The shardings of the state, and how the leaves are split."""
        check_inexact(params, "sharded: params")
        like = jax.tree.map(
            lambda p: jax.ShapeDtypeStruct(jnp.shape(p), jnp.result_type(p)), params
        )
        given = self._shardings, self._zero_axis
        # There are shardings of leaves that a wrapper has masked, too.
        return lay_out("sharded", self.inner.init, like, *given, all_used=False)


def _inside_shard_map() -> bool:
    return AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types
