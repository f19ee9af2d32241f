"""Dirty logging and aging."""

import pytest

import rig
import s2shadow
from rig import DATA, HOST, PAGE, RAM, G, M, Rig, flags
from s2shadow import EXEC, HIT, HOST_FAULT, L1_FAULT, MAPPED, MMIO, READ, WRITE

END = RAM + 64 * M


@pytest.fixture
def r():
    """L1 maps 4 MiB in pages and 4 MiB in blocks to DATA."""
    r = Rig()
    r.tables.map_range(0, DATA, 4 * M)
    r.tables.map_range(4 * M, DATA + 4 * M, 4 * M, level=2)
    return r


def dirty(r, start=DATA, end=DATA + 8 * M):
    """The dirty pages, by offset from DATA."""
    bits = flags(r.vm.dirty_log(start, end), (end - start) // PAGE)
    return {start - DATA + n * PAGE for n, bit in enumerate(bits) if bit}


def young(r, start=DATA, end=DATA + 8 * M, clear=False):
    ask = r.vm.age if clear else r.vm.test_young
    bits = flags(ask(start, end), (end - start) // PAGE)
    return {start - DATA + n * PAGE for n, bit in enumerate(bits) if bit}


def perms(r, index=0):
    return {row["ipa"].item(): row["perm"].item() for row in r.shadow(index)}


# dirty logging


def test_off_by_default(r):
    """Without logging nothing is dirty."""
    r.fault(0, WRITE)
    assert dirty(r) == set()


def test_write_is_reported_once(r):
    """Written, reported, cleared, protected again; the next write is reported again."""
    r.vm.log_dirty(RAM, END)
    assert r.fault(3 * PAGE, WRITE).kind == MAPPED
    assert dirty(r) == {3 * PAGE}
    assert dirty(r) == set()
    assert r.fault(3 * PAGE, READ).kind == HIT
    assert dirty(r) == set()
    assert r.fault(3 * PAGE, WRITE).kind == MAPPED
    assert r.fault(3 * PAGE, WRITE).kind == HIT
    assert dirty(r) == {3 * PAGE}
    r.vm.check()


def test_reads_do_not_write(r):
    """Under logging a read or a fetch is mapped without W, so that the write is seen."""
    r.vm.log_dirty(RAM, END)
    for n, access in enumerate((READ, EXEC)):
        f = r.fault(n * PAGE, access)
        assert f.kind == MAPPED and not f.perm & WRITE
    assert dirty(r) == set()
    f = r.fault(0, WRITE)
    assert f.kind == MAPPED and f.perm & WRITE
    assert dirty(r) == {0}


def test_on_protects_what_is_mapped(r):
    """Switching on takes W from what is there, in every context, and drops nothing."""
    r.fault(0, WRITE)
    r.fault(4 * M, WRITE)
    r.load(2)
    r.fault(0, WRITE)
    assert r.vm.log_dirty(RAM, END).leaves == 0
    assert all(not p & WRITE for n in (0, 1) for p in perms(r, n).values())
    assert r.fault(0, READ).kind == HIT
    assert r.fault(0, WRITE).kind == MAPPED
    assert dirty(r) == {0}
    r.vm.check()


def test_write_splits_blocks(r):
    """A write into a block: the host block falls to pages, the shadow block goes, one page is dirty."""
    r.fault(4 * M, READ)
    r.vm.log_dirty(RAM, END)
    assert perms(r).keys() == {4 * M}
    f = r.fault(4 * M + 5 * PAGE, WRITE)
    assert (f.kind, f.size) == (MAPPED, PAGE)
    assert perms(r).keys() == {4 * M + 5 * PAGE}
    assert dirty(r) == {4 * M + 5 * PAGE}
    sizes = {leaf[2] for leaf in r.host_leaves() if DATA + 4 * M <= leaf[0] < DATA + 6 * M}
    assert sizes == {PAGE}
    r.vm.check()


def test_write_splits_a_gigabyte():
    """A write into 1 GiB: one page is writable, whatever sizes lie around it."""
    r = Rig(host=False)
    r.mem.add(4 * G, G)
    r.vm.host.map(4 * G, 16 * G, G)
    r.tables.map(0, 4 * G, 1)
    assert r.fault(0).size == G
    r.vm.log_dirty(4 * G, 5 * G)
    f = r.fault(5 * M, WRITE)
    assert (f.kind, f.size) == (MAPPED, PAGE)
    assert [(leaf[0], leaf[2]) for leaf in r.host_leaves() if leaf[3] & WRITE] == [(4 * G + 5 * M, PAGE)]
    assert r.leaves() == [(5 * M, 4 * G + 5 * M, PAGE)]
    r.vm.check()


def test_aliases_report_one_page(r):
    """Written through two nested addresses and two contexts, a page is one dirty page."""
    r.tables.map(16 * M, DATA)
    r.vm.log_dirty(RAM, END)
    for vmid in (1, 2):
        r.load(vmid)
        r.fault(0, WRITE)
        r.fault(16 * M, WRITE)
    assert dirty(r) == {0}
    assert all(not p & WRITE for n in (0, 1) for p in perms(r, n).values())
    r.fault(16 * M, WRITE)
    assert dirty(r) == {0}


def test_a_read_brings_no_write(r):
    """A page that was written through one address is mapped without W by a read through another."""
    r.tables.map(16 * M, DATA)
    r.vm.log_dirty(RAM, END)
    r.fault(0, WRITE)
    assert not r.fault(16 * M, READ).perm & WRITE
    assert (perms(r)[0] & WRITE, perms(r)[16 * M] & WRITE) == (WRITE, 0)
    assert r.fault(16 * M, WRITE).kind == MAPPED


def test_only_what_was_dirty_is_protected_again(r):
    """dirty_log over a part leaves the rest writable and still reported later."""
    r.vm.log_dirty(RAM, END)
    for page in (0, PAGE, 2 * PAGE):
        r.fault(page, WRITE)
    assert dirty(r, DATA + PAGE, DATA + 2 * PAGE) == {PAGE}
    assert [bool(p & WRITE) for p in perms(r).values()] == [True, False, True]
    assert dirty(r) == {0, 2 * PAGE}


def test_range_of_logging(r):
    """Pages outside the logged range are written freely and never reported."""
    r.vm.log_dirty(DATA + PAGE, DATA + 2 * PAGE)
    for page in (0, PAGE, 2 * PAGE):
        assert r.fault(page, WRITE).kind == MAPPED
    assert dirty(r) == {PAGE}
    assert all(r.fault(page, WRITE).kind == HIT for page in (0, 2 * PAGE))
    r.vm.check()


def test_block_partly_logged(r):
    """A block with one logged page: no write into that page is missed, wherever the first write falls."""
    r.fault(4 * M, WRITE)
    r.vm.log_dirty(DATA + 4 * M + 7 * PAGE, DATA + 4 * M + 8 * PAGE)
    assert r.fault(4 * M, WRITE).kind == MAPPED
    assert dirty(r) == set()
    assert r.fault(4 * M + 7 * PAGE, WRITE).kind == MAPPED
    assert dirty(r) == {4 * M + 7 * PAGE}
    assert r.fault(4 * M + 9 * PAGE, WRITE).kind == MAPPED
    assert dirty(r) == set()
    r.vm.check()


def test_part_of_a_block(r):
    """Logging a part of a host block: its page shadows outside that part allow no more than the block now does."""
    r.fault(0, WRITE)
    r.fault(8 * PAGE, WRITE)
    r.vm.log_dirty(DATA + PAGE, DATA + 2 * PAGE)
    r.vm.check()
    assert r.fault(0, WRITE).kind in (HIT, MAPPED)
    assert dirty(r) == set()
    r.vm.check()


@pytest.mark.parametrize(("before", "after"), [("rwx", "rw"), ("rw", "rwx"), ("rwx", "rx"), ("rwx", "r")])
def test_protect_while_logging(r, before, after):
    """protect over a page that is dirty: shadow and host agree, and the page is still reported."""
    r.vm.host.protect(RAM, END, before)
    r.vm.log_dirty(RAM, END)
    r.fault(0, WRITE)
    r.vm.host.protect(DATA, DATA + 2 * M, after)
    r.vm.check()
    assert dirty(r) == {0}
    r.vm.check()
    assert r.fault(0, WRITE).kind == (MAPPED if "w" in after else HOST_FAULT)
    assert dirty(r) == ({0} if "w" in after else set())


def test_off_gives_write_back(r):
    """Switched off, the next write gets W for good, and nothing is reported any more."""
    r.vm.log_dirty(RAM, END)
    r.fault(0, WRITE)
    r.fault(PAGE, READ)
    r.vm.log_dirty(RAM, END, on=False)
    assert r.fault(PAGE, WRITE).kind == MAPPED
    assert dirty(r) == set()
    assert r.fault(PAGE, WRITE).kind == HIT


def test_off_then_block_write(r):
    """A block that was never written while logging ran is written as a block afterwards."""
    r.vm.log_dirty(RAM, END)
    r.fault(4 * M, READ)
    r.vm.log_dirty(RAM, END, on=False)
    f = r.fault(4 * M, WRITE)
    assert (f.kind, f.size) == (MAPPED, 2 * M)
    assert f.perm & WRITE


def test_l1_and_host_still_decide(r):
    """Logging gives nobody a permission: L1's read-only pages and the host's stay read-only."""
    r.tables.map(16 * M, DATA, perm="r")
    r.vm.host.protect(DATA + PAGE, DATA + 2 * PAGE, "r")
    r.vm.log_dirty(RAM, END)
    assert r.fault(16 * M, WRITE).kind == L1_FAULT
    assert r.fault(PAGE, WRITE).kind == HOST_FAULT
    assert dirty(r) == set()
    r.tables.map(17 * M, rig.ROM)
    assert r.fault(17 * M, WRITE).kind == MMIO


def test_mapped_while_logging(r):
    """What the host maps while logging runs is logged too."""
    r.vm.log_dirty(RAM, END)
    r.vm.host.map(DATA, 2 * HOST, 2 * M)
    f = r.fault(0, READ)
    assert f.kind == MAPPED and not f.perm & WRITE
    assert r.fault(0, WRITE).size == PAGE
    assert dirty(r) == {0}
    r.vm.check()


def test_populated_while_logging():
    """What populate maps while logging runs is logged too."""
    r = Rig(host=False)
    r.vm.host.populate = s2shadow.Linear(offset=HOST)
    r.tables.map(0, DATA, 2)
    r.vm.log_dirty(RAM, END)
    f = r.fault(0, READ)
    assert f.kind == MAPPED and not f.perm & WRITE
    f = r.fault(PAGE, WRITE)
    assert (f.kind, f.size) == (MAPPED, PAGE)
    assert dirty(r) == {PAGE}
    r.vm.check()


def test_engine_writes_are_logged():
    """The access flag that a walk sets in L1's table is a write to that page of L1's."""
    r = Rig(vtcr=1 << 21)
    where = r.tables.map(0, DATA, af=0)
    r.vm.log_dirty(RAM, END)
    r.fault(0, READ)
    assert dirty(r, RAM, END) == {(where & -PAGE) - DATA}
    r.fault(0, READ)
    assert dirty(r, RAM, END) == set()


def test_dirty_survives_unmap(r):
    """A page written and then taken away was still written: the log must say so."""
    r.vm.log_dirty(RAM, END)
    r.fault(0, WRITE)
    r.vm.unmap(DATA, DATA + PAGE)
    assert dirty(r) == {0}


def test_log_on_twice(r):
    """Switching on again forgets nothing."""
    r.vm.log_dirty(RAM, END)
    r.fault(0, WRITE)
    r.vm.log_dirty(DATA, DATA + M)
    assert dirty(r) == {0}


@pytest.mark.parametrize("start", [0, 1, 10, 63, 64])
@pytest.mark.parametrize("written", [64, 65, 66, 73, 127, 128, 191])
def test_report_from_anywhere(r, start, written):
    """A report finds what was written, wherever in its bit array it begins."""
    r.vm.log_dirty(RAM, END)
    r.fault(written * PAGE, WRITE)
    got = flags(r.vm.dirty_log(DATA + start * PAGE, DATA + 192 * PAGE), 192 - start)
    assert [start + n for n, dirty in enumerate(got) if dirty] == [written]


@pytest.mark.parametrize("pages", [1, 7, 8, 9, 513])
def test_bitmap_shape(r, pages):
    """One bit a page, little-endian within bytes, odd lengths padded with zeros."""
    r.vm.log_dirty(RAM, END)
    r.fault((pages - 1) * PAGE, WRITE)
    bitmap = r.vm.dirty_log(DATA, DATA + pages * PAGE)
    assert bitmap.dtype == "uint8" and bitmap.shape == ((pages + 7) // 8,)
    want = [0] * len(bitmap)
    want[-1] = 1 << (pages - 1) % 8
    assert bitmap.tolist() == want


# aging


def test_young_by_use(r):
    """Mapped by the host: young. Aged: old. Touched: young again, page by page."""
    assert young(r) == set(range(0, 8 * M, PAGE))
    assert young(r, clear=True) == set(range(0, 8 * M, PAGE))
    assert young(r) == set()
    r.fault(2 * PAGE)
    assert young(r) >= {2 * PAGE}
    assert young(r, DATA + 3 * M, DATA + 8 * M) == set()


def test_age_reports_and_clears(r):
    """Shadow entries count; each is reported once until used again."""
    r.fault(0)
    r.fault(5 * PAGE)
    young(r, RAM, END, clear=True)
    assert r.shadow()["young"].tolist() == [0, 0]
    assert r.fault(0).kind == HIT
    assert r.shadow()["young"].tolist() == [1, 0]
    assert 0 in young(r, clear=True)
    assert young(r) == set()
    r.vm.check()


@pytest.mark.parametrize("live", [False, True])
def test_a_use_outlives_its_leaf(r, live):
    """L1 invalidates the leaf by which an old page was used, be it new or one that was there: the page was used."""
    if live:
        r.fault(2 * PAGE)
    young(r, RAM, END, clear=True)
    assert r.fault(2 * PAGE).kind == (HIT if live else MAPPED)
    assert r.vcpu.tlbi("IPAS2E1IS", 2).removed == 1
    assert 2 * PAGE in young(r, DATA, DATA + 4 * PAGE)


def test_test_young_changes_nothing(r):
    """Asking is not aging."""
    r.fault(0)
    before = r.shadow().copy()
    assert young(r) == young(r)
    assert (r.shadow() == before).all()


def test_young_through_an_alias(r):
    """A page is young if any of its shadows is, in whatever context."""
    r.tables.map(16 * M, DATA)
    for vmid in (1, 2):
        r.load(vmid)
        r.fault(0)
        r.fault(16 * M)
    young(r, RAM, END, clear=True)
    r.fault(16 * M)
    assert 0 in young(r, DATA, DATA + PAGE)


def test_young_block(r):
    """A young block marks all its pages in the range, and aging a part of it ages it."""
    r.fault(4 * M)
    assert r.leaves() == [(4 * M, DATA + 4 * M, 2 * M)]
    young(r, RAM, END, clear=True)
    r.fault(4 * M + 3 * PAGE)
    assert young(r, DATA + 4 * M, DATA + 6 * M) == set(range(4 * M, 6 * M, PAGE))
    assert young(r, DATA + 5 * M, DATA + 5 * M + PAGE, clear=True) == {5 * M}
    assert young(r, DATA + 4 * M, DATA + 6 * M) == set()


def test_unmapped_is_not_young(r):
    """Where nothing is mapped nothing is young."""
    r.fault(0)
    r.vm.unmap(DATA, DATA + PAGE)
    assert young(r, DATA, DATA + 2 * PAGE) == {PAGE}
    assert young(r, END, END + M) == set()


def test_aging_owes_no_tlbi(r):
    """Age clears access flags and owes the hardware nothing."""
    r.fault(0)
    r.vm.take_tlbis()
    young(r, RAM, END, clear=True)
    assert len(r.vm.take_tlbis()) == 0


def test_relaxed_is_young(r):
    """An old entry that is relaxed is young."""
    where = r.tables.map(0, DATA, perm="r")
    r.fault(0)
    young(r, RAM, END, clear=True)
    r.tables.set(where, r.tables.leaf(DATA, 3, "rw"))
    assert r.fault(0, WRITE).kind == MAPPED
    assert r.shadow()["young"].tolist() == [1]
    assert young(r, DATA, DATA + PAGE) == {0}
