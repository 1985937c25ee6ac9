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
        self._start = {name: weight.scales_at(bits).float() for name, weight in weights.items()}
        self._dtype = {name: weight.scales.dtype for name, weight in weights.items()}
        self._ratio = {name: torch.zeros_like(s, requires_grad=True) for name, s in self._start.items()}
        self._best = {name: torch.zeros_like(scales) for name, scales in self._start.items()}
        parameters = list(self._ratio.values())
        self._optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, betas=_BETAS, weight_decay=0.0)

    def _exact(self, name: str) -> Tensor:
        return self._start[name] * self._ratio[name].detach().exp()

    @property
    def parameters(self) -> list[Tensor]:
        """Log-ratios of all layers."""
        return list(self._ratio.values())

    def scales(self) -> dict[str, Tensor]:
        """Present scales by layer: float32 [out_features, groups], rounded to the stored dtype; they require gradients."""
        return {name: self._exact(name).to(self._dtype[name]).float().requires_grad_() for name in self._ratio}

    def take_step(self, gradients: Mapping[str, Tensor], loss: float) -> None:
        """Take an optimizer step with the gradients of ``scales`` by layer, and the loss that they are of.

        The gradients pass the rounding of the scales unchanged, are divided by the running mean of the losses, and clipped.
        """
        first = self.step == 0
        self._mean_loss = loss if first else _MEAN_DECAY * self._mean_loss + (1 - _MEAN_DECAY) * loss
        for name, ratio in self._ratio.items():
            if name in gradients:  # else an expert without tokens
                ratio.grad = gradients[name] * self._exact(name) / self._mean_loss
        torch.nn.utils.clip_grad_norm_(self.parameters, _MAX_GRADIENT_NORM)
        for group in self._optimizer.param_groups:
            group["lr"] = self.config.learning_rate * rate_at(self.step, self.config)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def keep_if_best(self, loss: float) -> None:
        """Keep the present state if its validation loss is the least so far."""
        if loss < self.best_loss:
            self.best_loss = loss
            self._best = {name: ratio.detach().clone() for name, ratio in self._ratio.items()}

    def refined(self, weights: Mapping[str, NestedWeight]) -> dict[str, NestedWeight]:
        """Weights whose set of scales of this bit-width is that of the best state; they stay on their device."""
        return {name: self._refined(name, weight) for name, weight in weights.items()}

    def _refined(self, name: str, weight: NestedWeight) -> NestedWeight:
        best = (self._start[name] * self._best[name].exp()).to(self._dtype[name]).to(weight.scales.device)
        own = dict(sorted({**weight.own_scales, self.bits: best}.items()))
        fmt = dataclasses.replace(weight.format, scale_bits=tuple(own))
        return dataclasses.replace(weight, own_scales=own, format=fmt)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors on the CPU and numbers of the whole state."""
        tensors: dict[str, Tensor] = {}
        for name, ratio in self._ratio.items():
            moments = self._optimizer.state.get(ratio, {})
            parts = (ratio.detach(), *(moments.get(p, torch.zeros_like(ratio)) for p in _PARTS[1:3]), self._best[name])
            tensors |= {f"{self.bits}.{part}.{name}": t.cpu() for part, t in zip(_PARTS, parts, strict=True)}
        return tensors, {"step": self.step, "best_loss": self.best_loss, "mean_loss": self._mean_loss}

    def load_state(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Continue from a ``state``."""
        self.step, self.best_loss, self._mean_loss = (numbers[key] for key in ("step", "best_loss", "mean_loss"))
        for name, ratio in self._ratio.items():
            parts = [tensors[f"{self.bits}.{part}.{name}"].to(ratio.device) for part in _PARTS]
            with torch.no_grad():
                ratio.copy_(parts[0])
            self._best[name] = parts[3]
            if self.step:
                self._optimizer.state[ratio] = {
                    "step": torch.tensor(float(self.step)),
                    "exp_avg": parts[1],
                    "exp_avg_sq": parts[2],
                }


def rate_at(step: int, config: RefineConfig) -> float:
    """Share of the highest learning rate at a step: a linear warm-up, then a cosine."""
    warm = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    return warm * (_LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * step / config.steps)))
