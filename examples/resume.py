# SPDX-License-Identifier: Apache-2.0
"""Train, be killed at any moment, and continue bit for bit.

Trains a small network on scikit-learn's digits and saves parameters and state every few steps.
Stop it with Ctrl-C or kill -9 and start it again: it continues from its last complete checkpoint,
and ends with the same bits as an uninterrupted run. The step determines its batch, so there is no
other state of the data.

    python examples/resume.py                            # repeat until it is done
    python examples/resume.py --moments 8bit --bits 24 --steps 2000 --out out/resume_lean
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any


def interrupted(*_: object) -> None:
    """Ends the program at once, and shows the cursor that a progress bar has hidden."""
    show_cursor = b"\x1b[?25h" if sys.stdout.isatty() else b""
    os.write(sys.stdout.fileno(), show_cursor + b"\nInterrupted. Start it again, and it goes on.\n")
    os._exit(130)


if __name__ == "__main__":  # before the imports, which take seconds
    signal.signal(signal.SIGINT, interrupted)

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from sklearn.datasets import load_digits

import adamfn
from adamfn.interop.orbax import check_saved

# No leaf is large enough to be factored.
MOMENTS = tuple(name for name in adamfn.formats.FORMATS if name != "factored")
BITS = (16, 24, 32)
HIDDEN, BATCH, RATE, KEPT = 256, 64, 2e-3, 2
console = Console()


def optimizer(moments: str, bits: int | None) -> adamfn.GradientTransformation:
    tx = adamfn.adamw(RATE, moments=moments)
    return adamfn.chain(tx, adamfn.round_weights(bits)) if bits else tx


def start(tx: adamfn.GradientTransformation, bits: int | None) -> dict[str, Any]:
    """The content of a checkpoint, before the first step."""
    first, second = jax.random.split(jax.random.key(0))
    params = {
        "hidden": jax.random.normal(first, (64, HIDDEN)) / 8,
        "bias": jnp.zeros(HIDDEN),
        "out": jax.random.normal(second, (HIDDEN, 10)) / HIDDEN**0.5,
    }
    if bits:
        params = jax.tree.map(lambda weight: weight.astype(jnp.bfloat16), params)
    return {"params": params, "state": tx.init(params)}


def loss_of(params: dict, images: jax.Array, labels: jax.Array) -> jax.Array:
    hidden = jax.nn.relu(images @ params["hidden"] + params["bias"])
    logits = hidden @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def train_step(
    tx: adamfn.GradientTransformation, run: dict, step: int, images: jax.Array, labels: jax.Array
) -> tuple[dict, jax.Array]:
    chosen = jax.random.randint(jax.random.fold_in(jax.random.key(1), step), BATCH, 0, len(labels))
    params, state = run["params"], run["state"]
    loss, grads = jax.value_and_grad(loss_of)(params, images[chosen], labels[chosen])
    params, state = adamfn.step(tx, grads, state, params)
    return {"params": params, "state": state}, loss


def restore(manager: ocp.CheckpointManager, step: int, like: dict) -> dict:
    """The checkpoint of a step, or an error with its differences from this run."""
    check_saved(manager.item_metadata(step), like)
    return manager.restore(step, args=ocp.args.StandardRestore(like))


def train(
    folder: Path,
    moments: str,
    bits: int | None,
    steps: int,
    every: int,
    progress: Callable[[int, float], None] | None = None,
) -> tuple[int, dict]:
    """Continues the run in a folder, or begins it.

    Args:
      folder: the folder of its checkpoints.
      moments: the format of Adam's moments, one of `MOMENTS`.
      bits: bits stored of bfloat16 weights, one of `BITS`; None for float32 weights.
      steps: training steps in all.
      every: steps from one checkpoint to the next.
      progress: called with the number of steps taken and the loss of the last one.

    Returns:
      The step it continued from, and the parameters and state at the end.
    """
    tx = optimizer(moments, bits)
    images, labels = map(jnp.asarray, load_digits(return_X_y=True))
    images = images / 16.0
    options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, save_interval_steps=every)
    with ocp.CheckpointManager(
        folder.absolute(),
        item_handlers=ocp.StandardCheckpointHandler(),  # to read what is saved before restoring it
        options=options,
    ) as manager:
        begin = manager.latest_step() or 0
        begun = partial(start, tx, bits)
        like = jax.eval_shape(begun)
        run = restore(manager, begin, like) if begin else jax.jit(begun)()
        for step in range(begin, steps):
            run, loss = train_step(tx, run, step, images, labels)
            manager.save(step + 1, args=ocp.args.StandardSave(run), force=step + 1 == steps)
            if progress:
                progress(step + 1, float(loss))
    return begin, run


def positive(text: str) -> int:
    """Parses a number of steps."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", choices=MOMENTS, default="float32", help="(float32)")
    parser.add_argument("--bits", type=int, choices=BITS, help="of bfloat16 weights (float32)")
    parser.add_argument("--steps", type=positive, default=1000, help="training steps (1000)")
    parser.add_argument("--every", type=positive, default=50, help="steps to a checkpoint (50)")
    parser.add_argument(
        "--out", type=Path, default=Path("out/resume"), help="folder of checkpoints (out/resume)"
    )
    args = parser.parse_args(argv)

    columns = [
        TextColumn(f"[bold]{args.moments:9s}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[report]}"),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(args.moments, total=args.steps, report="")

        def progress(step: int, loss: float) -> None:
            bar.update(task, completed=step, report=f"loss {loss:.4f}")

        try:
            begin, run = train(args.out, args.moments, args.bits, args.steps, args.every, progress)
        except ValueError as error:  # a checkpoint of another run
            bar.stop()
            raise SystemExit(f"{error}\nOr give another --out than {args.out}.") from error
    done = f"Went on from step {begin}" if begin else "Began anew"
    console.print(f"{done}; checkpoints are in {args.out}.", soft_wrap=True)
    return run


if __name__ == "__main__":
    main()
