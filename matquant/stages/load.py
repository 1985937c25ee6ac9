"""Stage load: model, layers and texts of a job, checked before any long work."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from matquant.config import Config
from matquant.data import texts
from matquant.data.config import TextConfig
from matquant.data.sources.base import check_characters
from matquant.errors import UserError
from matquant.evaluate.plausibility import dtype_warnings, full_precision_warnings
from matquant.formats import allocation
from matquant.formats.allocation import Allocation
from matquant.formats.nested import NestedWeight
from matquant.formats.packed import LayerSpec
from matquant.models.activation_cache import OffloadTarget, choose_offload_target
from matquant.models.blocks import BlockModel, compute_dtype
from matquant.models.fixed_layers import fixed_layers, fixed_notes, unsplit_notes
from matquant.models.gguf import convert_gguf, is_gguf
from matquant.models.loading import LoadedModel, open_model
from matquant.models.model_sizes import ModelSizes, measure_model
from matquant.models.stock_comparison import check_against_stock
from matquant.models.token_ids import check_token_ids, embedded_tokens
from matquant.models.tracing import check_blockwise_forward
from matquant.quantize.base import BlockQuantizer, QuantizerTask
from matquant.quantize.layer_selection import check_layers, check_weight_range, layers_to_quantize
from matquant.refine.config import RefineConfig
from matquant.refine.self_text import check_generates
from matquant.search.stage import check_budgets
from matquant.stages.runtime import Runtime


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RefinementText:
    """Text of the stage refine.

    Attributes:
        sequences, length: number and tokens of the sequences, held-out ones included.
        held_out: number of sequences to judge by.
        batch_size: sequences of one step.
        read: int64 [sequences, length], those that are read from a text; the model writes the others itself in the stage.
    """

    sequences: int
    length: int
    held_out: int
    batch_size: int
    read: Tensor

    @property
    def written(self) -> int:
        """Number of sequences that the model writes itself."""
        return self.sequences - len(self.read)

    def split(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Sequences to train on, and evenly spaced ones among them that are held out."""
        chosen = torch.zeros(self.sequences, dtype=torch.bool)
        chosen[(torch.arange(self.held_out) * self.sequences) // self.held_out] = True
        return windows[~chosen], windows[chosen]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoadedJob:
    """Model and texts of a job.

    Attributes:
        config: of the job.
        model, blocks: the model, and the same as a row of blocks.
        dtype: in which blocks run.
        evaluation_dtype: in which they run for perplexity and KL.
        refine_dtype: in which they run in a refinement.
        layers: layers to quantize of each block, by full name.
        fixed_layers: reason of each linear layer that cannot be quantized, by full name.
        sizes: sizes of the model's parts.
        allocations: allocation files among ``bits``, by path.
        calibration: int64 [sequences, length] of the calibration text; None for a method without calibration.
        evaluation: int64 [sequences, length] of each dataset; empty without the stage evaluate.
        search: int64 [sequences, length] of the search; None without one.
        refinement: text of the stage refine; None without one.
    """

    config: Config
    model: LoadedModel
    blocks: BlockModel
    dtype: torch.dtype
    evaluation_dtype: torch.dtype
    refine_dtype: torch.dtype
    layers: list[dict[str, nn.Linear]]
    fixed_layers: Mapping[str, str]
    sizes: ModelSizes
    allocations: Mapping[str, Allocation]
    calibration: Tensor | None
    evaluation: Mapping[str, Tensor]
    search: Tensor | None
    refinement: RefinementText | None = None

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Full names of all layers to quantize, in the order of the model."""
        return tuple(name for block in self.layers for name in block)

    @property
    def layer_specs(self) -> dict[str, LayerSpec]:
        """Size, and format in the future parent, of each layer to quantize, by full name."""
        return self.quantizer().layer_specs(self.layers)

    @property
    def parent_bytes(self) -> int:
        """Bytes of the codes, scales and zero points of the parent."""
        return sum(layer.parent_bytes for layer in self.layer_specs.values())

    @property
    def dense_bytes(self) -> int:
        """Bytes of the quantized layers in the model's own dtype."""
        return self.sizes.quantized * self.model.dtype.itemsize

    def quantizer(self, lambdas: Mapping[int, float] | None = None, master_bits: int | None = None) -> BlockQuantizer:
        """Quantizer of the job's method; for the job's objective by default."""
        config = self.config
        task = QuantizerTask.of(
            config.objective.lambdas if lambdas is None else lambdas,
            config.method.master_bits if master_bits is None else master_bits,
            self.model.dtype,
            self.layer_names,
        )
        return config.method.build(task)

    def prompt_tokens(self) -> int:
        """Number of tokens in the prompt of the stage generate."""
        return count_tokens(self.model, str(self.config.prompt))

    def offload_target(
        self, runtime: Runtime, sequences: Tensor | None, models: int, dtype: torch.dtype
    ) -> OffloadTarget:
        """Storage for the hidden states of so many models between two blocks."""
        needed = models * own_tokens(runtime, sequences) * self.sizes.hidden * dtype.itemsize
        return choose_offload_target(needed, runtime.device, runtime.store.path / "scratch")


def refine_dtype(config: RefineConfig, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which blocks run in a refinement, of a model whose blocks run in ``dtype`` otherwise."""
    if config.dtype != "auto":
        chosen: torch.dtype = getattr(torch, config.dtype)
        return chosen
    trains_scales = config.wanted and not config.trains_weights
    return torch.bfloat16 if trains_scales and device.type == "cuda" and dtype == torch.float32 else dtype


def load_job(config: Config, runtime: Runtime) -> LoadedJob:
    """Load and check everything that a job reads.

    Raises:
        UserError: something in the config, model or texts cannot be used.
    """
    source = config.model
    if is_gguf(source):
        source, warnings = convert_gguf(source, runtime.store)
        runtime.log.warnings.extend(warnings)
    model = open_model(source)
    runtime.log.warnings.extend(model.warnings)
    blocks = BlockModel(model.model, model.checkpoint, config.transform.build(model.model))
    dtype = compute_dtype(model.dtype, runtime.device)
    lm_head = config.method.quantize_lm_head
    fixed = fixed_layers(blocks, runtime.device, dtype, lm_head=lm_head)
    runtime.log.warnings.extend([*fixed_notes(fixed), *unsplit_notes(blocks)])
    layers = layers_to_quantize(blocks, config.method.skips, lm_head=lm_head, fixed=fixed)
    check_layers(layers)
    _check_lengths(config, model, runtime.process_group.world_size)
    if "generate" in config.stages:
        _check_prompt(config, model)
    allocations = _read_allocations(config, [name for block in layers for name in block])
    evaluation = _evaluation_texts(config, model, runtime)
    largest = check_blockwise_forward(blocks, runtime.device, dtype)
    check_against_stock(model, blocks, runtime.device, dtype)
    job = LoadedJob(
        config=config,
        model=model,
        blocks=blocks,
        dtype=dtype,
        evaluation_dtype=torch.float32 if config.eval.dtype == "float32" else dtype,
        refine_dtype=refine_dtype(config.refine, dtype, runtime.device),
        layers=layers,
        fixed_layers=fixed,
        sizes=measure_model(blocks, layers, model.dtype, dtype),
        allocations=allocations,
        calibration=None,
        evaluation=evaluation,
        search=None,
    )
    _check_weight_ranges(job, largest)
    if config.search.wanted:
        _check_budgets(job)
        job = dataclasses.replace(job, search=_read("search", _search_text(config), "calibration", model, runtime))
    if config.refine.wanted:
        job = dataclasses.replace(job, refinement=_refinement_text(config, model, runtime))
    if config.method.uses_calibration:
        job = dataclasses.replace(
            job, calibration=_read("calibration", config.calibration, "calibration", model, runtime)
        )
    if evaluation:
        runtime.warn(dtype_warnings(job.evaluation_dtype))
    bos = model.tokenizer.bos_token_id
    known_bos = bos if bos is not None and bos < embedded_tokens(model.model) else None
    runtime.warn(full_precision_warnings(blocks, _first_windows(job), known_bos, runtime.device))
    return job


def _first_windows(job: LoadedJob) -> dict[str, Tensor]:
    """First sequence of each text, int64 [length], by the text's name in the config."""
    named = {} if job.calibration is None else {"calibration": job.calibration[0]}
    return named | {f"eval.datasets.{name}": sequences[0] for name, sequences in job.evaluation.items()}


def own_tokens(runtime: Runtime, sequences: Tensor | None) -> int:
    """Number of tokens of these sequences that run on this process."""
    return 0 if sequences is None else sequences[runtime.process_group.shard(len(sequences))].numel()


def count_tokens(model: LoadedModel, text: str) -> int:
    """Number of tokens of a text."""
    return len(model.tokenizer(text)["input_ids"])


def _read(where: str, text: TextConfig, split: str, model: LoadedModel, runtime: Runtime) -> Tensor:
    """Sequences of a text, int64 [sequences, length]; ``where`` is its name in the config."""
    sequences = runtime.process_group.rank0_first(lambda: texts.windows(text, split, model.tokenizer, runtime.store))
    check_token_ids(model, sequences, f"The text of {where}")
    runtime.log.warnings.extend(texts.notes(text))
    return sequences


def _check_lengths(config: Config, model: LoadedModel, world_size: int) -> None:
    """Refuse sequences that are longer than the model's context; texts that are not read are not checked."""
    longest = model.context_length
    for name, text in _texts(config).items():
        if longest is not None and text.sequence_length > longest:
            raise UserError(
                f"{name}.sequence_length={text.sequence_length} is longer than the context of {longest} tokens of "
                f"{model.label}."
            )
        if text.sequences < world_size:
            raise UserError(f"{name}.sequences={text.sequences} cannot be shared by {world_size} processes.")


def _check_prompt(config: Config, model: LoadedModel) -> None:
    """Refuse a prompt that the model cannot read: too long, of no tokens, or of tokens without embeddings."""
    prompt, new, longest = str(config.prompt), config.max_new_tokens, model.context_length
    check_characters(prompt, "The prompt")
    ids = model.tokenizer(prompt)["input_ids"]
    if not ids:
        raise UserError(f"The prompt {prompt!r} has no tokens. Give a prompt with text in it.")
    check_token_ids(model, ids, "The prompt")
    if longest is not None and len(ids) + new > longest:
        raise UserError(
            f"The prompt has {len(ids)} tokens; with max_new_tokens={new} that is longer than the context of {longest} "
            f"tokens of {model.label}."
        )


def _texts(config: Config) -> dict[str, TextConfig]:
    """Texts that the job reads, by their names in the config."""
    named = {"calibration": config.calibration} if config.method.uses_calibration else {}
    if config.search.wanted:
        named["search"] = _search_text(config)
    if config.refine.wanted and config.refine.text is not None:
        named["refine.text"] = config.refine.text
    if "evaluate" in config.stages:
        named |= {f"eval.datasets.{name}": text for name, text in config.eval.datasets.items()}
    return named


def _search_text(config: Config) -> TextConfig:
    """Sequences of the calibration text that the parent is not calibrated on."""
    search, text = config.search, config.calibration
    seed = None if text.seed is None else text.seed + 1 + search.seed
    return dataclasses.replace(text, sequences=search.sequences, sequence_length=search.sequence_length, seed=seed)


def _refinement_text(config: Config, model: LoadedModel, runtime: Runtime) -> RefinementText:
    """Sequences of the refinement that the model does not write itself."""
    text, held_out = config.refine.text, config.refine.validation_sequences
    assert text is not None
    if text.batch_size % runtime.process_group.world_size:
        raise UserError(
            f"refine.text.batch_size={text.batch_size} cannot be shared equally by {runtime.process_group.world_size} "
            "processes. Make it a multiple of their number."
        )
    wanted = dataclasses.replace(text, sequences=text.sequences + held_out)
    read, written = texts.split_self(wanted)
    if written:
        check_generates(model.model)
    empty = torch.empty(0, text.sequence_length, dtype=torch.int64)
    return RefinementText(
        sequences=wanted.sequences,
        length=text.sequence_length,
        held_out=held_out,
        batch_size=text.batch_size,
        read=empty if read is None else _read("refine.text", read, "train", model, runtime),
    )


def _evaluation_texts(config: Config, model: LoadedModel, runtime: Runtime) -> dict[str, Tensor]:
    """Read the evaluation texts before any long work, so that a missing or short one is refused at once."""
    if "evaluate" not in config.stages:
        return {}
    if config.method.uses_calibration:
        texts.check_apart(config.calibration, dict(config.eval.datasets))
    if config.refine.wanted and config.refine.text is not None:
        read, _ = texts.split_self(config.refine.text)
        if read is not None:
            texts.check_apart(read, dict(config.eval.datasets), "refine.text")
    return {
        name: _read(f"eval.datasets.{name}", text, "evaluation", model, runtime)
        for name, text in config.eval.datasets.items()
    }


def _read_allocations(config: Config, layers: list[str]) -> dict[str, Allocation]:
    """Allocation files among ``bits`` by path, checked against the layers."""
    found = {path: allocation.read(Path(path)) for path in config.allocations}
    for path, one in found.items():
        allocation.check_layers(one, layers, config.method.master_bits, path)
    return found


def _check_weight_ranges(job: LoadedJob, largest: Mapping[str, float]) -> None:
    """Refuse layers whose scales would all overflow or underflow; ``largest`` is the largest weight by tensor name."""
    quantizer = job.quantizer()
    for block in job.layers:
        for name, layer in block.items():
            check_weight_range(name, largest[f"{name}.weight"], quantizer.weight_format(name, layer.in_features))


def _check_budgets(job: LoadedJob) -> None:
    """Refuse a search budget that the narrowest bit-widths exceed."""
    quantizer = job.quantizer()
    check_budgets(
        job.config.search,
        [
            {
                name: NestedWeight.planned(quantizer.weight_format(name, layer.in_features), *layer.weight.shape)
                for name, layer in block.items()
            }
            for block in job.layers
        ],
    )
