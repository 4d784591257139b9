# SPDX-License-Identifier: Apache-2.0
"""The stages of papers beside the packages that have them, 200 steps: `make test-peers`."""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optimi
import pytest
import torch
from adam_atan2_pytorch import AdamAtan2
from timm.optim.adamw import AdamWLegacy

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_published import problem, rate, recipe, run, worst

import adamfn

B1, B2, EPS, DECAY, RATE = 0.9, 0.99, 1e-6, 0.1, 0.02
TOLERANCE = 2e-5  # of the largest parameter


def timm(**chosen):
    return lambda ps: AdamWLegacy(
        ps, lr=RATE, betas=(B1, B2), eps=EPS, weight_decay=DECAY, foreach=False, **chosen
    )


def stable(ps):
    return optimi.StableAdamW(
        ps, lr=RATE, betas=(B1, B2), eps=EPS, weight_decay=DECAY, foreach=False, triton=False
    )


def decay(tx_of):
    return lambda: recipe(tx_of(), decay=False)


PAIRS = {
    "C-AdamW of timm": (timm(caution=True), lambda: recipe(adamfn.cautious_updates())),
    "AdamC of timm": (
        timm(corrected_weight_decay=True),
        decay(lambda: adamfn.add_corrected_decay(DECAY, rate, peak=RATE)),
    ),
    "StableAdamW of optimi": (
        stable,
        lambda: adamfn.chain(
            adamfn.scale_by_moments(B1, B2, EPS),
            adamfn.bias_correct(B1, B2),
            adamfn.add_decayed_weights(DECAY),
            adamfn.clip_updates(B2, EPS),
            adamfn.scale_by_lr(rate),
        ),
    ),
    "Adam-atan2": (
        lambda ps: AdamAtan2(ps, lr=RATE, betas=(B1, B2)),
        lambda: adamfn.chain(adamfn.scale_by_atan2_moments(B1, B2), adamfn.scale_by_lr(rate)),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_follows(name):
    make, ours = PAIRS[name]
    p, grads = problem()
    weights = torch.nn.Parameter(torch.tensor(p))
    theirs, path = make([weights]), []
    for step, g in enumerate(grads):
        for group in theirs.param_groups:
            group["lr"] = rate(step)
        weights.grad = torch.tensor(g)
        theirs.step()
        path.append(np.float64(weights.detach().numpy()))
    found, _ = run(ours(), jnp.array(p), jnp.array(grads), "step")
    assert worst(np.float64(found), path) <= TOLERANCE


def test_norm_clipping_of_torch():
    p, grads = problem()
    weights = torch.nn.Parameter(torch.tensor(p))
    theirs, path = timm()([weights]), []
    for step, g in enumerate(grads):
        theirs.param_groups[0]["lr"] = rate(step)
        weights.grad = torch.tensor(g)
        torch.nn.utils.clip_grad_norm_([weights], 2.0)
        theirs.step()
        path.append(np.float64(weights.detach().numpy()))
    found, _ = run(
        recipe(first=[adamfn.clip_by_global_norm(2.0)]), jnp.array(p), jnp.array(grads), "step"
    )
    assert worst(np.float64(found), path) <= TOLERANCE
