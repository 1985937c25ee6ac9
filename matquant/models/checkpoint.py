"""Lazy reader of a checkpoint's safetensors, by the names of the tensors in the model.

Transformers renames and converts the tensors of a checkpoint (the experts of a block become one tensor, a fused
projection is split, old names become new ones). The same rules are applied here to one parameter at a time, so that the
whole model is never in memory.
"""

import copy
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from matquant.errors import UserError
from matquant.formats.safetensors_headers import DTYPES, StoredTensor
from matquant.models.tensor_swap import named_tensors, set_tensor, tensor_slot

# Components that wrappers of a module add to the names of its tensors: torch.compile, FSDP, activation checkpointing,
# DeepSpeed. DataParallel's is an ordinary word, so it counts only in front of all names.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
_PARALLEL = "module"


def wrapper_renaming(names: Collection[str]) -> dict[str, str]:
    """Renaming of a checkpoint's tensors that removes what wrappers of the model added to their names.

    Returns:
        Regular expressions with their replacements, as ``key_mapping`` of ``from_pretrained``; empty without wrappers.
    """
    rules: dict[str, str] = {}
    for wrapper in _WRAPPERS:
        # Transformers applies a rule once to a name; the comment makes another rule of it for each repetition.
        most = max(name.split(".").count(wrapper) for name in names) if names else 0
        rules |= {rf"(^|\.){wrapper}\.(?#{number})": r"\1" for number in range(most)}
    unwrapped = [".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in names]
    if unwrapped and all(name.startswith(f"{_PARALLEL}.") for name in unwrapped):
        rules[rf"^{_PARALLEL}\."] = ""
    return rules


def build_skeleton(
    config: Any,
    stored: Mapping[str, StoredTensor],
    dtype: torch.dtype,
    trust_remote_code: bool,
    renaming: Mapping[str, str],
) -> tuple[Any, dict[str, Any]]:
    """Build a model without weights: its parameters are on the meta device, in the dtypes that they have after loading.

    Args:
        renaming: from ``wrapper_renaming``.

    Returns:
        The model in eval mode, and Transformers' loading info: missing, unexpected and mismatched keys.
    """
    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))
    headers = {
        key: torch.empty(s.shape, dtype=DTYPES.get(s.dtype, torch.uint8), device="meta") for key, s in stored.items()
    }
    model, info = kind.from_pretrained(
        None,
        config=config,
        state_dict=headers,
        dtype=dtype,
        device_map={"": "meta"},
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # the caller reports them by name
        key_mapping=dict(renaming),
    )
    return model.eval().requires_grad_(False), info


class Checkpoint:
    """Lazy reader of the tensors of a model, by their names in the model.

    Args:
        skeleton: from ``build_skeleton`` with the same headers. It is copied, since a model's modules may be replaced
            later.
        stored: from ``read_headers``.
    """

    def __init__(self, skeleton: Any, stored: Mapping[str, StoredTensor]) -> None:
        self._stored = stored
        self._rules = list(getattr(skeleton, "_weight_conversions", None) or [])
        self._skeleton = copy.deepcopy(skeleton)
        self._tensors = dict(named_tensors(self._skeleton))
        self._keys: dict[str, list[str]] = {}  # name in the model -> keys in the checkpoint
        self._converted: set[str] = set()  # names of tensors that need a conversion
        self._find_keys()
        self._canonical = self._find_tied()

    def __contains__(self, name: str) -> bool:
        return name in self._canonical

    def stored(self) -> dict[str, Tensor]:
        """Stored tensors of the model's state dict by name, on the meta device; tied names share an object."""
        return {name: self._tensors[name] for name in self._skeleton.state_dict() if name in self._canonical}

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield the named tensors one at a time, on the CPU, in the dtype of the loaded model.

        Tied names give the same tensor. A tensor that needs no conversion is mapped from its file, not copied: drop it
        before the next one, or the file stays mapped.

        Raises:
            UserError: a file is damaged or was removed.
            KeyError: the checkpoint has no such tensor.
        """
        wanted: dict[str, list[str]] = defaultdict(list)
        for name in names:
            wanted[self._canonical[name]].append(name)
        with ExitStack() as stack:
            files: dict[Path, Any] = {}
            while wanted:
                first = next(iter(wanted))
                for name, tensor in self._read(first, files, stack):
                    for alias in wanted.pop(name, ()):
                        yield alias, tensor

    def _read(self, name: str, files: dict[Path, Any], stack: ExitStack) -> Iterator[tuple[str, Tensor]]:
        """Read the named tensor, and those that the same conversion makes."""
        try:
            slices = {}
            for key in self._keys[name]:
                file = self._stored[key].file
                if file not in files:
                    files[file] = stack.enter_context(safe_open(file, framework="pt"))
                slices[key] = files[file].get_slice(key)
            if name in self._converted:
                yield from self._convert(slices).items()
            else:
                yield name, next(iter(slices.values()))[...].to(self._tensors[name].dtype)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"The weights of {name} cannot be read ({error}). Copy or download the file again."
            ) from error

    def _convert(self, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
        """Convert tensors of the checkpoint by the rules of Transformers; the skeleton stays unchanged.

        Returns:
            Tensors by name in the model.
        """
        dtype = next(iter(self._tensors.values())).dtype
        plan = LoadStateDictConfig(dtype=dtype, weight_mapping=self._rules, device_map={"": _device_of(tensors)})
        convert_and_load_state_dict_in_model(self._skeleton, dict(tensors), plan)
        converted = {}
        for name, placeholder in self._tensors.items():
            slots, key = tensor_slot(self._skeleton, name)
            if slots[key] is not placeholder:
                converted[name] = slots[key].detach()
                slots[key] = placeholder
        return converted

    def _find_keys(self) -> None:
        """Set ``_keys`` and ``_converted`` by the rules of Transformers."""
        renamings = [rule for rule in self._rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in self._rules if isinstance(rule, WeightConverter)]
        prefix = self._skeleton.base_model_prefix
        groups: dict[str, list[str]] = defaultdict(list)
        rearranged = set()
        for key in self._stored:
            name, pattern = rename_source_key(key, renamings, converters, prefix, self._tensors)
            if name not in self._tensors and key in self._tensors:
                name, pattern = key, None
            if name in self._tensors:
                groups[name].append(key)
                rearranged |= {name} if pattern is not None else set()
        for name, keys in groups.items():
            names = [name]
            if name in rearranged:  # a conversion may give several tensors: run it on the meta device to find which
                names = list(self._convert({k: torch.empty(self._stored[k].shape, device="meta") for k in keys}))
                self._converted.update(names)
            for converted in names:
                self._keys[converted] = keys

    def _find_tied(self) -> dict[str, str]:
        """Map each name to a name under which its tensor is stored; tied names map to the same one."""
        first: dict[int, str] = {}
        for name in self._keys:
            first.setdefault(id(self._tensors[name]), name)
        return {name: first[id(tensor)] for name, tensor in self._tensors.items() if id(tensor) in first}


def fill(model: Any, checkpoint: Checkpoint) -> None:
    """Read all weights into the model."""
    placeholders = {name: tensor for name, tensor in named_tensors(model) if tensor.is_meta}
    filled: dict[int, Tensor] = {}  # tied tensors stay one object
    for name, tensor in checkpoint.read(placeholders):
        key = id(placeholders[name])
        filled[key] = set_tensor(model, name, filled.get(key, tensor))


def _device_of(tensors: Mapping[str, Any]) -> str:
    return "meta" if any(isinstance(tensor, Tensor) and tensor.is_meta for tensor in tensors.values()) else "cpu"
