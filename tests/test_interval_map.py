"""teardown="interval-map": what each context's map knows, what it forgets, and what a host change costs then.

Which leaves go, in any order of events, is compared with a model in test_engine_stateful and test_engine_seeded.
"""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import s2shadow
from model.intervals import Ranges
from rig import DATA, HOST, PAGE, RAM, RAM_SIZE, K, M, Rig, flags
from s2shadow import HIT, HOST_FAULT, MAPPED, READ, WRITE
from sanitizer import SANITIZED

STEPS = 1 << 18  # 2^48 of input space in blocks of 1 GiB
NODES = 104  # bytes of a known range: one node in either direction
UNKNOWN_NODE = 56


@pytest.fixture
def r():
    """The first 4 MiB of IPA show the data in order, by pages and then by two blocks; both VMIDs are contexts."""
    r = Rig(teardown="interval-map", contexts=2)
    r.tables.map_range(0, DATA, 512 * PAGE)
    r.tables.map(2 * M, DATA + 2 * M, 2)
    r.tables.map(4 * M, DATA + 4 * M, 2)
    r.load(2)
    r.load(1)
    return r


def touch(r, *ipas):
    return [r.fault(ipa).kind for ipa in ipas]


def known(r, index=0):
    """{offset in the data: (size, ipa)} of the ranges, None for an ipa that is not known."""
    return {
        row["start"].item() - DATA: (
            row["end"].item() - row["start"].item(),
            None if row["unknown"] else row["ipa"].item(),
        )
        for row in r.vm.intervals(index)
    }


def change(r, offset, size=PAGE):
    """Takes part of the data away and gives it back; (leaves dropped, contexts lost)."""
    before = r.vm.stats.unknown_unmaps
    dropped = r.vm.unmap(DATA + offset, DATA + offset + size).leaves
    r.vm.check()
    r.vm.host.map(DATA + offset, HOST + DATA + offset, size)
    return dropped, r.vm.stats.unknown_unmaps - before


# what is known


def test_single(r):
    """One leaf, one range; the notifier takes just that, and no step through the address space."""
    touch(r, 0, PAGE, 2 * M)
    assert known(r) == {0: (PAGE, 0), PAGE: (PAGE, PAGE), 2 * M: (2 * M, 2 * M)}
    r.vm.check()
    assert change(r, PAGE) == (1, 0)
    assert known(r) == {0: (PAGE, 0), 2 * M: (2 * M, 2 * M)}
    assert touch(r, 0, PAGE, 2 * M) == [HIT, MAPPED, HIT]
    assert r.vm.stats.kernel_steps == 0


def test_adjacent(r):
    """Ranges that only meet stay apart, also where the nested addresses go on."""
    touch(r, *range(0, 8 * PAGE, PAGE))
    assert known(r) == {n * PAGE: (PAGE, n * PAGE) for n in range(8)}
    assert change(r, 2 * PAGE, 3 * PAGE) == (3, 0)
    assert sorted(known(r)) == [0, PAGE, 5 * PAGE, 6 * PAGE, 7 * PAGE]


def test_part_of_a_block(r):
    """One page of a block costs the block's leaf; the range goes with it."""
    touch(r, 2 * M, 4 * M)
    assert change(r, 3 * M) == (1, 0)
    assert known(r) == {4 * M: (2 * M, 4 * M)}


def test_partly_covered_blocks_are_split(r):
    """``partial`` is "split" unless it says otherwise: what was not named stays mapped in the host."""
    r.vm.unmap(DATA, DATA + PAGE)
    assert sum(leaf[2] for leaf in r.host_leaves()) == RAM_SIZE - PAGE


def test_contexts_are_apart(r):
    """The same page in two contexts is no alias: two maps, each with one range."""
    touch(r, 0, 2 * M)
    r.load(2)
    touch(r, 0, 2 * M)
    assert known(r, 0) == known(r, 1) == {0: (PAGE, 0), 2 * M: (2 * M, 2 * M)}
    assert change(r, 0) == (2, 0)


def test_stage_2_off(r):
    """A context without stage 2 shows each page at its own address."""
    r.load(3, hcr=0)
    assert r.fault(DATA + 5 * PAGE).size == 2 * M
    assert known(r, 1) == {0: (2 * M, DATA)}
    assert change(r, 7 * PAGE) == (1, 0)


# what is forgotten


def test_alias(r):
    """A page at two nested addresses: neither is known any more. A host change of that page costs the whole context,
    one of any other page its leaf."""
    r.tables.map(8 * M, DATA)
    touch(r, 0, PAGE, 2 * PAGE, 2 * M, 8 * M)
    assert known(r) == {0: (PAGE, None), PAGE: (PAGE, PAGE), 2 * PAGE: (PAGE, 2 * PAGE), 2 * M: (2 * M, 2 * M)}
    r.vm.check()
    assert change(r, PAGE) == (1, 0)
    assert change(r, 0) == (4, 1)
    assert known(r) == {} and not len(r.shadow(0))
    assert r.vm.stats.kernel_steps == STEPS


def test_alias_costs_no_other_context(r):
    """The other context knows the page still, and keeps the rest."""
    r.tables.map(8 * M, DATA)
    touch(r, 0, PAGE, 8 * M)
    r.load(2)
    touch(r, 0, PAGE, 2 * M)
    assert change(r, 0) == (4, 1)
    assert known(r, 1) == {PAGE: (PAGE, PAGE), 2 * M: (2 * M, 2 * M)} and known(r, 0) == {}
    assert r.vm.stats.kernel_steps == STEPS


def test_forgetting_ends_with_the_context(r):
    """An emptied context starts anew: the first of the two addresses is known until the second is touched."""
    r.tables.map(8 * M, DATA)
    touch(r, 0, 8 * M)
    change(r, 0)
    touch(r, 8 * M, PAGE)
    assert known(r) == {0: (PAGE, 8 * M), PAGE: (PAGE, PAGE)}
    assert change(r, 0) == (1, 0)


@pytest.mark.parametrize("block_first", [True, False])
def test_block_and_pages(r, block_first):
    """Pages inside a block that is mapped elsewhere: one UNKNOWN range over all of the block, whichever came first."""
    r.tables.map(8 * M, DATA, 2)
    ipas = [PAGE, 7 * PAGE]
    touch(r, *([8 * M, *ipas] if block_first else [*ipas, 8 * M]), 2 * M)
    assert known(r) == {0: (2 * M, None), 2 * M: (2 * M, 2 * M)}
    assert r.vm.stats.rmap_bytes == UNKNOWN_NODE + NODES
    assert change(r, 300 * PAGE) == (4, 1)


def test_unknown_takes_in_what_comes(r):
    """A leaf inside an UNKNOWN range is UNKNOWN from the start, though it has no alias."""
    r.tables.map(8 * M, DATA, 2)
    touch(r, PAGE, 8 * M)
    r.vm.vcpus[0].tlbi("IPAS2E1IS", 8 * M >> 12)
    touch(r, 9 * PAGE)
    assert known(r) == {0: (2 * M, None)}
    r.vm.check()
    assert change(r, 9 * PAGE) == (2, 1)


def test_several_contexts_and_both_kinds(r):
    """One range of host pages over known and UNKNOWN ranges of two contexts: each context pays for its own."""
    r.tables.map(8 * M, DATA + PAGE)
    touch(r, 0, PAGE, 8 * M, 2 * M, 4 * M)
    r.load(2)
    touch(r, 0, PAGE, 4 * PAGE, 4 * M)
    assert change(r, 0, 2 * PAGE) == (5 + 2, 1)
    assert known(r, 1) == {4 * PAGE: (PAGE, 4 * PAGE), 4 * M: (2 * M, 4 * M)}


# leaves that go without a host change


def test_remap_with_tlbi(r):
    """L1 moves a page lawfully: unmap, TLBI, map elsewhere. That is no alias."""
    touch(r, 0)
    r.tables.unmap(0)
    r.vcpu.tlbi("IPAS2E1IS", 0)
    assert known(r) == {}
    r.tables.map(8 * M, DATA)
    touch(r, 8 * M)
    assert known(r) == {0: (PAGE, 8 * M)}


def test_remap_without_tlbi(r):
    """Without the TLBI the old leaf is there still, and so the page is shown twice."""
    touch(r, 0)
    r.tables.unmap(0)
    r.tables.map(8 * M, DATA)
    touch(r, 8 * M)
    assert known(r) == {0: (PAGE, None)}


def test_replaced_leaf(r):
    """L1 lets an address show another page: the leaf is replaced, and its range with it."""
    touch(r, 0)
    r.tables.map(0, DATA + 9 * PAGE, perm="rw")
    r.vm.host.protect(DATA, DATA + PAGE, "rx")
    assert r.fault(0, WRITE).kind == MAPPED
    assert known(r) == {9 * PAGE: (PAGE, 0)}
    r.vm.check()


def test_relaxed_leaf(r):
    """A leaf that gets a permission more is the same mapping."""
    r.vm.log_dirty(DATA, DATA + PAGE)
    touch(r, 0)
    assert r.fault(0, WRITE).kind == MAPPED
    assert known(r) == {0: (PAGE, 0)}


def test_unknown_outlives_its_leaves(r):
    """A TLBI removes both leaves of an alias, one after the other. The range stays: a host change empties the context
    although nothing maps the page."""
    r.tables.map(8 * M, DATA)
    touch(r, 0, 8 * M, PAGE)
    r.vcpu.tlbi("IPAS2E1IS", 0)
    r.vcpu.tlbi("IPAS2E1IS", 8 * M >> 12)
    assert known(r) == {0: (PAGE, None), PAGE: (PAGE, PAGE)}
    assert change(r, 0) == (1, 1)


def test_unknown_ends_with_vmalls12(r):
    """What empties the context empties its map, also where only the map has something left."""
    r.tables.map(8 * M, DATA)
    for _ in range(2):
        touch(r, 0, 8 * M)
        r.vcpu.tlbi("VMALLS12E1IS")
        assert known(r) == {} and r.vm.stats.rmap_bytes == 0
    touch(r, 0, 8 * M)
    r.vcpu.tlbi("IPAS2E1IS", 0)
    r.vcpu.tlbi("IPAS2E1IS", 8 * M >> 12)
    assert r.vm.stats.live == 0 and r.vm.stats.rmap_bytes == UNKNOWN_NODE
    r.vcpu.tlbi("ALLE1IS")
    assert r.vm.stats.rmap_bytes == 0
    assert change(r, 0) == (0, 0)


def test_recycled_context(r):
    """The next owner of a context knows nothing of the last one's."""
    r.tables.map(8 * M, DATA)
    touch(r, 0, 8 * M, PAGE)
    for vmid in (3, 4):
        r.load(vmid)
    assert r.vm.stats.contexts_recycled == 2
    assert known(r, 0) == known(r, 1) == {} and r.vm.stats.rmap_bytes == 0
    assert change(r, 0) == (0, 0)


def test_many_leaves():
    """More leaves than one section drops: the host change and the TLBI go on where they paused."""
    r = Rig(teardown="interval-map")
    r.vm.host.map(RAM, HOST + PAGE + RAM, RAM_SIZE)  # by pages
    r.tables.map_range(0, DATA, 32 * M, level=2)
    pages = np.arange(8192, dtype=np.uint64) * PAGE
    for end in ("unmap", "tlbi"):
        assert set(r.vcpu.fault_many(pages)["kind"].tolist()) == {MAPPED}
        r.vm.check()
        if end == "unmap":
            assert r.vm.unmap(DATA, DATA + 32 * M).leaves == 8192
            r.vm.host.map(DATA, HOST + PAGE + DATA, 32 * M)
        else:
            assert r.vcpu.tlbi("VMALLS12E1IS").removed == 8192
        assert r.vm.stats.live == r.vm.stats.rmap_bytes == 0


# what the proposal leaves as it is


def test_write_protection_visits_everything(r):
    """Dirty logging takes W from every leaf of every context, also far from the range; no leaf is lost by it."""
    for vmid in (2, 1):
        r.load(vmid)
        for ipa in (0, PAGE, 4 * M):
            r.fault(ipa, WRITE)
    r.vm.log_dirty(DATA, DATA + PAGE)
    for index in (0, 1):
        assert len(r.shadow(index)) == 3 and not (r.shadow(index)["perm"] & WRITE).any()
    assert r.vm.stats.unknown_unmaps == 0


def test_split_of_a_host_block(r):
    """A first write to a logged page splits the host's block: of the known ranges only the block's leaf is lost, under
    an UNKNOWN range the context."""
    touch(r, 2 * M, 4 * M, PAGE)
    r.vm.log_dirty(DATA + 2 * M, DATA + 2 * M + PAGE)
    assert r.fault(2 * M, WRITE).size == PAGE
    assert known(r) == {PAGE: (PAGE, PAGE), 2 * M: (PAGE, 2 * M), 4 * M: (2 * M, 4 * M)}
    r.tables.map(8 * M, DATA + 4 * M, 2)
    touch(r, 8 * M)
    r.vm.log_dirty(DATA + 4 * M, DATA + 4 * M + PAGE)
    assert r.fault(4 * M, WRITE).size == PAGE
    assert known(r) == {4 * M: (PAGE, 4 * M)}
    r.vm.check()


def test_aging_looks_at_the_host(r):
    """A page that only a shadow's access flag tells of is old, as in Linux."""
    touch(r, 0)
    assert flags(r.vm.age(DATA, DATA + PAGE), 1) == [True]
    assert touch(r, 0) == [HIT]
    assert flags(r.vm.age(DATA, DATA + PAGE), 1) == [False]


# memory


def test_bytes(r):
    """Two nodes for a known range, one for an UNKNOWN one, and the same figure per mapping."""
    touch(r, *range(0, 64 * PAGE, PAGE))
    stats = r.vm.stats
    assert stats.rmap_bytes == 64 * NODES and stats.link_bytes == 0
    assert stats.reverse_map_bytes_per_entry == NODES
    assert stats.memory_bytes == stats.table_bytes + stats.rmap_bytes


def tight(limit):
    r = Rig(teardown="interval-map", contexts=2, max_table_bytes=limit)
    r.vm.host.map(RAM, HOST + PAGE + RAM, RAM_SIZE)
    r.tables.map_range(0, DATA, 32 * M, level=2)
    r.tables.map_range(64 * M, DATA, 32 * M, level=2)
    return r


def test_bound_covers_the_maps():
    """Leaves are evicted rather than left untracked, and never more bytes than allowed."""
    limit = 900 * K
    r = tight(limit)
    rng = np.random.default_rng(5)
    for number in range(40):
        r.load(1 + number % 2)
        pages = rng.integers(0, 8192, 1500) + rng.integers(0, 2, 1500) * (64 * M // PAGE)
        kinds = r.vcpu.fault_many(pages.astype(np.uint64) * PAGE)["kind"]
        assert set(kinds.tolist()) <= {HIT, MAPPED}
        assert r.vm.stats.memory_bytes <= limit
        r.vm.check()
    assert r.vm.stats.evictions > 0


def test_ranges_without_leaves_are_given_back():
    """UNKNOWN ranges that outlived their leaves fill the bound; who needs the room gets it."""
    r = tight(900 * K)
    for vmid in (1, 2):
        r.load(vmid)
        for page in range(0, 8192, 2):
            for ipa in (page * PAGE, 64 * M + page * PAGE):
                r.fault(ipa)
            for ipa in (page * PAGE, 64 * M + page * PAGE):
                r.vcpu.tlbi("IPAS2E1IS", ipa >> 12)
    stats = r.vm.stats
    assert stats.rmap_bytes > 200 * K
    r.load(2)
    assert set(r.vcpu.fault_many(np.arange(3000, dtype=np.uint64) * PAGE)["kind"].tolist()) <= {MAPPED, HIT}
    r.vm.check()


REFUSED = """
import resource
import numpy as np
import s2shadow
from rig import HOST, PAGE, G, M, Rig

r = Rig(teardown="interval-map")
r.mem.add(4 * G, 256 * M)
r.vm.host.map(4 * G, HOST + PAGE, 256 * M)                  # by pages
r.tables.map_range(0, 4 * G, 256 * M, level=2)
ipas = np.random.default_rng(1).permutation(256 * M // PAGE).astype(np.uint64) * PAGE
out = np.zeros(len(ipas), s2shadow.FAULT_DTYPE)
r.vcpu.fault_many(ipas[:100], out=out[:100])
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (1 << 20, hard))     # less than is in use: nothing more to be had
r.vcpu.fault_many(ipas, out=out)
resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
r.vm.check()
print(sorted(set(out["kind"].tolist())), r.vm.stats.evictions > 0, r.vm.stats.live < len(ipas))
r.vcpu.fault_many(ipas)
r.vm.check()
print(r.vm.stats.live == len(ipas))
"""


@pytest.mark.skipif(SANITIZED, reason="ASan cannot work where malloc gets nothing")
def test_allocator_refuses():
    """No memory for a node: the leaf is not installed, others make room, and nothing is left untracked."""
    code = f"import sys; sys.path[:0] = {sys.path!r}\n{REFUSED}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[0, 1] True True", "True"]


# the map by itself

STARTS = st.integers(0, 60)
MAPPINGS = st.lists(st.tuples(STARTS, st.sampled_from([1, 1, 1, 2, 4, 7, 16])), max_size=40)


@given(MAPPINGS, st.lists(st.integers(0, 40), max_size=20))
def test_any_ranges(mappings, gone):
    """Ranges of any start and size, and removals: what a list knows that is searched from end to end."""
    r, model = Rig(teardown="interval-map", host=False), Ranges()
    for number, (start, size) in enumerate(mappings):
        r.vm._poke_interval(0, number * PAGE, start * PAGE, size * PAGE)
        model.remember(start * PAGE, (start + size) * PAGE, number * PAGE)
    for number in gone:
        r.vm._poke_interval(0, number * PAGE)
        model.forget(number * PAGE)
    assert r.vm.intervals(0).tolist() == model.rows()
    unknown = sum(row[3] for row in model.rows())
    assert r.vm.stats.rmap_bytes == unknown * UNKNOWN_NODE + (len(model.rows()) - unknown) * NODES


# check() and errors


def test_check_finds_an_uncovered_leaf(r):
    """A leaf whose range was lost would outlive its page."""
    touch(r, 0, PAGE, 2 * M)
    r.vm._poke_interval(0, PAGE)
    with pytest.raises(s2shadow.InvariantError, match="not covered by its context's interval map"):
        r.vm.check()
    r.vm._poke_interval(0, PAGE, DATA + PAGE, PAGE)
    r.vm.check()


@pytest.mark.parametrize(
    ("cipa", "size"), [(DATA + PAGE, 2 * PAGE), (DATA, PAGE), (DATA + 2 * PAGE, PAGE)], ids=["long", "apart", "wrong"]
)
def test_check_finds_a_wrong_range(r, cipa, size):
    """A range that is not the leaf's leads the host change past it."""
    touch(r, PAGE)
    r.vm._poke_interval(0, PAGE)
    r.vm._poke_interval(0, PAGE, cipa, size)
    with pytest.raises(s2shadow.InvariantError, match="not covered"):
        r.vm.check()


def test_check_finds_a_range_without_a_leaf(r):
    """A known range stands for a live leaf."""
    touch(r, 0)
    r.vm._poke_interval(0, 9 * PAGE, DATA + 9 * PAGE, PAGE)
    with pytest.raises(s2shadow.InvariantError, match="not a live leaf"):
        r.vm.check()


def test_check_finds_a_vanished_leaf(r):
    """An entry that became invalid behind the engine's back."""
    touch(r, 0, PAGE)
    r.vm._poke(0, 0, 1)
    with pytest.raises(s2shadow.InvariantError):
        r.vm.check()
    r.vm._poke(0, 0, 1)
    r.vm.check()


@pytest.mark.parametrize("teardown", [name for name in s2shadow.TEARDOWNS if name != "interval-map"])
def test_only_under_this_policy(teardown):
    r = Rig(teardown=teardown)
    with pytest.raises(ValueError, match="there are interval maps only with teardown='interval-map'"):
        r.vm.intervals(0)


def test_errors(r):
    with pytest.raises(ValueError, match="no context with index 7"):
        r.vm.intervals(7)
    assert r.vm.teardown == "interval-map"
    with pytest.raises(ValueError, match="teardown must be one of 'reverse-map', 'interval-map', 'blow-away'"):
        Rig(teardown="maple")


def test_answers_without_a_host(r):
    """A page that the host does not give back is a host fault, whatever the map knew."""
    r.tables.map(8 * M, DATA)
    touch(r, 0, 8 * M)
    r.vm.unmap(DATA, DATA + PAGE)
    assert touch(r, 0, 8 * M, PAGE) == [HOST_FAULT, HOST_FAULT, MAPPED]
    assert r.fault(PAGE, READ).kind == HIT
