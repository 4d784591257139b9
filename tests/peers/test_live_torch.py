# SPDX-License-Identifier: Apache-2.0
"""The installed torch beside adamfn, step by step: `make test-peers`.

The recorded runs that every test run reads say the same of torch 2.13.0; here hyperparameters and
networks are drawn at random, and states go through torch's own `load_state_dict`.
"""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_torch import TOLERANCE, torch_like, train, worst_difference
from torch_trajectories import ALL_RUNS, CASES, DATA, RECORDED, STEPS, begin, loss, record

import adamfn
from adamfn.interop.torch import from_state_dict, to_state_dict

OPTIMIZERS = {
    "Adam": {},
    "AMSGrad": {"amsgrad": True},
    "AdamW": {"weight_decay": 0.1},
    "NAdam": {"momentum_decay": 0.01},
    "RAdam": {},
    "Adamax": {},
    "SparseAdam": {},
}


def make(name, params, lr, betas, eps):
    cls = "Adam" if name == "AMSGrad" else name
    arguments = {"lr": lr, "betas": betas, "eps": eps, **OPTIMIZERS[name]}
    return getattr(torch.optim, cls)(list(params.values()), **arguments), (cls, arguments)


def train_torch(problem, tx, params, first, last, sparse):
    data, _ = begin(problem)
    data = {name: torch.tensor(a) for name, a in data.items()}

    def look_up(tokens, table):
        return torch.nn.functional.embedding(tokens, table, sparse=sparse)

    for step in range(first, last):
        tx.zero_grad()
        loss(problem, data, params, step, torch.tanh, look_up).backward()
        tx.step()


def tensors(arrays):
    return {name: torch.nn.Parameter(torch.tensor(np.array(a))) for name, a in arrays.items()}


def arrays(tensors):
    return {name: p.detach().numpy().copy() for name, p in tensors.items()}


def drawn(name):
    """A rate, decays and an eps.

    Rates are small: at 3e-3 some runs arrive, and there torch in float32 is as far from torch in
    float64 as from us.
    """
    rng = np.random.default_rng(sum(map(ord, name)))
    betas = (rng.uniform(0.5, 0.95), rng.uniform(0.9, 0.9995))
    return 10 ** rng.uniform(-4, -3), betas, 10 ** rng.uniform(-8, -4)


def problem_of(name):
    return "embedding" if name == "SparseAdam" else "network"


def test_the_recordings_are_of_this_torch():
    with np.load(DATA) as data:
        assert str(data["torch_version"]).split("+")[0] == torch.__version__.split("+")[0]


@pytest.mark.parametrize(("problem", "run"), CASES)
def test_the_recordings_can_be_made_again(problem, run):
    path, _, _ = record(problem, *ALL_RUNS[run])
    with np.load(DATA) as data:
        for name, values in path.items():
            recorded = data[f"{problem}/{run}/{name}"]
            # The order of torch's sums depends on the processor.
            np.testing.assert_allclose(values, recorded, atol=1e-5 * np.abs(recorded).max())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_follows_torch(name):
    problem = problem_of(name)
    _, begun = begin(problem)
    params = tensors(begun)
    theirs, arguments = make(name, params, *drawn(name))
    tx = torch_like(arguments[0], **arguments[1])
    ours = train(problem, tx, begun, tx.init(begun), 0, STEPS)
    for (count, found), before in zip(ours, [0, *range(1, STEPS)], strict=True):
        train_torch(problem, theirs, params, before, count, name == "SparseAdam")
        if count in RECORDED:
            assert worst_difference(found, arrays(params)) <= TOLERANCE, f"step {count}"


@pytest.mark.parametrize("way", ["update", "step"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_crosses_over_and_back(name, way):
    """Twenty steps in torch, twenty here, twenty in torch: as torch's sixty."""
    problem, sparse = problem_of(name), name == "SparseAdam"
    _, begun = begin(problem)
    whole = tensors(begun)
    train_torch(problem, make(name, whole, *drawn(name))[0], whole, 0, 60, sparse)

    params = tensors(begun)
    theirs, _ = make(name, params, *drawn(name))
    train_torch(problem, theirs, params, 0, 20, sparse)
    tx, state = from_state_dict(theirs.state_dict(), arrays(params), paths=list(params))

    data, _ = begin(problem)

    @jax.jit
    def step(params, state, count):
        def loss_of(params):
            device = jax.tree.map(jax.numpy.asarray, data)
            return loss(problem, device, params, count, jax.numpy.tanh, lambda i, t: t[i])

        grads = jax.grad(loss_of)(params)
        if way == "step":
            return adamfn.step(tx, grads, state, params)
        updates, state = tx.update(grads, state, params)
        return adamfn.apply_updates(params, updates), state

    ours = jax.tree.map(jax.numpy.asarray, arrays(params))
    for count in range(20, 40):
        ours, state = step(ours, state, count)

    back = tensors({name: ours[name] for name in params})  # JAX sorts the names
    again, _ = make(name, back, *drawn(name))
    state_dict = to_state_dict(state, like=again.state_dict(), paths=list(params))
    state_dict["state"] = jax.tree.map(torch.as_tensor, state_dict["state"])
    again.load_state_dict(state_dict)
    train_torch(problem, again, back, 40, 60, sparse)
    assert worst_difference(arrays(back), arrays(whole)) <= 1e-6


def test_groups_and_names_cross_over():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    named = dict(model.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named.items() if "weight" in n], "weight_decay": 0.1},
        {"params": [(n, p) for n, p in named.items() if "bias" in n], "lr": 0.1},
    ]
    tx = torch.optim.AdamW(groups, lr=0.01, amsgrad=True)
    x = torch.linspace(-1, 1, 20).reshape(5, 4)

    def step_torch():
        tx.zero_grad()
        (model(x) ** 2).sum().backward()
        tx.step()
        return {name: p.grad.numpy().copy() for name, p in named.items()}

    for _ in range(3):
        step_torch()
    params = arrays(named)
    paths = {name: name for name in named}
    ours, state = from_state_dict(tx.state_dict(), params, paths=paths)
    grads = step_torch()
    updates, _ = ours.update(grads, state, params)
    moved = adamfn.apply_updates(params, updates)
    for name, p in arrays(named).items():
        np.testing.assert_allclose(moved[name], p, rtol=1e-6, atol=1e-7)


def test_another_optimizer_is_refused():
    params = tensors({"w": np.ones(3, np.float32)})
    for cls in (torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.ASGD):
        tx = cls(list(params.values()), lr=0.1)
        params["w"].grad = torch.ones(3)
        tx.step()
        with pytest.raises(ValueError, match="expected one of Adam, AdamW"):
            from_state_dict(tx.state_dict(), arrays(params))
