# Shadow leaves as the rest of the engine sees them: with reverse-map links, counts and owed maintenance in step.

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from s2shadow.arch cimport level_shift
from s2shadow.atomics cimport load64
from s2shadow.intervals cimport intervals_empty
from s2shadow.owed cimport owe_leaf
from s2shadow.table cimport leaf_removed, page_of, page_t
from s2shadow.vm cimport context_t, read_tag, vm_t

ctypedef enum leaf_op_t:
    OP_DROP
    OP_NARROW                   # keep only ``keep_perm``; drop leaves that stick out of [whole_start, whole_end)
    OP_AGE                      # note and, if asked, clear the access flag

# One visit of shadow leaves: by canonical range (``visit_canonical``) or by context (``visit_context``).
ctypedef struct visit_t:
    leaf_op_t op
    uint64_t start              # what is visited: cIPA, or IPA of the context
    uint64_t end
    uint64_t whole_start        # canonical range that a leaf must lie in not to stick out
    uint64_t whole_end
    uint64_t budget             # leaves that may still be visited before the visit has to pause
    uint64_t dropped
    uint8_t keep_perm
    uint8_t drop_sticking_out
    uint8_t clear_young
    uint8_t tags                # guest levels that a context visit takes: bit level + 2
    uint64_t required           # of the dropped: those that the exact rule names
    uint64_t exact_start        # what the operation named, before any over-approximation
    uint64_t exact_end
    uint8_t exact_tags
    uint8_t guest_granule_bits  # 0: every dropped leaf was required
    uint8_t *bitmap             # OP_AGE: one bit per host page of [whole_start, whole_end)

# Where a visit by canonical range goes on that let go of the lock (``visit_lists``).
ctypedef struct cursor_t:
    int level
    uint64_t cipa               # of the list
    uint32_t slot               # the leaf of it that is next; 0: the first
    uint8_t lost                # that leaf went meanwhile: the rest of its list goes too

cdef enum:
    ALL_TAGS = 0x3F

cdef void visit_init(visit_t *visit, leaf_op_t op, uint64_t start, uint64_t end) noexcept nogil
cdef bint visit_canonical(vm_t *vm, visit_t *visit) noexcept nogil
cdef void cursor_init(const vm_t *vm, const visit_t *visit, cursor_t *cursor) noexcept nogil
cdef bint visit_lists(vm_t *vm, visit_t *visit, cursor_t *cursor) noexcept nogil
cdef bint visit_context(vm_t *vm, context_t *context, visit_t *visit) noexcept nogil
cdef uint64_t drop_list(vm_t *vm, uint32_t head, uint64_t budget) noexcept nogil
cdef void drop_leaf(vm_t *vm, uint32_t slot) noexcept nogil
cdef bint drop_below(vm_t *vm, uint32_t slot) noexcept nogil
cdef void drop_tables(vm_t *vm, context_t *context) noexcept nogil
cdef uint64_t drop_everything(vm_t *vm) noexcept nogil
cdef void mark_young(uint8_t *bitmap, int page_bits, uint64_t origin, uint64_t start, uint64_t end) noexcept nogil
cdef bint shadow_cipa(const vm_t *vm, uint32_t slot, uint64_t *cipa) noexcept nogil
cdef bint find_cipa(vm_t *vm, uint32_t slot, bint however_far, uint64_t *cipa) noexcept nogil
cdef bint evict(vm_t *vm, uint32_t keep_context, uint64_t keep_ipa) noexcept nogil


cdef inline void clear_leaf_at(vm_t *vm, uint32_t slot, uint64_t desc, uint32_t context, uint64_t ipa,
                               int level, int shift) noexcept nogil:
    """``clear_leaf`` where all that there is to know about it is known."""
    cdef bint table_freed = leaf_removed(&vm.arena, slot, <int>read_tag(desc))
    owe_leaf(&vm.owed, context, ipa, ipa + (<uint64_t>1 << shift), level, table_freed)
    vm.removed += 1


cdef inline void clear_leaf(vm_t *vm, uint32_t slot) noexcept nogil:
    """Remove a live leaf that is on no list any more from its table and the counts."""
    cdef const page_t *meta = &vm.arena.pages[page_of(&vm.arena, slot)]
    cdef uint32_t index = slot & vm.arena.slot_mask
    cdef int shift = level_shift(vm.arena.granule_bits, meta.level)
    clear_leaf_at(vm, slot, load64(vm.arena.words + slot), meta.context, meta.ipa + (<uint64_t>index << shift),
                  meta.level, shift)


cdef inline bint is_empty(const vm_t *vm, const context_t *context) noexcept nogil:
    """Whether a context has neither leaves nor ranges, of which UNKNOWN ones may outlive their leaves."""
    cdef const page_t *page = &vm.arena.pages[context.shadow.root]
    cdef uint32_t i
    if context.intervals != NULL and not intervals_empty(context.intervals):
        return False
    for i in range(<uint32_t>1 << context.shadow.concatenated_bits):
        if page[i].live:
            return False
    return True
