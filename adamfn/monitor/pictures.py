"""For eyes: a table of the last step that was looked at, and a picture of a run.

rich and matplotlib are imported where they are used.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from adamfn.monitor.faults import faults
from adamfn.monitor.looks import layers_of, looks

COLUMNS = (
    "gradient",
    "update",
    "weight",
    "update_over_weight",
    "step_50",
    "signal",
    "agreement",
    "by_eps",
    "lost",
)
"""The figures that the table shows, where a layer has them."""


def report(seen: Any, rows: int | None = None) -> Any:
    """A table of the last step that was looked at: the worst layers first, with what is wrong.

    Args:
      seen: an `Observation`, one stacked by `scan`, or a list of either.
      rows: how many layers to show; None for all.

    Returns:
      A `rich.table.Table`, for `rich.print` or `rich.live.Live`.

    Raises:
      ValueError: no step was looked at.
      ModuleNotFoundError: rich is not installed.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> from adamfn import monitor
    >>> tx = adamfn.adam(0.1)
    >>> params = {"w": jnp.ones(3)}
    >>> table = monitor.report(monitor.observe(tx, params, tx.init(params), params))
    >>> print(table.row_count, table.title)
    1 step 1: nothing is wrong
    """
    from rich import box
    from rich.table import Table

    layers, wrong = layers_of(seen), {fault.layer: fault.word for fault in faults(seen)}
    columns = [name for name in COLUMNS if any(name in own for own in layers.values())]
    found = f"{len(wrong)} of {len(layers)} layers" if wrong else "nothing is wrong"
    table = Table(title=f"step {looks(seen)[-1][0]}: {found}", box=box.SIMPLE, pad_edge=False)
    table.add_column("layer", no_wrap=True)
    table.add_column("what is wrong", style="bold red", no_wrap=True)
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    for layer in [*wrong, *(name for name in layers if name not in wrong)][:rows]:
        cells = [f"{layers[layer][c]:.2g}" if c in layers[layer] else "" for c in columns]
        table.add_row(layer, wrong.get(layer, ""), *cells)
    return table


def picture(seen: Any, losses: Sequence[float] | None = None, figure: str = "gradient") -> Any:
    """A picture of a run: layers against steps in colours of a figure, with the loss above.

    Args:
      seen: a list of `Observation`s, or one that `scan` stacked.
      losses: the loss of every training step, from the first.
      figure: one of `adamfn.monitor.figures`. Shares have a linear scale, all else a logarithmic
        one. What is not finite is red; grey is zero, or not there.

    Returns:
      A `matplotlib.figure.Figure`, for `.savefig(path)`.

    Raises:
      ValueError: no step was looked at, or no layer has the figure.
      ModuleNotFoundError: matplotlib is not installed.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> from adamfn import monitor
    >>> tx = adamfn.adam(0.1)
    >>> params = {"w": jnp.ones(3)}
    >>> seen = [monitor.observe(tx, params, tx.init(params), params)]
    >>> drawn = monitor.picture(seen, losses=[1.0], figure="update")
    """
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure

    layers, found = list(layers_of(seen)), looks(seen)
    steps = [step for step, _ in found]
    values = np.array([[own[layer].get(figure, 0.0) for _, own in found] for layer in layers])
    if not any(figure in own for own in layers_of(seen).values()):
        raise ValueError(
            f"picture: found no figure {figure!r}; expected one of"
            f" {', '.join(next(iter(layers_of(seen).values())))}."
        )
    shares = figure in ("zeros", "still", "agreement", "by_eps", "lowest", "highest", "largest", "lost")
    shown = np.ma.masked_where(~np.isfinite(values) | (values == 0) & (not shares), values)
    norm = Normalize(0, 1) if shares else LogNorm() if shown.count() else Normalize()
    drawn = Figure(figsize=(8, 2 + 0.22 * len(layers)), layout="constrained")
    heights = [1.5, 0.22 * len(layers) + 0.5]
    above, below = drawn.subplots(2, 1, sharex=True, height_ratios=heights)
    if losses is None:
        above.set_visible(False)
    else:
        above.plot(range(1, len(losses) + 1), losses, color="black", linewidth=0.8)
        above.set_ylabel("loss")
    below.set_facecolor("0.85")
    edges = [*steps, 2 * steps[-1] - steps[-2] if len(steps) > 1 else steps[-1] + 1]
    rows = np.arange(len(layers) + 1)
    mesh = below.pcolormesh(edges, rows, shown, norm=norm, cmap="viridis")
    broken = np.ma.masked_where(np.isfinite(values), np.ones_like(values))
    below.pcolormesh(edges, rows, broken, cmap="Reds", vmin=0, vmax=1.3)
    below.set_yticks(rows[:-1] + 0.5, layers, fontsize=7)
    below.invert_yaxis()
    below.set_xlabel("step")
    drawn.colorbar(mesh, ax=below, label=figure.replace("_", " "))
    return drawn
