# distutils: language = c++
# distutils: extra_compile_args = -std=c++17
"""The interval map of a context, on std::map.

Linux keeps both maps in maple trees. Red-black trees are as good a stand-in as a library offers: O(log n) too, 104
bytes for a mapping's two nodes against 70 to 100. Their nodes are far more than a maple tree's, so they come from a
pool, which goes as a whole when a context is emptied. What stays is that a look-up in cold memory misses the cache
more often (65,536 ranges are 16 levels deep, in a maple tree 5): with large maps the times are above a maple tree's.
An allocation that fails is no reason to forget: the mapping is then not made, and the map is as it was (Linux marks
the map as broken and empties the context on every later event).
"""

from cython.operator cimport dereference, predecrement, preincrement
from libc.stdlib cimport free
from libcpp.utility cimport pair

from s2shadow.table cimport (
    arena_charge, arena_refund, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t,
    pthread_mutex_unlock,
)
from s2shadow.vmem cimport allocate, refused

cdef extern from *:
    """
    #include <map>
    #include <memory_resource>
    #include <new>
    struct s2_target { uint64_t end, ipa; };
    /* Nodes from chunks, given back all at once. Not the library's pool: GCC 12's crashes where memory for the list of
       its chunks is refused, after it took the chunk. */
    struct s2_pool : std::pmr::memory_resource {
        enum { BLOCK = 64, BLOCKS = 256 };                      /* a node of either map fits into a block */
        union s2_block { s2_block *next; char bytes[BLOCK]; };
        struct s2_chunk { s2_block blocks[BLOCKS]; s2_chunk *next; };
        int (*const refused)(void);
        s2_chunk *chunks = nullptr;
        s2_block *unused = nullptr;
        size_t left = 0;                                        /* blocks of the first chunk that were never used */
        explicit s2_pool(int (*refused)(void)) : refused(refused) {}
        void *do_allocate(size_t bytes, size_t) override
        {
            s2_block *block = unused;
            if (bytes > BLOCK)
                throw std::bad_alloc();
            if (block) {
                unused = block->next;
                return block;
            }
            if (!left) {
                if (refused())
                    throw std::bad_alloc();
                s2_chunk *chunk = new s2_chunk;
                chunk->next = chunks;
                chunks = chunk;
                left = BLOCKS;
            }
            return &chunks->blocks[--left];
        }
        void do_deallocate(void *p, size_t, size_t) override
        {
            s2_block *block = static_cast<s2_block *>(p);
            block->next = unused;
            unused = block;
        }
        bool do_is_equal(const std::pmr::memory_resource &other) const noexcept override { return this == &other; }
        void release() noexcept
        {
            while (chunks) {
                s2_chunk *chunk = chunks;
                chunks = chunk->next;
                delete chunk;
            }
            unused = nullptr;
            left = 0;
        }
    };
    struct s2_maps {
        s2_pool pool;
        std::pmr::map<uint64_t, s2_target> ranges{&pool};
        std::pmr::map<uint64_t, decltype(ranges)::iterator> starts{&pool};
        explicit s2_maps(int (*refused)(void)) : pool(refused) {}
        /* The nodes own nothing: they go with the pool's memory, not one by one. */
        void clear() noexcept
        {
            pool.release();
            new (&ranges) decltype(ranges)(&pool);
            new (&starts) decltype(starts)(&pool);
        }
    };
    /* What can throw stays in here: no exception may reach code that runs without the GIL. */
    static inline s2_maps *s2_make_maps(int (*refused)(void)) noexcept
    {
        try { return refused() ? NULL : new s2_maps(refused); } catch (...) { return NULL; }
    }
    template <class Map, class Place, class Key, class Value>
    static inline bool s2_insert_before(Map *map, Place next, Key key, Value value) noexcept
    {
        try { map->emplace_hint(next, key, value); return true; } catch (...) { return false; }
    }
    """
    ctypedef struct target_t "s2_target":           # of a range, by its start
        uint64_t end
        uint64_t ipa
    cdef cppclass ordered_map "std::pmr::map"[Key, Value]:
        cppclass iterator:
            pair[Key, Value] &operator*() noexcept nogil
            iterator operator++() noexcept nogil
            iterator operator--() noexcept nogil
            bint operator==(iterator) noexcept nogil
            bint operator!=(iterator) noexcept nogil
        iterator begin() noexcept nogil
        iterator end() noexcept nogil
        iterator find(Key) noexcept nogil
        iterator lower_bound(Key) noexcept nogil
        iterator upper_bound(Key) noexcept nogil
        iterator erase(iterator) noexcept nogil
        bint empty() noexcept nogil
        size_t size() noexcept nogil
    cdef cppclass maps_t "s2_maps":
        ordered_map[uint64_t, target_t] ranges
        ordered_map[uint64_t, ordered_map[uint64_t, target_t].iterator] starts
        void clear() noexcept nogil
    maps_t *s2_make_maps(bint (*refused)() noexcept nogil) noexcept nogil
    bint s2_insert_before[Map, Place, Key, Value](Map *map, Place next, Key key, Value value) noexcept nogil

ctypedef ordered_map[uint64_t, target_t].iterator range_at
ctypedef ordered_map[uint64_t, range_at].iterator start_at

cdef enum:
    # Three pointers and a colour come before the pair in each node of a std::map, whoever's library it is.
    RANGE_BYTES = 32 + 24
    START_BYTES = 32 + 16

cdef struct intervals_t:
    maps_t *cpp
    arena_t *arena              # its bound covers the nodes
    pthread_mutex_t lock
    bint lost                   # everything is UNKNOWN: the context is being emptied


cdef intervals_t *intervals_new(arena_t *arena) noexcept nogil:
    """An empty map, or NULL."""
    cdef intervals_t *maps = <intervals_t *>allocate(1, sizeof(intervals_t))
    if maps == NULL:
        return NULL
    maps.arena = arena
    maps.cpp = s2_make_maps(refused)
    if maps.cpp == NULL:
        free(maps)
        return NULL
    pthread_mutex_init(&maps.lock, NULL)
    return maps


cdef void intervals_free(intervals_t *maps) noexcept nogil:
    if maps == NULL:
        return
    maps.cpp.clear()
    del maps.cpp
    pthread_mutex_destroy(&maps.lock)
    free(maps)


cdef bint add_range(intervals_t *maps, range_at *next, uint64_t start, uint64_t end, uint64_t ipa) noexcept nogil:
    """Put a range before ``next``, which becomes its place; False, and nothing done, without memory."""
    cdef target_t target
    target.end = end
    target.ipa = ipa
    if not arena_charge(maps.arena, &maps.arena.rmap_bytes, RANGE_BYTES):
        return False
    if s2_insert_before(&maps.cpp.ranges, next[0], start, target):
        predecrement(next[0])
        return True
    arena_refund(maps.arena, &maps.arena.rmap_bytes, RANGE_BYTES)
    return False


cdef bint add_start(intervals_t *maps, uint64_t ipa, range_at at) noexcept nogil:
    if not arena_charge(maps.arena, &maps.arena.rmap_bytes, START_BYTES):
        return False
    if s2_insert_before(&maps.cpp.starts, maps.cpp.starts.lower_bound(ipa), ipa, at):
        return True
    arena_refund(maps.arena, &maps.arena.rmap_bytes, START_BYTES)
    return False


cdef void erase_range(intervals_t *maps, range_at at) noexcept nogil:
    maps.cpp.ranges.erase(at)
    arena_refund(maps.arena, &maps.arena.rmap_bytes, RANGE_BYTES)


cdef void erase_start(intervals_t *maps, start_at at) noexcept nogil:
    maps.cpp.starts.erase(at)
    arena_refund(maps.arena, &maps.arena.rmap_bytes, START_BYTES)


cdef range_at first_reaching(intervals_t *maps, uint64_t start) noexcept nogil:
    """The first range that ends above ``start``."""
    cdef range_at at = maps.cpp.ranges.upper_bound(start)
    if at != maps.cpp.ranges.begin():
        predecrement(at)
        if dereference(at).second.end <= start:
            preincrement(at)
    return at


cdef bint overlaps(intervals_t *maps, range_at at, uint64_t end) noexcept nogil:
    return at != maps.cpp.ranges.end() and dereference(at).first < end


cdef bint add_known(intervals_t *maps, range_at at, uint64_t start, uint64_t end, uint64_t ipa) noexcept nogil:
    """A range where none is, before ``at``."""
    if not add_range(maps, &at, start, end, ipa):
        return False
    if add_start(maps, ipa, at):
        return True
    erase_range(maps, at)
    return False


cdef bint make_unknown(intervals_t *maps, range_at at, uint64_t start, uint64_t end) noexcept nogil:
    """One UNKNOWN range in place of [start, end) and of all that overlaps it, of which ``at`` is the first."""
    cdef range_at spanning = at, gone
    cdef uint64_t span_end = end
    if start < dereference(at).first and not add_range(maps, &spanning, start, end, UNKNOWN_IPA):
        return False
    while overlaps(maps, at, end):
        if dereference(at).second.end > span_end:
            span_end = dereference(at).second.end
        if dereference(at).second.ipa != UNKNOWN_IPA:
            erase_start(maps, maps.cpp.starts.find(dereference(at).second.ipa))
        gone = at
        preincrement(at)
        if gone != spanning:
            erase_range(maps, gone)
    dereference(spanning).second.end = span_end
    dereference(spanning).second.ipa = UNKNOWN_IPA
    return True


cdef bint intervals_record(intervals_t *maps, uint64_t cipa, uint64_t size, uint64_t ipa) noexcept nogil:
    """Note that ``ipa`` maps [cipa, cipa + size), before the leaf is there. False, and nothing noted, when there is no
    memory. The one operation of the shared side."""
    cdef range_at at
    cdef bint recorded
    if maps.lost:
        return True
    pthread_mutex_lock(&maps.lock)
    at = first_reaching(maps, cipa)
    if overlaps(maps, at, cipa + size):
        recorded = make_unknown(maps, at, cipa, cipa + size)
    else:
        recorded = add_known(maps, at, cipa, cipa + size, ipa)
    pthread_mutex_unlock(&maps.lock)
    return recorded


cdef void intervals_remove(intervals_t *maps, uint64_t ipa) noexcept nogil:
    """The leaf at ``ipa`` goes, and with it its range, if that is known."""
    cdef start_at found
    if maps == NULL:
        return
    found = maps.cpp.starts.find(ipa)
    if found != maps.cpp.starts.end():
        erase_range(maps, dereference(found).second)
        erase_start(maps, found)


cdef bint intervals_find(intervals_t *maps, uint64_t start, uint64_t end, interval_t *out) noexcept nogil:
    """The first range that overlaps [start, end) of cIPA; False if none does."""
    cdef range_at at
    if start >= end:
        return False
    if maps.lost:
        out.start = 0
        out.end = out.ipa = UNKNOWN_IPA
        return True
    at = first_reaching(maps, start)
    if not overlaps(maps, at, end):
        return False
    out.start = dereference(at).first
    out.end = dereference(at).second.end
    out.ipa = dereference(at).second.ipa
    return True


cdef void clear(intervals_t *maps) noexcept nogil:
    arena_refund(maps.arena, &maps.arena.rmap_bytes, intervals_bytes(maps))
    maps.cpp.clear()


cdef void intervals_lose(intervals_t *maps) noexcept nogil:
    """The context is going to be emptied: drop the maps whole, not leaf by leaf. Until ``intervals_reset`` everything
    is UNKNOWN, so that a host change that comes between two chunks misses nothing."""
    if maps != NULL:
        clear(maps)
        maps.lost = True


cdef void intervals_reset(intervals_t *maps) noexcept nogil:
    """The context is empty: so is its map."""
    if maps != NULL:
        clear(maps)
        maps.lost = False


cdef bint intervals_empty(const intervals_t *maps) noexcept nogil:
    return maps == NULL or (maps.cpp.ranges.empty() and not maps.lost)


cdef uint64_t intervals_bytes(const intervals_t *maps) noexcept nogil:
    """Bytes of the nodes, without what the pool keeps beside them."""
    return maps.cpp.ranges.size() * RANGE_BYTES + maps.cpp.starts.size() * START_BYTES


cdef uint64_t intervals_start_of(intervals_t *maps, uint64_t ipa) noexcept nogil:
    """Canonical start of the known range at ``ipa``, or UNKNOWN_IPA."""
    cdef start_at found = maps.cpp.starts.find(ipa)
    return dereference(dereference(found).second).first if found != maps.cpp.starts.end() else UNKNOWN_IPA


cdef uint64_t intervals_known(const intervals_t *maps) noexcept nogil:
    """How many ranges are known, by the nested addresses."""
    return maps.cpp.starts.size()
