"""Dashboards and alerts: what is committed, and what they link to."""

import re

import pytest
import yaml

from deploy.observability.__main__ import HERE, PANELS, dashboard, files
from workers.environment import ROOT

RULES = [
    rule
    for group in yaml.safe_load((HERE / "rules.yaml").read_text())["groups"]
    for rule in group["rules"]
]


def anchors(markdown: str) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", markdown, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_committed_dashboards_are_those_of_the_panels() -> None:
    """`python -m deploy.observability` writes them."""
    committed = {file: file.read_text() for file in (HERE / "dashboards").iterdir()}

    assert committed == files()


@pytest.mark.parametrize("name", PANELS)
def test_panels_do_not_overlap(name: str) -> None:
    cells = [
        (column, row)
        for panel in dashboard(name)["panels"]
        for column in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for row in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]

    assert len(cells) == len(set(cells))
    assert max(column for column, _ in cells) < 24


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_has_a_severity_and_a_runbook_that_exists(rule: dict[str, dict[str, str]]) -> None:
    file, anchor = rule["annotations"]["runbook"].split("#")

    assert rule["labels"]["severity"] in ("info", "warning", "critical")
    assert anchor in anchors((ROOT / file).read_text())
