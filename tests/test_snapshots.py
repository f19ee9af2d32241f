"""The captured tables of a real Linux 7.2 hypervisor walk to what its captures say."""

from collections import Counter
from functools import cache

import numpy as np
import pytest

import s2shadow
import snapshots

READ = s2shadow.READ


def features(snap):
    return s2shadow.Features(pa_bits=snap.pa_bits, lpa=snap.pa_bits == 52, lpa2=snap.pa_bits == 52)


@cache
def memory_of(snap, file="tables"):
    """Sparse memory from the first table page to the last, the pages written into it."""
    pages = snap.pages(file)
    mem = s2shadow.GuestMemory()
    start = min(pages)
    mem.add(start, max(pages) + 4096 - start)
    for address, page in pages.items():
        mem.write(address, page.tobytes())
    return mem


def test_all_there():
    """No snapshot is missing: 66 of them, 11 of the nested captures twice with L1's own tables."""
    assert len(snapshots.NAMES) == 66
    assert sum("nested" in snapshots.load(name).registers for name in snapshots.NAMES) == 22
    assert set(snapshots.readme_rows()) == set(snapshots.NAMES)


@pytest.mark.parametrize("name", snapshots.NAMES)
class TestSnapshot:
    def test_walks(self, name):
        """Every table of every VM: leaves, levels, sizes, and each leaf as a scan of the raw words finds it."""
        snap = snapshots.load(name)
        for which, file, vttbr, vtcr, count, sizes, tables in snap.roots:
            cfg = s2shadow.Stage2Config(vttbr, vtcr, features=features(snap))
            assert cfg.error is None, which
            found = s2shadow.leaves(memory_of(snap, file), cfg)
            by_hand = snap.scan(file, vttbr, vtcr)
            assert len(found) == count, which
            assert found[["ipa", "pa", "size", "level", "desc"]].tolist() == by_hand.leaves
            assert sizes is None or Counter(snapshots.NAME[s] for s in found["size"].tolist()) == sizes
            assert tables is None or {str(k): v for k, v in by_hand.tables.items()} == tables

    def test_geometry(self, name):
        """Start level, input size, base, VMID and the number of start tables."""
        snap = snapshots.load(name)
        for vm in snap.registers["vms"]:
            cfg = s2shadow.Stage2Config(*snapshots.regs(vm), features=features(snap))
            assert (cfg.granule, cfg.ia_bits, cfg.start_level) == (vm["granule"], vm["ipa_bits"], vm["start_level"])
            assert (cfg.baddr, cfg.vmid) == (int(vm["baddr"], 16), vm["vmid"])
            assert cfg.concatenated == vm["concatenated_start_tables"]

    def test_readme(self, name):
        """The sums over the VMs are those of the README: VMs, table pages, leaves by size."""
        snap = snapshots.load(name)
        vms, table_pages, sizes = snapshots.readme_rows()[name]
        got, used = Counter(), set()
        for which, file, vttbr, vtcr, *_ in snap.roots:
            if file == "tables":
                used |= snap.scan(file, vttbr, vtcr).pages
            if which.startswith("vm"):
                cfg = s2shadow.Stage2Config(vttbr, vtcr, features=features(snap))
                got += Counter(snapshots.NAME[s] for s in s2shadow.leaves(memory_of(snap), cfg)["size"].tolist())
        assert (len(snap.registers["vms"]), len(used), got) == (vms, table_pages, sizes)
        assert used == set(snap.pages())

    def test_spot_walks(self, name):
        """Single walks, inside leaves and beside them, agree with the scan; none changes a word."""
        snap = snapshots.load(name)
        rng = np.random.default_rng(len(name))
        for which, file, vttbr, vtcr, *_ in snap.roots:
            mem, leaves = memory_of(snap, file), snap.scan(file, vttbr, vtcr).leaves
            cfg = s2shadow.Stage2Config(vttbr, vtcr, features=features(snap))
            some = [leaves[n] for n in rng.integers(0, len(leaves), 200).tolist()]
            offsets = [int(rng.integers(0, leaf[2])) for leaf in some]
            ipas = np.array([leaf[0] + at for leaf, at in zip(some, offsets, strict=True)], dtype=np.uint64)
            ws = s2shadow.walk_many(mem, cfg, ipas, READ, update=False)
            for w, (_, pa, size, level, desc), at in zip(ws, some, offsets, strict=True):
                readable = desc >> 6 & 1
                assert (w["status"], w["fsc"]) == ((0, 0) if readable else (1, 0xC + level)), which
                assert (w["pa"], w["size"], w["level"], w["desc"]) == (pa + at, size, level, desc)
                assert w["updated"] == (readable and not desc >> 10 & 1)
            starts = {leaf[0] for leaf in leaves}
            ends = (leaf[0] + leaf[2] for leaf in leaves)
            gaps = [end for end in ends if end not in starts and end >> cfg.ia_bits == 0]
            for ipa in gaps[:50]:
                w = s2shadow.walk(mem, cfg, ipa)
                assert w.status == 1 and w.fault.startswith("translation fault")
        for file in ("tables", "l1_tables") if "nested" in snap.registers else ("tables",):
            mem = memory_of(snap, file)
            assert all(mem.read(address, 4096) == page.tobytes() for address, page in snap.pages(file).items())


NESTED = [name for name in snapshots.NAMES if "nested" in snapshots.load(name).registers]


@pytest.mark.parametrize("name", NESTED)
def test_real_shadows_compose(name):
    """Each leaf of the shadow that the real L0 built is what combine makes of L1's leaf and L0's."""
    snap = snapshots.load(name)
    feat = features(snap)
    host, l1 = memory_of(snap), memory_of(snap, "l1_tables")
    host_cfg = s2shadow.Stage2Config(*snapshots.regs(snap.registers["l0_table_for_l1"]), features=feat)
    (vm,), (shadow,) = snap.registers["nested"], snap.registers["vms"]
    l1_cfg = s2shadow.Stage2Config(*snapshots.regs(vm, "l1_"), features=feat)
    shadow_cfg = s2shadow.Stage2Config(*snapshots.regs(shadow), features=feat)
    leaves = s2shadow.leaves(host, shadow_cfg)
    assert len(leaves) == vm["shadow_leaves"]
    for leaf in leaves:
        guest = s2shadow.walk(l1, l1_cfg, leaf["ipa"].item(), READ, update=False)
        under = s2shadow.walk(host, host_cfg, guest.pa, READ, update=False)
        made = s2shadow.combine(guest, under, features=feat, guest_fwb=True, host_fwb=True)
        assert (made.size, made.perm, made.memattr, made.sh) == (leaf["size"], leaf["perm"], leaf["memattr"], 3)
        assert made.desc & 0xFFFF_FFFF_F000 == leaf["pa"]
        assert made.guest_level == guest.level
