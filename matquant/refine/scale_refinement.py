"""Training of the scales of some bit-widths, with the full-precision model as the teacher.

One step draws a batch, runs the full-precision model on it once, and takes an optimizer step at every bit-width whose turn it
is (``step_every``). Bit-widths share nothing that is trained, so each keeps its own best state, judged on held-out windows:
none ends worse than it began.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from matquant.formats.nested import NestedWeight
from matquant.refine.block_passes import Trained
from matquant.refine.refinement import Refinement
from matquant.refine.slice_model import SliceModel
from matquant.refine.trained_scales import TrainedScales


class ScaleRefinement(Refinement):
    """Refinement of the scales of each bit-width; codes and all other scales stay."""

    version = 3

    def start(self, model: SliceModel) -> None:
        self._step = 0
        self._trained = {bits: TrainedScales(bits, model.reader.weights, self.config) for bits in self.config.bits}

    @property
    def step(self) -> int:
        return self._step

    def take_step(self, model: SliceModel, batch: int) -> None:
        full = model.hidden(batch)
        for bits, one in self._trained.items():
            if self._step % self.config.every(bits) == 0:
                self._descend(model, one, batch, full)
        self._step += 1

    def _descend(self, model: SliceModel, one: TrainedScales, batch: int, full: Tensor) -> None:
        """Take one optimizer step; processes average their gradients."""
        group, scales = self.context.process_group, one.scales()
        value, gradients = model.gradients(batch, full, one.bits, scales)
        loss = torch.tensor(value, dtype=torch.float64)
        group.all_reduce(loss)
        self.average(gradients, scales)
        one.take_step(gradients, float(loss) / group.world_size)

    def trained(self, bits: int) -> Trained:
        return self._trained[bits].scales()

    def validated(self, losses: Mapping[int, float]) -> None:
        for bits, one in self._trained.items():
            one.keep_if_best(losses[bits])

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        numbers = {}
        for one in self._trained.values():
            own, numbers[str(one.bits)] = one.state()
            tensors |= own
        return tensors, {"step": self._step, "bits": numbers}

    def load_state(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        self._step = numbers["step"]
        for one in self._trained.values():
            one.load_state(tensors, numbers["bits"][str(one.bits)])

    def refined(self, weights: Mapping[str, NestedWeight]) -> dict[str, NestedWeight]:
        for one in self._trained.values():
            weights = one.refined(weights)
        return dict(weights)
