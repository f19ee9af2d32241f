"""What users read of a replay: the table, the CSV and the picture."""

from __future__ import annotations

import io
import os
from pathlib import Path
from textwrap import wrap
from typing import Any

from s2shadow.report import (
    Line,
    bytes_text,
    columns,
    count_text,
    csv_text,
    flatten,
    time_text,
    write_whole,
)

__all__ = ["plot", "replay_csv", "replay_lines"]

ROLES = {"l1": "a host that plays L1", "l0": "a host (L0) that runs a guest hypervisor"}
COLOURS = {"reverse-map": "#1b7f5c", "interval-map": "#2c6fbb", "blow-away": "#c0392b", "blow-away-lean": "#e59866"}
STYLES = {"reverse-map": "-", "interval-map": "-.", "blow-away": "-", "blow-away-lean": "--"}


def replay_lines(result: dict[str, Any], hints: bool = True) -> list[Line]:
    """The report of a replay, as ``run`` returned it."""
    lines = [Line(f"trace        {trace_text(result)}"), Line(f"replayed     {replayed_text(result)}"), Line()]
    policies = result["policies"]
    heading, *body = columns(policy_rows(result))
    lines.append(Line(heading, "bold"))
    lines += [Line(text, "green" if name == "reverse-map" else "") for name, text in zip(policies, body, strict=True)]
    lines.append(Line())
    lines += event_lines(result)
    lines += check_lines(result)
    for note in [*result["notes"], *trace_faults(result["trace"])]:
        lines += map(Line, wrap(note, 110, initial_indent="note         ", subsequent_indent=" " * 13))
    if result["interrupted"]:
        lines.append(Line("Interrupted: the figures are of the events until then.", "yellow"))
    verdict = verdict_text(result)
    if verdict:
        lines.append(Line(verdict, "bold"))
    if hints:
        lines.append(Line("JSON: --json FILE   picture: --plot FILE   page: --report FILE"))
    return lines


def trace_text(result: dict[str, Any]) -> str:
    trace = result["trace"]
    role = ROLES.get(result["config"]["role"] or "", "")
    return (f"{trace['label']}, {role}: {trace['seconds']:,.0f} s, {counted(trace['events'], 'event')}, "
            f"{counted(trace['vcpus'], 'vCPU')} of L1")


def counted(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def replayed_text(result: dict[str, Any]) -> str:
    applied = result["counts"]["applied"]
    first = next(iter(result["policies"].values()))
    parts = [f"{counted(first['faults']['total'], 'touch', 'touches')} by L2",
             f"{counted(applied.get('TLBIs', 0), 'TLBI')} of L1"]
    for name, one, many in (("edits of L1's tables", "edit of L1's tables", "edits of L1's tables"),
                            ("MMU notifiers", "MMU notifier", ""), ("aging", "range aged", "ranges aged")):
        if applied.get(name):
            parts.append(counted(applied[name], one, many))
    if first["teardown"]["events"]:
        parts.append(f"{counted(first['teardown']['events'], 'change')} of L1's memory")
    return ", ".join(parts) + ("" if result["config"]["tlbi"] == "exact" else f"; TLBIs as {result['config']['tlbi']}")


def policy_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table: with the columns of host changes only where there are any."""
    changes = any(row["teardown"]["events"] for row in result["policies"].values())
    heading = ["policy", "faults", "needless", "dropped", "required"]
    heading += ["change p50", "p99", "max", "Linux steps"] if changes else []
    heading += ["TLBI p50", "p99"]
    rows = [tuple(heading)]
    for name, row in result["policies"].items():
        teardown, tlbi = row["teardown"], row["tlbi"]
        cells = [name, count_text(row["faults"]["mapped"]), count_text(row["refaults_needless"]),
                 count_text(teardown["removed"] + tlbi["removed"]), count_text(teardown["required"] + tlbi["required"])]
        if changes:
            cells += [*times(teardown["ns"], "p50", "p99", "max"),
                      count_text(row["kernel_steps"]) if row["kernel_steps"] else "-"]
        rows.append((*cells, *times(tlbi["ns"], "p50", "p99")))
    return rows


def times(ns: dict[str, float] | None, *names: str) -> list[str]:
    return [time_text(None if ns is None else ns[name]) for name in names]


def event_lines(result: dict[str, Any]) -> list[Line]:
    """The host change that cost most, policy by policy."""
    event = next((record for record in result["largest"]
                  if any(done["removed"] or done["kernel_steps"] for done in record["policies"].values())), None)
    if event is None:
        return []
    what = f"the host takes {bytes_text(event['end'] - event['start'])} at {event['start']:#x} ({event['event']})"
    lines = [Line(f"one change   at {event['seconds']:,.2f} s {what}")]
    if event.get("linux_unmaps"):
        lines.append(Line(f"             for it the traced Linux made {event['linux_unmaps']:,} stage-2 unmap calls"))
    rows = [("policy", "dropped", "required", "time", "Linux steps, each with a flush")]
    rows += [(name, count_text(done["removed"]), count_text(done["required"]), time_text(done["ns"]),
              count_text(done["kernel_steps"]) if done["kernel_steps"] else "-")
             for name, done in event["policies"].items()]
    heading, *body = columns(rows)
    return [*lines, Line(heading, "bold"), *map(Line, body), Line()]


def check_lines(result: dict[str, Any]) -> list[Line]:
    checks = result["checks"]
    lines = []
    for name, text in (("tables", "L1's tables as captured"), ("hosts", "L0's table as captured"),
                       ("shadows", "shadow as captured where L2 touched")):
        rows = checks[name]
        if rows:
            pages, same = sum(row["pages"] for row in rows), sum(row["same"] for row in rows)
            good = sum(not differs(row) for row in rows)
            lines.append(Line(f"checked      {text}: {good} of {len(rows)} snapshots, {same:,} of {pages:,} pages",
                              "" if good == len(rows) else "yellow"))
    wrong = [row for row in checks["counts"] if row["recorded"] != row["expected"]]
    if checks["counts"]:
        shown = "; ".join(f"{row['name']} {row['recorded']:,} of {row['expected']:,}" for row in wrong[:4])
        lines.append(Line(f"checked      events as counted in checks.json: {len(checks['counts']) - len(wrong)} of "
                          f"{len(checks['counts'])}{f' ({shown})' if wrong else ''}", "yellow" if wrong else ""))
    different = sum(row["different"] for row in checks["same_mapping"])
    if different:
        lines.append(Line(f"checked      {different:,} pages are mapped otherwise under some policy", "yellow"))
    return lines


def differs(row: dict[str, Any]) -> bool:
    from s2shadow.replay import unexplained

    return unexplained(row) > row.get("under_way", 0)


def trace_faults(trace: dict[str, Any]) -> list[str]:
    """What is wrong with the trace itself."""
    texts = []
    if trace["lost"]:
        texts.append(f"the tracer lost {counted(trace['lost'], 'event')}")
    if trace["unreadable"]:
        texts.append(f"{counted(trace['unreadable'], 'line')} of the trace could not be read")
    if trace["truncated"]:
        texts.append(f"the trace is incomplete: {trace['truncated']}")
    if trace.get("mismatched"):
        texts.append(f"{trace['mismatched']:,} flushes in the text and in the CSV do not belong together")
    return texts


def verdict_text(result: dict[str, Any]) -> str:
    """What the policies cost beside each other."""
    needless = {name: row["dropped_needlessly"] for name, row in result["policies"].items()}
    if not any(needless.values()):
        return ""
    worst = max(needless, key=lambda name: needless[name])
    who = "Every policy" if len(set(needless.values())) == 1 and len(needless) > 1 else worst
    again = result["policies"][worst]["refaults_needless"]
    leaves, them = counted(needless[worst], "leaf", "leaves"), "it" if needless[worst] == 1 else "them"
    return f"{who} dropped {leaves} that nothing required, and served {counted(again, 'fault')} for {them} again."


def replay_csv(result: dict[str, Any]) -> str:
    """One row per policy; nested figures become columns of their own."""
    rows = []
    for name, row in result["policies"].items():
        flat = {key: flatten(with_times(value)) if isinstance(value, dict) else value for key, value in row.items()}
        rows.append({"policy": name, **flatten(flat)})
    return csv_text(rows) if rows else ""


def with_times(figures: dict[str, Any]) -> dict[str, Any]:
    """The same columns whether anything was measured or not."""
    if "ns" in figures and figures["ns"] is None:
        return {**figures, "ns": dict.fromkeys(("p50", "p99", "max", "mean"), "")}
    return figures


def plot(result: dict[str, Any], file: str | os.PathLike[str]) -> None:
    """Live leaves and faults served over the time of the trace, per policy.

    The format follows the file's ending (png, svg, pdf). ``ImportError`` without matplotlib; ``ValueError`` where
    nothing was replayed.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    timeline = result["timeline"]
    if len(timeline["seconds"]) < 2:
        raise ValueError("nothing to plot: the replay ended before anything happened")
    figure = Figure(figsize=(9, 6), layout="constrained")
    live, served = figure.subplots(2, 1, sharex=True)
    for name, row in timeline["policies"].items():
        style = {"color": COLOURS.get(name), "linestyle": STYLES.get(name, ":"), "linewidth": 1.5}
        figures = result["policies"][name]
        needless = count_text(figures["refaults_needless"])
        label = f"{name}\n{count_text(figures['faults']['mapped'])} faults, {needless} needless"
        live.plot(timeline["seconds"], row["live"], label=label, drawstyle="steps-post", **style)
        served.plot(timeline["seconds"], row["mapped"], drawstyle="steps-post", **style)
    for record in result["largest"]:
        if any(done["removed"] for done in record["policies"].values()):
            for axes in (live, served):
                axes.axvline(record["seconds"], color="#999999", linewidth=0.8, linestyle=":", zorder=0)
    for axes, text in ((live, "live shadow leaves"), (served, "faults served")):
        axes.set_ylabel(text)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: count_text(value)))
        axes.grid(axis="y", color="#dddddd")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    served.set_xlabel("seconds of the trace")
    figure.suptitle(f"Shadow page tables under {result['trace']['label']}", fontsize=13)
    figure.legend(loc="outside lower center", ncols=2 if len(result["policies"]) > 3 else 3, fontsize=9, frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format=Path(file).suffix.lower()[1:], dpi=150)
    write_whole(file, image.getvalue())
