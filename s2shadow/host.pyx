"""The canonical stage 2 and its changes (spec 04, section 5; spec 02, section 7).

Long removals work in chunks: their range is registered, faults in it answer RETRY, and the lock is let go between
chunks. What changes one host leaf at a time is whole at every moment and needs no registration.

What each policy does with the shadows: with the reverse map, only leaves over the range are touched. An interval map
finds the leaves to remove, and knows no more than that: like Linux, which the proposal leaves as it is there, taking
permissions narrows every leaf of every context, and aging looks at the host's leaves. Without either, removing too is
done to every leaf.
"""


from s2shadow.arch cimport (
    ACCESS_WRITE, DESC_AF, DESC_HOST_W, DESC_MEMATTR_SHIFT, DESC_S2AP_R, DESC_S2AP_W, DESC_VALID, DESC_XN, FINAL_LEVEL,
    PERM_ALL, SH_ISH, decode_oa, decode_sh, largest_leaf_level, leaf_level_within, level_span, perm_to_s2ap_xn,
    s2ap_xn_to_perm,
)
from s2shadow.atomics cimport fetch_or64, load32, load64, store64
from s2shadow.combine cimport leaf_desc
from s2shadow.dirty cimport clear_dirty, dirty_any_logged, dirty_next, dirty_set_range, mark_dirty
from s2shadow.leaf cimport (
    OP_AGE, OP_DROP, OP_NARROW, cursor_init, cursor_t, drop_everything, drop_list, evict, mark_young,
    visit_canonical, visit_context, visit_init, visit_lists, visit_t,
)
from s2shadow.lock cimport breathe, lock_exclusive, unlock_exclusive
from s2shadow.memory cimport region_t
from s2shadow.owed cimport owed_begin, owed_end
from s2shadow.rmap cimport rmap_find
from s2shadow.table cimport (
    arena_has_room, leaf_added, leaf_after, next_leaf, split_block, table_ensure, table_find, table_tidy,
)
from s2shadow.vm cimport (
    ACTIVE_RANGES, CHANGES_KEPT, DROP_CHUNK, NO_CONTEXT, TEARDOWN_INTERVAL_MAP, TEARDOWN_REVERSE_MAP,
    kernel_steps_per_context, note_change, overlaps_active, range_t, vm_t,
)
from s2shadow.vmem cimport refused


cdef enum:
    ROUNDS = 16                 # of making way for a mapping with others let in


cdef inline bint has_reverse_map(const vm_t *vm) noexcept nogil:
    return vm.teardown == TEARDOWN_REVERSE_MAP


cdef inline bint drops_by_range(const vm_t *vm) noexcept nogil:
    """Whether a removal finds its leaves; else it takes all."""
    return vm.teardown == TEARDOWN_REVERSE_MAP or vm.teardown == TEARDOWN_INTERVAL_MAP


cdef inline uint8_t granted_perm(uint64_t desc) noexcept nogil:
    """What the host grants, also while dirty logging withholds W."""
    cdef uint8_t perm = s2ap_xn_to_perm(desc, True)
    return perm | ACCESS_WRITE if desc & DESC_HOST_W else perm


cdef bint changed_since(const vm_t *vm, uint64_t seq, uint64_t start, uint64_t end) noexcept nogil:
    """Whether the host changed anything in [start, end) after ``seq``; unknown counts as yes."""
    cdef uint64_t i
    if vm.host_seq - seq > CHANGES_KEPT:
        return True
    for i in range(seq + 1, vm.host_seq + 1):
        if vm.changes[i % CHANGES_KEPT].start < end and start < vm.changes[i % CHANGES_KEPT].end:
            return True
    return False


cdef inline void begin(vm_t *vm, uint64_t start, uint64_t end, change_t *change) noexcept nogil:
    lock_exclusive(&vm.lock)
    change.dropped = 0
    change.work = 0
    owed_begin(&vm.owed)
    vm.invalidations += 1
    note_change(vm, start, end)


cdef inline void finish(vm_t *vm, change_t *change) noexcept nogil:
    """The ticket is the newest number: rows that were owed after a breath may have got a later one than the first."""
    owed_end(&vm.owed)
    change.ticket = vm.owed.seq
    unlock_exclusive(&vm.lock)


cdef bint register_active(vm_t *vm, uint64_t start, uint64_t end) noexcept nogil:
    """Announce that [start, end) is being worked on; False if too many are, and the work must be done at once."""
    if vm.active_count == ACTIVE_RANGES:
        return False
    vm.active[vm.active_count].start = start
    vm.active[vm.active_count].end = end
    vm.active_count += 1
    return True


cdef void count_kernel_steps(vm_t *vm) noexcept nogil:
    cdef uint32_t i
    for i in range(vm.contexts_used):
        if vm.contexts[i].valid:
            vm.kernel_steps += kernel_steps_per_context(vm)


cdef void forget_active(vm_t *vm, uint64_t start, uint64_t end) noexcept nogil:
    """Others may have come and gone meanwhile: find our range by its bounds."""
    cdef uint32_t i
    for i in range(vm.active_count):
        if vm.active[i].start == start and vm.active[i].end == end:
            vm.active_count -= 1
            vm.active[i] = vm.active[vm.active_count]
            return


cdef void drop_shadows_at_once(vm_t *vm, uint64_t start, uint64_t end) noexcept nogil:
    cdef visit_t visit
    if not drops_by_range(vm):
        drop_everything(vm)
        return
    visit_init(&visit, OP_DROP, start, end)
    visit_canonical(vm, &visit)


cdef void remove_host_leaves(vm_t *vm, uint64_t start, uint64_t end) noexcept nogil:
    """Remove the host leaves of a range that has no shadows left; they begin and end at its bounds."""
    cdef int level = 0
    cdef uint64_t at = start
    cdef uint32_t slot = next_leaf(&vm.arena, &vm.canonical, &at, end, &level)
    while slot:
        remove_host_leaf(vm, slot)
        at += level_span(vm.arena.granule_bits, level)
        slot = next_leaf(&vm.arena, &vm.canonical, &at, end, &level)


cdef bint split_host_block(vm_t *vm, uint32_t slot, int level) noexcept nogil:
    """Split a host block, evicting shadows for the table; False when even that does not help."""
    while not split_block(&vm.arena, slot, level):
        if not evict(vm, NO_CONTEXT, 0):
            return False
    vm.canonical_leaves += (<uint64_t>1 << vm.arena.slot_bits) - 1
    return True


cdef uint64_t widen_start(vm_t *vm, uint64_t start) noexcept nogil:
    """Start of the host block that ``start`` lies inside, or ``start``."""
    cdef int level = 0
    cdef uint32_t slot = table_find(&vm.arena, &vm.canonical, start, &level)
    if load64(vm.arena.words + slot) & DESC_VALID:
        return start & ~(level_span(vm.arena.granule_bits, level) - 1)
    return start


cdef uint64_t widen_end(vm_t *vm, uint64_t end) noexcept nogil:
    cdef int level = 0
    cdef uint32_t slot
    if end >> vm.canonical.ia_bits:
        return end
    slot = table_find(&vm.arena, &vm.canonical, end - 1, &level)
    if load64(vm.arena.words + slot) & DESC_VALID:
        return ((end - 1) | (level_span(vm.arena.granule_bits, level) - 1)) + 1
    return end


cdef bint split_at(vm_t *vm, uint64_t address) noexcept nogil:
    """Split the host block that ``address`` lies strictly inside until it is a boundary. False: no page for a table.

    Shadow leaves as large as a block that is split must be gone.
    """
    cdef int level = 0
    cdef uint32_t slot
    if address >> vm.canonical.ia_bits:
        return True
    while True:
        slot = table_find(&vm.arena, &vm.canonical, address, &level)
        if not load64(vm.arena.words + slot) & DESC_VALID:
            return True
        if not address & (level_span(vm.arena.granule_bits, level) - 1):
            return True
        if not split_host_block(vm, slot, level):
            return False


cdef uint64_t chunk_end(vm_t *vm, uint64_t start, uint64_t end) noexcept nogil:
    """Where a chunk of host leaves that starts at ``start`` ends; ``end`` when that is all."""
    cdef uint64_t at = start
    cdef int level = 0, _leaf
    cdef uint32_t slot = next_leaf(&vm.arena, &vm.canonical, &at, end, &level)
    for _leaf in range(DROP_CHUNK):
        if not slot:
            return end
        at += level_span(vm.arena.granule_bits, level)
        slot = leaf_after(&vm.arena, &vm.canonical, slot, &at, end, &level)
    return at if at < end else end


cdef bint unmap_chunk(vm_t *vm, uint64_t start, uint64_t end, bint chunked, change_t *change) noexcept nogil:
    """Remove the shadows and then the host leaves of a range, all in this exclusive section; False, with the host
    leaves still there, when there are more shadows than one section should drop."""
    cdef visit_t visit
    cdef uint64_t before
    cdef bint complete = True, widened = False
    if drops_by_range(vm):
        visit_init(&visit, OP_DROP, start, end)
        if chunked:
            visit.budget = DROP_CHUNK
        complete = visit_canonical(vm, &visit)
        change.dropped += visit.dropped
    if complete:
        if not split_at(vm, start):
            start = widen_start(vm, start)
            widened = True
        if not split_at(vm, end):
            end = widen_end(vm, end)
            widened = True
        if widened:
            before = vm.removed
            drop_shadows_at_once(vm, start, end)
            change.dropped += vm.removed - before
        note_change(vm, start, end)
        remove_host_leaves(vm, start, end)
    return complete


cdef void unmap_locked(vm_t *vm, uint64_t start, uint64_t end, bint drop_partial, bint chunked,
                       change_t *change) noexcept nogil:
    """Remove host leaves and their shadows. A block partly covered is split, or dropped whole (also when no table
    can be had for the split).

    In chunks, the lock is let go between sections. Meanwhile faults in the range answer RETRY, and nothing may map a
    block that reaches into it; each section leaves every invariant whole.
    """
    cdef uint64_t at, stop
    if drop_partial:
        start = widen_start(vm, start)
        end = widen_end(vm, end)
    if not drops_by_range(vm):
        count_kernel_steps(vm)
        change.dropped += drop_everything(vm)
        chunked = False                     # a fault between chunks would have to be swept up again
    chunked = chunked and register_active(vm, start, end)
    at = start
    while at < end:
        stop = chunk_end(vm, at, end) if chunked else end
        if unmap_chunk(vm, at, stop, chunked, change):
            at = stop
        if at < end:
            breathe(&vm.lock)
    if chunked:
        forget_active(vm, start, end)


cdef bint drop_page_shadows(vm_t *vm, uint64_t cipa, change_t *change) noexcept nogil:
    """Drop all shadows of one host page; False where that is for the long way to do, or to end."""
    cdef uint32_t head
    if not has_reverse_map(vm):
        return False
    head = rmap_find(&vm.rmap, cipa, FINAL_LEVEL)
    if not head or not load32(vm.rmap.heads + head):
        return True
    change.dropped += drop_list(vm, head, DROP_CHUNK)
    return not load32(vm.rmap.heads + head)


cdef void host_unmap(vm_t *vm, uint64_t start, uint64_t end, bint drop_partial, change_t *change) noexcept nogil:
    """Mostly the range is one host page; where nothing ever was nested, nothing but the canonical table is asked:
    ``begin`` and ``finish`` without what is for shadows."""
    cdef int level = 0
    cdef uint32_t slot
    lock_exclusive(&vm.lock)
    vm.invalidations += 1
    note_change(vm, start, end)
    change.dropped = 0
    slot = whole_leaf(vm, start, end, &level)
    if vm.contexts_used:
        owed_begin(&vm.owed)
        if slot and (level != FINAL_LEVEL or not drop_page_shadows(vm, start, change)):
            slot = 0
    if slot:
        remove_host_leaf(vm, slot)
    else:
        unmap_locked(vm, start, end, drop_partial, True, change)
    if vm.contexts_used:
        owed_end(&vm.owed)
    change.ticket = vm.owed.seq
    unlock_exclusive(&vm.lock)


cdef uint64_t host_desc(vm_t *vm, uint64_t cipa, uint64_t pa, int level, const host_attrs_t *attrs) noexcept nogil:
    """A canonical leaf; W is withheld while any page under it is logged."""
    cdef uint64_t desc = leaf_desc(&vm.arena.oa, pa, level, attrs.perm, attrs.memattr, attrs.sh, vm.features.xnx)
    if not attrs.young:
        desc &= ~DESC_AF
    if attrs.perm & ACCESS_WRITE:
        desc |= DESC_HOST_W
        if dirty_any_logged(&vm.dirty, cipa, cipa + level_span(vm.arena.granule_bits, level)):
            desc &= ~DESC_S2AP_W
    return desc


cdef int best_level(const vm_t *vm, uint64_t cipa, uint64_t pa, uint64_t size, uint64_t max_block) noexcept nogil:
    """Level of the largest leaf that is aligned at both addresses and fits."""
    cdef int level = leaf_level_within(vm.arena.granule_bits, vm.arena.oa.wide, size if size < max_block else max_block)
    while level < FINAL_LEVEL and (cipa | pa) & (level_span(vm.arena.granule_bits, level) - 1):
        level += 1
    return level


cdef bint put_host_leaf(vm_t *vm, uint64_t cipa, uint64_t pa, int level, const host_attrs_t *attrs) noexcept nogil:
    """Install a leaf where nothing is mapped; False when a table cannot be had."""
    cdef int reached = 0
    cdef uint32_t slot = table_ensure(&vm.arena, &vm.canonical, cipa, level, &reached)
    if not slot or reached != level or load64(vm.arena.words + slot):
        return False
    leaf_added(&vm.arena, slot, 0, vm.arena.alone)
    vm.canonical_leaves += 1
    store64(vm.arena.words + slot, host_desc(vm, cipa, pa, level, attrs))
    return True


cdef bint same_mapping(vm_t *vm, uint64_t cipa, uint64_t pa, uint64_t size, const host_attrs_t *attrs) noexcept nogil:
    """Whether [cipa, cipa + size) is mapped to just this already."""
    cdef uint64_t at = cipa, desc
    cdef uint32_t slot
    cdef int level = 0
    while at < cipa + size:
        slot = table_find(&vm.arena, &vm.canonical, at, &level)
        desc = load64(vm.arena.words + slot)
        if not desc & DESC_VALID or granted_perm(desc) != attrs.perm:
            return False
        if desc >> DESC_MEMATTR_SHIFT & 0xF != attrs.memattr or decode_sh(&vm.arena.oa, desc, SH_ISH) != attrs.sh:
            return False
        if decode_oa(&vm.arena.oa, desc) + (at & (level_span(vm.arena.granule_bits, level) - 1)) != pa + (at - cipa):
            return False
        at = (at & ~(level_span(vm.arena.granule_bits, level) - 1)) + level_span(vm.arena.granule_bits, level)
    return True


cdef uint64_t tables_for(const vm_t *vm, uint64_t cipa, uint64_t pa, uint64_t size, uint64_t max_block) noexcept nogil:
    """How many table pages a mapping may need."""
    cdef int granule_bits = vm.arena.granule_bits
    cdef uint64_t pages = 0, span
    cdef int level, largest = largest_leaf_level(granule_bits, vm.arena.oa.wide)
    for level in range(vm.canonical.start_level, FINAL_LEVEL):
        span = level_span(granule_bits, level)
        pages += 2                          # at the two ends
        if level < largest or span > max_block or (cipa ^ pa) & (span - 1):
            pages += size / span
    return pages


cdef bint room_for(vm_t *vm, uint64_t pages, bint chunked) noexcept nogil:
    """Evict until so many table pages fit. Between chunks others may take what was freed, so that there are no more
    pauses than pages."""
    cdef uint64_t removed = vm.removed, pauses = 0
    if not vm.arena.room_made and refused():
        return False
    while not arena_has_room(&vm.arena, pages):
        if not evict(vm, NO_CONTEXT, 0):
            return arena_has_room(&vm.arena, pages)
        if chunked and vm.removed - removed >= DROP_CHUNK and pauses < pages:
            breathe(&vm.lock)
            removed = vm.removed
            pauses += 1
    return True


cdef void await_inactive(vm_t *vm, uint64_t start, uint64_t end) noexcept nogil:
    """Wait until no invalidation works on the range: what it has taken away must not come back before it is done."""
    while overlaps_active(vm, start, end):
        breathe(&vm.lock)


cdef bint host_map(vm_t *vm, uint64_t cipa, uint64_t pa, uint64_t size, const host_attrs_t *attrs, uint64_t max_block,
                   change_t *change) noexcept nogil:
    """Map a range in the largest blocks that fit, in place of what was there, in one exclusive section, for which
    those before it evict and drop nearly all that must go: others may take some of the room meanwhile, and not for
    ever. False, and no mapping changed, when the tables cannot be had."""
    cdef uint64_t at, done = 0, pages = tables_for(vm, cipa, pa, size, max_block)
    cdef int level = 0, _round
    cdef bint live
    begin(vm, cipa, cipa + size, change)
    await_inactive(vm, cipa, cipa + size)
    if same_mapping(vm, cipa, pa, size, attrs):
        finish(vm, change)
        return True
    for _round in range(ROUNDS):
        if not room_for(vm, pages, True):
            finish(vm, change)
            return False
        await_inactive(vm, cipa, cipa + size)
        at = cipa
        if next_leaf(&vm.arena, &vm.canonical, &at, cipa + size, &level):
            drop_shadows(vm, cipa, cipa + size, change)
        if arena_has_room(&vm.arena, pages) and not overlaps_active(vm, cipa, cipa + size):
            break                           # nobody was let in since
    await_inactive(vm, cipa, cipa + size)
    if not room_for(vm, pages, False):
        finish(vm, change)
        return False
    at = cipa
    live = next_leaf(&vm.arena, &vm.canonical, &at, cipa + size, &level) != 0
    vm.arena.room_made += 1
    if live:
        unmap_locked(vm, cipa, cipa + size, False, False, change)
    while done < size:
        level = best_level(vm, cipa + done, pa + done, size - done, max_block)
        if not put_host_leaf(vm, cipa + done, pa + done, level, attrs):
            table_tidy(&vm.arena, &vm.canonical, cipa + done)
            unmap_locked(vm, cipa, cipa + size, False, False, change)   # room was made: only the arena can end here
            break
        done += level_span(vm.arena.granule_bits, level)
    vm.arena.room_made -= 1
    note_change(vm, cipa, cipa + size)
    finish(vm, change)
    return done == size


cdef bint host_make_room(vm_t *vm, uint64_t pages) noexcept nogil:
    """Evict shadows until ``pages`` more table pages fit, and what single mappings may ask for on top; False if they
    cannot. Pair what succeeds with ``host_give_room``."""
    cdef bint made
    lock_exclusive(&vm.lock)
    owed_begin(&vm.owed)
    made = room_for(vm, pages + 2 * (FINAL_LEVEL - vm.canonical.start_level), True)
    vm.arena.room_made += made
    owed_end(&vm.owed)
    unlock_exclusive(&vm.lock)
    return made


cdef void host_give_room(vm_t *vm) noexcept nogil:
    lock_exclusive(&vm.lock)
    vm.arena.room_made -= 1
    unlock_exclusive(&vm.lock)


cdef bint populate_block(vm_t *vm, uint64_t block, uint64_t pa, uint64_t size,
                         const host_attrs_t *attrs) noexcept nogil:
    """Map one block on a host fault (exclusive side) where nothing may be mapped; False when a table cannot be had."""
    cdef int level = best_level(vm, block, pa, size, ~<uint64_t>0)
    note_change(vm, block, block + size)
    while not put_host_leaf(vm, block, pa, level, attrs):
        table_tidy(&vm.arena, &vm.canonical, block)
        if not evict(vm, NO_CONTEXT, 0):
            return False
    return True


cdef int populate_linear(vm_t *vm, const region_t *region, uint64_t cipa) noexcept nogil:
    """Serve a host fault from the linear policy (exclusive side): 1 mapped, 0 not mappable, -1 no memory."""
    cdef int level = 0, at
    cdef uint64_t block, span, pa
    cdef host_attrs_t attrs
    attrs.perm = PERM_ALL & ~ACCESS_WRITE if region.readonly else PERM_ALL
    attrs.memattr = 0x6 if vm.features.fwb else 0xF
    attrs.sh = SH_ISH
    attrs.young = 1
    table_find(&vm.arena, &vm.canonical, cipa, &level)      # nothing is mapped in the block where the descent ended
    if level < vm.linear_level:
        level = vm.linear_level
    for at in range(level, FINAL_LEVEL + 1):
        if at < largest_leaf_level(vm.arena.granule_bits, vm.arena.oa.wide):
            continue
        span = level_span(vm.arena.granule_bits, at)
        block = cipa & ~(span - 1)
        if block < region.start or block + span > region.start + region.size:
            continue
        if overlaps_active(vm, block, block + span):
            continue
        if vm.linear_fresh:
            pa = (vm.fresh_next + span - 1) & ~(span - 1)
            if (pa + span - 1) >> vm.features.pa_bits:
                pa = 0                      # the space is used up: start over
            vm.fresh_next = pa + span
        else:
            pa = block + <uint64_t>vm.linear_offset
            if pa & (span - 1) or pa >> vm.features.pa_bits or (pa + span - 1) >> vm.features.pa_bits:
                continue
        return 1 if populate_block(vm, block, pa, span, &attrs) else -1
    return 0


cdef bint split_down(vm_t *vm, uint64_t cipa) noexcept nogil:
    """Split the host block around ``cipa`` down to a page and drop the shadow blocks over it (exclusive side). Shadows
    are evicted for the tables; where even that does not help the block is dropped. False while there are more shadow
    blocks than one section should drop."""
    cdef int level = 0
    cdef uint32_t slot, head
    cdef uint64_t span, block
    cdef visit_t visit
    while True:
        slot = table_find(&vm.arena, &vm.canonical, cipa, &level)
        if not load64(vm.arena.words + slot) & DESC_VALID or level == FINAL_LEVEL:
            return True
        span = level_span(vm.arena.granule_bits, level)
        block = cipa & ~(span - 1)
        # a leaf over the first byte that sticks out of the first piece is as large as the whole
        if has_reverse_map(vm):
            head = rmap_find(&vm.rmap, block, level)
            if head and load32(vm.rmap.heads + head):
                drop_list(vm, head, DROP_CHUNK)
                if load32(vm.rmap.heads + head):
                    return False
        elif drops_by_range(vm):
            visit_sticking_out(&visit, block, block + 1, block + span / (<uint64_t>1 << vm.arena.slot_bits))
            visit_canonical(vm, &visit)
        else:
            drop_everything(vm)
        note_change(vm, block, block + span)
        if not split_host_block(vm, slot, level):
            drop_shadows_at_once(vm, block, block + span)
            remove_host_leaf(vm, slot)
            return True


cdef void visit_sticking_out(visit_t *visit, uint64_t start, uint64_t end, uint64_t whole_end) noexcept nogil:
    """To drop the shadow leaves over [start, end) that stick out of [start, whole_end)."""
    visit_init(visit, OP_NARROW, start, end)
    visit.whole_end = whole_end
    visit.keep_perm = PERM_ALL
    visit.drop_sticking_out = 1


cdef bint visit_chunked(vm_t *vm, visit_t *visit, change_t *change) noexcept nogil:
    """Visit the shadows of a range, letting go of the lock whenever a section has done its share. True if it was let
    go, and the host's leaves may be other ones now."""
    return visit_within(vm, visit, visit.start, visit.end, change)


cdef bint visit_within(vm_t *vm, visit_t *visit, uint64_t start, uint64_t end, change_t *change) noexcept nogil:
    """The same with [start, end) around the range registered meanwhile, so that faults there answer RETRY and add
    nothing, where nothing has to be visited either."""
    cdef bint paused = False
    cdef cursor_t cursor
    visit.budget = DROP_CHUNK
    if not visit_canonical(vm, visit):
        if has_reverse_map(vm) and register_active(vm, start, end):
            cursor_init(vm, visit, &cursor)
            paused = True
            while True:
                breathe(&vm.lock)
                visit.budget = DROP_CHUNK
                if visit_lists(vm, visit, &cursor):
                    break
            forget_active(vm, start, end)
        else:
            visit.budget = ~<uint64_t>0
            visit_canonical(vm, visit)
    change.dropped += visit.dropped
    change.work += DROP_CHUNK - visit.budget if visit.budget <= DROP_CHUNK else DROP_CHUNK
    return paused


cdef void rest(vm_t *vm, change_t *change) noexcept nogil:
    """Between two host leaves: let others in if this section has done its share."""
    if change.work >= DROP_CHUNK:
        change.work = 0
        if has_reverse_map(vm):
            breathe(&vm.lock)


cdef void drop_shadows(vm_t *vm, uint64_t start, uint64_t end, change_t *change) noexcept nogil:
    """Drop the shadows of a range ahead of a change that must be whole, so that it finds few."""
    cdef visit_t visit
    if has_reverse_map(vm):
        visit_init(&visit, OP_DROP, start, end)
        visit_chunked(vm, &visit, change)


cdef grant_t grant_write(vm_t *vm, uint64_t cipa, bint exclusive) noexcept nogil:
    """Give back the W that dirty logging withheld, on a write fault.

    A block with a logged page is split first, so that only the page that is written is marked.
    """
    cdef int level = 0
    cdef uint32_t slot = table_find(&vm.arena, &vm.canonical, cipa, &level)
    cdef uint64_t span = level_span(vm.arena.granule_bits, level)
    cdef uint64_t block = cipa & ~(span - 1)
    if level < FINAL_LEVEL and dirty_any_logged(&vm.dirty, block, block + span):
        if not exclusive or not split_down(vm, cipa):
            return GRANT_EXCLUSIVE
        slot = table_find(&vm.arena, &vm.canonical, cipa, &level)
        if not load64(vm.arena.words + slot) & DESC_VALID:
            return GRANT_NO_MEMORY          # populate would only bring the block again
    mark_dirty(&vm.dirty, cipa)
    fetch_or64(vm.arena.words + slot, DESC_S2AP_W)
    return GRANT_DONE


cdef bint narrow_shadows(vm_t *vm, uint64_t start, uint64_t end, uint8_t keep, bint drop_sticking,
                         change_t *change) noexcept nogil:
    """Take permissions from the shadows of a range; True if the lock was let go meanwhile."""
    cdef visit_t visit
    if not has_reverse_map(vm):
        return False                        # done for all contexts beforehand
    visit_init(&visit, OP_NARROW, start, end)
    visit.keep_perm = keep
    visit.drop_sticking_out = drop_sticking
    return visit_chunked(vm, &visit, change)


cdef void narrow_everything(vm_t *vm, uint8_t keep) noexcept nogil:
    """Without a reverse map, every leaf of every context is narrowed, as Linux does."""
    cdef visit_t visit
    cdef uint32_t i
    if has_reverse_map(vm):
        return
    for i in range(vm.contexts_used):
        if vm.contexts[i].generation:
            visit_init(&visit, OP_NARROW, 0, ~<uint64_t>0)
            visit.keep_perm = keep
            visit_context(vm, &vm.contexts[i], &visit)


cdef uint64_t protect_whole(vm_t *vm, uint32_t slot, int level, uint64_t start, uint64_t end, uint8_t perm,
                            change_t *change) noexcept nogil:
    """Change the host leaves that lie inside [start, end) from the one in ``slot`` on, their shadows first; up to a
    chunk, and to the first leaf that is cut by the range or allows what it should already. Where to go on."""
    cdef uint64_t at = start, desc, changed, run_end = start
    cdef uint64_t permissions = perm_to_s2ap_xn(perm, vm.features.xnx) | (DESC_HOST_W if perm & ACCESS_WRITE else 0)
    cdef uint32_t first = slot
    cdef int first_level = level
    while slot and change.work < DROP_CHUNK:
        if at != run_end or at + level_span(vm.arena.granule_bits, level) > end:
            break
        if granted_perm(load64(vm.arena.words + slot)) == perm:
            break
        at += level_span(vm.arena.granule_bits, level)
        run_end = at
        change.work += 1
        slot = leaf_after(&vm.arena, &vm.canonical, slot, &at, end, &level)
    slot = first
    level = first_level
    at = start
    if narrow_shadows(vm, start, run_end, perm, True, change):
        slot = next_leaf(&vm.arena, &vm.canonical, &at, run_end, &level)    # other host changes may have been here
    while slot and at < run_end:
        desc = load64(vm.arena.words + slot)
        changed = desc & ~(DESC_S2AP_R | DESC_S2AP_W | DESC_XN | DESC_HOST_W) | permissions
        if perm & ACCESS_WRITE and dirty_any_logged(&vm.dirty, at, at + level_span(vm.arena.granule_bits, level)):
            changed &= ~DESC_S2AP_W | desc  # W that a write has earned stays: the page is marked
        store64(vm.arena.words + slot, changed)
        at += level_span(vm.arena.granule_bits, level)
        slot = leaf_after(&vm.arena, &vm.canonical, slot, &at, run_end, &level)
    return run_end


cdef uint64_t protect_leaf(vm_t *vm, uint32_t slot, int level, uint64_t block, uint64_t start, uint64_t end,
                           uint8_t perm, change_t *change) noexcept nogil:
    """Change host leaves inside [start, end) from the one in ``slot`` on, which is split where it sticks out; where to
    go on."""
    cdef uint64_t span = level_span(vm.arena.granule_bits, level)
    cdef uint64_t first = block if block > start else start
    cdef uint64_t last = block + span if block + span < end else end
    cdef visit_t visit
    if granted_perm(load64(vm.arena.words + slot)) == perm:
        change.work += 1
        return block + span
    if last - first < span:
        change.work += 1
        if drops_by_range(vm):
            visit_sticking_out(&visit, first, last, last)
            visit_chunked(vm, &visit, change)
        else:
            change.dropped += drop_everything(vm)
        if not split_at(vm, first) or not split_at(vm, last):
            drop_shadows_at_once(vm, block, block + span)
            remove_host_leaves(vm, block, block + span)
            return block + span
        return first                        # again, with pieces that fit
    return protect_whole(vm, slot, level, block, end, perm, change)


cdef void host_protect(vm_t *vm, uint64_t start, uint64_t end, uint8_t perm, change_t *change) noexcept nogil:
    cdef uint64_t at = start
    cdef int level = 0
    cdef uint32_t slot
    begin(vm, start, end, change)
    narrow_everything(vm, perm)
    while True:
        slot = next_leaf(&vm.arena, &vm.canonical, &at, end, &level)
        if not slot:
            break
        at = protect_leaf(vm, slot, level, at, start, end, perm, change)
        rest(vm, change)
    note_change(vm, start, end)
    finish(vm, change)


cdef void narrow_logged(vm_t *vm, uint64_t start, uint64_t end, change_t *change) noexcept nogil:
    """Take W from the shadows of the host leaves that overlap [start, end). The first and the last may be passed over
    where they have no W themselves: a large block is logged in many stretches, and its shadows have lost W with the
    first of them. Nothing of the whole may get W until the host's leaves have none either."""
    cdef uint64_t first = widen_start(vm, start), last = widen_end(vm, end), at = first
    cdef visit_t visit
    cdef int level = 0
    cdef uint32_t slot = next_leaf(&vm.arena, &vm.canonical, &at, end, &level)
    if not has_reverse_map(vm) or not slot:
        return                              # done for all contexts beforehand
    visit_init(&visit, OP_NARROW, at, last)
    visit.keep_perm = PERM_ALL & ~ACCESS_WRITE
    if not load64(vm.arena.words + slot) & DESC_S2AP_W:
        visit.start += level_span(vm.arena.granule_bits, level)
    slot = table_find(&vm.arena, &vm.canonical, end - 1, &level)
    if last > end and not load64(vm.arena.words + slot) & DESC_S2AP_W:
        visit.end = last - level_span(vm.arena.granule_bits, level)
    if visit.start < visit.end:
        visit_within(vm, &visit, first, last, change)


cdef void withhold_write(vm_t *vm, uint64_t start, uint64_t end) noexcept nogil:
    """Take W from host leaves that overlap [start, end); their shadows have none."""
    cdef uint64_t at = start
    cdef int level = 0
    cdef uint32_t slot = next_leaf(&vm.arena, &vm.canonical, &at, end, &level)
    while slot:
        store64(vm.arena.words + slot, load64(vm.arena.words + slot) & ~DESC_S2AP_W)
        at += level_span(vm.arena.granule_bits, level)
        slot = leaf_after(&vm.arena, &vm.canonical, slot, &at, end, &level)


cdef void host_log(vm_t *vm, const range_t *ranges, uint32_t count, bint on, change_t *change) noexcept nogil:
    """Switch dirty logging of some ranges, a stretch of pages at a time; the bit arrays must be reserved."""
    cdef uint64_t at, stop, stretch = <uint64_t>DROP_CHUNK << vm.arena.granule_bits
    cdef uint32_t i
    begin(vm, 0, 0, change)
    if on:
        narrow_everything(vm, PERM_ALL & ~ACCESS_WRITE)
    for i in range(count):
        at = ranges[i].start
        while at < ranges[i].end:
            stop = at + stretch if ranges[i].end - at > stretch else ranges[i].end
            if on:                          # whole host leaves, whose shadows may reach out of the range
                narrow_logged(vm, at, stop, change)
            dirty_set_range(&vm.dirty, at, stop, on)
            if on:
                withhold_write(vm, at, stop)
            at = stop
            if has_reverse_map(vm) and at < ranges[i].end:
                breathe(&vm.lock)
    finish(vm, change)


cdef void host_dirty_log(vm_t *vm, const range_t *ranges, uint32_t count, uint64_t origin,
                         uint8_t *bitmap) noexcept nogil:
    """Report, clear and protect again each page in one exclusive section: no write falls between. A write through a
    leaf that still allows it comes before the page is reported; one that comes after it faults."""
    cdef uint64_t page = <uint64_t>1 << vm.arena.granule_bits, at
    cdef uint32_t i, slot
    cdef int level = 0
    cdef change_t change
    begin(vm, 0, 0, &change)
    narrow_everything(vm, PERM_ALL & ~ACCESS_WRITE)
    for i in range(count):
        at = dirty_next(&vm.dirty, ranges[i].start, ranges[i].end)
        while at < ranges[i].end:
            narrow_shadows(vm, at, at + page, PERM_ALL & ~ACCESS_WRITE, False, &change)
            mark_young(bitmap, vm.arena.granule_bits, origin, at, at + page)
            clear_dirty(&vm.dirty, at)
            slot = table_find(&vm.arena, &vm.canonical, at, &level)
            if load64(vm.arena.words + slot) & DESC_VALID:
                store64(vm.arena.words + slot, load64(vm.arena.words + slot) & ~DESC_S2AP_W)
            change.work += 1
            rest(vm, &change)
            at = dirty_next(&vm.dirty, at + page, ranges[i].end)
    finish(vm, &change)


cdef void host_age(vm_t *vm, uint64_t start, uint64_t end, bint clear, uint8_t *bitmap) noexcept nogil:
    """OR the access flags of host and shadow leaves into ``bitmap``; clear them if asked. Owes no TLBI."""
    cdef visit_t visit
    cdef change_t change
    cdef uint64_t at = start, span, desc
    cdef int level = 0
    cdef uint32_t slot
    change.dropped = 0
    change.work = 0
    lock_exclusive(&vm.lock)
    while True:
        slot = next_leaf(&vm.arena, &vm.canonical, &at, end, &level)
        if not slot:
            break
        span = level_span(vm.arena.granule_bits, level)
        desc = load64(vm.arena.words + slot)
        if desc & DESC_AF:
            mark_young(bitmap, vm.arena.granule_bits, start, at if at > start else start,
                       at + span if at + span < end else end)
            if clear:
                store64(vm.arena.words + slot, desc & ~DESC_AF)
        at += span
        change.work += 1
        rest(vm, &change)
    if has_reverse_map(vm):
        visit_init(&visit, OP_AGE, start, end)
        visit.clear_young = clear
        visit.bitmap = bitmap
        owed_begin(&vm.owed)                # what it drops where others dropped leaves under it
        visit_chunked(vm, &visit, &change)
        owed_end(&vm.owed)
    unlock_exclusive(&vm.lock)
