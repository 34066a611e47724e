"""Products of few rows become Inductor's own loops, and only those."""

import pytest
import torch
from torch._inductor.utils import fresh_cache, run_and_get_code

from tqc.execute import matrix_vector
from tqc.torch_private import inductor_compile


def run(function, *examples):
    """The result of `function`, compiled as a region is, and the code that Inductor wrote for it."""
    module = torch.fx.symbolic_trace(function)
    fake = torch._subclasses.FakeTensorMode()
    results = []

    def compile_and_run():
        fakes = [fake.from_tensor(example) for example in examples]
        compiled, _ = inductor_compile(module, fakes, False, matrix_vector.decompositions())
        results.append(compiled(*examples)[0])

    with torch.no_grad(), fresh_cache():
        _, codes = run_and_get_code(compile_and_run)
    return results[0], codes[0].split("async_compile.wait")[-1]


def linear(x, weight, bias):
    return (torch.nn.functional.linear(x, weight, bias),)


def linear_no_bias(x, weight):
    return (torch.nn.functional.linear(x, weight),)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_row_is_multiplied_and_summed(dtype, bias):
    torch.manual_seed(0)
    x, weight, b = torch.randn(1, 1, 48), torch.randn(80, 48), torch.randn(80)
    arguments = [tensor.to(dtype) for tensor in ((x, weight, b) if bias else (x, weight))]
    out, code = run(linear if bias else linear_no_bias, *arguments)
    assert "extern_kernels" not in code
    expected = torch.nn.functional.linear(*(tensor.double() for tensor in arguments))
    assert out.dtype == dtype
    # As near as rounding the exact product to the dtype can be, give or take the order of the sum.
    torch.testing.assert_close(out.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_stay_a_matrix_product(dtype):
    torch.manual_seed(0)
    few = matrix_vector.MAX_ROWS[dtype]
    weight = torch.randn(80, 48).to(dtype)
    for rows in (few, few + 1):
        x = torch.randn(rows, 1, 48).to(dtype)
        out, code = run(linear_no_bias, x, weight)
        assert ("extern_kernels.mm" in code) == (rows > few)
        torch.testing.assert_close(out, torch.nn.functional.linear(x, weight), rtol=2e-2, atol=2e-2)


def test_double_stays_with_the_library():
    _, code = run(linear_no_bias, torch.randn(1, 48).double(), torch.randn(80, 48).double())
    assert "extern_kernels.mm" in code
