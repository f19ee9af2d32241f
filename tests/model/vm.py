"""A brute-force model of NestedVM: plain dictionaries, no reverse map, every question answered by looking everywhere.

A shadow behaves as a TLB: what it holds depends on what was accessed in which order, so the model follows the same fill
rules and its results must be equal, not merely legal.
"""

from dataclasses import dataclass, field

from . import walk as arch
from .combine import STAGE2_OFF, Host, combine, leaf_sizes
from .memory import DEVICE, READ_ONLY
from .walk import ALL, CD, EL0, EXEC, EXEC_EL0, HCR_PTW, PTW, READ, WRITE, Config, walk

HIT, MAPPED, L1_FAULT, HOST_FAULT, MMIO = range(5)
EXTERNAL_ABORT = 0x10
LETTERS = {"r": READ, "w": WRITE, "x": EXEC | EXEC_EL0}


def perm_of(text):
    return sum(LETTERS[letter] for letter in text if letter != "-")


def allows(perm, access):
    needed = access & (READ | WRITE)
    if access & EXEC:
        needed |= EXEC_EL0 if access & EL0 else EXEC
    return perm & needed == needed


def overlaps(base, size, start, end):
    return base < end and start < base + size


@dataclass
class HostLeaf:
    pa: int
    size: int
    perm: int
    memattr: int
    young: bool = True
    withheld: bool = False  # W is granted, but withheld so that the next write is seen

    @property
    def now(self):
        """The permissions that the table holds now."""
        return self.perm & ~WRITE if self.withheld else self.perm

    def part(self, offset, size):
        return HostLeaf(self.pa + offset, size, self.perm, self.memattr, self.young, self.withheld)


@dataclass
class ShadowLeaf:
    cipa: int
    pa: int
    size: int
    perm: int
    memattr: int
    sh: int
    guest_level: int
    guest_device: bool  # as L1 says, whatever the leaf itself is
    young: bool = True

    def translation(self):
        """All but permissions and use."""
        return self.cipa, self.pa, self.size, self.memattr, self.sh, self.guest_level, self.guest_device

    def answers(self, cfg, access):
        """Whether the access is allowed without asking L1: a stage-1 walk of Device memory may have to be refused."""
        walks_device = access & PTW and cfg.hcr & HCR_PTW and self.guest_device
        return allows(self.perm, access) and not walks_device


@dataclass
class Context:
    key: tuple = None
    vmid: int = 0
    enabled: bool = False
    granule: int = 0
    leaves: dict = field(default_factory=dict)  # ipa: ShadowLeaf
    refs: int = 0
    used: int = 0

    def find(self, ipa, sizes):
        """(ipa of the leaf, leaf) that covers the address, or (None, None)."""
        for size in sizes:
            base = ipa & -size
            leaf = self.leaves.get(base)
            if leaf and leaf.size == size:
                return base, leaf
        return None, None


@dataclass
class Vcpu:
    cfg: Config = None
    index: int = None


@dataclass
class Fault:
    kind: int
    ipa: int
    context: int
    fsc: int = 0
    level: int = 0
    perm: int = 0
    cipa: int = 0
    pa: int = 0
    size: int = 0

    @property
    def hpfar(self):
        return (self.ipa >> 12 << 4) & 0xFFFF_FFFF_FFF0


@dataclass
class Linear:
    offset: int = 0
    max_block: int = 2 << 20


class VM:
    context_type = Context

    def __init__(self, mem, features, vcpus=1, contexts=None, attributes="architectural"):
        self.mem, self.features, self.attributes = mem, features, attributes
        self.page = features.host_granule
        self.sizes = leaf_sizes(features)
        self.vcpus = [Vcpu() for _ in range(vcpus)]
        self.contexts = [self.context_type() for _ in range(contexts or 2 * vcpus)]
        self.host = {}  # cipa: HostLeaf
        self.logged = []  # disjoint (start, end)
        self.dirty = set()  # pages by address
        self.populate = None
        self.clock = 0

    # contexts

    def load(self, n, vttbr, vtcr, hcr=arch.VM, big_endian=False, s2pir=0):
        vcpu = self.vcpus[n]
        cfg = Config(vttbr, vtcr, self.features, hcr, big_endian, s2pir)
        self.put(n)
        vcpu.cfg, vcpu.index = cfg, self.acquire(cfg)
        ctx = self.contexts[vcpu.index]
        ctx.refs += 1
        ctx.used = self.tick()
        return vcpu.index

    def put(self, n):
        vcpu = self.vcpus[n]
        if vcpu.index is not None:
            ctx = self.contexts[vcpu.index]
            ctx.refs -= 1
            ctx.used = self.tick()
        vcpu.index = vcpu.cfg = None

    def tick(self):
        self.clock += 1
        return self.clock

    def acquire(self, cfg):
        key = context_key(cfg)
        for index, ctx in enumerate(self.contexts):
            if ctx.key == key:
                return index
        free = [(ctx.used, index) for index, ctx in enumerate(self.contexts) if not ctx.refs]
        index = min(free)[1]  # never used: 0
        self.contexts[index] = self.context_type(key, cfg.vmid, cfg.enabled, cfg.granule)
        return index

    # faults

    def fault(self, n, ipa, access):
        vcpu = self.vcpus[n]
        ctx = self.contexts[vcpu.index]
        base, leaf = ctx.find(ipa, self.sizes)
        if leaf and leaf.answers(vcpu.cfg, access):
            return self.hit(vcpu, ipa, base, leaf)
        guest = self.walk_guest(vcpu.cfg, ipa, access)
        if guest.fault:
            kind = L1_FAULT if vcpu.cfg.enabled else HOST_FAULT
            return Fault(kind, ipa, vcpu.index, fsc=guest.fsc, level=guest.level)
        return self.fault_host(vcpu, ipa, access, guest)

    def hit(self, vcpu, ipa, base, leaf):
        cipa = leaf.cipa + (ipa - base)
        if not leaf.young:
            leaf.young = self.host_leaf(cipa)[1].young = True
        return self.answer(HIT, vcpu, ipa, cipa, leaf)

    def answer(self, kind, vcpu, ipa, cipa, leaf):
        pa = leaf.pa + (cipa - leaf.cipa)
        return Fault(kind, ipa, vcpu.index, 0, leaf.guest_level, leaf.perm, cipa, pa, leaf.size)

    def walk_guest(self, cfg, ipa, access):
        """L1's translation; a descriptor that the walk updates is a write to L1's memory like any other."""
        self.mem.writes.clear()
        found = walk(self.mem, cfg, ipa, access)
        for address, _ in self.mem.writes:
            self.mark(address)
        return found

    def fault_host(self, vcpu, ipa, access, guest):
        cipa = guest.pa
        known = {"ipa": ipa, "context": vcpu.index, "level": guest.level, "cipa": cipa}
        region = None if cipa >> self.features.pa_bits else self.mem.region(cipa)
        if region is None or (region[2] == READ_ONLY and access & WRITE):
            return Fault(MMIO, fsc=EXTERNAL_ABORT, **known)
        if access & WRITE and not guest.perm & WRITE:  # only the MMU may write: no leaf of the shadow's can say that
            return Fault(MMIO, fsc=EXTERNAL_ABORT, **known)
        host = self.host_leaf(cipa)[1]
        if host is None and region[2] == DEVICE:
            return Fault(MMIO, fsc=EXTERNAL_ABORT, **known)
        host = host or self.populated(cipa)
        if host is None or not allows(host.perm, access):
            return Fault(HOST_FAULT, **known)
        return self.install(vcpu, ipa, access, guest)

    def populated(self, cipa):
        """What the linear policy maps here: the largest block that fits into region and free space."""
        if self.populate is None:
            return None
        start, end, kind = self.mem.region(cipa)
        offset = self.populate.offset
        for size in reversed(self.sizes):
            base = cipa & -size
            fits = start <= base and base + size <= end and size <= max(self.populate.max_block, self.page)
            if fits and offset % size == 0 and not self.host_overlapping(base, base + size):
                perm = ALL & ~WRITE if kind == READ_ONLY else ALL
                self.put_host(base, HostLeaf(base + offset, size, perm, 0b0110 if self.features.fwb else 0b1111))
                return self.host[base]
        return None

    def install(self, vcpu, ipa, access, guest):
        cipa = guest.pa
        if access & WRITE:
            self.grant_write(cipa)
        base, host = self.host_leaf(cipa)
        host.young = True
        under = self.within_region(cipa, Host(host.pa, host.size, host.now, host.memattr))
        if self.mem.region(cipa)[2] == READ_ONLY:
            under.perm &= ~WRITE
        cfg = vcpu.cfg
        made = combine(
            guest, under, self.features, cfg.fwb, self.features.fwb, self.attributes, bool(cfg.hcr & CD)
        )  # fmt: skip
        start = cipa & -made.size
        pa = host.pa + (start - base)
        device = cfg.enabled and cfg.is_device(guest.memattr)
        new = ShadowLeaf(start, pa, made.size, made.perm, made.memattr, made.sh, made.guest_level, device)
        ctx = self.contexts[vcpu.index]
        if self.is_logged(cipa, cipa + 1) and not access & WRITE:
            new.perm &= ~(WRITE & ~earned(ctx.leaves.get(ipa & -made.size), new))
        self.put_shadow(ctx, ipa & -made.size, new)
        return self.answer(MAPPED, vcpu, ipa, cipa, new)

    def within_region(self, cipa, host):
        """The part of the host's leaf that a shadow may use: none of it outside the region of the address."""
        start, end, _ = self.mem.region(cipa)
        for size in (s for s in reversed(self.sizes) if s <= host.size):
            base = cipa & -size
            if size == self.page or (start <= base and base + size <= end):
                return Host(host.pa + (base - (cipa & -host.size)), size, host.perm, host.memattr)

    def put_shadow(self, ctx, ipa, new):
        """Whatever is in the way goes: a leaf never mixes two descriptors of L1's."""
        for base in [b for b, leaf in ctx.leaves.items() if overlaps(b, leaf.size, ipa, ipa + new.size)]:
            self.remove(ctx, base)
        ctx.leaves[ipa] = new

    def remove(self, ctx, ipa):
        del ctx.leaves[ipa]

    def translate(self, n, ipa, access):
        """(ipa of the leaf, leaf) if the shadow alone can answer, else (None, None)."""
        vcpu = self.vcpus[n]
        base, leaf = self.contexts[vcpu.index].find(ipa, self.sizes)
        if leaf is None or not leaf.young or not leaf.answers(vcpu.cfg, access):
            return None, None
        return base, leaf

    # the host's table

    def host_leaf(self, cipa):
        for size in self.sizes:
            base = cipa & -size
            leaf = self.host.get(base)
            if leaf and leaf.size == size:
                return base, leaf
        return None, None

    def host_overlapping(self, start, end):
        found = [b for b, leaf in self.host.items() if b < end and start < b + leaf.size]
        return [(b, self.host[b]) for b in sorted(found)]

    def put_host(self, base, leaf):
        leaf.withheld = bool(leaf.perm & WRITE) and self.is_logged(base, base + leaf.size)
        self.host[base] = leaf

    def split(self, base):
        """One host leaf becomes leaves of the next smaller size."""
        leaf = self.host.pop(base)
        size = max(s for s in self.sizes if s < leaf.size)
        for offset in range(0, leaf.size, size):
            self.host[base + offset] = leaf.part(offset, size)

    def split_around(self, start, end):
        """Splits until no host leaf lies partly inside the range."""
        for base, leaf in self.host_overlapping(start, end):
            if base < start or base + leaf.size > end:
                self.split(base)
                self.split_around(max(base, start), min(base + leaf.size, end))

    def host_map(self, cipa, pa, size, perm="rwx", memattr=0b0110):
        bits, end = perm_of(perm), cipa + size
        if self.is_mapped_so(cipa, end, pa, bits, memattr):
            return 0
        self.split_around(cipa, end)
        for base, _ in self.host_overlapping(cipa, end):
            del self.host[base]
        at = cipa
        while at < end:
            fits = max(s for s in self.sizes if not (at | (pa + at - cipa)) % s and at + s <= end)
            self.put_host(at, HostLeaf(pa + at - cipa, fits, bits, memattr))
            at += fits
        return self.drop(cipa, end) + self.settle()

    def is_mapped_so(self, start, end, pa, perm, memattr):
        """True if every page of the range has this very translation already."""
        at = start
        while at < end:
            base, leaf = self.host_leaf(at)
            if leaf is None or (leaf.pa + (at - base), leaf.perm, leaf.memattr) != (pa + (at - start), perm, memattr):
                return False
            at = base + leaf.size
        return True

    def unmap(self, start, end, partial="split"):
        if partial == "split":
            self.split_around(start, end)
        gone = self.host_overlapping(start, end)
        dropped = 0
        for base, leaf in gone:
            del self.host[base]
            dropped += self.drop(base, base + leaf.size)
        return dropped + self.settle()

    def protect(self, start, end, perm):
        """Leaves that grant something else than this are cut to the range and changed."""
        bits = perm_of(perm)
        for base, leaf in self.host_overlapping(start, end):
            if leaf.perm != bits:
                self.split_around(max(base, start), min(base + leaf.size, end))
        for base, leaf in self.host_overlapping(start, end):
            if leaf.perm != bits:
                had_write = leaf.now & WRITE
                leaf.perm = bits
                leaf.withheld = bool(bits & WRITE and not had_write and self.is_logged(base, base + leaf.size))
        return self.settle()

    # dirty logging

    def is_logged(self, start, end):
        return any(a < end and start < b for a, b in self.logged)

    def mark(self, address):
        if self.is_logged(address, address + 1):
            self.dirty.add(address & -self.page)

    def grant_write(self, cipa):
        """A write was seen: its page is dirty and writable now. A block that is logged, even partly, is split."""
        base, leaf = self.host_leaf(cipa)
        if self.is_logged(base, base + leaf.size):
            while leaf.size > self.page:
                self.split(base)
                base, leaf = self.host_leaf(cipa)
            self.settle()
        leaf.withheld = False
        self.mark(cipa)

    def log_dirty(self, start, end, on=True):
        left = [(a, min(b, start)) for a, b in self.logged] + [(max(a, end), b) for a, b in self.logged]
        self.logged = [(a, b) for a, b in left if a < b] + [(start, end)] * on
        if not on:
            self.dirty -= {page for page in self.dirty if start <= page < end}
            return 0
        for _, leaf in self.host_overlapping(start, end):
            leaf.withheld = bool(leaf.perm & WRITE)
        return self.settle()

    def dirty_log(self, start, end):
        """The dirty pages: reported, cleared, protected again."""
        found = {page for page in self.dirty if start <= page < end}
        for page in found:
            self.dirty.discard(page)
            leaf = self.host_leaf(page)[1]
            if leaf:
                leaf.withheld = bool(leaf.perm & WRITE)
        self.settle()
        return found

    # aging

    def test_young(self, start, end):
        return self.young_pages(start, end, clear=False)

    def age(self, start, end):
        return self.young_pages(start, end, clear=True)

    def young_pages(self, start, end, clear):
        """A young leaf, the host's or a shadow's, makes all its pages young."""
        found = set()
        for base, leaf in self.all_leaves():
            if overlaps(base, leaf.size, start, end):
                if leaf.young:
                    found |= set(range(max(base, start), min(base + leaf.size, end), self.page))
                if clear:
                    leaf.young = False
        return found

    def all_leaves(self):
        """(cipa, leaf) of the host and of every shadow."""
        yield from list(self.host.items())
        for ctx in self.contexts:
            for leaf in ctx.leaves.values():
                yield leaf.cipa, leaf

    # dropping shadows

    def drop(self, start, end):
        """Drops every shadow leaf over this part of L1's memory; returns how many."""
        return self.drop_where(lambda leaf: overlaps(leaf.cipa, leaf.size, start, end))

    def drop_where(self, condition):
        dropped = 0
        for ctx in self.contexts:
            gone = [ipa for ipa, leaf in ctx.leaves.items() if condition(leaf)]
            for ipa in gone:
                self.remove(ctx, ipa)
            dropped += len(gone)
        return dropped

    def settle(self):
        """No leaf may be larger than the host's below it, or allow more. Returns how many had to go."""

        def unbacked(leaf):
            host = self.host_leaf(leaf.cipa)[1]
            return host is None or host.size < leaf.size

        dropped = self.drop_where(unbacked)
        for ctx in self.contexts:
            for leaf in ctx.leaves.values():
                leaf.perm &= self.host_leaf(leaf.cipa)[1].now
        return dropped

    # TLB maintenance by L1

    def tlbi_all(self):
        return self.drop_where(lambda leaf: True)

    def tlbi_vmid(self, vttbr, vtcr):
        return self.tlbi(vttbr, vtcr, lambda ctx, ipa, leaf: True)

    def tlbi_ipa(self, vttbr, vtcr, address):
        """Drops what L1 could name by this address: all of the leaf of L1's that the address lies in."""

        def named(ctx, ipa, leaf):
            size = guest_leaf_size(ctx.granule, leaf.guest_level)
            return ctx.enabled and address & -size == ipa & -size

        return self.tlbi(vttbr, vtcr, named)

    def tlbi(self, vttbr, vtcr, condition):
        removed = 0
        for ctx in self.of_vmid(vttbr, vtcr):
            gone = [ipa for ipa, leaf in ctx.leaves.items() if condition(ctx, ipa, leaf)]
            for ipa in gone:
                self.remove(ctx, ipa)
            removed += len(gone)
        return removed

    def of_vmid(self, vttbr, vtcr):
        vmid = Config(vttbr, vtcr, self.features).vmid
        return [ctx for ctx in self.contexts if ctx.key is not None and ctx.vmid == vmid]

    # questions

    def reverse(self, cipa):
        """Every (context, ipa, size) that maps this page of L1's memory."""
        page = cipa & -self.page
        return sorted(
            (index, ipa, leaf.size)
            for index, ctx in enumerate(self.contexts)
            for ipa, leaf in ctx.leaves.items()
            if overlaps(leaf.cipa, leaf.size, page, page + self.page)
        )


def earned(old, new):
    """What a leaf in place already allows, if the new one is the same translation and takes nothing from it."""
    if old and old.translation() == new.translation() and not old.perm & ~new.perm:
        return old.perm
    return 0


def context_key(cfg):
    """What makes two loads the same context."""
    if not cfg.enabled:
        return ("off", cfg.vmid)
    shape = (cfg.granule, cfg.start_level, cfg.ia_bits, cfg.ps, cfg.ha, cfg.hd, cfg.ds, cfg.implied_sh, cfg.s2pie)
    shape += (cfg.s2pir,) if cfg.s2pie else ()
    base = cfg.base if cfg.fault is None else cfg.vttbr & 0xFFFF_FFFF_FFFE
    return ("on", cfg.vmid, base, shape, cfg.big_endian, cfg.fwb, bool(cfg.hcr & CD))


def guest_leaf_size(granule, level):
    bits = granule.bit_length() - 1
    return 1 << bits + (bits - 3) * (3 - level)


__all__ = ["HIT", "HOST_FAULT", "L1_FAULT", "MAPPED", "MMIO", "STAGE2_OFF", "VM", "Linear"]
