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

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from matquant.calibration.hessian import Moments
from matquant.calibration.stream import FULL, Streams
from matquant.errors import UserError
from matquant.models.activations import Place
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


def check_layers(layers: Sequence[Mapping[str, nn.Linear]], group_size_of: Callable[[str], int]) -> None:
    """Refuse a group size that does not divide a layer, before any work.

    Raises:
        UserError: names the first such layer, and what would do.
    """
    for block in layers:
        for name, layer in block.items():
            group_size = group_size_of(name)
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
        device: where blocks run.
        dtype: in which blocks run.
        solver_device: where layers are solved; ``device`` when None.
        place: where hidden states wait between two blocks; ``device`` when None.
        overrides: gives for a layer's name the options that it has of its own, or None.
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
        solver_device: torch.device | None = None,
        place: Place | None = None,
        overrides: Callable[[str], SolverOptions | None] = lambda _: None,
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.blocks = blocks
        self.layers = layers
        self.options = options
        self.calibration = calibration
        self.device = device
        self.solver_device = solver_device or device
        self.dtype = dtype
        self.place = place
        self.overrides = overrides
        self.progress = progress
        self.seconds: dict[str, float] = collections.defaultdict(float)

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
        with self.timed("prepare"):
            return Streams(
                self.blocks, windows, names, self.calibration.batch_size, self.device, self.dtype, self.place
            )

    def _block(self, index: int, draft: Draft, streams: Streams | None) -> dict:
        name = block_file(index)
        done = draft.has(name)
        if done and (streams is None or index + 1 == len(self.layers)):
            weights, record = read_block(draft, name)
            self.progress(len(weights))
            return record | {"file": name}
        with contextlib.ExitStack() as stack:
            with self.timed("load"):
                # Without calibration nothing runs, and only the solver needs the weights.
                place = (self.device, self.dtype) if streams else (self.solver_device, torch.float32)
                stack.enter_context(self.blocks.on_device(index, *place))
            if done:
                weights, record = read_block(draft, name)
                self.progress(len(weights))
            else:
                weights, record = _BlockSolver(self, index, streams).solve()
                with self.timed("write"):
                    write_block(draft, name, weights, record)
            if streams is not None and index + 1 < len(self.layers):
                with self.timed("forward"):
                    streams.advance(index, lambda name: self.decoded(name, weights))
        return record | {"file": name}

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the seconds spent inside to ``seconds[phase]``."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[phase] += time.perf_counter() - start

    def decoded(self, stream: str, weights: Mapping[str, NestedWeight]) -> dict[str, Tensor]:
        """The dense weights of one stream, on the device; none for the full-precision model, which has its own."""
        if stream == FULL:
            return {}
        return {name: w.to(self.device).decode(int(stream), self.dtype) for name, w in weights.items()}


class _BlockSolver:
    """Solves the layers of one block, stage by stage."""

    def __init__(self, driver: Driver, index: int, streams: Streams | None) -> None:
        self.driver = driver
        self.index = index
        self.streams = streams
        self.layers = driver.layers[index]
        self.pools = {} if index == len(driver.blocks) else driver.blocks.expert_pools(index)
        self.weights: dict[str, NestedWeight] = {}
        self.record: dict = {"layers": {}, "notes": []}

    def solve(self) -> tuple[dict[str, NestedWeight], dict]:
        if self.streams is None:
            for name in self.layers:
                self._solve_layer(name, None, [])
            return self.weights, self.record
        for stage in self._stages():
            with self.driver.timed("forward"):
                moments = self._moments(stage, self.streams)
            self._fill_experts(stage, moments)
            for group in stage:
                with self.driver.timed("solve"):
                    self._solve_group(group, moments.pop(0))
        for name in self.layers:
            if name not in self.weights:  # a layer that the model never calls
                self._solve_group([name], {})
        return self.weights, self.record

    def _stages(self) -> list[list[list[str]]]:
        """Stages of groups of layers that share an input, in order of execution; what experts do alike is one stage."""
        if self.index == len(self.driver.blocks):
            return [[[name] for name in self.layers]]
        found = self.driver.blocks.input_groups(self.index)
        stages: dict[str, list[list[str]]] = {}
        for group in [*found.groups, *([name] for name in found.uncalled if name in self.pools)]:
            if kept := [name for name in group if name in self.layers]:
                stages.setdefault(self.pools.get(kept[0], kept[0]), []).append(kept)
        staged = list(stages.values())
        return staged if self.driver.calibration.staged else [[group for stage in staged for group in stage]]

    def _moments(self, stage: Sequence[Sequence[str]], streams: Streams) -> list[dict[int, Moments]]:
        """For each group of the stage the moments of its input in every stream."""
        firsts = [self.layers[group[0]] for group in stage]
        calibration = self.driver.calibration
        moments = [
            {
                # A router sends other tokens to an expert in each stream: those cannot be compared.
                bits: Moments(
                    self.layers[name].in_features, streams.device,
                    asymmetric=calibration.asymmetric and name not in self.pools,
                )
                for bits in calibration.streams
            }
            for name, *_ in stage
        ]  # fmt: skip
        weights = {name: self.driver.decoded(name, self.weights) for name in streams.hidden}
        for batch in streams.inputs(self.index, firsts, weights):
            full = batch.get(FULL, [None] * len(firsts))
            for bits in calibration.streams:
                for i, inputs in enumerate(batch[str(bits)]):
                    if inputs is not None:
                        moments[i][bits].add(inputs, full[i])
        return moments

    def _fill_experts(self, stage: Sequence[Sequence[str]], moments: Sequence[dict[int, Moments]]) -> None:
        """Give experts that saw fewer tokens than they have inputs the rest from what all experts saw on average.

        Each of them is recorded by name, with the tokens that it saw.
        """
        pools: dict[str, list[int]] = {}
        for i, group in enumerate(stage):
            if group[0] in self.pools:
                pools.setdefault(self.pools[group[0]], []).append(i)
        for members in pools.values():
            columns = self.layers[stage[members[0]][0]].in_features
            for bits in self.driver.calibration.streams:
                together = Moments(columns, self.driver.device)
                for i in members:
                    together.merge(moments[i][bits])
                poor = {i: moments[i][bits].tokens for i in members if moments[i][bits].tokens < columns}
                for i, tokens in poor.items():
                    moments[i][bits].fill(together, columns)
                    if bits == self.driver.calibration.streams[-1]:
                        found = [{"name": n, "tokens": tokens, "inputs": columns} for n in stage[i]]
                        self.record.setdefault("experts", []).extend(found)

    def _solve_group(self, names: Sequence[str], moments: dict[int, Moments]) -> None:
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
        calibration = calibrate(inputs, options, names[0])
        self.record["notes"] += calibration.notes
        for name in names:
            self._solve_layer(name, calibration, [i.hessian for i in inputs])

    def _inputs(self, name: str, moments: dict[int, Moments]) -> dict[int, Inputs]:
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
        solved = solve(weight, calibration, options)
        errors = {
            str(bits): relative_error(weight, solved.decode(bits), hessians[k % len(hessians)])
            for k, bits in enumerate(options.widths)
            if hessians
        }
        self.weights[name] = solved.to("cpu")
        self.record["layers"][name] = {"shape": list(weight.shape), "errors": errors}
        self.driver.progress(1)
