# SPDX-License-Identifier: Apache-2.0
"""Observations on the host: looks, faults, a table (by rich) and a picture (by matplotlib)."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jax.core import Tracer

from adamfn.monitor.observing import Observation
from adamfn.trees import described, shown

Layer = dict[str, float]  # its figures

# Times the others' median. One such layer of a thousand has 99.9% of the squared global norm.
_EXPLODING = 1000.0
_BY_FIGURE = {
    "stalled by rounding": "lost",
    "decided by eps": "by_eps",
    "codes at their limit": "lowest",
}
WORDS = ("not finite", "exploding", "dead", "frozen", *_BY_FIGURE)
"""The words of `faults`, the worst first: a NaN or an infinity, worst in a weight, then in moments;
a gradient over 1000 times the median of the other layers'; a gradient of zeros; an update of zeros
despite gradient and rate; more than half of the layer, by `lost`, `by_eps` and `lowest`."""

_COLUMNS = ("gradient", "update_over_weight", "step_50", "signal", "by_eps", "lost")
_SIZES = ("gradient", "update", "weight", "update_over_weight", "rate")  # span powers of ten


class Fault(NamedTuple):
    """What is wrong with a layer, such as `blocks/qkv[2]`: one of `WORDS`, and how bad it is."""

    layer: str
    word: str
    degree: float


def looks(seen: Any) -> list[tuple[int, dict[str, Layer]]]:
    """Returns the steps that were looked at, with the figures of every layer by its name.

    `seen` is an `Observation`, one stacked by `scan`, or a list of either; else, or if it is being
    traced: TypeError. The others take the same; if no step was looked at: ValueError.
    """
    if isinstance(seen, list):
        return [look for part in cast("list[Any]", seen) for look in looks(part)]
    traced = isinstance(seen, Observation) and isinstance(seen.step, Tracer)
    if traced or not isinstance(seen, Observation):
        raise TypeError(
            f"monitor: found {'a traced Observation' if traced else described(seen)}; expected what"
            " `observe` returned, or a list of it. Return it from the jitted function, and read it"
            " outside."
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
    """Returns what is wrong at the last of `looks`, the worst first, and once for a layer.

    >>> import adamfn, jax.numpy as jnp
    >>> tx, params = adamfn.adam(0.1, eps=1e-3), {"w": jnp.ones(2), "v": jnp.ones(2)}
    >>> grads = {"w": jnp.full(2, 1e-6), "v": jnp.zeros(2)}
    >>> seen = adamfn.monitor.observe(tx, grads, tx.init(params), params)
    >>> [(fault.layer, fault.word) for fault in adamfn.monitor.faults(seen)]
    [('v', 'dead'), ('w', 'decided by eps')]
    """
    layers, found = last_look(seen)[1], list[Fault]()
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
    if own["gradient"] > _EXPLODING * median:
        return "exploding", own["gradient"] / median
    if own["zeros"] == 1:
        return "dead", 1.0
    if own["still"] == 1 and own.get("rate", 1.0) > 0:
        return "frozen", own["gradient"]
    degrees = ((word, own.get(figure, 0.0)) for word, figure in _BY_FIGURE.items())
    return next((found for found in degrees if found[1] > 0.5), ("", 0.0))


def report(seen: Any, rows: int | None = None) -> Any:
    """Makes a `rich.table.Table` of the last look: the worst layers first, with what is wrong.

    `seen` and errors are as in `looks`; `rows` is how many layers to show, None for all. Show it
    with `rich.print` or `rich.live.Live`.

    >>> import adamfn, jax.numpy as jnp
    >>> tx, params = adamfn.adam(0.1), {"w": jnp.ones(3)}
    >>> seen = adamfn.monitor.observe(tx, params, tx.init(params), params)
    >>> print(adamfn.monitor.report(seen).title)
    step 1: nothing is wrong
    """
    if rows is not None and (not isinstance(rows, int) or rows < 0):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(
            f"report: rows is {shown(rows)}; expected how many layers, or None for all."
        )
    from rich import box
    from rich.table import Table

    wrong, (step, layers) = faults(seen), last_look(seen)
    words = {fault.layer: fault.word for fault in wrong}
    found = f"{len(wrong)} of {len(layers)} layers" if wrong else "nothing is wrong"
    table = Table(title=f"step {step}: {found}", box=box.SIMPLE, pad_edge=False)
    table.padding = (0, 1, 0, 0)
    table.add_column("layer", no_wrap=True)
    table.add_column("what is wrong", style="bold red", no_wrap=True)
    columns = [name for name in _COLUMNS if any(name in own for own in layers.values())]
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    for layer in [*words, *(name for name in layers if name not in words)][:rows]:
        cells = [f"{layers[layer][c]:.2g}" if c in layers[layer] else "" for c in columns]
        table.add_row(layer, words.get(layer, ""), *cells)
    return table


def picture(seen: Any, losses: Sequence[float] | None = None, figure: str = "gradient") -> Any:
    """Draws a run: layers against steps in colours of a figure, with the loss above.

    `seen` and errors are as in `looks`; `losses` is the loss of every training step, from the
    first; `figure` is one of `adamfn.monitor.figures`. Red is not finite; grey is missing, or zero
    on a logarithmic scale. Returns a `matplotlib.figure.Figure`, for `.savefig(path)`.

    >>> import adamfn, jax.numpy as jnp
    >>> tx, params = adamfn.adam(0.1), {"w": jnp.ones(3)}
    >>> seen = [adamfn.monitor.observe(tx, params, tx.init(params), params)]
    >>> drawn = adamfn.monitor.picture(seen, losses=[1.0], figure="signal")
    """
    from matplotlib import colormaps, colors, ticker
    from matplotlib.figure import Figure

    last, found = last_look(seen)[1], looks(seen)
    known = dict.fromkeys(name for own in last.values() for name in own)
    if figure not in known:
        wanted = f"one of {', '.join(known)}" if known else "layers, of which there are none"
        raise ValueError(f"picture: found no figure {figure!r}; expected {wanted}.")
    curve = np.zeros(0) if losses is None else np.asarray(losses)
    if curve.ndim != 1 or curve.dtype.kind not in "fiu":
        raise TypeError(
            f"picture: losses is {described(losses)}; expected the loss of every training step."
            " Which figure is drawn is figure=."
        )
    values = np.array([[own[layer].get(figure, -1.0) for _, own in found] for layer in last])
    finite = np.isfinite(values)
    shown = values[finite & (values > 0)]
    low, top = (shown.min(), shown.max()) if shown.size else (1.0, 1.0)
    norm = colors.LogNorm(low, top) if figure in _SIZES else colors.Normalize(0, max(1.0, top))
    values = np.where(finite, values, 10 * float(norm.vmax or 1))
    colours = colormaps["viridis"].with_extremes(over="red", under="0.85", bad="0.85")
    steps = [step for step, _ in found]
    edges = [*steps, steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1)]
    rows = np.arange(len(last) + 1)
    height = 0.22 * len(last) + 0.5
    drawn = Figure(figsize=(8, height + 1.5), layout="constrained")
    above, below = drawn.subplots(2, 1, sharex=True, height_ratios=(1.5, height))
    above.plot(range(1, len(curve) + 1), curve, color="black", linewidth=0.8)
    above.set_ylabel("loss")
    mesh = below.pcolormesh(edges, rows, values, norm=norm, cmap=colours)
    below.set_yticks(rows[:-1] + 0.5, list(last), fontsize=7)
    below.invert_yaxis()
    below.set_xlabel("step")
    below.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    drawn.colorbar(mesh, ax=below, label=figure.replace("_", " "))
    return drawn
