# SPDX-License-Identifier: Apache-2.0
"""`from_state_dict` and `to_state_dict`: a run goes on in the other library."""

import copy
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamfn.chains.transform import GradientTransformation
from adamfn.core.hyperparameters import ScalarOrSchedule
from adamfn.interop.growing import by_group
from adamfn.interop.states import LeafMoments, fill_moments, find_moments
from adamfn.interop.torch.members import Member, check_settings, continue_with, member_of
from adamfn.interop.torch.parameters import (
    Array,
    Layout,
    Paths,
    TorchParameter,
    check,
    laid_out,
    match,
    number_of,
    parameters_of,
    with_plain_moments,
)
from adamfn.trees import PyTree, check_inexact, check_swapped, described, leaves_by_path


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
        `amsgrad`), `NAdam`, `RAdam`, `Adamax` or `SparseAdam`; or of the AdamW of transformers,
        timm or bitsandbytes (8 bits too), or FusedAdam of apex or DeepSpeed. The hyperparameters of
        each of its groups are taken over.
      params: the parameters in JAX, real arrays in any pytree. Their values are not used.
      paths: the path of the leaf, such as `layers/0/kernel`, for each torch parameter in its order;
        or a mapping to it from the parameter's name (if the state dict has names) or number. A
        path of None leaves the parameter out. None: both have one order.
      layout: a function of a leaf's path and an array in torch's layout, which returns it in the
        leaf's, such as `to_flax`. None: both have one layout.
      optimizer: the name of torch's class, for state dicts of torch before 2.7, which do not tell
        `Adam` from `AdamW`.
      learning_rate: replaces the state dict's rates; a schedule goes on from torch's count.
      fresh: paths of leaves that torch has taken no step with and that begin here. Without it they
        are an error: torch leaves frozen parameters alone, and here they would be trained.
      harmless: keys of groups to be ignored, such as your own notes.

    Returns:
      A `GradientTransformation` and its state, with several groups or step counts a tuple.

    Raises:
      TypeError, ValueError: another optimizer's state dict, keys of groups that are missing or not
        known, arrays or leaves that do not match; names the parameter.

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
    matched = match(parameters_of(state_dict), list(leaves), paths)
    # Leaves of one group after one number of steps share a transformation, and its counts.
    groups: dict[tuple[int, int, float], GradientTransformation] = {}
    group_of: dict[str, int] = {}
    kept: dict[str, Mapping[str, Array]] = {}
    for path, parameter in matched.items():
        known = {k: value for k, value in parameter.group.items() if k not in harmless}
        parameter = with_plain_moments(parameter._replace(group=known))
        member = member_of(parameter, optimizer)
        check_settings(parameter, member)
        scalars, kept[path] = _kept(parameter, member, path, leaves[path], layout)
        key = (parameter.group_index, *scalars)
        if key not in groups:
            groups[key] = continue_with(member, parameter, learning_rate)
        group_of[path] = list(groups).index(key)
    stepped = any(parameter.state for parameter in matched.values())
    still = {path: p for path, p in matched.items() if stepped and not p.state}
    if isinstance(fresh, str) or not still.keys() <= {*fresh} <= matched.keys():
        listed = ", ".join(f"{path} ({p})" for path, p in still.items()) or "none"
        raise ValueError(
            f"interop.torch: fresh is {fresh!r}; expected the leaves that torch took no step with,"
            f" {listed}. They are frozen (requires_grad=False), or got no gradient. Leave them out"
            " of params, with a path of None; or, to train them from here on, pass"
            f" fresh={[*still]}."
        )

    def moment(field: str, path: str, first: jax.Array) -> jax.Array:
        return jnp.array(kept[path].get(field, first), first.dtype)  # torch writes to its own

    def filled(state: PyTree, key: tuple[int, int, float]) -> PyTree:
        _, step, product = key
        return fill_moments(state, step, moment, mu_product=jnp.asarray(product, float))

    if len(groups) == 1:
        [(key, tx)] = groups.items()
        return tx, filled(tx.init(params), key)
    tx = by_group(group_of, list(groups.values()))
    return tx, tuple(map(filled, tx.init(params), groups))


def to_state_dict(
    state: PyTree,
    like: Mapping[str, Any],
    *,
    paths: Paths = None,
    layout: Layout | None = None,
    optimizer: str | None = None,
) -> dict[str, Any]:
    """Continues a run in torch: converts its state to a torch optimizer's `state_dict()`.

    Args:
      state: the state of the same member of the family as `like`, also inside wrappers. (Adam,
        RAdam and SparseAdam keep the same moments, and each goes on from the others'.)
      like: `optimizer.state_dict()` of the torch optimizer that is to go on. Its hyperparameters
        are kept; its state may be empty.
      layout: the inverse of `from_state_dict`'s, such as `from_flax`; `paths` and `optimizer` are
        as there.

    Returns:
      A state dict of NumPy arrays; a parameter that was left out keeps its entry of `like`. After
      `jax.tree.map(torch.as_tensor, state_dict["state"])`, `load_state_dict` accepts it.

    Raises:
      TypeError, ValueError: a state of another member of the family, or of other leaves.

    >>> import adamfn, jax.numpy as jnp
    >>> from adamfn.interop.torch import to_state_dict
    >>> params = {"w": jnp.ones((2, 3))}
    >>> tx = adamfn.adam()
    >>> _, state = tx.update(params, tx.init(params))
    >>> group = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    >>> group |= {"amsgrad": False, "decoupled_weight_decay": False, "params": [0]}
    >>> state_dict = to_state_dict(state, like={"state": {}, "param_groups": [group]})
    >>> print(*state_dict["state"][0], state_dict["state"][0]["step"])
    step exp_avg exp_avg_sq 1.0
    """
    check_swapped("to_state_dict(state, like)", state, like)
    moments = find_moments("to_state_dict: state", state)
    parameters = parameters_of(like)
    entries = {p.key: dict(p.state) for p in parameters if p.state}
    groups = copy.deepcopy(list(like["param_groups"]))
    for path, parameter in match(parameters, list(moments), paths).items():
        kept = _entries(parameter, member_of(parameter, optimizer), path, moments[path], layout)
        entries[parameter.key] = kept
        if "bias_correction" in parameter.group:  # apex counts in the group
            groups[parameter.group_index]["step"] = kept["step"]
    ordered = {p.key: entries[p.key] for p in parameters if p.key in entries}
    return {"state": ordered, "param_groups": groups}


def _kept(
    parameter: TorchParameter, member: Member, path: str, leaf: Any, layout: Layout | None
) -> tuple[tuple[int, float], Mapping[str, Array]]:
    """Torch's count, NAdam's product and the arrays of one leaf."""
    dtype, shape = jnp.result_type(leaf), np.shape(leaf)
    fits, found = jnp.issubdtype(dtype, jnp.floating), f"the leaf at {path} is {described(leaf)}"
    check(fits, found, "a real one. Of a complex one, torch keeps two second moments, adamfn one.")
    arrays: dict[str, Array] = {}
    if not parameter.state:  # torch has taken no step with it yet
        return (0, 1.0), arrays
    state = {"step": parameter.group.get("step"), **parameter.state}  # apex counts in groups
    parameter = parameter._replace(state=state)
    step, product = parameter.number("state", "step"), 1.0
    if not (0 <= step < 2**31 and step.is_integer()):
        raise ValueError(
            f"interop.torch: step of {parameter} is {step}; expected a number of steps."
        )
    if member.optimizer == "NAdam":
        product = parameter.number("state", "mu_product")
    for field, key in member.keys.items():
        if key == "max_exp_avg_sq" and key not in state:
            continue  # if amsgrad was turned on in mid-run, torch begins its maximum at zero
        what = f"{key} of {parameter}"
        array = laid_out(what, parameter.entry("state", key), path, layout, shape)
        if field != "mu" and np.any(array < 0):
            raise ValueError(
                f"interop.torch: {what} has an element of {array.min():g}; expected none below"
                " zero, as it averages squares. Pass the state_dict() as torch wrote it."
            )
        arrays[field] = array
    return (int(step), product), arrays


def _entries(
    parameter: TorchParameter, member: Member, path: str, kept: LeafMoments, layout: Layout | None
) -> dict[str, Any]:
    group, node = parameter.group, kept.node
    expected, found = type(member.stage().init(())), type(node)
    codes = "state1" in parameter.state or "t_beta3" in group
    if codes or found is not expected:
        raise TypeError(
            f"interop.torch: {parameter} is {'bitsandbytes' if codes else member.optimizer}'s;"
            f" expected torch.optim's, and a {expected.__name__} for {member.optimizer}; found a"
            f" {found.__name__} at {path}. Pass the state_dict() of the class of torch.optim that"
            " does what this run did."
        )
    way_out = " Pass the state of one run, outside jax.jit."
    count = number_of(f"the count of the state at {path}", node.count, way_out)
    # SparseAdam and the look-alikes count in a Python int, the others in a float32 tensor.
    in_int = {"SparseAdam", "bias_correction", "correct_bias"} & {member.optimizer, *group}
    entries: dict[str, Any] = {"step": int(count) if in_int else np.array(count, np.float32)}
    if member.optimizer == "NAdam":
        entries["mu_product"] = np.array(node.mu_product, np.float32)
    for field, key in member.keys.items():
        known = parameter.state.get(key)
        shape = None if known is None else known.shape
        array = laid_out(f"{key} of {parameter}", kept.kept[field], path, layout, shape)
        entries[key] = np.array(array, order="C")
    return entries
