"""Find the width that each layer's keys and values need: `tqc calibrate`.

A text is decoded in chunks by the dense model. What packing does to the older tokens is the change d of their keys or
values, by the format's own coding: sinks and recent tokens stay, and keys are balanced as the product balances them.
Its effect on a prediction is KL = E_y[(g . d)^2] / 2 to second order, g being the gradient of log p(y) with respect to
these keys or values and y a token drawn from the prediction itself (Gauss-Newton: the Fisher information). With an
independent y at each position of a chunk, one gradient of the sum of all log p(y) stands for the chunk: products of
different positions are zero on average.

g . d is summed over a head's tokens before it is squared. The squares of single tokens vary less, but they leave out
that errors of one head agree: against the KL that each layer's keys or values cause alone when they are packed
(SmolLM2, 2 bits), they rank with .88 (V alone: .75), these with .97. Tokens of the text in place of drawn ones: .90.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tqc.cache.packed_tensor import PackedTensor
from tqc.format import PackedFormat
from tqc.format.quantizer import decode_pages, decoded, encode_pages
from tqc.widths import MAX_WIDTH, Widths

WIDTHS = (2, 3, 4)
BUDGET_BITS = 2.75
TOKENS = 768
# The text before them is only read; from there on predictions count.
PREFILL_TOKENS = 256
CHUNK_TOKENS = 64
# Gradients of each chunk, each with tokens of its own.
DRAWS = 4
_PROMPT: dict[str, Any] = {"provider": "reference", "rest": "eager"}


@dataclass
class _Side:
    """Keys or values of a layer: how they are packed, and what that has done to them so far.

    Attributes:
        fmt: of any width.
        head: rows of centre and balance, [1, heads, head_rows, head_dim].
        waiting: tokens that came and were not packed yet, from the first sink or page on.
        changes: by width, of all packed tokens, [heads, tokens, head_dim].
        errors: by width, [heads], float64 on the CPU.
    """

    fmt: PackedFormat
    head: Tensor
    waiting: list[Tensor] = field(default_factory=list)
    changes: dict[int, Tensor] = field(default_factory=dict)
    errors: dict[int, Tensor] = field(default_factory=dict)

    def pack(self, length: int, widths: Sequence[int]) -> None:
        """Note what packing does to the tokens that are packed when there are `length`."""
        x = torch.cat(self.waiting, dim=2)
        done = next(iter(self.changes.values())).shape[1] if self.changes else 0
        if not self.changes:
            x = x[:, :, self.fmt.sink_tokens :]
        count = self.fmt.packed_tokens(length) - done
        for width in widths:
            fmt = PackedFormat(
                self.fmt.head_dim, width, self.fmt.centred, rotation=self.fmt.rotation, seed=self.fmt.seed
            )
            old = x[:, :, :count]
            new = decoded(decode_pages(encode_pages(old, self.head, fmt), self.head, fmt), self.head, fmt)
            change = (new - old.float())[0].to(x.dtype)
            self.changes[width] = torch.cat([self.changes[width], change], dim=1) if done else change
        self.waiting = [x[:, :, count:]]

    def add(self, gradient: Tensor, begin: int, weight: float) -> None:
        """Add the errors of one gradient [1, heads, n, head_dim], that of the last n of `begin` tokens."""
        first = begin - gradient.shape[2] - self.fmt.sink_tokens
        skipped = max(0, first)
        for width, change in self.changes.items():
            held = max(0, change.shape[1] - skipped)  # a short sliding window holds no packed token
            g = gradient[0, :, skipped - first :][:, :held].float()
            moved = (g * change[:, skipped:].float()).sum((1, 2)).double().cpu()
            self.errors[width] = self.errors.get(width, torch.zeros_like(moved)) + weight * moved.square() / 2


def default_text() -> str:
    """English text that every Python carries, and `tqc eval` does not decode."""
    import heapq

    return getattr(heapq, "__about__", "")


def calibrate(
    model: Any,
    tokenizer: Any,
    budget_bits: float = BUDGET_BITS,
    widths: Sequence[int] = WIDTHS,
    text: str | None = None,
    tokens: int = TOKENS,
    name: str = "",
    on_progress: Callable[[int, int], None] | None = None,
) -> Widths:
    """Widths of least expected error within a budget, from forward and backward passes of a text.

    Beside the model it takes the memory of a chunk's activations and logits, and of `len(widths) + 3` caches.

    Args:
        model: a causal language model of transformers, as it was loaded (not compiled).
        budget_bits: code bits of an element, the mean over layers of (K + V) / 2.
        widths: those to choose from.
        text: `default_text()` if None; not what the result is measured on.
        tokens: how many tokens of it, fewer if it is shorter.
        name: of the model, for the file.
        on_progress: called with the tokens that are done and their number.

    Raises:
        ValueError: for widths or a budget that cannot be, a text that is too short, a compiled model, or one of which
            nothing is packed.
    """
    widths = sorted(set(widths))
    if not widths or not 1 <= widths[0] <= widths[-1] <= MAX_WIDTH:
        raise ValueError(f"widths must be 1 to {MAX_WIDTH}; got {widths}")
    if not budget_bits >= widths[0]:
        raise ValueError(f"budget_bits must be at least {widths[0]}, the least of the widths; got {budget_bits}")
    if getattr(model, "_compiled_call_impl", None) is not None or hasattr(model, "_orig_mod"):
        raise ValueError("model is compiled already: give it as it was loaded")
    text = default_text() if text is None else text
    ids = tokenizer(text[: 16 * tokens], return_tensors="pt").input_ids[:, :tokens].to(model.device)
    if ids.shape[1] <= PREFILL_TOKENS:
        raise ValueError(f"at least {PREFILL_TOKENS + 1} tokens are needed; the text has {ids.shape[1]}")
    report = on_progress or (lambda done, count: None)
    report(0, ids.shape[1])
    sides = _sides(model, ids[:, :PREFILL_TOKENS])
    if not sides:
        raise ValueError("no layer's cache is packed, so there are no widths to choose; tqc.explain says why")
    with _without_gradients(model):
        _measure(model, ids, sides, widths, report)
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", "")
    about = {
        "model": name or Path(str(getattr(model.config, "name_or_path", ""))).name,
        "architecture": type(model).__name__,
        "layers": str(layers),
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "tokens": str(ids.shape[1]),
        "tqc": importlib.metadata.version("tqai-compiler"),
    }
    return _as_widths(sides, widths, about).solved(budget_bits)


def _sides(model: Any, ids: Tensor) -> dict[int, tuple[_Side, _Side]]:
    """The packed layers by number, as the compiled model packs them in a prompt."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        torch.compile(model, backend="tqai", options=_PROMPT)(ids, past_key_values=cache, use_cache=True)
    found = {}
    for number, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if isinstance(keys, PackedTensor) and isinstance(values, PackedTensor):
            found[number] = (_side(keys), _side(values))
    return found


def _side(packed: PackedTensor) -> _Side:
    return _Side(packed.fmt, packed.fmt.head(packed.packed_storage.dense).clone())


def _measure(
    model: Any,
    ids: Tensor,
    sides: dict[int, tuple[_Side, _Side]],
    widths: Sequence[int],
    report: Callable[[int, int], None],
) -> None:
    from transformers import DynamicCache

    class Recording(DynamicCache):
        """Hands on what each layer gets; a sliding layer drops what it does not need, and a prompt is long."""

        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            for side, new in zip(sides.get(layer_idx, ()), (key_states, value_states), strict=False):
                side.waiting.append(new.detach())
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    cache = Recording(config=model.config)
    generator = torch.Generator(ids.device).manual_seed(0)
    tokens = ids.shape[1]
    for begin in range(0, tokens, CHUNK_TOKENS):
        chunk = ids[:, begin : begin + CHUNK_TOKENS]
        counts = begin >= PREFILL_TOKENS
        past = _as_leaves(cache, sides) if counts else []
        with torch.set_grad_enabled(counts):
            log_p = model(chunk, past_key_values=cache, use_cache=True).logits[0].float().log_softmax(-1)
            for side in (side for pair in sides.values() for side in pair if counts):
                # The chunk's own tokens wait at the end already: they are never packed yet.
                side.pack(begin, widths)
            for draw in range(DRAWS if counts else 0):
                drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
                loss = log_p.gather(1, drawn).sum()
                gradients = torch.autograd.grad(loss, past, retain_graph=draw < DRAWS - 1, allow_unused=True)
                flat = [side for pair in sides.values() for side in pair]
                for side, gradient, leaf in zip(flat, gradients, past, strict=True):
                    found = torch.zeros_like(leaf) if gradient is None else gradient
                    side.add(found, begin, 1 / (DRAWS * (tokens - PREFILL_TOKENS)))
        _as_leaves(cache, sides, False)
        report(min(begin + CHUNK_TOKENS, tokens), tokens)


def _as_leaves(cache: Any, sides: dict[int, Any], gradients: bool = True) -> list[Tensor]:
    """Cut the cache off from what computed it; its keys and values, layer by layer."""
    leaves = []
    for number in sides:
        layer = cache.layers[number]
        layer.keys, layer.values = (x.detach().requires_grad_(gradients) for x in (layer.keys, layer.values))
        leaves += [layer.keys, layer.values]
    return leaves


@contextlib.contextmanager
def _without_gradients(model: Any) -> Iterator[None]:
    """No parameter of the model wants a gradient meanwhile."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def _as_widths(sides: dict[int, tuple[_Side, _Side]], widths: Sequence[int], about: dict[str, str]) -> Widths:
    """The errors, with no widths chosen yet."""
    errors = [[torch.stack([side.errors[width] for width in widths], 1) for side in pair] for pair in sides.values()]
    heads = max(len(keys) for keys, _ in errors)
    padded = torch.zeros(2, len(sides), heads, len(widths))
    shapes = []
    for row, (number, pair) in enumerate(sides.items()):
        for side, found in enumerate(errors[row]):
            padded[side, row, : len(found)] = found
        shapes.append([number, len(errors[row][0]), *(side.fmt.head_dim for side in pair)])
    none = torch.zeros(len(sides), heads, dtype=torch.int8)
    tried = torch.tensor(widths, dtype=torch.int8)
    return Widths(none, none, torch.tensor(shapes, dtype=torch.int32), tried, padded[0], padded[1], about)
