"""FEAT_HAFDBS's dirty state in the engine: a write to a writable-clean page of L1's sets S2AP[1] in L1's descriptor.

By hand and by threads; random sequences against the model are in test_engine_matrix.py.
"""

import threading

import numpy as np
import pytest

import s2shadow
from model.memory import swap64
from rig import AF, DATA, DBM, DIRTY, HA, HD, HOST, MRO, PAGE, RAM, ROM, S2PIE, K, M, Rig, flags
from s2shadow import (
    EL0,
    EXEC,
    EXEC_EL0,
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
    HostMapping,
)  # fmt: skip

IPA = 0x12_3000
RX = READ | EXEC | EXEC_EL0
RWX = RX | WRITE
DIRECT = {"vtcr": HA | HD, "features": s2shadow.Features(hafdbs=2)}
INDIRECT = {"vtcr": HA | HD | S2PIE, "features": s2shadow.Features(hafdbs=2, s2pie=True)}
WIDE = {"vtcr": HA | HD, "features": s2shadow.Features(pa_bits=52, lpa=True, lpa2=True, hafdbs=2), "wide": True}


@pytest.fixture(params=[False, True], ids=["little-endian", "big-endian"])
def big_endian(request):
    return request.param


@pytest.fixture(params=[DIRECT, INDIRECT, WIDE], ids=["direct", "indirect", "wide"])
def r(request, big_endian):
    return Rig(big_endian=big_endian, **request.param)


def clean_page(r, ipa=IPA, cipa=DATA, perm="rwx", level=3, **fields):
    """Address of the descriptor of a writable-clean leaf."""
    return r.tables.map(ipa, cipa, level, perm=perm, clean=True, **fields)


def dirty_pages(r, start=RAM, end=RAM + 64 * M):
    page = r.features.host_granule
    found = flags(r.vm.dirty_log(start, end), (end - start) // page)
    return {start + n * page for n, dirty in enumerate(found) if dirty}


def memory_of(r):
    return r.mem.read(RAM, 4 * M)


class TestWrite:
    def test_sets_bit_7(self, r, big_endian):
        """The word in memory changes by that bit alone, in L1's byte order; the leaf is writable at once."""
        where = clean_page(r)
        before = r.mem.read64(where)
        f = r.fault(IPA + 8, WRITE)
        assert (f.kind, f.perm, f.pa) == (MAPPED, RWX, HOST + DATA + 8)
        assert r.mem.read64(where) == before ^ (swap64(DIRTY) if big_endian else DIRTY)
        assert r.tables.get(where) & DIRTY
        assert r.fault(IPA, WRITE).kind == HIT
        r.vm.check()

    def test_sets_the_access_flag_too(self, r):
        """One swap for both."""
        where = clean_page(r, af=0)
        before = r.tables.get(where)
        assert r.fault(IPA, WRITE).kind == MAPPED
        assert r.tables.get(where) == before | AF | DIRTY

    def test_nothing_else_is_written(self, r):
        """Neither the neighbours nor any other byte of L1's memory."""
        where = clean_page(r)
        for n in (-1, 1):
            clean_page(r, IPA + n * PAGE, DATA + 2 * PAGE)
        before = bytearray(memory_of(r))
        r.fault(IPA, WRITE)
        before[where - RAM : where - RAM + 8] = r.mem.read(where, 8)
        assert memory_of(r) == before

    @pytest.mark.parametrize("access", [WRITE | EL0, WRITE | READ, WRITE | PTW, WRITE | READ | EXEC])
    def test_every_kind_of_write(self, r, access):
        """By EL0, by an atomic, by a stage-1 walk that updates its own descriptor."""
        where = clean_page(r)
        assert r.fault(IPA, access).kind == MAPPED
        assert r.tables.get(where) & DIRTY

    def test_block(self, r):
        """A block has one descriptor: the first write anywhere in it sets the bit for all of it."""
        where = clean_page(r, 2 * M, DATA, level=2)
        r.vm.unmap(RAM, RAM + 64 * M)
        r.vm.host.populate = s2shadow.Linear(offset=HOST, max_block=4 * K)
        assert r.fault(2 * M).perm == RX
        assert r.fault(2 * M + 5 * PAGE, WRITE).perm == RWX
        assert r.tables.get(where) & DIRTY
        assert r.fault(2 * M + 6 * PAGE).perm == RWX
        r.vm.check()

    def test_batch(self, r):
        """Every page of a batch, each once."""
        places = [clean_page(r, IPA + n * PAGE, DATA + n * PAGE) for n in range(64)]
        got = r.vcpu.fault_many([IPA + n % 64 * PAGE for n in range(128)], WRITE)
        assert got["kind"].tolist() == [MAPPED] * 64 + [HIT] * 64
        assert all(r.tables.get(where) & DIRTY for where in places)


class TestRead:
    def test_maps_read_only(self, r):
        """A clean page is mapped without W until the write comes; then the same leaf is relaxed."""
        where = clean_page(r)
        before = r.tables.get(where)
        assert (r.fault(IPA).kind, r.fault(IPA).perm) == (MAPPED, RX)
        assert r.tables.get(where) == before
        assert r.vcpu.translate(IPA, WRITE).kind == s2shadow.MISS
        f = r.fault(IPA, WRITE)
        assert (f.kind, f.perm) == (MAPPED, RWX)
        assert r.tables.get(where) == before | DIRTY
        assert r.vm.stats.relaxed == 1 and r.vm.stats.installed == 1

    def test_already_dirty(self, r):
        """W right away, even on a read."""
        r.tables.map(IPA, DATA)
        assert r.fault(IPA).perm == RWX

    def test_two_views(self, r):
        """Another VMID read the page while it was clean: its own write needs no update of L1's any more."""
        where = clean_page(r)
        r.load(2)
        assert r.fault(IPA).perm == RX
        r.load(1)
        r.fault(IPA, WRITE)
        word = r.mem.read64(where)
        r.load(2)
        assert r.vcpu.translate(IPA, WRITE).kind == s2shadow.MISS
        assert r.fault(IPA, WRITE).perm == RWX
        assert r.mem.read64(where) == word


class TestL1Cleans:
    def test_next_write_sets_it_again(self, r):
        """L1 migrates L2: clear the bit, TLBI, and the next write sets it; reads in between do not."""
        where = clean_page(r)
        clean = r.tables.get(where)
        for _ in range(3):
            assert r.fault(IPA, WRITE).kind == MAPPED
            assert r.tables.get(where) == clean | DIRTY
            r.tables.set(where, clean)
            removed = r.vcpu.tlbi("IPAS2E1IS", IPA >> 12).removed
            assert removed == 1
            assert r.fault(IPA).perm == RX
            assert r.tables.get(where) == clean

    def test_without_tlbi(self, r):
        """Until L1 invalidates, the shadow may go on as a TLB would: the write hits, the bit stays clear."""
        where = clean_page(r)
        clean = r.tables.get(where)
        r.fault(IPA, WRITE)
        r.tables.set(where, clean)
        assert r.fault(IPA, WRITE).kind == HIT
        assert r.tables.get(where) == clean


class TestDirtyLog:
    def test_page_of_the_table_is_marked(self, r):
        """L0 wrote L1's memory: migration of L1 must see the table's page as well as the data's."""
        where = clean_page(r)
        r.vm.log_dirty(RAM, RAM + 64 * M)
        r.fault(IPA, WRITE)
        assert dirty_pages(r) == {where & -PAGE, DATA}

    def test_marked_once(self, r):
        """After the log is read, the next write marks the data again; L1's descriptor is dirty already."""
        clean_page(r)
        r.vm.log_dirty(RAM, RAM + 64 * M)
        r.fault(IPA, WRITE)
        dirty_pages(r)
        assert r.fault(IPA, WRITE).kind == MAPPED
        assert dirty_pages(r) == {DATA}

    def test_reads_mark_nothing(self, r):
        clean_page(r)
        r.vm.log_dirty(RAM, RAM + 64 * M)
        r.fault(IPA)
        assert dirty_pages(r) == set()

    def test_table_outside_the_range(self, r):
        clean_page(r)
        r.vm.log_dirty(DATA, DATA + 2 * M)
        r.fault(IPA, WRITE)
        assert dirty_pages(r, DATA, DATA + 2 * M) == {DATA}

    def test_batch(self, r):
        """Two leaf tables, their pages and nothing between."""
        places = [clean_page(r, ipa, DATA + n * PAGE) for n, ipa in enumerate((IPA, IPA + PAGE, IPA + 4 * M))]
        r.vm.log_dirty(RAM, DATA)
        r.vcpu.fault_many([IPA, IPA + PAGE, IPA + 4 * M], WRITE)
        assert dirty_pages(r, RAM, DATA) == {where & -PAGE for where in places}


def answers(r, access, kind, fsc=0, ipa=IPA):
    """The fault is answered so, and L1's memory is untouched."""
    before = memory_of(r)
    f = r.fault(ipa, access)
    assert (f.kind, f.fsc) == (kind, fsc)
    assert memory_of(r) == before
    assert len(r.shadow()) == 0


class TestNoUpdate:
    """Faults that must leave L1's descriptor as it is, AF included."""

    def test_not_writable(self, r):
        r.tables.map(IPA, DATA, perm="rx", af=0)
        answers(r, WRITE, L1_FAULT, 0x0F)

    @pytest.mark.parametrize("access", [WRITE | EXEC, WRITE | EXEC | EL0, WRITE | READ | EXEC])
    def test_not_executable(self, r, access):
        """A write that also fetches: all must be allowed before anything is marked."""
        clean_page(r, perm="rw", af=0)
        answers(r, access, L1_FAULT, 0x0F)

    def test_not_readable(self, r):
        clean_page(r, perm="w", af=0)
        answers(r, WRITE | READ, L1_FAULT, 0x0F)

    def test_walk_of_device_memory(self, r):
        """HCR.PTW: stage-1 tables must not lie in what L1 maps as Device."""
        clean_page(r, memattr=1, af=0)
        r.load(hcr=HCR_VM | HCR_PTW)
        answers(r, WRITE | PTW, L1_FAULT, 0x0F)
        assert r.fault(IPA, WRITE).kind == MAPPED

    def test_invalid(self, r):
        where = clean_page(r)
        r.tables.set(where, r.tables.get(where) & ~1)
        answers(r, WRITE, L1_FAULT, 0x07)

    def test_reserved_type(self, r):
        where = clean_page(r)
        r.tables.set(where, r.tables.get(where) & ~2)
        answers(r, WRITE, L1_FAULT, 0x07)

    def test_address_size(self, r):
        """An output beyond PS."""
        r.tables.vtcr &= ~(7 << 16)
        r.load()
        clean_page(r, cipa=1 << 33, af=0)
        answers(r, WRITE, L1_FAULT, 0x03)

    def test_beyond_the_input(self, r):
        clean_page(r)
        answers(r, WRITE, L1_FAULT, 0x04, ipa=1 << r.tables.ia_bits | IPA)

    def test_no_access_flag(self, r):
        """HA=0: HD counts as 0 too, the access flag fault comes first."""
        r.tables.vtcr &= ~HA
        r.load()
        clean_page(r, af=0)
        answers(r, WRITE, L1_FAULT, 0x0B)

    def test_hd_needs_ha(self, r):
        r.tables.vtcr &= ~HA
        r.load()
        clean_page(r)
        answers(r, WRITE, L1_FAULT, 0x0F)

    def test_hd_off(self, r):
        r.tables.vtcr &= ~HD
        r.load()
        clean_page(r, af=0)
        answers(r, WRITE, L1_FAULT, 0x0F)

    def test_read_of_a_clean_page(self, r):
        where = clean_page(r)
        before = memory_of(r)
        for access in (READ, EXEC, READ | EXEC | EL0, READ | PTW):
            assert r.fault(IPA, access).kind in (MAPPED, HIT)
        assert memory_of(r) == before and not r.tables.get(where) & DIRTY


@pytest.mark.parametrize("hafdbs", [0, 1])
def test_without_the_feature(hafdbs):
    """VTCR.HD is RES0 where the machine has no dirty state."""
    r = Rig(features=s2shadow.Features(hafdbs=hafdbs), vtcr=HA | HD)
    clean_page(r)
    answers(r, WRITE, L1_FAULT, 0x0F)


def test_direct_needs_dbm():
    r = Rig(**DIRECT)
    where = r.tables.map(IPA, DATA, perm="rx")
    answers(r, WRITE, L1_FAULT, 0x0F)
    r.tables.set(where, r.tables.get(where) | DBM)
    assert r.fault(IPA, WRITE).kind == MAPPED


class TestIndirect:
    """With FEAT_S2PIE bit 51 is part of the index: base permission and Dirty decide."""

    def test_index_without_bit_51(self):
        """RW+puX by an index whose bit 51 is clear is writable-clean as well."""
        r = Rig(**INDIRECT)
        where = r.tables.map(IPA, DATA, clean=True)
        index_1_only = r.tables.get(where) & ~(3 << 53 | DBM | DIRTY) | 1 << 6
        r.tables.set(where, index_1_only)
        r.load(s2pir=0xF0)
        assert r.fault(IPA).perm == RX
        assert r.fault(IPA, WRITE).perm == RWX
        assert r.tables.get(where) == index_1_only | DIRTY

    def test_dirty_alone_gives_nothing(self):
        """Read-only by its base permission, however dirty."""
        r = Rig(**INDIRECT)
        where = r.tables.map(IPA, DATA, perm="rx", clean=False)
        assert r.tables.get(where) & DIRTY
        answers(r, WRITE, L1_FAULT, 0x0F)
        assert r.fault(IPA).perm == RX

    @pytest.mark.parametrize("code", [2, 3, 6, 7])
    def test_only_the_mmu_writes(self, code):
        """A stage-1 walk's write marks the page dirty and is left to the embedder; nobody else may write."""
        r = Rig(**INDIRECT)
        where = r.tables.map(IPA, DATA, perm=MRO, clean=True)
        r.load(s2pir=code << 8)  # the index of MRO is 2
        answers(r, WRITE, L1_FAULT, 0x0F)
        answers(r, EXEC, L1_FAULT, 0x0F)
        f = r.fault(IPA, WRITE | PTW)
        assert (f.kind, f.fsc, f.cipa) == (MMIO, 0x10, DATA)
        assert r.tables.get(where) & DIRTY
        assert r.fault(IPA, READ | PTW).perm == READ
        assert r.fault(IPA, WRITE).kind == L1_FAULT

    @pytest.mark.parametrize("code", [0, 1, 5])
    def test_no_access(self, code):
        r = Rig(**INDIRECT)
        r.tables.map(IPA, DATA, perm=MRO)
        r.load(s2pir=code << 8)
        for access in (READ, WRITE, EXEC, READ | PTW, WRITE | PTW):
            answers(r, access, L1_FAULT, 0x0F)

    def test_s2pir_is_part_of_the_context(self):
        """The same tables under another S2PIR_EL2 are another shadow; without S2PIE it does not matter."""
        r = Rig(**INDIRECT)
        r.tables.map(IPA, DATA)
        first = r.load().index
        assert r.fault(IPA, WRITE).kind == MAPPED
        second = r.load(s2pir=0x8888_8888_8888_8888).index
        assert second != first
        assert r.fault(IPA, WRITE).fsc == 0x0F
        r.tables.vtcr &= ~S2PIE
        assert r.load().index == r.load(s2pir=0).index


class TestReadOnlyTables:
    """L1's tables where nothing may be written: an external abort on the walk, at the level of the descriptor."""

    def rig(self, big_endian, level=3, af=1):
        r = Rig(big_endian=big_endian, **DIRECT)
        leaf = r.tables.leaf(DATA, level, af=af, clean=True)
        self.word = r.tables.swap(leaf).to_bytes(8, "little")
        r.rom[8:16] = self.word
        r.tables.set(r.tables.slot(0, level - 1), ROM | 3)
        self.ipa = r.tables.size(level)
        return r

    @pytest.mark.parametrize("level", [2, 3])
    def test_write(self, big_endian, level):
        r = self.rig(big_endian, level)
        answers(r, WRITE, L1_FAULT, 0x14 + level, ipa=self.ipa)
        assert r.rom[8:16] == self.word

    def test_access_flag(self, big_endian):
        r = self.rig(big_endian, af=0)
        answers(r, READ, L1_FAULT, 0x17, ipa=self.ipa)
        assert r.rom[8:16] == self.word

    def test_read_needs_no_update(self, big_endian):
        r = self.rig(big_endian)
        r.vm.log_dirty(RAM, RAM + 64 * M)
        assert r.fault(self.ipa).perm == RX
        assert dirty_pages(r) == set()
        assert r.fault(self.ipa, WRITE).fsc == 0x17


class TestHost:
    """What the host allows does not change what L1's descriptor has to say, and the other way round."""

    def test_host_refuses(self, r):
        """L1 allowed the write: its descriptor may say dirty; the leaf must not be writable."""
        clean_page(r)
        r.vm.host.protect(DATA, DATA + PAGE, "rx")
        assert r.fault(IPA, WRITE).kind == HOST_FAULT
        assert r.fault(IPA).perm == RX
        r.vm.host.protect(DATA, DATA + PAGE, "rwx")
        assert r.fault(IPA, WRITE).perm == RWX

    def test_refused_by_l1_before_the_host_is_asked(self, r):
        """A host fault is only for what L1 allows."""
        r.tables.map(IPA, DATA, perm="rx", af=0)
        r.vm.unmap(DATA, DATA + PAGE)
        asked = []
        r.vm.host.populate = lambda cipa, access: asked.append(cipa)
        answers(r, WRITE, L1_FAULT, 0x0F)
        assert asked == []

    def test_logging_withholds_w(self, r):
        """L1 marked the page dirty long ago; W still comes with the next write only."""
        r.tables.map(IPA, DATA)
        r.vm.log_dirty(RAM, RAM + 64 * M)
        assert r.fault(IPA).perm == RX
        assert r.fault(IPA, WRITE).perm == RWX
        assert dirty_pages(r) == {DATA}


class TestEditedMeanwhile:
    """L1 edits the descriptor between the engine's look at it and what follows."""

    def populated(self, r, edit):
        """A write whose host page is missing; L1 edits while the embedder is asked."""
        r.vm.unmap(RAM, RAM + 64 * M)
        todo = [edit]

        def populate(cipa, access):
            if todo:
                todo.pop()()
            return HostMapping(HOST + (cipa & -PAGE), PAGE)

        r.vm.host.populate = populate
        return r.fault(IPA, WRITE)

    def test_cleaned(self, r):
        """The fault starts over: the bit is set again before the leaf is writable."""
        where = clean_page(r)
        clean = r.tables.get(where)
        f = self.populated(r, lambda: r.tables.set(where, clean))
        assert (f.kind, f.perm) == (MAPPED, RWX)
        assert r.tables.get(where) == clean | DIRTY

    def test_moved(self, r):
        """To another page: that one is mapped, and its descriptor marked."""
        where = clean_page(r)
        moved = r.tables.leaf(DATA + PAGE, 3, clean=True)
        f = self.populated(r, lambda: r.tables.set(where, moved))
        assert (f.kind, f.cipa) == (MAPPED, DATA + PAGE)
        assert r.tables.get(where) == moved | DIRTY
        r.vm.check()

    def test_made_read_only(self, r):
        where = clean_page(r)
        fixed = r.tables.leaf(DATA, 3, "rx")
        f = self.populated(r, lambda: r.tables.set(where, fixed))
        assert (f.kind, f.fsc) == (L1_FAULT, 0x0F)
        assert r.tables.get(where) == fixed
        assert len(r.shadow()) == 0

    def test_swaps_against_stores(self, big_endian):
        """Another thread keeps rewriting leaves: what it wrote last is there, plus AF and dirty at most. A swap that
        did not look at what it replaces would bring an old value back."""
        r = Rig(big_endian=big_endian, **DIRECT)
        ipas = [16 * M + n * PAGE for n in range(64)]
        places = [clean_page(r, ipa, af=0) for ipa in ipas]
        values = [r.tables.leaf(DATA + n % 2 * PAGE, 3, clean=True, af=0) | n << 55 for n in range(256)]
        done, lost = threading.Event(), []

        def l1():
            n = 0
            while not done.is_set():
                where, value = places[n % 64], values[n // 64 % 256]
                r.tables.set(where, value)
                now = [r.tables.get(where) for _ in range(3)]
                lost.extend((hex(value), hex(word)) for word in now if word & ~(AF | DIRTY) != value)
                n += 1

        writer = threading.Thread(target=l1)
        writer.start()
        removed = 0
        for _ in range(150):
            got = r.vcpu.fault_many(ipas, WRITE)
            assert set(got["kind"].tolist()) == {MAPPED}
            assert set(got["cipa"].tolist()) <= {DATA, DATA + PAGE}
            removed += r.vcpu.tlbi("ALLE1IS").removed
        done.set()
        writer.join()
        assert not lost, lost[:3]
        assert removed == 150 * 64
        r.vm.check()

    def test_a_read_and_a_write_at_once(self, big_endian):
        """Two vCPUs fault the same pages, one sets AF and the other AF and dirty: neither undoes the other's update."""
        pages, rounds = 8192, 30
        r = Rig(vcpus=2, big_endian=big_endian, **DIRECT)
        places = [clean_page(r, 16 * M + n * PAGE, DATA + n % 512 * PAGE, af=0) for n in range(pages)]
        assert places == list(range(places[0], places[0] + 8 * pages, 8))
        fresh = r.mem.read(places[0], 8 * pages)
        for n in (0, 1):
            r.load(1 + n, n=n)
        ipas = np.arange(16 * M, 16 * M + pages * PAGE, PAGE, dtype=np.uint64)
        kinds = [set(), set()]
        start, stop = threading.Barrier(2, timeout=60), threading.Barrier(2, timeout=60)

        def faults(n, access):
            for _ in range(rounds):
                start.wait()
                kinds[n] |= set(r.vm.vcpus[n].fault_many(ipas, access)["kind"].tolist())
                stop.wait()

        reader = threading.Thread(target=faults, args=(0, READ))
        reader.start()
        undone = 0
        for _ in range(rounds):
            start.wait()
            kinds[1] |= set(r.vm.vcpus[1].fault_many(ipas, WRITE)["kind"].tolist())
            stop.wait()
            words = np.frombuffer(r.mem.read(places[0], 8 * pages), ">u8" if big_endian else "<u8")
            undone += int((words & np.uint64(AF | DIRTY) != AF | DIRTY).sum())
            r.mem.write(places[0], fresh)
            r.vm.vcpus[1].tlbi("ALLE1IS")
        reader.join()
        assert undone == 0
        assert kinds == [{MAPPED}, {MAPPED}]
        r.vm.check()
