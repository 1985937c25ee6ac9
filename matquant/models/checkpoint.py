"""The weights of a checkpoint, read from its safetensors when asked for, under the names that the model gives them.

Transformers renames and rearranges what a checkpoint stores (the experts of a block become one tensor, a fused projection
is cut, old names become new ones). Its own rules do that here too, on the tensors of one parameter at a time, so that a
model is never in memory as a whole.
"""

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
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
from matquant.models.tensor_swap import named_tensors

# Tied tensors that a checkpoint holds twice are compared in pieces of so many numbers.
_COMPARED_AT_ONCE = 2**24


def build_skeleton(
    config: Any, stored: Mapping[str, StoredTensor], dtype: torch.dtype, trust_remote_code: bool
) -> tuple[Any, dict[str, Any]]:
    """A model without weights: its parameters are on the meta device, in the dtypes that loading would give them.

    Returns:
        The model in eval mode, and what Transformers says of missing, unexpected and mismatched keys.
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
    )
    return model.eval().requires_grad_(False), info


class Checkpoint:
    """The tensors of a model by their names in the model, read from the files when asked for.

    Args:
        skeleton: from ``build_skeleton`` of the same headers; it is copied, since a model's modules may be replaced later.
        stored: from ``read_headers``.
    """

    def __init__(self, skeleton: Any, stored: Mapping[str, StoredTensor]) -> None:
        self._stored = stored
        self._rules = list(getattr(skeleton, "_weight_conversions", None) or [])
        self._skeleton = copy.deepcopy(skeleton)
        self._tensors = dict(named_tensors(self._skeleton))
        self._keys: dict[str, list[str]] = {}  # a tensor's name -> what it is made of
        self._converted: set[str] = set()  # names of tensors that are not stored as they are
        self._find_sources()
        self._canonical = self._find_tied()

    def __contains__(self, name: str) -> bool:
        return name in self._canonical

    def stored(self) -> dict[str, Tensor]:
        """What is stored of the model's own state, by name and on the meta device; tied names share an object."""
        return {name: self._tensors[name] for name in self._skeleton.state_dict() if name in self._canonical}

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Each of the named tensors, on the CPU, in the dtype of the loaded model; one at a time, to be dropped at once.

        Names that are tied to one another give the same tensor. A tensor that is stored as it is needed is mapped from
        its file, not copied.

        Raises:
            UserError: a file is damaged or was removed.
            KeyError: the checkpoint does not hold such a tensor.
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
        """The named tensor, and those that are made together with it."""
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
        """What Transformers makes of these tensors of the checkpoint, by name; the skeleton stays as it was."""
        dtype = next(iter(self._tensors.values())).dtype
        plan = LoadStateDictConfig(dtype=dtype, weight_mapping=self._rules, device_map={"": _device_of(tensors)})
        convert_and_load_state_dict_in_model(self._skeleton, dict(tensors), plan)
        made = {}
        for name, own in self._tensors.items():
            held, leaf = _holder(self._skeleton, name)
            if held[leaf] is not own:
                made[name] = held[leaf].detach()
                held[leaf] = own
        return made

    def _find_sources(self) -> None:
        """Fill ``_keys`` and ``_converted``, by the rules of Transformers."""
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
            if name in rearranged:  # a rule may make several tensors of one: on the meta device it tells which
                names = list(self._convert({k: torch.empty(self._stored[k].shape, device="meta") for k in keys}))
                self._converted.update(names)
            for made in names:
                self._keys[made] = keys

    def _find_tied(self) -> dict[str, str]:
        """For each name a name under which its tensor is stored; tied names share one."""
        first: dict[int, str] = {}
        for name in self._keys:
            first.setdefault(id(self._tensors[name]), name)
        return {name: first[id(own)] for name, own in self._tensors.items() if id(own) in first}


def tie_equal(model: Any, checkpoint: Checkpoint) -> None:
    """Tie what the model's config ties and the checkpoint holds twice, if both are the same, as Transformers does."""
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        if (
            target in checkpoint
            and source in checkpoint
            and model.get_parameter(target) is not model.get_parameter(source)
        ):
            tensors = dict(checkpoint.read([target, source]))
            if _equal(tensors[target], tensors[source]):
                held, leaf = _holder(model, target)
                held[leaf] = model.get_parameter(source)


def compute_buffers(model: Any, checkpoint: Checkpoint) -> None:
    """Give the tensors that no checkpoint holds (rotary frequencies and the like) their values, on the CPU."""
    for name, tensor in named_tensors(model):
        if tensor.is_meta and name not in checkpoint:
            held, leaf = _holder(model, name)
            value = torch.empty_like(tensor, device="cpu")
            held[leaf] = nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
            model.get_submodule(name.rpartition(".")[0])._is_hf_initialized = False
    model._is_hf_initialized = False
    model.initialize_weights()


def fill(model: Any, checkpoint: Checkpoint) -> None:
    """Read all weights into the model."""
    own = {name: tensor for name, tensor in named_tensors(model) if tensor.is_meta}
    memo: dict[int, Tensor] = {}  # tied tensors stay one
    for name, tensor in checkpoint.read(own):
        held, leaf = _holder(model, name)
        if id(own[name]) not in memo:
            is_parameter = isinstance(own[name], nn.Parameter)
            memo[id(own[name])] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
        held[leaf] = memo[id(own[name])]


def _holder(model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """The dict that holds a parameter or buffer, and its key there."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    held: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
    return held, leaf


def _device_of(tensors: Mapping[str, Any]) -> str:
    return "meta" if any(isinstance(tensor, Tensor) and tensor.is_meta for tensor in tensors.values()) else "cpu"


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    rows = max(1, _COMPARED_AT_ONCE // max(1, one[0].numel()))
    return all(torch.equal(one[i : i + rows], other[i : i + rows]) for i in range(0, len(one), rows))
