"""The fault path: shadow hit, L1's walk, host leaf, combine, install.

L1's table is walked with the shared side held. The design page has the walk outside and checks sequences after it;
held through, walk and install are one step for whatever removes entries, so that a translation walked before an
invalidation cannot be installed after it, without a sequence to check. What must not hold the lock (an embedder's
populate) makes the fault start over. A step that only the exclusive side may do is redone there from the start.
"""

from libc.stdint cimport int8_t, uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy, memset

from s2shadow.arch cimport (
    ACCESS_PTW, ACCESS_WRITE, DESC_AF, DESC_GUEST_DEVICE, DESC_HOST_W, DESC_MEMATTR_SHIFT, DESC_S2AP_W, DESC_VALID,
    DESC_XN, FINAL_LEVEL, FSC_EXTERNAL_ABORT, LEVEL_STAGE2_OFF, SH_ISH, decode_oa, decode_sh, encode_oa, hpfar,
    level_span, memattr_is_device, required_perm, s2ap_xn_to_perm,
)
from s2shadow.atomics cimport cas64, fetch_add32, fetch_or64, load64, peek64, store64
from s2shadow.combine cimport combine_leaves, combined_t, host_leaf_t
from s2shadow.dirty cimport is_logged, mark_dirty
from s2shadow.host cimport GRANT_EXCLUSIVE, GRANT_NO_MEMORY, grant_t, grant_write, populate_linear
from s2shadow.intervals cimport intervals_record
from s2shadow.leaf cimport drop_below, drop_leaf, evict, find_cipa, shadow_cipa
from s2shadow.lock cimport lock_exclusive, lock_shared, sched_yield, unlock_exclusive, unlock_shared
from s2shadow.memory cimport find_region, is_asking, region_t
from s2shadow.owed cimport owe_leaf, owe_relaxed, owed_begin, owed_end
from s2shadow.plainfault cimport WAYS, fault_on_way, fault_plainly, find_ways, learn_plain, plain_way_t
from s2shadow.rmap cimport rmap_head_near, rmap_push, rmap_tidy
from s2shadow.table cimport (
    DESC_LOCKED, FIND_TOGETHER, find_together, found_t, is_table, leaf_added, links_ensure, page_of, slot_ipa,
    table_ensure, table_find, table_find_near, table_tidy,
)
from s2shadow.vm cimport (
    FAULT_CHUNK, KIND_HIT, KIND_HOST_FAULT, KIND_L1_FAULT, KIND_MAPPED, KIND_MISS, KIND_MMIO, KIND_NO_MEMORY,
    KIND_RETRY, POPULATE_CALLABLE, POPULATE_NONE, TEARDOWN_INTERVAL_MAP, TEARDOWN_REVERSE_MAP, combine_memo_t,
    context_t, fault_t, is_active, overlaps_active, read_tag, vcpu_t, vm_t,
)
from s2shadow.walker cimport walk_remembering, walk_t

cdef enum:
    MOST_SECTIONS = 1 << 16     # of one fault: 2^26 leaves that stand in its way

# How far an attempt to install a leaf got.
ctypedef enum install_t:
    INSTALL_DONE
    INSTALL_AGAIN               # another thread used the slot meanwhile
    INSTALL_EXCLUSIVE
    INSTALL_NO_MEMORY


cdef inline bint perm_allows(uint64_t desc, uint8_t need) noexcept nogil:
    return not need & ~s2ap_xn_to_perm(desc, True)


cdef inline bint device_walk_refused(const vcpu_t *vcpu, uint64_t desc, uint8_t access) noexcept nogil:
    """HCR_EL2.PTW: a stage-1 walk must not touch what L1 maps as Device; L1's walk decides what the fault is."""
    return access & ACCESS_PTW and vcpu.config.ptw and desc & DESC_GUEST_DEVICE


cdef inline void describe_hit(const vm_t *vm, uint64_t desc, uint64_t ipa, int level, uint64_t block,
                              fault_t *out) noexcept nogil:
    cdef uint64_t span = level_span(vm.arena.granule_bits, level)
    out.level = <int8_t>(<int>read_tag(desc) + LEVEL_STAGE2_OFF)
    out.perm = s2ap_xn_to_perm(desc, True)
    out.size = span
    out.cipa = block + (ipa & (span - 1))
    out.pa = (decode_oa(&vm.arena.oa, desc) & ~(span - 1)) + (ipa & (span - 1))


cdef inline uint32_t shadow_entry(const vm_t *vm, vcpu_t *vcpu, uint64_t ipa, uint64_t *desc,
                                  int *level) noexcept nogil:
    """Slot where the shadow's descent for ``ipa`` ends, and what stands there; 0 beyond its input size."""
    cdef const context_t *context = &vm.contexts[vcpu.context]
    cdef uint32_t slot
    desc[0] = 0
    if ipa >> context.shadow.ia_bits:
        return 0
    while True:
        slot = table_find_near(&vm.arena, &context.shadow, &vcpu.shadow_path, ipa, level)
        desc[0] = load64(vm.arena.words + slot)
        if level[0] == FINAL_LEVEL or not is_table(desc[0], level[0]):
            return slot                     # else another thread put a table there since: its descriptor is no leaf


cdef inline void begin_result(const vcpu_t *vcpu, uint64_t ipa, fault_t *out) noexcept nogil:
    memset(out, 0, sizeof(fault_t))
    out.context = <uint16_t>vcpu.context
    out.ipa = ipa
    out.hpfar = hpfar(ipa)


cdef inline bint block_of(vm_t *vm, uint32_t slot, bint exclusive, uint64_t *block) noexcept nogil:
    """cIPA of a leaf's block; False if only the exclusive side can tell."""
    if shadow_cipa(vm, slot, block):
        return True
    return exclusive and find_cipa(vm, slot, False, block)


cdef void find_block(vm_t *vm, vcpu_t *vcpu, uint64_t ipa) noexcept nogil:
    """Make the block of the leaf at ``ipa`` known (exclusive side). Where there are too many aliases and no room for
    markers the leaf goes: a shadow is a cache, and what comes back stands at the front of its list."""
    cdef uint64_t desc = 0, block = 0
    cdef int level = 0
    cdef uint32_t slot = shadow_entry(vm, vcpu, ipa, &desc, &level)
    if desc & DESC_VALID and not find_cipa(vm, slot, False, &block):
        drop_leaf(vm, slot)


cdef inline step_t translate_at(vm_t *vm, vcpu_t *vcpu, uint64_t ipa, uint8_t access, uint32_t slot, int level,
                                uint64_t desc, bint exclusive, fault_t *out) noexcept nogil:
    """Answer from where the shadow's descent for ``ipa`` ends."""
    cdef uint64_t block = 0
    begin_result(vcpu, ipa, out)
    out.kind = KIND_MISS
    if not desc & DESC_VALID or not desc & DESC_AF or not perm_allows(desc, required_perm(access)):
        return STEP_DONE
    if device_walk_refused(vcpu, desc, access):
        return STEP_DONE
    if not block_of(vm, slot, exclusive, &block):
        return STEP_EXCLUSIVE
    out.kind = KIND_HIT
    describe_hit(vm, desc, ipa, level, block, out)
    return STEP_DONE


cdef inline step_t translate_one(vm_t *vm, vcpu_t *vcpu, uint64_t ipa, uint8_t access, bint exclusive,
                                 fault_t *out) noexcept nogil:
    """What the hardware would find in the shadow now: HIT or MISS."""
    cdef uint64_t desc = 0
    cdef int level = 0
    cdef uint32_t slot = shadow_entry(vm, vcpu, ipa, &desc, &level)
    return translate_at(vm, vcpu, ipa, access, slot, level, desc, exclusive, out)


cdef inline step_t translate_found(vm_t *vm, vcpu_t *vcpu, uint64_t ipa, uint8_t access, const found_t *found,
                                   int64_t i, fault_t *out) noexcept nogil:
    """The same where the shadow's descent was made together with others', under this shared section. What stands there
    is read anew: if it is a table by now, the descent goes on."""
    cdef uint64_t desc = load64(vm.arena.words + found.slots[i])
    if is_table(desc, found.levels[i]) or ipa >> vm.contexts[vcpu.context].shadow.ia_bits:
        return translate_one(vm, vcpu, ipa, access, False, out)
    return translate_at(vm, vcpu, ipa, access, found.slots[i], found.levels[i], desc, False, out)


cdef void translate_run(vm_t *vm, vcpu_t *vcpu, const uint64_t *ipas, const uint8_t *masks, int64_t stride,
                        fault_t *out, int64_t n) noexcept nogil:
    """Translate addresses, under the shared side as far as it goes."""
    cdef int64_t at = 0, first, end, chunk = min(FAULT_CHUNK, FIND_TOGETHER)
    cdef step_t step = STEP_DONE
    cdef found_t found
    cdef bint together
    while at < n:
        first = at
        end = at + chunk if n - at > chunk else n
        together = end - first > 1 and step != STEP_EXCLUSIVE
        lock_shared(&vm.lock, vcpu.reader)
        if together:
            find_together(&vm.arena, &vm.contexts[vcpu.context].shadow, ipas + first, end - first, &found)
        while at < end:
            if together:
                step = translate_found(vm, vcpu, ipas[at], masks[at * stride], &found, at - first, out + at)
            else:
                step = translate_one(vm, vcpu, ipas[at], masks[at * stride], False, out + at)
            if step != STEP_DONE:
                break
            at += 1
        unlock_shared(vcpu.reader)
        if step == STEP_EXCLUSIVE:
            lock_exclusive(&vm.lock)
            owed_begin(&vm.owed)
            find_block(vm, vcpu, ipas[at])
            translate_one(vm, vcpu, ipas[at], masks[at * stride], True, out + at)
            owed_end(&vm.owed)
            unlock_exclusive(&vm.lock)
            at += 1


cdef void answer_without_leaf(fault_t *out, uint8_t kind) noexcept nogil:
    out.kind = kind
    out.perm = 0
    out.pa = 0
    out.size = 0


cdef inline step_t hit(vm_t *vm, uint32_t slot, uint64_t desc, int level, uint64_t ipa, bint exclusive,
                       fault_t *out) noexcept nogil:
    """Answer from a live leaf that allows the access, setting AF in shadow and host where it is clear."""
    cdef uint64_t block = 0
    if not block_of(vm, slot, exclusive, &block):
        return STEP_EXCLUSIVE
    describe_hit(vm, desc, ipa, level, block, out)
    if vm.active_count and is_active(vm, out.cipa):
        answer_without_leaf(out, KIND_RETRY)
        return STEP_DONE
    if not desc & DESC_AF:
        fetch_or64(vm.arena.words + slot, DESC_AF)
        set_host_young(vm, out.cipa)
    out.kind = KIND_HIT
    return STEP_DONE


cdef void set_host_young(vm_t *vm, uint64_t cipa) noexcept nogil:
    cdef int level = 0
    cdef uint32_t slot = table_find(&vm.arena, &vm.canonical, cipa, &level)
    if not load64(vm.arena.words + slot) & DESC_AF:
        fetch_or64(vm.arena.words + slot, DESC_AF)


cdef void stop_at_l1(const vcpu_t *vcpu, const walk_t *walked, fault_t *out) noexcept nogil:
    """L1's walk ended in a fault. With its stage 2 off that is L2's own address size fault."""
    out.kind = KIND_L1_FAULT if vcpu.config.enabled else KIND_HOST_FAULT
    out.fsc = walked.fsc
    out.level = walked.level


cdef inline bint is_mmio(const region_t *region, bint host_mapped, uint8_t access) noexcept nogil:
    if region == NULL:
        return True
    if region.device:
        return not host_mapped
    return region.readonly and access & ACCESS_WRITE


cdef inline bint host_leaf_for(const vm_t *vm, uint64_t desc, int level, const region_t *region, uint64_t cipa,
                               host_leaf_t *host) noexcept nogil:
    """The host's leaf, cut to what lies inside the region: its neighbours may be read-only or nothing at all. False
    where not even a page does."""
    cdef uint64_t block
    host.perm = s2ap_xn_to_perm(desc, True)
    host.memattr = <uint8_t>(desc >> DESC_MEMATTR_SHIFT & 0xF)
    host.sh = decode_sh(&vm.arena.oa, desc, SH_ISH)
    host.level = <int8_t>level
    host.size = level_span(vm.arena.granule_bits, level)
    host.pa = decode_oa(&vm.arena.oa, desc) & ~(host.size - 1)
    if region.readonly:
        host.perm &= ~ACCESS_WRITE
    while True:
        block = cipa & ~(host.size - 1)
        if block >= region.start and block + host.size <= region.start + region.size:
            return True
        if level == FINAL_LEVEL:
            return False
        level += 1
        host.level = <int8_t>level
        host.pa += cipa & (host.size - 1) & ~(level_span(vm.arena.granule_bits, level) - 1)
        host.size = level_span(vm.arena.granule_bits, level)


cdef step_t fault_step(vm_t *vm, vcpu_t *vcpu, uint64_t ipa, uint8_t access, bint exclusive,
                       fault_t *out) noexcept nogil:
    """One fault on the side of the lock that is held; see ``step_t`` for what may be left to do."""
    cdef walk_t walked
    cdef host_leaf_t host
    cdef const region_t *region
    cdef uint64_t desc = 0
    cdef grant_t granted
    cdef uint32_t slot, shadow_slot
    cdef int level = 0, shadow_level = 0, populated
    cdef uint8_t need = required_perm(access)
    begin_result(vcpu, ipa, out)
    shadow_slot = shadow_entry(vm, vcpu, ipa, &desc, &shadow_level)
    if desc & DESC_VALID:
        if perm_allows(desc, need) and not device_walk_refused(vcpu, desc, access):
            return hit(vm, shadow_slot, desc, shadow_level, ipa, exclusive, out)
        shadow_slot = 0
    walk_remembering(&vcpu.view, &vcpu.config, &vcpu.guest_path, ipa, access, &walked)
    if walked.updated:
        mark_dirty(&vm.dirty, walked.desc_addr)     # L0 wrote L1's memory: migration must see it
    if walked.status:
        if is_asking(&vcpu.view):
            return STEP_DESCRIPTOR
        stop_at_l1(vcpu, &walked, out)
        return STEP_DONE
    out.cipa = walked.pa
    out.level = walked.level
    region = find_region(&vcpu.view, walked.pa)
    if access & ACCESS_WRITE and not walked.perm & ACCESS_WRITE:
        region = NULL                       # only the MMU may write there (FEAT_S2PIE): no shadow leaf can say so
    if region == NULL or walked.pa >> vm.canonical.ia_bits:
        out.kind = KIND_MMIO
        out.fsc = FSC_EXTERNAL_ABORT
        return STEP_DONE
    while True:
        slot = table_find_near(&vm.arena, &vm.canonical, &vcpu.canonical_path, walked.pa, &level)
        desc = load64(vm.arena.words + slot)
        if is_mmio(region, desc & DESC_VALID != 0, access):
            out.kind = KIND_MMIO
            out.fsc = FSC_EXTERNAL_ABORT
            return STEP_DONE
        if vm.active_count and is_active(vm, walked.pa):
            out.kind = KIND_RETRY
            return STEP_DONE
        if not desc & DESC_VALID:
            out.kind = KIND_HOST_FAULT
            if vm.populate == POPULATE_NONE:
                return STEP_DONE
            if vm.populate == POPULATE_CALLABLE:
                return STEP_POPULATE
            if not exclusive:
                return STEP_EXCLUSIVE
            populated = populate_linear(vm, region, walked.pa)
            if populated <= 0:
                out.kind = KIND_HOST_FAULT if populated == 0 else KIND_NO_MEMORY
                return STEP_DONE
            continue
        if not host_leaf_for(vm, desc, level, region, walked.pa, &host):
            out.kind = KIND_MMIO
            out.fsc = FSC_EXTERNAL_ABORT
            return STEP_DONE
        if not need & ~host.perm:
            break
        if need & ~host.perm & ~ACCESS_WRITE or not desc & DESC_HOST_W or region.readonly:
            out.kind = KIND_HOST_FAULT
            return STEP_DONE
        granted = grant_write(vm, walked.pa, exclusive)
        if granted == GRANT_EXCLUSIVE:
            return STEP_EXCLUSIVE
        if granted == GRANT_NO_MEMORY:
            out.kind = KIND_NO_MEMORY
            return STEP_DONE
    if exclusive:
        shadow_slot = 0                     # tables may have gone since it was found
    return finish_fault(vm, vcpu, ipa, access, exclusive, &walked, &host, slot, shadow_slot, shadow_level, out)


cdef inline void combine_remembering(const vm_t *vm, vcpu_t *vcpu, const walk_t *walked, const host_leaf_t *host,
                                     combined_t *leaf) noexcept nogil:
    """``combine_leaves``, or what it said last time where all that it looks at but the address is the same."""
    cdef combine_memo_t *memo = &vcpu.memo
    cdef const context_t *context
    cdef uint64_t guest_key = 0, host_key, pa = host.pa + (walked.pa & (host.size - 1))
    memcpy(&guest_key, &walked.level, 4)    # level, perm, memattr, sh
    host_key = <uint64_t>1 << 32 | <uint64_t>host.perm | <uint64_t>host.memattr << 8 | <uint64_t>host.sh << 16
    host_key |= <uint64_t>host.level << 24
    if memo.guest == guest_key and memo.host == host_key:
        leaf[0] = memo.leaf
        leaf.desc |= encode_oa(&vm.arena.oa, pa & ~(leaf.size - 1))
        return
    context = &vm.contexts[vcpu.context]
    combine_leaves(walked, host, &context.rules, leaf)
    if walked.level != LEVEL_STAGE2_OFF and memattr_is_device(walked.memattr, vcpu.config.fwb):
        leaf.desc |= DESC_GUEST_DEVICE
    memo.guest = guest_key
    memo.host = host_key
    memo.leaf = leaf[0]
    memo.leaf.desc &= ~encode_oa(&vm.arena.oa, ~<uint64_t>0)


cdef inline step_t finish_fault(vm_t *vm, vcpu_t *vcpu, uint64_t ipa, uint8_t access, bint exclusive, walk_t *walked,
                                host_leaf_t *host, uint32_t host_slot, uint32_t shadow_slot, int shadow_level,
                                fault_t *out) noexcept nogil:
    """Both sides allow the access: combine and install. ``shadow_slot``, where it is not 0, is the invalid entry that
    the shadow's descent ended at."""
    cdef combined_t leaf
    cdef uint64_t block
    cdef bint logged = is_logged(&vm.dirty, walked.pa), may_keep_write = False
    if logged:
        may_keep_write = host.perm & walked.perm & ACCESS_WRITE
        if access & ACCESS_WRITE:
            mark_dirty(&vm.dirty, walked.pa)
        else:
            host.perm &= ~ACCESS_WRITE      # while a page is logged, W comes with a write only
    if not peek64(vm.arena.words + host_slot) & DESC_AF:
        fetch_or64(vm.arena.words + host_slot, DESC_AF)
    combine_remembering(vm, vcpu, walked, host, &leaf)
    block = walked.pa & ~(leaf.size - 1)
    if vm.active_count and overlaps_active(vm, block, block + leaf.size):
        out.kind = KIND_RETRY               # what was looked through for leaves like this one must stay so
        return STEP_DONE
    out.size = leaf.size
    out.perm = leaf.perm
    out.pa = host.pa + (walked.pa & (host.size - 1))
    if shadow_slot and shadow_level == leaf.level:
        if fill_slot(vm, vcpu, shadow_slot, host_slot, block, &leaf, out) == INSTALL_DONE:
            if not logged:
                learn_plain(vm, vcpu, ipa, walked, host, host_slot, shadow_slot, &leaf)
            return STEP_DONE
    return install_somehow(vm, vcpu, ipa, exclusive, host_slot, block, &leaf, may_keep_write, out)


cdef step_t install_somehow(vm_t *vm, vcpu_t *vcpu, uint64_t ipa, bint exclusive, uint32_t host_slot, uint64_t block,
                            combined_t *leaf, bint may_keep_write, fault_t *out) noexcept nogil:
    """Make tables, room or way for a leaf, as far as the side of the lock that is held allows."""
    cdef context_t *context = &vm.contexts[vcpu.context]
    cdef install_t installed
    while True:
        installed = install_leaf(vm, vcpu, context, ipa, host_slot, block, leaf, may_keep_write, exclusive, out)
        if installed == INSTALL_DONE:
            return STEP_DONE
        if not exclusive or installed == INSTALL_EXCLUSIVE:
            return STEP_EXCLUSIVE
        if installed == INSTALL_NO_MEMORY:
            tidy_tables(vm, vcpu, ipa)
            if vm.teardown == TEARDOWN_REVERSE_MAP:
                rmap_tidy(&vm.rmap, block)
            if not evict(vm, vcpu.context, ipa):
                answer_without_leaf(out, KIND_NO_MEMORY)
                return STEP_DONE


cdef install_t install_leaf(vm_t *vm, vcpu_t *vcpu, context_t *context, uint64_t ipa, uint32_t host_slot,
                            uint64_t block, combined_t *leaf, bint may_keep_write, bint exclusive,
                            fault_t *out) noexcept nogil:
    """Put the combined leaf for cIPA ``block`` where ``ipa`` is, whatever stands there."""
    cdef int level = 0
    cdef uint32_t slot
    cdef uint64_t desc
    cdef install_t filled
    while True:
        slot = table_ensure(&vm.arena, &context.shadow, ipa, leaf.level, &level)
        if not slot:
            return INSTALL_NO_MEMORY
        desc = load64(vm.arena.words + slot)
        if desc == DESC_LOCKED:
            sched_yield()                   # another thread is putting a leaf here
            continue
        if not desc & DESC_VALID:
            filled = fill_slot(vm, vcpu, slot, host_slot, block, leaf, out)
            if filled == INSTALL_AGAIN:
                continue
            return filled
        if level == leaf.level and not is_table(desc, level):
            if relax_leaf(vm, vcpu, slot, desc, ipa, block, leaf, may_keep_write, exclusive, out):
                return INSTALL_DONE
            if load64(vm.arena.words + slot) != desc and not exclusive:
                continue                    # it changed under us: look again
        if not exclusive:
            return INSTALL_EXCLUSIVE
        # Another size, another output or fewer permissions: a leaf never mixes two guest descriptors.
        if not is_table(desc, level):
            drop_leaf(vm, slot)
        elif not drop_below(vm, slot):
            return INSTALL_EXCLUSIVE        # on with it in the next section
        vcpu.replaced += 1


cdef inline install_t fill_slot(vm_t *vm, vcpu_t *vcpu, uint32_t slot, uint32_t host_slot, uint64_t block,
                                combined_t *leaf, fault_t *out) noexcept nogil:
    """Install into an invalid slot. It is locked while the links are set, so that a hit always finds its head."""
    cdef uint64_t seen = 0
    cdef uint32_t head
    if not links_ensure(&vm.arena, slot):
        return INSTALL_NO_MEMORY
    if vm.arena.alone:
        if peek64(vm.arena.words + slot):
            return INSTALL_AGAIN
    elif not cas64(vm.arena.words + slot, &seen, DESC_LOCKED):
        return INSTALL_AGAIN
    if vm.teardown == TEARDOWN_REVERSE_MAP:
        head = rmap_head_near(&vm.rmap, &vm.arena.pages[page_of(&vm.arena, host_slot)], host_slot, block, leaf.level)
        if not head:
            store64(vm.arena.words + slot, 0)
            return INSTALL_NO_MEMORY
        rmap_push(&vm.rmap, head, slot, vm.arena.alone)
    else:
        vm.arena.links[slot] = block
        if (vm.teardown == TEARDOWN_INTERVAL_MAP
                and not intervals_record(vm.contexts[vcpu.context].intervals, block, leaf.size,
                                         slot_ipa(&vm.arena, slot))):
            store64(vm.arena.words + slot, 0)
            return INSTALL_NO_MEMORY
    leaf_added(&vm.arena, slot, leaf.guest_level - LEVEL_STAGE2_OFF, vm.arena.alone)
    store64(vm.arena.words + slot, leaf.desc)
    vcpu.installed += 1
    out.kind = KIND_MAPPED
    return INSTALL_DONE


cdef bint relax_leaf(vm_t *vm, vcpu_t *vcpu, uint32_t slot, uint64_t desc, uint64_t ipa, uint64_t block,
                     combined_t *leaf, bint may_keep_write, bint exclusive, fault_t *out) noexcept nogil:
    """Add permissions to a live leaf that maps the same block in the same way; False if it must be replaced."""
    cdef uint64_t permissions = <uint64_t>0xC0 | DESC_XN
    cdef uint64_t known = 0, desired = leaf.desc
    cdef uint8_t old = s2ap_xn_to_perm(desc, True)
    if (desc ^ desired) & ~(permissions | DESC_AF):
        return False
    if not block_of(vm, slot, exclusive, &known) or known != block:
        return False                        # equal PA is not enough: two cIPAs may share a page (KSM)
    if may_keep_write and old & ACCESS_WRITE:
        desired |= DESC_S2AP_W              # the page is marked already
    if old & ~s2ap_xn_to_perm(desired, True):
        return False
    if not cas64(vm.arena.words + slot, &desc, desired):
        return False
    describe_hit(vm, desired, ipa, vm.arena.pages[page_of(&vm.arena, slot)].level, block, out)
    if (desc ^ desired) & permissions:
        out.kind = KIND_MAPPED
        vcpu.relaxed += 1
        owe_relaxed(&vm.owed, vcpu.context, ipa & ~(leaf.size - 1), (ipa & ~(leaf.size - 1)) + leaf.size, leaf.level)
    else:
        out.kind = KIND_HIT                 # another thread was here first, or AF was missing
    return True


cdef void tidy_tables(vm_t *vm, vcpu_t *vcpu, uint64_t ipa) noexcept nogil:
    """Free the empty tables on the way to ``ipa``; the hardware may have cached the way to them."""
    cdef context_t *context = &vm.contexts[vcpu.context]
    cdef uint64_t page = ipa & ~(level_span(vm.arena.granule_bits, FINAL_LEVEL) - 1)
    if ipa >> context.shadow.ia_bits:
        return
    if table_tidy(&vm.arena, &context.shadow, ipa):
        owe_leaf(&vm.owed, vcpu.context, page, page + level_span(vm.arena.granule_bits, FINAL_LEVEL), FINAL_LEVEL, True)


cdef step_t fault_exclusive(vm_t *vm, vcpu_t *vcpu, uint64_t ipa, uint8_t access, fault_t *out) noexcept nogil:
    """The whole fault again on the exclusive side. First what the shared attempt may have left goes: it made tables and
    nodes and then found no memory, and L1's table may say something else by now. Once more, and with others let in
    between, while there are leaves in its way: each section drops as many as one should. Others may put leaves there
    meanwhile, so that this must have an end."""
    cdef step_t step = STEP_EXCLUSIVE
    cdef int sections = 0
    while step == STEP_EXCLUSIVE:
        sections += 1
        lock_exclusive(&vm.lock)
        owed_begin(&vm.owed)
        tidy_tables(vm, vcpu, ipa)
        if vm.teardown == TEARDOWN_REVERSE_MAP and not out.cipa >> vm.canonical.ia_bits:
            rmap_tidy(&vm.rmap, out.cipa)
        if sections == 1:
            fetch_add32(&vm.unfinished, <uint32_t>-1)
        find_block(vm, vcpu, ipa)
        step = fault_step(vm, vcpu, ipa, access, True, out)
        owed_end(&vm.owed)
        if step == STEP_EXCLUSIVE and sections == MOST_SECTIONS:
            answer_without_leaf(out, KIND_RETRY)
            step = STEP_DONE
        if step == STEP_DONE:
            vcpu.kinds[out.kind] += 1
        unlock_exclusive(&vm.lock)
    return step


cdef step_t fault_one(vm_t *vm, vcpu_t *vcpu, uint64_t ipa, uint8_t access, fault_t *out) noexcept nogil:
    """``fault_run`` for one, which nothing of a batch burdens; ``out`` is the caller's alone."""
    cdef step_t step = STEP_DONE
    lock_shared(&vm.lock, vcpu.reader)
    if fault_plainly(vm, vcpu, ipa, access, out):
        vcpu.installed += 1
    else:
        step = fault_step(vm, vcpu, ipa, access, False, out)
    if step == STEP_DONE:
        vcpu.kinds[out.kind & 7] += 1       # under the lock: its exclusive side reads all counters
    elif step == STEP_EXCLUSIVE:
        fetch_add32(&vm.unfinished, 1)
    unlock_shared(vcpu.reader)
    if step == STEP_EXCLUSIVE:
        step = fault_exclusive(vm, vcpu, ipa, access, out)
    if step == STEP_POPULATE:
        vcpu.asked_cipa = out.cipa
    return step


cdef step_t fault_run(vm_t *vm, vcpu_t *vcpu, const uint64_t *ipas, const uint8_t *masks, int64_t stride,
                      fault_t *out, int64_t n, int64_t *at) noexcept nogil:
    """Serve faults from ``at`` on; stops at the element that needs the embedder."""
    cdef step_t step = STEP_DONE
    cdef fault_t row                        # not the user's array, which another thread may write
    cdef plain_way_t ways[WAYS]
    cdef int64_t i = at[0], first = 0, known = 0, end = i, plainly
    cdef uint64_t learnt
    cdef bint served
    while i < n and step == STEP_DONE:
        lock_shared(&vm.lock, vcpu.reader)
        if i == end:                        # once for each, however often the lock is let go in between
            first = i
            end = i + FAULT_CHUNK if n - i > FAULT_CHUNK else n
            known = i + find_ways(vm, vcpu, ipas + i, end - i, ways)
        learnt = vcpu.plain.learnt
        step = STEP_DONE
        plainly = 0
        while i < end:
            if i < known:
                served = fault_on_way(vm, vcpu, ipas[i], masks[i * stride], &ways[i - first], out + i)
            else:
                served = fault_plainly(vm, vcpu, ipas[i], masks[i * stride], out + i)
            if served:
                plainly += 1
                i += 1
                continue
            step = fault_step(vm, vcpu, ipas[i], masks[i * stride], False, &row)
            if step != STEP_DONE:
                break
            if vcpu.plain.learnt != learnt:
                known = 0
            vcpu.kinds[row.kind] += 1
            out[i] = row
            i += 1
        vcpu.installed += plainly
        vcpu.kinds[KIND_MAPPED] += plainly
        if step == STEP_EXCLUSIVE:
            fetch_add32(&vm.unfinished, 1)
        unlock_shared(vcpu.reader)
        known = 0
        if step == STEP_EXCLUSIVE:
            step = fault_exclusive(vm, vcpu, ipas[i], masks[i * stride], &row)
            if step == STEP_DONE:
                out[i] = row
                i += 1
        if step != STEP_DONE:
            vcpu.asked_cipa = row.cipa
            out[i] = row
    at[0] = i
    return step
