"""Building one artifact in several processes: all compute, the first one alone writes.

The store's folder has to be the same one for all of them, on one machine or on a file system that they share.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from matquant.distributed import ProcessGroup
from matquant.errors import UserError
from matquant.store.artifact import Artifact, Draft
from matquant.store.files import read_tensors
from matquant.store.store import Store


@dataclasses.dataclass(frozen=True, slots=True)
class DistributedDraft:
    """A draft that the first process has and writes; the others hold None instead, and know what it has."""

    path: Path
    resumed: bool
    process_group: ProcessGroup
    draft: Draft | None

    def has(self, name: str) -> bool:
        return self.process_group.broadcast_object(None if self.draft is None else self.draft.has(name))

    def read_tensors(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        return read_tensors(self.path / name) if self.draft is None else self.draft.read_tensors(name)

    def write_tensors(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        if self.draft is not None:
            self.draft.write_tensors(name, tensors, metadata)

    def read_json(self, name: str) -> Any:
        return self.process_group.broadcast_object(None if self.draft is None else self.draft.read_json(name))

    def write_json(self, name: str, value: Any) -> None:
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
    """``Store.open_or_build`` by all processes of a job; ``build`` runs in all of them at the same time, or in none.

    Raises:
        UserError: as ``Store.open_or_build``; or another process does not see the store of the first.
    """
    if process_group.world_size == 1:
        return store.open_or_build(kind, inputs, build)
    if process_group.is_main:

        def leading(draft: Draft) -> dict[str, Any]:
            process_group.broadcast_object({"draft": str(draft.path), "resumed": draft.resumed})
            return build(DistributedDraft(draft.path, draft.resumed, process_group, draft))

        artifact = store.open_or_build(kind, inputs, leading)
        process_group.broadcast_object({})
        return artifact
    while order := process_group.broadcast_object():
        path = Path(order["draft"])
        if not path.is_dir():
            raise UserError(
                f"Process {process_group.rank} does not see {path}, where the first one writes. Processes on several machines need "
                "a store.path on a file system that all of them share."
            )
        build(DistributedDraft(path, order["resumed"], process_group, None))
    return store.open(kind, inputs)
