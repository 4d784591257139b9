# SPDX-License-Identifier: Apache-2.0
"""Train the character transformer on eight devices: a mesh of data and tensor axes, and ZeRO.

An XLA flag makes eight devices of this machine's CPU; on a machine with eight devices, leave the
flag out. Batches are split along the axis `data`, the large matrices along `model`, and
Adam's moments along both. Shows the placement of a moment and the bytes of the state per device.

    python examples/sharded_training.py
    python examples/sharded_training.py --moments 8bit --steps 200 --data 2 --model 4
"""

import argparse
import os
import signal
import sys
from functools import partial
from typing import Any, NamedTuple


def interrupted(*_: object) -> None:
    """Ends the program at once, and shows the cursor that a progress bar has hidden."""
    show_cursor = b"\x1b[?25h" if sys.stdout.isatty() else b""
    os.write(sys.stdout.fileno(), show_cursor + b"\nInterrupted.\n")
    os._exit(130)


if __name__ == "__main__":  # before the imports, which take seconds
    signal.signal(signal.SIGINT, interrupted)
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    )

import char_lm
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import adamfn
from adamfn.sharding import sharded, state_shardings, whole_blocks

RATE, BATCH = 3e-3, 16
SPLIT = {  # how each matrix is split along `model`
    "qkv": jax.P(None, "model"),
    "out": jax.P("model", None),
    "up": jax.P(None, "model"),
    "down": jax.P("model", None),
}
console = Console()


class Run(NamedTuple):
    """The result of a run."""

    losses: list[float]
    state: Any
    bytes_on_a_device: dict[str, int]


def parameter_shardings(params: dict, mesh: jax.sharding.Mesh) -> dict:
    def sharding(path: Any, _: jax.Array) -> NamedSharding:
        return NamedSharding(mesh, SPLIT.get(path[-1].key, jax.P()))

    return jax.tree.map_with_path(sharding, params)


def bytes_on_a_device(tree: Any, shardings: Any) -> int:
    """Bytes of a tree on each device, computed from shapes."""
    sizes = jax.tree.map(
        lambda x, s: int(np.prod(s.shard_shape(x.shape))) * x.dtype.itemsize, tree, shardings
    )
    return sum(jax.tree.leaves(sizes))


def train(moments: str, steps: int, data: int, model: int) -> Run:
    """Trains with moments split along both axes."""
    mesh = jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    init = partial(char_lm.init, jax.random.key(0))
    shapes = jax.eval_shape(init)
    placed = parameter_shardings(shapes, mesh)
    formats = whole_blocks(moments, shapes, placed, zero_axis="data")
    tx = sharded(adamfn.adamw(RATE, moments=formats), placed, zero_axis="data")
    state_placed = state_shardings(tx, shapes, placed, zero_axis="data")

    # Created in place: no device ever holds all of them.
    params = jax.jit(init, out_shardings=placed)()
    state = tx.init(params)
    batches = NamedSharding(mesh, jax.P("data"))

    @partial(
        jax.jit,
        in_shardings=(placed, state_placed, batches),
        out_shardings=(placed, state_placed, None),
        donate_argnums=(0, 1),
    )
    def train_step(params, state, windows):
        loss, grads = jax.value_and_grad(char_lm.loss_of)(params, windows)
        params, state = adamfn.step(tx, grads, state, params)
        return params, state, loss

    text, _ = char_lm.load()
    random, losses = np.random.default_rng(0), []
    columns = [
        TextColumn(f"[bold]{moments:9s}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[report]}"),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(moments, total=steps, report="compiling")
        for _ in range(steps):
            starts = random.integers(0, len(text) - char_lm.CONTEXT, (BATCH, 1))
            windows = text[starts + np.arange(char_lm.CONTEXT + 1)].astype(np.int32)
            params, state, loss = train_step(params, state, jax.device_put(windows, batches))
            losses.append(float(loss))
            bar.update(task, advance=1, report=f"loss {losses[-1]:.3f}")

    abstract = jax.eval_shape(tx.init, shapes)
    everywhere = jax.tree.map(lambda _: NamedSharding(mesh, jax.P()), abstract)
    sizes = {
        "the whole state": bytes_on_a_device(abstract, everywhere),
        "split as the parameters are": bytes_on_a_device(
            abstract, state_shardings(tx, shapes, placed)
        ),
        "and along data, by ZeRO": bytes_on_a_device(abstract, state_placed),
    }
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert held == sizes["and along data, by ZeRO"]  # the computed bytes are the actual bytes
    return Run(losses, state, sizes)


def positive(text: str) -> int:
    """Parses a number of steps or devices."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def main(argv: list[str] | None = None) -> Run:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", choices=char_lm.MOMENTS, default="float32", help="(float32)")
    parser.add_argument("--steps", type=positive, default=100, help="training steps (100)")
    parser.add_argument("--data", type=positive, default=4, help="devices along data (4)")
    parser.add_argument("--model", type=positive, default=2, help="devices along model (2)")
    args = parser.parse_args(argv)
    if args.data * args.model > len(jax.devices()):
        parser.error(
            f"--data {args.data} times --model {args.model} is more than the {len(jax.devices())}"
            " devices that JAX sees"
        )
    if BATCH % args.data or char_lm.WIDTH % args.model:
        parser.error(f"--data must divide {BATCH} and --model {char_lm.WIDTH}")

    run = train(args.moments, args.steps, args.data, args.model)
    moment = jax.tree.leaves(run.state[0].mu["blocks"][0]["up"])[0]
    console.print(
        f"\nThe first moment of a matrix, {moment.dtype}{list(moment.shape)}, is placed on its"
        f" {args.data * args.model} devices ({moment.sharding.spec}):"
    )
    jax.debug.visualize_array_sharding(moment, scale=0.5)
    for name, size in run.bytes_on_a_device.items():
        console.print(f"{size:>12,} bytes on each device: {name}")
    return run


if __name__ == "__main__":
    main()
