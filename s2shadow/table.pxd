# Host-format stage-2 tables on an arena of table pages. The canonical table and every shadow are this one type.
#
# A slot is the 32-bit name of one entry: page << slot_bits | index. Slot names are also how the reverse map
# names a leaf. Page 0 is nil.

from libc.stdint cimport int64_t, int8_t, uint8_t, uint16_t, uint32_t, uint64_t

from s2shadow.arch cimport DESC_TABLE, DESC_VALID, FINAL_LEVEL, OA_48, encode_oa, level_shift, oa_format_t
from s2shadow.atomics cimport bump16, fetch_add16, load64, peek8, peek64, store64
from s2shadow.pageset cimport pageset_t

cdef enum:
    SLOT_LIMIT_BITS = 31        # bit 31 of a link tags a reverse-map head
    GUEST_LEVELS = 6            # -2 (stage 2 off) to 3, indexed by level + 2
    CANONICAL = 0xFFFF          # "context" of the canonical table's pages
    ROOT_PAGES = 16             # the most tables that may stand side by side
    DESC_LOCKED = 2             # invalid to a walker: a thread is putting a leaf into this slot

cdef extern from "pthread.h" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *mutex, void *attributes)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)

# Beside each table page. ``holds[g]`` counts the page's own leaves of guest level g plus its children that hold
# any, so that a level that is absent is skipped at the root.
ctypedef struct page_t:
    uint64_t ipa                # input address of the first entry
    uint32_t parent             # slot in the parent, 0 for a root
    uint32_t next_free
    uint16_t live               # valid entries
    uint16_t holds[GUEST_LEVELS]
    uint16_t context
    int8_t level
    uint8_t is_root
    # From here on atomic: looked at by whoever remembers the page, whatever has become of it.
    uint8_t has_links           # a leaf was installed: its links are accounted for
    uint32_t node               # canonical pages: the reverse-map node of the same block when last seen, or 0
    uint64_t key                # ipa and page_tag, once the page is where they say

ctypedef struct arena_t:
    uint64_t *words             # the table pages: entry words, indexed by slot
    uint64_t *links             # next and prev of a shadow leaf, indexed by slot
    page_t *pages
    oa_format_t oa
    uint64_t table_base         # simulated physical address of page 0
    uint64_t max_bytes          # of tables, links and heads; 0: no bound
    uint64_t used_bytes         # what max_bytes bounds
    uint64_t table_bytes
    uint64_t link_bytes
    uint64_t rmap_bytes
    uint32_t slot_mask          # the index of an entry in its page
    uint32_t page_limit
    uint32_t marker_base        # slot names from here on are reverse-map markers: links, but no table entry
    uint32_t marker_limit
    uint32_t next_page          # pages from here on were never used
    uint32_t free_page          # head of the free list; free pages are zero
    uint32_t free_pages
    pageset_t leaf_tables       # shadow tables of the last level: what eviction takes in turn
    uint64_t freed              # counts pages given back: what was remembered of tables may be wrong
    uint8_t granule_bits
    uint8_t slot_bits
    uint8_t alone               # one vCPU: nobody else is on the shared side, and counters need no locked instruction
    uint8_t room_made           # the exclusive side saw to it that all that it will take is there
    uint8_t keeps_links         # shadow leaves have links (reverse map) or a cIPA (none) beside them
    pthread_mutex_t lock

# The way of the last lookup, for the next one that shares a part of it. Good until a table page is freed.
ctypedef struct table_path_t:
    uint64_t ipa
    uint64_t freed              # arena.freed when it was learnt
    uint32_t pages[5]           # by level + 1; not the start level
    int8_t level                # the deepest page that is known

ctypedef struct table_t:
    uint32_t root               # first of the pages side by side
    uint16_t context
    uint8_t ia_bits
    uint8_t concatenated_bits
    int8_t start_level

cdef enum:
    FIND_TOGETHER = 32

# Where the descents for some addresses end: a leaf, an invalid entry, or what was one of them when it was looked at.
ctypedef struct found_t:
    uint32_t slots[FIND_TOGETHER]
    int8_t levels[FIND_TOGETHER]

cdef bint arena_init(arena_t *arena, int granule_bits, const oa_format_t *oa, uint64_t table_base,
                     uint64_t address_limit, uint64_t max_bytes) noexcept nogil
cdef void arena_destroy(arena_t *arena) noexcept nogil
cdef bint arena_charge(arena_t *arena, uint64_t *account, uint64_t bytes) noexcept nogil
cdef void arena_refund(arena_t *arena, uint64_t *account, uint64_t bytes) noexcept nogil
cdef bint arena_has_room(arena_t *arena, uint64_t pages) noexcept nogil
cdef uint64_t page_cost(const arena_t *arena) noexcept nogil

cdef uint32_t reserve_root(arena_t *arena) noexcept nogil
cdef void table_init(arena_t *arena, table_t *table, uint32_t root, uint16_t context, int ia_bits) noexcept nogil
cdef uint32_t table_ensure(arena_t *arena, const table_t *table, uint64_t ipa, int target, int *level) noexcept nogil
cdef void find_together(const arena_t *arena, const table_t *table, const uint64_t *ipas, int64_t n,
                        found_t *found) noexcept nogil
cdef bint charge_links(arena_t *arena, page_t *meta) noexcept nogil
cdef void first_of_level(arena_t *arena, page_t *meta, int tag) noexcept nogil
cdef void root_in_use(arena_t *arena) noexcept nogil
cdef bint last_leaf_removed(arena_t *arena, uint32_t page, int tag) noexcept nogil
cdef void leaves_removed(arena_t *arena, uint32_t page, const uint16_t *counts) noexcept nogil
cdef bint table_tidy(arena_t *arena, const table_t *table, uint64_t ipa) noexcept nogil
cdef void pin_page(arena_t *arena, uint32_t page) noexcept nogil
cdef bint unpin_page(arena_t *arena, uint32_t page) noexcept nogil
cdef uint32_t split_block(arena_t *arena, uint32_t slot, int level) noexcept nogil
cdef void drop_page_whole(arena_t *arena, uint32_t page) noexcept nogil
cdef uint32_t next_leaf(const arena_t *arena, const table_t *table, uint64_t *ipa, uint64_t end,
                        int *level) noexcept nogil


cdef inline uint32_t page_of(const arena_t *arena, uint32_t slot) noexcept nogil:
    return slot >> arena.slot_bits


cdef inline uint64_t page_tag(uint32_t context, int level) noexcept nogil:
    """What stands in a page's key below its address: tables start at multiples of 2 MiB at least. Never 0."""
    return <uint64_t>context << 3 | <uint64_t>(level + 2)


cdef inline bint is_page_of(const page_t *page, uint64_t ipa, uint64_t tag) noexcept nogil:
    """Whether a page that was remembered still is the table that starts at ``ipa`` and has this tag."""
    return load64(&page.key) == (ipa | tag)


cdef inline uint64_t slot_ipa(const arena_t *arena, uint32_t slot) noexcept nogil:
    cdef const page_t *page = &arena.pages[slot >> arena.slot_bits]
    cdef uint64_t index = slot & arena.slot_mask
    return page.ipa + (index << level_shift(arena.granule_bits, page.level))


cdef extern from *:
    """
    #include <string.h>
    /* whether a page holds leaves of guest levels -2 to 1: the first four counters at once */
    static inline int s2_holds_large(const uint16_t *holds) { uint64_t w; memcpy(&w, holds, 8); return w != 0; }
    static inline int s2_lowest(unsigned bits) { return __builtin_ctz(bits); }
    """
    bint holds_large "s2_holds_large"(const uint16_t *holds) noexcept nogil
    int lowest_bit "s2_lowest"(unsigned int bits) noexcept nogil           # of a number that is not 0


cdef inline uint8_t held_tags(const page_t *page) noexcept nogil:
    """The guest levels (bit level + 2) of which there are leaves in a page or below."""
    cdef uint8_t tags = <uint8_t>((page.holds[4] != 0) << 4 | (page.holds[5] != 0) << 5)
    cdef int tag
    if holds_large(page.holds):
        for tag in range(4):
            tags |= <uint8_t>((page.holds[tag] != 0) << tag)
    return tags


cdef inline bint is_table(uint64_t desc, int level) noexcept nogil:
    return (desc & 3) == 3 and level < FINAL_LEVEL


cdef inline uint32_t child_page(const arena_t *arena, uint64_t desc) noexcept nogil:
    # The arena is far smaller than 2^48: bits 47:12 of the difference are enough, in every format.
    return <uint32_t>(((desc - arena.table_base) & OA_48) >> arena.granule_bits)


cdef inline uint64_t table_desc(const arena_t *arena, uint32_t page) noexcept nogil:
    return encode_oa(&arena.oa, arena.table_base + (<uint64_t>page << arena.granule_bits)) | DESC_VALID | DESC_TABLE


cdef inline uint32_t table_find(const arena_t *arena, const table_t *table, uint64_t ipa, int *level) noexcept nogil:
    """Slot where the descent for ``ipa`` ends: a leaf or an invalid entry, at ``level``."""
    cdef int shift = level_shift(arena.granule_bits, table.start_level)
    cdef uint32_t slot = (table.root << arena.slot_bits) + <uint32_t>(ipa >> shift)
    cdef uint32_t mask = arena.slot_mask
    cdef uint64_t desc
    level[0] = table.start_level
    while level[0] < FINAL_LEVEL:
        desc = load64(arena.words + slot)   # what the table page says of itself comes with it
        if (desc & 3) != 3:
            break
        level[0] += 1
        shift -= arena.slot_bits
        slot = child_page(arena, desc) << arena.slot_bits | (<uint32_t>(ipa >> shift) & mask)
    return slot


cdef inline uint32_t table_find_near(const arena_t *arena, const table_t *table, table_path_t *path, uint64_t ipa,
                                     int *level) noexcept nogil:
    """``table_find``, from the deepest page that it shares with the last lookup by ``path``."""
    cdef int at = table.start_level, shift
    cdef uint32_t slot, page, mask = arena.slot_mask
    cdef uint64_t apart, desc, freed = peek64(&arena.freed)
    if path.freed == freed:
        at = path.level
    path.freed = freed
    shift = level_shift(arena.granule_bits, at)
    apart = (ipa ^ path.ipa) >> arena.slot_bits
    while at > table.start_level and apart >> shift:
        at -= 1
        shift += arena.slot_bits
    if at > table.start_level:
        slot = path.pages[at + 1] << arena.slot_bits | (<uint32_t>(ipa >> shift) & mask)
    else:
        slot = (table.root << arena.slot_bits) + <uint32_t>(ipa >> shift)
    while at < FINAL_LEVEL:
        desc = load64(arena.words + slot)   # what the table page says of itself comes with it
        if (desc & 3) != 3:
            break
        at += 1
        shift -= arena.slot_bits
        page = child_page(arena, desc)
        path.pages[at + 1] = page
        slot = page << arena.slot_bits | (<uint32_t>(ipa >> shift) & mask)
    path.ipa = ipa
    path.level = <int8_t>at
    level[0] = at
    return slot


cdef inline void forget_path(table_path_t *path) noexcept nogil:
    path.freed = ~<uint64_t>0


cdef inline uint16_t count16(uint16_t *counter, bint alone) noexcept nogil:
    """One more, on the shared side; what it was before. ``alone``: of the arena, here and below, so that a caller that
    knows it pays for no test."""
    return bump16(counter, 1) if alone else fetch_add16(counter, 1)


cdef inline bint links_ensure(arena_t *arena, uint32_t slot) noexcept nogil:
    """Account for the links beside a page before its first leaf; False over the bound."""
    cdef page_t *meta = &arena.pages[page_of(arena, slot)]
    return peek8(&meta.has_links) or not arena.keeps_links or charge_links(arena, meta)


cdef inline void entry_added(arena_t *arena, uint32_t page, bint alone) noexcept nogil:
    """Count one more valid entry."""
    cdef page_t *meta = &arena.pages[page]
    if count16(&meta.live, alone) == 0 and meta.is_root:
        root_in_use(arena)


cdef inline void leaf_added(arena_t *arena, uint32_t slot, int tag, bint alone) noexcept nogil:
    """Count the leaf that is being put into ``slot``. ``tag``: guest level + 2."""
    cdef uint32_t page = page_of(arena, slot)
    cdef page_t *meta = &arena.pages[page]
    entry_added(arena, page, alone)
    if count16(&meta.holds[tag], alone) == 0:
        first_of_level(arena, meta, tag)


cdef inline bint leaf_removed(arena_t *arena, uint32_t slot, int tag) noexcept nogil:
    """Clear a leaf's slot and what counted it; empty tables go (exclusive side), True if one did."""
    cdef uint32_t page = page_of(arena, slot)
    cdef page_t *meta = &arena.pages[page]
    store64(arena.words + slot, 0)
    if meta.holds[tag] > 1:                 # so is ``live``
        bump16(&meta.holds[tag], <uint16_t>-1)
        bump16(&meta.live, <uint16_t>-1)
        return False
    return last_leaf_removed(arena, page, tag)


cdef inline uint32_t leaf_after(const arena_t *arena, const table_t *table, uint32_t slot, uint64_t *ipa, uint64_t end,
                                int *level) noexcept nogil:
    """``next_leaf`` where ``slot``, of ``level``, ends at ``ipa``: mostly its neighbour."""
    slot += 1
    if level[0] == FINAL_LEVEL and slot & arena.slot_mask and ipa[0] < end:
        if peek64(arena.words + slot) & DESC_VALID:
            return slot
    return next_leaf(arena, table, ipa, end, level)
