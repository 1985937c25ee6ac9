"""Bit-width of one step, sent from the scheduler to the workers with vLLM's ``SchedulerOutput``. Works without vLLM."""

import dataclasses
from collections.abc import Mapping
from typing import Any

ATTRIBUTE = "matquant_step"  # of vLLM's SchedulerOutput


@dataclasses.dataclass(frozen=True, slots=True)
class StepWidth:
    """Bit-width of a step.

    Attributes:
        bits: bit-width of all layers; None for those that ``WidthExtension.set_bits`` set.
        state: state of the scheduler before the step, for reports.
        makes_drafts: False for a step in which no draft model runs.
    """

    bits: int | None
    state: Mapping[str, Any]
    makes_drafts: bool = True
