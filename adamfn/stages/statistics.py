# SPDX-License-Identifier: Apache-2.0
"""Stages that need a statistic of each leaf, or of each layer where layers are stacked."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from operator import not_
from typing import Any

import jax
import jax.numpy as jnp

from adamfn.chains.chain import chain, from_stage
from adamfn.chains.transform import GradientTransformation
from adamfn.core import formulas
from adamfn.core.averages import decay, decays_of
from adamfn.core.hyperparameters import scalar
from adamfn.core.masks import Mask, broadcast_mask
from adamfn.core.stage import Scalars, Stage
from adamfn.trees import Numeric, PyTree, described, path_name


def cautious_updates(floor: Numeric = 1e-3, *, stacked: Mask = None) -> GradientTransformation:
    r"""Keeps updates whose sign is their gradient's, and scales them up for those it drops.

    With the share s of the elements of a leaf whose update and gradient agree:

    $$ u \leftarrow \frac{\mathbb 1(u g > 0)\, u}{\max(s, s_\text{min})}, \qquad
    s = \operatorname{mean} \mathbb 1(u g > 0) $$

    g is the gradient that the adamfn stage of moments before it was given; `update` refuses a chain
    without one, such as optax's. After `bias_correct`, and before the decay and `scale_by_lr`,
    which turns signs, it makes AdamW the paper's C-AdamW. Inside `jax.shard_map` the share is that
    of a shard. Complex numbers agree if their angle is below a right one. Source: Liang et al.,
    Cautious Optimizers: Improving Training with One Line of Code, 2024, algorithms 1 and 2 (arXiv
    2411.16085), which divide by s + eps, or by s + 1/n; the floor is in the authors' later code.

    Args:
      floor: $s_\text{min}$, at least 0.
      stacked: which leaves hold layers along their first axis, each with its own share: given like
        the mask of `add_decayed_weights`, such as `adamfn.masks.named("layers")`. None for none.

    >>> import adamfn, jax.numpy as jnp
    >>> tx = adamfn.chain(adamfn.scale_by_moments(b1=0.9, b2=0.0), adamfn.cautious_updates())
    >>> _, state = tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    >>> print(tx.update(jnp.array([1.0, -0.1]), state)[0].round(2))  # one points the old way
    [0.38 0.  ]
    """
    least, name, formula = scalar("floor", floor), "cautious_updates", formulas.where_agreeing
    stage = Stage(name, formula, ("grads",), scalars=lambda *_: ((least,), {}), elementwise=False)
    return _by_layer(stage, formulas.where_agreeing_by_layer, stacked)


def clip_updates(
    b2: Numeric | None = None, eps: Numeric = 1e-8, *, stacked: Mask = None
) -> GradientTransformation:
    r"""Divides the updates of a leaf by how far its gradients have outgrown their average squares.

    With v of the stage of moments before it, after this step, and $\hat v = v / (1 - b_2^t)$:

    $$ u \leftarrow \frac{u}{\max(1, R)}, \qquad
    R = \sqrt{\operatorname{mean} \frac{g^2}{\max(\hat v, \epsilon^2)}} $$

    The mean is over a leaf. g and stacked are as in `cautious_updates`, eps as in `adam`; b2 is
    that of the moments, and need not be given. Just before `scale_by_lr`, with b2 of 0.99 and eps
    of 1e-6 in all stages, it makes AdamW the paper's StableAdamW, which clips the decay too; before
    `add_decayed_weights` it does not. Sources: Wortsman et al., Stable and Low-Precision Training
    for Large-Scale Vision-Language Models, 2023, algorithm 2 (arXiv 2304.13013); Shazeer and Stern,
    Adafactor, 2018, section 6.

    >>> import adamfn, jax.numpy as jnp
    >>> parts = adamfn.scale_by_moments(b1=0), adamfn.bias_correct(), adamfn.clip_updates()
    >>> tx, g = adamfn.chain(*parts), jnp.array([1.0, -1.0])
    >>> _, state = tx.update(g, tx.init(g))
    >>> print(tx.update(9 * g, state)[0].round(2))  # without it 1.41
    [ 1. -1.]
    """
    given, eps = None if b2 is None else decay("b2", b2), scalar("eps", eps)

    def scalars(count: jax.Array, state: Any, extra: Mapping[str, Any]) -> Scalars:
        c2 = decays_of("clip_updates", extra["decays"], None, given)[1].bias(count)
        return (c2, c2 * eps * eps), {}

    name, formula = "clip_updates", formulas.clip_outgrown
    stage = Stage(name, formula, ("grads", "nu"), scalars=scalars, elementwise=False)
    return _by_layer(stage, formulas.clip_outgrown_by_layer, stacked)


def _by_layer(stage: Stage, formula: Callable[..., Any], stacked: Mask) -> GradientTransformation:
    """The transformation of a stage, with another formula for stacked leaves."""
    if stacked is None:
        return from_stage(stage)

    def mask(params: PyTree) -> PyTree:
        leaves, treedef = jax.tree.flatten_with_path(params)
        found = broadcast_mask(f"{stage.name}: stacked", stacked, params)
        for (path, leaf), yes in zip(leaves, found, strict=True):
            if yes and jnp.ndim(leaf) == 0:
                raise ValueError(
                    f"{stage.name}: the leaf at {path_name(path) or 'the root'} is"
                    f" {described(leaf)}; expected an axis of layers, as `stacked` has it."
                )
        return treedef.unflatten(found)

    whole = replace(stage, mask=lambda params: jax.tree.map(not_, mask(params)))
    return chain(from_stage(whole), from_stage(replace(stage, mask=mask, formula=formula)))
