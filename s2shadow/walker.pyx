"""The stage-2 walker (spec 01, sections 3, 5 and 6; AArch64.S2Walk and AArch64.S2Translate of the Arm ARM)."""

from collections import namedtuple

import numpy as np

from cpython.exc cimport PyErr_CheckSignals
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memset

from s2shadow.arch cimport (
    ACCESS_PTW, ACCESS_WRITE, DESC_AF, DESC_CONTIGUOUS, DESC_DBM, DESC_MEMATTR_SHIFT, DESC_NT, DESC_S2AP_SHIFT,
    DESC_S2AP_W, DESC_TABLE, DESC_VALID, DESC_XN_SHIFT, FINAL_LEVEL, FSC_ACCESS_FLAG, FSC_ADDRESS_SIZE,
    FSC_PERMISSION, FSC_TRANSLATION, FSC_WALK_ABORT, LEVEL_STAGE2_OFF, PERM_ALL, PERM_OF_XN_S2AP, base_perm,
    base_perm_code, byteswap64, contiguous_bits, decode_oa, decode_sh, fault_code, level_shift, memattr_is_device,
    mostly_read_only, required_perm, s2ap_xn_to_perm,
)
from s2shadow.arguments cimport as_u64
from s2shadow.arrays cimport as_access, batch_t, take_addresses, take_masks, take_output
from s2shadow.atomics cimport load64, prefetch
from s2shadow.config cimport Stage2Config, fault_text
from s2shadow.memory cimport (
    CAS_REFUSED, GuestMemory, ask_swap, cas_desc, cas_result_t, find_tables, mem_view_t, read_desc, region_t,
    word_elsewhere,
)
from s2shadow.pace cimport next_piece, pace_t
from s2shadow.vmem cimport refused as allocation_refused
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

cdef enum:
    UPDATE = 0x80                       # beside an access: AF and dirty state are written


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


cdef request_t answer_elsewhere(mem_view_t *view, const s2_config_t *config, walk_state_t *state, request_t request,
                                walk_t *out) noexcept nogil:
    """Where no RAM of ours answered: from what the embedder said. Where it has not been asked yet, the question is
    noted, and the walk ends as if there were nothing: it starts over with the answer at hand."""
    cdef const uint64_t *word
    if request == WALK_READ:
        word = word_elsewhere(view, state.address)
        if word != NULL:
            return walk_take(config, state, byteswap64(word[0]) if config.big_endian else word[0], out)
    elif config.big_endian:
        ask_swap(view, state.address, byteswap64(state.expected), byteswap64(state.desired))
    else:
        ask_swap(view, state.address, state.expected, state.desired)
    return walk_abort(state, request, out)


cdef inline request_t answer_from(mem_view_t *view, const s2_config_t *config, walk_state_t *state, request_t request,
                                  walk_t *out) noexcept nogil:
    """Give the walk what it wants from L1's memory."""
    cdef uint64_t desc = 0
    cdef cas_result_t swapped
    if request == WALK_READ:
        if not read_desc(view, state.level, state.address, config.big_endian, &desc):
            return answer_elsewhere(view, config, state, request, out)
        return walk_take(config, state, desc, out)
    desc = state.expected
    swapped = cas_desc(view, state.level, state.address, config.big_endian, &desc, state.desired)
    if swapped == CAS_REFUSED:
        return answer_elsewhere(view, config, state, request, out)
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
    #if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    #define s2_fill_leaf(w, level, perm, desc, sh) do { \\
        uint64_t head_ = (uint64_t)(uint8_t)(level) << 16 | (uint64_t)(perm) << 24; \\
        head_ |= ((desc) & 0x3C) << 30 | (sh) << 32; \\
        __builtin_memcpy((w), &head_, 8); } while (0)
    #else
    #define s2_fill_leaf(w, level, perm, desc, sh) do { \\
        struct { uint8_t status, fsc; int8_t lvl; uint8_t prm, mem, s, c, u; } head_ = { \\
            0, 0, (int8_t)(level), (perm), (uint8_t)((desc) >> 2 & 0xF), (uint8_t)((sh) >> 8), 0, 0 }; \\
        __builtin_memcpy((w), &head_, 8); } while (0)
    #endif
    /* what plain walks need of a leaf: NEED_OF_ACCESS, and for walks of stage 1 what no leaf has */
    static const uint8_t s2_plain_need[32] = { 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 32, 33, 34, 35,
        128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128 };
    static const uint64_t s2_no_entry = 0;
    """
    void fill_leaf "s2_fill_leaf"(walk_t *out, int level, uint8_t perm, uint64_t desc, uint64_t sh) noexcept nogil
    const uint8_t *PLAIN_NEED "s2_plain_need"
    const uint64_t NO_ENTRY "s2_no_entry"

# How a plain walk ended.
ctypedef enum plain_t:
    PLAIN_DONE
    PLAIN_NOT                   # the state machine decides
    PLAIN_ELSEWHERE             # at a table outside the region of the last one of that level


cdef inline bint plain_leaf(const s2_config_t *config, uint64_t ipa, uint64_t desc, uint64_t address, int level,
                            int shift, uint8_t access, walk_t *out) noexcept nogil:
    """Describe a leaf in order that allows the access as it is; False for anything else."""
    cdef uint64_t index, span = <uint64_t>1 << shift
    cdef uint8_t perm
    if level == FINAL_LEVEL:
        if desc & config.leaf_mask != DESC_AF | DESC_TABLE | DESC_VALID:
            return False
    elif level < config.block_level or desc & config.leaf_mask != DESC_AF | DESC_VALID:
        return False
    index = (desc >> DESC_S2AP_SHIFT & 3 | desc >> (DESC_XN_SHIFT - 2) & 0xC) & config.perm_mask
    perm = PERM_OF_XN_S2AP[index]
    if PLAIN_NEED[access & 31] & ~perm:
        return False
    fill_leaf(out, level, perm, desc, desc & config.sh_mask | config.sh_implied)
    out.size = span
    out.pa = ((desc & config.oa.mask ^ ipa) & -span) ^ ipa
    out.desc = desc
    out.desc_addr = address
    return True


cdef inline uint64_t entry_in(const s2_config_t *config, uint64_t table, uint64_t ipa, int shift) noexcept nogil:
    """Address of the entry for ``ipa`` in the table that a descriptor names; ``shift``: log2 of an entry's span, less
    the 3 of an entry's own size."""
    return (table & config.oa.mask) + (ipa >> shift & config.entry_mask)


cdef inline bint plain_table(const s2_config_t *config, uint64_t desc) noexcept nogil:
    """Whether a descriptor above the last level is that of a table in reach."""
    return not (desc ^ (DESC_TABLE | DESC_VALID)) & config.plain_mask


cdef inline plain_t walk_plainly(mem_view_t *view, const s2_config_t *config, uint64_t ipa, uint64_t address, int level,
                                 int shift, uint8_t access, walk_path_t *path, walk_t *out) noexcept nogil:
    """The walk that most are, from the descriptor at ``address`` on. ``path``, if any, learns the way. No calls from
    here: they would cost the registers. PLAIN_ELSEWHERE leaves in ``out`` how far it got: level and desc_addr."""
    cdef const region_t *region = &view.tables[level + 1]
    cdef uint64_t desc, offset
    shift -= 3
    while True:
        offset = address - region.start
        if offset >= region.size:
            out.level = <int8_t>level
            out.desc_addr = address
            return PLAIN_ELSEWHERE
        desc = load64(<const uint64_t *>(region.host + offset))
        if level == FINAL_LEVEL or not plain_table(config, desc):
            break
        level += 1
        region += 1
        shift -= config.stride
        address = entry_in(config, desc, ipa, shift)
        if path != NULL:
            path.entries[level + 1] = address
    return PLAIN_DONE if plain_leaf(config, ipa, desc, address, level, shift + 3, access, out) else PLAIN_NOT


cdef void walk_elsewhere(mem_view_t *view, const s2_config_t *config, walk_path_t *path, uint64_t ipa, uint8_t how,
                         walk_t *out) noexcept nogil:
    """Go on where ``walk_plainly`` was elsewhere. ``how``: the access, and UPDATE."""
    cdef uint8_t access = how & ~UPDATE
    cdef plain_t ended = PLAIN_ELSEWHERE
    while ended == PLAIN_ELSEWHERE and find_tables(view, out.level, out.desc_addr) != NULL:
        ended = walk_plainly(view, config, ipa, out.desc_addr, out.level, config.shifts[out.level + 1], access, path,
                             out)
    if ended != PLAIN_DONE:
        walk_by_steps(view, config, ipa, access, how & UPDATE, out)
    elif path != NULL:
        path.ipa = ipa
        path.level = out.level


cdef void walk_stage2(mem_view_t *view, const s2_config_t *config, uint64_t ipa, uint8_t access,
                      bint update, walk_t *out) noexcept nogil:
    """Translate ``ipa``; see ``walk`` for what ``out`` says. ``view`` and ``out`` are the caller's own."""
    cdef plain_t ended = PLAIN_NOT
    if config.plain and not ipa >> config.ia_bits:
        ended = walk_plainly(view, config, ipa, config.base + (ipa >> config.start_shift << 3), config.start_level,
                             config.start_shift, access, NULL, out)
        if ended == PLAIN_DONE:
            return
    if ended == PLAIN_ELSEWHERE:            # nothing comes after these calls: they are jumps, and cost no registers
        walk_elsewhere(view, config, NULL, ipa, access | UPDATE if update else access, out)
    else:
        walk_by_steps(view, config, ipa, access, update, out)


cdef void walk_remembering(mem_view_t *view, const s2_config_t *config, walk_path_t *path, uint64_t ipa,
                           uint8_t access, walk_t *out) noexcept nogil:
    """``walk_stage2``, from the deepest table that it shares with the last walk: a walk cache, which whoever owns it
    must forget where the architecture says so. No fault comes from it: what does not succeed plainly is walked again
    from the root."""
    cdef int level = path.level, shift
    cdef uint64_t apart = ipa ^ path.ipa, address
    cdef plain_t ended
    if not config.plain or ipa >> config.ia_bits:
        walk_by_steps(view, config, ipa, access, True, out)
        return
    shift = config.shifts[level + 1]
    while level > config.start_level and apart >> shift >> config.stride:
        level -= 1
        shift += config.stride
    if level > config.start_level:
        address = (path.entries[level + 1] & ~config.entry_mask) + (ipa >> (shift - 3) & config.entry_mask)
    else:
        address = config.base + (ipa >> shift << 3)
    path.level = config.start_level
    ended = walk_plainly(view, config, ipa, address, level, shift, access, path, out)
    if ended == PLAIN_DONE:
        path.ipa = ipa
        path.level = out.level
    elif ended == PLAIN_ELSEWHERE:
        walk_elsewhere(view, config, path, ipa, access | UPDATE, out)
    else:
        walk_by_steps(view, config, ipa, access, True, out)


cdef inline void go_on(mem_view_t *view, int level, uint64_t address, int64_t i, walks_t *walks) noexcept nogil:
    """Take walk ``i`` to the entry at ``address``, if that is in RAM."""
    cdef const region_t *region = &view.tables[level + 1]
    cdef uint64_t offset = address - region.start
    if offset >= region.size:
        if find_tables(view, level, address) == NULL:
            return
        offset = address - region.start
    walks.addresses[i] = address
    walks.entries[i] = <const uint64_t *>(region.host + offset)
    walks.levels[i] = <int8_t>level
    prefetch(walks.entries[i])


cdef bint look_ahead(mem_view_t *view, const s2_config_t *config, const uint64_t *ipas, int64_t n,
                     walks_t *walks) noexcept nogil:
    """Take walks through all tables but the last descriptor, side by side: while one waits for memory, others go on,
    and each finds its line fetched when it is its turn again. First once as far as all share the way. What a walk stops
    at is left where it is: the walk proper, which reads it anew, decides about it. False for walks that have no
    tables."""
    cdef int level = config.start_level, shift = config.start_shift - 3
    cdef uint64_t apart = 0, table = config.base, mask = ~<uint64_t>7, address, desc
    cdef const region_t *region
    cdef int64_t i
    for i in range(n):
        apart |= ipas[i] ^ ipas[0]
    if (apart | ipas[0]) >> config.ia_bits:
        return False
    while level < FINAL_LEVEL and not apart >> shift >> 3:
        address = table + (ipas[0] >> shift & mask)
        region = find_tables(view, level, address)
        if region == NULL:
            break
        desc = load64(<const uint64_t *>(region.host + (address - region.start)))
        if not plain_table(config, desc):
            break
        table = desc & config.oa.mask
        mask = config.entry_mask
        shift -= config.stride
        level += 1
    for i in range(n):
        walks.entries[i] = &NO_ENTRY
        walks.levels[i] = <int8_t>level
        go_on(view, level, table + (ipas[i] >> shift & mask), i, walks)
    while level < FINAL_LEVEL:
        shift -= config.stride
        for i in range(n):
            desc = load64(walks.entries[i])
            if walks.levels[i] == level and plain_table(config, desc):
                go_on(view, level + 1, entry_in(config, desc, ipas[i], shift), i, walks)
        level += 1
    return True


cdef void walk_run(mem_view_t *view, const s2_config_t *config, const uint64_t *ipas, const uint8_t *masks,
                   int64_t stride, bint update, walk_t *out, int64_t n) noexcept nogil:
    """Many walks, each as ``walk_stage2`` would have it after the one before: only tables are read ahead, and what
    walks write (AF, dirty state) changes no table descriptor. A leaf that differs from the last one in nothing but its
    address is described likewise."""
    cdef walks_t walks
    cdef walk_t row                         # not the user's array, which another thread may write
    cdef uint64_t attributes = ~<uint64_t>0, desc, ipa, span = 0, head = 0          # no leaf says that
    cdef uint64_t shape = ~(config.oa.mask & config.output_mask)                    # all but an address in range
    cdef int64_t first = 0, last, i
    cdef uint8_t access, same_access = 0
    cdef int8_t same_level = 0
    cdef bint together
    while first < n:
        last = first + WALKS_TOGETHER if n - first > WALKS_TOGETHER else n
        together = config.plain and last - first > 1 and look_ahead(view, config, ipas + first, last - first, &walks)
        for i in range(last - first):
            access = masks[(first + i) * stride]
            ipa = ipas[first + i]
            if together:
                desc = load64(walks.entries[i])
                if desc & shape == attributes and walks.levels[i] == same_level and access == same_access:
                    memcpy(out + first + i, &head, sizeof(head))
                    out[first + i].pa = ((desc & config.oa.mask ^ ipa) & -span) ^ ipa
                    out[first + i].size = span
                    out[first + i].desc = desc
                    out[first + i].desc_addr = walks.addresses[i]
                    continue
                if plain_leaf(config, ipa, desc, walks.addresses[i], walks.levels[i],
                              config.shifts[walks.levels[i] + 1], access, &row):
                    attributes = desc & shape
                    same_level = walks.levels[i]
                    same_access = access
                    span = row.size
                    memcpy(&head, &row, sizeof(head))
                    out[first + i] = row
                    continue
            walk_stage2(view, config, ipa, access, update, &row)
            out[first + i] = row
        first = last


cdef class Walk:
    """The outcome of one walk, from ``walk`` or a ``WalkStep``: the fields of ``WALK_DTYPE`` as attributes, and more.

    ``ipa`` is the address that was walked. Addresses and sizes are bytes.
    """

    @property
    def status(self):
        """0 if the walk ended in a translation, 1 if in a fault."""
        return self.c.status

    @property
    def fsc(self):
        """Fault status code as in ESR_ELx.DFSC or IFSC, level included; 0 without a fault."""
        return self.c.fsc

    @property
    def level(self):
        """Level of the leaf or of the fault, -1 to 3; -2 where stage 2 is off."""
        return self.c.level

    @property
    def perm(self):
        """Permissions of the leaf: a mask of READ, WRITE, EXEC (EL1) and EXEC_EL0."""
        return self.c.perm

    @property
    def memattr(self):
        """MemAttr[3:0] as in the descriptor."""
        return self.c.memattr

    @property
    def sh(self):
        """SH[1:0] as in the descriptor, or as VTCR_EL2.DS implies it: 0 non-, 2 outer, 3 inner shareable."""
        return self.c.sh

    @property
    def contiguous(self):
        """1 if the leaf has the contiguous bit."""
        return self.c.contiguous

    @property
    def updated(self):
        """1 if the access flag or dirty state was written; with ``update=False``, if that was due."""
        return self.c.updated

    @property
    def pa(self):
        """Output address of ``ipa``, L1's physical address (cIPA); 0 where no leaf was found."""
        return self.c.pa

    @property
    def size(self):
        """Bytes that the leaf descriptor maps, without the rest of a contiguous group; 0 where none was found."""
        return self.c.size

    @property
    def desc(self):
        """The last descriptor read, in host byte order, as it is now in memory; 0 if none was."""
        return self.c.desc

    @property
    def desc_addr(self):
        """cIPA of ``desc``; 0 if none was read."""
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
    """What a ``WalkStep`` wants of memory: ``kind`` is ``"read"`` or ``"swap"`` (a compare-and-swap of 64 bits);
    ``address`` is a cIPA, 8-byte aligned. Values are words as a little-endian load of that address sees them;
    ``expected`` and ``desired`` are None for a read."""

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
        """The ``Walk`` that it came to; ``RuntimeError`` while it is under way."""
        if self.wanted != WALK_DONE:
            raise RuntimeError(f"the walk wants the descriptor at {self.state.address:#x} first")
        return self.walked

    def feed(self, value):
        """Memory answered: the word read, or, for a swap, the word that was there (``expected``: it was swapped).

        ``TypeError`` or ``ValueError`` for what is no 64-bit word, ``RuntimeError`` when nothing was asked for.
        """
        cdef uint64_t desc = self.word(as_u64(value, "value"))
        if self.wanted == WALK_READ:
            self.wanted = walk_take(&self.cfg.c, &self.state, desc, &self.walked.c)
        elif self.wanted == WALK_SWAP:
            self.wanted = walk_swapped(&self.cfg.c, &self.state, desc, &self.walked.c)
        else:
            raise RuntimeError("the walk is done")

    def abort(self):
        """Memory did not answer, or cannot be written: an external abort on the walk.

        ``RuntimeError`` when nothing was asked for.
        """
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
    ``ValueError`` or ``TypeError`` for what is no 64-bit address or no access; nothing in the tables raises.
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
    """Translate many addresses: uint64[n] -> ``WALK_DTYPE[n]``; the GIL is released.

    ``access`` is one mask or a uint8[n]. ``out`` may be a C-contiguous ``WALK_DTYPE[n]`` to write into; it is what is
    returned then. ``TypeError`` or ``ValueError`` for arrays of another type or shape. Source: as ``walk``. Ctrl-C is
    answered about every 10 ms; the walks before it are in ``out``.
    """
    cdef batch_t batch
    cdef void *rows = NULL
    cdef mem_view_t view
    cdef int64_t at = 0, n
    cdef pace_t pace
    ipas = take_addresses(ipas, &batch)
    access = take_masks(access, &batch)
    out = take_output(out, WALK_DTYPE, &batch, &rows)
    mem.pin(&view)
    try:
        while at < batch.n:
            n = next_piece(&pace, at, batch.n)
            if n == 1:                      # letting go of the GIL costs more than one walk
                walk_run(&view, &cfg.c, batch.ipas + at, batch.masks + at * batch.stride, 0, update,
                         <walk_t *>rows + at, 1)
            else:
                with nogil:
                    walk_run(&view, &cfg.c, batch.ipas + at, batch.masks + at * batch.stride, batch.stride, update,
                             <walk_t *>rows + at, n)
            at += n
    finally:
        mem.unpin()
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
        if not read_desc(view, level, table + (i << 3), config.big_endian, &desc):
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
            grown = NULL
            if not allocation_refused():
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
