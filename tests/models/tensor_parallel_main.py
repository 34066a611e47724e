"""One process of several over which transformers spreads a model; run by torchrun with the folder of a model.

Rank 0 prints, as JSON, by case: the worst error of the logits against the whole model in one process, relative to their
largest; what each rank's cache holds; how the decode steps of each rank read it.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from tests.common import OPTIONS
from tqc import report

TOKENS = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
CASES: dict[str, dict[str, Any]] = {
    "grows": {},
    "preallocated": {"cache_implementation": "static", "disable_compile": True},
}


def main(folder: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
    vocabulary = model.config.vocab_size
    prompt = torch.randint(2, vocabulary, (2, 80), generator=torch.Generator().manual_seed(0))
    whole = AutoModelForCausalLM.from_pretrained(folder).eval().generate(prompt, **TOKENS)
    expected = torch.stack(whole.logits)
    found = {}
    for name, kwargs in CASES.items():
        torch._dynamo.reset()
        compiled: Any = torch.compile(model, backend="tqai", options=OPTIONS)
        with report.collect() as plans:
            result = compiled.generate(prompt, **kwargs, **TOKENS)
        held = [[type(layer.keys).__name__, layer.keys.shape[1]] for layer in result.past_key_values.layers]
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, (held, [site.action for site in plans[-1].sites]))
        error = (torch.stack(result.logits) - expected).abs().max() / expected.abs().max()
        found[name] = {"error": error.item(), "held": [r[0] for r in ranks], "actions": [r[1] for r in ranks]}
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
