"""The workspace is built without a network, from metrics that runs really have."""

import pytest

pytest.importorskip("wandb_workspaces")

from matquant.errors import UserError
from matquant.report import dashboard


def test_it_has_the_charts_of_quality_and_search():
    workspace = dashboard.build("me", "matquant")
    panels = {panel.title: panel for section in workspace.sections for panel in section.panels}
    assert [section.name for section in workspace.sections] == ["Quality", "Search", "Runs"]
    assert str(panels["KL to full precision over bits"].x) in ("slice/bits", "Metric('slice/bits')")
    assert panels["Loss of the fittest"].metric_regex == "search/loss/.*"
    assert not workspace.runset_settings.filters


def test_a_group_is_filtered_for_and_cannot_be_code():
    assert "sweep-7" in str(dashboard.build("me", "matquant", "sweep-7").runset_settings.filters)
    with pytest.raises(UserError, match="quotes"):
        dashboard.build("me", "matquant", "x' or 'y")
