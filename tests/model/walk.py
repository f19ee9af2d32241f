"""One stage-2 translation (VMSAv8-64, 64-bit descriptors), each check in the order the architecture gives."""

from dataclasses import dataclass, field
from typing import NamedTuple

from .memory import swap64

READ, WRITE, EXEC, EL0, PTW, EXEC_EL0 = 1, 2, 4, 8, 16, 32
ALL = READ | WRITE | EXEC | EXEC_EL0
VM, HCR_PTW, DC, CD, FWB = 1 << 0, 1 << 2, 1 << 12, 1 << 32, 1 << 46

KILO4, KILO16, KILO64 = 1 << 12, 1 << 14, 1 << 16
OUTPUT_BITS = (32, 36, 40, 42, 44, 48, 52, 52)
GRANULE_OF_TG0 = {0: KILO4, 1: KILO64, 2: KILO16}
CONTIGUOUS_BITS = {
    KILO4: {3: 4, 2: 4, 1: 4},
    KILO16: {3: 7, 2: 5},
    KILO64: {3: 5, 2: 5},
}
START_LEVEL = {  # (granule, SL2, SL0)
    (KILO4, 0, 0): 2, (KILO4, 0, 1): 1, (KILO4, 0, 2): 0, (KILO4, 0, 3): 3, (KILO4, 1, 0): -1,
    (KILO16, 0, 0): 3, (KILO16, 0, 1): 2, (KILO16, 0, 2): 1, (KILO16, 0, 3): 0,
    (KILO64, 0, 0): 3, (KILO64, 0, 1): 2, (KILO64, 0, 2): 1,
}  # fmt: skip
BASE_PERMISSIONS = {  # FEAT_S2PIE; the values left out give nothing
    2: READ, 3: READ, 6: READ, 7: READ, 4: WRITE, 8: READ, 9: READ | EXEC_EL0, 10: READ | EXEC,
    11: READ | EXEC | EXEC_EL0, 12: READ | WRITE, 13: READ | WRITE | EXEC_EL0, 14: READ | WRITE | EXEC, 15: ALL,
}  # fmt: skip
MMU_MAY_WRITE = {2, 3, 6, 7}  # the "MRO" values: read-only but for stage-1 walks
FAULT_TEXT = {
    "translation": "translation fault",
    "addrsize": "address size fault",
    "access": "access flag fault",
    "permission": "permission fault",
    "walk-abort": "external abort on table walk",
}


@dataclass(frozen=True)
class Features:
    pa_bits: int = 48
    granules: tuple = (KILO4, KILO16, KILO64)
    xnx: bool = True
    fwb: bool = True
    lpa2: bool = False
    lpa: bool = False
    ttst: bool = False
    hafdbs: int = 1
    vmid_bits: int = 16
    bbm: bool = False
    host_granule: int = KILO4
    ttl: bool = True
    range: bool = True
    tlbios: bool = True
    xs: bool = True
    s2pie: bool = False


def fault_code(kind, level):
    """The six bits that ESR_ELx holds for this fault."""
    if level == -1:
        return {"addrsize": 0x29, "translation": 0x2B, "walk-abort": 0x13}[kind]
    return {"addrsize": 0, "translation": 4, "access": 8, "permission": 12, "walk-abort": 20}[kind] + level


def bits(word, high, low):
    return word >> low & ((1 << (high - low + 1)) - 1)


@dataclass
class Config:
    """VTTBR_EL2, VTCR_EL2 and the rest that a walk reads, decoded."""

    vttbr: int
    vtcr: int
    features: Features = field(default_factory=Features)
    hcr: int = VM
    big_endian: bool = False
    s2pir: int = 0

    def __post_init__(self):
        vtcr, feat = self.vtcr, self.features
        self.granule = GRANULE_OF_TG0.get(bits(vtcr, 15, 14))
        if self.granule not in feat.granules:
            self.granule = min(feat.granules)
        self.page_bits = self.granule.bit_length() - 1
        self.stride = self.page_bits - 3
        self.ds = bool(bits(vtcr, 32, 32)) and feat.lpa2 and self.granule != KILO64
        self.ia_bits = 64 - bits(vtcr, 5, 0)
        self.ps = min(bits(vtcr, 18, 16), 6)
        self.oa_bits = min(OUTPUT_BITS[self.ps], self.output_cap())
        self.ha = bool(bits(vtcr, 21, 21)) and feat.hafdbs >= 1
        self.hd = self.ha and bool(bits(vtcr, 22, 22)) and feat.hafdbs >= 2
        self.s2pie = bool(bits(vtcr, 36, 36)) and feat.s2pie
        self.fwb = bool(self.hcr & FWB) and feat.fwb
        self.enabled = bool(self.hcr & (VM | DC))
        self.implied_sh = bits(vtcr, 13, 12) if self.ds else None
        wide = feat.vmid_bits == 16 and bits(vtcr, 19, 19)
        self.vmid = bits(self.vttbr, 63 if wide else 55, 48)
        sl2 = bits(vtcr, 33, 33) if self.ds and self.granule == KILO4 else 0
        self.start_level = START_LEVEL.get((self.granule, sl2, bits(vtcr, 7, 6)))
        self.fault = self.find_fault()

    def output_cap(self):
        feat = self.features
        small = not feat.lpa or (self.granule != KILO64 and not feat.lpa2)
        return min(48 if small else 52, feat.pa_bits)

    def shift(self, level):
        """log2 of what one entry at this level spans."""
        return self.page_bits + self.stride * (3 - level)

    def size_out_of_range(self):
        feat = self.features
        largest_t0sz = 39 if not feat.ttst else 47 if self.granule == KILO64 else 48
        limit = 48 if feat.lpa and self.granule != KILO64 and not self.ds else 52
        return not 64 - largest_t0sz <= self.ia_bits <= min(limit, feat.pa_bits)

    def start_level_bad(self):
        feat, start = self.features, self.start_level
        if start is None:
            return True
        missing = {
            (KILO4, 3): not feat.ttst,
            (KILO4, 0): feat.pa_bits < 44,
            (KILO4, -1): not self.ds,
            (KILO16, 1): feat.pa_bits < 42,
            (KILO16, 0): not self.ds,
            (KILO64, 1): feat.pa_bits < 44,
        }
        if missing.get((self.granule, start)):
            return True
        return not self.shift(start) + 1 <= self.ia_bits <= self.shift(start) + self.stride + 4

    def find_fault(self):
        """None, or (kind, level) that every walk under these registers ends in; also sets base and tables."""
        self.base, self.tables = 0, 0
        if not self.enabled:
            return None
        if self.size_out_of_range() or self.start_level_bad():
            return "translation", 0
        span = self.ia_bits - self.shift(self.start_level)
        self.tables = 1 << max(0, span - self.stride)
        self.base = self.table_base(span + 3)
        if self.base >> self.oa_bits:
            return "addrsize", 0
        return None

    def table_base(self, align):
        long_form = self.ds or (self.features.lpa and self.granule == KILO64 and self.ps == 6)
        base = self.vttbr & ((1 << 48) - 2)
        if long_form:
            align = max(align, 6)
            base |= bits(self.vttbr, 5, 2) << 48
        return base >> align << align

    # descriptors

    def address(self, desc):
        """The output address bits that a table or page descriptor can hold."""
        address = desc & ((1 << 48) - 1)
        if self.ds:
            address |= bits(desc, 49, 48) << 48 | bits(desc, 9, 8) << 50
        elif self.granule == KILO64 and self.features.lpa:
            address |= bits(desc, 15, 12) << 48
        return address >> self.page_bits << self.page_bits

    def kind(self, desc, level):
        """What bits 1:0 say at this level."""
        if not desc & 1:
            return "invalid"
        if level == 3:
            return "page" if desc & 2 else "reserved"
        return "table" if desc & 2 else "block" if self.block_allowed(level) else "reserved"

    def block_allowed(self, level):
        feat = self.features
        allowed = {
            KILO4: {2: True, 1: True, 0: self.ds},
            KILO16: {2: True, 1: self.ds},
            KILO64: {2: True, 1: feat.lpa and feat.pa_bits >= 52},
        }
        return allowed[self.granule].get(level, False)

    def block_base(self, desc, level):
        """The output address bits that a leaf itself holds: those above what it spans."""
        span = self.shift(level)
        return self.address(desc) >> span << span

    def output(self, desc, level, ipa):
        """What this leaf translates the address to. A contiguous group takes its low bits from the address."""
        from_ipa = self.shift(level)
        group = CONTIGUOUS_BITS[self.granule].get(level, 0)
        if bits(desc, 52, 52) and from_ipa + group <= self.ia_bits:
            from_ipa += group
        return self.address(desc) >> from_ipa << from_ipa | ipa & ((1 << from_ipa) - 1)

    def permissions(self, desc):
        if self.s2pie:
            return BASE_PERMISSIONS.get(self.base_permission(desc), 0) & (ALL if bits(desc, 7, 7) else ~WRITE)
        executable = {0: EXEC | EXEC_EL0, 1: EXEC_EL0, 2: 0, 3: EXEC}
        xn = bits(desc, 54, 53) & (3 if self.features.xnx else 2)
        return bits(desc, 7, 6) | executable[xn]

    def base_permission(self, desc):
        """The field of S2PIR_EL2 that PIIndex, four bits of the descriptor, names."""
        index = bits(desc, 54, 53) << 2 | bits(desc, 51, 51) << 1 | bits(desc, 6, 6)
        return bits(self.s2pir, 4 * index + 3, 4 * index)

    def write_makes_dirty(self, desc, access):
        """True where a write is due to set bit 7 first, and may: the page is writable, and clean."""
        if not self.hd or not access & WRITE or bits(desc, 7, 7):
            return False
        if not self.s2pie:
            return bool(bits(desc, 51, 51))
        return bool(BASE_PERMISSIONS.get(self.base_permission(desc), 0) & WRITE) or self.mmu_writes(desc, access)

    def mmu_writes(self, desc, access):
        """A stage-1 walk may write where nobody else may."""
        return self.s2pie and bool(access & PTW) and self.base_permission(desc) in MMU_MAY_WRITE

    def is_device(self, memattr):
        return not memattr & 4 if self.fwb else not memattr & 12


class Step(NamedTuple):
    """One descriptor that a walk looked at; output is that of the table or leaf itself."""

    level: int
    table: int
    index: int
    address: int
    desc: int | None  # as a value; None: not readable
    kind: str
    output: int | None


@dataclass
class Walk:
    """What a walk found; fault is None or (kind, level)."""

    fault: tuple = None
    level: int = 0
    perm: int = 0
    memattr: int = 0
    sh: int = 0
    contiguous: int = 0
    updated: int = 0
    pa: int = 0
    size: int = 0
    desc: int = 0
    desc_addr: int = 0
    steps: tuple = ()

    @property
    def fsc(self):
        return fault_code(*self.fault) if self.fault else 0

    @property
    def text(self):
        return f"{FAULT_TEXT[self.fault[0]]}, level {self.fault[1]}" if self.fault else None


def walk(mem, cfg, ipa, access=READ, update=True):
    if not cfg.enabled:
        return walk_off(cfg, ipa)
    if ipa >> cfg.ia_bits:
        return faulted("translation", 0)
    if cfg.fault:
        return faulted(*cfg.fault)
    return descend(mem, cfg, ipa, access, update)


def walk_off(cfg, ipa):
    """Stage 2 off: the address is its own translation."""
    if ipa >> cfg.features.pa_bits:
        return faulted("addrsize", 0)
    as_stage1 = 0b0111 if cfg.fwb else 0b1111
    return Walk(level=-2, perm=ALL, memattr=as_stage1, sh=3, pa=ipa, size=1 << cfg.features.pa_bits)


def faulted(kind, level, desc=0, desc_addr=0):
    return Walk(fault=(kind, level), level=level, desc=desc, desc_addr=desc_addr)


def descend(mem, cfg, ipa, access, update):
    level = cfg.start_level
    table = cfg.base
    top = cfg.ia_bits
    desc = desc_addr = 0
    steps = []
    while True:
        index = (ipa & ((1 << top) - 1)) >> cfg.shift(level)
        addr = table + 8 * index
        raw = mem.read(addr)
        if raw is None:
            steps.append(Step(level, table, index, addr, None, "unreadable", None))
            return with_steps(faulted("walk-abort", level, desc, desc_addr), steps)
        desc, desc_addr = swap64(raw) if cfg.big_endian else raw, addr
        kind = cfg.kind(desc, level)
        if kind in ("invalid", "reserved"):
            steps.append(Step(level, table, index, addr, desc, kind, None))
            return with_steps(faulted("translation", level, desc, desc_addr), steps)
        if kind != "table":
            found = leaf(mem, cfg, ipa, access, update, level, desc, desc_addr)
            steps.append(Step(level, table, index, addr, found.desc, kind, cfg.block_base(found.desc, level)))
            return with_steps(found, steps)
        following = cfg.address(desc)
        steps.append(Step(level, table, index, addr, desc, kind, following))
        if following >> cfg.oa_bits:
            return with_steps(faulted("addrsize", level, desc, desc_addr), steps)
        table = following
        top = cfg.shift(level)
        level += 1


def with_steps(found, steps):
    found.steps = tuple(steps)
    return found


def leaf(mem, cfg, ipa, access, update, level, desc, desc_addr):
    block = not desc & 2
    if block and cfg.features.bbm and bits(desc, 16, 16):
        return faulted("translation", level, desc, desc_addr)
    if cfg.block_base(desc, level) >> cfg.oa_bits:  # a block larger than the output size is legal at 0
        return faulted("addrsize", level, desc, desc_addr)
    if not bits(desc, 10, 10) and not cfg.ha:
        return faulted("access", level, desc, desc_addr)
    found = Walk(
        level=level,
        perm=cfg.permissions(desc),
        memattr=bits(desc, 5, 2),
        sh=bits(desc, 9, 8) if cfg.implied_sh is None else cfg.implied_sh,
        contiguous=bits(desc, 52, 52),
        pa=cfg.output(desc, level, ipa),
        size=1 << cfg.shift(level),
        desc=desc,
        desc_addr=desc_addr,
    )
    if not permitted(cfg, found, access):
        found.fault = "permission", level
        return found
    return hardware_update(mem, cfg, found, access, update)


def permitted(cfg, found, access):
    dirty = bits(found.desc, 7, 7)
    granted = found.perm
    if cfg.write_makes_dirty(found.desc, access) or (dirty and cfg.mmu_writes(found.desc, access)):
        granted |= WRITE
    needed = access & (READ | WRITE)
    if access & EXEC:
        needed |= EXEC_EL0 if access & EL0 else EXEC
    if access & PTW and cfg.hcr & HCR_PTW and cfg.is_device(found.memattr):
        return False
    return granted & needed == needed


def hardware_update(mem, cfg, found, access, update):
    new = found.desc | (1 << 10 if cfg.ha else 0)
    if cfg.write_makes_dirty(found.desc, access):
        new |= 1 << 7
    if new == found.desc:
        return found
    found.updated = 1
    if update:
        if not mem.write(found.desc_addr, swap64(new) if cfg.big_endian else new):
            return faulted("walk-abort", found.level, found.desc, found.desc_addr)
        found.desc, found.perm = new, cfg.permissions(new)
    return found


def leaves(mem, cfg):
    """Every leaf that is in order: (ipa, output, size, descriptor, level, permissions, MemAttr, SH), by address."""
    if not cfg.enabled or cfg.fault:
        return []
    entries = 1 << cfg.ia_bits - cfg.shift(cfg.start_level)
    return list(leaves_below(mem, cfg, cfg.base, entries, 0, cfg.start_level))


def leaves_below(mem, cfg, table, entries, ipa, level):
    for addr in sorted(a for a in mem.words if table <= a < table + 8 * entries and mem.read(a) is not None):
        desc = swap64(mem.words[addr]) if cfg.big_endian else mem.words[addr]
        at = ipa + ((addr - table) // 8 << cfg.shift(level))
        kind = cfg.kind(desc, level)
        if kind == "table" and not cfg.address(desc) >> cfg.oa_bits:
            yield from leaves_below(mem, cfg, cfg.address(desc), cfg.granule // 8, at, level + 1)
        elif kind in ("block", "page") and not cfg.block_base(desc, level) >> cfg.oa_bits:
            if not (kind == "block" and cfg.features.bbm and bits(desc, 16, 16)):
                sh = bits(desc, 9, 8) if cfg.implied_sh is None else cfg.implied_sh
                size, perm, memattr = 1 << cfg.shift(level), cfg.permissions(desc), bits(desc, 5, 2)
                yield at, cfg.output(desc, level, at), size, desc, level, perm, memattr, sh
