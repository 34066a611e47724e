"""transformers' text-generation pipeline over a compiled model: the same text, through packed caches."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from tqc import report

OPTIONS = {"rest": "eager", "bits_k": 8, "bits_v": 8, "residual_window": 32}
PROMPT = "what is gravity ? " * 20


@pytest.mark.parametrize("in_place", [True, False])
def test_pipeline_generates_compressed(tiny_model_folder, in_place):
    torch._dynamo.reset()
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)

    def text(model):
        return pipeline("text-generation", model=model, tokenizer=tokenizer)(PROMPT, max_new_tokens=6, do_sample=False)

    dense = text(model)
    if in_place:
        model.compile(backend="tqai", options=OPTIONS)
    else:
        model = torch.compile(model, backend="tqai", options=OPTIONS)
    with report.collect() as plans:
        assert text(model) == dense
    assert {site.action for plan in plans for site in plan.sites} == {"pack", "fuse"}
