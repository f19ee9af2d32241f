# TLB maintenance that L0 owes its hardware: a queue in order of operations, with a bound.

from libc.stdint cimport int8_t, uint8_t, uint16_t, uint32_t, uint64_t

from s2shadow.table cimport pthread_mutex_t

cdef enum:
    TLBI_VMALLS12 = 0
    TLBI_IPA = 1
    TLBI_VA = 2
    TLBI_ASID = 3
    TLBI_VMALL = 4
    TLBI_ALL = 5
    TLBI_VAA = 6                # by VA, any ASID
    LEVEL_ANY = -2
    CANONICAL_VMID = 1          # host VMID of the canonical table, under which L1 itself runs; 0 is reserved
    FIRST_CONTEXT_VMID = 2      # host VMID of context 0

# The layout of HW_TLBI_DTYPE.
ctypedef struct hw_tlbi_t:
    uint64_t seq
    uint8_t op
    uint16_t host_vmid
    uint64_t start
    uint64_t end
    int8_t level
    uint16_t asid
    uint8_t last_level

ctypedef struct owed_t:
    hw_tlbi_t *rows
    uint32_t count
    uint32_t capacity
    uint32_t vmids               # 0 to vmids-1
    uint64_t seq                # of the operation under way, or of the last one
    uint8_t *whole              # by VMID: a VMALLS12 is queued and covers what comes
    uint8_t *touched            # by VMID: this operation owes it a VMALL at the end
    uint16_t *touched_list
    uint32_t touched_count
    uint8_t track
    pthread_mutex_t lock        # among those who relax leaves on the shared side

cdef bint owed_init(owed_t *owed, uint32_t contexts, bint track) noexcept nogil
cdef void owed_destroy(owed_t *owed) noexcept nogil
cdef void append(owed_t *owed, int op, uint32_t vmid, uint64_t start, uint64_t end, int level, uint16_t asid,
                 bint last_level) noexcept nogil
cdef void owe_context(owed_t *owed, uint32_t context) noexcept nogil
cdef void owe_stage1(owed_t *owed, int op, uint32_t vmid, uint64_t start, uint64_t end, int level, uint16_t asid,
                     bint last_level) noexcept nogil
cdef void owe_touched(owed_t *owed) noexcept nogil
cdef void owe_relaxed(owed_t *owed, uint32_t context, uint64_t start, uint64_t end, int level) noexcept nogil
cdef uint32_t owed_take(owed_t *owed, hw_tlbi_t *out, uint32_t limit) noexcept nogil


cdef inline void owed_begin(owed_t *owed) noexcept nogil:
    """Start an operation (exclusive side): it gets the next number."""
    owed.seq += 1


cdef inline void put(owed_t *owed, uint64_t seq, int op, uint32_t vmid, uint64_t start, uint64_t end, int level,
                     uint16_t asid, bint last_level) noexcept nogil:
    """Write a row; there must be room."""
    cdef hw_tlbi_t *row = owed.rows + owed.count
    owed.count += 1
    row.seq = seq
    row.op = <uint8_t>op
    row.host_vmid = <uint16_t>vmid
    row.start = start
    row.end = end
    row.level = <int8_t>level
    row.asid = asid
    row.last_level = last_level


cdef inline void owe_leaf(owed_t *owed, uint32_t context, uint64_t start, uint64_t end, int level,
                          bint table_freed) noexcept nogil:
    """The operation removed or narrowed a leaf. Where a table went with it, walk caches must forget the table too."""
    cdef uint32_t vmid = context + FIRST_CONTEXT_VMID
    cdef const hw_tlbi_t *last
    if not owed.track or owed.whole[vmid]:
        return
    if not owed.touched[vmid]:
        owed.touched[vmid] = 1
        owed.touched_list[owed.touched_count] = <uint16_t>vmid
        owed.touched_count += 1
    if table_freed:
        level = LEVEL_ANY
    last = owed.rows + owed.count - 1
    if owed.count == owed.capacity or (owed.count and last.end == start):
        append(owed, TLBI_IPA, vmid, start, end, level, 0, not table_freed)
    else:
        put(owed, owed.seq, TLBI_IPA, vmid, start, end, level, 0, not table_freed)


cdef inline void owed_end(owed_t *owed) noexcept nogil:
    """Finish an operation: the stage 1 of every context that it touched goes too."""
    cdef uint32_t vmid
    if owed.touched_count == 1 and owed.count < owed.capacity:
        owed.touched_count = 0
        vmid = owed.touched_list[0]
        owed.touched[vmid] = 0
        if not owed.whole[vmid]:
            put(owed, owed.seq, TLBI_VMALL, vmid, 0, 0, LEVEL_ANY, 0, False)
    elif owed.touched_count:
        owe_touched(owed)
