# SPDX-License-Identifier: Apache-2.0
"""Docstrings as the site shows them: the session at the end is an example, names are links."""

import ast
import re
from pathlib import Path

import griffe

FACE = ast.parse((Path(__file__).parent.parent / "adamfn" / "__init__.py").read_text())
PUBLIC = next(
    ast.literal_eval(node.value)
    for node in FACE.body
    if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
)
# Modules have pages of their own, and `backend` is an argument too.
LINKED = set(PUBLIC) - {"formats", "masks", "sharding", "backend"}
NAME = re.compile(r"(?<![`\[])`(\w+)`(?![`\]])")


class Docstrings(griffe.Extension):
    """What is done to each docstring before it is read."""

    def on_object(self, *, obj, **kwargs):
        """Rewrites the docstring of an object."""
        if obj.docstring is None:
            return
        head, session, tail = obj.docstring.value.partition("\n>>> ")
        head = NAME.sub(lambda match: _link(match[1], obj.name), head)
        if session:
            tail = (">>> " + tail).replace("\n", "\n    ")
            head = f"{head.rstrip()}\n\nExamples:\n    {tail}"
        obj.docstring.value = head


def _link(name, own):
    return f"[`{name}`][adamfn.{name}]" if name in LINKED and name != own else f"`{name}`"
