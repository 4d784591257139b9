"""The steps that were looked at, on the host."""

from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from adamfn.monitor.observing import Observation
from adamfn.trees import describe

Layer = dict[str, float]
"""The figures of one layer."""


def looks(seen: Any) -> list[tuple[int, dict[str, Layer]]]:
    """The steps that were looked at, with the figures of every layer by its name.

    Args:
      seen: an `Observation`, one stacked by `scan`, or a list of either.

    Raises:
      TypeError: it is something else, or is being traced.
    """
    if isinstance(seen, list):
        return [look for part in seen for look in looks(part)]  # pyright: ignore[reportUnknownVariableType]
    if not isinstance(seen, Observation):
        raise TypeError(
            f"monitor: found {describe(seen)}; expected what `observe` returned, which is the last"
            " of what `monitor.step` returns, or a list of it."
        )
    if isinstance(seen.step, Tracer):
        raise TypeError(
            "monitor: found an Observation that is being traced; expected one with numbers. Return"
            " it from the jitted function, and read it outside."
        )
    seen = jax.device_get(seen)
    found: list[tuple[int, dict[str, Layer]]] = []
    for place in np.ndindex(np.shape(seen.step)):
        if not seen.step[place]:
            continue
        layers: dict[str, Layer] = {}
        for path, figures in seen.leaves.items():
            for figure, value in figures.items():
                for layer, x in np.ndenumerate(value[place]):
                    layers.setdefault(f"{path}[{layer[0]}]" if layer else path, {})[figure] = float(
                        x
                    )
        found.append((int(seen.step[place]), layers))
    return found


def layers_of(seen: Any) -> dict[str, Layer]:
    """The figures of every layer at the last step that was looked at.

    Raises:
      ValueError: there is none.
    """
    found = looks(seen)
    if not found:
        raise ValueError(
            "monitor: found no step that was looked at; expected one. With every=n that is the"
            " first, and each n-th after it: keep what `observe` returned then."
        )
    return found[-1][1]


def flat(seen: Any) -> dict[str, float]:
    """All figures of the last step that was looked at, by names such as `blocks/qkv[2]/gradient`.

    For TensorBoard, `for name, x in flat(seen).items(): writer.add_scalar(name, x, step)`; for
    Weights and Biases, `wandb.log(flat(seen), step=step)`.

    Args:
      seen: an `Observation`, one stacked by `scan`, or a list of either.

    Raises:
      ValueError: no step was looked at.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> from adamfn import monitor
    >>> tx = adamfn.adam(0.1)
    >>> params = {"w": jnp.ones((2, 3))}
    >>> seen = monitor.observe(tx, params, tx.init(params), params, layers={"w": 0})
    >>> print(monitor.flat(seen)["w[1]/gradient"])
    1.0
    """
    layers = layers_of(seen)
    return {f"{name}/{figure}": x for name, own in layers.items() for figure, x in own.items()}
