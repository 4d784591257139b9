# SPDX-License-Identifier: Apache-2.0
"""A chain in optax's style: clipped gradients, and a rate that warms up and decays.

The model is logistic regression on scikit-learn's breast cancer data; its parameters are a plain
dict. The optimizer's state contains the rate of the last step, from `scale_by_lr`.

    python examples/clip_and_schedule.py --steps 200
"""

import argparse

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_breast_cancer

import adamfn


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps is {args.steps}; expected at least 1")

    features, labels = load_breast_cancer(return_X_y=True)
    x = jnp.asarray((features - features.mean(0)) / features.std(0), jnp.float32)
    y = jnp.asarray(labels, jnp.float32)

    def loss_of(params):
        logits = x @ params["weights"] + params["bias"]
        return optax.sigmoid_binary_cross_entropy(logits, y).mean()

    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=0.05,
        warmup_steps=max(args.steps // 10, 1),
        decay_steps=max(args.steps, 2),
    )
    tx = adamfn.chain(adamfn.clip_by_global_norm(1.0), adamfn.adamw(schedule))
    params = {"weights": jnp.zeros(x.shape[1]), "bias": jnp.zeros(())}
    state = tx.init(params)

    @jax.jit
    def train_step(params, state):
        loss, grads = jax.value_and_grad(loss_of)(params)
        params, state = adamfn.step(tx, grads, state, params)
        return params, state, loss

    losses = []
    for step in range(args.steps):
        params, state, loss = train_step(params, state)
        losses.append(float(loss))
        if step % max(args.steps // 10, 1) == 0:
            rate = optax.tree.get(state, "learning_rate")
            print(f"step {step:4d}  loss {loss:.4f}  learning rate {rate:.4f}")
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
