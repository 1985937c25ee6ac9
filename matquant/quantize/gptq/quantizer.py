"""GPTQ as a block quantizer: Hessians of the layers' inputs, stage by stage, and the nested column solver."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from matquant.calibration.activation_streams import FULL
from matquant.calibration.hessian import HessianAccumulator
from matquant.formats.nested import NestedWeight, WeightFormat
from matquant.models.model_sizes import ModelSizes
from matquant.models.tracing import shared_input_groups
from matquant.quantize.base import (
    BlockContext,
    BlockQuantizer,
    BlockResult,
    CalibrationNeeds,
    CalibrationTokens,
    MethodMemory,
    QuantizerTask,
    dequantize_stream,
)
from matquant.quantize.gptq import memory
from matquant.quantize.gptq.config import GptqConfig
from matquant.quantize.gptq.hessians import (
    CholeskyFactor,
    HessianStats,
    PreparedHessians,
    hessian_quadratic_form,
    prepare_hessians,
)
from matquant.quantize.gptq.memory import GptqSettings
from matquant.quantize.gptq.options import LayerOptions, SolverOptions
from matquant.quantize.gptq.solver import compile_column_solver, solve
from matquant.quantize.layer_selection import check_errors, check_scales, float_weight

Hessians = dict[int, HessianAccumulator]  # of one input, by the bit-width of the stream


class GptqQuantizer(BlockQuantizer):
    """GPTQ of blocks (arXiv 2210.17323), extended to all bit-widths of the objective."""

    version = 4
    calibration: CalibrationNeeds

    def __init__(self, config: GptqConfig, task: QuantizerTask) -> None:
        self.config = config
        self.options = LayerOptions.of(
            config,
            task,
            error_feedback=config.error_feedback,
            scale=config.scale,
            act_order=config.act_order,
            cd_passes=config.cd_passes,
            correction=config.correction,
            scale_bits=config.scale_bits,
            damp=config.damp,
            block_size=config.block_size,
        )
        bits = () if config.per_bit_models else config.calibration_bits
        self.calibration = CalibrationNeeds(
            bits=bits or (task.master_bits,), full_precision=config.asymmetric_calibration
        )

    def prepare(self) -> None:
        compile_column_solver()

    @torch.inference_mode()
    def quantize_block(self, context: BlockContext) -> BlockResult:
        return _BlockSolver(self, context).solve()

    def calibration_bits_of(self, bits: int) -> int:
        """Bit-width of the stream that ``bits`` is calibrated on: the nearest one, the higher of two equally near."""
        return min(self.calibration.bits, key=lambda stream: (abs(stream - bits), -stream))

    def weight_format(self, layer: str, in_features: int) -> WeightFormat:
        return self.options.of_layer(layer).weight_format(in_features)

    def cache_key(self) -> dict[str, Any]:
        config = self.config
        streams = [list(self.calibration.bits), config.asymmetric_calibration, config.true_sequential]
        return self.options.cache_key() | {"streams": streams, "solver": self.version}

    def memory(self, sizes: ModelSizes, tokens: CalibrationTokens) -> MethodMemory:
        return memory.gptq_memory(self._memory_settings(), sizes, tokens)

    def operations(self, sizes: ModelSizes, tokens: CalibrationTokens) -> float:
        return memory.gptq_operations(self._memory_settings(), sizes, tokens)

    def _memory_settings(self) -> GptqSettings:
        return GptqSettings(
            streams=len(self.calibration.bits),
            bit_widths=len(self.options.default.bits),
            asymmetric=self.config.asymmetric_calibration,
            true_sequential=self.config.true_sequential,
        )


class _BlockSolver:
    """Quantization of one block, stage by stage.

    A stage is a set of layers that are calibrated in one pass: q, k, v / o / gate, up / down with ``true_sequential``, all
        layers without.
    """

    def __init__(self, quantizer: GptqQuantizer, context: BlockContext) -> None:
        self.quantizer = quantizer
        self.context = context
        self.config = quantizer.config
        self.bits = quantizer.calibration.bits
        self.group = context.process_group
        self.expert_groups = context.expert_groups
        self.result = BlockResult()

    def solve(self) -> BlockResult:
        for stage in self._stages():
            self._solve_stage(stage)
        for name in self.context.layers:
            if name not in self.result.weights:  # a layer that the model never calls
                self._solve_group([name], {})
        return self.result

    def _solve_stage(self, stage: Sequence[list[str]]) -> None:
        streams = self.quantizer.calibration.streams
        dequantized = {name: dequantize_stream(name, self.result.weights, self.context) for name in streams}
        parts = self._split_by_memory(stage)
        shared = self._accumulate_shared(stage, dequantized) if len(parts) > 1 else {}
        for part in parts:
            hessians = [self._new_hessians(group[0]) for group in part]
            self._accumulate(part, hessians, dequantized)
            if part is parts[-1]:
                dequantized = {}  # free the memory for the solver
            self._pad_experts(part, hessians, shared or self._merge_experts(part, hessians))
            for group in part:
                with self.context.timer.timed("solve"):
                    self._solve_group(group, hessians.pop(0))

    # Stages

    def _stages(self) -> list[list[list[str]]]:
        """Stages in order of execution, each a list of groups of layers that share an input.

        Equal layers of all experts are in one stage.
        """
        layers = self.context.layers
        if self.context.is_head:
            return [[[name] for name in layers]]
        found = shared_input_groups(self.context.model, self.context.index)
        stages: dict[str, list[list[str]]] = {}
        for group in [*found.groups, *([name] for name in found.uncalled if name in self.expert_groups)]:
            if kept := [name for name in group if name in layers]:
                stages.setdefault(self.expert_groups.get(kept[0], kept[0]), []).append(kept)
        sequential = list(stages.values())
        return sequential if self.config.true_sequential else [[group for stage in sequential for group in stage]]

    def _split_by_memory(self, stage: Sequence[list[str]]) -> list[list[list[str]]]:
        """Split a stage into parts whose Hessian accumulators fit in ``MAX_HESSIAN_BYTES``."""
        parts: list[list[list[str]]] = [[]]
        held = 0
        for group in stage:
            columns = self.context.layers[group[0]].in_features
            needed = memory.hessian_bytes(len(self.bits), self.config.asymmetric_calibration, columns)
            if parts[-1] and held + needed > memory.MAX_HESSIAN_BYTES:
                parts.append([])
                held = 0
            parts[-1].append(group)
            held += needed
        return parts

    # Hessians

    def _new_hessians(self, name: str) -> Hessians:
        """Empty accumulators for the input of a layer in every stream.

        Experts have no cross terms: a router sends each of them other tokens in every stream, which cannot be compared.
        """
        asymmetric = self.config.asymmetric_calibration and name not in self.expert_groups
        columns = self.context.layers[name].in_features
        return {bits: HessianAccumulator(columns, self.context.device, asymmetric=asymmetric) for bits in self.bits}

    def _accumulate(
        self, stage: Sequence[list[str]], hessians: Sequence[Hessians], dequantized: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        """Add the inputs of each group of the stage, in every stream, to its accumulators.

        Args:
            hessians: of each group; groups may share the same ones.
            dequantized: weights of earlier stages as each stream reads them.
        """
        context = self.context
        assert context.streams is not None
        firsts = [context.layers[group[0]] for group in stage]
        with context.timer.timed("forward"):
            for batch in context.streams.layer_inputs(context.index, firsts, dequantized):
                full = batch.get(FULL, [None] * len(firsts))
                for bits in self.bits:
                    for i, inputs in enumerate(batch[str(bits)]):
                        if inputs is not None:
                            with context.timer.nested("hessians"):
                                hessians[i][bits].update(inputs, full[i])
            for of_group in {id(h): h for h in hessians}.values():
                for accumulator in of_group.values():
                    accumulator.all_reduce(self.group)

    def _accumulate_shared(
        self, stage: Sequence[list[str]], dequantized: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, Hessians]:
        """Accumulators over the inputs of all experts of each expert group, in a pass of their own."""
        experts = [group for group in stage if group[0] in self.expert_groups]
        shared = {self.expert_groups[group[0]]: self._new_hessians(group[0]) for group in experts}
        if experts:
            self._accumulate(experts, [shared[self.expert_groups[group[0]]] for group in experts], dequantized)
        return shared

    def _merge_experts(self, stage: Sequence[list[str]], hessians: Sequence[Hessians]) -> dict[str, Hessians]:
        """Sum of the accumulators of all experts of each expert group."""
        shared: dict[str, Hessians] = {}
        for group, of_group in zip(stage, hessians, strict=True):
            if group[0] in self.expert_groups:
                merged = shared.setdefault(self.expert_groups[group[0]], self._new_hessians(group[0]))
                for bits, accumulator in of_group.items():
                    merged[bits].merge(accumulator)
        return shared

    def _pad_experts(
        self, stage: Sequence[list[str]], hessians: Sequence[Hessians], shared: Mapping[str, Hessians]
    ) -> None:
        """Pad the accumulators of experts that saw fewer tokens than they have inputs with the average over all experts.

        Each such layer is recorded with the fewest tokens that it saw in any stream.
        """
        for group, of_group in zip(stage, hessians, strict=True):
            columns = self.context.layers[group[0]].in_features
            fewest = min(accumulator.tokens for accumulator in of_group.values())
            if group[0] not in self.expert_groups or fewest >= columns:
                continue
            for bits, accumulator in of_group.items():
                accumulator.pad_with(shared[self.expert_groups[group[0]]][bits], columns)
            self.result.experts.extend({"name": name, "tokens": fewest, "inputs": columns} for name in group)

    # Layers

    def _solve_group(self, names: Sequence[str], hessians: Hessians) -> None:
        """Quantize layers that share their input; ``hessians`` is empty afterwards."""
        if not hessians or any(h.tokens == 0 for h in hessians.values()):
            for name in names:
                self.result.notes.append(f"{name} saw no calibration data; it was rounded to nearest.")
                self._solve_layer(name, None, [])
            return
        stats = self._take_stats(names[0], hessians)
        options = {name: self.quantizer.options.of_layer(name) for name in names}
        for chosen in dict.fromkeys(id(o) for o in options.values()):
            alike = [name for name in names if id(options[name]) == chosen]
            self._solve_alike(alike, stats, options[alike[0]])

    def _solve_alike(self, names: Sequence[str], stats: Mapping[int, HessianStats], options: SolverOptions) -> None:
        """Quantize layers that share their input and their options."""
        inputs = list(stats.values())
        if len(stats) > 1:
            inputs = [stats[self.quantizer.calibration_bits_of(bits)] for bits in options.bits]
        prepared = prepare_hessians(inputs, options, names[0], self._distribute)
        self.result.notes.extend(prepared.notes)
        for name in names:
            self._solve_layer(name, prepared, [one.hessian for one in inputs])

    def _take_stats(self, name: str, hessians: Hessians) -> dict[int, HessianStats]:
        """Statistics of each stream for the solver; ``hessians`` is emptied, so that no second copy is held."""
        asymmetric = self.config.asymmetric_calibration and name not in self.expert_groups
        if asymmetric and any(h.cross is None for h in hessians.values()):
            self.result.notes.append(f"{name} sees other tokens in each slice; it was calibrated symmetrically.")
            asymmetric = False
        stats, device = {}, self.context.solver_device
        for bits in list(hessians):
            accumulator = hessians.pop(bits)
            cross = accumulator.cross.to(device) if asymmetric and accumulator.cross is not None else None
            stats[bits] = HessianStats(hessian=accumulator.hessian.to(device), cross_hessian=cross)
        return stats

    def _distribute(self, count: int, work: Callable[[int], CholeskyFactor]) -> list[CholeskyFactor]:
        """Map ``work`` over ``range(count)``, each process a share of it; all processes get all results."""
        if self.group.world_size == 1:
            return [work(index) for index in range(count)]
        made = {index: work(index) for index in range(self.group.rank, count, self.group.world_size)}
        return [self._broadcast_factor(made.get(index), index % self.group.world_size) for index in range(count)]

    def _broadcast_factor(self, factor: CholeskyFactor | None, source: int) -> CholeskyFactor:
        """Send the factor of rank ``source`` to all processes."""
        columns, corrected, note = self.group.broadcast_object(
            None if factor is None else [len(factor.factor), factor.correction is not None, factor.note], source
        )
        if factor is None:
            device = self.context.solver_device
            hessian, upper, *rest = torch.empty(2 + corrected, columns, columns, device=device)
            factor = CholeskyFactor(hessian=hessian, factor=upper, correction=rest[0] if corrected else None, note=note)
        for tensor in (factor.hessian, factor.factor, *((factor.correction,) if factor.correction is not None else ())):
            self.group.broadcast(tensor, source)
        return factor

    def _solve_layer(self, name: str, prepared: PreparedHessians | None, hessians: Sequence[Tensor]) -> None:
        """Quantize one layer; each process solves a shard of the rows."""
        options = self.quantizer.options.of_layer(name)
        weight = float_weight(name, self.context.layers[name], self.context.solver_device)
        own = weight[self.group.shard(len(weight))]
        solved = solve(own, prepared, options)
        with self.context.timer.nested("errors"):
            errors = self._relative_errors(weight, own, solved, hessians, options.bits)
        solved = solved.map_tensors(lambda tensor: self.group.all_gather_rows(tensor, len(weight)))
        self.result.notes.extend(check_scales(name, weight, solved))
        check_errors(name, errors)
        self.result.weights[name] = solved.to("cpu")
        self.result.errors[name] = errors
        self.context.progress(1)

    def _relative_errors(
        self, weight: Tensor, own: Tensor, solved: NestedWeight, hessians: Sequence[Tensor], all_bits: Sequence[int]
    ) -> dict[str, float]:
        """Relative output error at each bit-width, over all rows; ``own`` is this process's shard of the rows."""
        distinct = {id(hessian): hessian for hessian in hessians}  # bit-widths may share one
        energies = {key: hessian_quadratic_form(own, hessian) for key, hessian in distinct.items()}
        errors = {}
        for k, bits in enumerate(all_bits if hessians else ()):
            hessian = hessians[k % len(hessians)]
            lost = hessian_quadratic_form(own - solved.dequantize(bits), hessian)
            pair = torch.stack([lost, energies[id(hessian)]], 1)
            error, energy = self.group.all_gather_rows(pair, len(weight)).sum(0).tolist()
            errors[str(bits)] = error / energy if energy > 0 else 0.0
        return errors
