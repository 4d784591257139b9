# SPDX-License-Identifier: Apache-2.0
"""Train a small character transformer on the text of Python's standard library.

The text is the installed standard library: its top-level modules, with every tenth held out.
The model has 0.6M parameters in plain JAX. AdamW with an optax schedule takes many steps in one
jitted scan that donates parameters and state. `--moments` selects the format of Adam's moments.

    python examples/char_lm.py
    python examples/char_lm.py --moments 4bit --steps 400 --seed 1 --chars 1000
"""

import argparse
import functools
import os
import signal
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


def interrupted(*_: object) -> None:
    """Ends the program at once, and shows the cursor that a progress bar has hidden."""
    show_cursor = b"\x1b[?25h" if sys.stdout.isatty() else b""
    os.write(sys.stdout.fileno(), show_cursor + b"\nInterrupted.\n")
    os._exit(130)


if __name__ == "__main__":  # before the imports, which take seconds
    signal.signal(signal.SIGINT, interrupted)

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

import adamfn

MOMENTS = ("float32", "bfloat16", "8bit", "4bit", "factored", "blockmean")
CHARACTERS, CONTEXT, WIDTH, HEADS, LAYERS = 128, 64, 128, 4, 3  # a character is its ASCII code
BATCH, PEAK_RATE, WEIGHT_DECAY = 16, 3e-3, 1e-2
STEPS_PER_CALL, VALIDATION_WINDOWS, LARGEST_TEXT = 20, 2048, 4_000_000
PROMPT = "def read_lines(path):\n    "
console = Console()


class Run(NamedTuple):
    """The result of a training run."""

    validation_loss: float
    state: Any
    losses: list[float]
    params: Any


@functools.cache
def load() -> tuple[np.ndarray, np.ndarray]:
    """ASCII codes to train on and to validate on, the same for every seed."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [file.read_bytes().replace(b"\r\n", b"\n") for file in files]
    codes = [np.frombuffer(text, np.uint8) for text in texts]
    codes = [code[code < CHARACTERS] for code in codes]
    train = [code for i, code in enumerate(codes) if i % 10 != 9]
    held_out = [code for i, code in enumerate(codes) if i % 10 == 9]
    return np.concatenate(train)[:LARGEST_TEXT], np.concatenate(held_out)


def init(key: jax.Array, layers: int = LAYERS) -> dict:
    """Weights of standard deviation 1 / sqrt(inputs); the last layer shares the embedding."""
    keys = iter(jax.random.split(key, 1 + 4 * layers))

    def dense(inputs: int, outputs: int) -> jax.Array:
        return jax.random.normal(next(keys), (inputs, outputs)) / inputs**0.5

    def block() -> dict:
        return {
            "norm_1": jnp.ones(WIDTH),
            "qkv": dense(WIDTH, 3 * WIDTH),
            "out": dense(WIDTH, WIDTH) / (2 * layers) ** 0.5,
            "norm_2": jnp.ones(WIDTH),
            "up": dense(WIDTH, 4 * WIDTH),
            "down": dense(4 * WIDTH, WIDTH) / (2 * layers) ** 0.5,
        }

    return {
        "characters": dense(WIDTH, CHARACTERS).T,
        "blocks": [block() for _ in range(layers)],
        "norm": jnp.ones(WIDTH),
    }


def normalize(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * scale


def rotate(x: jax.Array) -> jax.Array:
    """Rotates pairs of elements by their position, so that products depend on the distance."""
    (length, _, size), half = x.shape[1:], x.shape[3] // 2
    angles = jnp.arange(length)[:, None] * 100.0 ** -(2 * jnp.arange(half) / size)
    sin, cos = jnp.sin(angles)[:, None], jnp.cos(angles)[:, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def layer(block: dict, x: jax.Array) -> jax.Array:
    """One block of the transformer, for x of shape (n, length, WIDTH)."""
    qkv = normalize(x, block["norm_1"]) @ block["qkv"]
    heads = (*x.shape[:2], HEADS, WIDTH // HEADS)
    q, k, v = (part.reshape(heads) for part in jnp.split(qkv, 3, -1))
    mixed = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
    x = x + mixed.reshape(x.shape) @ block["out"]
    return x + jax.nn.gelu(normalize(x, block["norm_2"]) @ block["up"]) @ block["down"]


def logits_of(params: dict, codes: jax.Array) -> jax.Array:
    """Scores of the next character, (n, length, CHARACTERS), for codes of shape (n, length).

    Computed in float32, whatever the dtype of the weights.
    """
    params = jax.tree.map(lambda weight: weight.astype(jnp.float32), params)
    x = params["characters"][codes]
    for block in params["blocks"]:
        x = layer(block, x)
    return normalize(x, params["norm"]) @ params["characters"].T


def loss_of(params: dict, windows: jax.Array) -> jax.Array:
    """Mean cross-entropy of each window's characters after its first, in nats."""
    logits = logits_of(params, windows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


@jax.jit
def validate(params: dict, windows: jax.Array) -> jax.Array:
    return jax.lax.map(lambda batch: loss_of(params, batch), windows).mean()


def train(
    moments: str = "float32",
    steps: int = 800,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
    recipe: Callable[[optax.Schedule], Any] | None = None,
    evaluated: Callable[[Any, dict], dict] | None = None,
    dtype: Any = jnp.float32,
) -> Run:
    """Trains a new model.

    Args:
      moments: the format of Adam's moments, one of `MOMENTS`.
      steps: training steps.
      seed: of weights and batches.
      progress: called with the number of steps taken and the loss of the last ones.
      recipe: makes the optimizer from the learning rate's schedule; None for AdamW.
      evaluated: computes the validated weights from state and parameters; None for the
        parameters.
      dtype: of the weights and of their gradients.
    """
    key, batches = jax.random.split(jax.random.key(seed))
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=PEAK_RATE / 10,
        peak_value=PEAK_RATE,
        warmup_steps=steps // 10,
        decay_steps=max(steps, 2),
        end_value=PEAK_RATE / 10,
    )
    chosen = {} if moments == "float32" else {"moments": moments}
    recipe = recipe or functools.partial(adamfn.adamw, weight_decay=WEIGHT_DECAY, **chosen)
    tx = recipe(schedule)
    params = jax.tree.map(lambda weight: weight.astype(dtype), init(key))
    state = tx.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_steps(params, state, numbers, text):
        def train_step(carry, number):
            params, state = carry
            where = jax.random.fold_in(batches, number)
            starts = jax.random.randint(where, (BATCH, 1), 0, len(text) - CONTEXT)
            windows = text[starts + jnp.arange(CONTEXT + 1)].astype(jnp.int32)
            loss, grads = jax.value_and_grad(loss_of)(params, windows)
            return adamfn.step(tx, grads, state, params), loss

        (params, state), losses = jax.lax.scan(train_step, (params, state), numbers)
        return params, state, losses

    text, held_out = map(jnp.asarray, load())
    losses = []
    for begin in range(0, steps, STEPS_PER_CALL):
        numbers = jnp.arange(begin, min(begin + STEPS_PER_CALL, steps))
        params, state, new = train_steps(params, state, numbers, text)
        losses += new.tolist()
        if progress:
            progress(len(losses), float(new.mean()))

    params = evaluated(state, params) if evaluated else params
    starts = np.linspace(0, len(held_out) - CONTEXT - 1, VALIDATION_WINDOWS).astype(int)
    windows = held_out[starts[:, None] + np.arange(CONTEXT + 1)].astype(jnp.int32)
    loss = validate(params, windows.reshape(-1, 64, CONTEXT + 1))
    return Run(float(loss), state, losses, params)


def sample(params: dict, length: int, seed: int, temperature: float = 0.8) -> str:
    """Continues `PROMPT` by `length` characters."""
    prompt = np.frombuffer(PROMPT.encode(), np.uint8).astype(np.int32)
    window = jnp.zeros(CONTEXT, jnp.int32).at[: len(prompt)].set(prompt)

    @jax.jit
    def write(window):
        def step(carry, key):
            window, last = carry  # characters after `last` are ignored
            logits = logits_of(params, window[None])[0, last] / temperature
            code = jax.random.categorical(key, logits)
            full = last == CONTEXT - 1
            window = jnp.where(full, jnp.roll(window, -1), window)
            last = jnp.where(full, last, last + 1)
            return (window.at[last].set(code), last), code

        keys = jax.random.split(jax.random.key(seed), length)
        return jax.lax.scan(step, (window, len(prompt) - 1), keys)[1]

    return "".join(map(chr, np.asarray(write(window))))


def positive(text: str) -> int:
    """Parses a number of steps or characters."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def main(argv: list[str] | None = None) -> Run:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", choices=MOMENTS, default="float32", help="(float32)")
    parser.add_argument("--steps", type=positive, default=800, help="training steps (800)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and sample (0)")
    parser.add_argument("--chars", type=positive, default=400, help="length of the sample (400)")
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
            bar.update(task, completed=step, report=f"loss {loss:.3f}")

        run = train(args.moments, args.steps, args.seed, progress)
    count = sum(leaf.size for leaf in jax.tree.leaves(run.params))
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(run.state))
    console.print(
        f"{count:,} parameters; Adam's state takes {stored / count:.2f} bytes for each.\n"
        f"Validation loss {run.validation_loss:.3f} nats a character. A sample:\n"
    )
    written = sample(run.params, args.chars, args.seed)
    console.print(Text(PROMPT, style="bold") + Text(written), soft_wrap=True)
    return run


if __name__ == "__main__":
    main()
