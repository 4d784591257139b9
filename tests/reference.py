# SPDX-License-Identifier: Apache-2.0
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
    largest = np.max(np.abs(expected), axes)
    return np.max(np.max(np.abs(found - expected), axes) / np.where(largest == 0, 1, largest))


def amsgrad(grads, learning_rate=1e-3, b1=0.9, b2=0.999, eps=1e-8):
    """As torch: the maximum of the uncorrected v."""
    m = v = largest = 0.0
    for t, g in _steps(grads):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * np.abs(g) ** 2
        largest = np.maximum(largest, v)
        yield -learning_rate * (m / (1 - b1**t)) / (np.sqrt(largest / (1 - b2**t)) + eps)


def nadam(grads, learning_rate=2e-3, b1=0.9, b2=0.999, eps=1e-8, momentum_decay=4e-3):
    m = v = 0.0
    product = 1.0
    for t, g in _steps(grads):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * np.abs(g) ** 2
        now, ahead = (b1 * (1 - 0.5 * 0.96 ** (s * momentum_decay)) for s in (t, t + 1))
        product *= now
        numerator = ahead * m / (1 - product * ahead) + (1 - now) * g / (1 - product)
        yield -learning_rate * numerator / (np.sqrt(v / (1 - b2**t)) + eps)


def radam(grads, learning_rate=1e-3, b1=0.9, b2=0.999, eps=1e-8):
    m = v = 0.0
    longest = 2 / (1 - b2) - 1
    for t, g in _steps(grads):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * np.abs(g) ** 2
        length = longest - 2 * t * b2**t / (1 - b2**t)
        factor = 1.0
        if length > 5:
            part = (length - 4) * (length - 2) / length
            whole = (longest - 4) * (longest - 2) / longest
            factor = np.sqrt(part / whole) * np.sqrt(1 - b2**t) / (np.sqrt(v) + eps)
        yield -learning_rate * m / (1 - b1**t) * factor


def adamax(grads, learning_rate=2e-3, b1=0.9, b2=0.999, eps=1e-8):
    m = v = 0.0
    for t, g in _steps(grads):
        m, v = b1 * m + (1 - b1) * g, np.maximum(b2 * v, np.abs(g) + eps)
        yield -learning_rate * m / (1 - b1**t) / v


def lazy_adam(grads, learning_rate=1e-3, b1=0.9, b2=0.999, eps=1e-8):
    """For tables of rows."""
    m, v = np.zeros_like(grads[0], np.float64), np.zeros_like(grads[0], np.float64)
    for t, g in _steps(grads):
        u = np.zeros_like(m)
        for row in np.flatnonzero(np.any(g != 0, axis=-1)):
            m[row] = b1 * m[row] + (1 - b1) * g[row]
            v[row] = b2 * v[row] + (1 - b2) * g[row] ** 2
            scale = np.sqrt(1 - b2**t) / (1 - b1**t)
            u[row] = -learning_rate * scale * m[row] / (np.sqrt(v[row]) + eps)
        yield u


def ademamix(grads, learning_rate=1e-3, b1=0.9, b2=0.999, eps=1e-8, b3=0.9999, alpha=5.0):
    m = slow = v = 0.0
    for t, g in _steps(grads):
        m, slow = b1 * m + (1 - b1) * g, b3 * slow + (1 - b3) * g
        v = b2 * v + (1 - b2) * np.abs(g) ** 2
        numerator = m / (1 - b1**t) + alpha * slow
        yield -learning_rate * numerator / (np.sqrt(v / (1 - b2**t)) + eps)


def adopt(grads, learning_rate=1e-3, b1=0.9, b2=0.9999, eps=1e-6):
    """Its first gradient only fills v."""
    m = v = 0.0
    for t, g in _steps(grads):
        if t > 1:
            x = g / np.maximum(np.sqrt(v), eps)
            m = b1 * m + (1 - b1) * x / np.maximum(1, np.abs(x) / (t - 1) ** 0.25)
        v = np.abs(g) ** 2 if t == 1 else b2 * v + (1 - b2) * np.abs(g) ** 2
        yield -learning_rate * m + 0 * g


def _steps(grads):
    return enumerate(np.asarray(grads).astype(np.result_type(grads, np.float64)), start=1)
