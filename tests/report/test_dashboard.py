"""The workspace is built without a network, from metrics that runs really have."""

import re
import subprocess
import sys

import pytest
from offline_runs import read_run
from shared import ROOT

pytest.importorskip("wandb_workspaces")

from matquant.config import TrackingConfig
from matquant.errors import UserError
from matquant.report import JobResults, dashboard, track

pytestmark = pytest.mark.slow

SECTIONS = ["Quality", "Allocations", "Search", "Runs"]


def panels(workspace):
    return [panel for section in workspace.sections for panel in section.panels]


def named_metrics(panel):
    """Metrics that a panel shows, and patterns of metrics."""
    columns = [column.metric for column in getattr(panel, "columns", None) or []]
    found = [getattr(panel, "x", None), *(getattr(panel, "y", None) or []), *(getattr(panel, "metrics", None) or [])]
    found += [*columns, *(getattr(panel, "media_keys", None) or [])]
    plain = [re.sub(r"^summary:|^Metric\('(.*)'\)$", r"\1", str(metric)) for metric in found if metric is not None]
    return [re.escape(name) for name in plain] + [r for r in [getattr(panel, "metric_regex", None)] if r]


@pytest.mark.parametrize("dataset", ["stdlib", "mine"])
def test_every_panel_shows_something_that_runs_log(make_results, tmp_path, dataset, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    results = make_results(bits=range(2, 9), datasets=(dataset,), allocation=True)
    widths = {layer["name"]: 2 + index % 3 for index, layer in enumerate(results["layers"])}
    entry = next(one for one in results["slices"] if one["bits"] == "allocation")
    entry |= {"name": "a.yaml", "allocation": {"widths": widths, "predicted": 0.5, "measured": 0.4}}
    history = {"budget": "2.5 bits", "generation": 1, "loss": 0.5, "evaluations": 16, "tokens": 4096, "skipped": 9}
    results["search"] = {"method": "hybrid", "fitness": "kl", "evaluations": 32, "tokens": 8192, "skipped": 9}
    results["search"]["history"] = [history, history | {"generation": 2}]
    assert track(JobResults.from_json(results), TrackingConfig(wandb=True), tmp_path, None, "x") is None
    run = read_run(tmp_path)
    logged = {name.removesuffix("/_type") for row in [*run["history"], run["summary"]] for name in row}
    for panel in panels(dashboard.build("me", "matquant", dataset=dataset)):
        names = named_metrics(panel)
        absent = [name for name in names if not any(re.fullmatch(name, one) for one in logged)]
        assert names
        assert all("allocation_" in name and "allocation_0" not in name for name in absent), (panel.title, absent)


def test_it_has_the_views_of_the_report():
    workspace = dashboard.build("me", "matquant")
    assert [section.name for section in workspace.sections] == SECTIONS
    titles = " ".join(panel.title for panel in panels(workspace))
    for view in (
        "KL to full precision over bits",
        "over bytes",
        "Perplexity",
        "Error of each layer",
        "Bit-width of each",
    ):
        assert view in titles
    assert not workspace.runset_settings.filters


def test_a_group_is_filtered_for_and_cannot_be_code():
    assert "sweep-7" in str(dashboard.build("me", "matquant", "sweep-7").runset_settings.filters)
    with pytest.raises(UserError, match="quotes"):
        dashboard.build("me", "matquant", "x' or 'y")


@pytest.mark.parametrize("package", ["wandb_workspaces"])
def test_a_missing_package_is_named(package):
    program = (
        f"import sys; sys.modules[{package!r}] = None; sys.argv = ['dashboard', 'me', 'matquant']; "
        "from matquant.report.dashboard import main; main()"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert "pip install 'matquant[dashboard]'" in run.stderr
