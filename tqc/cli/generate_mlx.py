"""What the command line does with a model of mlx-lm; the same functions as in `tqc.cli.generate`."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tqc.cli.generate import WARM_UP_TOKENS, Comparison, Generation, common_prefix, mean_kl


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
    import tqc

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
    steps = [after - before for before, after in itertools.pairwise(times)]
    return Generation(
        tokens=tokens,
        text=tokenizer.decode(tokens, skip_special_tokens=True).strip(),
        prompt_tokens=ids.shape[1],
        first_token_s=times[0] - start,
        total_s=times[-1] - start,
        tokens_per_s=1 / statistics.median(steps) if steps else None,
        cache_bytes=tqc.cache_bytes(cache),
        logits=torch.cat(logits),
    )


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
    dense = runs["dense"]
    return Comparison(
        dense=dense,
        compressed=runs["compressed"],
        dtype_bytes=model.dtype.itemsize,
        cache_bytes=forced.cache_bytes,
        kl=mean_kl(dense.logits, forced.logits),
        same_next=int((dense.logits.argmax(-1) == forced.logits.argmax(-1)).sum()),
        same_prefix=common_prefix(dense.tokens, runs["compressed"].tokens),
    )
