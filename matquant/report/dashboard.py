"""Weights & Biases workspace over the runs of a project, with the charts that fit these runs.

    python -m matquant.report.dashboard ENTITY PROJECT [--group GROUP] [--dataset DATASET]

It needs ``pip install wandb-workspaces`` and a login, and prints the workspace's address. Without a network, ``summary.html``
of a sweep shows the same comparisons, and ``wandb sync`` uploads offline runs later.
"""

import argparse
import sys
from typing import Any

from matquant.errors import UserError
from matquant.formats.bits import BIT_WIDTHS


def build(entity: str, project: str, group: str | None = None, dataset: str = "stdlib") -> Any:
    """Workspace, not saved: quality over bits, searches, runs side by side, and tables.

    Args:
        entity: user or team.
        project: name in ``tracking.project``.
        group: sweep whose runs are shown; all runs if None.
        dataset: evaluation text of the curves.

    Raises:
        UserError: wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ImportError:
        raise UserError("Dashboards need one more library: pip install wandb-workspaces.") from None
    quality = [
        reports.LinePlot(title="KL to full precision over bits", x="slice/bits", y=[f"slice/kl/{dataset}"], log_y=True),
        reports.LinePlot(title="Perplexity over bits", x="slice/bits", y=[f"slice/perplexity/{dataset}"]),
        reports.BarPlot(title="KL at 2 bits", metrics=["kl/2"]),
        reports.BarPlot(title="KL of the allocation", metrics=["kl/allocation"]),
    ]
    search = [
        reports.LinePlot(title="Loss of the fittest", x="search/generation", metric_regex="search/loss/.*", log_y=True),
        reports.LinePlot(title="Proposals skipped", x="search/generation", metric_regex="search/skipped/.*"),
    ]
    runs = [
        reports.ParallelCoordinatesPlot(
            title="KL by bits",
            columns=[reports.ParallelCoordinatesPlotColumn(metric=f"summary:kl/{bits}") for bits in BIT_WIDTHS],
        ),
        reports.MediaBrowser(title="Plots", media_keys=["plots/kl_bits", "plots/kl_bytes", "plots/allocation_0"]),
    ]
    panels: dict[str, list[Any]] = {"Quality": quality, "Search": search, "Runs": runs}
    sections = [workspaces.Section(name=name, panels=some, is_open=True) for name, some in panels.items()]
    shown = workspaces.RunsetSettings(filters=f"Metric('Group') == '{_quoted(group)}'" if group else "")
    return workspaces.Workspace(
        entity=entity, project=project, name="matquant", sections=sections, runset_settings=shown
    )


def _quoted(group: str) -> str:
    if "'" in group or "\\" in group:
        raise UserError(f"A group with quotes or backslashes cannot be filtered for; found {group!r}.")
    return group


def main() -> None:
    """Build and save a workspace, and print its address."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entity")
    parser.add_argument("project")
    parser.add_argument("--group")
    parser.add_argument("--dataset", default="stdlib")
    arguments = parser.parse_args()
    try:
        print(build(arguments.entity, arguments.project, arguments.group, arguments.dataset).save().url)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
