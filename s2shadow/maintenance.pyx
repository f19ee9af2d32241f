"""What a TLBI removes.

The extent rule: a shadow leaf is a fragment of one L1 leaf, and L1 may name any address inside that leaf. So an
operation on [start, end) takes every leaf of guest level l that lies in the range rounded out to L1's block size at
that level. Levels that a context does not hold are skipped at its root.
"""

from s2shadow.arch cimport LEVEL_STAGE2_OFF, level_shift, level_span
from s2shadow.leaf cimport OP_DROP, is_empty, visit_context, visit_init, visit_t
from s2shadow.owed cimport owe_context, owed_begin, owed_end
from s2shadow.vm cimport DROP_CHUNK, context_t, lock_exclusive, sched_yield, unlock


cdef bint is_named(const context_t *context, const maintenance_t *operation) noexcept nogil:
    if not context.valid:
        return False
    if operation.scope == SCOPE_ALL:
        return True
    if context.config.vmid != operation.vmid:
        return False
    if operation.scope == SCOPE_VMID:
        return True
    if not context.config.enabled:
        return False
    return not operation.granule_bits or context.config.granule_bits == operation.granule_bits


cdef bint drop_chunked(vm_t *vm, context_t *context, visit_t *visit) noexcept nogil:
    """Drop what a visit names, letting go of the lock between chunks; False if the context got another owner, whose
    leaves the operation does not name."""
    cdef uint64_t generation = context.generation
    visit.budget = DROP_CHUNK
    while not visit_context(vm, context, visit):
        unlock(&vm.lock)
        sched_yield()
        lock_exclusive(&vm.lock)
        if context.generation != generation:
            return False
        visit.budget = DROP_CHUNK
    return True


cdef void drop_whole(vm_t *vm, uint32_t index, maintenance_t *operation) noexcept nogil:
    cdef visit_t visit
    if is_empty(vm, &vm.contexts[index]):
        return
    owe_context(&vm.owed, index)
    visit_init(&visit, OP_DROP, 0, ~<uint64_t>0)
    drop_chunked(vm, &vm.contexts[index], &visit)
    operation.removed += visit.dropped


cdef void drop_extents(vm_t *vm, context_t *context, maintenance_t *operation) noexcept nogil:
    cdef visit_t visit
    cdef uint64_t span
    cdef int level
    for level in range(-1, 4):
        if level_shift(context.config.granule_bits, level) >= 64:
            continue                        # no such level with this granule
        if not operation.levels >> (level - LEVEL_STAGE2_OFF) & 1:
            continue
        span = level_span(context.config.granule_bits, level)
        visit_init(&visit, OP_DROP, operation.start & ~(span - 1), ((operation.end - 1) | (span - 1)) + 1)
        visit.tags = <uint8_t>(1 << (level - LEVEL_STAGE2_OFF))
        if not drop_chunked(vm, context, &visit):
            operation.removed += visit.dropped
            return
        operation.removed += visit.dropped


cdef void apply_maintenance(vm_t *vm, maintenance_t *operation) noexcept nogil:
    """Remove exactly what the operation names; it never acquires a context."""
    cdef uint32_t i
    operation.removed = 0
    operation.visited = 0
    lock_exclusive(&vm.lock)
    owed_begin(&vm.owed)
    for i in range(vm.context_count):
        if not is_named(&vm.contexts[i], operation):
            continue
        operation.visited += 1
        if operation.scope == SCOPE_IPA:
            if operation.start < operation.end:
                drop_extents(vm, &vm.contexts[i], operation)
        else:
            drop_whole(vm, i, operation)
    owed_end(&vm.owed)
    unlock(&vm.lock)
