"""The reference model's memory attributes, against the 196 compositions that the specification lists."""

import csv
from pathlib import Path

import numpy as np
import pytest

import snapshots
from model.combine import Host, combine, combine_memattr
from model.memory import Memory
from model.walk import Config, Features, walk

TABLE = Path(__file__).parent / "data" / "spec" / "memattr_compose.csv"
ROWS = list(csv.DictReader(TABLE.read_text().splitlines()))


def test_row_count():
    """The file is whole."""
    assert len(ROWS) == 196


@pytest.mark.parametrize("fwb", ["00", "01", "10", "11"])
def test_rows(fwb):
    """Every row with this FWB of L1 and of the host."""
    for row in (r for r in ROWS if r["l1_fwb"] + r["l0_fwb"] == fwb):
        got = combine_memattr(int(row["l1_memattr"], 2), int(row["l0_memattr"], 2), fwb[0] == "1", fwb[1] == "1")
        assert got == int(row["shadow_memattr"], 2), row


def model_memory(pages):
    mem = Memory()
    for address, page in pages.items():
        mem.add(address, 4096)
        for index in np.flatnonzero(page).tolist():
            mem.poke(address + 8 * index, int(page[index]))
    mem.regions = [(min(pages), max(pages) + 4096, None)]
    return mem


NESTED = ["g_nested_7.2/10_final", "g_nested_7.2/02_dirtylog_on", "g2_nested_notifier_7.2/06_storm"]


@pytest.mark.parametrize("name", NESTED)
def test_real_shadows(name):
    """The model makes the very leaves that a real L0 built over a real L1: address, size, permissions, attributes."""
    snap = snapshots.load(name)
    host, l1 = model_memory(snap.pages()), model_memory(snap.pages("l1_tables"))
    host_cfg = Config(*snapshots.regs(snap.registers["l0_table_for_l1"]))
    (vm,), (shadow,) = snap.registers["nested"], snap.registers["vms"]
    l1_cfg = Config(*snapshots.regs(vm, "l1_"))
    leaves = snap.scan("tables", *snapshots.regs(shadow)).leaves
    assert len(leaves) == vm["shadow_leaves"]
    for ipa, pa, size, _level, desc in leaves:
        guest = walk(l1, l1_cfg, ipa, update=False)
        under = walk(host, host_cfg, guest.pa, update=False)
        block = Host(under.pa & -under.size, under.size, under.perm, under.memattr, under.sh)
        made = combine(guest, block, Features(), True, True)
        assert (made.desc & 0xFFFF_FFFF_F000, made.size) == (pa, size)
        assert made.desc & 0x0060_0000_0000_03FC == desc & 0x0060_0000_0000_03FC
