# SPDX-License-Identifier: Apache-2.0
"""JAX's own checks raise nothing on finite gradients: every member, in every format.

That an optimizer's NaN surfaces elsewhere is tensorflow issue 2288; optax issue 1754 is one (0 / 0
in float16), flax issue 924 a promotion under x64, jax pull 4840 one without it.
"""

from contextlib import ExitStack

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import adamfn
from adamfn import monitor

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


EVERY_FORMAT = (
    "adam",
    "adamw",
    "amsgrad",
)  # the others' formulas do not know how moments are stored


def trees(name):
    """A transformation, parameters with a leaf for each format, and gradients of every size."""
    formats = adamfn.formats.FORMATS if name in EVERY_FORMAT else ("float32", "8bit")
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


def among_moments(*stages):
    between = (adamfn.scale_by_moments(), adamfn.bias_correct(), *stages)
    return adamfn.chain(*between, adamfn.scale_by_lr(1e-3))


CHAINS = {
    "atan2": adamfn.chain(adamfn.scale_by_atan2_moments(), adamfn.scale_by_lr(1e-3)),
    "cautious updates": among_moments(adamfn.cautious_updates()),
    "clipped updates": among_moments(adamfn.clip_updates()),
    "cautious decay": among_moments(adamfn.add_decayed_weights(0.1, cautious=True)),
    "corrected decay": among_moments(adamfn.add_corrected_decay(0.1, 1e-3, 1e-3)),
    "clipped": adamfn.chain(adamfn.clip_by_global_norm(1.0), adamfn.adamw()),
    "skipping": adamfn.chain(adamfn.skip_outliers(watched=("grad_norm",)), adamfn.adamw()),
    **{
        f"{bits} bits": adamfn.chain(adamfn.adamw(), adamfn.round_weights(bits))
        for bits in (16, 24, 32)
    },
    "packed": adamfn.packed(adamfn.adamw()),
}


@pytest.mark.parametrize("name", [*MEMBERS, *CHAINS])
def test_every_dtype_and_every_stage(name, switches):
    tx = CHAINS[name] if name in CHAINS else MEMBERS[name]()
    # Alone, in jit and eagerly, members take float32 below.
    dtypes = ("float32", "bfloat16") if name in CHAINS else ("bfloat16", "float16", "complex64")
    params = {dtype: jnp.ones(8, dtype) for dtype in dtypes}
    grads = {dtype: jnp.resize(jnp.array([0.0, 1.0, 1e-3]), 8).astype(dtype) for dtype in dtypes}

    @jax.jit
    def both(params, state):
        updates, state = tx.update(grads, state, params)
        monitor.observe(tx, grads, state, params)
        return adamfn.step(tx, grads, state, adamfn.apply_updates(params, updates))

    jax.block_until_ready(both(params, tx.init(params)))


def two_steps(tx, grads, carry):
    return jax.lax.fori_loop(0, 2, lambda _, carry: adamfn.step(tx, grads, *carry)[::-1], carry)


@pytest.mark.parametrize("name", MEMBERS)
def test_x64_around_a_part_of_a_program(name):
    # A state goes on inside with the dtypes that it has, so a loop takes it.
    tx, params, grads = trees(name)
    carry = jax.eval_shape(lambda: (tx.init(params), params))
    for x64 in (True, False):
        with jax.enable_x64(x64):
            lowered = jax.jit(lambda carry: two_steps(tx, grads, carry)).lower(carry)
            assert lowered.out_info == carry


def test_steps_with_x64_and_without():
    tx, params, grads = trees("amsgrad")
    carry = (tx.init(params), params)
    for x64 in (True, False):
        with jax.enable_x64(x64):
            carry = two_steps(tx, grads, carry)
    assert int(carry[0][0].count) == 4


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
