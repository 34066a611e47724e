"""Do transformers' own tests of generation and caches pass with a compiled model wherever they pass with a dense one?

    python -m benchmarks.transformers_tests FOLDER [--models llama t5 ...] [--only EXPRESSION]

FOLDER is a checkout of transformers, or what holds its `tests`, of the version that is installed; nothing of it is part
of this project. Each test runs twice, dense, and with every model that generates compiled by `backend="tqai"` with
8-bit caches. Needs pytest and parameterized.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

MODELS = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox", "bloom", "t5", "whisper"),
)
# Of the mixin that all models' tests share; those that compile the model themselves are about another backend.
ONLY = (
    "(generate or cache or past_key_values or beam or assisted or prompt_lookup or left_padding or greedy or sample)"
    " and not compil and not flash and not parallel and not Integration and not accelerator"
)
OPTIONS = {"bits_k": 8, "bits_v": 8, "residual_window": 32, "sink_tokens": 4, "rest": "eager"}
COMPILED, RESULTS = "TQC_TRANSFORMERS_TESTS_COMPILED", "TQC_TRANSFORMERS_TESTS_RESULTS"
_found: dict[str, str] = {}


# As a plugin of pytest, in the processes that run the tests


def pytest_configure() -> None:
    if os.environ.get(COMPILED):
        from transformers import GenerationMixin

        generate = GenerationMixin.generate

        def compiled(self: Any, *args: Any, **kwargs: Any) -> Any:
            if getattr(self, "_compiled_call_impl", None) is None:
                self.compile(backend="tqai", options=OPTIONS)
            return generate(self, *args, **kwargs)

        GenerationMixin.generate = compiled


def pytest_runtest_setup() -> None:
    import torch

    torch._dynamo.reset()  # models of many shapes in one process


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        reason = str(report.longrepr).strip().splitlines()[-1:] if report.outcome == "failed" else []
        name = report.nodeid.rpartition("::")[2]
        _found[name] = " ".join([report.outcome, *reason])[:300]


def pytest_sessionfinish() -> None:
    if path := os.environ.get(RESULTS):
        Path(path).write_text(json.dumps(_found))


# As a script


def outcomes(folder: Path, model: str, only: str, compiled: bool) -> dict[str, str]:
    """By test: passed, skipped, or failed and why."""
    root = str(Path(__file__).parents[1])
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "results.json"
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH", ""), root, str(folder)])),
            RESULTS: str(path),
            COMPILED: "1" if compiled else "",
        }
        arguments = ["-q", "--noconftest", "-p", "benchmarks.transformers_tests", "-k", only]
        test = f"tests/models/{model}/test_modeling_{model}.py"
        command = [sys.executable, "-m", "pytest", *arguments, "--timeout=300", "-p", "no:cacheprovider", test]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if not path.exists() or not (found := json.loads(path.read_text())):
            raise SystemExit(f"{test} did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--only", default=ONLY, help="which tests, as for pytest -k")
    arguments = parser.parse_args()
    if not (arguments.folder / "tests" / "models").is_dir():
        parser.error(f"{arguments.folder} holds no tests/models")
    from benchmarks.envelope import write

    rows: list[dict[str, Any]] = []
    for model in arguments.models:
        dense = outcomes(arguments.folder, model, arguments.only, False)
        compiled = outcomes(arguments.folder, model, arguments.only, True)
        passed = [name for name, outcome in dense.items() if outcome == "passed"]
        lost = {name: compiled.get(name, "did not run") for name in passed if compiled.get(name) != "passed"}
        counts = Counter(outcome.split()[0] for outcome in dense.values())
        row = {
            **{"model": model, "passed dense": len(passed), "of these compiled": len(passed) - len(lost)},
            **{"skipped": counts["skipped"], "failed dense": counts["failed"], "lost": lost},
        }
        print(json.dumps(row), flush=True)
        rows.append(row)
        write("transformers_tests", rows, packages=("transformers", "pytest"))
    if any(row["lost"] for row in rows):
        sys.exit("tests that pass dense fail compiled")


if __name__ == "__main__":
    main()
