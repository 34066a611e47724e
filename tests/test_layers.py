"""Who imports whom: only downwards, in no circle, private names of torch in one file, optional packages where used."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"tqc": "tqc", "passes": "tqc.passes", "lowering": "tqc.lowering", "mlx_trace": "tqc.mlx_trace"}

# The rooms, each with those it may import from: the name behind `tqc.`, "tqc" for the package's own names.
ALLOWED: dict[str, set[str]] = {
    "torch_private": set(),
    "cache_folder": set(),
    "format": {"torch_private"},
    "widths": set(),
    "plugins": set(),
    "strategies": {"format", "plugins"},
    "config": {"format", "plugins", "strategies", "widths"},
    "ops": {"format", "plugins", "torch_private"},
    "passes": {"format", "config", "ops", "torch_private"},
    "mlx_trace": {"format", "config", "ops", "passes", "lowering", "cache", "report", "torch_private"},
    "caches": {"cache", "mlx_trace"},
    "lowering": {"format", "ops", "cache_folder", "torch_private"},
    "cache": {"format", "plugins", "config", "ops", "torch_private"},
    "execute": {"format", "plugins", "ops", "lowering", "cache", "torch_private"},
    "report": {"passes"},
    "inner_models": {"torch_private"},
    "recompiles": {"torch_private"},
    "optimized_module": {"config", "inner_models", "torch_private"},
    "backend": {
        *("config", "ops", "passes", "lowering", "cache", "execute"),
        *("report", "optimized_module", "recompiles", "torch_private"),
    },
    "diffusion": {"format", "plugins", "config", "ops", "passes", "backend", "optimized_module", "torch_private"},
    "explainer": {
        *("passes", "cache", "report", "backend", "mlx_trace", "diffusion"),
        *("inner_models", "optimized_module", "recompiles", "torch_private"),
    },
    "export": {"cache", "format", "config", "ops", "passes", "lowering", "backend", "torch_private"},
    "tqc": {"config", "cache", "caches", "explainer", "export", "mlx_trace", "diffusion"},
    "models": {"cache_folder", "mlx_trace"},
    "evaluate": {"format", "plugins", "strategies", "config", "widths", "cache", "export"},
    "cli": {
        *("tqc", "config", "plugins", "widths", "lowering", "diffusion", "evaluate", "export", "models"),
        *("cache_folder", "torch_private"),
    },
    "__main__": {"cli"},
}

PRIVATE = re.compile(r"(torch|transformers)(\.\w+)*?\._(?!_)\w+(\.\w+)*")
PRIVATE_HOME = "tqc.torch_private"
# Names that other files may use all the same.
PRIVATE_ALLOWED = {
    ("tqc.cache.file", "torch._dynamo.mark_static_address"): "documented by torch; loads what transformers marks so",
    ("tqc.evaluate.evaluation", "torch._dynamo.config.patch"): "a documented setting: how often a model may recompile",
    ("tqc.explainer", "torch._dynamo.config.patch"): "a documented setting: how often a model may recompile",
    ("tqc.export.capture", "torch._dynamo.config.patch"): "a documented setting: whether numbers become symbols",
    ("tqc.ops.text", "torch._ops.OpOverload"): "the type of what torch.ops holds, which is public but for its name",
    ("tqc.ops.text", "torch._ops.OpOverloadPacket"): "the same",
}

OPTIONAL = {
    *("triton", "transformers", "tokenizers", "mlx", "mlx_lm", "onnx", "onnxscript", "onnxruntime", "diffusers"),
    *("gguf", "accelerate", "matplotlib", "huggingface_hub", "optuna", "cma"),
}


def sources() -> dict[str, str]:
    """Text of every file by the name that it is imported as."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path.read_text()
    return found


def arrows(files: Mapping[str, str]) -> dict[str, set[str]]:
    """Files that each file imports from, wherever the import stands. A package's name stands for its `__init__`."""
    return {name: set(_imported(name, text, files)) - {name} for name, text in files.items()}


def _imported(importer: str, text: str, files: Mapping[str, str]) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in files)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{importer} has a relative import, which this test does not follow"
            module = node.module or ""
            for alias in node.names:
                part = f"{module}.{alias.name}"
                if part in files or module in files:
                    yield part if part in files else module


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else name


def forbidden(files: Mapping[str, str], allowed: Mapping[str, set[str]]) -> list[str]:
    """Arrows between rooms that are not allowed, and rooms that the table does not know."""
    faults = [f"{name} is in no room of the table" for name in files if room(name) not in allowed]
    for importer, found in arrows(files).items():
        known = {room(importer)} | allowed.get(room(importer), set())
        faults += [f"{importer} imports {imported}" for imported in sorted(found) if room(imported) not in known]
    return faults


def circle(files: Mapping[str, str]) -> list[str]:
    """Files that import each other in a circle, the first one named again at the end; empty if there is none."""
    graph = arrows(files)
    done: set[str] = set()

    def search(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name not in done:
            for imported in sorted(graph[name]):
                if found := search(imported, [*way, name]):
                    return found
            done.add(name)
        return []

    return next(filter(None, (search(name, []) for name in sorted(graph))), [])


def private_names(files: Mapping[str, str]) -> set[tuple[str, str]]:
    """Private names of torch by file: imported, as chains of attributes, or as text for a late import."""
    found = set()
    for file, text in files.items():
        for node in ast.walk(ast.parse(text)):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Attribute):
                names = [ast.unparse(node)]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names = [node.value]
            found |= {(file, name) for name in names if PRIVATE.fullmatch(name)}
    # Of a chain, only the whole.
    return {
        (file, name)
        for file, name in found
        if not any(other == file and longer.startswith(f"{name}.") for other, longer in found)
    }


# Torch imports optional packages of its own accord, so what counts is who asks. None is there: all must do without.
_WATCHED = """
import sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in {names!r}:
            frame = sys._getframe(1)
            while "importlib" in frame.f_code.co_filename:
                frame = frame.f_back
            file = frame.f_code.co_filename
            if file.startswith({folder!r}) and "site-packages" not in file:
                asked.add(name)
            raise ModuleNotFoundError(name)
asked = set()
sys.meta_path.insert(0, Watch())
{code}
print(*asked)
"""


def asked(code: str, folder: Path) -> set[str]:
    """Which optional packages the files of a folder ask for while a fresh Python runs `code`."""
    script = _WATCHED.format(names=OPTIONAL, folder=str(folder), code=code)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_every_file_is_read() -> None:
    found = sources()
    assert {"tqc", "tqc.backend", "tqc.ops.attend", "tqc.passes", "tqc.passes.rewrites.pack_cache"} <= set(found)
    assert {"tqc.lowering", "tqc.lowering.cpu.kernels", "tqc.lowering.triton.attend"} <= set(found)
    graph = arrows(found)
    assert "tqc.ops" in graph["tqc.execute.realize"], "from tqc import ops"
    assert "tqc.ops.planes" in graph["tqc.ops.read"], "from tqc.ops import planes"
    assert "tqc.explainer" in graph["tqc"], "under TYPE_CHECKING"
    assert "tqc.evaluate.evaluation" in graph["tqc.cli.quality"], "inside of a function"


def test_rooms_import_downwards_only() -> None:
    assert not forbidden(sources(), ALLOWED)


def test_the_table_keeps_the_rules() -> None:
    """What a wider table must not allow."""
    assert not ALLOWED["passes"] & {"cache", "execute", "lowering"}
    assert not any("passes" in ALLOWED[name] for name in ("lowering", "execute", "cache", "ops"))
    assert {name for name, rooms in ALLOWED.items() if "cli" in rooms} == {"__main__"}
    assert ALLOWED["ops"] == {"format", "plugins", "torch_private"} and not ALLOWED["plugins"]


def test_no_file_is_in_a_circle() -> None:
    assert not (found := circle(sources())), " -> ".join(found)


def test_private_names_of_torch_are_in_one_file() -> None:
    found = {(file, name) for file, name in private_names(sources()) if not file.startswith(PRIVATE_HOME)}
    assert not found - PRIVATE_ALLOWED.keys()
    assert not PRIVATE_ALLOWED.keys() - found, "exceptions that nothing needs any more"


@pytest.mark.parametrize("module", ["tqc", "tqc.backend"])
def test_no_optional_package_is_imported_with(module: str) -> None:
    assert not asked(f"import {module}", ROOT)


def lacking(text: str) -> list[str]:
    """Folders of code that a map does not name, and files and folders that it names but are not there."""
    named = set(re.findall(r"`((?:tqc|passes|lowering|mlx_trace|tests|benchmarks|docs)(?:/[\w./]+?)?)/?`", text))
    code = {str(path.parent.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    faults = [f"{folder} is not named" for folder in sorted(code - named - {"tqc"})]
    kept = {name for name in named if not name.endswith(".json")}  # those are what scripts write
    return faults + [f"{name} is not there" for name in sorted(kept) if not (ROOT / name).exists()]


def test_the_map_names_every_folder() -> None:
    assert not lacking((ROOT / "CONTRIBUTING.md").read_text())


# --- The checks themselves can fail ----------------------------------------------------------------------------------

SMALL = {
    "tqc": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from tqc.config import Config",
    "tqc.config": "from tqc.format import Format",
    "tqc.format": "from tqc.format.pages import Format",
    "tqc.format.pages": "import torch",
    "tqc.ops": "from tqc.ops.read import read",
    "tqc.ops.read": "from tqc.format import Format\nfrom tqc.ops import planes",
    "tqc.ops.planes": "",
    "tqc.passes": "from tqc import ops",
    "tqc.cache": "",
    "tqc.cli.app": "import tqc",
}


def test_the_small_tree_is_fine() -> None:
    assert not forbidden(SMALL, ALLOWED) and not circle(SMALL) and not private_names(SMALL)


@pytest.mark.parametrize(
    "file, text, fault",
    [
        ("tqc.passes", "from tqc.cache import Storage", "tqc.passes imports tqc.cache"),
        ("tqc.passes", "from tqc import cache", "tqc.passes imports tqc.cache"),
        ("tqc.passes", "import tqc.cache", "tqc.passes imports tqc.cache"),
        ("tqc.cache", "def late():\n    from tqc.passes import rewrite", "tqc.cache imports tqc.passes"),
        ("tqc.format.pages", "from tqc.ops.planes import read", "tqc.format.pages imports tqc.ops.planes"),
        (
            "tqc.ops.planes",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from tqc.config import Config",
            "tqc.ops.planes imports tqc.config",
        ),
        ("tqc.cache", "from tqc.cli.app import main", "tqc.cache imports tqc.cli.app"),
        ("tqc.rooms", "", "tqc.rooms is in no room of the table"),
    ],
)
def test_a_forbidden_arrow_is_found(file: str, text: str, fault: str) -> None:
    assert forbidden({**SMALL, file: text}, ALLOWED) == [fault]


@pytest.mark.parametrize(
    "file, text, names",
    [
        ("tqc.ops.planes", "from tqc.ops.read import read", {"tqc.ops.read", "tqc.ops.planes"}),
        ("tqc.ops.planes", "from tqc.ops import read", {"tqc.ops.read", "tqc.ops.planes"}),
        ("tqc.ops.planes", "def late():\n    from tqc.ops import Op", {"tqc.ops", "tqc.ops.read", "tqc.ops.planes"}),
        ("tqc.format.pages", "from tqc import VERSION", {"tqc", "tqc.config", "tqc.format", "tqc.format.pages"}),
    ],
)
def test_a_circle_is_found(file: str, text: str, names: set[str]) -> None:
    found = circle({**SMALL, file: text})
    assert set(found) == names and found[0] == found[-1] and len(found) == len(names) + 1


@pytest.mark.parametrize(
    "text, name",
    [
        ("import torch._dynamo", "torch._dynamo"),
        ("import torch._inductor.config as config", "torch._inductor.config"),
        ("from torch import _guards", "torch._guards"),
        ("def late():\n    from torch._functorch.aot_autograd import make", "torch._functorch.aot_autograd.make"),
        ("import torch\nx = torch._C._aoti.f(1)", "torch._C._aoti.f"),
        ("import torch\nx = torch._subclasses.FakeTensor", "torch._subclasses.FakeTensor"),
        ("import torch\nx = torch.Tensor._make_subclass", "torch.Tensor._make_subclass"),
        ("from torch.utils._pytree import tree_map", "torch.utils._pytree.tree_map"),
        ("from transformers.utils import _private", "transformers.utils._private"),
        ("import importlib\nx = importlib.import_module('torch._dynamo')", "torch._dynamo"),
    ],
)
def test_a_private_name_is_found(text: str, name: str) -> None:
    assert private_names({**SMALL, "tqc.cache": text}) == {("tqc.cache", name)}


def test_an_optional_package_is_found(tmp_path: Path) -> None:
    """Also where a file goes without it, or asks for it by a name; not where somebody else asks."""
    lines = ["import importlib", "try: import onnx.helper", "except ImportError: pass", "def late(): import gguf"]
    lines += ["try: importlib.import_module('triton')", "except ImportError: pass"]
    (tmp_path / "early.py").write_text("\n".join(lines))
    assert asked("import early", tmp_path) == {"onnx", "triton"}
    assert asked("try: import mlx\nexcept ImportError: pass", tmp_path) == set()
    (tmp_path / "early.py").write_text("import onnx")
    with pytest.raises(AssertionError, match="onnx"):
        asked("import early", tmp_path)


def test_a_map_that_lies_is_found() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert "tqc/execute is not named" in lacking(text.replace("`tqc/execute`", ""))
    assert "tqc/runtime.py is not there" in lacking(f"{text}`tqc/runtime.py`")
