"""What a group of a state dict says besides rates and decays: what is honoured, what is refused."""

from collections.abc import Collection, Mapping
from typing import Any

from adamfn.interop.torch.parameters import TorchParameter

_ALWAYS = {"params", "param_names", "lr", "betas", "eps", "weight_decay", "step"}
_HONOURED = {
    *("amsgrad", "maximize", "momentum_decay", "decoupled_weight_decay"),
    *("correct_bias", "bias_correction", "adam_w_mode", "caution"),
}
_HARMLESS = {
    *("foreach", "fused", "capturable", "differentiable"),  # how torch computes it
    *("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"),  # schedulers'
    *("name", "group_name", "lr_scale", "max_lr_snapshot"),  # timm's; lr has the scale in it
}
_ONLY_AS: dict[str, Any] = {
    "corrected_weight_decay": False,
    "clipping_threshold": None,
    "alpha": 0.0,
    "t_alpha": None,
    "t_beta3": None,
}
"""What changes the mathematics unless it has this value: of timm and of bitsandbytes."""


def decoupled_in(group: Mapping[str, Any]) -> bool | None:
    """Whether a group's weight decay is decoupled; None if it does not tell."""
    decoupled = group.get("decoupled_weight_decay", group.get("adam_w_mode"))
    return None if decoupled is None else bool(decoupled)


def check_settings(caller: str, parameter: TorchParameter, harmless: Collection[str]) -> None:
    """Checks that nothing that a group says is ignored.

    Raises:
      ValueError: a key is not known, or says what no chain does.
    """
    group = parameter.group
    for key, value in group.items():
        if key in harmless or key in _ALWAYS | _HONOURED | _HARMLESS:
            continue
        if key not in _ONLY_AS:
            raise ValueError(
                f"{caller}: the group of {parameter} has {key}={value!r}, which is not known;"
                " expected hyperparameters of torch.optim, transformers, apex, DeepSpeed, timm or"
                f" bitsandbytes. If it changes no update, pass harmless=[{key!r}]."
            )
        if value != _ONLY_AS[key] or value is True:
            raise ValueError(
                f"{caller}: the group of {parameter} has {key}={value!r}, which no chain here does;"
                f" expected {_ONLY_AS[key]!r}. To go on without it, pass harmless=[{key!r}]."
            )
    fused = [key for key in ("bias_correction", "correct_bias") if key in group]
    if group.get("amsgrad") and fused:
        raise ValueError(
            f"{caller}: the group of {parameter} has amsgrad beside {fused[0]}; no optimizer that"
            " is known here does both, and DeepSpeed's ignores it. Set amsgrad to False there."
        )
    if group.get("caution") and decoupled_in(group) is False:
        raise ValueError(
            f"{caller}: the group of {parameter} has caution and a decay that is not decoupled; no"
            " optimizer that is known here does both. Pass the state_dict() of timm's itself."
        )
