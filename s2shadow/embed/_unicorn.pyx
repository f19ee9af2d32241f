"""The native half of ``s2shadow.embed.unicorn``: what Unicorn calls, and the shootdown between its CPUs.

A ``Hub`` is what the CPUs of one ``NestedVM`` share. Unicorn's TLB belongs to one instance and can only be flushed by
the thread that runs it. So a flush is asked for (``cpu.flush``, ``cpu.attention``), and done by the CPU's own thread in
a hook that comes before every translated block, or before it enters Unicorn. Who asked waits until no CPU is ``INSIDE``
with a flush to make. A CPU whose thread waits in a TLBI or a device is ``QUIET``: it runs nothing, and flushes before
it does. One whose thread waits in a hook of the embedder's is ``HOOKED``: it may be amid a store, for which Unicorn has
looked its entry up already and would use what a flush leaves of it, so that it flushes before its next block. Others
wait for that; who is in such a hook himself does not.

No thread calls into a Unicorn that another one runs: not even ``uc_emu_stop``, which is lost where it comes while
emulation starts or restarts, and would cost the CPU its way out and in.

Unicorn is found at run time, as addresses of its functions: nothing of it is needed to build this module.
"""

cimport cython
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memset

from s2shadow.arch cimport ACCESS_EL0, ACCESS_EXEC, ACCESS_READ, ACCESS_WRITE, PERM_EXEC_EL0
from s2shadow.atomics cimport cas32, load32, store32
from s2shadow.fault cimport STEP_DONE, fault_run, step_t
from s2shadow.lock cimport lock_exclusive, sched_yield, unlock_exclusive
from s2shadow.maintenance cimport apply_tlbi, tlbi_regs_t, tlbi_result_t
from s2shadow.memory cimport GuestMemory, region_over, region_t
from s2shadow.owed cimport FIRST_CONTEXT_VMID, TLBI_ALL, hw_tlbi_t, owed_take
from s2shadow.table cimport (
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock,
)
from s2shadow.tlbi cimport TLBI_OK, tlbi_lookup, tlbi_op_t
from s2shadow.vm cimport KIND_MAPPED, KIND_MMIO, KIND_RETRY, NO_CONTEXT, fault_t, forget_guest_path, vcpu_t, vm_t

cdef extern from *:
    """
    #include <pthread.h>
    #include <stdint.h>
    #include <time.h>
    /* what Unicorn passes to hooks, and the functions of it that are called */
    typedef struct { uint64_t paddr; int perms; } s2_uc_entry_t;
    typedef struct { uint32_t crn, crm, op0, op1, op2; uint64_t val; } s2_uc_cp_reg_t;
    typedef int (*s2_uc_hook_add_t)(void *, size_t *, int, void *, void *, uint64_t, uint64_t, ...);
    typedef int (*s2_uc_hook_del_t)(void *, size_t);
    typedef int (*s2_uc_ctl_t)(void *, int, ...);
    typedef int (*s2_uc_emu_start_t)(void *, uint64_t, uint64_t, uint64_t, size_t);
    typedef int (*s2_uc_emu_stop_t)(void *);
    typedef int (*s2_uc_reg_t)(void *, int, void *);
    typedef int (*s2_uc_map_ptr_t)(void *, uint64_t, size_t, uint32_t, void *);
    static __thread int s2_emulations;      /* that this thread is in */
    static inline uint64_t s2_thread(void) { return (uint64_t)(uintptr_t)pthread_self(); }
    static inline void s2_nap(void) { struct timespec t = {0, 20000}; nanosleep(&t, NULL); }
    """
    ctypedef bint c_bool "_Bool"
    ctypedef struct entry_t "s2_uc_entry_t":
        uint64_t paddr
        int perms
    ctypedef struct cp_reg_t "s2_uc_cp_reg_t":
        uint32_t crn
        uint32_t crm
        uint32_t op0
        uint32_t op1
        uint32_t op2
        uint64_t val
    ctypedef int (*hook_add_t "s2_uc_hook_add_t")(
        void *uc, size_t *hook, int type, void *callback, void *user, uint64_t begin, uint64_t end, ...) noexcept nogil
    ctypedef int (*hook_del_t "s2_uc_hook_del_t")(void *uc, size_t hook) noexcept nogil
    ctypedef int (*ctl_t "s2_uc_ctl_t")(void *uc, int control, ...) noexcept nogil
    ctypedef int (*emu_start_t "s2_uc_emu_start_t")(
        void *uc, uint64_t begin, uint64_t until, uint64_t timeout, size_t count) noexcept nogil
    ctypedef int (*emu_stop_t "s2_uc_emu_stop_t")(void *uc) noexcept nogil
    ctypedef int (*reg_t "s2_uc_reg_t")(void *uc, int reg, void *value) noexcept nogil
    ctypedef int (*map_ptr_t "s2_uc_map_ptr_t")(
        void *uc, uint64_t address, size_t size, uint32_t perms, void *host) noexcept nogil
    int emulations "s2_emulations"
    uint64_t this_thread "s2_thread"() noexcept nogil
    void nap "s2_nap"() noexcept nogil

cdef enum:
    ROWS = 64                   # owed rows taken at a time
    SPINS = 200                 # looks at a CPU that is to flush before naps between them
    RETRIES = 64                # looks at a range that an invalidation is at work on, before the CPU leaves
    ERR_OK = 0                  # uc_err
    ERR_EXCEPTION = 21
    MEM_READ = 16               # uc_mem_type
    MEM_WRITE = 17
    PROT_ALL = 7
    NO_PC = 1                   # no instruction is there

cdef enum:
    OUTSIDE                     # runs nothing of L2; flushes before it does
    INSIDE                      # in uc_emu_start
    QUIET                       # there too, but its thread waits in a TLBI or a device: flushes before it goes on
    HOOKED                      # there too, but its thread waits in a hook: flushes before its next block

# Why a CPU cannot be entered, and why it stopped by itself.
cdef enum:
    ENTERED
    BUSY
    NOT_LOADED
    STOPPED
    STAGE1_ON

cdef struct hub_t:
    pthread_mutex_t lock        # outer to every lock of the engine
    vm_t *vm
    cpu_t *first
    uint64_t waits              # how often somebody waited for flushes

# The addresses of Unicorn's functions and its constants.
cdef struct api_t:
    hook_add_t hook_add
    hook_del_t hook_del
    ctl_t ctl
    emu_start_t emu_start
    emu_stop_t emu_stop
    reg_t reg_read
    reg_t reg_write
    map_ptr_t map_ptr
    int hook_tlb_fill
    int hook_insn
    int hook_block
    int insn_sys
    int insn_msr
    int flush_control
    int reg_pc
    int reg_pstate
    uint64_t page_size          # of Unicorn's TLB

# A page of L2 that leads to the device page ``cipa``, which Unicorn finds at ``pa``.
cdef struct grant_t:
    uint64_t ipa
    uint64_t cipa
    uint64_t pa
    uint8_t given

cdef struct cpu_t:
    const api_t *api
    void *uc
    vm_t *vm
    vcpu_t *vcpu
    hub_t *hub
    cpu_t *next
    uint64_t thread             # that it runs on
    uint32_t state
    uint32_t attention          # for the next block: there is something to do
    uint8_t flush               # as the next four, under the hub's lock
    uint64_t flush_since        # the wait that it was asked for in
    uint64_t runs
    uint8_t active              # run() is under way
    uint8_t stop
    uint8_t why                 # it stopped by itself
    uint8_t traps
    uint8_t xnx
    # what Unicorn's TLB holds
    uint32_t context
    uint64_t generation
    uint8_t has_mmio            # device pages, which no row that is owed speaks of
    # the access that a fill could not serve
    uint8_t refused
    uint8_t refused_access
    uint64_t refused_ipa
    grant_t grants[2][2]        # device pages that L2 was let at, to read and to write: two that one access may be over
    uint8_t older_grant[2]
    tlbi_regs_t regs            # under which the program's TLBIs act
    uint8_t has_regs
    uint64_t fills
    uint64_t tlbis
    uint64_t flushes
    uint64_t interruptions


# --- what Unicorn calls ---

cdef inline uint8_t fetch_access(cpu_t *cpu) noexcept nogil:
    """A fetch, at EL0 if the program is there: with FEAT_XNX that makes a difference. Unicorn keeps the entries of the
    two apart."""
    cdef uint64_t pstate = 0
    if not cpu.xnx:
        return ACCESS_EXEC
    cpu.api.reg_read(cpu.uc, cpu.api.reg_pstate, &pstate)
    return ACCESS_EXEC if pstate & 0xC else ACCESS_EXEC | ACCESS_EL0


cdef inline grant_t *grant_of(cpu_t *cpu, uint64_t ipa, uint8_t access) noexcept nogil:
    cdef grant_t *grants = cpu.grants[access == ACCESS_WRITE]
    if grants[0].given and grants[0].ipa == ipa:
        return &grants[0]
    if grants[1].given and grants[1].ipa == ipa:
        return &grants[1]
    return NULL


cdef c_bool fill_tlb(void *_uc, uint64_t vaddr, int kind, entry_t *entry, void *user) noexcept nogil:
    """UC_HOOK_TLB_FILL: ask the engine. What it cannot serve ends the run, once; Unicorn asks for the page before
    ``until`` on the way out."""
    cdef cpu_t *cpu = <cpu_t *>user
    cdef const grant_t *grant
    cdef fault_t row
    cdef int64_t at
    cdef step_t step
    cdef int _try
    cdef uint8_t access
    if cpu.state != INSIDE or cpu.refused:
        return False
    access = ACCESS_READ if kind == MEM_READ else ACCESS_WRITE if kind == MEM_WRITE else fetch_access(cpu)
    cpu.fills += 1
    grant = NULL if access & ACCESS_EXEC else grant_of(cpu, vaddr, access)
    if grant != NULL:
        cpu.has_mmio = True     # before the engine is asked: who changes the answer after it was given finds this set
    for _try in range(RETRIES):
        at = 0
        step = fault_run(cpu.vm, cpu.vcpu, &vaddr, &access, 0, &row, 1, &at)
        if step != STEP_DONE or row.kind != KIND_RETRY:
            break
        sched_yield()
    if step == STEP_DONE and row.kind <= KIND_MAPPED:
        entry.paddr = row.pa
        entry.perms = row.perm & (ACCESS_READ | ACCESS_WRITE)
        if access & ACCESS_EXEC or (row.perm & ACCESS_EXEC and row.perm & PERM_EXEC_EL0):
            entry.perms |= ACCESS_EXEC
        return True
    if step == STEP_DONE:
        cpu.vcpu.kinds[row.kind] -= 1       # counted where it is answered: by VCPU.fault, which is asked next
        if row.kind == KIND_MMIO and grant != NULL and row.cipa == grant.cipa:
            entry.paddr = grant.pa
            entry.perms = access
            return True
    cpu.refused = True
    cpu.refused_ipa = vaddr
    cpu.refused_access = access
    return False


cdef void skip_instruction(cpu_t *cpu) noexcept nogil:
    """Go on behind the instruction. Unicorn alone would do so only where its CPU knows it, and for others loop."""
    cdef uint64_t pc = 0
    cpu.api.reg_read(cpu.uc, cpu.api.reg_pc, &pc)
    pc += 4
    cpu.api.reg_write(cpu.uc, cpu.api.reg_pc, &pc)


cdef uint32_t sys_instruction(void *_uc, int _reg, const cp_reg_t *cp, void *user) noexcept nogil:
    """UC_HOOK_INSN for SYS: a TLBI goes to the engine, and when it is over no CPU holds what it named."""
    cdef cpu_t *cpu = <cpu_t *>user
    cdef tlbi_op_t op
    cdef tlbi_regs_t regs
    cdef tlbi_result_t result
    if not cpu.traps or cpu.state != INSIDE or not 8 <= cp.crn <= 9:
        return 0
    if cp.op1 == 0 and cp.crn == 8 and (cp.crm == 3 or cp.crm == 7):
        return 0                            # stage 1 of EL1&0, which a guest does for itself: Unicorn drops it alone
    if tlbi_lookup(cp.op1, cp.crn, cp.crm, cp.op2, &cpu.vm.features, &op) != TLBI_OK:
        return 0                            # undefined here too
    if cpu.has_regs:
        regs = cpu.regs
    else:
        regs.vttbr = cpu.vcpu.vttbr
        regs.vtcr = cpu.vcpu.vtcr
        regs.hcr = cpu.vcpu.hcr
    cpu.tlbis += 1
    apply_tlbi(cpu.vm, &op, cp.val, &regs, &result)
    pthread_mutex_lock(&cpu.hub.lock)
    ask_flush(cpu)                          # whether or not a leaf fell: entries may be of one that went before
    drain(cpu.hub, True)
    cpu.state = QUIET
    settle(cpu.hub, NULL)
    wake(cpu)
    pthread_mutex_unlock(&cpu.hub.lock)
    skip_instruction(cpu)
    return 1


cdef uint32_t msr_instruction(void *_uc, int _reg, const cp_reg_t *cp, void *user) noexcept nogil:
    """UC_HOOK_INSN for MSR: stop where L2 turns its own stage 1 on, which nobody here would walk."""
    cdef cpu_t *cpu = <cpu_t *>user
    if cp.op0 != 3 or cp.op1 != 0 or cp.crn != 1 or cp.crm != 0 or cp.op2 != 0 or not cp.val & 1:
        return 0
    if cpu.state != INSIDE:
        return 0
    cpu.why = STAGE1_ON
    store32(&cpu.attention, 1)
    return 1


cdef void next_block(void *uc, uint64_t address, uint32_t _size, void *user) noexcept nogil:
    """UC_HOOK_BLOCK, the only place where a CPU is stopped or flushed while it runs: its PC is right here.

    Writing the PC makes Unicorn look the block up again: blocks that jump to each other directly ask no TLB."""
    cdef cpu_t *cpu = <cpu_t *>user
    if not load32(&cpu.attention):
        return
    pthread_mutex_lock(&cpu.hub.lock)
    store32(&cpu.attention, 0)
    if cpu.flush:
        flush_now(cpu)
        cpu.interruptions += 1
    if cpu.stop or cpu.why:
        cpu.api.emu_stop(uc)
    else:
        cpu.api.reg_write(uc, cpu.api.reg_pc, &address)
    pthread_mutex_unlock(&cpu.hub.lock)


cdef inline bint is_probe(const cpu_t *cpu, uint64_t pc) noexcept nogil:
    """Whether what was refused is Unicorn's own look at the page before ``until``, on its way out: L2 is elsewhere."""
    return cpu.refused and cpu.refused_access & ACCESS_EXEC and (pc & ~(cpu.api.page_size - 1)) != cpu.refused_ipa


# --- the shootdown ---

cdef inline void ask_flush(cpu_t *cpu) noexcept nogil:
    if not cpu.flush:
        cpu.flush = True
        cpu.flush_since = cpu.hub.waits


cdef void flush_now(cpu_t *cpu) noexcept nogil:
    cpu.api.ctl(cpu.uc, cpu.api.flush_control)
    cpu.flush = False
    cpu.has_mmio = False
    cpu.flushes += 1


cdef void drain(hub_t *hub, bint full) noexcept nogil:
    """Take what the engine owes its hardware and mark the CPUs that it concerns. ``full``: also those whose entries no
    row speaks of. The hub's lock is held."""
    cdef hw_tlbi_t rows[ROWS]
    cdef uint32_t taken, i
    cdef cpu_t *cpu
    while load32(&hub.vm.owed.count):
        lock_exclusive(&hub.vm.lock)        # rows of an operation show once its section is over
        taken = owed_take(&hub.vm.owed, rows, ROWS)
        unlock_exclusive(&hub.vm.lock)
        for i in range(taken):
            cpu = hub.first
            while cpu != NULL:
                if rows[i].op == TLBI_ALL or rows[i].host_vmid == cpu.context + FIRST_CONTEXT_VMID:
                    ask_flush(cpu)
                cpu = cpu.next
    cpu = hub.first
    while cpu != NULL and full:
        if cpu.has_mmio or not hub.vm.owed.track:
            ask_flush(cpu)
        cpu = cpu.next


cdef bint ask(hub_t *hub, uint64_t wait, const cpu_t *stopping, uint64_t run, bint hooked) noexcept nogil:
    """Make the CPUs look up that have a flush to make, and ``stopping`` in its ``run``; False if nobody is left to wait
    for. Not for a flush asked for after this ``wait`` began, nor for another run: they could go on for ever. Who is in
    a hook does not wait for another that is in one, nor who is in a device or a hook for their end."""
    cdef cpu_t *cpu = hub.first
    cdef bint any = False, stops
    while cpu != NULL:
        stops = cpu == stopping and cpu.active and cpu.runs == run
        if cpu.state == INSIDE or (cpu.state == HOOKED and not hooked):
            if (cpu.flush and cpu.flush_since <= wait) or stops:
                any = True
                store32(&cpu.attention, 1)
        elif stops and cpu.state != OUTSIDE and not emulations:
            any = True
        cpu = cpu.next
    return any


cdef void wake(cpu_t *cpu) noexcept nogil:
    """Back from waiting in a TLBI or a device: what was asked for meanwhile comes before L2 goes on."""
    if cpu.flush:
        flush_now(cpu)
        store32(&cpu.attention, 1)          # and the code that it is at is looked up again
    if cpu.stop:
        store32(&cpu.attention, 1)
    cpu.state = INSIDE


cdef void settle(hub_t *hub, const cpu_t *stopping) noexcept nogil:
    """Until every flush asked for is done, or will be before its CPU runs. The hub's lock is held, and let go of while
    waiting: for a block at first, then for whatever takes longer."""
    cdef int tries = 0
    cdef uint64_t wait = hub.waits, run = stopping.runs if stopping != NULL else 0
    cdef bint hooked = False
    cdef cpu_t *cpu = hub.first
    hub.waits += 1
    while cpu != NULL:
        if cpu.state == INSIDE and cpu.thread == this_thread():
            cpu.state = HOOKED
            hooked = True
        cpu = cpu.next
    while ask(hub, wait, stopping, run, hooked):
        pthread_mutex_unlock(&hub.lock)
        if tries < SPINS:
            sched_yield()
        else:
            nap()
        tries += 1
        pthread_mutex_lock(&hub.lock)
    cpu = hub.first
    while cpu != NULL and hooked:
        if cpu.state == HOOKED and cpu.thread == this_thread():
            if cpu.flush or cpu.stop:
                store32(&cpu.attention, 1)
            cpu.state = INSIDE
        cpu = cpu.next


cdef int enter(cpu_t *cpu, GuestMemory mem, bint full) noexcept nogil:
    """Take the vCPU and get Unicorn's TLB in step with its context, and all that is owed done."""
    cdef uint32_t idle = 0
    cdef vcpu_t *vcpu = cpu.vcpu
    if not cas32(&vcpu.busy, &idle, 1):
        return BUSY
    if vcpu.context == NO_CONTEXT:
        store32(&vcpu.busy, 0)
        return NOT_LOADED
    pthread_mutex_lock(&cpu.hub.lock)
    if mem.refresh(&vcpu.view):
        forget_guest_path(vcpu)
        if cpu.has_mmio:
            ask_flush(cpu)
    drain(cpu.hub, full)
    settle(cpu.hub, NULL)
    if cpu.stop:
        pthread_mutex_unlock(&cpu.hub.lock)
        store32(&vcpu.busy, 0)
        return STOPPED
    if vcpu.context != cpu.context or cpu.vm.contexts[vcpu.context].generation != cpu.generation:
        cpu.context = vcpu.context
        cpu.generation = cpu.vm.contexts[vcpu.context].generation
        ask_flush(cpu)
    if cpu.flush:
        flush_now(cpu)
    store32(&cpu.attention, 0)
    cpu.refused = False
    cpu.thread = this_thread()
    cpu.state = INSIDE
    pthread_mutex_unlock(&cpu.hub.lock)
    return ENTERED


cdef int emulate(cpu_t *cpu, uint64_t pc, uint64_t until) noexcept nogil:
    global emulations
    cdef int error
    emulations += 1
    error = cpu.api.emu_start(cpu.uc, pc, until if until else <uint64_t>NO_PC, 0, 0)
    emulations -= 1
    return error


cdef bint begin_run(cpu_t *cpu) noexcept nogil:
    cdef bint first
    pthread_mutex_lock(&cpu.hub.lock)
    first = not cpu.active
    if first:
        cpu.active = True
        cpu.runs += 1
        cpu.stop = False
        cpu.why = 0
    pthread_mutex_unlock(&cpu.hub.lock)
    return first


cdef void leave(cpu_t *cpu) noexcept nogil:
    pthread_mutex_lock(&cpu.hub.lock)
    cpu.state = OUTSIDE
    pthread_mutex_unlock(&cpu.hub.lock)
    store32(&cpu.vcpu.busy, 0)


cdef set _attached = set()                  # handles of Unicorn instances


@cython.no_gc_clear
cdef class Hub:
    """What the CPUs of one ``NestedVM`` share."""

    cdef hub_t c
    cdef readonly object vm             # alive as long as its vm_t is used
    cdef object __weakref__

    def __cinit__(self):
        memset(&self.c, 0, sizeof(hub_t))
        pthread_mutex_init(&self.c.lock, NULL)

    def __init__(self, vm):
        self.c.vm = <vm_t *>PyCapsule_GetPointer(vm._state(), "s2shadow.vm_t")
        self.vm = vm

    def __dealloc__(self):
        pthread_mutex_destroy(&self.c.lock)

    def sync(self):
        """Drain what the engine owes; return when no CPU can reach what it names."""
        with nogil:
            pthread_mutex_lock(&self.c.lock)
            drain(&self.c, True)
            settle(&self.c, NULL)
            pthread_mutex_unlock(&self.c.lock)


@cython.no_gc_clear
cdef class Attachment:
    """One Unicorn instance and one vCPU. ``uc`` is held alive; ``handle`` is its uc_engine."""

    cdef cpu_t c
    cdef api_t api
    cdef size_t hooks[4]
    cdef int hook_count
    cdef Hub hub
    cdef GuestMemory mem
    cdef readonly object uc
    cdef readonly bint attached
    cdef object __weakref__

    def __init__(self, Hub hub not None, uint32_t vcpu, uc, uintptr_t handle, dict functions, dict constants,
                 bint traps):
        cdef int error
        if self.attached:
            raise RuntimeError("attached already")
        if handle in _attached:             # one TLB, and two that would each keep a part of it in step
            raise ValueError("uc is attached already: detach that Cpu first")
        if vcpu >= hub.c.vm.vcpu_count:
            raise ValueError(f"no vCPU {vcpu}")
        self.hub = hub
        self.mem = hub.vm.mem
        self.uc = uc
        self.api.hook_add = <hook_add_t><uintptr_t>functions["uc_hook_add"]
        self.api.hook_del = <hook_del_t><uintptr_t>functions["uc_hook_del"]
        self.api.ctl = <ctl_t><uintptr_t>functions["uc_ctl"]
        self.api.emu_start = <emu_start_t><uintptr_t>functions["uc_emu_start"]
        self.api.emu_stop = <emu_stop_t><uintptr_t>functions["uc_emu_stop"]
        self.api.reg_read = <reg_t><uintptr_t>functions["uc_reg_read"]
        self.api.reg_write = <reg_t><uintptr_t>functions["uc_reg_write"]
        self.api.map_ptr = <map_ptr_t><uintptr_t>functions["uc_mem_map_ptr"]
        self.api.hook_tlb_fill = constants["hook_tlb_fill"]
        self.api.hook_insn = constants["hook_insn"]
        self.api.hook_block = constants["hook_block"]
        self.api.insn_sys = constants["insn_sys"]
        self.api.insn_msr = constants["insn_msr"]
        self.api.flush_control = constants["flush_control"]
        self.api.reg_pc = constants["reg_pc"]
        self.api.reg_pstate = constants["reg_pstate"]
        self.api.page_size = constants["page_size"]
        memset(&self.c, 0, sizeof(cpu_t))
        self.c.api = &self.api
        self.c.uc = <void *>handle
        self.c.hub = &hub.c
        self.c.vm = hub.c.vm
        self.c.vcpu = &hub.c.vm.vcpus[vcpu]
        self.c.context = NO_CONTEXT
        self.c.traps = traps
        self.c.xnx = hub.c.vm.features.xnx
        self.c.flush = True
        _attached.add(handle)
        self.attached = True
        error = self.api.hook_add(self.c.uc, &self.hooks[0], self.api.hook_tlb_fill, <void *>fill_tlb, &self.c, 1, 0)
        if error == ERR_OK:
            self.hook_count = 1
            error = self.api.hook_add(self.c.uc, &self.hooks[1], self.api.hook_insn, <void *>sys_instruction, &self.c,
                                      1, 0, self.api.insn_sys)
        if error == ERR_OK:
            self.hook_count = 2
            error = self.api.hook_add(self.c.uc, &self.hooks[2], self.api.hook_insn, <void *>msr_instruction, &self.c,
                                      1, 0, self.api.insn_msr)
        if error == ERR_OK:
            self.hook_count = 3
            error = self.api.hook_add(self.c.uc, &self.hooks[3], self.api.hook_block, <void *>next_block, &self.c, 1, 0)
        if error == ERR_OK:
            self.hook_count = 4
        with nogil:
            pthread_mutex_lock(&self.hub.c.lock)
            self.c.next = self.hub.c.first
            self.hub.c.first = &self.c
            pthread_mutex_unlock(&self.hub.c.lock)
        if error != ERR_OK:
            self.detach()
            raise RuntimeError(f"Unicorn takes no hook (uc_err {error})")

    def __dealloc__(self):
        if self.attached:
            self.unhook()

    cdef void unhook(self) noexcept:
        cdef cpu_t **at
        with nogil:
            pthread_mutex_lock(&self.hub.c.lock)
            at = &self.hub.c.first
            while at[0] != NULL and at[0] != &self.c:
                at = &at[0].next
            if at[0] != NULL:
                at[0] = self.c.next
            pthread_mutex_unlock(&self.hub.c.lock)
        while self.hook_count:
            self.hook_count -= 1
            self.api.hook_del(self.c.uc, self.hooks[self.hook_count])
        _attached.discard(<uintptr_t>self.c.uc)
        self.attached = False

    def detach(self):
        """Take the hooks away. ``RuntimeError`` while it runs."""
        if not self.attached:
            return
        if self.c.active:
            raise RuntimeError("it runs: stop it first")
        self.unhook()

    cdef int check(self) except -1:
        if not self.attached:
            raise RuntimeError("detached from Unicorn")
        return 0

    def map_region(self, uint64_t pa, uint64_t start):
        """Put the host memory of the region that begins at cIPA ``start`` at ``pa`` -> uc_err."""
        cdef const region_t *region
        self.check()
        region = region_over(self.mem.c.map, start, 1)
        if region == NULL or region.start != start:
            raise ValueError(f"no region starts at {start:#x}")
        return self.api.map_ptr(self.c.uc, pa, region.size, PROT_ALL, region.host)

    def begin(self):
        """run() begins; False if it is under way already."""
        cdef bint first
        self.check()
        with nogil:
            first = begin_run(&self.c)
        return first

    def end(self):
        with nogil:
            pthread_mutex_lock(&self.c.hub.lock)
            self.c.active = False
            self.c.stop = False
            pthread_mutex_unlock(&self.c.hub.lock)

    def resume(self, uint64_t pc, uint64_t until, bint synced):
        """Run until something ends it -> (uc_err, pc, whether it came to ``until``, which 0 is not).

        ``synced``: since it last ran nobody changed what no row speaks of."""
        cdef int error = ERR_OK, status
        with nogil:
            status = enter(&self.c, self.mem, not synced)
            if status == ENTERED:
                error = emulate(&self.c, pc, until)
                leave(&self.c)
                self.api.reg_read(self.c.uc, self.api.reg_pc, &pc)
        if error == ERR_EXCEPTION and is_probe(&self.c, pc):
            self.c.refused = False
            error = ERR_OK
        if error == ERR_OK and status == ENTERED and not until and pc == NO_PC and not self.c.stop:
            error = ERR_EXCEPTION           # L2 has gone there: for Unicorn the end, for L2 an alignment fault
        if status == BUSY:
            raise RuntimeError("the vCPU is in use by another thread")
        if status == NOT_LOADED:
            raise RuntimeError("the vCPU has no context: load() it first")
        # the fetch at ``until`` itself may have been refused: it is there all the same
        return error, pc, until and pc == until and status == ENTERED and (error == ERR_OK or self.c.refused)

    def stop(self):
        """Make it leave, if run() is under way; return when it has. Called in a hook or a device it does not wait for
        its own end, nor for that of another that is in one."""
        with nogil:
            pthread_mutex_lock(&self.c.hub.lock)
            if self.c.active:
                self.c.stop = True
                if self.c.state != OUTSIDE and self.c.thread == this_thread():
                    store32(&self.c.attention, 1)
                else:
                    settle(self.c.hub, &self.c)
            pthread_mutex_unlock(&self.c.hub.lock)

    def quiet(self):
        """The thread that runs it is in a hook that may wait for others: nobody has to wait for it."""
        with nogil:
            pthread_mutex_lock(&self.c.hub.lock)
            if self.c.state == INSIDE and self.c.thread == this_thread():
                self.c.state = QUIET
            pthread_mutex_unlock(&self.c.hub.lock)

    def wake(self):
        """The end of ``quiet``."""
        with nogil:
            pthread_mutex_lock(&self.c.hub.lock)
            if self.c.state == QUIET and self.c.thread == this_thread():
                wake(&self.c)
            pthread_mutex_unlock(&self.c.hub.lock)

    def flush(self):
        """Empty Unicorn's TLB; return when it is, or will be before L2 runs."""
        with nogil:
            pthread_mutex_lock(&self.c.hub.lock)
            ask_flush(&self.c)
            settle(self.c.hub, NULL)
            pthread_mutex_unlock(&self.c.hub.lock)

    def revoke(self, uint64_t pa):
        """Let nothing reach the device page at ``pa`` any more, before L2 runs again. For the thread that runs it."""
        cdef int i
        for i in range(4):
            if self.c.grants[i >> 1][i & 1].pa == pa:
                self.c.grants[i >> 1][i & 1].given = False
        with nogil:
            pthread_mutex_lock(&self.c.hub.lock)
            ask_flush(&self.c)
            pthread_mutex_unlock(&self.c.hub.lock)

    def grant(self, uint64_t ipa, uint64_t cipa, uint8_t access, uint64_t pa):
        """Let reads or writes of the page ``ipa`` reach ``pa`` as long as it leads to the device page ``cipa``."""
        cdef int write = access == ACCESS_WRITE
        cdef grant_t *grant = &self.c.grants[write][self.c.older_grant[write]]
        self.c.older_grant[write] ^= 1
        grant.ipa = ipa
        grant.cipa = cipa
        grant.pa = pa
        grant.given = True

    @property
    def refused(self):
        """The access that ended the run, as (ipa, access), or None."""
        return (self.c.refused_ipa, self.c.refused_access) if self.c.refused else None

    @property
    def stopping(self):
        return bool(self.c.stop)

    @property
    def stage1_on(self):
        return self.c.why == STAGE1_ON

    @property
    def registers(self):
        return (self.c.regs.vttbr, self.c.regs.vtcr, self.c.regs.hcr) if self.c.has_regs else None

    @registers.setter
    def registers(self, values):
        if values is not None:
            self.c.regs.vttbr, self.c.regs.vtcr, self.c.regs.hcr = values
        self.c.has_regs = values is not None

    @property
    def counters(self):
        """(fills, tlbis, flushes, those of them amid a run)"""
        return self.c.fills, self.c.tlbis, self.c.flushes, self.c.interruptions
