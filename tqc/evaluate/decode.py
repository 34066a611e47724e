"""Decode a text through several caches in step, with the dense one, and compare what they predict.

Teacher forcing in chunks: all positions p of a chunk have the same `packed_tokens(p)`, so that one call on the chunk
shows each of them the cache that decoding token by token would: the same packed tokens, everything later as it came.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tqc.cache.io import cache_bytes
from tqc.cache.packed_tensor import PackedTensor
from tqc.cache.storage import Appending, Storage
from tqc.config import Config
from tqc.format import PAGE_TOKENS, PackedFormat

# Where no cache packs anything, the text starts with a prefill of this many tokens. Caches of transformers quantize
# what came in 128 tokens at a time: with chunks of 32 behind it they do so at the end of a chunk, as token by token.
PREFILL_TOKENS = 128
# All-in bits are compared at this length, in bfloat16.
BITS_LENGTH = 4096


@dataclass
class Decoder:
    """A way to decode: what is called, and the cache that it gets.

    Attributes:
        run: called as `run(input_ids, past_key_values=cache, use_cache=True)`; returns an object with `logits`.
        new_cache: makes an empty cache.
        formats: of the packed tensors in the cache; they say which positions see equally much of it packed.
        optional: whether the others go on without it where it raises.
        held: the cache as one of transformers.
    """

    name: str
    run: Callable[..., Any]
    new_cache: Callable[[], Any]
    formats: tuple[PackedFormat, ...] = ()
    optional: bool = False
    held: Callable[[Any], Any] = lambda cache: cache

    def __post_init__(self) -> None:
        self.cache = self.new_cache()

    def restart(self) -> None:
        self.cache = self.new_cache()

    def append(self, ids: Tensor, **options: Any) -> Tensor:
        """Append `ids` [1, n] to the cache: logits of the next tokens, [n, vocabulary]."""
        return self.run(ids, past_key_values=self.cache, use_cache=True, **options).logits[0]

    def step(self, ids: Tensor) -> Tensor:
        """Append `ids` [1, n] to the cache: next-token log-probabilities, float32 [n, vocabulary]."""
        return self.append(ids).float().log_softmax(-1)


@dataclass
class Scores:
    """What one decoder predicted at each scored position, on the CPU.

    Attributes:
        kl: KL(dense || this) of the next-token distributions in nats, float32 [n].
        nll: -log probability of the token that follows, float32 [n] (one less where the text ends).
        same: whether the most likely token is the dense one, bool [n].
    """

    kl: list[Tensor] = field(default_factory=list)
    nll: list[Tensor] = field(default_factory=list)
    same: list[Tensor] = field(default_factory=list)

    def add(self, log_p: Tensor, log_q: Tensor, following: Tensor) -> None:
        """Score `log_q` against the dense `log_p`, both [n, vocabulary]; `following` are the next tokens, [<= n]."""
        self.kl.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0).cpu())
        self.nll.append(-log_q[: len(following)].gather(1, following[:, None])[:, 0].cpu())
        self.same.append((log_p.argmax(-1) == log_q.argmax(-1)).cpu())

    def summary(self) -> dict[str, float]:
        kl = torch.cat(self.kl)
        return {
            "perplexity": math.exp(torch.cat(self.nll).mean().item()),
            "kl_mean": kl.mean().item(),
            "kl_median": kl.median().item(),
            "kl_p99": kl.quantile(0.99).item(),
            "top1_agreement": torch.cat(self.same).float().mean().item(),
        }


def chunks(
    tokens: int, formats: Sequence[PackedFormat], largest: int = PAGE_TOKENS, begin: int = 0
) -> Iterator[tuple[int, int]]:
    """Begin and end of the chunks of a text of `tokens` tokens, such that in each of them `packed_tokens(position)` is
    constant for all `formats`. Chunks have up to `largest` tokens; one at 0, which sees nothing packed, may have more.

    Args:
        begin: how many tokens of the text were decoded before.
    """
    while begin < tokens:
        if begin:
            limit = min(tokens, begin + largest)
        else:
            limit = tokens if formats else min(tokens, PREFILL_TOKENS)
        end = begin + 1
        while end < limit and all(fmt.packed_tokens(end) == fmt.packed_tokens(begin) for fmt in formats):
            end += 1
        yield begin, end
        begin = end


def decode_in_step(
    dense: Decoder,
    others: Sequence[Decoder],
    ids: Tensor,
    score_from: int,
    on_step: Callable[[str], None],
    failed: dict[str, str],
    largest: int = PAGE_TOKENS,
) -> dict[str, Scores]:
    """Feed `ids` [1, tokens] to all decoders chunk by chunk, so that no more than a chunk of predictions is ever held.

    Args:
        score_from: first position whose prediction is scored.
        failed: optional decoders that raise are left out from there on, and are entered here with the reason.

    Returns:
        Scores by decoder name; the dense decoder's are those against itself.
    """
    tokens = ids.shape[1]
    for decoder in (dense, *others):
        decoder.restart()
    scores = {decoder.name: Scores() for decoder in (dense, *others)}
    formats = [fmt for decoder in (dense, *others) for fmt in decoder.formats]
    for begin, end in chunks(tokens, formats, largest):
        on_step(f"token {begin:,} of {tokens:,}")
        chunk = ids[:, begin:end]
        skipped = max(0, score_from - begin)
        following = ids[0, begin + skipped + 1 : end + 1]
        log_p = dense.step(chunk)[skipped:]
        for decoder in (dense, *others):
            if decoder.name in failed:
                continue
            try:
                log_q = log_p if decoder is dense else decoder.step(chunk)[skipped:]
            except Exception as error:
                if not decoder.optional:
                    raise
                failed[decoder.name] = first_line(error)
                continue
            if len(log_p):
                scores[decoder.name].add(log_p, log_q, following)
    return scores


def first_line(error: Exception) -> str:
    """An error as the reason why a cache is left out."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"


@dataclass(frozen=True)
class LayerShape:
    """Heads and head_dims of one layer's keys and values, whether they are packed, the layer's number, and query heads
    to a head where its tokens are scored."""

    heads: int
    k_head_dim: int
    v_head_dim: int
    packed: bool
    number: int = 0
    repeats: int | None = None

    @property
    def elements(self) -> int:
        return self.heads * (self.k_head_dim + self.v_head_dim)


def layer_shapes(cache: Any) -> list[LayerShape]:
    """Shapes of the layers of a cache that holds something."""
    return [
        LayerShape(
            *(keys.shape[1], keys.shape[3], values.shape[3]),
            isinstance(keys, PackedTensor),
            number,
            keys.fmt.groups.repeats if isinstance(keys, PackedTensor) and keys.fmt.groups else None,
        )
        for number, keys, values in _states(cache)
    ]


def elements(cache: Any) -> int:
    """How many numbers a cache stands for, keys and values."""
    return sum(keys.numel() + values.numel() for _, keys, values in _states(cache))


def _states(cache: Any) -> list[tuple[int, Tensor, Tensor]]:
    return [
        (number, layer.keys, layer.values)
        for number, layer in enumerate(cache.layers)
        if getattr(layer, "keys", None) is not None
    ]


def all_in_bits(config: Config, shapes: Sequence[LayerShape], length: int = BITS_LENGTH) -> float:
    """All-in bits per element of a bfloat16 cache that was filled token by token up to `length` tokens.

    Every byte counts: codes, scales, centres, sinks, window, state and spare capacity.
    """
    held, count = 0, 0
    for shape in shapes:
        count += length * shape.elements
        if not shape.packed:
            held += 2 * length * shape.elements
            continue
        head_dims = (shape.k_head_dim, shape.v_head_dim)
        own = config.of_layer(shape.number, shape.heads, *head_dims)
        for fmt in own.formats(*head_dims, repeats=shape.repeats):
            storage = Storage.allocate(1, shape.heads, fmt, torch.bfloat16, torch.device("cpu"), 1)
            for tokens in range(1, length + 1):
                storage.reserve(tokens)
                with Appending((storage,), (1,)):
                    pass
            held += storage.nbytes
    return held * 8 / count


def measured_bits(new_cache: Callable[[], Any], shape: LayerShape, length: int = BITS_LENGTH) -> float:
    """All-in bits per element of the first layer of a cache that gets half of `length` tokens at once and then one
    after the other, random in bfloat16."""
    cache, generator = new_cache(), torch.Generator().manual_seed(0)
    sizes = (shape.k_head_dim, shape.v_head_dim)
    states = [torch.randn(1, shape.heads, length, d, generator=generator).bfloat16() for d in sizes]
    half = length // 2
    for begin, end in ((0, half), *((t, t + 1) for t in range(half, length))):
        cache.update(states[0][:, :, begin:end], states[1][:, :, begin:end], 0)
    return cache_bytes(cache) * 8 / (length * shape.elements)
