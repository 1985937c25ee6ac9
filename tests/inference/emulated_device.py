"""CUDA device of 3 multiprocessors on the CPU emulator, for tests of launches, and the products that are right on it."""

import ctypes

import torch
from weights import make_weight

from matquant.inference import NestedLinear


class SharedWorkspace:
    """One set of tile semaphores for all launches, for tests to read."""

    def __init__(self, device=None) -> None:
        self.semaphores = torch.zeros(4096, dtype=torch.int32)

    def acquire(self, semaphores: int, workspace: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert semaphores <= self.semaphores.numel()
        return self.semaphores, torch.full((workspace,), torch.nan)


class EmulatedDriver:
    """CUDA driver of one kernel on the CPU emulator, which reads the arguments where the kernel's frame has them.

    Attributes:
        prepared: number of launches by ``prepare``.
    """

    def __init__(self, kernel, ran) -> None:
        self.kernel, self.ran, self.prepared = kernel, ran, 0

    def current_device(self) -> int:
        return -1  # of tensors on the CPU

    def current_stream(self, device: int) -> int:
        return 77

    def allow_shared(self, function: int, size: int) -> None:
        pass

    def launch(self, function: int, device: int, pdl: bool, *rest: int) -> None:
        *shape, shared_bytes, stream, address, extra = rest
        assert (stream, extra) == (77, 0)
        self._run(shape, shared_bytes, address)

    def prepare(self, *launch: int):
        *shape, shared_bytes = launch

        def run(function: int, stream: int, address: int) -> int:
            assert stream == 77
            self.prepared += 1
            self._run(shape, shared_bytes, address)
            return 0

        return run

    def _run(self, shape, shared_bytes: int, address: int) -> None:
        pointers = (ctypes.c_void_p * self.kernel.parameters).from_address(address)
        self.kernel.launch_addresses(shape, pointers, shared_bytes, seed=self.ran(shape[0]))


def assert_close(y, x, weight, bits, bias=None, *, rounds_weights=False):
    """Require an error of at most 1.2 times that of rounding the exact result, or of a matrix of rounded weights."""
    exact, dense = (
        x.double() @ weight.dequantize(bits, dtype).double().T + (0 if bias is None else bias.double())
        for dtype in (torch.float64, x.dtype)
    )
    rounding = ((dense if rounds_weights else exact).to(x.dtype).double() - exact).norm()
    assert (y.dtype, y.shape) == (x.dtype, exact.shape)
    assert (y.double() - exact).norm() <= 1.2 * rounding


def activations(*shape, dtype=torch.float16):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(2)) + 0.3).to(dtype)


def make_layer(rows=70, columns=128, bits=4, bias=False, **options):
    weight = make_weight(rows, columns, 64, **options)
    return NestedLinear.from_planes(weight, activations(rows) if bias else None, bits=bits), weight
