"""The C API: what stands behind the capsule ``s2shadow._C_API`` (include/s2shadow/s2shadow.h).

No function of the table knows of Python. A VM made by ``create`` owns its memory: a list of regions that changes on the
exclusive side of the lock, together with what every vCPU remembers of it, so that nobody holds an old list and none has
to be kept. The vCPUs of a NestedVM follow their GuestMemory instead, as they do for Python.

An embedder is asked with no lock held. Where a fault needs a mapping (``populate``) or a descriptor of memory that is
the embedder's, it stops, the lock is let go, the embedder answers, and the fault starts over with the answer at hand.
Descriptors that were answered are void after any TLBI (``vm_t.guest_clock``, looked at under the lock): a leaf that was
walked before a TLBI is not installed after it, although the walk did not hold the lock all the time.
"""

from pathlib import Path

from cpython.pycapsule cimport PyCapsule_New
from libc.stdint cimport UINT64_MAX, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

from s2shadow cimport (
    S2S_ATTRIBUTES_KVM72, S2S_CAS_DONE, S2S_CAS_LOST, S2S_DEFAULT, S2S_E_BROKEN, S2S_E_BUSY, S2S_E_CALLBACK,
    S2S_E_INVALID, S2S_E_NOT_LOADED, S2S_E_NO_MEMORY, S2S_E_STATE, S2S_E_UNDEFINED, S2S_NORMAL, S2S_NORMAL_AS_STAGE1,
    S2S_OK, S2S_PARTIAL_DEFAULT, S2S_PARTIAL_DROP, S2S_POPULATE_CALLBACK, S2S_POPULATE_LINEAR,
    S2S_READONLY, S2S_RWX, S2S_TEARDOWN_BLOW_AWAY_LEAN, S2S_TLBI_KVM72, S2SHADOW_ABI_VERSION, S2SHADOW_CAPSULE,
    s2s_api_t, s2s_change_t, s2s_fault_t, s2s_features_t, s2s_hw_tlbi_t, s2s_mapping_t, s2s_memory_ops_t,
    s2s_options_t, s2s_populate_fn, s2s_populate_t, s2s_registers_t, s2s_stats_t, s2s_tlbi_result_t, s2s_vm_t,
    s2s_walk_t,
)
from s2shadow.arch cimport SH_ISH, leaf_level_within
from s2shadow.atomics cimport load32, load_pointer, store32
from s2shadow.check cimport check_vm, finding_t
from s2shadow.config cimport decode_config, features_t, s2_config_t
from s2shadow.dirty cimport dirty_reserve, mark_dirty
from s2shadow.fault cimport STEP_DESCRIPTOR, STEP_DONE, fault_one, fault_run, step_t, translate_run
from s2shadow.handle cimport handle_t
from s2shadow.host cimport (
    change_t, forget_active, host_age, host_attrs_t, host_dirty_log, host_log, host_map, host_protect, host_unmap,
    register_active,
)
from s2shadow.lock cimport (
    lock_exclusive, lock_shared, lock_shared_other, unlock_exclusive, unlock_shared, unlock_shared_other,
)
from s2shadow.machine cimport (
    SETUP_DONE, counters_t, default_table_base, install_populated, least_bytes, plan_t, ram_within, root_bytes,
    vcpu_load, vcpu_put, vm_counters, vm_destroy, vm_init,
)
from s2shadow.maintenance cimport apply_tlbi, tlbi_regs_t, tlbi_result_t
from s2shadow.memory cimport (
    ANSWERS, QUESTION_CAS, QUESTION_NONE, QUESTION_READ, answer_t, answers_t, desc_source_t, is_asking, map_with,
    map_without, mem_view_t, new_map, region_map_t, region_over, region_t, view_begin, view_refresh,
)
from s2shadow.owed cimport FIRST_CONTEXT_VMID, hw_tlbi_t, owed_take
from s2shadow.table cimport CANONICAL, ROOT_PAGES
from s2shadow.tlbi cimport TLBI_OK, tlbi_lookup_word, tlbi_op_t
from s2shadow.vm cimport (
    KIND_HOST_FAULT, KIND_NO_MEMORY, KIND_RETRY, NO_CONTEXT, POPULATE_CALLABLE, POPULATE_LINEAR, POPULATE_NONE,
    TEARDOWN_BLOW_AWAY, TEARDOWN_BLOW_AWAY_LEAN, count_answer, fault_t, forget_guest_path, range_t, teardown_t, vcpu_t,
    vm_t,
)
from s2shadow.vmem cimport allocate
from s2shadow.walker cimport walk_stage2, walk_t

from s2shadow.check import RULES

cdef extern from *:
    """
    #include <stdarg.h>
    #include <stdio.h>
    static __thread char s2_message[200];
    static int __attribute__((format(printf, 2, 3))) s2_fail(int status, const char *format, ...)
    {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(s2_message, sizeof(s2_message), format, arguments);
        va_end(arguments);
        return status;
    }
    static const char *s2_last_error(void) { return s2_message; }
    """
    # Leave a message for last_error(); the status. Addresses are given as unsigned long long.
    int fail "s2_fail"(int status, const char *format, ...) noexcept nogil
    const char *api_last_error "s2_last_error"() noexcept nogil

ctypedef unsigned long long word

assert sizeof(s2s_fault_t) == sizeof(fault_t) and sizeof(s2s_walk_t) == sizeof(walk_t)
assert sizeof(s2s_hw_tlbi_t) == sizeof(hw_tlbi_t)

cdef enum:
    QUESTIONS = 64              # to the embedder for one element, before it ends in RETRY
    REGION_PAGE = 4096
    MOST_FIELDS = 256           # bytes of the largest struct that starts with its size

cdef enum answered_t:
    ANSWERED
    ANSWERED_NOTHING            # no mapping: the fault is the host's
    ANSWERED_NO_MEMORY          # the tables have no room for what was answered
    ANSWERED_WRONG              # a message was left


# --- statuses, and structs that start with their size ------------------------------------------------------------


cdef const char *api_status_text(int status) noexcept nogil:
    if status == S2S_OK:
        return "ok"
    if status == S2S_E_INVALID:
        return "invalid argument"
    if status == S2S_E_NO_MEMORY:
        return "out of memory"
    if status == S2S_E_BUSY:
        return "the vCPU is in use by another call"
    if status == S2S_E_NOT_LOADED:
        return "the vCPU has no context"
    if status == S2S_E_STATE:
        return "not possible on this VM"
    if status == S2S_E_CALLBACK:
        return "a callback failed"
    if status == S2S_E_UNDEFINED:
        return "undefined TLBI"
    if status == S2S_E_BROKEN:
        return "a broken invariant"
    return "unknown status"


cdef int take_struct(void *known, size_t known_size, size_t least, const void *given, const char *name) noexcept nogil:
    """Copy a struct of the caller's over our defaults, as far as it goes. What we do not know of must be zero."""
    cdef uint32_t size
    cdef size_t i
    if given == NULL:
        return fail(S2S_E_INVALID, "%s must not be NULL", name)
    memcpy(&size, given, sizeof(size))
    if size < least or size > MOST_FIELDS:
        return fail(S2S_E_INVALID, "%s says that it has %u bytes: set its size to sizeof", name, size)
    for i in range(known_size, size):
        if (<const uint8_t *>given)[i]:
            return fail(S2S_E_INVALID, "%s asks for something that this version does not know", name)
    memcpy(known, given, size if size < known_size else known_size)
    return S2S_OK


cdef void give_struct(void *given, size_t size, const void *known, size_t known_size) noexcept nogil:
    """Fill a struct of the caller's, who may know more or less than we do, and set its size."""
    cdef uint32_t said = <uint32_t>size
    memset(given, 0, size)
    memcpy(given, known, size if size < known_size else known_size)
    if size >= sizeof(said):
        memcpy(given, &said, sizeof(said))


cdef void default_features(s2s_features_t *features) noexcept nogil:
    memset(features, 0, sizeof(s2s_features_t))
    features.size = sizeof(s2s_features_t)
    features.pa_bits = 48
    features.host_granule_bits = 12
    features.vmid_bits = 16
    features.hafdbs = 1
    features.ttl = features.range = features.xnx = features.fwb = features.tlbios = features.xs = 1


cdef void default_options(s2s_options_t *options) noexcept nogil:
    memset(options, 0, sizeof(s2s_options_t))
    options.size = sizeof(s2s_options_t)
    options.vcpus = 1
    options.track_tlbis = 1
    options.table_base = S2S_DEFAULT


cdef void api_features_init(s2s_features_t *features, size_t size) noexcept nogil:
    cdef s2s_features_t known
    default_features(&known)
    give_struct(features, size, &known, sizeof(known))


cdef void api_options_init(s2s_options_t *options, size_t size) noexcept nogil:
    cdef s2s_options_t known
    default_options(&known)
    give_struct(options, size, &known, sizeof(known))


# --- lifetime ----------------------------------------------------------------------------------------------------


cdef bint is_flag(uint8_t value) noexcept nogil:
    return value <= 1


cdef int take_features(const s2s_features_t *given, features_t *out) noexcept nogil:
    """Check what ``Features`` checks."""
    cdef s2s_features_t f
    cdef int status
    cdef uint8_t possible
    default_features(&f)
    if given != NULL:
        status = take_struct(&f, sizeof(f), sizeof(f), given, "features")
        if status:
            return status
    if not (f.pa_bits == 32 or f.pa_bits == 36 or f.pa_bits == 40 or f.pa_bits == 42 or f.pa_bits == 44
            or f.pa_bits == 48 or f.pa_bits == 52):
        return fail(S2S_E_INVALID, "pa_bits must be 32, 36, 40, 42, 44, 48 or 52, got %d", <int>f.pa_bits)
    if not (f.host_granule_bits == 12 or f.host_granule_bits == 14 or f.host_granule_bits == 16):
        return fail(S2S_E_INVALID, "host_granule_bits must be 12, 14 or 16, got %d", <int>f.host_granule_bits)
    if f.hafdbs > 2:
        return fail(S2S_E_INVALID, "hafdbs must be 0, 1 or 2, got %d", <int>f.hafdbs)
    if f.vmid_bits != 8 and f.vmid_bits != 16:
        return fail(S2S_E_INVALID, "vmid_bits must be 8 or 16, got %d", <int>f.vmid_bits)
    if not (is_flag(f.ttl) and is_flag(f.range) and is_flag(f.xnx) and is_flag(f.fwb) and is_flag(f.lpa2)
            and is_flag(f.lpa) and is_flag(f.ttst) and is_flag(f.tlbios) and is_flag(f.xs) and is_flag(f.bbm)
            and is_flag(f.s2pie)):
        return fail(S2S_E_INVALID, "flags of features must be 0 or 1")
    if f.s2pie and not f.xnx:
        return fail(S2S_E_INVALID, "s2pie needs xnx: base permissions tell EL1 and EL0 execution apart")
    if f.pa_bits > 48 and not (f.lpa if f.host_granule_bits == 16 else f.lpa2):
        return fail(S2S_E_INVALID, "pa_bits %d needs %s: the host's tables could not hold such addresses",
                    <int>f.pa_bits, <const char *>("lpa" if f.host_granule_bits == 16 else "lpa2"))
    possible = <uint8_t>(7 if f.host_granule_bits == 12 else 6 if f.host_granule_bits == 14 else 4)
    if f.granules & ~possible:
        return fail(S2S_E_INVALID, "granules %#x: none below the host's can be advertised", <int>f.granules)
    out.pa_bits = f.pa_bits
    out.granules = f.granules if f.granules else possible
    out.hafdbs = f.hafdbs
    out.vmid16 = f.vmid_bits == 16
    out.xnx, out.fwb, out.lpa2, out.lpa, out.ttst = f.xnx, f.fwb, f.lpa2, f.lpa, f.ttst
    out.bbm, out.s2pie, out.ttl, out.range, out.tlbios, out.xs = f.bbm, f.s2pie, f.ttl, f.range, f.tlbios, f.xs
    out.host_granule_bits = f.host_granule_bits
    return S2S_OK


cdef int take_options(const s2s_options_t *given, plan_t *plan) noexcept nogil:
    """Check what the constructor of ``NestedVM`` checks."""
    cdef s2s_options_t o
    cdef int status
    cdef uint64_t most, granule, limit, alignment, least
    default_options(&o)
    if given != NULL:
        status = take_struct(&o, sizeof(o), sizeof(o), given, "options")
        if status:
            return status
    memset(plan, 0, sizeof(plan_t))
    status = take_features(o.features, &plan.features)
    if status:
        return status
    if o.teardown > S2S_TEARDOWN_BLOW_AWAY_LEAN or o.tlbi > S2S_TLBI_KVM72 or o.attributes > S2S_ATTRIBUTES_KVM72:
        return fail(S2S_E_INVALID, "teardown, tlbi or attributes is not one of the constants")
    most = (1 << (16 if plan.features.vmid16 else 8)) - FIRST_CONTEXT_VMID
    if most > CANONICAL:
        most = CANONICAL
    if o.vcpus < 1 or o.vcpus > most:
        return fail(S2S_E_INVALID, "vcpus must be 1 to %llu, got %u", <word>most, o.vcpus)
    if not o.contexts:
        o.contexts = 2 * o.vcpus
    if o.contexts < o.vcpus or o.contexts > most:
        return fail(S2S_E_INVALID, "contexts must be %u to %llu, got %u", o.vcpus, <word>most, o.contexts)
    granule = <uint64_t>1 << plan.features.host_granule_bits
    limit = <uint64_t>1 << plan.features.pa_bits
    alignment = ROOT_PAGES * granule
    if o.table_base == S2S_DEFAULT:
        o.table_base = default_table_base(plan.features.pa_bits)
    elif o.table_base & (alignment - 1) or o.table_base > limit - (1 << 30):
        return fail(S2S_E_INVALID, "table_base %#llx must be a multiple of %#llx and leave 1 GiB below pa_bits=%d",
                    <word>o.table_base, <word>alignment, <int>plan.features.pa_bits)
    if o.max_table_bytes:
        least = least_bytes(granule, o.vcpus, o.contexts)
        if o.max_table_bytes < least:
            return fail(S2S_E_INVALID, "max_table_bytes must be at least %llu, got %llu", <word>least,
                        <word>o.max_table_bytes)
        plan.max_bytes = o.max_table_bytes - root_bytes(granule, o.contexts)
    plan.vcpus = o.vcpus
    plan.contexts = o.contexts
    plan.teardown = <teardown_t>o.teardown
    plan.table_base = o.table_base
    plan.ignore_guest_attributes = o.attributes == S2S_ATTRIBUTES_KVM72
    plan.tlbi_kvm72 = o.tlbi == S2S_TLBI_KVM72
    plan.track_tlbis = o.track_tlbis != 0
    return S2S_OK


cdef int api_create(const s2s_options_t *options, s2s_vm_t **vm) noexcept nogil:
    cdef plan_t plan
    cdef handle_t *handle
    cdef uint32_t i
    cdef int status
    if vm == NULL:
        return fail(S2S_E_INVALID, "vm must not be NULL")
    status = take_options(options, &plan)
    if status:
        return status
    handle = <handle_t *>allocate(1, sizeof(handle_t))
    if handle != NULL:
        handle.vm = <vm_t *>allocate(1, sizeof(vm_t))
        handle.own.map = new_map(0)
        handle.answers = <answers_t *>allocate(plan.vcpus, sizeof(answers_t))
    if handle == NULL or handle.vm == NULL or handle.own.map == NULL or handle.answers == NULL:
        discard(handle)
        return fail(S2S_E_NO_MEMORY, "no memory for a VM")
    if vm_init(handle.vm, &plan) != SETUP_DONE:
        vm_destroy(handle.vm)
        discard(handle)
        return fail(S2S_E_NO_MEMORY, "no memory, or no address space, for the tables of a VM with %u contexts",
                    plan.contexts)
    for i in range(plan.vcpus):
        handle.answers[i].clock = &handle.vm.guest_clock
        handle.vm.vcpus[i].view.answers = &handle.answers[i]
        view_begin(&handle.vm.vcpus[i].view, handle.own.map, 0)
    vm[0] = <s2s_vm_t *>handle
    return S2S_OK


cdef void discard(handle_t *handle) noexcept nogil:
    if handle != NULL:
        free(handle.answers)
        free(handle.own.map)
        free(handle.vm)
        free(handle)


cdef void api_destroy(s2s_vm_t *vm) noexcept nogil:
    cdef handle_t *handle = <handle_t *>vm
    if handle != NULL and handle.shared == NULL:        # that of a NestedVM is Python's
        vm_destroy(handle.vm)
        discard(handle)


# --- L1's memory -------------------------------------------------------------------------------------------------


cdef int own_memory(const handle_t *handle) noexcept nogil:
    if handle == NULL:
        return fail(S2S_E_INVALID, "vm must not be NULL")
    if handle.shared != NULL:
        return fail(S2S_E_STATE, "the memory of a NestedVM is its GuestMemory: change that")
    return S2S_OK


cdef uint32_t count_callback_regions(const region_map_t *map) noexcept nogil:
    cdef uint32_t i, count = 0
    for i in range(map.count):
        count += map.sources[i].read != NULL
    return count


cdef void publish(handle_t *handle, region_map_t *map) noexcept nogil:
    """Every vCPU reads through ``map`` from now on (exclusive side): no walk runs, and nobody is left with the old."""
    cdef region_map_t *old = handle.own.map
    cdef uint32_t i
    handle.own.map = map
    handle.own.epoch += 1
    store32(&handle.callback_regions, count_callback_regions(map))
    handle.vm.guest_clock += 1
    for i in range(handle.vm.vcpu_count):
        view_begin(&handle.vm.vcpus[i].view, map, handle.own.epoch)
        forget_guest_path(&handle.vm.vcpus[i])
    free(old)


cdef int add_region(s2s_vm_t *vm, const region_t *region, const desc_source_t *source) noexcept nogil:
    cdef handle_t *handle = <handle_t *>vm
    cdef const region_t *other
    cdef region_map_t *map
    cdef int status = own_memory(handle)
    if status:
        return status
    if not region.size or (region.start | region.size) & (REGION_PAGE - 1):
        return fail(S2S_E_INVALID, "cipa %#llx and size %#llx must be multiples of %d, and size positive",
                    <word>region.start, <word>region.size, <int>REGION_PAGE)
    if region.size > <uint64_t>1 << 52 or region.start > (<uint64_t>1 << 52) - region.size:
        return fail(S2S_E_INVALID, "the region at %#llx reaches beyond 52 bits", <word>region.start)
    lock_exclusive(&handle.vm.lock)
    other = region_over(handle.own.map, region.start, region.size)
    if other != NULL:
        status = fail(S2S_E_INVALID, "the region at %#llx overlaps that at %#llx", <word>region.start,
                      <word>other.start)
    else:
        map = map_with(handle.own.map, region, source)
        if map == NULL:
            status = fail(S2S_E_NO_MEMORY, "no memory for the list of regions")
        else:
            publish(handle, map)
    unlock_exclusive(&handle.vm.lock)
    return status


cdef int api_add_ram(s2s_vm_t *vm, uint64_t cipa, uint64_t size, void *host, uint32_t flags) noexcept nogil:
    cdef region_t region
    if host == NULL or <size_t>host & 7:
        return fail(S2S_E_INVALID, "host memory must be 8-byte aligned and not NULL")
    if flags & ~S2S_READONLY:
        return fail(S2S_E_INVALID, "flags %#x are unknown", flags)
    memset(&region, 0, sizeof(region))
    region.start = cipa
    region.size = size
    region.host = <uint8_t *>host
    region.readonly = flags & S2S_READONLY
    return add_region(vm, &region, NULL)


cdef int api_add_device(s2s_vm_t *vm, uint64_t cipa, uint64_t size) noexcept nogil:
    cdef region_t region
    memset(&region, 0, sizeof(region))
    region.start = cipa
    region.size = size
    region.device = 1
    return add_region(vm, &region, NULL)


cdef int api_add_callbacks(s2s_vm_t *vm, uint64_t cipa, uint64_t size, const s2s_memory_ops_t *ops, void *opaque,
                           uint32_t flags) noexcept nogil:
    cdef s2s_memory_ops_t known
    cdef region_t region
    cdef desc_source_t source
    cdef int status
    memset(&known, 0, sizeof(known))
    status = take_struct(&known, sizeof(known), sizeof(known), ops, "ops")
    if status:
        return status
    if known.read == NULL:
        return fail(S2S_E_INVALID, "ops must have a read function")
    if flags & ~S2S_READONLY:
        return fail(S2S_E_INVALID, "flags %#x are unknown", flags)
    memset(&region, 0, sizeof(region))
    region.start = cipa
    region.size = size
    region.readonly = flags & S2S_READONLY
    source.read = known.read
    source.cas = known.cas
    source.opaque = opaque
    return add_region(vm, &region, &source)


cdef int api_remove_region(s2s_vm_t *vm, uint64_t cipa, s2s_change_t *change) noexcept nogil:
    """Take the region out first, then unmap what it had: a fault between finds no region and installs nothing, and what
    is live there still is known to be going."""
    cdef handle_t *handle = <handle_t *>vm
    cdef const region_map_t *map
    cdef region_map_t *fewer
    cdef change_t done
    cdef uint32_t at = 0
    cdef uint64_t size = 0, page, end, limit
    cdef bint going = False
    cdef int status = own_memory(handle)
    if status:
        return status
    page = <uint64_t>1 << handle.vm.arena.granule_bits
    limit = <uint64_t>1 << handle.vm.features.pa_bits
    lock_exclusive(&handle.vm.lock)
    map = handle.own.map
    while at < map.count and map.regions[at].start != cipa:
        at += 1
    if at == map.count:
        status = fail(S2S_E_INVALID, "no region starts at %#llx", <word>cipa)
    else:
        size = map.regions[at].size
        fewer = map_without(map, at)
        if fewer == NULL:
            status = fail(S2S_E_NO_MEMORY, "no memory for the list of regions")
        else:
            publish(handle, fewer)
    end = (cipa + size + page - 1) & ~(page - 1)
    if end > limit:
        end = limit
    cipa &= ~(page - 1)
    if not status and cipa < end:
        going = register_active(handle.vm, cipa, end)
    done.dropped = 0
    done.ticket = handle.vm.owed.seq
    unlock_exclusive(&handle.vm.lock)
    if status:
        return status
    if cipa < end:
        host_unmap(handle.vm, cipa, end, False, &done)
    if going:
        lock_exclusive(&handle.vm.lock)
        forget_active(handle.vm, cipa, end)
        unlock_exclusive(&handle.vm.lock)
    give_change(change, &done)
    return S2S_OK


cdef inline void give_change(s2s_change_t *change, const change_t *done) noexcept nogil:
    if change != NULL:
        change.leaves = done.dropped
        change.ticket = done.ticket


# --- vCPUs -------------------------------------------------------------------------------------------------------


cdef inline int enter(handle_t *handle, uint32_t index, vcpu_t **vcpu) noexcept nogil:
    """Take a vCPU. The test and the mark are two steps, which a locked instruction would not be: that a second thread
    is seen is a courtesy to who debugs an embedder, not what keeps threads apart."""
    if handle == NULL or index >= handle.vm.vcpu_count:
        return fail(S2S_E_INVALID, "there is no vCPU %u", index)
    vcpu[0] = &handle.vm.vcpus[index]
    if load32(&vcpu[0].busy):
        return fail(S2S_E_BUSY, "vCPU %u is in use by another call", index)
    store32(&vcpu[0].busy, 1)
    return S2S_OK


cdef inline void leave(vcpu_t *vcpu) noexcept nogil:
    store32(&vcpu.busy, 0)


cdef inline int enter_loaded(handle_t *handle, uint32_t index, vcpu_t **vcpu) noexcept nogil:
    cdef int status = enter(handle, index, vcpu)
    if status:
        return status
    if vcpu[0].context == NO_CONTEXT:
        leave(vcpu[0])
        return fail(S2S_E_NOT_LOADED, "vCPU %u has no context: load() it first", index)
    if handle.shared != NULL and view_refresh(&vcpu[0].view, handle.shared):
        forget_guest_path(vcpu[0])
    return S2S_OK


cdef int take_registers(const s2s_registers_t *given, s2s_registers_t *out) noexcept nogil:
    memset(out, 0, sizeof(s2s_registers_t))
    return take_struct(out, sizeof(s2s_registers_t), sizeof(s2s_registers_t), given, "registers")


cdef int api_load(s2s_vm_t *vm, uint32_t index, const s2s_registers_t *registers, uint32_t *context) noexcept nogil:
    cdef handle_t *handle = <handle_t *>vm
    cdef s2s_registers_t r
    cdef s2_config_t config
    cdef vcpu_t *vcpu = NULL
    cdef int status = take_registers(registers, &r)
    if not status:
        status = enter(handle, index, &vcpu)
    if status:
        return status
    decode_config(&handle.vm.features, r.vttbr, r.vtcr, r.hcr, r.big_endian != 0, r.s2pir, &config)
    vcpu_load(handle.vm, vcpu, &config, r.vttbr, r.vtcr, r.hcr)
    if context != NULL:
        context[0] = vcpu.context
    leave(vcpu)
    return S2S_OK


cdef int api_put(s2s_vm_t *vm, uint32_t index) noexcept nogil:
    cdef handle_t *handle = <handle_t *>vm
    cdef vcpu_t *vcpu = NULL
    cdef int status = enter(handle, index, &vcpu)
    if status:
        return status
    vcpu_put(handle.vm, vcpu)
    leave(vcpu)
    return S2S_OK


# --- what the embedder is asked ----------------------------------------------------------------------------------


cdef void ask_descriptor(vm_t *vm, answers_t *answers) noexcept nogil:
    """Read or swap the descriptor that a walk stopped at, and keep the answer for when the walk starts over."""
    cdef answer_t *known = NULL
    cdef uint64_t expected = answers.expected
    cdef uint32_t i
    cdef int swapped
    for i in range(answers.count):
        if answers.known[i].address == answers.address:
            known = &answers.known[i]
    if known == NULL:
        if answers.count == ANSWERS:
            answers.count = 0               # L1 keeps rebuilding the tables that this walk goes through
        known = &answers.known[answers.count]
        answers.count += 1
        memset(known, 0, sizeof(answer_t))
        known.address = answers.address
    if answers.question == QUESTION_READ:
        known.readable = answers.source.read(answers.source.opaque, answers.address, &known.word) != 0
    elif answers.question == QUESTION_CAS:
        swapped = answers.source.cas(answers.source.opaque, answers.address, &expected, answers.desired)
        known.swap_refused = swapped != S2S_CAS_DONE and swapped != S2S_CAS_LOST
        if swapped == S2S_CAS_DONE:
            known.word = answers.desired
            answers.swapped = 1
            lock_shared_other(&vm.lock)
            mark_dirty(&vm.dirty, answers.address)      # L0 wrote L1's memory: migration must see it
            unlock_shared_other(&vm.lock)
        elif swapped == S2S_CAS_LOST:
            known.word = expected
    answers.question = QUESTION_NONE


cdef inline void forget_answers(vcpu_t *vcpu) noexcept nogil:
    if vcpu.view.answers != NULL:
        vcpu.view.answers.count = 0
        vcpu.view.answers.swapped = 0
        vcpu.view.answers.question = QUESTION_NONE


cdef int memattr_of(const vm_t *vm, uint32_t memattr) noexcept nogil:
    """MemAttr[3:0], or -1."""
    if memattr == S2S_NORMAL:
        return 0x6 if vm.features.fwb else 0xF
    if memattr == S2S_NORMAL_AS_STAGE1:
        return 0x7 if vm.features.fwb else 0xF
    return <int>memattr if memattr < 16 else -1


cdef int take_attrs(const vm_t *vm, uint32_t perm, uint32_t memattr, host_attrs_t *attrs) noexcept nogil:
    cdef int code = memattr_of(vm, memattr)
    if perm & ~S2S_RWX:
        return fail(S2S_E_INVALID, "perm %#x must be made of READ, WRITE, EXEC and EXEC_EL0", perm)
    if code < 0:
        return fail(S2S_E_INVALID, "memattr %u is neither a code nor one of the constants", memattr)
    attrs.perm = <uint8_t>perm
    if not vm.features.xnx and perm & 36 != 36:
        attrs.perm &= 3
    attrs.memattr = <uint8_t>code
    attrs.sh = SH_ISH
    attrs.young = 1
    return S2S_OK


cdef int check_mapping(const vm_t *vm, const s2s_mapping_t *mapping) noexcept nogil:
    cdef uint64_t limit = <uint64_t>1 << vm.features.pa_bits
    if mapping.block & (mapping.block - 1) or mapping.block < <uint64_t>1 << vm.arena.granule_bits:
        return fail(S2S_E_CALLBACK, "populate answered a block of %#llx bytes", <word>mapping.block)
    if mapping.block > limit or mapping.pa & (mapping.block - 1) or mapping.pa > limit - mapping.block:
        return fail(S2S_E_CALLBACK, "populate answered pa %#llx for a block of %#llx bytes", <word>mapping.pa,
                    <word>mapping.block)
    return S2S_OK


cdef answered_t ask_populate(handle_t *handle, uint64_t cipa, uint8_t access) noexcept nogil:
    """Ask for a mapping of ``cipa`` and map what is answered."""
    cdef vm_t *vm = handle.vm
    cdef s2s_mapping_t mapping
    cdef host_attrs_t attrs
    cdef s2s_populate_fn populate
    cdef void *opaque
    cdef uint64_t seq
    cdef bint still
    cdef int answer
    lock_shared_other(&vm.lock)
    seq = vm.host_seq
    still = vm.populate == POPULATE_CALLABLE
    if handle.shared == NULL and region_over(handle.own.map, cipa, 1) == NULL:
        still = False                       # its region went meanwhile
    populate, opaque = handle.populate, handle.populate_opaque
    unlock_shared_other(&vm.lock)
    if not still:
        return ANSWERED                     # start over
    if populate == NULL:
        return ANSWERED_NOTHING             # the callable is Python's
    memset(&mapping, 0, sizeof(mapping))
    mapping.size = sizeof(mapping)
    mapping.perm = S2S_RWX
    mapping.memattr = S2S_NORMAL
    mapping.block = <uint64_t>1 << vm.arena.granule_bits
    answer = populate(opaque, cipa, access, &mapping)
    if answer == 0:
        return ANSWERED_NOTHING
    if answer < 0:
        fail(S2S_E_CALLBACK, "populate failed with %d for cipa %#llx", answer, <word>cipa)
        return ANSWERED_WRONG
    if check_mapping(vm, &mapping) or take_attrs(vm, mapping.perm, mapping.memattr, &attrs):
        return ANSWERED_WRONG
    if not install_populated(vm, cipa, mapping.pa, mapping.block, &attrs, seq):
        return ANSWERED_NO_MEMORY
    return ANSWERED


# --- faults ------------------------------------------------------------------------------------------------------


cdef int serve_asking(handle_t *handle, vcpu_t *vcpu, uint64_t ipa, uint8_t access, fault_t *out,
                      step_t step) noexcept nogil:
    """Serve one fault that wants something of the embedder, asking as often as it takes."""
    cdef int asked = 0
    cdef answered_t answered
    while step != STEP_DONE:
        out.kind = KIND_RETRY
        if asked == QUESTIONS:
            break                           # something comes between again and again
        asked += 1
        answered = ANSWERED
        if step == STEP_DESCRIPTOR:
            ask_descriptor(handle.vm, vcpu.view.answers)
        else:
            answered = ask_populate(handle, vcpu.asked_cipa, access)
        if answered == ANSWERED_WRONG:
            forget_answers(vcpu)
            return S2S_E_CALLBACK
        if answered != ANSWERED:
            out.kind = KIND_HOST_FAULT if answered == ANSWERED_NOTHING else KIND_NO_MEMORY
            break
        step = fault_one(handle.vm, vcpu, ipa, access, out)
    if step != STEP_DONE:
        count_answer(handle.vm, vcpu, out.kind)
    forget_answers(vcpu)                    # memory may say something else the next time
    return S2S_OK


cdef int bad_access(uint32_t access) noexcept nogil:
    return fail(S2S_E_INVALID, "access %#x must be made of READ, WRITE, EXEC, EL0 and PTW", access)


cdef int api_fault(s2s_vm_t *vm, uint32_t index, uint64_t ipa, uint32_t access, s2s_fault_t *out) noexcept nogil:
    cdef handle_t *handle = <handle_t *>vm
    cdef vcpu_t *vcpu = NULL
    cdef step_t step
    cdef int status
    if access > 31:
        return bad_access(access)
    status = enter_loaded(handle, index, &vcpu)
    if status:
        return status
    step = fault_one(handle.vm, vcpu, ipa, <uint8_t>access, <fault_t *>out)
    if step != STEP_DONE:
        status = serve_asking(handle, vcpu, ipa, <uint8_t>access, <fault_t *>out, step)
    leave(vcpu)
    return status


cdef int check_masks(const uint8_t *access, size_t stride, size_t n) noexcept nogil:
    cdef size_t i
    if stride > 1:
        return fail(S2S_E_INVALID, "access_stride must be 0 or 1, got %llu", <word>stride)
    for i in range(n if stride else 1):
        if access[i] > 31:
            return bad_access(access[i])
    return S2S_OK


cdef int check_batch(const uint64_t *ipas, const uint8_t *access, size_t stride, const s2s_fault_t *out,
                     size_t n) noexcept nogil:
    if not n:
        return S2S_OK
    if ipas == NULL or access == NULL or out == NULL:
        return fail(S2S_E_INVALID, "ipas, access and out must not be NULL")
    return check_masks(access, stride, n)


cdef int fault_batch(handle_t *handle, vcpu_t *vcpu, const uint64_t *ipas, const uint8_t *access, int64_t stride,
                     fault_t *out, int64_t n, int64_t *at) noexcept nogil:
    """Where all memory is ours, only a populate can stop a batch; else each fault may have something to ask."""
    cdef int status
    cdef step_t step
    while at[0] < n:
        if load32(&handle.callback_regions):
            step = fault_one(handle.vm, vcpu, ipas[at[0]], access[at[0] * stride], out + at[0])
        else:
            step = fault_run(handle.vm, vcpu, ipas, access, stride, out, n, at)
            if step == STEP_DONE:
                break
        if step != STEP_DONE:
            status = serve_asking(handle, vcpu, ipas[at[0]], access[at[0] * stride], out + at[0], step)
            if status:
                return status
        at[0] += 1
    return S2S_OK


cdef int api_fault_many(s2s_vm_t *vm, uint32_t index, const uint64_t *ipas, const uint8_t *access, size_t stride,
                        s2s_fault_t *out, size_t n, size_t *done) noexcept nogil:
    cdef handle_t *handle = <handle_t *>vm
    cdef vcpu_t *vcpu = NULL
    cdef int64_t at = 0
    cdef int status = check_batch(ipas, access, stride, out, n)
    if done != NULL:
        done[0] = 0
    if not status:
        status = enter_loaded(handle, index, &vcpu)
    if status:
        return status
    status = fault_batch(handle, vcpu, ipas, access, <int64_t>stride, <fault_t *>out, <int64_t>n, &at)
    forget_answers(vcpu)                    # a region of callbacks may have come while a batch ran
    leave(vcpu)
    if done != NULL:
        done[0] = <size_t>at
    return status


cdef int api_translate_many(s2s_vm_t *vm, uint32_t index, const uint64_t *ipas, const uint8_t *access, size_t stride,
                            s2s_fault_t *out, size_t n) noexcept nogil:
    cdef handle_t *handle = <handle_t *>vm
    cdef vcpu_t *vcpu = NULL
    cdef int status = check_batch(ipas, access, stride, out, n)
    if not status:
        status = enter_loaded(handle, index, &vcpu)
    if status:
        return status
    translate_run(handle.vm, vcpu, ipas, access, <int64_t>stride, <fault_t *>out, <int64_t>n)
    leave(vcpu)
    return S2S_OK


cdef int api_translate(s2s_vm_t *vm, uint32_t index, uint64_t ipa, uint32_t access, s2s_fault_t *out) noexcept nogil:
    cdef uint8_t mask = <uint8_t>access
    if access > 31:
        return bad_access(access)
    return api_translate_many(vm, index, &ipa, &mask, 0, out, 1)


cdef bint walk_once(vm_t *vm, vcpu_t *vcpu, uint64_t ipa, uint8_t access, bint update, walk_t *out) noexcept nogil:
    """Walk as far as memory answers; False if the embedder must be asked."""
    cdef bint asks
    lock_shared(&vm.lock, vcpu.reader)
    walk_stage2(&vcpu.view, &vcpu.config, ipa, access, update, out)
    asks = is_asking(&vcpu.view)
    if update and out.updated and not asks:
        mark_dirty(&vm.dirty, out.desc_addr)
    unlock_shared(vcpu.reader)
    return not asks


cdef int api_walk(s2s_vm_t *vm, uint32_t index, uint64_t ipa, uint32_t access, int update,
                  s2s_walk_t *out) noexcept nogil:
    cdef handle_t *handle = <handle_t *>vm
    cdef walk_t *walked = <walk_t *>out
    cdef vcpu_t *vcpu = NULL
    cdef int status, asked = 0
    if access > 31:
        return bad_access(access)
    status = enter_loaded(handle, index, &vcpu)
    if status:
        return status
    while not walk_once(handle.vm, vcpu, ipa, <uint8_t>access, update != 0, walked):
        asked += 1
        if asked > QUESTIONS:
            status = fail(S2S_E_BUSY, "the walk of %#llx was overtaken by TLBIs %d times", <word>ipa, <int>QUESTIONS)
            break
        ask_descriptor(handle.vm, vcpu.view.answers)
    if vcpu.view.answers != NULL and vcpu.view.answers.swapped:
        walked.updated = 1
    forget_answers(vcpu)
    leave(vcpu)
    return status


cdef int api_tlbi(s2s_vm_t *vm, uint32_t index, uint32_t insn, uint64_t xt, const s2s_registers_t *registers,
                  s2s_tlbi_result_t *result) noexcept nogil:
    """Does not take the vCPU: nothing of it changes."""
    cdef handle_t *handle = <handle_t *>vm
    cdef s2s_registers_t r
    cdef tlbi_op_t op
    cdef tlbi_regs_t regs
    cdef tlbi_result_t done
    cdef int status
    if handle == NULL or index >= handle.vm.vcpu_count:
        return fail(S2S_E_INVALID, "there is no vCPU %u", index)
    if registers == NULL:
        regs.vttbr = handle.vm.vcpus[index].vttbr
        regs.vtcr = handle.vm.vcpus[index].vtcr
        regs.hcr = handle.vm.vcpus[index].hcr
    else:                                   # another thread may be loading that vCPU
        status = take_registers(registers, &r)
        if status:
            return status
        regs.vttbr, regs.vtcr, regs.hcr = r.vttbr, r.vtcr, r.hcr
    if tlbi_lookup_word(insn, &handle.vm.features, &op) != TLBI_OK:
        return fail(S2S_E_UNDEFINED, "no TLBI has the word %#x, or the features lack it", insn)
    apply_tlbi(handle.vm, &op, xt, &regs, &done)
    if result != NULL:
        result.removed = done.removed
        result.required = done.required
        result.contexts = done.contexts
    return S2S_OK


# --- the host's stage 2 ------------------------------------------------------------------------------------------


cdef int check_range(const handle_t *handle, uint64_t start, uint64_t end) noexcept nogil:
    cdef uint64_t page, limit
    if handle == NULL:
        return fail(S2S_E_INVALID, "vm must not be NULL")
    page = <uint64_t>1 << handle.vm.arena.granule_bits
    limit = <uint64_t>1 << handle.vm.features.pa_bits
    if (start | end) & (page - 1):
        return fail(S2S_E_INVALID, "[%#llx, %#llx) is not aligned to the host page (%llu)", <word>start, <word>end,
                    <word>page)
    if start > end or end > limit:
        return fail(S2S_E_INVALID, "[%#llx, %#llx) is no range below pa_bits=%d", <word>start, <word>end,
                    <int>handle.vm.features.pa_bits)
    return S2S_OK


cdef void nothing_changed(handle_t *handle, s2s_change_t *change) noexcept nogil:
    cdef change_t done
    done.dropped = 0
    lock_shared_other(&handle.vm.lock)
    done.ticket = handle.vm.owed.seq
    unlock_shared_other(&handle.vm.lock)
    give_change(change, &done)


cdef int api_host_map(s2s_vm_t *vm, uint64_t cipa, uint64_t pa, uint64_t size, uint32_t perm, uint32_t memattr,
                      s2s_change_t *change) noexcept nogil:
    cdef handle_t *handle = <handle_t *>vm
    cdef host_attrs_t attrs
    cdef change_t done
    cdef int status
    if size > <uint64_t>1 << 52 or cipa > <uint64_t>1 << 52 or pa > <uint64_t>1 << 52 or not size:
        return fail(S2S_E_INVALID, "size %#llx is 0, or an address is beyond 52 bits", <word>size)
    status = check_range(handle, cipa, cipa + size)
    if not status:
        status = check_range(handle, pa, pa + size)
    if not status:
        status = take_attrs(handle.vm, perm, memattr, &attrs)
    if status:
        return status
    if not host_map(handle.vm, cipa, pa, size, &attrs, UINT64_MAX, &done):
        return fail(S2S_E_NO_MEMORY, "no room for the tables of %#llx bytes at %#llx", <word>size, <word>cipa)
    give_change(change, &done)
    return S2S_OK


cdef int api_host_unmap(s2s_vm_t *vm, uint64_t start, uint64_t end, uint32_t partial,
                        s2s_change_t *change) noexcept nogil:
    cdef handle_t *handle = <handle_t *>vm
    cdef change_t done
    cdef bint drop = partial == S2S_PARTIAL_DROP
    cdef int status = check_range(handle, start, end)
    if status:
        return status
    if partial > S2S_PARTIAL_DROP:
        return fail(S2S_E_INVALID, "partial %u is not one of the constants", partial)
    if start == end:
        nothing_changed(handle, change)
        return S2S_OK
    if partial == S2S_PARTIAL_DEFAULT:
        drop = handle.vm.teardown == TEARDOWN_BLOW_AWAY or handle.vm.teardown == TEARDOWN_BLOW_AWAY_LEAN
    host_unmap(handle.vm, start, end, drop, &done)
    give_change(change, &done)
    return S2S_OK


cdef int api_host_protect(s2s_vm_t *vm, uint64_t start, uint64_t end, uint32_t perm,
                          s2s_change_t *change) noexcept nogil:
    cdef handle_t *handle = <handle_t *>vm
    cdef host_attrs_t attrs
    cdef change_t done
    cdef int status = check_range(handle, start, end)
    if not status:
        status = take_attrs(handle.vm, perm, 0, &attrs)
    if status:
        return status
    host_protect(handle.vm, start, end, attrs.perm, &done)
    give_change(change, &done)
    return S2S_OK


cdef int api_set_populate(s2s_vm_t *vm, const s2s_populate_t *populate) noexcept nogil:
    cdef handle_t *handle = <handle_t *>vm
    cdef s2s_populate_t p
    cdef uint64_t page
    cdef int status
    if handle == NULL:
        return fail(S2S_E_INVALID, "vm must not be NULL")
    if handle.shared != NULL:
        return fail(S2S_E_STATE, "populate of a NestedVM is set by vm.host.populate")
    memset(&p, 0, sizeof(p))
    status = take_struct(&p, sizeof(p), sizeof(p), populate, "populate")
    if status:
        return status
    page = <uint64_t>1 << handle.vm.arena.granule_bits
    if p.policy > S2S_POPULATE_CALLBACK:
        return fail(S2S_E_INVALID, "policy %u is not one of the constants", p.policy)
    if p.policy == S2S_POPULATE_CALLBACK and p.callback == NULL:
        return fail(S2S_E_INVALID, "callback must not be NULL")
    if p.policy == S2S_POPULATE_LINEAR:
        if not p.max_block:
            p.max_block = 2 << 20
        if p.max_block < page or p.max_block & (p.max_block - 1):
            return fail(S2S_E_INVALID, "max_block %#llx is no power of two of at least the host page",
                        <word>p.max_block)
        if p.offset & <int64_t>(page - 1):
            return fail(S2S_E_INVALID, "offset %lld is not aligned to the host page", <long long>p.offset)
    lock_exclusive(&handle.vm.lock)
    if p.policy == S2S_POPULATE_LINEAR:
        handle.vm.linear_level = leaf_level_within(handle.vm.arena.granule_bits, handle.vm.arena.oa.wide, p.max_block)
        handle.vm.linear_offset = p.offset
        handle.vm.linear_fresh = p.fresh != 0
        handle.vm.populate = POPULATE_LINEAR
    else:
        handle.vm.populate = POPULATE_CALLABLE if p.policy == S2S_POPULATE_CALLBACK else POPULATE_NONE
        handle.populate = p.callback
        handle.populate_opaque = p.opaque
    unlock_exclusive(&handle.vm.lock)
    return S2S_OK


# --- dirty logging and aging -------------------------------------------------------------------------------------


cdef range_t *ram_ranges(handle_t *handle, uint64_t start, uint64_t end, uint32_t *count) noexcept nogil:
    """The RAM inside [start, end), to be freed; NULL where there is no memory for the list."""
    cdef const region_map_t *map
    cdef range_t *ranges
    lock_shared_other(&handle.vm.lock)      # our own list of regions may go otherwise; a GuestMemory keeps its
    map = handle.own.map
    if handle.shared != NULL:
        map = <const region_map_t *>load_pointer(<void *const *>&handle.shared.map)
    ranges = <range_t *>allocate(map.count + 1, sizeof(range_t))
    if ranges != NULL:
        count[0] = ram_within(map, <uint64_t>1 << handle.vm.arena.granule_bits, start, end, ranges)
    unlock_shared_other(&handle.vm.lock)
    if ranges == NULL:
        fail(S2S_E_NO_MEMORY, "no memory for a list of regions")
    return ranges


cdef int api_log_dirty(s2s_vm_t *vm, uint64_t start, uint64_t end, int on, s2s_change_t *change) noexcept nogil:
    cdef handle_t *handle = <handle_t *>vm
    cdef change_t done
    cdef range_t *ranges
    cdef uint32_t count = 0
    cdef bint reserved
    cdef int status = check_range(handle, start, end)
    if status:
        return status
    ranges = ram_ranges(handle, start, end, &count)
    if ranges == NULL:
        return S2S_E_NO_MEMORY
    if count == 0:
        nothing_changed(handle, change)
        free(ranges)
        return S2S_OK
    lock_exclusive(&handle.vm.lock)
    reserved = dirty_reserve(&handle.vm.dirty)
    unlock_exclusive(&handle.vm.lock)
    if reserved:
        host_log(handle.vm, ranges, count, on != 0, &done)
        give_change(change, &done)
    else:
        status = fail(S2S_E_NO_MEMORY, "cannot reserve address space for the dirty log")
    free(ranges)
    return status


cdef int clear_bitmap(handle_t *handle, uint64_t start, uint64_t end, uint8_t *bitmap, size_t bytes) noexcept nogil:
    cdef uint64_t wanted
    cdef int status = check_range(handle, start, end)
    if status:
        return status
    wanted = ((end - start >> handle.vm.arena.granule_bits) + 7) / 8
    if bytes < wanted or (bitmap == NULL and wanted):
        return fail(S2S_E_INVALID, "the bitmap needs %llu bytes, got %llu", <word>wanted, <word>bytes)
    if bitmap != NULL:
        memset(bitmap, 0, bytes)
    return S2S_OK


cdef int api_dirty_log(s2s_vm_t *vm, uint64_t start, uint64_t end, uint8_t *bitmap, size_t bytes) noexcept nogil:
    cdef handle_t *handle = <handle_t *>vm
    cdef range_t *ranges
    cdef uint32_t count = 0
    cdef bint active
    cdef int status = clear_bitmap(handle, start, end, bitmap, bytes)
    if status:
        return status
    ranges = ram_ranges(handle, start, end, &count)
    if ranges == NULL:
        return S2S_E_NO_MEMORY
    lock_shared_other(&handle.vm.lock)
    active = handle.vm.dirty.active
    unlock_shared_other(&handle.vm.lock)
    if count and active:
        host_dirty_log(handle.vm, ranges, count, start, bitmap)
    free(ranges)
    return S2S_OK


cdef int age_or_test(handle_t *handle, uint64_t start, uint64_t end, bint clear, uint8_t *bitmap,
                     size_t bytes) noexcept nogil:
    cdef int status = clear_bitmap(handle, start, end, bitmap, bytes)
    if not status and start < end:
        host_age(handle.vm, start, end, clear, bitmap)
    return status


cdef int api_age(s2s_vm_t *vm, uint64_t start, uint64_t end, uint8_t *bitmap, size_t bytes) noexcept nogil:
    return age_or_test(<handle_t *>vm, start, end, True, bitmap, bytes)


cdef int api_test_young(s2s_vm_t *vm, uint64_t start, uint64_t end, uint8_t *bitmap, size_t bytes) noexcept nogil:
    return age_or_test(<handle_t *>vm, start, end, False, bitmap, bytes)


# --- looking inside ----------------------------------------------------------------------------------------------


cdef int api_take_tlbis(s2s_vm_t *vm, s2s_hw_tlbi_t *rows, size_t limit, size_t *taken) noexcept nogil:
    cdef handle_t *handle = <handle_t *>vm
    if handle == NULL or taken == NULL or (rows == NULL and limit):
        return fail(S2S_E_INVALID, "vm, rows and taken must not be NULL")
    if limit > handle.vm.owed.capacity:
        limit = handle.vm.owed.capacity
    lock_exclusive(&handle.vm.lock)         # rows of an operation show once its section is over
    taken[0] = owed_take(&handle.vm.owed, <hw_tlbi_t *>rows, <uint32_t>limit) if limit else 0
    unlock_exclusive(&handle.vm.lock)
    return S2S_OK


cdef int api_stats(s2s_vm_t *vm, s2s_stats_t *stats) noexcept nogil:
    cdef handle_t *handle = <handle_t *>vm
    cdef s2s_stats_t s
    cdef counters_t c
    if handle == NULL or stats == NULL:
        return fail(S2S_E_INVALID, "vm and stats must not be NULL")
    if stats.size < sizeof(uint64_t) or stats.size > MOST_FIELDS:
        return fail(S2S_E_INVALID, "stats says that it has %u bytes: set its size to sizeof", stats.size)
    vm_counters(handle.vm, &c)
    memset(&s, 0, sizeof(s))
    s.faults, s.hits, s.mapped, s.l1_faults = c.faults, c.kinds[0], c.kinds[1], c.kinds[2]
    s.host_faults, s.mmio, s.retries, s.no_memory = c.kinds[3], c.kinds[4], c.kinds[5], c.kinds[6]
    s.installed, s.removed, s.relaxed, s.replaced = c.installed, c.removed, c.relaxed, c.replaced
    s.narrowed, s.live, s.invalidations, s.kernel_steps = c.narrowed, c.live, c.invalidations, c.kernel_steps
    s.unknown_unmaps, s.contexts_recycled, s.evictions = c.unknown_unmaps, c.recycled, c.evictions
    s.host_leaves, s.table_bytes, s.link_bytes, s.rmap_bytes = c.host_leaves, c.table_bytes, c.link_bytes, c.rmap_bytes
    s.owed_tlbis = c.owed
    give_struct(stats, stats.size, &s, sizeof(s))
    return S2S_OK


cdef list rule_texts = [rule.encode() for rule in RULES]        # kept: C sees what is inside
cdef const char *rule_text[64]
assert len(rule_texts) <= 64
for _rule in range(len(rule_texts)):
    rule_text[<int>_rule] = rule_texts[_rule]


cdef int api_check(s2s_vm_t *vm) noexcept nogil:
    cdef handle_t *handle = <handle_t *>vm
    cdef mem_view_t view
    cdef finding_t finding
    if handle == NULL:
        return fail(S2S_E_INVALID, "vm must not be NULL")
    view.answers = NULL
    lock_exclusive(&handle.vm.lock)
    view_begin(&view, handle.own.map, 0)
    if handle.shared != NULL:
        view.map = NULL
        view_refresh(&view, handle.shared)
    check_vm(handle.vm, &view, &finding)
    unlock_exclusive(&handle.vm.lock)
    if finding.rule:
        return fail(S2S_E_BROKEN, "%s: %#llx, should be %#llx", rule_text[finding.rule], <word>finding.seen,
                    <word>finding.wanted)
    return S2S_OK


# --- the table ---------------------------------------------------------------------------------------------------

cdef s2s_api_t api

api.size = sizeof(s2s_api_t)
api.abi_version = S2SHADOW_ABI_VERSION
api.status_text = api_status_text
api.last_error = api_last_error
api.features_init = api_features_init
api.options_init = api_options_init
api.create = api_create
api.destroy = api_destroy
api.add_ram = api_add_ram
api.add_device = api_add_device
api.add_callbacks = api_add_callbacks
api.remove_region = api_remove_region
api.load = api_load
api.put = api_put
api.fault = api_fault
api.translate = api_translate
api.walk = api_walk
api.fault_many = api_fault_many
api.translate_many = api_translate_many
api.tlbi = api_tlbi
api.host_map = api_host_map
api.host_unmap = api_host_unmap
api.host_protect = api_host_protect
api.set_populate = api_set_populate
api.log_dirty = api_log_dirty
api.dirty_log = api_dirty_log
api.age = api_age
api.test_young = api_test_young
api.take_tlbis = api_take_tlbis
api.stats = api_stats
api.check = api_check


def get_include():
    """Folder to pass to a C, C++ or Cython compiler for ``#include "s2shadow/s2shadow.h"``."""
    return str(Path(__file__).parent / "include")


_C_API = PyCapsule_New(&api, S2SHADOW_CAPSULE, NULL)
