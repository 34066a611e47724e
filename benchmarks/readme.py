"""Put the tables of benchmarks/results/*.json into README.md, between its two markers.

python benchmarks/readme.py             write them
python benchmarks/readme.py --check     only say whether they are up to date (exit code 1 if not)
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
FIELDS = ("name", "command", "date", "hardware", "versions", "rows", "notes")

_QUALITY = [
    ("name", "cache", ""),
    ("bits_4096", "bits at 4,096 tokens", ".2f"),
    ("kl_mean", "KL mean", ".2g"),
    ("kl_p99", "KL 99 %", ".2g"),
    ("top1_agreement", "same top-1", ".1%"),
    ("perplexity", "perplexity", ".2f"),
    ("perplexity_increase", "increase", "+.1%"),
    ("passkeys_found", "passkeys of 5", ""),
]
_GENERATE = [
    ("context", "tokens in the cache", ",d"),
    ("packed_step_ms", "ms a token, packed", ".1f"),
    ("dense_step_ms", "ms a token, dense", ".1f"),
    ("speedup", "speed over dense", ".2f"),
    ("memory", "cache bytes over dense", ".3f"),
    ("packed_prefill_s", "prefill s, packed", ".1f"),
    ("dense_prefill_s", "prefill s, dense", ".1f"),
    ("packed_compile_s", "compile s, packed", ".0f"),
    ("dense_compile_s", "compile s, dense", ".0f"),
]
# Title and columns (field of a row, heading, format) of each result file, in the order of the README. Any other file
# is shown with all its fields, behind these.
TABLES: dict[str, tuple[str, list[tuple[str, str, str]]]] = {
    "quality": ("Quality, SmolLM2-135M-Instruct", _QUALITY),
    "generate": ("Decoding, float32, default preset, against Inductor with a dense DynamicCache", _GENERATE),
    "quality_biased_keys": ("Quality with a large bias in the keys, as Qwen2 models have", _QUALITY),
}


def results() -> list[dict[str, Any]]:
    """All result files, in the order of the README.

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
    order = list(TABLES)
    return sorted(found, key=lambda result: order.index(result["name"]) if result["name"] in order else len(order))


def section(result: dict[str, Any]) -> str:
    """Title, table and provenance of one result file, as Markdown."""
    rows = result["rows"]
    title = result["name"].replace("_", " ").capitalize()
    fields = dict.fromkeys(field for row in rows for field, value in row.items() if not isinstance(value, (dict, list)))
    columns = [(field, field.replace("_", " "), "") for field in fields]
    if result["name"] in TABLES:
        title, columns = TABLES[result["name"]]
    lines = [f"**{title}**", "", _line(heading for _, heading, _ in columns), _line("---" for _ in columns)]
    for row in rows:
        cells = [_cell(row.get(field), spec) for field, _, spec in columns]
        if row.get("reason"):
            cells = [cells[0], row["reason"], *([""] * (len(columns) - 2))]
        lines.append(_line(cells))
    machine = ", ".join(
        f"{name} {value}" if name != "processor" else value for name, value in _items(result["hardware"])
    )
    packages = ", ".join(f"{name} {version}" for name, version in _items(result["versions"]))
    lines += ["", f"`{result['command']}`, {result['date']}; {machine}; {packages}."]
    return "\n".join([*lines, *(f"{note}" for note in result["notes"])])


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


def render(text: str) -> str:
    """`text` of the README with current tables.

    Raises:
        ValueError: if it does not have both markers, in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md has no {BEGIN} ... {END}")
    tables = "\n\n".join(section(result) for result in results()) or "Not measured yet."
    return f"{before}{BEGIN}\n{tables}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    text = README.read_text()
    try:
        current = render(text)
    except ValueError as error:
        sys.exit(str(error))
    if check and current != text:
        sys.exit("the tables in README.md are not those of benchmarks/results: run python benchmarks/readme.py")
    if not check:
        README.write_text(current)


if __name__ == "__main__":
    main()
