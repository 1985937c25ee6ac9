"""Kernels of other packages in the benchmark of kernels: stand-ins for the packages on the CPU, and the command line."""

import importlib.metadata
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from shared import ROOT, load_script
from torch import Tensor, nn

FOLDER = ROOT / "experiments" / "benchmarks"
GROUP = 128


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return load_script(FOLDER / "kernel_peers.py")


def dequantized(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    return (codes.double() - 2 ** (bits - 1)) * scales.double().repeat_interleave(GROUP, 1)


def install(monkeypatch: pytest.MonkeyPatch, **modules: dict[str, Any]) -> None:
    """Put modules of these contents into ``sys.modules``; ``__`` in a name is a dot."""
    for name, content in modules.items():
        path = name.replace("__", ".")
        module = ModuleType(path)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, path, module)


def install_humming(monkeypatch: pytest.MonkeyPatch, factor: float = 1.0) -> None:
    """Stand-in for Humming; its products are wrong by ``factor``."""

    class HummingLayer(nn.Module):
        def __init__(self, shape_n: int, shape_k: int, weight_config: dict[str, Any], torch_dtype: torch.dtype) -> None:
            super().__init__()
            self.bits, self.size = int(weight_config["dtype"].removeprefix("uint")), (shape_n, shape_k)
            assert (weight_config["group_size"], torch_dtype) == (GROUP, torch.float16)

        def load_from_tensors(self, tensors: dict[str, Tensor]) -> None:
            self.tensors = tensors

        def transform(self) -> None:
            packed, scales = self.tensors["weight"], self.tensors["weight_scale"]
            assert (packed.dtype, tuple(packed.shape)) == (torch.int32, self.size)
            self.dense = dequantized(packed, scales, self.bits)

        def forward(self, x: Tensor) -> Tensor:
            return (factor * (x.double() @ self.dense.T)).half()

    install(monkeypatch, humming={}, humming__ops={"pack_weight": lambda codes, bits: codes.contiguous()})
    install(monkeypatch, humming__layer={"HummingLayer": HummingLayer})


def old_repack(b_q_weight: Tensor, perm: Tensor, size_k: int, size_n: int, num_bits: int) -> Tensor:
    assert perm.dtype == torch.int32
    assert not perm.numel()
    return new_repack(b_q_weight, size_k, size_n, num_bits)


def new_repack(b_q_weight: Tensor, size_k: int, size_n: int, num_bits: int, is_a_8bit: bool = False) -> Tensor:
    words = b_q_weight.numpy().view("uint32").astype("int64")  # (depth * bits / 32, rows)
    parts = [(words >> shift) & (2**num_bits - 1) for shift in range(0, 32, num_bits)]
    codes = torch.stack([torch.from_numpy(part) for part in parts], 1).reshape(size_k, size_n)
    return codes.t()


def product(a: Tensor, b_q_weight: Tensor, b_scales: Tensor, b_q_type: int) -> Tensor:
    return (a.double() @ dequantized(b_q_weight, b_scales.t(), b_q_type).T).half()


def old_gemm(
    a, c, b_q_weight, b_bias, b_scales, global_scale, b_zeros, g_idx, perm, workspace, b_q_type, size_m, size_n, size_k,
    is_k_full=True, use_atomic_add=False, use_fp32_reduce=False, is_zp_float=False,
):  # fmt: skip
    assert use_fp32_reduce
    assert is_k_full
    return product(a, b_q_weight, b_scales, b_q_type)


def new_gemm(
    a, c, b_q_weight, b_bias, b_scales, a_scales, global_scale, b_zeros, workspace, b_q_type, size_m, size_n, size_k,
    use_atomic_add=False, use_fp32_reduce=False, is_zp_float=False,
):  # fmt: skip
    assert (size_m, size_k, size_n) == (*a.shape, b_q_weight.shape[0])
    return product(a, b_q_weight, b_scales, b_q_type)


def install_vllm(monkeypatch: pytest.MonkeyPatch, **ops: Callable[..., Tensor]) -> None:
    """Stand-in for vLLM with these operators. Its scalar types are numbers of bits."""
    utils = {
        "marlin_permute_scales": lambda s, size_k, size_n, group_size: s,
        "marlin_make_workspace_new": lambda device: torch.zeros(1, device=device),
    }

    class Types:
        uint4b8, uint8b128 = 4, 8

    parts = "vllm vllm.model_executor vllm.model_executor.layers vllm.model_executor.layers.quantization"
    install(monkeypatch, **{name.replace(".", "__"): {} for name in [*parts.split(), f"{parts.split()[-1]}.utils"]})
    install(monkeypatch, vllm__model_executor__layers__quantization__utils__marlin_utils=utils)
    install(monkeypatch, vllm__scalar_type={"scalar_types": Types})
    monkeypatch.setitem(sys.modules, "vllm._custom_ops", ModuleType("vllm._custom_ops"))
    sys.modules["vllm._custom_ops"].__dict__.update(ops)


OLD = {"gptq_marlin_repack": old_repack, "gptq_marlin_gemm": old_gemm}
NEW = {"gptq_marlin_repack": new_repack, "marlin_gemm": new_gemm}


def run_once(launches: Any) -> float:
    assert len({launch() is None for launch in launches}) == 1
    return 4.0


def timings(peers: Any, name: str, bits: int) -> list[Any]:
    (peer,) = peers.open_peers([name], [bits], GROUP)
    return list(peers.measure(peer, (64, 256), bits, {1: 8.0, 5: 2.0}, run_once, 1, "cpu"))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_humming_is_checked_and_timed(peers: Any, monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    install_humming(monkeypatch)
    first, second = timings(peers, "humming", bits)
    assert (first.peer, first.bits, first.tokens, first.us, first.faster, second.faster) == (
        "humming",
        bits,
        1,
        4,
        2,
        0.5,
    )
    assert 0 < first.error < 1e-3


@pytest.mark.parametrize("ops", [OLD, NEW], ids=["old", "new"])
@pytest.mark.parametrize("bits", [4, 8])
def test_marlin_is_called_by_the_names_of_its_release(
    peers: Any, monkeypatch: pytest.MonkeyPatch, ops: dict[str, Callable[..., Tensor]], bits: int
) -> None:
    install_vllm(monkeypatch, **ops)
    assert [(one.peer, one.tokens) for one in timings(peers, "marlin", bits)] == [("marlin", 1), ("marlin", 5)]


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_wrong_product_is_not_timed(peers: Any, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    install_humming(monkeypatch, factor)
    with pytest.raises(SystemExit, match="WRONG: humming .* at 4 bits, 64x256, 1 tokens: relative error"):
        timings(peers, "humming", 4)


def test_a_release_that_needs_another_argument_is_named(peers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    install_vllm(monkeypatch, gptq_marlin_repack=new_repack, marlin_gemm=lambda a, swizzle: a)
    with pytest.raises(SystemExit, match="needs swizzle, which kernel_peers.py does not know"):
        timings(peers, "marlin", 4)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run bench_kernels.py and return the sentence with which it ends."""
    monkeypatch.syspath_prepend(str(FOLDER))
    script = load_script(FOLDER / "bench_kernels.py")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["bench_kernels.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            script.main()
        assert isinstance(ended.value.code, str)  # printed, with exit status 1
        return ended.value.code

    return run


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--peers", "humming,cutlass"], "there is no peer 'cutlass'; there are humming, marlin."),
        (["--peers", "marlin", "--bits", "2,3"], "marlin has 4, 8 bits; found --bits 2, 3. Name one that it has."),
        (["--peers", "marlin", "--group", "64"], "compares groups of 128; found --group 64"),
        (["--peers", "humming"], "The peer humming cannot be imported"),
        (["--peers", "marlin"], "Install vllm into this environment, or leave it out of --peers."),
    ],
)
def test_peers_that_cannot_be_measured_end_the_run(
    bench: Callable[..., str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], sentence: str
) -> None:
    for name in ("humming", "vllm"):
        monkeypatch.setitem(sys.modules, name, None)
    assert sentence in bench(*arguments)


def test_a_release_of_vllm_without_marlin_is_named(bench: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    install_vllm(monkeypatch)
    assert "has neither marlin_gemm nor gptq_marlin_gemm" in bench("--peers", "marlin")


def test_installed_peers_are_opened_and_have_a_version(
    peers: Any, bench: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install_humming(monkeypatch)
    install_vllm(monkeypatch, **NEW)
    assert bench("--peers", "humming,marlin") == "There is no CUDA device to measure on."
    assert bench() == "There is no CUDA device to measure on."
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"1.2 of {name}")
    opened = peers.open_peers(["humming", "marlin"], [4], GROUP)
    assert [peer.version() for peer in opened] == ["1.2 of humming-kernels", "1.2 of vllm"]
