"""Room on the disk that a refinement needs, against its plan."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packing import Opened
from refining import refine

from matquant.formats.groups import group_count
from matquant.models.model_sizes import measure_model
from matquant.refine.config import RefineConfig
from matquant.refine.memory import refine_memory, trained_scales_bytes
from matquant.store.files import total_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

SLACK = 40_000  # bytes of headers, journals and manifests


@pytest.fixture
def peak_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], int]:
    """Function of the most bytes below the test's folder at the end of any write."""
    sizes = [0]
    replace = os.replace

    def measured(*paths: Any) -> None:
        sizes.append(total_bytes(tmp_path))
        replace(*paths)

    monkeypatch.setattr(os, "replace", measured)
    return lambda: max(sizes)


def planned_disk(opened: Opened, config: RefineConfig, states: int) -> int:
    sizes = measure_model(opened.blocks, opened.layers, torch.float32, torch.float32)
    layers = [layer for block in opened.layers for layer in block.values()]
    groups = sum(layer.out_features * group_count(layer.in_features, 32) for layer in layers)
    return refine_memory(
        sizes,
        trained_scales_bytes(sizes, len(config.bits), groups),
        parent=opened.parent.artifact.bytes,
        windows=10,
        length=12,
        batch=2,
        captured=0,
        states=states,
        on_gpu=False,
        offload=torch.device("cpu"),
    ).disk


@pytest.mark.parametrize("validations", [1, 3])
def test_a_later_state_is_written_beside_the_last_one(
    opened: Opened, tmp_path: Path, peak_on_disk: Callable[[], int], validations: int
) -> None:
    config = RefineConfig(method="scales", bits=(2, 3, 4), steps=validations, validate_every=1)
    refine(opened, tmp_path / "store", config)
    planned = planned_disk(opened, config, states=min(validations, 2))
    needed = opened.parent.artifact.bytes + peak_on_disk()
    assert 0.8 * planned < needed < planned + SLACK
