"""What the command line does with a model of mlx-lm; the same functions as in `tqc.cli.generate`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tqc.cli.generate import WARM_UP_TOKENS, Comparison, Generation


def compile_model(model: Any, options: dict[str, Any] | None) -> None:
    """Compile `model`, an `AsTorch`: with a packed cache, or for `options=None` with a dense one."""
    model.model = model.compiled({"preset": "off"} if options is None else options).model


def generate(
    model: Any,
    tokenizer: Any,
    inputs: dict[str, Tensor],
    max_tokens: int,
    on_text: Callable[[str], None] | None = None,
    forced: list[int] | None = None,
) -> Generation:
    """Continue `inputs` greedily, see `tqc.cli.generate.generate`."""
    cache, ids = model.new_cache(), inputs["input_ids"]
    stops = {tokenizer.eos_token_id}
    tokens: list[int] = []
    logits, times, shown = [], [], ""
    start = time.perf_counter()
    given = ids
    while len(tokens) < (max_tokens if forced is None else len(forced)):
        made = model(given, past_key_values=cache, logits_to_keep=1).logits[0, -1:].float()
        token = int(made.argmax()) if forced is None else forced[len(tokens)]
        times.append(time.perf_counter())
        tokens.append(token)
        logits.append(made)
        given = torch.tensor([[token]])
        if forced is None and token in stops:
            break
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        if on_text is not None and not text.endswith("\ufffd"):  # half a character
            on_text(text[len(shown) :])
            shown = text
    return Generation.of(tokens, tokenizer, ids.shape[1], start, times, cache, logits)


def compare(
    model: Any,
    tokenizer: Any,
    inputs: dict[str, Tensor],
    max_tokens: int,
    options: dict[str, Any],
    on_step: Callable[[str], None],
) -> Comparison:
    """Run `inputs` dense and compressed; each is compiled and warmed up before its clock counts."""
    runs = {}
    for name, given in (("dense", {"preset": "off"}), ("compressed", options)):
        on_step(f"compiling the {name} model")
        compiled = model.compiled(given)
        generate(compiled, tokenizer, inputs, WARM_UP_TOKENS)
        on_step(f"generating with the {name} cache")
        runs[name] = generate(compiled, tokenizer, inputs, max_tokens)
    on_step("decoding the dense run's tokens through the compressed cache")
    forced = generate(compiled, tokenizer, inputs, max_tokens, forced=runs["dense"].tokens)
    return Comparison.of(runs["dense"], runs["compressed"], forced, model.dtype.itemsize)
