"""Base class of the checkpoint formats, and what the stage passes to them."""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from matquant.pack.config import PackConfig
from matquant.pack.pack_input import PackInput
from matquant.quantize.config import MethodConfig


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PackRequest:
    """Model to write, and how.

    Attributes:
        source: model and parent.
        folder: empty folder for the weight files and their index.
        bits: default bit-width of a reader, or the bit-width to write: one, or one for each layer by name.
        prefill_bits: bit-width for many tokens; None for the same.
        max_bits: largest bit-width whose planes are written.
        file_bytes: largest size of a weight file.
        progress: called with 1 after each layer.
        stored_bits: bits of integer codes; None for as few as are exact.
        allow_nearest: store the nearest integer codes where none are exact.
    """

    source: PackInput
    folder: Path
    bits: int | Mapping[str, int]
    prefill_bits: int | None
    max_bits: int
    file_bytes: int
    progress: Callable[[int], None]
    stored_bits: int | None = None
    allow_nearest: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PackResult:
    """Description of the written weights.

    Attributes:
        quantization_config: for ``config.json``.
        config: other entries of ``config.json``, in place of the original's.
        record: for the results, beside folder and bytes.
    """

    quantization_config: dict[str, Any]
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    record: dict[str, Any] = dataclasses.field(default_factory=dict)


class CheckpointFormat(abc.ABC):
    """Format of a packed checkpoint.

    Attributes:
        name: value of ``pack.name``.
    """

    name: ClassVar[str]

    def check(self, config: PackConfig, method: MethodConfig) -> None:  # noqa: B027  (optional)
        """Refuse settings that the format cannot store for any model, before any long work. Raises UserError."""

    @abc.abstractmethod
    def write(self, request: PackRequest) -> PackResult:
        """Write the weight files and their index.

        Raises:
            UserError: the format cannot store the parent or the bit-widths, the disk is full, or a file cannot be read.
        """
