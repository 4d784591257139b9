# SPDX-License-Identifier: Apache-2.0
"""What storing Adam's moments in fewer bytes does to an update: a stress test.

Leaves of 32768 entries whose gradients are noise, the scales spread over 1, 2 and 4 decades inside
every block of 256; and over 1 decade, with all gradients scaled by 1e-8 to 1e5. After 1500 steps,
the next update of each storage beside float32's own: cosine, relative length, largest entry.
torchao, bitsandbytes and flashoptim-jax take part where they are installed, on the same gradients.

    python benchmarks/lean_fidelity.py           # writes benchmarks/results/lean_fidelity.json
                                                 # and docs/lean_fidelity.png
    python benchmarks/lean_fidelity.py --moments float32 8bit --no-peers --steps 300 --out /tmp
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from lean import DOCS, FORMATS, RESULTS, chosen, machine, quieten, save, versions
from lean_peers import B1, B2, EPS, PEERS, Leaves, Storage
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import adamfn

SHAPE, BLOCK, DECADES, STEPS = (128, 256), 256, (1, 2, 4), 1500
SCALES = (1e-8, 1e-7, 1e-6, 1e-4, 1e-2, 1e2, 1e4, 1e5)
SPREADS, SCALED = [str(d) for d in DECADES], [f"{scale:.0e}" for scale in SCALES]
ADAMFN = "adamfn {}"


def gradients(steps: int, seed: int) -> Iterator[Leaves]:
    """Yields for each step one leaf for each spread, of scales from 1 down to 10^-decades.

    And one for each scale, of gradients that spread over one decade.
    """
    random = np.random.default_rng(seed)
    exponents = random.permuted(np.tile(np.linspace(-1, 0, BLOCK), (SHAPE[0], 1)), axis=1)
    factors = {str(d): 10 ** (d * exponents) for d in DECADES}
    factors |= {f"{scale:.0e}": scale * 10**exponents for scale in SCALES}
    for _ in range(steps):
        noise = random.standard_normal(SHAPE)
        yield {name: (noise * factor).astype(np.float32) for name, factor in factors.items()}


def by_adamfn(moments: str) -> Storage:
    def run(steps: Iterator[Leaves]) -> tuple[Leaves, float]:
        tx = adamfn.chain(
            adamfn.scale_by_moments(B1, B2, EPS, **chosen(moments)), adamfn.bias_correct(B1, B2)
        )
        update = jax.jit(tx.update, donate_argnums=1)
        state = tx.init({name: jnp.zeros(SHAPE) for name in SPREADS + SCALED})
        for g in steps:
            updates, state = update(g, state)
        stored = sum(leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.ndim)
        return jax.tree.map(np.asarray, updates), stored / entries()

    return run


def entries() -> int:
    return len(SPREADS + SCALED) * SHAPE[0] * SHAPE[1]


def compare(updates: Leaves, expected: Leaves, names: list[str]) -> dict[str, dict[str, Any]]:
    """Cosine, relative length and largest entry of leaves; None where an update is not finite."""
    results = {}
    for name in names:
        u, e = (x[name].astype(np.float64).ravel() for x in (updates, expected))
        if not np.isfinite(u).all():
            results[name] = dict.fromkeys(("cosine", "relative_length", "largest"))
            continue
        lengths = np.linalg.norm(u), np.linalg.norm(e)
        results[name] = {
            "cosine": float(u @ e / (lengths[0] * lengths[1])),
            "relative_length": float(lengths[0] / lengths[1]),
            "largest": float(np.abs(u).max()),
        }
    return results


def table(rows: dict) -> Table:
    title = "An update beside float32's: cosine, relative length, largest entry"
    shown = Table(title=title, box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    shown.add_column("moments by", no_wrap=True)
    shown.add_column("bytes", min_width=4, no_wrap=True)
    for d in DECADES:
        shown.add_column(f"{d} decade{'s' * (d > 1)}", no_wrap=True)
    for name, row in rows.items():
        cells = (row["spreads"][str(d)] for d in DECADES)
        shown.add_row(
            name,
            f"{row['bytes_a_parameter']:.2f}",
            *(
                f"{c['cosine']:.4f} {short(c['relative_length'])} {short(c['largest'])}"
                for c in cells
            ),
        )
    return shown


def short(x: float) -> str:
    return f"{x:.2f}" if x < 10 else f"{x:.0f}"


def draw(rows: dict, path: Path) -> None:
    """A row for each storage: its update's angle and its length's error, on logarithmic axes."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in rows if name != ADAMFN.format("float32")][::-1]
    figure, axes = plt.subplots(
        1, 2, figsize=(8.4, 1.3 + 0.3 * len(names)), layout="constrained", sharey=True
    )
    measures = {
        "angle to float32's update, degrees": lambda c: np.degrees(np.arccos(min(1, c["cosine"]))),
        "error of the length, relative to float32's": lambda c: abs(c["relative_length"] - 1),
    }
    styles = dict(zip(DECADES, (("#8fbbe8", "o"), ("#1f6fb4", "s"), ("#b3361e", "D")), strict=True))
    for panel, (label, measure) in zip(axes, measures.items(), strict=True):
        for d, (color, marker) in styles.items():
            values = [measure(rows[name]["spreads"][str(d)]) for name in names]
            label_of = f"{d} decade{'s' * (d > 1)}"
            panel.plot(values, range(len(names)), marker, color=color, label=label_of, alpha=0.9)
        panel.set(xlabel=label, yticks=range(len(names)), yticklabels=names)
        panel.set_ylim(-0.6, len(names) - 0.4)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_xscale("log")
    axes[0].set(xlim=(0.5, 100), xticks=(1, 3, 10, 30, 90), xticklabels=(1, 3, 10, 30, 90))
    axes[0].minorticks_off()
    handles, labels = axes[0].get_legend_handles_labels()
    labels = [f"scales span {label}" for label in labels]
    figure.legend(handles, labels, loc="outside upper center", ncols=len(DECADES), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", nargs="*", choices=FORMATS, default=FORMATS)
    parser.add_argument("--no-peers", action="store_true", help="adamfn alone")
    parser.add_argument("--eager", action="store_true", help="torchao without a C++ compiler")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder of both files (results/ and docs/)")
    args = parser.parse_args(argv)

    names = ("float32", *(name for name in args.moments if name != "float32"))
    storages = {ADAMFN.format(name): by_adamfn(name) for name in names}
    if PEERS and not args.no_peers:
        storages |= PEERS
        quieten(args.eager)
    console, rows, expected = Console(), {}, None
    for name, storage in storages.items():
        steps = track(
            gradients(args.steps + 1, args.seed),
            total=args.steps + 1,
            description=f"{name:20s}",
            console=console,
        )
        updates, stored = storage(steps)
        expected = updates if expected is None else expected
        rows[name] = {
            "bytes_a_parameter": stored,
            "spreads": compare(updates, expected, SPREADS),
            "scales": compare(updates, expected, SCALED),
        }
    console.print(table(rows))
    recorded = {
        "machine": machine(),
        "versions": versions(),
        "steps": args.steps,
        "seed": args.seed,
        "rows": rows,
    }
    save((args.out or RESULTS) / "lean_fidelity.json", recorded)
    draw(rows, (args.out or DOCS) / "lean_fidelity.png")


if __name__ == "__main__":
    main()
