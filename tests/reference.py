"""The formulas of Adam and its kin in float64 NumPy, from the papers and not from the library.

The averages are written `b m + (1 - b) g` and the corrections `1 - b^t`, as on paper; float64 has
digits to spare for that. `test_exactness` holds this page to optax run in double precision.
"""

import numpy as np


def updates(
    grads,
    learning_rate=1e-3,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    eps_root=0.0,
    *,
    nesterov=False,
    weight_decay=0.0,
    params=0.0,
):
    """The update of every step, for gradients with the step as their first axis.

    Args:
      grads: real or complex; computed in float64 or complex128.
      weight_decay: decoupled, by Loshchilov and Hutter.
      params: what decays, the same at every step.
    """
    grads = np.asarray(grads)
    grads = grads.astype(np.complex128 if np.iscomplexobj(grads) else np.float64)
    m = np.zeros_like(grads[0])
    v = np.zeros_like(grads[0].real)
    result = np.empty_like(grads)
    for t, g in enumerate(grads, start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * np.abs(g) ** 2
        m_hat = m / (1 - b1**t)
        if nesterov:  # Dozat's: the coming step's share of m, this step's share of g
            m_hat = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
        v_hat = v / (1 - b2**t)
        ratio = m_hat / (np.sqrt(v_hat + eps_root) + eps)
        result[t - 1] = -learning_rate * (ratio + weight_decay * params)
    return result


def worst_error(found, expected):
    """The largest error of an update, relative to the largest update of its step."""
    found, expected = np.asarray(found), np.asarray(expected)
    axes = tuple(range(1, expected.ndim))
    return np.max(np.max(np.abs(found - expected), axes) / np.max(np.abs(expected), axes))
