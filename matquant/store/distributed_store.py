"""Artifacts that the processes of one job build together: all compute, rank 0 writes.

All processes must see the same store folder, on one machine or on a shared file system.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matquant.distributed import ProcessGroup
from matquant.errors import UserError
from matquant.store.artifact import Artifact
from matquant.store.draft import Draft
from matquant.store.store import Store
from matquant.store.tensor_files import read_tensors

if TYPE_CHECKING:
    from torch import Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class DistributedDraft:
    """Draft of a distributed job, with the interface of ``Draft``. Only rank 0 writes; ``has`` agrees on all ranks.

    Attributes:
        path: folder of the draft.
        resumed: True if the draft has files of an earlier build.
        process_group: processes of the job.
        draft: draft of rank 0; None on the other ranks.
    """

    path: Path
    resumed: bool
    process_group: ProcessGroup
    draft: Draft | None

    def has(self, name: str) -> bool:
        """``Draft.has`` of rank 0."""
        found: bool = self.process_group.broadcast_object(None if self.draft is None else self.draft.has(name))
        return found

    def read_tensors(self, name: str) -> tuple[dict[str, "Tensor"], dict[str, str]]:
        """``Draft.read_tensors``; every rank reads the file."""
        return read_tensors(self.path / name) if self.draft is None else self.draft.read_tensors(name)

    def write_tensors(self, name: str, tensors: dict[str, "Tensor"], metadata: dict[str, str] | None = None) -> None:
        """``Draft.write_tensors`` on rank 0."""
        if self.draft is not None:
            self.draft.write_tensors(name, tensors, metadata)

    def discard(self, name: str) -> None:
        """``Draft.discard`` on rank 0."""
        if self.draft is not None:
            self.draft.discard(name)

    def read_json(self, name: str) -> Any:
        """``Draft.read_json`` of rank 0, broadcast."""
        return self.process_group.broadcast_object(None if self.draft is None else self.draft.read_json(name))

    def write_json(self, name: str, value: Any) -> None:
        """``Draft.write_json`` on rank 0."""
        if self.draft is not None:
            self.draft.write_json(name, value)


DraftLike = Draft | DistributedDraft


def open_or_build(
    store: Store,
    process_group: ProcessGroup,
    kind: str,
    inputs: Mapping[str, Any],
    build: Callable[[DraftLike], dict[str, Any]],
) -> Artifact:
    """Collective ``Store.open_or_build``: ``build`` runs on all ranks at the same time, or on none.

    Raises:
        UserError: an error of ``Store.open_or_build``, or a rank does not see the store of rank 0.
    """
    if process_group.world_size == 1:
        return store.open_or_build(kind, inputs, build)
    if process_group.is_main:
        return _lead_build(store, process_group, kind, inputs, build)
    while order := process_group.broadcast_object():
        path = Path(order["draft"])
        if not path.is_dir():
            raise UserError(
                f"Process {process_group.rank} does not see {path}, the folder that process 0 writes to. Set store.path to a "
                "folder on a file system that all machines share."
            )
        build(DistributedDraft(path, order["resumed"], process_group, None))
    return store.open(kind, inputs)


def _lead_build(
    store: Store,
    process_group: ProcessGroup,
    kind: str,
    inputs: Mapping[str, Any],
    build: Callable[[DraftLike], dict[str, Any]],
) -> Artifact:
    """Rank 0 of ``open_or_build``: broadcasts the draft before each build, and an empty message at the end."""

    def broadcast_and_build(draft: Draft) -> dict[str, Any]:
        process_group.broadcast_object({"draft": str(draft.path), "resumed": draft.resumed})
        return build(DistributedDraft(draft.path, draft.resumed, process_group, draft))

    artifact = store.open_or_build(kind, inputs, broadcast_and_build)
    process_group.broadcast_object({})
    return artifact
