/* s2shadow: the C API of the engine.
 *
 * SPDX-License-Identifier: MIT
 *
 * One table of function pointers, s2s_api_t, behind the capsule "s2shadow._C_API". Python is needed to get the table
 * (s2s_import, below, or PyCapsule_Import) and never afterwards: no call takes the GIL, touches a Python object or
 * sets a Python error, and every call may come from any native thread. A VM made by create() lives and dies without
 * the interpreter.
 *
 * Terms and units are those of the Python API: an IPA is an address of L2, a cIPA one of L1's physical memory, a PA
 * one of the host. Addresses and sizes are bytes, ranges are half-open.
 *
 * ABI. What is compiled against major version M and minor version N runs with every table of major version M whose
 * minor version is at least N; s2s_import checks that. Within a major version:
 *   - functions are only added, at the end of s2s_api_t; they keep their signature and their meaning;
 *   - structs that start with a ``size`` grow at their end. The caller sets ``size`` to its own sizeof. Of a struct that
 *     the engine reads, what lies beyond ``size`` counts as not set; of one that it writes, nothing beyond is written;
 *   - structs without a ``size`` are rows of arrays, and never change; neither do the values of enumerators;
 *   - status codes, answers of a fault and operations of s2s_hw_tlbi_t may be added: treat one that is unknown as a
 *     failure, as a fault to try again, and as S2S_HW_VMALLS12 for that VMID.
 * All else needs a new major version.
 *
 * Threads. Any number of calls may run at once on one VM, with one thread per vCPU at a time: a second one that is seen
 * gets S2S_E_BUSY. destroy() must be the last call. Callbacks run with no lock of the engine held and may call the
 * engine, except for the vCPU on whose behalf they run.
 *
 * Errors. Functions return S2S_OK or a negative status, and then have changed nothing; last_error() says in words what
 * was wrong. What L1 wrote is never an error: it ends in the answer to a fault.
 */
#ifndef S2SHADOW_H
#define S2SHADOW_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#define S2S_STATIC_ASSERT(condition, text) static_assert(condition, text)
#else
#define S2S_STATIC_ASSERT(condition, text) _Static_assert(condition, text)
#endif

#define S2SHADOW_ABI_MAJOR 1
#define S2SHADOW_ABI_MINOR 0
#define S2SHADOW_ABI_VERSION (S2SHADOW_ABI_MAJOR << 16 | S2SHADOW_ABI_MINOR)
#define S2SHADOW_CAPSULE "s2shadow._C_API"
#define S2SHADOW_VM_CAPSULE "s2shadow.s2s_vm" /* name of NestedVM._c_handle */

typedef struct s2s_vm s2s_vm_t;

/* --- constants ------------------------------------------------------------------------------------------------- */

enum { /* what functions return */
    S2S_OK = 0,
    S2S_E_INVALID = -1,    /* an argument */
    S2S_E_NO_MEMORY = -2,  /* the system or max_table_bytes refused */
    S2S_E_BUSY = -3,       /* another call runs on that vCPU */
    S2S_E_NOT_LOADED = -4, /* the vCPU has no context: load() it first */
    S2S_E_STATE = -5,      /* not on this VM: its memory and its populate policy belong to Python */
    S2S_E_CALLBACK = -6,   /* a callback failed or answered what cannot be */
    S2S_E_UNDEFINED = -7,  /* the TLBI does not exist, or the features lack it */
    S2S_E_BROKEN = -8      /* check() found a broken invariant */
};

enum { /* an access, and what a leaf permits */
    S2S_READ = 1,
    S2S_WRITE = 2,
    S2S_EXEC = 4,      /* of a leaf: at EL1 */
    S2S_EL0 = 8,       /* the access is unprivileged */
    S2S_PTW = 16,      /* the access is a stage-1 table walk */
    S2S_EXEC_EL0 = 32, /* of a leaf only */
    S2S_RWX = 39       /* all that a leaf can permit */
};

enum { /* s2s_fault_t.kind */
    S2S_HIT = 0,
    S2S_MAPPED = 1,
    S2S_L1_FAULT = 2,
    S2S_HOST_FAULT = 3,
    S2S_MMIO = 4,
    S2S_RETRY = 5,
    S2S_NO_MEMORY = 6,
    S2S_MISS = 7 /* from translate() only */
};

enum { /* s2s_options_t.teardown, tlbi, attributes */
    S2S_TEARDOWN_REVERSE_MAP = 0,
    S2S_TEARDOWN_INTERVAL_MAP = 1,
    S2S_TEARDOWN_BLOW_AWAY = 2,
    S2S_TEARDOWN_BLOW_AWAY_LEAN = 3,
    S2S_TLBI_EXACT = 0,
    S2S_TLBI_KVM72 = 1,
    S2S_ATTRIBUTES_ARCHITECTURAL = 0,
    S2S_ATTRIBUTES_KVM72 = 1
};

enum { /* MemAttr[3:0] of a host mapping: 0 to 15 as they are, or by name, whose code depends on FEAT_S2FWB */
    S2S_DEVICE_nGnRnE = 0,
    S2S_DEVICE_nGnRE = 1,
    S2S_DEVICE_nGRE = 2,
    S2S_DEVICE_GRE = 3,
    S2S_NORMAL_NC = 5,
    S2S_NORMAL = 16,
    S2S_NORMAL_AS_STAGE1 = 17
};

enum { /* a host block that an unmapping covers in part */
    S2S_PARTIAL_DEFAULT = 0, /* dropped under blow-away, else split */
    S2S_PARTIAL_SPLIT = 1,
    S2S_PARTIAL_DROP = 2
};

enum { /* s2s_populate_t.policy */
    S2S_POPULATE_NONE = 0,
    S2S_POPULATE_LINEAR = 1,
    S2S_POPULATE_CALLBACK = 2
};

enum { /* s2s_hw_tlbi_t.op */
    S2S_HW_VMALLS12 = 0,
    S2S_HW_IPA = 1,
    S2S_HW_VA = 2,
    S2S_HW_ASID = 3,
    S2S_HW_VMALL = 4,
    S2S_HW_ALL = 5,
    S2S_HW_VAA = 6
};

#define S2S_READONLY 1u            /* flag of a region: L1 may not write it */
#define S2S_DEFAULT UINT64_MAX     /* s2s_options_t.table_base: chosen by the engine */
#define S2S_HCR_VM ((uint64_t)1)   /* bits of HCR_EL2 */
#define S2S_HCR_PTW ((uint64_t)1 << 2)
#define S2S_HCR_DC ((uint64_t)1 << 12)
#define S2S_HCR_CD ((uint64_t)1 << 32)
#define S2S_HCR_FWB ((uint64_t)1 << 46)

/* --- structs that start with their size ------------------------------------------------------------------------ */

/* What L1 is shown of the architecture; features_init() fills in the defaults. Flags are 0 or 1. */
typedef struct s2s_features {
    uint32_t size;
    uint8_t pa_bits;           /* 32, 36, 40, 42, 44, 48 or 52 */
    uint8_t granules;          /* bit 0: 4 KiB, bit 1: 16 KiB, bit 2: 64 KiB; 0: all that the host granule allows */
    uint8_t host_granule_bits; /* 12, 14 or 16 */
    uint8_t vmid_bits;         /* 8 or 16 */
    uint8_t hafdbs;            /* 0 none, 1 access flag, 2 dirty state too */
    uint8_t ttl;
    uint8_t range;
    uint8_t xnx;
    uint8_t fwb;
    uint8_t lpa2;
    uint8_t lpa;
    uint8_t ttst;
    uint8_t tlbios;
    uint8_t xs;
    uint8_t bbm;
    uint8_t s2pie;
} s2s_features_t;

/* What create() makes; options_init() fills in the defaults. */
typedef struct s2s_options {
    uint32_t size;
    uint32_t vcpus;
    uint32_t contexts; /* of the pool; 0: two per vCPU */
    uint8_t teardown;
    uint8_t tlbi;
    uint8_t attributes;
    uint8_t track_tlbis;            /* keep the queue of owed TLB maintenance */
    uint64_t max_table_bytes;       /* of tables, links and heads; 0: no bound */
    uint64_t table_base;            /* simulated PA of the tables, or S2S_DEFAULT */
    const s2s_features_t *features; /* NULL: the defaults */
} s2s_options_t;

/* L1's registers when it entered L2, or when it issued a TLBI. */
typedef struct s2s_registers {
    uint32_t size;
    uint32_t big_endian; /* SCTLR_EL2.EE */
    uint64_t vttbr;
    uint64_t vtcr;
    uint64_t hcr;
    uint64_t s2pir;
} s2s_registers_t;

/* A host block: the aligned block of ``block`` bytes around the cIPA in question is at ``pa``. */
typedef struct s2s_mapping {
    uint32_t size;
    uint8_t perm;
    uint8_t memattr;
    uint8_t reserved[2];
    uint64_t pa;
    uint64_t block;
} s2s_mapping_t;

/* A host fault: fill in ``mapping`` (preset to one page, rwx, normal) and return 1; 0 leaves it an S2S_HOST_FAULT; less
 * than 0 stops the call with S2S_E_CALLBACK. The engine may be called from here; the fault then starts over. */
typedef int (*s2s_populate_fn)(void *opaque, uint64_t cipa, uint32_t access, s2s_mapping_t *mapping);

/* What happens on a host fault. */
typedef struct s2s_populate {
    uint32_t size;
    uint32_t policy;    /* S2S_POPULATE_… */
    int64_t offset;     /* linear: pa = cipa + offset, over the regions, */
    uint64_t max_block; /* in blocks of at most so many bytes; 0: 2 MiB */
    uint32_t fresh;     /* linear: a new PA each time instead, so that a stale leaf shows */
    uint32_t reserved;
    s2s_populate_fn callback;
    void *opaque;
} s2s_populate_t;

/* Descriptors of a region whose memory is the embedder's. ``cipa`` is 8-byte aligned; words are what a little-endian
 * 64-bit load of that address gives. Called while a fault or a walk is served, any number of times for the same word;
 * an answer is used only if no TLBI and no change of the regions came after the question. */
enum { S2S_CAS_DONE = 0, S2S_CAS_LOST = 1, S2S_CAS_REFUSED = 2 };
typedef struct s2s_memory_ops {
    uint32_t size;
    uint32_t reserved;
    /* Read a word; return 0 where it cannot be read: an external abort on L1's walk. */
    int (*read)(void *opaque, uint64_t cipa, uint64_t *word);
    /* Swap a word atomically (access flag, dirty state): S2S_CAS_DONE; S2S_CAS_LOST with what is there in ``expected``;
     * S2S_CAS_REFUSED where it cannot be written. NULL: always refused. */
    int (*cas)(void *opaque, uint64_t cipa, uint64_t *expected, uint64_t desired);
} s2s_memory_ops_t;

/* Counters since create(), and what the VM holds now. */
typedef struct s2s_stats {
    uint32_t size;
    uint32_t reserved;
    uint64_t faults, hits, mapped, l1_faults, host_faults, mmio, retries, no_memory;
    uint64_t installed, removed, relaxed, replaced, narrowed, live;
    uint64_t invalidations, kernel_steps, unknown_unmaps, contexts_recycled, evictions;
    uint64_t host_leaves, table_bytes, link_bytes, rmap_bytes;
    uint64_t owed_tlbis; /* rows that take_tlbis() has not taken yet */
} s2s_stats_t;

/* --- rows: these never change within a major version ----------------------------------------------------------- */

/* The answer to a fault: a row of the Python API's FAULT_DTYPE. */
typedef struct s2s_fault {
    uint8_t kind;
    uint8_t fsc;   /* of S2S_L1_FAULT: for L1's ESR_EL2 */
    int8_t level;  /* of L1's leaf, or of the fault */
    uint8_t perm;  /* of the shadow entry */
    uint16_t context;
    uint64_t ipa, cipa, pa;
    uint64_t size; /* of the shadow entry */
    uint64_t hpfar;
} s2s_fault_t;

/* The outcome of a walk of L1's tables: a row of WALK_DTYPE. */
typedef struct s2s_walk {
    uint8_t status; /* 0 ok, 1 fault */
    uint8_t fsc;
    int8_t level;
    uint8_t perm;
    uint8_t memattr;
    uint8_t sh;
    uint8_t contiguous;
    uint8_t updated;
    uint64_t pa;
    uint64_t size;      /* bytes that the leaf maps */
    uint64_t desc;      /* the last descriptor read, in host byte order, */
    uint64_t desc_addr; /* and its cIPA */
} s2s_walk_t;

/* TLB maintenance that L0 owes its hardware: a row of HW_TLBI_DTYPE. */
typedef struct s2s_hw_tlbi {
    uint64_t seq;
    uint8_t op; /* S2S_HW_… */
    uint16_t host_vmid;
    uint64_t start, end;
    int8_t level; /* -2: any */
    uint16_t asid;
    uint8_t last_level;
} s2s_hw_tlbi_t;

/* What a host change did. The host page may be reused once every row of take_tlbis() with ``seq`` up to ``ticket`` has
 * been applied. */
typedef struct s2s_change {
    uint64_t leaves; /* shadow leaves dropped */
    uint64_t ticket;
} s2s_change_t;

typedef struct s2s_tlbi_result {
    uint64_t removed;  /* leaves, */
    uint64_t required; /* and those of them that the architecture names */
    uint64_t contexts; /* that the operation named */
} s2s_tlbi_result_t;

/* --- the table ------------------------------------------------------------------------------------------------- */

typedef struct s2s_api {
    uint32_t size;        /* of this table */
    uint32_t abi_version; /* major version << 16 | minor version */

    /* A status in words; and the last failure of this thread in detail, good until its next one. */
    const char *(*status_text)(int status);
    const char *(*last_error)(void);

    /* ``size``: the caller's sizeof. */
    void (*features_init)(s2s_features_t *features, size_t size);
    void (*options_init)(s2s_options_t *options, size_t size);

    /* NULL options: the defaults. destroy() releases all that the engine owns, and takes NULL. */
    int (*create)(const s2s_options_t *options, s2s_vm_t **vm);
    void (*destroy)(s2s_vm_t *vm);

    /* L1's physical memory. Bases and sizes are multiples of 4096 and below 2^52; regions do not overlap. ``host`` is
     * 8-byte aligned and stays the caller's: descriptors in it are read (and swapped, but for S2S_READONLY) until
     * remove_region() returns. That also unmaps the range, as host_unmap() does. A callback that another thread's
     * fault has called, or is about to call, may still be running then: its answer is thrown away. */
    int (*add_ram)(s2s_vm_t *vm, uint64_t cipa, uint64_t size, void *host, uint32_t flags);
    int (*add_device)(s2s_vm_t *vm, uint64_t cipa, uint64_t size);
    int (*add_callbacks)(s2s_vm_t *vm, uint64_t cipa, uint64_t size, const s2s_memory_ops_t *ops, void *opaque,
                         uint32_t flags);
    int (*remove_region)(s2s_vm_t *vm, uint64_t cipa, s2s_change_t *change);

    /* L1 entered L2 with these registers, or left it. ``context`` (may be NULL): index of the context taken. */
    int (*load)(s2s_vm_t *vm, uint32_t vcpu, const s2s_registers_t *registers, uint32_t *context);
    int (*put)(s2s_vm_t *vm, uint32_t vcpu);

    /* Serve a fault of L2; what the hardware would find in the shadow; L1's translation alone. ``update``: write the
     * access flag and dirty state that L1's configuration asks for. */
    int (*fault)(s2s_vm_t *vm, uint32_t vcpu, uint64_t ipa, uint32_t access, s2s_fault_t *out);
    int (*translate)(s2s_vm_t *vm, uint32_t vcpu, uint64_t ipa, uint32_t access, s2s_fault_t *out);
    int (*walk)(s2s_vm_t *vm, uint32_t vcpu, uint64_t ipa, uint32_t access, int update, s2s_walk_t *out);

    /* Many in order. ``access`` has one element for each ``access_stride`` 1, or one for all with 0. ``done`` (may be
     * NULL): how many rows are valid, which is less than ``n`` only if a status is returned. */
    int (*fault_many)(s2s_vm_t *vm, uint32_t vcpu, const uint64_t *ipas, const uint8_t *access, size_t access_stride,
                      s2s_fault_t *out, size_t n, size_t *done);
    int (*translate_many)(s2s_vm_t *vm, uint32_t vcpu, const uint64_t *ipas, const uint8_t *access,
                          size_t access_stride, s2s_fault_t *out, size_t n);

    /* L1 issued a TLBI: ``insn`` is the instruction word (its Rt does not count), ``xt`` the operand. NULL registers:
     * what ``vcpu`` loaded last. ``result`` may be NULL. */
    int (*tlbi)(s2s_vm_t *vm, uint32_t vcpu, uint32_t insn, uint64_t xt, const s2s_registers_t *registers,
                s2s_tlbi_result_t *result);

    /* The host's stage 2; bounds are multiples of the host page. ``change`` may be NULL. */
    int (*host_map)(s2s_vm_t *vm, uint64_t cipa, uint64_t pa, uint64_t size, uint32_t perm, uint32_t memattr,
                    s2s_change_t *change);
    int (*host_unmap)(s2s_vm_t *vm, uint64_t start, uint64_t end, uint32_t partial, s2s_change_t *change);
    int (*host_protect)(s2s_vm_t *vm, uint64_t start, uint64_t end, uint32_t perm, s2s_change_t *change);
    int (*set_populate)(s2s_vm_t *vm, const s2s_populate_t *populate);

    /* Dirty logging and aging. ``bitmap``: ``bytes`` of it, at least one bit for each host page of [start, end), bit 0
     * first; all of it is written. */
    int (*log_dirty)(s2s_vm_t *vm, uint64_t start, uint64_t end, int on, s2s_change_t *change);
    int (*dirty_log)(s2s_vm_t *vm, uint64_t start, uint64_t end, uint8_t *bitmap, size_t bytes);
    int (*age)(s2s_vm_t *vm, uint64_t start, uint64_t end, uint8_t *bitmap, size_t bytes);
    int (*test_young)(s2s_vm_t *vm, uint64_t start, uint64_t end, uint8_t *bitmap, size_t bytes);

    /* Take up to ``limit`` rows of TLB maintenance that L0 owes its hardware, oldest first. A queue that nobody drains
     * collapses to one S2S_HW_VMALLS12 per context. */
    int (*take_tlbis)(s2s_vm_t *vm, s2s_hw_tlbi_t *rows, size_t limit, size_t *taken);

    /* ``stats->size`` is set by the caller. */
    int (*stats)(s2s_vm_t *vm, s2s_stats_t *stats);
    /* Verify every invariant by brute force: for tests. */
    int (*check)(s2s_vm_t *vm);
} s2s_api_t;

/* --- layout ---------------------------------------------------------------------------------------------------- */

S2S_STATIC_ASSERT(sizeof(s2s_features_t) == 20, "s2s_features_t");
S2S_STATIC_ASSERT(offsetof(s2s_options_t, max_table_bytes) == 16, "s2s_options_t");
S2S_STATIC_ASSERT(offsetof(s2s_options_t, features) == 32, "s2s_options_t");
S2S_STATIC_ASSERT(sizeof(s2s_registers_t) == 40, "s2s_registers_t");
S2S_STATIC_ASSERT(sizeof(s2s_mapping_t) == 24, "s2s_mapping_t");
S2S_STATIC_ASSERT(offsetof(s2s_populate_t, callback) == 32, "s2s_populate_t");
S2S_STATIC_ASSERT(offsetof(s2s_memory_ops_t, read) == 8, "s2s_memory_ops_t");
S2S_STATIC_ASSERT(sizeof(s2s_stats_t) == 200, "s2s_stats_t");
S2S_STATIC_ASSERT(sizeof(s2s_fault_t) == 48 && offsetof(s2s_fault_t, ipa) == 8, "s2s_fault_t");
S2S_STATIC_ASSERT(sizeof(s2s_walk_t) == 40 && offsetof(s2s_walk_t, pa) == 8, "s2s_walk_t");
S2S_STATIC_ASSERT(sizeof(s2s_hw_tlbi_t) == 40 && offsetof(s2s_hw_tlbi_t, start) == 16, "s2s_hw_tlbi_t");
S2S_STATIC_ASSERT(sizeof(s2s_change_t) == 16, "s2s_change_t");
S2S_STATIC_ASSERT(sizeof(s2s_tlbi_result_t) == 24, "s2s_tlbi_result_t");
S2S_STATIC_ASSERT(offsetof(s2s_api_t, status_text) == 8, "s2s_api_t");
S2S_STATIC_ASSERT(sizeof(s2s_api_t) == 8 + 29 * sizeof(void (*)(void)), "s2s_api_t");

/* --- with Python ----------------------------------------------------------------------------------------------- */

#ifdef Py_PYTHON_H /* where Python.h was included first; both need the GIL */

/* The table, or NULL with a Python exception set: ImportError for an ABI that this header does not know. */
static inline const s2s_api_t *s2s_import(void)
{
    const s2s_api_t *api = (const s2s_api_t *)PyCapsule_Import(S2SHADOW_CAPSULE, 0);
    if (api == NULL)
        return NULL;
    if (api->abi_version >> 16 != S2SHADOW_ABI_MAJOR || api->abi_version < S2SHADOW_ABI_VERSION) {
        PyErr_Format(PyExc_ImportError, "s2shadow has C ABI %d.%d, this was compiled for %d.%d",
                     (int)(api->abi_version >> 16), (int)(api->abi_version & 0xFFFF), S2SHADOW_ABI_MAJOR,
                     S2SHADOW_ABI_MINOR);
        return NULL;
    }
    return api;
}

/* The handle of a NestedVM, or NULL with a Python exception set. It is good as long as the NestedVM lives: keep a
 * reference to that. destroy() must not be called on it. Its memory and its populate policy stay Python's: calls that
 * would change them return S2S_E_STATE, and where populate is a Python callable, a fault that would ask it is an
 * S2S_HOST_FAULT. */
static inline s2s_vm_t *s2s_from_python(PyObject *nested_vm)
{
    s2s_vm_t *vm = NULL;
    PyObject *capsule = PyObject_GetAttrString(nested_vm, "_c_handle");
    if (capsule != NULL) {
        vm = (s2s_vm_t *)PyCapsule_GetPointer(capsule, S2SHADOW_VM_CAPSULE);
        Py_DECREF(capsule);
    }
    return vm;
}

#endif

#ifdef __cplusplus
}
#endif
#endif
