"""Writes the kernels that are generated for three pairs of formats: python tests/golden/generate_metal.py."""

from __future__ import annotations

from pathlib import Path

from tests.lowering.metal_texts import as_cuda, as_metal
from tqc.format import PackedFormat
from tqc.lowering.metal.attend_source import attend_kernel
from tqc.lowering.metal.encode_source import encode_kernel
from tqc.lowering.metal.read_source import read_kernel
from tqc.lowering.metal.softmax_source import merge_kernel

FOLDER = Path(__file__).parent / "metal"


def texts() -> dict[str, str]:
    """Text of each file. Llama's shape at K4/V2 over long contexts, SmolLM2's at 3 bits, and Phi-2's at 8 bits, whose
    head_dim is no power of two, as CUDA."""
    llama = PackedFormat(128, 4, True), PackedFormat(128, 2, False)
    smol = PackedFormat(64, 3, True), PackedFormat(64, 3, False)
    phi = PackedFormat(80, 8, True), PackedFormat(80, 8, False)
    return {
        "d128_k4_v2.metal": _joined(
            as_metal(attend_kernel(*llama, "float16", 4, "none", True)), as_metal(merge_kernel(128, "float16"))
        ),
        "d64_k3_v3.metal": _joined(
            as_metal(attend_kernel(*smol, "bfloat16", 4, "bool", False)), as_metal(encode_kernel(smol[0], "bfloat16"))
        ),
        "d80_k8_v8.cu": _joined(
            as_cuda(attend_kernel(*phi, "float32", 1, "added", False)), as_cuda(read_kernel(phi[0], "float32"))
        ),
    }


def _joined(*parts: str) -> str:
    return "\n// ----\n".join(parts)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in texts().items():
        (FOLDER / name).write_text(text)
