"""Makes ops/grafana/dashboards/*.json with Grafana's own builders: ``python -P -m ops.grafana.make_dashboards``.

A dashboard is rows of panels; a panel is a title, what one sees there, a unit and queries. What each metric means is in
docs/reference/metrics.md.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    BigValueGraphMode,
    LegendDisplayMode,
    LegendPlacement,
    SortOrder,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    VariableOption,
    VariableRefresh,
    VariableSort,
)

from ops.grafana.panels import OF, Board, Look
from ops.grafana.scorer_panels import SCORER
from ops.grafana.trainer_panels import TRAINER

BOARDS = (TRAINER, SCORER)
FOLDER = Path(__file__).parent / "dashboards"
_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
_WIDTH, _HEIGHT, _STAT_HEIGHT = 24, 7, 4
_CALM, _WRONG = "#0072B2", "#D55E00"  # Okabe and Ito's blue and vermilion


def _queries(look: Look) -> list[prometheus.Dataquery]:
    return [
        prometheus.Dataquery().expr(expr).legend_format(legend).ref_id(chr(ord("A") + at)).datasource(_SOURCE)
        for at, (expr, legend) in enumerate(look.queries)
    ]


def _line(look: Look, width: int) -> timeseries.Panel:
    panel = (
        timeseries.Panel()
        .title(look.title)
        .description(look.what)
        .datasource(_SOURCE)
        .unit(look.unit)
        .span(width)
        .height(_HEIGHT)
        .show_points(VisibilityMode.NEVER)
        .line_width(1)
        .legend(
            common.VizLegendOptions()
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
    )
    if look.least is not None:
        panel.min(look.least)
    if look.stacked:
        panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL).group("A")).fill_opacity(40)
    for query in _queries(look):
        panel.with_target(query)
    return panel


def _number(look: Look, width: int) -> stat.Panel:
    steps = [Threshold(value=None, color=_CALM)]
    if look.wrong_from is not None:
        steps.append(Threshold(value=look.wrong_from, color=_WRONG))
    panel = (
        stat.Panel()
        .title(look.title)
        .description(look.what)
        .datasource(_SOURCE)
        .unit(look.unit)
        .span(width)
        .height(_STAT_HEIGHT)
        .no_value("no figure")
        .graph_mode(BigValueGraphMode.AREA)
        .color_mode(BigValueColorMode.VALUE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
    )
    for query in _queries(look):
        panel.with_target(query)
    return panel


def _variable(name: str, label: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(_SOURCE)
        .query(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".+")
        .current(VariableOption(selected=True, text="All", value="$__all"))
    )


def text_of(board: Board) -> str:
    """The dashboard as the text of its file."""
    of = f'job=~"{board.job}"'
    builder = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .description(board.what)
        .tags(["smes"])
        .timezone("browser")
        .readonly()
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .time("now-1h", "now")
        .refresh("15s")
        .version(1)
        .link(
            dashboard.DashboardLink("SMES")
            .type(DashboardLinkType.DASHBOARDS)
            .tags(["smes"])
            .as_dropdown(False)
            .include_vars(True)
            .keep_time(True)
        )
        .annotation(
            dashboard.AnnotationQuery()
            .name("Alerts")
            .datasource(_SOURCE)
            .enable(True)
            .icon_color(_WRONG)
            .expr(f'ALERTS{{alertstate="firing", alertname=~"Smes.+", {OF}}}')
        )
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(_variable("job", "Job", f"label_values(up{{{of}}}, job)"))
        .with_variable(_variable("instance", "Instance", 'label_values(up{job=~"$job"}, instance)'))
    )
    for name, label, query in board.variables:
        builder.with_variable(_variable(name, label, query))
    at = 1
    for title, looks in board.rows:
        builder.with_row(dashboard.Row(title).id(at))
        at += 1
        for look, width in zip(looks, _widths(looks), strict=True):
            builder.with_panel((_line if look.over_time else _number)(look, width).id(at))
            at += 1
    text = json.dumps(builder.build(), cls=JSONEncoder, indent=2, sort_keys=True, ensure_ascii=False)
    return f"{text}\n"


def file_of(board: Board) -> Path:
    """Where the dashboard lies."""
    return FOLDER / f"{board.uid}.json"


def _widths(looks: Sequence[Look]) -> list[int]:
    """Widths that fill the lines of a row: up to six numbers side by side, up to three charts."""
    widths: list[int] = []
    for over_time, most in ((False, 6), (True, 3)):
        count = sum(look.over_time == over_time for look in looks)
        lines = -(-count // most)
        for line in range(lines):
            here = count // lines + (line < count % lines)
            share = _WIDTH // here
            widths += [share] * (here - 1) + [_WIDTH - share * (here - 1)]
    assert [look.over_time for look in looks] == sorted(look.over_time for look in looks), "numbers first, then charts"
    return widths


def main() -> None:
    """Write the files."""
    for board in BOARDS:
        file_of(board).write_text(text_of(board))
        sys.stdout.write(f"{file_of(board)}\n")


if __name__ == "__main__":
    main()
