# SPDX-License-Identifier: Apache-2.0
"""The README's figures are those of the recorded results, its links lead somewhere, it is short."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import adamfn

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_tables_are_drawn_from_the_recorded_results():
    command = [sys.executable, str(ROOT / "benchmarks" / "readme_tables.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0, "run benchmarks/readme_tables.py"


def test_it_is_read_in_two_minutes():
    assert len(README.splitlines()) <= 150
    _, _, table = README.partition("<!-- why -->\n")
    rows = table.partition("<!-- end why -->")[0].splitlines()[2:]
    assert 0 < len(rows) <= 8


@pytest.mark.parametrize("link", re.findall(r"\]\((?!https:)([^)]*)\)", README))
def test_links_lead_to_a_page_and_a_heading(link):
    path, _, anchor = link.partition("#")
    assert (ROOT / path).exists()
    if anchor:
        headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), re.MULTILINE)
        assert anchor in {re.sub(r"\W+", "-", heading.lower()) for heading in headings}


@pytest.mark.parametrize(
    ("path", "line"), [("CHANGELOG.md", "## {}"), ("CITATION.cff", "version: {}")]
)
def test_the_version_is_everywhere_the_same(path, line):
    assert line.format(adamfn.__version__) in (ROOT / path).read_text().splitlines()


def test_every_source_names_its_license():
    folders = ("adamfn", "benchmarks", "examples", "tests", "website")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.*")]
    sources = [path for path in sources if path.suffix in (".py", ".cc", ".h")]
    assert len(sources) > 200
    for path in sources:
        line = path.read_text().partition("\n")[0]
        assert not line or line.endswith(" SPDX-License-Identifier: Apache-2.0"), path
