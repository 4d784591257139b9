# SPDX-License-Identifier: Apache-2.0
"""How far each library's Adam is from its formulas.

60 steps of 4096 gradients whose scales span nine decades, float32, jitted; three seeds. An error is
the largest difference of a step from the formulas in float64, relative to that step's largest
update. torch takes part where it is installed.

    python benchmarks/exactness.py               # writes benchmarks/results/exactness.json
"""

import argparse
import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import adamfn

STEPS, SIZE, SEEDS = 60, 4096, (0, 1, 2)
LEARNING_RATE, B1, B2, EPS = 1e-3, 0.9, 0.999, 1e-8

Run = Callable[[np.ndarray], Iterator[np.ndarray]]


def formulas(gradients: np.ndarray, b1: float = B1, b2: float = B2) -> np.ndarray:
    """The updates that Kingma and Ba's algorithm 1 gives, in float64."""
    m, v, updates = np.zeros(SIZE), np.zeros(SIZE), []
    for t, g in enumerate(gradients.astype(np.float64), start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
        updates.append(-LEARNING_RATE * m_hat / (np.sqrt(v_hat) + EPS))
    return np.array(updates)


def transformation(tx: adamfn.GradientTransformation) -> Run:
    def run(gradients: np.ndarray) -> Iterator[np.ndarray]:
        params = jnp.zeros(SIZE)
        state, update = tx.init(params), jax.jit(tx.update)
        for g in gradients:
            updates, state = update(jnp.asarray(g), state, params)
            yield np.asarray(updates)

    return run


def traced(gradients: np.ndarray) -> Iterator[np.ndarray]:
    @jax.jit
    def update(g, state, learning_rate, b1, b2, eps):
        return adamfn.adam(learning_rate, b1, b2, eps).update(g, state)

    state = adamfn.adam().init(jnp.zeros(SIZE))
    for g in gradients:
        updates, state = update(jnp.asarray(g), state, LEARNING_RATE, B1, B2, EPS)
        yield np.asarray(updates)


def torch_adam(gradients: np.ndarray) -> Iterator[np.ndarray]:
    import torch

    param = torch.zeros(SIZE, requires_grad=True)
    optimizer = torch.optim.Adam([param], lr=LEARNING_RATE, betas=(B1, B2), eps=EPS)
    for g in gradients:
        param.data.zero_()  # so that the parameter is the update, to the last bit
        param.grad = torch.as_tensor(g)
        optimizer.step()
        yield param.detach().numpy().copy()


def rounded_decays(gradients: np.ndarray) -> Iterator[np.ndarray]:
    """What is left for a library to whom b1 and b2 come as float32 arrays."""
    yield from formulas(gradients, float(np.float32(B1)), float(np.float32(B2)))


RUNS: dict[str, Run] = {
    "optax.adam": transformation(optax.adam(LEARNING_RATE)),
    "optax.adam, injected hyperparameters": transformation(
        optax.inject_hyperparams(optax.adam)(LEARNING_RATE)
    ),
    **({"torch.optim.Adam": torch_adam} if find_spec("torch") else {}),
    "adamfn.adam": transformation(adamfn.adam()),
    "adamfn.adam, traced hyperparameters": traced,
    "the formulas in float64, b1 and b2 rounded to float32": rounded_decays,
}


def gradients_of(seed: int) -> np.ndarray:
    """Gradients whose scales span nine decades."""
    random = np.random.default_rng(seed)
    scales = 10 ** random.uniform(-8, 1, SIZE)
    return (random.standard_normal((STEPS, SIZE)) * scales).astype(np.float32)


def largest_error(run: Run, seed: int) -> float:
    gradients = gradients_of(seed)
    expected = formulas(gradients)
    found = np.array(list(run(gradients)), np.float64)
    return float(np.max(np.abs(found - expected).max(1) / np.abs(expected).max(1)))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "exactness.json"
    )
    args = parser.parse_args(argv)
    errors = {name: [largest_error(run, seed) for seed in SEEDS] for name, run in RUNS.items()}
    shown = Table(title="Largest error of an update, relative to the step's largest update")
    shown.add_column("library")
    shown.add_column("three seeds", justify="right")
    for name, values in errors.items():
        shown.add_row(name, ", ".join(f"{value:.2g}" for value in values))
    Console().print(shown)
    versions = {"jax": jax.__version__, "optax": optax.__version__}
    if find_spec("torch"):
        import torch

        versions["torch"] = torch.__version__.partition("+")[0]
    args.out.write_text(json.dumps({"versions": versions, "errors": errors}, indent=2) + "\n")


if __name__ == "__main__":
    main()
