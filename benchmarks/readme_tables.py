"""Draws the README's tables from `benchmarks/results/`, between its markers.

python benchmarks/readme_tables.py           # rewrites README.md
python benchmarks/readme_tables.py --check   # exits 1 if it would change
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def exactness() -> str:
    """Each library's largest error."""
    recorded = json.loads((RESULTS / "exactness.json").read_text())
    rows = [f"| {name} | {max(errors):.1e} |" for name, errors in recorded["errors"].items()]
    return "\n".join(["| Adam by | largest error of an update |", "|---|---|", *rows])


def trace_cost() -> str:
    """Seconds of tracing and lowering, and their ratio."""
    recorded = json.loads((RESULTS / "trace_cost.json").read_text())
    rows = []
    for tree, result in recorded["results"].items():
        total = {peer: s["trace"] + s["lower"] for peer, s in result["seconds"].items()}
        compiling = {peer: s["compile"] for peer, s in result["seconds"].items()}
        ratio = result["trace_and_lower_ratio"]
        rows.append(
            f"| {tree} | {total['optax']:.2f} s | {total['adamfn']:.2f} s | {ratio['median']:.1f}"
            f" ({ratio['min']:.1f} to {ratio['max']:.1f}) | {compiling['optax']:.1f} s |"
            f" {compiling['adamfn']:.1f} s |"
        )
    head = (
        "| one training update over | optax, trace + lower | adamfn, trace + lower | ratio |"
        " optax, compile | adamfn, compile |"
    )
    return "\n".join([head, "|---|---|---|---|---|---|", *rows])


TABLES = {"exactness": exactness, "trace_cost": trace_cost}


def rendered(text: str) -> str:
    """The README's text with each table drawn again between its markers."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        text = f"{head}{begin}\n{table()}\n{end}{tail}"
    return text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    args = parser.parse_args(argv)
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = rendered(before)
    if args.check:
        sys.exit(before != after)
    readme.write_text(after)


if __name__ == "__main__":
    main()
