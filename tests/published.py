# SPDX-License-Identifier: Apache-2.0
"""What papers chain around Adam, in float64 NumPy, from the papers and not from the library.

Each is a generator of the parameters after every step, for a list of gradients of one leaf.
"""

import numpy as np

B1, B2, EPS = 0.9, 0.99, 1e-6
RATE, DECAY = 0.02, 0.1


def rate_at(t):
    """A rate that falls: of step t = 1, 2, ..."""
    return RATE * (1 - (t - 1) / 400)


def _adam(grads, b1=B1, b2=B2):
    m = v = 0.0
    for t, g in enumerate(grads, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        yield t, g, m / (1 - b1**t), v / (1 - b2**t)


def cautious_decay(p, grads):
    """Chen et al. 2025, algorithm 1."""
    for t, _, m, v in _adam(grads):
        u = m / (np.sqrt(v) + EPS)
        p = p - rate_at(t) * (u + DECAY * (u * p >= 0) * p)
        yield p


def cautious_updates(p, grads, floor=1e-3):
    """Liang et al. 2024, with timm's bound of the share."""
    for t, g, m, v in _adam(grads):
        u = m / (np.sqrt(v) + EPS)
        agrees = u * g > 0
        p = p - rate_at(t) * (u * agrees / max(agrees.mean(), floor) + DECAY * p)
        yield p


def stable_adamw(p, grads):
    """Wortsman et al. 2023, algorithm 2."""
    for t, g, m, v in _adam(grads):
        rms = np.sqrt(np.mean(g**2 / np.maximum(v, EPS**2)))
        rate = rate_at(t) / max(1, rms)
        p = p - rate * DECAY * p - rate * m / (np.sqrt(v) + EPS)
        yield p


def adamc(p, grads):
    """Defazio 2025, algorithm 2."""
    for t, _, m, v in _adam(grads):
        decayed = rate_at(t) ** 2 / RATE * DECAY * p
        p = p - rate_at(t) * m / (np.sqrt(v) + EPS) - decayed
        yield p


def atan2(p, grads, a=1.27, b=1.0):
    """Everett et al. 2024, section 4.3."""
    for t, _, m, v in _adam(grads):
        p = p - rate_at(t) * (a * np.arctan2(m, b * np.sqrt(v)) + DECAY * p)
        yield p


def norm_clipping(p, grads, bound=2.0):
    """Pascanu et al. 2013, algorithm 1, before AdamW."""
    norms = [np.sqrt(np.sum(g**2)) for g in grads]
    clipped = [g * (bound / n) if n >= bound else g for g, n in zip(grads, norms, strict=True)]
    for t, _, m, v in _adam(clipped):
        p = p - rate_at(t) * (m / (np.sqrt(v) + EPS) + DECAY * p)
        yield p


def skipping(p, grads, window=128, sigmas=6.0):
    """OLMo-core's criterion on the norm, of one side as MaxText's; what is skipped leaves AdamW."""
    norms = [np.sqrt(np.sum(g**2)) for g in grads]
    taken = []
    for k, norm in enumerate(norms):
        recent = norms[max(0, k - window) : k]
        far = len(recent) + 1 >= window // 2 and norm > np.mean(recent) + sigmas * np.std(
            recent, ddof=1
        )
        taken.append(not far)
    steps = _adam([g for g, yes in zip(grads, taken, strict=True) if yes])
    for yes in taken:
        if yes:
            t, _, m, v = next(steps)
            p = p - rate_at(t) * (m / (np.sqrt(v) + EPS) + DECAY * p)
        yield p
