"""The compiled choice of codes is that of trying all codes, in the same float32 arithmetic."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matquant.nested import levels
from matquant.quantize import rows

F32 = np.float32


def brute_force(t, lam, base, scale, zero):
    """Least cost, then nearest at the highest resolution to the highest width's target, then the lowest code."""
    cost = np.zeros(base.shape[1], dtype=F32)
    for k in range(len(t)):
        error = t[k] - scale * (base[k] - zero)
        cost = cost + lam[k] * error * error
    distance = np.abs(t[-1] - scale * (base[-1] - zero))
    return min(range(base.shape[1]), key=lambda q: (cost[q], distance[q], q))


def tables(widths, master_bits, slicing):
    return torch.stack([levels(b, master_bits, slicing) for b in (*widths, master_bits)]).float().numpy()


@settings(max_examples=400, deadline=None)
@given(
    data=st.data(),
    master_bits=st.integers(4, 8),
    slicing=st.sampled_from(["msb", "round"]),
    scale=st.floats(2.0**-13, 10, width=32),
    spread=st.sampled_from([0.0, 0.1, 3.0, 100.0]),
)
def test_best_code_is_that_of_all_codes(data, master_bits, slicing, scale, spread):
    widths = sorted(data.draw(st.sets(st.integers(2, master_bits), min_size=1)))
    lam = np.array([data.draw(st.floats(2.0**-10, 1024, width=32)) for _ in widths], dtype=F32)
    zero = F32(data.draw(st.sampled_from([2 ** (master_bits - 1), 0, 3, 2**master_bits - 1])))
    centre = data.draw(st.floats(-200, 200, width=32))
    wobble = st.floats(-1, 1, width=32)
    t = np.array([(centre + spread * data.draw(wobble)) * scale for _ in widths], dtype=F32)
    base = tables(widths, master_bits, slicing)
    assert rows.best_code(t, lam, base, F32(scale), zero) == brute_force(t, lam, base, F32(scale), zero)


def test_bits_that_no_width_sees_follow_the_weight():
    base = tables([2], 8, "msb")
    lam, t = np.ones(1, dtype=F32), np.array([10.3], dtype=F32)
    # All codes 128..191 share the 2-bit slice; 138 decodes to 10.5 at 8 bits.
    assert rows.best_code(t, lam, base, F32(1), F32(128)) == 138


def test_scale_of_zero_decodes_to_zero():
    assert rows.best_code(np.ones(1, dtype=F32), np.ones(1, dtype=F32), tables([4], 8, "msb"), F32(0), F32(128)) == 128


@pytest.mark.parametrize(("dtype", "bits", "exponent"), [(torch.float16, 10, -14), (torch.bfloat16, 7, -126)])
def test_round_scale_is_the_storage_dtypes_rounding(dtype, bits, exponent):
    values = torch.cat([torch.rand(2000), torch.rand(2000) * 1e-4, torch.rand(500) * 1e-7, torch.tensor([0.0, 3.5])])
    ours = [rows.round_scale(F32(v), bits, exponent) for v in values.tolist()]
    assert ours == values.to(dtype).float().tolist()
