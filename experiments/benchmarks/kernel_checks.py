"""Products on a GPU against float64, in every way that the operator takes."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from matquant.formats.nested import NestedWeight, Slicing, WeightFormat, planes_read
from matquant.formats.planes import NestedPlanes
from matquant.inference import ops
from matquant.inference.gemm_shape import GemmShape
from matquant.inference.kernel_families.wgmma import WGMMA_MIN_M


def activations(tokens: int, depth: int, dtype: torch.dtype, device: str = "cuda") -> Tensor:
    """Random, with a mean that is not 0 and a few columns ten times as large."""
    x = torch.randn(tokens, depth, device=device) + 0.5
    x[:, 7::97] *= 10
    return x.to(dtype)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """A product whose result is compared with float64; by default N is no multiple of 64, and K of the group or else of 32."""

    bits: int
    tokens: int
    dtype: torch.dtype
    group: int
    slicing: Slicing
    zeros: bool
    stretch: float
    rows: int = 1000
    columns: int = 0

    @property
    def depth(self) -> int:
        return self.columns or (self.group if self.group > 128 else 1280)

    def problem(self) -> GemmShape:
        return GemmShape(
            tokens=self.tokens,
            rows=self.rows,
            depth=self.depth,
            bits=self.bits,
            dtype=self.dtype,
            format=WeightFormat(
                group_size=self.group,
                slicing=self.slicing,
                zero_point_offset=8.0,
                scale_dtype=self.dtype,
                has_zero_points=self.zeros,
                stretch=self.stretch,
            ),
        )

    def error(self) -> float:
        """Error as a multiple of the rounding error of the exact result.

        From ``WGMMA_MIN_M`` tokens on the reference is a dense matmul. Planes that must not be read are poisoned.
        """
        shape = (self.rows, self.depth // self.group)
        sign = torch.randint(0, 2, shape, device="cuda") * 2 - 1
        weight = NestedWeight(
            codes=torch.randint(0, 256, (self.rows, self.depth), dtype=torch.uint8, device="cuda"),
            scales=((torch.rand(shape, device="cuda") * 0.02 + 0.001) * sign).to(self.dtype),
            zeros=torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda") if self.zeros else None,
            format=WeightFormat(
                master_bits=8,
                slicing=self.slicing,
                zero_point_offset=8.0,
                group_size=self.group,
                has_zero_points=self.zeros,
                scale_dtype=self.dtype,
                stretch=self.stretch,
            ),
        )
        packed = NestedPlanes.pack(weight)
        packed.planes[planes_read(self.bits, 8, self.slicing) :] = -1
        x, bias = activations(self.tokens, self.depth, self.dtype), torch.randn(self.rows, device="cuda").to(self.dtype)
        # float32 holds every dequantized weight to 2^-24, far below what is allowed.
        exact, by_dense = (
            x.double() @ weight.dequantize(self.bits, dtype).double().T + bias.double()
            for dtype in (torch.float32, self.dtype)
        )
        best = (by_dense if self.tokens >= WGMMA_MIN_M else exact).to(self.dtype)
        made = torch.linalg.norm(ops.linear(x, packed, self.bits, bias).double() - exact)
        return (made / torch.linalg.norm(best.double() - exact)).item()


# N and K whose CTAs fill a wave of 132 multiprocessors: clusters of 2, 4 and 8, and whole tiles.
WAVES = ((4096, 4096), (4060, 8192), (6144, 4096), (8192, 8192), (14336, 4096), (28640, 2048))


def checks(bits: Sequence[int], stretches: Sequence[float]) -> list[Check]:
    """Cases of these bit-widths in both dtypes; the stretches, group sizes and kinds of slices take turns."""
    groups = (128, 64, 32, 1312)
    found = []
    for i, b in enumerate(bits):
        for j, (rows, columns) in enumerate(WAVES):
            for tokens in (1, 8, 16, 32, 64, 100, 256, 500):
                found.append(
                    Check(
                        bits=b,
                        tokens=tokens,
                        dtype=(torch.float16, torch.bfloat16)[j % 2],
                        group=groups[(i + j) % 2],
                        slicing="msb",
                        zeros=(i + j) % 3 == 2,
                        stretch=stretches[(i + j) % len(stretches)],
                        rows=rows,
                        columns=columns,
                    )
                )
    for i, b in enumerate(bits):
        for j, dtype in enumerate((torch.float16, torch.bfloat16)):
            kind: Slicing = "round" if (i + j) % 3 == 2 else "msb"
            for tokens in (1, 3, 12, 17, 33, 64, 100, 300):
                found.append(
                    Check(
                        bits=b,
                        tokens=tokens,
                        dtype=dtype,
                        group=groups[(i + j) % 4],
                        slicing=kind,
                        zeros=(i + j) % 2 == 1,
                        stretch=stretches[(i + j) % len(stretches)] if kind == "msb" else 1.0,
                    )
                )
    return found


def check(bits: Sequence[int], stretches: Sequence[float]) -> float:
    """The largest error. Raises SystemExit if one is more than 1.2. cuBLAS adds up in float32, as the kernels do."""
    worst, products = 0.0, torch.backends.cuda.matmul
    products.allow_fp16_reduced_precision_reduction = products.allow_bf16_reduced_precision_reduction = False
    for case in checks(bits, stretches):
        error = case.error()
        if not error <= 1.2:
            raise SystemExit(f"WRONG, {error:.3g} times the error of rounding: {case}")
        worst = max(worst, error)
    return worst
