"""The rotation of V folded into weights: the same results, in every mixture of folded and other caches and graphs."""

from __future__ import annotations

import copy
import gc
import operator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import tqc
from tests.models.common import FAMILIES, assert_caches_close, assert_close, layers, prompt, run
from tests.models.common import compiled as compiled_model
from tests.passes.common import OPTIONS, compiled
from tqc import folded_weights, lowering, regions, runtime
from tqc.config import Config
from tqc.lowering import reference
from tqc.packed_tensor import PackedTensor, pack
from tqc.passes import rewrite
from tqc.passes.plan import DENSE, FUSE, PACK, Plan
from tqc.quantizer import fold

FOLDED = {"fold_values": True}


def decode(model: Any, cache: Any = None, **options: Any) -> tuple[Tensor, Any, list[Plan]]:
    cache = DynamicCache(config=model.config) if cache is None else cache
    with compiled_model(model, **options) as plans:
        return run(model, prompt(2, 90), cache, splits=(80, 87)), cache, plans


def folds(cache: Any) -> list[bool]:
    return [layer.values.fmt.folded for layer in layers(cache) if isinstance(layer.values, PackedTensor)]


def notes(plans: list[Plan]) -> str:
    return "; ".join(note for plan in plans for site in plan.sites for note in site.notes)


@pytest.mark.parametrize(
    "name, attn, tolerance",
    [
        ("llama", "sdpa", 1e-5),
        ("qwen2", "sdpa", 2e-3),  # bias on values; its large keys sit on boundaries between codes, which rounding tips
        ("phi3", "sdpa", 1e-5),  # one layer for queries, keys and values
        ("gemma2", "eager", 1e-5),
    ],
)
def test_models(name: str, attn: str, tolerance: float) -> None:
    model = FAMILIES[name].build(attn)
    expected, theirs, _ = decode(model)
    actual, ours, plans = decode(model, **FOLDED)
    for plan in plans:
        assert plan.rewritten["fold_rotation"] == FAMILIES[name].packed
        assert all(site.v_proj and site.o_proj for site in plan.sites if site.action != DENSE)
    assert plans[0].with_action(PACK) and plans[-1].with_action(FUSE)
    assert folds(ours) == [True] * FAMILIES[name].packed and not any(folds(theirs))
    assert_close(actual, expected, tolerance, "logits")
    for a, b in zip(layers(ours), layers(theirs), strict=True):
        for mine, its in ((a.keys, b.keys), (a.values, b.values)):
            torch.testing.assert_close(mine + 0, its + 0, atol=20 * tolerance, rtol=0)


@pytest.fixture(scope="module")
def llama() -> Any:
    return FAMILIES["llama"].build("sdpa")


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_generate(llama: Any, kwargs: dict[str, Any]) -> None:
    ids = prompt(1, 16).repeat(1, 5)

    def generate(**options: Any) -> Any:
        with compiled_model(llama, **options):
            return llama.generate(ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, **kwargs)

    expected, actual = generate(), generate(**FOLDED)
    assert actual.sequences.tolist() == expected.sequences.tolist()
    assert all(folds(actual.past_key_values))


@pytest.mark.parametrize("first, then", [(True, False), (False, True)])
def test_a_cache_of_one_kind_in_a_graph_of_the_other(llama: Any, first: bool, then: bool, tmp_path: Path) -> None:
    """Saved, loaded, copied, cropped, and grown by a graph with the other option, and by the model uncompiled."""
    ids, tail = prompt(2, 80), prompt(2, 7, seed=1)

    def go_on(*options: bool) -> tuple[Tensor, Any]:
        cache = DynamicCache(config=llama.config)
        with compiled_model(llama, fold_values=options[0]):
            run(llama, ids, cache)
        tqc.save_cache(cache, tmp_path / "cache")
        cache = copy.deepcopy(tqc.load_cache(tmp_path / "cache"))
        cache.crop(-3)
        logits = [run(llama, tail[:, :2], cache, splits=(2,))]  # not compiled
        assert folds(cache) == [options[0]] * 2
        with compiled_model(llama, fold_values=options[1]) as plans:
            logits.append(run(llama, tail[:, 2:], cache, splits=(2,)))
        assert folds(cache) == [options[0]] * 2
        if options == (True, False):
            assert "fold_values is off" in notes(plans)
        if options == (False, True):
            assert "the cache holds them as they are" in notes(plans)
        return torch.cat(logits, 1), cache

    (expected, theirs), (actual, ours) = go_on(False, False), go_on(first, then)
    assert_close(actual, expected, 1e-4, "logits")
    assert_caches_close(ours, theirs, 1e-3, packed=2)


def test_one_compiled_model_meets_both_kinds(llama: Any) -> None:
    """No graph that was made for one kind of cache takes the other."""
    caches = [decode(llama)[1], decode(llama, **FOLDED)[1]]
    with compiled_model(llama, **FOLDED):
        first, second, third = (run(llama, prompt(2, 3), copy.deepcopy(caches[i]), splits=(1,)) for i in (0, 1, 0))
    assert_close(second, first, 1e-4, "logits")
    assert torch.equal(third, first)


def test_a_changed_weight_is_folded_anew() -> None:
    model = FAMILIES["llama"].build("sdpa")
    attention = model.model.layers[0].self_attn
    other = {name: weight + 0.1 for name, weight in model.state_dict().items() if "proj" in name}

    def edit(step: int) -> None:
        with torch.no_grad():
            if step == 0:
                attention.v_proj.weight.mul_(-2.0)
            elif step == 1:
                model.load_state_dict(other, strict=False)
            elif step == 2:
                attention.o_proj.weight = nn.Parameter(-attention.o_proj.weight)
            elif step == 3:
                attention.v_proj.weight.data = attention.v_proj.weight.data * 3

    def steps(**options: Any) -> list[Tensor]:
        cache, logits = DynamicCache(config=model.config), []
        model.load_state_dict(before)
        with compiled_model(model, **options):
            run(model, prompt(2, 80), cache)
            for step in range(4):
                logits.append(run(model, prompt(2, 2, seed=step), cache, splits=(1,)))
                edit(step)
            attention.o_proj.weight.data.mul_(-1.0)  # torch does not count this one; the next prompt sees it
            logits.append(run(model, prompt(2, 82), DynamicCache(config=model.config)))
        return logits

    before = copy.deepcopy(model.state_dict())
    for actual, expected in zip(steps(**FOLDED), steps(), strict=True):
        assert_close(actual, expected, 1e-3, "logits")


def test_folded_weights_are_shared_by_graphs_and_go_with_their_weights() -> None:
    model = FAMILIES["llama"].build("sdpa")
    gc.collect()
    before = set(folded_weights._folded)
    _, cache, _ = decode(model, **FOLDED)
    made = folded_weights._folded.keys() - before
    assert len(made) == 4
    weight, how = model.model.layers[0].self_attn.v_proj.weight, (0, 0, 32, str(layers(cache)[0].values.fmt))
    first, second = (folded_weights.folded_weights([weight], [how], anew=False) for _ in range(2))
    assert first[0] is second[0] is folded_weights._folded[id(weight), how].folded
    del model, weight, cache
    torch._dynamo.reset()
    gc.collect()
    assert not made & folded_weights._folded.keys()


def test_regions_are_still_shared(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[bool, list[int]] = {}
    for on in (False, True):
        kinds = found[on] = []
        split = regions.split

        def count(gm: Any, split: Any = split, kinds: list[int] = kinds) -> Any:
            result = split(gm)
            kinds.append(len(result[0]))
            return result

        with monkeypatch.context() as patch:
            patch.setattr(regions, "split", count)
            decode(FAMILIES["llama"].build("sdpa", num_hidden_layers=5), fold_values=on)
    assert found[True] == found[False]


@pytest.mark.slow
def test_with_inductor(llama: Any) -> None:
    expected, theirs, _ = decode(llama, rest="inductor")
    actual, ours, _ = decode(llama, rest="inductor", **FOLDED)
    assert all(folds(ours))
    assert_close(actual, expected, 1e-4, "logits")
    assert_caches_close(ours, theirs, 1e-3, packed=2)


def test_a_preallocated_cache_is_not_folded(llama: Any) -> None:
    caches = [StaticCache(llama.config, max_cache_len=128) for _ in range(2)]
    expected, *_ = decode(llama, caches[0])
    actual, cache, plans = decode(llama, caches[1], **FOLDED)
    assert folds(cache) == [False] * 2 and "preallocated" in notes(plans)
    assert torch.equal(actual, expected)


# Small graphs: what must not be folded.
HEADS, QUERY_HEADS, HEAD_DIM, HIDDEN = 2, 4, 16, 64


class Block(nn.Module):
    """One attention layer; `forward` returns its output, the cache and what else a variant makes."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, features in (("q", QUERY_HEADS), ("k", HEADS), ("v", HEADS), ("o", QUERY_HEADS)):
            setattr(self, name, nn.Linear(HIDDEN, features * HEAD_DIM))
            with torch.no_grad():
                for weight in getattr(self, name).parameters():
                    weight.copy_(torch.randn(weight.shape, generator=generator) / 4)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, HEAD_DIM).transpose(1, 2)

    def values(self, x: Tensor) -> Tensor:
        return self.split(self.v(x))

    def project(self, out: Tensor, x: Tensor) -> Tensor:
        return self.o(out)

    def extra(self, v: Tensor) -> Any:
        return None

    def forward(self, x: Tensor, k_cache: Tensor, v_cache: Tensor) -> Any:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.values(x)
        keys, values = torch.cat([k_cache, k], dim=-2), torch.cat([v_cache, v], dim=-2)
        out = F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
        out = out.transpose(1, 2).reshape(*x.shape[:2], -1)
        return self.project(out, x), keys, values, self.extra(v)


class NormedValues(Block):
    def values(self, x: Tensor) -> Tensor:
        return F.rms_norm(self.split(self.v(x)), (HEAD_DIM,))


class AdaptedValues(Block):
    def values(self, x: Tensor) -> Tensor:
        return self.split(self.v(x) + 0.1 * self.k(x))


class TurnedValues(Block):
    def values(self, x: Tensor) -> Tensor:
        return self.split(self.v(x)).roll(1, -1)


class InterleavedValues(Block):
    def values(self, x: Tensor) -> Tensor:
        return self.v(x).view(*x.shape[:2], HEAD_DIM, -1).permute(0, 3, 1, 2)


class ValuesReturned(Block):
    def extra(self, v: Tensor) -> Any:
        return v


class ComputedWeight(Block):
    def values(self, x: Tensor) -> Tensor:
        return self.split(F.linear(x, self.v.weight * 2))


class OverlappingSlices(Block):
    def values(self, x: Tensor) -> Tensor:
        qv = self.q(x)
        self.seen = qv[..., 8:40]
        return self.split(qv[..., :32])

    def extra(self, v: Tensor) -> Any:
        return self.seen


class Gated(Block):
    def project(self, out: Tensor, x: Tensor) -> Tensor:
        return self.o(out * torch.sigmoid(x))


class OutputReadTwice(Block):
    def project(self, out: Tensor, x: Tensor) -> Tensor:
        return self.o(out) + out


REFUSED = {
    NormedValues: "the values come from rms_norm",
    AdaptedValues: "the values come from add",
    TurnedValues: "the values come from roll",
    InterleavedValues: "the values come from permute",
    ValuesReturned: "the values are read by cat, an output of the graph",
    ComputedWeight: "a weight is no parameter but comes from mul",
    OverlappingSlices: "the values are also read by getitem",
    Gated: "the output goes to mul",
    OutputReadTwice: "the output is read by linear, add",
}


def hidden(count: int) -> Tensor:
    return torch.randn(2, count, HIDDEN, generator=torch.Generator().manual_seed(count))


def empty() -> Tensor:
    return torch.tensor([])


@pytest.mark.parametrize("kind", [Block, *REFUSED], ids=lambda kind: kind.__name__)
def test_what_cannot_be_folded_says_why_and_is_right(kind: type[Block]) -> None:
    """A prompt's cache is folded only if both layers are found; one that is folded stays right in any graph."""
    block = kind()
    with torch.no_grad():
        expected = block(hidden(80), empty(), empty())
    with compiled(block, **FOLDED) as (fast, plans):
        actual = fast(hidden(80), empty(), empty())
    site = plans[0].sites[0]
    assert actual[2].fmt.folded == (kind is Block) and site.action == PACK
    if kind is not Block:
        assert site.v_proj is None and site.o_proj is None and REFUSED[kind] in notes(plans), site.notes
    torch.testing.assert_close(actual[0], expected[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(actual[2] + 0, expected[2], atol=0.2, rtol=0)

    k_fmt, v_fmt = Config.from_options(OPTIONS).formats(HEAD_DIM, HEAD_DIM)
    outputs = []
    for folded in (False, True):
        fmt = tqc.format.PackedFormat.parse(f"{v_fmt}:folded") if folded else v_fmt
        with compiled(block, **FOLDED) as (fast, plans):
            outputs.append(fast(hidden(1), pack(expected[1], k_fmt), pack(fold(expected[2], fmt), fmt)))
        assert plans[0].sites[0].action == FUSE and outputs[-1][2].fmt == fmt
    assert ("partly" in notes(plans)) == (kind is not Block)
    for a, b in zip(outputs[0], outputs[1], strict=True):
        if a is not None:
            torch.testing.assert_close(a + 0, b + 0, atol=1e-4, rtol=1e-4)


def test_a_preallocated_cache_that_came_folded_is_read_dense() -> None:
    def step(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        keys.index_copy_(2, positions, k)
        values.index_copy_(2, positions, v)
        return F.scaled_dot_product_attention(q, keys, values, mask)

    k_fmt, v_fmt = Config.from_options(OPTIONS).formats(HEAD_DIM, HEAD_DIM)
    v_fmt = tqc.format.PackedFormat.parse(f"{v_fmt}:folded")
    past = [torch.randn(1, HEADS, 100, HEAD_DIM) for _ in range(2)]
    q, k, v = (torch.randn(1, HEADS, 1, HEAD_DIM) for _ in range(3))
    caches = [pack(past[0], k_fmt), pack(fold(past[1], v_fmt), v_fmt)]
    dense = [cache + 0 for cache in caches]
    rest = torch.tensor([99]), torch.ones(1, 1, 1, 100, dtype=torch.bool)
    with compiled(step) as (fast, plans):
        actual = fast(q, k, v, *caches, *rest)
    assert plans[0].sites[0].reason == "the values of a preallocated cache are folded"
    torch.testing.assert_close(actual, step(q, k, v, *dense, *rest), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(caches[1] + 0, dense[1], atol=0.02, rtol=0)


def test_weights_that_the_graph_owns_are_replaced() -> None:
    """As in exported graphs: no call is left, the folded weights are the graph's."""
    graphs = []

    def backend(gm: Any, inputs: list[Any]) -> Any:
        names = [str(node.target) for node in gm.graph.nodes if node.op == "placeholder"]
        for node, x in zip(list(gm.graph.nodes), inputs, strict=False):
            if isinstance(x, nn.Parameter):
                gm.register_parameter(f"own_{names.index(str(node.target))}", x)
                with gm.graph.inserting_before(next(n for n in gm.graph.nodes if n.op != "placeholder")):
                    owned = gm.graph.get_attr(f"own_{names.index(str(node.target))}")
                owned.meta.update(node.meta)
                node.replace_all_uses_with(owned)
                gm.graph.erase_node(node)
        plan = rewrite(gm, Config.from_options({**OPTIONS, **FOLDED}))
        graphs.append((gm, plan))
        return lambda *args: gm(*(x for x in args if not isinstance(x, nn.Parameter)))

    block = Block()
    torch._dynamo.reset()
    with torch.no_grad():
        expected = block(hidden(80), empty(), empty())
        actual = torch.compile(block, backend=backend)(hidden(80), empty(), empty())
    ((gm, plan),) = graphs
    assert plan.rewritten["fold_rotation"] == 1 and actual[2].fmt.folded
    assert not any(node.target is runtime.folded_weights for node in gm.graph.nodes)
    linears = [node for node in gm.graph.nodes if node.target is F.linear]
    assert sum(str(node.args[1].target).startswith("_folded") for node in linears) == 2
    assert not any(node.target is operator.getitem and "own" in str(node.args[0]) for node in gm.graph.nodes)
    torch.testing.assert_close(actual[0], expected[0], atol=1e-4, rtol=1e-4)


def test_explain_says_what_was_folded(llama: Any) -> None:
    told = str(tqc.explain(llama, prompt(1, 40), options={**OPTIONS, **FOLDED}))
    assert "values folded into weights" in told and ":folded" in told.replace("\n", "")


def test_a_provider_that_knows_nothing_of_it_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    k_fmt, v_fmt = Config.from_options(OPTIONS).formats(HEAD_DIM, HEAD_DIM)
    folded = tqc.format.PackedFormat.parse(f"{v_fmt}:folded")
    monkeypatch.delattr(reference, "FOLDED")
    assert lowering.choose(k_fmt, v_fmt, torch.float32, "cpu", "reference")[0] == "reference"
    with pytest.raises(ValueError, match="takes no folded values"):
        lowering.choose(k_fmt, folded, torch.float32, "cpu", "reference")
