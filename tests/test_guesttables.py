"""L1's tables as KVM's calls write them, against a plain list of leaves."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import s2shadow as s2
from s2shadow.guesttables import GuestRam, Stage2Writer

K, M, G = 1 << 10, 1 << 20, 1 << 30
ROOT = 0x8000_0000
R, W, X = 1, 2, 36
# (name, VTCR, features, bytes of a page, leaf sizes)
GEOMETRIES = {
    "4K-40-bit": (24 | 1 << 6 | 5 << 16, s2.Features(), [4 * K, 2 * M, G]),
    "4K-48-bit": (16 | 2 << 6 | 5 << 16, s2.Features(), [4 * K, 2 * M, G]),
    "4K-34-bit": (30 | 0 << 6 | 5 << 16, s2.Features(), [4 * K, 2 * M]),
    "4K-52-bit": (12 | 2 << 6 | 6 << 16 | 1 << 32, s2.Features(pa_bits=52, lpa=True, lpa2=True), [4 * K, 2 * M, G]),
    "16K-40-bit": (24 | 2 << 6 | 2 << 14 | 5 << 16, s2.Features(), [16 * K, 32 * M]),
    "64K-42-bit": (22 | 1 << 6 | 1 << 14 | 5 << 16, s2.Features(), [64 * K, 512 * M]),
}


def writer(name):
    vtcr, features, sizes = GEOMETRIES[name]
    cfg = s2.Stage2Config(1 << 48 | ROOT, vtcr | 1 << 31, features=features, hcr=s2.HCR_VM | s2.HCR_FWB)
    assert cfg.error is None, (name, cfg.error)
    return Stage2Writer(GuestRam(s2.GuestMemory(), min(cfg.oa_bits, 48)), cfg), sizes


class Leaves:
    """A dictionary of leaves, and what each call does to it, one leaf at a time."""

    def __init__(self, sizes):
        self.sizes = sizes
        self.leaves = {}            # IPA: (size, PA, permissions)

    def overlapping(self, start, end):
        return [ipa for ipa, (size, _, _) in self.leaves.items() if ipa < end and ipa + size > start]

    def map(self, ipa, size, pa, perm):
        end = ipa + size
        while ipa < end:
            leaf = max(s for s in self.sizes if ipa % s == pa % s == 0 and ipa + s <= end)
            self.put(ipa, leaf, pa, perm)
            ipa, pa = ipa + leaf, pa + leaf

    def put(self, ipa, size, pa, perm):
        old = self.leaves.get(ipa)
        if old is not None and old[:2] == (size, pa):
            return                  # permissions are left to relax
        for other in self.overlapping(ipa, ipa + size):
            del self.leaves[other]
        self.leaves[ipa] = (size, pa, perm)

    def unmap(self, ipa, size):
        for other in self.overlapping(ipa, ipa + size):
            del self.leaves[other]

    def relax(self, ipa, perm):
        for other in self.overlapping(ipa, ipa + 1):
            size, pa, had = self.leaves[other]
            self.leaves[other] = (size, pa, had | perm)

    def wrprotect(self, ipa, size):
        for other in self.overlapping(ipa, ipa + size):
            leaf, pa, had = self.leaves[other]
            self.leaves[other] = (leaf, pa, had & ~W)

    def split(self, ipa, size):
        page = self.sizes[0]
        for other in self.overlapping(ipa, ipa + size):
            leaf, pa, had = self.leaves.pop(other)
            self.leaves |= {other + at: (page, pa + at, had) for at in range(0, leaf, page)}

    def rows(self):
        return [(ipa, *self.leaves[ipa]) for ipa in sorted(self.leaves)]


def found(table):
    rows = s2.leaves(table.mem, table.cfg)
    return list(zip(*(rows[name].tolist() for name in ("ipa", "size", "pa", "perm")), strict=True))


def steps_of(sizes):
    """Calls in two blocks of the second size at both ends of a 1 GiB-aligned place, of pages and of blocks."""
    page, block = sizes[:2]
    starts = st.sampled_from([0, 4 * G]).flatmap(
        lambda base: st.integers(0, 2 * block // page - 1).map(lambda at: base + at * page))
    blocks = st.sampled_from([base + at * block for base in (0, 4 * G) for at in range(3)])
    size = st.sampled_from([page, page, 2 * page, 5 * page, block, block + page, 2 * block])
    perm = st.sampled_from([R, R | W, R | X, R | W | X])
    where = st.one_of(starts, blocks)
    outputs = st.one_of(blocks.map(lambda ipa: ipa + 16 * G), starts.map(lambda ipa: ipa + 24 * G))
    return st.lists(st.one_of(
        st.tuples(st.just("map"), where, size, outputs, perm),
        st.tuples(st.sampled_from(["unmap", "wrprotect", "split"]), where, size),
        st.tuples(st.just("relax"), where, perm)), max_size=25)


@pytest.mark.parametrize("name", GEOMETRIES)
@settings(max_examples=25)
@given(data=st.data())
def test_calls_do_what_the_list_says(name, data):
    table, sizes = writer(name)
    model = Leaves(sizes)
    small = sizes[:2] if sizes[1] // sizes[0] <= 2048 else [sizes[0], 8 * sizes[0]]
    for call, ipa, *rest in data.draw(steps_of(small)):
        if call == "split" and sizes[1] // sizes[0] > 2048:
            continue                # thousands of leaves for each block
        getattr(table, call)(ipa, *rest)
        getattr(model, call)(ipa, *rest)
    assert found(table) == model.rows()
    for ipa, size, _, _ in model.rows():
        table.unmap(ipa, size)
    assert found(table) == [] and not any(table.tables.values())


def test_gigabytes():
    table, sizes = writer("4K-48-bit")
    model = Leaves(sizes)
    for one in (table, model):
        one.map(4 * G, 2 * G, 8 * G, R | W)
        one.map(5 * G + 2 * M, 4 * K, 16 * G, R)        # breaks the second
        one.map(6 * G, 2 * M, 20 * G, R)
        one.map(6 * G, G, 32 * G, R | W)                # over that table
        one.wrprotect(4 * G + 8 * M, 4 * K)
    assert found(table) == model.rows()
    assert len(model.rows()) == 3


def test_take_over_and_destroy():
    table, _ = writer("4K-40-bit")
    table.map(0, 2 * M, 4 * G, R)
    table.map(G + 4 * K, 4 * K, 5 * G, R | W)
    again = Stage2Writer(table.ram, table.cfg)
    assert again.tables == table.tables
    again.map(G + 8 * K, 4 * K, 6 * G, R)
    assert len(found(table)) == 3
    again.destroy()
    assert found(table) == []


def test_mkyoung_and_output():
    table, _ = writer("4K-40-bit")
    table.map(0, 2 * M, 4 * G, R)
    level, slot, desc = table.find(5 * K)
    assert table.output(5 * K, level, desc) == 4 * G + 5 * K
    table.mem.write64(slot, desc & ~(1 << 10))
    table.mkyoung(5 * K)
    assert table.find(5 * K)[2] == desc
    assert table.output(4 * M, *table.find(4 * M)[::2]) is None


def test_freed_tables_are_given_out_again_late():
    """L1 frees a table only after the TLBI, which comes later in the trace."""
    table, _ = writer("4K-40-bit")
    pages = set()
    for at in range(600):
        table.map(at * 2 * M, 4 * K, 4 * G, R)
        pages |= set(table.tables[3].values())
        table.unmap(at * 2 * M, 4 * K)
    assert 256 < len(pages) < 600


@pytest.mark.parametrize("call, message", [
    (lambda t: t.map(0, 0, 0, R), "no range"), (lambda t: t.map(1 << 40, 4 * K, 0, R), "no range"),
    (lambda t: t.map(0, 4 * K, 1 << 47 | 4, R), "no output"), (lambda t: t.map(0, 8 * G, 0, R), "no output"),
    (lambda t: t.map(0, 4 * K, (1 << 48) - 4 * K, R), "beyond"), (lambda t: t.unmap(100, 4 * K), "no range"),
    (lambda t: t.relax(1 << 40, R), "no address"), (lambda t: t.wrprotect(0, 1 << 41), "no range")])
def test_ranges_that_cannot_be(call, message):
    table, _ = writer("4K-40-bit")
    with pytest.raises(ValueError, match=message):
        call(table)
    assert found(table) == []


def test_a_table_that_holds_itself():
    table, _ = writer("4K-48-bit")
    page = table.ram.new_table(4 * K)
    table.mem.write(page, (page | 3).to_bytes(8, "little") * 512)
    cfg = s2.Stage2Config(1 << 48 | page, table.cfg.vtcr, features=table.cfg.features)
    with pytest.raises(ValueError, match="no end"):
        Stage2Writer(table.ram, cfg)


def test_registers_that_make_no_table():
    mem = s2.GuestMemory()
    cfg = s2.Stage2Config(ROOT, 63 | 1 << 31)
    assert cfg.error is not None
    with pytest.raises(ValueError, match="translation fault"):
        Stage2Writer(GuestRam(mem), cfg)


def test_memory_appears_where_it_is_named():
    mem = s2.GuestMemory()
    mem.add(0x4000_0000, 2 * M)
    ram = GuestRam(mem)
    ram.cover(0x4010_0000, 4 * K)
    ram.cover(63 * G, 2 * G)
    assert mem.read64(0) == mem.read64(127 * G) == 0
    with pytest.raises(ValueError):
        mem.read64(129 * G)
    with pytest.raises(ValueError, match="too many places"):
        for at in range(1000):
            ram.cover(at * 64 * G, 4 * K)
