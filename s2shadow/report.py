"""What users read: the storm's table, CSV and picture, walks in words, and files written whole or not at all."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from s2shadow.constants import perm_text, size_text

if TYPE_CHECKING:
    from s2shadow.config import Stage2Config
    from s2shadow.descriptor import WalkLevel
    from s2shadow.walker import Walk

STDOUT_PIECE = 1 << 14      # an unbuffered stdout drops the rest of a write that the reader cuts short
PLOT_FORMATS = (".png", ".svg", ".pdf")
ASCII = str.maketrans({"→": "->", "…": "...", "µ": "u", "×": "x"})


class Line(NamedTuple):
    """One line of output; ``style`` is colour on a terminal and never carries meaning of its own."""

    text: str = ""
    style: str = ""


# --- numbers ---------------------------------------------------------------------------------------------------


def time_text(ns: float | None) -> str:
    """Nanoseconds as ``410 ns``, ``1.3 µs``, ``39 ms``: two digits, three from 100 on."""
    if ns is None:
        return "-"
    for factor, unit in ((1.0, "ns"), (1e3, "µs"), (1e6, "ms"), (1e9, "s")):
        value = ns / factor
        if value < 999.5 or unit == "s":
            break
    if value >= 1000:
        return f"{value:,.0f} {unit}"
    return f"{value:.1f} {unit}" if value < 9.95 and unit != "ns" else f"{value:.0f} {unit}"


def count_text(value: float | None) -> str:
    """A count or ratio with thousands separators, with decimals only where they say something."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 99.5 or value == round(value) else f"{value:.2g}"


def ratio_text(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.2f}"


def times_text(value: float) -> str:
    """A ratio rounded to two digits: it is a measurement, not a count."""
    if value < 9.95:
        return f"{value:.1f}"
    digits = len(str(int(value))) - 2
    return f"{round(value, -digits):,.0f}"


def rate_text(per_second: float | None) -> str:
    if per_second is None:
        return "-"
    for factor, unit in ((1e6, "M"), (1e3, "k")):
        if per_second >= factor:
            return f"{per_second / factor:.1f} {unit}/s"
    return f"{per_second:.0f} /s"


def bytes_text(count: float) -> str:
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= factor:
            value = count / factor
            return f"{value:.1f} {unit}" if value < 9.95 else f"{value:,.0f} {unit}"
    return f"{count:.0f} B"


# --- output ----------------------------------------------------------------------------------------------------


def emit(lines: Iterable[Line], stream: TextIO) -> None:
    """Print lines; with rich's colours on a terminal, and in ASCII where the terminal knows no more."""
    console = colour_console(stream)
    for line in lines:
        text = encodable(line.text, stream)
        if console is None:
            stream.write(text + "\n")
        else:
            console.print(text, style=line.style or None, markup=False, highlight=False, soft_wrap=True)
    stream.flush()


def colour_console(stream: TextIO) -> Any:
    """A rich console for a terminal that wants colour, else None."""
    if os.environ.get("NO_COLOR") or not is_terminal(stream):
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(file=stream)


def is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError):
        return False


def encodable(text: str, stream: TextIO) -> str:
    """``text`` in the stream's own letters: in ASCII where it knows no more, names that are no text escaped."""
    for shown in (text, text.translate(ASCII)):
        if can_encode(shown, stream):
            return shown
    return shown.encode("ascii", "backslashreplace").decode()


def printable(text: str) -> str:
    """``text`` with U+FFFD for what is no letter, mark or line end: control and format characters."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def can_encode(text: str, stream: TextIO) -> bool:
    try:
        text.encode(getattr(stream, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def columns(rows: Sequence[Sequence[str]], gap: int = 3, left: Sequence[int] = (0,)) -> list[str]:
    """Rows as aligned text: the columns ``left`` to the left, all others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [(" " * gap).join(cell.ljust(width) if i in left else cell.rjust(width)
                             for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
            for row in rows]


# --- storm -----------------------------------------------------------------------------------------------------

STORM_HEADINGS = ("policy", "events", "teardown/event p50", "p99", "refaults/event", "total/event", "removed/required")


def storm_lines(result: dict[str, Any], hints: bool = True) -> list[Line]:
    """The report of a storm, as ``run`` returned it."""
    lines = []
    if "workload" in result:
        lines.append(Line(f"L1 tables    {result['workload']['label']}"))
        lines.append(Line(f"storm        {event_text(result['config'])}"))
        lines.append(Line())
    policies = result["policies"]
    if policies:
        rows = [STORM_HEADINGS, *(storm_row(name, row) for name, row in policies.items())]
        heading, *body = columns(rows)
        lines.append(Line(heading, "bold"))
        lines += [Line(text, "green" if name == "reverse-map" else "")
                  for name, text in zip(policies, body, strict=True)]
        lines.append(Line())
        name = "reverse-map" if "reverse-map" in policies else next(iter(policies))
        lines += [Line(faults_text(policies[name], result.get("floor"))),
                  Line(memory_text(policies[name], result.get("workload", {})))]
    if result["interrupted"]:
        lines.append(Line("Interrupted: the figures are of the rounds until then." if policies
                          else "Interrupted before the first round was complete.", "yellow"))
    verdict = verdict_text(result["ratios"])
    if hints and policies:
        verdict = "   ".join(filter(None, [verdict, "JSON: --json FILE", "picture: --plot FILE"]))
    if verdict:
        lines.append(Line(verdict, "bold"))
    return lines


def event_text(config: dict[str, Any]) -> str:
    pages = config["event_pages"]
    return (f"{pages:,} page{'s' if pages > 1 else ''} per event, random, working set "
            f"{'written' if config['write'] else 'touched'} again after each event")


def storm_row(name: str, row: dict[str, Any]) -> tuple[str, ...]:
    required = row["entries_required"]
    return (name, count_text(row["events"]), time_text(row["teardown_ns_per_event"]["p50"]),
            time_text(row["teardown_ns_per_event"]["p99"]), count_text(row["refaults_per_event"]),
            time_text(row["total_ns_per_event"]), ratio_text(row["entries_removed"] / required if required else None))


def faults_text(row: dict[str, Any], floor: dict[str, Any] | None) -> str:
    text = f"faults       {rate_text(row['faults_per_s'])} ({time_text(row['fault_ns'])} each"
    if floor is not None:
        text += (f"; one dependent load over the same {bytes_text(floor['bytes'])} takes "
                 f"{time_text(floor['ns_per_load'])} in this run")
    return text + ")"


def memory_text(row: dict[str, Any], workload: dict[str, Any]) -> str:
    what = "4K mapping" if set(workload.get("leaves_by_size", ())) <= {"4K"} else "mapping"
    return (f"memory       {row['table_bytes_per_entry']:,.1f} B tables + "
            f"{row['reverse_map_bytes_per_entry']:,.1f} B reverse map per {what}")


def verdict_text(ratios: dict[str, dict[str, float]]) -> str:
    total = ratios.get("total", {})
    name = "blow-away" if "blow-away" in total else next(iter(total), None)
    if name is None:
        return ""
    if total[name] >= 1:
        than = "" if name == "blow-away" else f" than with {name}"
        return f"One event costs {times_text(total[name])} times less with the reverse map{than}."
    return f"One event costs {times_text(1 / total[name])} times more with the reverse map than with {name}."


def storm_csv(result: dict[str, Any]) -> str:
    """One row per policy; nested figures become columns of their own."""
    rows = [{"policy": name, **flatten(row)} for name, row in result["policies"].items()]
    return csv_text(rows) if rows else ""


def flatten(row: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= {f"{key}_{inner}": item for inner, item in value.items()}
        else:
            flat[key] = value
    return flat


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def json_text(data: object) -> str:
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


# --- picture ---------------------------------------------------------------------------------------------------


def plot(result: dict[str, Any], file: str | os.PathLike[str]) -> None:
    """Nanoseconds per event of teardown, refaults and both, per policy, on a logarithmic scale.

    The format follows the file's ending (png, svg, pdf). ``ImportError`` without matplotlib.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    policies = result["policies"]
    if not policies:
        raise ValueError("nothing to plot: no policy has a complete round")
    parts = (("teardown (p50)", lambda row: row["teardown_ns_per_event"]["p50"]),
             ("refaults", lambda row: row["refault_ns_per_event"]),
             ("total", lambda row: row["total_ns_per_event"]))
    colours = {"reverse-map": "#1b7f5c", "interval-map": "#2c6fbb", "blow-away": "#c0392b",
               "blow-away-lean": "#e59866"}
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(policies)
    for i, (name, row) in enumerate(policies.items()):
        values = [value(row) for _, value in parts]
        at = [x - 0.4 + width * (i + 0.5) for x in range(len(parts))]
        refaults = count_text(row["refaults_per_event"])
        label = f"{name}\n{count_text(row['events'])} events, refaults per event: {refaults}"
        axes.bar(at, [max(value, 0.1) for value in values], width * 0.92, color=colours.get(name), label=label)
        for x, value in zip(at, values, strict=True):
            axes.annotate(time_text(value), (x, max(value, 0.1)), xytext=(0, 3), textcoords="offset points",
                          ha="center", va="bottom", fontsize=9)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(10 ** int(len(str(int(low))) - 1), high * 2)
    axes.set_xticks(range(len(parts)), [name for name, _ in parts])
    axes.tick_params(axis="x", length=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: time_text(value)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylabel("time per event (log scale)")
    pages = result["config"]["event_pages"]
    figure.suptitle(f"What one host change of {pages:,} page{'s' if pages > 1 else ''} costs a nested VM", fontsize=13)
    axes.set_title(result["workload"]["label"], fontsize=9, color="#555555")
    figure.legend(loc="outside lower center", ncols=2 if len(policies) > 3 else 3, fontsize=9, frameon=False)
    suffix = Path(file).suffix.lower()
    image = io.BytesIO()
    figure.savefig(image, format=suffix[1:], dpi=150)
    write_whole(file, image.getvalue())


# --- files -----------------------------------------------------------------------------------------------------


def write_json(result: dict[str, Any], file: str | os.PathLike[str]) -> None:
    """Write the result to ``file``, whole or not at all; ``-`` is stdout."""
    write_text(json_text(result), file)


def write_text(text: str, file: str | os.PathLike[str]) -> None:
    if os.fspath(file) == "-":
        text = encodable(text, sys.stdout)
        for at in range(0, len(text), STDOUT_PIECE):
            sys.stdout.write(text[at:at + STDOUT_PIECE])
        sys.stdout.flush()
    else:
        write_whole(file, text.encode(errors="backslashreplace"))


def hidden(target: str) -> str:
    """How the name begins that a file has until it is whole; shorter than a long name that is just allowed."""
    return f".{os.path.basename(target)[:40]}."


def write_whole(file: str | os.PathLike[str], data: bytes) -> None:
    """Replace ``file`` in one step, so that nobody ever reads half of it. Pipes and devices are written directly."""
    target = os.path.realpath(file)
    if os.path.exists(target) and not os.path.isfile(target):
        with open(target, "wb") as stream:
            stream.write(data)
        return
    descriptor, temporary = tempfile.mkstemp(dir=os.path.dirname(target), prefix=hidden(target))
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, mode_for(target))
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def write_folder(folder: str, files: dict[str, str]) -> None:
    """Make ``folder`` with these files (names may have folders of their own) in one step, or leave nothing behind.

    ``FileExistsError`` if there is something in it already.
    """
    target = os.path.realpath(folder)
    if os.path.lexists(target) and not (os.path.isdir(target) and not os.listdir(target)):
        raise FileExistsError(17, "it exists and is not an empty folder")
    if not os.path.isdir(os.path.dirname(target)):
        raise FileNotFoundError(2, f"no folder {os.path.dirname(folder) or os.path.dirname(target)}")
    temporary = tempfile.mkdtemp(dir=os.path.dirname(target), prefix=hidden(target))
    try:
        for name, text in files.items():
            file = Path(temporary, name)
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, encoding="ascii")
        os.chmod(temporary, mode_for(target, 0o777))
        os.rename(temporary, target)        # over an empty folder too
    except BaseException:
        shutil.rmtree(temporary)
        raise


def mode_for(target: str, ordinary: int = 0o666) -> int:
    """The permissions that an ordinary write would have left (a temporary file starts private)."""
    try:
        return stat.S_IMODE(os.stat(target).st_mode)
    except FileNotFoundError:
        umask = os.umask(0)
        os.umask(umask)
        return ordinary & ~umask


def check_writable(file: str) -> None:
    """``OSError`` now, rather than after a long run, if ``file`` could not be written."""
    target = os.path.realpath(file)
    if os.path.isdir(target):
        raise IsADirectoryError(21, "it is a folder")
    if os.path.exists(target):
        if not os.access(target, os.W_OK):
            raise PermissionError(13, "permission denied")
        if not os.path.isfile(target):
            return
    folder = os.path.dirname(target)
    if not os.path.isdir(folder):
        raise FileNotFoundError(2, f"no folder {os.path.dirname(file) or folder}")
    with contextlib.suppress(FileNotFoundError):
        os.stat(target)                 # a name that is too long, links in a circle
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=".s2shadow.")
    os.close(descriptor)
    os.unlink(temporary)


# --- walks -----------------------------------------------------------------------------------------------------

SHAREABILITY = ("non-shareable", "reserved shareability", "outer shareable", "inner shareable")
DEVICE = ("Device-nGnRnE", "Device-nGnRE", "Device-nGRE", "Device-GRE")
CACHEABILITY = ("reserved", "non-cacheable", "write-through", "write-back")


def config_line(cfg: Stage2Config) -> str:
    """The registers and what they say: ``VMID 1  VTTBR …  VTCR …: 4K granule, 40-bit IPA, …``."""
    parts = [f"{size_text(cfg.granule)} granule", f"{cfg.ia_bits}-bit IPA"]
    if cfg.start_level is not None:
        side = f" ({cfg.concatenated} tables side by side)" if cfg.concatenated > 1 else ""
        parts.append(f"starts at level {cfg.start_level}{side}")
    if cfg.ds:
        parts.append("DS on")
    if cfg.ha:
        parts.append("HA and HD on" if cfg.hd else "HA on")
    if cfg.s2pie:
        parts.append("S2PIE on")
    if cfg.error:
        parts.append(f"every walk ends in {article(cfg.error)}")
    return f"VMID {cfg.vmid}  VTTBR {cfg.vttbr:#018x}  VTCR {cfg.vtcr:#x}: {', '.join(parts)}"


def article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def leaf_kind(walk: Walk) -> str:
    return "page" if walk.level == 3 else "block"


def walk_line(walk: Walk) -> Line:
    """The outcome in one line."""
    if walk.status:
        allows = f"; the leaf allows {perm_text(walk.perm)}" if 0x0C <= walk.fsc <= 0x0F else ""
        return Line(f"{walk.ipa:#x}   {walk.fault} (FSC {walk.fsc:#04x}){allows}", "yellow")
    if walk.level == -2:
        return Line(f"{walk.ipa:#x} → {walk.pa:#x}   stage 2 is off")
    return Line(f"{walk.ipa:#x} → {walk.pa:#x}   {size_text(walk.size)} {leaf_kind(walk)}, {perm_words(walk.perm)}")


def perm_words(perm: int) -> str:
    words = [word for bit, word in ((1, "readable"), (2, "writable")) if perm & bit]
    execute = {0: [], 4: ["executable at EL1"], 32: ["executable at EL0"], 36: ["executable"]}[perm & 36]
    return ", ".join(words + execute) or "no access"


def explain_lines(cfg: Stage2Config, walk: Walk) -> list[Line]:
    """A traced walk: one line per level, then what is odd, then the outcome."""
    width = max((len(f"{step.table:#x}") for step in walk.steps), default=0)
    digits = max((len(str(step.index)) for step in walk.steps), default=0)
    lines = []
    for step in walk.steps:
        lines.append(Line(f"L{step.level}  {step.table:#{width}x}[{step.index:>{max(digits, 3)}}] = "
                          f"{step_text(cfg, walk, step)}"))
        lines += [Line(f"    {note}", "yellow") for note in step.notes]
    if not walk.steps and walk.status and cfg.error is None:
        lines.append(Line(f"{walk.ipa:#x} is beyond the {cfg.ia_bits}-bit input"))
    return [*lines, walk_line(walk)]


def step_text(cfg: Stage2Config, walk: Walk, step: WalkLevel) -> str:
    if step.desc is None:
        return "no RAM there"
    text = f"{step.desc:#018x}   {step.kind:<7}"
    if step.kind == "table":
        return f"{text} → {step.output:#x}"
    if step.kind in ("page", "block"):
        return f"{text} → {step.output:#x}   {', '.join(leaf_fields(cfg, walk, step))}".rstrip()
    return text.rstrip()


def leaf_fields(cfg: Stage2Config, walk: Walk, step: WalkLevel) -> list[str]:
    """The fields of a leaf descriptor in words; what a fault other than permission hides is not decoded again."""
    perm, named = walk.perm, step.fields
    if walk.status and not 0x0C <= walk.fsc <= 0x0F:
        return [] if named["AF"] else ["AF clear"]
    fields = [("no read or write", "read-only", "write-only", "read-write")[perm & 3],
              {0: "no execute", 4: "execute at EL1", 32: "execute at EL0", 36: "execute"}[perm & 36]]
    if named["AF"]:
        fields.append("AF")
    else:
        fields.append("AF clear (hardware sets it)" if walk.updated else "AF clear")
    if "PIIndex" in named:
        fields.append(f"PIIndex {named['PIIndex']}, {'dirty' if named['Dirty'] else 'clean'}")
    if named.get("DBM"):
        fields.append("DBM")
    fields.append(memattr_text(walk.memattr, cfg.fwb))
    fields.append(SHAREABILITY[walk.sh] + (" (VTCR.SH0)" if cfg.ds else ""))
    if walk.contiguous:
        fields.append("contiguous")
    if named.get("nT"):
        fields.append("nT")
    if named["Software"]:
        fields.append(f"software bits {named['Software']:#x}")
    return fields


def memattr_text(memattr: int, fwb: bool) -> str:
    """MemAttr[3:0] in words, with FWB and without."""
    if fwb:
        if not memattr & 4:
            return DEVICE[memattr & 3]
        return ("Normal (reserved code)", "Normal non-cacheable, or stage 1's Device", "Normal write-back",
                "as stage 1 says")[memattr & 3]
    outer, inner = memattr >> 2, memattr & 3
    if outer == 0:
        return DEVICE[inner]
    if outer == inner:
        return f"Normal {CACHEABILITY[inner]}"
    return f"Normal outer {CACHEABILITY[outer]}, inner {CACHEABILITY[inner]}"


def walk_record(walk: Walk) -> dict[str, Any]:
    """A walk for JSON and CSV; addresses and descriptors in hexadecimal text, as in registers.json."""
    return {"ipa": f"{walk.ipa:#x}", "status": walk.status, "fault": walk.fault, "fsc": walk.fsc, "level": walk.level,
            "pa": f"{walk.pa:#x}", "size": walk.size, "perm": perm_text(walk.perm), "memattr": walk.memattr,
            "sh": walk.sh, "contiguous": walk.contiguous, "updated": walk.updated, "desc": f"{walk.desc:#x}",
            "desc_addr": f"{walk.desc_addr:#x}"}


def step_record(step: WalkLevel) -> dict[str, Any]:
    record = {key: value if value is None or key in ("level", "index", "kind", "notes", "fields") else f"{value:#x}"
              for key, value in asdict(step).items()}
    record["fields"] = {name: f"{value:#x}" for name, value in step.fields.items()}
    return record
