"""Replay: samples of real traces against the captured tables, and what it counts against a plain model."""

import json
import lzma
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2shadow import replay
from s2shadow.capture import CaptureError
from s2shadow.lanes import Distribution
from s2shadow.memslots import Memslot
from s2shadow.replay import POINTS, ReplayConfig, run, unexplained
from s2shadow.storm import POLICIES
from s2shadow.trace import TraceError
from tracetext import Trace

DATA = Path(__file__).parent / "data"
SAMPLES = {"a_storm": "a_storm_max_7.2", "b_thp": "b_linux_l2_thp_7.2", "c_lpa2": "c_storm_lpa2_7.2",
           "d_vmids": "d_vmid_rollover_nvhe_7.2", "g2_notifier": "g2_nested_notifier_7.2"}
WHOLE = ["a_storm_max_7.2", "b_linux_l2_thp_7.2", "b2_linux_l2_4k_7.2", "c_storm_lpa2_7.2", "d_vmid_rollover_nvhe_7.2",
         "g2_nested_notifier_7.2"]
STEPS = 1 << 18                     # of 1 GiB in 48 bits: what Linux spends on one shadow
PAGE = 4096
GUEST, HOST_VA, PAGES = 0x4000_0000, 0x7F00_0000_0000, 24


def compose(folder, sample):
    """A capture folder of a sample's files and the snapshots that belong to it."""
    folder.mkdir()
    for source in [*(DATA / "replay" / sample).iterdir(), *(DATA / "captures" / SAMPLES[sample]).glob("[0-9]*")]:
        (folder / source.name).symlink_to(source)
    return folder


@pytest.fixture(scope="module")
def captures(tmp_path_factory):
    base = tmp_path_factory.mktemp("captures")
    return {sample: compose(base / sample, sample) for sample in SAMPLES}


@pytest.fixture(scope="module")
def results(captures):
    """Each sample replayed once, with every policy."""
    known = {}

    def result(sample):
        if sample not in known:
            known[sample] = run(ReplayConfig(captures[sample]))
        return known[sample]
    return result


# --- samples ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample, snapshots, pages", [
    ("a_storm", 16, 1_563_411), ("b_thp", 3, 78_338), ("c_lpa2", 12, 329_447), ("d_vmids", 221, 8_228)])
def test_l1_tables_are_those_of_the_next_snapshot(results, sample, snapshots, pages):
    result = results(sample)
    assert result["config"]["role"] == "l1"
    tables = result["checks"]["tables"]
    assert len(tables) == snapshots
    assert sum(row["pages"] for row in tables) == pages
    for row in tables:
        assert unexplained(row) <= row["under_way"], row
        assert row["equal_leaves"] == row["leaves"] > 0
    assert result["checks"]["passed"] and not result["interrupted"]


def test_l0_table_and_shadows_are_those_of_the_next_snapshot(results):
    result = results("g2_notifier")
    assert result["config"]["role"] == "l0"
    assert [row["snapshot"] for row in result["checks"]["hosts"]] == ["early", "populated"]
    assert [row["leaves"] for row in result["checks"]["shadows"]] == [15, 5683]
    for row in result["checks"]["hosts"] + result["checks"]["shadows"]:
        assert unexplained(row) == 0 and row["pages"] > 0, row
    applied = result["counts"]["applied"]
    assert applied["faults of L2 answered otherwise"] == 0
    assert applied["faults of L2 answered as recorded"] > 20_000
    assert result["checks"]["passed"]


def test_the_event_that_made_linux_unmap_half_a_million_times(results):
    """One page taken from L1: what the real host did, what blow-away says Linux does, and what had to be done."""
    result = results("g2_notifier")
    event = result["largest"][0]
    assert event["event"] == "CLEAR" and event["end"] - event["start"] == 2 << 20
    assert event["linux_unmaps"] == 2 * STEPS
    for policy in ("blow-away", "blow-away-lean"):
        done = event["policies"][policy]
        assert done["kernel_steps"] == 2 * STEPS and done["required"] == 0 and done["removed"] > 7000
    assert event["policies"]["reverse-map"]["removed"] == event["policies"]["reverse-map"]["kernel_steps"] == 0
    rows = result["policies"]
    assert rows["reverse-map"]["refaults_needless"] == rows["reverse-map"]["dropped_needlessly"] == 0
    assert rows["blow-away"]["refaults_needless"] > 3000
    assert rows["blow-away"]["kernel_flushes"] == 2 * STEPS
    assert (rows["blow-away"]["faults"]["mapped"] - rows["reverse-map"]["faults"]["mapped"]
            == rows["blow-away"]["refaults_needless"])


@pytest.mark.parametrize("sample", SAMPLES)
def test_policies_agree_on_what_is_mapped(results, sample):
    result = results(sample)
    assert list(result["policies"]) == result["config"]["teardown"] == list(POLICIES)
    assert all(row["different"] == 0 for row in result["checks"]["same_mapping"])
    if sample != "d_vmids":             # there, all VMs are gone at the end
        assert sum(row["pages"] for row in result["checks"]["same_mapping"]) > 0
    base = result["policies"]["reverse-map"]
    for name, row in result["policies"].items():
        assert sum(count for kind, count in row["faults"].items() if kind != "total") == row["faults"]["total"]
        assert row["faults"]["total"] == base["faults"]["total"], name
        assert row["faults"]["mapped"] - base["faults"]["mapped"] == row["refaults_needless"]
        assert not any(row["faults"][kind] for kind in ("host_fault", "mmio", "retry", "no_memory"))
        assert row["teardown"]["removed"] >= row["teardown"]["required"]


def test_counts_are_those_of_the_capture(results):
    counts = {row["name"]: row for row in results("d_vmids")["checks"]["counts"]}
    assert {"map", "kvm_guest_fault", "destroy", "TLBI vaale1is el1", "TLBI alle1is el2", "VTTBR"} <= counts.keys()
    assert not {"kvm_entry", "ENTRY"} & counts.keys()       # left out of the text, thinned out in the CSV
    assert all(row["recorded"] == row["expected"] for row in counts.values())


def test_counts_that_differ_are_told(captures, tmp_path):
    folder = tmp_path / "capture"
    folder.mkdir()
    for source in captures["d_vmids"].iterdir():
        if source.name != "checks.json":
            (folder / source.name).symlink_to(source)
    checks = json.loads((captures["d_vmids"] / "checks.json").read_text())
    checks["ftrace"]["map"] += 1
    (folder / "checks.json").write_text(json.dumps(checks))
    result = run(ReplayConfig(folder, teardown=("reverse-map",)))
    assert [row["name"] for row in result["checks"]["counts"] if row["recorded"] != row["expected"]] == ["map"]
    assert not result["checks"]["passed"]


def test_tables_that_differ_are_told(captures, tmp_path):
    """A map that the trace does not have: its block is in the captured table only."""
    folder = tmp_path / "capture"
    folder.mkdir()
    for source in captures["b_thp"].iterdir():
        if not source.name.startswith("trace"):
            (folder / source.name).symlink_to(source)
    lines = lzma.open(captures["b_thp"] / "trace.txt.xz", "rt").readlines()
    del lines[next(at for at, line in enumerate(lines) if " map: " in line and "size=0x200000" in line)]
    (folder / "trace.txt").write_text("".join(lines))
    result = run(ReplayConfig(folder, teardown=("reverse-map",)))
    assert [row["only_tables"] for row in result["checks"]["tables"]] == [512] * 3
    assert not result["checks"]["passed"]


def test_kvm72_drops_more(captures, results):
    exact = results("a_storm")["policies"]["reverse-map"]
    loose = run(ReplayConfig(captures["a_storm"], teardown=("reverse-map",), tlbi="kvm72"))
    assert loose["checks"]["passed"]
    row = loose["policies"]["reverse-map"]
    assert row["tlbi"]["removed"] > row["tlbi"]["required"] > 0 == exact["dropped_needlessly"]
    assert row["refaults_needless"] == row["faults"]["mapped"] - exact["faults"]["mapped"]


def test_a_trace_without_a_csv(captures, tmp_path):
    """The flush probes stand for the TLBIs, and what the workload wrote for the snapshots."""
    folder = tmp_path / "capture"
    folder.mkdir()
    for source in captures["b_thp"].iterdir():
        if not source.name.startswith("tlbi"):
            (folder / source.name).symlink_to(source)
    result = run(ReplayConfig(folder, teardown=("reverse-map",)))
    assert [row["snapshot"] for row in result["checks"]["tables"]] == ["booting", "booted", "work1"]
    assert result["checks"]["passed"]
    assert any("flush probes" in note for note in result["notes"])


def test_a_csv_alone(captures):
    result = run(ReplayConfig(captures["a_storm"] / "tlbi.csv.xz", teardown=("reverse-map",)))
    assert result["policies"]["reverse-map"]["tlbi"]["operations"] > 20_000
    assert result["policies"]["reverse-map"]["faults"]["total"] == 0


def test_a_text_alone_over_captured_tables(captures, results):
    """What a user has: one file, and a snapshot that says what L1's tables were."""
    result = run(ReplayConfig(captures["a_storm"] / "trace.txt.xz", memory=captures["a_storm"] / "01_populated",
                              teardown=("reverse-map",)))
    whole = results("a_storm")
    edits = "edits of L1's tables"
    assert result["counts"]["applied"][edits] == whole["counts"]["applied"][edits]
    mapped, expected = (r["policies"]["reverse-map"]["faults"]["mapped"] for r in (result, whole))
    assert abs(mapped - expected) < expected / 100


@pytest.mark.parametrize("capture", WHOLE)
def test_whole_captures(capture):
    folder = os.environ.get("S2SHADOW_CAPTURES")
    if not folder:
        pytest.skip("S2SHADOW_CAPTURES does not name the folder of the captures")
    result = run(ReplayConfig(Path(folder) / capture, teardown=("reverse-map",)))
    checks = result["checks"]
    tables = checks["tables"] + checks["hosts"] + checks["shadows"]
    assert checks["passed"], [row for row in tables if unexplained(row)]
    assert checks["tables"] or checks["shadows"]
    assert len(checks["counts"]) > 20


# --- what is counted, against a plain model --------------------------------------------------------------------


class Model:
    """Pages, sets and loops: what the exact reverse map and one other policy hold."""

    def __init__(self, drops_all):
        self.drops_all = drops_all
        self.exact, self.held = set(), set()
        self.hits = self.mapped = self.needless = self.removed = self.required = 0
        self.tlbi_removed = self.events = self.steps = 0

    def touch(self, page):
        if page in self.held:
            self.hits += 1
        else:
            self.mapped += 1
            self.needless += page in self.exact
        self.exact.add(page)
        self.held.add(page)

    def host_change(self, pages, contexts):
        self.events += 1
        self.required += len(self.held & pages)
        self.removed += len(self.held if self.drops_all else self.held & pages)
        self.steps += STEPS * contexts if self.drops_all else 0
        self.exact -= pages
        self.held = set() if self.drops_all else self.held - pages

    def tlbi(self, pages):
        self.tlbi_removed += len(self.held & pages)
        self.exact -= pages
        self.held -= pages


pages_of = st.integers(0, PAGES - 1)
nested_steps = st.lists(st.one_of(
    st.tuples(st.just("fault"), st.integers(0, 1), pages_of),
    st.tuples(st.just("unmap"), st.integers(-3, PAGES + 2), st.integers(1, 6)),
    st.tuples(st.just("tlbi"), st.integers(0, 1), pages_of),
    st.tuples(st.just("leave"), st.integers(0, 1), st.just(0))), max_size=60)


@settings(max_examples=40)
@given(nested_steps)
def test_refaults_of_a_nested_host(tmp_path_factory, steps):
    """A trace of an L0 without probes: each fault makes a leaf, notifiers come through the memory slot."""
    trace = Trace()
    models = {name: Model(name.startswith("blow-away")) for name in POLICIES if name != "interval-map"}
    inside = [True, True]
    for vcpu in (0, 1):
        trace.enter_l2(vcpu)
    for what, one, two in steps:
        if what == "fault":
            trace.fault(one, GUEST + two * PAGE)
            for model in models.values():
                if inside[one]:
                    model.touch(two)
        elif what == "unmap":
            trace.unmap_hva(HOST_VA + one * PAGE, HOST_VA + (one + two) * PAGE)
            pages = set(range(one, one + two)) & set(range(PAGES))
            for model in models.values():
                if pages:
                    model.host_change(pages, 1)
        elif what == "tlbi":
            trace.tlbi_ipa(one, GUEST + two * PAGE)
            for model in models.values():
                model.tlbi({two})
        else:
            (trace.exit_l2 if inside[one] else trace.enter_l2)(one)
            inside[one] = not inside[one]
    file = trace.write(tmp_path_factory.mktemp("trace") / "trace.txt")
    result = run(ReplayConfig(file, memslots=(Memslot(GUEST, HOST_VA, PAGES * PAGE),)))
    assert result["config"]["role"] == "l0"
    for name, model in models.items():
        row = result["policies"][name]
        assert (row["faults"]["hit"], row["faults"]["mapped"]) == (model.hits, model.mapped), name
        assert row["refaults_needless"] == model.needless
        assert row["teardown"]["events"] == model.events
        assert (row["teardown"]["removed"], row["teardown"]["required"]) == (model.removed, model.required)
        assert row["tlbi"]["removed"] == row["tlbi"]["required"] == model.tlbi_removed
        assert (row["kernel_steps"], row["live"]) == (model.steps, len(model.held))
        assert row["dropped_needlessly"] == model.removed - model.required
    other = result["policies"]["interval-map"]
    assert other["teardown"]["required"] <= other["teardown"]["removed"]
    assert other["refaults_needless"] <= result["policies"]["blow-away"]["refaults_needless"]
    assert result["checks"]["same_mapping"][0]["different"] == 0


plain_steps = st.lists(st.one_of(
    st.tuples(st.just("fault"), st.integers(0, 1), pages_of),
    st.tuples(st.just("unmap"), st.integers(-3, PAGES + 2), st.integers(1, 6))), min_size=1, max_size=40)


@settings(max_examples=25)
@given(plain_steps)
def test_a_plain_host_that_plays_l1(tmp_path_factory, steps):
    """Without probes: a fault is L1's to resolve, ``kvm_unmap_hva_range`` is its unmap and its flush."""
    trace = Trace()
    table, held, hits, mapped, forwarded, removed = set(), set(), 0, 0, 0, 0
    for what, one, two in steps:
        if what == "fault":
            trace.fault(one, GUEST + two * PAGE)
            if two in held:
                hits += 1
            elif two in table:
                mapped += 1
            else:
                forwarded += 1
                mapped += 1
            table.add(two)
            held.add(two)
        else:
            trace.unmap_hva(HOST_VA + one * PAGE, HOST_VA + (one + two) * PAGE)
            pages = set(range(one, one + two))
            removed += len(held & pages)
            table -= pages
            held -= pages
    file = trace.write(tmp_path_factory.mktemp("trace") / "trace.txt")
    result = run(ReplayConfig(file, memslots=(Memslot(GUEST, HOST_VA, PAGES * PAGE),), teardown=("blow-away",)))
    assert result["config"]["role"] == "l1"
    row = result["policies"]["blow-away"]
    assert (row["faults"]["hit"], row["faults"]["mapped"], row["faults"]["l1_fault"]) == (hits, mapped, forwarded)
    assert (row["tlbi"]["removed"], row["live"]) == (removed, len(held))


# --- what the roles do with single events ----------------------------------------------------------------------

ROOT = 0x8000_0000


def play(tmp_path, trace, **options):
    return run(ReplayConfig(trace.write(tmp_path / "trace.txt"), **options))


def test_l1_faults_are_passed_on_and_touched_again(tmp_path):
    trace = Trace()
    trace.fault(0, GUEST)
    trace.map(ROOT, GUEST, 0x9000_0000)
    trace.fault(0, GUEST + PAGE)                # another vCPU had mapped it: no map follows
    trace.fault(0, GUEST, write=True)
    row = play(tmp_path, trace, role="l1", teardown=("reverse-map",))["policies"]["reverse-map"]
    assert (row["faults"]["l1_fault"], row["faults"]["mapped"], row["faults"]["hit"]) == (2, 1, 1)


def test_l1_comes_back_only_after_the_flush(tmp_path):
    """relax_perms flushes before L2 runs again: the leaf with the new permission must survive."""
    trace = Trace()
    trace.fault(0, GUEST)
    trace.map(ROOT, GUEST, 0x9000_0000, prot=0xB)
    trace.fault(0, GUEST, write=True)
    trace.probe("relax", f"pgd=0x{ROOT:x} ipa=0x{GUEST:x} prot=0x4")
    trace.probe("tlb_ipa_nsh", f"pgd=0x{ROOT:x} ipa=0x{GUEST:x} level=3")
    trace.fault(0, GUEST, write=True)
    row = play(tmp_path, trace, role="l1", teardown=("reverse-map",))["policies"]["reverse-map"]
    assert (row["faults"]["l1_fault"], row["faults"]["mapped"], row["faults"]["hit"]) == (2, 2, 1)
    assert (row["tlbi"]["removed"], row["live"]) == (1, 1)


def test_l0_learns_what_l1_maps(tmp_path):
    """L0's own map says what backs L1, its answer to a fault of L2 which page of L1 that is, and at what level."""
    trace = Trace()
    own, shadow = 0x1_0000_0000, 0x1_0001_0000
    block, backed = 0x4020_0000, 0x2_0020_0000
    trace.map(own, block, backed, size=2 << 20)
    trace.enter_l2(0)
    ipa = 0x1000_0000
    trace.fault(0, ipa)
    trace.map(shadow, ipa, backed, size=2 << 20, prot=0xF | 2 << 55)
    trace.fault(0, ipa + (1 << 20))             # the same leaf
    trace.fault(0, 0x2000_0000)
    trace.probe("s2_fault_inject", "esr=0x92000007")
    trace.exit_l2(0)
    trace.fault(0, 0x0900_0000)                 # L1's own
    result = play(tmp_path, trace, teardown=("reverse-map",))
    row = result["policies"]["reverse-map"]
    assert (row["faults"]["mapped"], row["faults"]["hit"], row["faults"]["l1_fault"]) == (1, 1, 1)
    assert row["live"] == 1
    assert result["counts"]["skipped"]["faults of L1 itself"] == 1
    assert result["counts"]["applied"]["faults of L2 answered as recorded"] == 2


def test_l0_logs_dirty_pages(tmp_path):
    """A slot with logging: a leaf loses W, and the next write has to be served; reading the log protects again."""
    trace = Trace()
    own = 0x1_0000_0000
    slot = f"slot=0x0 flags=0x%x gpa=0x{GUEST:x} size=0x{PAGES * PAGE:x} hva=0x{HOST_VA:x}"
    trace.probe("memslot", slot % 0)
    trace.enter_l2(0)
    trace.fault(0, GUEST, write=True)
    trace.fault(0, GUEST, write=True)           # a hit
    trace.probe("memslot", slot % 1)
    trace.fault(0, GUEST, write=True)
    trace.fault(0, GUEST, write=True)           # a hit
    trace.probe("wrprotect", f"pgd=0x{own:x} ipa=0x{GUEST:x} size=0x1000")
    trace.fault(0, GUEST, write=True)
    trace.probe("memslot", slot % 0)
    trace.probe("age", f"pgd=0x{own:x} ipa=0x{GUEST:x} size=0x1000 mkold=1")
    result = play(tmp_path, trace, teardown=("reverse-map",))
    row = result["policies"]["reverse-map"]
    assert (row["faults"]["mapped"], row["faults"]["hit"]) == (3, 2)
    applied = result["counts"]["applied"]
    assert (applied["dirty logging switched"], applied["dirty logs read"], applied["aging"]) == (2, 1, 1)


def test_l0_slot_that_goes_takes_its_pages(tmp_path):
    trace = Trace()
    for size in (PAGES * PAGE, 0):
        trace.probe("memslot", f"slot=0x0 flags=0x0 gpa=0x{GUEST:x} size=0x{size:x} hva=0x{HOST_VA:x}")
        if size:
            trace.enter_l2(0)
            trace.fault(0, GUEST)
    result = play(tmp_path, trace, teardown=("reverse-map", "blow-away"))
    assert result["largest"][0]["event"] == "MEMSLOT"
    assert all(row["teardown"]["removed"] == 1 and row["live"] == 0 for row in result["policies"].values())


def test_notifiers_seen_twice_count_once(tmp_path):
    trace = Trace()
    trace.enter_l2(0)
    trace.fault(0, GUEST)
    trace.add(f"mn_start: (x+0x0/0x10) start=0x{HOST_VA:x} end=0x{HOST_VA + PAGE:x} event=1", "kswapd0", 50)
    trace.unmap_hva(HOST_VA, HOST_VA + PAGE)
    result = play(tmp_path, trace, teardown=("blow-away",), memslots=(Memslot(GUEST, HOST_VA, PAGES * PAGE),))
    assert result["policies"]["blow-away"]["teardown"]["events"] == 1
    assert result["largest"][0]["event"] == "CLEAR"


def test_traces_of_several_machines(tmp_path):
    """Two processes, each an L1 of its own; slots say by number whose they are."""
    trace = Trace()
    for process in (100, 200):
        trace.enter_l2(0)
        trace.fault(0, GUEST)
        trace.lines[-2:] = [re.sub(r"-100 *", f"-{process + 1} ({process:7}) ", line) for line in trace.lines[-2:]]
    trace.unmap_hva(HOST_VA + (1 << 30), HOST_VA + (1 << 30) + PAGE)
    slots = (Memslot(GUEST, HOST_VA, PAGES * PAGE, 0), Memslot(GUEST, HOST_VA + (1 << 30), PAGES * PAGE, 1))
    result = play(tmp_path, trace, teardown=("reverse-map",), memslots=slots)
    row = result["policies"]["reverse-map"]
    assert result["trace"]["machines"] == 2
    assert (row["faults"]["mapped"], row["teardown"]["removed"], row["live"]) == (2, 1, 1)


@pytest.mark.parametrize("role", ["l1", "l0"])
def test_what_no_trace_should_say(tmp_path, role):
    """Addresses and sizes of any kind end in a result."""
    odd = [0, 1, 0xFFF, PAGE, GUEST + 8, 1 << 40, (1 << 48) - PAGE, 1 << 48, (1 << 52) - PAGE, (1 << 64) - PAGE,
           (1 << 64) - 1]
    trace = Trace()
    trace.enter_l2(0)
    for value in odd:
        trace.fault(0, value)
        for other in odd:
            trace.map(other, value, other, size=odd[(odd.index(value) + odd.index(other)) % len(odd)])
            for name in ("unmap", "wrprotect", "split"):
                trace.probe(name, f"pgd=0x{ROOT:x} ipa=0x{value:x} size=0x{other:x}")
            trace.probe("age", f"pgd=0x{ROOT:x} ipa=0x{value:x} size=0x{other:x} mkold=1")
            trace.probe("gfn_unmap", f"start=0x{value:x} end=0x{other:x}")
            trace.probe("memslot", f"slot=0x{value:x} flags=0x1 gpa=0x{value:x} size=0x{other:x} hva=0x{other:x}")
            trace.unmap_hva(value, other)
            trace.tlbi_ipa(0, value)
            trace.probe("tlb_range", f"pgd=0x{ROOT:x} start=0x{value:x} pages={other >> 12}")
        trace.probe("relax", f"pgd=0x{ROOT:x} ipa=0x{value:x} prot=0xf")
        trace.probe("mkyoung", f"pgd=0x{ROOT:x} ipa=0x{value:x}")
        trace.probe("destroy", f"pgd=0x{value:x}")
        trace.enter_l2(0, hcr=value)
    result = play(tmp_path, trace, role=role)
    assert not result["interrupted"]
    assert sum(result["counts"]["events"].values()) == len(trace.lines) - 1
    json.dumps(result)


# --- the result ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", SAMPLES)
def test_schema(results, sample):
    result = results(sample)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["schema"] == 1
    assert " ".join(result) == ("schema machine config trace counts policies timeline largest checks notes interrupted")
    timeline = result["timeline"]
    columns = [timeline[name] for name in ("seconds", "touches", "tlbis", "changes")]
    columns += [row[name] for row in timeline["policies"].values() for name in ("live", "mapped")]
    assert len({len(column) for column in columns}) == 1 and 2 <= len(timeline["seconds"]) <= POINTS
    for column in columns[:4]:
        assert column == sorted(column)
    assert timeline["touches"][-1] == result["policies"]["reverse-map"]["faults"]["total"]
    for name, row in timeline["policies"].items():
        assert row["mapped"][-1] == result["policies"][name]["faults"]["mapped"]


def test_long_timelines_are_thinned():
    line = replay.Timeline(["one"])
    due = 0
    for time in range(0, 10**10, 1 << 18):
        if time >= due:
            due = line.add([time, time, 0, 0, 5, time])
    shown = line.result(0)
    assert POINTS // 2 <= len(shown["seconds"]) <= POINTS
    gaps = np.diff(shown["seconds"])
    assert gaps.max() < 4 * gaps.min()


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=300))
def test_distributions_are_close_to_all_the_values(values):
    found = Distribution()
    for value in values:
        found.add(value)
    summary = found.summary()
    assert summary["max"] == max(values)
    assert summary["mean"] == pytest.approx(sum(values) / len(values))
    for name, percent in (("p50", 50), ("p99", 99)):
        true = float(np.percentile(values, percent, method="inverted_cdf"))
        assert summary[name] == pytest.approx(true, rel=0.008, abs=1)


def test_interrupt_keeps_what_was_done(captures):
    calls = []

    def progress(what, fraction):
        calls.append(fraction)
        if len(calls) == 12:
            raise KeyboardInterrupt

    result = run(ReplayConfig(captures["g2_notifier"]), progress)
    assert result["interrupted"]
    assert 0 < result["policies"]["reverse-map"]["faults"]["total"] < 35_000
    assert calls == sorted(calls) and calls[-1] < 1
    json.dumps(result, allow_nan=False)


def test_interrupt_before_anything(captures):
    def progress(what, fraction):
        raise KeyboardInterrupt

    result = run(ReplayConfig(captures["b_thp"]), progress)
    assert result["interrupted"] and result["policies"]["reverse-map"]["faults"]["total"] == 0
    json.dumps(result, allow_nan=False)


def test_progress_ends_at_one(captures):
    seen = []
    run(ReplayConfig(captures["b_thp"], teardown=("reverse-map",)), lambda what, done: seen.append(done))
    assert seen[-1] == 1.0 and seen == sorted(seen)


@pytest.mark.parametrize("changes, message", [
    ({"role": "l2"}, "role must be one of l1, l0"), ({"tlbi": "sloppy"}, "tlbi must be one of exact, kvm72"),
    ({"teardown": ("reverse-map", "none")}, "teardown must be of reverse-map"), ({"teardown": ()}, "names no policy"),
    ({"vcpus": 0}, "vcpus must be at least 1"), ({"contexts": 0}, "contexts must be at least 1")])
def test_wrong_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        ReplayConfig("trace.txt", **changes)


def test_wrong_recordings(tmp_path, captures):
    with pytest.raises(CaptureError, match=r"neither trace\.txt nor tlbi\.csv"):
        run(ReplayConfig(tmp_path))
    with pytest.raises(CaptureError, match="only snapshots"):
        run(ReplayConfig(DATA / "captures" / "g_nested_7.2"))
    with pytest.raises(TraceError, match="cannot read"):
        run(ReplayConfig(tmp_path / "nothing.txt"))
    with pytest.raises(CaptureError, match="no capture at"):
        run(ReplayConfig(captures["b_thp"] / "trace.txt.xz", memory=tmp_path))
