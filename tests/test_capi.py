"""The C API: in lockstep with the Python one, and what only it has: its own memory, callbacks, statuses."""

import ctypes
import random

import numpy as np
import pytest

import s2shadow as s2
from beside import beside
from capitable import (
    BUSY,
    CALLBACK,
    CAS_DONE,
    CAS_LOST,
    CAS_REFUSED,
    CVM,
    INVALID,
    NOT_LOADED,
    READONLY,
    REFUSED_MEMORY,
    STATE,
    UNDEFINED,
    Failed,
    Features,
    Options,
    Populate,
    Registers,
    Stats,
    aligned,
    api,
    native,
)
from capitable import call as check
from seed import SEED

PAGE, SIZE = 4096, 1 << 22
ROOT, LEVEL_2, LEVEL_3 = 0x1000, 0x2000, 0x3000
DATA = 0x100000
PAGES = 64
LEAF = 0x7FF                # valid page, MemAttr 1111, S2AP rw, inner shareable, AF
AF, DBM = 1 << 10, 1 << 51
VTCR = 25 | 1 << 6 | 5 << 16 | 1 << 19      # 4 KiB granule, 39 bits of IPA, tables from level 1 on, 48 bits of output
VTCR_HA, VTCR_HD = 1 << 21, 1 << 22
VTTBR = ROOT | 5 << 48
VMALLS12E1IS, IPAS2E1IS, ALLE1IS, VAE1IS = 0xD50C83DF, 0xD50C803F, 0xD50C839F, 0xD508833F


def frame(page):
    return DATA + page * 37 % PAGES * PAGE


def tables(words, flags=0):
    """L1's tables in ``words``, which stand at cIPA 0: PAGES pages from IPA 0 on."""
    words[ROOT // 8] = LEVEL_2 | 3
    words[LEVEL_2 // 8] = LEVEL_3 | 3
    for page in range(PAGES):
        words[LEVEL_3 // 8 + page] = frame(page) | (LEAF ^ flags)
    return words


@pytest.fixture
def vm():
    """A VM of C's over a page table, linear, loaded; ``vm.words`` is its memory."""
    with CVM(vcpus=2) as made:
        made.words = tables(aligned(SIZE))
        made.add_ram(0, made.words)
        made.populate_linear(1 << 30)
        made.load(VTTBR, VTCR)
        yield made


def refused(status, text, function, *arguments):
    with pytest.raises(Failed, match=text) as caught:
        function(*arguments)
    assert caught.value.status == status


# --- in lockstep with Python -------------------------------------------------------------------------------------


class Lockstep:
    """The same events for a NestedVM, for a VM of C's over RAM, and for one whose tables are behind callbacks; each has
    memory of its own."""

    FEATURES = {"hafdbs": 2}

    def __init__(self, rng, big_endian):
        self.rng = rng
        self.big_endian = big_endian
        self.order = ">u8" if big_endian else "<u8"
        self.memories = [aligned(SIZE) for _ in range(3)]
        for words in self.memories:
            tables(words.view(self.order))
        self.mem = s2.GuestMemory()
        self.mem.add(0, buffer=self.memories[0][: DATA // 8])       # blocks are cut at the bounds of regions
        self.mem.add(DATA, buffer=self.memories[0][DATA // 8 :])
        self.mem.add(SIZE, PAGE, device=True)
        self.python = s2.NestedVM(self.mem, features=s2.Features(**self.FEATURES))
        self.python.host.populate = s2.Linear(1 << 30)
        self.ram, self.asked = CVM(self.FEATURES), CVM(self.FEATURES)
        self.ram.add_ram(0, self.memories[1][: DATA // 8])
        self.ram.add_ram(DATA, self.memories[1][DATA // 8 :])
        words = self.memories[2]
        self.asked.add_callbacks(0, DATA, lambda cipa: int(words[cipa // 8]), self.swap)
        self.asked.add_ram(DATA, words[DATA // 8 :])
        for vm in (self.ram, self.asked):
            check(api.add_device(vm.handle, SIZE, PAGE))
            vm.populate_linear(1 << 30)

    def swap(self, cipa, expected, desired):
        seen = int(self.memories[2][cipa // 8])
        if seen != expected:
            return CAS_LOST, seen
        self.memories[2][cipa // 8] = desired
        return CAS_DONE, expected

    def close(self):
        for vm in (self.ram, self.asked):
            vm.check()
            vm.__exit__()
        self.python.check()

    def same(self, python, *others):
        for other in others:
            np.testing.assert_array_equal(python, other)

    def load(self):
        vtcr = VTCR | self.rng.choice((0, VTCR_HA, VTCR_HA | VTCR_HD))
        vttbr = ROOT | self.rng.choice((5, 6, 7)) << 48
        self.config = s2.Stage2Config(vttbr, vtcr, self.python.features, big_endian=self.big_endian)
        context = self.python.vcpus[0].load(vttbr, vtcr, big_endian=self.big_endian)
        for vm in (self.ram, self.asked):
            assert vm.load(vttbr, vtcr, big_endian=self.big_endian) == context.index

    def fault(self):
        n = self.rng.randrange(1, 40)
        ipas = np.array([self.rng.randrange((PAGES + 2) * PAGE) for _ in range(n)], dtype=np.uint64)
        access = np.array([self.rng.choice((1, 2, 3, 4, 12, 17)) for _ in range(n)], dtype=np.uint8)
        rows = self.python.vcpus[0].fault_many(ipas, access)
        for vm in (self.ram, self.asked):
            status, answered = vm.fault_many(ipas, access)
            assert status == 0
            self.same(rows, answered)

    def fault_one(self):
        ipa, access = self.rng.randrange(PAGES * PAGE), self.rng.choice((1, 2))
        seen = self.python.vcpus[0].fault(ipa, access)
        after = self.python.vcpus[0].translate(ipa, access)
        for vm in (self.ram, self.asked):
            for answered, python in ((vm.fault(ipa, access), seen), (vm.translate(ipa, access), after)):
                for field in s2.FAULT_DTYPE.names:
                    assert getattr(answered, field) == getattr(python, field), field

    def walk(self):
        # nothing is written: ``s2shadow.walk`` has no engine whose dirty log would know
        ipa, access, update = self.rng.randrange(PAGES * PAGE), self.rng.choice((1, 2)), False
        seen = s2.walk(self.mem, self.config, ipa, access, update)
        for vm in (self.ram, self.asked):
            walked = vm.walk(ipa, access, update)
            for field in s2.WALK_DTYPE.names:
                assert getattr(walked, field) == getattr(seen, field), field

    def l1_writes(self):
        page = self.rng.randrange(PAGES)
        new = self.rng.choice((0, frame(self.rng.randrange(PAGES)) | LEAF, frame(page) | LEAF ^ AF,
                               frame(page) | LEAF ^ AF ^ 0x80 | DBM, SIZE | LEAF, 1 << 40 | LEAF))
        for words in self.memories:
            words.view(self.order)[LEVEL_3 // 8 + page] = new

    def tlbi(self):
        word, operand = self.rng.choice(((VMALLS12E1IS, 0), (ALLE1IS, 0), (VAE1IS, self.rng.randrange(PAGES)),
                                         (IPAS2E1IS, self.rng.randrange(PAGES))))
        result = self.python.vcpus[0].tlbi(word, operand)
        for vm in (self.ram, self.asked):
            assert vm.tlbi(word, operand) == (result.removed, result.required, result.contexts)

    def span(self):
        first = self.rng.randrange(PAGES)
        return DATA + first * PAGE, DATA + self.rng.randrange(first, PAGES + 1) * PAGE

    def unmap(self):
        start, end = self.span()
        done = tuple(self.python.unmap(start, end))
        for vm in (self.ram, self.asked):
            assert vm.change(api.host_unmap, start, end, 0) == done

    def protect(self):
        start, end = self.span()
        perm = self.rng.choice(("rwx", "rx", "r", "rw"))
        code = {"rwx": 39, "rx": 37, "r": 1, "rw": 3}[perm]
        done = tuple(self.python.host.protect(start, end, perm))
        for vm in (self.ram, self.asked):
            assert vm.change(api.host_protect, start, end, code) == done

    def host_map(self):
        start, end = self.span()
        if start == end:
            return
        done = tuple(self.python.host.map(start, start + (3 << 30), end - start, "rwx", "nc"))
        for vm in (self.ram, self.asked):
            assert vm.change(api.host_map, start, start + (3 << 30), end - start, 39, 5) == done

    def log(self):
        start, end = self.span()
        on = self.rng.random() < 0.7
        done = tuple(self.python.log_dirty(start, end, on))
        for vm in (self.ram, self.asked):
            assert vm.change(api.log_dirty, start, end, on) == done

    def log_tables(self):
        """L0 writes access flags into L1's tables: pages of them are dirty too."""
        done = tuple(self.python.log_dirty(0, DATA))
        for vm in (self.ram, self.asked):
            assert vm.change(api.log_dirty, 0, DATA, 1) == done

    def dirty_log(self):
        bits = self.python.dirty_log(0, SIZE)
        self.same(bits, *(vm.bitmap(api.dirty_log, 0, SIZE) for vm in (self.ram, self.asked)))

    def age(self):
        start, end = self.span()
        self.same(self.python.test_young(start, end),
                  *(vm.bitmap(api.test_young, start, end) for vm in (self.ram, self.asked)))
        self.same(self.python.age(start, end), *(vm.bitmap(api.age, start, end) for vm in (self.ram, self.asked)))

    def take_tlbis(self):
        self.same(self.python.take_tlbis(), *(vm.take_tlbis() for vm in (self.ram, self.asked)))

    def stats(self):
        seen = self.python.stats
        for vm in (self.ram, self.asked):
            for name, value in vm.stats().items():
                assert name == "owed_tlbis" or value == getattr(seen, name), name

    def run(self, steps):
        self.load()
        events = [self.fault] * 6 + [self.l1_writes] * 3 + [self.tlbi] * 2 + [
            self.fault_one, self.load, self.unmap, self.protect, self.host_map, self.log, self.log_tables,
            self.dirty_log, self.age, self.take_tlbis, self.stats, self.walk]
        for _ in range(steps):
            self.rng.choice(events)()
            self.same(*self.memories)
        self.python.check()


@pytest.mark.parametrize("big_endian", [False, True], ids=["little", "big"])
@pytest.mark.parametrize("run", range(4))
def test_lockstep_with_python(run, big_endian):
    pair = Lockstep(random.Random(SEED + run), big_endian)
    pair.run(150)
    pair.close()


@pytest.mark.parametrize("flags", [0, AF], ids=["AF set", "AF clear"])
def test_walks_are_those_of_python(flags):
    mem, words, asked = s2.GuestMemory(), aligned(SIZE), aligned(SIZE)
    for target in (words, asked):
        tables(target, flags)
        target[LEVEL_3 // 8 + 3] = 0
        target[LEVEL_3 // 8 + 4] = frame(4) | LEAF ^ 0x80
    mem.add(0, buffer=words)
    config = s2.Stage2Config(VTTBR, VTCR | VTCR_HA)

    def swap(cipa, expected, desired):
        assert asked[cipa // 8] == expected
        asked[cipa // 8] = desired
        return CAS_DONE, expected

    with CVM() as vm:
        vm.add_callbacks(0, SIZE, lambda cipa: int(asked[cipa // 8]), swap)
        vm.load(VTTBR, VTCR | VTCR_HA)
        for ipa, access, update in [(page * PAGE + 8, access, update) for page in range(8) for access in (1, 2)
                                    for update in (False, True)] + [(1 << 39, 1, True)]:
            walked, seen = vm.walk(ipa, access, update), s2.walk(mem, config, ipa, access, update)
            for field in s2.WALK_DTYPE.names:
                assert getattr(walked, field) == getattr(seen, field), (field, hex(ipa))
            np.testing.assert_array_equal(words, asked)


# --- memory ------------------------------------------------------------------------------------------------------


def test_regions_are_checked_and_nothing_changes(vm):
    words = aligned(PAGE)
    for arguments, text in [
        ((0x800, PAGE, words.ctypes.data, 0), "multiples of 4096"),
        ((SIZE, 0, words.ctypes.data, 0), "size positive"),
        ((SIZE, 100, words.ctypes.data, 0), "multiples of 4096"),
        ((0, PAGE, words.ctypes.data, 0), "overlaps that at 0"),
        (((1 << 52) - PAGE, 2 * PAGE, words.ctypes.data, 0), "beyond 52 bits"),
        ((SIZE, (1 << 64) - PAGE, words.ctypes.data, 0), "beyond 52 bits"),
        ((SIZE, PAGE, None, 0), "not NULL"),
        ((SIZE, PAGE, words.ctypes.data + 4, 0), "aligned"),
        ((SIZE, PAGE, words.ctypes.data, 2), "flags"),
    ]:
        refused(INVALID, text, lambda a=arguments: check(api.add_ram(vm.handle, *a)))
    refused(INVALID, "no region starts", vm.remove, PAGE)
    assert vm.fault(0).kind == s2.MAPPED


def test_kinds_of_regions(vm):
    check(api.add_device(vm.handle, SIZE, PAGE))
    readonly = aligned(PAGE)
    vm.add_ram(SIZE + PAGE, readonly, READONLY)
    vm.words[LEVEL_3 // 8 : LEVEL_3 // 8 + 3] = [SIZE | LEAF, SIZE + PAGE | LEAF, SIZE + 2 * PAGE | LEAF]
    assert vm.fault(0).kind == s2.MMIO
    assert vm.fault(PAGE).kind == s2.MAPPED and vm.fault(PAGE, s2.WRITE).kind == s2.MMIO
    assert vm.fault(2 * PAGE).kind == s2.MMIO


def test_a_region_that_is_removed_leaves_nothing(vm):
    extra = aligned(1 << 20)
    vm.add_ram(SIZE, extra)
    vm.words[LEVEL_3 // 8] = SIZE | LEAF
    assert vm.fault(0).kind == s2.MAPPED and vm.fault(PAGE).kind == s2.MAPPED
    vm.take_tlbis()
    leaves, ticket = vm.remove(SIZE)
    assert leaves == 1
    rows = vm.take_tlbis()
    assert len(rows) and (rows["seq"] <= ticket).all()
    assert vm.translate(0).kind == s2.MISS and vm.translate(PAGE).kind == s2.HIT
    assert vm.fault(0).kind == s2.MMIO
    vm.add_ram(SIZE, aligned(1 << 20))
    assert vm.fault(0).kind == s2.MAPPED
    vm.remove(0)                        # and the tables
    assert vm.fault(2 * PAGE).kind == s2.L1_FAULT
    assert vm.fault(2 * PAGE).fsc == 0x15
    vm.check()


def test_regions_come_and_go_beside_faults(vm):
    """The vCPUs' lists are replaced under them, and no walk reads what is not there any more."""
    ipas = np.tile(np.arange(PAGES, dtype=np.uint64) * PAGE, 500)      # long without the GIL

    def fault(vcpu):
        status, rows = vm.fault_many(ipas, vcpu=vcpu)
        assert status == 0 and set(rows["kind"]) <= {s2.HIT, s2.MAPPED, s2.MMIO, s2.RETRY}

    vm.load(VTTBR, VTCR, vcpu=1)
    vm.words[LEVEL_3 // 8 : LEVEL_3 // 8 + 8] = np.arange(8, dtype=np.uint64) * PAGE + SIZE | LEAF
    with beside(lambda: fault(0), lambda: fault(1)):
        for _ in range(100):
            vm.add_ram(SIZE, aligned(8 * PAGE))
            vm.remove(SIZE)
            vm.kept.pop()                   # its memory goes
    vm.check()


# --- descriptors behind callbacks --------------------------------------------------------------------------------


class Asked:
    """A VM whose tables are behind callbacks that a test may bend."""

    def __init__(self, **options):
        self.words = tables(aligned(SIZE))
        self.reads, self.swaps = [], []
        self.on_read = self.on_swap = None
        self.vm = CVM(**options)
        self.vm.add_callbacks(0, DATA, self.read, self.swap)
        self.vm.add_ram(DATA, self.words[DATA // 8 :])
        self.vm.populate_linear(1 << 30)
        self.vm.load(VTTBR, VTCR)

    def read(self, cipa):
        self.reads.append(cipa)
        value = int(self.words[cipa // 8])
        if self.on_read:
            value = self.on_read(cipa, value)
        return value

    def swap(self, cipa, expected, desired):
        self.swaps.append((cipa, expected, desired))
        if self.on_swap:
            return self.on_swap(cipa, expected, desired)
        self.words[cipa // 8] = desired
        return CAS_DONE, expected


@pytest.fixture
def asked():
    made = Asked(vcpus=2)
    with made.vm:
        yield made
        made.vm.check()


def test_each_descriptor_is_asked_for_once(asked):
    assert asked.vm.fault(5 * PAGE).pa == (1 << 30) + frame(5)
    assert asked.reads == [ROOT, LEVEL_2, LEVEL_3 + 40]
    asked.reads.clear()
    assert asked.vm.fault(5 * PAGE).kind == s2.HIT and not asked.reads


def test_an_answer_holds_for_one_fault(asked):
    """What L1 makes valid needs no TLBI to be seen, by the next element of a batch already."""
    asked.words[LEVEL_3 // 8 + 1] = 0
    filled = frame(1) | LEAF

    def on_read(cipa, value):
        asked.words[LEVEL_3 // 8 + 1] = filled      # after the answer was taken
        return value

    asked.on_read = on_read
    asked.words[LEVEL_3 // 8 + 1] = 0
    status, rows = asked.vm.fault_many([0, PAGE, PAGE])
    assert status == 0 and list(rows["kind"]) == [s2.MAPPED, s2.MAPPED, s2.HIT]


def test_no_leaf_walked_before_a_tlbi_is_installed_after_it(asked):
    """L1 moves the page and invalidates, just after the old descriptor was read and before the leaf is installed."""
    def on_read(cipa, value):
        if cipa == LEVEL_3 + 40 and asked.words[cipa // 8] == value == frame(5) | LEAF:
            asked.words[cipa // 8] = frame(6) | LEAF
            asked.vm.tlbi(IPAS2E1IS, 5)
        return value

    asked.on_read = on_read
    fault = asked.vm.fault(5 * PAGE)
    assert (fault.kind, fault.cipa) == (s2.MAPPED, frame(6))
    assert asked.reads.count(LEVEL_3 + 40) == 2 and asked.reads.count(ROOT) == 2


def test_overtaken_for_ever_is_a_retry(asked):
    def on_read(cipa, value):
        asked.vm.tlbi(VMALLS12E1IS)
        return value

    asked.on_read = on_read
    assert asked.vm.fault(0).kind == s2.RETRY
    assert asked.vm.stats()["retries"] == 1 and asked.vm.stats()["faults"] == 1
    asked.on_read = None
    assert asked.vm.fault(0).kind == s2.MAPPED


def test_what_cannot_be_read_is_an_external_abort(asked):
    for level, address in ((1, ROOT), (2, LEVEL_2), (3, LEVEL_3)):
        asked.on_read = lambda cipa, value, address=address: None if cipa == address else value
        fault = asked.vm.fault(0)
        assert (fault.kind, fault.fsc, fault.level) == (s2.L1_FAULT, 0x14 + level, level)
    assert asked.vm.stats()["l1_faults"] == 3 == asked.vm.stats()["faults"]


def test_access_flag_by_callback(asked):
    asked.words[LEVEL_3 // 8] ^= AF
    asked.vm.load(VTTBR | 1 << 49, VTCR | VTCR_HA)
    check(api.log_dirty(asked.vm.handle, 0, SIZE, 1, None))
    assert asked.vm.fault(0).kind == s2.MAPPED
    assert asked.swaps == [(LEVEL_3, frame(0) | LEAF ^ AF, frame(0) | LEAF)]
    assert asked.words[LEVEL_3 // 8] & AF
    assert np.unpackbits(asked.vm.bitmap(api.dirty_log, 0, SIZE), bitorder="little").nonzero()[0].tolist() == [3]


def test_a_lost_swap_goes_on_from_what_is_there(asked):
    asked.words[LEVEL_3 // 8] ^= AF
    asked.vm.load(VTTBR | 1 << 49, VTCR | VTCR_HA)

    def lose(cipa, expected, desired):
        asked.words[cipa // 8] = frame(9) | LEAF
        return CAS_LOST, frame(9) | LEAF

    asked.on_swap = lose
    fault = asked.vm.fault(0)
    assert (fault.kind, fault.cipa) == (s2.MAPPED, frame(9)) and len(asked.swaps) == 1


@pytest.mark.parametrize("answer", [CAS_REFUSED, 77])
def test_a_refused_swap_is_an_external_abort(asked, answer):
    asked.words[LEVEL_3 // 8] ^= AF
    asked.vm.load(VTTBR | 1 << 49, VTCR | VTCR_HA)
    asked.on_swap = lambda cipa, expected, desired: (answer, expected)
    fault = asked.vm.fault(0)
    assert (fault.kind, fault.fsc) == (s2.L1_FAULT, 0x17) and len(asked.swaps) == 1


@pytest.mark.parametrize("flags, cas", [(READONLY, True), (0, False)], ids=["read-only", "no function"])
def test_where_no_swap_can_be_made(flags, cas):
    words = tables(aligned(SIZE), AF)
    with CVM() as vm:
        vm.add_callbacks(0, SIZE, lambda cipa: int(words[cipa // 8]), (lambda *_: 1 / 0) if cas else None, flags)
        vm.populate_linear()
        vm.load(VTTBR, VTCR | VTCR_HA)
        assert vm.fault(0).fsc == 0x17


def test_a_callback_may_call_the_engine(asked):
    """All but the vCPU that asks."""
    asked.vm.load(VTTBR, VTCR, vcpu=1)
    seen = []

    def on_read(cipa, value):
        asked.on_read = None
        refused(BUSY, "in use", asked.vm.fault, 0)
        refused(BUSY, "in use", asked.vm.load, VTTBR, VTCR)
        seen.append(asked.vm.fault(3 * PAGE, vcpu=1).kind)
        seen.append(asked.vm.change(api.host_unmap, DATA, SIZE, 0)[0])
        asked.vm.check()
        return value

    asked.on_read = on_read
    assert asked.vm.fault(0).kind == s2.MAPPED
    assert seen == [s2.MAPPED, 1]


def test_a_callback_may_remove_its_region(asked):
    def on_read(cipa, value):
        asked.on_read = None
        asked.vm.remove(0)
        return value

    asked.on_read = on_read
    fault = asked.vm.fault(0)
    assert (fault.kind, fault.fsc) == (s2.L1_FAULT, 0x15)
    assert asked.vm.fault(0).kind == s2.L1_FAULT and len(asked.reads) == 1


def test_tables_partly_behind_callbacks(asked):
    """A table in RAM under one behind callbacks."""
    asked.words[LEVEL_2 // 8] = DATA + SIZE // 2 | 3
    table = (DATA + SIZE // 2) // 8
    asked.words[table : table + PAGES] = asked.words[LEVEL_3 // 8 : LEVEL_3 // 8 + PAGES]
    assert asked.vm.fault(5 * PAGE).cipa == frame(5)
    assert asked.reads == [ROOT, LEVEL_2]


# --- populate ----------------------------------------------------------------------------------------------------


def test_populate_by_callback(vm):
    calls = []

    def populate(cipa, access, mapping):
        calls.append((cipa, access, mapping.perm, mapping.memattr, mapping.block))
        mapping.pa, mapping.block, mapping.perm = 1 << 33, 1 << 21, s2.READ
        return 1

    vm.populate(populate)
    fault = vm.fault(8)
    assert (fault.kind, fault.pa, fault.perm) == (s2.MAPPED, (1 << 33) + frame(0) + 8, s2.READ)
    assert calls == [(frame(0) + 8, s2.READ, 39, 16, PAGE)]
    assert vm.fault(PAGE).pa == (1 << 33) + frame(1) and len(calls) == 1    # one block
    assert vm.fault(PAGE, s2.WRITE).kind == s2.HOST_FAULT


def test_populate_says_no_or_fails(vm):
    vm.populate(lambda cipa, access, mapping: 0 if cipa == frame(2) else -5 if cipa == frame(4) else 1)
    status, rows = vm.fault_many(np.arange(6, dtype=np.uint64) * PAGE)
    assert status == CALLBACK and "-5" in api.last_error().decode()
    assert list(rows["kind"]) == [s2.MAPPED, s2.MAPPED, s2.HOST_FAULT, s2.MAPPED]
    refused(CALLBACK, "-5", vm.fault, 4 * PAGE)
    assert vm.fault(5 * PAGE).kind == s2.MAPPED
    assert vm.stats()["host_faults"] == 1 and vm.stats()["faults"] == 5


@pytest.mark.parametrize("change, text", [
    ({"block": 3 * PAGE}, "block of 0x3000"),
    ({"block": 2048}, "block of 0x800"),
    ({"pa": 0x800}, "pa 0x800"),
    ({"pa": 1 << 48}, "pa 0x1000000000000"),
    ({"perm": 0x40}, "perm 0x40"),
    ({"memattr": 99}, "memattr 99"),
])
def test_a_mapping_that_cannot_be(vm, change, text):
    def populate(cipa, access, mapping):
        for name, value in change.items():
            setattr(mapping, name, value)
        return 1

    vm.populate(populate)
    refused(CALLBACK, text, vm.fault, 0)
    assert vm.stats()["host_leaves"] == 0


def test_a_mapping_resolved_before_a_change_is_not_installed_after_it(vm):
    places = iter((1 << 34, 1 << 35))

    def populate(cipa, access, mapping):
        mapping.pa = next(places) + cipa
        if mapping.pa < 1 << 35:
            vm.change(api.host_unmap, cipa, cipa + PAGE, 0)     # the host takes the page back meanwhile
        return 1

    vm.populate(populate)
    assert vm.fault(0).pa == (1 << 35) + frame(0)


def test_populate_policies(vm):
    check(api.set_populate(vm.handle, ctypes.byref(Populate())))
    assert vm.fault(0).kind == s2.HOST_FAULT
    vm.populate_linear(1 << 31, max_block=PAGE)
    assert vm.fault(0).pa == (1 << 31) + frame(0)
    assert vm.stats()["host_leaves"] == 1
    for fields, text in [({"policy": 3}, "policy 3"), ({"policy": 2}, "callback"),
                         ({"policy": 1, "offset": 100}, "offset 100"), ({"policy": 1, "max_block": 100}, "max_block")]:
        refused(INVALID, text, lambda f=fields: check(api.set_populate(vm.handle, ctypes.byref(Populate(**f)))))


# --- arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, text", [
    ({"vcpus": 0}, "vcpus must be 1 to"),
    ({"vcpus": 3, "contexts": 2}, "contexts must be 3"),
    ({"contexts": 70000}, "contexts must be"),
    ({"teardown": 4}, "teardown"),
    ({"max_table_bytes": 1000}, "max_table_bytes must be at least"),
    ({"table_base": 4096}, "table_base"),
    ({"features": {"pa_bits": 47}}, "pa_bits must be"),
    ({"features": {"pa_bits": 52}}, "needs lpa2"),
    ({"features": {"host_granule_bits": 13}}, "host_granule_bits"),
    ({"features": {"granules": 3, "host_granule_bits": 14}}, "granules"),
    ({"features": {"vmid_bits": 12}}, "vmid_bits"),
    ({"features": {"hafdbs": 3}}, "hafdbs"),
    ({"features": {"xnx": 2}}, "0 or 1"),
    ({"features": {"s2pie": 1, "xnx": 0}}, "s2pie needs xnx"),
])
def test_options_are_checked(options, text):
    refused(INVALID, text, lambda: CVM(**options))


def test_defaults_are_those_of_python(vm):
    features, options = Features(), Options()
    api.features_init(ctypes.byref(features), ctypes.sizeof(features))
    api.options_init(ctypes.byref(options), ctypes.sizeof(options))
    python = s2.Features()
    for name, *_ in Features._fields_[1:]:
        if name == "granules":
            assert features.granules == 0
        elif name == "host_granule_bits":
            assert 1 << features.host_granule_bits == python.host_granule
        else:
            assert getattr(features, name) == getattr(python, name), name
    assert (options.vcpus, options.contexts, options.track_tlbis) == (1, 0, 1)
    assert vm.load(ROOT, VTCR) != vm.load(ROOT | 9 << 48, VTCR)


def test_structs_may_grow():
    """A caller that knows more: what we do not know must be zero. One that knows less of what we write."""
    class Longer(Options):
        _fields_ = [("more", ctypes.c_uint64)]

    longer = Longer()
    api.options_init(ctypes.byref(longer), ctypes.sizeof(longer))
    assert longer.size == ctypes.sizeof(longer) and longer.more == 0
    handle = ctypes.c_void_p()
    check(api.create(ctypes.byref(longer), ctypes.byref(handle)))
    shorter = Stats()
    shorter.size, shorter.hits = 24, 77
    check(api.stats(handle, ctypes.byref(shorter)))
    assert (shorter.size, shorter.faults, shorter.hits) == (24, 0, 0) and ctypes.sizeof(Stats) > 24
    shorter.size, shorter.hits = 16, 77
    check(api.stats(handle, ctypes.byref(shorter)))
    assert shorter.hits == 77               # beyond what the caller has
    api.destroy(handle)
    longer.more = 1
    refused(INVALID, "does not know", lambda: check(api.create(ctypes.byref(longer), ctypes.byref(handle))))
    for size in (0, 4, 1 << 20):
        longer.size = size
        refused(INVALID, "set its size", lambda: check(api.create(ctypes.byref(longer), ctypes.byref(handle))))


def test_arguments_of_calls(vm):
    refused(INVALID, "no vCPU 2", vm.fault, 0, 1, 2)
    refused(INVALID, "access 0x20", vm.fault, 0, 32)
    refused(INVALID, "access 0x20", vm.translate, 0, 32)
    refused(INVALID, "access 0x40", vm.walk, 0, 64)
    refused(NOT_LOADED, "load\\(\\) it first", vm.fault, 0, 1, 1)
    refused(INVALID, "aligned to the host page", vm.change, api.host_unmap, 0, 100, 0)
    refused(INVALID, "no range", vm.change, api.host_unmap, 2 * PAGE, PAGE, 0)
    refused(INVALID, "no range", vm.change, api.host_unmap, 0, 1 << 49, 0)
    refused(INVALID, "partial 3", vm.change, api.host_unmap, 0, PAGE, 3)
    refused(INVALID, "perm 0x8", vm.change, api.host_protect, 0, PAGE, 8)
    refused(INVALID, "memattr 18", vm.change, api.host_map, 0, 0, PAGE, 39, 18)
    refused(INVALID, "is 0", vm.change, api.host_map, 0, 0, 0, 39, 16)
    refused(INVALID, "no range", vm.change, api.host_map, 0, (1 << 48) - PAGE, 2 * PAGE, 39, 16)
    refused(INVALID, "bitmap needs 2 bytes", lambda: check(api.age(vm.handle, 0, 9 * PAGE, bytes(1), 1)))
    refused(UNDEFINED, "no TLBI", vm.tlbi, 0xD503201F)
    registers = Registers()
    registers.size = 8
    refused(INVALID, "registers", lambda: vm.tlbi(VMALLS12E1IS, registers=registers))
    assert vm.fault_many([0, PAGE], [1, 33])[0] == INVALID
    assert vm.stats()["faults"] == 0
    assert api.fault_many(vm.handle, 0, None, None, 0, None, 0, None) == 0
    api.destroy(None)
    assert api.status_text(BUSY) != api.status_text(STATE) and api.status_text(-99) == b"unknown status"


def test_tlbi_under_other_registers(vm):
    assert vm.fault(0).kind == s2.MAPPED
    assert vm.tlbi(VMALLS12E1IS, registers=Registers(vttbr=9 << 48, vtcr=VTCR, hcr=1))[0] == 0
    assert vm.tlbi(VMALLS12E1IS, vcpu=1, registers=Registers(vttbr=5 << 48, vtcr=VTCR, hcr=1))[0] == 1


def test_no_room_is_a_row_in_faults_and_a_status_elsewhere():
    with CVM(max_table_bytes=1 << 20) as vm:
        vm.words = tables(aligned(SIZE))
        vm.add_ram(0, vm.words)
        vm.load(VTTBR, VTCR)
        refused(REFUSED_MEMORY, "no room for the tables", vm.change, api.host_map, 0, PAGE, (1 << 36) - PAGE, 39, 16)
        assert vm.stats()["host_leaves"] == 0
        vm.check()


# --- a NestedVM from C -------------------------------------------------------------------------------------------


@pytest.fixture
def nested():
    mem = s2.GuestMemory()
    words = tables(aligned(SIZE))
    mem.add(0, buffer=words)
    made = s2.NestedVM(mem)
    made.host.populate = "linear"
    made.vcpus[0].load(VTTBR, VTCR)
    return made


class Borrowed(CVM):
    def __init__(self, nested_vm):
        self.handle, self.kept = native(nested_vm), []


def test_both_faces_are_one_machine(nested):
    vm = Borrowed(nested)
    assert vm.fault(0).kind == s2.MAPPED and nested.vcpus[0].fault(0).kind == s2.HIT
    assert nested.unmap(DATA, SIZE).leaves == 1 and vm.translate(0).kind == s2.MISS
    assert vm.stats()["mapped"] == nested.stats.mapped == 1
    vm.check()
    vm.load(VTTBR | 1 << 49, VTCR)
    assert nested.contexts[1].refs == 1


def test_memory_and_populate_stay_pythons(nested):
    vm = Borrowed(nested)
    refused(STATE, "GuestMemory", vm.add_ram, SIZE, aligned(PAGE))
    refused(STATE, "GuestMemory", vm.remove, 0)
    refused(STATE, "vm.host.populate", vm.populate_linear)
    api.destroy(vm.handle)                  # nothing to destroy
    asked = []
    nested.host.populate = lambda cipa, access: asked.append(cipa)
    assert vm.fault(0).kind == s2.HOST_FAULT and not asked
    assert vm.stats()["host_faults"] == 1


def test_a_region_that_python_adds_is_seen(nested):
    vm = Borrowed(nested)
    nested.mem.write64(LEVEL_3, SIZE | LEAF)
    assert vm.fault(0).kind == s2.MMIO
    nested.mem.add(SIZE, PAGE)
    assert vm.fault(0).kind == s2.MAPPED
    assert vm.change(api.log_dirty, 0, 2 * SIZE, 1)[0] == 0
    assert vm.fault(0, s2.WRITE).kind == s2.MAPPED
    np.testing.assert_array_equal(vm.bitmap(api.dirty_log, 0, 2 * SIZE).nonzero()[0], [SIZE // PAGE // 8])


def test_a_vcpu_in_use_by_python_is_busy(nested):
    vm = Borrowed(nested)
    seen = []

    def populate(cipa, access):
        with pytest.raises(Failed, match="in use") as caught:
            vm.fault(0)
        seen.append(caught.value.status)
        return s2.HostMapping(cipa & ~(PAGE - 1), PAGE)

    nested.host.populate = populate
    assert nested.vcpus[0].fault(0).kind == s2.MAPPED
    assert seen == [BUSY]


def test_no_vm():
    """Every call that changes memory says so."""
    words = aligned(PAGE)
    refused(INVALID, "vm must not be NULL", lambda: check(api.add_ram(None, 0, PAGE, words.ctypes.data, 0)))
    refused(INVALID, "vm must not be NULL", lambda: check(api.add_device(None, 0, PAGE)))
    refused(INVALID, "vm must not be NULL", lambda: check(api.remove_region(None, 0, None)))
