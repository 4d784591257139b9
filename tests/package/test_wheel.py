# SPDX-License-Identifier: Apache-2.0
"""What `make wheel` built, installed where there is nothing else (`make test-wheel`)."""

import json
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGE = {
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "adamfn").rglob("*")
    if path.is_file() and path.suffix not in (".pyc", ".so", ".cc", ".h")
}
VERSION = re.search(r'__version__ = "(.*)"', (ROOT / "adamfn" / "__init__.py").read_text())[1]
LIBRARY = "adamfn/backends/cpu/adamfn_native.so"
STEPS = """
import json, sys
from importlib.metadata import distributions
import jax, jax.numpy as jnp
import adamfn

tx = adamfn.adamw(0.1, weight_decay=0.5)
params = {"w": jnp.array([[1.0, -2.0]]), "b": jnp.array(3.0)}
grads = {"w": jnp.array([[5.0, 0.0]]), "b": jnp.array(-7.0)}
state = tx.init(params)
updates, _ = tx.update(grads, state, params)
eager = adamfn.apply_updates(params, updates)
jitted, _ = jax.jit(lambda p, s: adamfn.step(tx, grads, s, p))(params, state)
chain = adamfn.chain(adamfn.scale_by_moments(moments="8bit"), adamfn.scale_by_lr(0.1))
large = jnp.ones((64, 256))
lean = chain.update(large, chain.init(large))[1][0].mu.dtype.name
print(json.dumps({
    "file": adamfn.__file__,
    "version": adamfn.__version__,
    "eager": jax.tree.map(lambda x: x.tolist(), eager),
    "jitted": jax.tree.map(lambda x: x.tolist(), jitted),
    "lean": lean,
    "backend": adamfn.backend("cpu").name,
    "installed": sorted(d.metadata["Name"].lower() for d in distributions()),
    "imported": sorted({name.partition(".")[0] for name in sys.modules}),
}))
"""


def built(pattern):
    found = sorted((ROOT / "dist").glob(pattern))
    assert len(found) == 1, f"found {found}; run make wheel"
    return found[0]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What a process of an environment with the wheel alone says."""
    folder = tmp_path_factory.mktemp("empty")
    python = folder / "environment" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(python.parent.parent)], check=True)
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    subprocess.run([*pip, str(built("*.whl"))], check=True)
    # -I: neither the checkout nor PYTHONPATH is searched for adamfn.
    command = [str(python), "-I", "-W", "error", "-c", STEPS]
    ran = subprocess.run(command, check=True, cwd=folder, stdout=subprocess.PIPE, text=True)
    return folder, json.loads(ran.stdout)


def test_the_wheel_has_the_package_and_nothing_else():
    names = set(zipfile.ZipFile(built("*.whl")).namelist())
    assert {name for name in names if ".dist-info/" not in name} == PACKAGE | {LIBRARY}
    assert "adamfn/py.typed" in names


def test_the_wheel_is_for_this_platform_and_every_python():
    _, _, python, abi, platform = built("*.whl").stem.split("-")
    assert (python, abi) == ("py3", "none")
    assert platform != "any"


def test_an_index_shows_the_readme_with_links_to_the_repository():
    wheel = zipfile.ZipFile(built("*.whl"))
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    shown = wheel.read(name).decode()
    assert "## The chain and its formulas" in shown
    links = re.findall(r"\]\(([^)]*)\)", shown)
    assert links
    assert all(link.startswith("https://") for link in links)
    assert f"/v{VERSION}/docs/why.png)" in shown
    assert "pip install adamfn\n" in shown


def test_the_sdist_has_what_tests_and_documentation_need():
    with tarfile.open(built("*.tar.gz")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= PACKAGE
    assert {"pyproject.toml", "README.md", "LICENSE", "Makefile", "CHANGELOG.md"} <= names
    assert {"docs/stages.md", "examples/digits.py", "tests/test_stage.py"} <= names
    assert {"mkdocs.yml", "website/hooks.py", "conftest.py", ".ci/run"} <= names
    assert {"cmake/CMakeLists.txt", "adamfn/backends/cpu/handler.cc"} <= names
    assert LIBRARY not in names


def test_the_wheel_brings_jax_and_chex_alone(found):
    folder, said = found
    assert Path(said["file"]).is_relative_to(folder)
    assert {"adamfn", "jax", "jaxlib", "chex"} <= set(said["installed"])
    present = {*said["installed"], *said["imported"]}
    assert not {"optax", "flax", "torch", "orbax-checkpoint"} & present


@pytest.mark.parametrize("way", ["eager", "jitted"])
def test_it_takes_a_step(found, way):
    # 0.1 against the gradient's sign, as at any first step, and 0.1 * 0.5 of the parameter.
    w, b = found[1][way]["w"], found[1][way]["b"]
    assert w[0] == pytest.approx([1.0 - 0.1 - 0.05, -2.0 + 0.1], rel=1e-6)
    assert b == pytest.approx(3.0 + 0.1 - 0.15, rel=1e-6)


def test_its_native_code_runs_and_its_formats_work(found):
    assert found[1]["backend"] == "native"
    assert found[1]["lean"] == "int8"
