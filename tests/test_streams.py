"""Two records of one machine, with a clock each, in one order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2shadow.events import EVENT_DTYPE
from s2shadow.events import EventKind as K
from s2shadow.streams import Merger, merge

ROOTS = (0x8000_0000, 0x9000_0000)
IPAS2E1IS, VMALLE1IS, VMALLE1 = 0xD50C8020, 0xD508831F, 0xD508871F


def row(kind, **fields):
    rows = np.zeros(1, EVENT_DTYPE)
    rows["kind"] = kind
    for name, value in fields.items():
        rows[name] = value
    return rows


def chunks(rows, size):
    array = np.concatenate(rows) if rows else np.zeros(0, EVENT_DTYPE)
    return (array[at:at + size] for at in range(0, len(array), size))


class Machine:
    """Writes both records of a history: (text rows, CSV rows, what happened in which order on each CPU)."""

    def __init__(self):
        self.text, self.table, self.order = [], [], {0: [], 1: []}
        self.now, self.ahead = 1_000_000, 7_000_000

    def tick(self, ns):
        self.now += ns

    def say(self, cpu, kind, **fields):
        self.text.append(row(kind, cpu=cpu, time=self.now, seq=len(self.text) + 1, **fields))
        self.order[cpu].append(("text", len(self.text)))

    def execute(self, cpu, kind, **fields):
        self.now += 3_000
        self.table.append(row(kind, cpu=cpu, time=self.now + self.ahead, seq=len(self.table) + 1, el=2, **fields))
        self.order[cpu].append(("table", len(self.table)))

    def flush(self, cpu, root):
        self.say(cpu, K.TLB_IPA, root=root)
        self.execute(cpu, K.TLBI, insn=IPAS2E1IS, vttbr=1 << 48 | root)
        self.execute(cpu, K.TLBI, insn=VMALLE1IS, vttbr=1 << 48 | root)

    def merged(self, text_chunk, table_chunk, role="l1"):
        merger = merge(chunks(self.text, text_chunk), chunks(self.table, table_chunk), role)
        return merger, np.concatenate(list(merger))


def order_on(rows, cpu):
    own = rows[rows["cpu"] == cpu]
    return [("table" if kind >= K.TLBI else "text", seq)
            for kind, seq in zip(own["kind"].tolist(), own["seq"].tolist(), strict=True)]


steps = st.lists(st.tuples(st.sampled_from(["flush", "fault", "entry", "stop"]), st.integers(0, 1), st.integers(0, 1),
                           st.integers(100_000, 2_000_000)), min_size=1, max_size=60)


@given(steps, st.integers(1, 30), st.integers(1, 30))
def test_the_order_of_each_cpu_is_what_happened(history, text_chunk, table_chunk):
    machine = Machine()
    machine.flush(0, ROOTS[0])
    for what, cpu, which, later in history:
        machine.tick(later)
        if what == "flush":
            machine.flush(cpu, ROOTS[which])
        elif what == "fault":
            machine.say(cpu, K.GUEST_FAULT)
        elif what == "entry":
            machine.execute(cpu, K.ENTER, vttbr=ROOTS[which])
        else:
            machine.ahead += later * 10         # stopped: only the other clock goes on
            for other in (0, 1):                # and what ties the clocks together again
                machine.tick(200_000)
                machine.flush(other, ROOTS[which])
    merger, rows = machine.merged(text_chunk, table_chunk)
    assert len(rows) == len(machine.text) + len(machine.table)
    for cpu in (0, 1):
        assert order_on(rows, cpu) == machine.order[cpu]
    flushes = sum(int(text["kind"][0]) == K.TLB_IPA for text in machine.text)
    assert (merger.ties, merger.mismatched) == (flushes, 0)


def test_times_are_those_of_the_text():
    machine = Machine()
    for at in range(20):
        machine.tick(500_000)
        if at == 10:
            machine.ahead += 40_000_000
        machine.flush(at % 2, ROOTS[0])
        machine.tick(300_000)
        machine.execute(0, K.ENTER)
        if at != 10:
            machine.order[0][-1] += (machine.now,)
    _, rows = machine.merged(1000, 1000)
    entries = rows[rows["kind"] == K.ENTER]
    wanted = [what[2] for what in machine.order[0] if len(what) == 3]
    near = [abs(int(time) - want) for time, want in zip(np.delete(entries["time"], 10).tolist(), wanted, strict=True)]
    assert max(near) < 20_000


def test_roots_tie_where_flushes_cannot():
    """A kernel whose flush code has no probes: the first entry into each table, and the fault and the map after it."""
    machine = Machine()
    for number in range(30):
        root = ROOTS[0] + number * 4096
        machine.tick(2_000_000)
        if number == 15:
            machine.ahead += 3_000_000_000
        machine.execute(0, K.ENTER, vttbr=2 << 48 | root)
        machine.tick(50_000)
        machine.say(0, K.GUEST_FAULT, pid=7)
        machine.tick(700_000)
        machine.say(0, K.MAP, pid=7, root=root)
        machine.execute(0, K.TLBI, insn=VMALLE1, vttbr=2 << 48 | root)
    for size in (7, 1000):
        merger, rows = machine.merged(size, size)
        assert merger.ties == 0
        assert order_on(rows, 0) == machine.order[0]


def test_handlers_tie_the_stream_of_a_nested_host():
    machine = Machine()
    for number in range(12):
        machine.tick(1_000_000)
        machine.execute(1, K.TLBI, insn=IPAS2E1IS, value=number)
        machine.table[-1]["el"] = 1
        machine.tick(5_000)
        machine.say(1, K.HANDLE_TLBI, insn=0xD50C8020, value=number)
        machine.tick(100_000)
        machine.say(0, K.GUEST_FAULT)
    merger, rows = machine.merged(5, 3, "l0")
    assert (merger.ties, merger.mismatched) == (12, 0)
    pairs = rows[rows["cpu"] == 1]
    assert pairs["kind"].tolist() == [K.HANDLE_TLBI, K.TLBI] * 12
    assert (pairs["value"][::2] == pairs["value"][1::2]).all()


def test_flushes_that_do_not_belong_together_are_counted():
    machine = Machine()
    machine.flush(0, ROOTS[0])
    machine.tick(1000)
    machine.flush(0, ROOTS[1])
    machine.table = machine.table[2:]           # the CSV began later
    merger, rows = machine.merged(100, 100)
    assert merger.mismatched == 1 and len(rows) == 4


@pytest.mark.parametrize("texts, tables", [(0, 5), (5, 0), (3, 3)])
def test_nothing_in_common(texts, tables):
    """All rows come through, each record in its order."""
    text = [row(K.AGE, time=1000 + i, seq=i) for i in range(texts)]
    table = [row(K.TLBI, time=50 + i, seq=i) for i in range(tables)]
    rows = list(Merger(chunks(text, 2), chunks(table, 2), "l1"))
    merged = np.concatenate(rows)
    assert len(merged) == texts + tables
    for first in (True, False):
        own = merged["seq"][(merged["kind"] < K.TLBI) == first].tolist()
        assert own == sorted(own)
