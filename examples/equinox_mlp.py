# SPDX-License-Identifier: Apache-2.0
"""Equinox: fit a sine curve; the optimizer sees only the model's arrays.

python examples/equinox_mlp.py --steps 500
"""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp

import adamfn


def loss_of(model: eqx.nn.MLP, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps is {args.steps}; expected at least 1")

    x = jnp.linspace(-3.0, 3.0, 128)[:, None]
    y = jnp.sin(2.0 * x)
    model = eqx.nn.MLP(1, 1, width_size=32, depth=2, key=jax.random.key(args.seed))
    tx = adamfn.adam(1e-2)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))  # functions become None

    @eqx.filter_jit(donate="all")  # the step writes model and state in place
    def train_step(model, state):
        loss, grads = eqx.filter_value_and_grad(loss_of)(model, x, y)
        # In more passes: updates, state = tx.update(grads, state, model), and eqx.apply_updates.
        model, state = adamfn.step(tx, grads, state, model)
        return model, state, loss

    losses = []
    for _ in range(args.steps):
        model, state, loss = train_step(model, state)
        losses.append(float(loss))
    print(f"mean squared error {losses[0]:.3f} -> {losses[-1]:.5f}")
    return losses


if __name__ == "__main__":
    main()
