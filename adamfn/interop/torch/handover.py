"""`to_state_dict`: a run here goes on in torch."""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np

from adamfn.interop.states import LeafMoments, find_moments
from adamfn.interop.torch.members import Member, member_of
from adamfn.interop.torch.parameters import (
    Layout,
    Paths,
    TorchParameter,
    array_of,
    laid_out,
    match,
    parameters_of,
)
from adamfn.interop.torch.quantized import is_quantized
from adamfn.trees import PyTree


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
      state: the state of the same member of the family as `like`, by itself or inside a chain or a
        wrapper.
      like: `optimizer.state_dict()` of the torch optimizer that is to go on. Its hyperparameters
        are kept; its state may be empty.
      paths: as for `from_state_dict`.
      layout: the inverse of `from_state_dict`'s, such as `from_flax`.
      optimizer: as for `from_state_dict`.

    Returns:
      A state dict of NumPy arrays; a parameter that was left out keeps its entry of `like`. After
      `jax.tree.map(torch.as_tensor, state_dict["state"])`, `load_state_dict` accepts it.

    Raises:
      TypeError, ValueError: a state of another member of the family, or of other leaves. (Adam,
        RAdam and SparseAdam keep the same moments, and each goes on from the others'.)

    >>> import adamfn
    >>> import jax.numpy as jnp
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
    moments = find_moments("to_state_dict: state", state)
    parameters = parameters_of(like)
    entries = {p.key: dict(p.state) for p in parameters if p.state}
    groups = copy.deepcopy(list(like["param_groups"]))
    for path, parameter in match(parameters, list(moments), paths).items():
        member = member_of(parameter, optimizer)
        own = _entries(parameter, member, path, moments[path], layout)
        entries[parameter.key] = own
        if "bias_correction" in parameter.group:  # apex counts in the group
            groups[parameter.group_index]["step"] = own["step"]
    ordered = {p.key: entries[p.key] for p in parameters if p.key in entries}
    return {"state": ordered, "param_groups": groups}


def _entries(
    parameter: TorchParameter,
    member: Member,
    path: str,
    moments: LeafMoments,
    layout: Layout | None,
) -> dict[str, Any]:
    node, kept = moments
    if is_quantized(parameter):
        raise ValueError(
            f"interop.torch: {parameter} is bitsandbytes', which has codes and tables; expected the"
            " state_dict() of torch.optim.AdamW, which does the same in 32 bits."
        )
    if not isinstance(node, member.state):
        raise TypeError(
            f"interop.torch: {parameter} is {member.optimizer}'s, which goes on from a"
            f" {member.state.__name__}; found a {type(node).__name__} at {path}. Pass the"
            " state_dict() of the torch optimizer that does what this run did."
        )
    count = array_of(f"the count of the state at {path}", node.count)
    if count.ndim:
        raise ValueError(
            f"interop.torch: the state at {path} has a count of shape {count.shape}, as that of"
            " several runs at once; expected a scalar. Pass one run:"
            " jax.tree.map(lambda x: x[0], state)."
        )
    # SparseAdam and the look-alikes count in a Python int, the others in a float32 tensor.
    whole = member.optimizer == "SparseAdam" or {"bias_correction", "correct_bias"} & {
        *parameter.group
    }
    entries = {"step": int(count) if whole else count.astype(np.float32)}
    if "mu_product" in member.scalars:
        entries["mu_product"] = np.array(node.mu_product, np.float32)
    for field, key in member.keys.items():
        array = array_of(f"{field} at {path}", kept[field])
        array = array.astype(np.float32) if array.dtype.itemsize < 4 else array
        known = parameter.state.get(key)
        shape = None if known is None else known.shape
        array = laid_out(f"{key} of {parameter}", array, path, layout, shape)
        entries[key] = np.array(array, order="C")
    return entries
