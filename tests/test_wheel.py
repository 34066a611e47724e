"""The wheel: it holds one package, and a user's folders named like ours neither shadow it nor are shadowed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "tqc", "passes", "lowering", "mlx_trace")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources: building in place would leave a build folder behind."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(ROOT / name, tree / name)
    _run("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(out), str(tree), cwd=out)
    (file,) = out.glob("*.whl")
    return file


def test_it_holds_one_package_with_the_kernels_sources(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"tqc", "tqai_compiler-0.1.0.dist-info"}
    mapped = {name: f"tqc/{name}" for name in ("passes", "lowering", "mlx_trace")}
    for folder, inside in {"tqc": "tqc", **mapped}.items():
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in (".py", ".cpp", ".h") or file.name == "py.typed":
                assert f"{inside}/{file.relative_to(ROOT / folder).as_posix()}" in names


def test_users_folders_with_our_names_stay_theirs(wheel: Path, tmp_path: Path) -> None:
    site, work = tmp_path / "site", tmp_path / "work"
    _run("-m", "pip", "install", "--no-deps", "--quiet", "--target", str(site), str(wheel), cwd=tmp_path)
    for name in ("passes", "lowering"):
        (work / name).mkdir(parents=True)
        (work / name / "__init__.py").write_text("OWNER = 'user'\n")
    script = work / "script.py"
    script.write_text(
        "import tqc, tqc.passes, tqc.lowering, passes, lowering\n"
        "print(tqc.__file__, tqc.passes.__file__, tqc.lowering.__file__, passes.OWNER, lowering.OWNER, sep='\\n')\n"
    )
    lines = _run(str(script), cwd=work, PYTHONPATH=f"{site}{os.pathsep}{work}").splitlines()
    expected = [site / "tqc" / name for name in ("__init__.py", "passes/__init__.py", "lowering/__init__.py")]
    assert [Path(line) for line in lines[:3]] == expected
    assert lines[3:] == ["user", "user"]


def _run(*args: str, cwd: Path, **env: str) -> str:
    done = subprocess.run([sys.executable, *args], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
