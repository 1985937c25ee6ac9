"""The config group ``pack``, typed and checked."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from matquant.errors import UserError
from matquant.formats.allocation import is_file_name
from matquant.formats.bits import MAX_BITS, MIN_BITS


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PackConfig:
    """What is exported, and where to."""

    name: Literal["none", "nested", "matgptq_v1", "gptq", "compressed_tensors"] = "none"
    path: str | None = None  # of the folder that is made; null: `packed` in the run's folder
    overwrite: bool = False  # replace a folder that is there
    bits: str | None = (
        None  # what a reader begins with: a width, or an allocation's file; null: see `stage.chosen_widths`
    )
    prefill_bits: int | None = None  # the width for many tokens; null: the same
    max_bits: int | None = None  # write only the planes of widths up to this one; null: all
    stored_bits: int | None = (
        None  # of the codes of gptq and compressed_tensors; null: as few as hold the slice exactly
    )
    fit: Literal["exact", "nearest"] = "exact"  # nearest: their codes nearest to the slice, where none are exact
    shard_gigabytes: float | None = None  # of a weight file; null: as large as the original's largest

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
    """Raises UserError for a value out of range, or for several models, one for each width, that a method makes."""
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
    if config.shard_gigabytes is not None and not config.shard_gigabytes > 0:
        raise UserError(f"pack.shard_gigabytes must be more than 0; found {config.shard_gigabytes:g}.")


def check_widths(max_bits: int, widths: Mapping[str, int | None]) -> None:
    """Raises UserError if a width, by the name of its setting, needs planes that are not written."""
    for where, width in widths.items():
        if width is not None and width > max_bits:
            raise UserError(
                f"{where}: {width} bits need more planes than are written, for {max_bits} bits. Raise pack.max_bits, or "
                "give fewer."
            )
