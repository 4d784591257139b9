# SPDX-License-Identifier: Apache-2.0
"""Runs the notebooks of `examples/` and writes their outputs into them (`make notebook`)."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

for path in sorted((Path(__file__).parent.parent / "examples").glob("*.ipynb")):
    notebook = nbformat.read(path, as_version=4)
    # Times would change at every run, and with chunks of a text its outputs.
    client = NotebookClient(notebook, record_timing=False, coalesce_streams=True)
    client.execute(cwd=path.parent)
    notebook.metadata.language_info = {"name": "python"}
    nbformat.write(notebook, path)
