"""The CPU provider's products of integers: what they add to the error, and that their sums fit."""

import pytest
import torch

from tests.lowering.common import CPU_LEVELS, check_int8, filled, make_store
from tqc.format import PackedFormat
from tqc.lowering.cpu import PROVIDER, kernels

if reason := PROVIDER.unavailable():
    pytest.skip(f"the CPU provider does not run here: {reason}", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("few_threads")


@pytest.mark.parametrize("spread", [1.0, 4.0], ids=["even", "peaked"])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("provider", [name for name in CPU_LEVELS if name != "scalar"], indirect=True)
def test_products_of_integers_add_little_to_the_formats_own_error(provider, head_dim, bits, spread):
    """Added error of the output by int8 or int16 products, against the error that packing makes: at most 5 %."""
    k_fmt, v_fmt = PackedFormat(head_dim, bits, True), PackedFormat(head_dim, bits, False)
    generator = torch.Generator().manual_seed(bits)
    keys, values = (torch.randn(1, 4, 2000, head_dim, generator=generator) for _ in range(2))
    query = torch.randn(1, 16, 16, head_dim, generator=generator) * spread
    k, v = make_store(1, 4, 2000, k_fmt, torch.float32), make_store(1, 4, 2000, v_fmt, torch.float32)
    provider.append(*k, keys, None, str(k_fmt))
    provider.append(*v, values, None, str(v_fmt))
    rest = (None, None, None, None, None, head_dim**-0.5, 0.0, False, str(k_fmt), str(v_fmt))
    module = kernels.loaded()
    outputs = {}
    for int8 in (False, True):
        module.use_int8(int8)
        outputs[int8], _ = provider.attend(query, *k, *v, *rest)
    exact = torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    check_int8(outputs[True], outputs[False], exact)
    in_float = bits == 8 and provider.level() == "avx2"
    assert torch.equal(outputs[True], outputs[False]) == in_float


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("head_dim", [256, 512])
@pytest.mark.parametrize("provider", [name for name in CPU_LEVELS if name != "scalar"], indirect=True)
def test_sums_of_int16_products_do_not_overflow(provider, head_dim, bits, sign):
    """The largest products there are: every code, element of the query and weight is the highest."""
    fmt = PackedFormat(head_dim, bits, False)
    k, v = filled(1, 1, 400, fmt, torch.float32), filled(1, 1, 400, fmt, torch.float32)
    for pages in (k[0], v[0]):
        pages[:, :, :, fmt.planes[0][2] :] = 255
        pages[:, :, :, 16:48] = 0
        pages[:, :, :, :4] = torch.ones(1).view(torch.uint8)
    query = (sign * fmt.rotation_matrix().T @ torch.ones(head_dim)).view(1, 1, 1, head_dim)
    rest = (None, None, None, None, None, 1 / head_dim, 0.0, False, str(fmt), str(fmt))
    outputs = {}
    for integers in (False, True):
        kernels.loaded().use_int8(integers)
        outputs[integers], _ = provider.attend(query, *k, *v, *rest)
    assert outputs[False].norm() > 1
    torch.testing.assert_close(outputs[True], outputs[False], rtol=0, atol=1e-3 * outputs[False].abs().max().item())
