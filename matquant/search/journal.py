"""Journal of finished steps: a search that was killed resumes after the last one."""

from typing import Any, Protocol

from matquant.store.distributed_store import DraftLike


class Journal(Protocol):
    """Finished steps by name, as JSON values."""

    def load(self, name: str) -> Any | None:
        """Return the value of a finished step; None if the step is not finished."""
        ...

    def save(self, name: str, value: Any) -> None:
        """Record the value of a step."""
        ...


class DraftJournal:
    """Journal in the draft of an artifact, one JSON file per step."""

    def __init__(self, draft: DraftLike) -> None:
        self.draft = draft

    def load(self, name: str) -> Any | None:
        """Return the content of the file; None if there is no such file."""
        return self.draft.read_json(f"{name}.json") if self.draft.has(f"{name}.json") else None

    def save(self, name: str, value: Any) -> None:
        """Write the file."""
        self.draft.write_json(f"{name}.json", value)
