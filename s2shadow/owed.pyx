"""The queue of owed TLB maintenance.

An operation is one host change, one TLBI or one relaxed leaf. All its rows carry its number, which is also the
ticket that the caller gets. A removed or narrowed leaf owes an invalidation by IPA, and the operation one of the
whole stage 1 of each context that it touched: combined entries survive an invalidation by IPA (Arm ARM, TLBI
IPAS2E1). When the queue is full it collapses to one VMALLS12 for each VMID that has rows.
"""

from libc.stdlib cimport free
from libc.string cimport memcpy, memmove, memset

from s2shadow.table cimport pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock
from s2shadow.vmem cimport allocate

cdef enum:
    CAPACITY = 8192


cdef bint owed_init(owed_t *owed, uint32_t contexts, bint track) noexcept nogil:
    memset(owed, 0, sizeof(owed_t))
    owed.vmids = contexts + FIRST_CONTEXT_VMID
    owed.track = track
    owed.capacity = CAPACITY if contexts * 2 < CAPACITY else contexts * 2
    owed.rows = <hw_tlbi_t *>allocate(owed.capacity, sizeof(hw_tlbi_t))
    owed.whole = <uint8_t *>allocate(owed.vmids, 1)
    owed.touched = <uint8_t *>allocate(owed.vmids, 1)
    owed.touched_list = <uint16_t *>allocate(owed.vmids, sizeof(uint16_t))
    pthread_mutex_init(&owed.lock, NULL)
    return owed.rows != NULL and owed.whole != NULL and owed.touched != NULL and owed.touched_list != NULL


cdef void owed_destroy(owed_t *owed) noexcept nogil:
    free(owed.rows)
    free(owed.whole)
    free(owed.touched)
    free(owed.touched_list)
    pthread_mutex_destroy(&owed.lock)


cdef void collapse(owed_t *owed) noexcept nogil:
    """Every VMID with rows gets one VMALLS12, under the oldest number: each ticket that was given stays true."""
    cdef uint64_t seq = owed.rows[0].seq
    cdef uint32_t i, vmid
    for i in range(owed.count):
        owed.whole[owed.rows[i].host_vmid] = 1
    owed.count = 0
    for vmid in range(owed.vmids):
        if owed.whole[vmid]:
            put(owed, seq, TLBI_VMALLS12, vmid, 0, 0, LEVEL_ANY, 0, False)


cdef void append(owed_t *owed, int op, uint32_t vmid, uint64_t start, uint64_t end, int level, uint16_t asid,
                 bint last_level) noexcept nogil:
    """Queue a row, unless a VMALLS12 that is still queued covers it; adjacent ranges of one operation merge."""
    cdef hw_tlbi_t *last
    if owed.whole[vmid]:
        return
    if op == TLBI_IPA and owed.count:
        last = owed.rows + owed.count - 1
        if (last.op == TLBI_IPA and last.seq == owed.seq and last.end == start and last.host_vmid == vmid
                and (last.level == level or not last_level)):
            last.end = end
            if not last_level:
                last.last_level = 0
                last.level = LEVEL_ANY
            return
    if owed.count == owed.capacity:
        collapse(owed)
        if owed.whole[vmid]:
            return
    if op == TLBI_VMALLS12:
        owed.whole[vmid] = 1
    put(owed, owed.seq, op, vmid, start, end, level, asid, last_level)


cdef void owe_context(owed_t *owed, uint32_t context) noexcept nogil:
    """The operation empties a whole context."""
    if owed.track:
        append(owed, TLBI_VMALLS12, context + FIRST_CONTEXT_VMID, 0, 0, LEVEL_ANY, 0, False)


cdef void owe_stage1(owed_t *owed, int op, uint32_t vmid, uint64_t start, uint64_t end, int level, uint16_t asid,
                     bint last_level) noexcept nogil:
    """L1 invalidated stage-1 entries: the hardware holds them under the host's VMID."""
    if owed.track:
        append(owed, op, vmid, start, end, level, asid, last_level)


cdef void owe_touched(owed_t *owed) noexcept nogil:
    cdef uint32_t vmid
    while owed.touched_count:
        owed.touched_count -= 1
        vmid = owed.touched_list[owed.touched_count]
        owed.touched[vmid] = 0
        if owed.count == owed.capacity:
            append(owed, TLBI_VMALL, vmid, 0, 0, LEVEL_ANY, 0, False)
        elif not owed.whole[vmid]:
            put(owed, owed.seq, TLBI_VMALL, vmid, 0, 0, LEVEL_ANY, 0, False)


cdef void owe_relaxed(owed_t *owed, uint32_t context, uint64_t start, uint64_t end, int level) noexcept nogil:
    """A leaf gained permissions (shared side): its old entry may go on denying until it is invalidated."""
    if not owed.track:
        return
    pthread_mutex_lock(&owed.lock)
    owed.seq += 1
    append(owed, TLBI_IPA, context + FIRST_CONTEXT_VMID, start, end, level, 0, True)
    append(owed, TLBI_VMALL, context + FIRST_CONTEXT_VMID, 0, 0, LEVEL_ANY, 0, False)
    pthread_mutex_unlock(&owed.lock)


cdef uint32_t owed_take(owed_t *owed, hw_tlbi_t *out, uint32_t limit) noexcept nogil:
    """Move up to ``limit`` rows out (exclusive side), oldest first; how many."""
    cdef uint32_t i, taken = owed.count if owed.count < limit else limit
    memcpy(out, owed.rows, taken * sizeof(hw_tlbi_t))
    for i in range(taken):
        if out[i].op == TLBI_VMALLS12:
            owed.whole[out[i].host_vmid] = 0
    owed.count -= taken
    memmove(owed.rows, owed.rows + taken, owed.count * sizeof(hw_tlbi_t))
    return taken
