"""A file whose tests do not depend on XLA's optimizations is compiled without them.

Such a file says `pytestmark = pytest.mark.unoptimized`, and why it may. Compiling is three
quarters of its time, and takes a third as long without LLVM's optimizations and XLA's fusion
emitters. Roundings, compiled text, bytes and long loops are tested in all other files, where
programs are compiled as a user's are.
"""

import pytest

UNOPTIMIZED = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


def pytest_configure(config):
    config.addinivalue_line("markers", "unoptimized: compiled without optimizations")


@pytest.fixture(autouse=True, scope="module")
def _compiler_options(request):
    """Those of this file. What was compiled with others is dropped before and after it."""
    if request.node.get_closest_marker("unoptimized") is None:
        yield
        return
    import jax
    from jax._src import compiler  # the options of `jit` reach no operation outside one

    given = compiler.get_compile_options

    def unoptimized(*arguments, env_options_overrides=None, **others):
        overrides = UNOPTIMIZED | dict(env_options_overrides or {})
        return given(*arguments, env_options_overrides=overrides, **others)

    jax.clear_caches()
    compiler.get_compile_options = unoptimized
    yield
    compiler.get_compile_options = given
    jax.clear_caches()
