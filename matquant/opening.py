"""What a job works on: its model, layers and texts, opened and checked before any long work."""

import dataclasses
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from matquant.config import Config, TextConfig
from matquant.data import texts
from matquant.distributed import ProcessGroup
from matquant.errors import UserError
from matquant.formats import allocation
from matquant.formats.allocation import Allocation
from matquant.models.activation_cache import OffloadTarget, choose_offload_target
from matquant.models.blocks import BlockModel, compute_dtype
from matquant.models.loading import open_model
from matquant.models.model_sizes import measure
from matquant.models.tracing import check
from matquant.options import own_options, planned_weight, solver_options
from matquant.quantize.driver import check_layers, layers_to_quantize
from matquant.search.stage import check_budgets
from matquant.store import Store


class Opened:
    """A job's model and what is read beside it.

    Attributes:
        loaded, blocks: the model, and as a row of blocks.
        dtype: in which blocks run.
        layers: what is quantized of each block, by full name.
        names: of all those layers.
        shapes: the sizes of the model's parts.
        allocations: the files among ``bits``, by path.
        evaluation: windows of each dataset, int64 [sequences, length]; none where nothing is measured.
        search_windows: likewise, of the search; None without one.

    Raises:
        UserError: something in the config, model or text cannot be worked with.
    """

    def __init__(self, config: Config, device: torch.device, process_group: ProcessGroup, store: Store) -> None:
        self.config, self.device, self.process_group, self.store = config, device, process_group, store
        self.loaded = open_model(config.model)
        self.blocks = BlockModel(self.loaded.model, self.loaded.checkpoint)
        self.dtype = compute_dtype(self.loaded.dtype, device)
        self.layers = layers_to_quantize(self.blocks, config.method.skips, head=config.method.head)
        self.names = [name for block in self.layers for name in block]
        check_layers(self.layers, lambda name: config.method.of_layer(name).group_size or config.method.group_size)
        self._check_lengths()
        self.allocations = self._read_allocations()
        self.evaluation = self._evaluation_windows()
        check(self.blocks, device, self.dtype)
        self.shapes = measure(self.blocks, self.layers, self.loaded.dtype, self.dtype)
        self.search_windows: Tensor | None = None
        if config.search.wanted:
            self._check_budgets()
            self.search_windows = self.windows(self._search_text(), "calibration")

    def windows(self, text: TextConfig, split: Literal["calibration", "evaluation"]) -> Tensor:
        """int64 [sequences, length] of a text."""
        return self.process_group.rank0_first(lambda: texts.windows(text, split, self.loaded.tokenizer, self.store))

    def place(self, windows: Tensor | None, models: int) -> OffloadTarget:
        """Where the hidden states of so many models wait between two blocks."""
        needed = models * self.own_tokens(windows) * self.shapes.hidden * self.dtype.itemsize
        return choose_offload_target(needed, self.device, self.store.path / "scratch")

    def own_tokens(self, windows: Tensor | None) -> int:
        """How many tokens of these windows go through this process."""
        return 0 if windows is None else windows[self.process_group.shard(len(windows))].numel()

    @property
    def prompt_tokens(self) -> int:
        """Of what ``stages=[generate]`` goes on with."""
        return len(self.loaded.tokenizer(str(self.config.prompt))["input_ids"])

    @property
    def dense_bytes(self) -> int:
        """Bytes of the quantized layers in the model's own dtype."""
        return self.shapes.quantized * self.loaded.dtype.itemsize

    def _check_lengths(self) -> None:
        """Refuse windows and a prompt that are longer than the model's context; texts that are not read may be as they like."""
        longest = self.loaded.context_length
        for name, text in self._texts().items():
            if longest is not None and text.sequence_length > longest:
                raise UserError(
                    f"{name}.sequence_length={text.sequence_length} is longer than the {longest} tokens that "
                    f"{self.loaded.label} was made for."
                )
            if text.sequences < self.process_group.world_size:
                raise UserError(
                    f"{name}.sequences={text.sequences} cannot be shared by {self.process_group.world_size} processes."
                )
        if "generate" in self.config.stages and longest is not None:
            prompt, new = self.prompt_tokens, self.config.max_new_tokens
            if prompt + new > longest:
                raise UserError(
                    f"The prompt has {prompt} tokens; with max_new_tokens={new} that is more than the {longest} tokens that "
                    f"{self.loaded.label} was made for."
                )

    def _texts(self) -> dict[str, TextConfig]:
        """All texts that the job reads, by the names that they have in the config."""
        named = {} if self.config.method.solver == "rtn" else {"calibration": self.config.calibration}
        if self.config.search.wanted:
            named["search"] = self._search_text()
        if "evaluate" in self.config.stages:
            named |= {f"eval.datasets.{name}": text for name, text in self.config.eval.datasets.items()}
        return named

    def _check_budgets(self) -> None:
        method = self.config.method
        options = solver_options(method, self.config.objective.lambdas, method.master_bits, self.loaded.dtype)
        own = own_options(method, self.names, options)
        check_budgets(
            self.config.search,
            [
                {name: planned_weight(layer.weight.shape, own.get(name, options)) for name, layer in block.items()}
                for block in self.layers
            ],
        )

    def _search_text(self) -> TextConfig:
        """Other windows of the calibration text than those that the parent is calibrated on."""
        search, text = self.config.search, self.config.calibration
        return dataclasses.replace(
            text,
            sequences=search.sequences,
            sequence_length=search.sequence_length,
            seed=None if text.seed is None else text.seed + 1 + search.seed,
        )

    def _evaluation_windows(self) -> dict[str, Tensor]:
        """Cut before any long work, so that a text that is missing or too short is refused at once."""
        if "evaluate" not in self.config.stages:
            return {}
        if self.config.method.solver != "rtn":
            texts.check_apart(self.config.calibration, dict(self.config.eval.datasets))
        return {name: self.windows(text, "evaluation") for name, text in self.config.eval.datasets.items()}

    def _read_allocations(self) -> dict[str, Allocation]:
        """The files among ``bits``, by path, held against the layers before any long work."""
        read = {path: allocation.read(Path(path)) for path in self.config.allocations}
        for path, found in read.items():
            allocation.check(found, self.names, self.config.method.master_bits, path)
        return read
