"""adamfn follows recorded runs of torch.optim (torch_trajectories.py records them)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_trajectories import DATA, RECORDED, RUNS

import adamfn


def torch_like(optimizer, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=None):
    """The chain that does what torch does with these arguments."""
    if optimizer == "AdamW":  # without weight_decay: both libraries' default must be 0.01
        decay = {} if weight_decay is None else {"weight_decay": weight_decay}
        return adamfn.adamw(lr, *betas, eps, **decay)
    if weight_decay is None:
        return adamfn.adam(lr, *betas, eps)
    return adamfn.chain(adamfn.add_decayed_weights(weight_decay), adamfn.adam(lr, *betas, eps))


@pytest.mark.parametrize("name", RUNS)
def test_follows_torch(name):
    with np.load(DATA) as data:
        arrays = dict(data)
    x, y = arrays["x"], arrays["y"]
    optimizer, arguments = RUNS[name]
    tx = torch_like(optimizer, **arguments)

    def loss(params):
        return jnp.mean((x @ params["w"] + params["b"] - y) ** 2)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return adamfn.apply_updates(params, updates), state

    params = {"w": arrays["w"], "b": arrays["b"]}
    state = tx.init(params)
    recorded = iter(zip(RECORDED, arrays[f"{name}/w"], arrays[f"{name}/b"], strict=True))
    for count in range(1, RECORDED[-1] + 1):
        params, state = step(params, state)
        if count in RECORDED:
            _, w, b = next(recorded)
            error = max(np.abs(params["w"] - w).max(), np.abs(params["b"] - b).max())
            # Measured: 5e-6 of the largest at most.
            assert error <= 2e-5 * np.abs(w).max(), f"step {count}"


def test_the_runs_differ_from_one_another():
    # Or following one of them would say nothing of its hyperparameters.
    with np.load(DATA) as data:
        ends = [data[f"{name}/w"][-1] for name in RUNS]
    for i, a in enumerate(ends):
        for b in ends[:i]:
            assert np.abs(a - b).max() > 1e-3 * np.abs(a).max()
