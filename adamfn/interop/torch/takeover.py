"""`from_state_dict`: a torch run goes on here."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adamfn.chains.transform import GradientTransformation
from adamfn.core.hyperparameters import ScalarOrSchedule
from adamfn.interop.growing import by_group
from adamfn.interop.states import fill_moments, leaves_by_path
from adamfn.interop.torch.chains import continue_with
from adamfn.interop.torch.members import Member, check_settings, member_of
from adamfn.interop.torch.parameters import (
    Layout,
    Paths,
    TorchParameter,
    array_of,
    laid_out,
    match,
    number_of,
    parameters_of,
)
from adamfn.interop.torch.quantized import with_plain_moments
from adamfn.trees import PyTree, check_inexact, describe, wide_dtype


class _Kept(NamedTuple):
    """torch's state of one leaf."""

    scalars: tuple[float, ...]
    arrays: Mapping[str, jax.Array]


def from_state_dict(
    state_dict: Mapping[str, Any],
    params: PyTree,
    *,
    paths: Paths = None,
    layout: Layout | None = None,
    optimizer: str | None = None,
    learning_rate: ScalarOrSchedule | None = None,
    fresh: Collection[str] = (),
    harmless: Collection[str] = (),
) -> tuple[GradientTransformation, PyTree]:
    """Continues a torch run: the transformation and the state that go on from its state dict.

    Args:
      state_dict: `optimizer.state_dict()` of torch.optim's `Adam`, `AdamW` (both also with
        `amsgrad`), `NAdam`, `RAdam`, `Adamax` or `SparseAdam`, with tensors or arrays; or of
        the AdamW of transformers, timm or bitsandbytes (8 bits too), or FusedAdam of apex or
        DeepSpeed. The hyperparameters of each of its groups are taken over, also `maximize`.
      params: the parameters in JAX: any pytree of real floating-point arrays. Their values are
        not used.
      paths: the leaf of each torch parameter. None: they have one order. A sequence: the path of
        the leaf, such as `layers/0/kernel`, for each torch parameter in its order. A mapping: from
        the parameter's name (if the state dict has names) or number to the path. A path of None
        leaves that parameter out.
      layout: a function of a leaf's path and an array laid out as torch's parameter, which lays
        it out as the leaf, such as `to_flax`. None: both have one layout.
      optimizer: the name of torch's class, if the state dict does not tell: that of torch before
        2.7 does not tell `Adam` from `AdamW`.
      learning_rate: replaces the state dict's rates; a schedule goes on from torch's count.
      fresh: paths of leaves that torch has taken no step with and that begin here. Without it they
        are an error: torch leaves frozen parameters alone, and here they would be trained.
      harmless: keys of groups to be ignored, such as your own notes.

    Returns:
      A `GradientTransformation`, and its state after the steps that torch took. With several
      groups or step counts, the state is a tuple with one part for each.

    Raises:
      TypeError, ValueError: a state dict of another optimizer; missing keys; keys of groups that
        are unknown or that no chain does; sparse or complex tensors; parameters and leaves that do
        not match; frozen parameters. The message names the parameter.

    >>> import numpy as np
    >>> from adamfn.interop.torch import from_state_dict
    >>> moments = {"exp_avg": np.full((3, 2), 0.1), "exp_avg_sq": np.full((3, 2), 0.01)}
    >>> group = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    >>> group |= {"amsgrad": False, "decoupled_weight_decay": True, "params": [0]}
    >>> state_dict = {"state": {0: {"step": 7, **moments}}, "param_groups": [group]}
    >>> params = {"kernel": np.ones((2, 3), np.float32)}
    >>> tx, state = from_state_dict(state_dict, params, layout=lambda path, array: array.T)
    >>> print(state[0].count, state[0].mu["kernel"].shape)
    7 (2, 3)
    """
    check_inexact(params, "from_state_dict: params")
    leaves = {path: leaf for path, leaf in leaves_by_path(params).items() if leaf is not None}
    if not leaves:
        raise ValueError("interop.torch: params has no leaves; expected a model's parameters.")
    matched = match(parameters_of(state_dict), list(leaves), paths)

    # Leaves of one group after one number of steps share a transformation, and its counts.
    kept: dict[str, _Kept] = {}
    group_of: dict[str, int] = {}
    groups: dict[Any, tuple[GradientTransformation, Mapping[str, float]]] = {}
    for path, parameter in matched.items():
        member = member_of(parameter, optimizer)
        check_settings(parameter, harmless)
        kept[path] = _kept(with_plain_moments(parameter), member, path, leaves[path], layout)
        key = (parameter.group_index, *kept[path].scalars)
        if key not in groups:
            tx = continue_with(member, parameter, optimizer, learning_rate)
            groups[key] = tx, dict(zip(member.scalars, kept[path].scalars, strict=True))
        group_of[path] = list(groups).index(key)
    _check_steps(matched, fresh)

    def filled(state: PyTree, scalars: Mapping[str, float]) -> PyTree:
        more = {k: jnp.asarray(v, float) for k, v in scalars.items() if k != "step"}
        count = jnp.asarray(int(scalars["step"]), jnp.int32)
        return fill_moments(state, count, lambda field, path, _: kept[path].arrays[field], **more)

    transformations, scalars = zip(*groups.values(), strict=True)
    if len(transformations) == 1:
        return transformations[0], filled(transformations[0].init(params), scalars[0])
    tx = by_group(group_of, list(transformations))
    return tx, tuple(filled(*part) for part in zip(tx.init(params), scalars, strict=True))


def _check_steps(matched: Mapping[str, TorchParameter], fresh: Collection[str]) -> None:
    """Checks that every parameter has taken a step, or is to begin here, or none has."""
    if isinstance(fresh, str) or not matched.keys() >= {*fresh}:
        raise ValueError(
            f"interop.torch: fresh is {fresh!r}; expected a list of some of the leaves"
            f" {', '.join(matched)}."
        )
    still = [path for path in matched if not matched[path].state and path not in fresh]
    if still and any(parameter.state for parameter in matched.values()):
        raise ValueError(
            f"interop.torch: no step was taken with {matched[still[0]]}, matched with {still[0]}:"
            " it is frozen (requires_grad=False), or got no gradient. Leave it out of params, with"
            f" a path of None; or, to train it from here on, pass fresh={still!r}."
        )


def _kept(
    parameter: TorchParameter, member: Member, path: str, leaf: Any, layout: Layout | None
) -> _Kept:
    shape, dtype = np.shape(leaf), jnp.result_type(leaf)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"interop.torch: the leaf at {path} is {describe(leaf)}; expected a real one. torch"
            " keeps second moments of a complex number's two parts, adamfn one of its modulus."
        )
    zeros = {field: jnp.zeros(shape, wide_dtype(dtype)) for field in member.keys}
    if not parameter.state:  # torch has taken no step with it yet
        fresh = {"step": 0.0, "mu_product": 1.0}
        return _Kept(tuple(fresh[key] for key in member.scalars), zeros)
    state = {"step": parameter.group.get("step")} | dict(parameter.state)  # apex counts in groups
    # If amsgrad was turned on in mid-run, torch begins its maximum at zero.
    needed = {*member.scalars, *member.keys.values()} - {"max_exp_avg_sq"}
    for key in sorted(needed):
        if state.get(key) is None:
            raise ValueError(
                f"interop.torch: the state of {parameter} has no {key}; found"
                f" {', '.join(map(str, parameter.state))}, expected what {member.optimizer} keeps."
                " Pass the state_dict() of the optimizer itself."
            )
    scalars = tuple(number_of(f"{key} of {parameter}", state[key]) for key in member.scalars)
    if not (0 <= scalars[0] < 2**31 and scalars[0].is_integer()):
        raise ValueError(
            f"interop.torch: step of {parameter} is {scalars[0]}; expected a number of steps."
        )
    arrays = dict(zeros)
    for field, key in member.keys.items():
        if key not in state:
            continue
        array = array_of(f"{key} of {parameter}", state[key])
        if field != "mu" and np.any(array < 0):
            raise ValueError(
                f"interop.torch: {key} of {parameter} has an element of {array.min():g}; expected"
                " none below zero, as it averages squares. Pass the state_dict() as torch wrote it."
            )
        array = laid_out(f"{key} of {parameter}", array, path, layout, shape)
        arrays[field] = jnp.array(array, zeros[field].dtype)  # a copy: torch writes to its own
    return _Kept(scalars, arrays)
