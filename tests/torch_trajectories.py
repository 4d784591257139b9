"""Records how torch.optim.Adam and AdamW solve a least-squares problem.

    python tests/torch_trajectories.py

writes tests/data/torch_adam.npz, which test_torch.py reads. It needs torch; the tests do not.
"""

from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data" / "torch_adam.npz"
RECORDED = [1, 2, 3, 5, *range(10, 201, 10)]
"""The steps after which the parameters are recorded."""
RUNS = {
    "adam": ("Adam", {"lr": 1e-2}),
    "adam_slow": ("Adam", {"lr": 1e-3, "betas": (0.99, 0.9999)}),
    "adam_short": ("Adam", {"lr": 5e-3, "betas": (0.5, 0.9), "eps": 1e-3}),
    "adam_rmsprop": ("Adam", {"lr": 2e-3, "betas": (0.0, 0.99)}),
    "adam_l2": ("Adam", {"lr": 1e-2, "weight_decay": 0.3}),
    "adamw": ("AdamW", {"lr": 1e-2}),
    "adamw_strong": ("AdamW", {"lr": 2e-3, "betas": (0.8, 0.95), "weight_decay": 0.5}),
}
"""The name of each run, with torch's class and its arguments."""


def problem():
    """A design matrix with columns over a decade, targets, and where training begins.

    It begins so far off that 200 steps do not arrive. Around the optimum a short average makes
    steps of the gradient's sign, whose last bit then decides the path, in any library.
    """
    rng = np.random.default_rng(0)
    x = rng.standard_normal((48, 12)) * 10 ** np.linspace(-1, 0, 12)
    y = x @ rng.standard_normal((12, 3)) + rng.standard_normal((48, 3))
    w, b = rng.standard_normal((12, 3)), np.zeros(3)
    return {name: a.astype(np.float32) for name, a in {"x": x, "y": y, "w": w, "b": b}.items()}


def record(arrays, optimizer, arguments):
    """The parameters after the recorded steps: arrays with the step as their first axis."""
    import torch

    x, y, w, b = (torch.tensor(arrays[name]) for name in "xywb")
    w.requires_grad_()
    b.requires_grad_()
    tx = getattr(torch.optim, optimizer)([w, b], **arguments)
    path = {"w": [], "b": []}
    for step in range(1, RECORDED[-1] + 1):
        tx.zero_grad()
        torch.mean((x @ w + b - y) ** 2).backward()
        tx.step()
        if step in RECORDED:
            path["w"].append(w.detach().numpy().copy())
            path["b"].append(b.detach().numpy().copy())
    return {name: np.stack(values) for name, values in path.items()}


def main():
    """Writes the file."""
    import torch

    arrays = problem()
    for name, (optimizer, arguments) in RUNS.items():
        for leaf, path in record(problem(), optimizer, arguments).items():
            arrays[f"{name}/{leaf}"] = path
    DATA.parent.mkdir(exist_ok=True)
    np.savez_compressed(DATA, torch_version=torch.__version__, **arrays)
    print(f"{DATA}: {DATA.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
