# What the faults of a batch will load, fetched before they are served one after the other.
#
# Nothing is decided here and nothing kept: tables are those that the vCPU remembers (plainfault.pxd), and where it
# remembers none, or a wrong one, a line is fetched in vain or not at all.

from libc.stdint cimport int64_t, uint32_t, uint64_t

from s2shadow.atomics cimport peek32, peek64, prefetch
from s2shadow.vm cimport EPOCH_MASK, LEAF_TABLES, guest_table_t, plain_t, vcpu_t, vm_t

cdef enum:
    FAULTS_AHEAD = 32


cdef inline void fetch_ahead(const vm_t *vm, const vcpu_t *vcpu, const uint64_t *ipas, int64_t n) noexcept nogil:
    """Fetch L1's leaf, the host's leaf, the shadow's slot with its links, and the head. Not for addresses in one leaf
    table: those are as good as always in order, and the hardware sees that by itself. Nor where L1's, the host's and
    the shadow's leaves differ in size: a block is split among pages then, which follow each other."""
    cdef const plain_t *plain = &vcpu.plain
    cdef const uint32_t *shadows = vm.contexts[vcpu.context].leaf_tables
    cdef const uint64_t *entries[FAULTS_AHEAD]
    cdef const guest_table_t *table
    cdef int bits = vm.arena.slot_bits, shift = plain.guest_shift, span = plain.guest_span
    cdef uint64_t mask = (<uint64_t>1 << bits) - 1, epoch = plain.epoch & EPOCH_MASK, number, place
    cdef uint32_t page
    cdef int64_t i
    if n > FAULTS_AHEAD:
        n = FAULTS_AHEAD
    if n < 2 or not plain.perm or not (ipas[0] ^ ipas[n - 1]) >> span:
        return
    if plain.shadow_shift != shift or plain.host_shift != shift or plain.shadow_span != span or plain.host_span != span:
        return
    for i in range(n):
        number = ipas[i] >> span
        place = ipas[i] >> shift & mask
        table = &plain.guest[number & (LEAF_TABLES - 1)]
        entries[i] = NULL
        if table.key == (number << span | epoch):
            entries[i] = table.words + place
            prefetch(entries[i])
        place |= <uint64_t>peek32(&shadows[number & (LEAF_TABLES - 1)]) << bits
        prefetch(vm.arena.words + place)
        prefetch(vm.arena.links + place)
    for i in range(n):
        if entries[i] == NULL:
            continue
        number = peek64(entries[i]) & plain.guest_oa
        page = plain.host[number >> span & (LEAF_TABLES - 1)]
        place = number >> shift & mask
        prefetch(vm.arena.words + (<uint64_t>page << bits | place))
        prefetch(vm.rmap.heads + (<uint64_t>peek32(&vm.arena.pages[page].node) << bits | place))
