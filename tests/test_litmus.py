"""Litmus tests: after this operation, who may still see the old translation and who may not.

The machine has two PEs with a TLB each, and in both TLBs the translations of five observers:

    a1   stage 2 from table A, VMID 1           b1   from table B, VMID 1 (another context of the same VMID)
    a2   stage 2 from table A, VMID 2           n1   VMID 1 with stage 2 off
    el2  virtual EL2, under the canonical host VMID

Each has, for pages 0 to 2, entries named like ``a1.ipa.0`` (stage 2 alone), ``a1.va5.0`` and ``a1.va6.0`` (combined,
by ASID), ``a1.vag.0`` (combined, global, other addresses). An outcome is what one PE has lost when the operation has
been done and L0 has done what it owes. ``must`` names what the architecture forbids to see, ``may`` what it leaves
open; anything else stays under tlbi="exact". tlbi="kvm72" may take more, of the VMID, but never less.
"""

import csv
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest

import s2shadow
from rig import DATA, HOST, PAGE, RAM, RAM_SIZE, K, M, Tables
from s2shadow import EXEC, HCR_VM, HIT, MAPPED, READ, WRITE
from s2shadow.tlbmodel import TlbModel

PAGES = range(3)
LARGE = RAM + 32 * M  # data for large granules
SPARE = 8  # a page that nobody maps at first
LOW, HIGH = 0x7F00_0000_0000, 0xFFFF_8000_0000_0000  # where stage 1 has the pages: by ASID, and global
E2H_TGE = 1 << 34 | 1 << 27
GUESTS = ("a1", "b1", "a2", "n1")
TG4K = 1 << 46


def forms(stem):
    """The shareability and nXS forms of an operation: TLBI VAE1, VAE1IS, VAE1OS, and their nXS twins."""
    return [stem + share + nxs for nxs in ("", "NXS") for share in ("", "IS", "OS")]


def every(*stems):
    return pytest.mark.parametrize("op", [op for stem in stems for op in forms(stem)])


class Litmus:
    def __init__(self, mode="exact"):
        self.mode = mode
        self.mem = s2shadow.GuestMemory()
        self.mem.add(RAM, RAM_SIZE)
        self.vm = s2shadow.NestedVM(self.mem, vcpus=2, contexts=8, tlbi=mode)
        self.vm.host.map(RAM, HOST + RAM, RAM_SIZE)
        for at in (DATA, LARGE):  # pages of their own here
            self.vm.unmap(at, at + 2 * M)
            for page in range(512):
                self.vm.host.map(at + page * PAGE, HOST + at + page * PAGE, PAGE)
        words = self.mem.read64, self.mem.write64
        self.tables = {name: Tables(*words, RAM + n * M, PAGE) for n, name in enumerate("ab")}
        for n, table in enumerate(self.tables.values()):
            table.map_range(0, DATA + n * 16 * PAGE, 3 * PAGE)
        self.tlbs = [TlbModel(entries=None) for _ in range(2)]
        self.names, self.host_vmids = {}, {}
        for pe in range(2):
            for who in GUESTS:
                self.host_vmids[who] = self.enter(pe, who).host_vmid
                for page in PAGES:
                    self.fill(pe, who, page)
        self.settle()

    # Registers and addresses

    def regs(self, who):
        """VTTBR, VTCR and HCR under which this guest runs."""
        table, vmid = self.tables["b" if who == "b1" else "a"], 2 if who == "a2" else 1
        return {"vttbr": table.vttbr(vmid), "vtcr": table.vtcr, "hcr": 0 if who == "n1" else HCR_VM}

    def enter(self, pe, who):
        return self.vm.vcpus[pe].load(**self.regs(who))

    def ipa(self, who, page):
        return (DATA if who == "n1" else 0) + page * PAGE

    @staticmethod
    def va(kind, page):
        return (HIGH if kind == "vag" else LOW) + page * PAGE

    # Filling

    def fill(self, pe, who, page):
        """L2 touches a page: hardware holds stage 2 alone, and combined entries of two ASIDs and global."""
        fault = self.vm.vcpus[pe].fault(self.ipa(who, page))
        assert fault.kind in (HIT, MAPPED)
        vmid = 2 + fault.context
        self.remember(pe, f"{who}.ipa.{page}", self.tlbs[pe].fill_ipa(vmid, fault))
        self.fill_combined(pe, who, vmid, page, fault)
        if who == "n1":  # virtual EL2 sees the same memory of L1
            self.fill_combined(pe, "el2", 1, page, fault)

    def fill_combined(self, pe, who, vmid, page, fault):
        for kind, asid in (("va5", 5), ("va6", 6), ("vag", None)):
            entry = self.tlbs[pe].fill_va(vmid, self.va(kind, page), fault, asid)
            self.remember(pe, f"{who}.{kind}.{page}", entry)

    def remember(self, pe, name, entry):
        self.names[pe, name] = entry

    # Acting

    def tlbi(self, op, xt=0, pe=0, who=None, **regs):
        """L1 issues an operation, under its own registers (those last loaded) or under those named; L0 then does what
        it owes, on both PEs."""
        result = self.vm.vcpus[pe].tlbi(op, xt, **(self.regs(who) if who else {}) | regs)
        self.settle()
        return result

    def settle(self):
        rows = self.vm.take_tlbis()
        for tlb in self.tlbs:
            tlb.apply(rows)
        self.vm.check()
        return rows

    # Looking

    def lost(self, pe):
        held = set(self.tlbs[pe])
        return {name for (n, name), entry in self.names.items() if n == pe and entry not in held}

    def expect(self, must=(), may=(), over=()):
        """Both PEs lost all of ``must``, and beyond it only of ``may``; under kvm72 also of ``over``."""
        allowed = [*must, *may, *(over if self.mode == "kvm72" else ())]
        for pe in range(2):
            lost = self.lost(pe)
            names = {name for n, name in self.names if n == pe}
            forbidden = {name for name in names if any(fnmatch(name, pattern) for pattern in must)}
            assert forbidden or not must, f"no entry is called {must}"
            assert not forbidden - lost, f"PE {pe} still sees {sorted(forbidden - lost)}"
            extra = {name for name in lost if not any(fnmatch(name, pattern) for pattern in allowed)}
            assert not extra, f"PE {pe} lost {sorted(extra)} for nothing"

    def read(self, pe, who, page, access=READ):
        """What an access by IPA gets now: the TLB, the shadow, a fault. PA, or the kind of the answer."""
        self.enter(pe, who)
        vcpu, ipa = self.vm.vcpus[pe], self.ipa(who, page)
        entry = self.tlbs[pe].translate(vcpu, ipa, access)
        if entry is None:
            fault = vcpu.fault(ipa, access)
            entry = self.tlbs[pe].fill_ipa(2 + fault.context, fault)
            if entry is None:
                return fault.kind
        return entry.pa_of(ipa)

    def read_va(self, pe, who, kind, page):
        """The same by VA: a combined entry, or L2's stage 1 (which never changes here) and then stage 2."""
        asid = {"va5": 5, "va6": 6, "vag": None}[kind]
        entry = self.tlbs[pe].lookup_va(self.host_vmids[who], self.va(kind, page), READ, asid)
        return entry.pa_of(self.va(kind, page)) if entry else self.read(pe, who, page)


def pa(page, table="a"):
    return HOST + DATA + page * PAGE + ("ab".index(table) * 16 * PAGE)


@pytest.fixture(params=["exact", "kvm72"])
def lit(request):
    return Litmus(request.param)


@pytest.fixture
def exact():
    return Litmus()


OVER_IPA = ("a1.ipa.*", "b1.ipa.*", "n1.*")  # Linux: as much as 1 GiB around it, and the contexts with stage 2 off
COMBINED = ("a1.va*", "b1.va*")


def page_operand(page, ttl=0):
    return page | ttl << 44


def range_operand(page, pages=2, ttl=0, tg=TG4K):
    assert pages % 2 == 0
    return page | ttl << 37 | (pages // 2 - 1) << 39 | tg


# IPAS2E1, IPAS2LE1


@every("IPAS2E1", "IPAS2LE1")
def test_ipas2e1(lit, op):
    """The page that it names, in every context of the VMID with stage 2 on, on both PEs. Combined entries need not
    go. Not another page, not another VMID, not stage 2 off."""
    lit.tlbi(op, page_operand(1), who="a1")
    lit.expect(must=["a1.ipa.1", "b1.ipa.1"], may=COMBINED, over=OVER_IPA)


@every("IPAS2E1", "IPAS2LE1")
def test_ipas2e1_issued_by_other_pe(lit, op):
    """From which PE it comes makes no difference: an NSH form is served as a broadcast one."""
    lit.tlbi(op, page_operand(1), pe=1, who="a1")
    lit.expect(must=["a1.ipa.1", "b1.ipa.1"], may=COMBINED, over=OVER_IPA)


@every("IPAS2E1", "IPAS2LE1")
def test_ipas2e1_of_another_vmid(lit, op):
    """It acts under the VTTBR of its own time: VMID 2 is loaded nowhere."""
    for pe in range(2):
        lit.enter(pe, "a1")
    lit.tlbi(op, page_operand(1), who="a2")
    lit.expect(must=["a2.ipa.1"], may=["a2.va*"], over=["a2.ipa.*"])


@every("IPAS2E1", "IPAS2LE1")
def test_ipas2e1_ttl(lit, op):
    """A TTL that is right: 4K granule, level 3."""
    lit.tlbi(op, page_operand(1, ttl=0b0111), who="a1")
    lit.expect(must=["a1.ipa.1", "b1.ipa.1"], may=COMBINED, over=OVER_IPA)


@pytest.mark.parametrize("ttl", [0b0110, 0b0101, 0b1011, 0b1111])
@pytest.mark.parametrize("op", ["IPAS2E1IS", "IPAS2LE1IS"])
def test_ipas2e1_wrong_ttl(lit, op, ttl):
    """A TTL of another level or granule: nobody has to lose anything."""
    lit.tlbi(op, page_operand(1, ttl), who="a1")
    lit.expect(over=[*OVER_IPA, *COMBINED])


@every("IPAS2E1", "IPAS2LE1")
def test_ipas2e1_any_address_of_a_block(exact, op):
    """L1's leaf is a 2M block, the host has pages: every fragment goes, whatever address in the block is named."""
    block = 4 * M
    exact.tables["a"].map(block, DATA, 2)
    exact.enter(0, "a1")
    tlb, vcpu = exact.tlbs[0], exact.vm.vcpus[0]
    for page in (0, 7, 511):
        vcpu.fault(block + page * PAGE)
        assert tlb.translate(vcpu, block + page * PAGE)
    exact.tlbi(op, page_operand(block // PAGE + 300), who="a1")
    assert [tlb.translate(vcpu, block + page * PAGE) for page in (0, 7, 511)] == [None] * 3
    exact.expect(may=COMBINED)


@every("IPAS2E1", "IPAS2LE1")
def test_ipas2e1_then_vmalle1(lit, op):
    """L1's whole protocol: clear, IPAS2E1, VMALLE1, map anew. Nobody sees the old page, by IPA or by VA."""
    lit.tables["a"].unmap(PAGE)
    lit.tlbi(op, page_operand(1), who="a1")
    lit.tlbi("VMALLE1IS", who="a1")
    lit.tables["a"].map(PAGE, DATA + SPARE * PAGE)
    for pe in range(2):
        assert lit.read(pe, "a1", 1) == lit.read_va(pe, "a1", "va5", 1) == lit.read_va(pe, "a1", "vag", 1) == pa(SPARE)
        assert lit.read(pe, "a1", 0) == pa(0) and lit.read(pe, "b1", 1) == pa(1, "b")
        assert lit.read(pe, "a2", 1) == pa(1), "VMID 2 was not named: the old page may be seen"


def test_no_tlbi_old_page_may_be_seen(lit):
    """L1 writes its table and says nothing: all may go on with the old page."""
    lit.tables["a"].map(PAGE, DATA + SPARE * PAGE)
    for pe in range(2):
        assert lit.read(pe, "a1", 1) == lit.read_va(pe, "a1", "va5", 1) == pa(1)


def test_no_tlbi_then_unmap(lit):
    """L1 never invalidated; then the host takes the old page. Nobody may see it any more, and L2 finds the new one."""
    lit.tables["a"].map(PAGE, DATA + SPARE * PAGE)
    lit.vm.unmap(DATA + PAGE, DATA + 2 * PAGE)
    lit.settle()
    lit.expect(must=["a1.*.1", "a2.*.1", "n1.*.1"], may=["a1.va*", "a2.va*", "n1.va*", "el2.*"])
    for pe in range(2):
        assert lit.read(pe, "a1", 1) == lit.read_va(pe, "a2", "va6", 1) == pa(SPARE)


def test_ipas2e1_without_vmalle1_then_unmap(lit):
    """L1 forgot the VMALLE1: combined entries of its page may stay as long as the page is there, and no longer."""
    lit.tables["a"].map(PAGE, DATA + SPARE * PAGE)
    lit.tlbi("IPAS2E1IS", page_operand(1), who="a1")
    assert all(lit.read_va(pe, "a1", "va5", 1) in (pa(1), pa(SPARE)) for pe in range(2))
    lit.vm.unmap(DATA + PAGE, DATA + 2 * PAGE)
    lit.settle()
    assert all(lit.read_va(pe, who, kind, 1) == pa(SPARE) for pe in range(2) for who in ("a1", "a2")
               for kind in ("va5", "va6", "vag"))  # fmt: skip


def test_ipa_row_spares_combined_entries(exact):
    """The hardware's IPAS2E1 alone does not reach a combined entry; the VMALL that L0 adds does."""
    exact.enter(0, "a1")
    exact.vm.vcpus[0].tlbi("IPAS2E1IS", page_operand(1), **exact.regs("a1"))
    rows = exact.vm.take_tlbis()
    by_ipa = rows[rows["op"] == 1]
    for tlb in exact.tlbs:
        tlb.apply(by_ipa)
    exact.expect(must=["a1.ipa.1", "b1.ipa.1"])
    for tlb in exact.tlbs:
        tlb.apply(rows)
    exact.expect(must=["a1.ipa.1", "b1.ipa.1", "a1.va*", "b1.va*"])


# RIPAS2E1, RIPAS2LE1


@every("RIPAS2E1", "RIPAS2LE1")
def test_ripas2e1(lit, op):
    """The pages of the range, in both contexts of the VMID; not the page after it."""
    lit.tlbi(op, range_operand(0), who="a1")
    lit.expect(must=["a1.ipa.[01]", "b1.ipa.[01]"], may=COMBINED, over=OVER_IPA)


@pytest.mark.parametrize(("xt", "why"), [
    (range_operand(0, tg=2 << 46), "another granule"), (range_operand(0, tg=0), "TG=00 is reserved"),
    (range_operand(0, ttl=2), "another level"), (range_operand(SPARE), "other pages"),
    (range_operand(1 << 36), "beyond the input size"),
])  # fmt: skip
@pytest.mark.parametrize("op", ["RIPAS2E1IS", "RIPAS2LE1OS"])
def test_ripas2e1_names_nothing(lit, op, xt, why):
    """Ranges that nobody's leaves match: all may stay, whatever the reason."""
    lit.tlbi(op, xt, who="a1")
    lit.expect(over=[*OVER_IPA, *COMBINED])


@every("RIPAS2E1", "RIPAS2LE1")
def test_ripas2e1_ttl(lit, op):
    """A level hint that is right."""
    lit.tlbi(op, range_operand(1, ttl=3), who="a1")
    lit.expect(must=["a1.ipa.[12]", "b1.ipa.[12]"], may=COMBINED, over=OVER_IPA)


# VMALLS12E1, ALLE1


@every("VMALLS12E1")
def test_vmalls12e1(lit, op):
    """All of the VMID, stage 2 on and off, stage 1 and 2; nothing of VMID 2, nothing of virtual EL2."""
    lit.tlbi(op, who="a1")
    lit.expect(must=["a1.*", "b1.*", "n1.*"])


@every("VMALLS12E1")
def test_vmalls12e1_with_stage2_off(lit, op):
    """Issued with HCR_EL2.VM=0: the VMID counts, and its stage 2 goes too."""
    lit.tlbi(op, who="n1")
    lit.expect(must=["a1.*", "b1.*", "n1.*"])


@every("VMALLS12E1")
def test_vmalls12e1_then_new_translation(lit, op):
    """After it L2 finds the new page, on both PEs; VMID 2 may still see the old one."""
    lit.tables["a"].map(PAGE, DATA + SPARE * PAGE)
    lit.tlbi(op, who="b1")
    for pe in range(2):
        assert lit.read(pe, "a1", 1) == lit.read_va(pe, "a1", "va5", 1) == pa(SPARE)
        assert lit.read_va(pe, "a2", "va5", 1) == pa(1)


@every("ALLE1")
def test_alle1(lit, op):
    """Everything of EL1&0, every VMID; virtual EL2 has another regime."""
    lit.tlbi(op, who="a1")
    lit.expect(must=["a1.*", "b1.*", "a2.*", "n1.*"])


# Stage 1 of EL1&0: no shadow leaf goes, no stage-2 entry, in no mode


@every("VMALLE1")
def test_vmalle1(lit, op):
    """Stage 1 of the VMID, every ASID and global, in all its contexts, stage 2 on and off."""
    live = [context.entries for context in lit.vm.contexts]
    lit.tlbi(op, who="a1")
    lit.expect(must=["[abn]1.va*"])
    assert [context.entries for context in lit.vm.contexts] == live


@every("VAE1", "VALE1")
def test_vae1(lit, op):
    """One VA of one ASID."""
    lit.tlbi(op, 5 << 48 | LOW + PAGE >> 12, who="a1")
    lit.expect(must=["[abn]1.va5.1"])


@every("VAE1", "VALE1")
def test_vae1_of_global_page(lit, op):
    """A global entry goes whatever ASID is named."""
    lit.tlbi(op, 9 << 48 | (HIGH + PAGE >> 12) & (1 << 44) - 1, who="a1")
    lit.expect(must=["[abn]1.vag.1"])


@every("VAAE1", "VAALE1")
def test_vaae1(lit, op):
    """One VA of every ASID; the ASID field is ignored."""
    lit.tlbi(op, 9 << 48 | LOW + PAGE >> 12, who="a1")
    lit.expect(must=["[abn]1.va[56].1"])


@every("ASIDE1")
def test_aside1(lit, op):
    """All of one ASID; global entries stay."""
    lit.tlbi(op, 5 << 48, who="a1")
    lit.expect(must=["[abn]1.va5.*"])


@every("RVAE1", "RVALE1")
def test_rvae1(lit, op):
    """A range of one ASID; not the page after it."""
    lit.tlbi(op, 5 << 48 | range_operand(LOW >> 12), who="a1")
    lit.expect(must=["[abn]1.va5.[01]"])


@every("RVAAE1", "RVAALE1")
def test_rvaae1(lit, op):
    """A range of every ASID, in the upper half too."""
    lit.tlbi(op, range_operand((HIGH >> 12 & (1 << 37) - 1) + 1), who="a1")
    lit.expect(must=["[abn]1.vag.[12]"])


@pytest.mark.parametrize("op", ["VAE1IS", "VAAE1IS", "RVAE1IS", "RVAAE1IS"])
def test_stage1_by_address_wrong_level(lit, op):
    """A TTL of level 2 where stage 1 has pages: nobody has to lose anything."""
    page = LOW >> 12
    xt = range_operand(page, ttl=2) if op.startswith("R") else page | 0b0110 << 44
    lit.tlbi(op, 5 << 48 | xt, who="a1")
    lit.expect()


@pytest.mark.parametrize("op", ["VAE1IS", "RVAE1IS", "VALE1IS", "RVALE1IS", "VAAE1IS", "VAALE1IS"])
def test_last_level_spares_table_descriptors(exact, op):
    """A walk cache of stage 1: VAE1 takes the table descriptor over the address, VALE1 leaves it."""
    vmid = exact.host_vmids["a1"]
    for tlb in exact.tlbs:
        tlb.fill_table(vmid, LOW, 2 * M, DATA, 2, 5, "combined")
    xt = range_operand(LOW >> 12) if op.startswith("R") else LOW >> 12
    exact.tlbi(op, 5 << 48 | xt, who="a1")
    for tlb in exact.tlbs:
        assert (tlb.lookup_table(vmid, LOW, 5, "combined") is not None) == ("LE1" in op)
        assert tlb.lookup_va(vmid, LOW, asid=5) is None


EL1_OPS = {
    "VMALLE1": (0, "el2.va*"),
    "VAE1": (5 << 48 | LOW + PAGE >> 12, "el2.va5.1"),
    "VALE1": (5 << 48 | LOW + PAGE >> 12, "el2.va5.1"),
    "VAAE1": (LOW + PAGE >> 12, "el2.va[56].1"),
    "VAALE1": (LOW + PAGE >> 12, "el2.va[56].1"),
    "ASIDE1": (5 << 48, "el2.va5.*"),
    "RVAE1": (5 << 48 | range_operand(LOW >> 12), "el2.va5.[01]"),
    "RVALE1": (5 << 48 | range_operand(LOW >> 12), "el2.va5.[01]"),
    "RVAAE1": (range_operand(LOW >> 12), "el2.va[56].[01]"),
    "RVAALE1": (range_operand(LOW >> 12), "el2.va[56].[01]"),
}


@every(*EL1_OPS)
def test_el1_operation_under_e2h_tge(lit, op):
    """With HCR_EL2.{E2H,TGE}={1,1} an EL1 operation is about virtual EL2&0; L2 keeps all it has."""
    stem = max((stem for stem in EL1_OPS if op.startswith(stem)), key=len)
    xt, must = EL1_OPS[stem]
    lit.tlbi(op, xt, who="a1", hcr=HCR_VM | E2H_TGE)
    lit.expect(must=[must])


@pytest.mark.parametrize("hcr", [1 << 34, 1 << 27])
def test_el1_operation_with_only_one_of_e2h_tge(lit, hcr):
    """One bit of the two is not enough: L2 is meant."""
    lit.tlbi("VMALLE1IS", who="a1", hcr=HCR_VM | hcr)
    lit.expect(must=["[abn]1.va*"])


@pytest.mark.parametrize("op", ["VMALLE1IS", "ASIDE1IS"])
def test_stage1_of_another_vmid(lit, op):
    """L1 names a VMID that is not loaded: only that one's contexts lose."""
    for pe in range(2):
        lit.enter(pe, "a1")
    lit.tlbi(op, 5 << 48 if op[0] == "A" else 0, who="a2")
    lit.expect(must=["a2.va*" if op[0] == "V" else "a2.va5.*"])


# Virtual EL2


@every("ALLE2")
def test_alle2(lit, op):
    """All of virtual EL2, nothing of L2."""
    lit.tlbi(op, who="a1")
    lit.expect(must=["el2.*"])


@every("VAE2", "VALE2")
def test_vae2(lit, op):
    """One VA of virtual EL2."""
    lit.tlbi(op, 5 << 48 | LOW + PAGE >> 12, who="a1", hcr=HCR_VM | 1 << 34)
    lit.expect(must=["el2.va5.1"])


@every("RVAE2", "RVALE2")
def test_rvae2(lit, op):
    """A range of virtual EL2."""
    lit.tlbi(op, 5 << 48 | range_operand(LOW >> 12), who="a1", hcr=HCR_VM | 1 << 34)
    lit.expect(must=["el2.va5.[01]"])


# The host


def test_unmap_reaches_every_alias(lit):
    """The host takes a page: every context that maps it, both VMIDs and stage 2 off, on both PEs, by IPA and by VA.
    Not the contexts that do not map it. (L1's own use of the page is the canonical table's.)"""
    change = lit.vm.unmap(DATA + PAGE, DATA + 2 * PAGE)
    assert change.leaves == 3
    rows = lit.settle()
    assert (rows["seq"] <= change.ticket).all()
    lit.expect(must=["a1.*.1", "a2.*.1", "n1.*.1"], may=["a1.va*", "a2.va*", "n1.va*", "el2.*"])
    assert all(lit.read(pe, who, 1) == s2shadow.HOST_FAULT for pe in range(2) for who in ("a1", "a2", "n1"))


def test_host_maps_another_page(lit):
    """The same address of L1 gets another page of the host: nobody sees the one before."""
    lit.vm.host.map(DATA + PAGE, 2 * HOST, PAGE)
    lit.settle()
    for pe in range(2):
        assert {lit.read(pe, who, 1) for who in ("a1", "a2", "n1")} == {2 * HOST}
        assert lit.read_va(pe, "a1", "vag", 1) == 2 * HOST and lit.read(pe, "b1", 1) == pa(1, "b")


@pytest.mark.parametrize(("take", "access"), [
    (lambda vm: vm.host.protect(DATA, DATA + PAGE, "rx"), WRITE), (lambda vm: vm.log_dirty(DATA, DATA + PAGE), WRITE),
    (lambda vm: vm.host.protect(DATA, DATA + PAGE, "rw"), EXEC),
])  # fmt: skip
def test_permission_taken_away(lit, take, access):
    """The host takes a permission: no entry allows it any more."""
    take(lit.vm)
    lit.settle()
    for pe in range(2):
        for entry in lit.tlbs[pe]:
            assert entry.host_vmid == 1 or not (entry.pa == pa(0) and entry.allows(access)), entry
    lit.expect(must=["a1.*.0", "a2.*.0", "n1.*.0"], may=["a1.va*", "a2.va*", "n1.va*", "el2.*"])


def test_dirty_log_takes_write_again(lit):
    """A page that was written while it is logged: `dirty_log` protects it, and the next write is seen."""
    lit.vm.log_dirty(DATA, DATA + PAGE)
    lit.settle()
    assert lit.read(0, "a1", 0, WRITE) == pa(0)
    assert np.unpackbits(lit.vm.dirty_log(DATA, DATA + PAGE), count=1, bitorder="little")[0]
    lit.settle()
    assert not any(entry.pa == pa(0) and entry.allows(WRITE) for entry in lit.tlbs[0] if entry.host_vmid != 1)
    assert lit.read(0, "a2", 0, WRITE) == pa(0)
    assert np.unpackbits(lit.vm.dirty_log(DATA, DATA + PAGE), count=1, bitorder="little")[0]


def test_relaxation(lit):
    """A leaf gains W on one PE: the other may be denied by its old entry until L0's maintenance, and not after."""
    lit.vm.log_dirty(DATA, DATA + PAGE)
    lit.settle()
    for pe in range(2):
        assert lit.read(pe, "a1", 0) == pa(0)
    vcpu, vmid = lit.vm.vcpus[0], lit.host_vmids["a1"]
    lit.enter(0, "a1")
    assert vcpu.fault(0, WRITE).kind == MAPPED
    assert lit.tlbs[1].lookup_ipa(vmid, 0, WRITE) is None
    lit.settle()
    assert lit.tlbs[1].lookup_ipa(vmid, 0, READ) is None
    lit.enter(1, "a1")
    assert lit.tlbs[1].translate(lit.vm.vcpus[1], 0, WRITE)


def test_recycled_context():
    """A context gets a new owner: nothing of the old one is seen under its host VMID."""
    lit = Litmus()
    old = lit.host_vmids["a1"]
    for vmid in range(3, 40):
        context = lit.vm.vcpus[0].load(lit.tables["b"].vttbr(vmid), lit.tables["b"].vtcr)
        if context.host_vmid == old:
            break
    assert context.host_vmid == old and lit.vm.stats.contexts_recycled
    lit.settle()
    assert not any(entry.host_vmid == old for tlb in lit.tlbs for entry in tlb)
    lit.vm.vcpus[0].fault(PAGE)
    assert lit.tlbs[0].translate(lit.vm.vcpus[0], PAGE).pa == pa(1, "b")


# Tables of the shadow that are freed: hardware may have their descriptors in a walk cache


def table_entry(lit, who, ipa):
    """Both PEs walked to ``ipa``: they may hold the level-2 descriptor over it."""
    vmid = lit.host_vmids[who]
    for tlb in lit.tlbs:
        tlb.fill_table(vmid, ipa, 2 * M, 0xDEAD_B000, 2)
    return lambda: [tlb.lookup_table(vmid, ipa) for tlb in lit.tlbs]


def test_unmap_of_the_last_leaf_of_a_table(exact):
    """The table goes with its last leaf, and may serve another context: its descriptor must not stay."""
    held = table_entry(exact, "a1", 0)
    exact.vm.unmap(DATA, DATA + PAGE)
    exact.settle()
    assert None not in held(), "the table is there still"
    exact.vm.unmap(DATA + PAGE, DATA + 3 * PAGE)
    exact.settle()
    assert held() == [None, None]


@pytest.mark.parametrize("op", ["RIPAS2E1IS", "RIPAS2LE1IS"])
def test_tlbi_of_the_last_leaf_of_a_table(exact, op):
    """The same when L1's own operation, last-level or not, took the leaves: L0's tables are not L1's."""
    held = table_entry(exact, "a1", 0)
    exact.tlbi(op, range_operand(0, 4), who="a1")
    assert held() == [None, None]


# Other granules of L1


@pytest.mark.parametrize(("granule", "tg"), [(16 * K, 2), (64 * K, 3)])
@pytest.mark.parametrize("mode", ["exact", "kvm72"])
def test_larger_granule_of_l1(mode, granule, tg):
    """One page of L1 is many of the host: the operation names one of them, all go, with the TTL or without."""
    lit = Litmus(mode)
    table = Tables(lit.mem.read64, lit.mem.write64, RAM + 16 * M, granule)
    for n in range(2):
        table.map(n * granule, LARGE + n * granule)
    for xt in (3, 3 | (tg << 2 | 3) << 44):
        for pe in range(2):
            lit.vm.vcpus[pe].load(table.vttbr(7), table.vtcr)
            for page in range(2 * granule // PAGE):
                lit.vm.vcpus[pe].fault(page * PAGE)
                assert lit.tlbs[pe].translate(lit.vm.vcpus[pe], page * PAGE)
        lit.tlbi("IPAS2E1IS", xt, vttbr=table.vttbr(7), vtcr=table.vtcr, hcr=HCR_VM)
        for pe in range(2):
            seen = [lit.tlbs[pe].translate(lit.vm.vcpus[pe], page * PAGE) for page in range(2 * granule // PAGE)]
            assert not any(seen[: granule // PAGE])
            assert all(seen[granule // PAGE :]) or mode == "kvm72"
    lit.expect()


def test_every_operation_has_a_litmus_test():
    """All 126 operations are in some parametrised test of this file."""
    with (Path(__file__).parent / "data" / "tlbi_ops.csv").open() as file:
        names = {line["name"] for line in csv.DictReader(file)}
    tested = set()
    for value in globals().values():
        for mark in getattr(value, "pytestmark", ()):
            if mark.name == "parametrize" and mark.args[0] == "op":
                tested |= set(mark.args[1])
    assert len(names) == 126 and names <= tested, sorted(names - tested)
