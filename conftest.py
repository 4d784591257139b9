"""What JAX compiles is kept where `make test` says.

Each of its processes has a folder of its own, and those that tests start have none: a file is not
written at once, and tests kill what they start.
"""

import os

PROCESS = os.environ.get("PYTEST_XDIST_WORKER")
FOLDER = os.environ.pop("JAX_COMPILATION_CACHE_DIR", None) if PROCESS else None
if FOLDER:
    import jax

    jax.config.update("jax_compilation_cache_dir", os.path.join(FOLDER, PROCESS))
