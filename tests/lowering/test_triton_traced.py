"""The provider's ops that torch looks into: what they compute, what they write, and what Inductor makes of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tqc.format import PackedFormat

pytest.importorskip("triton")
from tqc.lowering.triton import PROVIDER, kernels, traced_ops  # noqa: E402
from tqc.lowering.triton.tables import append_tables, attend_tables, read_tables  # noqa: E402

K_FMT, V_FMT = (PackedFormat(64, bits, bits == 4, residual_window=32) for bits in (4, 2))
CACHE = sorted(f"{side}_{part}" for side in "kv" for part in ("pages", "dense", "state"))
ops = getattr(torch.ops, traced_ops.NAMESPACE)


def store(fmt, device, tokens=80):
    parts = [
        torch.zeros(1, 2, 5, fmt.page_bytes, dtype=torch.uint8, device=device),
        fmt.empty_dense(1, 2, fmt.dense_rows, torch.float32, device),
        torch.zeros(3, dtype=torch.int64, device=device),
    ]
    kernels.append(*parts, torch.randn(1, 2, tokens, 64).to(device), None, fmt.spec)
    return parts


def test_they_compute_what_the_functions_do(triton_device):
    torch.manual_seed(0)
    device = torch.device(triton_device)
    k, v = store(K_FMT, device), store(V_FMT, device)
    query = torch.randn(1, 4, 1, 64).to(device)
    key, value = (torch.randn(1, 2, 1, 64).to(device) for _ in range(2))
    specs, start = (K_FMT.spec, V_FMT.spec), torch.tensor([80], device=device)
    rest = (key, value, None, None, start, 0.125, 0.0, False, *specs)
    actual = ops.attend(query, *k, *v, *rest, attend_tables(*specs, torch.float32, device))
    for ours, theirs in zip(actual, kernels.attend(query, *k, *v, *rest), strict=True):
        assert torch.equal(ours, theirs)

    tables = [append_tables(spec, torch.float32, device) for spec in specs]
    expected = [part.clone() for part in (*k, *v)]
    kernels.append_pair(*expected[:3], key, *expected[3:], value, start, *specs)
    ops.append_pair(*k, key, *v, value, start, *specs, [*tables[0], *tables[1]])
    for ours, theirs in zip((*k, *v), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert k[2].tolist() == [81, 64, 0]
    ops.append(*k, key, None, specs[0], tables[0])
    assert k[2].tolist() == [82, 64, 0]
    dense = ops.read(*k, 82, specs[0], read_tables(specs[0], device))
    assert torch.equal(dense, kernels.read(*k, 82, specs[0])) and torch.equal(dense[:, :, 81:], key)


def test_paged(triton_device):
    torch.manual_seed(0)
    device = torch.device(triton_device)
    k, v = store(K_FMT, device), store(V_FMT, device)
    pools = [part[0].transpose(0, 1).contiguous() for part in (k[0], v[0])]
    table = torch.arange(5, dtype=torch.int32, device=device)[None]
    lengths = torch.tensor([80], dtype=torch.int32, device=device)
    query, specs = torch.randn(1, 4, 1, 64).to(device), (K_FMT.spec, V_FMT.spec)
    stored = (query, pools[0], k[1], pools[1], v[1], table, lengths, None, None, *specs)
    tables = attend_tables(*specs, torch.float32, device)
    actual, _ = ops.attend_paged(*stored, 0.125, 1, None, None, None, 0.0, False, tables)
    expected, _ = kernels.attend(query, *k, *v, None, None, None, None, None, 0.125, 0.0, False, *specs)
    torch.testing.assert_close(actual, expected)


def test_their_schemas_say_what_they_write(triton_device):
    device = torch.device(triton_device)
    k, v, new = store(K_FMT, device), store(V_FMT, device), torch.randn(1, 2, 1, 64).to(device)
    specs, query = (K_FMT.spec, V_FMT.spec), torch.randn(1, 4, 1, 64).to(device)
    tables = [list(append_tables(spec, torch.float32, device)) for spec in specs]
    attend = (query, *k, *v, new, new, None, None, None, 0.125, 0.0, True, *specs)
    for op, arguments in (
        (ops.append, (*k, new, None, specs[0], tables[0])),
        (ops.append_pair, (*k, new, *v, new, None, *specs, tables[0] + tables[1])),
        (ops.read, (*k, 80, specs[0], list(read_tables(specs[0], device)))),
        (ops.attend, (*attend, list(attend_tables(*specs, torch.float32, device)))),
    ):
        torch.library.opcheck(op.default, arguments, test_utils="test_schema")
        written = {a.name for a in op.default._schema.arguments if a.is_write}
        assert written == ({"pages", "dense", "state"} if op is ops.append else set(CACHE) & written), op
    assert {a.name for a in ops.append_pair.default._schema.arguments if a.is_write} == set(CACHE)


def test_arguments_that_do_not_fit_are_refused(triton_device):
    device = torch.device(triton_device)
    k, new = store(K_FMT, device), torch.zeros(1, 2, 1, 64, device=device)
    with pytest.raises(ValueError, match="does not fit"):
        ops.append(*k, new[:, :1], None, K_FMT.spec, append_tables(K_FMT.spec, torch.float32, device))
    assert k[2].tolist() == [80, 64, 0]


@pytest.mark.gpu
@pytest.mark.skipif(PROVIDER.unavailable() is not None, reason=f"Triton: {PROVIDER.unavailable()}")
def test_inductor_runs_them():
    torch.manual_seed(0)
    device, specs = torch.device("cuda"), (K_FMT.spec, V_FMT.spec)
    stores = [*store(K_FMT, device), *store(V_FMT, device)]
    query, key, value = (torch.randn(1, heads, 1, 64).to(device) for heads in (4, 2, 2))
    tables = [list(append_tables(spec, torch.float32, device)) for spec in specs]
    of_attend = list(attend_tables(*specs, torch.float32, device))

    def step(query, key, value, *stores):
        k, v = stores[:3], stores[3:]
        out, _ = ops.attend(query, *k, *v, key, value, None, None, None, 0.125, 0.0, True, *specs, of_attend)
        ops.append_pair(*k, key, *v, value, None, *specs, tables[0] + tables[1])
        return 2 * out

    expected = [part.clone() for part in stores]
    wanted = step(query, key, value, *expected)
    actual = torch.compile(step, fullgraph=True)(query, key, value, *stores)
    torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=1e-4)
    assert stores[2].tolist() == [81, 64, 0]
    for ours, theirs in zip(stores, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.fixture(scope="module")
def over_cuda():
    """What `traced_main.py` finds: a graph and Inductor's code for a decode step over CUDA tensors."""
    script = Path(__file__).with_name("traced_main.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_torch_sees_the_kernels_and_what_they_write(over_cuda):
    out = ["lse", "out"]
    assert over_cuda["unfolded"]["launches"] == [
        {"kernel": "attend_kernel", "writes": out},
        {"kernel": "merge_kernel", "writes": out},
        {"kernel": "append_kernel", "writes": sorted(CACHE)},
    ]
    assert sorted(over_cuda["unfolded"]["outputs"]) == sorted(CACHE), "inputs that the graph changes"
    # They are part of the keys of torch's caches: an op whose kernels it missed would be served stale code.
    assert over_cuda["kernels of ops"] == {
        "append": ["append_kernel"],
        "append_pair": ["append_kernel"],
        "read": ["read_kernel"],
        "attend": ["attend_kernel", "merge_kernel"],
        "attend_paged": ["attend_kernel", "merge_kernel"],
    }


@pytest.mark.parametrize("tracer", ["dynamo", "make_fx", "export"])
def test_tracers_keep_the_ops(over_cuda, tracer):
    """Dynamo without a graph break."""
    assert over_cuda["unfolded"][tracer] == [f"{traced_ops.NAMESPACE}.{name}" for name in ("attend", "append_pair")]


def test_inductor_launches_the_kernels(over_cuda):
    calls = over_cuda["inductor"]["calls"]
    first = calls.index("attend_kernel_0.run")
    assert calls[first : first + 3] == ["attend_kernel_0.run", "merge_kernel_1.run", "append_kernel_2.run"]
    assert all(name.startswith("triton_poi") for name in calls[:first] + calls[first + 3 :])
    # In place: nothing is copied between what the graph makes its cache of and the launch.
    assert len(calls[:first]) == len(CACHE)
    assert [row["ptx"] for row in over_cuda["inductor"]["compiled"]] == [True] * 3


def test_a_step_of_the_runtime_neither_waits_nor_copies(over_cuda):
    """So that it can be recorded: memory for results, views and launches, nothing that the host reads."""
    found = over_cuda["runtime"]
    assert found["launches"] == ["attend_kernel", "merge_kernel", "append_kernel"]
    allowed = ("aten.empty.", "aten.transpose.", "aten.detach.", "prim.device")
    assert not [name for name in found["operations"] if not name.startswith(allowed)]
    assert sum(name.startswith("aten.empty.") for name in found["operations"]) == 4
    assert found["lengths known"] == [None, None]
