"""The run behind peers.py, inside the environment that it sets up; see there."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from tqc.evaluate.evaluation import evaluate
from tqc.models import load

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SETTINGS = ("quality", "default", "small", "kv-only", "k3v2")
PACKAGES = ("tqai", "optimum-quanto", "hqq")


def biased(model: Any) -> Any:
    """The weights of `model` as a Qwen2 model with a constant of norm 600 in the slowest rotary pairs of its keys."""
    import settings

    settings.DecodingThroughCache()  # registers the attention that with_biased_keys selects
    result = settings.with_biased_keys(model)
    result.set_attn_implementation("sdpa")
    return result


def main() -> None:
    import envelope

    parser = argparse.ArgumentParser(prog="peers.py", description="See peers.py.")
    parser.add_argument("--tokens", type=int, default=2048, help="length of the text that is decoded")
    parser.add_argument("--biased-keys", action="store_true", help="put a constant of norm 600 into the keys")
    parser.add_argument("--presets", nargs="+", default=SETTINGS, metavar="PRESET", help="which presets")
    parser.add_argument("--no-peers", action="store_true", help="presets and the dense run alone")
    arguments = parser.parse_args()
    sys.argv[0] = str(Path(__file__).with_name("peers.py"))

    model, tokenizer = load(None, "float32")
    if arguments.biased_keys:
        model = biased(model)
    name = "quality_biased_keys" if arguments.biased_keys else "quality"
    console = Console(width=120)
    with Console(stderr=True).status("starting") as status:
        found = evaluate(
            model,
            tokenizer,
            arguments.presets,
            tokens=arguments.tokens,
            passkey_tokens=1024,
            peers=not arguments.no_peers,
            on_step=status.update,
        )
    console.print(found)
    notes = [
        f"{found.tokens:,} tokens of Python's documentation, teacher-forced through each cache, float32, scored from "
        f"position {found.score_from:,} on; KL in nats to the dense run. Bits count every byte that the cache holds, "
        f"in bfloat16. Passkeys: numbers hidden in {found.passkey_tokens:,} tokens, asked for through the cache."
    ]
    path = envelope.write(name, [asdict(row) for row in found.rows], notes, PACKAGES)
    found.plot(path.with_suffix(".png"))
    console.print(f"written: {path.relative_to(envelope.ROOT)}")


if __name__ == "__main__":
    main()
