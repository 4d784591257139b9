# SPDX-License-Identifier: Apache-2.0
"""Flax's partitioned parameters on a mesh of eight: in Linen's TrainState, in an nnx.Optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType

import adamfn

P = jax.P
MESH = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
RULES = [("inputs", "data"), ("outputs", "model")]
KERNELS = {"Dense_0": P("data", "model"), "Dense_1": P("model", "data")}
X = np.random.default_rng(0).normal(size=(16, 128)).astype(np.float32)


class Network(nn.Module):
    logical: bool

    @nn.compact
    def __call__(self, x):
        box = nn.with_logical_partitioning if self.logical else nn.with_partitioning
        names = ("inputs", "outputs") if self.logical else ("data", "model")
        begin = nn.initializers.lecun_normal()
        x = nn.tanh(nn.Dense(512, kernel_init=box(begin, names))(x))
        return nn.Dense(128, kernel_init=box(begin, names[::-1]))(x)


def weights(p):
    """Small whole numbers, for gradients that are the same to the bit on any mesh."""
    return jnp.arange(p.size, dtype=jnp.float32).reshape(p.shape) * 7 % 13 - 6


def train_step(state):
    def loss(params):
        return sum(jnp.vdot(p, weights(p)) for p in jax.tree.leaves(params))

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


@pytest.mark.parametrize(
    ("moments", "logical"),
    [("float32", False), ("4bit", False), ("factored", False), ("8bit", True)],
)
def test_a_train_state_on_a_mesh(moments, logical):
    network = Network(logical)
    # By XLA on one device too: native code may round an ulp otherwise, and turn a code.
    tx = adamfn.with_backend(adamfn.adamw(1e-3, moments=moments), "xla")

    def create():
        params = network.init(jax.random.key(0), X)["params"]
        return TrainState.create(apply_fn=network.apply, params=params, tx=tx)

    shapes = jax.eval_shape(create)
    if logical:
        where = nn.logical_to_mesh_sharding(nn.get_partition_spec(shapes), MESH, RULES)
    else:
        where = nn.get_sharding(shapes, MESH)
    state = jax.jit(create, out_shardings=where)()
    step = jax.jit(train_step, in_shardings=(where,), out_shardings=where)
    expected, step_alone = jax.jit(create)(), jax.jit(train_step)
    for _ in range(3):
        state, expected = step(state), step_alone(expected)
    kept = nn.unbox(state.opt_state[0])
    for layer, spec in KERNELS.items():
        trees = (nn.unbox(state.params), kept.mu, kept.nu)
        kernels = [tree[layer]["kernel"] for tree in trees if tree[layer]["kernel"] is not None]
        assert len(kernels) == (2 if moments in ("4bit", "factored") else 3)
        for kernel in kernels:
            assert kernel.sharding.is_equivalent_to(jax.NamedSharding(MESH, spec), 2)
        a, b = (nn.unbox(s.params)[layer]["kernel"] for s in (state, expected))
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    for a, b in zip(*(jax.tree.leaves(s.opt_state) for s in (state, expected)), strict=True):
        if b.dtype in (jnp.int8, jnp.uint8, jnp.bfloat16):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    for scale in jax.tree.leaves(kept.scales):
        assert scale.sharding.is_fully_replicated
    assert len(jax.tree.leaves(kept.scales)) == (0 if moments == "float32" else 6)


@pytest.mark.parametrize("moments", ["8bit", "factored"])
@pytest.mark.parametrize("spec", [("data", "model"), (None, ("data", "model"))])
def test_an_nnx_optimizer_made_inside_jit_keeps_its_shardings(moments, spec):
    """Else the second step is compiled again: flax gives no shardings to scales."""

    @nnx.jit
    def create():
        box = nnx.with_partitioning(nnx.initializers.lecun_normal(), spec)
        model = nnx.Linear(128, 1024, use_bias=False, kernel_init=box, rngs=nnx.Rngs(0))
        return model, nnx.Optimizer(model, adamfn.adamw(moments=moments), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda m: jnp.mean(m(X) ** 2))(model))

    def shardings(optimizer):
        return [x.sharding for x in jax.tree.leaves(nnx.as_pure(nnx.state(optimizer.opt_state)))]

    with jax.set_mesh(MESH):
        model, optimizer = create()
        before = shardings(optimizer)
        train_step(model, optimizer)
    assert before == shardings(optimizer)
    rows = moments == "factored" and spec[0] is not None
    assert sum(not x.is_fully_replicated for x in before) == (5 if moments == "8bit" else 3 + rows)
