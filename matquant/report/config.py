"""Settings of Weights & Biases."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    """Weights & Biases run of a job.

    Attributes:
        wandb: record a run, offline unless ``WANDB_MODE`` says otherwise.
        project: that the run belongs to.
        group: of the run; null: the sweep's folder.
        tags: of the run.
    """

    wandb: bool = True
    project: str = "matquant"
    group: str | None = None
    tags: tuple[str, ...] = ()
