"""Checks of the settings of ``pack``, before any work."""

from collections.abc import Mapping, Sequence

from matquant.errors import UserError
from matquant.formats.bits import MAX_BITS, MIN_BITS
from matquant.pack.config import PackConfig
from matquant.pack.formats import FORMATS


def check_pack(config: PackConfig, stages: Sequence[str], models: int) -> None:
    """Raise UserError for a value out of range, or if the method makes several models."""
    if "pack" in stages and not config.wanted:
        raise UserError("stages names pack, but pack=none; choose a format, for example pack=nested.")
    if config.name not in (*FORMATS, "none"):
        raise UserError(f"pack.name must be one of {', '.join((*FORMATS, 'none'))}; found {config.name!r}.")
    if config.bits is not None and config.uniform_bits is None and config.allocation_file is None:
        raise UserError(f"pack.bits is a bit-width or an allocation's file (.yaml, .txt); found {config.bits!r}.")
    for name in ("uniform_bits", "prefill_bits", "max_bits", "stored_bits"):
        value = getattr(config, name)
        if value is not None and not MIN_BITS <= value <= MAX_BITS:
            shown = "bits" if name == "uniform_bits" else name
            raise UserError(f"pack.{shown}: a bit-width must lie in {MIN_BITS}..{MAX_BITS} bits; found {value}.")
    check_planes(
        config.max_bits or MAX_BITS, {"pack.bits": config.uniform_bits, "pack.prefill_bits": config.prefill_bits}
    )
    if config.wanted and models > 1:
        raise UserError(
            f"The method makes {models} models, one for each bit-width, and a folder holds one of them: give one "
            "bit-width with bits=, or a nested method, such as method=matgptq."
        )
    if config.shard_gb is not None and not config.shard_gb > 0:
        raise UserError(f"pack.shard_gb must be more than 0; found {config.shard_gb:g}.")


def check_planes(max_bits: int, bits: Mapping[str, int | None]) -> None:
    """Raise UserError if a bit-width, by the name of its setting, needs planes that are not written."""
    for where, wanted in bits.items():
        if wanted is not None and wanted > max_bits:
            raise UserError(
                f"{where}: {wanted} bits need more planes than are written, for {max_bits} bits. Raise pack.max_bits, or "
                "give fewer."
            )
