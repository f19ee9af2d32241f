"""Memory slots: host addresses of notifiers into the IPAs of each VM, over time."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2shadow.capture import CaptureError
from s2shadow.events import EVENT_DTYPE, UNKNOWN, EventKind
from s2shadow.memslots import FOREVER, HVA_KINDS, Memslot, Memslots, Piece, parse_memslot
from s2shadow.trace import VMNumbers, read_trace

HERE = Path(__file__).parent
SAMPLES = HERE / "data" / "traces"
CAPTURES = os.environ.get("S2SHADOW_CAPTURES")
FULL = pytest.mark.skipif(CAPTURES is None, reason="S2SHADOW_CAPTURES does not name the folder of captures")
K = EventKind
PAGE = 4096
TOP = 1 << 64

# --- as a user types it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "slot"), [
    ("gpa=0x40000000,hva=0xffff77e00000,size=0x18000000", Memslot(0x40000000, 0xFFFF77E00000, 0x18000000)),
    ("size=384M, hva=0xffff77e00000, gpa=1073741824", Memslot(0x40000000, 0xFFFF77E00000, 384 << 20)),
    ("gpa=0,hva=0x1000,size=1T,vm=3", Memslot(0, 0x1000, 1 << 40, 3)),
    ("gpa=0,hva=0xfffffffffffff000,size=4k", Memslot(0, TOP - PAGE, PAGE))])
def test_typed_slots(text, slot):
    assert parse_memslot(text) == slot == Memslot(*slot[:4], since=0, until=FOREVER)


@pytest.mark.parametrize(("text", "error"), [
    ("", "gpa=,hva=,size="), ("gpa=0,hva=0", "size= is missing in 'gpa=0,hva=0'"), ("gpa=0,size=4K", "hva= is missing"),
    ("hva=0,size=4K", "gpa= is missing"), ("gpa=0,hva=0,size=4K,gpa=0", "gpa appears twice"),
    ("gpa=0,hva=0,length=4K", "got 'length=4K'"), ("gpa=x,hva=0,size=4K", "gpa is not a number: 'x'"),
    ("gpa=0,hva=,size=4K", "hva is not a number: ''"), ("gpa=0,hva=0,size=K", "size is not a number: 'K'"),
    ("gpa=4K,hva=0,size=4K", "gpa is not a number: '4K'"), ("gpa=0x10,hva=0,size=4K", "gpa must be a multiple of 4096"),
    ("gpa=-4096,hva=0,size=4K", "gpa must be a multiple"), ("gpa=0,hva=1,size=4K", "hva must be a multiple"),
    ("gpa=0,hva=0,size=4097", "size must be a multiple"), ("gpa=0,hva=0,size=0", "size is 0"),
    ("gpa=0xffffffffff000,hva=0,size=8K", "beyond 52 bits"), ("gpa=0,hva=0xfffffffffffff000,size=8K", "beyond 64 bits"),
    ("gpa=0,hva=0,size=4K,vm=65535", "vm must be between 0 and 65534"), ("gpa=0,hva=0,size=4K,vm=-1", "vm must be")])
def test_typed_slots_that_are_wrong(text, error):
    with pytest.raises(ValueError, match=error) as raised:
        parse_memslot(text)
    assert "\n" not in str(raised.value)


# --- memslots.json -----------------------------------------------------------------------------------------------


def load(tmp_path, data):
    file = tmp_path / "memslots.json"
    file.write_text(data if isinstance(data, str) else json.dumps(data))
    return Memslots.load(file)


def test_the_three_shapes(tmp_path):
    full = {"t_ns": 2000, "vm": 1, "slot": 0, "gpa": "0", "size": 65536, "hva": "0xffffa8c00000", "rc": 0}
    assert load(tmp_path, {"slots": [full]}).slots == (Memslot(0, 0xFFFFA8C00000, 65536, 1, 2000),)
    derived = {"gpa": "0x40000000", "size": "0x18000000", "hva": "0xffff77e00000", "flags": "0x0", "how": "derived"}
    assert load(tmp_path, {"slots": [derived]}).slots == (Memslot(0x40000000, 0xFFFF77E00000, 0x18000000),)
    probed = {"slot": "0x3", "flags": "0x0", "gpa": "0x90a0000", "size": "0x1000", "hva": "0xffff9c200000",
              "t": 10.395683}
    assert load(tmp_path, {"slots": [probed]}).slots == (Memslot(0x90A0000, 0xFFFF9C200000, 0x1000, 0, 10_395_683_000),)


def test_slots_come_and_go(tmp_path):
    def slot(time, name, gpa, size=PAGE, vm=0, **more):
        return {"t_ns": time, "slot": name, "gpa": gpa, "size": size, "hva": 0x10000, "vm": vm} | more

    slots = load(tmp_path, {
        "slots": [slot(50, 1, 0x7000, vm=1), slot(10, 1, 0x1000), slot(20, 1, 0x2000), slot(30, 1, 0, size=0),
                  slot(40, 2, 0x3000, rc=-1), slot(60, 1, 0x4000), slot(70, 9, 0, size=0)],
        "vms": [{"ev": "vm", "vm": 0, "t_ns": 1}, {"ev": "vmdel", "vm": 1, "t_ns": 80},
                {"ev": "vmdel", "vm": 5, "t_ns": 90}]})
    assert slots.slots == (Memslot(0x1000, 0x10000, PAGE, 0, 10, 20), Memslot(0x2000, 0x10000, PAGE, 0, 20, 30),
                           Memslot(0x7000, 0x10000, PAGE, 1, 50, 80), Memslot(0x4000, 0x10000, PAGE, 0, 60))
    found = [slots.lookup(0x10000, 0x11000, time) for time in (9, 10, 19, 20, 30, 55, 60, 80)]
    assert [[piece.start for piece in pieces] for pieces in found] \
        == [[], [0x1000], [0x1000], [0x2000], [], [0x7000], [0x4000, 0x7000], [0x4000]]


@pytest.mark.parametrize(("data", "error"), [
    ("{", "is not JSON"), ("[]", "the file must be an object"), ({}, "slots is missing"),
    ({"slots": 1}, "slots must be a list"),
    ({"slots": [1]}, r"slots\[0\] must be an object"), ({"slots": [{}]}, r"slots\[0\]\.gpa is missing"),
    ({"slots": [{"gpa": "zero", "size": 4096, "hva": 0}]}, r"gpa must be a number.*'zero'"),
    ({"slots": [{"gpa": 1, "size": 4096, "hva": 0}]}, "gpa must be a multiple of 4096"),
    ({"slots": [{"gpa": 0, "size": 4096, "hva": 0, "t": "now"}]}, "t must be seconds, got 'now'"),
    ({"slots": [{"gpa": 0, "size": 4096, "hva": 0, "t": float("nan")}]}, "t must be seconds"),
    ({"slots": [{"gpa": 0, "size": 4096, "hva": 0, "vm": 65535}]}, "vm must be a number below")])
def test_broken_files(data, error, tmp_path):
    with pytest.raises(CaptureError, match=error) as raised:
        load(tmp_path, data)
    assert "memslots.json" in str(raised.value) and "\n" not in str(raised.value)


def test_missing_file(tmp_path):
    with pytest.raises(CaptureError, match="cannot read .*none: No such file"):
        Memslots.load(tmp_path / "none")


# --- lookup ------------------------------------------------------------------------------------------------------


def test_pieces():
    slots = Memslots([Memslot(0x40000000, 0x10000, 0x4000, 0), Memslot(0x80000000, 0x14000, 0x2000, 0),
                      Memslot(0x40000000, 0x12000, 0x4000, 7)])
    assert len(slots) == 3
    assert slots.lookup(0x11800, 0x15000) == [Piece(0, 0x40001800, 0x40004000), Piece(0, 0x80000000, 0x80001000),
                                              Piece(7, 0x40000000, 0x40003000)]
    assert slots.lookup(0, 0x10000) == slots.lookup(0x16000, TOP - 1) == []
    assert slots.lookup(0x10000, 0x10000) == [Piece(0, 0x40000000, 0x40000000)]     # an address
    assert slots.lookup(0x16000, 0x16000) == []
    assert slots.lookup(0x13000, 0x12000) == [Piece(0, 0x40003000, 0x40003000), Piece(7, 0x40001000, 0x40001000)]
    both = slots + Memslots([Memslot(0, 0x10000, PAGE, 9)])
    assert [piece.vm for piece in both.lookup(0x10000, 0x10001)] == [0, 9]


def test_the_top_of_the_address_space():
    slots = Memslots([Memslot(0, TOP - PAGE, PAGE)])
    assert slots.lookup(TOP - 16, TOP - 1) == [Piece(0, PAGE - 16, PAGE - 1)]
    assert slots.lookup(TOP - 1, TOP - 1) == [Piece(0, PAGE - 1, PAGE - 1)]


SLOTS = st.builds(
    lambda gpa, hva, pages, vm, since, life: Memslot(gpa * PAGE, hva * PAGE, pages * PAGE, vm, since, since + life),
    st.integers(0, 20), st.integers(0, 20), st.integers(1, 8), st.integers(0, 2), st.integers(0, 9), st.integers(1, 9))
RANGES = st.tuples(st.integers(0, 30), st.integers(1, 12), st.integers(0, 20))


@given(st.lists(SLOTS, max_size=8), st.lists(RANGES, max_size=8))
def test_lookup_against_page_by_page(made, ranges):
    slots = Memslots(made)
    start = np.array([first * PAGE for first, _, _ in ranges], np.uint64)
    end = np.array([(first + pages) * PAGE for first, pages, _ in ranges], np.uint64)
    pieces = slots.lookup_many(start, end, np.array([time for _, _, time in ranges], np.uint64))
    found = sorted((row, vm, page) for row, begin, stop, vm in pieces.tolist() for page in range(begin, stop, PAGE))
    model = sorted((row, slot.vm, slot.gpa + page * PAGE - slot.hva)
                   for row, (first, pages, time) in enumerate(ranges) for page in range(first, first + pages)
                   for slot in made
                   if slot.hva <= page * PAGE < slot.hva + slot.size and slot.since <= time < slot.until)
    assert found == model
    assert pieces["row"].tolist() == sorted(pieces["row"].tolist())


def test_events_on_hva_become_rows_of_vms():
    slots = Memslots([Memslot(0x1000, 0x10000, 0x1000, 0), Memslot(0x5000, 0x10000, 0x2000, 1, since=50)])
    events = np.zeros(6, EVENT_DTYPE)
    events["vm"], events["seq"], events["time"] = UNKNOWN, range(6), 10
    events["kind"] = [K.MN_START, K.GUEST_FAULT, K.MN_START, K.TEST_AGE_HVA, K.UNMAP_HVA, K.MAP]
    events["start"] = [0x10000, 0x10000, 0x10000, 0x10000, 0x90000, 0x10000]
    events["end"] = [0x12000, 0x10000, 0x12000, 0x10000, 0x91000, 0x11000]
    events["time"][2:] = 50
    before = events.copy()
    rows = slots.to_ipa(events)
    assert np.array_equal(events, before)
    said = [tuple(row) for row in rows[["seq", "vm", "start", "end"]].tolist()]
    assert said == [(0, 0, 0x1000, 0x2000), (1, UNKNOWN, 0x10000, 0x10000), (2, 0, 0x1000, 0x2000),
                    (2, 1, 0x5000, 0x7000), (3, 0, 0x1000, 0x1000), (3, 1, 0x5000, 0x5000),
                    (5, UNKNOWN, 0x10000, 0x11000)]
    assert len(slots.to_ipa(events[:0])) == 0 and len(Memslots([]).to_ipa(events)) == 2
    assert np.array_equal(slots.to_ipa(events[::2])["seq"], [0, 2, 2])


def test_slots_from_the_probe():
    events = np.zeros(4, EVENT_DTYPE)
    events["kind"], events["vm"] = K.MEMSLOT, [UNKNOWN, 2, UNKNOWN, UNKNOWN]
    events["kind"][3] = K.MAP
    events["time"], events["value"] = [10, 20, 30, 40], [1, 1, 1, 1]
    events["start"], events["end"] = [0x1000, 0x1000, 0x9000, 0], [0x3000, 0x2000, 0x9000, 0x1000]
    events["va"] = [0x10000, 0x20000, 0, 0]
    assert Memslots.from_events(events).slots == (Memslot(0x1000, 0x10000, 0x2000, 0, 10, 30),
                                                  Memslot(0x1000, 0x20000, 0x1000, 2, 20))


# --- captures ----------------------------------------------------------------------------------------------------

NAMES = {"a": "a_storm_max_7.2", "b": "b_linux_l2_thp_7.2", "b2": "b2_linux_l2_4k_7.2", "c": "c_storm_lpa2_7.2",
         "d": "d_vmid_rollover_nvhe_7.2", "g2": "g2_nested_notifier_7.2"}


@pytest.mark.parametrize(("name", "count"), [("a", 69), ("b2", 1), ("g2", 4)])
def test_sampled_slots(name, count):
    slots = Memslots.load(SAMPLES / f"{name}.memslots.json")
    assert len(slots) == count
    events = np.concatenate(list(read_trace(SAMPLES / f"{name}.trace.txt.xz")))
    rows = slots.to_ipa(events)
    on_hva = np.isin(rows["kind"], HVA_KINDS)
    assert (rows["vm"][on_hva] != UNKNOWN).all()
    if name != "g2":
        assert on_hva.any()
    else:               # the same slots, seen by a probe
        assert Memslots.from_events(events).slots == slots.slots


@FULL
@pytest.mark.parametrize(("name", "outside"), [("a", 12), ("b", 1), ("b2", 1), ("c", 12), ("d", 0)])
def test_captured_unmaps_lie_in_what_their_notifier_named(name, outside):
    """A notifier's unmap comes from the task of its mn_start, on IPAs that the HVA range stands for in that VM.

    Unmaps outside are of slots that go. (The slots of b and b2 are themselves derived from 11104 of 11105 and 34079 of
    34080 such pairs; those of the others are what the VMM set.)
    """
    folder = Path(CAPTURES) / NAMES[name]
    slots = Memslots.load(folder / "memslots.json")
    numbers = VMNumbers()
    events = np.concatenate([numbers.number(part) for part in read_trace(folder / "trace.txt.xz")])
    pieces, missed, last, found = {}, 0, {}, 0
    at = np.flatnonzero(events["kind"] == K.MN_START)
    for row, start, end, vm in slots.lookup_many(events["start"][at], events["end"][at], events["time"][at]).tolist():
        pieces.setdefault(int(at[row]), []).append((vm, start, end))
    steps = np.flatnonzero(np.isin(events["kind"], (K.MN_START, K.UNMAP)))
    columns = (events[field][steps].tolist() for field in ("kind", "pid", "start", "end"))
    for step, kind, pid, start, end in zip(steps.tolist(), *columns, strict=True):
        if kind == K.MN_START:
            last[pid] = step
        elif any(begin <= start and end <= stop for _, begin, stop in pieces.get(last.get(pid), ())):
            found += 1
        else:
            missed += 1
    assert missed == outside and found == np.count_nonzero(events["kind"] == K.UNMAP) - outside > 0
    unmapped = json.loads((folder / "checks.json").read_text())["ftrace"]["gfn_unmap"]
    assert found == unmapped - (name in ("b", "b2"))
