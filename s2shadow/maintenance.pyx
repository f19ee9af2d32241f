"""What a TLBI removes.

The extent rule: a shadow leaf is a fragment of one L1 leaf, and L1 may name any address inside that leaf. So an
operation on [start, end) takes every leaf of guest level l that lies in the range rounded out to L1's block size at
that level. Levels that a context does not hold are skipped at its root, so nothing costs where nothing is.

``tlbi="kvm72"`` does what Linux 7.2 does instead (spec 03, O1-O15): every context with the VMID, stage 2 on or off;
a size that is guessed where no TTL is given; whole aligned blocks whatever level their leaves have.
"""

from libc.stdint cimport uint8_t
from libc.string cimport memset

from s2shadow.arch cimport DESC_VALID, FINAL_LEVEL, LEVEL_STAGE2_OFF, level_shift, level_span
from s2shadow.atomics cimport load64, peek64
from s2shadow.config cimport decode_vmid
from s2shadow.intervals cimport intervals_lose, intervals_reset
from s2shadow.leaf cimport OP_DROP, clear_leaf_at, drop_leaf, is_empty, visit_context, visit_init, visit_t
from s2shadow.lock cimport breathe, lock_exclusive, unlock_exclusive
from s2shadow.owed cimport (
    CANONICAL_VMID, FIRST_CONTEXT_VMID, LEVEL_ANY, TLBI_ASID, TLBI_VA, TLBI_VAA, TLBI_VMALL, owe_context,
    owe_stage1, owed_begin, owed_end,
)
from s2shadow.rmap cimport rmap_unlink
from s2shadow.table cimport child_page, held_tags, is_table, lowest_bit, page_t, page_tag, table_find
from s2shadow.tlbi cimport (
    CLASS_STAGE1, NO_LEVEL, REGIME_EL2_S1, SCOPE_ALL, SCOPE_ASID, SCOPE_IPA, SCOPE_VA, SCOPE_VAA,
    tlbi_decode, tlbi_no_operand, tlbi_op_t, tlbi_t,
)
from s2shadow.vm cimport (
    DROP_CHUNK, TEARDOWN_REVERSE_MAP, context_t, forget_guest_path, kernel_steps_per_context,
    read_tag, remembered_page, tlbi_counts_t, vcpu_t,
)

cdef enum:
    GUEST_TAGS = 0x3E           # levels -1 to 3: not the leaves of a context without stage 2
    HCR_TGE_BIT = 27
    HCR_E2H_BIT = 34


cdef bint drop_chunked(vm_t *vm, context_t *context, visit_t *visit, tlbi_result_t *result) noexcept nogil:
    """Drop what a visit names, letting go of the lock between chunks; False if the context got another owner, whose
    leaves the operation does not name. No address is passed twice: what others put in behind was walked after the
    operation began, and an L1 that goes on faulting must not keep it from ending."""
    cdef uint64_t generation = context.generation
    cdef bint same = True
    visit.budget = result.pause_at - result.removed if result.pause_at > result.removed else 0
    while same and not visit_context(vm, context, visit):
        breathe(&vm.lock)
        visit.budget = DROP_CHUNK
        same = context.generation == generation and context.valid
    result.removed += visit.dropped
    result.pause_at = result.removed + visit.budget
    return same


cdef void drop_whole(vm_t *vm, context_t *context, tlbi_result_t *result) noexcept nogil:
    """Every leaf of a context that is not empty."""
    cdef visit_t visit
    owe_context(&vm.owed, context.shadow.context)
    visit_init(&visit, OP_DROP, 0, ~<uint64_t>0)
    intervals_lose(context.intervals)
    if drop_chunked(vm, context, &visit, result) and not context_tags(vm, context):
        intervals_reset(context.intervals)
    result.required += visit.dropped


cdef uint8_t hinted_tags(const tlbi_t *tlbi) noexcept nogil:
    """The guest levels that an operation may take."""
    return GUEST_TAGS if tlbi.level == NO_LEVEL else <uint8_t>(1 << (tlbi.level - LEVEL_STAGE2_OFF))


cdef inline int tag_shift(const context_t *context, int tag) noexcept nogil:
    """Size of L1's leaves of a guest level, in bits."""
    return level_shift(context.config.granule_bits, tag + LEVEL_STAGE2_OFF)


cdef inline uint8_t drop_at(vm_t *vm, context_t *context, uint64_t ipa, uint8_t tags,
                            tlbi_result_t *result) noexcept nogil:
    """Drop the shadow leaf over ``ipa`` if it has one of the guest levels and L1's block is no larger than the entry
    that the descent ends at. Returns the levels of larger blocks: of those any leaf under the block is named."""
    cdef int level = context.shadow.start_level, shift = level_shift(vm.arena.granule_bits, level)
    cdef int largest = tag_shift(context, lowest_bit(tags))
    cdef uint32_t slot, known, mask = vm.arena.slot_mask
    cdef uint64_t desc
    cdef uint8_t larger = 0
    slot = (context.shadow.root << vm.arena.slot_bits) + <uint32_t>(ipa >> shift)
    if largest <= vm.arena.granule_bits:
        known = remembered_page(vm, context.shadow.context, ipa, vm.arena.granule_bits + vm.arena.slot_bits,
                                page_tag(context.shadow.context, FINAL_LEVEL))
        if known:
            level = FINAL_LEVEL
            shift = vm.arena.granule_bits
            slot = known << vm.arena.slot_bits | (<uint32_t>(ipa >> shift) & mask)
    while True:
        while largest > shift:
            larger |= tags & -tags
            tags &= tags - 1
            if not tags:
                return larger
            largest = tag_shift(context, lowest_bit(tags))
        desc = peek64(vm.arena.words + slot)
        if not is_table(desc, level):
            break
        level += 1
        shift -= vm.arena.slot_bits
        slot = child_page(&vm.arena, desc) << vm.arena.slot_bits | (<uint32_t>(ipa >> shift) & mask)
    if desc & DESC_VALID and tags >> read_tag(desc) & 1:
        if vm.teardown == TEARDOWN_REVERSE_MAP:     # in line: this is what the budget is of
            rmap_unlink(&vm.rmap, slot)
            clear_leaf_at(vm, slot, desc, context.shadow.context, ipa >> shift << shift, level, shift)
        else:
            drop_leaf(vm, slot)
        result.removed += 1
        result.required += 1
        if result.removed >= result.pause_at and not larger:    # the context may be another's afterwards
            breathe(&vm.lock)
            result.pause_at = result.removed + DROP_CHUNK
    return larger


cdef inline uint8_t context_tags(const vm_t *vm, const context_t *context) noexcept nogil:
    """The guest levels that a context has leaves of."""
    cdef const page_t *page = &vm.arena.pages[context.shadow.root]
    cdef uint8_t tags = held_tags(page)
    cdef uint32_t i
    for i in range(1, <uint32_t>1 << context.shadow.concatenated_bits):
        tags |= held_tags(page + i)
    return tags


cdef void drop_extents(vm_t *vm, context_t *context, const tlbi_t *tlbi, tlbi_result_t *result) noexcept nogil:
    """Exactly the leaves that the extent rule names. A hint of another granule names none."""
    cdef visit_t visit
    cdef uint64_t span
    cdef uint8_t tags = hinted_tags(tlbi) & context_tags(vm, context)
    cdef int level
    cdef bint whole
    if tlbi.granule_bits and tlbi.granule_bits != context.config.granule_bits:
        return
    if tags and not tlbi.op.is_range and not tlbi.start >> context.shadow.ia_bits:
        tags = drop_at(vm, context, tlbi.start, tags, result)
    if not tags:
        return
    for level in range(-1, 4):
        if not tags >> (level - LEVEL_STAGE2_OFF) & 1 or level_shift(context.config.granule_bits, level) >= 64:
            continue
        span = level_span(context.config.granule_bits, level)
        visit_init(&visit, OP_DROP, tlbi.start & ~(span - 1), ((tlbi.end - 1) | (span - 1)) + 1)
        visit.tags = <uint8_t>(1 << (level - LEVEL_STAGE2_OFF))
        whole = drop_chunked(vm, context, &visit, result)
        result.required += visit.dropped
        if not whole:
            return
    if result.removed >= result.pause_at:   # those that found nothing more did not pause
        breathe(&vm.lock)
        result.pause_at = result.removed + DROP_CHUNK


cdef uint64_t kvm72_level_size(int granule_bits, int level) noexcept nogil:
    """__ttl_to_size; 0 for what it does not know."""
    if level == 3 or level == 2 or (level == 1 and granule_bits == 12):
        return level_span(granule_bits, level)
    return 0


cdef uint64_t kvm72_largest(int granule_bits) noexcept nogil:
    return level_span(granule_bits, 1 if granule_bits == 12 else 2)


cdef uint64_t kvm72_guessed_size(vm_t *vm, const context_t *context, uint64_t ipa) noexcept nogil:
    """get_guest_mapping_ttl: probe the shadow at the address aligned to each of L1's sizes, smallest first; the first
    tagged leaf decides. Largest size when none is found, or when its block does not reach the address."""
    cdef int granule_bits = context.config.granule_bits, probe, level = 0, guest_level
    cdef uint64_t at = ipa, desc, size
    for probe in range(3, 0, -1):
        if not kvm72_level_size(granule_bits, probe):
            continue
        at &= ~(level_span(granule_bits, probe) - 1)
        if at >> context.shadow.ia_bits:
            continue
        desc = load64(vm.arena.words + table_find(&vm.arena, &context.shadow, at, &level))
        guest_level = <int>read_tag(desc) + LEVEL_STAGE2_OFF
        if not desc & DESC_VALID or guest_level < 1:
            continue                        # Linux has no tag for levels below 1
        size = kvm72_level_size(granule_bits, guest_level)
        if not size:
            size = kvm72_largest(granule_bits)
        return size if ipa < at + size else kvm72_largest(granule_bits)
    return kvm72_largest(granule_bits)


cdef uint64_t kvm72_size(vm_t *vm, const context_t *context, const tlbi_t *tlbi) noexcept nogil:
    """compute_tlb_inval_range: a TTL is trusted as it is, whatever the context's granule."""
    cdef uint64_t size = 0
    if not vm.features.ttl or not tlbi.ttl:
        return kvm72_guessed_size(vm, context, tlbi.start)
    if tlbi.ttl >> 2:
        size = kvm72_level_size(10 + 2 * (tlbi.ttl >> 2), tlbi.ttl & 3)
    return size if size else kvm72_largest(context.config.granule_bits)


cdef void drop_as_kvm72(vm_t *vm, context_t *context, const tlbi_t *tlbi, const tlbi_t *exact,
                        tlbi_result_t *result) noexcept nogil:
    """What Linux removes; ``exact`` is the same operation as the architecture reads it, and decides what had to go."""
    cdef visit_t visit
    cdef uint64_t start = tlbi.start, end = tlbi.end, size
    if not tlbi.op.is_range:
        size = kvm72_size(vm, context, tlbi)
        start &= ~(size - 1)
        end = start + size
    visit_init(&visit, OP_DROP, start, end)
    visit.guest_granule_bits = context.config.granule_bits
    visit.exact_start = exact.start
    visit.exact_end = exact.end
    if context.config.enabled and not exact.names_nothing and exact_granule(exact, context):
        visit.exact_tags = hinted_tags(exact)
    drop_chunked(vm, context, &visit, result)
    result.required += visit.required


cdef bint exact_granule(const tlbi_t *tlbi, const context_t *context) noexcept nogil:
    return not tlbi.granule_bits or tlbi.granule_bits == context.config.granule_bits


cdef void forget_guest_tables(vm_t *vm, const tlbi_t *tlbi, uint16_t vmid) noexcept nogil:
    """What vCPUs remember of L1's tables is a walk cache: last-level forms keep it, all others drop it."""
    cdef vcpu_t *vcpu = vm.vcpus
    cdef const vcpu_t *end = vcpu + vm.vcpu_count
    if tlbi.op.last_level or tlbi.names_nothing:
        return
    while vcpu != end:
        if vcpu.config.vmid == vmid or tlbi.op.scope == SCOPE_ALL:
            forget_guest_path(vcpu)
        vcpu += 1


cdef inline void drop_named(vm_t *vm, context_t *context, const tlbi_t *tlbi, const tlbi_t *exact,
                            tlbi_result_t *result) noexcept nogil:
    if vm.tlbi_kvm72:
        drop_as_kvm72(vm, context, tlbi, exact, result)
    else:
        drop_extents(vm, context, tlbi, result)


cdef void apply_stage2(vm_t *vm, const tlbi_t *tlbi, const tlbi_t *exact, const tlbi_regs_t *regs,
                       tlbi_result_t *result) noexcept nogil:
    """IPAS2*, RIPAS2*, VMALLS12E1* and ALLE1*."""
    cdef uint16_t vmid = decode_vmid(&vm.features, regs.vttbr, regs.vtcr)
    cdef context_t *context = vm.contexts
    cdef const context_t *end = context + vm.contexts_used
    cdef bint all_vmids = tlbi.op.scope == SCOPE_ALL, by_ipa = tlbi.op.scope == SCOPE_IPA
    forget_guest_tables(vm, tlbi, vmid)
    while context != end:
        if context.valid and (context.config.vmid == vmid or all_vmids):
            if not by_ipa:
                result.contexts += 1
                if vm.tlbi_kvm72:
                    vm.kernel_steps += kernel_steps_per_context(vm)
                if not is_empty(vm, context):
                    drop_whole(vm, context, result)
            elif context.config.enabled or vm.tlbi_kvm72:
                result.contexts += 1
                if not tlbi.names_nothing:
                    drop_named(vm, context, tlbi, exact, result)
        context += 1


cdef void owe_one_stage1(vm_t *vm, const tlbi_t *tlbi, uint32_t host_vmid, bint has_asid) noexcept nogil:
    """Pass an operation on. Without an ASID in the regime (EL2 with E2H=0, where the field is RES0) any will do. In
    what units the base of a range of small pages is, TCR_ELx.DS says, which is not known here: where it may be 1, all
    goes."""
    cdef int op = TLBI_VMALL
    if tlbi.op.is_range and vm.features.lpa2 and tlbi.granule_bits < 16:
        owe_stage1(&vm.owed, TLBI_VMALL, host_vmid, 0, 0, LEVEL_ANY, 0, False)
        return
    if tlbi.op.scope == SCOPE_VA and not has_asid:
        owe_stage1(&vm.owed, TLBI_VAA, host_vmid, tlbi.start, tlbi.end, tlbi.level, 0, tlbi.op.last_level)
        return
    if tlbi.op.scope == SCOPE_VA:
        op = TLBI_VA
    elif tlbi.op.scope == SCOPE_VAA:
        op = TLBI_VAA
    elif tlbi.op.scope == SCOPE_ASID:
        op = TLBI_ASID
    owe_stage1(&vm.owed, op, host_vmid, tlbi.start, tlbi.end, tlbi.level, tlbi.asid, tlbi.op.last_level)


cdef void apply_stage1(vm_t *vm, const tlbi_t *tlbi, const tlbi_regs_t *regs, tlbi_result_t *result) noexcept nogil:
    """Stage-1 operations remove no shadow leaf. EL1's go to every context with the VMID; EL2's, and EL1's under
    {E2H,TGE}={1,1}, to the virtual EL2 regime, which runs under the canonical VMID."""
    cdef uint16_t vmid = decode_vmid(&vm.features, regs.vttbr, regs.vtcr)
    cdef uint32_t i
    if tlbi.names_nothing:
        return
    if tlbi.op.regime == REGIME_EL2_S1 or (regs.hcr >> HCR_E2H_BIT & 1 and regs.hcr >> HCR_TGE_BIT & 1):
        owe_one_stage1(vm, tlbi, CANONICAL_VMID, regs.hcr >> HCR_E2H_BIT & 1)
        return
    for i in range(vm.contexts_used):
        if vm.contexts[i].valid and vm.contexts[i].config.vmid == vmid:
            result.contexts += 1
            owe_one_stage1(vm, tlbi, i + FIRST_CONTEXT_VMID, True)


cdef void apply_tlbi(vm_t *vm, const tlbi_op_t *op, uint64_t xt, const tlbi_regs_t *regs,
                     tlbi_result_t *result) noexcept nogil:
    """Do what L1 asked for, under the registers that it had then; no context is acquired."""
    cdef tlbi_t exact, linux
    cdef const tlbi_t *tlbi = &exact
    cdef tlbi_counts_t *counts
    cdef uint64_t machine_vtcr
    if op.takes_operand:
        tlbi_decode(op, xt, &vm.features, regs.vtcr, False, &exact)
    else:
        tlbi_no_operand(op, &exact)
    if vm.tlbi_kvm72:                       # Linux cuts a range at the machine's address size
        machine_vtcr = regs.vtcr & ~<uint64_t>0x3F | <uint64_t>(64 - vm.features.pa_bits)
        tlbi_decode(op, xt, &vm.features, machine_vtcr, True, &linux)
        tlbi = &linux
    memset(result, 0, sizeof(tlbi_result_t))
    result.pause_at = DROP_CHUNK
    lock_exclusive(&vm.lock)
    vm.guest_clock += 1                     # before anything goes: what was read of L1's tables until now is void
    owed_begin(&vm.owed)
    if op.kind == CLASS_STAGE1:
        apply_stage1(vm, tlbi, regs, result)
    else:
        apply_stage2(vm, tlbi, &exact, regs, result)
    owed_end(&vm.owed)
    counts = &vm.tlbis[<int>op.kind]
    counts.operations += 1
    counts.contexts += result.contexts
    counts.removed += result.removed
    counts.required += result.required
    unlock_exclusive(&vm.lock)
