"""A step that is interrupted, wherever, leaves caches that the next step can use: done again, it gives the same."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.passes.common import tensors
from tqc.cache.packed_tensor import PackedTensor, pack
from tqc.cache.storage import Appending, Storage
from tqc.execute.instructions import AttendExtend, AttendWrite
from tqc.format import PackedFormat
from tqc.lowering import reference
from tqc.lowering.provider import Provider
from tqc.ops import planes

FORMATS = PackedFormat(16, 8, True, 4, 32), PackedFormat(16, 8, False, 4, 32)
STEPS = 70  # past two pages
CAPACITY = 120
CALLS = ("attend", "append", "append")


class Interrupted(BaseException):
    """As KeyboardInterrupt, which is no Exception."""


class Kernels:
    """The reference, which is interrupted before or behind one of its calls."""

    def __init__(self) -> None:
        self.calls, self.at, self.behind = 0, -1, False

    def run(self, name: str, *args: Any) -> Any:
        here = self.calls == self.at
        self.calls += 1
        if here and not self.behind:
            raise Interrupted
        result = getattr(planes, name)(*args)
        if here:
            raise Interrupted
        return result

    def provider(self) -> Provider:
        functions = {name: lambda *args, name=name: self.run(name, *args) for name in ("append", "attend", "read")}
        return dataclasses.replace(reference.PROVIDER, load=lambda: SimpleNamespace(**functions))


def caches(grows: bool) -> list[PackedTensor]:
    *_, keys, values = tensors(batch=1, past=40)
    made = [pack(x, fmt) for x, fmt in zip((keys, values), FORMATS, strict=True)]
    if not grows:
        made = [PackedTensor(x.packed_storage, CAPACITY) for x in made]
        for x in made:
            x.packed_storage.reserve(CAPACITY)
    return made


def decode(grows: bool, where: int | None, behind: bool) -> tuple[list[torch.Tensor], list[PackedTensor]]:
    """Outputs of all steps and the caches at the end; each step is cut off at its `where`-th call, then repeated."""
    kernels = Kernels()
    step: Any = (AttendExtend if grows else AttendWrite)(kernels.provider(), 0.25, 0.0)
    held = caches(grows)
    outputs = []
    generator = torch.Generator().manual_seed(1)
    for index in range(STEPS):
        query, key, value = (torch.randn(1, heads, 1, 16, generator=generator) for heads in (4, 2, 2))
        operands = {"query": query, "key": key, "value": value, "attn_mask": None, "sinks": None}
        if not grows:
            operands["positions"] = torch.tensor([40 + index])
        for attempt in range(1 if where is None else 2):
            kernels.calls, kernels.at, kernels.behind = 0, -1 if where is None or attempt else where, behind
            try:
                result = step(**operands, k_cache=held[0], v_cache=held[1])
            except Interrupted:
                assert attempt == 0
                for x in held:
                    s = x.packed_storage
                    assert [s.length, s.packed, s.begin] == s.state.tolist(), "no host copy of a state is stale"
        out, *stored = result if grows else (result,)
        held = stored or held
        outputs.append(out)
    return outputs, held


@pytest.mark.parametrize("behind", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize("where", range(len(CALLS)), ids=["attend", "append keys", "append values"])
@pytest.mark.parametrize("grows", [True, False], ids=["growing", "preallocated"])
def test_a_step_done_again_gives_the_same(grows: bool, where: int, behind: bool) -> None:
    expected, theirs = decode(grows, None, False)
    actual, ours = decode(grows, where, behind)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=5e-3, rtol=0)  # tokens may be coded a step earlier
    for a, b in zip(ours, theirs, strict=True):
        assert a.packed_storage.length == b.packed_storage.length == 40 + STEPS
        assert torch.equal(a.dequantize(), b.dequantize())


def test_no_host_copy_is_believed_while_kernels_write() -> None:
    storage = Storage.allocate(1, 2, FORMATS[0], torch.float32, torch.device("cpu"), 8)
    with Appending((storage,), (3,)):
        assert storage._length is None and storage._packed is None
    assert (storage.length, storage.packed) == (3, 0)
    with pytest.raises(Interrupted), Appending((storage,), (2,)):
        raise Interrupted
    assert storage.length == 0, "nothing was written: the device knows"
