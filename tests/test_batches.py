"""A batch answers as its elements would one after the other, however they are overlapped; and what mappings weigh.

Walks and faults of a batch run side by side, with their tables read and their lines fetched ahead. Here the same work
is done one by one on a twin, and everything that can be seen must be the same.
"""

import random
import sys

import numpy as np
import pytest

import s2shadow
from rig import DATA, HA, HD, PAGE, RAM, RAM_SIZE, G, K, M, Rig, Tables
from s2shadow import EXEC, L1_FAULT, MAPPED, READ, WRITE
from s2shadow.constants import TEARDOWNS
from sanitizer import SANITIZED

BASES = (0, 2 * M, 4 * M, 64 * M, G, G + 2 * M, 3 * G)
SLOTS = [base + n * PAGE for base in BASES for n in (0, 1, 17, 511)]
SIZES = (1, 2, 31, 33, 64, 65, 200)
FEATURES = s2shadow.Features(hafdbs=2)


def populate(rng, tables):
    """L1 maps most of SLOTS, each in its own way: pages and blocks, old, clean, without permissions, Device."""
    for base in BASES:
        if rng.random() < 0.2:
            tables.map(base, DATA + rng.randrange(1, 16) * 2 * M, level=2, perm=rng.choice(("rwx", "r")))
            continue
        for at in [at for at in SLOTS if base <= at < base + 2 * M and rng.random() < 0.8]:
            tables.map(
                at,
                DATA + rng.randrange(2048) * PAGE,
                perm=rng.choice(("rwx", "rw", "r", "x", "-")),
                af=rng.random() < 0.6,
                clean=rng.random() < 0.4,
                memattr=rng.choice((15, 15, 5, 0)),
            )


def requests(rng, count):
    """Addresses and accesses: random ones, runs in order, repeated ones, and some that nothing maps."""
    pool = [*SLOTS, 5 * G, 1 << 38, 1 << 40, 1 << 63]
    if rng.random() < 0.3:
        start = rng.choice(BASES)
        pool = [start + n * PAGE for n in range(511)]
    ipas = np.array([rng.choice(pool) + rng.randrange(512) * 8 for _ in range(count)], dtype=np.uint64)
    if rng.random() < 0.5:
        return ipas, rng.choice((READ, WRITE, EXEC))
    return ipas, np.array([rng.choice((1, 2, 4, 3, 9, 17, 18)) for _ in range(count)], dtype=np.uint8)


def scattered_tables(seed, **form):
    """Tables whose pages lie in many regions, RAM and ROM, with holes between."""
    mem = s2shadow.GuestMemory()
    for n in range(64):
        piece = RAM + n * 64 * K
        mem.add(piece, 64 * K) if n % 7 else mem.add(piece, 32 * K)
    # pages from everywhere, those in holes among them
    pages = random.Random(seed).sample(range(16, 64 * 16), 200)
    tables = Tables(lambda a: words.get(a, 0), lambda a, w: words.update({a: w}), RAM, **form)
    words = {}
    tables.new_table = lambda count=1: RAM + pages.pop() * PAGE
    populate(random.Random(seed), tables)
    for address, word in words.items():
        try:
            mem.write64(address, word)
        except ValueError:
            pass  # a table where no memory is: an external abort
    return mem, s2shadow.Stage2Config(tables.vttbr(), tables.vtcr, features=FEATURES, big_endian=tables.big_endian)


@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_walks(seed, update, big_endian):
    """Tables in many regions; with updates, in an order in which each walk sees what the one before it wrote."""
    rng = random.Random(seed)
    form = {"vtcr": HA | HD, "big_endian": big_endian}
    (mem, cfg), (twin, _) = scattered_tables(seed, **form), scattered_tables(seed, **form)
    for count in SIZES:
        ipas, access = requests(rng, count)
        found = s2shadow.walk_many(mem, cfg, ipas, access, update=update)
        for n, ipa in enumerate(ipas.tolist()):
            one = s2shadow.walk(twin, cfg, ipa, access if isinstance(access, int) else int(access[n]), update=update)
            assert {name: found[n][name] for name in found.dtype.names} == {
                name: getattr(one, name) for name in found.dtype.names
            }, hex(ipa)
    for start, size, *_ in mem.regions:
        assert mem.read(start, min(size, 64 * K)) == twin.read(start, min(size, 64 * K))


def rows_of(one):
    return tuple(getattr(one, name) for name in s2shadow.FAULT_DTYPE.names)


@pytest.mark.parametrize("teardown", TEARDOWNS)
@pytest.mark.parametrize("seed", range(8))
def test_faults_and_translations(seed, teardown):
    """Installs, hits, replacements and L1 faults of a batch, some with a host that must be asked, and then misses."""
    rng = random.Random(seed)
    rigs = [Rig(FEATURES, vtcr=HA | HD, teardown=teardown, host=seed % 2 == 0) for _ in range(2)]
    for r in rigs:
        populate(random.Random(seed), r.tables)
        if seed % 2:
            r.vm.host.populate = (
                "linear" if seed % 4 == 1 else lambda cipa, access: s2shadow.HostMapping(cipa & -4096, 4096)
            )
    ours, theirs = rigs
    for count in SIZES:
        ipas, access = requests(rng, count)
        accesses = [access] * count if isinstance(access, int) else access.tolist()
        found = ours.vcpu.fault_many(ipas, access)
        alone = [theirs.vcpu.fault(ipa, a) for ipa, a in zip(ipas.tolist(), accesses, strict=True)]
        assert [tuple(row) for row in found.tolist()] == [rows_of(one) for one in alone]
        found = ours.vcpu.translate_many(ipas, access)
        alone = [theirs.vcpu.translate(ipa, a) for ipa, a in zip(ipas.tolist(), accesses, strict=True)]
        assert [tuple(row) for row in found.tolist()] == [rows_of(one) for one in alone]
        if count == 64:
            for r in rigs:
                r.vcpu.tlbi("VMALLS12E1")
    ours.vm.check()
    assert ours.vm.stats == theirs.vm.stats
    assert (ours.shadow() == theirs.shadow()).all()
    assert ours.mem.read(RAM, 4 * M) == theirs.mem.read(RAM, 4 * M)


def test_block_between_pages():
    """A batch that is well under way with pages meets a block, and pages again."""
    r = Rig()
    r.tables.map_range(0, DATA, 512 * PAGE)
    r.tables.map(4 * M, DATA + 4 * M, level=2)
    r.tables.map_range(8 * M, DATA + 8 * M, 512 * PAGE)
    r.vm.unmap(RAM, RAM + RAM_SIZE)
    r.vm.host.map(RAM, RAM + (1 << 30), RAM_SIZE)
    ipas = [n * PAGE + part * M for n in range(40) for part in (0, 8)]
    ipas[33] = ipas[50] = 4 * M + 3 * PAGE
    found = r.vcpu.fault_many(np.array(ipas, dtype=np.uint64), READ)
    assert (found["cipa"] == DATA + np.array(ipas)).all()
    assert (found["pa"] == found["cipa"] + (1 << 30)).all()
    r.vm.check()


# --- arrays at the border ----------------------------------------------------------------------------------------


def border():
    r = Rig()
    r.tables.map_range(0, DATA, 8 * PAGE)
    r.vcpu.fault_many(np.arange(0, 8 * PAGE, PAGE))
    return (
        r,
        {
            "walk_many": lambda *a, **k: s2shadow.walk_many(r.mem, cfg, *a, **k),
            "fault_many": r.vcpu.fault_many,
            "translate_many": r.vcpu.translate_many,
        },
        (cfg := s2shadow.Stage2Config(r.tables.vttbr(), r.tables.vtcr)),
    )


@pytest.mark.parametrize("name", ["walk_many", "fault_many", "translate_many"])
def test_arrays(name):
    """Any integers are taken, arrays that fit without a copy; ``out`` is written and returned."""
    r, calls, _ = border()
    call = calls[name]
    dtype = s2shadow.WALK_DTYPE if name == "walk_many" else s2shadow.FAULT_DTYPE
    ipas = np.arange(0, 8 * PAGE, PAGE, dtype=np.uint64)
    call(ipas)
    want = call(ipas, READ)
    out = np.zeros(8, dtype=dtype)
    assert call(ipas, READ, out=out) is out
    assert (out == want).all() and want.dtype == dtype
    assert (out["pa"][1:] != out["pa"][0]).all()
    for same in (ipas.tolist(), ipas.astype(np.int32), ipas.astype(">u8"), np.repeat(ipas, 2)[::2]):
        assert (call(same, READ) == want).all()
    for access in (np.uint8(1), np.array(1), np.ones(8, dtype=np.uint8), [1] * 8, np.ones(16, dtype=np.uint8)[::2]):
        assert (call(ipas, access) == want).all()
    unaligned = np.zeros(8 * 8 + 1, dtype=np.uint8)[1:].view(np.uint64)
    unaligned[:] = ipas
    assert (call(unaligned, READ) == want).all()
    ipas.flags.writeable = False
    assert (call(ipas, READ) == want).all()
    for n in (0, 1):
        out = np.zeros(n, dtype=dtype)
        assert call(ipas[:n], READ, out=out) is out and (out == want[:n]).all()
        assert (call(ipas[:n], np.ones(n, dtype=np.uint8)) == want[:n]).all()
    assert (call(ipas, READ, out=np.zeros(8, dtype=np.dtype(dtype, copy=True))) == want).all()


@pytest.mark.parametrize("name", ["walk_many", "fault_many", "translate_many"])
def test_arrays_refused(name):
    r, calls, _ = border()
    call = calls[name]
    dtype = s2shadow.WALK_DTYPE if name == "walk_many" else s2shadow.FAULT_DTYPE
    ipas = np.zeros(4, dtype=np.uint64)
    readonly = np.zeros(4, dtype=dtype)
    readonly.flags.writeable = False
    for out, error in (
        (np.zeros(3, dtype=dtype), ValueError),
        (np.zeros((4, 1), dtype=dtype), ValueError),
        (np.zeros(8, dtype=dtype)[::2], ValueError),
        (readonly, ValueError),
        (np.zeros(4, dtype=np.uint64), TypeError),
        (bytearray(4 * dtype.itemsize), TypeError),
    ):
        with pytest.raises(error, match="out"):
            call(ipas, READ, out=out)
    for access, error in ((32, ValueError), (-1, ValueError), ([1, 1], ValueError), (1.0, TypeError), ("r", TypeError)):
        with pytest.raises(error, match="access"):
            call(ipas, access)
    for bad, error in (([-1], ValueError), ([0.5], TypeError), ([[1]], ValueError), (7, ValueError)):
        with pytest.raises(error, match="ipas"):
            call(bad)


# --- what mappings weigh -----------------------------------------------------------------------------------------


def mapped(ipas, cipas):
    """An engine with a leaf for each pair."""
    mem = s2shadow.GuestMemory()
    mem.add(1 << 40, 1 << 36)  # tables, sparse
    mem.add(0, 1 << 39)
    tables = Tables(mem.read64, mem.write64, 1 << 40, start=0)
    for ipa, cipa in zip(ipas.tolist(), cipas.tolist(), strict=True):
        tables.map(ipa, cipa)
    vm = s2shadow.NestedVM(mem)
    vcpu = vm.vcpus[0]
    vcpu.load(tables.vttbr(), tables.vtcr)
    for cipa in np.unique(cipas).tolist():
        vm.host.map(cipa, cipa + PAGE, PAGE)
    assert (vcpu.fault_many(ipas, READ)["kind"] == MAPPED).all()
    return vm.stats


def on_paper(ipas, cipas):
    """Bytes: tables of both kinds (roots, and pages below them), links beside the shadow's leaf tables, and heads.

    A table page is 4096 bytes, the links of one as much, the heads of a node 2048, and again where it has children.
    """
    shadow, host = ([len(np.unique(a >> np.uint64(shift))) for shift in (21, 30, 39)] for a in (ipas, cipas))
    tables = (sum(shadow) + sum(host) + 2) * 4096
    nodes = host[0] * 2048 + (sum(host[1:]) + 1) * 4096
    return tables + shadow[0] * 4096 + nodes


N = 4096
DENSE = np.arange(N, dtype=np.uint64) * np.uint64(PAGE)
SHAPES = {
    "dense": (DENSE, DENSE + np.uint64(G)),
    "sparse": (DENSE * np.uint64(512), DENSE * np.uint64(512) + np.uint64(G)),
    "sparse, canonical dense": (DENSE * np.uint64(64), DENSE + np.uint64(G)),
    "aliased": (DENSE, DENSE % np.uint64(N // 8 * PAGE) + np.uint64(G)),
    "one page": (DENSE[:1024], np.full(1024, G, dtype=np.uint64)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_of_mappings(shape):
    """No more than a fifth above what tables, links and heads need on paper."""
    ipas, cipas = SHAPES[shape]
    stats = mapped(ipas, cipas)
    paper = on_paper(ipas, cipas)
    assert stats.live == len(ipas)
    assert paper * 0.9 < stats.memory_bytes <= paper * 1.2, (stats.memory_bytes / len(ipas), paper / len(ipas))


def resident():
    with open("/proc/self/smaps_rollup") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("Rss:")) << 10


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
@pytest.mark.skipif(SANITIZED, reason="ASan keeps what was freed for a while")
def test_small_machines_stay_small():
    """Arenas are on large pages, but not their first 2 MiB."""
    mapped(DENSE[:16], DENSE[:16])
    before = resident()
    kept = [s2shadow.NestedVM(s2shadow.GuestMemory()) for _ in range(8)]
    assert resident() - before < 8 * 256 * K
    before = resident()
    kept.append(mapped(DENSE[:1024], DENSE[:1024]))
    r = Rig()
    r.tables.map_range(0, DATA, 1000 * PAGE)
    assert (r.vcpu.fault_many(DENSE[:1000], READ)["kind"] == MAPPED).all()
    assert resident() - before < 4 * M
    assert r.vcpu.fault(1 << 38).kind == L1_FAULT


# what a batch once said otherwise


def alike(tables, ipas, access=READ):
    """A batch says what walks one by one say."""
    config = s2shadow.Stage2Config(vttbr=tables.vttbr(), vtcr=tables.vtcr, hcr=s2shadow.HCR_VM)
    mem = tables.read.__self__
    rows = s2shadow.walk_many(mem, config, np.array(ipas, dtype=np.uint64), access)
    for ipa, row in zip(ipas, rows, strict=True):
        one = s2shadow.walk(mem, config, ipa, access)
        assert (row["status"], row["fsc"], row["pa"], row["size"]) == (one.status, one.fsc, one.pa, one.size), hex(ipa)
    return rows


def test_a_leaf_beyond_the_output_size_after_one_within():
    """Equal in all but their addresses, of which one is beyond VTCR.PS: an Address size fault."""
    r = Rig()
    r.tables.map(0, DATA)
    r.tables.map(PAGE, 1 << 41)
    r.tables.map(2 * PAGE, DATA)
    r.tables.vtcr = r.tables.vtcr & ~(7 << 16) | 2 << 16  # 40 bits
    rows = alike(r.tables, [0, PAGE, 2 * PAGE])
    assert rows["fsc"].tolist() == [0, 3, 0]


def test_an_access_that_needs_nothing_finds_nothing():
    r = Rig()
    r.tables.map(0, DATA)
    assert alike(r.tables, [G, 2 * G, PAGE, 0, G], access=0)["status"].tolist() == [1, 1, 1, 0, 1]


def test_tlbis_of_a_read_only_array():
    r = Rig()
    r.tables.map(0, DATA)
    assert r.fault(0).kind == MAPPED
    ops = np.zeros(2, dtype=s2shadow.TLBI_OP_DTYPE)
    ops["insn"] = 0xD50C_8020  # IPAS2E1IS of IPA 0
    ops.setflags(write=False)
    assert r.vm.tlbi_many(ops).tolist() == [1, 0]


def test_a_populate_that_writes_into_the_batch():
    """What it writes counts for nothing but that element's kind."""
    r = Rig(host=False)
    r.tables.map_range(0, DATA, 4 * PAGE)
    out = np.zeros(4, dtype=s2shadow.FAULT_DTYPE)

    def nothing(_cipa, _access):
        out["kind"] = 255

    r.vm.host.populate = nothing
    r.vcpu.fault_many(np.arange(4, dtype=np.uint64) * PAGE, READ, out=out)
    r.vm.check()
