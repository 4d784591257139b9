"""Every example runs, and shows what it says."""

import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("steps", ["1", "3"])
def test_digits_runs_with_few_steps(steps, tmp_path):
    example("digits")["main"](["--steps", steps, "--out", str(tmp_path / "new" / "folder")])
    assert (tmp_path / "new" / "folder" / "digits.png").exists()


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
    monkeypatch.syspath_prepend(EXAMPLES)
    with pytest.raises(SystemExit):
        example("see_inside")["main"](["--figure", "nope", "--out", str(tmp_path)])
    assert "--figure is nope, which nothing here has" in capsys.readouterr().err


def test_digits_has_help(capsys):
    with pytest.raises(SystemExit) as exit_:
        example("digits")["main"](["--help"])
    assert exit_.value.code == 0
    assert "--steps" in capsys.readouterr().out


@pytest.mark.parametrize("seconds", [1.0, 4.0])
def test_digits_can_be_interrupted(seconds, tmp_path):
    command = [sys.executable, str(EXAMPLES / "digits.py"), "--steps", "100000"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    time.sleep(seconds)  # during the imports, the compilation or the training
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert b"Traceback" not in printed, printed.decode()
    assert b"Interrupted." in printed
    assert process.returncode == 130


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
    main = example("see_inside")["main"]
    worst, *_ = main([*options.split(), "--steps", "1", "--out", str(tmp_path)])
    assert worst.word == word
    assert worst.layer.endswith(layer)
    assert (tmp_path / "see_inside.png").read_bytes().startswith(b"\x89PNG")
    assert word in capsys.readouterr().out


def test_sharded_training_shows_where_a_moment_lies():
    command = [sys.executable, str(EXAMPLES / "sharded_training.py"), "--steps", "4"]
    run = subprocess.run(
        [*command, "--moments", "8bit"], check=False, capture_output=True, text=True, timeout=200
    )
    assert run.returncode == 0, run.stderr
    for word in ("4/4", "CPU 0", "CPU 7", "int8[128, 512]", "1,262,600 bytes", "163,016 bytes"):
        assert word in run.stdout, run.stdout


def assert_same_weights(found, expected, rate):
    import jax
    import numpy as np

    import adamfn

    wholes = [adamfn.whole_weights(*own) for own in (found, expected)]
    for a, b in zip(*map(jax.tree.leaves, wholes), strict=True):
        # Two programs of one arithmetic: a gradient is summed in another order here and there.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-2 * rate)


def test_step_in_backward_is_the_ordinary_step_without_its_gradients(monkeypatch):
    import jax

    monkeypatch.syspath_prepend(EXAMPLES)
    found = example("step_in_backward")
    tx = found["optimizer"](lean=False)
    params = found["init"](jax.random.key(0), 32, "float32")
    plain, in_backward = found["compiled"](tx, params)
    grads = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    temporary = [step.memory_analysis().temp_size_in_bytes for step in (plain, in_backward)]
    # One layer's gradients, and its slices of weights and moments, are 4 of 32.
    assert temporary[0] - temporary[1] > 0.8 * grads
    windows = jax.random.randint(jax.random.key(1), (found["BATCH"], 65), 0, 128)
    other = jax.tree.map(lambda leaf: leaf + 0, params)  # they are donated
    state = found["init_by_layers"](tx, params)
    expected = plain(other, tx.init(other), windows)
    moved = in_backward(params, state, windows)
    assert float(moved[2]) == pytest.approx(float(expected[2]), rel=1e-6)
    assert_same_weights(moved[:2], expected[:2], found["RATE"])


def test_step_in_backward_with_rounding_is_each_layers_own_step(monkeypatch):
    import jax
    import jax.numpy as jnp

    import adamfn

    monkeypatch.syspath_prepend(EXAMPLES)
    found, layers = example("step_in_backward"), 2
    tx = found["optimizer"](lean=True)
    params = found["init"](jax.random.key(0), layers, "bfloat16")
    state = jax.jit(lambda params: found["init_by_layers"](tx, params))(params)
    windows = jax.random.randint(jax.random.key(1), (2, 9), 0, 128)

    @jax.jit
    def layer_by_layer(params, state):
        """All gradients first. Each layer has a state of its own, and so the noise of its own."""
        grads = jax.grad(found["ordinary_loss"])(params, windows)
        ends = adamfn.step(tx, *(tree["ends"] for tree in (grads, state, params)))
        rows = [
            adamfn.step(tx, *found["at"](number, [t["blocks"] for t in (grads, state, params)]))
            for number in range(layers)
        ]
        blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
        return tuple({"ends": a, "blocks": b} for a, b in zip(ends, blocks, strict=True))

    expected, in_backward = (params, state), jax.jit(found["in_backward"](tx))
    for _ in range(3):
        expected = layer_by_layer(*expected)
        params, state, _ = in_backward(params, state, windows)
    assert jax.tree.structure(state) == jax.tree.structure(expected[1])
    assert_same_weights((params, state), expected, found["RATE"])


@pytest.mark.parametrize("name", ["resume", "sharded_training", "see_inside"])
def test_they_can_be_interrupted(name, tmp_path):
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--steps", "100000"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path
    )
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert b"Traceback" not in printed, printed.decode()
    assert b"Interrupted." in printed
    assert process.returncode == 130


def test_cost_on_accelerators_shows_every_format_and_draws(tmp_path, capsys):
    found = example("cost_on_accelerators")["main"](
        f"--model resnet-50 --topology cpu --mesh data=1 --zero-axis data --out {tmp_path}"
        " --moments float32 bfloat16".split()
    )
    parameters = 25557032
    assert found["float32"].state == 8 * parameters + 8  # and count and rate
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
        (["--topology", "cpu", "--mesh", "data=1", "--zero-axis", "fsdp"], ["'fsdp'", "'data'"]),
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
            ["['kernel']", "expected a NamedSharding there or above it"],
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
