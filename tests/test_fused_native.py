"""Native code of the fused step: its building and keeping, its numbers, and what it refuses."""

import os
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adamfn
from adamfn.formats import EightBit, get
from adamfn.fused import cpu, native
from adamfn.fused.primitive import group_step
from adamfn.fused.reference import Group, step_group

MOMENTS = ("float32", "bfloat16", "8bit")
LIBRARY = "print(__import__('adamfn').fused.native.library_path())"


def python(program, timeout=120, **environment):
    """Runs a program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a compiler that does not optimize."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("ADAMFN_CXXFLAGS", "-O0")
    return tmp_path / "adamfn"


def test_native_code_runs_here():
    # Every other test of this page would pass by XLA alone.
    assert native.load() is None
    assert adamfn.fused.backend("cpu").name == "native"
    assert str(adamfn.fused.backend("cpu")).startswith("native on cpu: built by ")
    with pytest.raises(ValueError, match="platform is 'abacus'; expected one of cpu, gpu"):
        adamfn.fused.backend("abacus")
    text = jax.jit(lambda p, s: adamfn.step(TX, p, s, p)).lower(PARAMS, STATE).as_text()
    assert "adamfn_step" in text


TX = adamfn.fused_adam()
PARAMS = {"w": jnp.ones(3)}
STATE = TX.init(PARAMS)


def test_a_library_is_built_once_and_kept(cache):
    path = native.library_path()
    assert path.parent == cache
    assert cache.stat().st_mode & 0o777 == 0o700
    assert [*cache.iterdir()] == [path]
    built = path.stat().st_mtime_ns
    assert native.library_path() == path
    assert path.stat().st_mtime_ns == built

    content = path.read_bytes()
    for damaged in (content[:-1], content[:5000], b"", content[:100] + b"x" + content[101:]):
        path.write_bytes(damaged)
        assert not native.is_sound(path)
    path.write_bytes(content)
    assert native.is_sound(path)
    path.chmod(0o722)
    assert not native.is_sound(path)
    path.chmod(0o000)
    assert os.getuid() == 0 or not native.is_sound(path)
    path.chmod(0o700)
    link = cache / "link.so"
    link.symlink_to(path)
    assert not native.is_sound(link)
    assert not native.is_sound(cache / "absent.so")

    path.write_bytes(content[:5000])
    assert native.library_path() == path  # built anew in its place
    assert native.is_sound(path)


def test_what_another_user_owns_is_not_loaded(cache, monkeypatch):
    cache.mkdir(mode=0o700)
    (cache / "x.so").write_bytes(b"")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert native.cache_directory() is None
    assert not native.is_sound(cache / "x.so")


def test_a_cache_that_others_can_write_to_is_not_used(cache):
    cache.mkdir()
    cache.chmod(0o777)
    path = native.library_path()
    assert path.parent != cache
    assert [*cache.iterdir()] == []
    shutil.rmtree(path.parent)


def test_a_cache_that_cannot_be(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert native.cache_directory() is None


def test_the_name_changes_with_what_the_library_is_made_of(monkeypatch):
    names = {native._key("g++"), native._key("clang++")}
    monkeypatch.setattr(native, "version", lambda name: "0")
    names.add(native._key("g++"))
    monkeypatch.setattr(native, "_processor", lambda: ("another",))
    names.add(native._key("g++"))
    monkeypatch.setattr(native, "_source", lambda name: b"another")
    names.add(native._key("g++"))
    assert len(names) == 5


def test_two_processes_that_build_at_once_both_win(cache):
    with ThreadPoolExecutor(2) as pool:
        done = [*pool.map(lambda _: python(LIBRARY), range(2))]
    assert done[0].returncode == done[1].returncode == 0, done[0].stderr + done[1].stderr
    assert done[0].stdout == done[1].stdout
    assert native.is_sound(Path(done[0].stdout.strip()))
    assert len([*cache.iterdir()]) == 1


def test_a_compiler_that_fails(cache, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(native.NativeCodeError, match="false could not compile"):
        native.library_path()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(native.NativeCodeError, match=r"no C\+\+ compiler \(no-such-compiler\)"):
        native.library_path()
    assert [*cache.iterdir()] == []


def test_without_a_compiler_there_is_one_warning_and_xla(tmp_path):
    done = python(
        """
        import warnings
        import jax, jax.numpy as jnp, adamfn
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for shape in (3, 4):
                params = jnp.ones(shape)
                for tx in (adamfn.fused_adam(0.5), adamfn.fused_adam(0.5, moments="8bit")):
                    step = jax.jit(lambda p, s: adamfn.step(tx, p, s, p))
                    moved, _ = step(params, tx.init(params))
                    assert jnp.allclose(moved, 0.5), moved
        (warning,) = [w for w in caught if "adamfn" in str(w.message)]
        assert "no C++ compiler" in str(warning.message), warning
        assert "backend='xla'" in str(warning.message)
        found = adamfn.fused.backend()
        assert found.name == "xla" and "no C++ compiler" in found.reason, found
        """,
        PATH="",
        CXX="",
        XDG_CACHE_HOME=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr[-2000:]


def special_leaf(seed, size):
    """Normal numbers, and every kind of other: denormals, zeros, infinities, NaN, the largest."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(size).astype(np.float32) * 10.0 ** rng.integers(-12, 3, size)
    odd = [0.0, -0.0, 1e-42, -1e-40, 1.2e-38, 3e38, np.inf, -np.inf, np.nan, 1e-20, 1e-19]
    x[:: size // 100] = rng.choice(odd, x[:: size // 100].shape)
    return jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_the_same_numbers_as_xla_whatever_they_are(moments, eps):
    params = {"w": special_leaf(0, 64 * 300).reshape(64, 300), "b": special_leaf(1, 1001)}
    found, expected = (
        adamfn.fused_adamw(0.1, eps=eps, moments=moments, backend=backend)
        for backend in ("auto", "xla")
    )
    states = [tx.init(params) for tx in (found, expected)]
    trees = [params, params]
    for seed in (2, 4):
        grads = {"w": special_leaf(seed, 64 * 300).reshape(64, 300), "b": special_leaf(seed, 1001)}
        for i, tx in enumerate((found, expected)):
            step = jax.jit(lambda p, s, g, tx=tx: adamfn.step(tx, g, s, p))
            trees[i], states[i] = step(trees[i], states[i], grads)
    for a, b in zip(
        *(jax.tree.leaves((t, s)) for t, s in zip(trees, states, strict=False)), strict=True
    ):
        a, b = np.asarray(a), np.asarray(b)
        if a.dtype.kind in "iu" or a.dtype.itemsize < 4:
            # Sums that were rounded otherwise may fall on another side of their noise.
            assert np.mean(np.float32(a) != np.float32(b)) < 5e-3
        else:
            # A fused multiply-add cancels otherwise, at most by a rounding of what is subtracted.
            np.testing.assert_allclose(a, b, rtol=5e-6, atol=3e-8)


def test_noise_and_codes_are_those_of_the_format():
    # One step from the same state: what differs is only the rounding of sums.
    rng = np.random.default_rng(0)
    params = {k: jnp.asarray(rng.standard_normal((35, 413)), jnp.float32) for k in "ab"}
    for name in ("8bit", "bfloat16"):
        fused, chain = adamfn.fused_adam(moments=name), adamfn.adam(moments=name)
        like = chain.init(params)
        step = jax.jit(lambda state, tx=fused: adamfn.step(tx, params, state, params)[1])
        update = jax.jit(lambda state, tx=chain: tx.update(params, state)[1])
        state = fused.init(params)
        for count in (0, 1, 2**31 - 2):
            state = state._replace(count=jnp.int32(count))
            expected = update(adamfn.fused.to_chain(state, like, params))
            moved = adamfn.fused.to_chain(step(state), like, params)
            for a, b in zip(*(jax.tree.leaves(s[0][1:]) for s in (moved, expected)), strict=True):
                assert np.mean(np.float32(a) != np.float32(b)) < 1e-4


@pytest.mark.parametrize("block", [16, 64, 1024, 1040])
def test_block_sizes(block):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((6, 2100)), jnp.float32)
    moved = []
    for backend in ("auto", "xla"):
        tx = adamfn.fused_adam(moments=EightBit(block), backend=backend)
        step = jax.jit(lambda s, tx=tx: adamfn.step(tx, x, s, x))
        native_call = "adamfn_step" in step.lower(tx.init(x)).as_text()
        assert native_call == (backend == "auto" and block <= 1024)
        moved.append(step(tx.init(x))[1])
    for a, b in zip(*map(jax.tree.leaves, moved), strict=True):
        if (a.dtype.kind == "i" and a.dtype.itemsize == 1) or a.dtype == jnp.uint8:
            assert np.mean(a != b) < 1e-3  # as above
        else:
            np.testing.assert_allclose(a, b, rtol=1e-5)


def test_results_that_are_not_in_place():
    # XLA gives results their operands' buffers; native code does not rely on it.
    n = 5000
    rng = np.random.default_rng(0)
    g, p, mu = (jnp.asarray(rng.standard_normal(n), jnp.float32) for _ in range(3))
    group = Group(None, False, (True,), jax.tree.structure([(0, 0)]), packed=False)
    vector = jnp.asarray([0.1, 0.001, 1, 1, 1e-8, 0, 1, 1, 0.1, 1e-3], jnp.float32)
    operands = [vector, jnp.int32(3), jnp.zeros(1, jnp.uint32), mu, mu**2, g, p]
    found = jax.ffi.ffi_call("adamfn_step", [mu, mu, p], vmap_method="sequential")(
        *operands,
        format=np.int32(0),
        packed=False,
        nesterov=False,
        blocks=np.array([0], np.int64),
        decays=np.array([1], np.int64),
    )
    expected = step_group(group, *operands)
    in_place = jax.jit(lambda *x: group_step(group, *x))(*operands)
    for a, b, c in zip(found, expected, in_place, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-8)
        np.testing.assert_array_equal(a, c)
    np.testing.assert_array_equal(mu, operands[3])


def wrong_calls():
    f32, ones = jnp.float32, jnp.ones
    good = {
        "operands": [ones(10), jnp.int32(1), jnp.zeros(1, jnp.uint32), *[ones(4)] * 4],
        "format": 0,
        "block": 0,
        "decays": [0],
    }

    def operand(index, value):
        operands = list(good["operands"])
        operands[index] = value
        return {**good, "operands": operands}

    yield "scalars", operand(0, ones(9)), "other scalars"
    yield "count", operand(1, f32(1)), "other scalars"
    yield "numbers", operand(2, jnp.zeros(2, jnp.uint32)), "other scalars"
    yield "mu's size", operand(3, ones(5)), "moments of another dtype or size"
    yield "nu's dtype", operand(4, ones(4, jnp.int32)), "moments of another dtype or size"
    yield "gradient's dtype", operand(5, ones(4, jnp.float16)), "other dtypes or sizes"
    yield "gradient's size", operand(5, ones(3)), "other dtypes or sizes"
    yield "too few", {**good, "operands": good["operands"][:-1]}, "another number of operands"
    yield "two leaves", {**good, "decays": [0, 0]}, "another number of operands"
    yield "no leaf", {**good, "decays": []}, "another number of leaves"
    yield "packed", {**operand(3, ones(5)), "packed": True}, "moments of another dtype or size"
    longer = {**good, "operands": [*good["operands"][:5], ones(5), ones(5)], "packed": True}
    yield "packed too long", longer, "moments of another dtype or size"
    yield "format", {**good, "format": 9}, "an unknown format"
    yield "negative format", {**good, "format": -1}, "an unknown format"
    lean = EightBit().encode(ones((2, 300)), ones((2, 300)), None)
    eight = [*good["operands"][:3], *jax.tree.leaves(lean), ones((2, 300)), ones((2, 300))]
    yield "block", {**good, "operands": eight, "format": 3, "block": 0}, "block of another size"
    yield "wide", {**good, "operands": eight, "format": 3, "block": 4096}, "block of another size"
    yield (
        "scales",
        {**good, "operands": eight, "format": 3, "block": 32},
        "moments of another dtype or size",
    )


@pytest.mark.parametrize(
    ("call", "message"), [pytest.param(*case, id=name) for name, *case in wrong_calls()]
)
def test_a_wrong_call_is_an_error_and_no_crash(call, message):
    operands = call["operands"]
    moments = 5 if call["format"] == 3 else 2
    results = [*operands[3 : 3 + moments], *operands[3 + moments + len(call["decays"]) :]]
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(
            jax.ffi.ffi_call("adamfn_step", results, vmap_method="sequential")(
                *operands,
                format=np.int32(call["format"]),
                packed=call.get("packed", False),
                nesterov=False,
                blocks=np.array([call["block"]] * len(call["decays"]), np.int64),
                decays=np.array(call["decays"], np.int64),
            )
        )


def test_threads_that_call_at_once():
    params = {"w": jnp.ones((400, 300)), "b": jnp.ones(7)}
    tx = adamfn.fused_adam(0.1, moments="8bit")
    step = jax.jit(lambda p, s: adamfn.step(tx, p, s, p))

    def run(_):
        p, state = params, tx.init(params)
        for _ in range(10):
            p, state = step(p, state)
        return jax.block_until_ready((p, state))

    expected = run(0)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(run, range(8)):
            jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_step_is_over_when_it_returns():
    # What reads the parameters next reads the last task's too.
    tx = adamfn.fused_adam(0.25, b1=0.0, b2=0.0, eps=0.0)
    params = jnp.zeros(2**20)
    state = tx.init(params)

    @jax.jit
    def largest(state):
        moved, _ = adamfn.step(tx, jnp.ones_like(params), state, params)
        return jnp.max(moved)

    assert {float(largest(state)) for _ in range(100)} == {-0.25}


def test_a_process_forked_after_use():
    done = python(
        """
        import os, signal, warnings
        import jax, jax.numpy as jnp, numpy as np, adamfn
        warnings.simplefilter("ignore")  # JAX warns of forks
        params, tx = jnp.ones(200_000), adamfn.fused_adam(0.1)
        state = tx.init(params)
        step = jax.jit(lambda p, s: adamfn.step(tx, p, s, p)[0])
        expected = np.asarray(step(params, state))
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            os._exit(int(not np.array_equal(step(params, state), expected)))
        _, status = os.waitpid(child, 0)
        assert status == 0, status
        assert np.array_equal(step(params, state), expected)
        """
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_under_sanitizers(tmp_path):
    """Address and undefined-behaviour sanitizers over leaves of every kind."""
    libraries = [
        subprocess.run(
            [native.find_compiler(), f"-print-file-name={name}"], capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(os.path.isabs(path) for path in libraries):
        pytest.skip("the compiler has no sanitizers' libraries")
    done = python(
        """
        import jax, jax.numpy as jnp, numpy as np, adamfn
        assert adamfn.fused.backend().name == "native"
        odd = jnp.tile(jnp.array([0.0, 1e-42, 3e38, jnp.inf, -jnp.inf, jnp.nan, 1e-19]), 1300)
        params = {
            "blocks": odd[:8450].reshape(65, 130), "vector": jnp.ones(3), "none": jnp.ones((0,)),
            "alone": jnp.ones(40_000), "half": jnp.ones((64, 100), jnp.bfloat16), "scalar": odd[1],
        }
        for moments in ("float32", "bfloat16", "8bit"):
            tx = adamfn.fused_adamw(moments=moments, nesterov=moments != "8bit")
            step = jax.jit(lambda p, s: adamfn.step(tx, p, s, p))
            p, state = step(params, tx.init(params))
            jax.block_until_ready(step(p, state))
        print("sound")
        """,
        LD_PRELOAD=" ".join(libraries),
        ASAN_OPTIONS="detect_leaks=0",  # the interpreter's own
        ADAMFN_CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -O1",
        XDG_CACHE_HOME=str(tmp_path),
    )
    assert done.stdout == "sound\n", done.stderr[-3000:]


def test_formats_it_knows():
    # What is kept in float32 has no format.
    known = {name for name in adamfn.formats.FORMATS if cpu.knows(get(name), jnp.float32)}
    assert known == {"bfloat16", "8bit"}
    assert cpu.knows(None, jnp.float32, jnp.bfloat16)
    assert not cpu.knows(None, jnp.float32, jnp.float16)
