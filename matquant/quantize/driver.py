"""Quantizes a model block by block: calibrate, solve, store, and carry on with what the quantized block puts out.

Lifecycle of one block:
  1. inputs reach it as the already quantized blocks before it leave them;
  2. one forward pass collects a Hessian for every distinct input of its linear layers;
  3. each layer is solved, and the block is committed to the draft (after a crash, work goes on at the next block);
  4. the block runs again with its quantized weights, to make the next block's inputs.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from matquant.calibration.hessian import watch
from matquant.calibration.stream import Stream
from matquant.errors import UserError
from matquant.models.blocks import BlockModel
from matquant.nested import NestedWeight
from matquant.quantize.parent import block_file, read_block, write_block
from matquant.quantize.solver import Solution, SolverOptions, relative_error, solve
from matquant.store import Draft


def check_layers(blocks: BlockModel, group_size: int, skips: Callable[[str], bool]) -> None:
    """Refuse a group size that does not divide a layer, before any work.

    Raises:
        UserError: names the first such layer, and what would do.
    """
    found = False
    for index in range(len(blocks)):
        for name, layer in blocks.linears(index).items():
            if skips(name):
                continue
            found = True
            if group_size != -1 and layer.in_features % group_size:
                raise UserError(
                    f"method.group_size={group_size} does not divide the {layer.in_features} input features of "
                    f"{name}. Choose another (32, 64, 128, or -1 for one scale per row), or leave such layers alone with "
                    f"method.skip=['*{name.rsplit('.', 1)[-1]}']."
                )
    if not found:
        raise UserError("method.skip leaves no layer to quantize.")


class Driver:
    """Quantizes all blocks of one model with one set of solver options.

    Args:
        blocks: the model.
        options: of the solver.
        skips: whether a layer, by its full name, is left alone.
        device: where blocks run; the solver itself works on the CPU.
        dtype: in which blocks run.
        progress: called with 1 after each solved layer.
    """

    def __init__(
        self,
        blocks: BlockModel,
        options: SolverOptions,
        *,
        skips: Callable[[str], bool],
        device: torch.device,
        dtype: torch.dtype,
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.blocks = blocks
        self.options = options
        self.skips = skips
        self.device = device
        self.dtype = dtype
        self.progress = progress

    @torch.inference_mode()
    def run(self, draft: Draft, windows: Tensor | None, batch_size: int) -> list[dict]:
        """Quantize every block into ``draft``.

        Args:
            draft: where blocks are committed; those that it has already are taken from there.
            windows: int64 [sequences, length], the calibration text; None rounds to nearest.

        Returns:
            For each block what ``write_block`` recorded of it: file, layers with shapes and errors, notes.
        """
        stream = None if windows is None else Stream(self.blocks, windows, batch_size, self.device, self.dtype)
        return [self._block(index, draft, stream) for index in range(len(self.blocks))]

    def _block(self, index: int, draft: Draft, stream: Stream | None) -> dict:
        layers = {n: m for n, m in self.blocks.linears(index).items() if not self.skips(n)}
        name = block_file(index)
        if draft.has(name):
            weights, record = read_block(draft, name)
            self.progress(len(weights))
        else:
            hessians = self._hessians(index, layers, stream)
            weights, record = self._solve(layers, hessians, stream is not None)
            write_block(draft, name, weights, record)
        if stream is not None and index + 1 < len(self.blocks):
            decoded = {n: w.decode(self.options.master_bits) for n, w in weights.items()}
            stream.run(index, decoded, advance=True)
        return record | {"file": name}

    def _hessians(
        self, index: int, layers: Mapping[str, nn.Linear], stream: Stream | None
    ) -> dict[str, Tensor | None]:
        """The Hessian of every layer that saw data; layers with a common input share one tensor."""
        if stream is None:
            return dict.fromkeys(layers)
        groups = [[n for n in group if n in layers] for group in self.blocks.input_groups(index).groups]
        groups = [group for group in groups if group]
        found: dict[str, Tensor | None] = dict.fromkeys(layers)
        with watch([[layers[n] for n in group] for group in groups], stream.device) as hessians:
            stream.run(index)
        for group, hessian in zip(groups, hessians, strict=True):
            found.update(dict.fromkeys(group, hessian.value()))
        return found

    def _solve(
        self, layers: Mapping[str, nn.Linear], hessians: Mapping[str, Tensor | None], calibrated: bool
    ) -> tuple[dict[str, NestedWeight], dict]:
        weights: dict[str, NestedWeight] = {}
        record: dict = {"layers": {}, "notes": []}
        for name, layer in layers.items():
            solution, errors = self._solve_layer(name, layer, hessians[name])
            weights[name] = solution.weight
            record["layers"][name] = {"shape": list(layer.weight.shape), "errors": errors}
            if calibrated and hessians[name] is None:
                record["notes"].append(f"{name} saw no calibration data; it was rounded to nearest.")
            record["notes"] += solution.notes
            self.progress(1)
        return weights, record

    def _solve_layer(self, name: str, layer: nn.Linear, hessian: Tensor | None) -> tuple[Solution, dict[str, float]]:
        weight = layer.weight.detach().float().cpu()
        if not torch.isfinite(weight).all():
            raise UserError(f"The weights of {name} hold NaN or Inf; mend the checkpoint or leave it alone with method.skip.")
        solution = solve(weight, hessian, self.options, name)
        if hessian is None:
            return solution, {}
        hessian = hessian.cpu()
        widths = self.options.widths
        return solution, {str(b): relative_error(weight, solution.weight.decode(b), hessian) for b in widths}
