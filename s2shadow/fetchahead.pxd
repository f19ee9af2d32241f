# What the faults of a batch will load, fetched before they are served one after the other.
#
# Nothing is decided here and nothing kept: tables are those that the vCPU remembers (plainfault.pxd), and where it
# remembers none, or a wrong one, a line is fetched in vain or not at all.

from libc.stdint cimport int64_t, uint32_t, uint64_t

from s2shadow.atomics cimport load32, peek64, prefetch
from s2shadow.vm cimport EPOCH_MASK, LEAF_TABLES, context_t, guest_table_t, plain_t, vcpu_t, vm_t

cdef enum:
    FAULTS_AHEAD = 32


cdef inline void fetch_ahead(const vm_t *vm, const vcpu_t *vcpu, const uint64_t *ipas, int64_t n) noexcept nogil:
    """Fetch L1's leaf, the host's leaf, the shadow's slot with its links, and the head. Addresses in one leaf table are
    as good as always in order, and the hardware sees that by itself."""
    cdef const plain_t *plain = &vcpu.plain
    cdef const context_t *context = &vm.contexts[vcpu.context]
    cdef const uint64_t *entries[FAULTS_AHEAD]
    cdef const guest_table_t *table
    cdef int bits = vm.arena.slot_bits
    cdef uint32_t mask = (<uint32_t>1 << bits) - 1, page, slot
    cdef uint64_t ipa, cipa
    cdef int64_t i
    if n > FAULTS_AHEAD:
        n = FAULTS_AHEAD
    if n < 2 or not plain.perm or not (ipas[0] ^ ipas[n - 1]) >> plain.guest_span:
        return
    for i in range(n):
        ipa = ipas[i]
        table = &plain.guest[ipa >> plain.guest_span & (LEAF_TABLES - 1)]
        entries[i] = NULL
        if table.key == (ipa >> plain.guest_span << plain.guest_span | plain.epoch & EPOCH_MASK):
            entries[i] = table.words + (ipa >> plain.guest_shift & vcpu.config.index_mask)
            prefetch(entries[i])
        page = load32(&context.leaf_tables[ipa >> plain.shadow_span & (LEAF_TABLES - 1)])
        slot = page << bits | (<uint32_t>(ipa >> plain.shadow_shift) & mask)
        prefetch(vm.arena.words + slot)
        prefetch(vm.arena.links + slot)
    for i in range(n):
        if entries[i] == NULL:
            continue
        cipa = peek64(entries[i]) & plain.guest_oa | ipas[i] & ((<uint64_t>1 << plain.guest_shift) - 1)
        page = plain.host[cipa >> plain.host_span & (LEAF_TABLES - 1)]
        slot = <uint32_t>(cipa >> plain.host_shift) & mask
        prefetch(vm.arena.words + (page << bits | slot))
        if plain.host_level == plain.shadow_level:
            prefetch(vm.rmap.heads + (vm.arena.pages[page].node << bits | slot))
