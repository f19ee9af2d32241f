"""Isolation as a property: whatever L1 does, no leaf reaches or allows what the host does not map and allow now.

The judge is ``hostile.Hostile.verify``, after every step. A seeded run over many machines (10^6 steps in the long
form), and hypothesis, which makes a failure small.
"""

import os
import random

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import hostile
from hostile import BASE, Breach, Hostile, K, M
from rig import S2PIR
from s2shadow import HIT, MAPPED
from seed import SEED

LONG = os.environ.get("S2SHADOW_LONG") == "1"
STEPS = 400  # of one machine
MACHINES = 2500 if LONG else 12
GRANULES = (*[4 * K] * 8, 16 * K, 64 * K)


def machine(n, **options):
    rng = random.Random(f"{SEED} {n}")
    return Hostile(rng, host_granule=GRANULES[n % len(GRANULES)], **options), rng


@pytest.mark.parametrize("part", range(10 if LONG else 1))
def test_hostile_run(part, notes):
    """Machines of every kind, 400 steps each, all of them judged: 4,800 steps, or 10^6."""
    names, weights = list(hostile.WEIGHTS), list(hostile.WEIGHTS.values())
    steps = leaves = 0
    for n in range(part * MACHINES // 10, (part + 1) * MACHINES // 10) if LONG else range(MACHINES):
        m, rng = machine(n)
        for step in range(STEPS):
            name = rng.choices(names, weights)[0]
            try:
                getattr(m, name)(rng)
                m.verify()
            except Exception as error:
                error.add_note(f"machine {n} of S2SHADOW_SEED={SEED}, step {step}: {name}")
                raise
            steps += 1
        leaves += m.vm.stats.installed
        m.end()
    assert steps == (MACHINES // 10 if LONG else MACHINES) * STEPS and leaves > steps / 10
    notes.append(f"hostile L1: {steps} steps, {leaves} leaves installed")


L2 = ("fault", "fault", "fault", "batch", "aliases", "aliases", "alias_table", "translate")
L1 = ("load", "load", "put", "l1_map", "l1_map_run", "l1_scribble", "l1_loop", "l1_rebuild")
INVALIDATIONS = ("tlbi", "tlbi", "tlbi", "tlbi_nonsense", "tlbi_many")
HOST = ("host_map", "host_map_all", "unmap", "protect", "log_dirty", "dirty_log", "age", "take_tlbis")
RACES = ("raced_faults", "raced_host")
NUMBERS = st.integers(0, 1 << 16)


class HostileL1(RuleBasedStateMachine):
    """Hypothesis picks what happens, and numbers from which the details follow."""

    @initialize(granule=st.sampled_from(GRANULES), seed=NUMBERS)
    def start(self, granule, seed):
        self.machine = Hostile(random.Random(seed), host_granule=granule)

    def do(self, name, seed):
        getattr(self.machine, name)(random.Random(seed))

    @rule(name=st.sampled_from(L2), seed=NUMBERS)
    def l2(self, name, seed):
        self.do(name, seed)

    @rule(name=st.sampled_from(L1), seed=NUMBERS)
    def l1(self, name, seed):
        self.do(name, seed)

    @rule(name=st.sampled_from(INVALIDATIONS), seed=NUMBERS)
    def l1_invalidates(self, name, seed):
        self.do(name, seed)

    @rule(name=st.sampled_from(HOST), seed=NUMBERS)
    def host(self, name, seed):
        self.do(name, seed)

    @rule(name=st.sampled_from(RACES), seed=NUMBERS)
    def at_once(self, name, seed):
        self.do(name, seed)

    @precondition(lambda self: hasattr(self, "machine"))
    @invariant()
    def isolated(self):
        self.machine.verify()

    def teardown(self):
        if hasattr(self, "machine"):
            self.machine.end()


TestHostileL1 = HostileL1.TestCase
TestHostileL1.settings = settings(max_examples=2000 if LONG else 40, stateful_step_count=40, deadline=None)


# The judge itself


def quiet(**options):
    """A machine whose two vCPUs have leaves of sound tables."""
    m = Hostile(random.Random(11), teardown="reverse-map", tight=False, populate=False, pa_bits=48, **options)
    m.l1_rebuild(random.Random(12))
    rng = random.Random(13)
    for vcpu in m.vm.vcpus:
        tables = m.tables[vcpu.index]
        vcpu.load(tables.vttbr(1 + vcpu.index), tables.vtcr, big_endian=tables.big_endian, s2pir=S2PIR)
        m.loaded[vcpu.index] = vcpu.index
    for _ in range(4):
        m.aliases(rng)
    m.verify()
    assert m.vm.stats.live > 20
    return m


@pytest.mark.parametrize("bit", [7, 12, 20, 36, 40])
def test_judge_sees_one_bit(bit):
    """A leaf with one bit of its output address or its W other than it should be."""
    m = quiet()
    seen = 0
    for context in m.vm.contexts:
        for row in m.vm.shadow(context.index):
            if bit == 7 and row["perm"] & 2:
                continue                    # W goes: that is legal
            m.vm._poke(context.index, int(row["ipa"]), 1 << bit)
            before = m.host.perm.copy()
            if bit == 7:                    # the host forgets that it allows W
                m.host.protect(BASE, BASE + m.host.pages * m.page, 1 | 4 | 32)
            elif bit < 30:                  # nothing else is mapped by the host
                m.host.perm[:] = 0
                m.host.map(int(row["cipa"]), int(row["cipa"] + row["size"]), int(row["pa"]), 0x27)
            with pytest.raises(Breach):
                m.scan()
            m.vm._poke(context.index, int(row["ipa"]), 1 << bit)
            m.host.perm[:] = before
            m.host.changed = True
            seen += 1
    assert seen
    m.verify()


def test_judge_sees_what_the_host_took():
    """Each page that a leaf maps, taken from the host behind the engine's back."""
    m = quiet()
    pages = {int(c) for context in m.vm.contexts for c in m.vm.shadow(context.index)["cipa"]}
    for cipa in pages:
        kept = m.host.perm.copy()
        m.host.unmap(cipa, cipa + m.page)
        with pytest.raises(Breach):
            m.scan()
        with pytest.raises(Breach):
            m.verify_host()
        m.host.perm[:] = kept
        m.host.changed = True
    assert len(pages) > 4
    m.verify()


def test_judge_sees_a_lost_write():
    """A page that L2 wrote while it was logged, and that the log does not have."""
    m = quiet()
    m.vm.log_dirty(BASE, m.ram_end)
    m.host.log(BASE, m.ram_end, True)
    m.host.written[2 * M // m.page + 900] = True
    with pytest.raises(Breach, match="dirty log"):
        for seed in range(100):
            m.dirty_log(random.Random(seed))


def test_two_decoders():
    """Entry by entry and level by level: the same leaves from the same pages."""
    for pa_bits, granule in ((40, 4 * K), (52, 4 * K), (48, 16 * K), (52, 16 * K), (52, 64 * K)):
        m = Hostile(random.Random(5), granule, "reverse-map", tight=False, pa_bits=pa_bits, populate=False)
        for seed in range(12):
            m.aliases(random.Random(seed))
        total = 0
        for context in m.vm.contexts:
            where = (context.host_vttbr, context.host_vtcr, m.page, pa_bits)
            plain = hostile.shadow_leaves(*m.vm.tables(context.index), *where)
            ipa, pa, size, perm, word = hostile.decode_tables(*m.vm.tables(context.index), *where)
            columns = zip(pa.tolist(), size.tolist(), perm.tolist(), strict=True)
            assert sorted(columns) == sorted(plain)
            shadow = m.vm.shadow(context.index)
            order = np.argsort(ipa)
            assert np.array_equal(shadow["ipa"], ipa[order]) and np.array_equal(shadow["desc"], word[order])
            total += len(plain)
        assert total


def test_answers_are_judged():
    """An access that was let through to another page, or that the host forbids, is a breach."""
    m = quiet()
    row = next(m.vm.shadow(context.index)[0] for context in m.vm.contexts if context.entries)
    answer = np.array([(MAPPED, row["cipa"], row["pa"], row["size"], row["ipa"])], hostile.ANSWER)
    m.judge(answer, np.array([1], np.uint8))
    for field, value in (("pa", row["pa"] + m.page), ("cipa", 1 << 45)):
        wrong = answer.copy()
        wrong[field] = value
        wrong["kind"] = HIT
        with pytest.raises(Breach):
            m.judge(wrong, np.array([1], np.uint8))
    m.host.protect(BASE, m.ram_end, 1)
    with pytest.raises(Breach):
        m.judge(answer, np.array([2], np.uint8))
