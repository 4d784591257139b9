# SPDX-License-Identifier: Apache-2.0
"""The stages that papers chain around Adam, beside the papers in float64 over 200 steps."""

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
from published import B1, B2, DECAY, EPS, RATE

import adamfn

STEPS = 200
TOLERANCE = 2e-5  # of the largest parameter: some hundred float32 roundings
SHAPE = (32, 128)  # large enough for moments in 8 bits


def rate(count):
    return RATE * (1 - count / 400)


def recipe(*before_rate, first=(), moments="float32", decay=True):
    stages = [
        *first,
        adamfn.scale_by_moments(B1, B2, EPS, moments=moments),
        adamfn.bias_correct(B1, B2),
        *before_rate,
        *([adamfn.add_decayed_weights(DECAY)] if decay else []),
        adamfn.scale_by_lr(rate),
    ]
    return adamfn.chain(*stages)


def stable_adamw(moments="float32"):
    return adamfn.chain(
        adamfn.scale_by_moments(B1, B2, EPS, moments=moments),
        adamfn.bias_correct(B1, B2),
        adamfn.add_decayed_weights(DECAY),
        adamfn.clip_updates(B2, EPS),
        adamfn.scale_by_lr(rate),
    )


def atan2(moments="float32"):
    return adamfn.chain(
        adamfn.scale_by_atan2_moments(B1, B2, moments=moments),
        adamfn.add_decayed_weights(DECAY),
        adamfn.scale_by_lr(rate),
    )


RECIPES = {
    "cautious_decay": lambda **kw: recipe(
        adamfn.add_decayed_weights(DECAY, cautious=True), decay=False, **kw
    ),
    "cautious_updates": lambda **kw: recipe(adamfn.cautious_updates(), **kw),
    "stable_adamw": stable_adamw,
    "adamc": lambda **kw: recipe(
        adamfn.add_corrected_decay(DECAY, rate, peak=RATE), decay=False, **kw
    ),
    "atan2": atan2,
    "norm_clipping": lambda **kw: recipe(first=[adamfn.clip_by_global_norm(2.0)], **kw),
    "skipping": lambda **kw: recipe(first=[adamfn.skip_outliers(["grad_norm"])], **kw),
}


def problem(shape=(6, 5)):
    """Parameters and gradients; some gradients are far larger than the others."""
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(STEPS, *shape)) * 10 ** rng.uniform(-2, 0, shape)
    grads[[90, 150]] *= 100
    return np.float32(rng.normal(size=shape)), np.float32(grads)


def run(tx, p, grads, way):
    """The parameters after every step."""

    def body(carry, g):
        p, state = carry
        if way == "step":
            p, state = adamfn.step(tx, g, state, p)
        else:
            updates, state = tx.update(g, state, p)
            p = adamfn.apply_updates(p, updates)
        return (p, state), p

    (_, state), path = jax.jit(lambda p, s, gs: jax.lax.scan(body, (p, s), gs))(
        p, tx.init(p), grads
    )
    return path, state


def worst(path, expected):
    return max(
        np.max(np.abs(a - b)) / np.max(np.abs(b)) for a, b in zip(path, expected, strict=True)
    )


@pytest.mark.parametrize("way", ["update", "step"])
@pytest.mark.parametrize("name", RECIPES)
def test_follows_its_paper(name, way):
    p, grads = problem()
    path, _ = run(RECIPES[name](), jnp.array(p), jnp.array(grads), way)
    expected = getattr(published, name)(np.float64(p), [*np.float64(grads)])
    assert worst(np.float64(path), expected) <= TOLERANCE


@pytest.mark.parametrize("name", RECIPES)
def test_runs_beside_moments_in_8_bits(name):
    p, grads = problem(SHAPE)
    path, _ = run(RECIPES[name](moments="8bit"), jnp.array(p), jnp.array(grads), "step")
    *_, expected = getattr(published, name)(np.float64(p), [*np.float64(grads)])
    # As far from the formula as the format is: about a hundredth of the way from the start.
    distance = np.linalg.norm(path[-1] - expected) / np.linalg.norm(expected - p)
    assert distance < 0.1
