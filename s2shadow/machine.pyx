"""Set-up and teardown of a machine, and what its Python and its C face do with it alike."""

from libc.stdlib cimport free
from libc.string cimport memset

from s2shadow.arch cimport DESC_VALID, FINAL_LEVEL, leaf_level_within, level_span, oa_format_t
from s2shadow.atomics cimport load64
from s2shadow.combine cimport host_oa_format
from s2shadow.context cimport context_acquire, context_release
from s2shadow.dirty cimport dirty_destroy
from s2shadow.host cimport changed_since, populate_block
from s2shadow.intervals cimport intervals_free, intervals_new
from s2shadow.lock cimport lock_exclusive, lock_init, lock_reader, unlock_exclusive
from s2shadow.owed cimport owed_begin, owed_destroy, owed_end, owed_init
from s2shadow.rmap cimport node_t, rmap_destroy, rmap_init
from s2shadow.table cimport (
    CANONICAL, ROOT_PAGES, arena_destroy, arena_init, forget_path, page_t, reserve_root, table_find, table_init,
)
from s2shadow.vm cimport (
    NO_CONTEXT, TEARDOWN_INTERVAL_MAP, TEARDOWN_REVERSE_MAP, context_t, forget_ways, is_active, overlaps_active,
)
from s2shadow.vmem cimport allocate

cdef enum:
    LEVELS = 4                  # of the longest walk path through our own tables

cdef uint64_t default_table_base(uint64_t pa_bits) noexcept nogil:
    """The top of the address space, as far as an arena of 2^31 slots of 8 bytes reaches."""
    cdef uint64_t limit = <uint64_t>1 << pa_bits, arena = <uint64_t>1 << 34
    return limit - arena if limit > arena else limit / 2


cdef uint64_t root_bytes(uint64_t host_granule, uint64_t contexts) noexcept nogil:
    """What the roots of the canonical table and of every context take."""
    return (contexts + 1) * ROOT_PAGES * (host_granule + sizeof(page_t))


cdef uint64_t least_bytes(uint64_t host_granule, uint64_t vcpus, uint64_t contexts) noexcept nogil:
    """The roots and one full walk path per vCPU: shadow and canonical tables, links of the leaf table, and nodes of the
    reverse map."""
    cdef uint64_t path = LEVELS * 2 * (host_granule + sizeof(page_t)) + host_granule
    path += LEVELS * (host_granule + sizeof(node_t))
    return root_bytes(host_granule, contexts) + vcpus * path


cdef setup_t vm_init(vm_t *vm, const plan_t *plan) noexcept nogil:
    """Set up ``vm``, whatever it holds; what fails leaves something that ``vm_destroy`` takes."""
    cdef oa_format_t oa
    cdef uint32_t i, root
    memset(vm, 0, sizeof(vm_t))
    lock_init(&vm.lock)
    vm.features = plan.features
    vm.teardown = plan.teardown
    vm.ignore_guest_attributes = plan.ignore_guest_attributes
    vm.tlbi_kvm72 = plan.tlbi_kvm72
    vm.context_count = plan.contexts
    vm.vcpu_count = plan.vcpus
    host_oa_format(&vm.features, &oa)
    if not arena_init(&vm.arena, vm.features.host_granule_bits, &oa, plan.table_base,
                      <uint64_t>1 << vm.features.pa_bits, plan.max_bytes):
        return SETUP_NO_ADDRESS_SPACE
    vm.arena.alone = plan.vcpus == 1
    vm.arena.keeps_links = plan.teardown == TEARDOWN_REVERSE_MAP
    vm.contexts = <context_t *>allocate(plan.contexts, sizeof(context_t))
    vm.vcpus = <vcpu_t *>allocate(plan.vcpus, sizeof(vcpu_t))
    if (vm.contexts == NULL or vm.vcpus == NULL
            or (plan.teardown == TEARDOWN_REVERSE_MAP and not rmap_init(&vm.rmap, &vm.arena, vm.features.pa_bits))
            or not owed_init(&vm.owed, plan.contexts, plan.track_tlbis)):
        return SETUP_NO_MEMORY
    root = reserve_root(&vm.arena)
    if not root:
        return SETUP_NO_ROOTS
    table_init(&vm.arena, &vm.canonical, root, CANONICAL, vm.features.pa_bits)
    for i in range(plan.contexts):
        vm.contexts[i].shadow.root = reserve_root(&vm.arena)
        if not vm.contexts[i].shadow.root:
            return SETUP_NO_ROOTS
        if plan.teardown == TEARDOWN_INTERVAL_MAP:
            vm.contexts[i].intervals = intervals_new(&vm.arena)
            if vm.contexts[i].intervals == NULL:
                return SETUP_NO_MEMORY
    for i in range(plan.vcpus):
        vm.vcpus[i].context = NO_CONTEXT
        vm.vcpus[i].reader = lock_reader(&vm.lock, i)
        forget_path(&vm.vcpus[i].canonical_path)
    vm.dirty.input_bits = vm.features.pa_bits
    vm.dirty.page_bits = vm.features.host_granule_bits
    return SETUP_DONE


cdef void vm_destroy(vm_t *vm) noexcept nogil:
    cdef uint32_t i
    if vm.contexts != NULL:
        for i in range(vm.context_count):
            intervals_free(vm.contexts[i].intervals)
    dirty_destroy(&vm.dirty)
    owed_destroy(&vm.owed)
    rmap_destroy(&vm.rmap)
    arena_destroy(&vm.arena)
    free(vm.contexts)
    free(vm.vcpus)


cdef void vcpu_load(vm_t *vm, vcpu_t *vcpu, const s2_config_t *config, uint64_t vttbr, uint64_t vtcr,
                    uint64_t hcr) noexcept nogil:
    """L1 entered L2 with these registers: take the context that they name, or recycle one."""
    lock_exclusive(&vm.lock)
    if vcpu.context != NO_CONTEXT:
        context_release(vm, vcpu.context)
        vcpu.context = NO_CONTEXT
    vcpu.context = context_acquire(vm, config, vttbr, vtcr)
    vcpu.config = config[0]
    forget_ways(vcpu)
    vcpu.vttbr = vttbr
    vcpu.vtcr = vtcr
    vcpu.hcr = hcr
    unlock_exclusive(&vm.lock)


cdef void vcpu_put(vm_t *vm, vcpu_t *vcpu) noexcept nogil:
    lock_exclusive(&vm.lock)
    if vcpu.context != NO_CONTEXT:
        context_release(vm, vcpu.context)
        vcpu.context = NO_CONTEXT
    unlock_exclusive(&vm.lock)


cdef bint install_populated(vm_t *vm, uint64_t cipa, uint64_t pa, uint64_t size, const host_attrs_t *attrs,
                            uint64_t seq) noexcept nogil:
    """Map what populate answered, in the block of ``size`` at ``pa``, as much of it as the tables have room for and as
    no host change after ``seq`` forbids. False when a table cannot be had."""
    cdef int level = leaf_level_within(vm.arena.granule_bits, vm.arena.oa.wide, size), reached = 0
    cdef uint64_t span, block
    cdef bint stored = True
    pa += cipa & (size - 1)
    lock_exclusive(&vm.lock)
    if not load64(vm.arena.words + table_find(&vm.arena, &vm.canonical, cipa, &reached)) & DESC_VALID:
        if reached > level:
            level = reached                 # part of a larger block is mapped already
        span = level_span(vm.arena.granule_bits, level)
        while level < FINAL_LEVEL and overlaps_active(vm, cipa & ~(span - 1), (cipa & ~(span - 1)) + span):
            level += 1
            span = level_span(vm.arena.granule_bits, level)
        block = cipa & ~(span - 1)
        # What was resolved before a change of that range must not be installed after it.
        if not (is_active(vm, cipa) or changed_since(vm, seq, block, block + span)):
            owed_begin(&vm.owed)
            stored = populate_block(vm, block, pa & ~(span - 1), span, attrs)
            owed_end(&vm.owed)
    unlock_exclusive(&vm.lock)
    return stored


cdef uint32_t ram_within(const region_map_t *map, uint64_t page, uint64_t start, uint64_t end,
                         range_t *out) noexcept nogil:
    """The parts of [start, end) that are RAM, rounded out to host pages, each page once; how many. ``out`` has room for
    one range per region."""
    cdef uint64_t low, high, done = start
    cdef uint32_t i, count = 0
    for i in range(map.count):
        low = map.regions[i].start & ~(page - 1)
        high = (map.regions[i].start + map.regions[i].size + page - 1) & ~(page - 1)
        if low < done:
            low = done
        if high > end:
            high = end
        if not map.regions[i].device and low < high:
            out[count].start = low
            out[count].end = high
            count += 1
            done = high
    return count


cdef void vm_counters(vm_t *vm, counters_t *out) noexcept nogil:
    """All at one moment: vCPUs count on the shared side, and what only they count is not atomic."""
    cdef uint32_t i, k
    memset(out, 0, sizeof(counters_t))
    lock_exclusive(&vm.lock)
    for i in range(vm.vcpu_count):
        for k in range(8):
            out.kinds[k] += vm.vcpus[i].kinds[k]
        out.installed += vm.vcpus[i].installed
        out.relaxed += vm.vcpus[i].relaxed
        out.replaced += vm.vcpus[i].replaced
    for k in range(7):                      # MISS is no answer to a fault
        out.faults += out.kinds[k]
    out.removed = vm.removed
    out.live = out.installed - out.removed
    out.narrowed = vm.narrowed
    out.invalidations = vm.invalidations
    out.kernel_steps = vm.kernel_steps
    out.unknown_unmaps = vm.unknown_unmaps
    out.recycled = vm.recycled
    out.evictions = vm.evictions
    out.host_leaves = vm.canonical_leaves
    out.table_bytes = vm.arena.table_bytes
    out.link_bytes = vm.arena.link_bytes
    out.rmap_bytes = vm.arena.rmap_bytes
    out.owed = vm.owed.count
    unlock_exclusive(&vm.lock)
