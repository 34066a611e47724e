"""Layers run by one call: what a chain holds, that it does what its graph does in Python, and when it is left out."""

import copy
from contextlib import contextmanager

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.models.common import FAMILIES
from tqc.cache.packed_tensor import PackedTensor
from tqc.execute import chains, split_graph
from tqc.execute.instructions import AttendExtend, AttendSlide, AttendWrite
from tqc.lowering.cpu import PROVIDER
from tqc.torch_private import entry_of

if reason := PROVIDER.unavailable():
    pytest.skip(reason, allow_module_level=True)

OPTIONS = {"provider": "cpu", "residual_window": 32, "sink_tokens": 4, "bits_k": 4, "bits_v": 2}
LAYERS = 6
CAPACITY = 136
PROMPT = torch.arange(90).remainder(97)[None]


class Subject:
    """A compiled model with the graphs that were made of it; its caches grow, or are allocated at full length."""

    def __init__(self, grows=True, dtype=torch.float32, padding=0, layers=LAYERS, **options):
        torch._dynamo.reset()
        self.model = FAMILIES["llama"].build(dtype=dtype, num_hidden_layers=layers)
        self.grows, self.padding, self.graphs = grows, padding, []
        self.model.compile(backend="tqai", options={**OPTIONS, **options})

    @property
    def chains(self):
        found = (chain for graph in self.graphs for chain in graph.chains)
        return [chain for chain in found if isinstance(chain.run, chains.CompiledChain)]

    @contextmanager
    def in_python(self):
        before = {chain: chain.run for chain in self.chains}
        for chain in before:
            chain.run = chain.module.forward
        yield
        for chain, run in before.items():
            chain.run = run

    def decoder(self):
        """Steps through given tokens behind the prompt, with a cache of its own."""
        config = self.model.config
        cache = DynamicCache(config=config) if self.grows else StaticCache(config=config, max_cache_len=CAPACITY)
        return Decoder(self.model, cache, self.padding)


class Decoder:
    def __init__(self, model, cache, padding):
        self.model, self.cache, self.length, self.padding = model, cache, PROMPT.shape[1], padding
        self.call(PROMPT, torch.arange(self.length)[None])

    def call(self, ids, positions, mask=None):
        if mask is None and self.padding:
            mask = torch.ones(1, self.length)
            mask[:, : self.padding] = 0
        with torch.no_grad():
            out = self.model(
                input_ids=ids, position_ids=positions, past_key_values=self.cache, attention_mask=mask, use_cache=True
            )
        return out.logits

    def step(self, token=7):
        self.length += 1
        return self.call(torch.tensor([[token]]), torch.tensor([[self.length - 1]]))

    def parts(self):
        tensors = [x for layer in self.cache.layers for x in (layer.keys, layer.values)]
        assert all(isinstance(x, PackedTensor) for x in tensors)
        return [part for x in tensors for part in (x.state, x.dense, x.dequantize())]


@pytest.fixture(scope="module", params=["grows", "fixed"])
def subject(request):
    if request.param == "grows":
        subject = Subject()
    else:
        subject = Subject(grows=False, dtype=torch.bfloat16, padding=5)
    make = split_graph.SplitGraph.__init__

    def remember(graph, *args, **kwargs):
        make(graph, *args, **kwargs)
        subject.graphs.append(graph)

    with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(recompile_limit=64):
        patch.setattr(split_graph.SplitGraph, "__init__", remember)
        for _ in range(2):  # a graph is compiled at its second call
            decoder = subject.decoder()
            for _ in range(3):
                decoder.step()
        yield subject


@pytest.mark.extended
def test_a_chain_of_caches_with_groups_does_what_its_graph_does_in_python():
    """Steps without a group that leaves run in the chain, which keeps the queries for the scorer too."""
    options = {"strategy": "evict", "scorer": "snapkv", "scorer_kwargs": {"queries": 4}, "residual_window": 96}
    subject = Subject(**options)
    make = split_graph.SplitGraph.__init__

    def remember(graph, *args, **kwargs):
        make(graph, *args, **kwargs)
        subject.graphs.append(graph)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split_graph.SplitGraph, "__init__", remember)
        for _ in range(2):
            chained = subject.decoder()
            chained.step()
    assert len(subject.chains) == 1
    chained, expected = subject.decoder(), subject.decoder()
    logits = [chained.step(token) for token in range(90)]  # two groups leave
    assert subject.chains[0].run.seconds()[1] > 0
    with subject.in_python():
        for ours, theirs in zip(logits, [expected.step(token) for token in range(90)], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    for ours, theirs in zip(chained.parts(), expected.parts(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert chained.cache.layers[0].keys.evicted_tokens == 64


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


def test_a_chain_is_all_layers_from_the_first_attention_to_the_last(subject):
    chain = subject.chains[0]
    nodes = list(chain.module.graph.nodes)
    attention = AttendExtend if subject.grows else AttendWrite
    assert sum(isinstance(node.target, attention) for node in nodes) == LAYERS
    assert sum(node.op == "call_module" for node in nodes) == LAYERS - 1
    outer = next(graph.outer for graph in subject.graphs if chain in graph.chains)
    assert [node.target for node in outer.graph.nodes if node.op == "call_module"] == [
        "region_0",
        "chain_0",
        "region_2",
    ]
    assert not any(isinstance(node.target, attention) for node in outer.graph.nodes)


def test_a_chain_does_what_its_graph_does_in_python(subject):
    chained, expected = subject.decoder(), subject.decoder()
    for chain in subject.chains:
        chain.run.seconds()
    logits = [chained.step(token) for token in range(40)]  # past a page
    spent = [sum(times) for times in zip(*(chain.run.seconds() for chain in subject.chains), strict=True)]
    assert all(seconds > 0 for seconds in spent)
    with subject.in_python():
        assert_same(logits, [expected.step(token) for token in range(40)])
    assert_same(chained.parts(), expected.parts())
    for decoder in (chained, expected):
        assert [layer.values.packed_storage.length for layer in decoder.cache.layers] == [PROMPT.shape[1] + 40] * LAYERS


def test_nothing_is_kept_alive(subject):
    decoder = subject.decoder()
    decoder.step()

    def uses():
        held = subject.model.model.layers[2].mlp.up_proj.weight, decoder.cache.layers[1].keys.pages
        return [torch._C._storage_Use_Count(x.untyped_storage()._cdata) for x in held]

    before = uses()
    for _ in range(3):
        decoder.step()
    assert uses() == before
    if subject.grows:
        return
    while decoder.length < CAPACITY:
        decoder.step()
    with pytest.raises(
        IndexError, match=f"positions {CAPACITY} to {CAPACITY} are outside of a cache of {CAPACITY} tok"
    ):
        decoder.step()
    assert uses() == before
    storage = decoder.cache.layers[0].keys.packed_storage
    assert [storage.length, storage.packed, storage.begin] == storage.state.tolist()


def test_two_continuations_of_a_prefix_do_not_see_each_other(subject):
    if not subject.grows:
        pytest.skip("a cache of full length is written in place")
    first = subject.decoder()
    second = copy.copy(first)
    second.cache = DynamicCache(config=subject.model.config)
    second.cache.layers = [copy.copy(layer) for layer in first.cache.layers]
    logits = [[decoder.step(token) for token in tokens] for decoder, tokens in ((first, range(5)), (second, range(5)))]
    assert_same(*logits)
    assert_same(first.parts(), second.parts())


def test_layers_that_hold_the_same_tensor_extend_it_one_after_the_other(subject):
    if not subject.grows:
        pytest.skip("a cache of full length is written in place")

    def step():
        decoder = subject.decoder()
        decoder.cache.layers[2].keys = decoder.cache.layers[1].keys
        return [decoder.step(), *decoder.parts()]

    step(), step()  # a graph of its own
    chained = step()
    with subject.in_python():
        assert_same(chained, step())


def test_going_back_under_a_mask_that_shows_what_lies_behind(subject, caplog):
    """Such a write is no append: that attention runs in Python."""
    if subject.grows:
        pytest.skip("a growing cache is written behind its end only")
    results = []
    visible = torch.zeros(1, 1, 1, CAPACITY, dtype=subject.model.dtype)
    visible[..., PROMPT.shape[1] :] = torch.finfo(visible.dtype).min

    def step(decoder):
        for layer in decoder.cache.layers:
            layer.cumulative_length.sub_(20)
        return decoder.call(torch.tensor([[3]]), torch.tensor([[decoder.length - 20]]), visible)

    for _ in range(2):
        step(subject.decoder())
    for chained in (True, False):
        decoder = subject.decoder()
        if chained:
            caplog.clear()
            logits = step(decoder)
            assert sum("out of order" in record.message for record in caplog.records) == 2 * LAYERS
        else:
            with subject.in_python():
                logits = step(decoder)
        results.append([logits, *decoder.parts()])
    assert_same(*results)


@pytest.mark.parametrize(
    "layers, options",
    [(LAYERS, {"rest": "eager"}), (LAYERS, {"provider": "reference"}), (4, {})],
    ids=["nothing is compiled", "a provider without chains", "regions not worth a wrapper"],
)
def test_no_chain(layers, options, monkeypatch):
    made = []
    compile_chain = chains.Chain.compile_with_provider
    monkeypatch.setattr(chains.Chain, "compile_with_provider", lambda chain: made.append(chain) or compile_chain(chain))
    decoder = Subject(layers=layers, **options).decoder()
    for _ in range(3):
        decoder.step()
    assert decoder.parts()
    assert not made


def test_a_wrapper_with_work_of_its_own_has_no_entry():
    def g(args):
        output_tensors = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(args)
        return [output_tensors[0].item(), torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors]

    class Code:
        current_callable = staticmethod(g)

    assert entry_of(Code()) is None


@pytest.mark.extended
@pytest.mark.xfail(reason="their chain is not compiled yet: Python runs its instructions", strict=True)
def test_a_sliding_window_of_fixed_size_is_chained():
    """It rolls on in a chain as its graph does in Python."""
    graphs, make = [], split_graph.SplitGraph.__init__

    def remember(graph, *args, **kwargs):
        make(graph, *args, **kwargs)
        graphs.append(graph)

    torch._dynamo.reset()
    model = FAMILIES["mistral"].build(num_hidden_layers=3)
    model.compile(backend="tqai", options=OPTIONS)

    def steps(chained):
        cache = StaticCache(config=model.config, max_cache_len=CAPACITY)
        ids, logits = torch.cat([PROMPT, torch.arange(40)[None]], 1), []
        with torch.no_grad():
            for a, b in [(0, 90), *((at, at + 1) for at in range(90, 130))]:
                for graph in graphs:
                    for chain in graph.chains if not chained else ():
                        chain.run = chain.module.forward
                logits.append(model(ids[:, a:b], past_key_values=cache).logits)
        return logits, [part for layer in cache.layers for part in (layer.keys.state, layer.keys.dequantize())]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split_graph.SplitGraph, "__init__", remember)
        logits, parts = steps(True)
        found = [chain for graph in graphs for chain in graph.chains]
        assert any(isinstance(chain.run, chains.CompiledChain) for chain in found)
        assert any(isinstance(node.target, AttendSlide) for chain in found for node in chain.module.graph.nodes)
        expected, expected_parts = steps(False)
    assert_same(logits, expected)
    assert_same(parts, expected_parts)
