"""Compile the extension module at first use and keep it in the user's cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.machinery
import importlib.util
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from tqc.cache_folder import folder_for_code
from tqc.lowering.provider import Unavailable

SOURCES = Path(__file__).parent
MODULE = "_tqc_cpu"
# A build takes about a minute; on a loaded machine it is left to finish, and only one that hangs is given up.
PATIENCE_SECONDS = 3600
NOTICE_SECONDS = 20

log = logging.getLogger(__name__)

# CPU features (as Linux names them) that each level needs, and the compiler flags that go with them.
_AVX2 = {"avx2": "-mavx2", "fma": "-mfma", "f16c": "-mf16c", "bmi2": "-mbmi2"}
_AVX512 = {
    "avx512f": "-mavx512f",
    "avx512bw": "-mavx512bw",
    "avx512vl": "-mavx512vl",
    "avx512dq": "-mavx512dq",
    "avx512vbmi": "-mavx512vbmi",
    "avx512_vnni": "-mavx512vnni",
}
_NEON = {"asimddp": "-march=armv8.2-a+dotprod"}
LEVELS = {"scalar": {}, "neon": _NEON, "avx2": _AVX2, "avx512": {**_AVX2, **_AVX512}}


class BuildError(Unavailable):
    """Why there is no extension module; the message is fit to show."""


@cache
def cpu_features() -> frozenset[str]:
    """Feature flags of this CPU as /proc/cpuinfo lists them; elsewhere what torch and the kind of machine tell."""
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.split(":", 1)[1].split())
    except OSError:
        pass
    if platform.machine() == "arm64" and sys.platform == "darwin":
        return frozenset(_NEON)
    return frozenset(_AVX2) if torch.backends.cpu.get_cpu_capability().startswith("AVX") else frozenset()


def level() -> str:
    """The best level this CPU runs, or the one that TQC_CPU_LEVEL forces.

    Raises:
        BuildError: if the forced level is unknown or this CPU lacks it.
    """
    able = [name for name, needs in LEVELS.items() if needs.keys() <= cpu_features()]
    forced = os.environ.get("TQC_CPU_LEVEL")
    if not forced:
        return able[-1]
    if forced not in LEVELS:
        raise BuildError(f"TQC_CPU_LEVEL must be one of {', '.join(LEVELS)}; got {forced!r}")
    if forced not in able:
        missing = ", ".join(sorted(LEVELS[forced].keys() - cpu_features()))
        raise BuildError(f"TQC_CPU_LEVEL={forced} needs a CPU with {missing}")
    return forced


def _run(command: list[str], timeout: float, notice: str = "") -> subprocess.CompletedProcess[str]:
    """Run a compiler; its messages come in English and ASCII, which every locale can show.

    It has a session of its own, so that what it started ends with it, whatever ends the wait.

    Args:
        notice: what is logged once if it takes long.

    Raises:
        subprocess.TimeoutExpired, OSError: if it takes longer than `timeout` seconds, or cannot be started.
    """
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="ascii",
        errors="backslashreplace",
        env={**os.environ, "LC_ALL": "C"},
        start_new_session=True,
    ) as process:
        try:
            try:
                out, err = process.communicate(timeout=min(timeout, NOTICE_SECONDS))
            except subprocess.TimeoutExpired:
                if timeout <= NOTICE_SECONDS:
                    raise
                if notice:
                    log.warning(notice)
                out, err = process.communicate(timeout=timeout - NOTICE_SECONDS)
        except BaseException:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _compiler() -> tuple[list[str], str]:
    """Command of the C++ compiler, which $CXX may give with arguments, and what it says of its version."""
    try:
        given = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise BuildError(f"CXX={os.environ['CXX']} is no command: {error}") from None
    commands = [given] if given else [["g++"], ["clang++"], ["c++"]]
    command = next((command for command in commands if shutil.which(command[0])), None)
    if command is None:
        raise BuildError(f"no C++ compiler: {', '.join(command[0] for command in commands)} not found on PATH")
    try:
        done = _run([*command, "--version"], timeout=60)
        done.check_returncode()
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"the C++ compiler {shlex.join(command)} does not run: {error}") from None
    return command, done.stdout


def _flags(chosen: str) -> list[str]:
    includes = [sysconfig.get_paths()["include"], str(Path(torch.__file__).parent / "include")]
    flags = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-w"]
    flags += LEVELS[chosen].values()
    if chosen == "avx512":
        flags.append("-mprefer-vector-width=512")
    if sys.platform == "darwin":
        flags += ["-undefined", "dynamic_lookup"]
    return flags + [part for include in includes for part in ("-isystem", include)]


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update((part if isinstance(part, bytes) else os.fsencode(part)) + b"\0")
    return digest.hexdigest()[:16]


def built(chosen: str) -> Path:
    """Path of the module for a level, compiled now unless it is in the cache.

    Its name is `_tqc_cpu-LEVEL-SOURCES-COMPILER-CONTENT.so`, the last three digests. Where no compiler runs, what any
    compiler built of these sources serves.

    Raises:
        BuildError: if it is not there and cannot be compiled.
    """
    flags = _flags(chosen)
    try:
        texts = [text for path in sorted(SOURCES.glob("*.[hc]*")) for text in (path.name, path.read_bytes())]
        texts += [*flags, torch.__version__, platform.machine(), str(sys.implementation.cache_tag)]
        folder = folder_for_code()
        name = f"{MODULE}-{chosen}-{_digest(*texts)}"
        try:
            command, version = _compiler()
        except BuildError:
            if kept := _kept(folder, f"{name}-*"):
                return kept
            raise
        name = f"{name}-{_digest(*command, version)}"
        return _kept(folder, name) or _build(command, flags, folder, name)
    except OSError as error:
        raise BuildError(f"building the CPU kernels failed: {error}") from None


def _kept(folder: Path, name: str) -> Path | None:
    """A file of that name and whole content; others of that name, which a full disk left, are removed."""
    for path in folder.glob(f"{name}-*.so"):
        if path.stem.endswith(f"-{_digest(path.read_bytes())}"):
            return path
        with contextlib.suppress(OSError):
            path.unlink()
    return None


def _build(command: list[str], flags: list[str], folder: Path, name: str) -> Path:
    libraries = ["-L", str(Path(torch.__file__).parent / "lib"), "-ltorch_cpu"]
    # Two processes may both build: each writes a file of its own, and the renames are atomic.
    handle, temporary = tempfile.mkstemp(prefix=f"{name}.", dir=folder)
    os.close(handle)
    try:
        build = [*command, *flags, str(SOURCES / "module.cpp"), *libraries, "-o", temporary]
        notice = f"{command[0]} is compiling the CPU kernels, once for all later runs; they will be in {folder}"
        done = _run(build, PATIENCE_SECONDS, notice)
        if done.returncode:
            last = "\n".join(done.stderr.strip().splitlines()[-8:])
            raise BuildError(f"{shlex.join(command)} could not build the CPU kernels:\n{last}")
        os.chmod(temporary, 0o700)
        target = folder / f"{name}-{_digest(Path(temporary).read_bytes())}.so"
        os.replace(temporary, target)
    except subprocess.SubprocessError as error:
        raise BuildError(f"building the CPU kernels failed: {error}") from None
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
    return target


def load(chosen: str) -> ModuleType:
    """Import the module for a level, building it if need be.

    Raises:
        BuildError: if it cannot be built or loaded.
    """
    path = built(chosen)
    loader = importlib.machinery.ExtensionFileLoader(MODULE, str(path))
    try:
        spec = importlib.machinery.ModuleSpec(MODULE, loader, origin=str(path))
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:
        raise BuildError(f"the built CPU kernels do not load: {error}") from None
    return module
