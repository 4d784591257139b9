# SPDX-License-Identifier: Apache-2.0
"""See inside a training run: find a deliberate fault in the character transformer.

Shows a live table of all layers during training, worst first, with a word for each fault, and draws
a picture of the run at the end. `--fault none` shows a healthy run.

    python examples/see_inside.py --fault exploding
    python examples/see_inside.py --fault rounding --steps 100 --out out
    python examples/see_inside.py --fault eps --nnx           # through nnx.Optimizer
"""

import argparse
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple


def interrupted(*_: object) -> None:
    """Ends the program at once, and shows the cursor that the table has hidden."""
    show_cursor = b"\x1b[?25h" if sys.stdout.isatty() else b""
    os.write(sys.stdout.fileno(), show_cursor + b"\nInterrupted.\n")
    os._exit(130)


if __name__ == "__main__":  # before the imports, which take seconds
    signal.signal(signal.SIGINT, interrupted)

import char_lm
import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console
from rich.live import Live

import adamfn
from adamfn import monitor

EVERY, RATE = 10, 3e-3


class Fault(NamedTuple):
    """A fault: in one layer, or in all layers through the optimizer."""

    says: str
    grads: Callable[[Any], Any] = lambda grads: grads
    params: Callable[[Any], Any] = lambda params: params
    tx: Callable[[], Any] = lambda: adamfn.adamw(RATE)


def one_layer(change: Callable[[jax.Array], jax.Array]) -> Callable[[Any], Any]:
    """Changes only the middle block's `up`."""

    def changed(path: Any, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return change(leaf) if "blocks/1/up" in name else leaf

    return lambda tree: jax.tree_util.tree_map_with_path(changed, tree)


FAULTS = {
    "none": Fault("a healthy run"),
    "dead": Fault("no gradient", grads=one_layer(jnp.zeros_like)),
    "exploding": Fault("gradients 10,000 times as large", grads=one_layer(lambda g: 1e4 * g)),
    "nan": Fault("one NaN in a gradient", grads=one_layer(lambda g: g.at[3, 4].set(jnp.nan))),
    "eps": Fault("an eps above every gradient", tx=lambda: adamfn.adamw(RATE, eps=1.0)),
    "rounding": Fault(
        "bfloat16 weights at a rate of 1e-6",
        params=lambda params: jax.tree.map(lambda p: p.astype(jnp.bfloat16), params),
        tx=lambda: adamfn.adamw(1e-6),
    ),
}


def batch(text: jax.Array, number: jax.Array) -> jax.Array:
    where = jax.random.fold_in(jax.random.key(1), number)
    starts = jax.random.randint(where, (char_lm.BATCH, 1), 0, len(text) - char_lm.CONTEXT)
    return text[starts + jnp.arange(char_lm.CONTEXT + 1)].astype(jnp.int32)


def plain(fault: Fault, steps: int) -> Iterator[tuple[jax.Array, monitor.Observation]]:
    """The loss and the observation of each step."""
    tx = fault.tx()
    text = jnp.asarray(char_lm.load()[0])
    params = fault.params(char_lm.init(jax.random.key(0)))
    state = tx.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, state, number):
        loss, grads = jax.value_and_grad(char_lm.loss_of)(params, batch(text, number))
        grads = fault.grads(grads)
        params, state, seen = monitor.step(tx, grads, state, params, every=EVERY)
        return params, state, loss, seen

    for number in range(steps):
        params, state, loss, seen = train_step(params, state, number)
        yield loss, seen


class Transformer(nnx.Module):
    def __init__(self, params: dict):
        self.characters = nnx.Param(params["characters"])
        self.blocks = nnx.List([nnx.Dict(jax.tree.map(nnx.Param, b)) for b in params["blocks"]])
        self.norm = nnx.Param(params["norm"])

    def loss(self, windows: jax.Array) -> jax.Array:
        params = {"characters": self.characters, "blocks": self.blocks, "norm": self.norm}
        return char_lm.loss_of(params, windows)


def by_nnx(fault: Fault, steps: int) -> Iterator[tuple[jax.Array, monitor.Observation]]:
    """The same through Flax NNX."""
    tx = fault.tx()
    text = jnp.asarray(char_lm.load()[0])
    model = Transformer(fault.params(char_lm.init(jax.random.key(0))))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, number):
        loss, grads = nnx.value_and_grad(lambda model: model.loss(batch(text, number)))(model)
        grads = fault.grads(grads)
        trees = (grads, optimizer.opt_state, nnx.state(model, nnx.Param))
        seen = monitor.observe(tx, *map(nnx.as_pure, trees), every=EVERY)
        optimizer.update(model, grads)
        return loss, seen

    for number in range(steps):
        yield train_step(model, optimizer, number)


def main(argv: list[str] | None = None) -> list[monitor.Fault]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    told = "; ".join(f"{name}: {fault.says}" for name, fault in FAULTS.items())
    parser.add_argument("--fault", choices=FAULTS, default="exploding", help=told)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--nnx", action="store_true", help="through Flax NNX")
    parser.add_argument("--figure", default="gradient", help="what the picture shows (gradient)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the picture")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps is {args.steps}; expected at least 1")
    try:  # a mistake shows before the training
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error}")

    console = Console()
    training = by_nnx if args.nnx else plain
    losses, run = [], []
    with Live(console=console, refresh_per_second=4) as live:
        for number, (loss, seen) in enumerate(training(FAULTS[args.fault], args.steps)):
            losses.append(loss)
            if number % EVERY == 0:
                run.append(seen)
                if not any(args.figure in own for own in monitor.looks(seen)[0][1].values()):
                    parser.error(f"--figure is {args.figure}, which nothing here has")
                live.update(monitor.report(seen, rows=12))
    path = args.out / "see_inside.png"
    monitor.picture(run, [float(loss) for loss in losses], args.figure).savefig(path, dpi=120)
    console.print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; the run is drawn in {path}")
    return monitor.faults(run)


if __name__ == "__main__":
    main()
