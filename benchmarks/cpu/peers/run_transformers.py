"""Runs the embedded model in torch: tqc, Inductor, eager, and other projects' caches for transformers."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from measure import job, measure
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import QuantizedCache

from tqc.models import load

given = job()


def new_cache(config: Any, tokens: int) -> Any:
    """An empty cache of the job's kind with room for `tokens`."""
    kind = given["cache"]
    if kind == "dynamic":
        return DynamicCache(config=config)
    if kind == "static":
        return StaticCache(config=config, max_cache_len=tokens)
    if kind == "tqai":
        from tqc.evaluate.peers import PEERS

        return next(peer for peer in PEERS if peer.name == "tqai K4 V2").new_cache(model)
    axis = {"quanto": 0, "hqq": 1}[kind]
    return QuantizedCache(kind, config, nbits=4, axis_key=axis, axis_value=axis)


def prefill(ids: list[int]) -> int:
    global cache, length
    cache = None  # the one before is freed first
    cache, length = new_cache(model.config, len(ids) + given["steps"] + 64), len(ids)
    out = model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return int(out.logits[0, -1].argmax())


def step(token: int) -> int:
    global length
    position = torch.tensor([[length]])
    length += 1
    out = model(input_ids=torch.tensor([[token]]), position_ids=position, past_key_values=cache, use_cache=True)
    return int(out.logits[0, -1].argmax())


torch.set_num_threads(given["threads"])
model, _ = load(None, "float32")
if given["backend"]:
    model.compile(backend=given["backend"], options=given.get("options"))
cache, length = None, 0
with torch.no_grad():
    for context in (64, 128):  # the second length makes dynamo's graphs dynamic
        prefill(list(range(100, 100 + context)))
        for token in range(4):
            step(token)
    if not given["prepare"]:
        measure(given, prefill, step, {"torch": torch.__version__, "transformers": transformers.__version__})
