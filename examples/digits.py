# SPDX-License-Identifier: Apache-2.0
"""Train a small convolutional network on handwritten digits, with optax and with adamfn.

It uses scikit-learn's bundled digits of 8 by 8 pixels, a Flax NNX model, an optax schedule, and
AdamW inside one jitted step that donates model and optimizer. It trains with `optax.adamw`, with
`adamfn.adamw`, and with adamfn's moments in 8 bits. It prints what each costs, and draws the runs
to `out/digits.png`.

    python examples/digits.py                    # or: make demo
    python examples/digits.py --steps 200 --seed 1 --out pictures
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple


def interrupted(*_: object) -> None:
    """Ends the program at once, and shows the cursor that a progress bar has hidden."""
    show_cursor = b"\x1b[?25h" if sys.stdout.isatty() else b""
    os.write(sys.stdout.fileno(), show_cursor + b"\nInterrupted.\n")
    os._exit(130)


if __name__ == "__main__":  # before the imports, which take seconds
    signal.signal(signal.SIGINT, interrupted)

import jax
import matplotlib as mpl
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import adamfn
from adamfn.interop.flax import Optimizer

BATCH, EVALUATE_EVERY, PEAK_RATE, WEIGHT_DECAY = 64, 20, 4e-3, 1e-2
MATRICES = adamfn.masks.matrices()  # weight decay applies to these
console = Console()


class Digits(NamedTuple):
    """Images of shape (n, 8, 8, 1) in [0, 1], and their labels."""

    images: np.ndarray
    labels: np.ndarray


class Run(NamedTuple):
    """The recorded run of one optimizer."""

    losses: list[float]
    evaluated_at: list[int]
    accuracies: list[float]
    predictions: np.ndarray
    state_bytes: int
    to_first_step: float
    """Seconds from the network to the end of its first step: tracing, compiling, running."""
    per_step: float
    """Seconds of a step, in the median of all but the first."""


class Network(nnx.Module):
    """Two convolutions and two dense layers: 139k parameters."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv_1 = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.conv_2 = nnx.Conv(16, 32, (3, 3), rngs=rngs)
        self.hidden = nnx.Linear(4 * 4 * 32, 256, rngs=rngs)
        self.out = nnx.Linear(256, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits, of shape (n, 10)."""
        x = nnx.relu(self.conv_1(x))
        x = nnx.max_pool(nnx.relu(self.conv_2(x)), (2, 2), (2, 2))
        return self.out(nnx.relu(self.hidden(x.reshape(len(x), -1))))


def load() -> tuple[Digits, Digits]:
    """The same split whatever the seed: 1347 digits to train on, 450 to test on."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0).astype(np.float32).reshape(-1, 8, 8, 1)
    parts = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    return Digits(parts[0], parts[2]), Digits(parts[1], parts[3])


def batches(data: Digits, steps: int, seed: int):
    """Yields `steps` batches, in a new order each epoch, each image moved by up to a pixel."""
    padded = np.pad(data.images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (8, 8), axis=(1, 2))
    windows = np.moveaxis(windows, 3, -1)  # (n, 3, 3, 8, 8, 1), a view
    random, order = np.random.default_rng(seed), np.array([], int)
    for _ in range(steps):
        if len(order) < BATCH:
            order = random.permutation(len(data.labels))
        chosen, order = order[:BATCH], order[BATCH:]
        down, right = random.integers(3, size=(2, BATCH))
        yield windows[chosen, down, right], data.labels[chosen]


def loss_of(model: Network, images: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()


def train(
    name: str, tx: Any, schedule: Any, train_set: Digits, test_set: Digits, steps: int, seed: int
) -> Run:
    """Trains a new network with `tx` and records how it goes."""
    model = Network(nnx.Rngs(seed))
    began = time.perf_counter()
    # It is used like nnx.Optimizer, but updates weights and moments in one pass over memory.
    # Optax's transformations behave as they do in flax's.
    optimizer = Optimizer(model, tx, wrt=nnx.Param)
    state = jax.tree.leaves(nnx.state(optimizer))
    state_bytes = sum(leaf.nbytes for leaf in state)

    @nnx.jit(donate_argnums=(0, 1))
    def train_step(model, optimizer, images, labels):
        loss, grads = nnx.value_and_grad(loss_of)(model, images, labels)
        optimizer.update(model, grads)
        return loss

    @nnx.jit
    def predict(model, images):
        return model(images).argmax(-1)

    losses, seconds, evaluated_at, accuracies = [], [], [], []
    columns = [
        TextColumn(f"[bold]{name:12s}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[report]}"),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=steps, report="")
        for step, (images, labels) in enumerate(batches(train_set, steps, seed), start=1):
            started = began if step == 1 else time.perf_counter()
            losses.append(float(train_step(model, optimizer, images, labels)))
            seconds.append(time.perf_counter() - started)
            if step % EVALUATE_EVERY == 0 or step == steps:
                predictions = np.asarray(predict(model, test_set.images))
                evaluated_at.append(step)
                accuracies.append(float(np.mean(predictions == test_set.labels)))
                rate = rate_in(optimizer.opt_state, schedule)
                report = f"loss {losses[-1]:.4f}  accuracy {accuracies[-1]:.1%}  rate {rate:.2e}"
                progress.update(task, report=report)
            progress.advance(task)
    first, *rest = seconds
    per_step = median(rest or seconds)
    return Run(losses, evaluated_at, accuracies, predictions, state_bytes, first, per_step)


def rate_in(state: Any, schedule: Any) -> float:
    """The rate of the last step: adamfn's state contains it, optax's only the count."""
    rate = optax.tree.get(state, "learning_rate")
    if rate is None:
        counts = [count for _, count in optax.tree.get_all_with_path(state, "count")]
        rate = schedule(counts[-1] - 1)
    return float(rate)


def smooth(losses: list[float], window: int = 15) -> np.ndarray:
    """The average of each step's losses and those around it."""
    window = min(window, len(losses))
    weights = np.ones(window)
    return np.convolve(losses, weights, "same") / np.convolve(np.ones(len(losses)), weights, "same")


def draw(runs: dict[str, Run], test_set: Digits, path: Path) -> None:
    """Draws loss, accuracy and some test digits with the first network's predictions."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(11, 6.2), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=[3.4, 1])
    curves = grid[0].subgridspec(1, 2)
    loss_axes, accuracy_axes = (figure.add_subplot(curves[0, i]) for i in range(2))
    # The runs nearly coincide: the others are thin lines on a broad pale one.
    styles = (
        {"color": "#8fbbe8", "linewidth": 5},
        {"color": "#b3361e", "linestyle": (0, (4, 2))},
        {"color": "#1a7f4b", "linewidth": 1},
    )
    for (name, run), style in zip(runs.items(), styles, strict=True):
        loss_axes.plot(range(1, len(run.losses) + 1), smooth(run.losses), label=name, **style)
        marker = "o" if len(run.accuracies) == 1 else ""  # a line of one point shows nothing
        percentages = [100 * accuracy for accuracy in run.accuracies]
        accuracy_axes.plot(run.evaluated_at, percentages, label=name, marker=marker, **style)
    loss_axes.set(
        title="Training loss", xlabel="step", ylabel="cross-entropy, mean of 15 steps", yscale="log"
    )
    accuracy_axes.set(title="Test accuracy", xlabel="step", ylabel="%")
    lowest = 100 * min(run.accuracies[-1] for run in runs.values())
    accuracy_axes.set_ylim(bottom=max(0, min(88, lowest - 5)), top=100.5)
    for axes in (loss_axes, accuracy_axes):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    loss_axes.legend(frameon=False, loc="upper right")
    accuracy_axes.legend(frameon=False, loc="lower right")

    predictions = next(iter(runs.values())).predictions
    wrong = np.flatnonzero(predictions != test_set.labels)[:6]
    right = np.flatnonzero(predictions == test_set.labels)[: 14 - len(wrong)]
    strip = grid[1].subgridspec(1, 14)
    for column, index in enumerate([*right, *wrong]):
        axes = figure.add_subplot(strip[0, column])
        axes.imshow(test_set.images[index, :, :, 0], cmap="gray_r")
        axes.set(xticks=[], yticks=[])
        said, truth = predictions[index], test_set.labels[index]
        if said == truth:
            axes.set_title(f"{said}", fontsize=11)
        else:
            axes.set_title(f"{said}, is {truth}", fontsize=9, color="#b3361e")
    figure.suptitle("Handwritten digits: one AdamW run by optax and by adamfn")
    figure.savefig(path, dpi=140)
    plt.close(figure)


def summary(runs: dict[str, Run]) -> Table:
    """One row for each run."""
    table = Table(title="One training run by three optimizers")
    table.add_column("optimizer", no_wrap=True)
    for column in ("accuracy", "last loss", "state", "a step", "first step"):
        table.add_column(column, justify="right")
    for name, run in runs.items():
        table.add_row(
            name,
            f"{run.accuracies[-1]:.2%}",
            f"{smooth(run.losses)[-1]:.5f}",
            f"{run.state_bytes / 1e3:,.0f} kB",
            f"{1e3 * run.per_step:.2f} ms",
            f"{run.to_first_step:.1f} s",
        )
    return table


def positive(text: str) -> int:
    """Parses a number of steps."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def main(argv: list[str] | None = None) -> dict[str, Run]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=positive, default=600, help="training steps (600)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (0)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the picture (out)")
    args = parser.parse_args(argv)
    try:  # a mistake shows before the training
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error}")

    train_set, test_set = load()
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=PEAK_RATE / 10,
        peak_value=PEAK_RATE,
        warmup_steps=args.steps // 10,
        decay_steps=max(args.steps, 2),
    )
    decay: dict[str, Any] = {"weight_decay": WEIGHT_DECAY, "mask": MATRICES}
    optimizers = {
        "optax.adamw": optax.adamw(schedule, **decay),
        "adamfn.adamw": adamfn.adamw(schedule, **decay),
        "adamfn, 8 bits": adamfn.adamw(schedule, **decay, moments="8bit"),
    }
    # What the first run of a process compiles for all is left out of the times.
    jax.block_until_ready(
        nnx.value_and_grad(loss_of)(Network(nnx.Rngs(0)), *next(batches(train_set, 1, 0)))
    )
    runs = {
        name: train(name, tx, schedule, train_set, test_set, args.steps, args.seed)
        for name, tx in optimizers.items()
    }
    console.print(summary(runs))
    picture = args.out / "digits.png"
    draw(runs, test_set, picture)
    console.print(
        "State is the optimizer's alone; the first step includes compiling. On a CPU, 8 bits trade"
        " time for memory; on a GPU they save both.",
    )
    console.print(f"The runs are drawn in {picture}.", soft_wrap=True)
    return runs


if __name__ == "__main__":
    main()
