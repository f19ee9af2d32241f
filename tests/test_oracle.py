"""The live oracle: QEMU's walker over the shadow gives what it gives over L1's table and then the host's.

Random tables of L1, a random host, everything faulted in. Then someone else's walker (oracle.py) walks the shadow on
the one hand, L1's table and the host's canonical table on the other: the same PA, the same permissions, the same
memory type and shareability, or a fault on both sides. Each run has another seed, which its last lines name.
"""

import os
from collections import Counter

import numpy as np
import pytest

import s2shadow
from oracle import FAULT, PA_BITS, Registers
from randomtables import MEMATTRS, TG0, Region, start_levels
from rig import Tables
from s2shadow import EXEC, HCR_CD, READ, WRITE
from twostages import (
    ADDRESS_SIZE,
    DATA,
    PAGE,
    PAS,
    SAMPLE,
    TABLES,
    K,
    M,
    Machine,
    RandomMachine,
    assert_none,
    compare_answers,
    compare_shadow,
    differences,
    excess,
)
from vectors import combined_attributes

LONG = os.environ.get("S2SHADOW_LONG") == "1"
MACHINES = 120 if LONG else 3  # of each kind
CHANGING = 40 if LONG else 1
CPUS = sorted(PA_BITS)
GRANULES = (4 * K, 16 * K, 64 * K)
KINDS = [(cpu, granule) for cpu in CPUS for granule in GRANULES]


@pytest.fixture(scope="module")
def total(notes):
    """What all tests here have compared."""
    total = Counter()
    yield total
    notes.append("live oracle, compared: " + ", ".join(f"{count:,} {what}" for what, count in total.items()))


@pytest.fixture
def seen(total):
    """Counts what one test compares."""
    seen = Counter()
    yield seen
    total.update({"addresses": seen["addresses"]})


# The shadow


def fill_and_compare(machine, seen):
    """Everything faulted in, in all guests; then the shadows and the answers are compared."""
    for guest, (reads, writes) in zip(machine.guests, machine.fill(), strict=True):
        stages = compare_shadow(machine, guest, seen)
        compare_answers(machine, guest, "read", reads, stages)
        compare_answers(machine, guest, "write", writes, stages)


@pytest.mark.parametrize("cpu, host_granule", KINDS)
def test_shadow(rng, seen, cpu, host_granule):
    """After reads and writes of everything the shadow is what the two stages are, and so was every answer."""
    for _ in range(MACHINES):
        machine = RandomMachine(rng, cpu, host_granule)
        fill_and_compare(machine, seen)
        machine.vm.check()
    assert seen["addresses"] == MACHINES * 2 * SAMPLE
    for what in ("read", "write", "fault"):
        assert seen[what] > seen["addresses"] // 20, what


POLICIES = [("reverse-map", "exact"), ("reverse-map", "kvm72"), ("blow-away", "exact"), ("blow-away-lean", "kvm72")]


@pytest.mark.parametrize("teardown, tlbi", POLICIES)
@pytest.mark.parametrize("host_granule", GRANULES)
def test_changes(rng, seen, host_granule, teardown, tlbi):
    """The host changes its mappings, L1 edits its tables and invalidates: at once the shadow allows nothing that the
    two stages no longer do; and when everything is faulted in again, all that they do."""
    for _ in range(CHANGING):
        cpu = str(rng.choice(CPUS))
        machine = RandomMachine(rng, cpu, host_granule, teardown=teardown, tlbi=tlbi)
        fill_and_compare(machine, seen)
        for _ in range(3):
            change_host(machine)
            for guest in machine.guests:
                change_guest(machine, guest)
            for guest in machine.guests:
                compare_shadow(machine, guest, seen, excess)
            fill_and_compare(machine, seen)
        machine.vm.check()
    assert seen["addresses"] == CHANGING * 7 * 2 * SAMPLE


def change_host(machine):
    """Some ranges are unmapped, protected, moved, logged or aged."""
    rng, vm, page = machine.rng, machine.vm, machine.features.host_granule
    extents = machine.host.extents
    for n in rng.integers(0, len(extents.starts), 40):
        start, end = int(extents.starts[n]), int(extents.ends[n])
        if rng.random() < 0.5:  # a part of it, of no more than a block in a place of its own
            start += int(rng.integers(0, (end - start) // page)) * page
            end = min(end, start + page * int(rng.integers(1, 513)))
        change = rng.integers(0, 7)
        if change == 0:
            vm.unmap(start, end, partial=str(rng.choice(["split", "drop"])))
        elif change == 1:
            vm.host.protect(start, end, str(rng.choice(["rwx", "r", "rx", "w", "-"])))
        elif change == 2 and end - start <= 512 * M:
            machine.host.map(start, end - start)
        elif change in (3, 4):
            vm.log_dirty(start, end, on=bool(change == 3))
        elif change == 5:
            vm.dirty_log(start, end)
        else:
            vm.age(start, end)


def change_guest(machine, guest):
    """L1 rewrites some leaves and cuts off a table; now and then it invalidates all at once instead of one by one."""
    # Linux 7.2 takes a range by the letter: of a block that it names in part, leaves beside that part stay
    owed = guest.tables.edit(150, whole_ranges=machine.tlbi == "kvm72") + guest.tables.cut()
    if machine.rng.random() < 0.2:
        owed = [(str(machine.rng.choice(["VMALLS12E1IS", "ALLE1IS"])), 0)]
    for op, operand in owed:
        guest.vcpu.tlbi(op, operand)


def test_stage2_off(rng, seen):
    """With L1's stage 2 off the shadow is the canonical table."""
    for cpu, host_granule in KINDS:
        machine = RandomMachine(rng, cpu, host_granule, guests=1)
        vcpu = machine.vm.vcpus[0]
        index = vcpu.load(0, 0, hcr=0).index
        ipas = machine.host.extents.pick(rng, SAMPLE)
        ipas[::50] = rng.integers(0, 1 << machine.features.pa_bits, len(ipas[::50]), dtype=np.uint64)
        for access in (READ, WRITE):
            vcpu.fault_many(ipas, access)
        shadow, canonical = machine.walk_engine(index, ipas), machine.walk_engine(None, ipas)
        assert not differences(shadow, canonical).any()
        seen["addresses"] += len(ipas)
        assert np.count_nonzero(shadow["read"]) > len(ipas) // 20


def simple_machine(**options):
    """A machine of one guest, whose table maps nothing yet, and whose memory the host does not map yet."""
    machine = Machine("cortex-a72", regions=(Region(DATA, 64 * M, PAGE),), **options)
    tables = Tables(machine.mem.read64, machine.mem.write64, TABLES)
    tables.oa_bits = machine.features.pa_bits
    return machine, machine.guest(tables)


PAIRS = [(a, sh, b) for b in MEMATTRS.tolist() for a in MEMATTRS.tolist() for sh in range(4)]


@pytest.mark.parametrize("policy", ["architectural", "kvm72"])
def test_memory_types(seen, policy):
    """Every MemAttr and SH of L1 over every MemAttr of the host; Linux 7.2 takes the host's alone."""
    machine, guest = simple_machine(attributes=policy)
    for n, (a, sh, b) in enumerate(PAIRS):
        guest.tables.map(n * PAGE, DATA + n * PAGE, memattr=a, sh=sh)
        machine.vm.host.map(DATA + n * PAGE, PAS + n * PAGE, PAGE, memattr=b)
    ipas = np.arange(len(PAIRS), dtype=np.uint64) * PAGE
    guest.vcpu.fault_many(ipas, READ)
    stages, shadow = machine.two_stages(guest, ipas), machine.walk_engine(guest.index, ipas)
    assert shadow["read"].all() and shadow["write"].all()
    assert len(np.unique(stages.first["attr"])) == len(np.unique(stages.second["attr"])) == len(MEMATTRS)
    expected = stages.both if policy == "architectural" else stages.second
    assert_none(differences(shadow, expected), guest, pair=PAIRS, shadow=shadow, **vars(stages))
    seen["addresses"] += len(ipas)


# A test of these tests: what is wrong on purpose is found

R, W, AF, XN = 1 << 6, 1 << 7, 1 << 10, 1 << 54
NC, OSH = 0b1010 << 2, 1 << 8  # from write-back to Non-cacheable, from inner to outer shareable
FLIPS = {"invalid": 1, "read": R, "write": W, "MemAttr": NC, "SH": OSH, "PA 21": 1 << 21, "PA 43": 1 << 43}


@pytest.fixture
def small():
    """Sixteen pages and a block of L1's, and addresses all over them."""
    machine, guest = simple_machine()
    machine.vm.host.map(DATA, PAS, 4 * M)  # two blocks
    guest.tables.map_range(0, DATA, 16 * PAGE)
    guest.tables.map(2 * M, DATA + 2 * M, 2)
    guest.ipas = np.array([*range(0, 16 * PAGE, K), *range(2 * M, 4 * M, 64 * K)], np.uint64)
    guest.vcpu.fault_many(guest.ipas, WRITE)
    return machine, guest


def found(machine, guest):
    stages = machine.two_stages(guest, guest.ipas)
    return differences(machine.walk_engine(guest.index, guest.ipas), stages.both)


@pytest.mark.parametrize("flip", [*FLIPS.values(), AF, 1 << 12], ids=[*FLIPS, "AF", "PA 12"])
def test_notices_a_wrong_page(small, flip):
    """A bit of one leaf of the shadow: just the addresses of its page differ."""
    machine, guest = small
    assert not found(machine, guest).any()
    machine.vm._poke(guest.index, 5 * PAGE, flip)
    assert (found(machine, guest) == (guest.ipas >> 12 == 5)).all()


@pytest.mark.parametrize("flip", [*FLIPS.values(), AF], ids=[*FLIPS, "AF"])
def test_notices_a_wrong_block(small, flip):
    """The same for a block."""
    machine, guest = small
    machine.vm._poke(guest.index, 3 * M, flip)
    assert (found(machine, guest) == (guest.ipas >= 2 * M)).all()


@pytest.mark.parametrize("flip", FLIPS.values(), ids=FLIPS)
def test_notices_a_wrong_host_leaf(small, flip):
    """The host's block under L1's pages changed, and the shadow did not follow."""
    machine, guest = small
    machine.vm._poke(None, DATA, flip)
    assert (found(machine, guest) == (guest.ipas < 2 * M)).all()


EDITS = {
    "another page": (DATA, {}),
    "permission": (DATA + 7 * PAGE, {"perm": "r"}),
    "MemAttr": (DATA + 7 * PAGE, {"memattr": 5}),
    "SH": (DATA + 7 * PAGE, {"sh": 2}),
    "AF": (DATA + 7 * PAGE, {"af": 0}),
}


@pytest.mark.parametrize("cipa, fields", EDITS.values(), ids=EDITS)
def test_notices_a_missing_tlbi(small, cipa, fields):
    """L1 edited a leaf: the shadow is stale until it invalidates."""
    machine, guest = small
    guest.tables.map(7 * PAGE, cipa, **fields)
    assert (found(machine, guest) == (guest.ipas >> 12 == 7)).all()
    guest.vcpu.tlbi("IPAS2E1IS", 7)
    guest.vcpu.fault_many(guest.ipas, READ)
    guest.vcpu.fault_many(guest.ipas, WRITE)
    assert not found(machine, guest).any()


def test_notices_a_wrong_fetch(small):
    """XN, and a PA that is not the one."""
    machine, guest = small
    machine.oracle.pages(PAS, 4 * M)
    guest.vcpu.fault_many(guest.ipas, EXEC)
    ipas, pages = np.arange(16, dtype=np.uint64) * PAGE, np.arange(16)
    assert (machine.oracle.fetch(ipas, machine.engine_registers(guest.index)) == pages).all()
    machine.vm._poke(guest.index, 5 * PAGE, XN)
    machine.vm._poke(guest.index, 6 * PAGE, 1 << 12)
    pages[5:7] = FAULT, 7
    assert (machine.oracle.fetch(ipas, machine.engine_registers(guest.index)) == pages).all()


# Execution, for which AT has no form: an instruction is fetched and executed at EL1

CODE_REGIONS = (Region(DATA, 4 * M, PAGE), Region(DATA + 16 * M, 16 * M, 2 * M))
CODE_SIZE, HOST_CODE_SIZE = 32 * M, 32 * M
FETCHES = 500


@pytest.mark.parametrize("cpu, host_granule", KINDS)
def test_fetch(rng, total, cpu, host_granule):
    """An instruction can be fetched through the shadow where it can be through L1's table and then through the host's,
    and it is the one of the same page."""
    executed = 0
    for _ in range(MACHINES):
        machine = RandomMachine(rng, cpu, host_granule, CODE_REGIONS, PAS + HOST_CODE_SIZE)
        machine.oracle.pages(DATA, CODE_SIZE)
        machine.oracle.pages(PAS, HOST_CODE_SIZE)
        for guest in machine.guests:
            ipas = guest.ipas[:FETCHES] & ~np.uint64(7)  # not a page's last word: what follows must be mapped as well
            for access in (READ, WRITE, EXEC):
                guest.vcpu.fault_many(ipas, access)
            first = fetch_guest(machine, guest, ipas)
            both = np.full(len(ipas), FAULT)
            cipas = DATA + (first[first >= 0].astype(np.uint64) << 12)
            both[first >= 0] = machine.oracle.fetch(cipas, machine.engine_registers(None))
            shadow = machine.oracle.fetch(ipas, machine.engine_registers(guest.index))
            assert_none(shadow != both, guest, ipa=ipas, shadow=shadow, first=first, both=both)
            executed += np.count_nonzero(shadow >= 0)
            total["fetches"] += len(ipas)
    assert executed > MACHINES * 2 * FETCHES // 50


def fetch_guest(machine, guest, ipas):
    """Fetches through L1's table; those that leave L1's memory, or are beyond the output size, cannot go on."""
    found = machine.oracle.fetch(ipas, guest.regs)
    if guest.tables.oa_bits <= 32:  # all of DATA is beyond
        found[found >= 0] = FAULT
    return found


# The walker


@pytest.mark.parametrize("cpu", CPUS)
def test_walk_many(rng, seen, cpu):
    """walk_many over L1's table: the fault status code with its level, or the page and its memory type."""
    for _ in range(2 * MACHINES):
        machine = RandomMachine(rng, cpu)
        for guest in machine.guests:
            cfg = s2shadow.Stage2Config(features=machine.features, **guest.registers)
            answers = machine.walk_guest(guest, guest.ipas, machine.el0)
            el0 = s2shadow.EL0 if machine.el0 else 0
            for name, access in (("read", READ), ("write", WRITE)):
                walks = s2shadow.walk_many(machine.mem, cfg, guest.ipas, access | el0, update=False)
                seen["addresses"] += len(walks)
                compare_walks(guest, walks, answers, name)
    assert seen["addresses"] == MACHINES * 2 * 4 * SAMPLE


# (MAIR code, shareability) in PAR by MemAttr and SH, where stage 1 is write-back
ATTRIBUTES = [
    [combined_attributes(memattr, sh, False, True) if memattr in MEMATTRS else (0, 0) for sh in range(4)]
    for memattr in range(16)
]


def compare_walks(guest, walks, answers, name):
    allowed, fsc = answers[name], answers[name + "_fsc"]
    same_fault = np.where(fsc == ADDRESS_SIZE, walks["fsc"] < 4, (walks["fsc"] == fsc) & (walks["level"] == fsc & 3))
    wrong = (allowed != (walks["status"] == 0)) | ~allowed & ~same_fault
    wrong |= allowed & (walks["pa"] >> 12 << 12 != answers["pa"])
    if not guest.registers["hcr"] & HCR_CD:
        types = np.array(ATTRIBUTES)[walks["memattr"], walks["sh"]]
        wrong |= allowed & ((types[:, 0] != answers["attr"]) | (types[:, 1] != answers["sh"]))
    assert_none(wrong, guest, ipa=guest.ipas, walk=walks, oracle=answers)


@pytest.mark.parametrize("granule", GRANULES)
@pytest.mark.parametrize("cpu", CPUS)
def test_start_levels(rng, total, cpu, granule):
    """Every SL0 with every T0SZ up to 39 over an empty table: the level of the fault says where the walk started, or
    that it never did."""
    machine = Machine(cpu)
    ipas = rng.integers(0, 1 << np.arange(1, machine.features.pa_bits, dtype=np.uint64), dtype=np.uint64)
    legal = 0
    for sl0 in range(4):
        for t0sz in range(40):
            vtcr = t0sz | sl0 << 6 | TG0[granule] << 14 | 5 << 16
            cfg = s2shadow.Stage2Config(TABLES, vtcr, features=machine.features)
            fsc = machine.oracle.walk(ipas, Registers(TABLES, vtcr))["read_fsc"]
            walks = s2shadow.walk_many(machine.mem, cfg, ipas, READ)
            assert (walks["fsc"] == fsc).all(), (sl0, t0sz)
            assert cfg.error is None or (fsc == 4).all()
            legal += cfg.error is None
            total["addresses"] += len(ipas)
    assert legal == len(start_levels(granule, machine.features.pa_bits))
