"""Fixtures of tests that launch kernels on the CPU emulator."""

import ctypes
import types

import pytest
import torch
from emulated_device import EmulatedDriver, SharedWorkspace

from matquant.cuda import Kernel
from matquant.cuda.arguments import Address
from matquant.inference import cuda_ops, direct_calls, launch_config
from tests.kernels.emulator import TensorMap, compile_kernel, read_source


@pytest.fixture
def device(monkeypatch, request):
    """A CUDA device of 3 multiprocessors that the CPU emulator implements. Returns its launches.

    With ``@pytest.mark.parametrize("device", ["sm_90a"], indirect=True)`` it has WGMMA, without frames of arguments: the
    emulator has descriptors of its own.
    """
    launched = []
    capability = (9, 0) if getattr(request, "param", None) == "sm_90a" else (8, 6)

    def load(source, name, *, defines, device, **how):
        if capability == (9, 0):
            return Launcher(source, name, defines)

        def ran(grid):
            launched.append((defines, grid))
            return len(launched)

        compiled = compile_kernel(read_source(source), name, defines)
        return Kernel(name, 5, device, EmulatedDriver(compiled, ran), pdl=True)

    class Launcher:
        def __init__(self, source, name, defines):
            self.defines = defines
            self.kernel = compile_kernel(read_source(source), name, defines)

        def launch(self, grid, block, args, shared_bytes):
            launched.append((self.defines, grid))
            args = [ctypes.c_void_p(arg) if isinstance(arg, Address) else arg for arg in args]
            self.kernel.launch((grid,), (block,), args, shared_bytes, seed=len(launched))

    properties = types.SimpleNamespace(multi_processor_count=3, shared_memory_per_multiprocessor=100 * 1024)
    monkeypatch.setattr(cuda_ops, "load", load)
    monkeypatch.setattr(cuda_ops, "Workspace", SharedWorkspace)
    monkeypatch.setattr(cuda_ops, "launch_cache", {})
    monkeypatch.setattr(cuda_ops, "workspaces", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(launch_config, "encode_tma_descriptor", TensorMap)
    return launched


@pytest.fixture
def emulated(device, monkeypatch):
    """The kernels run on the CPU emulator for layers on the CPU. Returns their launches."""
    monkeypatch.setattr(direct_calls, "is_on_cuda", lambda tensor: True)
    return device
