"""Base class of the checkpoint formats, and their request and result."""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from matquant.errors import UserError
from matquant.formats.groups import fit_group_size
from matquant.formats.packed import LayerSpec
from matquant.models.loading import LoadedModel
from matquant.pack.config import PackConfig
from matquant.pack.pack_input import PackInput
from matquant.quantize.config import GROUP_SIZES, MethodConfig


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
        dense_type: GGUF type of matrices that are not quantized; auto for the smallest exact one.
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
    dense_type: str = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PackResult:
    """Description of the written weights.

    Attributes:
        quantization_config: for ``config.json``; None for a format that holds config and tokenizer in its weight file.
        config: other entries of ``config.json``, in place of the original's.
        record: for the results, beside folder and bytes.
        stored_weights: weights of a block in the finished folder, by layer, from the folder and the block's number; None if
            they are those of the slice.
    """

    quantization_config: dict[str, Any] | None
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    record: dict[str, Any] = dataclasses.field(default_factory=dict)
    stored_weights: Callable[[Path, int], Mapping[str, Tensor]] | None = None


def check_equal_groups(name: str, layers: Mapping[str, LayerSpec]) -> None:
    """Check that all groups of a row are equal, for a format ``name`` that has no shorter last group.

    Raises:
        UserError: names the first layer with a shorter one, and the group sizes that all layers admit.
    """
    uneven = [layer for layer, spec in layers.items() if not spec.has_equal_groups]
    if not uneven:
        return
    spec, more = layers[uneven[0]], f" and {len(uneven) - 1} more layers" if len(uneven) > 1 else ""
    row_sizes = {one.in_features for one in layers.values()}
    fitting = [str(s) for s in GROUP_SIZES if all(size % fit_group_size(s, size) == 0 for size in row_sizes)]
    raise UserError(
        f"pack={name} holds groups of equal size only, but groups of {spec.format.group_size} leave a shorter last group in "
        f"the {spec.in_features} input features of {uneven[0]}{more}. Set method.group_size (and method.overrides) to one "
        f"of {', '.join(fitting)} (-1: one scale per row), or use pack=nested."
    )


class CheckpointFormat(abc.ABC):
    """Format of a packed checkpoint.

    Attributes:
        name: value of ``pack.name``.
    """

    name: ClassVar[str]

    def check(  # noqa: B027  (optional)
        self, config: PackConfig, method: MethodConfig, layers: Mapping[str, LayerSpec]
    ) -> None:
        """Refuse settings and layers that the format cannot store, before any long work.

        Args:
            layers: size, and format in the parent, of each layer by full name.

        Raises:
            UserError: names the setting or the first such layer, and the alternatives.
        """

    def check_model(self, config: PackConfig, loaded: LoadedModel) -> None:  # noqa: B027  (optional)
        """Refuse models and tokenizers that the format cannot store, before any long work.

        Raises:
            UserError: names what the format does not have, and the alternatives.
        """

    @abc.abstractmethod
    def write(self, request: PackRequest) -> PackResult:
        """Write the weight files and their index.

        Raises:
            UserError: the format cannot store the parent or the bit-widths, the disk is full, or a file cannot be read.
        """
