"""`from_state_dict`: a torch run goes on here."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adamfn.chains.transform import GradientTransformation
from adamfn.core.hyperparameters import ScalarOrSchedule
from adamfn.interop.groups import by_group
from adamfn.interop.states import fill_moments, leaves_by_path
from adamfn.interop.torch.chains import continue_with
from adamfn.interop.torch.layouts import Layout, check_layout
from adamfn.interop.torch.members import Member, member_of
from adamfn.interop.torch.parameters import (
    Paths,
    TorchParameter,
    array_of,
    match,
    number_of,
    parameters_of,
)
from adamfn.interop.torch.quantized import with_plain_moments
from adamfn.interop.torch.settings import check_settings
from adamfn.trees import PyTree, check_inexact, describe, wide_dtype

_CALLER = "from_state_dict"


class _Kept(NamedTuple):
    """What torch keeps of one leaf, as the state has it."""

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
    """Takes over a torch run: the transformation and the state that continue it.

    Args:
      state_dict: `optimizer.state_dict()` of torch.optim's `Adam`, `AdamW` (both also with
        `amsgrad`), `NAdam`, `RAdam`, `Adamax` or `SparseAdam`, with tensors or arrays; or of
        the AdamW of transformers, timm or bitsandbytes (8 bits too), or FusedAdam of apex or
        DeepSpeed. The hyperparameters of each of its groups are taken over, `maximize` too.
      params: the parameters in JAX: any pytree of real floating-point arrays. Their values are
        not used.
      paths: which leaf each torch parameter is. None: they have one order. A sequence: the path
        of the leaf, such as `layers/0/kernel`, for each torch parameter in its order. A mapping:
        from the parameter's name (where the state dict has names) or number to the path. A path
        of None leaves that parameter out.
      layout: a function of a leaf's path and an array laid out as torch's parameter, which lays
        it out as the leaf, such as `to_flax`. None: both have one layout.
      optimizer: the class's name, where the state dict does not tell: those of torch before 2.7
        do not tell `Adam` from `AdamW`.
      learning_rate: used in place of the state dict's rates; a schedule goes on from torch's
        count.
      fresh: paths of leaves that torch has taken no step with and that begin here. Without, they
        are an error: torch leaves frozen parameters alone, and here they would be trained.
      harmless: keys of groups to be ignored, such as notes of one's own.

    Returns:
      A `GradientTransformation`, and its state after the steps that torch took. With several
      groups or step counts, the state is a tuple with one part for each.

    Raises:
      TypeError, ValueError: a state dict of another optimizer, missing keys, keys of groups that
        are not known or that no chain does, sparse or complex tensors, parameters and leaves that
        do not match, frozen parameters: the message names the parameter.

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
    check_inexact(params, f"{_CALLER}: params")
    check_layout(_CALLER, layout)
    leaves = {path: leaf for path, leaf in leaves_by_path(params).items() if leaf is not None}
    if not leaves:
        raise ValueError(f"{_CALLER}: params has no leaves; expected the parameters of a model.")
    matched = match(_CALLER, parameters_of(_CALLER, state_dict), list(leaves), paths)

    # Leaves of one group after one number of steps share a transformation, and its counts.
    kept: dict[str, _Kept] = {}
    group_of: dict[str, int] = {}
    groups: dict[Any, tuple[GradientTransformation, Mapping[str, float]]] = {}
    for path, parameter in matched.items():
        member = member_of(_CALLER, parameter, optimizer)
        check_settings(_CALLER, parameter, harmless)
        plain = with_plain_moments(_CALLER, parameter)
        kept[path] = _kept(plain, member, path, leaves[path], layout)
        key = (parameter.group_index, *kept[path].scalars)
        if key not in groups:
            tx = continue_with(_CALLER, member, parameter, optimizer, learning_rate)
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
    unknown = [path for path in fresh if path not in matched or isinstance(fresh, str)]
    if unknown:
        raise ValueError(
            f"{_CALLER}: fresh is {fresh!r}; expected a list of some of the leaves"
            f" {', '.join(matched)}."
        )
    still = [path for path in matched if not matched[path].state and path not in fresh]
    if still and any(parameter.state for parameter in matched.values()):
        raise ValueError(
            f"{_CALLER}: no step was taken with {matched[still[0]]}, matched with {still[0]}: it is"
            " frozen (requires_grad=False), or got no gradient. Leave it out of params, with a path"
            f" of None; or, to train it from here on, pass fresh={still!r}."
        )


def _kept(
    parameter: TorchParameter, member: Member, path: str, leaf: Any, layout: Layout | None
) -> _Kept:
    shape, dtype = np.shape(leaf), jnp.result_type(leaf)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"{_CALLER}: the leaf at {path} is {describe(leaf)}; expected a real one. torch keeps"
            " second moments of a complex number's two parts, adamfn one of its modulus."
        )
    wide = wide_dtype(dtype)
    if not parameter.state:  # torch has taken no step with it yet
        fresh = {"step": 0.0, "mu_product": 1.0}
        zeros = {field: jnp.zeros(shape, wide) for field in member.keys}
        return _Kept(tuple(fresh[key] for key in member.scalars), zeros)
    state = {"step": parameter.group.get("step")} | dict(parameter.state)  # apex counts in groups
    missing = {key for key in member.keys.values() if key not in state} - {"max_exp_avg_sq"}
    for key in (*member.scalars, *member.keys.values()):
        if key in missing or (key in member.scalars and state.get(key) is None):
            raise ValueError(
                f"{_CALLER}: the state of {parameter} has no {key}; found"
                f" {', '.join(map(str, parameter.state))}, expected what {member.optimizer} keeps."
                " Pass the state_dict() of the optimizer itself."
            )
    scalars = tuple(
        number_of(_CALLER, f"{key} of {parameter}", state[key]) for key in member.scalars
    )
    if not (0 <= scalars[0] < 2**31 and scalars[0].is_integer()):
        raise ValueError(
            f"{_CALLER}: step of {parameter} is {scalars[0]}; expected a number of steps."
        )
    arrays: dict[str, jax.Array] = {}
    for field, key in member.keys.items():
        if key not in state:  # amsgrad was turned on in mid-run: torch begins its maximum at zero
            arrays[field] = jnp.zeros(shape, wide)
            continue
        array = array_of(_CALLER, f"{key} of {parameter}", state[key])
        if field != "mu" and np.any(array < 0):
            raise ValueError(
                f"{_CALLER}: {key} of {parameter} has an element of {array.min():g}; expected none"
                " below zero, as it averages squares. Pass the state_dict() as torch wrote it."
            )
        if layout is not None:
            array = array_of(_CALLER, f"layout's result for {path}", layout(path, array))
        if np.shape(array) != shape:
            raise ValueError(
                f"{_CALLER}: {parameter}, matched with {path}: found {key} of shape"
                f" {np.shape(array)}, expected {shape}. layout= moves its axes (to_flax for Flax's"
                " kernels); paths= says which leaf it is."
            )
        arrays[field] = jnp.array(array, wide)  # a copy: torch goes on writing to its own
    return _Kept(scalars, arrays)
