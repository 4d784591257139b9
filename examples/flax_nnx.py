# SPDX-License-Identifier: Apache-2.0
"""Flax NNX: classify irises, with adamfn.adamw in an Optimizer that takes one-pass steps.

python examples/flax_nnx.py --steps 300
"""

import argparse

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_iris

import adamfn
from adamfn.interop.flax import Optimizer  # nnx.Optimizer works too, in more passes


class Classifier(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(4, 32, rngs=rngs)
        self.out = nnx.Linear(32, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(nnx.relu(self.hidden(x)))


def loss_of(model: Classifier, x: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()


@nnx.jit(donate_argnums=(0, 1))  # the step writes model and optimizer in place
def train_step(model: Classifier, optimizer: Optimizer, x: jax.Array, labels: jax.Array):
    loss, grads = nnx.value_and_grad(loss_of)(model, x, labels)
    optimizer.update(model, grads)
    return loss


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps is {args.steps}; expected at least 1")

    features, labels = load_iris(return_X_y=True)
    x = jnp.asarray((features - features.mean(0)) / features.std(0), jnp.float32)
    y = jnp.asarray(labels)
    model = Classifier(nnx.Rngs(args.seed))
    tx = adamfn.adamw(1e-2, mask=adamfn.masks.matrices())
    optimizer = Optimizer(model, tx, wrt=nnx.Param)

    losses = [float(train_step(model, optimizer, x, y)) for _ in range(args.steps)]
    accuracy = jnp.mean(model(x).argmax(-1) == y)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, accuracy {accuracy:.1%}")
    return losses


if __name__ == "__main__":
    main()
