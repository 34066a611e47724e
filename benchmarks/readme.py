"""Write docs/results.md from benchmarks/results/*.json, and the tables of README.md and of other pages of docs.

python benchmarks/readme.py             write them
python benchmarks/readme.py --check     only say whether they are up to date (exit code 1 if not)

docs/results.md is written whole. In the others a table stands between `<!-- results:begin NAME -->` and
`<!-- results:end -->`, NAME being that of the result file.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- results:begin (\w+) -->\n).*?(<!-- results:end -->)", re.DOTALL)
Columns = list[tuple[str, str, str]]
FIELDS = ("name", "command", "date", "hardware", "versions", "rows", "notes")

_QUALITY = [
    ("name", "cache", ""),
    ("bits_4096", "bits at 4,096 tokens", ".2f"),
    ("kl_mean", "KL mean", ".2g"),
    ("kl_p99", "KL 99 %", ".2g"),
    ("top1_agreement", "same top-1", ".1%"),
    ("perplexity", "perplexity", ".2f"),
    ("perplexity_increase", "increase", "+.1%"),
    ("numbers_nll", "NLL of hidden numbers", ".2f"),
    ("numbers_found", "found of 8", ""),
]
_QUALITY_SHORT = [
    ("name", "cache", ""),
    ("bits_4096", "bits at 4,096 tokens", ".2f"),
    ("kl_mean", "KL mean", ".2g"),
    ("top1_agreement", "same top-1", ".1%"),
    ("perplexity_increase", "perplexity", "+.1%"),
    ("numbers_nll", "NLL of hidden numbers", ".2f"),
]
_STRESS = [
    ("model", "model", ""),
    ("transformation", "keys", ""),
    ("setting", "cache", ""),
    ("bits_4096", "bits at 4,096 tokens", ".2f"),
    ("kl_mean", "KL mean", ".2g"),
    ("kl_p99", "KL 99 %", ".2g"),
    ("perplexity", "perplexity", ".2f"),
    ("numbers_nll", "NLL of hidden numbers", ".2f"),
    ("numbers_found", "found of 8", ""),
]
# The peers in README.md, beside all presets: the best with 4 and with 2 bits, and tqai as published and by default.
QUALITY_PEERS = ("transformers hqq 4 bits", "transformers hqq 2 bits", "tqai K4 V2", "tqai K8 V8")
_GENERATE_SHORT = [
    ("context", "tokens in the cache", ",d"),
    ("packed_step_ms", "ms a token, packed", ".1f"),
    ("dense_step_ms", "dense", ".1f"),
    ("speedup", "speed over dense", ".2f"),
    ("speedup_over_dense_rows", "over dense with our products", ".2f"),
    ("memory", "cache bytes over dense", ".3f"),
]
_GENERATE = [
    ("context", "tokens in the cache", ",d"),
    ("packed_step_ms", "ms a token, packed", ".1f"),
    ("dense_step_ms", "ms a token, dense", ".1f"),
    ("speedup", "speed over dense", ".2f"),
    ("speedup_over_dense_rows", "over dense with our products", ".2f"),
    ("memory", "cache bytes over dense", ".3f"),
    ("packed_prefill_s", "prefill s, packed", ".1f"),
    ("dense_prefill_s", "prefill s, dense", ".1f"),
    ("packed_compile_s", "compile s, packed", ".0f"),
    ("dense_compile_s", "compile s, dense", ".0f"),
]
_FIRST_TOKEN = [
    ("name", "", ""),
    ("empty_caches_s", "seconds, empty caches", ".1f"),
    ("warm_caches_s", "seconds, warm caches", ".1f"),
]
_STEP_PROFILE = [
    ("context", "tokens in the cache", ",d"),
    *((part, f"{part}, ms", ".2f") for part in ("weights", "attention", "append", "framework", "generate")),
]
_PEERS = [("name", "", ""), ("weights", "weights", ""), ("cache", "cache", "")]
_CONTEXTS = (256, 1024, 4096, 8000)
_GENERATE_PEERS = [
    *_PEERS,
    *((f"ms_{context}", f"ms at {context:,}", ".1f") for context in _CONTEXTS),
    ("increase_ms", "increase", ".1f"),
    *((f"prefill_tokens_s_{context}", f"prefill tokens/s, {context:,}", ".0f") for context in _CONTEXTS),
    *((f"peak_mb_{context}", f"peak MB, {context:,}", ",d") for context in (256, 8000)),
    ("same_8000", "same tokens at 8,000", ".0%"),
    ("read_gb_s", "GB/s before", ".0f"),
    ("date", "date", ""),
]
_ATTENTION = [
    ("batch", "batch", ""),
    ("heads_dim", "heads", ""),
    ("length", "tokens", ",d"),
    *((f"{bits}_us", f"µs, {bits[:2].upper()} {bits[2:].upper()}", ",.0f") for bits in ("k4v2", "k3v3", "k4v4")),
    ("bf16_us", "torch bf16", ",.0f"),
    ("fp32_us", "torch fp32", ",.0f"),
    ("flex_us", "flex bf16", ",.0f"),
    ("onnxruntime_us", "onnxruntime", ",.0f"),
    *((f"{bits}_over_bf16", f"{bits[:2].upper()} {bits[2:].upper()} over bf16", ".1f") for bits in ("k4v2", "k4v4")),
    *((f"{bits}_of_floor", f"{bits[:2].upper()} {bits[2:].upper()} of floor", ".2f") for bits in ("k4v2", "k4v4")),
]
_BITS = ("k4v2", "k3v3", "k4v4", "k5v5", "k6v6", "k7v7", "k8v8")
_MODELS = [
    ("model", "architecture", ""),
    ("attention", "attention", ""),
    ("result", "result", ""),
    ("sites", "attentions of a step", ""),
    ("packed", "packed", ""),
    ("error", "error of the logits", ".2g"),
    ("why", "why not more", ""),
]
_DIFFUSION = [
    ("who", "by", ""),
    ("method", "method", ""),
    ("setting", "set to", ""),
    ("attention", "attention left", ".0%"),
    ("total", "all operations left", ".1%"),
    ("seconds", "seconds", ".2f"),
    ("psnr_db", "PSNR, dB", ".1f"),
    ("right", "taken for what was asked", ".0%"),
]
_LEVELS = [
    ("heads_dim", "heads", ""),
    ("length", "tokens", ",d"),
    *((f"{bits}_us", f"µs, {bits[:2].upper()} {bits[2:].upper()}", ",.0f") for bits in _BITS),
    *((f"{bits}_ratio", f"{bits[:2].upper()} {bits[2:].upper()}, AVX2 over it", ".1f") for bits in _BITS),
]
_PLUGINS = [
    ("model", "model", ""),
    ("setting", "cache", ""),
    ("bits_4096", "bits at 4,096", ".2f"),
    ("kl_mean", "KL mean", ".4f"),
    ("kl_p99", "99 %", ".2f"),
    ("perplexity_increase", "perplexity", "+.1%"),
    ("numbers_nll", "NLL of hidden numbers", ".3f"),
    ("numbers_found", "found of 16", ""),
]
_GROUPED = [
    ("what", "what", ""),
    ("shape", "shape", ""),
    ("setting", "cache", ""),
    ("us", "µs", ",.0f"),
    ("us_uniform_4_bits", "µs, all at 4 bits", ",.0f"),
    ("ratio", "ratio", ".2f"),
    ("bytes_ratio", "bytes, float32 window", ".3f"),
    ("mean_ms", "mean ms", ".2f"),
    ("median_ms", "median ms", ".2f"),
    ("slowest_ms", "slowest ms", ".1f"),
    ("ratio_of_means", "ratio of means", ".3f"),
]

_TQAI_NMSE = [
    ("made_by", "by", ""),
    ("configuration", "configuration", ""),
    ("published", "published", ".6f"),
    ("nmse", "here", ".6f"),
    ("off_percent", "off, %", "+.1f"),
    *(
        (name, name, ".4f")
        for name in ("Qwen 0.5B", "Qwen 3B", "Qwen 7B", "Gemma 2B", "Gemma 7B", "Llama 8B", "WAN 5B")
    ),
]
_CODEBOOKS = [
    ("model", "model", ""),
    ("of", "of", ""),
    ("bits", "bits", ""),
    ("solver", "solver", ""),
    ("train_error", "error, first half", ".4f"),
    ("error", "second half", ".4f"),
    ("attention_kl", "KL of attention", ".4f"),
]
_TOKEN_DIFFERENCES = [
    ("configuration", "", ""),
    ("order_none", "coded as it is", ".4f"),
    ("order_1", "delta", ".4f"),
    ("order_2", "delta2", ".4f"),
]


@dataclass(frozen=True)
class Table:
    """How a result file is shown: columns are (field of a row, heading, format), rows those that `shows` wants; with
    the file's notes or without."""

    title: str
    columns: Columns
    shows: Callable[[dict[str, Any]], bool] = lambda row: True
    notes: bool = True


RESULTS_PAGE = "docs/results.md"
# The tables of each document in their order, by result file. A result that none names is in docs/results.md, with all
# its fields; README.md shows excerpts, and no other table stands in two documents.
DOCUMENTS: dict[str, dict[str, Table]] = {
    "README.md": {
        "quality": Table(
            "Quality, SmolLM2-135M-Instruct",
            _QUALITY_SHORT,
            lambda row: row["kind"] != "peer" or row["name"] in QUALITY_PEERS,
            notes=False,
        ),
        "generate": Table(
            "Decoding on the CPU, SmolLM2-135M, float32, default preset, against Inductor with a dense cache",
            _GENERATE_SHORT,
            notes=False,
        ),
    },
    RESULTS_PAGE: {
        "quality": Table("Quality, SmolLM2-135M-Instruct", _QUALITY),
        "quality_stress": Table("Quality on real models, as they are and with hard keys", _STRESS),
        "generate": Table("Decoding, float32, default preset, against Inductor with a dense DynamicCache", _GENERATE),
        "generate_peers": Table("Decoding, beside others on the CPU", _GENERATE_PEERS),
        "first_token": Table("From the command `tqc run` to its first token", _FIRST_TOKEN),
        "codebooks": Table("Solvers of codebooks on keys and values of real models", _CODEBOOKS),
        "attention": Table("Decode attention, the least time of a call", _ATTENTION),
    },
    "docs/models.md": {
        "models": Table(
            "What a decoding step packs", _MODELS, lambda row: row["result"] not in ("not built", "dense run failed")
        ),
    },
    "docs/diffusion.md": {
        "diffusion": Table("Strategies, searched plans and diffusers' own caches", _DIFFUSION),
    },
    "docs/tqai.md": {
        "tqai_nmse": Table("Mean relative squared error of random states that change little", _TQAI_NMSE),
        "token_differences": Table("Differences between tokens of a text", _TOKEN_DIFFERENCES),
    },
    "docs/plugins.md": {
        "plugins": Table("Scorers and strategies, losers included", _PLUGINS),
        "grouped": Table("What groups cost and gain on the CPU", _GROUPED),
    },
    "docs/performance.md": {
        "step_profile": Table("Where a decode step's time goes", _STEP_PROFILE),
        "levels": Table("Decode attention with AVX-512, and with AVX2 on the same processor", _LEVELS),
    },
}
RESULTS_HEAD = """# Results

<!-- Written by benchmarks/readme.py from benchmarks/results/*.json: change those, not this file. -->

Below each table stands the command that made it, with the day, the machine and the versions. Two more tables are in
[performance.md](performance.md), which says where time and memory go: the parts of a decode step, and AVX2 beside
AVX-512."""


def results() -> list[dict[str, Any]]:
    """All result files by name.

    Raises:
        ValueError: if a file lacks a field of the common frame (`benchmarks/envelope.py`).
    """
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        if not isinstance(result, dict) or (lacking := [field for field in FIELDS if field not in result]):
            raise ValueError(
                f"{path.relative_to(ROOT)} lacks {', '.join(lacking)}: write it with benchmarks/envelope.py"
            )
        found.append(result)
    return found


def all_fields(result: dict[str, Any]) -> Table:
    """The table of a result file that no document names."""
    rows = result["rows"]
    fields = dict.fromkeys(field for row in rows for field, value in row.items() if not isinstance(value, (dict, list)))
    return Table(
        result["name"].replace("_", " ").capitalize(), [(field, field.replace("_", " "), "") for field in fields]
    )


def section(result: dict[str, Any], table: Table, title: str = "**{}**") -> str:
    """Title, table and provenance of one result file, as Markdown; columns that no row has are left out."""
    columns = [column for column in table.columns if any(column[0] in row for row in result["rows"])]
    lines = [title.format(table.title), "", _line(heading for _, heading, _ in columns), _line("---" for _ in columns)]
    for row in filter(table.shows, result["rows"]):
        cells = [_cell(row.get(field), spec) for field, _, spec in columns]
        if row.get("reason"):
            cells = [cells[0], row["reason"], *([""] * (len(columns) - 2))]
        lines.append(_line(cells))
    machine = ", ".join(
        f"{name} {value}" if name != "processor" else value for name, value in _items(result["hardware"])
    )
    packages = ", ".join(f"{name} {version}" for name, version in _items(result["versions"]))
    lines += ["", f"`{result['command']}`, {result['date']}; {machine}; {packages}."]
    return "\n".join([*lines, *(result["notes"] if table.notes else ())])


def _items(fields: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name.replace("_", " "), str(value)) for name, value in fields.items()]


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Any, spec: str) -> str:
    if value is None or value == "":
        return ""
    if isinstance(value, float) and not spec:
        spec = ".3g"
    return format(value, spec) if isinstance(value, (int, float)) else str(value)


def render(document: str, text: str) -> str:
    """`text` of the document with current tables.

    Raises:
        ValueError: if it does not have the markers of its tables.
    """
    found, known = {result["name"]: result for result in results()}, DOCUMENTS[document]
    if document == RESULTS_PAGE:
        return _results_page(found)
    marked = [name for _, name, _ in BLOCK.findall(text)]
    if sorted(marked) != sorted(known):
        raise ValueError(
            f"{document} must have <!-- results:begin NAME --> ... <!-- results:end --> once for each of "
            f"{', '.join(known)}; it has {', '.join(marked) or 'none'}"
        )

    def filled(block: re.Match[str]) -> str:
        begin, name, end = block.groups()
        return f"{begin}{section(found[name], known[name]) if name in found else 'Not measured yet.'}\n{end}"

    return BLOCK.sub(filled, text)


def _results_page(found: dict[str, dict[str, Any]]) -> str:
    named = set().union(*DOCUMENTS.values())
    tables = {name: table for name, table in DOCUMENTS[RESULTS_PAGE].items() if name in found}
    tables |= {name: all_fields(result) for name, result in found.items() if name not in named}
    parts = [RESULTS_HEAD]
    for name, table in tables.items():
        parts.append(section(found[name], table, "## {}"))
        if (RESULTS / f"{name}.png").exists():
            parts.append(f"![{table.title}](../benchmarks/results/{name}.png)")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    for document in DOCUMENTS:
        path = ROOT / document
        text = path.read_text() if path.exists() else ""
        try:
            current = render(document, text)
        except ValueError as error:
            sys.exit(str(error))
        if check and current != text:
            sys.exit(f"{document} is not what benchmarks/results gives: run python benchmarks/readme.py")
        if not check:
            path.write_text(current)


if __name__ == "__main__":
    main()
