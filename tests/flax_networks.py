# SPDX-License-Identifier: Apache-2.0
"""A network of flax's nnx and one of its linen, and a training step of each, for several tests."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx

import adamfn

X = jnp.asarray(np.random.default_rng(0).standard_normal((16, 8)), jnp.float32)
Y = jnp.sin(X[:, :3])
STEPS = 20
TRANSFORMATIONS = {
    "adam": lambda: adamfn.adam(3e-3),
    "adamw": lambda: adamfn.adamw(optax.cosine_decay_schedule(3e-3, STEPS)),
    "8bit": lambda: adamfn.adamw(3e-3, moments="8bit"),
    "clipped": lambda: adamfn.chain(optax.clip_by_global_norm(0.1), adamfn.adamw(3e-3)),
    "MultiSteps": lambda: optax.MultiSteps(adamfn.adamw(3e-3), 2),
    "optax": lambda: optax.adamw(3e-3),
}


class Network(nnx.Module):
    def __init__(self, width=128):
        rngs = nnx.Rngs(0)
        self.hidden = nnx.Linear(8, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)  # has variables that are no parameters
        self.inner = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.inner(nnx.relu(self.norm(self.hidden(x)))))


def loss_of(model):
    return jnp.mean((model(X) - Y) ** 2)


def train_step(model, optimizer, wrt=nnx.Param, **extra):
    loss, grads = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, wrt))(model)
    optimizer.update(model, grads, **extra)
    return loss


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.Dense(128, use_bias=False)(nn.relu(nn.Dense(128)(x))))


def linen_state(cls, tx, **fields):
    model = Dense()
    params = model.init(jax.random.key(0), X)["params"]
    return cls.create(apply_fn=model.apply, params=params, tx=tx, **fields)


def linen_step(state, **extra):
    def loss_of(params):
        return jnp.mean((state.apply_fn({"params": params}, X) - Y) ** 2)

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    return state.apply_gradients(grads=grads, **extra), loss
