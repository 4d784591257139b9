"""JAX's own checks raise nothing on finite gradients: every member, in every format."""

from contextlib import ExitStack

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import adamfn

MEMBERS = {
    "adam": adamfn.adam,
    "nesterov": lambda **own: adamfn.adam(nesterov=True, **own),
    "adamw": adamfn.adamw,
    "amsgrad": adamfn.amsgrad,
    "adamax": adamfn.adamax,
    "nadam": adamfn.nadam,
    "radam": adamfn.radam,
    "lazy_adam": adamfn.lazy_adam,
    "without memory": lambda **own: adamfn.adam(b1=0.0, b2=0.0, **own),
}
SETTINGS = {
    "jax_debug_nans": True,
    "jax_debug_infs": True,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_enable_checks": True,
}
SHAPE = (128, 128)  # the smallest that all formats hold
SIZES = [0.0, 1.0, 1e-39, 1e-20]  # of whole rows: zero, normal, denormal, and denormal if squared


def trees(name):
    """A transformation, parameters with a leaf for each format, and gradients of every size."""
    # Rows of lazy_adam cannot rest where several share a number.
    formats = [f for f in adamfn.formats.FORMATS if name != "lazy_adam" or f != "factored"]
    noise = np.random.default_rng(0).normal(size=SHAPE)
    rows = (noise * np.resize(SIZES, 128)[:, None]).astype(np.float32)
    grads = dict.fromkeys(formats, jnp.asarray(rows))
    return MEMBERS[name](moments=lambda path, leaf: path), jax.tree.map(jnp.ones_like, grads), grads


def steps(tx, params, grads):
    """Three steps, the second with gradients of zero."""

    def step(carry, scale):
        params, state = carry
        scaled = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
        return adamfn.step(tx, scaled, state, params), None

    return jax.lax.scan(step, (params, tx.init(params)), jnp.array([1.0, 0.0, 1.0]))[0]


@pytest.fixture
def switches():
    with ExitStack() as stack:
        for name, value in SETTINGS.items():
            stack.callback(jax.config.update, name, getattr(jax.config, name))
            jax.config.update(name, value)
        yield


@pytest.mark.parametrize("name", MEMBERS)
def test_debugging_switches_in_jit(name, switches):
    tx, params, grads = trees(name)
    step = jax.jit(lambda *trees: steps(tx, *trees)).lower(params, grads).compile()
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(step(params, grads))


@pytest.mark.parametrize("name", MEMBERS)
def test_no_tracer_leaks(name):
    tx, params, grads = trees(name)
    with jax.checking_leaks():
        jax.jit(lambda *trees: steps(tx, *trees)).trace(params, grads)


@pytest.mark.parametrize("name", MEMBERS)
def test_debugging_switches_eagerly(name, switches):
    tx = MEMBERS[name]()
    params = {"w": jnp.ones(4), "n": 1.0}
    state = tx.init(params)
    for w in ([0.0, 1.0, 1e-39, 1e-20], [0.0, 0.0, 0.0, 0.0], [1e30, -1.0, 1e-39, 0.0]):
        updates, state = tx.update({"w": jnp.array(w), "n": 1.0}, state, params)
        params = adamfn.apply_updates(params, updates)


def test_checkify():
    tx, params, grads = trees("adamw")
    errors = checkify.float_checks | checkify.index_checks | checkify.div_checks
    plain = adamfn.with_backend(tx, "xla")  # its operations are seen one by one
    checked = jax.jit(checkify.checkify(lambda *trees: steps(plain, *trees), errors=errors))
    error, _ = checked(params, grads)
    error.throw()


def test_without_jit(switches):
    tx, params, grads = trees("adamw")
    with jax.disable_jit():
        adamfn.step(tx, grads, tx.init(params), params)


@pytest.mark.parametrize("name", MEMBERS)
def test_a_python_number_without_jit(name, switches):
    tx = MEMBERS[name]()
    with jax.disable_jit():
        updates, _ = tx.update(1.0, tx.init(1.0), 1.0)
    assert np.isfinite(updates)
