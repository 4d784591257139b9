# SPDX-License-Identifier: Apache-2.0
"""adamfn follows recorded runs of torch.optim (torch_trajectories.py records them)."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from torch_trajectories import ALL_RUNS, CASES, DATA, RECORDED, STEPS, begin, loss

import adamfn

# Relative to the largest parameter.
TOLERANCE = 2e-5
# Every run of the least squares and the embedding; on the network, one of each optimizer.
FOLLOWED = [
    (problem, run)
    for problem, run in CASES
    if problem != "network"
    or run in ("adamw_strong", "amsgrad", "nadam", "radam", "adam_maximized", "adamax_maximized")
]


def torch_like(
    optimizer,
    *,
    amsgrad=False,
    weight_decay=None,
    decoupled_weight_decay=False,
    maximize=False,
    **arguments,
):
    """The chain that does what torch does with these arguments, as the documentation's table."""
    if "lr" in arguments:
        arguments["learning_rate"] = arguments.pop("lr")
    if "betas" in arguments:
        arguments["b1"], arguments["b2"] = arguments.pop("betas")
    if optimizer == "AdamW" and not amsgrad:  # no decay: both libraries' default must be 0.01
        decay = {} if weight_decay is None else {"weight_decay": weight_decay}
        return adamfn.adamw(**arguments, **decay)
    member = {
        "Adam": adamfn.amsgrad if amsgrad else adamfn.adam,
        "AdamW": adamfn.amsgrad,
        "NAdam": adamfn.nadam,
        "RAdam": adamfn.radam,
        "Adamax": adamfn.adamax,
        "SparseAdam": adamfn.lazy_adam,
    }[optimizer]
    tx = member(**arguments)
    if weight_decay and (optimizer == "AdamW" or decoupled_weight_decay):
        stages = {
            adamfn.amsgrad: (adamfn.scale_by_max_moments, (0.9, 0.999)),
            adamfn.nadam: (adamfn.scale_by_nesterov_moments, (0.0, 0.999)),
            adamfn.radam: (adamfn.scale_by_rectified_moments, (0.9, 0.999)),
        }
        moments, corrected = stages[member]
        rate = arguments.pop("learning_rate")
        tx = adamfn.chain(
            moments(**arguments),
            adamfn.bias_correct(*corrected),
            adamfn.add_decayed_weights(weight_decay),
            adamfn.scale_by_lr(rate),
        )
    elif weight_decay:
        tx = adamfn.chain(adamfn.add_decayed_weights(weight_decay), tx)
    return adamfn.chain(optax.scale(-1.0), tx) if maximize else tx


@cache
def gradient_of(problem):
    """Compiled once for all runs of a problem."""
    data = jax.tree.map(jnp.asarray, begin(problem)[0])

    def loss_of(params, count):
        return loss(problem, data, params, count, jnp.tanh, lambda tokens, table: table[tokens])

    return jax.jit(jax.grad(loss_of))


def train(problem, tx, params, state, first, last):
    """Takes the steps after `first` up to `last`; yields the count and the parameters."""

    @jax.jit
    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return adamfn.apply_updates(params, updates), state

    for count in range(first, last):
        params, state = step(gradient_of(problem)(params, count), state, params)
        yield count + 1, params


def worst_difference(found, expected):
    """The largest difference of a parameter, relative to the largest parameter."""
    largest = max(np.abs(a).max() for a in expected.values())
    return max(np.abs(found[name] - a).max() for name, a in expected.items()) / largest


def recorded(problem, run, params, step):
    with np.load(DATA) as data:
        row = RECORDED.index(step)
        return {name: data[f"{problem}/{run}/{name}"][row] for name in params}


@pytest.mark.parametrize(("problem", "run"), FOLLOWED)
def test_follows_torch(problem, run):
    optimizer, arguments = ALL_RUNS[run]
    tx = torch_like(optimizer, **arguments)
    _, params = begin(problem)
    errors = {
        count: worst_difference(found, recorded(problem, run, params, count))
        for count, found in train(problem, tx, params, tx.init(params), 0, STEPS)
        if count in RECORDED
    }
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("problem", ["least_squares", "network", "embedding"])
def test_the_runs_differ_from_one_another(problem):
    # Or following one of them would say nothing of its hyperparameters.
    _, params = begin(problem)
    ends = [recorded(problem, run, params, STEPS) for p, run in CASES if p == problem]
    for i, a in enumerate(ends):
        assert min(map(partial(worst_difference, a), ends[:i]), default=1) > TOLERANCE
