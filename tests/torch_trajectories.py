# SPDX-License-Identifier: Apache-2.0
"""Records how torch's Adam family solves three small problems.

    python tests/torch_trajectories.py

writes tests/data/torch_adam.npz, which test_torch.py and test_interop_torch.py read. It needs
torch; the tests do not.
"""

import json
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data" / "torch_adam.npz"
STEPS = 200
TAKEN_OVER = 40
"""The step after which the optimizer's state is recorded too."""
RECORDED = [1, 2, 5, TAKEN_OVER, 2 * TAKEN_OVER, STEPS]
"""The steps after which the parameters are recorded."""
RUNS = {
    "adam": ("Adam", {}),
    "adam_fast": ("Adam", {"lr": 1e-2}),
    "adam_slow": ("Adam", {"lr": 2e-3, "betas": (0.99, 0.9999)}),
    "adam_short": ("Adam", {"lr": 5e-3, "betas": (0.5, 0.9), "eps": 1e-3}),
    "adam_rmsprop": ("Adam", {"lr": 3e-3, "betas": (0.0, 0.99)}),
    "adam_l2": ("Adam", {"lr": 1e-2, "weight_decay": 0.3}),
    "adamw": ("AdamW", {}),
    "adamw_strong": ("AdamW", {"lr": 2e-3, "betas": (0.8, 0.95), "weight_decay": 0.5}),
    "amsgrad": ("Adam", {"amsgrad": True}),
    "amsgrad_short": ("Adam", {"lr": 5e-3, "betas": (0.8, 0.9), "amsgrad": True}),
    "amsgrad_decayed": ("AdamW", {"lr": 4e-3, "weight_decay": 0.2, "amsgrad": True}),
    "nadam": ("NAdam", {}),
    "nadam_rising": ("NAdam", {"lr": 4e-3, "betas": (0.95, 0.99), "momentum_decay": 0.5}),
    "nadam_l2": ("NAdam", {"lr": 3e-3, "weight_decay": 0.1}),
    "nadam_decayed": (
        "NAdam",
        {"lr": 7e-3, "weight_decay": 0.3, "decoupled_weight_decay": True},
    ),
    "radam": ("RAdam", {}),
    "radam_short": ("RAdam", {"lr": 5e-3, "betas": (0.8, 0.95), "eps": 1e-4}),
    "radam_untrusted": ("RAdam", {"lr": 1e-3, "betas": (0.9, 0.6)}),
    "radam_l2": ("RAdam", {"lr": 1e-2, "weight_decay": 0.3}),
    "radam_decayed": (
        "RAdam",
        {"lr": 6e-3, "weight_decay": 0.3, "decoupled_weight_decay": True},
    ),
    "adamax": ("Adamax", {}),
    "adamax_short": ("Adamax", {"lr": 5e-3, "betas": (0.5, 0.9), "eps": 1e-2}),
    "adamax_l2": ("Adamax", {"lr": 1e-2, "weight_decay": 0.3}),
}
"""The name of each run, with torch's class and its arguments."""
SPARSE_RUNS = {
    "sparse": ("SparseAdam", {}),
    "sparse_short": ("SparseAdam", {"lr": 1e-2, "betas": (0.5, 0.9), "eps": 1e-3}),
}
"""Likewise, for the embedding alone."""
MAXIMIZED = {
    "adam_maximized": ("Adam", {"lr": 2e-3, "weight_decay": 0.1, "maximize": True}),
    "adamax_maximized": ("Adamax", {"maximize": True}),
}
"""Likewise, uphill on the network, whose tanh bounds it."""
CASES = [
    *((problem, run) for problem in ("least_squares", "network") for run in RUNS),
    *(("embedding", run) for run in SPARSE_RUNS),
    *(("network", run) for run in MAXIMIZED),
]
ALL_RUNS = RUNS | SPARSE_RUNS | MAXIMIZED


def begin(problem):
    """The data of a problem and the parameters that training begins with, by name.

    It begins so far off that 200 steps do not arrive. Around the optimum a short average makes
    steps of the gradient's sign, whose last bit then decides the path, in any library. Here torch
    in float32 stays within 5e-6 of torch in float64.
    """
    rng = np.random.default_rng(0)
    if problem == "embedding":
        data = {"tokens": rng.integers(0, 20, (STEPS, 6)), "y": rng.standard_normal((20, 4))}
        params = {"table": 3 * rng.standard_normal((20, 4))}
    else:
        x = rng.standard_normal((48, 12)) * 10 ** np.linspace(-1, 0, 12)
        y = x @ rng.standard_normal((12, 3)) + rng.standard_normal((48, 3))
        data = {"x": x, "y": y}
        if problem == "least_squares":
            params = {"w": rng.standard_normal((12, 3)), "b": np.zeros(3)}
        else:
            params = {
                "w1": rng.standard_normal((12, 16)) / np.sqrt(12),
                "b1": np.zeros(16),
                "w2": rng.standard_normal((16, 3)) / 4,
                "b2": np.zeros(3),
            }

    def narrow(arrays):
        return {k: a.astype(np.float32) if a.dtype.kind == "f" else a for k, a in arrays.items()}

    return narrow(data), narrow(params)


def loss(problem, data, params, step, tanh, look_up):
    """The loss before a step, for arrays of torch and of JAX alike.

    Args:
      step: the number of steps taken so far.
      tanh: `torch.tanh` or `jnp.tanh`.
      look_up: a function of tokens and a table.
    """
    if problem == "least_squares":
        return ((data["x"] @ params["w"] + params["b"] - data["y"]) ** 2).mean()
    if problem == "network":
        hidden = tanh(data["x"] @ params["w1"] + params["b1"])
        return ((tanh(hidden @ params["w2"] + params["b2"]) - tanh(data["y"])) ** 2).mean()
    tokens = data["tokens"][step]
    return ((look_up(tokens, params["table"]) - data["y"][tokens]) ** 2).mean()


def record(problem, optimizer, arguments):
    """The run of one optimizer.

    Returns:
      The parameters after the recorded steps, by name, with the step as their first axis; the
      optimizer's state after 40 steps, by the parameter's name and torch's own key; and the group
      of its state dict.
    """
    import torch

    data, params = begin(problem)
    data = {name: torch.tensor(a) for name, a in data.items()}
    params = {name: torch.nn.Parameter(torch.tensor(a)) for name, a in params.items()}
    tx = getattr(torch.optim, optimizer)(list(params.values()), **arguments)
    sparse = optimizer == "SparseAdam"

    def look_up(tokens, table):
        return torch.nn.functional.embedding(tokens, table, sparse=sparse)

    path = {name: [] for name in params}
    state = {}
    for step in range(STEPS):
        tx.zero_grad()
        loss(problem, data, params, step, torch.tanh, look_up).backward()
        tx.step()
        if step + 1 in RECORDED:
            for name, p in params.items():
                path[name].append(p.detach().numpy().copy())
        if step + 1 == TAKEN_OVER:
            for name, kept in zip(params, tx.state_dict()["state"].values(), strict=True):
                state |= {f"{name}/{key}": np.asarray(value).copy() for key, value in kept.items()}
    group = tx.state_dict()["param_groups"][0]
    return {name: np.stack(values) for name, values in path.items()}, state, group


def main():
    """Writes the file."""
    import torch

    arrays = {"torch_version": torch.__version__}
    for problem, run in CASES:
        path, state, group = record(problem, *ALL_RUNS[run])
        arrays |= {f"{problem}/{run}/{name}": a for name, a in path.items()}
        arrays |= {f"{problem}/{run}/state/{name}": a for name, a in state.items()}
        arrays[f"{problem}/{run}/group"] = json.dumps(group)
    DATA.parent.mkdir(exist_ok=True)
    np.savez_compressed(DATA, **arrays)
    print(f"{DATA}: {DATA.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
