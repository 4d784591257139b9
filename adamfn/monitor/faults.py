"""What is wrong with a layer, in a word, and from which figure on."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from adamfn.monitor.looks import Layer, layers_of

EXPLODING = 1000.0
"""How many times the median of the other layers' gradients. A layer as far above a thousand others
has 99.9% of the squared global norm to itself: clipping by it leaves the others nothing."""

MOST = 0.5
"""A share of a layer's elements from which on it is the rule there: steps that eps decides, updates
that rounding loses, codes of nu at the lowest level, which smaller ones are taken for."""

WORDS = (
    "not finite",
    "exploding",
    "dead",
    "frozen",
    "stalled by rounding",
    "decided by eps",
    "codes at their limit",
)
"""From the worst on. Not finite: a NaN or an infinity, the weight before the moments, these before
the gradient, which is the way it spreads. Exploding: as above. Dead: a gradient of zeros. Frozen: a
gradient, a rate, and an update of zeros. The others: `MOST` of the layer, by `lost`, `by_eps` and
`lowest`."""


class Fault(NamedTuple):
    """What is wrong with a layer."""

    layer: str
    """Its path, and its number where layers are stacked: `blocks/qkv[2]`."""
    word: str
    """One of `WORDS`."""
    degree: float
    """How far it has come: within a word, the worst is the largest."""


def faults(seen: Any) -> list[Fault]:
    """What is wrong at the last step that was looked at, worst first.

    Args:
      seen: an `Observation`, one stacked by `scan`, or a list of either.

    Returns:
      A `Fault` for each layer that has one: the first of `WORDS` that holds.

    Raises:
      ValueError: no step was looked at.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> from adamfn import monitor
    >>> tx = adamfn.adam(0.1, eps=1e-3)
    >>> params = {"w": jnp.ones(2), "v": jnp.ones(2)}
    >>> grads = {"w": jnp.full(2, 1e-6), "v": jnp.zeros(2)}
    >>> for fault in monitor.faults(monitor.observe(tx, grads, tx.init(params), params)):
    ...     print(fault.layer, fault.word)
    v dead
    w decided by eps
    """
    layers = layers_of(seen)
    found = [fault for fault in _found(layers) if fault.word]
    return sorted(found, key=lambda fault: (WORDS.index(fault.word), -fault.degree))


def _found(layers: dict[str, Layer]) -> Iterator[Fault]:
    gradients = {name: own["gradient"] for name, own in layers.items()}
    for name, own in layers.items():
        others = [x for other, x in gradients.items() if other != name and 0 < x < np.inf]
        median = float(np.median(others)) if others else np.inf
        yield Fault(name, *_worst(own, median))


def _worst(own: Layer, median: float) -> tuple[str, float]:
    kinds = ("weight", "moments", "gradient")
    not_finite = [own.get(f"not_finite_{kind}", 0.0) for kind in kinds]
    if any(not_finite):
        # The weight's first, then the moments': what has most of them is where it has spread.
        worst = next(place for place, count in enumerate(not_finite) if count)
        return "not finite", len(kinds) - worst + 1 - 1 / (1 + not_finite[worst])
    if own["gradient"] > EXPLODING * median:
        return "exploding", own["gradient"] / median
    if own["zeros"] == 1:
        return "dead", 1.0
    if own["still"] == 1 and own.get("rate", 1.0) > 0:
        return "frozen", own["gradient"]
    for word, figure in (
        ("stalled by rounding", "lost"),
        ("decided by eps", "by_eps"),
        ("codes at their limit", "lowest"),
    ):
        if own.get(figure, 0.0) > MOST:
            return word, own[figure]
    return "", 0.0
