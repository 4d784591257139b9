"""A file whose tests do not depend on what XLA optimizes is compiled without it.

Such a file says `pytestmark = pytest.mark.unoptimized`, and why it may. Compiling is three quarters of
its time, and takes a third of it without LLVM's optimizations and XLA's fusion emitters. Roundings,
compiled text, bytes and long loops are tested as a user's programs are compiled: in all other files.
"""

import pytest

UNOPTIMIZED = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


def pytest_configure(config):
    config.addinivalue_line("markers", "unoptimized: its programs are compiled without optimizations")


@pytest.fixture(autouse=True, scope="module")
def _compiler_options(request):
    """Those of this file. What was compiled with others is dropped before and after it."""
    if request.node.get_closest_marker("unoptimized") is None:
        yield
        return
    import jax
    from jax._src import compiler  # `jit` takes options too, but not for the calls that a test makes

    given = compiler.get_compile_options

    def unoptimized(*arguments, env_options_overrides=None, **others):
        overrides = UNOPTIMIZED | dict(env_options_overrides or {})
        return given(*arguments, env_options_overrides=overrides, **others)

    jax.clear_caches()
    compiler.get_compile_options = unoptimized
    yield
    compiler.get_compile_options = given
    jax.clear_caches()
