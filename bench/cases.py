"""The operations whose instructions are counted, one function each: see ``instructions.Meter.measure``.

Every size below is small, since callgrind runs fifty times slower: no operation's count depends on how much else is
mapped, and ``scaling.py`` shows that.
"""

import numpy as np

import s2shadow as s2
from nest import BLOCK, DATA, HCR, PAGE, Nest, range_operand, scattered, u64
from s2shadow._floor import bare_unmap_each, c_fault_each, fault_each, tlbi_each, unmap_each, walk_each

CASES = {}
IPAS2E1IS = 0xD50C8020
IPAS2LE1IS = 0xD50C80A0
VMALLS12E1IS = 0xD50C83C0
RIPAS2E1IS = 0xD50C8040
LEAVES = 1 << 16


def case(function):
    CASES[function.__name__] = function
    return function


# --- walks -------------------------------------------------------------------------------------------------------


def hot_walks(measure, levels, **options):
    bed = Nest(512, levels=levels, **options)
    config = bed.config()
    ipas = bed.ipas[scattered(512)]

    def prepare(n):
        chosen = np.resize(ipas, n)
        return lambda: walk_each(bed.mem, config, chosen, s2.READ), n

    measure(prepare, 4096)


@case
def walk_3_levels(measure):
    hot_walks(measure, 3, regions=33)


@case
def walk_4_levels(measure):
    hot_walks(measure, 4, regions=33)


@case
def walk_3_levels_spread(measure):
    """The tables of each level in another region."""
    hot_walks(measure, 3, regions=31, spread=True)


@case
def walk_4_levels_spread(measure):
    hot_walks(measure, 4, regions=30, spread=True)


def batched_walks(measure, pages):
    bed = Nest(pages, levels=4, regions=33)
    config = bed.config()
    ipas = bed.ipas[scattered(pages)]
    out = np.empty(1 << 13, dtype=s2.WALK_DTYPE)

    def prepare(n):
        chosen = np.resize(ipas, n)
        return lambda: len(s2.walk_many(bed.mem, config, chosen, s2.READ, out=out[:n])), n

    measure(prepare, 4096)


@case
def walk_many_4_levels(measure):
    """All in one leaf table, as addresses in order are."""
    batched_walks(measure, 512)


@case
def walk_many_4_levels_random(measure):
    """All over 64 leaf tables."""
    batched_walks(measure, 1 << 15)


# --- shadow faults -----------------------------------------------------------------------------------------------


def single_faults(measure, n=1 << 15, order=scattered, **options):
    """All pages of an empty context, each by a fault of its own."""

    def prepare(n):
        bed = Nest(n, **options)
        ipas = bed.ipas[order(n)]
        return lambda: fault_each(bed.state, 0, ipas, s2.READ, s2.MAPPED), n

    measure(prepare, n)


def batched_faults(measure, n=1 << 15, order=scattered, **options):
    def prepare(n):
        bed = Nest(n, **options)
        ipas = bed.ipas[order(n)]
        out = np.empty(n, dtype=s2.FAULT_DTYPE)

        def run():
            bed.vm.vcpus[0].fault_many(ipas, s2.READ, out=out)
            return n

        return run, n

    measure(prepare, n)


@case
def fault_4k_random(measure):
    single_faults(measure)


@case
def fault_4k_sequential(measure):
    single_faults(measure, order=np.arange)


@case
def fault_4k_random_interval_map(measure):
    single_faults(measure, teardown="interval-map")


@case
def fault_4k_random_33_regions(measure):
    """Canonical pages all over 32 regions, the tables in another."""
    single_faults(measure, regions=33)


@case
def fault_4k_random_batch(measure):
    batched_faults(measure)


@case
def fault_4k_sequential_batch(measure):
    batched_faults(measure, order=np.arange)


@case
def fault_4k_random_33_regions_batch(measure):
    batched_faults(measure, regions=33)


def refaults(measure, bed, n, one_by_one, word=IPAS2E1IS):
    """Leaves of a full context that TLBIs dropped, all over it; the tables are there."""
    order = bed.ipas[scattered(len(bed.ipas))]
    out = np.empty(2 * n, dtype=s2.FAULT_DTYPE)

    def prepare(n):
        ipas = order[:n]
        tlbi_each(bed.state, word, ipas >> np.uint64(12), bed.vttbrs[0], bed.vtcr, HCR)
        if one_by_one:
            return lambda: fault_each(bed.state, 0, ipas, s2.READ, s2.MAPPED), n
        return lambda: len(bed.vm.vcpus[0].fault_many(ipas, s2.READ, out=out[:n])), n

    measure(prepare, n)


@case
def fault_4k_random_4g(measure):
    """Over 4 GiB: what was remembered of the last fault's way helps less than within one."""
    refaults(measure, Nest(1 << 20, track_tlbis=False).fill(), 1 << 13, one_by_one=True)


@case
def fault_4k_random_4g_batch(measure):
    refaults(measure, Nest(1 << 20, track_tlbis=False).fill(), 1 << 13, one_by_one=False)


@case
def fault_2m_random(measure):
    single_faults(measure, 1 << 12, size=BLOCK)


@case
def fault_2m_random_batch(measure):
    batched_faults(measure, 1 << 12, size=BLOCK)


def hits(measure, fault, engine):
    """``fault`` of one way, on the ``engine`` of a bed as that way takes it."""
    bed = Nest(1 << 12).fill()
    ipas = bed.ipas[scattered(1 << 12)]

    def prepare(n):
        chosen = np.resize(ipas, n)
        return lambda: fault(engine(bed), 0, chosen, s2.READ, s2.HIT), n

    measure(prepare, 2048)


@case
def fault_hit(measure):
    hits(measure, fault_each, lambda bed: bed.state)


@case
def fault_hit_c_api(measure):
    """The same through the C API's table."""
    hits(measure, c_fault_each, lambda bed: bed.vm)


# --- notifiers ---------------------------------------------------------------------------------------------------


def notifiers(measure, bed, among, leaves, unmap=unmap_each, n=256):
    """``n`` and then 2n of the pages ``among``, each unmapped by itself; ``leaves`` shadow leaves go with each."""
    picked = among[scattered(len(among))]
    parts = {n: picked[:n], 2 * n: picked[n : 3 * n]}
    assert len(parts[2 * n]) == 2 * n

    def prepare(n):
        bed.drain()
        starts = u64(parts[n])
        return lambda: unmap(bed.state, starts, bed.size), n * leaves

    measure(prepare, n)


@case
def bare_unmap(measure):
    """The bare canonical operation: a host that never heard of nesting, on the same table."""
    bed = Nest(LEAVES, load=False)
    notifiers(measure, bed, bed.canonical, 1, unmap=bare_unmap_each)


@case
def unmap_never_nested(measure):
    bed = Nest(LEAVES, load=False)
    notifiers(measure, bed, bed.canonical, 0)


@case
def unmap_1_context(measure):
    bed = Nest(LEAVES).fill()
    notifiers(measure, bed, bed.canonical, 1)


@case
def unmap_64_contexts(measure):
    bed = Nest(2048, contexts=64).fill()
    notifiers(measure, bed, bed.canonical, 1)


@case
def unmap_shared_by_8_contexts(measure):
    bed = Nest(LEAVES // 8, contexts=8, shared=True).fill()
    notifiers(measure, bed, bed.canonical, 8)


@case
def unmap_8_aliases(measure):
    bed = Nest(LEAVES // 8, aliases=8).fill()
    notifiers(measure, bed, bed.canonical, 8)


@case
def unmap_interval_map(measure):
    bed = Nest(LEAVES, teardown="interval-map").fill()
    notifiers(measure, bed, bed.canonical, 1)


@case
def unmap_interval_map_64_contexts(measure):
    """63 maps do not know the page."""
    bed = Nest(2048, contexts=64, teardown="interval-map").fill()
    notifiers(measure, bed, bed.canonical, 1)


@case
def unmap_not_shadowed(measure):
    """Eight full contexts, but none maps these pages."""
    bed = Nest(LEAVES // 8, contexts=8, unshadowed=LEAVES).fill()
    notifiers(measure, bed, bed.unshadowed, 0)


@case
def unmap_not_shadowed_beside(measure):
    """The same, on pages whose neighbours in the reverse map are shadowed."""
    bed = Nest(LEAVES)
    kinds = bed.vm.vcpus[0].fault_many(bed.ipas[::2], s2.READ)
    touched = np.isin(bed.canonical, kinds["cipa"])
    notifiers(measure, bed, bed.canonical[~touched], 0)


# --- curves ------------------------------------------------------------------------------------------------------


def curve(measure_at, *sizes):
    """A case for each size: {size: name}."""
    names = {}
    for size in sizes:
        name = f"{measure_at.__name__}_{size}"
        CASES[name] = lambda measure, size=size: measure_at(measure, size)
        names[size] = name
    return names


def notifier_contexts(measure, contexts):
    bed = Nest(LEAVES // contexts, contexts=contexts).fill()
    notifiers(measure, bed, bed.canonical, 1)


def notifier_pages(measure, pages):
    bed = Nest(pages).fill()
    notifiers(measure, bed, bed.canonical, 1)


def notifier_aliases(measure, aliases):
    bed = Nest(LEAVES // aliases, aliases=aliases).fill()
    notifiers(measure, bed, bed.canonical, aliases, n=16)


def fault_pages(measure, pages):
    """TLBIs of last-level form leave what is remembered of L1's tables: few faults among many tables tell no more of
    the way there than of the fault."""
    refaults(measure, Nest(pages).fill(), 128, one_by_one=True, word=IPAS2LE1IS)


CURVES = {
    "notifier_by_contexts": curve(notifier_contexts, 1, 4, 16, 64),
    "notifier_by_pages": curve(notifier_pages, 1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18),
    "notifier_by_aliases": curve(notifier_aliases, 1, 4, 16, 64, 256, 1024),
    "fault_by_footprint": curve(fault_pages, 1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20),
}


# --- TLBIs -------------------------------------------------------------------------------------------------------


def tlbis(measure, bed, word, operands, removed, n=1024):
    parts = {n: operands[:n], 2 * n: operands[n : 3 * n]}
    assert len(parts[2 * n]) == 2 * n

    def prepare(n):
        bed.drain()
        chosen = u64(parts[n])
        return lambda: tlbi_each(bed.state, word, chosen, bed.vttbrs[0], bed.vtcr, HCR), n * removed

    measure(prepare, n)


@case
def tlbi_ipa(measure):
    bed = Nest(LEAVES).fill()
    tlbis(measure, bed, IPAS2E1IS, bed.ipas[scattered(LEAVES)] >> np.uint64(12), 1)


@case
def tlbi_ipa_interval_map(measure):
    bed = Nest(LEAVES, teardown="interval-map").fill()
    tlbis(measure, bed, IPAS2E1IS, bed.ipas[scattered(LEAVES)] >> np.uint64(12), 1)


@case
def tlbi_ipa_not_shadowed(measure):
    """Every other page of the GiB is."""
    bed = Nest(LEAVES)
    bed.vm.vcpus[0].fault_many(bed.ipas[::2], s2.READ)
    tlbis(measure, bed, IPAS2E1IS, bed.ipas[1::2] >> np.uint64(12), 0)


@case
def tlbi_ipa_64_contexts(measure):
    bed = Nest(1024 * 4, contexts=64).fill([0])
    tlbis(measure, bed, IPAS2E1IS, bed.ipas[scattered(4096)] >> np.uint64(12), 1)


@case
def tlbi_ipa_2m(measure):
    bed = Nest(1 << 12, size=BLOCK).fill()
    tlbis(measure, bed, IPAS2E1IS, bed.ipas[scattered(1 << 12)] >> np.uint64(12), 1)


@case
def tlbi_vmalls12_empty(measure):
    bed = Nest(512)
    tlbis(measure, bed, VMALLS12E1IS, u64(np.zeros(1 << 12)), 0)


@case
def tlbi_range_per_page(measure):
    """One RIPAS2E1 over pages that are all shadowed."""
    bed = Nest(LEAVES, order=np.arange)

    def prepare(n):
        bed.fill()
        operand = u64([range_operand(0, n)])
        return lambda: tlbi_each(bed.state, RIPAS2E1IS, operand, bed.vttbrs[0], bed.vtcr, HCR), n

    measure(prepare, 1 << 13)


@case
def write_protect_per_leaf(measure):
    """``vm.host.protect`` of a range whose pages are all shadowed."""
    bed = Nest(LEAVES)

    def prepare(n):
        bed.vm.host.protect(DATA, DATA + LEAVES * PAGE, "rwx")
        bed.vm.vcpus[0].tlbi("VMALLS12E1")
        bed.fill()

        def run():
            bed.vm.host.protect(DATA, DATA + n * PAGE, "rx")
            return bed.vm.stats.live

        return run, LEAVES

    measure(prepare, 1 << 13)


# --- bytes -------------------------------------------------------------------------------------------------------


FIGURES = {}


def figure(function):
    FIGURES[function.__name__] = function
    return function


@figure
def reverse_map_bytes():
    """Bytes of heads, links and radix nodes for each 4K mapping, dense."""
    return Nest(1 << 18).fill().vm.stats.reverse_map_bytes_per_entry


def bytes_per_mapping(bed, ipas):
    """Of the canonical table, the shadow, links, heads and nodes, for each of some mappings."""
    assert (bed.vm.vcpus[0].fault_many(u64(ipas), s2.READ)["kind"] == s2.MAPPED).all()
    return bed.vm.stats.memory_bytes / len(ipas)


@figure
def bytes_dense():
    bed = Nest(1 << 18)
    return bytes_per_mapping(bed, bed.ipas)


@figure
def bytes_sparse():
    """One page of each 2 MiB of IPA, anywhere in dense canonical memory."""
    bed = Nest(1 << 18)
    return bytes_per_mapping(bed, bed.ipas[::512])


@figure
def bytes_aliased():
    """Each canonical page at eight IPAs."""
    bed = Nest(1 << 15, aliases=8)
    return bytes_per_mapping(bed, bed.ipas)
