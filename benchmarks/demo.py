# SPDX-License-Identifier: Apache-2.0
"""The demo over several seeds: accuracy, bytes of state, time of a step and to the first one.

python benchmarks/demo.py     # writes benchmarks/results/demo.json
"""

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import mean, median, stdev

from lean import RESULTS, machine, save, versions

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import digits


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS / "demo.json")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        runs = [digits.main(["--seed", str(seed), "--out", folder]) for seed in args.seeds]
    summary = {}
    for name in runs[0]:
        own = [run[name] for run in runs]
        accuracies = [run.accuracies[-1] for run in own]
        summary[name] = {
            "accuracy": mean(accuracies),
            "spread": stdev(accuracies) if len(own) > 1 else 0.0,
            "state_bytes": own[0].state_bytes,
            "per_step": median(run.per_step for run in own),
            "to_first_step": median(run.to_first_step for run in own),
        }
    save(
        args.out,
        {"machine": machine(), "versions": versions(), "seeds": args.seeds, "runs": summary},
    )


if __name__ == "__main__":
    main()
