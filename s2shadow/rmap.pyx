"""The reverse map's nodes and lists (spec 05, section 7)."""

from libc.string cimport memset

from s2shadow.arch cimport FINAL_LEVEL, level_shift, level_span
from s2shadow.atomics cimport bump32, cas32, fetch_add32, linger, load32, poke64, store32, store64
from s2shadow.table cimport (
    SLOT_LIMIT_BITS, arena_charge, arena_refund, arena_t, pthread_mutex_destroy, pthread_mutex_init,
    pthread_mutex_lock, pthread_mutex_unlock,
)
from s2shadow.vmem cimport prefer_huge, refused, release, reserve

cdef enum:
    SMALLEST_RMAP = 1024        # nodes; below this the reservation gives up


cdef uint64_t marker_count(const rmap_t *rmap) noexcept nogil:
    return rmap.arena.marker_limit - rmap.arena.marker_base


cdef void rmap_unmap(rmap_t *rmap) noexcept nogil:
    cdef uint64_t names = <uint64_t>rmap.node_limit << rmap.arena.slot_bits
    release(rmap.heads, names * 4)
    release(rmap.children, names * 4)
    release(rmap.nodes, rmap.node_limit * sizeof(node_t))
    release(rmap.marker_heads, marker_count(rmap) * 4)
    rmap.heads = NULL
    rmap.children = NULL
    rmap.nodes = NULL
    rmap.marker_heads = NULL


cdef bint rmap_init(rmap_t *rmap, arena_t *arena, int input_bits) noexcept nogil:
    """Reserve address space for every head that 31 bits can name, and make the root."""
    cdef int level = FINAL_LEVEL
    memset(rmap, 0, sizeof(rmap_t))
    rmap.arena = arena
    rmap.next_node = 1                      # node 0 is nil
    rmap.node_limit = <uint32_t>1 << (SLOT_LIMIT_BITS - arena.slot_bits)
    while rmap.node_limit >= SMALLEST_RMAP:
        rmap.heads = <uint32_t *>reserve((<uint64_t>rmap.node_limit << arena.slot_bits) * 4)
        rmap.children = <uint32_t *>reserve((<uint64_t>rmap.node_limit << arena.slot_bits) * 4)
        rmap.nodes = <node_t *>reserve(rmap.node_limit * sizeof(node_t))
        rmap.marker_heads = <uint32_t *>reserve(marker_count(rmap) * 4)
        if rmap.heads != NULL and rmap.children != NULL and rmap.nodes != NULL and rmap.marker_heads != NULL:
            pthread_mutex_init(&rmap.lock, NULL)
            prefer_huge(rmap.heads, (<uint64_t>rmap.node_limit << arena.slot_bits) * 4)
            while level_shift(arena.granule_bits, level) + arena.slot_bits < input_bits:
                level -= 1
            rmap.root = take_node(rmap, level)
            if not rmap.root:
                return False
            rmap.nodes[rmap.root].level = <int8_t>level
            rmap.nodes[rmap.root].key = node_key(0, level)
            rmap.root_level = <int8_t>level
            return True
        rmap_unmap(rmap)
        rmap.node_limit >>= 1
    return False


cdef void rmap_destroy(rmap_t *rmap) noexcept nogil:
    if rmap.heads != NULL:
        rmap_unmap(rmap)
        pthread_mutex_destroy(&rmap.lock)


cdef uint64_t node_cost(const rmap_t *rmap, int level) noexcept nogil:
    """Bytes of one node: its heads, its children above the last level, and what stands beside."""
    cdef uint64_t heads = <uint64_t>4 << rmap.arena.slot_bits
    return (heads if level == FINAL_LEVEL else 2 * heads) + sizeof(node_t)


cdef uint32_t take_node(rmap_t *rmap, int level) noexcept nogil:
    cdef uint32_t node
    if not arena_charge(rmap.arena, &rmap.arena.rmap_bytes, node_cost(rmap, level)):
        return 0
    pthread_mutex_lock(&rmap.lock)
    node = rmap.free_node
    if node:
        rmap.free_node = rmap.nodes[node].next_free
    elif rmap.next_node < rmap.node_limit and not refused():
        node = rmap.next_node
        rmap.next_node += 1
    pthread_mutex_unlock(&rmap.lock)
    if not node:
        arena_refund(rmap.arena, &rmap.arena.rmap_bytes, node_cost(rmap, level))
    return node


cdef void give_node(rmap_t *rmap, uint32_t node) noexcept nogil:
    """Take back a node whose heads and children are all empty. Others may look whether it is one that they remember."""
    cdef node_t *meta = &rmap.nodes[node]
    cdef int level = meta.level
    poke64(&meta.key, 0)
    meta.level = NODE_FREE
    meta.cipa = 0
    meta.parent = 0
    pthread_mutex_lock(&rmap.lock)
    rmap.nodes[node].next_free = rmap.free_node
    rmap.free_node = node
    pthread_mutex_unlock(&rmap.lock)
    arena_refund(rmap.arena, &rmap.arena.rmap_bytes, node_cost(rmap, level))


cdef inline uint32_t entry_name(const rmap_t *rmap, uint32_t node, uint64_t cipa) noexcept nogil:
    cdef int shift = level_shift(rmap.arena.granule_bits, rmap.nodes[node].level)
    cdef uint32_t mask = rmap.arena.slot_mask
    return node << rmap.arena.slot_bits | (<uint32_t>(cipa >> shift) & mask)


cdef uint32_t add_child(rmap_t *rmap, uint32_t name, uint64_t cipa) noexcept nogil:
    """The child that stands at ``name`` in the end (another thread may win), or 0."""
    cdef uint32_t node = name >> rmap.arena.slot_bits, seen = 0
    cdef int level = rmap.nodes[node].level + 1
    cdef uint32_t child = take_node(rmap, level)
    cdef int shift = level_shift(rmap.arena.granule_bits, level) + rmap.arena.slot_bits
    if not child:
        return 0
    rmap.nodes[child].parent = name
    rmap.nodes[child].level = <int8_t>level
    rmap.nodes[child].cipa = cipa >> shift << shift
    fetch_add32(&rmap.nodes[node].used, 1)
    linger()
    if cas32(rmap.children + name, &seen, child):
        # it is in its place: whoever remembers it may believe it, and not before, when it may yet be given back
        store64(&rmap.nodes[child].key, node_key(cipa >> shift << shift, level))
        return child
    fetch_add32(&rmap.nodes[node].used, <uint32_t>-1)
    give_node(rmap, child)
    return seen


cdef uint32_t rmap_ensure(rmap_t *rmap, uint64_t cipa, int level) noexcept nogil:
    """Name of the head for the block of ``level``'s size around ``cipa``, made on the way; 0 if there is no room."""
    cdef uint32_t node = rmap.root, name = entry_name(rmap, node, cipa)
    while rmap.nodes[node].level < level:
        node = load32(rmap.children + name)
        if not node:
            node = add_child(rmap, name, cipa)
            if not node:
                return 0
        name = entry_name(rmap, node, cipa)
    return name


cdef void unlink_after_leaf(rmap_t *rmap, uint32_t slot) noexcept nogil:
    """``rmap_unlink`` of a leaf that is not the first: a marker must stand before a leaf, one that does not goes."""
    cdef uint32_t following = load32(link_next(rmap.arena, slot)), prev = load32(link_prev(rmap.arena, slot))
    if is_marker(rmap, prev) and (not following or is_marker(rmap, following)):
        slot = prev
        prev = load32(link_prev(rmap.arena, slot))
        give_marker(rmap, slot)
    if following:
        store32(link_prev(rmap.arena, following), prev)
    if not prev & HEAD_TAG:
        store32(link_next(rmap.arena, prev), following)
        return
    prev &= ~<uint32_t>HEAD_TAG
    store32(rmap.heads + prev, following)
    if not following:
        node_less(rmap, prev >> rmap.arena.slot_bits)


cdef uint32_t take_marker(rmap_t *rmap, uint32_t head) noexcept nogil:
    """A marker that knows ``head``, or 0 (exclusive side)."""
    cdef uint32_t marker = rmap.free_marker
    if not marker and (rmap.next_marker == marker_count(rmap) or refused()):
        return 0
    if not arena_charge(rmap.arena, &rmap.arena.rmap_bytes, MARKER_BYTES):
        return 0
    if marker:
        rmap.free_marker = load32(link_next(rmap.arena, marker))
    else:
        marker = rmap.arena.marker_base + rmap.next_marker
        rmap.next_marker += 1
    rmap.marker_heads[marker - rmap.arena.marker_base] = head
    return marker


cdef void give_marker(rmap_t *rmap, uint32_t marker) noexcept nogil:
    store32(link_next(rmap.arena, marker), rmap.free_marker)
    rmap.free_marker = marker
    arena_refund(rmap.arena, &rmap.arena.rmap_bytes, MARKER_BYTES)


cdef bint room_for_markers(rmap_t *rmap, uint64_t count) noexcept nogil:
    if refused() or not arena_charge(rmap.arena, &rmap.arena.rmap_bytes, count * MARKER_BYTES):
        return False
    arena_refund(rmap.arena, &rmap.arena.rmap_bytes, count * MARKER_BYTES)
    return True


cdef uint32_t rmap_mark(rmap_t *rmap, uint32_t slot, bint however_far) noexcept nogil:
    """The head of the list that ``slot`` stands in (exclusive side). Markers are put between ``slot`` and the nearest
    leaf that knows its head, so that climbs from there are short: each stretch of a list is marked once, so this costs
    O(1) for each leaf ever pushed. Where they find no room each climb would be as long as the last: 0, unless
    ``however_far``, if it is longer than ``CLIMB_LIMIT``."""
    cdef uint32_t at = slot, head = 0, marker, prev
    cdef uint64_t steps = 0
    while not head:
        if steps and not however_far and steps % CLIMB_LIMIT == 0:
            if not room_for_markers(rmap, (steps + CLIMB_LIMIT) / MARKER_SPACING):
                return 0
        at = load32(link_prev(rmap.arena, at))
        head = known_head(rmap, at)
        steps += 1
    at = slot
    steps = 0
    while True:
        prev = load32(link_prev(rmap.arena, at))
        if known_head(rmap, prev):
            return head
        if steps % MARKER_SPACING == 0:
            marker = take_marker(rmap, head)
            if not marker:
                return head
            store32(link_prev(rmap.arena, marker), prev)
            store32(link_next(rmap.arena, marker), at)
            store32(link_next(rmap.arena, prev), marker)
            store32(link_prev(rmap.arena, at), marker)
        steps += 1
        at = prev


cdef void node_less(rmap_t *rmap, uint32_t node) noexcept nogil:
    """Count one used entry less, and free nodes that are empty now, upwards."""
    cdef uint32_t parent
    while bump32(&rmap.nodes[node].used, <uint32_t>-1) == 1 and node != rmap.root:
        parent = rmap.nodes[node].parent
        store32(rmap.children + parent, 0)
        give_node(rmap, node)
        node = parent >> rmap.arena.slot_bits


cdef void rmap_tidy(rmap_t *rmap, uint64_t cipa) noexcept nogil:
    """Free the empty nodes that a failed ``rmap_ensure`` left on the way to ``cipa`` (exclusive side)."""
    cdef uint32_t node = rmap.root, child
    while rmap.nodes[node].level < FINAL_LEVEL:
        child = load32(rmap.children + entry_name(rmap, node, cipa))
        if not child:
            break
        node = child
    if node != rmap.root and rmap.nodes[node].used == 0:
        pin_node(rmap, node)
        unpin_node(rmap, node)


cdef void pin_node(rmap_t *rmap, uint32_t node) noexcept nogil:
    """Keep a node while its lists are being emptied."""
    bump32(&rmap.nodes[node].used, 1)


cdef void unpin_node(rmap_t *rmap, uint32_t node) noexcept nogil:
    """Let go of a node; it is freed if it is empty."""
    node_less(rmap, node)


cdef uint32_t rmap_next_list(const rmap_t *rmap, int level, uint64_t *cipa, uint64_t end) noexcept nogil:
    """The first list of ``level`` that is not empty and whose block reaches beyond ``cipa`` and starts below ``end``:
    its head, and its block's start in ``cipa``; or 0. What is not there is stepped over as a whole."""
    cdef uint32_t node, name, mask = rmap.arena.slot_mask
    cdef uint64_t span
    while cipa[0] < end:
        node = rmap.root
        name = entry_name(rmap, node, cipa[0])
        while rmap.nodes[node].level < level and load32(rmap.children + name):
            node = load32(rmap.children + name)
            name = entry_name(rmap, node, cipa[0])
        span = level_span(rmap.arena.granule_bits, rmap.nodes[node].level)
        cipa[0] &= ~(span - 1)
        while rmap.nodes[node].level == level and name & mask != mask and not load32(rmap.heads + name):
            name += 1
            cipa[0] += span
        if rmap.nodes[node].level == level and load32(rmap.heads + name):
            return name if cipa[0] < end else 0
        cipa[0] += span
    return 0
