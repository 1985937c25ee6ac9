"""Quantizes a model block by block, on what the blocks before it put out.

Several slices of the model may be followed at once, each a stream of hidden states of its own, beside that of the
full-precision model. Lifecycle of one block:
  1. for each stage (layers that share an input: q,k,v / o / gate,up / down), every stream runs up to it, with the layers of
     earlier stages already quantized at the stream's width;
  2. the moments of the stage's inputs give its layers' problems, which are solved;
  3. when all stages are done the block is committed to the draft: after a crash, work goes on at the next block;
  4. every stream runs through the block with its own slice of it, to make the next block's inputs.
Without ``staged`` all layers of a block are one stage, as in GPTQ.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from matquant.calibration.hessian import Moments
from matquant.calibration.stream import FULL, Streams
from matquant.errors import UserError
from matquant.models.blocks import BlockModel
from matquant.nested import NestedWeight
from matquant.quantize.parent import block_file, read_block, write_block
from matquant.quantize.solver import Calibration, Inputs, SolverOptions, calibrate, relative_error, solve
from matquant.store import Draft


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


def layers_to_quantize(blocks: BlockModel, skips: Callable[[str], bool], *, head: bool) -> list[dict[str, nn.Linear]]:
    """For each block its linear layers by full name but the skipped ones; last the head's, when that is asked for."""
    return [
        {name: layer for name, layer in blocks.linears(index).items() if not skips(name)}
        for index in range(len(blocks) + head)
    ]


def check_layers(layers: Sequence[Mapping[str, nn.Linear]], group_size: int) -> None:
    """Refuse a group size that does not divide a layer, before any work.

    Raises:
        UserError: names the first such layer, and what would do.
    """
    for block in layers:
        for name, layer in block.items():
            if group_size != -1 and layer.in_features % group_size:
                raise UserError(
                    f"method.group_size={group_size} does not divide the {layer.in_features} input features of "
                    f"{name}. Choose another (32, 64, 128, or -1 for one scale per row), or leave such layers alone with "
                    f"method.skip=['*{name.rsplit('.', 1)[-1]}']."
                )
    if not any(layers):
        raise UserError("method.skip leaves no layer to quantize.")


class Driver:
    """Quantizes all blocks of one model with one set of options.

    Args:
        blocks: the model.
        layers: what is quantized of each block, from ``layers_to_quantize``.
        options: of the solver.
        calibration: of the inputs; unused when there is no calibration text.
        device: where blocks run; the solver itself works on the CPU.
        dtype: in which blocks run.
        progress: called with 1 after each solved layer.
    """

    def __init__(
        self,
        blocks: BlockModel,
        layers: Sequence[Mapping[str, nn.Linear]],
        options: SolverOptions,
        calibration: CalibrationOptions,
        *,
        device: torch.device,
        dtype: torch.dtype,
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.blocks = blocks
        self.layers = layers
        self.options = options
        self.calibration = calibration
        self.device = device
        self.dtype = dtype
        self.progress = progress

    @torch.inference_mode()
    def run(self, draft: Draft, windows: Tensor | None) -> list[dict]:
        """Quantize every block into ``draft``.

        Args:
            draft: where blocks are committed; those that it has already are taken from there.
            windows: int64 [sequences, length], the calibration text; None rounds to nearest.

        Returns:
            For each block what ``write_block`` recorded of it: file, layers with shapes and errors, notes.
        """
        streams = None if windows is None else self._start(windows)
        return [self._block(index, draft, streams) for index in range(len(self.layers))]

    def _start(self, windows: Tensor) -> Streams:
        names = [FULL] * self.calibration.asymmetric + [str(bits) for bits in self.calibration.streams]
        return Streams(self.blocks, windows, names, self.calibration.batch_size, self.device, self.dtype)

    def _block(self, index: int, draft: Draft, streams: Streams | None) -> dict:
        name = block_file(index)
        with streams.at(index) if streams else contextlib.nullcontext():
            if draft.has(name):
                weights, record = read_block(draft, name)
                self.progress(len(weights))
            else:
                weights, record = _BlockSolver(self, index, streams).solve()
                write_block(draft, name, weights, record)
            if streams is not None and index + 1 < len(self.layers):
                streams.advance(index, self.decoded(weights))
        return record | {"file": name}

    def decoded(self, weights: Mapping[str, NestedWeight]) -> dict[str, dict[str, Tensor]]:
        """The dense weights of every stream, on the device."""
        return {
            str(bits): {n: w.decode(bits).to(self.device, self.dtype) for n, w in weights.items()}
            for bits in self.calibration.streams
        }


class _BlockSolver:
    """Solves the layers of one block, stage by stage."""

    def __init__(self, driver: Driver, index: int, streams: Streams | None) -> None:
        self.driver = driver
        self.index = index
        self.streams = streams
        self.layers = driver.layers[index]
        self.weights: dict[str, NestedWeight] = {}
        self.record: dict = {"layers": {}, "notes": []}

    def solve(self) -> tuple[dict[str, NestedWeight], dict]:
        if self.streams is None:
            for name in self.layers:
                self._solve_layer(name, None, [])
            return self.weights, self.record
        for stage in self._stages():
            moments = self._moments(stage, self.streams)
            for group, by_stream in zip(stage, moments, strict=True):
                self._solve_group(group, by_stream)
        for name in self.layers:
            if name not in self.weights:  # an expert that no token of the probe chose
                self._solve_group([name], {})
        return self.weights, self.record

    def _stages(self) -> list[list[list[str]]]:
        """Stages of groups of layers that share an input, in order of execution."""
        if self.index == len(self.driver.blocks):
            return [[[name] for name in self.layers]]
        found = self.driver.blocks.input_groups(self.index).groups
        groups = [kept for group in found if (kept := [name for name in group if name in self.layers])]
        return [[group] for group in groups] if self.driver.calibration.staged else [groups]

    def _moments(self, stage: Sequence[Sequence[str]], streams: Streams) -> list[dict[int, Moments]]:
        """For each group of the stage the moments of its input in every stream."""
        firsts = [self.layers[group[0]] for group in stage]
        calibration = self.driver.calibration
        moments = [
            {
                bits: Moments(layer.in_features, streams.device, asymmetric=calibration.asymmetric)
                for bits in calibration.streams
            }
            for layer in firsts
        ]
        for batch in streams.inputs(self.index, firsts, self.driver.decoded(self.weights)):
            full = batch.get(FULL, [None] * len(firsts))
            for bits in calibration.streams:
                for i, inputs in enumerate(batch[str(bits)]):
                    if inputs is not None:
                        moments[i][bits].add(inputs, full[i])
        return moments

    def _solve_group(self, names: Sequence[str], moments: Mapping[int, Moments]) -> None:
        """Solve layers that share their input."""
        if not moments or any(m.tokens == 0 for m in moments.values()):
            for name in names:
                self.record["notes"].append(f"{name} saw no calibration data; it was rounded to nearest.")
                self._solve_layer(name, None, [])
            return
        inputs = self._inputs(names[0], moments)
        calibration = calibrate(inputs, self.driver.options, names[0])
        self.record["notes"] += calibration.notes
        for name in names:
            self._solve_layer(name, calibration, [i.hessian.cpu() for i in inputs])

    def _inputs(self, name: str, moments: Mapping[int, Moments]) -> list[Inputs]:
        """The moments as the solver takes them: one for all widths, or one per width."""
        asymmetric = self.driver.calibration.asymmetric
        if asymmetric and any(m.cross is None for m in moments.values()):
            self.record["notes"].append(f"{name} sees other tokens in each slice; it was calibrated symmetrically.")
            asymmetric = False
        given = {bits: Inputs(hessian=m.hessian, cross=m.cross if asymmetric else None) for bits, m in moments.items()}
        if len(given) == 1:
            return list(given.values())
        return [given[self.driver.calibration.stream_of(bits)] for bits in self.driver.options.widths]

    def _solve_layer(self, name: str, calibration: Calibration | None, hessians: Sequence[Tensor]) -> None:
        options = self.driver.options
        weight = self.layers[name].weight.detach().float().cpu()
        if not torch.isfinite(weight).all():
            raise UserError(
                f"The weights of {name} hold NaN or Inf; mend the checkpoint or leave it alone with method.skip."
            )
        solved = solve(weight, calibration, options)
        errors = {
            str(bits): relative_error(weight, solved.decode(bits), hessians[k % len(hessians)])
            for k, bits in enumerate(options.widths)
            if hessians
        }
        self.weights[name] = solved
        self.record["layers"][name] = {"shape": list(weight.shape), "errors": errors}
        self.driver.progress(1)
