"""What the command line does with a model: compile it, generate with clocks, compare two runs."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WARM_UP_TOKENS = 4


@dataclass
class Generation:
    """One greedy continuation and what it took.

    Attributes:
        tokens: generated ones, without the prompt.
        first_token_s: from the call to the first token, compilation included.
        total_s: from the call to the last token.
        tokens_per_s: 1 / the median time of a token after the first, so that compiling between two tokens does not
            count; None if there is only one.
        cache_bytes: every byte that the cache holds at the end.
        logits: float32 [len(tokens), vocabulary].
        watched: what the option `monitor` saw; None without it.
    """

    tokens: list[int]
    text: str
    prompt_tokens: int
    first_token_s: float
    total_s: float
    tokens_per_s: float | None
    cache_bytes: int
    logits: Tensor
    watched: str | None = None

    @classmethod
    def of(
        cls,
        tokens: list[int],
        tokenizer: Any,
        prompt_tokens: int,
        start: float,
        times: list[float],
        cache: Any,
        logits: Sequence[Tensor],
    ) -> Generation:
        """From when the call began and each token came, in seconds, and each token's logits, [1, vocabulary]."""
        import tqc

        steps = [after - before for before, after in itertools.pairwise(times)]
        return cls(
            tokens=tokens,
            text=tokenizer.decode(tokens, skip_special_tokens=True).strip(),
            prompt_tokens=prompt_tokens,
            first_token_s=times[0] - start,
            total_s=times[-1] - start,
            tokens_per_s=1 / statistics.median(steps) if steps else None,
            cache_bytes=tqc.cache_bytes(cache),
            logits=torch.cat(list(logits)).float(),
            watched=_watched(cache),
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": len(self.tokens),
            "first_token_s": self.first_token_s,
            "total_s": self.total_s,
            "tokens_per_s": self.tokens_per_s,
            "cache_bytes": self.cache_bytes,
            **({"monitor": self.watched} if self.watched else {}),
        }


def _watched(cache: Any) -> str | None:
    import tqc

    try:
        return str(tqc.monitor(cache))
    except ValueError:  # nothing watched it
        return None


@dataclass
class Comparison:
    """A dense and a compressed run of one prompt, and a third that decodes the dense run's tokens compressed.

    Attributes:
        dense, compressed: free-running.
        dtype_bytes: bytes of one element of the dense cache.
        cache_bytes: of the compressed cache with the dense run's tokens in it.
        kl: mean KL divergence in nats of the third run's next-token distributions from the dense run's.
        same_next: at how many steps these have the same most likely token.
        same_prefix: how many tokens the two free-running texts have in common from the start.
    """

    dense: Generation
    compressed: Generation
    dtype_bytes: int
    cache_bytes: int
    kl: float
    same_next: int
    same_prefix: int

    @classmethod
    def of(cls, dense: Generation, compressed: Generation, forced: Generation, dtype_bytes: int) -> Comparison:
        """From the two free-running ones, and the dense run's tokens decoded compressed."""
        return cls(
            dense=dense,
            compressed=compressed,
            dtype_bytes=dtype_bytes,
            cache_bytes=forced.cache_bytes,
            kl=mean_kl(dense.logits, forced.logits),
            same_next=int((dense.logits.argmax(-1) == forced.logits.argmax(-1)).sum()),
            same_prefix=common_prefix(dense.tokens, compressed.tokens),
        )

    @property
    def cache_ratio(self) -> float:
        return self.dense.cache_bytes / self.cache_bytes

    @property
    def bits_per_element(self) -> float:
        """Every byte that the compressed cache holds, over the elements that it stands for."""
        return 8 * self.dtype_bytes / self.cache_ratio

    def to_dict(self) -> dict[str, Any]:
        return {
            "dense": self.dense.to_dict(),
            "compressed": self.compressed.to_dict(),
            "compressed_cache_bytes": self.cache_bytes,
            "cache_ratio": self.cache_ratio,
            "bits_per_element": self.bits_per_element,
            "kl_nats": self.kl,
            "same_next_tokens": self.same_next,
            "same_prefix_tokens": self.same_prefix,
            "compared_tokens": len(self.dense.tokens),
        }


def compile_model(model: Any, options: dict[str, Any] | None) -> None:
    """Compile `model` in place: with a packed cache, or for `options=None` dense with Inductor."""
    if options is None:
        model.compile(backend="inductor", dynamic=True)
    else:
        model.compile(backend="tqai", options=options)


def generate(
    model: Any,
    tokenizer: Any,
    inputs: dict[str, Tensor],
    max_tokens: int,
    on_text: Callable[[str], None] | None = None,
    forced: list[int] | None = None,
    cache: Any = None,
) -> Generation:
    """Continue `inputs` greedily.

    Args:
        cache: a transformers cache that holds the start of `inputs`; a new `DynamicCache` if absent.
        on_text: called with each piece of text as it comes.
        forced: tokens to take instead of the most likely ones, one a step; they end the run.
    """
    clock = _clock(tokenizer, on_text)
    extra: dict[str, Any] = {}
    if forced is not None:
        extra["logits_processor"] = [_Forced(forced, inputs["input_ids"].shape[1])]
        max_tokens = len(forced)
    start = time.perf_counter()
    result = model.generate(
        **inputs,
        max_new_tokens=max_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=_pad_token(tokenizer),
        streamer=clock,
        return_dict_in_generate=True,
        output_logits=True,
        past_key_values=cache,
        **extra,
    )
    tokens = result.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    prompt_tokens, cache = inputs["input_ids"].shape[1], result.past_key_values
    return Generation.of(tokens, tokenizer, prompt_tokens, start, clock.times, cache, result.logits)


def compare(
    model: Any,
    tokenizer: Any,
    inputs: dict[str, Tensor],
    max_tokens: int,
    options: dict[str, Any],
    on_step: Callable[[str], None],
) -> Comparison:
    """Run `inputs` dense and compressed; each is compiled and warmed up before its clock counts.

    Args:
        options: of the backend, for the compressed run.
        on_step: called with the name of each step as it starts.
    """
    on_step("compiling the dense model")
    compile_model(model, None)
    generate(model, tokenizer, inputs, WARM_UP_TOKENS, cache=eager_prefill(model, inputs))
    on_step("generating with the dense cache")
    dense = generate(model, tokenizer, inputs, max_tokens, cache=eager_prefill(model, inputs))
    on_step("compiling the compressed model")
    torch.compiler.reset()
    compile_model(model, options)
    generate(model, tokenizer, inputs, WARM_UP_TOKENS)
    on_step("generating with the compressed cache")
    compressed = generate(model, tokenizer, inputs, max_tokens)
    on_step("decoding the dense run's tokens through the compressed cache")
    forced = generate(model, tokenizer, inputs, max_tokens, forced=dense.tokens)
    return Comparison.of(dense, compressed, forced, model.dtype.itemsize)


def eager_prefill(model: Any, inputs: dict[str, Tensor]) -> Any:
    """A dense cache of all tokens but the last, made without compiling: decoding alone is one graph, not three."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        if (start := inputs["input_ids"][:, :-1]).numel():
            model(input_ids=start, past_key_values=cache)
    return cache


def mean_kl(reference: Tensor, other: Tensor) -> float:
    """Mean over rows of KL(softmax(reference) || softmax(other)), in nats."""
    p, q = (torch.log_softmax(logits.double(), dim=-1) for logits in (reference, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many leading items two lists share."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count


class _Forced:
    """A logits processor that leaves one token per step."""

    def __init__(self, tokens: list[int], prompt_tokens: int) -> None:
        self.tokens = tokens
        self.prompt_tokens = prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self.tokens[input_ids.shape[1] - self.prompt_tokens]
        only = torch.full_like(scores, -torch.inf)
        only[:, token] = 0.0
        return only


def _clock(tokenizer: Any, on_text: Callable[[str], None] | None) -> Any:
    """A streamer that notes when each token came and hands on the text."""
    from transformers import TextStreamer

    class Clock(TextStreamer):
        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.times: list[float] = []

        def put(self, value: Tensor) -> None:
            if not self.next_tokens_are_prompt:
                self.times.append(time.perf_counter())
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if on_text is not None:
                on_text(text)

    return Clock()


def _pad_token(tokenizer: Any) -> int | None:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
