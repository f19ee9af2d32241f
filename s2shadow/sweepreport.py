"""What users read of a sweep: its summary and its picture. Both take the rows of the output."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from s2shadow.report import Line, columns, count_text, time_text, times_text, write_whole
from s2shadow.storm import POLICIES, REVERSE_MAP

if TYPE_CHECKING:
    from s2shadow.sweep import SweepResult

__all__ = ["axes_of", "choose_x", "plot", "summary_lines"]

Rows = Sequence[dict[str, Any]]

# columns that a spec can vary, in the order in which they are shown -> words for a picture
AXES = {
    "capture": "capture", "vm": "VM", "contexts": "nested VMs (contexts)", "pages": "4K pages per context",
    "aliases": "IPAs per page", "block_mix": "fraction of bytes in 2 MiB blocks", "event_pages": "pages per event",
    "events_limit": "events", "write": "touched by writing", "tlbi": "TLBI extent", "track_tlbis": "TLBIs recorded",
    "seconds_limit": "seconds per policy", "min_events": "least events", "seed": "seed"}
REPETITIONS = ("seed", "seconds_limit", "min_events")       # vary how often, not what is measured
COLOURS = {REVERSE_MAP: "#1b7f5c", "blow-away": "#c0392b", "blow-away-lean": "#e59866", "interval-map": "#2c6fbb"}
MOST_VALUES, MOST_FAILURES = 12, 5
MOST_COLUMNS, MOST_ROWS = 5, 4


# --- axes ------------------------------------------------------------------------------------------------------


def axes_of(rows: Rows) -> dict[str, list[Any]]:
    """The varied columns with their values. Of two that vary together (events with pages per event, say) the first."""
    found: dict[str, list[Any]] = {}
    for name in AXES:
        values = {row.get(name) for row in rows}
        if len(values) > 1 and not any(vary_together(rows, name, other) for other in found):
            found[name] = sorted(values, key=lambda value: (value is not None, value))
    return found


def vary_together(rows: Rows, one: str, other: str) -> bool:
    pairs = {(row.get(one), row.get(other)) for row in rows}
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def is_numeric(values: Iterable[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def choose_x(axes: dict[str, list[Any]]) -> str:
    """The number with the most values; else whatever varies; else contexts."""
    candidates = [name for name in axes if name not in REPETITIONS]
    numeric = [name for name in candidates if is_numeric(axes[name])]
    return max(numeric or candidates or ["contexts"], key=lambda name: len(axes.get(name, ())))


def policies_of(rows: Rows) -> list[str]:
    return [policy for policy in POLICIES if any(row["policy"] == policy for row in rows)]


def measured(rows: Rows) -> list[dict[str, Any]]:
    return [row for row in rows if row["error"] is None]


def value_text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "-"
    if isinstance(value, str):
        return "/".join(Path(value).parts[-2:])
    return f"{value:g}" if isinstance(value, float) else f"{value:,}"


# --- summary ---------------------------------------------------------------------------------------------------

HEADINGS = ("policy", "points", "teardown/event p50", "refaults/event", "total/event", "lowest", "highest",
            "times reverse-map")


def summary_lines(result: SweepResult, hints: bool = True) -> list[Line]:
    """The report of a sweep: what ran where, medians per policy, medians along each axis, what failed."""
    rows = measured(result.rows)
    lines = [Line(f"sweep        {sweep_text(result)}")]
    if rows:
        lines += [Line(f"ran          {places_text(rows)}"), Line(), *policy_table(rows)]
        lines += axis_tables(rows)
    lines += [Line(), *closing_lines(result, hints)]
    return lines


def sweep_text(result: SweepResult) -> str:
    axes = axes_of(result.rows)
    over = f" over {', '.join(axes)}" if axes else ""
    parts = [f"{result.spec}: {result.points:,} point{'s' if result.points != 1 else ''}{over}"]
    if result.before:
        parts.append(f"{result.before:,} finished before")
    if result.retried:
        parts.append(f"{result.retried:,} tried again after a worker died")
    return ", ".join(parts)


def places_text(rows: Rows) -> str:
    """Machines, workers, and what that means for the figures."""
    hosts = sorted({f"{row['host']} ({row['cpu']})" for row in rows})
    workers = [row["workers"] for row in rows if row["workers"] is not None]
    most = max(workers, default=None)
    on = hosts[0] if len(hosts) == 1 else f"{len(hosts)} machines"
    if most is None:
        return f"on {on}"
    text = f"{most:,} worker{'s' if most > 1 else ''} on {on}"
    return f"{text}; storms side by side on one machine slow each other down" if most > len(hosts) else text


def policy_table(rows: Rows) -> list[Line]:
    """Medians over all points."""
    policies = policies_of(rows)
    table: list[Sequence[str]] = [HEADINGS if len(policies) > 1 and REVERSE_MAP in policies else HEADINGS[:-1]]
    for policy in policies:
        own = [row for row in rows if row["policy"] == policy]
        total = [row["total_ns_per_event"] for row in own]
        cells = [policy, f"{len(own):,}", time_text(middle(own, "teardown_ns_per_event_p50")),
                 count_text(middle(own, "refaults_per_event")), time_text(median(total)), time_text(min(total)),
                 time_text(max(total))]
        if len(table[0]) > len(cells):
            ratios = [row["total_times_reverse_map"] for row in own if row["total_times_reverse_map"] is not None]
            cells.append(times_text(median(ratios)) if ratios and policy != REVERSE_MAP else "-")
        table.append(cells)
    heading, *body = columns(table)
    return [Line(heading, "bold"), *(Line(text, "green" if policy == REVERSE_MAP else "")
                                     for policy, text in zip(policies, body, strict=True))]


def middle(rows: Rows, name: str) -> float | None:
    values = [row[name] for row in rows if row[name] is not None]
    return median(values) if values else None


def axis_tables(rows: Rows) -> list[Line]:
    """Per axis and value the median of the total cost over all other axes."""
    policies = policies_of(rows)
    table = [["total/event, median", *policies]]
    for name, values in axes_of(rows).items():
        if name in REPETITIONS:
            continue
        shown = spread(values, MOST_VALUES)
        for value in shown:
            own = [row for row in rows if row.get(name) == value]
            table.append([f"{name} {value_text(value)}",
                          *(time_text(middle([row for row in own if row["policy"] == policy], "total_ns_per_event"))
                            for policy in policies)])
    if len(table) == 1:
        return []
    heading, *body = columns(table)
    return [Line(), Line(heading, "bold"), *map(Line, body)]


def spread(values: list[Any], most: int) -> list[Any]:
    """At most so many of them, the first and the last among them."""
    if len(values) <= most:
        return values
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def closing_lines(result: SweepResult, hints: bool) -> list[Line]:
    lines = []
    failures = [row for row in result.rows if row["error"] is not None]
    reasons = {(row["point"], row["error"]): row for row in failures}
    for (point, error), row in list(reasons.items())[:MOST_FAILURES]:
        where = ", ".join(f"{name} {value_text(row[name])}" for name in axes_of(result.rows))
        lines.append(Line(f"failed       point {point}{f' ({where})' if where else ''}: {error}", "yellow"))
    if len(reasons) > MOST_FAILURES:
        lines.append(Line(f"             and {len(reasons) - MOST_FAILURES:,} more: column error of the results",
                          "yellow"))
    if result.interrupted:
        kept = f"{result.finished:,} of {result.points:,} points are in {result.output}"
        lines.append(Line(f"Interrupted: {kept}; the same sweep, without --restart, goes on from there.", "yellow"))
    elif failures:
        lines.append(Line(f"{result.finished:,} of {result.points:,} points are in {result.output}; the same sweep, "
                          "without --restart, tries the others again.", "bold"))
    else:
        tail = "   picture: --plot FILE" if hints else ""
        lines.append(Line(f"{len(result.rows):,} rows, one per point and policy, are in {result.output}.{tail}",
                          "bold"))
    return lines


# --- picture ---------------------------------------------------------------------------------------------------


def plot(rows: Rows, file: str | os.PathLike[str], x: str | None = None) -> None:
    """The total cost per event of each policy against ``x``, one panel per combination of the other axes.

    Repetitions, and axes with too many values for panels, are one line: the median, with a band from the lowest to the
    highest. The format follows the file's ending (png, svg, pdf). ``ImportError`` without matplotlib.
    """
    from matplotlib.figure import Figure

    rows = measured(rows)
    if not rows:
        raise ValueError("nothing to plot: no point is finished")
    axes = axes_of(rows)
    x = choose_x(axes) if x is None else x
    across, down = panel_axes(axes, x)
    merged = [name for name in axes if name not in (x, across, down)]
    tops, sides = axes[across] if across else [None], axes[down] if down else [None]

    figure = Figure(figsize=(max(3.2 * len(tops) + 1.2, 6.4), max(2.8 * len(sides) + 1.6, 4.8)), layout="constrained")
    panels = figure.subplots(len(sides), len(tops), sharex=True, sharey=True, squeeze=False)
    values = axes.get(x) or sorted({row[x] for row in rows})
    for line, side in zip(panels, sides, strict=True):
        for panel, top in zip(line, tops, strict=True):
            own = [row for row in rows if (not across or row[across] == top) and (not down or row[down] == side)]
            draw_panel(panel, own, x, values)
            names = [(name, value) for name, value in ((across, top), (down, side)) if name]
            panel.set_title("\n".join(f"{AXES[name]}: {value_text(value)}" for name, value in names), fontsize=9)
    dress(figure, panels, x, values)
    title = "What one host change costs a nested VM"
    figure.suptitle(f"{title}\n{merged_text(rows, merged)}" if merged_text(rows, merged) else title, fontsize=11)
    image = io.BytesIO()
    figure.savefig(image, format=Path(file).suffix.lower()[1:], dpi=150)
    write_whole(file, image.getvalue())


def panel_axes(axes: dict[str, list[Any]], x: str) -> tuple[str | None, str | None]:
    """The axes across and down: of those that fit, the ones with the most values."""
    others = sorted((name for name in axes if name != x and name not in REPETITIONS), key=lambda name: -len(axes[name]))
    across = next((name for name in others if len(axes[name]) <= MOST_COLUMNS), None)
    down = next((name for name in others if name != across and len(axes[name]) <= MOST_ROWS), None)
    return across, down


def merged_text(rows: Rows, merged: Sequence[str]) -> str:
    if not merged:
        return ""
    return f"line: median over {', '.join(AXES[name] for name in merged)}; band: lowest to highest"


def draw_panel(panel: Any, rows: Rows, x: str, values: Sequence[Any]) -> None:
    for policy in policies_of(rows):
        totals = {value: [row["total_ns_per_event"] for row in rows if row["policy"] == policy and row[x] == value]
                  for value in values}
        at = [i if not is_numeric(values) else value for i, value in enumerate(values) if totals[value]]
        found = [total for total in totals.values() if total]
        colour = COLOURS.get(policy)
        panel.plot(at, [median(total) for total in found], "o-", color=colour, markersize=4, label=policy)
        panel.fill_between(at, [min(total) for total in found], [max(total) for total in found], color=colour,
                           alpha=0.18, linewidth=0)


def dress(figure: Any, panels: Any, x: str, values: Sequence[Any]) -> None:
    """Scales, ticks at the measured values, and one legend."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    numeric = is_numeric(values)
    logarithmic = numeric and values[0] > 0 and values[-1] >= 8 * values[0]
    for panel in panels.flat:
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: time_text(value)))
        panel.yaxis.set_minor_locator(NullLocator())
        if logarithmic:
            panel.set_xscale("log", base=2)
        ticks = spread(list(values), 7) if numeric else list(values)
        places = ticks if numeric else range(len(values))
        panel.set_xticks(places, [value_text(value) for value in ticks], rotation=0 if numeric else 30, fontsize=8)
        panel.xaxis.set_minor_locator(NullLocator())
        panel.grid(color="#dddddd")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[-1]:
        panel.set_xlabel(AXES[x], fontsize=9)
    figure.supylabel("teardown and refaults of one event", fontsize=10)
    seen = {label: handle for panel in panels.flat
            for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(seen.values(), seen.keys(), loc="outside lower center", ncols=len(seen), fontsize=9, frameon=False)
