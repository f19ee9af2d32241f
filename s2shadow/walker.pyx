"""The stage-2 walker (spec 01, sections 3, 5 and 6; AArch64.S2Walk and AArch64.S2Translate of the Arm ARM)."""

from collections import namedtuple

import numpy as np

from cpython.exc cimport PyErr_CheckSignals
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memset

from s2shadow.arch cimport (
    ACCESS_PTW, ACCESS_WRITE, DESC_AF, DESC_CONTIGUOUS, DESC_DBM, DESC_MEMATTR_SHIFT, DESC_NT, DESC_S2AP_W,
    DESC_TABLE, DESC_VALID, FINAL_LEVEL, FSC_ACCESS_FLAG, FSC_ADDRESS_SIZE, FSC_PERMISSION, FSC_TRANSLATION,
    FSC_WALK_ABORT, LEVEL_STAGE2_OFF, PERM_ALL, base_perm, base_perm_code, byteswap64, contiguous_bits, decode_oa,
    decode_sh, fault_code, level_shift, memattr_is_device, mostly_read_only, required_perm,
    s2ap_xn_to_perm,
)
from s2shadow.arguments cimport as_u64
from s2shadow.atomics cimport load64
from s2shadow.config cimport Stage2Config, fault_text
from s2shadow.memory cimport CAS_REFUSED, GuestMemory, cas_desc, cas_result_t, mem_view_t, read_desc
from s2shadow.pace cimport pace_next, pace_start, pace_t
from s2shadow.constants import Access, perm_text, size_text
from s2shadow.descriptor import describe_level

WALK_DTYPE = np.dtype([("status", "u1"), ("fsc", "u1"), ("level", "i1"), ("perm", "u1"), ("memattr", "u1"),
                       ("sh", "u1"), ("contiguous", "u1"), ("updated", "u1"),
                       ("pa", "u8"), ("size", "u8"), ("desc", "u8"), ("desc_addr", "u8")], align=True)

LEAF_DTYPE = np.dtype([("ipa", "u8"), ("pa", "u8"), ("size", "u8"), ("desc", "u8"),
                       ("level", "i1"), ("perm", "u1"), ("memattr", "u1"), ("sh", "u1")], align=True)

ctypedef struct leaf_t:
    uint64_t ipa
    uint64_t pa
    uint64_t size
    uint64_t desc
    int8_t level
    uint8_t perm
    uint8_t memattr
    uint8_t sh

assert WALK_DTYPE.itemsize == sizeof(walk_t) and LEAF_DTYPE.itemsize == sizeof(leaf_t)


cdef inline void fail(walk_t *out, int base, int level) noexcept nogil:
    out.status = 1
    out.level = <int8_t>level
    out.fsc = fault_code(base, level)


cdef inline bint is_leaf_or_fault(const s2_config_t *config, uint64_t desc, int level, bint *leaf) noexcept nogil:
    """Decode the descriptor type: False for a Translation fault, else ``leaf`` says leaf or table."""
    if not desc & DESC_VALID:
        return False
    if level == FINAL_LEVEL:
        leaf[0] = True
        return (desc & DESC_TABLE) != 0
    leaf[0] = not desc & DESC_TABLE
    return not leaf[0] or level >= config.block_level


cdef inline int group_shift(const s2_config_t *config, int level, int shift) noexcept nogil:
    """log2 of what a contiguous group of leaves spans.

    A group that would exceed the input size is IMPLEMENTATION DEFINED: the bit is ignored.
    """
    cdef int bits = shift + contiguous_bits(config.granule_bits, level)
    return shift if bits > config.ia_bits else bits


cdef inline uint64_t block_address(const s2_config_t *config, uint64_t desc, int shift) noexcept nogil:
    """Output address of a leaf; the bits below its span are not the descriptor's to give."""
    return decode_oa(&config.oa, desc) >> shift << shift


cdef inline uint64_t leaf_output(const s2_config_t *config, uint64_t desc, uint64_t block, uint64_t ipa, int level,
                                 int shift) noexcept nogil:
    """Output address; the bits of a contiguous group's size come from the IPA (StageOA)."""
    cdef uint64_t offset_mask = ((<uint64_t>1) << shift) - 1
    if desc & DESC_CONTIGUOUS:
        offset_mask = ((<uint64_t>1) << group_shift(config, level, shift)) - 1
    return (block & ~offset_mask) | (ipa & offset_mask)


cdef inline uint8_t leaf_perm(const s2_config_t *config, uint64_t desc) noexcept nogil:
    cdef uint8_t perm
    if not config.s2pie:
        return s2ap_xn_to_perm(desc, config.xnx)
    perm = base_perm(base_perm_code(config.s2pir, desc))
    return perm if desc & DESC_S2AP_W else perm & ~ACCESS_WRITE     # bit 7 is the dirty state here


cdef inline void describe_leaf(const s2_config_t *config, uint64_t desc, walk_t *out) noexcept nogil:
    out.perm = leaf_perm(config, desc)
    out.memattr = <uint8_t>((desc >> DESC_MEMATTR_SHIFT) & 0xF)
    out.sh = decode_sh(&config.oa, desc, config.sh0)
    out.contiguous = (desc & DESC_CONTIGUOUS) != 0


cdef inline bint may_become_writable(const s2_config_t *config, uint64_t desc, uint8_t access) noexcept nogil:
    """Whether a write may go through once bit 7 is set: the leaf is writable-clean, and hardware manages that."""
    cdef unsigned int code
    if not config.s2pie:
        return config.hd and desc & DESC_DBM
    code = base_perm_code(config.s2pir, desc)
    if not (base_perm(code) & ACCESS_WRITE or (access & ACCESS_PTW and mostly_read_only(code))):
        return False
    return config.hd or desc & DESC_S2AP_W


cdef void walk_identity(const s2_config_t *config, uint64_t ipa, walk_t *out) noexcept nogil:
    """Stage 2 off: identity, with the attributes of stage 1."""
    if ipa >> config.pa_bits:
        fail(out, FSC_ADDRESS_SIZE, 0)
        return
    out.level = LEVEL_STAGE2_OFF
    out.perm = PERM_ALL
    out.memattr = 0x7 if config.fwb else 0xF
    out.sh = 3
    out.pa = ipa
    out.size = <uint64_t>1 << config.pa_bits


cdef void walk_refused(const s2_config_t *config, uint64_t ipa, walk_t *out) noexcept nogil:
    """What needs no descriptor: stage 2 off, an illegal configuration, an address beyond the input size."""
    if not config.enabled:
        walk_identity(config, ipa, out)
    elif config.ia_bits < 64 and ipa >> config.ia_bits:
        fail(out, FSC_TRANSLATION, 0)       # checked before the base address
    else:
        out.status = 1
        out.fsc = config.error_fsc


cdef inline request_t walk_begin(const s2_config_t *config, uint64_t ipa, uint8_t access, bint update,
                                 walk_state_t *state, walk_t *out) noexcept nogil:
    """Start a walk: what it wants first."""
    memset(out, 0, sizeof(walk_t))
    if not config.walkable or ipa >> config.ia_bits:
        walk_refused(config, ipa, out)
        return WALK_DONE
    state.ipa = ipa
    state.access = access
    state.update = update
    state.level = config.start_level
    state.shift = config.start_shift
    state.address = config.base + (ipa >> state.shift << 3)     # the start table may be wider than one granule
    return WALK_READ


cdef inline bint enter_table(const s2_config_t *config, uint64_t desc, walk_state_t *state) noexcept nogil:
    """Go down one level by a table descriptor; False where its address is out of range."""
    cdef uint64_t table = decode_oa(&config.oa, desc)
    if table & ~config.output_mask:
        return False
    state.level += 1
    state.shift -= config.granule_bits - 3
    state.address = table + ((state.ipa >> state.shift & (((<uint64_t>1) << (config.granule_bits - 3)) - 1)) << 3)
    return True


cdef inline request_t take_leaf(const s2_config_t *config, walk_state_t *state, uint64_t desc,
                                walk_t *out) noexcept nogil:
    """Steps 9 to 15 of the order of checks (spec 01, section 5)."""
    cdef uint8_t need = required_perm(state.access)
    cdef uint64_t desired = desc | DESC_AF, block = block_address(config, desc, state.shift)
    if config.bbm and state.level < FINAL_LEVEL and desc & DESC_NT:
        fail(out, FSC_TRANSLATION, state.level)         # nT must not be cached, and a shadow is a cache
        return WALK_DONE
    if block & ~config.output_mask:
        fail(out, FSC_ADDRESS_SIZE, state.level)
        return WALK_DONE
    if not desc & DESC_AF and not config.ha:
        fail(out, FSC_ACCESS_FLAG, state.level)
        return WALK_DONE
    describe_leaf(config, desc, out)
    out.level = <int8_t>state.level
    out.size = (<uint64_t>1) << state.shift
    out.pa = leaf_output(config, desc, block, state.ipa, state.level, state.shift)
    if state.access & ACCESS_WRITE and may_become_writable(config, desc, state.access):
        desired |= DESC_S2AP_W
        need &= ~ACCESS_WRITE
    if need & ~out.perm or (state.access & ACCESS_PTW and config.ptw and memattr_is_device(out.memattr, config.fwb)):
        fail(out, FSC_PERMISSION, state.level)
        return WALK_DONE
    if desired == desc:
        return WALK_DONE
    out.updated = 1
    if not state.update:
        return WALK_DONE
    state.expected = desc
    state.desired = desired
    return WALK_SWAP


cdef inline request_t walk_take(const s2_config_t *config, walk_state_t *state, uint64_t desc,
                                walk_t *out) noexcept nogil:
    """``desc``, in host byte order, is what stands at ``state.address``: what the walk wants next."""
    cdef bint leaf = False
    out.desc = desc
    out.desc_addr = state.address
    if not is_leaf_or_fault(config, desc, state.level, &leaf):
        fail(out, FSC_TRANSLATION, state.level)
        return WALK_DONE
    if leaf:
        return take_leaf(config, state, desc, out)
    if enter_table(config, desc, state):
        return WALK_READ
    fail(out, FSC_ADDRESS_SIZE, state.level)
    return WALK_DONE


cdef inline request_t walk_swapped(const s2_config_t *config, walk_state_t *state, uint64_t seen,
                                   walk_t *out) noexcept nogil:
    """The swap that the walk wanted found ``seen``: where that is not what it expected, the walk goes on from there."""
    if seen == state.expected:
        out.desc = state.desired
        out.perm = leaf_perm(config, state.desired)
        return WALK_DONE
    memset(out, 0, sizeof(walk_t))          # nothing that the old value said may stay
    return walk_take(config, state, seen, out)


cdef inline request_t walk_abort(walk_state_t *state, request_t refused, walk_t *out) noexcept nogil:
    """Memory did not answer: an external abort on the walk."""
    if refused == WALK_SWAP:
        memset(out, 0, sizeof(walk_t))
        out.desc = state.expected
        out.desc_addr = state.address
    fail(out, FSC_WALK_ABORT, state.level)
    return WALK_DONE


cdef inline request_t answer_from(mem_view_t *view, const s2_config_t *config, walk_state_t *state, request_t request,
                                  walk_t *out) noexcept nogil:
    """Give the walk what it wants from L1's memory."""
    cdef uint64_t desc = 0
    cdef cas_result_t swapped
    if request == WALK_READ:
        if not read_desc(view, state.address, config.big_endian, &desc):
            return walk_abort(state, request, out)
        return walk_take(config, state, desc, out)
    desc = state.expected
    swapped = cas_desc(view, state.address, config.big_endian, &desc, state.desired)
    if swapped == CAS_REFUSED:
        return walk_abort(state, request, out)
    return walk_swapped(config, state, desc, out)


cdef void walk_by_steps(mem_view_t *view, const s2_config_t *config, uint64_t ipa, uint8_t access, bint update,
                        walk_t *out) noexcept nogil:
    """The whole walk by the state machine."""
    cdef walk_state_t state
    cdef request_t request = walk_begin(config, ipa, access, update, &state, out)
    while request != WALK_DONE:
        request = answer_from(view, config, &state, request, out)


cdef extern from *:
    """
    /* the first eight bytes of a walk_t in one store; ``sh`` stands where a descriptor has it */
    #define s2_fill_leaf(w, level, perm, desc, sh) do { \\
        struct { uint8_t status, fsc; int8_t lvl; uint8_t prm, mem, s, c, u; } head_ = { \\
            0, 0, (int8_t)(level), (perm), (uint8_t)((desc) >> 2 & 0xF), (uint8_t)((sh) >> 8), 0, 0 }; \\
        __builtin_memcpy((w), &head_, 8); } while (0)
    """
    void fill_leaf "s2_fill_leaf"(walk_t *out, int level, uint8_t perm, uint64_t desc, uint64_t sh) noexcept nogil


cdef inline bint walk_plainly(mem_view_t *view, const s2_config_t *config, uint64_t ipa, uint64_t address, int level,
                              int shift, uint8_t access, walk_path_t *path, walk_t *out) noexcept nogil:
    """The walk that most are, from the descriptor at ``address`` on: tables in the region of the last one, a leaf in
    order that allows the access as it is. False for any other: the state machine decides those. No calls from here:
    they would cost the registers. ``path``, if any, learns the way."""
    cdef uint64_t desc, offset, kind
    cdef uint8_t perm
    while True:
        offset = address - view.tables.start
        if offset >= view.tables.size:
            return False
        desc = load64(<const uint64_t *>(view.tables.host + offset))
        kind = desc & config.plain_mask
        if kind != 3 or level == FINAL_LEVEL:
            break
        level += 1
        shift -= config.granule_bits - 3
        address = (desc & config.oa.mask) + ((ipa >> shift & config.index_mask) << 3)
        if path != NULL:
            path.entries[level + 1] = address
    if kind != <uint64_t>(3 if level == FINAL_LEVEL else 1) or level < config.block_level:
        return False
    perm = s2ap_xn_to_perm(desc, config.xnx)
    if desc & (DESC_AF | DESC_CONTIGUOUS) != DESC_AF or access & ACCESS_PTW or required_perm(access) & ~perm:
        return False
    fill_leaf(out, level, perm, desc, desc & config.sh_mask | config.sh_implied)
    out.size = <uint64_t>1 << shift
    out.pa = (desc & config.oa.mask & ~(out.size - 1)) | (ipa & (out.size - 1))
    out.desc = desc
    out.desc_addr = address
    return True


cdef void walk_stage2(mem_view_t *view, const s2_config_t *config, uint64_t ipa, uint8_t access,
                      bint update, walk_t *out) noexcept nogil:
    """Translate ``ipa``; see ``walk`` for what ``out`` says. ``view`` is the caller's own."""
    if not config.plain or ipa >> config.ia_bits or not walk_plainly(
            view, config, ipa, config.base + (ipa >> config.start_shift << 3), config.start_level, config.start_shift,
            access, NULL, out):
        walk_by_steps(view, config, ipa, access, update, out)


cdef void walk_remembering(mem_view_t *view, const s2_config_t *config, walk_path_t *path, uint64_t ipa,
                           uint8_t access, walk_t *out) noexcept nogil:
    """``walk_stage2``, from the deepest table that it shares with the last walk: a walk cache, which whoever owns it
    must forget where the architecture says so. No fault comes from it: what does not succeed plainly is walked again
    from the root."""
    cdef int stride = config.granule_bits - 3, level = path.level, shift
    cdef uint64_t apart = ipa ^ path.ipa, address
    if not config.plain or ipa >> config.ia_bits:
        walk_by_steps(view, config, ipa, access, True, out)
        return
    shift = level_shift(config.granule_bits, level)
    while level > config.start_level and apart >> shift >> stride:
        level -= 1
        shift += stride
    if level > config.start_level:
        address = path.entries[level + 1] & ~((<uint64_t>1 << config.granule_bits) - 1)
        address += (ipa >> shift & ((<uint64_t>1 << stride) - 1)) << 3
    else:
        address = config.base + (ipa >> shift << 3)
    path.level = config.start_level
    if walk_plainly(view, config, ipa, address, level, shift, access, path, out):
        path.ipa = ipa
        path.level = out.level
    else:
        walk_by_steps(view, config, ipa, access, True, out)


cdef class Walk:
    """The outcome of one walk: the fields of ``WALK_DTYPE`` as attributes, and ``fault``."""

    @property
    def status(self):
        return self.c.status

    @property
    def fsc(self):
        return self.c.fsc

    @property
    def level(self):
        return self.c.level

    @property
    def perm(self):
        return self.c.perm

    @property
    def memattr(self):
        return self.c.memattr

    @property
    def sh(self):
        return self.c.sh

    @property
    def contiguous(self):
        return self.c.contiguous

    @property
    def updated(self):
        return self.c.updated

    @property
    def pa(self):
        return self.c.pa

    @property
    def size(self):
        return self.c.size

    @property
    def desc(self):
        return self.c.desc

    @property
    def desc_addr(self):
        return self.c.desc_addr

    @property
    def fault(self):
        """None, or the fault as text, such as ``translation fault, level 2``."""
        return fault_text(self.c.fsc) if self.c.status else None

    @property
    def steps(self):
        """The levels of the walk, as ``WalkLevel``; () unless it was traced."""
        return self.trace or ()

    @property
    def notes(self):
        """What is odd about the tables on the way, such as a misprogrammed contiguous group; () unless traced."""
        return tuple([note for step in self.steps for note in step.notes])

    def __repr__(self):
        if self.c.status:
            return f"Walk({self.ipa:#x}: {self.fault})"
        return f"Walk({self.ipa:#x} → {self.pa:#x}, {size_text(self.size)}, {perm_text(self.perm)}, level {self.level})"


class WalkRequest(namedtuple("WalkRequest", "kind address expected desired")):
    """What a ``WalkStep`` wants of memory: ``kind`` is ``"read"`` or ``"swap"``; ``address`` is 8-byte aligned. Values
    are words as a little-endian load of that address sees them; ``expected`` and ``desired`` are None for a read."""

    __slots__ = ()


cdef class WalkStep:
    """A walk that stops at every access to memory: made by ``walk_step``."""

    cdef Stage2Config cfg
    cdef walk_state_t state
    cdef request_t wanted
    cdef Walk walked

    cdef uint64_t word(self, uint64_t value):
        """Between a descriptor and the word that memory holds for it."""
        return byteswap64(value) if self.cfg.c.big_endian else value

    @property
    def request(self):
        """A ``WalkRequest``, or None when the walk is done."""
        if self.wanted == WALK_DONE:
            return None
        if self.wanted == WALK_READ:
            return WalkRequest("read", self.state.address, None, None)
        return WalkRequest("swap", self.state.address, self.word(self.state.expected), self.word(self.state.desired))

    @property
    def result(self):
        """The ``Walk``; ``RuntimeError`` while it is under way."""
        if self.wanted != WALK_DONE:
            raise RuntimeError(f"the walk wants the descriptor at {self.state.address:#x} first")
        return self.walked

    def feed(self, value):
        """Memory answered: the word read, or, for a swap, the word that was there (``expected``: it was swapped)."""
        cdef uint64_t desc = self.word(as_u64(value, "value"))
        if self.wanted == WALK_READ:
            self.wanted = walk_take(&self.cfg.c, &self.state, desc, &self.walked.c)
        elif self.wanted == WALK_SWAP:
            self.wanted = walk_swapped(&self.cfg.c, &self.state, desc, &self.walked.c)
        else:
            raise RuntimeError("the walk is done")

    def abort(self):
        """Memory did not answer, or cannot be written: an external abort on the walk."""
        if self.wanted == WALK_DONE:
            raise RuntimeError("the walk is done")
        self.wanted = walk_abort(&self.state, self.wanted, &self.walked.c)

    def __repr__(self):
        if self.wanted == WALK_DONE:
            return f"WalkStep({self.walked!r})"
        return f"WalkStep({self.state.ipa:#x}, level {self.state.level}: {self.request})"


def walk_step(Stage2Config cfg not None, ipa, access=Access.READ, bint update=True):
    """Begin a walk whose memory is the caller's -> ``WalkStep``.

    While ``step.request`` is not None, do what it asks of memory and give the answer to ``step.feed`` (or call
    ``step.abort``); then ``step.result`` is the ``Walk``. Steps are independent: any number may be in flight. The
    arguments and the answer are those of ``walk``, which is the same state machine.
    """
    cdef WalkStep step = WalkStep.__new__(WalkStep)
    cdef uint64_t address = as_u64(ipa, "ipa")
    cdef uint8_t mask = as_access(access)
    step.cfg = cfg
    step.walked = Walk.__new__(Walk)
    step.walked.ipa = address
    step.wanted = walk_begin(&cfg.c, address, mask, update, &step.state, &step.walked.c)
    return step


cdef Walk traced_walk(GuestMemory mem, Stage2Config cfg, ipa, access, bint update):
    """The walk, with every level that it met."""
    cdef WalkStep step = walk_step(cfg, ipa, access, update)
    cdef mem_view_t view
    cdef request_t asked
    cdef int level
    cdef uint64_t address
    cdef list levels = []
    mem.pin(&view)
    try:
        while step.wanted != WALK_DONE:
            level, address, asked = step.state.level, step.state.address, step.wanted
            step.wanted = answer_from(&view, &cfg.c, &step.state, asked, &step.walked.c)
            if asked == WALK_SWAP:
                levels.pop()                # again, as memory holds it now
            read = asked == WALK_SWAP or step.walked.c.fsc != fault_code(FSC_WALK_ABORT, level)
            levels.append(describe_level(mem, cfg, step.walked.ipa, level, address,
                                         step.walked.c.desc if read else None))
    finally:
        mem.unpin()
    step.walked.trace = tuple(levels)
    return step.walked


def walk(GuestMemory mem not None, Stage2Config cfg not None, ipa, access=Access.READ, bint update=True,
         bint trace=False):
    """Translate ``ipa`` through L1's stage 2 -> ``Walk``.

    ``access`` is an ``Access`` mask; several of READ, WRITE and EXEC must all be allowed. With ``update`` the
    hardware access flag (and dirty state) is written into the descriptor by compare-and-swap; without it nothing
    is written and ``updated`` says that a write was due. A descriptor that cannot be read, or cannot be updated
    because its page is read-only, is an external abort on the walk. After a permission fault the leaf is still
    described. With ``trace``, ``Walk.steps`` has each level with its fields named, and ``Walk.notes`` what is odd.
    Source: Arm ARM, AArch64.S2Translate; order of checks as in its pseudocode.
    """
    if trace:
        return traced_walk(mem, cfg, ipa, access, update)
    cdef Walk result
    cdef mem_view_t view
    cdef uint8_t mask = as_access(access)
    result = Walk.__new__(Walk)
    result.ipa = as_u64(ipa, "ipa")
    mem.pin(&view)
    walk_stage2(&view, &cfg.c, result.ipa, mask, update, &result.c)
    mem.unpin()
    return result


def walk_many(GuestMemory mem not None, Stage2Config cfg not None, ipas, access=Access.READ, bint update=True,
              out=None):
    """Translate many addresses: uint64[n] -> ``WALK_DTYPE``[n]; the GIL is released.

    ``access`` is one mask or a uint8[n]. ``out`` may be a C-contiguous ``WALK_DTYPE``[n] to write into. Ctrl-C is
    answered about every 10 ms; the walks before it are in ``out``.
    """
    cdef const uint64_t[::1] addresses = as_addresses(ipas)
    cdef const uint8_t[::1] masks = as_masks(access, addresses.shape[0])
    cdef Py_ssize_t n = addresses.shape[0], at = 0, end, stride = 1 if masks.shape[0] > 1 else 0
    cdef uint8_t[::1] raw
    cdef walk_t *rows
    cdef mem_view_t view
    cdef pace_t pace
    out = as_output(out, WALK_DTYPE, n)
    if n == 0:
        return out
    raw = out.view(np.uint8)
    rows = <walk_t *>&raw[0]
    mem.pin(&view)
    pace_start(&pace)
    try:
        while at < n:
            end = min(n, at + pace.piece)
            with nogil:
                while at < end:
                    walk_stage2(&view, &cfg.c, addresses[at], masks[at * stride], update, rows + at)
                    at += 1
            pace_next(&pace)
            PyErr_CheckSignals()
    finally:
        mem.unpin()
    return out


def as_addresses(ipas):
    """A C-contiguous uint64 vector, without a copy where possible."""
    array = np.asarray(ipas)
    if array.dtype != np.uint64:
        if array.size and array.dtype.kind not in "ui":
            raise TypeError(f"ipas must be integers, got {array.dtype}")
        if array.dtype.kind == "i" and array.size and array.min() < 0:
            raise ValueError("ipas must not be negative")
        array = array.astype(np.uint64)
    if array.ndim != 1:
        raise ValueError(f"ipas must be one-dimensional, got {array.ndim} dimensions")
    return np.ascontiguousarray(array)


def as_access(access):
    """One access mask, checked."""
    mask = as_u64(access, "access")
    if mask > 31:
        raise ValueError(f"access must be made of READ, WRITE, EXEC, EL0 and PTW, got {mask:#x}")
    return mask


def as_masks(access, n):
    """A uint8 vector of ``n`` access masks, or of one that stands for all."""
    array = np.asarray(access)
    if array.ndim == 0:
        return np.array([as_access(access)], dtype=np.uint8)
    if array.shape != (n,):
        raise ValueError(f"access must be one mask or have the length of ipas ({n}), got shape {array.shape}")
    if array.dtype.kind not in "ui":
        raise TypeError(f"access must be integers, got {array.dtype}")
    if array.size and (array.min() < 0 or array.max() > 31):
        raise ValueError("access must be made of READ, WRITE, EXEC, EL0 and PTW")
    return np.ascontiguousarray(array, dtype=np.uint8)


def as_output(out, dtype, n):
    """``out`` checked, or a new array."""
    if out is None:
        return np.empty(n, dtype=dtype)
    if not isinstance(out, np.ndarray) or out.dtype != dtype:
        raise TypeError(f"out must be an array of {dtype}")
    if out.shape != (n,) or not out.flags.c_contiguous or not out.flags.writeable:
        raise ValueError(f"out must be a writable C-contiguous array of {n} elements, got shape {out.shape}")
    return out


cdef enum:
    LOOK_INTERVAL = 1 << 20     # descriptors read between looks at signals: a few milliseconds


cdef struct collector_t:
    leaf_t *rows
    uint64_t count
    uint64_t capacity
    uint64_t limit
    uint64_t budget             # descriptors still allowed to be read: tables may loop
    uint64_t look_at            # budget at which signals are looked at next


cdef int look_at_signals() except -1 with gil:
    PyErr_CheckSignals()
    return 0


cdef int collect_table(mem_view_t *view, const s2_config_t *config, uint64_t table, uint64_t ipa, int level,
                       uint64_t entries, collector_t *into) except? -3 nogil:
    """Append the leaves of one table; 0, or -1 over a limit, -2 out of memory, -3 with an exception (Ctrl-C)."""
    cdef int shift = level_shift(config.granule_bits, level)
    cdef uint64_t i, desc = 0, next_table
    cdef bint leaf = False
    cdef walk_t walked
    cdef leaf_t *row
    cdef int result
    cdef void *grown
    if into.budget < entries:
        return -1
    into.budget -= entries
    if into.budget < into.look_at:
        into.look_at = into.budget - min(into.budget, <uint64_t>LOOK_INTERVAL)
        look_at_signals()
    for i in range(entries):
        if not read_desc(view, table + (i << 3), config.big_endian, &desc):
            continue                        # a large granule's table may lie in RAM only in part
        if not is_leaf_or_fault(config, desc, level, &leaf):
            continue
        if leaf and config.bbm and level < FINAL_LEVEL and desc & DESC_NT:
            continue
        if block_address(config, desc, shift if leaf else config.granule_bits) & ~config.output_mask:
            continue
        if not leaf:
            next_table = decode_oa(&config.oa, desc)
            result = collect_table(view, config, next_table, ipa + (i << shift), level + 1,
                                   (<uint64_t>1) << (config.granule_bits - 3), into)
            if result:
                return result
            continue
        if into.count == into.limit:
            return -1
        if into.count == into.capacity:
            into.capacity = into.capacity * 2 if into.capacity else 1024
            grown = realloc(into.rows, into.capacity * sizeof(leaf_t))
            if grown == NULL:
                return -2
            into.rows = <leaf_t *>grown
        row = into.rows + into.count
        into.count += 1
        describe_leaf(config, desc, &walked)
        row.ipa = ipa + (i << shift)
        row.pa = leaf_output(config, desc, block_address(config, desc, shift), row.ipa, level, shift)
        row.size = (<uint64_t>1) << shift
        row.desc = desc
        row.level = <int8_t>level
        row.perm = walked.perm
        row.memattr = walked.memattr
        row.sh = walked.sh
    return 0


def leaves(GuestMemory mem not None, Stage2Config cfg not None, uint64_t limit=1 << 24):
    """Every leaf of L1's table under ``cfg``, sorted by IPA: ``LEAF_DTYPE`` array. Nothing is written.

    Leaves count whatever their permissions and access flag; what a walk would refuse by type or output size does
    not. ``ValueError`` when there are more than ``limit`` leaves or the tables loop; an empty array when stage 2
    is off or the configuration is illegal.
    """
    cdef collector_t into
    cdef mem_view_t view
    cdef int result = 0
    cdef uint64_t entries
    cdef uint8_t[::1] raw
    if not cfg.c.enabled or cfg.c.has_error:
        return np.empty(0, dtype=LEAF_DTYPE)
    memset(&into, 0, sizeof(into))
    into.limit = limit
    into.budget = (limit + 4096) * 64
    into.look_at = into.budget - min(into.budget, <uint64_t>LOOK_INTERVAL)
    entries = (<uint64_t>1) << (cfg.c.ia_bits - level_shift(cfg.c.granule_bits, cfg.c.start_level))
    mem.pin(&view)
    try:
        try:
            with nogil:
                result = collect_table(&view, &cfg.c, cfg.c.base, 0, cfg.c.start_level, entries, &into)
        finally:
            mem.unpin()
        if result == -1:
            raise ValueError(f"more than {limit} leaves, or tables that loop")
        if result == -2:
            raise MemoryError("leaves")
        out = np.empty(into.count, dtype=LEAF_DTYPE)
        if into.count:
            raw = out.view(np.uint8)
            memcpy(&raw[0], into.rows, into.count * sizeof(leaf_t))
        return out
    finally:
        free(into.rows)
