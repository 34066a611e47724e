"""Views of packed tensors that only a dense one can show: no write into them is lost, and rows come together again."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from tests.common import KEYS, normal, states
from tests.models.common import FAMILIES, compiled, layers
from tqc.cache.decoded import Decoded
from tqc.cache.packed_tensor import PackedTensor, pack

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens": lambda x: x[:, :, 5:6],
    "the last": lambda x: x[:, :, -7:],
    "every other": lambda x: x[:, :, ::2],
    "a row": lambda x: x[1],
    "a row of a row": lambda x: x[1][None][0][0],
    "a head": lambda x: x[:, 1],
    "narrow": lambda x: x.narrow(2, 3, 4),
    "select": lambda x: x.select(2, 7),
    "view": lambda x: x.view(2, -1),
    "flatten": lambda x: x.flatten(2),
    "transpose": lambda x: x.transpose(1, 2),
    "mT": lambda x: x.mT,
    "permute": lambda x: x.permute(1, 0, 2, 3),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "chunk": lambda x: x.chunk(2, dim=2)[1],
    "split": lambda x: x.split(30, dim=2)[2],
    "unbind": lambda x: x.unbind(0)[0],
    "expand": lambda x: x[:1].expand(3, -1, -1, -1)[0],
    "diagonal": lambda x: x.diagonal(0, 2, 3),
    "unfold": lambda x: x.unfold(2, 4, 4),
    "a view of a view": lambda x: x[:, :, 5:].transpose(1, 2)[:, 3],
}
WRITES: dict[str, Callable[[Tensor], object]] = {
    "copy_": lambda x: x.copy_(torch.zeros(())),
    "add_": lambda x: x.add_(1),
    "index": lambda x: x.__setitem__(..., 0.0),
    "out": lambda x: torch.add(torch.zeros_like(x), 1, out=x),
    "foreach": lambda x: torch._foreach_add_([x], 1),
}


def cache() -> PackedTensor:
    return pack(states(100)[0], KEYS)


@pytest.mark.parametrize("name", VIEWS)
def test_a_write_into_a_view_is_seen_or_refused(name: str) -> None:
    x = cache()
    dense = x.dequantize()
    part, expected = VIEWS[name](x), VIEWS[name](dense)
    assert torch.equal(part + 0, expected) and part.shape == expected.shape
    for write in WRITES.values():
        with pytest.raises(NotImplementedError, match="which is a copy|are in use|would write into a packed tensor"):
            write(part)
    assert torch.equal(x.dequantize(), dense)


def test_a_part_is_dense_to_all_that_reads() -> None:
    x = cache()
    part, expected = x[:, :, 5:9], x.dequantize()[:, :, 5:9]
    assert part.numpy().tolist() == part.tolist() == expected.tolist() and "tensor" in repr(part)
    for made in (part * 1, part.clone(), torch.cat([part, part])[:2], copy.deepcopy(part)):
        assert type(made) is Tensor and torch.equal(made, expected)
        made.zero_()
    assert torch.equal(part, expected)
    total = torch.compile(lambda t: t.sum(-1) * 2, backend="eager")(part)
    torch.testing.assert_close(total, expected.sum(-1) * 2)


def test_a_write_into_what_a_part_was_taken_from() -> None:
    """The part would go on to show what was there before."""
    x, new = cache(), normal(2, 2, 1, 16)
    part = x[:, :, 99:]
    with pytest.raises(NotImplementedError, match="parts that were taken out of it are in use"):
        x[:, :, 99:] = new
    del part
    x[:, :, 99:] = new
    assert torch.equal(x[:, :, 99:] + 0, new)


@pytest.mark.parametrize("index", [0, 1, -1])
def test_rows_that_are_taken_out_and_put_together_stay_packed(index: int) -> None:
    x = cache()
    row = x[index][None]
    assert isinstance(row, PackedTensor) and row._base is None
    assert torch.equal(row.dequantize(), x.dequantize()[[index]])
    joined = torch.stack([row.cpu(), x[0][None]])
    assert isinstance(joined, Decoded) and joined.shape == (2, 1, 2, 100, 16)
    both = joined.squeeze(1).to("cpu")
    assert isinstance(both, PackedTensor) and both._base is None
    assert torch.equal(both.dequantize(), x.dequantize()[[index, 0]])
    for other in (joined.squeeze(0), joined[0], torch.stack([x, x]).squeeze(1), torch.stack([row, row.dequantize()])):
        assert not isinstance(other, PackedTensor)


@torch.no_grad()
def test_whispers_cache_comes_back_packed() -> None:
    """Its `generate` splits the cache in rows, and stacks these."""
    model = FAMILIES["whisper"].build(decoder_layers=1)
    given = torch.randn(2, 8, 120, generator=torch.Generator().manual_seed(0))
    model.generation_config.no_timestamps_token_id = 5
    with compiled(model, sink_tokens=0):
        result = model.generate(given, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    found = result.past_key_values
    assert isinstance(found, EncoderDecoderCache) and isinstance(found.self_attention_cache, DynamicCache)
    held = [tensor for layer in layers(found) for tensor in (layer.keys, layer.values)]
    assert len(held) == 4 and {tensor.shape[0] for tensor in held} == {2}
    assert all(isinstance(tensor, PackedTensor) for tensor in held), [type(tensor) for tensor in held]
