"""Visiting and removing shadow leaves. Everything here runs on the exclusive side."""

from libc.stdint cimport uint16_t
from libc.string cimport memset

from s2shadow.arch cimport (
    DESC_AF, DESC_VALID, DESC_XN, FINAL_LEVEL, LEVEL_STAGE2_OFF, level_shift, level_span, perm_to_s2ap_xn,
    s2ap_xn_to_perm,
)
from s2shadow.atomics cimport load32, load64, prefetch, prefetch_to_write, store32, store64
from s2shadow.intervals cimport (
    UNKNOWN_IPA, interval_t, intervals_find, intervals_lose, intervals_remove, intervals_reset,
)
from s2shadow.owed cimport owe_context, owe_leaf
from s2shadow.pageset cimport pageset_next
from s2shadow.rmap cimport (
    HEAD_TAG, give_marker, head_cipa, head_emptied, is_marker, leaf_cipa, link_next, link_prev, node_t, pin_node,
    rmap_is_empty, rmap_mark, rmap_next_list, rmap_unlink, unpin_node,
)
from s2shadow.table cimport (
    CANONICAL, GUEST_LEVELS, arena_t, child_page, drop_page_whole, is_table, leaves_removed, page_of, page_t,
    pin_page, slot_ipa, table_find, unpin_page,
)
from s2shadow.vm cimport (
    DROP_CHUNK, TEARDOWN_BLOW_AWAY_LEAN, TEARDOWN_INTERVAL_MAP, TEARDOWN_REVERSE_MAP, context_t,
    kernel_steps_per_context, read_tag, vm_t,
)

cdef enum:
    FETCH_AHEAD = 16            # leaves whose heads are on their way while one is unlinked


cdef void visit_init(visit_t *visit, leaf_op_t op, uint64_t start, uint64_t end) noexcept nogil:
    memset(visit, 0, sizeof(visit_t))
    visit.op = op
    visit.start = start
    visit.end = end
    visit.whole_start = start
    visit.whole_end = end
    visit.budget = ~<uint64_t>0
    visit.tags = ALL_TAGS


cdef bint shadow_cipa(const vm_t *vm, uint32_t slot, uint64_t *cipa) noexcept nogil:
    """cIPA of a shadow leaf's block; False if its list must be marked first (``find_cipa``)."""
    if vm.teardown == TEARDOWN_REVERSE_MAP:
        return leaf_cipa(&vm.rmap, slot, cipa)
    cipa[0] = vm.arena.links[slot]          # without a reverse map the cIPA stands in the links' place
    return True


cdef bint find_cipa(vm_t *vm, uint32_t slot, bint however_far, uint64_t *cipa) noexcept nogil:
    """The same with markers put in (exclusive side); False, unless ``however_far``, if the leaf stands deep in its list
    and there is no room for them."""
    cdef uint32_t head
    if shadow_cipa(vm, slot, cipa):
        return True
    head = rmap_mark(&vm.rmap, slot, however_far)
    if head:
        cipa[0] = head_cipa(&vm.rmap, head)
    return head != 0


cdef inline int leaf_level(const vm_t *vm, uint32_t slot) noexcept nogil:
    return vm.arena.pages[page_of(&vm.arena, slot)].level


cdef void drop_leaf(vm_t *vm, uint32_t slot) noexcept nogil:
    """Remove a live leaf from its list or map, its table and the counts."""
    if vm.teardown == TEARDOWN_REVERSE_MAP:
        rmap_unlink(&vm.rmap, slot)
    elif vm.teardown == TEARDOWN_INTERVAL_MAP:
        intervals_remove(vm.contexts[vm.arena.pages[page_of(&vm.arena, slot)].context].intervals,
                         slot_ipa(&vm.arena, slot))
    clear_leaf(vm, slot)


cdef uint64_t drop_list(vm_t *vm, uint32_t head, uint64_t budget) noexcept nogil:
    """Remove up to ``budget`` leaves from the front of a list; how many. What remains is a list again."""
    cdef uint32_t slot = load32(vm.rmap.heads + head), following
    cdef uint64_t dropped = 0
    while slot:
        following = load32(link_next(&vm.arena, slot))
        if is_marker(&vm.rmap, slot):
            give_marker(&vm.rmap, slot)
        elif dropped < budget:
            clear_leaf(vm, slot)
            dropped += 1
        else:
            store32(link_prev(&vm.arena, slot), HEAD_TAG | head)
            store32(vm.rmap.heads + head, slot)
            return dropped
        slot = following
    head_emptied(&vm.rmap, head)
    return dropped


cdef void narrow_leaf(vm_t *vm, uint32_t slot, uint8_t keep) noexcept nogil:
    """Take away every permission but ``keep``."""
    cdef uint64_t desc = load64(vm.arena.words + slot), ipa
    cdef uint8_t perm = s2ap_xn_to_perm(desc, True)
    if not perm & ~keep:
        return
    desc &= ~(<uint64_t>0xC0 | DESC_XN)
    store64(vm.arena.words + slot, desc | perm_to_s2ap_xn(perm & keep, vm.features.xnx))
    ipa = slot_ipa(&vm.arena, slot)
    owe_leaf(&vm.owed, vm.arena.pages[page_of(&vm.arena, slot)].context, ipa,
             ipa + level_span(vm.arena.granule_bits, leaf_level(vm, slot)), leaf_level(vm, slot), False)
    vm.narrowed += 1


cdef void mark_young(uint8_t *bitmap, int page_bits, uint64_t origin, uint64_t start, uint64_t end) noexcept nogil:
    """Set the bits of the pages of [start, end)."""
    cdef uint64_t page
    for page in range((start - origin) >> page_bits, (end - origin) >> page_bits):
        bitmap[page >> 3] |= <uint8_t>(1 << (page & 7))


cdef void age_leaf(vm_t *vm, uint32_t slot, visit_t *visit, uint64_t block) noexcept nogil:
    cdef uint64_t desc = load64(vm.arena.words + slot)
    cdef uint64_t end = block + level_span(vm.arena.granule_bits, leaf_level(vm, slot))
    if not desc & DESC_AF:
        return
    mark_young(visit.bitmap, vm.arena.granule_bits, visit.whole_start,
               block if block > visit.whole_start else visit.whole_start,
               end if end < visit.whole_end else visit.whole_end)
    if visit.clear_young:
        store64(vm.arena.words + slot, desc & ~DESC_AF)


cdef bint is_required(const vm_t *vm, uint32_t slot, const visit_t *visit) noexcept nogil:
    """The extent rule: L1's block around the leaf meets what the operation named, at a level that its hint allows."""
    cdef int tag
    cdef uint64_t span, block
    if not visit.guest_granule_bits:
        return True
    tag = <int>read_tag(load64(vm.arena.words + slot))
    if not visit.exact_tags >> tag & 1:
        return False
    span = level_span(visit.guest_granule_bits, tag + LEVEL_STAGE2_OFF)
    block = slot_ipa(&vm.arena, slot) & ~(span - 1)
    return block < visit.exact_end and visit.exact_start < block + span


cdef bint visit_leaf(vm_t *vm, uint32_t slot, visit_t *visit, uint64_t block) noexcept nogil:
    """Apply the operation to one leaf whose cIPA block starts at ``block``; False when the budget is spent."""
    cdef bint drops = visit.op == OP_DROP
    cdef uint64_t end
    if visit.budget == 0:
        return False
    visit.budget -= 1
    if visit.op == OP_AGE:
        age_leaf(vm, slot, visit, block)
        return True
    if visit.op == OP_NARROW and visit.drop_sticking_out:
        end = block + level_span(vm.arena.granule_bits, leaf_level(vm, slot))
        drops = block < visit.whole_start or end > visit.whole_end
    if not drops:
        narrow_leaf(vm, slot, visit.keep_perm)
        return True
    visit.dropped += 1
    visit.required += is_required(vm, slot, visit)
    drop_leaf(vm, slot)
    return True


cdef bint visit_list(vm_t *vm, uint32_t head, visit_t *visit, uint64_t block) noexcept nogil:
    """Apply the operation to the leaves that map ``block``; False when the budget is spent."""
    cdef uint32_t slot, following
    cdef uint64_t dropped
    if visit.op == OP_DROP:
        dropped = drop_list(vm, head, visit.budget)
        visit.budget -= dropped
        visit.dropped += dropped
        visit.required += dropped
        return not load32(vm.rmap.heads + head)
    slot = load32(vm.rmap.heads + head)
    while slot:
        following = load32(link_next(&vm.arena, slot))
        if not is_marker(&vm.rmap, slot) and not visit_leaf(vm, slot, visit, block):
            return False
        slot = following
    return True


cdef bint visit_node(vm_t *vm, uint32_t node, visit_t *visit) noexcept nogil:
    """Every list of a node and below that overlaps the range; False when the budget is spent."""
    cdef node_t *meta = &vm.rmap.nodes[node]
    cdef int shift = level_shift(vm.arena.granule_bits, meta.level)
    cdef uint64_t first = 0, last = (<uint64_t>1 << vm.arena.slot_bits) - 1, i
    cdef uint32_t name, child, ahead
    cdef bint complete = True
    if visit.start > meta.cipa:
        first = (visit.start - meta.cipa) >> shift
    if (visit.end - 1 - meta.cipa) >> shift < last:
        last = (visit.end - 1 - meta.cipa) >> shift
    pin_node(&vm.rmap, node)
    for i in range(first, last + 1):
        name = <uint32_t>((<uint64_t>node << vm.arena.slot_bits) + i)
        if i + FETCH_AHEAD <= last:
            ahead = load32(vm.rmap.heads + name + FETCH_AHEAD)
            prefetch_to_write(vm.arena.words + ahead)
            prefetch_to_write(vm.arena.links + ahead)
        if load32(vm.rmap.heads + name):
            if not visit_list(vm, name, visit, meta.cipa + (i << shift)):
                complete = False
                break
        if meta.level < FINAL_LEVEL:
            child = load32(vm.rmap.children + name)
            if child and not visit_node(vm, child, visit):
                complete = False
                break
    unpin_node(&vm.rmap, node)
    return complete


cdef bint visit_canonical(vm_t *vm, visit_t *visit) noexcept nogil:
    """Every shadow leaf, of any context, that overlaps [start, end) of cIPA; False when the budget is spent.

    With the reverse map it costs the leaves it meets and the nodes that are there; see ``visit_intervals`` for the
    interval map. The other policies cannot do it.
    """
    if visit.start >= visit.end:
        return True
    if vm.teardown == TEARDOWN_INTERVAL_MAP:
        return visit_intervals(vm, visit)
    return rmap_is_empty(&vm.rmap) or visit_node(vm, vm.rmap.root, visit)


cdef void cursor_init(const vm_t *vm, const visit_t *visit, cursor_t *cursor) noexcept nogil:
    memset(cursor, 0, sizeof(cursor_t))
    cursor.level = vm.rmap.nodes[vm.rmap.root].level
    cursor.cipa = visit.start


cdef bint visit_lists(vm_t *vm, visit_t *visit, cursor_t *cursor) noexcept nogil:
    """As ``visit_canonical`` with the reverse map, but list by list, so that a visit that keeps its leaves goes on
    where it paused: in the midst of a page's million aliases too. False when the budget is spent. Faults in the range
    must not add leaves meanwhile."""
    cdef uint64_t at
    cdef uint32_t head
    while cursor.level <= FINAL_LEVEL:
        at = cursor.cipa
        head = rmap_next_list(&vm.rmap, cursor.level, &at, visit.end)
        if at != cursor.cipa:
            cursor.cipa = at
            cursor.slot = 0
            cursor.lost = 0
        if head:
            if not visit_list_from(vm, head, visit, cursor):
                return False
            cursor.cipa += level_span(vm.arena.granule_bits, cursor.level)
        else:
            cursor.level += 1
            cursor.cipa = visit.start
        cursor.slot = 0
        cursor.lost = 0
    return True


cdef bint visit_list_from(vm_t *vm, uint32_t head, visit_t *visit, cursor_t *cursor) noexcept nogil:
    cdef uint32_t slot = cursor.slot, following, node = head >> vm.arena.slot_bits
    cdef leaf_op_t op = visit.op
    cdef bint complete = True
    if slot and not stands_in_list(vm, slot, cursor.level, cursor.cipa):
        cursor.lost = 1                     # which leaves were visited cannot be told: dropping is always right
        slot = 0
    if not slot:
        slot = load32(vm.rmap.heads + head)
    pin_node(&vm.rmap, node)
    while slot and complete:
        following = load32(link_next(&vm.arena, slot))
        if not is_marker(&vm.rmap, slot):
            if cursor.lost:
                if op == OP_AGE:
                    age_leaf(vm, slot, visit, cursor.cipa)
                visit.op = OP_DROP
            complete = visit_leaf(vm, slot, visit, cursor.cipa)
            visit.op = op
            if not complete:
                cursor.slot = slot
        slot = following
    unpin_node(&vm.rmap, node)
    return complete


cdef bint stands_in_list(vm_t *vm, uint32_t slot, int level, uint64_t cipa) noexcept nogil:
    """Whether a name that was a leaf of this list is known to be one still."""
    cdef const page_t *page = &vm.arena.pages[page_of(&vm.arena, slot)]
    cdef uint64_t stands_at = 0
    cdef uint64_t desc = load64(vm.arena.words + slot)
    if page.level != level or page.context == CANONICAL or not desc & DESC_VALID or is_table(desc, level):
        return False
    return find_cipa(vm, slot, False, &stands_at) and stands_at == cipa


cdef bint visit_intervals(vm_t *vm, visit_t *visit) noexcept nogil:
    """The interval maps of all contexts, one after the other. Leaves of known ranges are visited as ever; where the
    range is UNKNOWN its whole context goes, in one section and beside the budget, as it does in Linux."""
    cdef interval_t found
    cdef context_t *context
    cdef uint64_t at
    cdef uint32_t i
    cdef int level = 0
    for i in range(vm.contexts_used):
        context = &vm.contexts[i]
        at = visit.start
        while intervals_find(context.intervals, at, visit.end, &found):
            at = found.end
            if found.ipa == UNKNOWN_IPA:
                vm.kernel_steps += kernel_steps_per_context(vm)
                vm.unknown_unmaps += 1
                visit.dropped += empty_whole(vm, i)
            elif not visit_leaf(vm, table_find(&vm.arena, &context.shadow, found.ipa, &level), visit, found.start):
                return False
    return True


cdef bint holds_any(const page_t *page, uint8_t tags) noexcept nogil:
    cdef int tag
    for tag in range(GUEST_LEVELS):
        if tags >> tag & 1 and page.holds[tag]:
            return True
    return False


cdef void free_empty(vm_t *vm, uint32_t page) noexcept nogil:
    """An empty table on the exclusive side is what a fault left that found no memory."""
    if not vm.arena.pages[page].is_root:
        pin_page(&vm.arena, page)
        release_page(vm, page)


cdef void release_page(vm_t *vm, uint32_t page) noexcept nogil:
    """Unpin a page; where that frees it, walk caches must forget it."""
    cdef const page_t *meta = &vm.arena.pages[page]
    cdef uint32_t context = meta.context
    cdef uint64_t ipa = meta.ipa, span = level_span(vm.arena.granule_bits, meta.level) << vm.arena.slot_bits
    if unpin_page(&vm.arena, page):
        owe_leaf(&vm.owed, context, ipa, ipa + span, FINAL_LEVEL, True)


cdef inline void fetch_head(const vm_t *vm, uint32_t slot) noexcept nogil:
    """The head of a leaf that will be unlinked soon."""
    cdef uint32_t prev = load32(link_prev(&vm.arena, slot))
    if prev & HEAD_TAG:
        prefetch(vm.rmap.heads + (prev & ~<uint32_t>HEAD_TAG))


cdef bint drop_run(vm_t *vm, uint32_t page, uint64_t first, uint64_t last, visit_t *visit) noexcept nogil:
    """``visit_page`` where leaves of the smallest size are dropped: counted once for the page, owed once for each
    stretch of neighbours. The page must be pinned."""
    cdef const page_t *meta = &vm.arena.pages[page]
    cdef uint32_t base = page << vm.arena.slot_bits, slot
    cdef uint64_t i, desc, dropped = 0, gap = first
    cdef int tag, page_bits = vm.arena.granule_bits
    cdef uint16_t counts[GUEST_LEVELS]
    cdef bint complete = True
    memset(counts, 0, sizeof(counts))
    for i in range(first, last + 1):
        slot = base + <uint32_t>i
        desc = load64(vm.arena.words + slot)
        tag = <int>read_tag(desc)
        if not desc & DESC_VALID or not visit.tags >> tag & 1:
            if gap < i:
                owe_leaf(&vm.owed, meta.context, meta.ipa + (gap << page_bits), meta.ipa + (i << page_bits),
                         FINAL_LEVEL, False)
            gap = i + 1
            continue
        if dropped == visit.budget:
            complete = False
            visit.start = meta.ipa + (i << page_bits)
            last = i - 1
            break
        if visit.guest_granule_bits:
            visit.required += is_required(vm, slot, visit)
        if i + FETCH_AHEAD <= last:
            fetch_head(vm, slot + FETCH_AHEAD)
        rmap_unlink(&vm.rmap, slot)
        store64(vm.arena.words + slot, 0)
        counts[tag] += 1
        dropped += 1
    if gap <= last and dropped:
        owe_leaf(&vm.owed, meta.context, meta.ipa + (gap << page_bits), meta.ipa + ((last + 1) << page_bits),
                 FINAL_LEVEL, False)
    leaves_removed(&vm.arena, page, counts)
    if not visit.guest_granule_bits:
        visit.required += dropped
    visit.budget -= dropped
    visit.dropped += dropped
    vm.removed += dropped
    return complete


cdef bint visit_page(vm_t *vm, uint32_t page, visit_t *visit) noexcept nogil:
    """Every leaf of a table page and below that overlaps the range and has one of the guest levels."""
    cdef page_t *meta = &vm.arena.pages[page]
    cdef int shift = level_shift(vm.arena.granule_bits, meta.level)
    cdef uint64_t first = 0, last = (<uint64_t>1 << vm.arena.slot_bits) - 1, i, desc, block = 0
    cdef uint32_t slot
    cdef bint complete = True
    if not meta.live:
        free_empty(vm, page)
        return True
    if not holds_any(meta, visit.tags) and visit.tags != ALL_TAGS:
        return True
    if visit.end <= meta.ipa or visit.start > meta.ipa + ((last + 1) << shift) - 1:
        return True
    if visit.start > meta.ipa:
        first = (visit.start - meta.ipa) >> shift
    if (visit.end - 1 - meta.ipa) >> shift < last:
        last = (visit.end - 1 - meta.ipa) >> shift
    pin_page(&vm.arena, page)
    if meta.level == FINAL_LEVEL and visit.op == OP_DROP and vm.teardown == TEARDOWN_REVERSE_MAP:
        complete = drop_run(vm, page, first, last, visit)
        first = last + 1
    for i in range(first, last + 1):
        slot = <uint32_t>((<uint64_t>page << vm.arena.slot_bits) + i)
        desc = load64(vm.arena.words + slot)
        if not desc & DESC_VALID:
            continue
        if is_table(desc, meta.level):
            complete = visit_page(vm, child_page(&vm.arena, desc), visit)
        elif visit.tags >> read_tag(desc) & 1:
            complete = visit_leaf(vm, slot, visit, block)
            if not complete:
                visit.start = meta.ipa + (i << shift)
        if not complete:
            break
    release_page(vm, page)
    return complete


cdef bint visit_context(vm_t *vm, context_t *context, visit_t *visit) noexcept nogil:
    """Every leaf of a context that overlaps [start, end) of its IPA; False when the budget is spent, and then ``start``
    is where to go on."""
    cdef uint32_t i
    for i in range(<uint32_t>1 << context.shadow.concatenated_bits):
        if not visit_page(vm, context.shadow.root + i, visit):
            return False
    return True


cdef bint drop_below(vm_t *vm, uint32_t slot) noexcept nogil:
    """Remove the leaves under the table that ``slot`` points to, and with the last of them the table; False if there
    are more than one section should drop."""
    cdef visit_t visit
    visit_init(&visit, OP_DROP, 0, ~<uint64_t>0)
    visit.budget = DROP_CHUNK
    return visit_page(vm, child_page(&vm.arena, load64(vm.arena.words + slot)), &visit)


cdef void drop_tables_in(vm_t *vm, uint32_t page) noexcept nogil:
    cdef page_t *meta = &vm.arena.pages[page]
    cdef uint64_t i, desc
    cdef uint32_t slot, child
    if not meta.live:
        free_empty(vm, page)
        return
    pin_page(&vm.arena, page)
    for i in range(<uint64_t>1 << vm.arena.slot_bits):
        slot = <uint32_t>((<uint64_t>page << vm.arena.slot_bits) + i)
        desc = load64(vm.arena.words + slot)
        if is_table(desc, meta.level):
            child = child_page(&vm.arena, desc)
            if meta.level + 1 < FINAL_LEVEL or not vm.arena.pages[child].live:
                drop_tables_in(vm, child)
            else:
                vm.removed += vm.arena.pages[child].live
                drop_page_whole(&vm.arena, child)
        elif desc & DESC_VALID:
            drop_leaf(vm, slot)
    release_page(vm, page)


cdef void drop_tables(vm_t *vm, context_t *context) noexcept nogil:
    """Empty a context by whole tables, without looking at their leaves. Only where there is no reverse map."""
    cdef uint32_t i
    for i in range(<uint32_t>1 << context.shadow.concatenated_bits):
        drop_tables_in(vm, context.shadow.root + i)


cdef uint64_t drop_everything(vm_t *vm) noexcept nogil:
    """Empty every context, one leaf after the other or by tables as the policy says; how many leaves went."""
    cdef uint64_t before = vm.removed
    cdef uint32_t i
    cdef visit_t visit
    for i in range(vm.contexts_used):
        if not vm.contexts[i].generation or is_empty(vm, &vm.contexts[i]):
            continue                        # one that is being recycled has no owner, but leaves
        owe_context(&vm.owed, i)
        if vm.teardown != TEARDOWN_BLOW_AWAY_LEAN:
            visit_init(&visit, OP_DROP, 0, ~<uint64_t>0)
            visit_context(vm, &vm.contexts[i], &visit)
        else:
            drop_tables(vm, &vm.contexts[i])
    return vm.removed - before


cdef uint64_t empty_whole(vm_t *vm, uint32_t index) noexcept nogil:
    """Drop every leaf of a context in this section; how many there were."""
    cdef context_t *context = &vm.contexts[index]
    cdef visit_t visit
    owe_context(&vm.owed, index)
    visit_init(&visit, OP_DROP, 0, ~<uint64_t>0)
    intervals_lose(context.intervals)
    visit_context(vm, context, &visit)
    intervals_reset(context.intervals)
    return visit.dropped


cdef void empty_partly(vm_t *vm, uint32_t index) noexcept nogil:
    """Drop as many leaves of a context as one section should; an interval map goes as a whole."""
    cdef visit_t visit
    if vm.teardown == TEARDOWN_INTERVAL_MAP:
        empty_whole(vm, index)
        return
    owe_context(&vm.owed, index)
    visit_init(&visit, OP_DROP, 0, ~<uint64_t>0)
    visit.budget = DROP_CHUNK
    visit_context(vm, &vm.contexts[index], &visit)


cdef bint evict_cold_context(vm_t *vm, uint32_t keep) noexcept nogil:
    """Take leaves of the least recently used context that no vCPU holds. Where none of those holds anything, that stays
    so until a context is acquired or released: all are looked at once."""
    cdef context_t *context
    cdef context_t *coldest = NULL
    cdef uint32_t i, at = 0
    if vm.all_cold_empty == vm.clock:
        return False
    for i in range(vm.contexts_used):
        context = &vm.contexts[i]
        if context.valid and not context.refs and i != keep and not is_empty(vm, context):
            if coldest == NULL or context.last_used < coldest.last_used:
                coldest = context
                at = i
    if coldest == NULL:
        vm.all_cold_empty = vm.clock
        return False
    empty_partly(vm, at)
    return True


cdef bint evict_leaf_table(vm_t *vm, uint32_t keep_context, uint64_t keep_ipa) noexcept nogil:
    """Empty one shadow table of pages, in turn; not the one that is about to be used. Each turn but the first passes
    only tables that hold nothing, and those go with it."""
    cdef arena_t *arena = &vm.arena
    cdef uint32_t passed = 0
    cdef page_t *meta
    cdef visit_t visit
    while passed < 2:
        vm.evict_hand = pageset_next(&arena.leaf_tables, vm.evict_hand)
        if not vm.evict_hand:
            passed += 1
            continue
        vm.evict_looked += 1
        meta = &arena.pages[vm.evict_hand]
        if meta.context == keep_context and keep_ipa - meta.ipa < level_span(arena.granule_bits, FINAL_LEVEL - 1):
            continue
        if not meta.live:                   # left by a fault that found no memory
            free_empty(vm, vm.evict_hand)
            continue
        visit_init(&visit, OP_DROP, 0, ~<uint64_t>0)
        visit_page(vm, vm.evict_hand, &visit)
        return True
    return False


cdef bint evict_any_context(vm_t *vm) noexcept nogil:
    """The last resort: take leaves of contexts that are in use too, in turn."""
    cdef uint32_t _looked
    for _looked in range(vm.contexts_used):
        vm.context_hand = vm.context_hand + 1 if vm.context_hand + 1 < vm.contexts_used else 0
        if vm.contexts[vm.context_hand].generation and not is_empty(vm, &vm.contexts[vm.context_hand]):
            empty_partly(vm, vm.context_hand)
            return True
    return False


cdef bint evict(vm_t *vm, uint32_t keep_context, uint64_t keep_ipa) noexcept nogil:
    """Make room: a cold context, else a leaf table, else any context; False when no shadow leaf is left."""
    if evict_cold_context(vm, keep_context) or evict_leaf_table(vm, keep_context, keep_ipa) or evict_any_context(vm):
        vm.evictions += 1
        return True
    return False
