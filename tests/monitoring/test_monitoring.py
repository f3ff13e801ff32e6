"""The dashboard, the rules and the table of metrics in docs name what exists, and all of what exists."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from tests.monitoring.promql import Query, read_query
from vlmrt.actors.edge.timelines import HISTOGRAMS
from vlmrt.runtime.metric_table import EVERY, METRICS, Metric
from vlmrt.runtime.prometheus import VLLM_METRICS
from vlmrt.runtime.timeline import SpanName

DOCS = Path(__file__).parents[2] / "docs"
DASHBOARD = DOCS / "monitoring" / "vlmrt-dashboard.json"
RULES = DOCS / "monitoring" / "vlmrt-rules.yaml"
RULE_TESTS = Path(__file__).parent / "rule_tests.yaml"
METRICS_PAGE = DOCS / "metrics.md"
OF_PROMETHEUS = {"instance", "job"}  # labels that a scrape adds
SUFFIXES = ("_bucket", "_sum", "_count")


def metric_of(series: str) -> tuple[str, Metric]:
    """The metric that has this series.  Raises: KeyError where none has."""
    name = series.removeprefix("vlmrt_")
    if name == series:
        raise KeyError(f"{series} is none of ours")
    if name in METRICS and METRICS[name].kind != "histogram":
        return name, METRICS[name]
    for suffix in SUFFIXES:
        base = name.removesuffix(suffix)
        if base != name and base in METRICS and METRICS[base].kind == "histogram":
            return base, METRICS[base]
    raise KeyError(f"no metric has a series {series}")


def labels_of(series: str) -> set[str]:
    _, metric = metric_of(series)
    return {"actor", *metric.labels, *OF_PROMETHEUS, *(("le",) if series.endswith("_bucket") else ())}


def check(text: str, recorded: set[str]) -> Query:
    """A query names metrics that exist, or recorded ones, with labels that they have."""
    query = read_query(text)
    assert query.selected, f"no metric in {text}"
    known: set[str] = set()
    for series, labels in query.selected:
        has = OF_PROMETHEUS if series in recorded else labels_of(series)
        assert set(labels) <= has, f"{series} has no label {set(labels) - has}: {text}"
        known |= has
    assert set(query.groupings) <= known, f"nothing has a label {set(query.groupings) - known}: {text}"
    return query


# ---------------------------------------------------------------- the dashboard


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return found


def dashboard_queries() -> Iterator[tuple[str, str]]:
    """(query, legend)."""
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"], target["legendFormat"]


def test_every_query_of_the_dashboard_names_metrics_and_labels_that_exist() -> None:
    queries = list(dashboard_queries())
    assert len(queries) > 80
    for text, legend in queries:
        query = check(text, set())
        known = set().union(*(labels_of(series) for series, _ in query.selected))
        assert set(re.findall(r"{{(\w+)}}", legend)) <= known, f"{legend}: {text}"


def test_the_dashboard_shows_every_metric() -> None:
    shown = {metric_of(series)[0] for text, _ in dashboard_queries() for series, _ in read_query(text).selected}
    assert METRICS.keys() - shown == set()


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    panels = dashboard()["panels"]
    ids = [panel["id"] for panel in panels]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert place["x"] + place["w"] <= 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells


def test_every_query_keeps_to_the_chosen_instances_and_data_source() -> None:
    found = dashboard()
    for panel in found["panels"]:
        for target in panel.get("targets", ()):
            assert target["datasource"]["uid"] == "${datasource}"
            num_selected = len(read_query(target["expr"]).selected)
            assert target["expr"].count('instance=~"$instance"') == num_selected, target["expr"]
    names = {variable["name"] for variable in found["templating"]["list"]}
    assert names == {"datasource", "instance"}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(found["panels"]))) <= {*names, "__rate_interval"}


# ---------------------------------------------------------------- the rules


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def test_every_rule_names_metrics_and_labels_that_exist() -> None:
    recorded: set[str] = set()
    for rule in rules():
        query = check(rule["expr"], recorded)
        if "record" in rule:
            base = rule["record"].split(":")[1]
            assert any(name.startswith(base) for name in METRICS) or base in ("server_error_ratio",) or "_hit_" in base
            recorded.add(rule["record"])
        else:
            shown = json.dumps(rule["annotations"])
            known = set().union(*(OF_PROMETHEUS if s in recorded else labels_of(s) for s, _ in query.selected))
            if query.groupings:
                known &= {*query.groupings, *OF_PROMETHEUS}
            assert set(re.findall(r"\$labels\.(\w+)", shown)) <= known, rule["alert"]
            assert rule["labels"]["severity"] in ("warning", "critical")
            assert rule["annotations"].keys() == {"summary", "description"}


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool (Debian: prometheus) is not on the PATH: the rules are read, not checked")
    return subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_promtool_accepts_the_rules() -> None:
    done = promtool("check", "rules", str(RULES))
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_reads_every_query_of_the_dashboard(tmp_path: Path) -> None:
    expressions = {text.replace("$__rate_interval", "1m").replace("$instance", ".*") for text, _ in dashboard_queries()}
    records = [{"record": f"panel:{number}", "expr": text} for number, text in enumerate(sorted(expressions))]
    file = tmp_path / "panels.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": records}]}))
    done = promtool("check", "rules", "--lint=none", str(file))
    assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_go_off_when_they_should_and_not_before() -> None:
    done = promtool("test", "rules", str(RULE_TESTS))
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_case() -> None:
    tried = set(re.findall(r"alertname: (\w+)", RULE_TESTS.read_text()))
    assert {rule["alert"] for rule in rules() if "alert" in rule} == tried


# ---------------------------------------------------------------- docs


def test_the_page_has_every_metric_as_it_is() -> None:
    rows = re.findall(r"^\| `vlmrt_(\w+)` \| (\w+) \| ([^|]*) \| ([^|]*) \| (.*) \|$", METRICS_PAGE.read_text(), re.M)
    written = {
        name: (kind, actors, tuple(re.findall(r"`(\w+)`", labels)), help) for name, kind, actors, labels, help in rows
    }
    assert len(written) == len(rows), "a metric twice"
    assert written == {
        name: (
            metric.kind,
            "every actor" if metric.actors == EVERY else ", ".join(metric.actors),
            metric.labels,
            metric.help,
        )
        for name, metric in METRICS.items()
    }


def test_the_page_has_every_name_of_vllms_with_what_it_is_made_of() -> None:
    rows = re.findall(r"^\| `vllm:(\w+)` \| (.*) \|$", METRICS_PAGE.read_text(), re.M)
    written = {name: tuple(re.findall(r"`vlmrt_(\w+)`", sources)) for name, sources in rows}
    assert written == {name: compat.sources for name, compat in VLLM_METRICS.items()}


def test_the_page_has_every_span() -> None:
    section = METRICS_PAGE.read_text().partition("## One request's time")[2].partition("## ")[0]
    first_cells = re.findall(r"^\| (`[^|]*) \|", section, re.M)
    written = {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}
    assert written == set(get_args(SpanName))
    assert set(HISTOGRAMS) <= written
    assert {METRICS[name].kind for name in HISTOGRAMS.values()} == {"histogram"}


# ---------------------------------------------------------------- the reader of queries


def test_queries_are_read() -> None:
    text = (
        'histogram_quantile(0.9, sum by (le, actor) (rate(a_bucket{x=~"a,b",y!="1"}[5m]))) / on (job) b:c > 2e3 and d'
    )
    query = read_query(text)
    assert [(one.metric, one.labels) for one in query.selected] == [("a_bucket", ("x", "y")), ("b:c", ()), ("d", ())]
    assert query.groupings == ("le", "actor", "job")
    with pytest.raises(ValueError, match="no label matcher"):
        read_query('a{x=~"}"}')  # a brace within a value is more than it reads, and it says so
    with pytest.raises(ValueError, match="unknown function summ"):
        read_query("summ(a)")


@pytest.mark.parametrize(
    "text",
    [
        "vlmrt_no_such_metric",
        "vlmrt_time_to_first_token_seconds",  # a histogram has no series of its own name
        "vlmrt_requests_running_bucket",
        'vlmrt_requests_running{code="200"}',
        "sum by (reader) (vlmrt_requests_running)",
        "sum by (le) (vlmrt_time_to_first_token_seconds_sum)",
    ],
)
def test_a_query_of_what_does_not_exist_fails(text: str) -> None:
    with pytest.raises((KeyError, AssertionError)):
        check(text, set())
