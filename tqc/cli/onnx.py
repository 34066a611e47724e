"""What the command line does with ONNX files: write and check them, generate with them, show what they are."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqc.cli.inputs import BadInput

if TYPE_CHECKING:
    from rich.table import Table

CHECKED_PROMPT, CHECKED_STEPS = 128, 32


def is_exported(model: str | None) -> bool:
    """Whether `model` is a folder that `tqc export` wrote."""
    return model is not None and (Path(model) / "model.onnx").is_file()


def check(model: Any, folder: str, options: dict[str, Any] | None, max_cache_len: int) -> dict[str, Any]:
    """Differences between the exported model and torch's, on tokens drawn at random."""
    import torch

    from tqc.export.check import compare

    tokens = min(CHECKED_PROMPT + CHECKED_STEPS, max_cache_len)
    prompt = max(1, tokens - CHECKED_STEPS)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))
    return compare(model, folder, options, ids, prompt).to_dict()


def generate(folder: str, prompt: str, max_tokens: int, on_text: Any) -> dict[str, Any]:
    """Continue a prompt greedily by onnxruntime; as `Generation.to_dict`."""
    from tqc.export.generator import OnnxGenerator
    from tqc.export.metadata import ModelFileError

    try:
        generator = OnnxGenerator(folder)
        tokens = generator.chat(prompt)
        made: list[int] = []
        times: list[float] = []
        shown = 0

        def hear(step: list[int]) -> None:
            nonlocal shown
            times.append(time.perf_counter())
            made.append(step[0])
            text = generator.decode(made)
            if not text.endswith("\ufffd"):  # half of a character
                on_text(text[shown:])
                shown = len(text)

        start = time.perf_counter()
        result = generator.generate(tokens, max_tokens, on_token=hear)
    except (ModelFileError, ValueError) as error:
        raise BadInput(str(error)) from None
    steps = sorted(after - before for before, after in zip(times, times[1:], strict=False))
    return {
        "text": generator.decode(result).strip(),
        "prompt_tokens": len(tokens),
        "new_tokens": len(result),
        "first_token_s": times[0] - start,
        "total_s": times[-1] - start,
        "tokens_per_s": 1 / steps[len(steps) // 2] if steps else None,
        "cache_bytes": generator.cache_bytes,
    }


def describe(folder: str) -> dict[str, Any]:
    """What a file tells of itself, and its inputs."""
    from tqc.export.generator import OnnxGenerator
    from tqc.export.metadata import ModelFileError

    try:
        generator = OnnxGenerator(folder)
    except ModelFileError as error:
        raise BadInput(str(error)) from None
    inputs = {value.name: [value.type, *map(str, value.shape)] for value in generator.session.get_inputs()}
    return {**generator.metadata, "inputs": inputs, "cache_bytes": generator.cache_bytes}


def tables(facts: dict[str, Any]) -> list[Table]:
    from rich.table import Table

    about = Table("", "", title=facts["model"], show_header=False)
    for name in ("architecture", "dtype", "format_version", "tqc_version", "torch_version", "max_cache_len"):
        about.add_row(name.replace("_", " "), str(facts[name]))
    about.add_row("cache bytes a sequence", f"{facts['cache_bytes']:,}")
    caches = Table("cache", "format", title="caches")
    for cache in facts["packed"]:
        caches.add_row(cache["name"], cache["spec"])
    for cache in facts["dense"]:
        caches.add_row(cache["name"], f"dense {cache['dtype']}")
    inputs = Table("input", "type", "shape", title="inputs")
    for name, (kind, *shape) in facts["inputs"].items():
        inputs.add_row(name, kind, ", ".join(shape))
    return [about, caches, inputs]
