"""Leaves, tables and contexts as they are at one moment."""

from libc.string cimport memcpy

from s2shadow.arch cimport (
    DESC_AF, DESC_MEMATTR_SHIFT, FINAL_LEVEL, LEVEL_STAGE2_OFF, SH_ISH, decode_oa, decode_sh, level_span,
    s2ap_xn_to_perm,
)
from s2shadow.atomics cimport load64
from s2shadow.context cimport context_entries, context_table_bytes
from s2shadow.intervals cimport UNKNOWN_IPA, interval_t, intervals_find
from s2shadow.leaf cimport find_cipa
from s2shadow.lock cimport lock_exclusive, lock_shared_other, unlock_exclusive, unlock_shared_other
from s2shadow.rmap cimport is_marker, link_next, rmap_find
from s2shadow.table cimport child_page, is_table, leaf_after, next_leaf, page_of, page_t, slot_ipa
from s2shadow.vm cimport context_t, read_tag


cdef int64_t list_rows(vm_t *vm, listing_t what, uint64_t of, void *rows, uint64_t room) noexcept nogil:
    """How many rows there are, of which the first ``room`` are written; -1 for a context that never was."""
    cdef int64_t n = -1
    if what == LIST_HOST or what == LIST_REVERSE:
        lock_shared_other(&vm.lock)
        if what == LIST_HOST:
            n = host_rows(vm, <host_row_t *>rows, room)
        else:
            n = reverse_rows(vm, of, <reverse_row_t *>rows, room)
        unlock_shared_other(&vm.lock)
        return n
    lock_exclusive(&vm.lock)                # a shadow's cIPAs may want markers
    if is_context(vm, of):
        if what == LIST_SHADOW:
            n = shadow_rows(vm, &vm.contexts[of], <shadow_row_t *>rows, room)
        else:
            n = interval_rows(&vm.contexts[of], <interval_row_t *>rows, room)
    unlock_exclusive(&vm.lock)
    return n


cdef inline bint is_context(const vm_t *vm, uint64_t index) noexcept nogil:
    return index < vm.context_count and vm.contexts[index].generation != 0


cdef int64_t host_rows(const vm_t *vm, host_row_t *rows, uint64_t room) noexcept nogil:
    cdef uint64_t at = 0, end = <uint64_t>1 << vm.canonical.ia_bits, desc, span, n = 0
    cdef int level = 0
    cdef uint32_t slot = next_leaf(&vm.arena, &vm.canonical, &at, end, &level)
    while slot:
        span = level_span(vm.arena.granule_bits, level)
        if n < room:
            desc = load64(vm.arena.words + slot)
            rows[n].cipa = at
            rows[n].size = span
            rows[n].pa = decode_oa(&vm.arena.oa, desc) & ~(span - 1)
            rows[n].perm = s2ap_xn_to_perm(desc, True)
            rows[n].memattr = <uint8_t>(desc >> DESC_MEMATTR_SHIFT & 0xF)
        at += span
        n += 1
        slot = leaf_after(&vm.arena, &vm.canonical, slot, &at, end, &level)
    return n


cdef int64_t shadow_rows(vm_t *vm, const context_t *context, shadow_row_t *rows, uint64_t room) noexcept nogil:
    cdef uint64_t at = 0, end = <uint64_t>1 << context.shadow.ia_bits, n = 0
    cdef int level = 0
    cdef uint32_t slot = next_leaf(&vm.arena, &context.shadow, &at, end, &level)
    while slot:
        if n < room:
            describe(vm, slot, level, at, rows + n)
            find_cipa(vm, slot, True, &rows[n].cipa)
        at += level_span(vm.arena.granule_bits, level)
        n += 1
        slot = leaf_after(&vm.arena, &context.shadow, slot, &at, end, &level)
    return n


cdef void describe(const vm_t *vm, uint32_t slot, int level, uint64_t ipa, shadow_row_t *row) noexcept nogil:
    cdef uint64_t desc = load64(vm.arena.words + slot)
    row.ipa = ipa
    row.size = level_span(vm.arena.granule_bits, level)
    row.pa = decode_oa(&vm.arena.oa, desc) & ~(row.size - 1)
    row.desc = desc
    row.perm = s2ap_xn_to_perm(desc, True)
    row.memattr = <uint8_t>(desc >> DESC_MEMATTR_SHIFT & 0xF)
    row.sh = decode_sh(&vm.arena.oa, desc, SH_ISH)
    row.young = (desc & DESC_AF) != 0
    row.level = <int8_t>level
    row.guest_level = <int8_t>(<int>read_tag(desc) + LEVEL_STAGE2_OFF)


cdef int64_t reverse_rows(const vm_t *vm, uint64_t cipa, reverse_row_t *rows, uint64_t room) noexcept nogil:
    cdef uint64_t n = 0
    cdef uint32_t head, slot
    cdef int level
    for level in range(vm.rmap.nodes[vm.rmap.root].level, FINAL_LEVEL + 1):
        head = rmap_find(&vm.rmap, cipa, level)
        slot = vm.rmap.heads[head] if head else 0
        while slot:
            if not is_marker(&vm.rmap, slot):
                if n < room:
                    rows[n].ipa = slot_ipa(&vm.arena, slot)
                    rows[n].size = level_span(vm.arena.granule_bits, level)
                    rows[n].context = vm.arena.pages[page_of(&vm.arena, slot)].context
                n += 1
            slot = link_next(&vm.arena, slot)[0]
    return n


cdef int64_t interval_rows(const context_t *context, interval_row_t *rows, uint64_t room) noexcept nogil:
    cdef interval_t found
    cdef uint64_t at = 0, n = 0
    while intervals_find(context.intervals, at, ~<uint64_t>0, &found):
        if n < room:
            rows[n].start = found.start
            rows[n].end = found.end
            rows[n].unknown = found.ipa == UNKNOWN_IPA
            rows[n].ipa = 0 if rows[n].unknown else found.ipa
        at = found.end
        n += 1
    return n


cdef int64_t list_tables(vm_t *vm, int64_t context, uint64_t *addresses, uint8_t *contents,
                         uint64_t room) noexcept nogil:
    """Table pages of a context, or of the host (-1), parents first: how many there are, of which the first ``room`` are
    written; -1 for a context that never was."""
    cdef const table_t *table = &vm.canonical
    cdef uint64_t n = 0
    cdef uint32_t i
    lock_exclusive(&vm.lock)
    if context >= 0:
        table = &vm.contexts[context].shadow if is_context(vm, context) else NULL
    if table != NULL:
        for i in range(<uint32_t>1 << table.concatenated_bits):
            n = copy_pages(vm, table.root + i, n, addresses, contents, room)
    unlock_exclusive(&vm.lock)
    return -1 if table == NULL else <int64_t>n


cdef uint64_t copy_pages(const vm_t *vm, uint32_t page, uint64_t n, uint64_t *addresses, uint8_t *contents,
                         uint64_t room) noexcept nogil:
    cdef const page_t *meta = &vm.arena.pages[page]
    cdef const uint64_t *words = vm.arena.words + (<uint64_t>page << vm.arena.slot_bits)
    cdef uint64_t i, granule = <uint64_t>1 << vm.arena.granule_bits
    if n < room:
        addresses[n] = vm.arena.table_base + page * granule
        memcpy(contents + n * granule, words, granule)
    n += 1
    if meta.level == FINAL_LEVEL or not meta.live:
        return n
    for i in range(<uint64_t>1 << vm.arena.slot_bits):
        if is_table(words[i], meta.level):
            n = copy_pages(vm, child_page(&vm.arena, words[i]), n, addresses, contents, room)
    return n


cdef uint32_t list_contexts(vm_t *vm, context_row_t *rows) noexcept nogil:
    """The contexts that have a key, in order; there must be room for all of the pool."""
    cdef uint32_t i, n = 0
    lock_shared_other(&vm.lock)
    for i in range(vm.context_count):
        if vm.contexts[i].valid:
            fill_context(vm, i, rows + n)
            n += 1
    unlock_shared_other(&vm.lock)
    return n


cdef void list_context(vm_t *vm, uint32_t index, context_row_t *row) noexcept nogil:
    lock_shared_other(&vm.lock)
    fill_context(vm, index, row)
    unlock_shared_other(&vm.lock)


cdef void fill_context(const vm_t *vm, uint32_t index, context_row_t *row) noexcept nogil:
    cdef const context_t *context = &vm.contexts[index]
    row.shadow = context.shadow
    row.vttbr = context.vttbr
    row.vtcr = context.vtcr
    row.entries = context_entries(vm, context)
    row.table_bytes = context_table_bytes(vm, context)
    row.index = index
    row.refs = context.refs
    row.vmid = context.config.vmid
    row.enabled = context.config.enabled
