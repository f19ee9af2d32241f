# The faults that most are: L1's leaf, the host's and the shadow's tables where they were before, attributes like those
# of the last fault, nothing to update and nothing in the way.
#
# What a vCPU remembers of L1's tables is a walk cache, as ``guest_path`` is, and is forgotten with it. Pages of the
# host's and the shadow's tables are hints: each is believed only as far as the page itself says what it is. Whatever is
# not plain is left, untouched, to the long way (fault.pyx), which decides everything and teaches this one.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from s2shadow.arch cimport (
    ACCESS_PTW, DESC_AF, DESC_CONTIGUOUS, DESC_MEMATTR_SHIFT, DESC_S2AP_SHIFT, DESC_SH_SHIFT, DESC_XN,
    LEVEL_STAGE2_OFF, hpfar, level_shift, required_perm,
)
from s2shadow.atomics cimport cas64, load64, peek8, peek64, store32, store64
from s2shadow.combine cimport combined_t, host_leaf_t
from s2shadow.dirty cimport is_logged
from s2shadow.memory cimport find_region, find_tables, region_t
from s2shadow.rmap cimport rmap_head_near, rmap_push
from s2shadow.table cimport CANONICAL, DESC_LOCKED, is_page_of, leaf_added, page_of, page_t
from s2shadow.vm cimport (
    EPOCH_MASK, KIND_MAPPED, LEAF_TABLES, TEARDOWN_REVERSE_MAP, fault_t, guest_table_t, plain_t, remembered_page,
    vcpu_t, vm_t,
)
from s2shadow.walker cimport walk_t


cdef inline uint64_t span_start(uint64_t address, int bits) noexcept nogil:
    return address >> bits << bits


cdef inline bint fault_plainly(vm_t *vm, vcpu_t *vcpu, uint64_t ipa, uint8_t access, fault_t *out) noexcept nogil:
    """Serve a fault (shared side); False, and nothing done, where it is not plain."""
    cdef plain_t *plain = &vcpu.plain
    cdef int bits = vm.arena.slot_bits
    cdef uint32_t mask = (<uint32_t>1 << bits) - 1, page, host_slot, slot, head
    cdef const guest_table_t *table
    cdef const region_t *region
    cdef page_t *host
    cdef uint64_t desc, cipa, offset, seen = 0
    if access & ACCESS_PTW or not plain.perm or required_perm(access) & ~plain.perm:
        return False
    # the shadow's slot
    page = remembered_page(vm, vcpu.context, ipa, plain.shadow_span, plain.shadow_level)
    slot = page << bits | (<uint32_t>(ipa >> plain.shadow_shift) & mask)
    if not page or peek64(vm.arena.words + slot) or not peek8(&vm.arena.pages[page].has_links):
        return False
    # L1's leaf
    table = &plain.guest[ipa >> plain.guest_span & (LEAF_TABLES - 1)]
    if table.key != (span_start(ipa, plain.guest_span) | plain.epoch & EPOCH_MASK):
        return False
    desc = load64(table.words + (ipa >> plain.guest_shift & vcpu.config.index_mask))
    if desc & plain.guest_mask != plain.guest_says:
        return False
    cipa = desc & plain.guest_oa | ipa & ((<uint64_t>1 << plain.guest_shift) - 1)
    region = find_region(&vcpu.view, cipa)
    if region == NULL or region.readonly or region.device:
        return False
    offset = (cipa & ~(plain.leaf_size - 1)) - region.start
    if offset >= region.size or plain.leaf_size > region.size - offset:
        return False
    # the host's leaf
    page = plain.host[cipa >> plain.host_span & (LEAF_TABLES - 1)]
    host = &vm.arena.pages[page]
    if not is_page_of(host, span_start(cipa, plain.host_span), CANONICAL, plain.host_level):
        return False
    host_slot = page << bits | (<uint32_t>(cipa >> plain.host_shift) & mask)
    desc = load64(vm.arena.words + host_slot)
    if desc & ~vm.arena.oa.mask != plain.host_says or vm.active_count or is_logged(&vm.dirty, cipa):
        return False
    desc = desc & vm.arena.oa.mask | cipa & ((<uint64_t>1 << plain.host_shift) - 1)
    if not vm.arena.alone and not cas64(vm.arena.words + slot, &seen, DESC_LOCKED):
        return False
    head = rmap_head_near(&vm.rmap, host, host_slot, cipa, plain.shadow_level)
    if not head:
        store64(vm.arena.words + slot, 0)
        return False
    rmap_push(&vm.rmap, head, slot)
    leaf_added(&vm.arena, slot, plain.guest_level - LEVEL_STAGE2_OFF)
    store64(vm.arena.words + slot, plain.leaf | desc & ~(plain.leaf_size - 1))
    vcpu.installed += 1
    out.kind = KIND_MAPPED
    out.fsc = 0
    out.level = plain.guest_level
    out.perm = plain.perm
    out.context = <uint16_t>vcpu.context
    out.ipa = ipa
    out.cipa = cipa
    out.pa = desc
    out.size = plain.leaf_size
    out.hpfar = hpfar(ipa)
    return True


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
        table.key = span_start(ipa, plain.guest_span) | plain.epoch & EPOCH_MASK
    plain.host[walked.pa >> plain.host_span & (LEAF_TABLES - 1)] = page_of(&vm.arena, host_slot)
    store32(&vm.contexts[vcpu.context].leaf_tables[ipa >> plain.shadow_span & (LEAF_TABLES - 1)],
            page_of(&vm.arena, slot))


cdef inline void learn_plain(vm_t *vm, vcpu_t *vcpu, uint64_t ipa, const walk_t *walked, const host_leaf_t *host,
                             uint32_t host_slot, uint32_t slot, const combined_t *leaf) noexcept nogil:
    """A leaf was put into ``slot``: faults like this one may be served plainly from now on."""
    cdef plain_t *plain = &vcpu.plain
    cdef uint64_t attributes = vcpu.config.plain_mask | DESC_AF | DESC_CONTIGUOUS | DESC_XN
    cdef uint64_t desc = peek64(vm.arena.words + host_slot)
    attributes |= <uint64_t>3 << DESC_S2AP_SHIFT | <uint64_t>3 << DESC_SH_SHIFT | <uint64_t>0xF << DESC_MEMATTR_SHIFT
    if not vcpu.config.plain or walked.level < 0 or walked.desc & (DESC_AF | DESC_CONTIGUOUS) != DESC_AF:
        return
    if host.level != vm.arena.pages[page_of(&vm.arena, host_slot)].level or vm.arena.oa.high_mask or not desc & DESC_AF:
        return
    if vm.teardown != TEARDOWN_REVERSE_MAP or vcpu.view.output.readonly:
        return
    plain.guest_level = walked.level
    plain.host_level = host.level
    plain.shadow_level = leaf.level
    plain.guest_shift = <uint8_t>level_shift(vcpu.config.granule_bits, walked.level)
    plain.host_shift = <uint8_t>level_shift(vm.arena.granule_bits, host.level)
    plain.shadow_shift = <uint8_t>level_shift(vm.arena.granule_bits, leaf.level)
    plain.guest_span = plain.guest_shift + vcpu.config.granule_bits - 3
    plain.host_span = plain.host_shift + vm.arena.slot_bits
    plain.shadow_span = plain.shadow_shift + vm.arena.slot_bits
    plain.guest_mask = attributes
    plain.guest_says = walked.desc & attributes
    plain.guest_oa = vcpu.config.oa.mask & ~(((<uint64_t>1) << plain.guest_shift) - 1)
    plain.host_says = desc & ~vm.arena.oa.mask
    plain.leaf = leaf.desc & ~vm.arena.oa.mask
    plain.leaf_size = leaf.size
    plain.perm = leaf.perm
    learn_tables(vm, vcpu, ipa, walked, host_slot, slot)
