# SPDX-License-Identifier: Apache-2.0
"""Plain pytrees: one regression, fifty steps, the ten losses of a torch notebook.

The network is Linear(2, 16)-ReLU-Linear(16, 1) from torch.manual_seed(0), its weights recorded in
`data/seed_weights.json`; the single sample is x = [1, 2], y = 1. A from-scratch Adam in torch
printed 0.809774 at epoch 5 and 0.232563 at epoch 50.

    python examples/seed_regression.py
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp

import adamfn

WEIGHTS = Path(__file__).parent / "data" / "seed_weights.json"
X, Y = jnp.array([[1.0, 2.0]]), jnp.array([[1.0]])


def predict(params, x):
    hidden = jax.nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return hidden @ params["out"]["kernel"] + params["out"]["bias"]


def loss(params):
    return jnp.mean((predict(params, X) - Y) ** 2)


def losses(steps: int) -> list[float]:
    """The loss before each step."""
    recorded = json.loads(WEIGHTS.read_text())
    params = {
        layer: {name: jnp.array(values) for name, values in arrays.items()}
        for layer, arrays in recorded.items()
    }
    tx = adamfn.adam(learning_rate=1e-3)
    state = tx.init(params)

    @jax.jit
    def train_step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        params, state = adamfn.step(tx, grads, state, params)
        return params, state, value

    found = []
    for _ in range(steps):
        params, state, value = train_step(params, state)
        found.append(float(value))
    return found


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps is {args.steps}; expected at least 1")
    found = losses(args.steps)
    for epoch in range(5, args.steps + 1, 5):
        print(f"Epoch {epoch:02d}: loss = {found[epoch - 1]:.6f}")
    return found[-1]


if __name__ == "__main__":
    main()
