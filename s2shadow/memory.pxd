# L1's physical memory as a walker sees it, and the one seam through which descriptors are read and swapped.

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from s2shadow.arch cimport byteswap64
from s2shadow.atomics cimport cas64, load64

ctypedef struct region_t:
    uint64_t start
    uint64_t size
    uint8_t *host               # NULL for a device region, and where the memory is the embedder's
    uint8_t readonly
    uint8_t device

# Where the descriptors of a region are that is the embedder's memory; words as a little-endian load sees them.
ctypedef struct desc_source_t:
    int (*read)(void *opaque, uint64_t cipa, uint64_t *word) noexcept nogil     # NULL: the region is no such
    int (*cas)(void *opaque, uint64_t cipa, uint64_t *expected, uint64_t desired) noexcept nogil
    void *opaque

# An immutable list of regions, sorted by start. Changes publish a new one.
ctypedef struct region_map_t:
    uint32_t count
    region_t *regions
    desc_source_t *sources      # in step with the regions

# What the readers of one memory share.
ctypedef struct memory_t:
    region_map_t *map
    uint64_t epoch              # changes with the map

ctypedef enum question_t:
    QUESTION_NONE
    QUESTION_READ
    QUESTION_CAS

cdef enum:
    ANSWERS = 8                 # a walk reads five descriptors at most, unless L1 rebuilds its tables meanwhile

ctypedef struct answer_t:
    uint64_t address
    uint64_t word
    uint8_t readable
    uint8_t swap_refused

# What the embedder said of its descriptors during the walk at hand, and what it must be asked next. An embedder is
# asked with no lock held and the walk then starts over: ``stamp`` tells whether anything came between, which makes
# the answers void.
ctypedef struct answers_t:
    const uint64_t *clock       # changes with every TLBI and every change of the regions
    uint64_t stamp
    uint32_t count
    uint8_t swapped             # some descriptor was
    question_t question
    desc_source_t source        # whom to ask
    uint64_t address
    uint64_t expected           # QUESTION_CAS
    uint64_t desired
    answer_t known[ANSWERS]

# One reader's window: the map it uses, and the regions it last hit (one compare on the fast path).
ctypedef struct mem_view_t:
    const region_map_t *map
    uint64_t epoch
    region_t tables[5]          # that of the last descriptor of each level, by level + 1; size 0: none, or no RAM
    region_t output             # that of the last output address
    answers_t *answers          # NULL where nobody can be asked

ctypedef enum cas_result_t:
    CAS_DONE
    CAS_LOST
    CAS_REFUSED

cdef const region_t *search_region(const mem_view_t *view, uint64_t address, region_t *last) noexcept nogil
cdef const uint64_t *word_elsewhere(mem_view_t *view, uint64_t address) noexcept nogil
cdef void ask_swap(mem_view_t *view, uint64_t address, uint64_t expected, uint64_t desired) noexcept nogil
cdef void view_begin(mem_view_t *view, const region_map_t *map, uint64_t epoch) noexcept nogil
cdef bint view_refresh(mem_view_t *view, const memory_t *memory) noexcept nogil
cdef const region_t *region_over(const region_map_t *map, uint64_t start, uint64_t size) noexcept nogil
cdef region_map_t *new_map(uint32_t count) noexcept nogil
cdef region_map_t *map_with(const region_map_t *map, const region_t *region,
                            const desc_source_t *source) noexcept nogil
cdef region_map_t *map_without(const region_map_t *map, uint32_t index) noexcept nogil


cdef inline bint is_asking(const mem_view_t *view) noexcept nogil:
    """Whether the last walk ended since the embedder must be asked."""
    return view.answers != NULL and view.answers.question != QUESTION_NONE


cdef inline const region_t *find_region(mem_view_t *view, uint64_t address) noexcept nogil:
    """The region that holds an output address, or NULL."""
    if address - view.output.start < view.output.size:
        return &view.output
    return search_region(view, address, &view.output)


cdef inline const region_t *find_tables(mem_view_t *view, int level, uint64_t address) noexcept nogil:
    """The RAM region that holds a descriptor of ``level``, or NULL."""
    cdef region_t *last = &view.tables[level + 1]
    if address - last.start < last.size:
        return last
    if search_region(view, address, last) == NULL or last.host == NULL:
        last.size = 0
        return NULL
    return last


cdef inline bint read_desc(mem_view_t *view, int level, uint64_t address, bint big_endian,
                           uint64_t *desc) noexcept nogil:
    """Read one descriptor (8-byte aligned); False where no RAM is."""
    cdef const region_t *region = find_tables(view, level, address)
    if region == NULL:
        return False
    desc[0] = load64(<const uint64_t *>(region.host + (address - region.start)))
    if big_endian:
        desc[0] = byteswap64(desc[0])
    return True


cdef inline cas_result_t cas_desc(mem_view_t *view, int level, uint64_t address, bint big_endian,
                                  uint64_t *expected, uint64_t desired) noexcept nogil:
    """Swap a descriptor that still holds ``expected``; when lost, ``expected`` becomes what is there."""
    cdef const region_t *region = find_tables(view, level, address)
    cdef uint64_t seen
    if region == NULL or region.readonly:
        return CAS_REFUSED
    seen = byteswap64(expected[0]) if big_endian else expected[0]
    if cas64(<uint64_t *>(region.host + (address - region.start)), &seen,
             byteswap64(desired) if big_endian else desired):
        return CAS_DONE
    expected[0] = byteswap64(seen) if big_endian else seen
    return CAS_LOST


cdef class _RetiredMap:
    cdef region_map_t *map
    cdef list owners                # of the memory that a walk may read through the map; empty until then

cdef class GuestMemory:
    cdef memory_t c
    cdef uint32_t users          # engines, and walks that run without the GIL
    cdef list owners             # of map.regions, in step
    cdef list retired            # maps that a user may still read
    cdef object lock
    cdef object __weakref__

    cdef void pin(self, mem_view_t *view) noexcept
    cdef void unpin(self) noexcept
    cdef bint refresh(self, mem_view_t *view) noexcept nogil
    cdef list publish(self, region_map_t *map, list owners, _RetiredMap old)
    cdef int fill(self, const uint64_t[::1] addresses, const uint8_t[:, ::1] pages) except -1
    cdef int check_overlap(self, const region_t *region) except -1
    cdef list insert(self, const region_t *region, object owner)
    cdef uint8_t *piece(self, uint64_t cipa, size_t wanted, bint writing, size_t *length) except NULL
