# The reverse map: canonical block -> every shadow leaf of that size that maps it.
#
# A sparse radix over cIPA, shaped like a table of the host's granule. A node at level l has a head for each
# block of level l's size; heads and links are slot names (table.pxd). ``prev`` of a list's first leaf is the
# tagged name of its head, so that a leaf is unlinked in O(1) and its cIPA is found without storing it.

from libc.stdint cimport int8_t, uint32_t, uint64_t

from s2shadow.arch cimport FINAL_LEVEL, level_shift
from s2shadow.atomics cimport load32
from s2shadow.table cimport arena_t, pthread_mutex_t

cdef enum:
    HEAD_TAG = 0x80000000u
    CHAIN_LIMIT = 64            # how far a leaf's head is looked for before the leaf is refreshed instead

ctypedef struct node_t:
    uint64_t cipa
    uint32_t parent             # name of the entry in the parent, 0 for the root
    uint32_t next_free
    uint32_t used               # heads that are not empty, plus children
    int8_t level

ctypedef struct rmap_t:
    arena_t *arena              # owner of the links; its bound covers heads and nodes
    uint32_t *heads             # by name: node << slot_bits | index
    uint32_t *children
    node_t *nodes
    uint32_t node_limit
    uint32_t next_node
    uint32_t free_node
    uint32_t root
    pthread_mutex_t lock

cdef bint rmap_init(rmap_t *rmap, arena_t *arena, int input_bits) noexcept nogil
cdef void rmap_destroy(rmap_t *rmap) noexcept nogil
cdef uint32_t rmap_ensure(rmap_t *rmap, uint64_t cipa, int level) noexcept nogil
cdef uint32_t rmap_find(const rmap_t *rmap, uint64_t cipa, int level) noexcept nogil
cdef void rmap_push(rmap_t *rmap, uint32_t head, uint32_t slot) noexcept nogil
cdef void rmap_unlink(rmap_t *rmap, uint32_t slot) noexcept nogil
cdef void rmap_tidy(rmap_t *rmap, uint64_t cipa) noexcept nogil
cdef void pin_node(rmap_t *rmap, uint32_t node) noexcept nogil
cdef void unpin_node(rmap_t *rmap, uint32_t node) noexcept nogil


cdef inline uint32_t *link_next(const arena_t *arena, uint32_t slot) noexcept nogil:
    return <uint32_t *>(arena.links + slot)


cdef inline uint32_t *link_prev(const arena_t *arena, uint32_t slot) noexcept nogil:
    return <uint32_t *>(arena.links + slot) + 1


cdef inline uint64_t head_cipa(const rmap_t *rmap, uint32_t head) noexcept nogil:
    cdef const node_t *node = &rmap.nodes[head >> rmap.arena.slot_bits]
    cdef uint64_t index = head & ((1 << rmap.arena.slot_bits) - 1)
    return node.cipa + (index << level_shift(rmap.arena.granule_bits, node.level))


cdef inline bint leaf_cipa(const rmap_t *rmap, uint32_t slot, uint64_t *cipa) noexcept nogil:
    """cIPA of a leaf's block; False if its list is so long that the head was not reached."""
    cdef int steps
    cdef uint32_t prev
    for steps in range(CHAIN_LIMIT):
        prev = load32(link_prev(rmap.arena, slot))
        if prev & HEAD_TAG:
            cipa[0] = head_cipa(rmap, prev & ~<uint32_t>HEAD_TAG)
            return True
        slot = prev
    return False


cdef inline bint rmap_is_empty(const rmap_t *rmap) noexcept nogil:
    return load32(&rmap.nodes[rmap.root].used) == 0
