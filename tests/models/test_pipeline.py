"""transformers' text-generation pipeline over a compiled model: the same text, through packed caches."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, pipeline

from tqc import report

OPTIONS = {"rest": "eager", "bits_k": 8, "bits_v": 8, "residual_window": 32}


def make_tokenizer():
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(100)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w99", pad_token="w98")


@pytest.mark.parametrize("in_place", [True, False])
def test_pipeline_generates_compressed(in_place):
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=100,
    )
    model, tokenizer = LlamaForCausalLM(config).eval(), make_tokenizer()
    prompt = " ".join(f"w{i % 97}" for i in range(80))

    def text(model):
        return pipeline("text-generation", model=model, tokenizer=tokenizer)(prompt, max_new_tokens=6, do_sample=False)

    dense = text(model)
    if in_place:
        model.compile(backend="tqai", options=OPTIONS)
    else:
        model = torch.compile(model, backend="tqai", options=OPTIONS)
    with report.collect() as plans:
        assert text(model) == dense
    assert {site.action for plan in plans for site in plan.sites} == {"pack", "fuse"}
