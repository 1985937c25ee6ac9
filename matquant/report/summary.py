"""Summary of a sweep: ``summary.csv``, ``summary.html`` and a comparison on the terminal."""

import atexit
import csv
import io
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback

from matquant.report.output_files import write_atomic
from matquant.report.sweep import ERROR_FILE, Row, SweepJob, read_jobs, rows

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn
    from omegaconf import DictConfig

CSV_NAME, HTML_NAME = "summary.csv", "summary.html"


def summarize(folder: Path, since: float | None = None) -> list[Row]:
    """Write ``summary.csv`` and ``summary.html`` over the jobs below ``folder``, and return the rows.

    A row per job and slice: job, overrides, model, method, status (``done`` or ``failed``), bits, average_bits, bytes,
    perplexity_NAME and kl_NAME per dataset, seconds_quantize, reused, parent_sha256, error.

    Args:
        since: start of the sweep in seconds since the epoch; older results of a job that was started again are ignored.
    """
    jobs = read_jobs(Path(folder), since)
    return _write(jobs, Path(folder))


def _write(jobs: Sequence[SweepJob], folder: Path) -> list[Row]:
    from matquant.report.summary_page import render_summary

    table = rows(jobs)
    write_atomic(folder / CSV_NAME, _csv(table))
    write_atomic(folder / HTML_NAME, render_summary(jobs, _title(folder.resolve())))
    return table


def _title(folder: Path) -> str:
    """Name of the folder, with the date above it if it is Hydra's default, a time of day."""
    dated = all(re.fullmatch(r"[\d-]+", name) for name in (folder.parent.name, folder.name))
    return f"{folder.parent.name} {folder.name}" if dated else folder.name


def _csv(table: Sequence[Row]) -> str:
    buffer = io.StringIO()
    header = list(table[0]) if table else ["job"]
    writer = csv.DictWriter(buffer, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return buffer.getvalue()


class SummaryCallback(Callback):
    """Hydra callback that summarizes a multirun at its end, also after a failed job.

    Sample config::

        hydra:
          callbacks:
            summary:
              _target_: matquant.report.summary.SummaryCallback

    Lifecycle: ``on_multirun_start`` and ``on_multirun_end`` run in the launching process; ``on_job_start`` and ``on_job_end``
        in the
    process of the job, which a launcher may start with a pickled copy of this object.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None  # of the sweep; None in a single run
        self.started = 0.0

    def on_multirun_start(self, config: "DictConfig", **kwargs: Any) -> None:
        """Remember the folder and the start of the sweep."""
        self.folder = Path(str(config.hydra.sweep.dir)).absolute()
        self.started = time.time()
        # After a failed job Hydra raises its error instead of calling on_multirun_end.
        atexit.register(self._finish)

    def on_job_start(self, config: "DictConfig", **kwargs: Any) -> None:
        """Remove the error file of an earlier attempt."""
        if self.folder is not None:
            (Path(config.hydra.runtime.output_dir) / ERROR_FILE).unlink(missing_ok=True)

    def on_job_end(self, config: "DictConfig", job_return: "JobReturn", **kwargs: Any) -> None:
        """Write the error of a failed job."""
        if self.folder is not None and job_return.status.name == "FAILED":
            error = job_return._return_value  # return_value would raise it
            write_atomic(Path(config.hydra.runtime.output_dir) / ERROR_FILE, f"{type(error).__name__}: {error}\n")

    def on_multirun_end(self, config: "DictConfig", **kwargs: Any) -> None:
        """Write the summary."""
        self._finish()

    def _finish(self) -> None:
        atexit.unregister(self._finish)
        if self.folder is None or not os.path.isdir(self.folder):  # False also for a name that no folder can have
            return
        from rich.console import Console

        from matquant.report.summary_table import print_summary

        jobs = read_jobs(self.folder, self.started)
        if jobs:
            _write(jobs, self.folder)
            sys.stdout.flush()
            print_summary(jobs, self.folder / HTML_NAME, Console())
