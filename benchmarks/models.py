"""What is packed in every architecture of transformers that can be built small, without a hub.

    python -m benchmarks.models                         all, ten minutes; or `make test-models`
    python -m benchmarks.models llama gemma3_text       some, printed only
    python -m benchmarks.models --attn eager flex_attention

Without `--attn` a model runs with sdpa, or eagerly where it does not take that. Each model is random and small. It
generates from a prompt of 60 tokens, dense and compiled with 8-bit caches, and the logits are compared. A row says how
many attention sites the graph of a decoding step has, how many of them read or keep a packed cache, and why the others
do not; or what failed, in the model itself ("not built", "dense run failed") or in ours.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing import get_context
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from benchmarks.envelope import write
from tqc import report
from tqc.passes.plan import DENSE, FUSE, READ

OPTIONS = {"rest": "eager", "bits_k": 8, "bits_v": 8, "residual_window": 32, "sink_tokens": 4}
PROMPT, STEPS, TOLERANCE = 60, 6, 0.1
SECONDS = 300
MAX_PARAMETERS = 60_000_000
TASKS = {
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSeq2SeqLM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}
# What a configuration that has such a field gets.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "text_vocab_size"), 128),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "model_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size", "inner_dim"), 96),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size", "intermediate_size_mlp"), 96),
    **dict.fromkeys(("shared_expert_intermediate_size", "mlp_hidden_size", "expert_ffn_hidden_size"), 96),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels", "v_head_dim", "qk_rope_head_dim", "qk_nope_head_dim"), 16),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 512),
    **dict.fromkeys(("pad_token_id", "bos_token_id"), 1),
    **{"eos_token_id": 2, "sliding_window": 48, "word_embed_proj_dim": 64, "decoder_start_token_id": 1},
    **{"mamba_d_state": 8, "mamba_d_conv": 4, "state_size": 8, "first_k_dense_replace": 1, "n_group": 1},
    **{"attn_layer_period": 2, "attn_layer_offset": 1, "attn_layer_indices": [1]},
    **{"topk_group": 1, "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0},
}
# Other shapes for architectures that do not run with these.
VARIATIONS: tuple[dict[str, Any], ...] = ({}, {"num_key_value_heads": 4}, {"head_dim": None}, {"q_lora_rank": None})


def shrunk(kind: type, variation: dict[str, Any], depth: int = 0) -> dict[str, Any]:
    """Keyword arguments that make a configuration of this class small, with one layer of each type."""
    default: Any = kind()
    sizes = {**SMALL, **variation}
    found = {name: size for name, size in sizes.items() if _field(default, name) is not None}
    types = _field(default, "layer_types")
    if isinstance(types, list) and types:
        firsts = sorted({types.index(layer) for layer in types})
        firsts = firsts if len(firsts) > 1 else [0, 1]
        found["num_hidden_layers"] = len(firsts)
        for name, held in vars(default).items():  # all lists that have an entry a layer
            if isinstance(held, list) and len(held) == len(types):
                found[name.lstrip("_")] = [held[index] for index in firsts if index < len(held)]
    for name, sub_kind in getattr(kind, "sub_configs", {}).items():
        sub = getattr(default, name, None)
        if sub is not None and depth < 3 and sub_kind is not transformers.AutoConfig:
            found[name] = shrunk(type(sub), variation, depth + 1)
    return {name: held for name, held in found.items() if held is not None}


def _field(config: Any, name: str) -> Any:
    """A field that can be set, or None."""
    found = getattr(type(config), name, None)
    if isinstance(found, property) and found.fset is None:
        return None
    try:
        return getattr(config, name, None)
    except Exception:  # some fields ask to be read layer by layer
        return None


def build(task: str, name: str, attn: str, variation: dict[str, Any]) -> Any:
    kind = transformers.CONFIG_MAPPING[name]
    config = kind(**shrunk(kind, variation))
    torch.manual_seed(0)
    with torch.device("meta"):
        size = sum(p.numel() for p in getattr(transformers, task).from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{size:,} parameters")
    model = getattr(transformers, task).from_config(config, attn_implementation=attn).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 1
    model.generation_config.decoder_start_token_id = 1
    return model


def generate(model: Any) -> tuple[torch.Tensor, Any]:
    ids = torch.randint(3, 128, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
    result = model.generate(ids, **options, return_dict_in_generate=True, output_logits=True)
    return torch.stack(result.logits, dim=1), result


def cell(task: str, name: str, attn: str) -> dict[str, Any]:
    row: dict[str, Any] = {"model": name, "attention": attn}
    failures: dict[str, str] = {}
    for variation in VARIATIONS:
        try:
            model = build(task, name, attn, variation)
        except Exception as error:
            if attn == "sdpa" and "does not support an attention implementation" in str(error):
                return cell(task, name, "eager")
            failures.setdefault("not built", _first_line(error))
            continue
        try:
            with torch.no_grad():
                expected, _ = generate(model)
            break
        except Exception as error:
            failures["dense run failed"] = _first_line(error)
    else:
        result, why = failures.popitem()
        return {**row, "result": result, "why": why}
    model.compile(backend="tqai", options=OPTIONS)
    try:
        with report.collect() as plans, torch.no_grad():
            actual, _ = generate(model)
    except Exception as error:
        return {**row, "result": "FAILED", "why": _first_line(error)}
    error = ((actual - expected).norm(dim=-1).max() / expected.norm(dim=-1).mean()).item()
    steps = [plan for plan in plans if plan.sites]
    if not steps:
        return {**row, "result": "no attention found", "error": round(error, 4)}
    step = steps[-1]
    row |= {
        "sites": len(step.sites),
        "packed": sum(site.action in (FUSE, READ) for site in step.sites),
        "error": round(error, 4),
    }
    notes = [site.notes[0] for site in step.with_action(READ)]
    row["why"] = "; ".join(dict.fromkeys([*(site.reason for site in step.with_action(DENSE)), *notes]))
    row["result"] = "packed" if row["packed"] == row["sites"] else "partly" if row["packed"] else "dense"
    return row if error < TOLERANCE else {**row, "result": "WRONG"}


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]


def _isolated(task: tuple[str, str, str]) -> dict[str, Any]:
    """A cell, cut off after `SECONDS`."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"took more than {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    torch.set_num_threads(1)
    try:
        return cell(*task)
    except BaseException as error:
        return {"model": task[1], "attention": task[2], "result": "FAILED", "why": _first_line(error)}
    finally:
        signal.alarm(0)


def cells(names: list[str], attentions: list[str]) -> Iterator[tuple[str, str, str]]:
    for task, architectures in TASKS.items():
        for name in architectures:
            if not names or name in names:
                yield from ((task, name, attn) for attn in attentions)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--attn", nargs="+", default=["sdpa"])
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    begin, rows = time.time(), []
    # A process a cell: what one model leaves behind must not count against the next.
    with get_context("fork").Pool(arguments.processes, maxtasksperchild=1) as pool:
        for row in pool.imap(_isolated, list(cells(arguments.names, arguments.attn))):
            print({key: val for key, val in row.items() if val not in ("", None)}, flush=True)
            rows.append(row)
    print(f"{len(rows)} cells in {time.time() - begin:.0f} s")
    if not arguments.names:
        write("models", rows, packages=("transformers",))
    if any(row["result"] in ("FAILED", "WRONG") for row in rows):
        sys.exit("some models failed")


if __name__ == "__main__":
    main()
