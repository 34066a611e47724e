"""Compile the extension module at first use and keep it in the user's cache folder."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import platform
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

SOURCES = Path(__file__).parent
MODULE = "_tqc_cpu"
TIMEOUT_SECONDS = 300

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


class BuildError(RuntimeError):
    """Why there is no extension module; the message is fit to show."""


@cache
def cpu_features() -> frozenset[str]:
    """Feature flags of this CPU as /proc/cpuinfo lists them; elsewhere what torch and the kind of machine tell."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
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


def cache_folder() -> Path:
    """Where built modules are kept, made with mode 0700 if it is not there.

    Raises:
        BuildError: if the folder belongs to another user or others may write to it.
    """
    if "TQC_CACHE_DIR" in os.environ:
        folder = Path(os.environ["TQC_CACHE_DIR"])
    elif os.environ.get("XDG_CACHE_HOME"):
        folder = Path(os.environ["XDG_CACHE_HOME"]) / "tqc"
    else:
        folder = Path.home() / ".cache" / "tqc"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise BuildError(f"cannot use the cache folder {folder}: {error.strerror}") from None
    if hasattr(os, "getuid") and status.st_uid != os.getuid():
        raise BuildError(f"the cache folder {folder} belongs to another user; set TQC_CACHE_DIR to one of your own")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildError(f"others may write to the cache folder {folder}; run chmod go-w on it or set TQC_CACHE_DIR")
    return folder


def _compiler() -> tuple[str, str]:
    """Path of the C++ compiler and what it says of its version."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        raise BuildError(f"no C++ compiler: {', '.join(names)} not found on PATH")
    try:
        version = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"the C++ compiler {path} does not run: {error}") from None
    return path, version


def _flags(chosen: str) -> list[str]:
    includes = [sysconfig.get_paths()["include"], str(Path(torch.__file__).parent / "include")]
    flags = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-w"]
    flags += LEVELS[chosen].values()
    if chosen == "avx512":
        flags.append("-mprefer-vector-width=512")
    if sys.platform == "darwin":
        flags += ["-undefined", "dynamic_lookup"]
    return flags + [part for include in includes for part in ("-isystem", include)]


def built(chosen: str) -> Path:
    """Path of the module for a level, compiled now unless it is in the cache."""
    compiler, version = _compiler()
    flags = _flags(chosen)
    digest = hashlib.sha256()
    for source in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    for text in (version, *flags, torch.__version__, platform.machine(), sys.implementation.cache_tag):
        digest.update(text.encode() + b"\0")
    folder = cache_folder()
    target = folder / f"{MODULE}-{chosen}-{digest.hexdigest()[:20]}.so"
    if target.exists():
        return target
    # Two processes may both build: each writes a file of its own, and the renames are atomic.
    handle, temporary = tempfile.mkstemp(prefix=f"{target.name}.", dir=folder)
    os.close(handle)
    libraries = ["-L", str(Path(torch.__file__).parent / "lib"), "-ltorch_cpu"]
    command = [compiler, *flags, str(SOURCES / "module.cpp"), *libraries, "-o", temporary]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
        if done.returncode:
            last = "\n".join(done.stderr.strip().splitlines()[-8:])
            raise BuildError(f"{compiler} could not build the CPU kernels:\n{last}")
        os.chmod(temporary, 0o700)
        os.replace(temporary, target)
    except (OSError, subprocess.SubprocessError) as error:
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
