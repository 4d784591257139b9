"""The native code's library: its building, keeping and loading, and what may go wrong with each."""

import ctypes
import os
import pwd
import select
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import pytest

from adamfn.backends.native import build, cache, loader

COPIES = """#!/bin/sh
while [ "$1" != -o ]; do shift; done
cp {library} "$2"
"""


def python(program, *arguments, **environment):
    """Runs a program in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A library that the system's compiler built, without optimizing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAMFN_CXXFLAGS", "-O0")
        return build.build(build.find_compiler(), tmp_path_factory.mktemp("built"))


@pytest.fixture
def compiler(library, tmp_path, monkeypatch):
    """A compiler that copies that library; a cache and a place for files that are empty."""
    stub = tmp_path / "compiler"
    stub.write_text(COPIES.format(library=library))
    stub.chmod(0o755)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("CXX", str(stub))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return stub


@pytest.fixture
def anew(compiler, monkeypatch):
    """Forgets what this process has loaded, and tells XLA of nothing more."""
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *_, **__: None)

    def forget():
        monkeypatch.setattr(loader, "_native", None)
        monkeypatch.setitem(jax.ffi.__dict__, "adamfn_step", None)

    forget()
    return forget


def replace(path, content):
    """Writes a file anew: to write into a library that is loaded would end this process."""
    path.unlink()
    path.write_bytes(content)
    path.chmod(0o600)


def load_in_vain(match):
    """Loads twice: one warning, then silence."""
    with pytest.warns(UserWarning, match=match) as caught:
        found = loader.load()
    assert len(caught) == 1
    assert found[:2] == (None, None)
    assert loader.load() is found
    assert [*Path(tempfile.gettempdir()).iterdir()] == []


def test_a_library_is_built_once_and_serves_where_there_is_no_compiler(anew, compiler, monkeypatch):
    opened, cdll = [], ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda path: opened.append(path) or cdll(path))
    native = loader.load()
    assert native == (cache.directory() / cache.name(), str(compiler), None)
    assert opened == [str(native.path)]
    assert [*native.path.parent.iterdir()] == [native.path]
    assert [*Path(tempfile.gettempdir()).iterdir()] == []
    for no_compiler in ("no-such-compiler", "'", "false"):
        monkeypatch.setenv("CXX", no_compiler)
        assert loader.load() == native
        anew()
        assert loader.load() == native


def test_a_damaged_library_is_built_anew(anew):
    path = loader.load().path
    content = path.read_bytes()
    for damaged in (content[:-1], content[:5000], b"", content[:100] + b"x" + content[101:]):
        replace(path, damaged)
        assert cache.compiler_of(path) is None
    anew()
    assert loader.load().path == path
    assert path.read_bytes() == content


def test_what_is_no_file_of_ours_alone_is_not_sound(anew):
    path = loader.load().path
    path.chmod(0o722)
    assert cache.compiler_of(path) is None
    path.chmod(0o000)
    assert os.getuid() == 0 or cache.compiler_of(path) is None
    path.chmod(0o755)
    assert cache.compiler_of(path)
    (path.parent / "link.so").symlink_to(path)
    assert cache.compiler_of(path.parent / "link.so") is None
    assert cache.compiler_of(path.parent / "absent.so") is None
    assert cache.compiler_of(path.parent) is None


@pytest.mark.parametrize(("owner", "trusted"), [(1000, True), (0, True), (1001, False)])
def test_the_user_and_root_are_trusted(anew, monkeypatch, owner, trusted):
    path = loader.load().path
    lstat = Path.lstat
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    monkeypatch.setattr(
        Path, "lstat", lambda p: os.stat_result((*lstat(p)[:4], owner, *lstat(p)[5:]))
    )
    assert (cache.compiler_of(path) is not None) == trusted
    monkeypatch.setattr(cache, "compiler_of", lambda path: "c++")
    assert (cache.find(path.name) is not None) == trusted  # the directory, too
    assert (cache.keep(path, path.name, "c++") is not None) == trusted


def test_a_cache_that_others_can_write_to_is_not_used(anew, compiler):
    path = loader.load().path
    path.parent.chmod(0o777)
    assert cache.find(path.name) is None
    path.unlink()
    anew()
    assert loader.load() == (None, str(compiler), None)
    assert [*path.parent.iterdir()] == []
    assert [*Path(tempfile.gettempdir()).iterdir()] == []


def test_a_cache_that_cannot_be_written_to(anew, compiler, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError

    path = loader.load().path
    monkeypatch.setattr(os, "utime", refuse)  # root may write anywhere
    path.parent.chmod(0o500)
    anew()
    assert loader.load().path == path
    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setenv("ADAMFN_CXXFLAGS", "-DANOTHER")
    anew()
    assert loader.load() == (None, str(compiler), None)
    assert [*path.parent.iterdir()] == [path]


def test_a_cache_that_cannot_be(anew, compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(compiler))
    assert loader.load() == (None, str(compiler), None)

    def no_entry(_):
        raise KeyError

    # Neither is there a home, nor an entry in the list of users.
    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.chdir(tmp_path)
    anew()
    assert loader.load() == (None, str(compiler), None)
    assert {path.name for path in tmp_path.iterdir()} == {"compiler", "scratch"}


def test_the_users_directories_stay_private_whatever_the_umask(anew, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says its specification
    before = os.umask(0)
    try:
        path = loader.load().path
    finally:
        os.umask(before)
    assert path.parent == tmp_path / ".cache" / "adamfn"
    for private in (path, path.parent, path.parent.parent):
        assert private.stat().st_mode & 0o077 == 0


def test_the_name_changes_with_what_the_library_is_made_of(monkeypatch):
    names = {cache.name()}
    monkeypatch.setenv("ADAMFN_CXXFLAGS", "-DANOTHER")
    names.add(cache.name())
    monkeypatch.setattr(cache.jaxlib.version, "__version__", "0")
    names.add(cache.name())
    monkeypatch.setattr(cache, "_processor", lambda: ("another",))
    names.add(cache.name())
    monkeypatch.setattr(cache, "source", lambda name: b"another")
    names.add(cache.name())
    assert len(names) == 5


def test_libraries_long_unused_are_removed(anew):
    path = loader.load().path
    long_ago = time.time() - 91 * 24 * 3600
    unused, recent, other = (path.parent / name for name in ("adamfn-1.so", "adamfn-2.so", "x.so"))
    for old in (path, unused, recent, other):
        old.touch()
        os.utime(old, (long_ago, long_ago))
    os.utime(recent)
    assert cache.find(path.name)  # it is used
    cache.keep(recent, "adamfn-3.so", "c++")
    assert {p.name for p in path.parent.iterdir()} == {
        path.name,
        recent.name,
        "adamfn-3.so",
        "x.so",
    }


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("exit 3", "could not compile it: exit status 3"),
        ("printf 'a note\\n\\377: error: what\\n'; exit 1", "compile it: �: error: what"),
        ("echo a note", "could not compile it: a note"),
        (COPIES.format(library="/dev/null"), "OSError: "),
        (COPIES.format(library="/dev/null") + "exit 3", "compile it: exit status 3"),
    ],
)
def test_a_compiler_that_fails(anew, compiler, monkeypatch, body, message):
    good = compiler.read_text()
    compiler.write_text(f"#!/bin/sh\n{body}\n")
    load_in_vain(message)
    compiler.write_text(good)
    anew()
    assert loader.load().path is not None


@pytest.mark.parametrize(
    ("cxx", "message"),
    [
        ("no-such-compiler -v", r"no C\+\+ compiler \(no-such-compiler -v\)"),
        ("'", "ValueError: No closing quotation"),
        ("/dev/null", r"no C\+\+ compiler"),
    ],
)
def test_no_compiler(anew, monkeypatch, cxx, message):
    monkeypatch.setenv("CXX", cxx)
    load_in_vain(message)


@pytest.mark.parametrize(
    ("module", "function"), [(cache, "name"), (cache, "keep"), (jax.ffi, "register_ffi_target")]
)
def test_whatever_goes_wrong_is_one_warning(anew, monkeypatch, module, function):
    def fail(*_, **__):
        raise LookupError("what is that")

    monkeypatch.setattr(module, function, fail)
    loader.load_kept()
    load_in_vain("LookupError: what is that")
    anew()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning):
            loader.load()
        assert loader.load().path is None  # not again at each trace


def test_a_compiler_of_several_words_or_a_relative_path(anew, compiler, monkeypatch):
    monkeypatch.chdir(compiler.parent)
    monkeypatch.setenv("CXX", "./compiler")
    assert loader.load().built_by == str(compiler)
    loader.load().path.unlink()
    anew()
    monkeypatch.setenv("CXX", "env A='b c' ./compiler")
    assert loader.load().built_by == f"{shutil.which('env')} 'A=b c' ./compiler"


def test_a_compiler_that_hangs_is_ended_with_its_children(anew, compiler, monkeypatch, capfd):
    fifo = compiler.parent / "fifo"
    os.mkfifo(fifo)
    compiler.write_text(f"#!/bin/sh\nsleep 30 >{fifo}\nexit 1\n")
    monkeypatch.setattr(build, "_SAY_AFTER", 0.2)
    monkeypatch.setattr(build, "_GIVE_UP_AFTER", 0.5)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        load_in_vain(f"{compiler} did not finish within 0.5 seconds")
        assert select.select([reader], [], [], 2)[0]  # no one holds the other end
    finally:
        os.close(reader)
    assert capfd.readouterr().err == f"adamfn waits for {compiler} to compile its step.\n"


def test_kept_libraries_are_loaded_silently_and_never_built(anew, compiler, monkeypatch):
    loader.load_kept()
    assert cache.directory().exists() is False
    native = loader.load()
    content = native.path.read_bytes()
    anew()
    replace(native.path, content[:-1])
    loader.load_kept()
    assert native.path.read_bytes() == content[:-1]
    replace(native.path, content)
    loader.load_kept()
    native.path.unlink()
    compiler.unlink()
    assert loader.load() == native


def test_two_processes_that_build_at_once_both_win(compiler):
    program = "from adamfn.backends.native import loader; print(loader.load())"
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: python(program), range(2))
    assert first == second
    assert "reason=None" in first
    assert len([*cache.directory().iterdir()]) == 1


def test_without_a_compiler_there_is_one_warning_and_xla(compiler):
    python(
        """
        import warnings
        import jax, jax.numpy as jnp, adamfn

        def show(message, *_):
            if "adamfn" in str(message):
                shown.append(str(message))
                adamfn.backend()  # what shows a warning may ask

        shown = []
        warnings.simplefilter("always")
        warnings.showwarning = show
        for shape in (3, 4):
            params = jnp.ones(shape)
            for tx in (adamfn.adam(0.5), adamfn.adam(0.5, moments="8bit")):
                step = jax.jit(lambda p, s: adamfn.step(tx, p, s, p))
                moved, _ = step(params, tx.init(params))
                assert jnp.allclose(moved, 0.5), moved
        (warning,) = shown
        assert "no C++ compiler" in warning and "with_backend" in warning
        found = adamfn.backend()
        assert found.name == "xla" and "no C++ compiler" in found.reason, found
        """,
        PATH="",
        CXX="",
    )


def test_processes_forked_during_the_build(compiler):
    # The first exits at once, as a program does. The second asks for native code itself.
    compiler.write_text(
        compiler.read_text().replace("cp", "echo >>starts; until [ -e go ]; do sleep .1; done; cp")
    )
    python(
        """
        import os, pathlib, signal, sys, threading, time, warnings
        from adamfn.backends.native.loader import load
        warnings.simplefilter("ignore")  # JAX warns of forks
        os.chdir(sys.argv[1])
        thread = threading.Thread(target=load)
        thread.start()
        while not os.path.exists("starts"):
            time.sleep(0.01)
        first = os.fork()
        if first == 0:
            sys.exit()
        assert os.waitpid(first, 0)[1] == 0
        second = os.fork()
        if second == 0:
            signal.alarm(30)
            pathlib.Path("go").touch()
            os._exit(load().path is None)
        assert os.waitpid(second, 0)[1] == 0
        thread.join()
        assert load().path is not None, load()
        """,
        compiler.parent,
    )


@pytest.mark.parametrize("kept", [True, False])
def test_another_copy_of_the_module(compiler, kept):
    # XLA may see a handler that is registered twice only at its start, and then not start.
    python(
        """
        import importlib, os, warnings
        import jax
        from adamfn.backends.native import loader
        native = loader.load()
        assert native.reason is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert importlib.reload(loader).load() == native
        os.environ["ADAMFN_CXXFLAGS"] = "-DANOTHER"
        with warnings.catch_warnings(record=True) as caught:
            assert "another copy of adamfn" in importlib.reload(loader).load().reason
        assert len(caught) == 1
        jax.devices()
        """,
        XDG_CACHE_HOME=str(compiler.parent if kept else compiler),
    )


def test_an_executable_of_another_process_runs_once_the_kept_library_is_loaded(compiler):
    kept = compiler.parent / "executable"
    python(
        """
        import pickle, sys
        import jax, jax.numpy as jnp, adamfn
        from jax.experimental.serialize_executable import serialize
        tx, params = adamfn.adam(0.5), jnp.ones(3)
        step = jax.jit(lambda p: adamfn.step(tx, p, tx.init(p), p)[0]).lower(params)
        assert "adamfn_step" in step.as_text()
        with open(sys.argv[1], "wb") as file:
            pickle.dump(serialize(step.compile()), file)
        """,
        kept,
    )
    compiler.unlink()
    python(
        """
        import pickle, sys
        import jax.numpy as jnp
        from jax.experimental.serialize_executable import deserialize_and_load
        from adamfn.backends.native.loader import load_kept
        with open(sys.argv[1], "rb") as file:
            serialized = pickle.load(file)
        load_kept()
        assert jnp.allclose(deserialize_and_load(*serialized)(jnp.ones(3)), 0.5)
        """,
        kept,
    )
