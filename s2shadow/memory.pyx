"""L1's physical memory: engine-owned sparse regions, zero-copy buffers, device regions."""

import operator
import threading
from collections import namedtuple

from cpython.buffer cimport PyBUF_C_CONTIGUOUS, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport int64_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

from s2shadow.arguments cimport as_u64
from s2shadow.atomics cimport fetch_add32, load32, load64, load_pointer, store_pointer, store64
from s2shadow.vmem cimport allocate, release, reserve

PAGE = 4096
ADDRESS_LIMIT = 1 << 52

Region = namedtuple("Region", "start size readonly device")
Region.__doc__ = ("One region of L1's physical memory: ``start`` (cIPA) and ``size`` in bytes; ``readonly``: L1 cannot "
                  "write it; ``device``: MMIO, which walks never read.")


cdef const region_t *search_region(const mem_view_t *view, uint64_t address, region_t *last) noexcept nogil:
    """The region that holds ``address``, copied to ``last``, or NULL."""
    cdef uint32_t low = 0, high = view.map.count, middle
    cdef const region_t *region
    while low < high:
        middle = (low + high) >> 1
        region = &view.map.regions[middle]
        if address < region.start:
            high = middle
        elif address - region.start >= region.size:
            low = middle + 1
        else:
            last[0] = region[0]
            return last
    return NULL


cdef int64_t source_at(const mem_view_t *view, uint64_t address) noexcept nogil:
    """Index of the embedder's region that holds ``address``, or -1."""
    cdef uint32_t i
    for i in range(view.map.count):
        if address - view.map.regions[i].start < view.map.regions[i].size:
            return i if view.map.sources[i].read != NULL else -1
    return -1


cdef answer_t *answer_at(answers_t *answers, uint64_t address) noexcept nogil:
    """What the embedder said of a descriptor, or NULL. Nothing that it said before a TLBI counts after it."""
    cdef uint32_t i
    if answers.stamp != answers.clock[0]:
        answers.stamp = answers.clock[0]
        answers.count = 0
    for i in range(answers.count):
        if answers.known[i].address == address:
            return &answers.known[i]
    return NULL


cdef const uint64_t *word_elsewhere(mem_view_t *view, uint64_t address) noexcept nogil:
    """A word that is not in RAM of ours, as the embedder gave it. NULL where it has not been asked, and then the
    question is noted, or where nothing can be read."""
    cdef answer_t *known
    cdef int64_t index
    if view.answers == NULL:
        return NULL
    index = source_at(view, address)
    if index < 0:
        return NULL
    known = answer_at(view.answers, address)
    if known == NULL:
        view.answers.question = QUESTION_READ
        view.answers.source = view.map.sources[index]
        view.answers.address = address
        return NULL
    return &known.word if known.readable else NULL


cdef void ask_swap(mem_view_t *view, uint64_t address, uint64_t expected, uint64_t desired) noexcept nogil:
    """Note a swap that the embedder shall make, unless it refused that already: once it was made, the walk that starts
    over finds the word as it is."""
    cdef answer_t *known
    cdef int64_t index
    if view.answers == NULL:
        return
    index = source_at(view, address)
    if index < 0 or view.map.regions[index].readonly or view.map.sources[index].cas == NULL:
        return
    known = answer_at(view.answers, address)
    if known != NULL and known.swap_refused:
        return
    view.answers.question = QUESTION_CAS
    view.answers.source = view.map.sources[index]
    view.answers.address = address
    view.answers.expected = expected
    view.answers.desired = desired


cdef void view_begin(mem_view_t *view, const region_map_t *map, uint64_t epoch) noexcept nogil:
    """Read through this map from now on."""
    cdef int level
    view.map = map
    view.epoch = epoch
    for level in range(5):
        view.tables[level].size = 0
    view.output.size = 0


cdef bint view_refresh(mem_view_t *view, const memory_t *memory) noexcept nogil:
    """Take over a newer map; False if there is none. Regions only come while a user is there: hits stay right."""
    cdef uint64_t epoch = load64(&memory.epoch)
    if view.map != NULL and view.epoch == epoch:
        return False
    view_begin(view, <const region_map_t *>load_pointer(<void *const *>&memory.map), epoch)
    return True


cdef region_map_t *new_map(uint32_t count) noexcept nogil:
    """An empty map with room for ``count`` regions, or NULL."""
    cdef region_map_t *map = <region_map_t *>allocate(
        1, sizeof(region_map_t) + count * (sizeof(region_t) + sizeof(desc_source_t)))
    if map != NULL:
        map.count = count
        map.regions = <region_t *>(map + 1)
        map.sources = <desc_source_t *>(map.regions + count)
    return map


cdef const region_t *region_over(const region_map_t *map, uint64_t start, uint64_t size) noexcept nogil:
    """A region that overlaps [start, start + size), or NULL."""
    cdef uint32_t i
    for i in range(map.count):
        if start < map.regions[i].start + map.regions[i].size and map.regions[i].start < start + size:
            return &map.regions[i]
    return NULL


cdef region_map_t *map_with(const region_map_t *map, const region_t *region,
                            const desc_source_t *source) noexcept nogil:
    """A copy with one more region, or NULL; ``source`` may be NULL."""
    cdef uint32_t i, at = 0
    cdef region_map_t *more = new_map(map.count + 1)
    if more == NULL:
        return NULL
    while at < map.count and map.regions[at].start < region.start:
        at += 1
    for i in range(map.count):
        more.regions[i if i < at else i + 1] = map.regions[i]
        more.sources[i if i < at else i + 1] = map.sources[i]
    more.regions[at] = region[0]
    memset(&more.sources[at], 0, sizeof(desc_source_t))
    if source != NULL:
        more.sources[at] = source[0]
    return more


cdef region_map_t *map_without(const region_map_t *map, uint32_t index) noexcept nogil:
    """A copy without one region, or NULL."""
    cdef uint32_t i
    cdef region_map_t *fewer = new_map(map.count - 1)
    if fewer == NULL:
        return NULL
    for i in range(fewer.count):
        fewer.regions[i] = map.regions[i if i < index else i + 1]
        fewer.sources[i] = map.sources[i if i < index else i + 1]
    return fewer


cdef class _SparseBacking:
    """Anonymous memory, committed page by page as it is touched."""

    cdef void *address
    cdef size_t size

    def __cinit__(self, size_t size):
        self.size = 0
        self.address = reserve(size)
        if self.address == NULL:
            raise MemoryError(f"cannot reserve {size} bytes of address space for a memory region")
        self.size = size

    def __dealloc__(self):
        if self.size:
            release(self.address, self.size)


cdef class _BufferBacking:
    """A buffer held open: its owner can neither free nor resize it."""

    cdef Py_buffer view
    cdef bint held

    def __cinit__(self, buffer, bint readonly):
        self.held = False
        try:
            PyObject_GetBuffer(buffer, &self.view,
                               PyBUF_C_CONTIGUOUS if readonly else PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE)
        except (BufferError, ValueError, TypeError) as error:
            if isinstance(error, TypeError):
                raise TypeError(f"buffer must support the buffer protocol, got {type(buffer).__name__}") from None
            hint = "" if readonly else " (a read-only buffer needs readonly=True)"
            raise ValueError(f"buffer cannot be used: {error}{hint}") from None
        self.held = True

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.view)


cdef class _RetiredMap:
    def __cinit__(self):
        self.owners = []

    def __dealloc__(self):
        free(self.map)


cdef class GuestMemory:
    """L1's physical memory (cIPA space), a set of regions that do not overlap.

    Addresses and sizes are bytes and multiples of 4096, below 2^52. Engine-owned regions are zero-filled and
    committed as they are touched, so a region of 1 TiB costs nothing until used.

    Thread safety: regions may be added while walks run; a region cannot be removed while any walk runs or while
    a ``NestedVM`` uses this memory (``ValueError``).
    """

    def __cinit__(self):
        self.c.map = new_map(0)
        if self.c.map == NULL:
            raise MemoryError("region list")
        self.owners = []
        self.retired = []
        # Wherever Python makes an object, and wherever one goes, a finalizer may run that wants this memory, in this
        # thread. So a change is one piece, after all is made that it needs, and what goes does so without the lock.
        self.lock = threading.RLock()

    def __dealloc__(self):
        free(self.c.map)

    cdef void pin(self, mem_view_t *view) noexcept:
        """Start using the current map from a thread without the GIL; pair with ``unpin``."""
        fetch_add32(&self.users, 1)
        view.answers = NULL
        view.map = NULL
        self.refresh(view)

    cdef void unpin(self) noexcept:
        fetch_add32(&self.users, <uint32_t>-1)

    cdef bint refresh(self, mem_view_t *view) noexcept nogil:
        return view_refresh(view, &self.c)

    cdef list publish(self, region_map_t *map, list owners, _RetiredMap old):
        """Let the regions of ``map`` and those that own their memory take the place of the present ones, which ``old``
        takes up -> what nobody reads any more, to be dropped without the lock. What may fail comes first: a map that
        a walk reads must never be freed, nor an owner be lost."""
        cdef list unread = None, none_retired = old.owners
        try:
            self.retired.append(old)
        except MemoryError:
            free(map)
            raise
        old.map = self.c.map
        old.owners = self.owners
        store_pointer(<void **>&self.c.map, map)
        store64(&self.c.epoch, self.c.epoch + 1)
        self.owners = owners
        if fetch_add32(&self.users, 0) == 0:            # a full barrier between the new map and the look at its users
            unread = self.retired
            self.retired = none_retired
        return unread

    def add(self, cipa, size=None, *, buffer=None, bint readonly=False, bint device=False):
        """Add a region at ``cipa``: engine-owned of ``size`` bytes, over ``buffer`` without a copy, or a device.

        ``readonly`` is what L1 sees; a read-only buffer needs it. Raises ``ValueError`` for an unaligned base or
        size, a zero size, an overlap, or a buffer that is read-only, not C-contiguous, released or not 8-byte
        aligned; ``MemoryError`` when the address space is exhausted. Nothing is changed then.
        """
        cdef region_t region
        cdef _SparseBacking sparse
        cdef _BufferBacking held
        owner = None
        region.start = as_u64(cipa, "cipa")
        region.host = NULL
        if buffer is not None:
            if device:
                raise ValueError("a device region has no buffer")
            held = _BufferBacking(buffer, readonly)
            if size is not None and size != held.view.len:
                raise ValueError(f"size {size} differs from the buffer's {held.view.len} bytes")
            size = held.view.len
            region.host = <uint8_t *>held.view.buf
            if size and <uint64_t>region.host & 7:
                raise ValueError("buffer is not 8-byte aligned in host memory")
            owner = held
        elif size is None:
            raise TypeError("add() needs a size or a buffer")
        size = operator.index(size)
        self._check_range(region.start, size)
        region.size = size
        region.readonly = readonly
        region.device = device
        with self.lock:
            self.check_overlap(&region)
            if buffer is None and not device:
                sparse = _SparseBacking(size)
                region.host = <uint8_t *>sparse.address
                owner = sparse
            _unread = self.insert(&region, owner)

    @staticmethod
    def _check_range(uint64_t cipa, size):
        if size <= 0:
            raise ValueError(f"size must be positive, got {size}")
        if cipa % PAGE:
            raise ValueError(f"base {cipa:#x} is not aligned to {PAGE} bytes")
        if size % PAGE:
            raise ValueError(f"size {size:#x} is not a multiple of {PAGE} bytes")
        if cipa + size > ADDRESS_LIMIT:
            raise ValueError(f"region [{cipa:#x}, {cipa + size:#x}) reaches beyond 52 bits")

    cdef int check_overlap(self, const region_t *region) except -1:
        cdef const region_t *other = region_over(self.c.map, region.start, region.size)
        if other != NULL:
            start, end = other.start, other.start + other.size
            raise ValueError(f"region [{region.start:#x}, {region.start + region.size:#x}) overlaps "
                             f"[{start:#x}, {end:#x})")
        return 0

    cdef list insert(self, const region_t *region, object owner):
        cdef uint32_t at
        cdef region_map_t *map
        cdef list seen = None, owners = None
        cdef _RetiredMap old = _RetiredMap.__new__(_RetiredMap)
        while self.owners is not seen:
            seen = self.owners
            at = 0
            while at < self.c.map.count and self.c.map.regions[at].start < region.start:
                at += 1
            owners = [*seen[:at], owner, *seen[at:]]
        self.check_overlap(region)
        map = map_with(self.c.map, region, NULL)
        if map == NULL:
            raise MemoryError("region list")
        return self.publish(map, owners, old)

    cdef int fill(self, const uint64_t[::1] addresses, const uint8_t[:, ::1] pages) except -1:
        """Make an empty memory one of read-only pages, in one step: ``addresses`` are sorted and aligned to the pages,
        ``pages`` stays as it is and where it is while this memory lives."""
        cdef uint32_t i, count = <uint32_t>addresses.shape[0]
        cdef region_map_t *map
        cdef _RetiredMap old = _RetiredMap.__new__(_RetiredMap)
        held = _BufferBacking(pages, True)
        owners = [held] * count
        map = new_map(count)
        if map == NULL:
            raise MemoryError("region list")
        for i in range(count):
            map.regions[i].start = addresses[i]
            map.regions[i].size = pages.shape[1]
            map.regions[i].host = <uint8_t *>&pages[i, 0]
            map.regions[i].readonly = 1
        self.publish(map, owners, old)
        return 0

    def remove(self, cipa):
        """Remove the region that starts at ``cipa``; ``ValueError`` if none does or if it is in use."""
        cdef uint32_t at = 0
        cdef uint64_t start = as_u64(cipa, "cipa")
        cdef region_map_t *map
        cdef list seen = None, owners = None
        cdef _RetiredMap old = _RetiredMap.__new__(_RetiredMap)
        with self.lock:
            while self.owners is not seen:
                seen = self.owners
                at = 0
                while at < self.c.map.count and self.c.map.regions[at].start != start:
                    at += 1
                if at == self.c.map.count:
                    raise ValueError(f"no region starts at {cipa:#x}")
                owners = [*seen[:at], *seen[at + 1:]]
            if load32(&self.users):
                raise ValueError(f"region at {cipa:#x} is in use by an engine or a running walk")
            map = map_without(self.c.map, at)
            if map == NULL:
                raise MemoryError("region list")
            _unread = self.publish(map, owners, old)

    cdef uint8_t *piece(self, uint64_t cipa, size_t wanted, bint writing, size_t *length) except NULL:
        """Host address of ``cipa`` and how many of the ``wanted`` bytes are there."""
        cdef uint32_t i
        cdef region_t *region
        for i in range(self.c.map.count):
            region = &self.c.map.regions[i]
            if cipa >= region.start and cipa - region.start < region.size:
                if region.device:
                    raise ValueError(f"{cipa:#x} is in a device region")
                if writing and region.readonly:
                    raise ValueError(f"{cipa:#x} is in a read-only region")
                length[0] = min(wanted, region.size - (cipa - region.start))
                return region.host + (cipa - region.start)
        raise ValueError(f"{cipa:#x} is outside every region")

    def read(self, cipa, n):
        """``n`` bytes at ``cipa`` -> ``bytes``; adjacent regions read as one. ``ValueError`` outside RAM."""
        cdef size_t length = 0, done = 0, wanted = as_u64(n, "n")
        cdef uint64_t start = as_u64(cipa, "cipa")
        cdef const uint8_t *host
        if wanted > ADDRESS_LIMIT:
            raise ValueError(f"n must be at most 2^52, got {n}")
        cdef bytes data = PyBytes_FromStringAndSize(NULL, wanted)
        cdef char *out = data
        with self.lock:
            while done < wanted:
                host = self.piece(start + done, wanted - done, False, &length)
                memcpy(out + done, host, length)
                done += length
        return data

    def write(self, cipa, data):
        """Write the bytes of any C-contiguous buffer at ``cipa``.

        Nothing is written if any part is outside writable RAM: ``ValueError``.
        """
        cdef const uint8_t[::1] source = memoryview(data).cast("B")
        cdef size_t n = source.shape[0], length = 0, done = 0
        cdef uint64_t start = as_u64(cipa, "cipa")
        cdef uint8_t *host
        with self.lock:
            while done < n:
                self.piece(start + done, n - done, True, &length)
                done += length
            done = 0
            while done < n:
                host = self.piece(start + done, n - done, True, &length)
                memcpy(host, &source[done], length)
                done += length

    def read64(self, cipa):
        """The little-endian 64-bit word at ``cipa``; ``ValueError`` if not 8-byte aligned, or outside RAM."""
        cdef size_t length = 0
        cdef uint64_t address = as_u64(cipa, "cipa")
        if address & 7:
            raise ValueError(f"{cipa:#x} is not 8-byte aligned")
        with self.lock:
            return load64(<const uint64_t *>self.piece(address, 8, False, &length))

    def write64(self, cipa, value):
        """Store a little-endian 64-bit word at ``cipa`` in one piece, as a running walk sees it.

        ``ValueError`` if not 8-byte aligned, or outside writable RAM.
        """
        cdef size_t length = 0
        cdef uint64_t address = as_u64(cipa, "cipa"), word = as_u64(value, "value")
        if address & 7:
            raise ValueError(f"{cipa:#x} is not 8-byte aligned")
        with self.lock:
            store64(<uint64_t *>self.piece(address, 8, True, &length), word)

    @property
    def regions(self):
        """The regions, sorted by start: tuple of ``Region(start, size, readonly, device)``."""
        cdef bytes copy
        cdef const region_t *region
        cdef Py_ssize_t i
        with self.lock:                     # objects are made after it: a finalizer that runs then may want this memory
            copy = PyBytes_FromStringAndSize(<const char *>self.c.map.regions, self.c.map.count * sizeof(region_t))
        region = <const region_t *><const char *>copy
        return tuple([Region(region[i].start, region[i].size, bool(region[i].readonly), bool(region[i].device))
                      for i in range(len(copy) // <Py_ssize_t>sizeof(region_t))])

    def load_tables(self, snapshot, which="auto"):
        """Load a capture's table pages at their addresses, with RAM around them -> ``s2shadow.capture.Capture``.

        ``which``: ``"l1"`` takes l1_tables.npz, ``"host"`` tables.npz, ``"auto"`` the former where it exists.
        ``CaptureError`` (a ``ValueError``) for a folder that is missing or damaged; nothing is added then.
        """
        from s2shadow.capture import load_tables
        return load_tables(self, snapshot, which=which)

    def __repr__(self):
        return f"GuestMemory({len(self.owners)} regions, {sum(r.size for r in self.regions):#x} bytes)"
