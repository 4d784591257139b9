# SPDX-License-Identifier: Apache-2.0
"""Where JAX keeps what it compiles, and how the programs of tests are compiled.

What JAX compiles is kept where `make test` says. Each of its processes has a folder of its own, and
those that tests start have none: a file is not written at once, and tests kill what they start.

The code of Markdown pages is a test for each page (`website/samples.py`).

Compiling is three quarters of all tests' time, and takes half as long without LLVM's optimizations
(a third before JAX 0.12, where fusion emitters can be left out too). So tests and the
documentation's examples are compiled without them. What depends on them is compiled as a user's
programs are: tests of roundings near their bounds, of compiled text, memory and long loops, which
have the mark `optimized`, and those of the folders `BY_OTHER_COMPILERS`.
"""

import os
from functools import cached_property

import pytest

from website import samples

os.environ.setdefault("KERAS_BACKEND", "jax")  # which Keras reads when it is imported
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's threads, which spin beside JAX's
PROCESS = os.environ.get("PYTEST_XDIST_WORKER")
FOLDER = os.environ.pop("JAX_COMPILATION_CACHE_DIR", None) if PROCESS else None
if FOLDER:
    import jax

    jax.config.update("jax_compilation_cache_dir", os.path.join(FOLDER, PROCESS))

BY_OTHER_COMPILERS = ("accelerators", "gpu", "peers")
UNOPTIMIZED = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


class Compiler:
    """JAX's compiler, with its options or with those of `UNOPTIMIZED`."""

    given = None  # the function that another stands for

    @cached_property
    def options(self):
        """Those of `UNOPTIMIZED` that this version of XLA has."""
        import jax

        def accepts(name, value):
            try:
                jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
            except jax.errors.JaxRuntimeError:
                return False
            return True

        return {name: value for name, value in UNOPTIMIZED.items() if accepts(name, value)}

    def switch(self):
        """Changes the options, and drops what was compiled with others."""
        import jax
        from jax._src import compiler  # `jit` takes options, but not an operation outside of one

        options, given = self.options, compiler.get_compile_options
        jax.clear_caches()
        if self.given:
            compiler.get_compile_options, self.given = self.given, None
            return

        def unoptimized(*arguments, env_options_overrides=None, **named):
            overrides = options | dict(env_options_overrides or {})
            return given(*arguments, env_options_overrides=overrides, **named)

        compiler.get_compile_options, self.given = unoptimized, given


COMPILER = Compiler()


class PageItem(pytest.Item):
    """The code of a page."""

    def runtest(self):
        """Runs it."""
        samples.run(self.path)


class PageFile(pytest.File):
    """A page, which is one test if it has code."""

    def collect(self):
        """Yields the test."""
        if samples.BLOCK.search(self.path.read_text()):
            yield PageItem.from_parent(self, name="code")


def _depends_on_optimizations(item):
    if item is None or item.path.parent.name in BY_OTHER_COMPILERS:
        return True
    return item.get_closest_marker("optimized") is not None


def pytest_configure(config):
    """Tells pytest the mark."""
    config.addinivalue_line("markers", "optimized: compiled with XLA's optimizations")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before the test's fixtures."""
    if not COMPILER.given and not _depends_on_optimizations(item):
        COMPILER.switch()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """After the test's fixtures."""
    if COMPILER.given and _depends_on_optimizations(nextitem):
        COMPILER.switch()


def pytest_collect_file(file_path, parent):
    """Collects pages."""
    return PageFile.from_parent(parent, path=file_path) if file_path.suffix == ".md" else None
