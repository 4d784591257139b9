# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed go on from their last checkpoint, bit for bit.

Children are forked from a server that has imported everything and has not started JAX: a kill
costs a fork and not an import. They kill themselves at a chosen access to their folder's files, so
that the machine's speed changes nothing.
"""

import itertools
import multiprocessing
import os
import random
import runpy
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import adamfn
from adamfn.interop.orbax import check_saved

RESUME = Path(__file__).parent.parent / "examples" / "resume.py"
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["optax", "adamfn", "orbax.checkpoint", "rich.progress", "sklearn.datasets"]
)
STEPS, EVERY = 16, 4
TX = adamfn.adamw(1e-3, moments="8bit")
SHAPES = {"kernel": (64, 128), "bias": (128,)}


FLAGS = "--xla_backend_optimization_level=0"


def exit_code(target, *arguments):
    """Of a forked process, which is waited for."""
    process = FORKS.Process(target=target, args=arguments, daemon=True)
    process.start()
    process.join()
    return process.exitcode


def kill_at(access, folder, finished=0):
    """Kills this process before an access to a file in the folder, by its number from 1.

    Counted from now on, or from when so many checkpoints are finished. A save has 20 to 25.
    """
    accesses = itertools.count(1)
    checkpoints = itertools.count(1)
    begun = finished == 0

    def hook(event, arguments):
        nonlocal begun
        if not event.startswith(("open", "os.")) or not arguments:
            return
        if not str(arguments[0]).startswith(folder):
            return
        if begun and next(accesses) == access:
            os.kill(os.getpid(), signal.SIGKILL)
        if event == "os.rename" and Path(str(arguments[1])).name.isdigit():
            begun = begun or next(checkpoints) == finished

    sys.addaudithook(hook)


def resume(folder, options, access=None):
    os.environ["XLA_FLAGS"] = FLAGS
    if access:
        kill_at(access, folder, finished=1)
    main = runpy.run_path(str(RESUME))["main"]
    main([*options, "--steps", str(STEPS), "--every", str(EVERY), "--out", folder])


def saved_steps(folder):
    """The steps of whole checkpoints, as the names of folders tell."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


@pytest.mark.parametrize(
    ("options", "kills"),
    [
        ("--moments float32", 2),
        ("--moments bfloat16 --bits 16", 1),
        ("--moments 8bit --bits 24", 2),
    ],
)
def test_killed_at_random_points_it_ends_with_the_same_bits(options, kills, tmp_path):
    chance, options = random.Random(options), options.split()
    folders = whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert exit_code(resume, str(whole), options) == 0
    for _ in range(kills):
        begun = (saved_steps(killed) or [0])[-1]
        assert exit_code(resume, str(killed), options, chance.randint(1, 20)) == -signal.SIGKILL
        assert STEPS > saved_steps(killed)[-1] > begun
    assert exit_code(resume, str(killed), options) == 0
    found = []
    for folder in folders:
        assert saved_steps(folder)[-1] == STEPS
        with ocp.CheckpointManager(folder) as manager:
            found.append(manager.restore(STEPS, args=ocp.args.StandardRestore()))
    assert jax.tree.structure(found[0]) == jax.tree.structure(found[1])
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def content(step):
    """A state in which every number tells the step."""
    shapes = jax.eval_shape(TX.init, {n: jnp.zeros(s) for n, s in SHAPES.items()})
    return jax.tree.map(lambda x: np.full(x.shape, step % 100, x.dtype), shapes)


def check_and_save(folder, access):
    """Checks the last checkpoint, then saves three, and is killed."""
    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=2)) as m:
        check_content(m, last := m.latest_step())
        kill_at(access, folder)
        for step in range(last + 1, last + 4):
            m.save(step, args=ocp.args.StandardSave(jax.device_put(content(step))))


def check_content(manager, step):
    found = manager.restore(step, args=ocp.args.StandardRestore(content(0)))
    for a, b in zip(*map(jax.tree.leaves, (found, content(step))), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_twenty_kills_during_a_save_leave_a_whole_checkpoint(tmp_path):
    unfinished, last = 0, 1
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=ocp.args.StandardSave(content(1)))
    for access in range(1, 41, 2):  # within the first save, and within the second
        assert exit_code(check_and_save, str(tmp_path), access) == -signal.SIGKILL
        unfinished += any("tmp" in path.name for path in tmp_path.iterdir())
        step = saved_steps(tmp_path)[-1]
        assert step >= last
        last = step
    with ocp.CheckpointManager(tmp_path) as manager:
        check_content(manager, last)  # the children have checked those before
    assert last > 5, "of the kills in a second save, the first one was to be whole"
    assert unfinished >= 15, "most kills were to hit a save"


WITH_CLIP = adamfn.chain(adamfn.clip_by_global_norm(1.0), adamfn.adamw(1e-3, moments="8bit"))


@pytest.mark.parametrize(
    ("saved", "asked", "words"),
    [
        ("8bit", "float32", ["0/mu/kernel", "holds int8[64,256]", "expected float32[64,256]"]),
        ("float32", "8bit", ["0/mu/kernel", "holds float32[64,256]", "expected int8[64,256]"]),
        ("float32", "bfloat16", ["0/mu/kernel", "holds float32", "expected bfloat16[64,256]"]),
        (
            "8bit",
            adamfn.formats.EightBit(128),
            ["0/scales/kernel/0/scale", "float32[64,1]", "float32[64,2]"],
        ),
        ("8bit", WITH_CLIP, ["0/grad_norm", "nothing"]),
        ("8bit", adamfn.adam(moments="8bit"), ["2/learning_rate", "nothing"]),
        ("8bit", adamfn.amsgrad(moments="8bit"), ["0/nu_max"]),
    ],
)
def test_another_chain_or_format_says_what_differs(saved, asked, words, tmp_path):
    params = {"kernel": jnp.zeros((64, 256)), "bias": jnp.zeros(256)}
    if not hasattr(asked, "init"):
        asked = adamfn.adamw(moments=asked)
    state, like = (
        {"params": params, "state": tx.init(params)} for tx in (adamfn.adamw(moments=saved), asked)
    )
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
        check_saved(manager.item_metadata(1), state)
        with pytest.raises(ValueError, match="check_saved") as raised:
            check_saved(manager.item_metadata(1), like)
    for word in words:
        assert word in str(raised.value), str(raised.value)


def test_a_manager_that_cannot_read_metadata_is_an_error(tmp_path):
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=ocp.args.StandardSave({"w": jnp.zeros(3)}))
    with (
        ocp.CheckpointManager(tmp_path) as manager,
        pytest.raises(ValueError, match="item_handlers"),
    ):
        check_saved(manager.item_metadata(1), {"w": jnp.zeros(3)})


def test_the_example_refuses_a_checkpoint_of_another_format(tmp_path):
    main = runpy.run_path(str(RESUME))["main"]
    main(["--steps", "2", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"state/0/mu/hidden.*\nOr give another --out"):
        main(["--steps", "4", "--moments", "8bit", "--out", str(tmp_path)])
