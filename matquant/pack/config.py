"""Settings of the stage ``pack``, and their checks."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from matquant.errors import UserError
from matquant.formats.allocation import is_file_name
from matquant.formats.bits import MAX_BITS, MIN_BITS

# Settings that had another name before.
RENAMED = {"pack.fit": "pack.rounding", "pack.shard_gigabytes": "pack.shard_gb"}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PackConfig:
    """Format and folder of the packed checkpoint.

    Attributes:
        path: of the new folder; None: ``packed`` in the run's folder.
        overwrite: replace an existing folder.
        bits: default of a reader: a bit-width or an allocation file; None: the job's only bit-width or allocation, else all
            bits.
        prefill_bits: bit-width for prompts; None: the same.
        max_bits: largest bit-width whose planes are written; None: all.
        stored_bits: bits of the codes of gptq and compressed_tensors; None: as few as store the slice exactly.
        rounding: exact refuses a slice that gptq or compressed_tensors cannot store exactly; nearest stores the nearest
            codes, with a recorded error.
        shard_gb: size of a weight file in GB; None: that of the original's largest file.
    """

    name: Literal["none", "nested", "matgptq_v1", "gptq", "compressed_tensors"] = "none"
    path: str | None = None
    overwrite: bool = False
    bits: str | None = None
    prefill_bits: int | None = None
    max_bits: int | None = None
    stored_bits: int | None = None
    rounding: Literal["exact", "nearest"] = "exact"
    shard_gb: float | None = None

    @property
    def wanted(self) -> bool:
        return self.name != "none"

    @property
    def allocation_file(self) -> str | None:
        return self.bits if is_file_name(self.bits) else None

    @property
    def width(self) -> int | None:
        return int(self.bits) if self.bits is not None and self.bits.isdecimal() else None


def check(config: PackConfig, stages: Sequence[str], models: int) -> None:
    """Raise UserError for a value out of range, or if the method makes several models."""
    if "pack" in stages and not config.wanted:
        raise UserError("stages names pack, but pack=none; choose a format, for example pack=nested.")
    if config.bits is not None and config.width is None and config.allocation_file is None:
        raise UserError(f"pack.bits is a width or an allocation's file (.yaml, .txt); found {config.bits!r}.")
    for name in ("width", "prefill_bits", "max_bits", "stored_bits"):
        value = getattr(config, name)
        if value is not None and not MIN_BITS <= value <= MAX_BITS:
            shown = "bits" if name == "width" else name
            raise UserError(f"pack.{shown}: a width must lie in {MIN_BITS}..{MAX_BITS} bits; found {value}.")
    check_widths(config.max_bits or MAX_BITS, {"pack.bits": config.width, "pack.prefill_bits": config.prefill_bits})
    if config.wanted and models > 1:
        raise UserError(
            f"The method makes {models} models, one for each width, and a folder holds one of them: give one width with bits=, "
            "or a nested method, such as method=matgptq."
        )
    if config.shard_gb is not None and not config.shard_gb > 0:
        raise UserError(f"pack.shard_gb must be more than 0; found {config.shard_gb:g}.")


def check_widths(max_bits: int, widths: Mapping[str, int | None]) -> None:
    """Raises UserError if a width, by the name of its setting, needs planes that are not written."""
    for where, width in widths.items():
        if width is not None and width > max_bits:
            raise UserError(
                f"{where}: {width} bits need more planes than are written, for {max_bits} bits. Raise pack.max_bits, or "
                "give fewer."
            )
