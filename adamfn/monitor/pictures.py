"""A table of the last look, and a picture of a run. rich and matplotlib are imported where used."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from adamfn.monitor.reading import faults, last_look, looks
from adamfn.trees import describe

COLUMNS = ("gradient", "update_over_weight", "step_50", "signal", "by_eps", "lost")
"""The figures in the table."""

_SIZES = ("gradient", "update", "weight", "update_over_weight", "rate")
"""Figures that span many powers of ten."""


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
        raise ValueError(f"report: rows is {rows!r}; expected how many layers, or None for all.")
    from rich import box
    from rich.table import Table

    wrong, (step, layers) = faults(seen), last_look(seen)
    words = {fault.layer: fault.word for fault in wrong}
    found = f"{len(wrong)} of {len(layers)} layers" if wrong else "nothing is wrong"
    table = Table(title=f"step {step}: {found}", box=box.SIMPLE, pad_edge=False)
    table.padding = (0, 1, 0, 0)
    table.add_column("layer", no_wrap=True)
    table.add_column("what is wrong", style="bold red", no_wrap=True)
    columns = [name for name in COLUMNS if any(name in own for own in layers.values())]
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
    import matplotlib as mpl
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    last, found = last_look(seen)[1], looks(seen)
    known = dict.fromkeys(name for own in last.values() for name in own)
    if figure not in known:
        wanted = f"one of {', '.join(known)}" if known else "layers, of which there are none"
        raise ValueError(f"picture: found no figure {figure!r}; expected {wanted}.")
    curve = np.zeros(0) if losses is None else np.asarray(losses)
    if curve.ndim != 1 or curve.dtype.kind not in "fiu":
        raise TypeError(
            f"picture: losses is {describe(losses)}; expected the loss of every training step."
            " Which figure is drawn is figure=."
        )
    values = np.array([[own[layer].get(figure, -1.0) for _, own in found] for layer in last])
    log, finite = figure in _SIZES, np.isfinite(values)
    shown = values[finite & ((values > 0) if log else (values >= 0))]
    ends = (shown.min(), shown.max()) if shown.size else (1.0, 1.0)
    top = ends[1] if log else max(1.0, ends[1])
    norm = LogNorm(ends[0], top) if log else Normalize(0, top)
    colours = mpl.colormaps["viridis"].with_extremes(over="red", under="0.85", bad="0.85")
    steps = [step for step, _ in found]
    edges = [*steps, steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1)]
    rows = np.arange(len(last) + 1)

    height = 0.22 * len(last) + 0.5
    drawn = Figure(figsize=(8, height + 1.5), layout="constrained")
    above, below = drawn.subplots(2, 1, sharex=True, height_ratios=(1.5, height))
    above.plot(range(1, len(curve) + 1), curve, color="black", linewidth=0.8)
    above.set_ylabel("loss")
    values = np.where(finite, np.where(log & (values == 0), -1.0, values), 10 * top)
    mesh = below.pcolormesh(edges, rows, values, norm=norm, cmap=colours)
    below.set_yticks(rows[:-1] + 0.5, list(last), fontsize=7)
    below.invert_yaxis()
    below.set_xlabel("step")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    drawn.colorbar(mesh, ax=below, label=figure.replace("_", " "))
    return drawn
