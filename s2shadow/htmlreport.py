"""The page of a replay: one HTML file with its figures, tables and data, that needs no network and no script."""

from __future__ import annotations

import html
import json
import math
import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from s2shadow.htmlstyle import STYLE
from s2shadow.replayreport import (
    check_lines,
    differs,
    policy_rows,
    replayed_text,
    trace_faults,
    trace_text,
    verdict_text,
)
from s2shadow.report import bytes_text, count_text, printable, ratio_text, time_text, write_whole

__all__ = ["command_line", "report_page", "write_report"]

# classes of the style sheet: a policy keeps its colour and dash whatever else is shown
SERIES = {"reverse-map": "s0", "interval-map": "s1", "blow-away": "s2", "blow-away-lean": "s3"}
SPARE = ("s4", "s5")
WIDE = 1000             # an SVG's inner units; the page stretches it to whatever width there is
MEANINGS = (
    ("faults", "faults of L2 that the shadow had to serve"),
    ("needless", "those that only over-invalidation caused: the reverse map with exact TLBIs still had the page"),
    ("dropped, required", "shadow leaves removed by host changes and TLBIs, and those that had to go"),
    ("change", "time of the engine for one host change"),
    ("Linux steps", "range steps that Linux would spend on the host changes, each with a range flush"),
    ("TLBI", "time of the engine for one TLBI of L1"),
)


class Figure(NamedTuple):
    """One row of the table of all figures: where the result has it, and how it is written."""

    label: str
    path: tuple[str, ...]
    text: Callable[[float | None], str] = count_text


FIGURES = (
    Figure("touches by L2", ("faults", "total")),
    Figure("hits", ("faults", "hit")),
    Figure("faults served", ("faults", "mapped")),
    Figure("of these needless", ("refaults_needless",)),
    Figure("faults for L1", ("faults", "l1_fault")),
    Figure("faults for the host", ("faults", "host_fault")),
    Figure("MMIO", ("faults", "mmio")),
    Figure("retries", ("faults", "retry")),
    Figure("out of memory", ("faults", "no_memory")),
    Figure("host changes", ("teardown", "events")),
    Figure("leaves they removed", ("teardown", "removed")),
    Figure("leaves they required", ("teardown", "required")),
    Figure("time of one, p50", ("teardown", "ns", "p50"), time_text),
    Figure("time of one, p99", ("teardown", "ns", "p99"), time_text),
    Figure("time of one, max", ("teardown", "ns", "max"), time_text),
    Figure("time of one, mean", ("teardown", "ns", "mean"), time_text),
    Figure("TLBIs of L1", ("tlbi", "operations")),
    Figure("leaves they removed", ("tlbi", "removed")),
    Figure("leaves they required", ("tlbi", "required")),
    Figure("time of one, p50", ("tlbi", "ns", "p50"), time_text),
    Figure("time of one, p99", ("tlbi", "ns", "p99"), time_text),
    Figure("time of one, max", ("tlbi", "ns", "max"), time_text),
    Figure("time of one, mean", ("tlbi", "ns", "mean"), time_text),
    Figure("leaves dropped needlessly", ("dropped_needlessly",)),
    Figure("range steps of Linux", ("kernel_steps",)),
    Figure("range flushes of Linux", ("kernel_flushes",)),
    Figure("TLB maintenance owed by L0", ("owed_tlbis",)),
    Figure("leaves at the end", ("live",)),
    Figure("contexts recycled", ("contexts_recycled",)),
)
RATIOS = (
    ("faults served", ("faults", "mapped")),
    ("leaves dropped", ("dropped",)),
    ("host change p50", ("teardown", "ns", "p50")),
    ("host change p99", ("teardown", "ns", "p99")),
    ("TLBI p50", ("tlbi", "ns", "p50")),
    ("TLBI p99", ("tlbi", "ns", "p99")),
    ("owed TLB maintenance", ("owed_tlbis",)),
)


def write_report(result: dict[str, Any], file: str | os.PathLike[str]) -> None:
    """Write the page of a replay (as ``s2shadow.replay.run`` returned it) to ``file``, whole or not at all."""
    write_whole(file, report_page(result).encode("utf-8", "replace"))


def report_page(result: dict[str, Any]) -> str:
    """The page as text: HTML with its style, figures as SVG, and the result as JSON in the element ``result``."""
    title = f"Shadow page tables under {result['trace']['label']}"
    body = "\n".join([
        heading(result, title),
        section("Policies", policy_table(result)),
        section("Time line", timeline_figures(result)),
        section("Latency", latency_figures(result)),
        section("Refaults", refault_figure(result)),
        section("Ratios", ratio_table(result)),
        section("Host changes that cost most", largest_tables(result)),
        section("All figures", figures_table(result)),
        section("Checks", check_part(result)),
        section("What was recorded", recorded_part(result)),
        section("To reproduce it", configuration(result)),
    ])
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # whatever a trace's names hold: the page can load nothing and run nothing
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        f'<script type="application/json" id="result">{json_data(result)}</script>\n</body>\n</html>\n')


# --- pieces of HTML --------------------------------------------------------------------------------------------


def escape(text: object) -> str:
    """Text that HTML shows as it is; control characters, which HTML forbids, as U+FFFD."""
    return html.escape(printable(str(text)))


def json_data(result: dict[str, Any]) -> str:
    """JSON that no HTML parser can leave early."""
    text = json.dumps(result, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def section(title: str, content: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{content}\n</section>" if content else ""


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def table(caption: str, rows: Sequence[Sequence[str]], ident: str = "", marks: Sequence[str] = ()) -> str:
    """A table that scrolls in its own box. The first row and column are headings; ``marks``: classes of the rows."""
    head, *body = rows
    lines = [f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}">',
             f'<table id="{ident}">' if ident else "<table>", f"<caption>{escape(caption)}</caption>",
             "<thead><tr>" + "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head) + "</tr></thead>",
             "<tbody>"]
    for number, (name, *cells) in enumerate(body):
        key = f'<i class="key {marks[number]}"></i>' if marks else ""
        lines.append(f'<tr><th scope="row">{key}{escape(name)}</th>'
                     + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    return "\n".join([*lines, "</tbody></table></div>"])


def facts(rows: Iterable[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in rows) + "</dl>"


def details(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>\n{content}\n</details>" if content else ""


def series(result: dict[str, Any]) -> dict[str, str]:
    """The class of each policy."""
    unknown = [name for name in result["policies"] if name not in SERIES]
    return SERIES | {name: SPARE[i % len(SPARE)] for i, name in enumerate(unknown)}


# --- tables ----------------------------------------------------------------------------------------------------


def heading(result: dict[str, Any], title: str) -> str:
    lines = [f"<header>\n<h1>{escape(title)}</h1>", paragraph(trace_text(result))]
    if result["policies"]:
        lines.append(paragraph(f"Replayed: {replayed_text(result)}."))
        lines.append(paragraph(verdict_text(result), "verdict"))
    if result["interrupted"]:
        lines.append(paragraph("Interrupted: the figures are of the events until then.", "warning"))
    return "\n".join([*lines, "</header>"])


def policy_table(result: dict[str, Any]) -> str:
    if not result["policies"]:
        return paragraph("No policy was replayed.")
    marks = [series(result)[name] for name in result["policies"]]
    meanings = "<dl>" + "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in MEANINGS) + "</dl>"
    return (table("Each policy over the same events", policy_rows(result), "policies", marks)
            + details("What the columns say", meanings)
            + paragraph("A trace shows the faults that really happened: a page that only a policy here dropped, and "
                        "that L2 touched without a fault on the traced host, is not among them. Needless faults are a "
                        "lower bound.", "small"))


def ratio_table(result: dict[str, Any]) -> str:
    policies = result["policies"]
    if not policies:
        return ""
    base = "reverse-map" if "reverse-map" in policies else next(iter(policies))
    wanted = [row for row in RATIOS if any(figure(policies[name], row[1]) for name in policies)]
    rows = [("policy", "dropped / required", *(label for label, _ in wanted))]
    for name, row in policies.items():
        required = row["teardown"]["required"] + row["tlbi"]["required"]
        rows.append((name, ratio_text(figure(row, ("dropped",)) / required if required else None),
                     *(ratio_text(ratio(figure(row, path), figure(policies[base], path))) for _, path in wanted)))
    marks = [series(result)[name] for name in policies]
    return table(f"Relative to {base}, but for the first column; below 1: less than {base}", rows, "ratios", marks)


def ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def figure(row: dict[str, Any], path: tuple[str, ...]) -> Any:
    """A figure of a policy, None where nothing was measured."""
    if path == ("dropped",):
        return row["teardown"]["removed"] + row["tlbi"]["removed"]
    value: Any = row
    for name in path:
        if value is None:
            return None
        value = value[name]
    return value


def figures_table(result: dict[str, Any]) -> str:
    policies = result["policies"]
    if not policies:
        return ""
    rows = [("figure", *policies)]
    rows += [(label, *(text(figure(row, path)) for row in policies.values())) for label, path, text in FIGURES]
    return details("Every figure of every policy", table("Every figure of every policy", rows, "figures"))


def largest_tables(result: dict[str, Any]) -> str:
    tables = []
    for record in result["largest"]:
        what = (f"{record['event']} of {bytes_text(record['end'] - record['start'])} at {record['start']:#x}, "
                f"{record['seconds']:,.2f} s into the trace")
        if record.get("linux_unmaps"):
            what += f"; for it the traced Linux made {record['linux_unmaps']:,} stage-2 unmap calls"
        rows = [("policy", "dropped", "required", "time", "Linux steps", "owed TLBIs")]
        rows += [(name, count_text(done["removed"]), count_text(done["required"]), time_text(done["ns"]),
                  count_text(done["kernel_steps"]), count_text(done["owed"]))
                 for name, done in record["policies"].items()]
        tables.append(table(what, rows, marks=[series(result).get(name, SPARE[0]) for name in record["policies"]]))
    return "\n".join(tables)


def check_part(result: dict[str, Any]) -> str:
    checks = result["checks"]
    lines = check_lines(result)
    if not lines:
        return paragraph("Nothing to compare with: the trace has no snapshots or counts beside it.")
    parts = [paragraph(line.text.removeprefix("checked").strip(), "warning" if line.style == "yellow" else "")
             for line in lines]
    rows: list[tuple[str, ...]] = [("snapshot", "VM", "pages", "same", "otherwise", "leaves", "equal", "verdict")]
    for kind, text in (("tables", "L1's table"), ("hosts", "L0's table"), ("shadows", "shadow")):
        rows += [snapshot_row(row, text) for row in checks[kind]]
    if len(rows) > 1:
        parts.append(details("Snapshots", table("Tables as replayed, against the captured ones", rows, "snapshots")))
    if checks["counts"]:
        counts = [("event", "recorded", "expected")]
        counts += [(row["name"], count_text(row["recorded"]), count_text(row["expected"])) for row in checks["counts"]]
        caption = "Events of the trace, against the capture's own counts"
        parts.append(details("Counts", table(caption, counts, "counts")))
    return "\n".join(parts)


def snapshot_row(row: dict[str, Any], what: str) -> tuple[str, ...]:
    otherwise = sum(row[name] for name in ("other_pa", "only_replay", "only_tables"))
    return (f"{row['snapshot']}, {what}", str(row.get("vm", "-")),
            *map(count_text, (row["pages"], row["same"], otherwise, row["leaves"], row["equal_leaves"])),
            "differs" if differs(row) else "same")


def recorded_part(result: dict[str, Any]) -> str:
    counts = result["counts"]
    parts = []
    for name, caption in (("applied", "Replayed"), ("skipped", "Left out, as the replay has them otherwise"),
                          ("events", "Rows of the trace"), ("names", "Names in the text"),
                          ("tlbi", "TLB maintenance instructions")):
        rows = [(key, count_text(value)) for key, value in counts[name].items()]
        if rows:
            parts.append(details(caption, table(caption, [("what", "times"), *rows], f"counts-{name}")))
    notes = [*result["notes"], *trace_faults(result["trace"])]
    if notes:
        parts.insert(0, "<ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>")
    return "\n".join(parts)


def configuration(result: dict[str, Any]) -> str:
    config, trace = result["config"], result["trace"]
    rows = [(name, value_text(value)) for name, value in config.items()]
    rows += [(f"trace {name}", value_text(value)) for name, value in trace.items()]
    rows += [(f"machine {name}", value_text(value)) for name, value in result["machine"].items()]
    return (f'<pre><code>{escape(command_line(config))}</code></pre>\n'
            + details("Configuration, trace and machine", facts(rows))
            + paragraph("The element “result” of this page holds the result as JSON, as --json writes it.", "small"))


def value_text(value: Any) -> str:
    if value is None or value == []:
        return "-"
    if isinstance(value, list):
        return ", ".join(memslot_text(item) if isinstance(item, dict) else str(item) for item in value)
    return str(value)


def command_line(config: dict[str, Any]) -> str:
    """The shell command that runs a replay of this configuration again."""
    words = ["s2shadow", "replay", config["trace"]]
    for name in ("role", "memory"):
        if config[name] is not None:
            words += [f"--{name}", config[name]]
    for slot in config["memslots"]:
        words += ["--memslot", memslot_text(slot)]
    if config["teardown"]:
        words += ["--teardown", ",".join(config["teardown"])]
    words += ["--tlbi", config["tlbi"]]
    for name in ("vcpus", "contexts"):
        if config.get(name) is not None:
            words += [f"--{name}", str(config[name])]
    return shlex.join([*words, "--report", "report.html"])


def memslot_text(slot: dict[str, int]) -> str:
    vm = f",vm={slot['vm']}" if slot["vm"] else ""
    return f"gpa={slot['gpa']:#x},hva={slot['hva']:#x},size={slot['size']:#x}{vm}"


# --- figures ---------------------------------------------------------------------------------------------------
# Shapes are SVG, stretched to the width at hand; all words are HTML around it, so that they keep their size.


class Scale(NamedTuple):
    """From values to SVG units, 0 at ``low`` and WIDE at ``high``; ``log``: of positive values only."""

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high, value = (math.log10(x) if self.log else x for x in (self.low, self.high, value))
        return round(WIDE * (value - low) / (high - low), 2)


def nice_scale(highest: float) -> tuple[Scale, list[float]]:
    """From 0 to a round number at or above ``highest``, with three to six ticks."""
    highest = highest if highest > 0 else 1
    power = 10.0 ** math.floor(math.log10(highest))
    step = next(power * part for part in (0.2, 0.5, 1, 2) if highest <= 5 * power * part)
    count = math.ceil(highest / step - 1e-9)
    ticks = [step * i for i in range(count + 1)]
    return Scale(0, ticks[-1]), ticks


def axis_text(value: float, highest: float) -> str:
    """A tick's count, short: in thousands or millions where the axis reaches far."""
    for factor, unit in ((1e6, " M"), (1e3, " k")):
        if value and highest >= 20 * factor:
            return f"{value / factor:,.6g}{unit}"
    return count_text(value)


def chart(caption: str, shapes: str, kind: str, left: str, bottom: str, ident: str) -> str:
    """A figure: SVG between its axes. ``left`` and ``bottom`` are labels, as HTML."""
    return (f'<figure id="{ident}" class="{kind}">\n<figcaption>{escape(caption)}</figcaption>\n'
            f'<div class="chart"><div class="left">{left}</div>'
            f'<svg role="img" aria-label="{escape(caption)}" viewBox="0 0 {WIDE} {WIDE}" preserveAspectRatio="none">'
            f'{shapes}</svg><div class="bottom">{bottom}</div></div>\n</figure>')


def label(text: str, place: str, at: float) -> str:
    """A tick's label ``at`` SVG units from the left or the top."""
    end = " first" if at < 0.02 * WIDE else " last" if at > 0.93 * WIDE else ""
    return f'<span class="{place}{end}" style="{place}:{at / WIDE:.2%}">{escape(text)}</span>'


def path(points: str, kind: str, width: float | None = None) -> str:
    style = "" if width is None else f' style="stroke-width:{width:g}"'
    return f'<path class="{kind}" d="{points}"{style}/>'


def stepped(xs: Sequence[float], ys: Sequence[float]) -> str:
    """A line that keeps each value until the next one."""
    parts = [f"M{xs[0]:g} {ys[0]:g}"]
    for (_, y), (x, next_y) in pairwise(zip(xs, ys, strict=True)):
        parts.append(f"H{x:g}" if next_y == y else f"H{x:g}V{next_y:g}")
    return "".join(parts)


def timeline_figures(result: dict[str, Any]) -> str:
    timeline = result["timeline"]
    if len(timeline["seconds"]) < 2 or timeline["seconds"][0] == timeline["seconds"][-1]:
        return paragraph("The replay ended before anything happened.")
    names = series(result)
    rows = timeline["policies"]
    live = [(name, names[name], row["live"]) for name, row in rows.items()]
    served = [(name, names[name], row["mapped"]) for name, row in rows.items()]
    events = [("touches by L2", "s4", timeline["touches"]), ("TLBIs of L1", "s5", timeline["tlbis"])]
    return "\n".join([
        legend(live, "; dotted: the host changes that dropped leaves" if marked(result) else ""),
        timeline_chart(result, "Live shadow leaves", live, "live"),
        timeline_chart(result, "Faults served so far", served, "served"),
        legend([*events, *([("host changes, at the bottom", "tick", [])] if timeline["changes"][-1] else [])]),
        timeline_chart(result, "Events replayed so far", events, "events", change_ticks(timeline))])


def legend(lines: Sequence[tuple[str, str, Any]], more: str = "") -> str:
    keys = "".join(f'<span><i class="key {kind}"></i>{escape(name)}</span>' for name, kind, _ in lines)
    return f'<p class="legend">{keys}{escape(more.removeprefix("; "))}</p>'


def marked(result: dict[str, Any]) -> list[float]:
    return [record["seconds"] for record in result["largest"]
            if any(done["removed"] for done in record["policies"].values())]


def timeline_chart(result: dict[str, Any], caption: str, lines: Sequence[tuple[str, str, Sequence[float]]], ident: str,
                   more: Sequence[float] = ()) -> str:
    seconds = result["timeline"]["seconds"]
    across = Scale(seconds[0], seconds[-1])
    xs = [across.at(second) for second in seconds]
    up, ticks = nice_scale(max((max(values) for *_, values in lines), default=0))
    shapes = [path(f"M0 {WIDE - up.at(tick):g}H{WIDE}", "grid") for tick in ticks]
    shapes += [path(f"M{across.at(second):g} 0V{WIDE}", "mark")
               for second in marked(result) if seconds[0] <= second <= seconds[-1]]
    # each line a little thinner than the one below it: equal ones stay in sight
    shapes += [path(stepped(xs, [WIDE - up.at(value) for value in values]), kind, 1.75 + 1.5 * (len(lines) - 1 - i))
               for i, (_, kind, values) in enumerate(lines)]
    shapes += [path(f"M{across.at(second):g} {WIDE}V{0.9 * WIDE:g}", "tick") for second in more]
    _, times = nice_scale(seconds[-1] - seconds[0])
    bottom = "".join(label(f"{seconds[0] + at:,.4g} s", "left", across.at(seconds[0] + at))
                     for at in times if seconds[0] + at <= seconds[-1])
    left = "".join(label(axis_text(tick, ticks[-1]), "top", WIDE - up.at(tick)) for tick in ticks)
    return chart(caption, "".join(shapes), "time", left, bottom, ident)


def change_ticks(timeline: dict[str, Any]) -> list[float]:
    """When the host changed something, as finely as the time line tells."""
    changes = [0, *timeline["changes"]]
    return [second for second, (before, after) in zip(timeline["seconds"], pairwise(changes), strict=True)
            if after > before]


def latency_figures(result: dict[str, Any]) -> str:
    parts = [latency_figure(result, "teardown", "Time of the engine for one host change"),
             latency_figure(result, "tlbi", "Time of the engine for one TLBI of L1")]
    shown = [part for part in parts if part]
    if not shown:
        return paragraph("Nothing was timed.")
    keys = "".join(f'<span><i class="point {kind}"></i>{name}</span>'
                   for kind, name in (("p50", "p50"), ("p99", "p99"), ("max", "max"), ("mean", "mean")))
    return "\n".join([f'<p class="legend">{keys}</p>', *shown])


def latency_figure(result: dict[str, Any], what: str, caption: str) -> str:
    """Per policy a strip from p50 to the maximum, on a logarithmic scale."""
    names = series(result)
    measured = {name: row[what]["ns"] for name, row in result["policies"].items() if row[what]["ns"] is not None}
    if not measured:
        return ""
    # a clock of coarse steps may read 0 ns: drawn at the left end, told as it is
    low = 10.0 ** math.floor(math.log10(max(1, min(min(ns.values()) for ns in measured.values()))))
    high = 10.0 ** math.ceil(math.log10(max(10 * low, *(ns["max"] for ns in measured.values()))))
    across = Scale(low, high, log=True)
    ticks = [low * 10.0**i for i in range(round(math.log10(high / low)) + 1)]
    grid = "".join(path(f"M{across.at(tick):g} 0V{WIDE}", "grid") for tick in ticks)
    strips = []
    for name, ns in measured.items():
        at = {key: across.at(max(ns[key], low)) for key in ("p50", "p99", "max", "mean")}
        told = ", ".join(f"{key} {time_text(ns[key])}" for key in at)
        shapes = path(f"M{at['p50']:g} 500H{at['max']:g}", f"range {names[name]}")
        shapes += "".join(path(f"M{x:g} 500h0" if key != "max" else f"M{x:g} 150V850", f"point {key} {names[name]}")
                          for key, x in at.items())
        strips.append(
            f'<div class="strip"><p><i class="key {names[name]}"></i>{escape(name)} <span>{told}</span></p>'
            f'<svg role="img" aria-label="{escape(f"{caption}, {name}: {told}")}" viewBox="0 0 {WIDE} {WIDE}" '
            f'preserveAspectRatio="none">{grid}{shapes}</svg></div>')
    every = max(1, math.ceil(len(ticks) / 5))
    bottom = "".join(label(time_text(tick), "left", across.at(tick)) for tick in ticks[::every])
    return (f'<figure id="latency-{what}" class="latency">\n<figcaption>{caption} (logarithmic scale)</figcaption>\n'
            + "\n".join(strips) + f'\n<div class="bottom">{bottom}</div>\n</figure>')


def refault_figure(result: dict[str, Any]) -> str:
    """Per policy a bar of the faults served, the needless ones last."""
    policies = result["policies"]
    highest = max((row["faults"]["mapped"] for row in policies.values()), default=0)
    if not highest:
        return paragraph("No fault was served.") if policies else ""
    names = series(result)
    across, ticks = nice_scale(highest)
    grid = "".join(path(f"M{across.at(tick):g} 0V{WIDE}", "grid") for tick in ticks)
    strips = []
    for name, row in policies.items():
        served, needless = row["faults"]["mapped"], row["refaults_needless"]
        share = f" ({needless / served:.1%})" if served else ""
        told = f"{count_text(served)} faults served, {count_text(needless)} needless{share}"
        first, last = across.at(max(served - needless, 0)), across.at(served)
        shapes = path(f"M0 200H{first:g}V800H0Z", f"bar {names[name]}")
        shapes += path(f"M{first:g} 200H{last:g}V800H{first:g}Z", f"bar needless {names[name]}")
        strips.append(
            f'<div class="strip"><p><i class="key {names[name]}"></i>{escape(name)} <span>{told}</span></p>'
            f'<svg role="img" aria-label="{escape(f"{name}: {told}")}" viewBox="0 0 {WIDE} {WIDE}" '
            f'preserveAspectRatio="none">{grid}{shapes}</svg></div>')
    bottom = "".join(label(axis_text(tick, ticks[-1]), "left", across.at(tick)) for tick in ticks)
    return ('<figure id="refaults" class="latency">\n<figcaption>Faults served; hollow: those that only '
            'over-invalidation caused</figcaption>\n' + "\n".join(strips)
            + f'\n<div class="bottom">{bottom}</div>\n</figure>')
