# SPDX-License-Identifier: Apache-2.0
"""A page fails if its code prints something else than it shows; each optimizer has its page."""

import inspect
from pathlib import Path

import pytest

import adamfn
from website import samples

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGE = """
```python
x = 2  # a comment
print(x)  # 2
for y in range(2):
    print(y, x)
# 0 2
# 1 2

# A comment that stands alone.
print("a long", "line")
```

```text
a ... line
```

```py
raise ValueError("shown, not run")
```

```python
x / 0
```

```text
ZeroDivisionError: division by zero
```
"""


def run(folder, page):
    path = folder / "page.md"
    path.write_text(page)
    samples.run(path)


def test_a_page_prints_what_it_shows(tmp_path):
    run(tmp_path, PAGE)


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("# 2\n", "# 3\n", 4),
        ("# 1 2", "# 1 3", 6),
        ("a ... line", "a short line", 11),
        ("```text\na ... line\n```", "", 11),
        ("by zero", "by one", 23),
        ("x / 0", "x / 1", 23),
    ],
)
def test_another_output_fails_and_names_its_line(tmp_path, old, new, line):
    assert PAGE.count(old) == 1
    with pytest.raises(AssertionError, match=rf"page.md, line {line} prints"):
        run(tmp_path, PAGE.replace(old, new))


@pytest.mark.parametrize("code", ["1 / 0\nx = 1", "1 / 0\n```\n\n```python\nx = 1"])
def test_only_the_last_statement_may_fail_and_must_show_it(tmp_path, code):
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, f"```python\n{code}\n```\n\n```text\nZeroDivisionError: ...\n```")


def test_code_is_at_most_88_columns_wide():
    for page in PAGES:
        for block in samples.BLOCK.finditer(page.read_text()):
            wide = [line for line in block[1].splitlines() if len(line) > 88]
            assert not wide, (page.name, wide)


def test_each_optimizer_has_a_page_of_its_family_and_a_row_in_the_table_that_chooses():
    takes_a_rate = {
        name
        for name, function in inspect.getmembers(adamfn, inspect.isfunction)
        if next(iter(inspect.signature(function).parameters), None) == "learning_rate"
    }
    optimizers = takes_a_rate - {"scale_by_lr"}
    assert "adamw" in optimizers
    contents, choosing = ((ROOT / path).read_text() for path in ("mkdocs.yml", "docs/choosing.md"))
    for name in optimizers:
        assert (ROOT / f"docs/family/{name}.md").exists(), name
        assert f"- family/{name}.md" in contents
        assert f"](family/{name}.md)" in choosing
