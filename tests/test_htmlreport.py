"""The page of a replay: its HTML read back and compared with the result, and the page in a real browser."""

import copy
import json
import math
import os
import re
import shlex
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from browser import Browser, find_browser
from s2shadow.cli import main, make_parser
from s2shadow.commands.replay import replay_values
from s2shadow.htmlreport import FIGURES, command_line, memslot_text, nice_scale, report_page, write_report
from s2shadow.htmlstyle import STYLE
from s2shadow.memslots import Memslot, parse_memslot
from s2shadow.replay import ReplayConfig, config_dict

DATA = Path(__file__).parent / "data"
RESULTS = {name: json.loads((DATA / "htmlreport" / f"{name}.json").read_text()) for name in ("g2", "a")}
VOID = {"meta", "br", "hr", "img", "input", "link"}
UNITS = {"ns": 1, "µs": 1e3, "ms": 1e6, "s": 1e9}
EVIL = '</script x="</script><script>alert(1)</script><img src=x onerror="alert(1)">\'"&amp;\x00\x1b[31m'


class Page(HTMLParser):
    """A page taken apart; refuses tags that are not closed in order, and a second element of one id."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.ids = [], Counter(), [], []
        self.scripts, self.styles, self.words = [], [], []
        self.tables, self.svgs = {}, []
        self.figure = None
        self.feed(text)
        self.close()
        assert self.open == []
        assert len(self.ids) == len(set(self.ids))

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        assert len(attributes) == len(attrs)
        self.tags[tag] += 1
        self.attributes += [(tag, name, value) for name, value in attrs]
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.table = self.tables.setdefault(attributes.get("id", f"table {len(self.tables)}"), [])
        elif tag == "tr":
            self.table.append([])
        elif tag in ("td", "th"):
            assert tag == "td" or attributes["scope"] in ("row", "col")
            self.table[-1].append("")
        elif tag == "script":
            assert attributes["type"] == "application/json"
            self.scripts.append("")
        elif tag == "figure":
            self.figure = attributes["id"]
        elif tag == "svg":
            self.svgs.append((self.figure, attributes, []))
        elif tag == "path":
            self.svgs[-1][2].append(attributes)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        inside = self.open[-1] if self.open else ""
        if inside == "script":
            self.scripts[-1] += data
        elif inside == "style":
            self.styles.append(data)
        else:
            self.words.append(data)
            if inside in ("td", "th"):
                self.table[-1][-1] += data

    @property
    def text(self):
        return "".join(self.words)

    def paths(self, figure, kind):
        """Paths of a class in the SVGs of a figure, SVG by SVG."""
        return [[each for each in paths if kind in each["class"].split()]
                for name, _, paths in self.svgs if name == figure]


def number(text):
    """A figure as written, as (value, step of its last digit); None for ``-``."""
    if text == "-":
        return None
    digits, _, unit = text.partition(" ")
    plain = digits.replace(",", "").rstrip("%")
    decimals = len(plain.partition(".")[2])
    return float(plain) * UNITS.get(unit, 1), 10.0**-decimals * UNITS.get(unit, 1)


def assert_tells(text, value):
    """``text`` is ``value`` but for rounding."""
    if value is None:
        assert text == "-"
    else:
        told, step = number(text)
        assert abs(told - value) <= 0.51 * step, (text, value)


def leaves(row, path=()):
    """Every figure of a policy by its path; those of a part that was not measured as None."""
    for key, value in row.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        elif key == "ns":
            yield from (((*path, key, part), None) for part in ("p50", "p99", "max", "mean"))
        else:
            yield (*path, key), value


def changed(name, **parts):
    return copy.deepcopy(RESULTS[name]) | parts


def unmeasured():
    """Interrupted before anything happened."""
    result = changed("g2", interrupted=True, largest=[], notes=[],
                     checks={name: [] for name in RESULTS["g2"]["checks"]} | {"passed": True},
                     counts={name: {} for name in RESULTS["g2"]["counts"]})
    for row in result["policies"].values():
        for path, _ in leaves(RESULTS["g2"]["policies"]["blow-away"]):
            inner = row
            for key in path[:-1]:
                if key == "ns":
                    break
                inner = inner[key]
            if "ns" not in path:
                inner[path[-1]] = 0
        row["teardown"]["ns"] = row["tlbi"]["ns"] = None
    result["timeline"] = {"seconds": [], "touches": [], "tlbis": [], "changes": [],
                          "policies": {name: {"live": [], "mapped": []} for name in result["policies"]}}
    return result


def one_point():
    result = unmeasured()
    timeline = result["timeline"]
    for values in (timeline, *timeline["policies"].values()):
        for name in values.keys() - {"policies"}:
            values[name] = [0]
    return result


def no_policy():
    result = unmeasured()
    result["policies"], result["timeline"]["policies"], result["config"]["teardown"] = {}, {}, []
    return result


def other_names():
    """Policies that the page has never heard of, in an order of their own."""
    names = {"blow-away": "interval-map", "reverse-map": "per-page", "blow-away-lean": "none at all"}

    def renamed(rows):
        return {names[name]: rows[name] for name in names}
    result = changed("g2")
    result["policies"] = renamed(result["policies"])
    result["timeline"]["policies"] = renamed(result["timeline"]["policies"])
    for record in result["largest"]:
        record["policies"] = renamed(record["policies"])
    result["config"]["teardown"] = list(names.values())
    return result


def hostile():
    """Every name of the result that somebody else chose is one that breaks pages."""
    result = other_names()
    name = f"none at all{EVIL}"
    for rows in (result["policies"], result["timeline"]["policies"], *(each["policies"] for each in result["largest"])):
        rows[name] = rows.pop("none at all")
    result["config"] |= {"teardown": list(result["policies"]), "trace": f"/x/{EVIL}\udc80", "memory": EVIL}
    result["trace"] |= {"label": EVIL, "truncated": EVIL}
    result["machine"]["cpu"] = EVIL
    result["notes"] = [EVIL]
    for part in result["counts"].values():
        part[EVIL] = 1
    for record in result["largest"]:
        record["event"] = EVIL
    result["checks"]["shadows"][0]["snapshot"] = result["checks"]["counts"][0]["name"] = EVIL
    return result


def uneven():
    """A clock of coarse steps, one policy without host changes, and a trace with gaps."""
    result = changed("g2")
    result["policies"]["reverse-map"]["teardown"]["ns"] = None
    result["policies"]["blow-away"]["tlbi"]["ns"] = dict.fromkeys(("p50", "p99", "max", "mean"), 0.0)
    result["trace"] |= {"lost": 3, "unreadable": 2, "mismatched": 1}
    return result


CASES = {"g2": RESULTS["g2"], "a": RESULTS["a"], "unmeasured": unmeasured(), "one point": one_point(),
         "no policy": no_policy(), "other names": other_names(), "hostile": hostile(), "uneven": uneven()}
PAGES = {name: Page(report_page(result)) for name, result in CASES.items()}
FULL = ("g2", "a", "other names", "hostile", "uneven")
each_case = pytest.mark.parametrize("name", CASES)
each_full = pytest.mark.parametrize("name", FULL)


# --- what the page says ----------------------------------------------------------------------------------------


@each_case
def test_page_asks_for_nothing(name):
    page = PAGES[name]
    assert not page.tags.keys() & {"link", "img", "iframe", "object", "embed", "base", "form", "image", "use", "a"}
    names = {key for _, key, _ in page.attributes}
    assert not [key for key in names if key in ("src", "href", "xlink:href", "srcset", "action") or key[:2] == "on"]
    inline = "".join([*page.styles, *(value for _, key, value in page.attributes if key == "style")])
    assert not re.search(r"url\(|@import|//|expression", inline)
    assert ("meta", "http-equiv", "Content-Security-Policy") in page.attributes
    assert page.tags["h1"] == page.tags["main"] == page.tags["title"] == page.tags["script"] == 1


@each_case
def test_page_holds_the_result(name):
    assert json.loads(PAGES[name].scripts[0]) == CASES[name]


@each_full
def test_every_figure_of_every_policy(name):
    policies = CASES[name]["policies"]
    head, *rows = PAGES[name].tables["figures"]
    assert [shown(text) for text in policies] == head[1:]
    assert len(rows) == len(FIGURES)
    for at, row in enumerate(policies.values()):
        figures = dict(leaves(row))
        assert sorted(figure.path for figure in FIGURES) == sorted(figures)
        for figure, cells in zip(FIGURES, rows, strict=True):
            assert cells[0] == figure.label
            assert_tells(cells[1 + at], figures[figure.path])
            assert (cells[1 + at] == "-") == (figures[figure.path] is None)


def shown(text):
    """A name as the page shows it."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


@pytest.mark.parametrize("name", ["g2", "a", "other names", "uneven"])
def test_table_of_policies(name):
    policies = CASES[name]["policies"]
    head, *rows = PAGES[name].tables["policies"]
    assert [cells[0] for cells in rows] == list(policies)
    for cells, row in zip(rows, policies.values(), strict=True):
        teardown, tlbi = row["teardown"], row["tlbi"]
        values = [row["faults"]["mapped"], row["refaults_needless"], teardown["removed"] + tlbi["removed"],
                  teardown["required"] + tlbi["required"]]
        if teardown["events"]:
            values += [teardown["ns"] and teardown["ns"][key] for key in ("p50", "p99", "max")]
            values.append(row["kernel_steps"] or None)
        values += [tlbi["ns"] and tlbi["ns"][key] for key in ("p50", "p99")]
        assert len(head) == len(cells) == 1 + len(values)
        for text, value in zip(cells[1:], values, strict=True):
            assert_tells(text, value)


def test_ratios():
    head, *rows = PAGES["g2"].tables["ratios"]
    policies = RESULTS["g2"]["policies"]
    base = policies["reverse-map"]
    for cells, row in zip(rows, policies.values(), strict=True):
        told = dict(zip(head, cells, strict=True))
        removed = row["teardown"]["removed"] + row["tlbi"]["removed"]
        assert_tells(told["dropped / required"], removed / (row["teardown"]["required"] + row["tlbi"]["required"]))
        assert_tells(told["faults served"], row["faults"]["mapped"] / base["faults"]["mapped"])
        assert_tells(told["leaves dropped"], removed / base["tlbi"]["removed"])
        for part, label in (("teardown", "host change"), ("tlbi", "TLBI")):
            for key in ("p50", "p99"):
                assert_tells(told[f"{label} {key}"], row[part]["ns"][key] / base[part]["ns"][key])
        assert_tells(told["owed TLB maintenance"], row["owed_tlbis"] / base["owed_tlbis"])


def test_ratios_without_a_base():
    """Nothing to divide by: no ratio, rather than a made-up one."""
    result = changed("g2")
    result["policies"]["reverse-map"]["faults"]["mapped"] = 0
    head, *rows = Page(report_page(result)).tables["ratios"]
    assert [cells[head.index("faults served")] for cells in rows] == ["-"] * len(rows)
    assert head[1:] != Page(report_page(RESULTS["a"])).tables["ratios"][0][1:], "no host changes, no such columns"


def test_host_changes():
    page = PAGES["g2"]
    for at, record in enumerate(RESULTS["g2"]["largest"]):
        assert f"{record['start']:#x}" in page.text
        head, *rows = [table for name, table in page.tables.items() if name.startswith("table ")][at]
        assert head[0] == "policy"
        for cells, (name, done) in zip(rows, record["policies"].items(), strict=True):
            assert cells[0] == name
            for text, key in zip(cells[1:], ("removed", "required", "ns", "kernel_steps", "owed"), strict=True):
                assert_tells(text, done[key])
    assert "524,288 stage-2 unmap calls" in page.text


def test_checks_counts_and_notes():
    result, page = RESULTS["g2"], PAGES["g2"]
    head, *rows = page.tables["snapshots"]
    assert len(rows) == sum(len(result["checks"][kind]) for kind in ("tables", "hosts", "shadows"))
    assert {cells[-1] for cells in rows} == {"same"}
    worse = changed("g2")
    worse["checks"]["shadows"][1]["other_pa"] = 2
    assert [cells[-1] for cells in Page(report_page(worse)).tables["snapshots"]].count("differs") == 1
    for kind, counts in result["counts"].items():
        assert [(name, number(text)[0]) for name, text in page.tables[f"counts-{kind}"][1:]] == list(counts.items())
    assert all(note in page.text for note in result["notes"])
    assert "the tracer lost 3 events" in PAGES["uneven"].text


def test_partial_results_say_so():
    assert "Interrupted" in PAGES["unmeasured"].text
    assert "Nothing was timed." in PAGES["unmeasured"].text
    for name in ("unmeasured", "one point", "no policy"):
        assert "ended before anything happened" in PAGES[name].text
        assert PAGES[name].svgs == []
    assert "No policy was replayed." in PAGES["no policy"].text


def test_hostile_names_stay_text():
    page, tame = PAGES["hostile"], PAGES["other names"]
    assert page.text.count(shown(EVIL)) >= 10
    extra = page.tags - tame.tags
    assert extra.keys() <= {"tr", "th", "td", "li", "p"}, "rows for the names added, nothing else"
    report_page(hostile()).encode("utf-8", "replace").decode("utf-8")


# --- what the figures show -------------------------------------------------------------------------------------


def corners(path):
    """Corners of a stepped line, from its M, H and V."""
    at, points = [0.0, 0.0], []
    for letter, values in re.findall(r"([MHV])([-\d. e+]+)", path["d"]):
        numbers = [float(value) for value in values.split()]
        if letter == "M":
            at = numbers
        else:
            at[letter == "V"] = numbers[0]
        points.append(tuple(at))
    return points


@pytest.mark.parametrize("name", ["g2", "a", "other names"])
@pytest.mark.parametrize(("figure", "key"), [("live", "live"), ("served", "mapped")])
def test_time_line_is_the_results(name, figure, key):
    timeline = CASES[name]["timeline"]
    seconds = timeline["seconds"]
    [paths] = [[each for each in paths if re.fullmatch(r"s\d", each["class"])]
               for chart, _, paths in PAGES[name].svgs if chart == figure]
    assert len({each["class"] for each in paths}) == len(paths) == len(timeline["policies"])
    highest = max(max(row[key]) for row in timeline["policies"].values())
    tops = []
    for path, row in zip(paths, timeline["policies"].values(), strict=True):
        points = corners(path)
        assert points[0][0] == 0 and points[-1][0] == pytest.approx(1000)
        assert all(a[0] <= b[0] for a, b in pairwise(points))
        drawn = [value_at(points, 1000 * (at - seconds[0]) / (seconds[-1] - seconds[0])) for at in seconds]
        units = max(row[key]) and (1000 - min(y for _, y in points)) / max(row[key])
        tops.append(1000 / units)
        assert drawn == pytest.approx([1000 - units * value for value in row[key]], abs=0.02)
    assert tops == pytest.approx([tops[0]] * len(tops), rel=1e-4), "one scale for all"
    assert 1 <= tops[0] / highest <= 2


def value_at(points, x):
    """Where a stepped line is after the corners up to ``x``, but for rounding."""
    return [y for at, y in points if at <= x + 0.006][-1]


def test_host_changes_are_marked():
    [marks] = PAGES["g2"].paths("live", "mark")
    seconds = RESULTS["g2"]["timeline"]["seconds"]
    wanted = [record["seconds"] for record in RESULTS["g2"]["largest"] if record["policies"]["blow-away"]["removed"]]
    assert [float(re.match(r"M([\d.]+)", mark["d"])[1]) for mark in marks] == pytest.approx(
        [1000 * (at - seconds[0]) / (seconds[-1] - seconds[0]) for at in wanted], abs=0.01)
    assert len(marks) == 1
    changes = [0, *RESULTS["g2"]["timeline"]["changes"]]
    assert len(PAGES["g2"].paths("events", "tick")[0]) == sum(a < b for a, b in pairwise(changes))


@pytest.mark.parametrize(("name", "part"), [("g2", "teardown"), ("g2", "tlbi"), ("a", "tlbi")])
def test_latencies_are_to_scale(name, part):
    """Equal factors are equal ways, in every strip alike."""
    points = []
    rows = [row[part]["ns"] for row in RESULTS[name]["policies"].values()]
    figure = f"latency-{part}"
    for kind in ("p50", "mean", "p99", "max"):
        strips = PAGES[name].paths(figure, kind)
        for [path], ns in zip(strips, rows, strict=True):
            points.append((math.log10(ns[kind]), float(re.match(r"M([\d.]+)", path["d"])[1])))
    (a, xa), (b, xb) = min(points), max(points)
    assert 0 <= xa < xb <= 1000
    for value, x in points:
        assert x == pytest.approx(xa + (value - a) * (xb - xa) / (b - a), abs=0.05)


def test_no_latency_figure_where_nothing_was_timed():
    assert "latency-teardown" not in PAGES["a"].ids
    assert [len(strip) for strip in PAGES["uneven"].paths("latency-teardown", "range")] == [1, 1, 1]
    for strip in PAGES["uneven"].paths("latency-tlbi", "p50"):
        assert float(re.match(r"M([\d.]+)", strip[0]["d"])[1]) >= 0, "0 ns stands at the left end"


def test_refaults_are_to_scale():
    bars = PAGES["g2"].paths("refaults", "bar")
    ends = []
    for paths, row in zip(bars, RESULTS["g2"]["policies"].values(), strict=True):
        (kept_from, kept_to), (needless_from, needless_to) = (
            map(float, re.match(r"M([\d.]+) 200H([\d.]+)V", path["d"]).groups()) for path in paths)
        served, needless = row["faults"]["mapped"], row["refaults_needless"]
        assert kept_from == 0 and kept_to == needless_from
        assert needless_to - needless_from == pytest.approx(needless_to * needless / served, abs=0.02)
        ends.append(needless_to / served)
    assert ends == pytest.approx([ends[0]] * len(ends), rel=1e-4)


@given(st.one_of(st.integers(0, 1 << 62), st.floats(1e-6, 1e18)))
def test_scale_holds_its_values(highest):
    scale, ticks = nice_scale(highest)
    assert ticks[0] == 0
    assert 3 <= len(ticks) <= 6
    assert highest <= ticks[-1] * (1 + 1e-9)
    assert highest == 0 or ticks[-1] <= 2 * highest * (1 + 1e-9)
    assert -0.01 <= scale.at(highest) <= 1000.01


# --- colours ---------------------------------------------------------------------------------------------------


def luminance(colour):
    parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_stand_out(scheme):
    """WCAG 2: text 4.5:1, shapes 3:1."""
    light, dark = STYLE.split("prefers-color-scheme: dark")
    colours = dict(re.findall(r"--([\w]+): (#[0-9a-f]{6})", light if scheme == "light" else dark))
    back = colours.pop("back")
    assert {"text", "soft", "warning", "green", "blue", "vermilion", "purple", "orange", "grey"} <= colours.keys()
    for name in ("text", "soft", "warning"):
        assert contrast(colours[name], back) >= 4.5, name
    assert contrast(colours["text"], colours["box"]) >= 4.5
    for name in ("green", "blue", "vermilion", "purple", "orange", "grey"):
        assert contrast(colours[name], back) >= 3, name


# --- command and file ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [
    ReplayConfig("trace.txt"),
    ReplayConfig("my traces/it's.txt", memory="a b/00_early", role="l1", tlbi="kvm72", vcpus=3, contexts=9),
    ReplayConfig("$(reboot).gz", role="l0", teardown=("blow-away", "reverse-map"),
                 memslots=(Memslot(0, 0x7F00_0000_0000, 0x4000_0000), Memslot(1 << 32, 1 << 40, 4096))),
])
def test_command_runs_the_same_again(config):
    words = shlex.split(command_line(config_dict(config)))
    assert words[0] == "s2shadow"
    options = make_parser().parse_args(words[1:])
    assert config_dict(ReplayConfig(**replay_values(options))) == config_dict(config)
    assert options.report.endswith(".html")


def test_command_is_on_the_page():
    assert command_line(RESULTS["g2"]["config"]) in PAGES["g2"].text
    assert command_line(RESULTS["g2"]["config"]) == (
        "s2shadow replay g2_nested_notifier_7.2 --role l0 --teardown reverse-map,interval-map,blow-away,blow-away-lean "
        "--tlbi exact --report report.html")


def test_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "page.html"
    write_report(RESULTS["a"], file)
    before = file.read_bytes()
    broken = changed("a")
    broken["trace"]["seconds"] = math.nan
    with pytest.raises(ValueError, match="JSON"):
        write_report(broken, file)
    assert file.read_bytes() == before == report_page(RESULTS["a"]).encode()
    write_report(hostile(), file)
    assert Page(file.read_text("utf-8")).tags == PAGES["hostile"].tags
    assert os.listdir(tmp_path) == ["page.html"]


def test_command_writes_the_page(tmp_path, capsys):
    """The page and the JSON of one replay are of the same figures."""
    page, data = tmp_path / "out.html", tmp_path / "out.json"
    code = main(["replay", str(DATA / "traces" / "g2.trace.txt.xz"), "--report", str(page), "--json", str(data)])
    result = json.loads(data.read_text())
    assert code == 0
    read = Page(page.read_text("utf-8"))
    assert json.loads(read.scripts[0]) == result
    assert [cells[0] for cells in read.tables["policies"][1:]] == result["config"]["teardown"]
    terminal = capsys.readouterr().out
    for cells in read.tables["policies"]:
        assert re.search(r"\s{2,}".join(map(re.escape, cells)) + "$", terminal, re.MULTILINE)


# --- in a browser ----------------------------------------------------------------------------------------------

MEASURE = """(() => {
  const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.width, r.height]; };
  document.querySelectorAll('details').forEach(e => { e.open = true; });
  const outside = [...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll') && !e.closest('svg'))
    .filter(e => { const r = e.getBoundingClientRect(); return r.width && (r.left < 0 || r.right > innerWidth + .5); });
  const labels = kind => [...document.querySelectorAll(kind)].map(e => [...e.querySelectorAll('span')].map(box));
  return {
    width: innerWidth, scroll: document.documentElement.scrollWidth,
    outside: outside.map(e => e.outerHTML.slice(0, 120)),
    svgs: [...document.querySelectorAll('svg')].map(box),
    drawn: [...document.querySelectorAll('svg path[class^=s]')].map(e => getComputedStyle(e).stroke),
    bottoms: labels('.bottom'), lefts: labels('div.left'),
    tables: Object.fromEntries([...document.querySelectorAll('table[id]')].map(
      t => [t.id, [...t.rows].map(r => [...r.cells].map(c => c.textContent))])),
    tall: [...document.querySelectorAll('td')].every(e => e.getBoundingClientRect().height > 0),
    back: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
    images: document.images.length,
    even: [...document.querySelectorAll('path')].every(e => getComputedStyle(e).vectorEffect == 'non-scaling-stroke'),
    result: document.getElementById('result').textContent,
  };
})()"""


@pytest.fixture(scope="module")
def browser():
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium (Debian package chromium): the page is not tried in a browser")
    each = Browser(program)
    yield each
    each.close()


def rgb(scheme, name):
    light, dark = STYLE.split("prefers-color-scheme: dark")
    colour = dict(re.findall(r"--([\w]+): (#[0-9a-f]{6})", light if scheme == "light" else dark))[name]
    return f"rgb({int(colour[1:3], 16)}, {int(colour[3:5], 16)}, {int(colour[5:], 16)})"


def apart(boxes, axis):
    """No label of an axis covers its neighbour."""
    spans = sorted((box[axis], box[axis] + box[axis + 2]) for box in boxes)
    return all(a[1] <= b[0] for a, b in pairwise(spans))


PHONE, DESK = (360, 800), (1280, 900)
VIEWS = [(name, size, scheme) for name in CASES for size in (PHONE, DESK) for scheme in ("light", "dark")
         if name in RESULTS or (size == PHONE) == (scheme == "light")]


@pytest.mark.parametrize(("name", "size", "scheme"), VIEWS, ids=str)
def test_page_in_a_browser(browser, tmp_path, name, size, scheme):
    file = tmp_path / "page.html"
    write_report(CASES[name], file)
    browser.open(file, *size, scheme)
    seen = browser.evaluate(MEASURE)
    assert browser.messages == []
    assert browser.requests == [file.as_uri()]
    assert (seen["width"], seen["scroll"]) == (size[0], size[0]), "the page itself never scrolls sideways"
    assert seen["outside"] == []
    assert seen["images"] == 0
    assert (seen["back"], seen["ink"]) == (rgb(scheme, "back"), rgb(scheme, "text"))
    assert len(seen["svgs"]) == len(PAGES[name].svgs)
    assert all(left >= 0 and left + width <= size[0] and width > 200 and height > 15
               for left, _, width, height in seen["svgs"])
    assert seen["tables"] == {key: rows for key, rows in PAGES[name].tables.items() if not key.startswith("table ")}
    assert json.loads(seen["result"]) == CASES[name]
    assert seen["tall"]
    assert seen["even"], "lines are as thick however wide the figure is"
    assert all(apart(boxes, 0) for boxes in seen["bottoms"])
    assert all(apart(boxes, 1) and all(box[3] < 20 for box in boxes) for boxes in seen["lefts"])
    if name == "g2":
        assert set(seen["drawn"]) == {rgb(scheme, colour)
                                      for colour in ("green", "blue", "vermilion", "purple", "grey", "orange")}
        assert browser.screenshot().startswith(b"\x89PNG")


def test_browser_shows_what_it_should_complain_of(browser, tmp_path):
    """The checks above can fail: a page that asks for something and logs is found out."""
    file = tmp_path / "page.html"
    file.write_text('<!DOCTYPE html><title>x</title><img src="none.png"><script>console.error("seen")</script>')
    browser.open(file, 360, 800, "light")
    assert len(browser.requests) == 2
    assert browser.messages


@pytest.mark.parametrize("vm", [0, 3])
def test_memory_slots_are_written_as_they_are_read(vm):
    """The command that repeats a replay names each slot whole."""
    slot = Memslot(0x4000_0000, 0xFFFF_77E0_0000, 0x1800_0000, vm)
    (told,) = config_dict(ReplayConfig(trace="x", memslots=(slot,)))["memslots"]
    assert parse_memslot(memslot_text(told)) == slot
