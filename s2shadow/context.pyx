"""Matching, recycling and counting of shadow contexts."""

from s2shadow.arch cimport FINAL_LEVEL
from s2shadow.atomics cimport load64
from s2shadow.intervals cimport intervals_lose, intervals_reset
from s2shadow.leaf cimport OP_DROP, visit_context, visit_init, visit_t
from s2shadow.lock cimport breathe
from s2shadow.owed cimport owe_context, owed_begin, owed_end
from s2shadow.table cimport arena_t, child_page, is_table, page_cost, page_t, table_init
from s2shadow.vm cimport DROP_CHUNK, NO_CONTEXT


cdef bint same_key(const s2_config_t *a, const s2_config_t *b) noexcept nogil:
    """Off: VMID alone. On: VMID, decoded BADDR, the VTCR bits that change a walk, EE, FWB, CD, S2PIR."""
    if a.enabled != b.enabled or a.vmid != b.vmid:
        return False
    if not a.enabled:
        return True
    return (a.base == b.base and a.walk_vtcr == b.walk_vtcr and a.big_endian == b.big_endian
            and a.fwb == b.fwb and a.cd == b.cd and a.s2pir == b.s2pir)


cdef uint32_t find_context(vm_t *vm, const s2_config_t *config) noexcept nogil:
    cdef uint32_t i
    for i in range(vm.context_count):
        if vm.contexts[i].valid and same_key(&vm.contexts[i].config, config):
            return i
    return NO_CONTEXT


cdef uint32_t choose_victim(vm_t *vm) noexcept nogil:
    """A context that was never used, else the least recently used one that no vCPU holds. There always is one: the
    pool has at least as many contexts as vCPUs, and the caller holds none."""
    cdef uint32_t i, best = NO_CONTEXT
    for i in range(vm.context_count):
        if vm.contexts[i].refs:
            continue
        if not vm.contexts[i].valid:
            return i
        if best == NO_CONTEXT or vm.contexts[i].last_used < vm.contexts[best].last_used:
            best = i
    return best


cdef void empty_context(vm_t *vm, uint32_t index) noexcept nogil:
    """Drop what a previous owner left, in chunks; the context is held and invalid meanwhile, so nobody finds it."""
    cdef visit_t visit
    visit_init(&visit, OP_DROP, 0, ~<uint64_t>0)
    visit.budget = DROP_CHUNK
    intervals_lose(vm.contexts[index].intervals)
    while not visit_context(vm, &vm.contexts[index], &visit):
        breathe(&vm.lock)
        visit.budget = DROP_CHUNK
    intervals_reset(vm.contexts[index].intervals)


cdef void shape_context(vm_t *vm, uint32_t index, const s2_config_t *config) noexcept nogil:
    """Give an empty context its key and a table for the input size that L1 chose."""
    cdef context_t *context = &vm.contexts[index]
    cdef int ia_bits = vm.features.pa_bits
    if config.enabled and not config.has_error and config.ia_bits < ia_bits:
        ia_bits = config.ia_bits
    table_init(&vm.arena, &context.shadow, context.shadow.root, <uint16_t>index, ia_bits)
    context.config = config[0]
    context.generation += 1
    context.rules.granule_bits = vm.arena.granule_bits
    context.rules.xnx = vm.features.xnx
    context.rules.guest_fwb = config.fwb
    context.rules.host_fwb = vm.features.fwb
    context.rules.guest_cd = config.cd
    context.rules.oa = vm.arena.oa
    context.rules.ignore_guest_attributes = vm.ignore_guest_attributes


cdef uint32_t context_acquire(vm_t *vm, const s2_config_t *config, uint64_t vttbr, uint64_t vtcr) noexcept nogil:
    """The context for a configuration, with one more reference (exclusive side; may let go of the lock)."""
    cdef uint32_t index = find_context(vm, config)
    cdef context_t *context
    if index == NO_CONTEXT:
        index = choose_victim(vm)
        context = &vm.contexts[index]
        context.refs = 1
        if context.valid:
            context.valid = 0
            vm.recycled += 1
            owed_begin(&vm.owed)
            owe_context(&vm.owed, index)
            empty_context(vm, index)
            owed_end(&vm.owed)
            if find_context(vm, config) != NO_CONTEXT:      # another vCPU made it while the lock was free
                context.refs = 0
                return context_acquire(vm, config, vttbr, vtcr)
        shape_context(vm, index, config)
        context.vttbr = vttbr
        context.vtcr = vtcr
        context.valid = 1
        if vm.contexts_used <= index:
            vm.contexts_used = index + 1
    else:
        context = &vm.contexts[index]
        context.refs += 1
    vm.clock += 1
    context.last_used = vm.clock
    return index


cdef void context_release(vm_t *vm, uint32_t index) noexcept nogil:
    vm.clock += 1
    vm.contexts[index].last_used = vm.clock
    vm.contexts[index].refs -= 1


cdef uint64_t count_entries(const arena_t *arena, uint32_t page) noexcept nogil:
    """Leaves of a table page and below. Counted on demand, so that no fault pays for a shared counter."""
    cdef const page_t *meta = &arena.pages[page]
    cdef uint64_t i, desc, total = 0
    if meta.level == FINAL_LEVEL:
        return meta.live
    if not meta.live:
        return 0
    for i in range(<uint64_t>1 << arena.slot_bits):
        desc = load64(arena.words + ((<uint64_t>page << arena.slot_bits) + i))
        if is_table(desc, meta.level):
            total += count_entries(arena, child_page(arena, desc))
        elif desc & 1:
            total += 1
    return total


cdef uint64_t count_tables(const arena_t *arena, uint32_t page) noexcept nogil:
    cdef const page_t *meta = &arena.pages[page]
    cdef uint64_t i, desc, total = 1
    if not meta.live:
        return 0
    if meta.level == FINAL_LEVEL:
        return 1
    for i in range(<uint64_t>1 << arena.slot_bits):
        desc = load64(arena.words + ((<uint64_t>page << arena.slot_bits) + i))
        if is_table(desc, meta.level):
            total += count_tables(arena, child_page(arena, desc))
    return total


cdef uint64_t context_entries(const vm_t *vm, const context_t *context) noexcept nogil:
    """Live leaves of a context (any side of the lock held)."""
    cdef uint64_t total = 0
    cdef uint32_t i
    for i in range(<uint32_t>1 << context.shadow.concatenated_bits):
        total += count_entries(&vm.arena, context.shadow.root + i)
    return total


cdef uint64_t context_table_bytes(const vm_t *vm, const context_t *context) noexcept nogil:
    """Bytes of a context's tables that hold something."""
    cdef uint64_t total = 0
    cdef uint32_t i
    for i in range(<uint32_t>1 << context.shadow.concatenated_bits):
        total += count_tables(&vm.arena, context.shadow.root + i)
    return total * page_cost(&vm.arena)
