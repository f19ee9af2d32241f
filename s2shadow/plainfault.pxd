# The faults that most are: L1's leaf, the host's and the shadow's tables where they were before, attributes like those
# of the last fault, nothing to update and nothing in the way.
#
# What a vCPU remembers of L1's tables is a walk cache, as ``guest_path`` is, and is forgotten with it. Pages of the
# host's and the shadow's tables are hints: each is believed only as far as the page itself says what it is. Whatever is
# not plain is left, untouched, to the long way (fault.pyx), which decides everything and teaches this one.

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from s2shadow.arch cimport (
    ACCESS_PTW, DESC_AF, DESC_CONTIGUOUS, DESC_MEMATTR_SHIFT, DESC_S2AP_SHIFT, DESC_SH_SHIFT, DESC_XN,
    LEVEL_STAGE2_OFF, hpfar, level_shift, required_perm,
)
from s2shadow.atomics cimport cas64, load64, peek8, peek32, peek64, prefetch, prefetch_to_write, store32, store64
from s2shadow.combine cimport combined_t, host_leaf_t
from s2shadow.dirty cimport is_logged
from s2shadow.memory cimport find_region, find_tables, region_t
from s2shadow.rmap cimport rmap_head_known, rmap_push
from s2shadow.table cimport CANONICAL, DESC_LOCKED, is_page_of, leaf_added, page_of, page_t, page_tag
from s2shadow.vm cimport (
    EPOCH, KIND_MAPPED, LEAF_TABLES, STAMP_MASK, TEARDOWN_REVERSE_MAP, fault_head_t, fault_t, guest_table_t, plain_t,
    remembered_page, vcpu_t, vm_t,
)
from s2shadow.walker cimport walk_t

cdef enum:
    WAYS = 32                   # faults of a batch that are begun together


cdef inline uint64_t span_start(uint64_t address, int bits) noexcept nogil:
    return address >> bits << bits


# Where the leaves of a fault are, found ahead of it.
ctypedef struct plain_way_t:
    uint64_t cipa
    uint32_t slot               # of the shadow
    uint32_t host_page          # 0: the fault is not plain
    uint32_t host_slot


cdef inline uint32_t plain_page(const vm_t *vm, const vcpu_t *vcpu, uint64_t ipa) noexcept nogil:
    """The shadow's table, or 0."""
    cdef const plain_t *plain = &vcpu.plain
    cdef uint32_t page = remembered_page(vm, vcpu.context, ipa, plain.shadow_span, plain.shadow_tag)
    return page if peek8(&vm.arena.pages[page].has_links) else 0


cdef inline uint32_t plain_slot(const vm_t *vm, const vcpu_t *vcpu, uint32_t page, uint64_t ipa) noexcept nogil:
    return page << vm.arena.slot_bits | (<uint32_t>(ipa >> vcpu.plain.shadow_shift) & vm.arena.slot_mask)


cdef inline const uint64_t *plain_guest(const vcpu_t *vcpu, uint64_t ipa) noexcept nogil:
    """L1's descriptor, or NULL."""
    cdef const plain_t *plain = &vcpu.plain
    cdef const guest_table_t *table = &plain.guest[ipa >> plain.guest_span & (LEAF_TABLES - 1)]
    if table.key != (span_start(ipa, plain.guest_span) | plain.stamp & STAMP_MASK):
        return NULL
    return table.words + (ipa >> plain.guest_shift & vcpu.config.index_mask)


cdef inline bint holds_leaf(const region_t *region, uint64_t start, uint64_t size) noexcept nogil:
    """Whether a leaf lies wholly in a region of memory that L1 may write."""
    cdef uint64_t offset = start - region.start
    return offset < region.size and size <= region.size - offset and not region.readonly | region.device


cdef inline bint plain_cipa(vcpu_t *vcpu, uint64_t desc, uint64_t ipa, uint64_t *cipa) noexcept nogil:
    """Where L1's leaf leads to; False where the leaf is of another kind, or not in plain memory."""
    cdef const plain_t *plain = &vcpu.plain
    cdef const region_t *region
    cdef uint64_t at = desc & plain.guest_oa | ipa & plain.guest_offset
    if desc & plain.guest_mask != plain.guest_says:
        return False
    cipa[0] = at
    if holds_leaf(&vcpu.view.output, at & plain.leaf_base, plain.leaf_size):
        return True
    region = find_region(&vcpu.view, at)
    return region != NULL and holds_leaf(region, at & plain.leaf_base, plain.leaf_size)


cdef inline uint32_t plain_host(const vm_t *vm, const vcpu_t *vcpu, uint64_t cipa) noexcept nogil:
    """The host's table, or 0."""
    cdef const plain_t *plain = &vcpu.plain
    cdef uint32_t page = plain.host[cipa >> plain.host_span & (LEAF_TABLES - 1)]
    if not is_page_of(&vm.arena.pages[page], span_start(cipa, plain.host_span), plain.host_tag):
        return 0
    return page


cdef inline uint32_t plain_host_slot(const vm_t *vm, const vcpu_t *vcpu, uint32_t page, uint64_t cipa) noexcept nogil:
    return page << vm.arena.slot_bits | (<uint32_t>(cipa >> vcpu.plain.host_shift) & vm.arena.slot_mask)


cdef inline bint plain_access(const vcpu_t *vcpu, uint8_t access) noexcept nogil:
    return vcpu.plain.accesses >> access & 1


cdef inline bint put_leaf(vm_t *vm, const plain_t *plain, uint64_t cipa, uint32_t slot, page_t *host,
                          uint32_t host_slot, uint64_t leaf, bint alone) noexcept nogil:
    """List and count a leaf, and write it; False where another thread is at the slot, or there is no node to list it
    in."""
    cdef uint64_t seen = 0
    cdef uint32_t head
    if not alone and not cas64(vm.arena.words + slot, &seen, DESC_LOCKED):
        return False
    head = rmap_head_known(&vm.rmap, host, host_slot, cipa, plain.shadow_level)
    if not head:
        store64(vm.arena.words + slot, 0)
        return False
    rmap_push(&vm.rmap, head, slot, alone)
    leaf_added(&vm.arena, slot, plain.guest_level - LEVEL_STAGE2_OFF, alone)
    store64(vm.arena.words + slot, leaf)
    return True


cdef inline bint install_plainly(vm_t *vm, vcpu_t *vcpu, uint64_t ipa, uint64_t cipa, uint32_t slot,
                                 page_t *host, uint32_t host_slot, fault_t *out) noexcept nogil:
    """Put the leaf into a slot that was free; False, and nothing done, where the host's leaf is not plain, in the slot
    of table ``host``. ``out`` is only written, whole."""
    cdef const plain_t *plain = &vcpu.plain
    cdef uint64_t desc = load64(vm.arena.words + host_slot)
    if desc & ~vm.arena.oa.mask != plain.host_says or vm.active_count or is_logged(&vm.dirty, cipa):
        return False
    desc = desc & vm.arena.oa.mask | cipa & plain.host_offset
    if vm.arena.alone:
        if not put_leaf(vm, plain, cipa, slot, host, host_slot, plain.leaf | desc & plain.leaf_base, True):
            return False
    elif not put_leaf(vm, plain, cipa, slot, host, host_slot, plain.leaf | desc & plain.leaf_base, False):
        return False
    memcpy(out, &plain.answer, sizeof(fault_head_t))
    out.ipa = ipa
    out.cipa = cipa
    out.pa = desc
    out.size = plain.leaf_size
    out.hpfar = hpfar(ipa)
    return True


cdef inline bint fault_plainly(vm_t *vm, vcpu_t *vcpu, uint64_t ipa, uint8_t access, fault_t *out) noexcept nogil:
    """Serve a fault (shared side); False, and nothing done, where it is not plain. Counts are the caller's."""
    cdef uint32_t slot, page
    cdef const uint64_t *entry
    cdef uint64_t cipa = 0
    if not plain_access(vcpu, access):
        return False
    page = plain_page(vm, vcpu, ipa)
    slot = plain_slot(vm, vcpu, page, ipa)
    if not page or peek64(vm.arena.words + slot):
        return False
    entry = plain_guest(vcpu, ipa)
    if entry == NULL or not plain_cipa(vcpu, load64(entry), ipa, &cipa):
        return False
    page = plain_host(vm, vcpu, cipa)
    return page and install_plainly(vm, vcpu, ipa, cipa, slot, &vm.arena.pages[page],
                                    plain_host_slot(vm, vcpu, page, cipa), out)


cdef inline int64_t find_ways(const vm_t *vm, vcpu_t *vcpu, const uint64_t *ipas, int64_t n,
                              plain_way_t *ways) noexcept nogil:
    """The first half of up to ``WAYS`` plain faults (shared side), step by step for all of them, so that their misses
    overlap; what the second half needs is fetched meanwhile. Returns how many were looked at: none in one leaf table
    of L1's, whose faults are as good as always in order, and the hardware sees that by itself. Ways are good until the
    lock is let go or the vCPU learns another shape."""
    cdef const uint64_t *entries[WAYS]
    cdef const plain_t *plain = &vcpu.plain
    cdef uint32_t slot, host_slot, page, node
    cdef uint64_t cipa = 0
    cdef int64_t i
    if n > WAYS:
        n = WAYS
    if n < 2 or not plain.accesses or not (ipas[0] ^ ipas[n - 1]) >> plain.guest_span:
        return 0
    for i in range(n):
        page = plain_page(vm, vcpu, ipas[i])
        slot = plain_slot(vm, vcpu, page, ipas[i])
        entries[i] = plain_guest(vcpu, ipas[i]) if page else NULL
        ways[i].slot = slot
        prefetch(entries[i])
        prefetch_to_write(vm.arena.words + slot)
        prefetch_to_write(vm.arena.links + slot)
        prefetch_to_write(&vm.arena.pages[page].live)
    for i in range(n):
        page = 0
        if entries[i] != NULL and plain_cipa(vcpu, load64(entries[i]), ipas[i], &cipa):
            page = plain_host(vm, vcpu, cipa)
        host_slot = plain_host_slot(vm, vcpu, page, cipa)
        ways[i].cipa = cipa
        ways[i].host_page = page
        ways[i].host_slot = host_slot
        prefetch(vm.arena.words + host_slot)
        node = peek32(&vm.arena.pages[page].node)
        prefetch_to_write(&vm.rmap.nodes[node].used)
        prefetch_to_write(vm.rmap.heads + (node << vm.arena.slot_bits | host_slot & vm.arena.slot_mask))
    return n


cdef inline bint fault_on_way(vm_t *vm, vcpu_t *vcpu, uint64_t ipa, uint8_t access, const plain_way_t *way,
                              fault_t *out) noexcept nogil:
    """``fault_plainly`` where the way was found ahead, under this shared section."""
    if not way.host_page or not plain_access(vcpu, access) or peek64(vm.arena.words + way.slot):
        return False
    return install_plainly(vm, vcpu, ipa, way.cipa, way.slot, &vm.arena.pages[way.host_page], way.host_slot, out)


cdef inline void learn_tables(vm_t *vm, vcpu_t *vcpu, uint64_t ipa, const walk_t *walked, uint32_t host_slot,
                              uint32_t slot) noexcept nogil:
    """Remember where the leaf tables of a fault are whose shape is known."""
    cdef plain_t *plain = &vcpu.plain
    cdef guest_table_t *table = &plain.guest[ipa >> plain.guest_span & (LEAF_TABLES - 1)]
    cdef uint64_t address = walked.desc_addr - ((ipa >> plain.guest_shift & vcpu.config.index_mask) << 3), offset
    cdef const region_t *region = find_tables(&vcpu.view, walked.level, walked.desc_addr)
    if region == NULL:
        return
    offset = address - region.start
    if offset < region.size and <uint64_t>1 << vcpu.config.granule_bits <= region.size - offset:
        table.words = <const uint64_t *>(region.host + offset)
        table.key = span_start(ipa, plain.guest_span) | plain.stamp & STAMP_MASK
    plain.host[walked.pa >> plain.host_span & (LEAF_TABLES - 1)] = page_of(&vm.arena, host_slot)
    store32(&vm.contexts[vcpu.context].leaf_tables[ipa >> plain.shadow_span & (LEAF_TABLES - 1)],
            page_of(&vm.arena, slot))


cdef inline uint32_t plain_accesses(uint8_t perm) noexcept nogil:
    """The accesses that a leaf allows, but for stage-1 walks."""
    cdef uint32_t allowed = 0
    cdef uint8_t access
    for access in range(ACCESS_PTW):
        if not required_perm(access) & ~perm:
            allowed |= <uint32_t>1 << access
    return allowed


cdef inline void learn_plain(vm_t *vm, vcpu_t *vcpu, uint64_t ipa, const walk_t *walked, const host_leaf_t *host,
                             uint32_t host_slot, uint32_t slot, const combined_t *leaf) noexcept nogil:
    """A leaf was put into ``slot``: faults like this one may be served plainly from now on."""
    cdef plain_t *plain = &vcpu.plain
    cdef uint64_t attributes = vcpu.config.plain_mask | DESC_AF | DESC_CONTIGUOUS | DESC_XN
    cdef uint64_t desc = peek64(vm.arena.words + host_slot)
    cdef int shift = level_shift(vcpu.config.granule_bits, walked.level), span = shift + vcpu.config.granule_bits - 3
    attributes |= <uint64_t>3 << DESC_S2AP_SHIFT | <uint64_t>3 << DESC_SH_SHIFT | <uint64_t>0xF << DESC_MEMATTR_SHIFT
    if vm.teardown != TEARDOWN_REVERSE_MAP or vcpu.view.output.readonly:
        return
    if not vcpu.config.plain or walked.level < 0 or walked.desc & (DESC_AF | DESC_CONTIGUOUS) != DESC_AF:
        return
    if host.level != vm.arena.pages[page_of(&vm.arena, host_slot)].level or vm.arena.oa.high_mask or not desc & DESC_AF:
        return
    if span > vcpu.config.ia_bits:          # beside a start table that fills no granule L1 may keep anything
        return
    plain.learnt += 1
    plain.stamp = plain.stamp & ~<uint64_t>(EPOCH - 1) | <uint64_t>walked.level
    plain.guest_level = walked.level
    plain.host_tag = page_tag(CANONICAL, host.level)
    plain.shadow_tag = page_tag(vcpu.context, leaf.level)
    plain.shadow_level = leaf.level
    plain.guest_shift = <uint8_t>shift
    plain.host_shift = <uint8_t>level_shift(vm.arena.granule_bits, host.level)
    plain.shadow_shift = <uint8_t>level_shift(vm.arena.granule_bits, leaf.level)
    plain.guest_span = <uint8_t>span
    plain.host_span = plain.host_shift + vm.arena.slot_bits
    plain.shadow_span = plain.shadow_shift + vm.arena.slot_bits
    plain.guest_mask = attributes
    plain.guest_says = walked.desc & attributes
    plain.guest_oa = vcpu.config.oa.mask & ~(((<uint64_t>1) << plain.guest_shift) - 1)
    plain.host_says = desc & ~vm.arena.oa.mask
    plain.leaf = leaf.desc & ~vm.arena.oa.mask
    plain.leaf_size = leaf.size
    plain.leaf_base = ~(leaf.size - 1)
    plain.guest_offset = (<uint64_t>1 << plain.guest_shift) - 1
    plain.host_offset = (<uint64_t>1 << plain.host_shift) - 1
    plain.answer.kind = KIND_MAPPED
    plain.answer.level = walked.level
    plain.answer.context = <uint16_t>vcpu.context
    if not plain.accesses or plain.answer.perm != leaf.perm:
        plain.answer.perm = leaf.perm
        plain.accesses = plain_accesses(leaf.perm)
    learn_tables(vm, vcpu, ipa, walked, host_slot, slot)
