# SPDX-License-Identifier: Apache-2.0
"""One rate for each group of parameters, with optax.partition.

A regression that only fine-tunes its first layer: the layer's rate is a hundredth of the head's.
The head's bias has no weight decay.

    python examples/per_group_rates.py --steps 300
"""

import argparse

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_diabetes

import adamfn


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps is {args.steps}; expected at least 1")

    features, targets = load_diabetes(return_X_y=True)
    x = jnp.asarray(features / features.std(0), jnp.float32)
    y = jnp.asarray((targets - targets.mean()) / targets.std(), jnp.float32)
    params = {
        "body": {"kernel": jax.random.normal(jax.random.key(args.seed), (x.shape[1], 32)) / 3},
        "head": {"kernel": jnp.zeros(32), "bias": jnp.zeros(())},
    }

    def loss_of(params):
        hidden = jnp.tanh(x @ params["body"]["kernel"])
        return jnp.mean((hidden @ params["head"]["kernel"] + params["head"]["bias"] - y) ** 2)

    tx = optax.partition(
        {
            "slow": adamfn.adam(1e-4),
            "fast": adamfn.adamw(1e-2, mask=lambda p: jax.tree.map(lambda leaf: leaf.ndim > 0, p)),
        },
        {"body": "slow", "head": "fast"},
    )
    state = tx.init(params)

    @jax.jit
    def train_step(params, state):
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = tx.update(grads, state, params)
        return adamfn.apply_updates(params, updates), state, loss

    losses, start = [], params
    for _ in range(args.steps):
        params, state, loss = train_step(params, state)
        losses.append(float(loss))
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), params, start)
    print(f"mean squared error {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(f"largest move: body {moved['body']['kernel']:.4f}, head {moved['head']['kernel']:.4f}")
    return losses


if __name__ == "__main__":
    main()
