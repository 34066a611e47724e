"""The shim finds what is wrong with a kernel, so that what passes it has none of these faults."""

from __future__ import annotations

import shutil
import sys

import pytest

mx = pytest.importorskip("mlx.core")

from tests.lowering.metal_shim import Shim  # noqa: E402
from tqc.lowering.metal.language import Kernel  # noqa: E402

if sys.platform != "linux" or not shutil.which("g++"):
    pytest.skip("the shim needs g++ on Linux", allow_module_level=True)

_BEGIN = """
  const int lane = thread_index_in_simdgroup;
  const int at = simdgroup_index_in_threadgroup * 32 + lane;
  SHARED float kept[64];
"""
_MISSING_BARRIER = "kept[at] = x[at]; out[at] = kept[63 - at];"
_BARRIER = "kept[at] = x[at]; group_barrier(); out[at] = kept[63 - at];"
_SIMDGROUP = "out[at] = simd_sum(x[at]) + 100.0f * simd_max(x[at]);"
_DIVERGED = "if (lane < 5) out[at] = simd_sum(x[at]); else { group_barrier(); out[at] = 0.0f; }"
_ENDED = "if (lane < 5) return; out[at] = simd_sum(x[at]);"
_NOT_ALL = "if (at < 32) group_barrier(); out[at] = 0.0f;"
_NEVER_WRITTEN = "out[at] = kept[at];"


def run(body):
    kernel = Kernel("tried", ("x",), ("out",), "float32", (), "", _BEGIN + body, 2)
    how = {"grid": (128, 1, 1), "threadgroup": (64, 1, 1), "output_shapes": [(64,)], "output_dtypes": [mx.float32]}
    return Shim(kernel)(inputs=[mx.arange(64, dtype=mx.float32)], **how)[0]


def test_barriers_and_functions_of_simdgroups():
    assert run(_BARRIER).tolist() == list(range(63, -1, -1))
    sums = [sum(range(32)) + 3100, sum(range(32, 64)) + 6300]
    assert run(_SIMDGROUP).tolist() == [sums[0]] * 32 + [sums[1]] * 32


@pytest.mark.parametrize(
    "body, fault",
    [
        (_MISSING_BARRIER, "results depend on the order of threads"),
        (_DIVERGED, "a simdgroup diverged"),
        (_ENDED, "a thread ended before its simdgroup met"),
        (_NOT_ALL, "a thread ended before a barrier"),
    ],
)
def test_faults_are_found(body, fault):
    with pytest.raises(AssertionError, match=fault):
        run(body)


def test_threadgroup_memory_begins_as_nans():
    assert mx.isnan(run(_NEVER_WRITTEN)).all()
