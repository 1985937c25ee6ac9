"""Settings of the refinement, and their checks."""

import dataclasses
from typing import Literal

from matquant.data.config import TextConfig
from matquant.errors import UserError
from matquant.formats.bits import MAX_BITS, MIN_BITS
from matquant.quantize.config import check_distillation


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RefineConfig:
    """Training of the whole model after quantizing: of scales, or (a published baseline) of the weights.

    Attributes:
        name: name of the preset.
        method: ``none``, or ``scales``: each of ``bits`` gets a set of scales of its own, trained so that the slice predicts
            like the full-precision model (KL divergence, temperature 1); codes, and the base set of scales, do not change. Or
            ``qat``, for method=matquant_qat: the weights are trained on the cross-entropy of the text, weighted over ``bits``
            by the objective, and quantized anew.
        bits: bit-widths to refine; with ``scales`` all others read what they read before.
        text: training text. A window of each step's batch is read at every bit-width. The dataset ``self``, alone or in a
            mix, is text that the full-precision model writes itself.
        dtype: of the forward and backward passes; ``auto``: bfloat16 for scales of a float32 model on a GPU, else that of the
            model. Trained tensors are float32 in any case.
        top_k: of the dataset ``self``: number of the most likely tokens that each token is drawn from.
        validation_sequences: further windows of the text, for the held-out KL; with ``scales`` it chooses the best state of
            each bit-width.
        steps: steps, each with a batch of its own.
        step_every: with ``scales``: for each of ``bits``, in their order, the number of steps between its optimizer steps;
            empty: each bit-width takes one at each step.
        learning_rate: highest learning rate, of the log-scales or the weights (AdamW without weight decay, linear warm-up,
            cosine decay to a twentieth, with ``qat`` to 0).
        warmup_steps: steps of the warm-up.
        validate_every: steps between two validations; the state is saved at each, so that a killed job goes on from there.
        seed: of the order of the batches.
        distilled_bits: with ``qat``: bit-widths that aim at the predictions of the slice of all bits too, with equal weight
            (co-distillation; [2] is the published 8→2).
        distill_only: with ``qat``: let distilled_bits aim at these predictions alone.
    """

    name: str = "none"
    method: Literal["none", "scales", "qat"] = "none"
    bits: tuple[int, ...] = (2, 3, 4)
    text: TextConfig | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    top_k: int = 50
    validation_sequences: int = 16
    steps: int = 600
    step_every: tuple[int, ...] = ()
    learning_rate: float = 3e-3
    warmup_steps: int = 20
    validate_every: int = 50
    seed: int = 0
    distilled_bits: tuple[int, ...] = ()
    distill_only: bool = False

    @property
    def wanted(self) -> bool:
        """True unless ``method`` is ``none``."""
        return self.method != "none"

    @property
    def trains_weights(self) -> bool:
        """True for training of the weights, False for that of scales."""
        return self.method == "qat"

    def steps_of(self, bits: int) -> int:
        """Return the number of optimizer steps of a bit-width."""
        return -(-self.steps // self.every(bits))

    def every(self, bits: int) -> int:
        """Return the number of steps between two optimizer steps of a bit-width."""
        return self.step_every[self.bits.index(bits)] if self.step_every else 1

    def check(self, master_bits: int) -> None:
        """Raise UserError for a setting out of range. ``master_bits``: bits of the parent's codes."""
        if not self.wanted:
            return
        for bits in self.bits:
            if not MIN_BITS <= bits <= min(MAX_BITS, master_bits):
                raise UserError(
                    f"refine.bits names {bits}; a bit-width of this parent lies in {MIN_BITS}..{master_bits}."
                )
        if not self.bits or len(set(self.bits)) != len(self.bits):
            raise UserError(f"refine.bits must name at least one bit-width, each once; found {list(self.bits)}.")
        for name in ("validation_sequences", "steps", "validate_every", "top_k"):
            if getattr(self, name) < 1:
                raise UserError(f"refine.{name} must be at least 1; found {getattr(self, name)}.")
        if self.warmup_steps < 0 or not 0 < self.learning_rate < 1:
            raise UserError(
                "refine.warmup_steps cannot be negative, and refine.learning_rate lies between 0 and 1; found "
                f"{self.warmup_steps} and {self.learning_rate}."
            )
        if self.step_every and (len(self.step_every) != len(self.bits) or min(self.step_every) != 1):
            raise UserError(
                f"refine.step_every has a number of at least 1 for each of refine.bits={list(self.bits)}, one of them 1; found "
                f"{list(self.step_every)}."
            )
        if self.trains_weights:
            check_distillation(self.distilled_bits, self.distill_only, "refine", master_bits)
            if unread := set(self.distilled_bits) - set(self.bits):
                raise UserError(
                    f"refine.distilled_bits names {min(unread)}, which refine.bits={list(self.bits)} does not."
                )
            if self.step_every:
                raise UserError(
                    "refine.step_every is for refine.method=scales; qat trains all bit-widths at every step."
                )
        elif self.distilled_bits or self.distill_only:
            raise UserError(
                f"refine.distilled_bits and refine.distill_only are for refine.method=qat; found refine.method={self.method}."
            )
        if self.text is None:
            raise UserError(f"refine.method={self.method} needs a text: choose the preset refine={self.method}.")
