"""Settings of the stage ``pack``."""

import dataclasses
from typing import Literal

from matquant.formats.allocation import is_file_name

# Settings that had another name before.
RENAMED = {"pack.fit": "pack.rounding", "pack.shard_gigabytes": "pack.shard_gb"}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PackConfig:
    """Format and folder of the packed checkpoint.

    Attributes:
        name: of a format in ``matquant.pack.formats``; none packs nothing.
        path: of the new folder; None: ``packed`` in the run's folder.
        overwrite: replace an existing folder.
        bits: default of a reader: a bit-width or an allocation file; None: the job's only bit-width or allocation, else all
            bits.
        prefill_bits: bit-width for prompts; None: the same.
        max_bits: largest bit-width whose planes are written; None: all.
        stored_bits: bits of the codes of gptq, compressed_tensors and gguf; None: as few as store the slice exactly, or as
            the slice has if rounding is nearest and the format is gguf.
        rounding: exact refuses a slice that gptq, compressed_tensors or gguf cannot store exactly; nearest stores the nearest
            codes, with a recorded error.
        shard_gb: size of a weight file in GB; None: that of the original's largest file. gguf has one file.
        dense_type: type in gguf of matrices that are not quantized, such as embeddings and head; auto: the smallest that
            holds them exactly. Norms and biases stay in F32.
    """

    name: str = "none"
    path: str | None = None
    overwrite: bool = False
    bits: str | None = None
    prefill_bits: int | None = None
    max_bits: int | None = None
    stored_bits: int | None = None
    rounding: Literal["exact", "nearest"] = "exact"
    shard_gb: float | None = None
    dense_type: Literal["auto", "F32", "F16", "BF16", "Q8_0"] = "auto"

    @property
    def wanted(self) -> bool:
        """True if the job packs."""
        return self.name != "none"

    @property
    def allocation_file(self) -> str | None:
        """Path in ``bits``; None if it is a number."""
        return self.bits if is_file_name(self.bits) else None

    @property
    def uniform_bits(self) -> int | None:
        """Bit-width in ``bits``; None if it is a path."""
        return int(self.bits) if self.bits is not None and self.bits.isdecimal() else None
