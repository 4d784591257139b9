# SPDX-License-Identifier: Apache-2.0
"""Runs the Python blocks of a page, in order and in one namespace, as its reader would.

What a statement prints is in the comment at its end, on its last line or on the lines below it.
A `text` block below a Python block has the rest of what the block prints, or the error of its last
statement. `...` stands for any text, white space is one space, and numbers have six digits.
"""

import ast
import contextlib
import io
import itertools
import re
import traceback

NUMBER = re.compile(r"\d+\.\d*(?:e[-+]?\d+)?")
BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\n\n^```text\n(.*?)^```$)?", re.DOTALL | re.MULTILINE)


def run(path):
    """Runs a page; an `AssertionError` shows the line whose output differs."""
    names, markdown = {"__name__": "__main__"}, path.read_text()
    for block in BLOCK.finditer(markdown):
        start, (code, text) = markdown.count("\n", 0, block.start(1)), block.groups()
        lines, printed = markdown.splitlines()[: start + code.count("\n")], ""
        statements = ast.parse("\n" * start + code).body
        for statement in statements:
            out = io.StringIO()
            try:
                with contextlib.redirect_stdout(out):
                    exec(compile(ast.Module([statement], []), path, "exec"), names)
            except Exception as error:
                if text is None or statement is not statements[-1]:
                    raise
                out.write("".join(traceback.format_exception_only(error)))
            comment = _comment_after(statement, lines)
            if comment and out.getvalue():
                _compare(out.getvalue(), comment, f"{path}, line {statement.end_lineno}")
            else:
                printed += out.getvalue()
        if printed or text:
            _compare(printed, text or "", f"{path}, line {len(lines)}")


def _comment_after(statement, lines):
    rest = lines[statement.end_lineno - 1].encode()[statement.end_col_offset :].decode().strip()
    below = itertools.takewhile(lambda line: line[:1] == "#", lines[statement.end_lineno :])
    return "\n".join(line.removeprefix("#") for line in [rest, *below]).strip()


def _compare(printed, expected, where):
    pattern = re.escape(_plain(expected)).replace(re.escape("..."), ".*")
    found = _plain(printed)
    assert re.fullmatch(pattern, found), f"{where} prints\n{printed}\nand shows\n{expected}"


def _plain(text):
    numbers = NUMBER.sub(lambda number: f"{float(number[0]):.6g}", " ".join(text.split()))
    return numbers.replace("[ ", "[").replace(" ]", "]")
