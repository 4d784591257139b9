# SPDX-License-Identifier: Apache-2.0
"""The reference of the site has every public name, and no other."""

import re
from pathlib import Path

import adamfn
from adamfn import formats, interop, masks, monitor
from adamfn.interop import torch

PAGES = Path(__file__).parent.parent / "docs" / "api"


def test_every_public_name_has_its_entry():
    text = "\n".join(page.read_text() for page in PAGES.glob("*.md"))
    entries = re.findall(r"^::: (adamfn\.\S+)", text, re.MULTILINE)
    assert len(entries) == len(set(entries))
    modules = {"formats", "masks", "monitor", "sharding"}
    public = {f"adamfn.{name}" for name in adamfn.__all__ if name not in modules}
    for module in (masks, monitor, interop, torch):
        public |= {f"{module.__name__.replace('core.', '')}.{name}" for name in module.__all__}
    # What formats are told apart by is not for users.
    inner = {"FORMATS", "check_moments", "choose_formats"}
    public |= {f"adamfn.formats.{name}" for name in formats.__all__ if name not in inner}
    assert public - {*entries} == set()
    for entry in entries:
        assert len(entry.split(".")) > 2 or entry in public, f"{entry} is not public"
