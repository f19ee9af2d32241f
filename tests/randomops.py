"""A seeded stream of operations on a lockstep.Pair: what L2, L1 and the host do, so that shadows stay full."""

from lockstep import ALIASES, DATA_PAGES, OTHER_S2PIR, SLOTS
from rig import MRO, S2PIR
from s2shadow import HCR_CD, HCR_PTW

PERMS = ("r", "rw", "rx", "rwx", "rwx", "rwx", "w", "rp", "ru", "")
HOST_PERMS = ("rwx", "rwx", "rwx", "rw", "rx", "r")
ACCESSES = (1, 1, 1, 2, 2, 2, 3, 4, 4 | 8, 1 | 8, 2 | 8, 5, 7)
LENGTHS = (1, 1, 1, 1, 1, 2, 3, 16, 512, 600)


def some_ipa(rng, pair):
    """Half near the start of a slot, where L1 maps most; the rest anywhere in its 2 MiB."""
    return pair.ipa(rng.randrange(SLOTS), rng.choice((rng.randrange(12), rng.randrange(12), rng.randrange(512))))


def fault(rng, pair):
    pair.fault(rng.randrange(2), some_ipa(rng, pair), rng.choice(ACCESSES))


def fault_canonical(rng, pair):
    pair.fault(rng.randrange(2), pair.data + rng.randrange(DATA_PAGES) * pair.page, rng.choice(ACCESSES))


def batch(rng, pair):
    pair.fault_many(rng.randrange(2), [some_ipa(rng, pair) for _ in range(rng.randrange(1, 30))], rng.choice(ACCESSES))


def translate(rng, pair):
    pair.translate(rng.randrange(2), some_ipa(rng, pair), rng.choice(ACCESSES))


def load(rng, pair):
    pair.load(rng.randrange(2), rng.randrange(1, 4), rng.randrange(2), rng.random() < 0.85)


def put(rng, pair):
    pair.put(rng.randrange(2))


def l1_map(rng, pair):
    slot, offset = rng.randrange(SLOTS), rng.randrange(12)
    level = rng.choice((3, 3, 3, 3, 3, 2, 2, 1))
    memattr, sh = rng.choice((15, 15, 15, 15, 5, 1, 6, 7)), rng.choice((3, 3, 3, 2, 0))
    page, young, tlbi = rng.randrange(DATA_PAGES), rng.random() < 0.8, rng.random() < 0.7
    pair.l1_map(rng.randrange(2), pair.ipa(slot, offset), level, page, rng.choice(PERMS), memattr, sh, young, tlbi)


def l1_map_run(rng, pair):
    pair.l1_map_run(rng.randrange(2), rng.choice(ALIASES), rng.randrange(0, DATA_PAGES, 8), rng.choice(PERMS))


def l1_unmap(rng, pair):
    pair.l1_unmap(rng.randrange(2), some_ipa(rng, pair), rng.choice((3, 3, 3, 3, 2, 1)), rng.random() < 0.7)


def tlbi(rng, pair):
    pair.tlbi(rng.randrange(2), rng.choice(("ALLE1IS", "VMALLS12E1", "VMALLS12E1IS")), rng.randrange(1, 5))


def tlbi_ipa(rng, pair):
    pair.tlbi_ipa(rng.randrange(2), some_ipa(rng, pair), rng.randrange(1, 4))


def host_map(rng, pair):
    shift = rng.choice((0, 0, 0, 0, 1, 512))
    pair.host_map(rng.randrange(DATA_PAGES), rng.choice(LENGTHS), shift, rng.choice(HOST_PERMS))


def host_heal(rng, pair):
    """Puts the data back as it was at the start, in blocks."""
    if rng.random() < 0.2:
        pair.unmap_all()
    pair.host_map(0, DATA_PAGES)


def host_gigabyte(rng, pair):
    pair.host_map_gigabyte()


def unmap(rng, pair):
    pair.unmap(rng.randrange(DATA_PAGES), rng.choice(LENGTHS), rng.choice(("split", "split", None, "drop")))


def protect(rng, pair):
    pair.protect(rng.randrange(DATA_PAGES), rng.choice(LENGTHS), rng.choice(HOST_PERMS))


def log_dirty(rng, pair):
    pair.log_dirty(rng.randrange(DATA_PAGES), rng.choice((*LENGTHS, DATA_PAGES)), rng.random() < 0.6)


def dirty_log(rng, pair):
    pair.dirty_log(rng.randrange(DATA_PAGES), rng.choice((1, 16, 512, 600, DATA_PAGES)))


def young(rng, pair):
    pair.young(rng.randrange(DATA_PAGES), rng.choice(LENGTHS), rng.random() < 0.6)


WEIGHTS = {
    fault: 400,
    batch: 60,
    fault_canonical: 30,
    translate: 30,
    load: 60,
    put: 5,
    l1_map: 120,
    l1_map_run: 40,
    l1_unmap: 20,
    tlbi: 4,
    tlbi_ipa: 40,
    host_map: 15,
    host_heal: 4,
    host_gigabyte: 1,
    unmap: 25,
    protect: 15,
    log_dirty: 10,
    dirty_log: 15,
    young: 15,
}


QUIET = {**WEIGHTS, l1_map: 4, l1_map_run: 12, l1_unmap: 1, tlbi: 1, tlbi_ipa: 10}  # L1 seldom edits its tables


# What 52-bit addresses, hardware dirty state, permission indirection and the attribute controls add


def fault_near(rng, pair):
    """Where L1 maps most, once or twice; stage-1 walks too."""
    ipa = pair.ipa(rng.randrange(SLOTS), rng.randrange(12))
    access = rng.choice((1, 1, 2, 2, 2, 3, 4, 4 | 8, 1 | 16, 2 | 16, 2 | 16))
    n = rng.randrange(2)
    pair.fault(n, ipa, access)
    if rng.random() < 0.4:
        pair.fault(n, ipa + 8 * rng.randrange(100), rng.choice((access, 1, 2)))


def some_page(rng):
    """Mostly one of a few, so that the same page is seen through many addresses and contexts; or one that is no RAM."""
    if rng.random() < 0.08:
        return DATA_PAGES - 1 - rng.randrange(4)
    return rng.choice((rng.randrange(24), rng.randrange(DATA_PAGES - 8)))


def log_more(rng, pair):
    pair.log_dirty(0, DATA_PAGES, rng.random() < 0.7)


def mmu_write(rng, pair):
    """Stage-1 tables where only the MMU may write: it updates a descriptor, somebody else tries."""
    ipa, table = pair.ipa(rng.randrange(SLOTS), rng.randrange(12)), rng.randrange(2)
    pair.load(0, rng.randrange(1, 3), table)
    pair.l1_map(table, ipa, 3, some_page(rng), MRO, young=rng.random() < 0.5, clean=rng.random() < 0.5)
    for access in rng.sample((2 | 16, 1 | 16, 2, 1, 3 | 16), 4):
        pair.fault(0, ipa, access)


def fault_huge(rng, pair):
    """Inside huge blocks: over the memory that is as large, or over the data wherever it lies in the block."""
    inside = rng.choice((0, pair.data, pair.data, pair.data + 512 * pair.page, rng.getrandbits(45) & -pair.page))
    ipa = pair.huge_ipa(rng.randrange(2), rng.randrange(2), inside + rng.randrange(512) * pair.page)
    pair.fault(rng.randrange(2), ipa, rng.choice((1, 2, 4)))


def load_more(rng, pair):
    hcr = rng.choice((0, 0, HCR_CD)) | rng.choice((0, HCR_PTW))
    s2pir = rng.choice((S2PIR, S2PIR, OTHER_S2PIR))
    pair.load(rng.randrange(2), rng.randrange(1, 4), rng.randrange(2), rng.random() < 0.9, hcr, s2pir)


def l1_map_more(rng, pair):
    """Writable-clean pages, pages that only the MMU may write, and memory of every type."""
    slot, offset, table = rng.randrange(SLOTS), rng.randrange(12), rng.randrange(2)
    level, page = rng.choice((*[3] * 20, 2, 2, 1)), some_page(rng)
    perm, memattr = rng.choice((*PERMS, *["rwx"] * 8, "rw", "w", MRO, MRO)), rng.choice((15, 15, rng.randrange(16)))
    sh, young, clean = rng.choice((3, 2, 1, 0)), rng.random() < 0.8, rng.random() < 0.6
    pair.l1_map(table, pair.ipa(slot, offset), level, page, perm, memattr, sh, young, rng.random() < 0.7, clean)


def l1_fill(rng, pair):
    """Twelve pages at the start of a slot, so that what was unmapped or turned into a block comes back."""
    slot, table = rng.randrange(SLOTS), rng.randrange(2)
    for offset in range(12):
        perm = rng.choice((*PERMS, *["rwx"] * 10, MRO, MRO, MRO))
        pair.l1_map(table, pair.ipa(slot, offset), 3, some_page(rng), perm, clean=rng.random() < 0.5)


def l1_change(rng, pair):
    """With the same page touched before and after, mostly without a TLBI."""
    slot, offset, n, table = rng.randrange(SLOTS), rng.randrange(12), rng.randrange(2), rng.randrange(2)
    ipa = pair.ipa(slot, offset)
    pair.fault(n, ipa, rng.choice((1, 2)))
    perm, memattr = rng.choice((*PERMS, "rwx", "rwx", MRO)), rng.choice((15, 15, rng.randrange(16)))
    pair.l1_change(table, ipa, perm, memattr, rng.choice((3, 3, 2, 0)), rng.random() < 0.5, rng.random() < 0.3)
    for access in rng.choices((1, 2, 4, 17, 18), k=2):
        pair.fault(n, ipa, access)


def l1_clean(rng, pair):
    pair.l1_clean(rng.randrange(2), some_ipa(rng, pair), rng.random() < 0.7)


def l1_map_huge(rng, pair):
    pair.l1_map_huge(rng.randrange(2), rng.randrange(2), rng.choice(PERMS), rng.random() < 0.7)


def host_map_memattr(rng, pair):
    pair.host_map(rng.randrange(DATA_PAGES), rng.choice(LENGTHS), memattr=rng.choice((None, *range(16))))


def host_map_huge(rng, pair):
    pair.host_map_huge()


MORE = {
    **{operation: weight // 4 for operation, weight in WEIGHTS.items() if weight >= 4},
    fault_near: 600,
    fault_huge: 50,
    mmu_write: 15,
    load_more: 40,
    l1_map_more: 100,
    l1_map: 10,
    l1_unmap: 2,
    l1_fill: 40,
    l1_clean: 40,
    l1_change: 60,
    l1_map_huge: 20,
    host_map_memattr: 8,
    host_map_huge: 3,
    log_more: 12,
    log_dirty: 10,
    dirty_log: 15,
}

SPLITTING = (host_map, unmap, protect)  # where these cannot allocate, a host block goes
TIGHT = {operation: weight for operation, weight in QUIET.items() if operation not in SPLITTING}


def prefill(rng, pair):
    """L1 maps the pages that are touched most, in both of its tables."""
    for table in (0, 1):
        for slot in range(SLOTS):
            for offset in range(12):
                pair.l1_map(table, pair.ipa(slot, offset), 3, rng.randrange(DATA_PAGES - 8), rng.choice(PERMS))


def run(rng, pair, count, after=None, mix=WEIGHTS):
    """count operations; after(n, name) is called after each."""
    operations, weights = list(mix), list(mix.values())
    for n in range(count):
        operation = rng.choices(operations, weights)[0]
        operation(rng, pair)
        if after:
            after(n, operation.__name__)
