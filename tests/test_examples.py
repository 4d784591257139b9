# SPDX-License-Identifier: Apache-2.0
"""Every example runs, and shows what it says."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

QUICK = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # of processes that tests start
EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOK = (
    "0.809774 0.721449 0.638959 0.562460 0.491979 0.428558 0.372196 0.320848 0.274360 0.232563"
)


def example(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_seed_regression_reproduces_the_notebook(capsys):
    example("seed_regression")["main"]([])
    printed = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert len(printed) == 10
    for found, expected in zip(printed, NOTEBOOK.split(), strict=True):
        # One unit of the last printed digit, in exact arithmetic.
        assert abs(int(found.replace(".", "")) - int(expected.replace(".", ""))) <= 1


@pytest.mark.parametrize(
    "name", ["flax_nnx", "flax_linen", "equinox_mlp", "clip_and_schedule", "per_group_rates"]
)
def test_the_loss_falls(name):
    losses = example(name)["main"](["--steps", "40"])
    assert len(losses) == 40
    assert losses[-1] < 0.95 * losses[0]


def test_digits_learns_like_optax_and_draws(tmp_path, capsys):
    runs = example("digits")["main"](["--steps", "60", "--out", str(tmp_path)])
    assert runs["adamfn.adamw"].accuracies[-1] > 0.8  # a guess is right one time in ten
    # Two roundings of one trajectory, which training pulls apart: by 1.5e-5 in ten steps, by 1e-2
    # in sixty, as the steps of weights with hardly a gradient are little but its sign.
    ours, theirs = (runs[name].losses[:10] for name in ("adamfn.adamw", "optax.adamw"))
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for word in ("adamfn.adamw", "optax.adamw", "accuracy", "digits.png"):
        assert word in printed


def test_digits_reads_the_rate_from_the_state():
    import jax.numpy as jnp

    import adamfn

    tx = adamfn.adamw(lambda count: 0.5 / (1 + count))
    params = jnp.ones(3)
    _, state = tx.update(params, tx.init(params), params)
    _, state = tx.update(params, state, params)
    assert example("digits")["rate_in"](state, None) == 0.25


def test_digits_runs_with_one_step(tmp_path):
    example("digits")["main"](["--steps", "1", "--out", str(tmp_path / "a" / "folder")])
    assert (tmp_path / "a" / "folder" / "digits.png").exists()


@pytest.mark.parametrize("argument", ["0", "-3", "many"])
def test_digits_refuses_a_senseless_number_of_steps(argument, capsys):
    with pytest.raises(SystemExit) as exit_:
        example("digits")["main"]([f"--steps={argument}"])
    assert exit_.value.code == 2
    assert "not a positive whole number" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        "seed_regression",
        "flax_nnx",
        "flax_linen",
        "equinox_mlp",
        "clip_and_schedule",
        "per_group_rates",
        "step_in_backward",
        "see_inside",
    ],
)
def test_no_steps_are_refused(name, capsys, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    with pytest.raises(SystemExit):
        example(name)["main"](["--steps", "0"])
    assert "at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["digits", "see_inside"])
def test_a_folder_that_cannot_be_made_is_named_before_the_training(
    name, tmp_path, capsys, monkeypatch
):
    monkeypatch.syspath_prepend(EXAMPLES)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        example(name)["main"](["--out", str(tmp_path / "file" / "folder")])
    assert "--out: [Errno 20] Not a directory" in capsys.readouterr().err


def test_a_figure_that_is_none_is_refused_at_the_first_look(tmp_path, capsys, monkeypatch):
    import jax.numpy as jnp

    import adamfn

    def looks(fault, steps):
        tx, params = adamfn.adam(), {"w": jnp.ones(2)}
        yield 0.0, adamfn.monitor.observe(tx, params, tx.init(params), params)
        raise AssertionError("it went on to train")

    monkeypatch.syspath_prepend(EXAMPLES)
    main = example("see_inside")["main"]
    monkeypatch.setitem(main.__globals__, "plain", looks)
    with pytest.raises(SystemExit):
        main(["--figure", "nope", "--out", str(tmp_path)])
    assert "--figure is nope, which nothing here has" in capsys.readouterr().err


def test_digits_has_help(capsys):
    with pytest.raises(SystemExit) as exit_:
        example("digits")["main"](["--help"])
    assert exit_.value.code == 0
    assert "--steps" in capsys.readouterr().out


INTERRUPTED = """
import runpy, signal, sys

moment, *sys.argv = sys.argv[1:]

def interrupt(*arguments, **named):
    signal.raise_signal(signal.SIGINT)

class AtImport:
    @staticmethod
    def find_spec(name, path, target=None):
        if name == "jax":
            interrupt()

if moment == "import":
    sys.meta_path.insert(0, AtImport)
elif moment == "compile":
    from jax import monitoring
    monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **named: "backend_compile" in event and interrupt()
    )
else:
    from rich.progress import Progress
    Progress.advance = interrupt
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("name", "moment"),
    [
        ("digits", "first step"),
        ("resume", "compile"),
        ("sharded_training", "compile"),
        ("see_inside", "compile"),
        ("char_lm", "import"),
        ("cost_on_accelerators", "import"),
    ],
)
def test_they_can_be_interrupted(name, moment, tmp_path):
    command = [sys.executable, "-c", INTERRUPTED, moment, EXAMPLES / f"{name}.py"]
    paths = [str(EXAMPLES), *sys.path]  # Python adds the script's folder
    own = {"PYTHONPATH": os.pathsep.join(paths), **QUICK}
    run = subprocess.run(
        [*command, "--steps", "2"],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=tmp_path,
        env=os.environ | own,
    )
    assert b"Traceback" not in run.stdout, run.stdout.decode()
    assert b"Interrupted." in run.stdout
    assert run.returncode == 130


def test_torch_to_jax_continues_torchs_curve(tmp_path, capsys):
    theirs, ours = example("torch_to_jax")["main"](["--out", str(tmp_path)])
    assert len(theirs) == 300
    assert len(ours) == 150
    # Two roundings of one run, which training pulls apart: 1e-6 for fifty steps, 5e-4 at the end.
    assert ours[:50] == pytest.approx(theirs[150:200].tolist(), rel=1e-5)
    assert ours == pytest.approx(theirs[150:].tolist(), rel=5e-3)
    assert (tmp_path / "torch_to_jax.png").read_bytes().startswith(b"\x89PNG")
    assert "taken over" in capsys.readouterr().out


def test_char_lm_trains_with_lean_moments_and_writes(capsys):
    main = example("char_lm")["main"]
    main.__globals__["VALIDATION_WINDOWS"] = 64
    run = main(["--steps", "20", "--chars", "20", "--moments", "8bit"])  # one call of the loop
    assert run.losses[-1] < 0.75 * run.losses[0]
    assert run.validation_loss < 4.0  # a guess costs log 128 = 4.9
    printed = capsys.readouterr().out
    for word in ("2.08 bytes for each", "Validation loss", "def read_lines"):
        assert word in printed


def test_char_lm_takes_bfloat16_weights():
    import jax
    import jax.numpy as jnp

    found = example("char_lm")
    params = jax.eval_shape(lambda: found["init"](jax.random.key(0)))
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16), params)
    windows = jax.ShapeDtypeStruct((1, 9), jnp.int32)
    loss, grads = jax.eval_shape(jax.value_and_grad(found["loss_of"]), params, windows)
    assert loss.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("options", "layer", "word"),
    [("--fault nan", "blocks/1/up", "not finite"), ("--fault exploding --nnx", "up", "exploding")],
)
def test_see_inside_finds_the_fault(options, layer, word, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    import char_lm

    monkeypatch.setattr(char_lm.init, "__defaults__", (2,))  # layers, of which one is at fault
    main = example("see_inside")["main"]
    worst, *_ = main([*options.split(), "--steps", "1", "--out", str(tmp_path)])
    assert worst.word == word
    assert worst.layer.endswith(layer)
    assert (tmp_path / "see_inside.png").read_bytes().startswith(b"\x89PNG")
    assert word in capsys.readouterr().out


def test_sharded_training_shows_where_a_moment_lies():
    command = [sys.executable, str(EXAMPLES / "sharded_training.py"), "--steps", "4"]
    run = subprocess.run(
        [*command, "--moments", "8bit"],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | QUICK,
    )
    assert run.returncode == 0, run.stderr
    for word in ("4/4", "CPU 0", "CPU 7", "int8[128, 512]", "1,262,604 bytes", "163,020 bytes"):
        assert word in run.stdout, run.stdout


def test_cost_on_accelerators_shows_every_format_and_draws(tmp_path, capsys):
    found = example("cost_on_accelerators")["main"](
        f"--model resnet-50 --topology cpu --mesh data=1 --zero-axis data --out {tmp_path}"
        " --moments float32 bfloat16".split()
    )
    parameters = 25557032
    assert found["float32"].state == 8 * parameters + 12  # and count and two rates
    assert found["bfloat16"].state < 0.51 * found["float32"].state
    assert (tmp_path / "cost_on_accelerators.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for word in ("25,557,032 parameters", "float32", "bfloat16", "collectives", "nothing ran"):
        assert word in printed


FLAX_MODEL = """
import jax
from flax import nnx

def shapes():
    return jax.eval_shape(lambda: nnx.as_pure(nnx.state(nnx.Linear(512, 256, rngs=nnx.Rngs(0)))))

def split(axis="data"):
    return shapes(), {"kernel": jax.P(None, axis), "bias": jax.P()}

def wrongly_split():
    return split("model")

def another_tree():
    return shapes(), {"weights": jax.P(), "bias": jax.P()}
"""


@pytest.fixture
def flax_model(tmp_path, monkeypatch):
    name = f"model_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(FLAX_MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


@pytest.mark.parametrize("function", ["shapes", "split"])
def test_cost_on_accelerators_takes_a_flax_model(flax_model, function, tmp_path):
    found = example("cost_on_accelerators")["main"](
        f"--model {flax_model}:{function} --topology cpu --mesh data=1 --moments float32"
        f" --by update --dtype bfloat16 --out {tmp_path}".split()
    )
    assert found["float32"].arguments >= (2 + 2 + 8) * (512 * 256 + 256)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--topology", "v9"], ["'v9' is unknown", "v5e:16x16"]),
        (["--topology", "v5e"], ["libtpu", 'pip install "jax[tpu]"']),
        (["--topology", "cpu", "--mesh", "data=3"], ["data=3", "chips is 1;"]),
        (["--topology", "cpu", "--mesh", "data=1", "--zero-axis", "fsdp"], ["'fsdp'", "data=1"]),
        (["--topology", "cpu", "--zero-axis", "data"], ["give --mesh too"]),
        (["--model", "gpt3"], ["'gpt3' is unknown", "module:function"]),
        (["--model", "not_there:shapes"], ["not_there", "the name of a module here"]),
        (["--model", "MODEL:missing"], ["missing", "a function in it"]),
        (
            ["--topology", "cpu", "--mesh", "data=1", "--model", "MODEL:wrongly_split"],
            ["'model'", "'data'", "give --mesh that axis"],
        ),
        (
            ["--topology", "cpu", "--mesh", "data=1", "--model", "MODEL:another_tree"],
            ["['kernel']", "expected shardings with the structure of params"],
        ),
    ],
)
def test_cost_on_accelerators_says_what_will_not_do(
    arguments, words, flax_model, capsys, monkeypatch
):
    main = example("cost_on_accelerators")["main"]
    monkeypatch.setattr(main.__globals__["machines"], "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as exit_:
        main([argument.replace("MODEL", flax_model) for argument in arguments])
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for word in words:
        assert word in said
