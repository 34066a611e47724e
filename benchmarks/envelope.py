"""The common frame of benchmark results: what was run, when, on what, with which versions.

A result file is benchmarks/results/NAME.json:

    {"name", "command", "date", "hardware": {...}, "versions": {...}, "rows": [{...}], "notes": ["..."]}

A script writes it with `write("NAME", rows)`; `benchmarks/readme.py` puts the tables into README.md.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def write(name: str, rows: Sequence[dict[str, Any]], notes: Sequence[str] = (), packages: Iterable[str] = ()) -> Path:
    """Write benchmarks/results/NAME.json and return its path; `packages` are those whose versions matter too."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(text(envelope(name, rows, notes, packages)))
    return path


def text(result: dict[str, Any]) -> str:
    """A result as JSON, one line to a row."""
    rows = ",\n  ".join(map(json.dumps, result["rows"]))
    return json.dumps({**result, "rows": []}, indent=1).replace('"rows": []', f'"rows": [\n  {rows}\n ]', 1) + "\n"


def envelope(
    name: str, rows: Sequence[dict[str, Any]], notes: Sequence[str] = (), packages: Iterable[str] = ()
) -> dict[str, Any]:
    """`rows` in the common frame."""
    return {
        "name": name,
        "command": command(),
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "versions": versions(packages),
        "rows": list(rows),
        "notes": list(notes),
    }


def command() -> str:
    """The command line of this process, with paths below the project's folder relative to it, and no other paths."""
    return shlex.join(["python", *map(_without_machine, (str(Path(sys.argv[0]).resolve()), *sys.argv[1:]))])


def _without_machine(word: str) -> str:
    path = Path(word)
    if not path.is_absolute():
        return word
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else "PATH"


def hardware() -> dict[str, Any]:
    """Processor, cores that this process may use, threads of torch, memory, and the GPU if there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {"processor": processor(), "cores": cores, "threads": torch.get_num_threads()}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def processor() -> str:
    try:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        return names[0].split(":", 1)[1].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def versions(packages: Iterable[str] = ()) -> dict[str, str]:
    """Versions of Python, of what every benchmark uses, and of `packages`; those not installed are left out."""
    found = {"python": platform.python_version()}
    for package in ("tqai-compiler", "torch", "transformers", *packages):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found
