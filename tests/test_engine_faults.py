"""Every row of what a fault answers, and what it leaves behind."""

import numpy as np
import pytest

import rig
import s2shadow
from rig import DATA, DEVICE, HOST, NOWHERE, PAGE, RAM, ROM, G, K, M, Rig
from s2shadow import (
    EL0,
    EXEC,
    EXEC_EL0,
    HCR_DC,
    HCR_PTW,
    HCR_VM,
    HIT,
    HOST_FAULT,
    L1_FAULT,
    MAPPED,
    MMIO,
    PTW,
    READ,
    WRITE,
)

RWX = READ | WRITE | EXEC | EXEC_EL0
IPA = 0x12_3000


def hpfar(ipa):
    """HPFAR_EL2: IPA[55:12] in bits 47:4."""
    return (ipa >> 12 << 4) & 0xFFFF_FFFF_FFF0


@pytest.fixture
def r():
    return Rig()


def fields(f, *names):
    return tuple(int(getattr(f, name)) for name in names)


# HIT and MAPPED


def test_mapped_then_hit(r):
    """The first access installs, the next is answered by the shadow; both say the same."""
    r.tables.map(IPA, DATA)
    for kind in (MAPPED, HIT, HIT):
        f = r.fault(IPA + 0x678, READ)
        assert fields(f, "kind", "fsc", "level", "perm", "context") == (kind, 0, 3, RWX, 0)
        assert fields(f, "ipa", "cipa", "pa", "size") == (IPA + 0x678, DATA + 0x678, HOST + DATA + 0x678, PAGE)
        assert f.hpfar == hpfar(IPA)
    assert r.leaves() == [(IPA, DATA, PAGE)]
    r.vm.check()


def test_shadow_row(r):
    """A live entry, field by field."""
    r.tables.map(IPA, DATA, perm="rx")
    r.fault(IPA, READ)
    (row,) = r.shadow()
    got = {name: row[name].item() for name in row.dtype.names}
    desc = got.pop("desc")
    assert got == {
        "ipa": IPA, "cipa": DATA, "pa": HOST + DATA, "size": PAGE, "perm": READ | EXEC | EXEC_EL0,
        "memattr": 6, "sh": 3, "young": 1, "level": 3, "guest_level": 3,
    }  # fmt: skip
    assert desc & 0xFFFF_FFFF_F7FF == (HOST + DATA) | 3 | 6 << 2 | 1 << 6 | 3 << 8 | 1 << 10
    assert desc >> 55 & 7 == 5


@pytest.mark.parametrize(
    ("level", "host_size", "size"),
    [(2, 2 * M, 2 * M), (2, 4 * K, 4 * K), (3, 2 * M, 4 * K), (1, 2 * M, 2 * M), (1, 4 * K, 4 * K)],
)
def test_leaf_size(level, host_size, size):
    """The smaller of L1's leaf and the host's."""
    r = Rig(host=False)
    for at in range(0, 4 * M, host_size):
        r.vm.host.map(DATA + at, HOST + DATA + at, host_size)
    span = r.tables.size(level)
    cipa = DATA + 0x5000
    ipa = 0x4000_0000 + (cipa & (span - 1))
    r.tables.map(0x4000_0000, cipa & -span, level)
    f = r.fault(ipa, WRITE)
    assert fields(f, "kind", "size", "level") == (MAPPED, size, level)
    assert fields(f, "cipa", "pa") == (cipa, HOST + cipa)
    assert r.leaves() == [(ipa & -size, cipa & -size, size)]
    r.vm.check()


def test_gigabyte_leaf():
    """1 GiB on both sides is one entry."""
    r = Rig(host=False)
    r.mem.add(4 * G, 2 * G)
    r.vm.host.map(4 * G, 64 * G, 2 * G)
    r.tables.map(8 * G, 5 * G, 1)
    f = r.fault(8 * G + 0x1234_5678)
    assert fields(f, "kind", "size", "level", "pa") == (MAPPED, G, 1, 65 * G + 0x1234_5678)
    assert r.leaves() == [(8 * G, 5 * G, G)]
    r.vm.check()


@pytest.mark.parametrize(
    ("granule", "level", "size"),
    [(16 * K, 3, 4 * K), (16 * K, 2, 2 * M), (64 * K, 3, 4 * K), (64 * K, 2, 2 * M)],
)
def test_larger_granules(granule, level, size):
    """L1 with 16K or 64K pages over a 4K host: fragments of L1's leaf, each where it belongs."""
    r = Rig(granule=granule)
    span = r.tables.size(level)
    cipa = RAM + 32 * M if level == 2 and granule == 16 * K else RAM & -span if level == 2 else DATA
    r.tables.map(span, cipa, level)
    for offset in (0, 0x3000, span // 2, span - PAGE):
        if not RAM <= cipa + offset < RAM + 64 * M:
            continue
        f = r.fault(span + offset)
        assert fields(f, "kind", "level", "size", "cipa") in (
            (MAPPED, level, size, cipa + offset),
            (HIT, level, size, cipa + offset),
        )
    assert all(row["size"] == size and row["guest_level"] == level for row in r.shadow())
    r.vm.check()


@pytest.mark.parametrize("big_endian", [False, True])
def test_endianness(big_endian):
    """Tables in either byte order."""
    r = Rig(big_endian=big_endian)
    r.tables.map(IPA, DATA)
    assert fields(r.fault(IPA), "kind", "pa") == (MAPPED, HOST + DATA)


@pytest.mark.parametrize("hcr", [HCR_VM, HCR_DC, HCR_VM | HCR_DC])
def test_dc_acts_as_vm(hcr):
    """HCR.DC switches stage 2 on as HCR.VM does."""
    r = Rig()
    r.tables.map(IPA, DATA)
    r.load(hcr=hcr)
    assert fields(r.fault(IPA), "kind", "cipa") == (MAPPED, DATA)
    assert r.fault(IPA + PAGE).kind == L1_FAULT


def test_hit_needs_the_permission(r):
    """A read-only entry does not answer a write: L1's leaf forbids it, the entry stays."""
    r.tables.map(IPA, DATA, perm="r")
    assert r.fault(IPA, READ).kind == MAPPED
    f = r.fault(IPA, WRITE)
    assert fields(f, "kind", "fsc", "level") == (L1_FAULT, 0xF, 3)
    assert r.fault(IPA, READ).kind == HIT


def test_relax(r):
    """L1 grants more without a TLBI: the fault that needs it finds it; nothing else was lost."""
    where = r.tables.map(IPA, DATA, perm="r")
    assert r.fault(IPA, READ).perm == READ
    r.tables.set(where, r.tables.leaf(DATA, 3, "rw"))
    assert fields(r.fault(IPA, READ), "kind", "perm") == (HIT, READ)
    assert fields(r.fault(IPA, WRITE), "kind", "perm") == (MAPPED, READ | WRITE)
    assert len(r.shadow()) == 1
    r.vm.check()


def test_relax_is_no_mixture(r):
    """L1 changes the address and grants more: the entry is replaced, never old address with new permissions."""
    where = r.tables.map(IPA, DATA, perm="r")
    r.fault(IPA, READ)
    r.tables.set(where, r.tables.leaf(DATA + PAGE, 3, "rw"))
    assert r.fault(IPA, READ).cipa == DATA  # a TLB may keep the old one
    f = r.fault(IPA, WRITE)
    assert fields(f, "kind", "cipa", "pa", "perm") == (MAPPED, DATA + PAGE, HOST + DATA + PAGE, READ | WRITE)
    assert r.leaves() == [(IPA, DATA + PAGE, PAGE)]
    assert len(r.vm.reverse(DATA)) == 0 and len(r.vm.reverse(DATA + PAGE)) == 1
    r.vm.check()


def test_swapped_permissions_are_no_mixture(r):
    """L1 takes X and gives W: the new entry has no X left over."""
    where = r.tables.map(IPA, DATA, perm="rx")
    r.fault(IPA, READ)
    r.tables.set(where, r.tables.leaf(DATA, 3, "rw"))
    assert fields(r.fault(IPA, WRITE), "kind", "perm") == (MAPPED, READ | WRITE)
    assert fields(r.fault(IPA, EXEC), "kind", "fsc") == (L1_FAULT, 0xF)


def test_attributes_are_no_mixture():
    """L1 changes attributes and grants more: the entry is replaced."""
    r = Rig(features=s2shadow.Features(fwb=False))
    where = r.tables.map(IPA, DATA, perm="r", memattr=15)
    assert r.fault(IPA, READ).kind == MAPPED
    r.tables.set(where, r.tables.leaf(DATA, 3, "rw", memattr=1))
    assert r.fault(IPA, WRITE).kind == MAPPED
    (row,) = r.shadow()
    assert (row["memattr"], row["perm"]) == (1, READ | WRITE)
    assert (r.vm.stats.replaced, r.vm.stats.relaxed) == (1, 0)


def test_pages_of_one_frame_are_no_mixture(r):
    """L1 names another page that the host has merged with the old one, and grants more: the leaf is that of the new
    page, whatever happens to the old one."""
    r.vm.host.map(DATA + PAGE, HOST + DATA, PAGE)
    where = r.tables.map(IPA, DATA, perm="r")
    r.fault(IPA, READ)
    r.tables.set(where, r.tables.leaf(DATA + PAGE, 3, "rw"))
    f = r.fault(IPA, WRITE)
    assert fields(f, "kind", "cipa", "pa") == (MAPPED, DATA + PAGE, HOST + DATA)
    assert r.leaves() == [(IPA, DATA + PAGE, PAGE)]
    assert r.vm.unmap(DATA, DATA + PAGE).leaves == 0
    assert r.vm.unmap(DATA + PAGE, DATA + 2 * PAGE).leaves == 1
    r.vm.check()


def test_levels_are_no_mixture():
    """L1 joins pages to a block that leads to the same place, and grants more; the host has pages. The leaf is of the
    block's level: a TLBI that names that finds it."""
    r = Rig(host=False)
    r.vm.host.map(DATA, HOST + PAGE, 2 * M)     # in pages
    r.tables.map_range(0, DATA, 2 * M, perm="r")
    assert r.fault(PAGE, READ).size == PAGE
    r.tables.set(r.tables.slot(0, 2), r.tables.leaf(DATA, 2, "rw"))
    assert r.fault(PAGE, WRITE).level == 2
    assert (r.vm.stats.replaced, r.vm.stats.relaxed) == (1, 0)
    r.vm.check()
    assert r.vcpu.tlbi("IPAS2E1IS", rig.single(0, PAGE, 2)).removed == 1


def test_block_over_pages(r):
    """L1 joins pages to a block without a TLBI: the block takes the pages' place."""
    for n in range(4):
        r.tables.map(n * PAGE, DATA + n * PAGE, perm="r")
        r.fault(n * PAGE)
    r.tables.set(r.tables.slot(0, 2), r.tables.leaf(DATA, 2))
    assert r.fault(0, READ).kind == HIT
    f = r.fault(PAGE, WRITE)
    assert fields(f, "kind", "size", "level") == (MAPPED, 2 * M, 2)
    assert r.leaves() == [(0, DATA, 2 * M)]
    r.vm.check()


def test_page_in_block(r):
    """L1 splits a block without a TLBI: the page that needs it takes the block's place."""
    r.tables.map(0, DATA, 2, perm="r")
    assert r.fault(0).size == 2 * M
    r.tables.map(5 * PAGE, DATA + 2 * M)
    assert r.fault(5 * PAGE, READ).cipa == DATA + 5 * PAGE
    assert fields(r.fault(5 * PAGE, WRITE), "kind", "size", "cipa") == (MAPPED, PAGE, DATA + 2 * M)
    assert r.leaves() == [(5 * PAGE, DATA + 2 * M, PAGE)]
    r.vm.check()


def test_contiguous(r):
    """A contiguous group translates like its members, one leaf at a time."""
    for n in range(16):
        r.tables.map(0x10_0000 + n * PAGE, DATA + 0x1_0000 + n * PAGE, extra=1 << 52)
    for n in (0, 7, 15):
        f = r.fault(0x10_0000 + n * PAGE)
        assert fields(f, "kind", "cipa", "size") == (MAPPED, DATA + 0x1_0000 + n * PAGE, PAGE)


# L1_FAULT


@pytest.mark.parametrize(
    ("prepare", "fsc", "level"),
    [
        (lambda t: t.unmap(IPA, 3), 0x07, 3),
        (lambda t: t.unmap(IPA, 2), 0x06, 2),
        (lambda t: t.unmap(IPA, 1), 0x05, 1),
        (lambda t: t.set(t.slot(IPA, 3), t.leaf(DATA, 2)), 0x07, 3),  # 01 is no page
        (lambda t: t.map(IPA, 1 << 46), 0x03, 3),
        (lambda t: t.set(t.slot(IPA, 2), 1 << 46 | 3), 0x02, 2),
        (lambda t: t.map(IPA, DATA, af=0), 0x0B, 3),
        (lambda t: t.map(IPA, DATA, perm="wx"), 0x0F, 3),
        (lambda t: t.map(0, RAM, 2, perm=""), 0x0E, 2),
        (lambda t: t.set(t.slot(IPA, 2), NOWHERE | 3), 0x17, 3),
        (lambda t: t.set(t.slot(IPA, 2), DEVICE | 3), 0x17, 3),
        (lambda t: t.set(t.slot(IPA, 1), NOWHERE | 3), 0x16, 2),
    ],
)
def test_l1_fault(prepare, fsc, level):
    """Whatever L1's tables forbid goes to L1, with the code and the level of L1's own table."""
    r = Rig()
    r.tables.vtcr = r.tables.vtcr & ~(7 << 16) | 4 << 16  # 44-bit output
    r.load()
    prepare(r.tables)
    f = r.fault(IPA, READ)
    assert fields(f, "kind", "fsc", "level", "context") == (L1_FAULT, fsc, level, 1)
    assert f.hpfar == hpfar(IPA)
    assert len(r.shadow(f.context)) == 0
    r.vm.check()


@pytest.mark.parametrize(
    ("perm", "access", "allowed"),
    [
        ("r", READ, True), ("r", WRITE, False), ("r", EXEC, False), ("r", READ | WRITE, False),
        ("w", WRITE, True), ("w", READ, False), ("rw", READ | WRITE, True), ("rwx", READ | EXEC, True),
        ("rp", EXEC, True), ("rp", EXEC | EL0, False), ("ru", EXEC, False), ("ru", EXEC | EL0, True),
        ("x", EXEC, True), ("x", READ, False), ("", READ, False),
    ],
)  # fmt: skip
def test_permissions(r, perm, access, allowed):
    """Each permission on its own, EL1 and EL0 apart."""
    r.tables.map(IPA, DATA, perm=perm)
    f = r.fault(IPA, access)
    assert fields(f, "kind", "fsc") == ((MAPPED, 0) if allowed else (L1_FAULT, 0xF))
    assert r.fault(IPA, access).kind == (HIT if allowed else L1_FAULT)


def test_no_xnx():
    """Without FEAT_XNX an entry is executable only where EL1 and EL0 both may."""
    r = Rig(features=s2shadow.Features(xnx=False))
    r.tables.map(IPA, DATA, perm="rx")
    assert r.fault(IPA, EXEC).perm == READ | EXEC | EXEC_EL0
    r.tables.map(IPA + PAGE, DATA, perm="r")
    assert r.fault(IPA + PAGE, EXEC | EL0).kind == L1_FAULT


@pytest.mark.parametrize("ipa", [1 << 39, 1 << 40, 1 << 47, 1 << 48, 1 << 63, (1 << 64) - 1])
def test_beyond_input_size(r, ipa):
    """An address that L1's table cannot take: translation fault, level 0, no alias of a low address."""
    r.tables.map(0, DATA)
    f = r.fault(ipa)
    assert fields(f, "kind", "fsc", "level") == (L1_FAULT, 4, 0)
    assert f.hpfar == hpfar(ipa)
    assert len(r.shadow()) == 0


@pytest.mark.parametrize("ipa", [0, IPA, 1 << 45])
def test_illegal_configuration(r, ipa):
    """Registers that decode to nothing: a context in which every access faults, and no error."""
    ctx = r.vcpu.load(r.tables.vttbr(), 0)
    f = r.fault(ipa)
    assert fields(f, "kind", "fsc", "level", "context") == (L1_FAULT, 4, 0, ctx.index)
    r.vm.check()


def test_access_flag_update():
    """VTCR.HA: the walk sets the access flag in L1's table, once, and only if the access is allowed."""
    r = Rig(vtcr=1 << 21)
    where = r.tables.map(IPA, DATA, perm="r", af=0)
    assert r.fault(IPA, WRITE).kind == L1_FAULT
    assert not r.tables.get(where) >> 10 & 1
    assert r.fault(IPA, READ).kind == MAPPED
    assert r.tables.get(where) == r.tables.leaf(DATA, 3, "r", af=1)
    r.tables.map(IPA, DATA, perm="r", af=0)
    assert r.fault(IPA, READ).kind == HIT
    assert not r.tables.get(where) >> 10 & 1


def test_access_flag_in_rom():
    """Tables in read-only memory cannot take the update: external abort on the walk."""
    r = Rig(vtcr=1 << 21)
    r.rom[0:8] = r.tables.leaf(DATA, 3, af=0).to_bytes(8, "little")
    r.rom[8:16] = r.tables.leaf(DATA, 3, af=1).to_bytes(8, "little")
    r.tables.set(r.tables.slot(0, 2), ROM | 3)
    assert fields(r.fault(0), "kind", "fsc", "level") == (L1_FAULT, 0x17, 3)
    assert r.fault(PAGE).kind == MAPPED


def test_table_walk_onto_device():
    """HCR.PTW: a stage-1 table walk onto what L1 calls Device is a permission fault; data accesses are not."""
    r = Rig(features=s2shadow.Features(fwb=False))
    r.load(hcr=HCR_VM | HCR_PTW)
    r.tables.map(IPA, DATA, memattr=1)
    assert fields(r.fault(IPA, READ | PTW), "kind", "fsc") == (L1_FAULT, 0xF)
    assert r.fault(IPA, READ).kind == MAPPED
    assert fields(r.fault(IPA, READ | PTW), "kind", "fsc") == (L1_FAULT, 0xF)
    r.load(hcr=HCR_VM)
    assert r.fault(IPA, READ | PTW).kind in (HIT, MAPPED)


# HOST_FAULT


def test_no_host_leaf():
    """Nothing maps the canonical address: the host has to."""
    r = Rig(host=False)
    r.tables.map(IPA, DATA)
    f = r.fault(IPA + 0x10, WRITE)
    assert fields(f, "kind", "fsc", "cipa") == (HOST_FAULT, 0, DATA + 0x10)
    assert f.hpfar == hpfar(IPA)
    r.vm.host.map(DATA, HOST, PAGE)
    assert fields(r.fault(IPA + 0x10, WRITE), "kind", "pa") == (MAPPED, HOST + 0x10)


@pytest.mark.parametrize(("perm", "access"), [("r", WRITE), ("rw", EXEC), ("wx", READ), ("r", EXEC | EL0)])
def test_host_permission(perm, access):
    """The host's leaf forbids it: not L1's business."""
    r = Rig(host=False)
    r.vm.host.map(DATA, HOST, PAGE, perm=perm)
    r.tables.map(IPA, DATA)
    assert fields(r.fault(IPA, access), "kind", "fsc", "cipa") == (HOST_FAULT, 0, DATA)
    assert len(r.shadow()) == 0


def test_shadow_has_the_hosts_permissions():
    """What is installed allows no more than host and L1 both."""
    r = Rig(host=False)
    r.vm.host.map(DATA, HOST, PAGE, perm="rx")
    r.tables.map(IPA, DATA, perm="rw")
    assert fields(r.fault(IPA, READ), "kind", "perm") == (MAPPED, READ)
    assert r.fault(IPA, WRITE).kind == HOST_FAULT
    assert r.fault(IPA, EXEC).kind == L1_FAULT


def test_l1_is_asked_first():
    """Where both forbid, L1 has the fault."""
    r = Rig(host=False)
    r.vm.host.map(DATA, HOST, PAGE, perm="r")
    r.tables.map(IPA, DATA, perm="r")
    assert r.fault(IPA, WRITE).kind == L1_FAULT


def test_stage2_off():
    """Stage 2 of L1 off: L2's addresses are canonical, in a context of their own by VMID."""
    r = Rig()
    ctx = r.load(hcr=0)
    assert not ctx.enabled
    f = r.fault(DATA + 0x123, WRITE)
    assert fields(f, "kind", "level", "cipa", "pa", "size") == (MAPPED, -2, DATA + 0x123, HOST + DATA + 0x123, 2 * M)
    assert r.shadow(ctx.index)["guest_level"].tolist() == [-2]
    assert r.fault(NOWHERE).kind == MMIO
    r.vm.check()


@pytest.mark.parametrize("ipa", [1 << 48, 1 << 52, (1 << 64) - 1])
def test_stage2_off_beyond_the_machine(ipa):
    """Stage 2 off and more address bits than the machine has: an address size fault of L2's own."""
    r = Rig()
    r.load(hcr=0)
    f = r.fault(ipa)
    assert fields(f, "kind", "fsc") == (HOST_FAULT, 0)
    assert f.hpfar == hpfar(ipa)


# MMIO


@pytest.mark.parametrize("access", [READ, WRITE, EXEC, READ | PTW])
@pytest.mark.parametrize("cipa", [NOWHERE, DEVICE, DEVICE + 0x1008])
def test_mmio(r, cipa, access):
    """Outside every region, or in a device: the embedder decides, whatever the access."""
    r.tables.map(IPA, cipa & -PAGE)
    f = r.fault(IPA + cipa % PAGE, access)
    assert fields(f, "kind", "fsc", "cipa") == (MMIO, 0x10, cipa)
    assert len(r.shadow()) == 0
    assert r.fault(IPA, access).kind == MMIO


def test_mmio_though_populated(r):
    """populate is not asked where there is no memory."""
    asked = []
    r.vm.host.populate = lambda cipa, access: asked.append(cipa)
    for cipa in (NOWHERE, DEVICE):
        r.tables.map(IPA, cipa)
        assert r.fault(IPA).kind == MMIO
    assert asked == []


def test_device_mapped_by_host(r):
    """A device region that the host maps is passed through."""
    r.vm.host.map(DEVICE, HOST + DEVICE, PAGE, perm="rw", memattr="device-nGnRE")
    r.tables.map(IPA, DEVICE)
    f = r.fault(IPA, WRITE)
    assert fields(f, "kind", "pa", "perm") == (MAPPED, HOST + DEVICE, READ | WRITE)
    assert r.shadow()["memattr"].tolist() == [1]
    r.tables.map(IPA + PAGE, DEVICE + PAGE)
    assert r.fault(IPA + PAGE, WRITE).kind == MMIO


@pytest.mark.parametrize("perm", ["rwx", "rx"])
def test_readonly_region(r, perm):
    """Reads of a read-only region map it without W, even if the host's leaf has it; writes are MMIO."""
    r.vm.host.map(ROM, HOST + ROM, 2 * M, perm=perm)
    r.tables.map(0, ROM, 2)
    assert fields(r.fault(0x5008, WRITE), "kind", "fsc", "cipa") == (MMIO, 0x10, ROM + 0x5008)
    f = r.fault(0x5008, READ)
    assert fields(f, "kind", "perm") == (MAPPED, READ | EXEC | EXEC_EL0)
    assert fields(r.fault(0x5008, WRITE), "kind", "fsc") == (MMIO, 0x10)
    assert fields(r.fault(0x5008, READ | WRITE), "kind", "fsc") == (MMIO, 0x10)
    r.vm.check()


def mixed_rig(second):
    """One 2 MiB leaf of L1 and of the host over 1 MiB of RAM and 1 MiB of something else."""
    mem = s2shadow.GuestMemory()
    mem.add(RAM, 2 * M)
    mem.add(16 * M, M)
    if second == "read-only":
        mem.add(17 * M, buffer=bytes(M), readonly=True)
    if second == "device":
        mem.add(17 * M, M, device=True)
    vm = s2shadow.NestedVM(mem)
    tables = rig.Tables(mem.read64, mem.write64, RAM)
    vm.host.map(16 * M, HOST, 2 * M if second == "read-only" else M)
    tables.map(0, 16 * M, 2)
    vm.vcpus[0].load(tables.vttbr(), tables.vtcr)
    return vm


@pytest.mark.parametrize("second", ["read-only", "device", "nothing"])
def test_leaf_over_two_regions(second):
    """A leaf never reaches from RAM into a read-only region, a device, or nothing, with RAM's permissions."""
    vm = mixed_rig(second)
    fault = vm.vcpus[0].fault
    assert fault(0, WRITE).kind == MAPPED
    assert fault(M, WRITE).kind == MMIO
    assert fault(M + PAGE, READ).kind == (MAPPED if second == "read-only" else MMIO)
    assert fault(M + PAGE, WRITE).kind == MMIO
    assert fault(M - PAGE, WRITE).kind in (HIT, MAPPED)
    vm.check()


# Batches and translate


def random_layout(r, rng, n):
    """n pages of L1's, some unmapped, some read-only, some to nowhere."""
    for k in range(n):
        kind = rng.integers(0, 8)
        if kind:
            cipa = {1: NOWHERE, 2: DEVICE, 3: ROM}.get(int(kind), DATA) + k * PAGE
            r.tables.map(k * PAGE, cipa, perm="r" if kind == 4 else "rwx")


def test_batch_equals_scalar():
    """fault_many answers as fault does, one after the other."""
    rng = np.random.default_rng(3)
    ipas = (rng.integers(0, 256, 2000, dtype=np.uint64) << 12) + rng.integers(0, 512, 2000, dtype=np.uint64) * 8
    access = rng.choice([READ, WRITE, EXEC, READ | EL0], 2000).astype(np.uint8)
    one, many = Rig(), Rig()
    for r in (one, many):
        random_layout(r, np.random.default_rng(4), 256)
    batch = many.vcpu.fault_many(ipas, access)
    assert batch.dtype == s2shadow.FAULT_DTYPE and batch.shape == (2000,)
    for row, ipa, mask in zip(batch, ipas.tolist(), access.tolist(), strict=True):
        f = one.fault(ipa, mask)
        assert [row[name].item() for name in row.dtype.names] == [int(getattr(f, name)) for name in row.dtype.names]
    assert np.array_equal(one.shadow(), many.shadow())
    assert set(batch["kind"].tolist()) == {HIT, MAPPED, L1_FAULT, HOST_FAULT, MMIO}
    many.vm.check()


def test_batch_output(r):
    """out= is filled and returned; one access serves all; an empty batch is fine."""
    r.tables.map_range(0, DATA, 16 * PAGE)
    out = np.zeros(16, dtype=s2shadow.FAULT_DTYPE)
    got = r.vcpu.fault_many(np.arange(16, dtype=np.uint64) * PAGE, WRITE, out=out)
    assert got is out and (out["kind"] == MAPPED).all()
    assert len(r.vcpu.fault_many(np.zeros(0, dtype=np.uint64), READ)) == 0


@pytest.mark.parametrize("many", [False, True])
def test_translate(r, many):
    """The shadow alone: a miss before, a hit after, and no change by asking."""

    def translate(ipa, access):
        if many:
            return r.vcpu.translate_many(np.array([ipa], dtype=np.uint64), access)[0]
        return r.vcpu.translate(ipa, access)

    def value(t, name):
        return int(t[name] if many else getattr(t, name))

    r.tables.map(IPA, DATA, perm="r")
    assert value(translate(IPA, READ), "kind") != HIT
    assert len(r.shadow()) == 0
    r.fault(IPA, READ)
    hit = translate(IPA + 0x18, READ)
    assert [value(hit, n) for n in ("kind", "cipa", "pa", "size", "perm")] == [
        HIT, DATA + 0x18, HOST + DATA + 0x18, PAGE, READ,
    ]  # fmt: skip
    assert value(translate(IPA, WRITE), "kind") != HIT
    assert value(translate(IPA + PAGE, READ), "kind") != HIT
    r.vm.age(RAM, RAM + 64 * M)
    assert value(translate(IPA, READ), "kind") != HIT
    assert not r.shadow()["young"].any()
    assert r.fault(IPA, READ).kind == HIT
    assert value(translate(IPA, READ), "kind") == HIT


def test_hit_makes_young(r):
    """An old entry still answers, and the host's leaf learns that it was used."""
    r.tables.map(IPA, DATA)
    r.fault(IPA)
    r.vm.age(RAM, RAM + 64 * M)
    assert not rig.flags(r.vm.test_young(DATA, DATA + PAGE), 1)[0]
    assert r.fault(IPA).kind == HIT
    assert r.shadow()["young"].tolist() == [1]
    assert rig.flags(r.vm.test_young(DATA, DATA + PAGE), 1)[0]
