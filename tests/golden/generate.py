"""Wrote pages.safetensors and pages.json, once for each version of the packed format. Kept to show how.

Version 1 wrote them; version 2 did not change pages (`head` of a case is `centre` there, and its balance is 1). Run it
for a version that does, into other files: these must decode for ever as they do.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tqc.format import PAGE_TOKENS, PackedFormat
from tqc.format.quantizer import decode_pages, encode_pages, head_rows, unrotate

CASES = {
    "keys_3_bits": PackedFormat(64, 3, True),
    "values_3_bits": PackedFormat(64, 3, False),
    "keys_4_bits_96": PackedFormat(96, 4, True, seed=7),
    "values_7_bits_haar": PackedFormat(40, 7, False, rotation="haar", seed=1),
    "keys_1_bit": PackedFormat(128, 1, True),
    "values_8_bits": PackedFormat(16, 8, False),
    "worked_example": PackedFormat(8, 3, True),
}


def main() -> None:
    parts = {}
    for index, (name, fmt) in enumerate(CASES.items()):
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randn(1, 1, 2 * PAGE_TOKENS, fmt.head_dim, generator=generator)
        tokens += 3 * torch.randn(1, 1, 1, fmt.head_dim, generator=generator)
        tokens *= torch.logspace(0, 1, 2 * PAGE_TOKENS).unsqueeze(-1)
        tokens[:, :, 40] = 0.0 if fmt.head_dim > 8 else 1.0
        tokens[:, :, 50, 0] = float("inf")
        tokens = tokens.bfloat16()
        head = head_rows(tokens[:, :, :PAGE_TOKENS], fmt)
        pages = encode_pages(tokens, head, fmt)
        decoded = unrotate(decode_pages(pages, head, fmt), fmt)
        found = {"tokens": tokens, "head": head, "pages": pages, "decoded": decoded}
        parts |= {f"{name}.{part}": value for part, value in found.items()}
    folder = Path(__file__).parent
    save_file(parts, folder / "pages.safetensors", metadata={"format": "tq1"})
    (folder / "pages.json").write_text(json.dumps({name: str(fmt) for name, fmt in CASES.items()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
