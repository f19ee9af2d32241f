"""Every answer of QEMU's that the architecture decides, through each of the ways to get one: a walk, a batch of walks,
a walk whose memory is the caller's, and the fault path, scalar and in batches. `pytest -m vectors` runs just this.
"""

from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest

import s2shadow
import vectors
from s2shadow import HIT, L1_FAULT, MAPPED, MMIO

pytestmark = pytest.mark.vectors
HOST = 1 << 21  # what is added to a cIPA to get a PA
OPEN = {"public": 4520, "cpus": 1628}  # answers flagged as open
EXPRESSIBLE = {0x00, 0x04, 0x08, 0x0C, 0x44, 0xFF}  # what an FWB host can say of a guest without FWB


def swap64(word):
    return int.from_bytes(word.to_bytes(8, "little"), "big")


class Machine:
    """The memory and registers of one set, as the engine wants them. Words are what memory holds, whatever EE says."""

    at_once = 1  # accesses; None: as many as QEMU's memory stays the same for
    updates = True

    def __init__(self, tables, ram):
        self.tables, self.ram = tables, ram
        self.mem = self.memory()
        self.words = self.stored(tables.words)
        self.pages = sorted({address & -4096 for address in self.words})
        self.settle({})
        self.registers = {"hcr": tables.hcr, "big_endian": tables.big_endian}
        self.cfg = s2shadow.Stage2Config(tables.vttbr, tables.vtcr, features=features(tables), **self.registers)

    def memory(self):
        mem = s2shadow.GuestMemory()
        for start, size in self.ram:
            mem.add(start, size)
        return mem

    def stored(self, words):
        words = dict(words)
        return {a: swap64(w) for a, w in words.items()} if self.tables.big_endian else words

    def write(self, words):
        for address, word in words.items():
            self.mem.write64(address, word)

    def image(self):
        """Every page that holds a word of the tables."""
        return [self.mem.read(page, 4096) for page in self.pages]

    def changes(self):
        """The words that are no longer what they were."""
        if self.image() == self.settled:
            return {}
        now = {address: self.mem.read64(address) for address in self.words}
        return {address: word for address, word in now.items() if word != self.words[address]} or {None: "beside"}

    def settle(self, changes):
        """Memory as QEMU left it, whatever the walk did."""
        self.words.update(self.stored(changes))
        self.write(self.words)
        self.settled = self.image()

    def is_ram(self, address):
        return any(start <= address < start + size for start, size in self.ram)

    def close(self):
        pass


def features(tables):
    return s2shadow.Features(**vectors.features_of(tables.cpu))


# Ways to an answer: each takes the next accesses, over which QEMU's memory stays the same, and gives as many answers


class Walks(Machine):
    def answers(self, accesses):
        (access,) = accesses
        return [self.described(s2shadow.walk(self.mem, self.cfg, access.ipa, access.flags), access)]

    def described(self, w, access):
        return SimpleNamespace(
            status=w.status, fsc=w.fsc, level=w.level, pa=w.pa, memattr=w.memattr, sh=w.sh, updated=w.updated,
            hpfar=access.ipa >> 12 << 4,
        )  # fmt: skip


class Batches(Machine):
    """walk_many without updates: it never writes, and says which update was due."""

    at_once = None
    updates = False

    def answers(self, accesses):
        ipas = np.array([access.ipa for access in accesses], dtype=np.uint64)
        flags = np.array([access.flags for access in accesses], dtype=np.uint8)
        rows = s2shadow.walk_many(self.mem, self.cfg, ipas, flags, update=False)
        names = rows.dtype.names
        return [
            SimpleNamespace(**dict(zip(names, row, strict=True)), hpfar=access.ipa >> 12 << 4)
            for access, row in zip(accesses, rows.tolist(), strict=True)
        ]


class Steps(Walks):
    """The caller serves each request from a dictionary."""

    def memory(self):
        return None

    def write(self, words):
        self.now = dict(words)

    def image(self):
        return dict(self.now)

    def changes(self):
        return {address: word for address, word in self.now.items() if word != self.settled.get(address)}

    def answers(self, accesses):
        (access,) = accesses
        step = s2shadow.walk_step(self.cfg, access.ipa, access.flags)
        while (request := step.request) is not None:
            if self.is_ram(request.address):
                word = self.now.get(request.address, 0)
                if request.kind == "swap" and word == request.expected:
                    self.now[request.address] = request.desired
                step.feed(word)
            else:
                step.abort()
        return [self.described(step.result, access)]


@cache
def engine(ram, feat, linear):
    """One NestedVM for all sets of a CPU: every set loads its registers and leaves memory empty again."""
    mem = s2shadow.GuestMemory()
    for start, size in ram:
        mem.add(start, size)
    vm = s2shadow.NestedVM(mem, features=feat, table_base=0)
    if linear:
        vm.host.populate = "linear"
    else:
        for start, size in ram:
            if start + size + HOST <= 1 << feat.pa_bits:
                vm.host.map(start, start + HOST, size, memattr="normal-as-s1")
    return vm


class Faults(Machine):
    """The fault path; the host maps all RAM and leaves attributes to stage 1, so that the shadow shows L1's."""

    linear = False

    def memory(self):
        self.vm = engine(tuple(self.ram), features(self.tables), self.linear)
        self.vcpu = self.vm.vcpus[0]
        registers = {"hcr": self.tables.hcr, "big_endian": self.tables.big_endian}
        self.context = self.vcpu.load(self.tables.vttbr, self.tables.vtcr, **registers).index
        return self.vm.mem

    def answers(self, accesses):
        (access,) = accesses
        answers = [self.described(self.vcpu.fault(access.ipa, access.flags), access)]
        self.vcpu.tlbi("ALLE1IS")
        return answers

    def described(self, f, access):
        got = SimpleNamespace(status=int(f.kind == L1_FAULT), fsc=0, level=f.level, pa=f.cipa, hpfar=f.hpfar)
        got.memattr = got.sh = got.updated = None
        if f.kind == L1_FAULT:
            got.fsc = f.fsc
        elif self.is_ram(f.cipa) and not f.cipa >> self.vm.features.pa_bits:
            assert f.kind in (MAPPED, HIT) and f.pa == f.cipa + (0 if self.linear else HOST), (access, f)
            if self.at_once == 1 and "attr" in access.answer:
                self.take_attributes(got)
        else:
            assert (f.kind, f.fsc) == (MMIO, 0x10), (access, f)
        return got

    def take_attributes(self, got):
        (leaf,) = self.vm.shadow(self.context)
        got.memattr, got.sh = int(leaf["memattr"]), int(leaf["sh"])

    def close(self):
        self.write(dict.fromkeys(self.words, 0))
        self.vcpu.put()


class FaultBatches(Faults):
    """Runs of accesses over one shadow, which keeps what it learned; the host table grows by itself."""

    at_once = None
    linear = True

    def answers(self, accesses):
        ipas = np.array([access.ipa for access in accesses], dtype=np.uint64)
        flags = np.array([access.flags for access in accesses], dtype=np.uint8)
        rows = self.vcpu.fault_many(ipas, flags)
        self.vcpu.tlbi("ALLE1IS")
        names = rows.dtype.names
        faults = [SimpleNamespace(**dict(zip(names, row, strict=True))) for row in rows.tolist()]
        return [self.described(f, access) for f, access in zip(faults, accesses, strict=True)]


WAYS = {"walk": Walks, "walk_many": Batches, "walk_step": Steps, "fault": Faults, "fault_many": FaultBatches}


def runs(accesses, at_once):
    """The accesses in groups over which QEMU's memory stays as it is."""
    group = []
    for access in accesses:
        group.append(access)
        if access.changes or len(group) == at_once:
            yield group
            group = []
    if group:
        yield group


# Against QEMU


def differences(machine, access, got):
    """What one answer has that QEMU's has not."""
    if machine.__class__ in (Faults, FaultBatches) and not got.status:
        wrong = attribute_differences(machine, access, got)
        bare = {name: value for name, value in access.answer.items() if name not in ("attr", "sh")}
        access = vectors.Access(access.op, access.ipa, access.ok, bare, access.changes)
    else:
        wrong = []
    return wrong + vectors.compare(machine.tables, access, got, machine.ram)


def attribute_differences(machine, access, got):
    """The shadow leaf's attributes, combined with stage 1 off as QEMU's are: the same, or the stricter that an FWB host
    has for what it cannot say. The host is inner shareable."""
    if got.memattr is None or "attr" not in access.answer or access.answer.get("cu_attr"):
        return []
    feat, dc = machine.vm.features, bool(machine.tables.hcr & vectors.HCR_DC)
    ours = vectors.combined_attributes(got.memattr, got.sh, feat.fwb, dc)
    attr, sh = access.get("attr"), access.get("sh")
    if feat.fwb and not machine.cfg.hcr & s2shadow.HCR_FWB and attr not in EXPRESSIBLE:
        attr = 0x44
    if feat.pa_bits == 52:  # the host has no SH in its leaves: only stage 1's counts besides its own
        sh = vectors.stage1_attributes(dc)[1]
    sh = 2 if attr in (0, 4, 8, 12, 0x44) else vectors.stronger_sh(sh, 3)
    return [] if ours == (attr, sh) else [f"attributes {ours}, QEMU {attr, sh}"]


def change_differences(machine, group, answers, changed):
    """Descriptors that were written, or said to be due, are those that QEMU wrote."""
    if any(access.skipped or access.answer.get("cu_mem") for access in group):
        return []
    wanted = machine.stored(group[-1].changes)
    said = [got.updated for got in answers if got.updated is not None]
    wrong = [] if said in ([], [0] * (len(said) - 1) + [bool(wanted)]) else [f"updated {said}, QEMU {wanted}"]
    if changed != (wanted if machine.updates else {}):
        wrong.append(f"changed {changed}, QEMU {wanted}")
    return wrong


def replay(way, tables, ram):
    """(answers compared, differences) of one set."""
    machine = way(tables, ram)
    compared, wrong = 0, []
    for group in runs(tables.accesses, machine.at_once):
        changed = {}
        if not all(access.skipped for access in group):
            answers = machine.answers(group)
            changed = machine.changes()
            found = change_differences(machine, group, answers, changed)
            for access, got in zip(group, answers, strict=True):
                if not access.skipped:
                    compared += 1
                    found += differences(machine, access, got)
            wrong += [(tables.number, hex(group[0].ipa), text) for text in found]
        if group[-1].changes or changed:
            machine.settle(dict(group[-1].changes))
    machine.close()
    return compared, wrong


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("row", vectors.COUNTS, ids="-".join)
def test_answers(row, way):
    """Every answer not left open: fault or address, level, code, HPFAR, attributes, descriptor changes."""
    sets, ram = vectors.sets_of(*row), vectors.load(row[0]).ram
    results = [replay(WAYS[way], tables, ram) for tables in sets]
    wrong = [text for _, texts in results for text in texts]
    compared = sum(n for n, _ in results)
    assert not wrong, f"{len(wrong)} of {compared}: {wrong[:5]}"
    assert (len(sets), compared) == vectors.COUNTS[row]


def outcome(got):
    return got.status, got.fsc, got.level, got.hpfar, None if got.status else got.pa


@pytest.mark.parametrize("name", ["public", "cpus"])
def test_open_answers(name):
    """Where the architecture leaves the answer open, all ways give the same one, and write the same."""
    ram, compared = vectors.load(name).ram, 0
    for tables in vectors.load(name).sets:
        if not any(access.answer.get("cu") for access in tables.accesses):
            continue
        walks, *others = [way(tables, ram) for way in (Walks, Steps, Batches, Faults)]
        for access in tables.accesses:
            if access.answer.get("cu"):
                compared += 1
                ((want,),) = [walks.answers([access])]
                for other in others:
                    ((got,),) = [other.answers([access])]
                    assert outcome(got) == outcome(want), (tables.number, access, type(other))
                    assert not other.updates or other.changes() == walks.changes()
            for machine in (walks, *others):
                machine.settle(dict(access.changes))
        for machine in (walks, *others):
            machine.close()
    assert compared == OPEN[name]
