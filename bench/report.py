"""One page of what was measured: the figures with limits, every suite, the curves.

    python -m bench.report FOLDER           # reads the JSON files in it, writes README.md and SVG plots beside them
    python -m bench.report FOLDER --run     # first measures everything at the sizes of the record (an hour)

FOLDER holds ``benchmarks.json`` (pytest-benchmark), ``instructions.json``, ``scaling.json`` and
``scaling_instructions.json``; what is missing is left out of the page, and said so. ``machine.json`` says where and
when; ``--run`` writes it. By convention FOLDER is ``bench/results/DATE-CPU``.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).parent
PARTS = ("benchmarks", "instructions", "scaling", "scaling_instructions", "machine")
RUNS = (
    ("instructions", ["bench/instructions.py", "--json"]),
    ("scaling_instructions", ["bench/scaling.py", "--instructions", "--json"]),
    ("benchmarks", ["-m", "pytest", "bench", "-q", "--benchmark-columns=min", "--benchmark-json"]),
    ("scaling", ["bench/scaling.py", "--json"]),
)
# What Linux 7.2 takes for the same, in userspace on a machine of this class; with the reverse map proposed in 2026
LINUX = {
    "walk_3_levels": ("774", ""),
    "walk_4_levels": ("980", ""),
    "fault_4k_random": ("2,431, no reverse map", "7,274"),
    "fault_4k_sequential": ("2,431, no reverse map", "6,773"),
    "fault_4k_random_batch": ("2,431, no reverse map", "7,274"),
    "fault_2m_random": ("2,048, no reverse map", "6,889"),
    "unmap_1_context": ("64.6M, then 65,536 refaults", "4,869"),
    "unmap_64_contexts": ("", "33,345"),
    "unmap_shared_by_8_contexts": ("", "33,696 in all"),
    "tlbi_ipa": ("1,350", "5,301"),
    "tlbi_ipa_not_shadowed": ("21.3M, and 262,144 leaves lost", "584M"),
    "tlbi_vmalls12_empty": ("59.2M", "59.2M"),
    "reverse_map_bytes": ("0", "37 to 42"),
    "bench_walk_cold_batch": ("663 to 752 ns", ""),
    "bench_fault_random_batch": ("546 ns, no reverse map", "2,232 ns"),
    "bench_fault_sequential_batch": ("145 ns, no reverse map", "560 ns"),
    "bench_unmap_1_context": ("3,517 µs, then 65,536 refaults", "728 ns"),
    "bench_unmap_64_contexts": ("595 ms, then 67 million refaults", "7.3 µs"),
    "bench_tlbi_range_sequential": ("5.3 ns, no reverse map", "225 to 255 ns"),
    "bench_write_protect[protect]": ("40 ms", "40 ms"),
    "bench_write_protect[log_dirty]": ("40 ms", "40 ms"),
}  # fmt: skip


# --- what is there -----------------------------------------------------------------------------------------------


def load(folder):
    """{part: its JSON, or None}."""
    found = {}
    for part in PARTS:
        path = folder / f"{part}.json"
        found[part] = json.loads(path.read_text()) if path.exists() else None
    return found


def machine():
    cpuinfo = dict(re.findall(r"^(.+?)\s*: (.+)$", text_of("/proc/cpuinfo"), re.MULTILINE))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    huge = re.search(r"\[(\w+)\]", text_of("/sys/kernel/mm/transparent_hugepage/enabled"))
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": cpuinfo.get("model name") or platform.processor() or platform.machine(),
        "family_model": "/".join(cpuinfo[key] for key in ("cpu family", "model") if key in cpuinfo),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "huge_pages": huge[1] if huge else "unknown",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "commit": commit(),
    }


def text_of(path):
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def commit():
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def trimmed(benchmarks):
    """Of pytest-benchmark's JSON what the page needs: a file to be committed."""
    return [
        {"name": found["name"], "group": found["group"], "min": found["stats"]["min"], **found["extra_info"]}
        for found in benchmarks["benchmarks"]
    ]


def measure(folder):
    """Take every figure; a part that fails (status 1: a budget exceeded) is still on the page."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "machine.json").write_text(json.dumps(machine(), indent=1) + "\n")
    paths = [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "S2SHADOW_BENCH": "full", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    for part, command in RUNS:
        path = folder / f"{part}.json"
        print(f"$ python {' '.join(command)} {path}", file=sys.stderr)
        done = subprocess.run([sys.executable, *command, str(path.resolve())], cwd=HERE.parent, env=environment)
        if done.returncode not in (0, 1, 77):
            raise SystemExit(f"report: {part} ended with status {done.returncode}")
        if part == "benchmarks":
            path.write_text(json.dumps(trimmed(json.loads(path.read_text())), indent=1) + "\n")


# --- the page ----------------------------------------------------------------------------------------------------


def page(parts, plots):
    """The Markdown of everything."""
    sections = [heading(parts["machine"])]
    budgets = tomllib.loads((HERE / "budgets.toml").read_text())
    makers = {
        "instructions": lambda figures: instructions_section(figures, budgets["instructions"]),
        "benchmarks": lambda rows: limits_section(rows, budgets["times"]) + suites_section(rows),
    }
    for part, make in makers.items():
        sections.append(make(parts[part]) if parts[part] else [f"`{part}.json` is missing: not measured here.", ""])
    sections.append(curves_section(plots))
    return "\n".join(line for section in sections for line in section)


def heading(found):
    if not found:
        return ["# Measured", ""]
    return [
        f"# Measured on {found['date']}, {found['cpu']}",
        "",
        f"CPU family/model {found['family_model']}, {found['cores']} cores, {found['memory_gib']} GiB, Linux "
        f"{found['kernel']}, transparent huge pages `{found['huge_pages']}`, Python {found['python']}, "
        f"commit {found['commit']}. How: [bench/README.md](../../README.md).",
        "",
        "Linux columns: kernel 7.2's own C code in userspace on a machine of this class, and the same with the reverse "
        "map of maple trees proposed in 2026.",
        "",
    ]


def table(titles, rows, right=()):
    lines = [titles, ["---:" if i in right else "---" for i in range(len(titles))], *rows]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


def instructions_section(found, entries):
    rows = []
    for name, measured in found["figures"].items():
        entry = entries.get(name, {})
        linux = LINUX.get(name, ("", ""))
        goal = f"{entry['goal']:,}" if "goal" in entry else ""
        rows.append([f"`{name}`", f"**{measured:,.1f}**", goal, verdict(measured, entry.get("goal")), *linux])
    built = found["built"]
    text = f"Counted by callgrind, modules built by {built['compiler']} with {built['flags']}. `unmap_*`: beyond " \
           "`bare_unmap`; `_shared_by_8` and `_8_aliases`: for each leaf after the first."  # fmt: skip
    titles = ["operation", "instructions", "goal", "", "Linux 7.2", "with maple trees"]
    return ["## Instructions per operation", "", text, "", *table(titles, rows, right=(1, 2, 4, 5))]


def verdict(measured, limit):
    return "" if limit is None else "reached" if measured <= limit else "**not reached**"


def ns(value):
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def judged(limit, row):
    """What a limit of budgets.toml says in words, and whether a benchmark's figures keep it."""
    if "ns" in limit:
        return f"{limit['ns']:,} ns", row["ns_per_operation"] <= limit["ns"]
    if "ratio" in limit:
        return limit["text"], row.get("times_floor", 0.0) <= limit["ratio"]
    if "above" in limit:
        return f"{limit['above']:,} ns above the floor", row["ns_per_operation"] - row["floor_ns"] <= limit["above"]
    return f"{limit['speedup']} times one thread", row.get("speedup", 0.0) >= limit["speedup"]


def limits_section(rows, limits):
    lines = []
    for row in (row for row in rows if row["name"] in limits):
        text, kept = judged(limits[row["name"]], row)
        ratio = f"{row['speedup']:.2f} times one thread" if "speedup" in row else f"{row['times_floor']:.3g}"
        lines.append([f"`{row['name']}`", f"**{ns(row['ns_per_operation'])}**", ns(row["floor_ns"]), ratio, text,
                      "kept" if kept else "**not reached**", *LINUX.get(row["name"], ("", ""))])  # fmt: skip
    titles = ["figure", "ns", "floor", "times floor", "limit", "", "Linux 7.2", "with maple trees"]
    text = "Floors are of the same run, on as much memory. Notifiers are beyond the bare canonical operation."
    return ["## Times with a limit", "", text, "", *table(titles, lines, right=(1, 2, 3))]


STORED = ("operations", "ns_per_operation", "floor_ns", "times_floor")


def suites_section(rows):
    lines = ["## Every suite", "", "ns per operation: the best round of each.", ""]
    for group in dict.fromkeys(row["group"] for row in rows):
        body = []
        for row in (row for row in rows if row["group"] == group):
            more = ", ".join(
                f"{key} {round(found, 1):,}" for key, found in row.items()
                if key not in (*STORED, "name", "group", "min") and isinstance(found, int | float)
            )  # fmt: skip
            floor = [ns(row["floor_ns"]), f"{row['times_floor']:.2f}"] if "floor_ns" in row else ["", ""]
            taken = row.get("ns_per_operation", row["min"] * 1e9)
            body.append([f"`{row['name']}`", ns(taken), *floor, more.replace("_", " ")])
        lines += [f"### {group}", "", *table(["benchmark", "ns", "floor", "times", ""], body, right=(1, 2, 3))]
    return lines


def curves_section(plots):
    lines = ["## Curves", ""]
    if not plots:
        return [*lines, "Not measured here.", ""]
    for title, file in plots:
        lines += [f"![{title}]({file})", ""]
    return lines


# --- plots -------------------------------------------------------------------------------------------------------

CURVES = {
    "notifier_by_contexts": ("A notifier of one page, by contexts (1,048,576 leaves in all)", "contexts"),
    "notifier_by_pages": ("A notifier of one page, by shadowed pages in one context", "pages"),
    "notifier_by_aliases": ("A notifier of one page, by the IPAs that show it: all their leaves go", "aliases"),
    "fault_by_footprint": ("A random fault, by bytes of all tables, links and heads", "bytes"),
}
PAGE_BYTES = 36     # of the footprint, for each page


def draw(parts, folder):
    """One picture for each curve, of time and instructions -> [(title, file name)]."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "s2shadow"        # the same data, the same file
    import matplotlib.pyplot as plt

    drawn = []
    for name, (title, axis) in CURVES.items():
        times = (parts["scaling"] or {}).get(name)
        counts = (parts["scaling_instructions"] or {}).get(name)
        if not times and not counts:
            continue
        figure, panels = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
        figure.suptitle(title)
        draw_times(panels[0], times or [], axis)
        draw_counts(panels[1], counts or [], axis, PAGE_BYTES if name == "fault_by_footprint" else 1)
        file = f"{name}.svg"
        figure.savefig(folder / file, metadata={"Date": None})
        plt.close(figure)
        drawn.append((title, file))
    return drawn


def draw_times(panel, points, axis):
    series = (("ns", "one batch" if any("single_ns" in p for p in points) else "s2shadow", "o-"),
              ("single_ns", "one at a time", "s-"), ("floor_ns", "floor: bare C", "o--"),
              ("serial_floor_ns", "floor: bare C, one at a time", "s--"))  # fmt: skip
    for key, label, style in series:
        draw_line(panel, [(point["x"], point[key]) for point in points if key in point], label, style)
    finish(panel, axis, "ns")


def draw_counts(panel, points, axis, scale):
    draw_line(panel, [(point["x"] * scale, point["instructions"]) for point in points], "s2shadow", "o-")
    finish(panel, axis, "instructions")


def draw_line(panel, points, label, style):
    if points:
        panel.plot(*zip(*points, strict=True), style, label=label, markersize=4)


def finish(panel, axis, unit):
    """What must grow with the leaves that go is a line from the origin on even scales; all else is over powers of 2."""
    if axis != "aliases":
        panel.set_xscale("log", base=2)
    panel.set_xlabel(axis)
    panel.set_ylabel(unit)
    panel.margins(y=0.15)
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
    if panel.lines:
        panel.legend(fontsize=8)


# --- the command -------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="One page of what was measured.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the JSON files are, and the page goes")
    parser.add_argument("--run", action="store_true", help="measure first, at the sizes of the record")
    options = parser.parse_args(argv)
    if options.run:
        measure(options.folder)
    if not options.folder.is_dir():
        print(f"report: no folder {options.folder}", file=sys.stderr)
        return 2
    parts = load(options.folder)
    if not any(parts[part] for part in PARTS[:-1]):
        print(f"report: nothing measured in {options.folder}: none of {', '.join(f'{p}.json' for p in PARTS[:-1])}",
              file=sys.stderr)  # fmt: skip
        return 2
    try:
        plots = draw(parts, options.folder)
    except ModuleNotFoundError:
        print("report: no plots: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
        plots = []
    out = options.folder / "README.md"
    out.write_text(page(parts, plots))
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
