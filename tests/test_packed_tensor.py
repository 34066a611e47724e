"""The tensor that a cache holds: every way in which caches handle keys and values, and what must not happen."""

import copy
import pickle

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tqc.cache.packed_tensor import PackedTensor, pack, write_at
from tqc.config import Config
from tqc.format import PAGE_TOKENS

HEADS, HEAD_DIM = 2, 64
FORMATS = Config(bits_k=8, bits_v=8, residual_window=32).formats(HEAD_DIM, HEAD_DIM)


def tokens(count, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, HEADS, count, HEAD_DIM, generator=generator)


@pytest.fixture(params=FORMATS, ids=["keys", "values"])
def fmt(request):
    return request.param


def test_looks_like_the_dense_tensor(fmt):
    dense = tokens(150).bfloat16()
    packed = pack(dense, fmt)
    assert isinstance(packed, PackedTensor)
    assert (packed.shape, packed.dtype, packed.device) == (dense.shape, dense.dtype, dense.device)
    torch.testing.assert_close(packed.dequantize(), dense, atol=0.06, rtol=0.02)
    assert packed.packed_nbytes() < 0.9 * dense.nbytes
    assert "150" in repr(packed)


def test_other_ops_see_dense_values(fmt):
    packed = pack(tokens(100), fmt)
    dense = packed.dequantize()
    assert torch.equal(packed + 1, dense + 1)
    query = tokens(3, seed=1)
    assert torch.equal(
        scaled_dot_product_attention(query, packed, packed), scaled_dot_product_attention(query, dense, dense)
    )
    assert torch.equal(packed.transpose(1, 2), dense.transpose(1, 2))


def test_append_is_in_place_and_the_old_tensor_stays_valid(fmt):
    old = pack(tokens(100), fmt)
    before = old.dequantize()
    new = torch.cat([old, tokens(40, seed=1)], dim=-2)
    assert new.packed_storage is old.packed_storage and new.shape[2] == 140
    assert old.shape[2] == 100
    torch.testing.assert_close(old.dequantize(), before, atol=0.06, rtol=0)
    torch.testing.assert_close(new.dequantize()[:, :, 100:], tokens(40, seed=1), atol=0.06, rtol=0)


def test_a_fork_copies_and_leaves_its_sibling_alone(fmt):
    prefix = pack(tokens(100), fmt)
    one = torch.cat([prefix, tokens(70, seed=1)], dim=2)
    kept = one.dequantize()
    two = torch.cat([prefix, tokens(70, seed=2)], dim=2)
    assert two.packed_storage is not one.packed_storage
    assert torch.equal(one.dequantize(), kept)
    torch.testing.assert_close(two.dequantize()[:, :, 100:], tokens(70, seed=2), atol=0.06, rtol=0)
    torch.testing.assert_close(two.dequantize()[:, :, :100], tokens(100), atol=0.06, rtol=0)


@pytest.mark.parametrize("length", [1, 3, 36, 60, 99])
def test_crop_then_append(fmt, length):
    packed = pack(tokens(100), fmt)
    storage = packed.packed_storage
    packed = packed[..., :length, :]
    assert isinstance(packed, PackedTensor) and packed.shape[2] == length
    packed = torch.cat([packed, tokens(50, seed=1)], dim=-2)
    assert packed.packed_storage is storage, "nobody reads further, so nothing needs to be copied"
    expected = torch.cat([tokens(100)[:, :, :length], tokens(50, seed=1)], dim=2)
    torch.testing.assert_close(packed.dequantize(), expected, atol=0.08, rtol=0)


def test_crop_of_a_tensor_that_lives_on_copies(fmt):
    whole = pack(tokens(100), fmt)
    kept = whole.dequantize()
    branch = torch.cat([whole[:, :, :50], tokens(60, seed=1)], dim=2)
    assert branch.packed_storage is not whole.packed_storage
    assert torch.equal(whole.dequantize(), kept)


@pytest.mark.parametrize(
    "select",
    [
        lambda x: x.index_select(0, torch.tensor([1, 1, 0])),
        lambda x: x[torch.tensor([1, 1, 0])],
        lambda x: x.repeat_interleave(3, dim=0),
        lambda x: x.repeat(2, 1, 1, 1),
        lambda x: x[:1],
        lambda x: x[torch.tensor([True, False])],
        lambda x: x.clone(),
        lambda x: x.detach(),
        lambda x: copy.deepcopy(x),
        lambda x: x.to("cpu", copy=True),
    ],
    ids=["index_select", "index", "repeat_interleave", "repeat", "rows", "mask", "clone", "detach", "deepcopy", "to"],
)
def test_batch_operations_stay_packed(fmt, select):
    dense = tokens(100)
    packed = pack(dense, fmt)
    chosen = select(packed)
    assert isinstance(chosen, PackedTensor)
    assert torch.equal(chosen.dequantize(), select(packed.dequantize()))
    longer = torch.cat([chosen, tokens(5, batch=chosen.shape[0], seed=3)], dim=2)
    assert longer.shape[2] == 105
    torch.testing.assert_close(packed.dequantize(), dense, atol=0.06, rtol=0)


def test_deepcopy_shares_nothing(fmt):
    packed = pack(tokens(100), fmt)
    twin = copy.deepcopy(packed)
    grown = torch.cat([packed, tokens(64, seed=1)], dim=2)
    kept = grown.dequantize()
    torch.cat([twin, tokens(64, seed=2)], dim=2)
    assert torch.equal(grown.dequantize(), kept)


def test_dtype_conversion_is_dense(fmt):
    packed = pack(tokens(100), fmt)
    assert type(packed.to(torch.float16)) is torch.Tensor
    assert torch.equal(packed.half(), packed.dequantize().half())


def test_writes_are_refused_not_lost(fmt):
    packed = pack(tokens(100), fmt)
    for write in (lambda: packed.add_(1), lambda: packed.mul_(2), lambda: torch.add(packed, 1, out=packed)):
        with pytest.raises(NotImplementedError, match="would write into a packed tensor"):
            write()


def test_pickled_it_is_dense(fmt, caplog):
    packed = pack(tokens(40), fmt)
    loaded = pickle.loads(pickle.dumps(packed))
    assert type(loaded) is torch.Tensor and torch.equal(loaded, packed.dequantize())
    assert "tqc.save_cache" in caplog.text


def test_preallocated_writes_at_a_position(fmt):
    cache = pack(tokens(0), fmt)
    cache.packed_storage.reserve(256)
    cache = PackedTensor(cache.packed_storage, 256)
    write_at(cache, tokens(120), torch.arange(120))
    cache.index_copy_(2, torch.arange(120, 123), tokens(3, seed=1))
    expected = torch.cat([tokens(120), tokens(3, seed=1), torch.zeros(2, HEADS, 133, HEAD_DIM)], dim=2)
    torch.testing.assert_close(cache.dequantize(), expected, atol=0.06, rtol=0)
    cache.zero_()
    assert not cache.dequantize().any()


def test_growth_is_amortized_and_spare_capacity_small(fmt):
    packed = pack(tokens(40, batch=1), fmt)
    moves, pages = 0, packed.pages
    for step in range(4096 // PAGE_TOKENS):
        packed = torch.cat([packed, tokens(PAGE_TOKENS, batch=1, seed=step)], dim=2)
        moves += packed.pages is not pages
        pages = packed.pages
    used = fmt.packed_tokens(packed.shape[2]) // PAGE_TOKENS
    assert pages.shape[2] <= used + max(1, used // 128)
    assert moves <= 4096 // PAGE_TOKENS // 2 + 8  # of few pages none is spare


def test_flatten_round_trip(fmt):
    packed = pack(tokens(100), fmt)
    names, context = packed.__tensor_flatten__()
    inner = {name: getattr(packed, name) for name in names}
    again = PackedTensor.__tensor_unflatten__(inner, context, packed.shape, packed.stride())
    assert torch.equal(again.dequantize(), packed.dequantize()) and again.fmt == packed.fmt
