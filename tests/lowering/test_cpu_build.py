"""Building the CPU kernels: what is kept and checked, what fails and how it is said, machines that lack something."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tqc.lowering.cpu import PROVIDER, build

if reason := PROVIDER.unavailable():
    pytest.skip(f"the CPU provider does not run here: {reason}", allow_module_level=True)


def run_python(code, **environment):
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)


UNAVAILABLE = "from tqc.lowering.cpu import PROVIDER; print(PROVIDER.unavailable())"


def test_without_a_compiler_it_says_so(tmp_path):
    done = run_python(UNAVAILABLE, PATH=str(tmp_path), CXX="", TQC_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler" in done.stdout


NO_HOME = """
import os, pwd
def getpwuid(uid): raise KeyError(uid)
pwd.getpwuid = getpwuid
del os.environ["HOME"]
"""
ASK_ALL = """
import torch
from tqc.cli.info import describe
from tqc.format import PackedFormat
from tqc.lowering.select import choose, providers
fmt = PackedFormat(64, 4, True)
for provider in providers(): provider.supports(fmt, fmt, torch.float32, "cpu")
reasons = describe()["providers"]
print(choose(fmt, fmt, torch.float32, "cpu")[0].name, ascii(reasons))
"""


@pytest.mark.parametrize(
    ("code", "environment"),
    [
        ("", {"HOME": "/proc/none", "TQC_CACHE_DIR": "/proc/none", "TMPDIR": "/proc/none"}),
        (NO_HOME, {"TQC_CACHE_DIR": "", "XDG_CACHE_HOME": ""}),
        ("", {"TQC_CACHE_DIR": "/proc/caf\xe9", "CXX": "caf\xe9", "PYTHONUTF8": "0", "LC_ALL": "C"}),
    ],
    ids=["nothing to write to", "no home", "ASCII"],
)
def test_asking_what_can_be_had_never_raises(code, environment):
    done = run_python(code + ASK_ALL, PYTHONCOERCECLOCALE="0", **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("reference") and "cache folder" in done.stdout and "\n" not in done.stdout.strip()


def test_a_failed_build_shows_the_compilers_last_lines(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\ncase "$1" in --version) echo one;; *) echo "error: no memory" >&2; exit 1;; esac\n')
    compiler.chmod(0o700)
    done = run_python(UNAVAILABLE, CXX=str(compiler), TQC_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert "error: no memory" in done.stdout
    assert not [name for name in os.listdir(tmp_path / "cache")]


@pytest.fixture
def copying_compiler(tmp_path, monkeypatch):
    """A cache of its own, and a compiler that copies what is built already and counts its calls."""
    compiler, calls = tmp_path / "c++", tmp_path / "calls"
    compiler.write_text(
        'if [ "$1" = --version ]; then echo one; exit; fi\n'
        f'echo call >> {calls}\nfor last; do :; done\ncp {build.built("scalar")} "$last"\n'
    )
    monkeypatch.setenv("TQC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", f"sh '{compiler}'")
    return lambda: len(calls.read_text().splitlines()) if calls.exists() else 0


def test_what_is_built_needs_no_compiler(copying_compiler, monkeypatch):
    path = build.built("scalar")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.built("scalar") == path
    build.load("scalar")
    with pytest.raises(build.BuildError, match="no-such-compiler not found"):
        build.built("neon")


def truncated(content):
    return content[: len(content) // 2]


def with_one_bit_changed(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [truncated, with_one_bit_changed, lambda content: b""])
def test_a_damaged_file_is_built_anew(copying_compiler, damage):
    path = build.built("scalar")
    assert build.built("scalar") == path and copying_compiler() == 1
    path.write_bytes(damage(path.read_bytes()))
    assert build.built("scalar") == path and copying_compiler() == 2
    build.load("scalar")


class Interrupted(BaseException):
    """As KeyboardInterrupt, which is no Exception."""


@pytest.fixture
def slow_compiler(tmp_path, monkeypatch):
    """A compiler that starts another process, as g++ starts cc1plus, and waits for it; and whether that one lives."""
    compiler, started = tmp_path / "c++", tmp_path / "started"
    compiler.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exit\nsleep 60 & echo $! > {started}.part\n'
        f"mv {started}.part {started}\nwait\n"
    )
    compiler.chmod(0o700)
    monkeypatch.setenv("TQC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(compiler))

    def lives():
        state = Path("/proc", started.read_text().strip(), "stat")
        return state.exists() and state.read_text().split()[2] not in "ZX"

    return lives


def test_a_build_that_hangs_leaves_no_process(slow_compiler, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "NOTICE_SECONDS", 0.2)
    monkeypatch.setattr(build, "PATIENCE_SECONDS", 1)
    with pytest.raises(build.BuildError, match="timed out"):
        build.built("scalar")
    wait_until(lambda: not slow_compiler())
    assert not list((tmp_path / "cache").iterdir())


def test_a_build_that_is_interrupted_leaves_no_process(slow_compiler, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "NOTICE_SECONDS", 0.5)

    def interrupt(*_):
        assert slow_compiler()
        raise Interrupted

    monkeypatch.setattr(build.log, "warning", interrupt)
    with pytest.raises(Interrupted):
        build.built("scalar")
    wait_until(lambda: not slow_compiler())
    assert not list((tmp_path / "cache").iterdir())


def wait_until(done):
    end = time.monotonic() + 5
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("seconds", [0, 2])
def test_one_line_is_logged_if_a_build_takes_long(copying_compiler, monkeypatch, caplog, tmp_path, seconds):
    script = tmp_path / "c++"
    script.write_text(script.read_text().replace("for last", f"sleep {seconds}\nfor last"))
    monkeypatch.setattr(build, "NOTICE_SECONDS", 1)
    build.built("scalar")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (1 if seconds else 0) and all("is compiling the CPU kernels" in line for line in lines)


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    done = run_python(UNAVAILABLE, TQC_CACHE_DIR=str(tmp_path / "file" / "cache"))
    assert "cannot use the cache folder" in done.stdout
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1, done.stderr


def test_messages_in_another_encoding(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_bytes(b"#!/bin/sh\nprintf '\\377\\376 broken' >&2; [ \"$1\" = --version ]\n")
    compiler.chmod(0o700)
    done = run_python(UNAVAILABLE, CXX=str(compiler), TQC_CACHE_DIR=str(tmp_path / "cache"), PYTHONUTF8="0", LC_ALL="C")
    assert done.returncode == 0 and "broken" in done.stdout, done.stderr


def test_an_unsafe_cache_folder_is_refused(tmp_path):
    tmp_path.chmod(0o777)
    done = run_python(UNAVAILABLE, TQC_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "others may write" in done.stdout
