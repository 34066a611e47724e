"""The rotation of V folded into weights: what can be folded, what cannot and why, and who owns the weights."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tqc
from tests.passes.common import OPTIONS, compiled, notes
from tqc import ops
from tqc.cache.packed_tensor import pack
from tqc.config import Config
from tqc.format.quantizer import fold
from tqc.lowering import reference, select
from tqc.passes import rewrite
from tqc.passes.plan import FUSE, PACK

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
    with compiled(block, fold_values=True) as (fast, plans):
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
        with compiled(block, fold_values=True) as (fast, plans):
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
        plan = rewrite(gm, Config.from_options({**OPTIONS, "fold_values": True}))
        graphs.append((gm, plan))
        return lambda *args: gm(*(x for x in args if not isinstance(x, nn.Parameter)))

    block = Block()
    torch._dynamo.reset()
    with torch.no_grad():
        expected = block(hidden(80), empty(), empty())
        actual = torch.compile(block, backend=backend)(hidden(80), empty(), empty())
    ((gm, plan),) = graphs
    assert plan.rewritten["fold_rotation"] == 1 and actual[2].fmt.folded
    assert not any(node.target is ops.fold for node in gm.graph.nodes)
    linears = [node for node in gm.graph.nodes if node.target is F.linear]
    assert sum(str(node.args[1].target).startswith("_folded") for node in linears) == 2
    assert not any(node.target is operator.getitem and "own" in str(node.args[0]) for node in gm.graph.nodes)
    torch.testing.assert_close(actual[0], expected[0], atol=1e-4, rtol=1e-4)


def test_a_provider_that_knows_nothing_of_it_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    k_fmt, v_fmt = Config.from_options(OPTIONS).formats(HEAD_DIM, HEAD_DIM)
    folded = tqc.format.PackedFormat.parse(f"{v_fmt}:folded")
    plain = dataclasses.replace(reference.PROVIDER, folded=False)
    monkeypatch.setattr(select, "providers", lambda: [plain])
    assert select.choose(k_fmt, v_fmt, torch.float32, "cpu", "reference")[0] is plain
    with pytest.raises(ValueError, match="takes no folded values"):
        select.choose(k_fmt, folded, torch.float32, "cpu", "reference")
