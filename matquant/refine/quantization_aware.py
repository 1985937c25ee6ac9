"""Training of the weights themselves, end to end: MatQuant on QAT (arXiv 2502.06786, equations 1, 2, 6 and 7).

Every quantized layer has a latent float32 weight, which begins at the full-precision weight. A slice is made of it by min-max
codes of the present weight, with straight-through gradients; scales and zero points count as constants in the backward pass.
The loss is the sum over the bit-widths of lambda times the cross-entropy of the text. A distilled bit-width aims at the
predictions of the slice of all bits too, or alone. One step adds the gradients of all bit-widths. The last state counts: as
published, no better one before it is chosen.

Norms, embeddings and layers that are not quantized stay as they are, since a parent does not hold them.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from matquant.errors import UserError
from matquant.formats.nested import NestedWeight
from matquant.quantize.layer_selection import check_scales
from matquant.quantize.straight_through import MinMaxGrid, group_ranges
from matquant.refine.block_passes import Trained
from matquant.refine.config import RefineConfig
from matquant.refine.refinement import Refinement
from matquant.refine.slice_model import Loss, SliceModel

_MOMENTS = ("exp_avg", "exp_avg_sq")


class QuantizationAwareTraining(Refinement):
    """Training of the latent weights of all quantized layers; codes and scales are made anew from them.

    Attributes:
        latents: float32 [out_features, in_features] by layer name, once training has started.
    """

    version = 2

    def start(self, model: SliceModel) -> None:
        self._step = 0
        self._format = {name: weight.format for name, weight in model.reader.weights.items()}
        self._master_bits = next(iter(self._format.values())).master_bits
        self.latents = {
            name: model.reader.blocks.model.get_submodule(name).weight.detach().float().clone().requires_grad_()
            for name in model.reader.weights
        }
        self._optimizer = torch.optim.AdamW(self.latents.values(), lr=self.config.learning_rate, weight_decay=0.0)

    @property
    def step(self) -> int:
        return self._step

    def take_step(self, model: SliceModel, batch: int) -> None:
        losses, gradients = self.losses_and_gradients(model, batch)
        self._check(losses, "loss")
        self.average(gradients, self.latents)
        for name, latent in self.latents.items():
            latent.grad = gradients.get(name)
        for group in self._optimizer.param_groups:
            group["lr"] = self.config.learning_rate * rate_at(self._step, self.config)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._step += 1

    def losses_and_gradients(self, model: SliceModel, batch: int) -> tuple[dict[int, float], dict[str, Tensor]]:
        """Loss of each bit-width with its lambda on one batch, and the gradients of their sum by layer."""
        wide = self._wide_loss(model, batch) if self.config.distilled_bits else None
        losses: dict[int, float] = {}
        gradients: dict[str, Tensor] = {}
        for bits in sorted(self.config.bits, reverse=True):
            loss = self._loss_of(model, batch, bits, wide)
            losses[bits], found = model.loss_and_gradients(batch, loss, bits, self.latents)
            for name, gradient in found.items():
                gradients[name] = gradients[name] + gradient if name in gradients else gradient
        return losses, gradients

    def _loss_of(self, model: SliceModel, batch: int, bits: int, wide: Loss | None) -> Loss:
        """Loss of one bit-width with its lambda."""
        weight, targets = self.context.lambdas[bits], []
        if bits in self.config.distilled_bits and wide is not None:
            targets.append(wide)
        if not targets or not self.config.distill_only:
            targets.append(model.cross_entropy(batch))
        return lambda rows, found: weight * torch.stack([target(rows, found) for target in targets]).sum()

    def _wide_loss(self, model: SliceModel, batch: int) -> Loss:
        """Divergence from the slice of all bits, whose predictions are constants."""
        hidden = model.slice_hidden(batch, self._master_bits, self.latents)
        return model.divergence_from(batch, hidden, (self._master_bits, self.latents))

    def trained(self, bits: int) -> Trained:
        return self.latents

    def linear(self, name: str, x: Tensor, latent: Tensor, bits: int, bias: Tensor | None) -> Tensor:
        """Output of a layer of the slice of ``bits`` bits of a latent weight."""
        grid = self._grid(name)
        return F.linear(x, grid.slice(grid.codes(latent), bits, latent.shape[1]).to(x.dtype), bias)

    @torch.no_grad()
    def _grid(self, name: str) -> MinMaxGrid:
        """Grid of the present latent weight; constant in the backward pass."""
        fmt = self._format[name]
        return MinMaxGrid.of_ranges(*group_ranges(self.latents[name], fmt.group_size), fmt)

    def validated(self, losses: Mapping[int, float]) -> None:
        self._check(losses, "held-out KL")

    def _check(self, losses: Mapping[int, float], what: str) -> None:
        """Raise UserError for a loss that is not finite."""
        if wrong := [bits for bits, loss in losses.items() if not math.isfinite(loss)]:
            raise UserError(
                f"The {what} of {wrong[0]} bits is not finite at step {self._step} of the training. Lower "
                f"refine.learning_rate={self.config.learning_rate:g}, or check the model and refine.text."
            )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        for name, latent in self.latents.items():
            moments = self._optimizer.state.get(latent, {})
            tensors[f"latent.{name}"] = latent.detach().cpu()
            tensors |= {f"{part}.{name}": moments[part].cpu() for part in _MOMENTS if part in moments}
        return tensors, {"step": self._step, "optimizer_steps": self._optimizer_steps()}

    def _optimizer_steps(self) -> dict[str, float]:
        """Optimizer steps of each layer; an expert without tokens in a batch takes none."""
        return {
            name: float(self._optimizer.state[one]["step"])
            for name, one in self.latents.items()
            if one in self._optimizer.state
        }

    def load_state(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        self._step = numbers["step"]
        for name, latent in self.latents.items():
            with torch.no_grad():
                latent.copy_(tensors[f"latent.{name}"])
            if name in numbers["optimizer_steps"]:
                moments = {part: tensors[f"{part}.{name}"].to(latent.device) for part in _MOMENTS}
                self._optimizer.state[latent] = {"step": torch.tensor(numbers["optimizer_steps"][name]), **moments}

    @torch.no_grad()
    def refined(self, weights: Mapping[str, NestedWeight]) -> dict[str, NestedWeight]:
        return {name: self._quantized(name) for name in weights}

    def _quantized(self, name: str) -> NestedWeight:
        latent, grid = self.latents[name], self._grid(name)
        quantized = grid.to_nested(grid.codes(latent), latent.shape[1])
        self.notes[name] = check_scales(name, latent, quantized)
        return quantized.to("cpu")


def rate_at(step: int, config: RefineConfig) -> float:
    """Share of the highest learning rate at a step: a linear warm-up, then a cosine to 0."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)))
