"""Kernels of other packages for the same products as ``bench_kernels.py`` times: ``--peers humming,marlin``.

A peer gets random symmetric codes with float16 scales, so that a weight is (code - 2^(bits-1)) * scale. Before a time is taken,
its product is compared with float64. A peer is one class here and one entry in ``PEERS``; its package is imported when the peer
is named, and is no requirement of this project.

Humming compiles a kernel for each shape, bit-width and range of batches, which takes most of the time of a run: name few.
"""

import dataclasses
import importlib
import importlib.metadata
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from kernel_checks import activations
from torch import Tensor

GROUP_SIZE = 128
MAX_ERROR = 2e-3  # relative, in norm: weights may be rounded to float16 once more
MAX_COPIES = 64

Layer = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True, slots=True)
class PeerWeight:
    """Symmetric quantized weight.

    Attributes:
        codes: uint8 [rows, depth], below 2^bits.
        scales: float16 [rows, depth / GROUP_SIZE].
    """

    codes: Tensor
    scales: Tensor
    bits: int

    @classmethod
    def random(cls, rows: int, depth: int, bits: int, device: str) -> "PeerWeight":
        codes = torch.randint(0, 2**bits, (rows, depth), dtype=torch.uint8, device=device)
        scales = torch.rand(rows, depth // GROUP_SIZE, device=device) * 0.02 + 0.001
        return cls(codes, scales.half(), bits)

    def dequantize(self) -> Tensor:
        """Dense weight: float64 [rows, depth]."""
        return (self.codes.double() - 2 ** (self.bits - 1)) * self.scales.double().repeat_interleave(GROUP_SIZE, 1)


class KernelPeer(ABC):
    """Kernel of another package.

    Attributes:
        name: its name on the command line.
        package: distribution that has it.
        bits: bit-widths that it has.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    bits: ClassVar[tuple[int, ...]]

    @abstractmethod
    def __init__(self) -> None:
        """Import the package. Raises ImportError."""

    @abstractmethod
    def layer(self, weight: PeerWeight) -> Layer:
        """Product with a weight: from x, float16 [tokens, depth], to y, float16 [tokens, rows]."""

    def version(self) -> str:
        """Version of the package; "unknown" for one without metadata."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return "unknown"


class Humming(KernelPeer):
    """Humming, by its own layer with its choice of kernel."""

    name, package, bits = "humming", "humming-kernels", (2, 3, 4, 5, 6, 7, 8)

    def __init__(self) -> None:
        self._ops, self._layers = (importlib.import_module(f"humming.{module}") for module in ("ops", "layer"))

    def layer(self, weight: PeerWeight) -> Layer:
        rows, depth = weight.codes.shape
        config = {"dtype": f"uint{weight.bits}", "group_size": GROUP_SIZE}
        layer = self._layers.HummingLayer(
            shape_n=rows, shape_k=depth, weight_config=config, torch_dtype=torch.float16
        ).to(weight.codes.device)
        packed = self._ops.pack_weight(weight.codes.int(), weight.bits)
        layer.load_from_tensors({"weight": packed, "weight_scale": weight.scales})
        layer.transform()
        return layer


class Marlin(KernelPeer):
    """Marlin in vLLM, whose operator is ``marlin_gemm`` or, in older releases, ``gptq_marlin_gemm``."""

    name, package, bits = "marlin", "vllm", (4, 8)

    def __init__(self) -> None:
        self._ops = importlib.import_module("vllm._custom_ops")
        self._utils = importlib.import_module("vllm.model_executor.layers.quantization.utils.marlin_utils")
        self._types = importlib.import_module("vllm.scalar_type").scalar_types
        found = [name for name in ("marlin_gemm", "gptq_marlin_gemm") if hasattr(self._ops, name)]
        if not found:
            raise ImportError("vllm._custom_ops has neither marlin_gemm nor gptq_marlin_gemm")
        self._gemm = getattr(self._ops, found[0])

    def layer(self, weight: PeerWeight) -> Layer:
        (rows, depth), device = weight.codes.shape, weight.codes.device
        scales = weight.scales.t().contiguous()  # (groups, rows)
        sizes = {"size_n": rows, "size_k": depth}
        nothing = torch.empty(0, dtype=torch.int32, device=device)
        repack = {"b_q_weight": _gptq_words(weight), "perm": nothing, "num_bits": weight.bits} | sizes
        fixed = sizes | {
            "c": None,
            "b_q_weight": _call(self._ops.gptq_marlin_repack, repack),
            "b_bias": None,
            "b_scales": self._utils.marlin_permute_scales(scales, depth, rows, GROUP_SIZE),
            "a_scales": None,
            "global_scale": None,
            "b_zeros": None,
            "g_idx": None,
            "perm": None,
            "workspace": self._utils.marlin_make_workspace_new(device),
            "b_q_type": self._types.uint4b8 if weight.bits == 4 else self._types.uint8b128,
            "is_k_full": True,
            "use_atomic_add": False,
            "use_fp32_reduce": True,
            "is_zp_float": False,
        }
        return lambda x: _call(self._gemm, fixed | {"a": x, "size_m": x.shape[0]})


PEERS: dict[str, type[KernelPeer]] = {peer.name: peer for peer in (Humming, Marlin)}


def _gptq_words(weight: PeerWeight) -> Tensor:
    """Codes as GPTQ stores them: int32 [depth * bits / 32, rows], the first of a word's columns in its lowest bits."""
    per_word = 32 // weight.bits
    codes = weight.codes.t().int().reshape(-1, per_word, weight.codes.shape[0])
    shifts = torch.arange(per_word, dtype=torch.int32, device=codes.device) * weight.bits
    return (codes << shifts[None, :, None]).sum(1, dtype=torch.int32)


def _call(function: Callable[..., Tensor], values: dict[str, Any]) -> Tensor:
    """Call with those of the values that the function takes: releases differ. Exits if it needs another one."""
    parameters = inspect.signature(function).parameters
    needed = [name for name, one in parameters.items() if one.default is one.empty and name not in values]
    if needed:
        name = getattr(function, "__name__", str(function))
        raise SystemExit(f"{name} of this release needs {', '.join(needed)}, which kernel_peers.py does not know.")
    return function(**{name: values[name] for name in parameters if name in values})


def open_peers(names: Sequence[str], bits: Sequence[int], group_size: int) -> list[KernelPeer]:
    """Import the named peers. Exits with a sentence if one is unknown or missing, or has nothing to measure."""
    if unknown := [name for name in names if name not in PEERS]:
        raise SystemExit(f"--peers: there is no peer {unknown[0]!r}; there are {', '.join(PEERS)}.")
    if names and group_size != GROUP_SIZE:
        raise SystemExit(f"--peers compares groups of {GROUP_SIZE}; found --group {group_size}. Leave one of both out.")
    return [_open(PEERS[name], bits) for name in names]


def _open(peer: type[KernelPeer], bits: Sequence[int]) -> KernelPeer:
    if not set(bits) & set(peer.bits):
        raise SystemExit(
            f"{peer.name} has {_listed(peer.bits)} bits; found --bits {_listed(bits)}. Name one that it has."
        )
    try:
        return peer()
    except ImportError as error:
        raise SystemExit(
            f"The peer {peer.name} cannot be imported ({error}). Install {peer.package} into this environment, or leave it out "
            "of --peers."
        ) from error


def _listed(bits: Sequence[int]) -> str:
    return ", ".join(map(str, bits))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PeerTiming:
    """Time of one product in microseconds, and the relative error of its result."""

    peer: str
    rows: int
    depth: int
    bits: int
    tokens: int
    us: float
    fp16_us: float
    faster: float
    error: float


def measure(
    peer: KernelPeer,
    shape: tuple[int, int],
    bits: int,
    fp16_us: dict[int, float],
    replay: Callable[[Sequence[Callable[[], Any]]], float],
    cache_bytes: int,
    device: str = "cuda",
) -> Iterator[PeerTiming]:
    """Check and time the products of one shape and bit-width.

    Args:
        shape: rows and depth.
        fp16_us: microseconds of the float16 product by number of tokens.
        replay: microseconds of one of several launches.
        cache_bytes: size of the second-level cache, which the copies of the weight exceed.

    Raises:
        SystemExit: a product is wrong.
    """
    rows, depth = shape
    copies = min(max(3, -(-4 * cache_bytes // (rows * depth * bits // 8))), MAX_COPIES)
    weight = PeerWeight.random(rows, depth, bits, device)
    layers = [
        peer.layer(weight),
        *(peer.layer(PeerWeight.random(rows, depth, bits, device)) for _ in range(copies - 1)),
    ]
    for tokens, dense_us in fp16_us.items():
        x = activations(tokens, depth, torch.float16, device)
        error = relative_error(layers[0](x), x, weight)
        if not error <= MAX_ERROR:
            raise SystemExit(
                f"WRONG: {peer.name} {peer.version()} at {bits} bits, {rows}x{depth}, {tokens} tokens: relative error "
                f"{error:.3g}."
            )
        us = replay([lambda layer=layer, x=x: layer(x) for layer in layers])
        yield PeerTiming(
            peer=peer.name,
            rows=rows,
            depth=depth,
            bits=bits,
            tokens=tokens,
            us=us,
            fp16_us=dense_us,
            faster=dense_us / us,
            error=error,
        )


def relative_error(y: Tensor, x: Tensor, weight: PeerWeight) -> float:
    """Norm of the difference from the product in float64, relative to that product. NaN counts as wrong."""
    exact = x.double() @ weight.dequantize().T
    return (torch.linalg.norm(y.double() - exact) / torch.linalg.norm(exact)).item()
