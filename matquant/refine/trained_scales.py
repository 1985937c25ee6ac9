"""Trained set of scales of one bit-width, with its optimizer and the best state so far."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from matquant.formats.nested import NestedWeight
from matquant.refine.config import RefineConfig

_BETAS = (0.9, 0.95)
_MAX_GRADIENT_NORM = 1.0
_LAST_RATE = 0.05  # share of the highest learning rate at the end
_MEAN_DECAY = 0.9  # of the running mean of the losses
_PARTS = ("ratio", "exp_avg", "exp_avg_sq", "best")


class TrainedScales:
    """Log-ratios of trained scales to those before, for all layers at one bit-width.

    The scales of all layers are one tensor, layer by layer, so that an optimizer step takes few launches.

    Args:
        bits: the bit-width.
        weights: nested weights by layer name, on the device of the training.

    Attributes:
        step: number of optimizer steps so far.
        best_loss: least validation loss, of the state that is kept.
    """

    def __init__(self, bits: int, weights: Mapping[str, NestedWeight], config: RefineConfig) -> None:
        self.bits, self.config, self.step = bits, config, 0
        self.best_loss, self._mean_loss = math.inf, 0.0
        scales = {name: weight.scales_at(bits) for name, weight in weights.items()}
        self._shapes = {name: one.shape for name, one in scales.items()}
        self._dtypes = {name: weight.scales.dtype for name, weight in weights.items()}
        self._start = torch.cat([one.float().flatten() for one in scales.values()])
        self._ratio = torch.zeros_like(self._start, requires_grad=True)
        self._best = torch.zeros_like(self._start)
        self._optimizer = torch.optim.AdamW([self._ratio], lr=config.learning_rate, betas=_BETAS, weight_decay=0.0)

    def _by_layer(self, flat: Tensor) -> dict[str, Tensor]:
        """Views [out_features, groups] of a tensor with a value for each scale."""
        parts = flat.split([shape.numel() for shape in self._shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}

    def _rounded(self, scales: Tensor) -> Tensor:
        """Scales rounded to the dtypes that they are stored in, as float32."""
        if len(dtypes := set(self._dtypes.values())) == 1:
            return scales.to(dtypes.pop()).float()
        parts = [one.to(self._dtypes[name]).float().flatten() for name, one in self._by_layer(scales).items()]
        return torch.cat(parts)

    def _exact(self) -> Tensor:
        return self._ratio.detach().exp().mul_(self._start)

    def scales(self) -> dict[str, Tensor]:
        """Present scales by layer: float32 [out_features, groups], rounded to the stored dtype; they require gradients."""
        return {name: one.requires_grad_() for name, one in self._by_layer(self._rounded(self._exact())).items()}

    def take_step(self, gradients: Mapping[str, Tensor], loss: float) -> None:
        """Take an optimizer step with the gradients of ``scales`` by layer, and the loss that they are of.

        A missing gradient, of an expert without tokens, counts as zeros. The gradients pass the rounding of the scales
        unchanged, are divided by the running mean of the losses, and clipped.
        """
        first = self.step == 0
        self._mean_loss = loss if first else _MEAN_DECAY * self._mean_loss + (1 - _MEAN_DECAY) * loss
        device = self._ratio.device
        flat = [
            gradients[name].flatten() if name in gradients else torch.zeros(shape.numel(), device=device)
            for name, shape in self._shapes.items()
        ]
        self._ratio.grad = torch.cat(flat).mul_(self._exact()).div_(self._mean_loss)
        torch.nn.utils.clip_grad_norm_([self._ratio], _MAX_GRADIENT_NORM)
        for group in self._optimizer.param_groups:
            group["lr"] = self.config.learning_rate * self._rate()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def _rate(self) -> float:
        """Share of the highest learning rate at the present step: a linear warm-up, then a cosine."""
        warm = min(1.0, (self.step + 1) / max(self.config.warmup_steps, 1))
        done = self.step / self.config.steps_of(self.bits)
        return warm * (_LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * done)))

    def keep_if_best(self, loss: float) -> None:
        """Keep the present state if its validation loss is the least so far."""
        if loss < self.best_loss:
            self.best_loss = loss
            self._best = self._ratio.detach().clone()

    def refined(self, weights: Mapping[str, NestedWeight]) -> dict[str, NestedWeight]:
        """Weights whose set of scales of this bit-width is that of the best state; they stay on their device."""
        best = self._by_layer(self._start * self._best.exp())
        return {name: self._refined(weight, best[name]) for name, weight in weights.items()}

    def _refined(self, weight: NestedWeight, best: Tensor) -> NestedWeight:
        scales = best.to(weight.scales.dtype).clone().to(weight.scales.device)  # not a view of all layers
        own = dict(sorted({**weight.own_scales, self.bits: scales}.items()))
        fmt = dataclasses.replace(weight.format, scale_bits=tuple(own))
        return dataclasses.replace(weight, own_scales=own, format=fmt)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors on the CPU and numbers of the whole state."""
        moments = self._optimizer.state.get(self._ratio, {})
        parts = (self._ratio, *(moments.get(part, torch.zeros_like(self._ratio)) for part in _PARTS[1:3]), self._best)
        tensors = {f"{self.bits}.{part}": one.detach().cpu() for part, one in zip(_PARTS, parts, strict=True)}
        return tensors, {"step": self.step, "best_loss": self.best_loss, "mean_loss": self._mean_loss}

    def load_state(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Continue from a ``state``."""
        self.step, self.best_loss, self._mean_loss = (numbers[key] for key in ("step", "best_loss", "mean_loss"))
        ratio, exp_avg, exp_avg_sq, self._best = (
            tensors[f"{self.bits}.{part}"].to(self._ratio.device) for part in _PARTS
        )
        with torch.no_grad():
            self._ratio.copy_(ratio)
        if self.step:
            step = torch.tensor(float(self.step))
            self._optimizer.state[self._ratio] = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
