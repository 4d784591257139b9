# SPDX-License-Identifier: Apache-2.0
"""Chains whose stages contradict one another are refused, with the reason."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamfn

REFUSED = {
    "two decays": (
        lambda: adamfn.chain(adamfn.add_decayed_weights(0.1), adamfn.adamw()),
        "add_decayed_weights and add_decayed_weights would both decay the same parameters",
    ),
    "AdamC's and another": (
        lambda: adamfn.chain(adamfn.add_corrected_decay(0.1, 1e-3, 1e-3), adamfn.adamw()),
        "add_corrected_decay and add_decayed_weights would both decay",
    ),
    "clipping after the rate": (
        lambda: adamfn.chain(adamfn.adam(), adamfn.clip_by_global_norm(1.0)),
        "clip_by_global_norm stands after scale_by_lr.* the rate of a step after it",
    ),
    "clipping of updates": (
        lambda: adamfn.chain(adamfn.scale_by_moments(), adamfn.clip_by_global_norm(1.0)),
        "clip_by_global_norm stands after scale_by_moments.* Put it first",
    ),
    "skipping after the moments": (
        lambda: adamfn.chain(adamfn.scale_by_moments(), adamfn.skip_outliers()),
        "skip_outliers stands after scale_by_moments",
    ),
    "skipping before what is not ours": (
        lambda: adamfn.chain(adamfn.skip_outliers(), optax.ema(0.9), adamfn.adam()),
        "skip_outliers stands before .* which is not fused with it",
    ),
    "a cautious decay after the rate": (
        lambda: adamfn.chain(adamfn.adam(), adamfn.add_decayed_weights(0.1, cautious=True)),
        "add_decayed_weights stands after scale_by_lr, which turns the signs",
    ),
    "cautious updates after the rate": (
        lambda: adamfn.chain(adamfn.adam(), adamfn.cautious_updates()),
        "cautious_updates stands after scale_by_lr, which turns the signs",
    ),
    "a second correction": (
        lambda: adamfn.chain(adamfn.scale_by_atan2_moments(), adamfn.bias_correct()),
        "bias_correct stands after scale_by_atan2_moments",
    ),
}
REFUSED |= {
    "two rates": (
        lambda: adamfn.chain(adamfn.adam(), adamfn.scale_by_lr(0.1)),
        "scale_by_lr stands after scale_by_lr, which .* uphill",
    ),
    "two optimizers": (
        lambda: adamfn.chain(
            adamfn.adam(), optax.identity(), adamfn.with_backend(adamfn.adam(), "xla")
        ),
        "scale_by_lr stands after scale_by_lr",
    ),
    "clipping by squares that are none": (
        lambda: adamfn.chain(adamfn.scale_by_infinity_moments(), adamfn.clip_updates()),
        "clip_updates stands after scale_by_infinity_moments, which has no average of squares",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"(?i)chain: {message}"):
        make()


def test_allowed():
    mask = {"a": True, "b": False}
    adamfn.chain(
        optax.clip(1.0),
        adamfn.skip_outliers(),
        adamfn.clip_by_global_norm(1.0),
        adamfn.scale_by_moments(),
        adamfn.bias_correct(),
        adamfn.add_decayed_weights(0.1, mask),
        adamfn.add_corrected_decay(0.1, 1e-3, 1e-3, mask),
        adamfn.scale_by_lr(1e-3),
    )
    adamfn.chain(adamfn.adam(), optax.clip_by_global_norm(1.0))


def test_a_correction_takes_its_decays_from_the_moments_before_it():
    g = jnp.array([1.0, -3.0])
    pairs = [
        (adamfn.scale_by_moments(0.8, 0.95), {"b1": 0.8, "b2": 0.95}),
        (adamfn.scale_by_max_moments(0.8, 0.95), {"b1": 0.8, "b2": 0.95}),
        (adamfn.scale_by_infinity_moments(0.8, 0.95), {"b1": 0.8, "b2": 0}),
        (adamfn.scale_by_nesterov_moments(0.8, 0.95), {"b1": 0, "b2": 0.95}),
        (adamfn.scale_by_rectified_moments(0.8, 0.95), {"b1": 0.8, "b2": 0.95}),
        (adamfn.scale_by_lazy_moments(0.8, 0.95), {"b1": 0.8, "b2": 0.95}),
        (adamfn.scale_by_moments(jnp.float32(0.8), 0.95), {"b1": jnp.float32(0.8), "b2": 0.95}),
    ]
    for moments, decays in pairs:
        between = adamfn.chain(moments, adamfn.add_decayed_weights(0.1))
        found = adamfn.chain(between, adamfn.bias_correct())
        expected = adamfn.chain(between, adamfn.bias_correct(**decays))
        half = adamfn.chain(between, adamfn.bias_correct(b2=decays["b2"]))
        for tx in (found, half):
            updates = tx.update(g, tx.init(g), g, decays="of others")[0]
            np.testing.assert_array_equal(updates, expected.update(g, expected.init(g), g)[0])
    moments, correct = adamfn.scale_by_moments(0.8, 0.95), adamfn.bias_correct()
    expected = adamfn.chain(moments, correct)
    for apart in (
        adamfn.chain(adamfn.with_backend(moments, "xla"), correct),
        adamfn.chain(adamfn.packed(moments), optax.identity(), correct),
        adamfn.chain(moments, adamfn.with_backend(adamfn.packed(correct), "xla")),
    ):
        found = apart.update(g, apart.init(g))[0]
        np.testing.assert_array_equal(found, expected.update(g, expected.init(g))[0])
    tx = adamfn.chain(adamfn.with_backend(moments, "xla"), adamfn.bias_correct(0.9))
    with pytest.raises(ValueError, match=r"b1 is 0\.9, and that of the moments .* is 0\.8"):
        tx.update(g, tx.init(g))
    tx = adamfn.chain(optax.chain(adamfn.scale_by_moments()), adamfn.bias_correct())
    np.testing.assert_allclose(tx.update(g, tx.init(g))[0], [1, -1], rtol=1e-6)  # the defaults


@pytest.mark.parametrize(
    ("moments", "after", "says"),
    [
        (adamfn.scale_by_moments(0.9, 0.95), adamfn.bias_correct(0.9, 0.999), "b2 is 0.999"),
        (adamfn.scale_by_moments(0.8), adamfn.bias_correct(b1=0.9), "b1 is 0.9"),
        (adamfn.scale_by_infinity_moments(), adamfn.bias_correct(0.9, 0.999), "b2 is 0.999"),
        (adamfn.scale_by_nesterov_moments(), adamfn.bias_correct(0.9), "b1 is 0.9"),
        (adamfn.scale_by_moments(0.9, 0.95), adamfn.clip_updates(0.999), "b2 is 0.999"),
    ],
)
def test_decays_that_are_not_those_of_the_moments_are_refused(moments, after, says):
    tx, g = adamfn.chain(moments, after, adamfn.scale_by_lr()), jnp.ones(2)
    with pytest.raises(ValueError, match=rf"{says}, and that of the moments .*; expected the same"):
        tx.update(g, tx.init(g))


def broken(before, stage, after):
    """A stage whose run is broken, before and after it, in each of three ways."""
    parts = (before, stage, after)
    yield optax.chain(*parts)
    yield adamfn.chain(before, optax.chain(stage), after)
    if before is not None:
        yield adamfn.chain(before, optax.identity(), stage, after)


@pytest.mark.parametrize("jitted", [False, True])
def test_a_stage_that_looks_at_its_run_is_refused_where_the_run_is_broken(jitted):
    g, before = jnp.array([1.0, -3.0]), adamfn.scale_by_moments()
    rate = adamfn.scale_by_lr(0.1)
    cautious = adamfn.chain(adamfn.add_decayed_weights(0.0), adamfn.cautious_updates())
    cases = [
        *((tx, "cautious_updates: it reads grads") for tx in broken(before, cautious, rate)),
        *((tx, "clip_updates: it reads") for tx in broken(before, adamfn.clip_updates(), rate)),
        (optax.chain(adamfn.skip_outliers(["grad_norm"]), adamfn.adam()), "skip_outliers: nothing"),
        (
            adamfn.chain(
                optax.chain(
                    adamfn.chain(
                        adamfn.clip_by_global_norm(1.0), adamfn.skip_outliers(["grad_norm"])
                    )
                ),
                adamfn.adam(),
            ),
            "skip_outliers: nothing",
        ),
    ]
    for tx, message in cases:
        update, step = tx.update, partial(adamfn.step, tx)
        for call in map(jax.jit, (update, step)) if jitted else (update, step):
            with pytest.raises(ValueError, match=f"{message}.*in the same adamfn.chain"):
                call(g, tx.init(g), g)


def test_optax_around_a_whole_run_breaks_nothing():
    g = jnp.array([1.0, -3.0])
    parts = adamfn.skip_outliers(["grad_norm"]), adamfn.scale_by_moments()
    inner = adamfn.chain(*parts, adamfn.cautious_updates(), adamfn.scale_by_lr(0.1))
    tx = optax.chain(optax.identity(), inner, optax.scale(0.5))
    updates, state = tx.update(g, tx.init(g), g)
    np.testing.assert_allclose(2 * updates, inner.update(g, inner.init(g), g)[0])
    held, after = tx.update(g * jnp.nan, state, g)
    np.testing.assert_array_equal(held, [0, 0])
    assert after[1][1].count == 1
