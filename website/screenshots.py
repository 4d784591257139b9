# SPDX-License-Identifier: Apache-2.0
"""Opens every page of `site/` in a browser, at desktop and phone width, and keeps pictures of them.

It fails where a page is wider than its window, code is cut off, a formula or a picture is missing,
a long page has no table of contents that leads through it, the search finds nothing, or what copy
buttons give does not run. The browser is an installed Chromium or Chrome.

    python website/screenshots.py            # every page, to out/site
    python website/screenshots.py stages     # those with `stages` in their addresses
"""

import argparse
import contextlib
import functools
import io
import shutil
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from playwright.sync_api import Error, sync_playwright

ROOT = Path(__file__).parent.parent
WIDTHS = {"desktop": 1280, "phone": 390}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
COPIED = ("", "coming_from_optax", "api/recipes")
FAULTS = r"""
([desktop, first, listed]) => {
  const faults = [];
  const wide = document.documentElement.scrollWidth - window.innerWidth;
  if (wide > 0) faults.push(`${wide} pixels wider than the window`);
  for (const element of document.querySelectorAll(".md-content img"))
    if (!element.naturalWidth) faults.push(`no picture ${element.getAttribute("src")}`);
  const prose = document.querySelector(".md-content").cloneNode(true);
  for (const element of prose.querySelectorAll("pre, code, .katex")) element.remove();
  const left = prose.textContent.match(/\$\$|\\[()[\]]|\$[^$]*\\[a-z]+[^$]*\$/);
  if (left) faults.push(`a formula that is not rendered: ${left[0]}`);
  for (const code of document.querySelectorAll("pre > code"))
    if (code.scrollWidth > code.clientWidth + 1 && (desktop || first))
      faults.push(`code is cut off: ${code.textContent.trim().slice(0, 40)}`);
  const marks = [...document.querySelectorAll(".md-sidebar--secondary .md-nav__link")]
    .map(link => document.getElementById(decodeURIComponent(link.hash.slice(1))))
    .filter(mark => mark)
    .map(mark => mark.getBoundingClientRect().top + window.scrollY);
  const tops = [0, ...marks, document.documentElement.scrollHeight];
  const gap = Math.max(...tops.slice(1).map((top, k) => top - tops[k]));
  if (desktop && listed && tops.at(-1) > 6000 && gap > 4000)
    faults.push(`${tops.at(-1)} pixels high, ${gap} of them without an entry in the contents`);
  return faults;
}
"""


class Quiet(SimpleHTTPRequestHandler):
    """A server of files that logs nothing."""

    def log_message(self, *args):
        """Nothing."""


def run_copies(browser, address):
    """Runs what the copy buttons give: of a guide in one namespace, of a docstring by itself."""
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    tab = context.new_page()
    for page in COPIED:
        tab.goto(f"{address}/{page}/")
        names = {}
        blocks = tab.locator(".language-pycon, .language-python:not(.doc-signature)").all()
        if not blocks:
            yield f"{page or 'index'}: no code to copy"
        for block in blocks:
            block.hover()
            block.locator("button").click()
            code = tab.evaluate("navigator.clipboard.readText()")
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(code, {} if page.startswith("api/") else names)
            except Exception as error:
                yield f"{page or 'index'}: copied code fails, {error!r}:\n{code}"
    context.close()


def main():
    """Opens the pages; the exit code is 1 if one of them has a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of addresses; all pages without them")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "site")
    args = parser.parse_args()
    site = ROOT / "site"
    pages = sorted(path.parent.relative_to(site) for path in site.rglob("index.html"))
    pages = [p for p in pages if not args.names or any(n in str(p) for n in args.names)]
    args.out.mkdir(parents=True, exist_ok=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    faults = []
    browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        for name, width in WIDTHS.items():
            tab = browser.new_page(viewport={"width": width, "height": 900})
            for page in pages:
                tab.goto(f"{address}/{page}/")
                kind = [name == "desktop", not page.parts, page.parts[:1] != ("examples",)]
                faults += [f"{page} ({name}): {fault}" for fault in tab.evaluate(FAULTS, kind)]
                picture = str(page).replace("/", "-") if page.parts else "index"
                tab.screenshot(path=args.out / f"{picture}-{name}.png", full_page=True)
            tab.goto(f"{address}/", wait_until="networkidle")
            if name == "phone":
                tab.click("label[for=__search].md-header__button")
            tab.click("input.md-search__input")
            tab.keyboard.type("bias_correct", delay=50)  # a search listens to keys
            try:
                tab.wait_for_selector(".md-search-result__item", timeout=20_000)
            except Error:
                faults.append(f"search ({name}): nothing found for bias_correct")
            tab.screenshot(path=args.out / f"search-{name}.png")
        faults += run_copies(browser, address)
        browser.close()
    print("\n".join(faults) or f"{len(pages)} pages without a fault; pictures in {args.out}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
