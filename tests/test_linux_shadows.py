"""Linux itself through the engine: given the two tables that a real L0 had, the engine's shadow is the one L0 built.

22 snapshots of a nested Linux (L0, L1 and L2 are real): leaf by leaf the same address, size, permissions, type and
shareability. And a host's tables of 52-bit addresses (VTCR.DS=1) as L1's: every leaf of every VM of 11 snapshots.
"""

from bisect import bisect_right

import numpy as np
import pytest

import s2shadow
import snapshots
from model.combine import combine_memattr
from s2shadow import EXEC, EXEC_EL0, HCR_FWB, HCR_VM, HOST_FAULT, MAPPED, READ, WRITE

NESTED = [name for name in snapshots.NAMES if "nested" in snapshots.load(name).registers]
LPA2 = [name for name in snapshots.NAMES if name.startswith("c_storm_lpa2")]
SOFTWARE = 0xF << 55  # Linux keeps its own level tag there, we ours
NORMAL_FWB = 0b0110


def access_of(desc):
    """Something that this leaf allows."""
    return READ if desc >> 6 & 1 else WRITE if desc >> 7 & 1 else EXEC


def nested_vm(name):
    """The engine with L1's memory and tables, the host's table, and L1's registers loaded."""
    mem = s2shadow.GuestMemory()
    capture = mem.load_tables(snapshots.CAPTURES / name, "l1")
    vm = s2shadow.NestedVM(mem, features=s2shadow.Features(hafdbs=1))
    host = capture.host
    vm.host.load(host.addresses, host.pages, host.vttbr, host.vtcr)
    (l1,) = capture.vms
    context = vm.vcpus[0].load(l1.vttbr, l1.vtcr, hcr=HCR_VM | HCR_FWB)
    return vm, context


def parallel(leaves):
    """The leaves' addresses, and for each an access that it allows, for a batch."""
    ipas = np.array([leaf[0] for leaf in leaves], dtype=np.uint64)
    return ipas, np.array([access_of(leaf[-1]) for leaf in leaves], dtype=np.uint8)


def linux_shadow(name):
    """(ipa, size, descriptor) of every leaf of the shadow that Linux made."""
    snap = snapshots.load(name)
    (shadow,) = snap.registers["vms"]
    leaves = snap.scan("tables", *snapshots.regs(shadow)).leaves
    assert len(leaves) == snap.registers["nested"][0]["shadow_leaves"]
    return [(ipa, size, desc & ~SOFTWARE) for ipa, _, size, _, desc in leaves]


@pytest.mark.parametrize("name", NESTED)
def test_shadow(name):
    """Each leaf of Linux's is faulted in once: then both shadows are the same, to the bit."""
    vm, context = nested_vm(name)
    linux = linux_shadow(name)
    faults = vm.vcpus[0].fault_many(*parallel(linux))
    assert set(faults["kind"].tolist()) <= {MAPPED}
    rows = vm.shadow(context.index)
    ours = [(ipa, size, desc & ~SOFTWARE) for ipa, size, desc in rows[["ipa", "size", "desc"]].tolist()]
    assert ours == linux
    assert rows["young"].all()
    vm.check()


def test_leaf_count():
    """All of them: 61,000 leaves."""
    assert sum(len(linux_shadow(name)) for name in NESTED) == 61_000


@pytest.mark.parametrize("name", NESTED)
def test_rest_of_l1(name):
    """L1's leaves that L2 had not touched yet compose the same way; where the host has nothing, it is asked."""
    vm, context = nested_vm(name)
    snap = snapshots.load(name)
    l1 = snap.scan("l1_tables", *snapshots.regs(snap.registers["nested"][0], "l1_")).leaves
    host = snap.scan("tables", *snapshots.regs(snap.registers["l0_table_for_l1"])).leaves
    faults = vm.vcpus[0].fault_many(*parallel(l1))
    rows = {row[0]: row for row in vm.shadow(context.index)[["ipa", "cipa", "pa", "size", "perm", "young"]].tolist()}
    unmapped = 0
    for (ipa, cipa, size, _, desc), fault in zip(l1, faults, strict=True):
        under = host_leaf(host, cipa)
        if under is None or not under[4] >> 6 & access_of(desc):
            unmapped += 1
            assert (fault["kind"], fault["cipa"]) == (HOST_FAULT, cipa)
            continue
        start, pa, host_size, _, host_desc = under
        size = min(size, host_size)
        perm = desc >> 6 & host_desc >> 6 & 3 | EXEC | EXEC_EL0  # XN is 0 on both sides everywhere
        assert not (desc | host_desc) >> 53 & 3
        assert rows[ipa] == (ipa, cipa, pa + (cipa - start & -size), size, perm, 1)
        assert fault["kind"] == MAPPED
    assert len(rows) == len(l1) - unmapped
    vm.check()


def host_leaf(leaves, address):
    """The last leaf that starts at or below the address, if it covers it."""
    at = bisect_right(leaves, address, key=lambda leaf: leaf[0]) - 1
    return leaves[at] if at >= 0 and address < leaves[at][0] + leaves[at][2] else None


HOST = 0x5 << 48 | 1 << 42  # so that our own leaves need 52 bits too
WIDE = s2shadow.Features(pa_bits=52, lpa=True, lpa2=True)


@pytest.mark.parametrize("name", LPA2)
def test_lpa2(name):
    """Every leaf of every VM, through tables of 52-bit addresses on both sides; another reader finds them in ours."""
    mem = s2shadow.GuestMemory()
    capture = mem.load_tables(snapshots.CAPTURES / name)
    vm = s2shadow.NestedVM(mem, features=WIDE, contexts=len(capture.vms))
    vm.host.populate = s2shadow.Linear(offset=HOST, max_block=1 << 30)
    snap = snapshots.load(name)
    for entry, captured in zip(snap.registers["vms"], capture.vms, strict=True):
        linux = snap.scan("tables", *snapshots.regs(entry)).leaves
        context = vm.vcpus[0].load(captured.vttbr, captured.vtcr, hcr=captured.hcr)
        vm.vcpus[0].fault_many(*parallel(linux))
        want = [
            (ipa, pa, HOST + pa, size, desc >> 6 & 3, combine_memattr(desc >> 2 & 15, NORMAL_FWB, True, True), level)
            for ipa, pa, size, level, desc in linux
        ]
        rows = vm.shadow(context.index)
        assert rows[["ipa", "cipa", "pa", "size"]].tolist() == [row[:4] for row in want]
        assert (rows["perm"] & 3).tolist() == [row[4] for row in want]
        assert rows[["memattr", "guest_level"]].tolist() == [row[5:] for row in want]
        assert (rows["sh"] == 3).all() and rows["young"].all()
        addresses, pages = vm.tables(context.index)
        words = dict(zip(addresses.tolist(), pages.view("<u8"), strict=True))
        ours = snapshots.scan(words, context.host_vttbr, context.host_vtcr).leaves
        assert [leaf[:3] for leaf in ours] == [(ipa, HOST + pa, size) for ipa, pa, size, _, _ in linux]
    vm.check()
