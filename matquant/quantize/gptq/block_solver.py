"""Solves the layers of one block: gathers what reaches them, factors it, and chooses their codes."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from matquant.calibration.activation_streams import FULL, ActivationStreams
from matquant.calibration.hessian import HessianAccumulator
from matquant.errors import UserError
from matquant.formats.nested import NestedWeight
from matquant.models.tracing import shared_input_groups
from matquant.quantize.gptq.solver import Calibration, Factored, Inputs, SolverOptions, calibrate, output_energy, solve

if TYPE_CHECKING:
    from matquant.quantize.driver import Driver

# Bytes of moments that are held at once. More experts are taken one part after another, which costs a pass for each.
MOST_MOMENTS = 2**33


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationOptions:
    """How a block's inputs are made.

    Attributes:
        streams: widths whose slices are followed through the model. Each width of the objective is calibrated on the
            nearest of them, the higher one of two as near.
        asymmetric: aim at the outputs that the full-precision inputs give, instead of those of the quantized model's.
        staged: let later layers of a block see the earlier ones quantized.
        batch_size: windows in one forward pass.
    """

    streams: tuple[int, ...]
    asymmetric: bool
    staged: bool
    batch_size: int

    def stream_of(self, bits: int) -> int:
        return min(self.streams, key=lambda stream: (abs(stream - bits), -stream))


class BlockSolver:
    """Solves the layers of one block, stage by stage."""

    def __init__(self, driver: "Driver", index: int, streams: ActivationStreams | None) -> None:
        self.driver = driver
        self.index = index
        self.streams = streams
        self.layers = driver.layers[index]
        self.pools = {} if index == len(driver.blocks) else driver.blocks.expert_groups(index)
        self.weights: dict[str, NestedWeight] = {}
        self.record: dict = {"layers": {}, "notes": []}

    def solve(self) -> tuple[dict[str, NestedWeight], dict]:
        if self.streams is None:
            for name in self.layers:
                self._solve_layer(name, None, [])
            return self.weights, self.record
        for stage in self._stages():
            decoded = {name: self.driver.decoded(name, self.weights) for name in self.streams.hidden}
            parts = self._parts(stage)
            pooled = self._pooled(stage, decoded) if len(parts) > 1 else {}
            for part in parts:
                moments = [self._new_moments(group[0]) for group in part]
                self._gather(part, moments, decoded)
                if part is parts[-1]:
                    decoded = {}  # its memory is the solver's
                self._fill_experts(part, moments, pooled or self._merged(part, moments))
                for group in part:
                    with self.driver.phases.timed("solve"):
                        self._solve_group(group, moments.pop(0))
        for name in self.layers:
            if name not in self.weights:  # a layer that the model never calls
                self._solve_group([name], {})
        return self.weights, self.record

    def _stages(self) -> list[list[list[str]]]:
        """Stages of groups of layers that share an input, in order of execution; what experts do alike is one stage."""
        if self.index == len(self.driver.blocks):
            return [[[name] for name in self.layers]]
        found = shared_input_groups(self.driver.blocks, self.index)
        stages: dict[str, list[list[str]]] = {}
        for group in [*found.groups, *([name] for name in found.uncalled if name in self.pools)]:
            if kept := [name for name in group if name in self.layers]:
                stages.setdefault(self.pools.get(kept[0], kept[0]), []).append(kept)
        staged = list(stages.values())
        return staged if self.driver.calibration.staged else [[group for stage in staged for group in stage]]

    def _parts(self, stage: Sequence[list[str]]) -> list[list[list[str]]]:
        """A stage in parts whose moments fit in ``MOST_MOMENTS`` bytes: many experts' would not be held at once."""
        calibration = self.driver.calibration
        parts: list[list[list[str]]] = [[]]
        held = 0
        for group in stage:
            needed = (
                8 * self.layers[group[0]].in_features ** 2 * len(calibration.streams) * (1 + calibration.asymmetric)
            )
            if parts[-1] and held + needed > MOST_MOMENTS:
                parts.append([])
                held = 0
            parts[-1].append(group)
            held += needed
        return parts

    def _new_moments(self, name: str) -> dict[int, HessianAccumulator]:
        """Of the input of a layer in every stream. A router sends an expert other tokens in each: those cannot be compared."""
        asymmetric = self.driver.calibration.asymmetric and name not in self.pools
        columns = self.layers[name].in_features
        return {
            bits: HessianAccumulator(columns, self.driver.device, asymmetric=asymmetric)
            for bits in self.driver.calibration.streams
        }

    def _gather(
        self,
        stage: Sequence[list[str]],
        moments: Sequence[dict[int, HessianAccumulator]],
        decoded: Mapping[str, Mapping[str, Tensor]],
    ) -> None:
        """Add what reaches each group of the stage, in every stream, to its moments.

        Args:
            moments: of each group; groups may have the same ones.
            decoded: the weights that were solved before, as each stream reads them.
        """
        assert self.streams is not None
        firsts = [self.layers[group[0]] for group in stage]
        with self.driver.phases.timed("forward"):
            for batch in self.streams.inputs(self.index, firsts, decoded):
                full = batch.get(FULL, [None] * len(firsts))
                for bits in self.driver.calibration.streams:
                    for i, inputs in enumerate(batch[str(bits)]):
                        if inputs is not None:
                            with self.driver.phases.within("moments"):
                                moments[i][bits].add(inputs, full[i])
            for of_group in {id(m): m for m in moments}.values():
                for of_stream in of_group.values():
                    of_stream.add_up(self.driver.process_group)

    def _pooled(
        self, stage: Sequence[list[str]], decoded: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, dict[int, HessianAccumulator]]:
        """What all experts of each pool see together, in every stream, in a pass of its own."""
        experts = [group for group in stage if group[0] in self.pools]
        pooled = {self.pools[group[0]]: self._new_moments(group[0]) for group in experts}
        if experts:
            self._gather(experts, [pooled[self.pools[group[0]]] for group in experts], decoded)
        return pooled

    def _merged(
        self, stage: Sequence[list[str]], moments: Sequence[dict[int, HessianAccumulator]]
    ) -> dict[str, dict[int, HessianAccumulator]]:
        """What all experts of each pool saw together, from what each of them saw."""
        pooled: dict[str, dict[int, HessianAccumulator]] = {}
        for group, of_group in zip(stage, moments, strict=True):
            if group[0] in self.pools:
                together = pooled.setdefault(self.pools[group[0]], self._new_moments(group[0]))
                for bits, seen in of_group.items():
                    together[bits].merge(seen)
        return pooled

    def _fill_experts(
        self,
        stage: Sequence[list[str]],
        moments: Sequence[dict[int, HessianAccumulator]],
        pooled: Mapping[str, dict[int, HessianAccumulator]],
    ) -> None:
        """Give experts that saw fewer tokens than they have inputs the rest from what all experts saw on average.

        Each of them is recorded by name, with the fewest tokens that it saw in any stream.
        """
        for group, of_group in zip(stage, moments, strict=True):
            columns = self.layers[group[0]].in_features
            fewest = min(seen.tokens for seen in of_group.values())
            if group[0] not in self.pools or fewest >= columns:
                continue
            for bits, seen in of_group.items():
                seen.fill(pooled[self.pools[group[0]]][bits], columns)
            found = [{"name": name, "tokens": fewest, "inputs": columns} for name in group]
            self.record.setdefault("experts", []).extend(found)

    def _solve_group(self, names: Sequence[str], moments: dict[int, HessianAccumulator]) -> None:
        """Solve layers that share their input."""
        if not moments or any(m.tokens == 0 for m in moments.values()):
            for name in names:
                self.record["notes"].append(f"{name} saw no calibration data; it was rounded to nearest.")
                self._solve_layer(name, None, [])
            return
        given = self._inputs(names[0], moments)
        options = {name: self.driver.overrides(name) or self.driver.options for name in names}
        for chosen in dict.fromkeys(id(o) for o in options.values()):
            alike = [name for name in names if id(options[name]) == chosen]
            self._solve_alike(alike, given, options[alike[0]])

    def _solve_alike(self, names: Sequence[str], given: Mapping[int, Inputs], options: SolverOptions) -> None:
        """Solve layers that share their input and their options."""
        inputs = list(given.values())
        if len(given) > 1:
            inputs = [given[self.driver.calibration.stream_of(bits)] for bits in options.widths]
        calibration = calibrate(inputs, options, names[0], self._shared)
        self.record["notes"] += calibration.notes
        for name in names:
            self._solve_layer(name, calibration, [i.hessian for i in inputs])

    def _shared(self, count: int, work: Callable[[int], Factored]) -> list[Factored]:
        """The factored inputs of so many streams, of which each process makes some."""
        process_group = self.driver.process_group
        if process_group.world_size == 1:
            return [work(index) for index in range(count)]
        made = {index: work(index) for index in range(process_group.rank, count, process_group.world_size)}
        return [self._copied(made.get(index), index % process_group.world_size) for index in range(count)]

    def _copied(self, made: Factored | None, source: int) -> Factored:
        """What the process ``source`` made, which is ``made`` there, in every process."""
        process_group = self.driver.process_group
        columns, shifted, note = process_group.broadcast_object(
            None if made is None else [len(made.factor), made.shift is not None, made.note], source
        )
        if made is None:
            hessian, factor, *shift = torch.empty(2 + shifted, columns, columns, device=self.driver.solver_device)
            made = Factored(hessian=hessian, factor=factor, shift=shift[0] if shifted else None, note=note)
        for tensor in (made.hessian, made.factor, *((made.shift,) if made.shift is not None else ())):
            process_group.broadcast(tensor, source)
        return made

    def _inputs(self, name: str, moments: dict[int, HessianAccumulator]) -> dict[int, Inputs]:
        """The moments of each stream as the solver takes them; ``moments`` is empty afterwards."""
        asymmetric = self.driver.calibration.asymmetric and name not in self.pools
        if asymmetric and any(m.cross is None for m in moments.values()):
            self.record["notes"].append(f"{name} sees other tokens in each slice; it was calibrated symmetrically.")
            asymmetric = False
        given, place = {}, self.driver.solver_device
        for bits in list(moments):  # one after the other, so that no second copy of all is held
            of_stream = moments.pop(bits)
            cross = of_stream.cross.to(place) if asymmetric and of_stream.cross is not None else None
            given[bits] = Inputs(hessian=of_stream.hessian.to(place), cross=cross)
        return given

    def _solve_layer(self, name: str, calibration: Calibration | None, hessians: Sequence[Tensor]) -> None:
        options = self.driver.overrides(name) or self.driver.options
        weight = self.layers[name].weight.detach().to(self.driver.solver_device).float()
        if not torch.isfinite(weight).all():
            raise UserError(
                f"The weights of {name} hold NaN or Inf; mend the checkpoint or leave it alone with method.skip."
            )
        solved, errors = self._solve_rows(weight, calibration, hessians, options)
        if not torch.isfinite(solved.scales).all():
            raise UserError(
                f"The weights of {name} reach {weight.abs().max():.3g}, too much for scales in {options.scale_dtype}. Leave it "
                "alone with method.skip, or set model.dtype=bfloat16."
            )
        self.weights[name] = solved.to("cpu")
        self.record["layers"][name] = {"shape": list(weight.shape), "errors": errors}
        self.driver.progress(1)

    def _solve_rows(
        self, weight: Tensor, calibration: Calibration | None, hessians: Sequence[Tensor], options: SolverOptions
    ) -> tuple[NestedWeight, dict[str, float]]:
        """The whole solution and its relative errors; each process solves a part of the rows."""
        process_group = self.driver.process_group
        own = weight[process_group.shard(len(weight))]
        solved = solve(own, calibration, options)
        with self.driver.phases.within("errors"):
            errors = self._errors(weight, own, solved, hessians, options.widths)
        return solved.map_tensors(lambda tensor: process_group.all_gather_rows(tensor, len(weight))), errors

    def _errors(
        self, weight: Tensor, own: Tensor, solved: NestedWeight, hessians: Sequence[Tensor], widths: Sequence[int]
    ) -> dict[str, float]:
        """The share of the outputs' energy that is lost at each width, of all rows; ``own`` are this process's."""
        wholes = {id(hessian): hessian for hessian in hessians}  # one for each, though widths may share it
        wholes = {key: output_energy(own, hessian) for key, hessian in wholes.items()}
        errors = {}
        for k, bits in enumerate(widths if hessians else ()):
            hessian = hessians[k % len(hessians)]
            energies = torch.stack([output_energy(own - solved.dequantize(bits), hessian), wholes[id(hessian)]], 1)
            lost, whole = self.driver.process_group.all_gather_rows(energies, len(weight)).sum(0).tolist()
            errors[str(bits)] = lost / whole if whole > 0 else 0.0
        return errors
