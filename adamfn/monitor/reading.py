"""Observations on the host: which steps were looked at, and what is wrong with each layer."""

from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jax.core import Tracer

from adamfn.monitor.observing import Observation
from adamfn.trees import describe

Layer = dict[str, float]
"""The figures of one layer."""

EXPLODING = 1000.0
"""Times the median of the other layers' gradients. A layer so far above a thousand others has 99.9%
of the squared global norm, so clipping by that norm leaves the others nothing."""

MOST = 0.5
"""Fraction of a layer above which a condition counts as affecting all of it."""

FIGURES = {
    "stalled by rounding": "lost",
    "decided by eps": "by_eps",
    "codes at their limit": "lowest",
}
WORDS = ("not finite", "exploding", "dead", "frozen", *FIGURES)
"""The words of `faults`, the worst first. Not finite: a NaN or an infinity, worst in a weight, then
in moments. Exploding: a gradient over a thousand times the median of the other layers'. Dead: a
gradient of zeros. Frozen: a gradient, a rate, and an update of zeros. The others: more than half of
the layer, by the figures `lost`, `by_eps` and `lowest`."""


class Fault(NamedTuple):
    """What is wrong with a layer."""

    layer: str
    """Its path, with an index if layers are stacked: `blocks/qkv[2]`."""
    word: str
    """One of `WORDS`."""
    degree: float
    """How bad it is: larger is worse among the faults of one word."""


def looks(seen: Any) -> list[tuple[int, dict[str, Layer]]]:
    """Returns the steps that were looked at, with the figures of every layer by its name.

    `seen` is an `Observation`, one stacked by `scan`, or a list of either; anything else, and one
    that is being traced, raises a TypeError. The other functions take the same, and raise a
    ValueError if no step was looked at.
    """
    if isinstance(seen, list):
        return [look for part in cast("list[Any]", seen) for look in looks(part)]
    if not isinstance(seen, Observation) or isinstance(seen.step, Tracer):
        traced = "an Observation that is being traced"
        raise TypeError(
            f"monitor: found {traced if isinstance(seen, Observation) else describe(seen)}; expected"
            " what `observe` returned, or a list of it. Return it from the jitted function, and"
            " read it outside."
        )
    seen = jax.device_get(seen)
    found: list[tuple[int, dict[str, Layer]]] = []
    for place in map(tuple, np.argwhere(seen.step)):
        layers: dict[str, Layer] = {}
        for path, figures in seen.leaves.items():
            for figure, value in figures.items():
                for layer, x in np.ndenumerate(value[place]):
                    name = f"{path}[{layer[0]}]" if layer else path
                    layers.setdefault(name, {})[figure] = float(x)
        found.append((int(seen.step[place]), layers))
    return found


def last_look(seen: Any) -> tuple[int, dict[str, Layer]]:
    """The last of `looks`, of which there must be one."""
    found = looks(seen)
    if not found:
        raise ValueError(
            "monitor: found no step that was looked at; expected one. With every=n these are the"
            " first and each n-th after it."
        )
    return found[-1]


def flat(seen: Any) -> dict[str, float]:
    """Returns the figures of the last of `looks` by names such as `blocks/qkv[2]/gradient`.

    For TensorBoard, `for name, x in flat(seen).items(): writer.add_scalar(name, x, step)`; for
    Weights and Biases, `wandb.log(flat(seen), step=step)`.

    >>> import adamfn, jax.numpy as jnp
    >>> tx, params = adamfn.adam(0.1), {"w": jnp.ones((2, 3))}
    >>> seen = adamfn.monitor.observe(tx, params, tx.init(params), params, layers={"w": 0})
    >>> print(adamfn.monitor.flat(seen)["w[1]/gradient"])
    1.0
    """
    _, layers = last_look(seen)
    return {f"{name}/{figure}": x for name, own in layers.items() for figure, x in own.items()}


def faults(seen: Any) -> list[Fault]:
    """Returns what is wrong at the last of `looks`, the worst first.

    A layer has one `Fault` at most: the first of `WORDS` that holds.

    >>> import adamfn, jax.numpy as jnp
    >>> tx = adamfn.adam(0.1, eps=1e-3)
    >>> params = {"w": jnp.ones(2), "v": jnp.ones(2)}
    >>> grads = {"w": jnp.full(2, 1e-6), "v": jnp.zeros(2)}
    >>> seen = adamfn.monitor.observe(tx, grads, tx.init(params), params)
    >>> [(fault.layer, fault.word) for fault in adamfn.monitor.faults(seen)]
    [('v', 'dead'), ('w', 'decided by eps')]
    """
    _, layers = last_look(seen)
    found: list[Fault] = []
    for name, own in layers.items():
        others = [x["gradient"] for other, x in layers.items() if other != name]
        others = [x for x in others if 0 < x < np.inf]
        word, degree = _worst(own, float(np.median(others)) if others else np.inf)
        found += [Fault(name, word, degree)] if word else []
    return sorted(found, key=lambda fault: (WORDS.index(fault.word), -fault.degree))


def _worst(own: Layer, median: float) -> tuple[str, float]:
    for worst, kind in enumerate(("weight", "moments", "gradient")):
        count = own.get(f"not_finite_{kind}", 0.0)
        if count:
            return "not finite", 4 - worst - 1 / (1 + count)
    if own["gradient"] > EXPLODING * median:
        return "exploding", own["gradient"] / median
    if own["zeros"] == 1:
        return "dead", 1.0
    if own["still"] == 1 and own.get("rate", 1.0) > 0:
        return "frozen", own["gradient"]
    degrees = ((word, own.get(figure, 0.0)) for word, figure in FIGURES.items())
    return next((found for found in degrees if found[1] > MOST), ("", 0.0))
