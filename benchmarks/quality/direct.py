"""Decode through packed caches without the compiler: what a compiled graph calls, called by a model's attention.

A row of a table takes seconds, not minutes: nothing is traced, the dense model reads the text and the prompts once for
all rows, and the questions for hidden numbers are one batch. Kernels, scores, bytes and chunks are the product's own;
only who calls them differs, so that a row is that of `tqc eval` to the rounding of the rest of the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

from tqc import ops
from tqc.cache import packed_tensor
from tqc.config import Config
from tqc.evaluate.decode import LayerShape, Scores, all_in_bits, chunks
from tqc.evaluate.evaluation import default_text
from tqc.evaluate.needles import HiddenNumbers, hide_numbers
from tqc.execute.instructions import AttendExtend
from tqc.lowering.select import choose

SCORE_FROM = 256
# One call of attention: query, key, value, scale, and how many tokens see each other where the layer has a window.
Call = tuple[Tensor, Tensor, Tensor, float, int | None]


class Decoding:
    """A cache that the model's attention attends to and appends to while it is `now`.

    Attributes:
        layers: packed keys and values of each layer. Without any it is dense, for one call, which `calls` keeps.
    """

    now: Decoding | None = None

    def __init__(self, layers: dict[int, tuple[Tensor, Tensor]]) -> None:
        self.layers = layers
        self.calls: dict[int, Call] = {}

    def run(self, model: Any, ids: Tensor, begin: int) -> Tensor:
        """Hidden states [batch, n, hidden] of tokens from position `begin` on."""
        Decoding.now = self
        positions = torch.arange(begin, begin + ids.shape[1]).expand(ids.shape)
        return model.model(ids, position_ids=positions, use_cache=False).last_hidden_state


def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **more: Any) -> Any:
    now, number, window = Decoding.now, module.layer_idx, more.get("sliding_window")
    assert now
    if not now.layers:
        now.calls[number] = (query, key, value, scaling, window)
        seen = _mask(query.shape[2], key.shape[2], window)
        return scaled_dot_product_attention(query, key, value, seen, scale=scaling, enable_gqa=True).transpose(
            1, 2
        ), None
    keys, values = now.layers[number]
    seen = None if window is None else _mask(query.shape[2], keys.shape[2] + query.shape[2], window)
    provider, _ = choose(keys.fmt, values.fmt, query.dtype, "cpu")
    out, *held = AttendExtend(provider, scaling, 0.0, seen is None)(query, key, value, keys, values, seen, None)
    now.layers[number] = tuple(held)
    return out.transpose(1, 2), None


AttentionInterface.register("tqc_direct", attention)


def _mask(rows: int, columns: int, window: int | None) -> Tensor:
    """What each of the last `rows` of `columns` tokens sees, bool [rows, columns]."""
    row, column = torch.arange(columns - rows, columns)[:, None], torch.arange(columns)[None]
    return (column <= row) & (column > row - (window or columns))


def _packed(config: Config, number: int, call: Call, tokens: int) -> tuple[Tensor, Tensor]:
    """The first tokens of a prompt's call as they are packed."""
    query, key, value = (x[:, :, :tokens] for x in call[:3])
    keep = None if call[4] is None else call[4] - 1
    own = config.of_layer(number, key.shape[1], key.shape[3], value.shape[3])
    repeats = None if keep else query.shape[1] // key.shape[1]
    k_fmt, v_fmt = own.formats(key.shape[3], value.shape[3], keep, repeats)
    append, scored = choose(k_fmt, v_fmt, query.dtype, "cpu")[0].kernels.append, ()
    if k_fmt.groups:
        scored = ops.score(key, value, query, k_fmt.spec, scale=call[3])
    keys = packed_tensor.pack(key, k_fmt, append, query, scored)
    return keys, packed_tensor.pack(value, v_fmt, append, None, (scored[0], None) if scored else ())


class Bench:
    """A text and prompts with hidden numbers, read by the dense model once.

    Args:
        model: of transformers, as it was loaded; its attention is replaced.
        prompts: how many texts with eight numbers each.
    """

    def __init__(self, model: Any, tokenizer: Any, tokens: int, prompts: int) -> None:
        self.model = model
        model.set_attn_implementation("tqc_direct")
        text = default_text()
        self.ids = tokenizer(text[: 16 * tokens], return_tensors="pt").input_ids[:, :tokens]
        self.calls, hidden = self._prompt(self.ids)
        self.log_p = model.lm_head(hidden[0, SCORE_FROM:]).float().log_softmax(-1)
        likely = -self.log_p[:-1].gather(1, self.ids[0, SCORE_FROM + 1 :, None])
        self.perplexity = likely.mean().exp().item()
        self.hidden = [hide_numbers(tokenizer, text, tokens, seed=seed) for seed in range(prompts)]
        self.prompts = [self._prompt(numbers.context)[0] for numbers in self.hidden]

    def _prompt(self, ids: Tensor) -> tuple[dict[int, Call], Tensor]:
        decoding = Decoding({})
        hidden = decoding.run(self.model, ids, 0)
        return decoding.calls, hidden

    def row(self, config: Config) -> dict[str, Any]:
        """What one cache does: see `tqc.evaluate.evaluation.Row`."""
        scores = self._text(config).summary()
        found = [self._numbers(config, *part) for part in zip(self.hidden, self.prompts, strict=True)]
        shapes = [
            LayerShape(
                k.shape[1], k.shape[3], v.shape[3], True, number, q.shape[1] // k.shape[1] if w is None else None
            )
            for number, (q, k, v, _, w) in self.calls.items()
        ]
        return {
            "bits_4096": all_in_bits(config, shapes),
            "kl_mean": scores["kl_mean"],
            "kl_p99": scores["kl_p99"],
            "perplexity_increase": scores["perplexity"] / self.perplexity - 1,
            "numbers_nll": torch.cat([nll for nll, _ in found]).mean().item(),
            "numbers_found": sum(right for _, right in found),
        }

    def _text(self, config: Config) -> Scores:
        formats = config.formats(64, 64)
        tokens, scores = self.ids.shape[1], Scores()
        decoding: Decoding | None = None
        for begin, end in chunks(tokens, formats, formats[0].block_tokens):
            if decoding is None:
                # What sees nothing packed is as in the dense model.
                layers = {number: _packed(config, number, call, end) for number, call in self.calls.items()}
                decoding, hidden = Decoding(layers), None
            else:
                hidden = decoding.run(self.model, self.ids[:, begin:end], begin)[0]
            skipped = max(0, SCORE_FROM - begin)
            if begin + skipped >= end:
                continue
            mine = self.log_p[begin + skipped - SCORE_FROM : end - SCORE_FROM]
            log_q = mine if hidden is None else self.model.lm_head(hidden[skipped:]).float().log_softmax(-1)
            scores.add(mine, log_q, self.ids[0, begin + skipped + 1 : end + 1])
        return scores

    def _numbers(self, config: Config, hidden: HiddenNumbers, calls: dict[int, Call]) -> tuple[Tensor, int]:
        """As `HiddenNumbers.ask`, all questions at once: what pads them stands behind what counts."""
        formats = config.formats(64, 64)
        start, most = hidden.context.shape[1], max(question.ids.shape[1] for question in hidden.questions)
        ids = torch.cat([pad(question.ids, (0, most - question.ids.shape[1])) for question in hidden.questions])
        rows = torch.zeros(len(ids), dtype=torch.int64)
        layers = {number: _packed(config, number, call, start) for number, call in calls.items()}
        decoding = Decoding({n: (k.index_select(0, rows), v.index_select(0, rows)) for n, (k, v) in layers.items()})
        parts = [
            decoding.run(self.model, ids[:, begin - start : end - start], begin)
            for begin, end in chunks(start + most, formats, formats[0].block_tokens, start)
        ]
        nll, found = [], 0
        for question, state in zip(hidden.questions, torch.cat(parts, dim=1), strict=True):
            log_q = self.model.lm_head(state[question.first - 1 : question.end - 1]).float().log_softmax(-1)
            right = question.ids[0, question.first : question.end]
            nll.append(-log_q.gather(1, right[:, None])[:, 0])
            found += bool((log_q.argmax(-1) == right).all())
        return torch.cat(nll), found
