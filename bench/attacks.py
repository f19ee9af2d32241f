"""What an L1 that means harm can make L0 spend: time for each fault all along, bytes, and how long others wait.

    python bench/attacks.py --markdown bench/results/attacks.md     # half a minute, 1 GiB of memory
    python bench/attacks.py --small                                 # seconds

L1's tables here are five pages: each entry of a level points to the one table below, and each entry of the last to one
data page, so that every address of 48 bits is an alias of it. Times are of batches of faults, in order; *first*,
*middle* and *last* are the medians of the first, the fifth and the last tenth of the batches. An attack works if time
or bytes grow while it goes on. (The first tenth touches memory that the system has yet to give.)
"""

import argparse
import datetime
import statistics
import sys
from pathlib import Path
from time import perf_counter_ns, sleep

import numpy as np

import s2shadow as s2
from beside import beside
from nest import HCR, VTCR
from report import machine
from s2shadow._floor import pauses

PAGE, BLOCK, GIB = 4 << 10, 2 << 20, 1 << 30
DATA, TABLES = 1 << 40, 1 << 44
HOST = 1 << 42
BATCH = 256


def u64(values):
    return np.asarray(values, dtype=np.uint64)


def endless_tables(address, target, level=3):
    """Tables of L1 under which every IPA of 48 bits leads to ``target``, by leaves of ``level``."""
    image = np.zeros((4, PAGE // 8), dtype=np.uint64)
    for at in range(level):
        image[at] = address + (at + 1) * PAGE | 3
    image[level] = target | 0x3C | 3 << 6 | 3 << 8 | 1 << 10 | (3 if level == 3 else 1)
    return image.reshape(-1)


class Victim:
    """An engine, L1's endless tables for pages and for blocks, and a host that maps what they lead to."""

    def __init__(self, *, level=3, contexts=2, vcpus=2, **options):
        self.mem = s2.GuestMemory()
        self.mem.add(DATA, 2 * GIB)
        self.images = [endless_tables(TABLES, DATA, level), endless_tables(TABLES + BLOCK, DATA + GIB)]
        for n, image in enumerate(self.images):
            self.mem.add(TABLES + n * BLOCK, buffer=image)
        self.vm = s2.NestedVM(self.mem, vcpus=vcpus, contexts=contexts, track_tlbis=False, **options)
        self.vm.host.map(DATA, HOST + (PAGE if level == 3 else 0), BLOCK)       # by pages, or as one block
        self.vm.host.map(DATA + GIB, HOST + GIB, BLOCK)
        for n, vcpu in enumerate(self.vm.vcpus):
            self.load(vcpu, 1 + n)

    def load(self, vcpu, vmid, tables=0):
        return vcpu.load(TABLES + tables * BLOCK | vmid << 48, VTCR[4], hcr=HCR)

    def touch(self, ipas, access=s2.READ, vcpu=0):
        """Faults in batches: nanoseconds per fault of each batch."""
        spent = []
        for at in range(0, len(ipas), BATCH):
            part = ipas[at : at + BATCH]
            began = perf_counter_ns()
            got = self.vm.vcpus[vcpu].fault_many(part, access)
            spent.append((perf_counter_ns() - began) / len(part))
            assert ((got["kind"] == s2.MAPPED) | (got["kind"] == s2.HIT)).all()
        return spent


class Aliased(Victim):
    """One page at ``count`` addresses, in equal shares in so many contexts, each on a vCPU of its own."""

    def __init__(self, count, contexts=1):
        super().__init__(contexts=contexts + 1, vcpus=contexts + 1)     # the last is for a bystander
        self.contexts, self.ipas = contexts, u64(np.arange(count // contexts)) * u64(PAGE)
        self.count = len(self.ipas) * contexts

    def touch_all(self, access=s2.READ):
        return [spent for vcpu in range(self.contexts) for spent in self.touch(self.ipas, access, vcpu)]


def growth(spent):
    """Medians of the first, the fifth and the last tenth."""
    tenth, middle = max(1, len(spent) // 10), len(spent) * 4 // 10
    return [statistics.median(part) for part in (spent[:tenth], spent[middle : middle + tenth], spent[-tenth:])]


def attack(name, spent, vm, operations, bound=None):
    first, middle, last = growth(spent)
    stats = vm.stats
    vm.check()
    return {
        "name": name, "operations": operations, "first": first, "middle": middle, "last": last,
        "live": stats.live, "bytes": stats.memory_bytes, "bound": bound, "evictions": stats.evictions,
    }


# The attacks. ``count``: how many leaves, loads or operations.


def alias(name, count, contexts):
    v = Aliased(count, contexts)
    spent = v.touch_all()
    assert v.vm.stats.live == v.count
    return v, attack(name, spent, v.vm, v.count)


def alias_one_context(count):
    return alias("one page at so many addresses of one context", count, 1)


def alias_many_contexts(count, contexts=64):
    return alias(f"one page in {contexts} contexts", count, contexts)


def scattered_pages(count):
    """Every fault needs three tables of its own."""
    bound = 16 << 20
    v = Victim(max_table_bytes=bound)
    ipas = u64(np.random.default_rng(1).integers(0, 1 << 36, count)) * u64(PAGE)
    return v, attack("pages all over the address space, at the bound", v.touch(ipas), v.vm, count, bound)


def scattered_pages_over_host_tables(count):
    """The host's own tables are most of the arena."""
    bound = 96 << 20
    v = Victim(max_table_bytes=bound)
    for n in range(1 << 14):                # one table page each
        v.vm.host.map((1 << 45) + n * BLOCK, HOST + PAGE, PAGE)
    ipas = u64(np.random.default_rng(2).integers(0, 1 << 36, count)) * u64(PAGE)
    name = "the same between 16,384 of the host's own tables"
    return v, attack(name, v.touch(ipas), v.vm, count, bound)


def scattered_blocks(count):
    """Blocks stand in upper tables: no leaf table is there to evict."""
    bound = 16 << 20
    v = Victim(level=2, max_table_bytes=bound)
    ipas = u64(np.random.default_rng(3).integers(0, 1 << 27, count)) * u64(BLOCK)
    return v, attack("blocks all over the address space, at the bound", v.touch(ipas), v.vm, count, bound)


def churn_contexts(count):
    """Each load is another VMID than those that the pool holds, with a few leaves of its own."""
    bound = 16 << 20
    v = Victim(contexts=8, max_table_bytes=bound)
    ipas = u64([0, PAGE, GIB, 37 * GIB])
    vcpu, spent = v.vm.vcpus[0], []
    for at in range(0, count, BATCH):
        began = perf_counter_ns()
        for n in range(at, min(at + BATCH, count)):
            v.load(vcpu, 10 + n % 60000)
            vcpu.fault_many(ipas)
        spent.append((perf_counter_ns() - began) / BATCH)
    return v, attack("another VMID at every entry (load and four faults)", spent, v.vm, count, bound)


def flood_tlbis(count):
    """An operation by IPA and the fault that brings the leaf back, among 2^18 leaves."""
    v = Victim()
    v.touch(u64(np.arange(1 << 18)) * u64(PAGE))
    rng = np.random.default_rng(4)
    spent = []
    ops = np.zeros(BATCH, s2.TLBI_OP_DTYPE)
    ops["insn"] = 0xD50C8020                # IPAS2E1IS
    for _ in range(0, count, BATCH):
        pages = u64(rng.integers(0, 1 << 18, BATCH))
        ops["xt"] = pages
        began = perf_counter_ns()
        v.vm.tlbi_many(ops)
        v.vm.vcpus[0].fault_many(pages * u64(PAGE))
        spent.append((perf_counter_ns() - began) / BATCH)
    return v, attack("a TLBI and its refault, among 262,144 leaves", spent, v.vm, count)


def edit_tables(count):
    """L1 turns a leaf from one page to another under the same address, and never says so."""
    v = Victim()
    image, spent = v.images[0], []
    rng = np.random.default_rng(5)
    for n in range(0, count, BATCH):
        image[3 * (PAGE // 8) :] = DATA + n % 512 * PAGE | 0x3C | (1 + 2 * (n % 2)) << 6 | 3 << 8 | 1 << 10 | 3
        ipas = u64(rng.integers(0, 1 << 14, BATCH)) * u64(PAGE)
        began = perf_counter_ns()
        v.vm.vcpus[0].fault_many(ipas, s2.WRITE if n % 2 else s2.READ)
        spent.append((perf_counter_ns() - began) / BATCH)
    return v, attack("table edits without a TLBI", spent, v.vm, count)


ATTACKS = (
    (alias_one_context, 1 << 20, 1 << 13),
    (alias_many_contexts, 1 << 20, 1 << 13),
    (scattered_pages, 1 << 18, 1 << 12),
    (scattered_pages_over_host_tables, 1 << 18, 1 << 12),
    (scattered_blocks, 1 << 18, 1 << 13),
    (churn_contexts, 1_000_000, 1 << 10),
    (flood_tlbis, 1 << 20, 1 << 12),
    (edit_tables, 1 << 20, 1 << 12),
)


# What the host and TLBIs do to the page with all the aliases, and who has to wait


class Bystander:
    """A vCPU in another context, whose faults have nothing to do with it: how long each of its calls took."""

    def __init__(self, victim, vcpu):
        self.vcpu = vcpu
        victim.load(vcpu, 60001, tables=1)
        self.ipas = u64(np.arange(32)) * u64(PAGE)
        self.vcpu.fault_many(self.ipas)
        self.out, self.waits = np.zeros(len(self.ipas), s2.FAULT_DTYPE), []

    def call(self):
        began = perf_counter_ns()
        self.vcpu.fault_many(self.ipas, s2.READ, out=self.out)
        self.waits.append(perf_counter_ns() - began)


def timed(victim, event):
    """What an event gave, and its time, its pauses (a bystander only faults, which has none), and the bystander's
    longest and usual call."""
    bystander, state = Bystander(victim, victim.vm.vcpus[-1]), victim.vm._state()

    def await_calls(count):
        while len(bystander.waits) < count and not failures:
            sleep(0.001)

    with beside(bystander.call) as failures:
        await_calls(50)
        before, paused = len(bystander.waits), pauses(state)
        began = perf_counter_ns()
        got = event()
        spent = perf_counter_ns() - began
        after, paused = len(bystander.waits), pauses(state) - paused
        await_calls(after + 1)              # the one that the event's end may have found waiting
    during = bystander.waits[before : after + 1]
    victim.vm.check()
    return got, {"ns": spent, "pauses": paused, "longest": max(during), "calls": len(during),
                 "usual": statistics.median(bystander.waits[:before])}


def host_events(victim):
    """Each change of the aliased page, timed."""
    vm, end = victim.vm, DATA + PAGE
    events = (
        ("age", lambda: vm.age(DATA, end)),
        ("protect (takes W)", lambda: vm.host.protect(DATA, end, "rx")),
        ("protect (gives it back)", lambda: vm.host.protect(DATA, end, "rwx")),
        ("log_dirty", lambda: vm.log_dirty(DATA, end)),
        ("dirty_log after a write", lambda: vm.dirty_log(DATA, end)),
        ("map over it", lambda: vm.host.map(DATA, HOST + 5 * PAGE, PAGE)),
        ("unmap", lambda: vm.unmap(DATA, end)),
    )
    for name, event in events:
        if name in ("log_dirty", "dirty_log after a write", "unmap"):   # it has all its leaves again, written to
            victim.touch_all(s2.WRITE)
        live = vm.stats.live
        yield {"name": name, "leaves": live, **timed(victim, event)[1]}


def tlbi_of_all(victim):
    """The TLBI that takes the leaves of every context, timed."""
    victim.vm.host.map(DATA, HOST + PAGE, PAGE)     # what the host did last was to unmap it
    victim.touch_all()
    got, row = timed(victim, lambda: victim.vm.vcpus[0].tlbi("ALLE1IS"))
    assert got.removed >= victim.count
    return {"name": "ALLE1IS", "leaves": got.removed, **row}


def run(small):
    """Rows: of the attacks; of the host's events, by what the table is of; of the TLBIs."""
    rows, events, tlbis = [], {}, []
    sys.setswitchinterval(1e-5)             # whoever comes out of the engine gets the GIL soon
    for call, full, little in ATTACKS:
        victim, row = call(little if small else full)
        print(f"{row['name']}: {row['first']:.0f} -> {row['last']:.0f} ns", file=sys.stderr)
        rows.append(row)
        if isinstance(victim, Aliased):
            events[row["name"]] = list(host_events(victim))
        if call is alias_many_contexts:
            tlbis.append(tlbi_of_all(victim))
        del victim
    return rows, events, tlbis


def megabytes(count):
    return f"{count / (1 << 20):.1f} MiB"


COMMAND = "python bench/attacks.py --markdown bench/results/attacks.md"
ATTACKS_TEXT = """Nanoseconds per operation, medians of the first, the fifth and the last tenth (the first touches
memory that the system has yet to give); bytes of tables, links and reverse map.

| attack | operations | first | middle | last | last / first | leaves | bytes | bound | evictions |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"""
EVENTS_TEXT = """What the host then does to the page with all the aliases, in chunks, for each attack that made them.
*Pauses*: how often the event let go of the lock for others before it was done. Meanwhile a vCPU of another context
touches 32 pages of its own in a loop: its longest call during the event, and its usual one."""
EVENTS_TABLE = """| event | leaves | time | per leaf | pauses | longest call beside | usual call | calls beside |
|---|---:|---:|---:|---:|---:|---:|---:|"""
TLBIS_TEXT = """A TLBI of everything in those contexts, with all the aliases there again; the same vCPU is beside, and
the leaves of its own go as well.

| TLBI | leaves removed | time | per leaf | pauses | longest call beside |
|---|---:|---:|---:|---:|---:|"""


def took(row):
    """The cells that the tables of events and of TLBIs share."""
    each = f"{row['ns'] / row['leaves']:,.0f} ns"
    return (f"| {row['name']} | {row['leaves']:,} | {row['ns'] / 1e6:,.2f} ms | {each} | {row['pauses']:,} "
            f"| {row['longest'] / 1e6:,.2f} ms |")


def markdown(rows, events, tlbis):
    found = machine()
    where = f"{found['cpu']}, {found['cores']} CPUs, Python {found['python']}, commit {found['commit']}"
    yield "# Attacks on resources\n"
    yield f"Measured {datetime.date.today():%d %B %Y} on {where}, by"
    yield f"\n    {COMMAND}\n\n`bench/attacks.py` says what each does. {ATTACKS_TEXT}"
    for row in rows:
        times = " | ".join(f"{row[name]:,.0f}" for name in ("first", "middle", "last"))
        held = f"{row['live']:,} | {megabytes(row['bytes'])} | {megabytes(row['bound']) if row['bound'] else 'none'}"
        ratio = row["last"] / row["first"]
        yield f"| {row['name']} | {row['operations']:,} | {times} | {ratio:.2f} | {held} | {row['evictions']:,} |"
    yield f"\n{EVENTS_TEXT}"
    for name, changes in events.items():
        yield f"\nAfter *{name}*:\n\n{EVENTS_TABLE}"
        for row in changes:
            yield f"{took(row)} {row['usual'] / 1e3:,.1f} us | {row['calls']:,} |"
    yield f"\n{TLBIS_TEXT}"
    for row in tlbis:
        yield took(row)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="few operations: to see that it works")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there instead of to stdout")
    args = parser.parse_args(argv)
    text = "\n".join(markdown(*run(args.small))) + "\n"
    if args.markdown:
        args.markdown.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
