# SPDX-License-Identifier: Apache-2.0
"""Eight devices on the CPU, for the tests of this folder: `pytest tests/eight_devices`.

`make test` runs them after the others, which are to have one: the number of devices is fixed when
JAX begins.
"""

import os

FLAG = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}"
os.environ["JAX_PLATFORMS"] = "cpu"  # of processes that tests start

import jax  # noqa: E402

jax.config.update("jax_platforms", "cpu")
if len(jax.devices()) != 8:
    raise RuntimeError("JAX has begun without eight devices: run tests/eight_devices alone.")
