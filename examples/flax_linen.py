# SPDX-License-Identifier: Apache-2.0
"""Flax Linen: a regression on scikit-learn's diabetes data, with a TrainState.

python examples/flax_linen.py --steps 300
"""

import argparse
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from sklearn.datasets import load_diabetes

import adamfn
from adamfn.interop.flax import TrainState  # flax.training.train_state's works too, in more passes


class Regressor(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(1)(nn.relu(nn.Dense(32)(x)))[:, 0]


@partial(jax.jit, donate_argnums=0)  # the step writes the state in place
def train_step(state: TrainState, x: jax.Array, y: jax.Array) -> tuple[TrainState, jax.Array]:
    def loss_of(params):
        return jnp.mean((state.apply_fn({"params": params}, x) - y) ** 2)

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    return state.apply_gradients(grads=grads), loss


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
    model = Regressor()
    state = TrainState.create(
        apply_fn=model.apply,
        params=model.init(jax.random.key(args.seed), x)["params"],
        tx=adamfn.adamw(1e-2, mask=adamfn.masks.matrices()),
    )

    losses = []
    for _ in range(args.steps):
        state, loss = train_step(state, x, y)
        losses.append(float(loss))
    print(f"mean squared error {losses[0]:.3f} -> {losses[-1]:.3f} (1 is a constant guess)")
    return losses


if __name__ == "__main__":
    main()
