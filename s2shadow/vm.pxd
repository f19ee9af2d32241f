# The state of one NestedVM, and its locks. No Python objects below this line of the house.

from libc.stdint cimport int8_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from s2shadow.atomics cimport peek32
from s2shadow.combine cimport combine_rules_t, combined_t
from s2shadow.config cimport features_t, s2_config_t
from s2shadow.dirty cimport dirty_t
from s2shadow.intervals cimport intervals_t
from s2shadow.lock cimport lock_shared, lock_t, reader_t, unlock_shared
from s2shadow.memory cimport mem_view_t
from s2shadow.owed cimport owed_t
from s2shadow.rmap cimport rmap_t
from s2shadow.table cimport arena_t, forget_path, is_page_of, table_path_t, table_t
from s2shadow.walker cimport walk_path_t

cdef extern from *:
    """
    /* S2SHADOW_STRESS builds let go of the lock as often as they can */
    #ifdef S2SHADOW_STRESS
    enum { S2_DROP_CHUNK = 2, S2_FAULT_CHUNK = 1 };
    #else
    enum { S2_DROP_CHUNK = 1024, S2_FAULT_CHUNK = 32 };
    #endif
    """
    const int DROP_CHUNK "S2_DROP_CHUNK"        # leaves removed or changed before the lock is let go for a moment
    const int FAULT_CHUNK "S2_FAULT_CHUNK"      # faults of a batch under one shared section

cdef enum:
    NO_CONTEXT = 0xFFFFFFFFu
    ACTIVE_RANGES = 64          # invalidations that may work in chunks at once
    CHANGES_KEPT = 64           # host changes that a populate in flight can be checked against
    LEAF_TABLES = 8192          # leaf tables of each kind that are remembered: 16 GiB with a 4K granule
    STAMP_MASK = 0x1FFFFF       # below the span of any leaf table
    EPOCH = 4                   # in a stamp, above the level

ctypedef enum teardown_t:
    TEARDOWN_REVERSE_MAP
    TEARDOWN_INTERVAL_MAP
    TEARDOWN_BLOW_AWAY
    TEARDOWN_BLOW_AWAY_LEAN

ctypedef enum populate_t:
    POPULATE_NONE
    POPULATE_LINEAR
    POPULATE_CALLABLE

cdef enum:
    KIND_HIT = 0
    KIND_MAPPED = 1
    KIND_L1_FAULT = 2
    KIND_HOST_FAULT = 3
    KIND_MMIO = 4
    KIND_RETRY = 5
    KIND_NO_MEMORY = 6
    KIND_MISS = 7

# The layout of FAULT_DTYPE.
ctypedef struct fault_t:
    uint8_t kind
    uint8_t fsc
    int8_t level
    uint8_t perm
    uint16_t context
    uint64_t ipa
    uint64_t cipa
    uint64_t pa
    uint64_t size
    uint64_t hpfar

ctypedef struct range_t:
    uint64_t start
    uint64_t end

# One shadow stage 2: its key is the walk configuration it was acquired with (spec 04, section 2).
ctypedef struct context_t:
    s2_config_t config
    table_t shadow
    combine_rules_t rules
    intervals_t *intervals      # NULL but under TEARDOWN_INTERVAL_MAP
    uint64_t vttbr              # as L1 wrote them when the context was acquired
    uint64_t vtcr
    uint64_t last_used
    uint64_t generation         # raised when the context gets another key
    uint32_t refs
    uint8_t valid
    uint32_t leaf_tables[LEAF_TABLES]       # by input address, modulo: hints as in plain_t

# The last combination: most neighbours have the same attributes. Keys pack what combine_leaves looks at.
ctypedef struct combine_memo_t:
    uint64_t guest
    uint64_t host               # 0: nothing is remembered
    combined_t leaf             # its descriptor without an address

# A leaf table of L1's that was walked: the input address that it starts at with the vCPU's stamp in its low bits.
ctypedef struct guest_table_t:
    uint64_t key
    const uint64_t *words

# The head of a fault_t.
ctypedef struct fault_head_t:
    uint8_t kind
    uint8_t fsc
    int8_t level
    uint8_t perm
    uint16_t context
    uint16_t nothing

# What the last fault looked like that was served without ado, and where leaf tables are: plainfault.pxd.
ctypedef struct plain_t:
    uint64_t stamp              # an epoch, raised when L1's tables must be forgotten, and the level of its leaf tables
    uint64_t learnt             # raised when what follows is written
    uint64_t guest_mask         # what a descriptor of L1's must say, but for the address,
    uint64_t guest_says
    uint64_t guest_oa
    uint64_t host_says          # and one of the host's
    uint64_t leaf               # the shadow leaf then, without an address
    uint64_t leaf_size
    uint64_t leaf_base          # bits of an address that its leaf shares,
    uint64_t guest_offset       # and those within L1's
    uint64_t host_offset        # and the host's
    uint64_t shadow_tag         # page_tag of the tables that hold the leaves
    uint64_t host_tag
    fault_head_t answer
    uint32_t accesses           # those that the leaf allows, a bit for each; 0: there is no last fault
    uint8_t guest_shift         # of the leaves' sizes
    uint8_t host_shift
    uint8_t shadow_shift
    uint8_t guest_span          # of the tables that hold them
    uint8_t host_span
    uint8_t shadow_span
    int8_t guest_level
    int8_t shadow_level
    guest_table_t guest[LEAF_TABLES]        # by input address, modulo
    uint32_t host[LEAF_TABLES]              # table pages: hints, that the page's own account must bear out

ctypedef struct vcpu_t:
    s2_config_t config
    mem_view_t view
    walk_path_t guest_path
    table_path_t shadow_path
    table_path_t canonical_path
    combine_memo_t memo
    plain_t plain
    uint64_t vttbr              # last loaded: what a TLBI acts under unless told otherwise
    uint64_t vtcr
    uint64_t hcr
    uint64_t asked_cipa         # what STEP_POPULATE asks the embedder for
    reader_t *reader            # of vm.lock
    uint32_t context
    uint32_t busy
    uint64_t kinds[8]
    uint64_t installed
    uint64_t relaxed
    uint64_t replaced
    uint8_t pad[64]             # counters of neighbours stay on lines of their own

ctypedef struct tlbi_counts_t:
    uint64_t operations
    uint64_t contexts           # that they named
    uint64_t removed
    uint64_t required

ctypedef struct vm_t:
    arena_t arena
    rmap_t rmap
    table_t canonical
    features_t features
    owed_t owed
    dirty_t dirty
    context_t *contexts
    vcpu_t *vcpus
    uint32_t context_count
    uint32_t vcpu_count
    teardown_t teardown
    uint8_t ignore_guest_attributes
    uint8_t tlbi_kvm72
    lock_t lock
    # populate
    populate_t populate
    int64_t linear_offset
    int linear_level            # of the largest block allowed
    uint8_t linear_fresh
    uint64_t fresh_next
    # host changes
    range_t active[ACTIVE_RANGES]
    uint32_t active_count
    range_t changes[CHANGES_KEPT]
    uint64_t host_seq
    uint32_t contexts_used      # contexts from here on were never acquired; 0: nothing ever was nested
    # counters of the exclusive side
    uint64_t clock
    uint64_t removed
    uint64_t narrowed
    uint64_t invalidations
    uint64_t kernel_steps
    uint64_t unknown_unmaps     # contexts emptied because an interval map did not know better
    uint64_t recycled
    uint64_t evictions
    uint64_t evict_looked       # leaf tables that evictions looked at
    uint64_t canonical_leaves
    tlbi_counts_t tlbis[5]      # by tlbi_class_t
    uint32_t evict_hand         # the leaf table that was evicted last
    uint32_t context_hand       # the context that eviction took leaves of last
    uint64_t all_cold_empty     # the clock when no context without references held anything
    uint32_t unfinished         # faults whose shared attempt may have left what the exclusive one tidies
    uint64_t guest_clock        # changes with every TLBI and every change of L1's memory that is made under the lock


cdef inline void forget_guest_path(vcpu_t *vcpu) noexcept nogil:
    vcpu.guest_path.level = vcpu.config.start_level
    vcpu.plain.stamp += EPOCH
    if not vcpu.plain.stamp & STAMP_MASK & ~(EPOCH - 1):    # the oldest would look like new ones
        memset(vcpu.plain.guest, 0xFF, sizeof(vcpu.plain.guest))


cdef inline void forget_ways(vcpu_t *vcpu) noexcept nogil:
    """What a vCPU remembers of its context, when that is another one now."""
    forget_guest_path(vcpu)
    forget_path(&vcpu.shadow_path)
    vcpu.memo.host = 0
    vcpu.plain.accesses = 0


cdef inline void count_answer(vm_t *vm, vcpu_t *vcpu, int kind) noexcept nogil:
    """Count an answer that was found with no lock held: counters are read on the exclusive side."""
    lock_shared(&vm.lock, vcpu.reader)
    vcpu.kinds[kind & 7] += 1
    unlock_shared(vcpu.reader)


cdef inline uint64_t kernel_steps_per_context(const vm_t *vm) noexcept nogil:
    """Linux walks a context's whole input space in steps of its largest block (stage2_apply_range)."""
    cdef int step_bits = 30 if vm.arena.granule_bits == 12 else 25 if vm.arena.granule_bits == 14 else 29
    return <uint64_t>1 << (vm.features.pa_bits - step_bits)


cdef inline bint is_active(const vm_t *vm, uint64_t cipa) noexcept nogil:
    """Whether an invalidation is at work on ``cipa``."""
    cdef uint32_t i
    for i in range(vm.active_count):
        if vm.active[i].start <= cipa < vm.active[i].end:
            return True
    return False


cdef inline bint overlaps_active(const vm_t *vm, uint64_t start, uint64_t end) noexcept nogil:
    """Whether an invalidation is at work on any of [start, end): nothing new may be mapped there."""
    cdef uint32_t i
    for i in range(vm.active_count):
        if vm.active[i].start < end and start < vm.active[i].end:
            return True
    return False


cdef inline void note_change(vm_t *vm, uint64_t start, uint64_t end) noexcept nogil:
    """Raise host_seq and remember the range: a populate in flight over it must not be installed."""
    cdef range_t *change
    vm.host_seq += 1
    change = &vm.changes[vm.host_seq % CHANGES_KEPT]
    change.start = start
    change.end = end


cdef inline uint32_t remembered_page(const vm_t *vm, uint32_t index, uint64_t ipa, int span,
                                     uint64_t tag) noexcept nogil:
    """The shadow's table with this tag, of 1 << ``span`` bytes, that ``ipa`` lies in, if it is remembered and still is
    that table; else 0."""
    cdef uint32_t page = peek32(&vm.contexts[index].leaf_tables[ipa >> span & (LEAF_TABLES - 1)])
    return page if is_page_of(&vm.arena.pages[page], ipa >> span << span, tag) else 0


cdef inline uint64_t read_tag(uint64_t desc) noexcept nogil:
    """Guest level + 2 of a shadow leaf."""
    return desc >> 55 & 7
