"""Table pages and the tables made of them."""

from libc.string cimport memset

from s2shadow.arch cimport (
    DESC_TABLE, DESC_VALID, FINAL_LEVEL, decode_oa, encode_oa, largest_leaf_level, level_shift, level_span, oa_format_t,
)
from s2shadow.atomics cimport (
    bump16, cas64, fetch_add16, fetch_add64, fetch_or8, linger, load64, poke8, poke32, poke64, prefetch,
    store64,
)
from s2shadow.pageset cimport pageset_add, pageset_destroy, pageset_init, pageset_remove
from s2shadow.vmem cimport prefer_huge, refused, release, reserve

cdef extern from "sched.h" nogil:
    int sched_yield()

cdef enum:
    SMALLEST_ARENA = 1024       # pages; below this the reservation gives up
    MARKER_SHARE = 16           # one slot name in so many is a marker's


cdef void arena_unmap(arena_t *arena) noexcept nogil:
    cdef uint64_t slots = <uint64_t>arena.page_limit << arena.slot_bits
    release(arena.words, slots * 8)
    release(arena.links, <uint64_t>arena.marker_limit * 8)
    release(arena.pages, arena.page_limit * sizeof(page_t))
    pageset_destroy(&arena.leaf_tables)
    arena.words = NULL
    arena.links = NULL
    arena.pages = NULL


cdef bint arena_init(arena_t *arena, int granule_bits, const oa_format_t *oa, uint64_t table_base,
                     uint64_t address_limit, uint64_t max_bytes) noexcept nogil:
    """Reserve address space for every slot that 31 bits can name; less where the system grants less."""
    memset(arena, 0, sizeof(arena_t))
    arena.granule_bits = <uint8_t>granule_bits
    arena.slot_bits = <uint8_t>(granule_bits - 3)
    arena.slot_mask = (<uint32_t>1 << arena.slot_bits) - 1
    arena.oa = oa[0]
    arena.table_base = table_base
    arena.max_bytes = max_bytes
    arena.next_page = ROOT_PAGES            # page 0 is nil; roots stay aligned
    arena.page_limit = <uint32_t>1 << (SLOT_LIMIT_BITS - arena.slot_bits)
    if (address_limit - table_base) >> granule_bits < arena.page_limit:
        arena.page_limit = <uint32_t>((address_limit - table_base) >> granule_bits)
    arena.page_limit -= arena.page_limit / MARKER_SHARE
    while arena.page_limit >= SMALLEST_ARENA:
        arena.marker_base = arena.page_limit << arena.slot_bits
        arena.marker_limit = arena.marker_base + arena.marker_base / (MARKER_SHARE - 1)
        arena.words = <uint64_t *>reserve((<uint64_t>arena.page_limit << arena.slot_bits) * 8)
        arena.links = <uint64_t *>reserve(<uint64_t>arena.marker_limit * 8)
        arena.pages = <page_t *>reserve(arena.page_limit * sizeof(page_t))
        if (arena.words != NULL and arena.links != NULL and arena.pages != NULL
                and pageset_init(&arena.leaf_tables, arena.page_limit)):
            pthread_mutex_init(&arena.lock, NULL)
            prefer_huge(arena.words, (<uint64_t>arena.page_limit << arena.slot_bits) * 8)
            prefer_huge(arena.links, <uint64_t>arena.marker_limit * 8)
            return True
        arena_unmap(arena)
        arena.page_limit >>= 1
    return False


cdef void arena_destroy(arena_t *arena) noexcept nogil:
    if arena.words != NULL:
        arena_unmap(arena)
        pthread_mutex_destroy(&arena.lock)


cdef bint arena_charge(arena_t *arena, uint64_t *account, uint64_t bytes) noexcept nogil:
    """Take ``bytes`` from the bound; False, and nothing taken, if they are not there."""
    if arena.max_bytes and not arena.room_made and refused():
        return False
    if arena.max_bytes and fetch_add64(&arena.used_bytes, bytes) + bytes > arena.max_bytes:
        fetch_add64(&arena.used_bytes, -bytes)
        return False
    if not arena.max_bytes:
        fetch_add64(&arena.used_bytes, bytes)
    fetch_add64(account, bytes)
    return True


cdef void arena_refund(arena_t *arena, uint64_t *account, uint64_t bytes) noexcept nogil:
    fetch_add64(&arena.used_bytes, -bytes)
    fetch_add64(account, -bytes)


cdef uint64_t page_cost(const arena_t *arena) noexcept nogil:
    """Bytes of one table page with what stands beside it."""
    return (<uint64_t>1 << arena.granule_bits) + sizeof(page_t)


cdef bint arena_has_room(arena_t *arena, uint64_t pages) noexcept nogil:
    """Whether ``pages`` more table pages fit under the bound and in the arena (exclusive side only)."""
    if arena.max_bytes and load64(&arena.used_bytes) + pages * page_cost(arena) > arena.max_bytes:
        return False
    return arena.free_pages + <uint64_t>(arena.page_limit - arena.next_page) >= pages


cdef uint32_t take_page(arena_t *arena) noexcept nogil:
    """A zeroed page, or 0."""
    cdef uint32_t page
    if not arena_charge(arena, &arena.table_bytes, page_cost(arena)):
        return 0
    pthread_mutex_lock(&arena.lock)
    page = arena.free_page
    if page:
        arena.free_page = arena.pages[page].next_free
        arena.free_pages -= 1
    elif arena.next_page < arena.page_limit and (arena.room_made or not refused()):
        page = arena.next_page
        arena.next_page += 1
    pthread_mutex_unlock(&arena.lock)
    if not page:
        arena_refund(arena, &arena.table_bytes, page_cost(arena))
    return page


cdef void give_page(arena_t *arena, uint32_t page) noexcept nogil:
    """Take back a page whose words are zero. Others may look whether it is one that they remember."""
    cdef page_t *meta = &arena.pages[page]
    if meta.level == FINAL_LEVEL:
        pageset_remove(&arena.leaf_tables, page)
    if meta.has_links:
        arena_refund(arena, &arena.link_bytes, <uint64_t>8 << arena.slot_bits)
    poke64(&meta.key, 0)
    poke8(&meta.has_links, 0)
    poke32(&meta.node, 0)
    memset(meta, 0, <size_t>(<char *>&meta.has_links - <char *>meta))
    pthread_mutex_lock(&arena.lock)
    store64(&arena.freed, arena.freed + 1)
    arena.pages[page].next_free = arena.free_page
    arena.free_page = page
    arena.free_pages += 1
    pthread_mutex_unlock(&arena.lock)
    arena_refund(arena, &arena.table_bytes, page_cost(arena))


cdef uint32_t reserve_root(arena_t *arena) noexcept nogil:
    """The first of ROOT_PAGES aligned pages, or 0. Roots stay for the life of the arena; an empty one costs nothing."""
    cdef uint32_t root = arena.next_page
    if root + ROOT_PAGES > arena.page_limit or refused():
        return 0
    arena.next_page += ROOT_PAGES
    return root


cdef int start_level_for(int granule_bits, bint wide, int ia_bits) noexcept nogil:
    """The lowest table that can start a walk of ``ia_bits``, with up to 16 side by side; never below the level of the
    largest leaf, which must have a slot."""
    cdef int level = largest_leaf_level(granule_bits, False)
    if wide and ia_bits > level_shift(granule_bits, level - 1):
        level -= 1
    while ia_bits > level_shift(granule_bits, level) + granule_bits - 3 + 4:
        level -= 1
    return level


cdef inline void set_key(page_t *meta) noexcept nogil:
    """The page is in its place: whoever remembers it may believe it. Not before, when it may yet be given back."""
    store64(&meta.key, meta.ipa | page_tag(meta.context, meta.level))


cdef void table_init(arena_t *arena, table_t *table, uint32_t root, uint16_t context, int ia_bits) noexcept nogil:
    """Shape an empty table; its root pages must hold nothing."""
    cdef int shift, i
    cdef page_t *page
    cdef int smallest = level_shift(arena.granule_bits, largest_leaf_level(arena.granule_bits, False)) + 1
    if ia_bits < smallest:                  # of that start level
        ia_bits = smallest
    table.root = root
    table.context = context
    table.ia_bits = <uint8_t>ia_bits
    table.start_level = <int8_t>start_level_for(arena.granule_bits, arena.oa.wide, ia_bits)
    shift = level_shift(arena.granule_bits, table.start_level)
    table.concatenated_bits = 0
    if ia_bits > shift + arena.slot_bits:
        table.concatenated_bits = <uint8_t>(ia_bits - shift - arena.slot_bits)
    for i in range(ROOT_PAGES):
        page = &arena.pages[root + i]
        page.is_root = 1
        page.context = context
        page.level = table.start_level
        page.ipa = <uint64_t>i << (shift + arena.slot_bits)
        set_key(page)


cdef void find_together(const arena_t *arena, const table_t *table, const uint64_t *ipas, int64_t n,
                        found_t *found) noexcept nogil:
    """``table_find`` for up to FIND_TOGETHER addresses, side by side: while one descent waits for memory, others go on.
    First once as far as all share the way. Addresses beyond the input size find something within it."""
    cdef int level = table.start_level, bits = arena.slot_bits, shift = level_shift(arena.granule_bits, level)
    cdef uint64_t apart = 0, mask = ((<uint64_t>1 << table.ia_bits) - 1) >> shift, desc
    cdef uint32_t base = table.root << bits
    cdef int64_t i
    for i in range(1, n):
        apart |= ipas[i] ^ ipas[0]
    while level < FINAL_LEVEL and not apart >> shift:
        desc = load64(arena.words + (base + (ipas[0] >> shift & mask)))
        if not is_table(desc, level):
            break
        base = child_page(arena, desc) << bits
        mask = (<uint64_t>1 << bits) - 1
        shift -= bits
        level += 1
    for i in range(n):
        found.slots[i] = base + <uint32_t>(ipas[i] >> shift & mask)
        found.levels[i] = <int8_t>level
        prefetch(arena.words + found.slots[i])
    mask = (<uint64_t>1 << bits) - 1
    while level < FINAL_LEVEL:
        shift -= bits
        for i in range(n):
            desc = load64(arena.words + found.slots[i])
            if found.levels[i] == level and is_table(desc, level):
                found.slots[i] = child_page(arena, desc) << bits | <uint32_t>(ipas[i] >> shift & mask)
                found.levels[i] = <int8_t>(level + 1)
                prefetch(arena.words + found.slots[i])
        level += 1
    if apart >> shift >> bits:              # not within one leaf table
        for i in range(n):
            prefetch(arena.links + found.slots[i])


cdef bint add_table(arena_t *arena, const table_t *table, uint32_t slot, int level, uint64_t ipa,
                    uint32_t page) noexcept nogil:
    """Put an empty table into an invalid slot; False, and the page given back, if another thread was first."""
    cdef uint64_t seen = 0
    cdef page_t *meta = &arena.pages[page]
    meta.parent = slot
    meta.context = table.context
    meta.level = <int8_t>(level + 1)
    meta.ipa = ipa & ~(level_span(arena.granule_bits, level) - 1)
    linger()
    if cas64(arena.words + slot, &seen, table_desc(arena, page)):
        set_key(meta)
        entry_added(arena, page_of(arena, slot), arena.alone)
        if meta.level == FINAL_LEVEL and meta.context != CANONICAL:
            pageset_add(&arena.leaf_tables, page)
        return True
    give_page(arena, page)
    return False


cdef uint32_t table_ensure(arena_t *arena, const table_t *table, uint64_t ipa, int target, int *level) noexcept nogil:
    """Slot for ``ipa`` at ``target``, with tables made on the way; a leaf above it stops the descent (``level``
    says where). 0 when a table cannot be had."""
    cdef int shift
    cdef uint32_t slot = table_find(arena, table, ipa, level)
    cdef uint32_t page
    cdef uint64_t desc
    while level[0] < target:
        desc = load64(arena.words + slot)
        if desc == DESC_LOCKED:
            sched_yield()                   # another thread is about to put a leaf here
            continue
        if is_table(desc, level[0]):
            page = child_page(arena, desc)
        elif desc & DESC_VALID:
            return slot
        else:
            page = take_page(arena)
            if not page:
                return 0
            if not add_table(arena, table, slot, level[0], ipa, page):
                continue
        level[0] += 1
        shift = level_shift(arena.granule_bits, level[0])
        slot = page << arena.slot_bits | (<uint32_t>(ipa >> shift) & ((<uint32_t>1 << arena.slot_bits) - 1))
    if level[0] > target:                   # a table stands where the leaf should go
        level[0] = target
        page = page_of(arena, slot)
        while arena.pages[page].level > target:
            slot = arena.pages[page].parent
            page = page_of(arena, slot)
    return slot


cdef bint charge_links(arena_t *arena, page_t *meta) noexcept nogil:
    """Account for the links beside a page; False over the bound."""
    if not arena_charge(arena, &arena.link_bytes, <uint64_t>8 << arena.slot_bits):
        return False
    if fetch_or8(&meta.has_links, 1):
        arena_refund(arena, &arena.link_bytes, <uint64_t>8 << arena.slot_bits)
    return True


cdef void first_of_level(arena_t *arena, page_t *meta, int tag) noexcept nogil:
    """A page holds its first leaf of a guest level: its parents count it, as far as that is news to them."""
    while meta.parent:
        meta = &arena.pages[page_of(arena, meta.parent)]
        if fetch_add16(&meta.holds[tag], 1):
            return


cdef void root_in_use(arena_t *arena) noexcept nogil:
    """A root shows in the bytes from its first entry; the bound was charged for all roots when the arena was made."""
    fetch_add64(&arena.table_bytes, page_cost(arena))


cdef void holds_less(arena_t *arena, page_t *meta, int tag) noexcept nogil:
    while bump16(&meta.holds[tag], <uint16_t>-1) == 1 and meta.parent:
        meta = &arena.pages[page_of(arena, meta.parent)]


cdef bint entry_removed(arena_t *arena, uint32_t page) noexcept nogil:
    """Count one valid entry less, and free tables that are empty now, upwards; True if one was."""
    cdef page_t *meta = &arena.pages[page]
    cdef uint32_t parent
    cdef bint freed = False
    while bump16(&meta.live, <uint16_t>-1) == 1:
        if meta.is_root:
            fetch_add64(&arena.table_bytes, -page_cost(arena))
            if meta.has_links:
                meta.has_links = 0
                arena_refund(arena, &arena.link_bytes, <uint64_t>8 << arena.slot_bits)
            return freed
        freed = True
        parent = meta.parent
        store64(arena.words + parent, 0)
        give_page(arena, page)
        page = page_of(arena, parent)
        meta = &arena.pages[page]
    return freed


cdef bint last_leaf_removed(arena_t *arena, uint32_t page, int tag) noexcept nogil:
    """Count a page's last leaf of one guest level less; the page goes if it is empty now, True if so."""
    holds_less(arena, &arena.pages[page], tag)
    return entry_removed(arena, page)


cdef void leaves_removed(arena_t *arena, uint32_t page, const uint16_t *counts) noexcept nogil:
    """Count the leaves of a pinned page that were cleared, by guest level + 2 (exclusive side)."""
    cdef page_t *meta = &arena.pages[page]
    cdef uint16_t all = 0
    cdef int tag
    for tag in range(GUEST_LEVELS):
        if counts[tag]:
            all += counts[tag]
            bump16(&meta.holds[tag], 1 - counts[tag])
            holds_less(arena, meta, tag)
    bump16(&meta.live, -all)


cdef void pin_page(arena_t *arena, uint32_t page) noexcept nogil:
    """Keep a page that is not empty while its leaves are being removed."""
    bump16(&arena.pages[page].live, 1)


cdef bint unpin_page(arena_t *arena, uint32_t page) noexcept nogil:
    """Let go of a page; it is freed if it is empty now, True if so."""
    return entry_removed(arena, page)


cdef bint table_tidy(arena_t *arena, const table_t *table, uint64_t ipa) noexcept nogil:
    """Free the empty tables that a failed ``table_ensure`` left on the way to ``ipa`` (exclusive side); True if any."""
    cdef int level = 0
    cdef uint32_t page = page_of(arena, table_find(arena, table, ipa, &level))
    if arena.pages[page].live == 0 and not arena.pages[page].is_root:
        pin_page(arena, page)
        return unpin_page(arena, page)
    return False


cdef uint32_t split_block(arena_t *arena, uint32_t slot, int level) noexcept nogil:
    """Replace a canonical block by a table of leaves of the next size (exclusive side); the page, or 0."""
    cdef uint64_t desc = load64(arena.words + slot), step, i, pa = decode_oa(&arena.oa, desc)
    cdef uint64_t entries = <uint64_t>1 << arena.slot_bits
    cdef uint32_t page = take_page(arena)
    cdef page_t *meta
    if not page:
        return 0
    meta = &arena.pages[page]
    meta.parent = slot
    meta.context = arena.pages[page_of(arena, slot)].context
    meta.level = <int8_t>(level + 1)
    meta.ipa = slot_ipa(arena, slot)
    set_key(meta)
    meta.live = <uint16_t>entries
    meta.holds[0] = <uint16_t>entries       # the parent's count stays: one leaf less, one child more
    step = level_span(arena.granule_bits, level + 1)
    desc &= ~encode_oa(&arena.oa, ~<uint64_t>0)
    if level + 1 == FINAL_LEVEL:
        desc |= DESC_TABLE
    for i in range(entries):
        store64(arena.words + ((<uint64_t>page << arena.slot_bits) + i),
                desc | encode_oa(&arena.oa, pa + i * step))
    store64(arena.words + slot, table_desc(arena, page))
    return page


cdef void drop_page_whole(arena_t *arena, uint32_t page) noexcept nogil:
    """Free a table of leaves without looking at them (exclusive side; nothing may link to them)."""
    cdef page_t *meta = &arena.pages[page]
    cdef uint32_t parent = meta.parent
    cdef int tag
    memset(arena.words + (<uint64_t>page << arena.slot_bits), 0, <size_t>8 << arena.slot_bits)
    for tag in range(GUEST_LEVELS):
        if meta.holds[tag]:
            holds_less(arena, &arena.pages[page_of(arena, parent)], tag)
    store64(arena.words + parent, 0)
    give_page(arena, page)
    entry_removed(arena, page_of(arena, parent))


cdef uint32_t next_leaf(const arena_t *arena, const table_t *table, uint64_t *ipa, uint64_t end,
                        int *level) noexcept nogil:
    """First leaf whose block reaches beyond ``ipa`` and starts below ``end``, or 0; ``ipa`` becomes its start."""
    cdef uint32_t slot
    cdef uint64_t span
    while ipa[0] < end:
        slot = table_find(arena, table, ipa[0], level)
        span = level_span(arena.granule_bits, level[0])
        if load64(arena.words + slot) & DESC_VALID:
            ipa[0] &= ~(span - 1)
            return slot
        ipa[0] = (ipa[0] & ~(span - 1)) + span
    return 0
