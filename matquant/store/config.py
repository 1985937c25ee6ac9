"""Settings of the artifact store."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StoreConfig:
    """Folder of the artifact store, and the store command that replaces the job.

    Attributes:
        path: folder of the store. The composed config reads it from the environment variable ``MATQUANT_STORE`` if set.
        action: store command to run instead of the job; None runs the job.
    """

    path: str = "outputs/store"
    action: Literal["ls", "verify", "clean"] | None = None
