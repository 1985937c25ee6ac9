"""Environment of a job: devices, processes, store, terminal, and the log of warnings and times."""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from matquant import machine
from matquant.config import Config
from matquant.distributed import ProcessGroup
from matquant.memory import MemoryPlan
from matquant.progress import ProgressBars
from matquant.store import Store

logger = logging.getLogger(__name__)


@dataclasses.dataclass(slots=True)
class JobLog:
    """Warnings, seconds by stage, and the memory plan of a job.

    Attributes:
        warnings: sentences for the user, in order.
        stage: the most recent one, which an error belongs to.
        seconds: wall time of each stage.
        quantize_seconds: time of quantizing by phase.
        plan: memory plan, once a stage announced it.
    """

    warnings: list[str] = dataclasses.field(default_factory=list)
    stage: str = ""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    quantize_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    plan: MemoryPlan | None = None

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Record the wall time of a stage, also of one that fails."""
        start, self.stage = time.perf_counter(), stage
        try:
            yield
        finally:
            self.seconds[stage] = round(time.perf_counter() - start, 3)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Runtime:
    """Devices, processes and store of a job.

    Attributes:
        device: of the blocks.
        process_group: processes that share the work.
        store: artifacts.
        bars: progress bars; silent on all processes but the main one.
        check_memory: refuse a job that cannot fit.
        log: warnings, times and memory plan so far.
    """

    device: torch.device
    process_group: ProcessGroup
    store: Store
    bars: ProgressBars
    check_memory: bool
    log: JobLog = dataclasses.field(default_factory=JobLog)

    @classmethod
    def of(cls, config: Config, device: torch.device, process_group: ProcessGroup) -> "Runtime":
        """Runtime for a config."""
        return cls(
            device=device,
            process_group=process_group,
            store=Store(Path(config.store.path)),
            bars=ProgressBars(config.runtime.progress if process_group.is_main else False),
            check_memory=config.runtime.check_memory,
        )

    @property
    def on_gpu(self) -> bool:
        """True if blocks run on a CUDA device."""
        return self.device.type == "cuda"

    def warn(self, sentences: Iterable[str]) -> None:
        """Record warnings, and log them at once: the user may want to stop the job."""
        for sentence in sentences:
            self.log.warnings.append(sentence)
            if self.process_group.is_main:
                logger.warning(sentence)

    def announce(self, plan: MemoryPlan | None) -> None:
        """Log the memory plan, and refuse a job that cannot fit. The first plan of a job counts."""
        if self.log.plan is not None or plan is None:
            return
        self.log.plan = plan
        logger.info(plan.sentence())
        if self.check_memory:
            plan.refuse()

    def peaks(self) -> dict[str, int]:
        """Peak memory so far, in bytes."""
        return {"host_peak": machine.host_peak(), "device_peak": machine.device_peak(self.device)}
