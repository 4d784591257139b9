"""`fused_adam` and `fused_adamw`: a training update in one pass over the memory."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp

from adamfn.adam import adam, adamw
from adamfn.ema import increment
from adamfn.fused.groups import Plan, step_leaves
from adamfn.fused.packing import may_pack, pack
from adamfn.fused.primitive import group_step, pallas_group_step
from adamfn.fused.reference import step_group
from adamfn.fused.scalars import Scalars, scalars_at
from adamfn.fused.state import WAY_OUT, FusedAdamState, check_moments, from_chain, to_chain
from adamfn.hyperparams import ScalarOrSchedule, scheduled, value_at
from adamfn.state import check_state
from adamfn.step import SteppingTransformation
from adamfn.storage import Moments, choose_formats, zero_moments
from adamfn.transform import GradientTransformation
from adamfn.trees import PyTree, matching_leaves
from adamfn.weight_decay import broadcast_mask

Backend = Literal["auto", "xla", "pallas"]
"""What runs a step: the fastest known where it is lowered, plain XLA, or Pallas kernels."""

_STEP_GROUP: dict[Backend, Callable[..., list[jax.Array]]] = {
    "auto": group_step,
    "xla": step_group,
    "pallas": pallas_group_step,
}
_LEAVES_OF_A_CALL = 16


def fused_adam(
    learning_rate: ScalarOrSchedule = 1e-3,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    eps_root: chex.Numeric = 0.0,
    *,
    nesterov: bool = False,
    moments: Moments = "float32",
    packed: bool = True,
    backend: Backend = "auto",
) -> SteppingTransformation:
    r"""`adam` whose `step` goes over gradients, moments and parameters once.

    $$
    \theta \leftarrow \theta - \alpha \frac{\hat m}{\sqrt{\hat v + \epsilon_\text{root}} + \epsilon}
    $$

    with $\hat m$ and $\hat v$ as in `adam`. `adamfn.step(tx, grads, state, params)` takes the step.
    On CPU it runs in native code, which a C++ compiler of the system makes at the first use
    (`adamfn.fused.backend()` says whether it could); on GPU and TPU XLA fuses it. `update` is
    `adam`'s, so that it composes; it unpacks the moments and packs them again.

    Gradients and parameters in float32 and bfloat16 and moments in float32, bfloat16 and 8 bits go
    the short way; every other leaf goes through XLA, with the same result. Between the formulas
    nothing is rounded to the gradient's dtype: a bfloat16 parameter is rounded once.

    Args:
      learning_rate: as in `adam`; `step(..., learning_rate=x)` wins over it.
      b1: as in `adam`.
      b2: as in `adam`.
      eps: as in `adam`.
      eps_root: as in `adam`.
      nesterov: as in `adam`.
      moments: as in `adam`.
      packed: whether the float32 moments of leaves under 32768 elements share buffers, which makes
        the calls of many small leaves cheaper. Leaves that lie on several devices are not packed,
        nor are traced ones, of which that cannot be seen, where JAX has several.
      backend: `"auto"`; `"xla"` for no native code; `"pallas"` for Pallas kernels, which were run
        in interpret mode on CPU only, and for GPU and TPU no more than compiled, so that whether
        they beat XLA there is not known, and they are not the default.

    Returns:
      A `SteppingTransformation`, whose state is a `FusedAdamState`; `adamfn.fused.to_chain` and
      `from_chain` move it to `adam`'s and back.

    Raises:
      TypeError, ValueError: as `adam`; at `step`, gradients, parameters or a state that do not fit.

    References:
      Kingma and Ba, Adam: A Method for Stochastic Optimization, 2015, algorithm 1
      (arXiv 1412.6980).

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> tx = adamfn.fused_adam(learning_rate=0.25)
    >>> params = {"w": jnp.array([1.0, -2.0])}
    >>> params, state = adamfn.step(tx, {"w": jnp.array([3.0, -5.0])}, tx.init(params), params)
    >>> print(params["w"])
    [ 0.75 -1.75]
    """
    chain = adam(learning_rate, b1, b2, eps, eps_root, nesterov=nesterov, moments=moments)
    scalars = scalars_at(b1, b2, eps, eps_root, nesterov=nesterov)
    rates = _Rates(scheduled("learning_rate", learning_rate), None, None)
    return _fused("fused_adam", chain, scalars, rates, nesterov, moments, packed, backend)


def fused_adamw(
    learning_rate: ScalarOrSchedule = 1e-3,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    eps_root: chex.Numeric = 0.0,
    *,
    weight_decay: ScalarOrSchedule = 1e-2,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    nesterov: bool = False,
    moments: Moments = "float32",
    packed: bool = True,
    backend: Backend = "auto",
) -> SteppingTransformation:
    r"""`adamw` whose `step` goes over gradients, moments and parameters once.

    $$
    \theta \leftarrow \theta - \alpha \Big(
      \frac{\hat m}{\sqrt{\hat v + \epsilon_\text{root}} + \epsilon} + \lambda \theta
    \Big)
    $$

    Args:
      learning_rate: as in `fused_adam`.
      b1: as in `adam`.
      b2: as in `adam`.
      eps: as in `adam`.
      eps_root: as in `adam`.
      weight_decay: as in `adamw`.
      mask: as in `adamw`.
      nesterov: as in `adam`.
      moments: as in `adam`.
      packed: as in `fused_adam`.
      backend: as in `fused_adam`.

    Returns:
      A `SteppingTransformation`, as `fused_adam` does; its `update` needs `params`.

    Raises:
      TypeError, ValueError: as `adamw` and `fused_adam`.

    References:
      Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019, algorithm 2
      (arXiv 1711.05101).

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> tx = adamfn.fused_adamw(learning_rate=0.1, weight_decay=0.5)
    >>> params = jnp.array([2.0])
    >>> params, state = adamfn.step(tx, jnp.array([0.0]), tx.init(params), params)
    >>> print(params)
    [1.9]
    """
    chain = adamw(
        learning_rate,
        b1,
        b2,
        eps,
        eps_root,
        weight_decay=weight_decay,
        mask=mask,
        nesterov=nesterov,
        moments=moments,
    )
    scalars = scalars_at(b1, b2, eps, eps_root, nesterov=nesterov)
    rates = _Rates(
        scheduled("learning_rate", learning_rate), scheduled("weight_decay", weight_decay), mask
    )
    return _fused("fused_adamw", chain, scalars, rates, nesterov, moments, packed, backend)


class _Rates(NamedTuple):
    learning_rate: ScalarOrSchedule
    weight_decay: ScalarOrSchedule | None
    mask: Any

    def decays(self, params: PyTree) -> list[bool]:
        """Of each leaf: whether weight decay moves it."""
        if self.weight_decay is None or self.mask is None:
            return [self.weight_decay is not None] * len(jax.tree.leaves(params))
        return [bool(yes) for yes in jax.tree.leaves(broadcast_mask(self.mask, params))]


def _fused(
    name: str,
    chain: GradientTransformation,
    scalars: Callable[..., Scalars],
    rates: _Rates,
    nesterov: bool,
    moments: Moments,
    packed: bool,
    backend: Backend,
) -> SteppingTransformation:
    if backend not in get_args(Backend):
        raise ValueError(f"{name}: backend is {backend!r}; expected one of {get_args(Backend)}.")

    def init(params: PyTree) -> FusedAdamState:
        mu, nu = zero_moments(name, params, moments)
        leaves, treedef = jax.tree.flatten(params)
        formats = choose_formats(moments, params)
        small = [
            number
            for number, (leaf, format) in enumerate(zip(leaves, formats, strict=True))
            if packed and format is None and may_pack(leaf)
        ]
        count = jnp.zeros((), jnp.int32)
        rate = jnp.asarray(value_at("learning_rate", rates.learning_rate, count), float)
        return FusedAdamState(count, pack(mu, treedef, small), pack(nu, treedef, small), rate)

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, FusedAdamState]:
        like = jax.eval_shape(chain.init, updates)
        state = check_state(name, state, FusedAdamState)
        updates, moved = chain.update(updates, to_chain(state, like, updates), params, **extra)
        return updates, from_chain(moved, state, updates)

    def step(
        grads: PyTree,
        state: PyTree,
        params: PyTree,
        *,
        learning_rate: ScalarOrSchedule | None = None,
        **extra: Any,
    ) -> tuple[PyTree, FusedAdamState]:
        state = check_state(name, state, FusedAdamState)
        matching_leaves({"grads": grads, "params": params}, name, (), WAY_OUT)
        formats = choose_formats(moments, params)
        check_moments(name, state, params, formats)

        chosen = (
            rates.learning_rate
            if learning_rate is None
            else scheduled("learning_rate", learning_rate)
        )
        rate = value_at("learning_rate", chosen, state.count)
        decay = rates.weight_decay
        decay = 0.0 if decay is None else value_at("weight_decay", decay, state.count)
        count = increment(state.count)
        at_step = scalars(count, decay, rate)

        together = _LEAVES_OF_A_CALL if backend == "auto" else 1
        plan = Plan(formats, rates.decays(params), nesterov, _STEP_GROUP[backend], together)
        mu, nu, params = step_leaves(plan, grads, params, state.mu, state.nu, count, at_step)
        return params, FusedAdamState(count, mu, nu, jnp.asarray(rate, float))

    return SteppingTransformation(init, update, step)
