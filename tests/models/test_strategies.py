"""Strategies end to end: which tokens a model's own cache keeps, what it takes, and what can be done with it."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

import tqc
from tests.common import round_trip
from tests.models.common import FAMILIES, assert_close, compiled, dense, prompt, run, sites
from tqc.cache.io import cache_bytes
from tqc.ops import planes
from tqc.passes.plan import FUSE, PACK

EVICT = {"strategy": "evict", "scorer": "snapkv", "residual_window": 96, "scorer_kwargs": {"queries": 8}}
TIERED = {
    "strategy": "tiered",
    "scorer": "snapkv",
    "tiers": "1x8+2x8/4",
    "residual_window": 160,
    "scorer_kwargs": {"queries": 8},
}
WHOLE = {"strategy": "tiered", "tiers": "1x8+1x8/2", "residual_window": 96, "scorer": "knorm"}
TEXT = prompt(length=400)
STRATEGIES = {"evict": EVICT, "tiered": TIERED, "whole": WHOLE}
SOME = pytest.mark.parametrize(
    "name",
    ["evict", pytest.param("tiered", marks=pytest.mark.extended), pytest.param("whole", marks=pytest.mark.extended)],
)


@pytest.fixture(scope="module")
def llama():
    return FAMILIES["llama"].build()


@pytest.fixture(scope="module")
def caches(llama):
    """A cache of 330 tokens of each strategy, to be copied."""
    made = {}
    for name, options in STRATEGIES.items():
        made[name] = DynamicCache()
        with compiled(llama, **options):
            llama(TEXT[:, :330], past_key_values=made[name])
    return made


def gone(cache: DynamicCache, layer: int = 0) -> torch.Tensor:
    keys = cache.layers[layer].keys
    found = planes.evicted(keys.pages, keys.state, keys.shape[2], keys.fmt)
    return torch.zeros(*keys.shape[:3], dtype=torch.bool) if found is None else found


@pytest.mark.parametrize("name", STRATEGIES)
def test_attention_reads_what_was_kept_and_the_length_stays(llama, caches, name):
    cache, ids = copy.deepcopy(caches[name]), TEXT[:, 330:333]
    assert cache.get_seq_length() == 330
    with compiled(llama, **STRATEGIES[name]) as plans:
        logits = [llama(ids[:, at : at + 1], past_key_values=cache).logits for at in range(3)]
    assert sites(plans[0], FUSE) == 2 and cache.get_seq_length() == 333
    keys = cache.layers[0].keys
    groups = keys.fmt.groups
    share = 1 - groups.kept / groups.tokens
    assert gone(cache).float().sum(-1).unique().tolist() == [share * keys.packed_storage.packed]
    if name == "whole":  # all is there, so it is the dense model
        plain = DynamicCache()
        expected = run(llama, TEXT[:, :333], plain, (330,))[:, 330:]
        assert_close(torch.cat(logits, 1), expected, 0.05, "logits")


def test_evicted_tokens_are_as_if_they_were_masked(llama, caches):
    """Against the dense model, whose attention gets a mask of each layer and head by a hook."""
    cache, ids = copy.deepcopy(caches["evict"]), TEXT[:, 330:331]
    plain = DynamicCache()
    for index, layer in enumerate(caches["evict"].layers):
        plain.update(layer.keys.dequantize(), layer.values.dequantize(), index)
    holes = [gone(caches["evict"], layer) for layer in range(2)]
    attention = torch.nn.functional.scaled_dot_product_attention

    def with_holes(query, key, value, attn_mask=None, **how):
        hidden = torch.nn.functional.pad(holes.pop(0), (0, 1)).repeat_interleave(2, 1).unsqueeze(2)
        return attention(query, key, value, attn_mask=~hidden, **how)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", with_holes)
        expected = llama(ids, past_key_values=plain).logits
    with compiled(llama, **EVICT):
        logits = llama(ids, past_key_values=cache).logits
    assert not holes and gone(caches["evict"]).any()
    assert_close(logits, expected, 0.01, "logits")


@pytest.mark.extended
def test_a_prompt_in_pieces_keeps_the_same_tokens(llama, caches):
    cache = DynamicCache()
    with compiled(llama, **EVICT):
        run(llama, TEXT[:, :330], cache, (50, 200, 280, 328))
    # Later layers see what attention made of the first one's losses.
    for one, other in zip(cache.layers[:1], caches["evict"].layers[:1], strict=True):
        assert torch.equal(gone(cache), gone(caches["evict"]))
        assert one.keys.state.tolist() == other.keys.state.tolist()
        assert_close(dense(one.values), dense(other.values), 0.02, "values")


def test_generate_holds_half_the_bytes(llama):
    with compiled(llama, **{**EVICT, "bits_k": 4, "bits_v": 4}):
        kept = llama.generate(prompt(1, 420), max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
    cache = kept.past_key_values
    assert cache.get_seq_length() == 439
    half = sum(x.pages.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    uniform = DynamicCache()
    with compiled(llama, residual_window=96, bits_k=4, bits_v=4):
        llama(prompt(1, 439), past_key_values=uniform)
    whole = sum(x.pages.nbytes for layer in uniform.layers for x in (layer.keys, layer.values))
    assert half < 0.66 * whole and cache_bytes(cache) < cache_bytes(uniform)  # of 16 channels a byte is much


def test_padding_goes_first(llama):
    ids = prompt(length=200)
    mask = torch.ones_like(ids)
    mask[0, :36] = 0
    cache = DynamicCache()
    with compiled(llama, **EVICT):
        llama(ids, attention_mask=mask, past_key_values=cache)
    assert gone(cache)[0, :, 4:36].all() and not gone(cache)[1, :, 4:36].all()


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_batch_is_reordered_selected_and_repeated(caches, name):
    cache, whole = copy.deepcopy(caches[name]), caches[name]
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(gone(cache), gone(whole).flip(0))
    assert torch.equal(dense(cache.layers[1].values), dense(whole.layers[1].values).flip(0))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    assert torch.equal(gone(cache), gone(whole).flip(0))


@SOME
def test_saved_and_loaded_it_goes_on_as_before(llama, caches, tmp_path, name):
    loaded, own = round_trip(copy.deepcopy(caches[name]), tmp_path), copy.deepcopy(caches[name])
    ids = TEXT[:, 330:]
    with compiled(llama, **STRATEGIES[name]):
        one, other = (llama(ids, past_key_values=cache).logits for cache in (loaded, own))
    assert torch.equal(one, other)
    assert torch.equal(gone(loaded), gone(own)) and int(loaded.layers[0].keys.state[1]) > 128


@SOME
def test_a_fork_leaves_its_sibling_alone(llama, caches, name):
    cache = copy.deepcopy(caches[name])
    fork = DynamicCache()
    for index, layer in enumerate(cache.layers):
        fork.update(layer.keys[:, :, :], layer.values[:, :, :], index)
    before = [dense(layer.keys) for layer in cache.layers], gone(cache)
    with compiled(llama, **STRATEGIES[name]):
        llama(prompt(length=80, seed=5), past_key_values=fork)
        assert torch.equal(gone(cache), before[1])
        assert all(torch.equal(dense(layer.keys), old) for layer, old in zip(cache.layers, before[0], strict=True))
        llama(prompt(length=80, seed=6), past_key_values=cache)
    assert cache.get_seq_length() == fork.get_seq_length() == 410


def test_a_crop_behind_what_was_evicted_works_and_another_is_refused_before_anything_is_lost(llama, caches):
    cache = copy.deepcopy(caches["evict"])
    cache.crop(-40)
    assert cache.get_seq_length() == 290 and torch.equal(gone(cache), gone(caches["evict"])[..., :290])
    with compiled(llama, **EVICT):
        llama(prompt(length=50, seed=3), past_key_values=cache)
    before = [dense(layer.keys) for layer in cache.layers]
    with pytest.raises(NotImplementedError, match="a cache cannot be cut to 100 tokens: .* some were evicted"):
        cache.crop(100 - cache.get_seq_length())
    assert cache.get_seq_length() == 340
    assert all(torch.equal(dense(layer.keys), old) for layer, old in zip(cache.layers, before, strict=True))
    cache.crop(4 + 128 - 340)
    assert cache.get_seq_length() == 132


@pytest.mark.extended
def test_a_crop_anywhere_where_nothing_is_evicted(llama, caches):
    cache = copy.deepcopy(caches["whole"])
    cache.crop(100 - cache.get_seq_length())
    with compiled(llama, **WHOLE):
        llama(prompt(length=90, seed=3), past_key_values=cache)
    assert cache.get_seq_length() == 190


def test_what_would_take_zeros_for_evicted_tokens_is_refused(caches):
    keys = copy.deepcopy(caches["evict"]).layers[0].keys
    for use in (lambda: keys + 1, lambda: keys.sum(), lambda: copy.copy(keys).__reduce_ex__(2)):
        with pytest.raises(NotImplementedError, match="would take zeros for tokens that were evicted"):
            use()
    with pytest.raises(NotImplementedError, match="a scorer sorts its tokens"):
        torch.cat([keys, torch.zeros(2, 2, 1, 16)], dim=2)
    with pytest.raises(NotImplementedError, match="a scorer sorts its tokens"):
        keys[:, :, 3:4] = torch.zeros(2, 2, 1, 16)


@pytest.mark.extended
def test_beams_and_assisted_decoding(llama):
    ids = prompt(1, 180)
    with compiled(llama, **EVICT) as plans:
        beams = llama.generate(ids, num_beams=3, max_new_tokens=20, do_sample=False)
        assert beams.shape == (1, 200) and any(sites(plan, FUSE) for plan in plans)
        greedy = llama.generate(ids, max_new_tokens=24, do_sample=False)
        assistant = FAMILIES["llama"].build(num_hidden_layers=1)
        assisted = llama.generate(ids, max_new_tokens=24, do_sample=False, assistant_model=assistant)
    assert assisted.shape == greedy.shape


def test_caches_that_cannot_be_evicted_from_keep_all_and_say_why(llama):
    with compiled(llama, **EVICT) as plans:
        cache = StaticCache(llama.config, max_cache_len=300)
        llama(prompt(length=200), past_key_values=cache, cache_position=torch.arange(200))
    notes = [note for plan in plans for site in plan.sites for note in site.notes]
    assert notes and set(notes) == {"evict left out, all tokens kept: the cache is preallocated"}
    assert cache.layers[0].keys.fmt.groups is None
    with compiled(FAMILIES["mistral"].build(), **{**EVICT, "residual_window": 96}) as plans:
        pass
    window = FAMILIES["mistral"].build(sliding_window=200)
    with compiled(window, **EVICT) as plans:
        window(prompt(length=150), past_key_values=DynamicCache(config=window.config))
    assert "a sliding window" in plans[0].sites[0].notes[0] and sites(plans[0], PACK) == 2


def test_explain_says_what_is_kept(llama):
    found = tqc.explain(llama, options={**EVICT, "provider": "reference"}, input_ids=prompt(1, 300))
    assert "group64=1x3:scored8x2+0=snapkv(queries=8)" in found.graphs[1][0]["keys"]
    assert found.tokens == 303 and "of 303 tokens 128 were evicted, by each head its own" in found.notes


def test_the_first_token_is_that_of_an_uncompressed_cache(llama):
    """The prompt's own attention is dense."""
    ids = prompt(length=200)
    with torch.no_grad():
        expected = llama(ids).logits[:, -1]
    with compiled(llama, **EVICT):
        logits = llama(ids, past_key_values=DynamicCache()).logits[:, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
