# SPDX-License-Identifier: Apache-2.0
"""Take over a torch run: a network trained in torch continues in JAX, and the curves coincide.

A small convolutional network learns scikit-learn's handwritten digits with torch.optim.AdamW,
with different rates and decays in its two groups. After 150 of 300 steps, its weights and the
optimizer's state are converted for a Flax network, which takes the other 150 steps on the same
batches. torch takes them too, for comparison. Both losses are drawn to `out/torch_to_jax.png`.

    python examples/torch_to_jax.py            # without torch, from a recorded checkpoint
    python examples/torch_to_jax.py --record   # train in torch and record the checkpoint anew
"""

import argparse
import json
from functools import cache
from pathlib import Path

import jax
import matplotlib as mpl
import numpy as np
import optax
from flax import linen as nn
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import adamfn
from adamfn.interop.torch import from_state_dict, to_flax

CHECKPOINT = Path(__file__).parent / "data" / "torch_digits.npz"
TAKEN_OVER, STEPS, BATCH = 150, 300, 128
PATHS = {
    "conv_1.weight": "conv_1/kernel",
    "conv_1.bias": "conv_1/bias",
    "conv_2.weight": "conv_2/kernel",
    "conv_2.bias": "conv_2/bias",
    "out.weight": "out/kernel",
    "out.bias": "out/bias",
}
console = Console()


class Network(nn.Module):
    """The torch network in Flax: images of shape (n, 8, 8, 1) to logits of shape (n, 10)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # Padded by one on each side, like torch: "SAME" pads differently for a stride of two.
        x = nn.relu(nn.Conv(16, (3, 3), padding=1, name="conv_1")(x))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2, padding=1, name="conv_2")(x))
        return nn.Dense(10, name="out")(x.mean((1, 2)))


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's images, of shape (n, 64), and their labels."""
    return load_digits(return_X_y=True)


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    """The images of a step, shape (n, 8, 8) in [0, 1], and their labels: the same for both."""
    images, labels = digits()
    chosen = np.random.default_rng(step).integers(len(labels), size=BATCH)
    return (images[chosen] / 16).astype(np.float32).reshape(-1, 8, 8), labels[chosen]


def train_in_torch() -> dict[str, np.ndarray]:
    """Trains for all steps; returns the losses, and the weights and state at halfway."""
    import torch

    class TorchNetwork(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv_1 = torch.nn.Conv2d(1, 16, 3, padding=1)
            self.conv_2 = torch.nn.Conv2d(16, 32, 3, stride=2, padding=1)
            self.out = torch.nn.Linear(32, 10)

        def forward(self, x):
            x = torch.relu(self.conv_2(torch.relu(self.conv_1(x))))
            return self.out(x.mean((2, 3)))

    torch.manual_seed(0)
    model = TorchNetwork()
    named = list(model.named_parameters())
    tx = torch.optim.AdamW(
        [
            {"params": [(name, p) for name, p in named if p.ndim > 1], "weight_decay": 0.1},
            {"params": [(name, p) for name, p in named if p.ndim == 1], "lr": 1e-2},
        ],
        lr=5e-3,
        weight_decay=0.0,
    )
    recorded, losses = {}, []
    for step in range(STEPS):
        images, labels = batch(step)
        tx.zero_grad()
        logits = model(torch.tensor(images)[:, None])
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels))
        loss.backward()
        tx.step()
        losses.append(loss.item())
        if step + 1 == TAKEN_OVER:
            recorded = checkpoint(dict(named), tx.state_dict())
    return recorded | {"losses": np.float32(losses)}


def checkpoint(weights: dict, state_dict: dict) -> dict[str, np.ndarray]:
    """Weights and an optimizer's state as arrays for `np.savez`."""
    arrays = {f"weights/{name}": p.detach().numpy().copy() for name, p in weights.items()}
    for key, kept in state_dict["state"].items():
        arrays |= {f"state/{key}/{name}": np.asarray(value).copy() for name, value in kept.items()}
    return arrays | {"param_groups": np.array(json.dumps(state_dict["param_groups"]))}


def read(arrays: dict[str, np.ndarray]) -> tuple[dict, dict]:
    """The reverse of `checkpoint`."""
    weights, state = {}, {}
    for name, array in arrays.items():
        if name.startswith("weights/"):
            weights[name.removeprefix("weights/")] = array
        elif name.startswith("state/"):
            _, key, entry = name.split("/")
            state.setdefault(int(key), {})[entry] = array
    return weights, {"state": state, "param_groups": json.loads(str(arrays["param_groups"]))}


def train_in_jax(weights: dict, state_dict: dict) -> list[float]:
    """Continues the run; returns the losses of the remaining steps."""
    params: dict = {}
    for name, path in PATHS.items():
        layer, leaf = path.split("/")
        params.setdefault(layer, {})[leaf] = to_flax(path, weights[name])
    tx, state = from_state_dict(state_dict, params, paths=PATHS, layout=to_flax)

    @jax.jit
    def train_step(params, state, images, labels):
        def loss_of(params):
            logits = Network().apply({"params": params}, images[..., None])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, grads = jax.value_and_grad(loss_of)(params)
        params, state = adamfn.step(tx, grads, state, params)
        return params, state, loss

    losses = []
    for step in range(TAKEN_OVER, STEPS):
        params, state, loss = train_step(params, state, *batch(step))
        losses.append(loss.item())
    return losses


def draw(torch_losses: np.ndarray, jax_losses: list[float], path: Path) -> None:
    """Draws both curves, and their difference below."""
    mpl.use("agg")
    import matplotlib.pyplot as plt

    steps = np.arange(1, STEPS + 1)
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(7, 5.5), sharex=True, height_ratios=[3, 1], layout="constrained"
    )
    above.plot(steps, torch_losses, color="C0", alpha=0.4, lw=4, label="torch, all the way")
    above.plot(steps[TAKEN_OVER:], jax_losses, color="C3", lw=1.2, label="taken over by adamfn")
    above.axvline(TAKEN_OVER, color="0.5", ls=":", lw=1)
    above.set(ylabel="loss of the step", yscale="log", title="A torch run continues in JAX")
    above.legend(frameon=False)
    apart = np.abs(np.asarray(jax_losses) / torch_losses[TAKEN_OVER:] - 1)
    below.plot(steps[TAKEN_OVER:], np.maximum(apart, 1e-8), color="C3", lw=1)
    below.axvline(TAKEN_OVER, color="0.5", ls=":", lw=1)
    below.set(xlabel="step", ylabel="difference,\nrelative", yscale="log", ylim=(5e-9, 1e-2))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> tuple[np.ndarray, list[float]]:
    """Takes over the run, prints and draws it; returns the losses of torch and adamfn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="train in torch (needs torch)")
    parser.add_argument(
        "--out", type=Path, default=Path("out"), help="a folder, or a picture's name"
    )
    arguments = parser.parse_args(argv)
    if arguments.record:
        with console.status("torch trains"):
            np.savez_compressed(CHECKPOINT, **train_in_torch())
    with np.load(CHECKPOINT) as data:
        arrays = dict(data)
    with console.status("adamfn goes on"):
        ours = train_in_jax(*read(arrays))
    theirs = arrays["losses"]

    table = Table("step", "loss in torch", "loss in JAX", title="The same batches")
    for step in (TAKEN_OVER, TAKEN_OVER + 1, TAKEN_OVER + 2, 200, 250, STEPS):
        after = step > TAKEN_OVER
        here = f"{ours[step - TAKEN_OVER - 1]:.6f}" if after else "taken over after this"
        table.add_row(str(step), f"{theirs[step - 1]:.6f}", here)
    console.print(table)
    picture = arguments.out if arguments.out.suffix else arguments.out / "torch_to_jax.png"
    draw(theirs, ours, picture)
    console.print(f"Both losses are drawn to {picture}.")
    return theirs, ours


if __name__ == "__main__":
    main()
