# SPDX-License-Identifier: Apache-2.0
"""Two processes on one machine: they train as one, and none outlives the other in silence."""

import functools
import multiprocessing
import os
import signal
import socket
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import AxisType

import adamfn
from adamfn.sharding import state_shardings

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["adamfn", "orbax.checkpoint"])
STEPS, EVERY, KILLED_AT, EXAMPLES, LIMIT = 12, 4, 10, 8, 120
PARAMS = {"kernel": np.full((64, 256), 0.5, np.float32), "bias": np.zeros(256, np.float32)}
TX = adamfn.adamw(1e-2, moments="8bit")


def batch_of(step):
    """Whole numbers: their sums are exact, in whatever order two processes add them."""
    random = np.random.default_rng(step)
    return [random.integers(-3, 4, (EXAMPLES, n)).astype(np.float32) for n in (64, 256)]


def loss_of(params, x, y):
    return jnp.mean(jnp.sum((x @ params["kernel"] + params["bias"]) * y, -1))


def train_step(params, state, x, y):
    updates, state = TX.update(jax.grad(loss_of)(params, x, y), state, params)
    return adamfn.apply_updates(params, updates), state


def train(rank, port, folder, killed_at, log):
    """One of the two processes."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"127.0.0.1:{port}", 2, rank, initialization_timeout=60, heartbeat_timeout_seconds=10
    )
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    everywhere, split = (jax.NamedSharding(mesh, spec) for spec in (jax.P(), jax.P("data")))
    shardings = {
        "params": jax.tree.map(lambda _: everywhere, PARAMS),
        "state": state_shardings(TX, PARAMS, everywhere, zero_axis="data"),
    }
    where = tuple(shardings.values())
    step = jax.jit(train_step, in_shardings=(*where, split, split), out_shardings=where)

    def start():
        return {"params": jax.tree.map(jnp.asarray, PARAMS), "state": TX.init(PARAMS)}

    options = ocp.CheckpointManagerOptions(save_interval_steps=EVERY)
    with ocp.CheckpointManager(folder, options=options) as manager:
        begin = manager.latest_step() or 0
        if begin:
            like = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                jax.eval_shape(start),
                shardings,
            )
            run = manager.restore(begin, args=ocp.args.StandardRestore(like))
        else:
            run = jax.jit(start, out_shardings=shardings)()
        codes = run["state"][0].mu["kernel"]
        assert [shard.data.shape for shard in codes.addressable_shards] == [(32, 256)]
        for number in range(begin, STEPS):
            if number == killed_at and rank == 1:
                manager.wait_until_finished()
                os.kill(os.getpid(), signal.SIGKILL)
            batch = [
                jax.make_array_from_callback(
                    x.shape, split, functools.partial(np.asarray(x).__getitem__)
                )
                for x in batch_of(number)
            ]
            run = dict(zip(run, step(run["params"], run["state"], *batch), strict=True))
            manager.save(number + 1, args=ocp.args.StandardSave(run))
    if rank == 0:
        np.savez(f"{folder}/end.npz", begin=begin, **jax.device_get(run["params"]))
    # A child of multiprocessing runs no exit handlers: without this, the process that coordinates
    # may be gone while the other still asks it, which then dies.
    jax.distributed.shutdown()


def both(folder, killed_at=None):
    """Runs both processes to their ends; their exit codes and what they wrote to stderr."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs = [folder.parent / f"{folder.name}-{rank}-{killed_at}.txt" for rank in (0, 1)]
    processes = [
        FORKS.Process(target=train, args=(rank, port, str(folder), killed_at, str(logs[rank])))
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(LIMIT)
        return [process.exitcode for process in processes], [log.read_text() for log in logs]
    finally:
        for process in processes:
            process.kill()
            process.join()


def test_two_processes_train_as_one(tmp_path):
    codes, logs = both(tmp_path / "run")
    assert codes == [0, 0], "\n".join(logs)
    params, state, step = PARAMS, TX.init(PARAMS), jax.jit(train_step)
    for number in range(STEPS):
        params, state = step(params, state, *batch_of(number))
    with np.load(tmp_path / "run" / "end.npz") as end:
        for name in PARAMS:
            np.testing.assert_allclose(end[name], params[name], rtol=0, atol=1e-6)


def test_one_is_killed_and_both_are_started_again(tmp_path):
    folder = tmp_path / "run"
    codes, logs = both(folder, KILLED_AT)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (None, 0), "the other hangs, or thinks that all is well"
    assert "rror" in logs[0]
    assert not (folder / "end.npz").exists()
    codes, logs = both(folder)
    assert codes == [0, 0], "\n".join(logs)
    params, state, step = PARAMS, TX.init(PARAMS), jax.jit(train_step)
    for number in range(STEPS):
        params, state = step(params, state, *batch_of(number))
    with np.load(folder / "end.npz") as end:
        assert end["begin"] == KILLED_AT // EVERY * EVERY
        for name in PARAMS:
            np.testing.assert_allclose(end[name], params[name], rtol=0, atol=1e-6)
