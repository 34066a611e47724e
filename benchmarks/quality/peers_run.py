"""The run behind peers.py, inside the environment that it sets up; see there."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from tqc.evaluate.evaluation import PEER, evaluate
from tqc.evaluate.plot import plot
from tqc.models import EMBEDDED_NAME, load

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SETTINGS = ("quality", "default", "small", "kv-only", "k3v2")
PACKAGES = ("tqai", "optimum-quanto", "hqq")


def main() -> None:
    import envelope

    parser = argparse.ArgumentParser(prog="peers.py", description="See peers.py.")
    parser.add_argument("--tokens", type=int, default=2048, help="length of the text that is decoded")
    parser.add_argument("--presets", nargs="+", default=SETTINGS, metavar="PRESET", help="which presets")
    parser.add_argument("--no-peers", action="store_true", help="presets and the dense run alone")
    arguments = parser.parse_args()
    sys.argv[0] = str(Path(__file__).with_name("peers.py"))

    model, tokenizer = load(None, "float32")
    console, found = Console(width=120), None
    # Peers in a run of their own, with the dense cache again, so that the presets are written before these begin.
    for settings, peers in ((arguments.presets, False), ((), True)):
        if peers and arguments.no_peers:
            break
        begin = time.monotonic()
        with Console(stderr=True).status("starting") as status:
            part = evaluate(model, tokenizer, settings, tokens=arguments.tokens, peers=peers, on_step=status.update)
        part.model = EMBEDDED_NAME
        if found is None:
            found = part
        else:
            found.rows += [row for row in part.rows if row.kind == PEER]
        notes = [
            f"{found.tokens:,} tokens of Python's documentation, teacher-forced through each cache, float32, scored "
            f"from position {found.score_from:,} on; KL in nats to the dense run. Bits count every byte that the cache "
            f"holds, in bfloat16. Hidden numbers: {found.numbers} in a text of as many tokens, asked for through the "
            "cache; NLL in nats a token of the right number."
        ]
        path = envelope.write("quality", [asdict(row) for row in found.rows], notes, PACKAGES)
        plot([found], path.with_suffix(".png"))
        console.print(found)
        console.print(f"written after {time.monotonic() - begin:.0f} s: {path.relative_to(envelope.ROOT)}")


if __name__ == "__main__":
    main()
