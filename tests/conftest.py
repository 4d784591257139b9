"""Tests that do not depend on XLA's optimizations are compiled without them.

A file says so by `pytestmark = pytest.mark.unoptimized`, a test by that mark, with the reason.
Compiling is three quarters of these tests' time, and takes a third as long without LLVM's
optimizations and XLA's fusion emitters. Roundings, compiled text, bytes and long loops are tested
in all others, whose programs are compiled as a user's are.
"""

import pytest

UNOPTIMIZED = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
given = []  # JAX's own function, while another stands in its place


def pytest_configure(config):
    config.addinivalue_line("markers", "unoptimized: compiled without optimizations")


def is_unoptimized(item):
    return item is not None and item.get_closest_marker("unoptimized") is not None


def drop_what_is_compiled_and_use(get_compile_options):
    import jax
    from jax._src import compiler  # the options of `jit` reach no operation outside one

    jax.clear_caches()
    given.append(compiler.get_compile_options)
    compiler.get_compile_options = get_compile_options


def unoptimized(*arguments, env_options_overrides=None, **others):
    overrides = UNOPTIMIZED | dict(env_options_overrides or {})
    return given[0](*arguments, env_options_overrides=overrides, **others)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if is_unoptimized(item) and not given:
        drop_what_is_compiled_and_use(unoptimized)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    if given and not is_unoptimized(nextitem):
        drop_what_is_compiled_and_use(given[0])
        given.clear()
