"""Refinements of the scales of a small random model, for tests."""

from pathlib import Path
from typing import Any

import torch
from packing import Opened

from matquant.formats.parent import Parent
from matquant.refine.config import RefineConfig
from matquant.refine.refinement import RefineContext
from matquant.refine.scale_refinement import ScaleRefinement
from matquant.store import Store

CPU = torch.device("cpu")
WINDOWS = torch.randint(3, 120, (14, 12), generator=torch.Generator().manual_seed(0))


def context_of(opened: Opened, **changes: Any) -> RefineContext:
    fields: dict[str, Any] = {"blocks": opened.blocks, "parent": opened.parent, "windows": WINDOWS[:10]}
    fields |= {"validation": WINDOWS[10:], "batch_size": 2, "device": CPU, "dtype": torch.float32}
    return RefineContext(**fields | changes)


def refine(opened: Opened, store: Path, config: RefineConfig, **changes: Any) -> tuple[Parent, list[dict]]:
    """Refined parent and the history of its validations."""
    refinement = ScaleRefinement(config, context_of(opened, **changes))

    def build(draft: Any) -> dict[str, Any]:
        return {"blocks": refinement.run(draft), "history": refinement.history}

    parent = Parent(Store(store).open_or_build("refined", {"seed": config.seed}, build))
    return parent, parent.artifact.about["history"]
