# SPDX-License-Identifier: Apache-2.0
"""Records states of adamfn 0.2.0, and the parameters after the next step: `state_0_2_0.npz`.

It needs adamfn 0.2.0; later versions arrange their states otherwise. `test_states_0_2_0.py` reads
the file, and makes the same chains with the functions `runs` and `gradient`.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import adamfn

FILE = Path(__file__).with_name("state_0_2_0.npz")
STEPS = 3
SMALL = {"a": jnp.ones((2, 3)), "b": [jnp.ones(3), jnp.ones(())]}
LEAN = {
    "bias": jnp.ones(3),
    "layers": [{"bias": jnp.ones(5)}, {"bias": jnp.ones(7), "kernel": jnp.ones((32, 128))}],
}


def runs():
    """By name: a transformation and its parameters."""
    rounded = {**LEAN, "layers": [LEAN["layers"][0], {"kernel": jnp.ones((32, 128), jnp.bfloat16)}]}
    lean = {
        moments: (adamfn.adamw(0.1, moments=moments), LEAN)
        for moments in ("float32", "8bit", "blockmean")
    }
    return lean | {
        "factored": (adamfn.adam(0.1, moments="factored"), {"w": jnp.ones((128, 128)), **SMALL}),
        "4bit": (adamfn.amsgrad(0.1, moments="4bit"), LEAN),
        "rate alone": (adamfn.scale_by_lr(0.5), SMALL),
        "rate in a chain": (adamfn.chain(adamfn.scale_by_lr(0.5)), SMALL),
        "packed": (adamfn.packed(adamfn.adamw(0.1)), SMALL),
        "rounded": (
            adamfn.chain(adamfn.adamw(0.1, moments="8bit"), adamfn.round_weights(24)),
            rounded,
        ),
    }


def gradient(params, step):
    """A gradient with one row, repeated: it takes little space."""

    def of(p):
        row = np.cos(np.arange(p.shape[-1] if p.ndim else 1) + step).astype(np.float32)
        return jnp.asarray(np.broadcast_to(row, p.shape) if p.ndim else row[0])

    return jax.tree.map(of, params)


def sample(array):
    """Some elements of a large array, in float32."""
    array = np.asarray(array.astype(jnp.float32))
    return array[..., ::16] if array.size >= 4096 else array


def named(prefix, tree):
    """The arrays of a tree by their paths."""
    leaves = jax.tree.leaves_with_path(tree)
    return {
        f"{prefix}/{jax.tree_util.keystr(path, simple=True, separator='/')}": leaf
        for path, leaf in leaves
    }


def main():
    """Writes the file."""
    written = {}
    for name, (tx, params) in runs().items():
        state, update = tx.init(params), jax.jit(tx.update)
        for step in range(STEPS + 1):
            if step == STEPS:
                written |= named(f"{name}/state", jax.tree.map(np.asarray, state))
            updates, state = update(gradient(params, step), state, params)
        # Parameters stay as they were made, and need not be recorded.
        moved = adamfn.apply_updates(params, updates)
        written |= named(f"{name}/next", jax.tree.map(sample, moved))
    np.savez_compressed(FILE, **written)


if __name__ == "__main__":
    main()
