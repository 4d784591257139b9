"""The README's figures are those of the recorded results."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_tables_are_drawn_from_the_recorded_results():
    command = [sys.executable, str(ROOT / "benchmarks" / "readme_tables.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0, "run benchmarks/readme_tables.py"
