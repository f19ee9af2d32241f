"""What a vCPU remembers of L1's tables is a walk cache: it may be as stale as L1's TLBIs allow, and never more.

Table descriptors may be any that L1 had there since the last operation that reaches them; leaves are read anew; a
fault is reported only from the tables as they are now.
"""

import random

import pytest

import s2shadow
from rig import DATA, HOST, PAGE, RAM, RAM_SIZE, G, M, Rig, single, span
from s2shadow import L1_FAULT, MAPPED, READ

BASES = (0, 2 * M, 64 * M, G, G + 2 * M)
SLOTS = [base + n * PAGE for base in BASES for n in (0, 3, 511)]
FORGETS = ("IPAS2E1IS", "IPAS2E1", "RIPAS2E1IS", "RIPAS2E1OS", "VMALLS12E1IS", "VMALLS12E1", "ALLE1IS", "ALLE1")
KEEPS = ("IPAS2LE1IS", "IPAS2LE1", "RIPAS2LE1IS", "VMALLE1IS", "VAE1IS")  # last level, or stage 1


class History:
    """Rig, and for each vCPU every value that a descriptor had since that vCPU had to forget."""

    def __init__(self, big_endian):
        self.r = Rig(vcpus=2, big_endian=big_endian, contexts=4)
        self.values = [{}, {}]
        self.r.tables.write = self.write
        self.copies = RAM + 8 * M
        for n in (0, 1):
            self.load(n)

    def write(self, address, word):
        old = self.r.mem.read64(address)
        for values in self.values:
            values.setdefault(address, {self.r.tables.swap(old)}).add(self.r.tables.swap(word))
        self.r.mem.write64(address, word)

    def load(self, n):
        self.r.load(n=n)
        self.values[n] = {}

    def relocate(self, ipa, level):
        """L1 moves the table below this entry: the same entries somewhere else, each one page further on."""
        where = self.r.tables.slot(ipa, level)
        desc = self.r.tables.get(where)
        if desc & 3 == 3:
            old, self.copies = self.r.tables.decode(desc), self.copies + PAGE
            for at in range(0, PAGE, 8):
                entry = self.r.tables.get(old + at)
                if entry:
                    self.write(self.copies + at, self.r.tables.swap(entry + (PAGE if level == 2 else 0)))
            self.r.tables.set(where, self.copies | 3)

    def forget_shadows(self):
        """The host takes all memory away and gives it back: the next access walks, with what the vCPU remembers."""
        self.r.vm.unmap(RAM, RAM + RAM_SIZE)
        self.r.vm.host.map(RAM, HOST + RAM, RAM_SIZE)

    def outcomes(self, n, ipa, table=None, level=1):
        """cIPAs that the vCPU may find."""
        tables = self.r.tables
        index = ipa >> tables.shift(level) & 511
        address = (tables.base if table is None else table) + 8 * index
        now = tables.get(address)
        found = set()
        for desc in self.values[n].get(address, set()) | {now}:
            if level < 3 and desc & 3 == 3:
                found |= self.outcomes(n, ipa, tables.decode(desc), level + 1)
        if now & 3 == (3 if level == 3 else 1):
            found.add(now & 0xFFFF_FFFF_F000 & -tables.size(level) | ipa & tables.size(level) - 1)
        return found

    def fault(self, n, ipa):
        """Whether the answer was an old one."""
        fresh = s2shadow.walk(self.r.mem, self.cfg, ipa, READ)
        f = self.r.fault(ipa, READ, n)
        if f.kind == L1_FAULT:
            assert (f.fsc, f.level) == (fresh.fsc, fresh.level), "a fault that is not in the tables"
            return False
        assert f.kind == MAPPED and f.pa == HOST + f.cipa
        assert f.cipa in self.outcomes(n, ipa)
        return bool(fresh.status) or f.cipa != fresh.pa

    @property
    def cfg(self):
        tables = self.r.tables
        return s2shadow.Stage2Config(tables.vttbr(), tables.vtcr, self.r.features, big_endian=tables.big_endian)


def edit(rng, history, ipa):
    tables, level = history.r.tables, rng.choice((3, 3, 3, 3, 2, 1))
    what = rng.choice(("map", "map", "map", "unmap", "relocate", "relocate", "relocate"))
    if what == "relocate":
        history.relocate(ipa, rng.choice((1, 2, 2)))
    elif what == "unmap":
        tables.unmap(ipa, level)
    else:
        level = max(level, 2)
        tables.map(ipa, DATA + rng.randrange(0, 4 * M, tables.size(level)), level)


def operand(rng, op, ipa):
    if op.startswith("RIPAS2"):
        return span(ipa, PAGE)
    return single(ipa, rng.choice((None, PAGE)), 3) if op.startswith("IPAS2") else 0


@pytest.mark.parametrize("big_endian", [False, True])
def test_as_stale_as_allowed(big_endian):
    """Random edits without their TLBIs, random TLBIs, reloads: every answer is one that hardware might give."""
    rng, history, stale = random.Random(5), History(big_endian), 0
    for ipa in SLOTS:
        history.r.tables.map(ipa, DATA + ipa % M, 3)
    for _ in range(1000):
        near = rng.choice((SLOTS, *[[ipa for ipa in SLOTS if ipa & -2 * M == base] for base in BASES]))
        n, dice = rng.randrange(2), rng.random()
        if dice < 0.5:
            edit(rng, history, rng.choice(near))
        elif dice < 0.6:
            op = rng.choice(KEEPS)
            history.r.vm.vcpus[n].tlbi(op, operand(rng, op, rng.choice(near)))
        elif dice < 0.64:
            op = rng.choice(FORGETS)
            history.r.vm.vcpus[n].tlbi(op, operand(rng, op, rng.choice(near)))
            if not op.startswith(("IPAS2", "RIPAS2")):  # those name an address: what others use may stay
                history.values = [{}, {}]
        elif dice < 0.66:
            history.load(n)
        for ipa in rng.choices(near, k=4):
            stale += history.fault(n, ipa)
            history.forget_shadows()
    assert (stale > 20) == (not big_endian), "big-endian tables are not remembered, others are"
    history.r.vm.check()


@pytest.mark.parametrize("op", FORGETS)
@pytest.mark.parametrize("level", [1, 2])
def test_forgets(op, level):
    """One table moved, one operation that names an address under it: every vCPU goes the new way."""
    history = History(False)
    ipa = G + 2 * M + 3 * PAGE
    history.r.tables.map(ipa, DATA)
    for n in (0, 1, 0, 1):
        history.fault(n, ipa)
        history.forget_shadows()
    history.relocate(ipa, 2)
    if level == 1:
        history.relocate(ipa, 1)
        history.r.tables.set(history.r.tables.slot(ipa, 3), history.r.tables.leaf(DATA + PAGE, 3))
    assert history.fault(0, ipa), "nothing is remembered: what is tested here?"
    xt = span(ipa, PAGE) if op.startswith("R") else single(ipa) if op.startswith("I") else 0
    history.r.vcpu.tlbi(op, xt)
    history.forget_shadows()
    for n in (1, 0):
        assert history.r.fault(ipa, n=n).cipa == DATA + PAGE


@pytest.mark.parametrize(("op", "forgets"), [("ALLE1IS", True), ("ALLE1", True), ("VMALLS12E1IS", False)])
def test_under_another_vmid(op, forgets):
    """What names all VMIDs reaches the vCPUs of all; what names one leaves those of others alone."""
    history = History(False)
    r, ipa = history.r, G + 2 * M + 3 * PAGE
    r.tables.map(ipa, DATA)
    r.load(vmid=2, n=1)
    for _ in range(2):
        history.fault(0, ipa)
        history.forget_shadows()
    history.relocate(ipa, 2)
    assert history.fault(0, ipa), "nothing is remembered: what is tested here?"
    r.vm.vcpus[1].tlbi(op, 0)
    history.forget_shadows()
    assert r.fault(ipa).cipa == (DATA + PAGE if forgets else DATA)
