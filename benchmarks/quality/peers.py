"""Quality and all-in bits of the presets beside other projects' caches, all decoded through on the same text.

    python benchmarks/quality/peers.py                      SmolLM2-135M-Instruct -> benchmarks/results/quality.json
    python benchmarks/quality/peers.py --tokens 1024        a shorter text

The presets take some ten minutes on one thread, and are written before the peers begin, which take half an hour more.
The peers' packages go into a virtual environment of their own, build/peers/quality, which sees this one's torch and
transformers. A package that cannot be installed is named with the reason, and the run goes on without it.
"""

from __future__ import annotations

import os
import site
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / "build" / "peers" / "quality"
# What each peer needs beyond torch and transformers: ninja builds quanto's kernels, hqq imports einops and termcolor.
PACKAGES = ("tqai==0.6.1", "optimum-quanto==0.2.7", "ninja", "hqq==0.2.8.post1", "einops", "termcolor")


def set_up() -> Path:
    """Make the environment, as far as it is not there yet; its Python."""
    python = VENV / "bin" / "python"
    if not python.exists():
        venv.create(VENV, with_pip=True)
        own = next((VENV / "lib").glob("python*")) / "site-packages"
        parents = [folder for folder in site.getsitepackages() if Path(folder).is_dir()]
        (own / "parent.pth").write_text("".join(f"import site; site.addsitedir({folder!r})\n" for folder in parents))
    for package in PACKAGES:
        # Without dependencies: torch and the rest are those of the parent.
        command = [python, "-m", "pip", "install", "-q", "--no-deps", package]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            reason = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
            print(f"{package} cannot be installed: {reason[-1]}", file=sys.stderr)
    return python


def main() -> None:
    python = set_up()
    environment = {**os.environ, "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    script = Path(__file__).with_name("peers_run.py")
    sys.exit(subprocess.run([python, script, *sys.argv[1:]], env=environment, cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
