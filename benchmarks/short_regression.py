# SPDX-License-Identifier: Apache-2.0
"""The last loss of a short regression at a high rate, by the format of Adam's moments.

A network of 17,000 weights learns a sine in 200 steps. `docs/lean_moments.md` has the means.

    python benchmarks/short_regression.py
"""

import jax
import jax.numpy as jnp

import adamfn

SEEDS, STEPS, RATE = 16, 200, 0.01
X = jnp.linspace(-1.0, 1.0, 64)[:, None]


def last_loss(moments: str, key: jax.Array) -> jax.Array:
    """The loss after all steps, from the weights that a key draws."""
    first, second, last = jax.random.split(key, 3)
    params = {
        "first": 4 * jax.random.normal(first, (1, 128)),
        "second": jax.random.normal(second, (128, 128)) / 128**0.5,
        "last": jax.random.normal(last, (128, 1)) / 128**0.5,
    }

    def loss(params):
        hidden = jnp.tanh(jnp.tanh(X @ params["first"] + 1) @ params["second"])
        return jnp.mean((hidden @ params["last"] - jnp.sin(4 * X)) ** 2)

    tx = adamfn.adam(RATE, moments=moments)

    def one(_, run):
        params, state = run
        return adamfn.step(tx, jax.grad(loss)(params), state, params)

    return loss(jax.lax.fori_loop(0, STEPS, one, (params, tx.init(params)))[0])


if __name__ == "__main__":
    keys = jax.random.split(jax.random.key(0), SEEDS)
    for name in ("float32", "8bit", "4bit"):
        losses = jax.jit(jax.vmap(lambda key, name=name: last_loss(name, key)))(keys)
        print(f"{name:8} {losses.mean():.5f}")
