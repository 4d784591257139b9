"""Runs the notebook of `examples/` and writes its outputs into it (`make notebook`)."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

PATH = Path(__file__).parent.parent / "examples" / "adam_from_the_formulas.ipynb"

notebook = nbformat.read(PATH, as_version=4)
# Times would change at every run, and with chunks of a text its outputs.
client = NotebookClient(notebook, record_timing=False, coalesce_streams=True)
client.execute(cwd=PATH.parent)
notebook.metadata.language_info = {"name": "python"}
nbformat.write(notebook, PATH)
