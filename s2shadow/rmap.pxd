# The reverse map: canonical block -> every shadow leaf of that size that maps it.
#
# A sparse radix over cIPA, shaped like a table of the host's granule. A node at level l has a head for each
# block of level l's size; heads and links are slot names (table.pxd). ``prev`` of a list's first leaf is the
# tagged name of its head, so that a leaf is unlinked in O(1) and its cIPA is found without storing it. In long
# lists (aliases) markers stand between the leaves, which know the head: a climb ends after a few steps.

from libc.stdint cimport int8_t, uint32_t, uint64_t

from s2shadow.arch cimport level_shift
from s2shadow.atomics cimport bump32, cas32, fetch_add32, linger, load32, load64, peek32, store32
from s2shadow.table cimport arena_t, page_t, pthread_mutex_t

cdef enum:
    HEAD_TAG = 0x80000000u
    CHAIN_LIMIT = 64            # how far a leaf's head is looked for before markers are put in
    CLIMB_LIMIT = 4096          # and how far where there is no room for them
    MARKER_SPACING = 32
    MARKER_BYTES = 12           # two links and the head
    NODE_FREE = -9              # level of a node that is not in use

ctypedef struct node_t:
    uint64_t cipa
    uint32_t parent             # name of the entry in the parent, 0 for the root
    uint32_t next_free
    uint32_t used               # heads that are not empty, plus children
    int8_t level
    uint64_t key                # cipa and level, once the node is where they say; for those who remember it

ctypedef struct rmap_t:
    arena_t *arena              # owner of the links; its bound covers heads and nodes
    uint32_t *heads             # by name: node << slot_bits | index
    uint32_t *children
    node_t *nodes
    uint32_t *marker_heads      # by marker
    uint32_t next_marker
    uint32_t free_marker
    uint32_t node_limit
    uint32_t next_node
    uint32_t free_node
    uint32_t root
    int8_t root_level
    pthread_mutex_t lock

cdef bint rmap_init(rmap_t *rmap, arena_t *arena, int input_bits) noexcept nogil
cdef void rmap_destroy(rmap_t *rmap) noexcept nogil
cdef uint32_t rmap_ensure(rmap_t *rmap, uint64_t cipa, int level) noexcept nogil
cdef void unlink_after_leaf(rmap_t *rmap, uint32_t slot) noexcept nogil
cdef void give_marker(rmap_t *rmap, uint32_t marker) noexcept nogil
cdef void node_less(rmap_t *rmap, uint32_t node) noexcept nogil
cdef uint32_t rmap_next_list(const rmap_t *rmap, int level, uint64_t *cipa, uint64_t end) noexcept nogil
cdef uint32_t rmap_mark(rmap_t *rmap, uint32_t slot, bint however_far) noexcept nogil
cdef void rmap_tidy(rmap_t *rmap, uint64_t cipa) noexcept nogil
cdef void pin_node(rmap_t *rmap, uint32_t node) noexcept nogil
cdef void unpin_node(rmap_t *rmap, uint32_t node) noexcept nogil


cdef inline uint32_t *link_next(const arena_t *arena, uint32_t slot) noexcept nogil:
    return <uint32_t *>(arena.links + slot)


cdef inline uint32_t *link_prev(const arena_t *arena, uint32_t slot) noexcept nogil:
    return <uint32_t *>(arena.links + slot) + 1


cdef inline uint64_t head_cipa(const rmap_t *rmap, uint32_t head) noexcept nogil:
    cdef const node_t *node = &rmap.nodes[head >> rmap.arena.slot_bits]
    cdef uint64_t index = head & rmap.arena.slot_mask
    return node.cipa + (index << level_shift(rmap.arena.granule_bits, node.level))


cdef inline bint is_marker(const rmap_t *rmap, uint32_t slot) noexcept nogil:
    return slot >= rmap.arena.marker_base


cdef inline uint32_t known_head(const rmap_t *rmap, uint32_t prev) noexcept nogil:
    """The head that a ``prev`` link tells, or 0 if it is a leaf."""
    if prev & HEAD_TAG:
        return prev & ~<uint32_t>HEAD_TAG
    return rmap.marker_heads[prev - rmap.arena.marker_base] if is_marker(rmap, prev) else 0


cdef inline bint leaf_cipa(const rmap_t *rmap, uint32_t slot, uint64_t *cipa) noexcept nogil:
    """cIPA of a leaf's block; False if neither head nor marker was reached: ``rmap_mark`` helps."""
    cdef int _step
    cdef uint32_t head
    for _step in range(CHAIN_LIMIT):
        slot = load32(link_prev(rmap.arena, slot))
        head = known_head(rmap, slot)
        if head:
            cipa[0] = head_cipa(rmap, head)
            return True
    return False


cdef inline bint rmap_is_empty(const rmap_t *rmap) noexcept nogil:
    return load32(&rmap.nodes[rmap.root].used) == 0


cdef inline uint64_t node_key(uint64_t cipa, int level) noexcept nogil:
    """Nodes start at multiples of 2 MiB at least. Never 0."""
    return cipa | <uint64_t>(level + 2)


cdef inline uint32_t rmap_head_known(const rmap_t *rmap, const page_t *page, uint32_t host_slot, uint64_t cipa,
                                     int level) noexcept nogil:
    """Name of the head for a leaf under the host leaf in ``host_slot`` of canonical table ``page``, which remembers the
    node of its own block; 0 where it does not, or there is no node for the leaf. A node that went meanwhile does not
    answer to that block."""
    cdef uint32_t node = load32(&page.node), name, mask = rmap.arena.slot_mask
    cdef int at = page.level
    if load64(&rmap.nodes[node].key) != node_key(page.ipa, at):
        return 0
    name = node << rmap.arena.slot_bits | (host_slot & mask)
    while at < level:
        node = load32(rmap.children + name)
        if not node:
            return 0
        at += 1
        name = node << rmap.arena.slot_bits
        name |= <uint32_t>(cipa >> level_shift(rmap.arena.granule_bits, at)) & mask
    return name


cdef inline uint32_t rmap_head_near(rmap_t *rmap, page_t *page, uint32_t host_slot, uint64_t cipa,
                                    int level) noexcept nogil:
    """The same where nodes are made on the way: 0 if there is no room. What was made for a fault that fails must be
    tidied by the exclusive side."""
    cdef uint32_t name = rmap_head_known(rmap, page, host_slot, cipa, level)
    if name:
        return name
    name = rmap_ensure(rmap, cipa, page.level)
    if not name:
        return 0
    store32(&page.node, name >> rmap.arena.slot_bits)
    return rmap_ensure(rmap, cipa, level) if page.level < level else name


cdef inline uint32_t rmap_find(const rmap_t *rmap, uint64_t cipa, int level) noexcept nogil:
    """Name of the head for the block of ``level``'s size around ``cipa``, or 0 if there are no leaves of its node."""
    cdef int bits = rmap.arena.slot_bits, shift = level_shift(rmap.arena.granule_bits, rmap.root_level)
    cdef uint32_t mask = (<uint32_t>1 << bits) - 1
    cdef uint32_t node, name = rmap.root << bits | (<uint32_t>(cipa >> shift) & mask)
    cdef int _level
    for _level in range(rmap.root_level, level):
        node = load32(rmap.children + name)
        if not node:
            return 0
        shift -= bits
        name = node << bits | (<uint32_t>(cipa >> shift) & mask)
    return name


cdef inline void rmap_push(rmap_t *rmap, uint32_t head, uint32_t slot, bint alone) noexcept nogil:
    """Put a leaf at the front of a list. Lock-free: pushes may race with pushes, never with unlinks."""
    cdef uint32_t first = load32(rmap.heads + head)
    cdef node_t *node = &rmap.nodes[head >> rmap.arena.slot_bits]
    store32(link_prev(rmap.arena, slot), HEAD_TAG | head)
    store32(link_next(rmap.arena, slot), first)
    if alone:
        store32(rmap.heads + head, slot)
    else:
        while not cas32(rmap.heads + head, &first, slot):
            store32(link_next(rmap.arena, slot), first)
    linger()
    if first:
        store32(link_prev(rmap.arena, first), slot)
    elif alone:
        bump32(&node.used, 1)
    else:
        fetch_add32(&node.used, 1)


cdef inline void head_emptied(rmap_t *rmap, uint32_t head) noexcept nogil:
    """A list lost its last leaf (exclusive side)."""
    cdef node_t *node = &rmap.nodes[head >> rmap.arena.slot_bits]
    store32(rmap.heads + head, 0)
    if node.used > 1:
        bump32(&node.used, <uint32_t>-1)
    else:
        node_less(rmap, head >> rmap.arena.slot_bits)


cdef inline void rmap_unlink(rmap_t *rmap, uint32_t slot) noexcept nogil:
    """Take a leaf out of its list (exclusive side)."""
    cdef uint32_t following, prev = peek32(link_prev(rmap.arena, slot))
    if not prev & HEAD_TAG:
        unlink_after_leaf(rmap, slot)
        return
    following = peek32(link_next(rmap.arena, slot))
    prev &= ~<uint32_t>HEAD_TAG
    if following:
        store32(link_prev(rmap.arena, following), HEAD_TAG | prev)
        store32(rmap.heads + prev, following)
    else:
        head_emptied(rmap, prev)
