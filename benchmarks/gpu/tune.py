"""Find the fastest tiles and launches on this GPU and write them to lowering/triton/tuned.json, which the kernels read.

    python benchmarks/gpu/tune.py                     all settings, decoding and prefill: mostly compiling, an hour
    python benchmarks/gpu/tune.py --kinds decode --head-dims 128 --settings 42 33

Only this architecture's part of the file changes. A setting is written if it is at least 2 % faster than the defaults.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measure import SETTINGS, SHAPES, Timer, captured, formats, packed_cache

from tqc.lowering.triton import tuning
from tqc.lowering.triton.attend import attend

GAIN = 1.02
# (batch, tokens): what the candidates are measured on; the sum of the times, each over that of the defaults, counts.
POINTS = {"decode": ((1, 32768), (8, 8192), (32, 8192)), "prefill": ((1, 8192),)}
ROWS = {"decode": 1, "prefill": 512}
HEADS = {shape.head_dim: (shape.query_heads, shape.heads) for shape in reversed(SHAPES)}


def candidates(kind: str, default: tuning.Launch) -> Iterator[tuning.Launch]:
    """The default, then everything else worth trying."""
    yield default
    decode = kind == "decode"
    blocks = (default.rows,) if decode else (32, 64)
    # Programs to a multiprocessor, and the registers that leave room for them.
    residency = ((1, None), (2, None), (3, 168), (4, 128)) if decode else ((2, None),)
    for tile, rows, warps, stages, (per_sm, registers) in itertools.product(
        (32, 64, 128), blocks, (4, 8), (2, 3, 4), residency
    ):
        launch = replace(
            default,
            tile=tile,
            rows=rows,
            num_warps=warps,
            num_stages=stages,
            programs_per_sm=per_sm,
            maxnreg=registers if warps == 4 else None,
        )
        if launch != default:
            yield launch


def times(kind: str, head_dim: int, k_bits: int, v_bits: int, launches: list[tuning.Launch]) -> dict[int, list[float]]:
    """Milliseconds at each point, by the index of the launch; one that cannot run is left out.

    A launch that is already twice as slow as the first one at a point is not measured further.
    """
    timer = Timer()
    k_fmt, v_fmt = formats(head_dim, k_bits, v_bits)
    query_heads, heads = HEADS[head_dim]
    dtype, count = torch.bfloat16, ROWS[kind]
    found: dict[int, list[float]] = {index: [] for index in range(len(launches))}
    choose = tuning.choose
    try:
        for batch, length in POINTS[kind]:
            k, v = (packed_cache(batch, heads, length, fmt, dtype, "cuda") for fmt in (k_fmt, v_fmt))
            query = torch.randn(batch, query_heads, count, head_dim, dtype=dtype, device="cuda")
            key, value = (torch.randn(batch, heads, count, head_dim, dtype=dtype, device="cuda") for _ in range(2))
            rest = (key, value, None, None, None, head_dim**-0.5, 0.0, True, k_fmt.spec, v_fmt.spec)

            def call(k=k, v=v, query=query, rest=rest) -> None:
                attend(query, *k, *v, *rest)

            for index in list(found):
                tuning.choose = lambda *args, launch=launches[index]: launch  # type: ignore[assignment]
                try:
                    found[index].append(timer(captured(call), seconds=0.02))
                except Exception as error:
                    print(f"  {launches[index]}: {type(error).__name__}", flush=True)
                    del found[index]
                    continue
                if found[index][-1] > 2 * found[0][-1]:
                    del found[index]
    finally:
        tuning.choose = choose
    return found


def best(launches: list[tuning.Launch], found: dict[int, list[float]]) -> tuple[tuning.Launch, float]:
    """The launch of the least relative time, and its gain over the first one."""
    relative = {index: sum(a / b for a, b in zip(ms, found[0], strict=True)) / len(ms) for index, ms in found.items()}
    index = min(relative, key=relative.__getitem__)
    return launches[index], 1 / relative[index]


def write(architecture: str, key: str, launch: tuning.Launch, path: Path = tuning.TABLE) -> None:
    """Set one entry of the table, and leave all others."""
    table = json.loads(path.read_text()) if path.exists() else {}
    table.setdefault(architecture, {})[key] = asdict(launch)
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=POINTS, default=list(POINTS))
    parser.add_argument("--head-dims", nargs="+", type=int, choices=sorted(HEADS), default=sorted(HEADS))
    allowed = [f"{k}{v}" for k, v in SETTINGS]
    parser.add_argument("--settings", nargs="+", choices=allowed, default=allowed, help="bits of keys and values")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU here")
    architecture = tuning.architecture(torch.device("cuda"))
    for kind, head_dim, setting in itertools.product(arguments.kinds, arguments.head_dims, arguments.settings):
        k_fmt, v_fmt = formats(head_dim, int(setting[0]), int(setting[1]))
        query_heads, heads = HEADS[head_dim]
        rows = ROWS[kind] * query_heads // heads
        launches = list(candidates(kind, tuning.choose(architecture, rows, k_fmt, v_fmt, False)))
        launch, gain = best(launches, times(kind, head_dim, int(setting[0]), int(setting[1]), launches))
        key = f"{kind} d{head_dim} k{setting[0]}v{setting[1]}"
        print(f"{architecture} {key}: {launch}, {gain:.2f} times as fast as the defaults", flush=True)
        if gain >= GAIN:
            write(architecture, key, launch)


if __name__ == "__main__":
    main()
