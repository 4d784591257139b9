# SPDX-License-Identifier: Apache-2.0
"""Calls that are valid for optax's functions of the same names, and mean the same here."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamfn

MASK = {"matrix": True, "scalar": False}
NAMES = ["adam", "adamw", "scale_by_adam", "amsgrad", "nadam", "radam", "adamax"]
CALLS = [
    ("adam", (0.1,), {}),
    ("adam", (0.1, 0.8, 0.99, 1e-6, 1e-5), {}),
    ("adam", (0.1, 0.8, 0.99, 1e-6, 1e-5, jnp.bfloat16), {}),
    ("adam", (0.1,), {"mu_dtype": None}),
    ("adam", (), {"learning_rate": lambda count: 0.1 / (1 + count), "mu_dtype": jnp.float32}),
    ("adam", (0.1,), {"nesterov": True, "mu_dtype": "bfloat16"}),
    ("adamw", (0.1, 0.9, 0.999, 1e-8, 0.0, None, 1e-2, MASK), {}),
    ("adamw", (0.1,), {"b1": 0.0, "weight_decay": 1e-4, "nesterov": True}),
    ("adamw", (0.1,), {"weight_decay": lambda count: 0.1 * count, "mask": lambda params: MASK}),
    ("scale_by_adam", (), {}),
    ("scale_by_adam", (0.9, 0.95, 1e-6, 1e-5, jnp.float32), {"nesterov": True}),
    ("scale_by_adam", (), {"b1": 0, "mu_dtype": np.dtype("bfloat16")}),
    ("amsgrad", (0.1, 0.9, 0.95, 1e-3, 1e-5, None, True, False), {}),
    ("amsgrad", (0.1,), {"bias_correction_mu": False, "bias_correction_nu": False}),
    ("amsgrad", (0.1,), {"mu_dtype": jnp.bfloat16, "bias_correction_nu": False}),
    # Its eps and the bound of rho are torch's.
    ("radam", (0.1, 0.9, 0.9, 1e-20, 1e-5, 4.0), {}),
    ("radam", (0.1, 0.9, 0.9, 1e-20), {"nesterov": True}),
    ("adamax", (0.1, 0.9, 0.99, 1e-3), {}),
]


def test_updates_are_optaxs():
    rng, steps = np.random.default_rng(0), 8
    params = {"matrix": jnp.full((8, 16), 0.5), "scalar": jnp.float32(0.5)}
    grads = {k: rng.standard_normal((steps, *p.shape)).astype("f") for k, p in params.items()}

    def updates_of(tx):
        def step(state, g):
            return tx.update(g, state, params)[::-1]

        return jax.lax.scan(step, tx.init(params), grads)[1]

    made = [
        [getattr(library, name)(*args, **kwargs) for library in (adamfn, optax)]
        for name, args, kwargs in CALLS
    ]
    found = jax.jit(lambda: [[updates_of(tx) for tx in both] for both in made])()
    for (name, args, kwargs), (ours, theirs) in zip(CALLS, found, strict=True):
        rounds = "bfloat16" in f"{args} {kwargs}"
        for leaf in params:
            error = np.abs(ours[leaf] - theirs[leaf]) / np.max(np.abs(theirs[leaf]))
            # optax's first steps are off by 1.0e-5: its 1 - b2 is a float32's. Of a mu in bfloat16
            # it rounds b1 mu too, by 0.4 per cent for each of the steps that mu remembers.
            assert np.max(error) < (0.02 if rounds else 1.1e-5), f"{name}{args} {kwargs}: {leaf}"


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_of_optaxs_is_taken_at_its_place(name):
    theirs = inspect.signature(getattr(optax, name)).parameters
    ours = inspect.signature(getattr(adamfn, name)).parameters
    for place, (argument, parameter) in enumerate(theirs.items()):
        if (name, argument) == ("nadam", "nesterov"):
            continue  # without it, optax's nadam is adam
        assert argument in ours
        if parameter.kind is not parameter.KEYWORD_ONLY:
            assert list(ours).index(argument) == place
            assert ours[argument].kind is parameter.POSITIONAL_OR_KEYWORD


def test_mu_dtype_stores_mu_alone():
    params = {"w": jnp.ones((2, 3)), "b": jnp.float32(1.0), "z": jnp.ones(2, jnp.complex64)}
    for tx in (adamfn.adam(mu_dtype=jnp.bfloat16), adamfn.nadam(mu_dtype="bfloat16")):
        state = tx.init(params)[0]
        assert {k: x.dtype.name for k, x in state.mu.items()} == {
            "w": "bfloat16",
            "b": "bfloat16",
            "z": "complex64",
        }
        assert {x.dtype for x in state.nu.values()} == {jnp.dtype("float32")}
    for same in (None, jnp.float32, "float32", np.float64):  # without 64 bits, this is float32
        state = adamfn.adam(mu_dtype=same).init(params)
        assert jax.tree.structure(state) == jax.tree.structure(adamfn.adam().init(params))


def test_mu_in_bfloat16_is_the_nearest():
    grads = np.random.default_rng(1).standard_normal((6, 100)).astype("f")
    tx = adamfn.scale_by_adam(mu_dtype=jnp.bfloat16)
    state, mu, nu = tx.init(grads[0]), 0.0, 0.0
    for t, g in enumerate(grads.astype("d"), start=1):
        updates, state = tx.update(grads[t - 1], state)
        mu, nu = 0.9 * mu + 0.1 * g, 0.999 * nu + 0.001 * g * g
        exact = mu / (1 - 0.9**t) / (np.sqrt(nu / (1 - 0.999**t)) + 1e-8)
        mu = np.float64(np.float32(mu).astype(jnp.bfloat16))
        np.testing.assert_allclose(updates, exact, rtol=1e-6, atol=1e-6)  # averages cancel
        np.testing.assert_array_equal(state[0].mu, mu.astype("f"))


def test_what_mu_dtype_cannot_be():
    with pytest.raises(ValueError, match="mu_dtype is float16; expected None, bfloat16 or float32"):
        adamfn.adam(mu_dtype=jnp.float16)
    with pytest.raises(TypeError, match=r"found mu_dtype=.* and moments='8bit'; expected one"):
        adamfn.adamw(mu_dtype=jnp.bfloat16, moments="8bit")


def test_adamw_takes_the_mask_by_both_names():
    params = {"a": jnp.ones(1), "b": jnp.ones(1)}
    tx = adamfn.adamw(0.1, weight_decay=0.5, weight_decay_mask={"a": True, "b": False})
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose([updates["a"][0], updates["b"][0]], [-0.05, 0])
    with pytest.raises(TypeError, match="both mask= and weight_decay_mask="):
        adamfn.adamw(mask={"a": True}, weight_decay_mask={"a": True})


def test_the_threshold_of_radam():
    with pytest.raises(ValueError, match=r"threshold is 3.0; expected 4 at least"):
        adamfn.radam(threshold=3.0)


def test_apply_updates_as_optaxs():
    x = jnp.arange(3.0)
    trees = [
        ({"a": x, "b": (x, None)}, {"a": x, "b": (x, None)}),
        (None, x),
        ({"a": x, "frozen": None}, {"a": x, "frozen": x}),
        ({"a": x.astype(jnp.bfloat16)}, {"a": 2 * x}),
        ({"a": 1.0}, {"a": 2.0}),
    ]
    for params, updates in trees:
        found, expected = (f(params, updates) for f in (adamfn.apply_updates, optax.apply_updates))
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        assert jax.tree.map(jnp.result_type, found) == jax.tree.map(jnp.result_type, expected)
    found = adamfn.apply_updates(params={"a": x}, updates={"a": x})
    np.testing.assert_array_equal(found["a"], 2 * x)


def test_chain_as_optaxs():
    grads = {"a": jnp.arange(3.0)}
    for parts in ((optax.scale(2.0),), (optax.identity(), adamfn.scale_by_adam())):
        ours, theirs = adamfn.chain(*parts), optax.chain(*parts)
        (found, state), (expected, other) = (
            tx.update(grads, tx.init(grads), grads, unknown=1) for tx in (ours, theirs)
        )
        np.testing.assert_allclose(found["a"], expected["a"])
        assert len(state) == len(other) == len(parts)
