"""Output of a job: results.json, a table, report.html, a sweep's summary and a wandb run.

Importing this stays cheap: matplotlib and wandb are imported by the functions that need them. The Hydra callback is
`matquant.report.summary.SummaryCallback`.
"""

from matquant.report.html import write_report
from matquant.report.results import ALLOCATION, JobResults, ResultsError, load, write
from matquant.report.table import print_table
from matquant.report.tracking import track

__all__ = ["ALLOCATION", "JobResults", "ResultsError", "load", "print_table", "track", "write", "write_report"]
