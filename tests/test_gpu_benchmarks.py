"""The GPU benchmarks, as far as they go without one: the baseline's numbers, refusals, and a run in the interpreter."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
FOLDER = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu"


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.mark.parametrize("group,head_dim,length", [(1, 64, 7), (4, 96, 300)])
def test_the_fp8_baseline_is_attention(scripts, group, head_dim, length):
    import fp8

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 2 * group, 1, head_dim, generator=generator).to(device)
    keys, values = (torch.randn(1, 2, length, head_dim, generator=generator).to(device) for _ in range(2))
    (k8, k_scale), (v8, v_scale) = fp8.quantize(keys), fp8.quantize(values)
    actual = fp8.attend(query, k8, v8, k_scale, v_scale, head_dim**-0.5, (64, 4, 2, 2), 3)
    expected = F.scaled_dot_product_attention(query, k8.float() * k_scale, v8.float() * v_scale, enable_gqa=True)
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=0)


def test_packed_cache_is_one(scripts):
    from measure import formats, packed_cache

    from tqc.ops import planes as ops

    k_fmt, _ = formats(64, 4, 2)
    parts = packed_cache(2, 1, 1000, k_fmt, torch.float32, "cpu", spare=100)
    assert parts[0].shape[2] * 32 >= k_fmt.packed_tokens(1100)
    decoded = ops.read(*parts, 1000, str(k_fmt))
    assert decoded.isfinite().all() and 0.8 < decoded.std() < 1.2
    ops.append(*parts, torch.zeros(2, 1, 100, 64), None, str(k_fmt))


def test_tuning_takes_the_fastest_and_keeps_other_entries(scripts, tmp_path):
    import tune

    from tqc.lowering.triton.tuning import Launch

    default = Launch(tile=64, dense_tile=32, rows=16, num_warps=4, num_stages=2)
    launches = list(tune.candidates("decode", default))
    assert launches[0] == default and len(set(launches)) >= 30
    launch, gain = tune.best(launches, {0: [1.0, 4.0], 3: [0.9, 5.0], 5: [0.5, 2.0]})
    assert launch == launches[5] and gain == 2.0
    path = tmp_path / "tuned.json"
    path.write_text('{"sm_80": {"a": {"tile": 1}}, "sm_90": {"b": {"tile": 2}}}')
    tune.write("sm_90", "c", launch, path)
    table = json.loads(path.read_text())
    assert table["sm_80"] == {"a": {"tile": 1}} and table["sm_90"]["b"] == {"tile": 2}
    assert Launch(**table["sm_90"]["c"]) == launch


@pytest.mark.parametrize(
    "interpret,arguments,words",
    [
        ("1", ["--out", "x.json", "--sections", "nonsense"], "invalid choice"),
        ("1", ["--out", "x.json", "--device", "cpu"], "numerics"),
        ("1", ["--out", "no/such/folder/x.json", "--device", "cpu", "--sections", "numerics"], "no folder"),
        ("", ["--out", "x.json", "--device", "cpu", "--sections", "numerics"], "TRITON_INTERPRET=1"),
        ("", ["--out", "x.json"], "no GPU"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(scripts, monkeypatch, capsys, interpret, arguments, words):
    import run as script

    if words == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_numerics_in_the_interpreter(scripts):
    import sections

    rows = list(sections.numerics("cpu", True, lambda: 1e9))
    assert len(rows) == 2 and all(row["passed"] for row in rows), rows


def test_numerics_notice_what_is_wrong(scripts, monkeypatch):
    import sections

    attend = sections.kernels.attend

    def wrong(*arguments):
        out, lse = attend(*arguments)
        return 1.1 * out, lse

    monkeypatch.setattr(sections.kernels, "attend", wrong)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert next(sections.numerics(device, True, lambda: 1e9))["passed"] is False


def test_a_section_that_crashes_keeps_its_rows(scripts, monkeypatch, tmp_path):
    """The worker dies after a row: the row and the error are in the file, and the exit status says so."""
    import run as script

    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, sys\n"
        "open(sys.argv[sys.argv.index('--out') + 1], 'w').write('{\"passed\": true}\\n')\n"
        "sys.stderr.write('illegal memory access')\nos._exit(9)\n"
    )
    monkeypatch.setattr(script, "__file__", str(worker))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    out = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", ["run.py", "--device", "cpu", "--sections", "numerics", "--out", str(out)])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 1
    section = json.loads(out.read_text())["sections"]["numerics"]
    assert section["rows"] == [{"passed": True}] and "illegal memory access" in section["error"]
