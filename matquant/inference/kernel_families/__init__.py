"""Families of GEMM kernels, in order of preference.

A family is one file here, one entry of ``FAMILIES``, and one source in ``kernels/``.
"""

from matquant.inference.gemm_shape import DeviceLimits, GemmShape
from matquant.inference.kernel_families.base import KernelFamily, TileConfig
from matquant.inference.kernel_families.mma import MmaFamily
from matquant.inference.kernel_families.wgmma import WgmmaFamily
from matquant.inference.kernel_families.wgmma_ws import WgmmaWsFamily

FAMILIES: dict[str, KernelFamily] = {family.name: family for family in (WgmmaWsFamily(), WgmmaFamily(), MmaFamily())}


def choose_family(shape: GemmShape, device: DeviceLimits) -> KernelFamily:
    """Return the first family that supports a shape on a device. Raises ValueError if there is none."""
    for family in FAMILIES.values():
        if family.supports(shape, device):
            return family
    raise ValueError(f"no kernel family computes {shape.tokens} tokens in one launch on this device")


def choose_tile_config(shape: GemmShape, device: DeviceLimits) -> TileConfig:
    """Return the tile configuration for a shape of at most ``launch_config.max_tokens`` tokens."""
    return choose_family(shape, device).choose(shape, device)
