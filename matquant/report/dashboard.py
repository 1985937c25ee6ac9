"""Weights & Biases workspace over the runs of a project, with the charts that fit these runs.

    python -m matquant.report.dashboard ENTITY PROJECT [--group GROUP] [--dataset DATASET]

It needs ``pip install 'matquant[dashboard]'`` and a login (``wandb login``), and prints the workspace's address. Without a
network, ``summary.html`` of a sweep shows the same comparisons, and ``wandb sync`` uploads offline runs later.
"""

import argparse
import sys
from typing import Any

from matquant.errors import UserError
from matquant.formats.bits import BIT_WIDTHS
from matquant.optional_packages import missing_sentence
from matquant.report.tracking import MAPS


def build(entity: str, project: str, group: str | None = None, dataset: str = "stdlib") -> Any:
    """Workspace, not saved, with the views of ``report.html``.

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
        raise UserError(missing_sentence("wandb_workspaces", "A workspace")) from None
    panels = {
        "Quality": _quality(reports, dataset),
        "Allocations": _allocations(reports, dataset),
        "Search": _search(reports),
        "Runs": _runs(reports),
    }
    sections = [workspaces.Section(name=name, panels=some, is_open=True) for name, some in panels.items()]
    shown = workspaces.RunsetSettings(filters=f"Metric('Group') == '{_quoted(group)}'" if group else "")
    return workspaces.Workspace(
        entity=entity, project=project, name="matquant", sections=sections, runset_settings=shown
    )


def _quality(reports: Any, dataset: str) -> list[Any]:
    """Panels of KL and perplexity over bits and over bytes, and of the error of every layer."""
    kl, perplexity = f"slice/kl/{dataset}", f"slice/perplexity/{dataset}"
    return [
        reports.LinePlot(title="KL to full precision over bits", x="slice/bits", y=[kl], log_y=True),
        reports.LinePlot(title="KL to full precision over bytes", x="slice/bytes", y=[kl], log_y=True),
        reports.LinePlot(title="Perplexity over bits", x="slice/bits", y=[perplexity]),
        reports.BarPlot(title="KL at 2 bits", metrics=["kl/2"]),
        reports.MediaBrowser(title="Error of each layer", media_keys=[f"plots/layer_error_{b}" for b in BIT_WIDTHS]),
    ]


def _allocations(reports: Any, dataset: str) -> list[Any]:
    """Panels of the search's front, and of the bit-width of every layer."""
    kl = f"allocation/kl/{dataset}"
    return [
        reports.LinePlot(title="KL of allocations over average bits", x="allocation/average_bits", y=[kl], log_y=True),
        reports.LinePlot(title="KL of allocations over bytes", x="allocation/bytes", y=[kl], log_y=True),
        reports.BarPlot(title="KL of the allocation", metrics=["kl/allocation"]),
        reports.MediaBrowser(
            title="Bit-width of each layer", media_keys=[f"plots/allocation_{index}" for index in range(MAPS)]
        ),
    ]


def _search(reports: Any) -> list[Any]:
    """Panels of the generations of a search."""
    return [
        reports.LinePlot(title="Loss of the fittest", x="search/generation", metric_regex="search/loss/.*", log_y=True),
        reports.LinePlot(title="Proposals skipped", x="search/generation", metric_regex="search/skipped/.*"),
    ]


def _runs(reports: Any) -> list[Any]:
    """Panels that compare runs."""
    columns = [reports.ParallelCoordinatesPlotColumn(metric=f"summary:kl/{bits}") for bits in BIT_WIDTHS]
    return [
        reports.ParallelCoordinatesPlot(title="KL by bits", columns=columns),
        reports.MediaBrowser(title="Plots", media_keys=["plots/kl_bits", "plots/kl_bytes", "plots/perplexity_bits"]),
    ]


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
