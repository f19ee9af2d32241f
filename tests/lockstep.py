"""Engine and model side by side: every operation is done on both, and everything that one can see must be equal."""

import numpy as np

import rig
import s2shadow
from model.intervals import IntervalVM
from model.memory import Memory
from model.vm import VM, HostLeaf, Linear
from model.walk import Config, Features, walk
from s2shadow import HCR_FWB, HCR_VM

K, M, G = 1 << 10, 1 << 20, 1 << 30
RAM, RAM_END = 1 * G, 3 * G
TABLES, DATA = RAM, 2 * G
DATA_PAGES = 2048
ROM, DEVICE, NOWHERE = 3 * G, 4 * G, 5 * G
HOST = 1 << 40
HIGH = 0xA << 48  # where L1's memory lies if its addresses are to need 52 bits
HOST_OF_PA_BITS = {40: 1 << 39, 48: HOST, 52: 0x5 << 48 | 1 << 42}  # every bit of the address in use
HUGE, HUGE_SIZE = 8 << 40, {4 * K: 512 * G, 16 * K: 64 * G, 64 * K: 4096 * G}  # leaves of 52-bit descriptors only
HUGE_LEVEL = {4 * K: 0, 16 * K: 1, 64 * K: 1}
OTHER_S2PIR = rig.S2PIR ^ 0x4F << 56  # rwx and rwp give way to rx and x
GRANULES = [(4 * K, 4 * K), (4 * K, 16 * K), (4 * K, 64 * K), (16 * K, 64 * K)]
BASES = (0, 2 * M - 16 * K, 2 * M, 6 * M, 32 * M, 33 * M, 512 * M, 514 * M, G, G + 2 * M, 2 * G, 8 * G)
VMIDS = (1, 2, 3)
SLOTS = len(BASES)
HIGH_BASES = (*BASES[:-3], (1 << 48) + 2 * M, (1 << 51) + G, (1 << 52) - 32 * M)  # of inputs with 52 bits
ALIASES = (0, 2 * M, 32 * M, 512 * M, G, 8 * G)
ODD_TARGETS = (NOWHERE, DEVICE, ROM, ROM + M - 64 * K)
VMALLS12, IPA, ALL = 0, 1, 5
MODELS = {"interval-map": IntervalVM}


class Pair:
    def __init__(
        self, granules=GRANULES[0], vcpus=1, populate=None, fwb=True, xnx=True, ha=True, contexts=3,
        host_granule=4 * K, features=None, shapes=({}, {}), high=False, attributes="architectural",
        teardown="reverse-map", **engine,
    ):  # fmt: skip
        """`shapes`: more about each of L1's two tables, for rig.Tables; `high`: addresses of 52 bits in L1's memory."""
        self.page = host_granule
        at = HIGH if high else 0
        self.ram, self.data, self.huge = at + RAM, at + DATA, at + HUGE
        self.data_end = self.data + DATA_PAGES * self.page
        self.odd_targets = [at + target for target in ODD_TARGETS]
        self.ours, self.theirs = s2shadow.GuestMemory(), Memory()
        self.add(self.ram, RAM_END - RAM)
        self.add(at + DEVICE, 2 * M, device=True)
        self.ours.add(at + ROM, buffer=bytes(M), readonly=True)
        self.theirs.add(at + ROM, M, readonly=True)
        options = {"fwb": fwb, "xnx": xnx, "host_granule": host_granule}
        options["granules"] = tuple(g for g in (4 * K, 16 * K, 64 * K) if g >= host_granule)
        options |= features or {}
        size = {"vcpus": vcpus, "contexts": contexts, "attributes": attributes}
        engine |= {"features": s2shadow.Features(**options), "teardown": teardown}
        self.vm = s2shadow.NestedVM(self.ours, **size, **engine)
        self.model = MODELS.get(teardown, VM)(self.theirs, Features(**options), **size)
        self.pa_bits = self.model.features.pa_bits
        self.host = HOST_OF_PA_BITS[self.pa_bits]
        self.normal = 0b0110 if fwb else 0b1111
        self.vcpus = vcpus
        self.tables = [self.new_tables(n, granules[n], vtcr=ha * rig.HA | more.pop("vtcr", 0), **more)
                       for n, more in enumerate(map(dict, shapes))]  # fmt: skip
        self.bases = HIGH_BASES if any(tables.ia_bits == 52 for tables in self.tables) else BASES
        if populate:
            self.vm.host.populate = s2shadow.Linear(offset=self.host, max_block=populate)
            self.model.populate = Linear(self.host, populate)
        else:
            self.do_host_map(self.data, self.host + self.data, DATA_PAGES * self.page)
        self.do_host_map(at + ROM, self.host + at + ROM, 2 * M)
        if self.pa_bits > 40 and any(tables.wide for tables in self.tables):
            size = HUGE_SIZE[max(granules)]
            self.add(self.huge, size)
            self.do_host_map(self.huge, self.host + self.huge, max(s for s in self.model.sizes if s <= size))
        for n in range(vcpus):
            self.load(n, 1, 0)
        self.seen = self.held()

    def add(self, start, size, **kind):
        self.ours.add(start, size, **kind)
        self.theirs.add(start, size, **kind)

    def new_tables(self, n, granule, **shape):
        pool = self.ram + 256 * M * n
        return rig.Tables(self.ours.read64, self.write64, pool, granule, limit=self.pa_bits, **shape)

    def write64(self, address, word):
        """L1's software writes."""
        self.ours.write64(address, word)
        self.theirs.poke(address, word)

    # addresses

    def ipa(self, slot, offset=0):
        return self.bases[slot % SLOTS] + offset * self.page + 8 * slot

    def target(self, page):
        """Where L1's leaf points: into the data, or once in a while where there is none."""
        odd = DATA_PAGES - 1 - page
        return self.odd_targets[odd] if odd < len(self.odd_targets) else self.data + page * self.page

    def range(self, page, length):
        start = self.data + page * self.page
        return start, min(start + length * self.page, self.data_end)

    def log_range(self, page, length):
        """The longest stands for everything, L1's tables too."""
        return (self.ram, self.data_end) if length == DATA_PAGES else self.range(page, length)

    # vCPUs

    def load(self, n, vmid, table, on=True, hcr=0, s2pir=rig.S2PIR):
        """`hcr`: more bits than VM, and FWB for table 1."""
        n %= self.vcpus
        tables = self.tables[table]
        hcr |= (HCR_VM if on else 0) | (HCR_FWB if table else 0)
        more = {"hcr": hcr, "big_endian": tables.big_endian, "s2pir": s2pir}
        index = self.vm.vcpus[n].load(tables.vttbr(vmid), tables.vtcr, **more).index
        assert index == self.model.load(n, tables.vttbr(vmid), tables.vtcr, **more)

    def put(self, n):
        n %= self.vcpus
        if self.model.vcpus[n].index is not None:
            self.vm.vcpus[n].put()
            self.model.put(n)

    def fault(self, n, ipa, access):
        n %= self.vcpus
        if self.model.vcpus[n].index is not None:
            got = self.vm.vcpus[n].fault(ipa, access)
            self.same_fault(got, self.model.fault(n, ipa, access))

    def fault_many(self, n, ipas, access):
        n %= self.vcpus
        if self.model.vcpus[n].index is not None:
            rows = self.vm.vcpus[n].fault_many(np.array(ipas, dtype=np.uint64), access)
            for row, ipa in zip(rows, ipas, strict=True):
                self.same_fault(Row(row), self.model.fault(n, ipa, access))

    def translate(self, n, ipa, access):
        n %= self.vcpus
        if self.model.vcpus[n].index is None:
            return
        got = self.vm.vcpus[n].translate(ipa, access)
        base, leaf = self.model.translate(n, ipa, access)
        assert (got.kind == s2shadow.HIT) == (leaf is not None)
        if leaf:
            assert (got.pa, got.size, got.perm) == (leaf.pa + ipa - base, leaf.size, leaf.perm)

    # L1

    def l1_map(self, table, ipa, level, page, perm="rwx", memattr=15, sh=3, young=True, tlbi=False, clean=False):
        tables = self.tables[table]
        level = max(level, tables.start)
        cipa = self.target(page) & -tables.size(level)
        had_table = self.has_table(tables, ipa, level)
        tables.map(ipa, cipa, level, perm=perm, memattr=memattr, sh=sh, af=int(young), clean=clean)
        self.after_edit(table, ipa, had_table, tlbi)

    def has_table(self, tables, ipa, level):
        return level < 3 and tables.get(tables.slot(ipa, level)) & 3 == 3

    def after_edit(self, table, ipa, had_table, tlbi):
        """A vCPU may remember L1's tables, as hardware's walk caches do: where one went, L1 must say so, under every
        VMID that uses the table. Leaves may wait: the model knows what the shadows hold of them."""
        if had_table:
            self.forget_table(table, ipa & (1 << self.tables[table].ia_bits) - 1)  # high addresses were cut there too
        elif tlbi:
            self.tlbi_ipa(0, ipa, 1)

    def forget_table(self, table, ipa):
        """L1 says that a table under this address went."""
        for vmid in VMIDS:
            self.tlbi_ipa(0, ipa, vmid)

    def l1_change(self, table, ipa, perm, memattr, sh, clean, tlbi):
        """L1 changes its mind about a page: the same address, other permissions or attributes."""
        tables = self.tables[table]
        where = tables.slot(ipa, 3)
        desc = tables.get(where)
        if desc & 3 == 3:
            tables.set(where, tables.leaf(tables.decode(desc), 3, perm, memattr, sh, clean=clean))
        if tlbi:
            self.tlbi_ipa(0, ipa, 1)

    def l1_clean(self, table, ipa, tlbi=True):
        """L1 takes the dirty state back, as it does while it migrates L2."""
        tables = self.tables[table]
        where = tables.slot(ipa, 3)
        desc = tables.get(where)
        if desc & 3 == 3:
            tables.set(where, desc & ~rig.DIRTY | (0 if tables.s2pie else rig.DBM))
        if tlbi:
            self.tlbi_ipa(0, ipa, 1)

    def l1_map_huge(self, table, n, perm="rwx", to_huge=True):
        """A block of 512 GiB, 64 GiB or 4 TiB, where L1's format has it: over memory as large, or over all the rest."""
        tables = self.tables[table]
        level = HUGE_LEVEL[tables.granule]
        if tables.wide and level >= tables.start:
            size = tables.size(level)
            had_table = self.has_table(tables, size * (1 + n), level)
            tables.map(size * (1 + n), (self.huge if to_huge else self.data) & -size, level, perm=perm)
            self.after_edit(table, size * (1 + n), had_table, False)

    def huge_ipa(self, table, n, at):
        """`at` is an address inside."""
        return HUGE_SIZE[self.tables[table].granule] * (1 + n) + at % HUGE_SIZE[self.tables[table].granule]

    def l1_map_run(self, table, ipa, page, perm="rwx"):
        tables = self.tables[table]
        first = page * self.page // tables.granule
        for n in range(8):
            offset = (first + n) * tables.granule % (self.data_end - self.data)
            tables.map(ipa + n * tables.granule, self.data + offset, 3, perm=perm)

    def l1_unmap(self, table, ipa, level, tlbi=False):
        tables = self.tables[table]
        level = max(level, tables.start)
        had_table = self.has_table(tables, ipa, level)
        tables.unmap(ipa, level)
        self.after_edit(table, ipa, had_table, tlbi)

    def tlbi(self, n, op, vmid):
        regs = self.registers(vmid)
        got = self.vm.vcpus[n % self.vcpus].tlbi(op, hcr=HCR_VM, **regs)
        want = self.model.tlbi_all() if op.startswith("ALLE1") else self.model.tlbi_vmid(**regs)
        assert got.removed == got.required == want

    def tlbi_ipa(self, n, ipa, vmid):
        regs = self.registers(vmid)
        got = self.vm.vcpus[n % self.vcpus].tlbi("IPAS2E1IS", ipa >> 12, hcr=HCR_VM, **regs)
        assert got.removed == got.required == self.model.tlbi_ipa(address=ipa, **regs)

    def registers(self, vmid):
        return {"vttbr": self.tables[0].vttbr(vmid), "vtcr": self.tables[0].vtcr}

    # the host

    def do_host_map(self, cipa, pa, size, perm="rwx", memattr=None):
        memattr = self.normal if memattr is None else memattr
        got = self.vm.host.map(cipa, pa, size, perm, memattr)
        assert got.leaves == self.model.host_map(cipa, pa, size, perm, memattr)

    def host_map(self, page, length, shift=0, perm="rwx", memattr=None):
        start, end = self.range(page, length)
        self.do_host_map(start, self.host + start + shift * self.page, end - start, perm, memattr)

    def host_map_gigabyte(self):
        self.do_host_map(self.data, self.host + self.data, G)

    def host_map_huge(self):
        if self.theirs.region(self.huge):
            self.do_host_map(self.huge, self.host + self.huge, self.model.sizes[-1])

    def unmap(self, page, length, partial="split"):
        start, end = self.range(page, length)
        got = self.vm.unmap(start, end, partial)
        assert got.leaves == self.model.unmap(start, end, partial or "split")

    def unmap_all(self):
        everything = 0, 1 << self.pa_bits
        assert self.vm.unmap(*everything).leaves == self.model.unmap(*everything)

    def protect(self, page, length, perm):
        start, end = self.range(page, length)
        assert self.vm.host.protect(start, end, perm).leaves == self.model.protect(start, end, perm)

    def log_dirty(self, page, length, on=True):
        start, end = self.log_range(page, length)
        assert self.vm.log_dirty(start, end, on).leaves == self.model.log_dirty(start, end, on)

    def dirty_log(self, page, length):
        start, end = self.log_range(page, length)
        got = self.pages_of(self.vm.dirty_log(start, end), start)
        assert got == self.model.dirty_log(start, end)
        return got

    def young(self, page, length, clear):
        start, end = self.range(page, length)
        got = (self.vm.age if clear else self.vm.test_young)(start, end)
        assert self.pages_of(got, start) == self.model.young_pages(start, end, clear)

    def same_fault(self, got, want):
        names = ("kind", "fsc", "level", "perm", "context", "ipa", "cipa", "pa", "size", "hpfar")
        assert {n: int(getattr(got, n)) for n in names} == {n: getattr(want, n) for n in names}

    def pages_of(self, bitmap, start):
        bits = np.unpackbits(np.asarray(bitmap), bitorder="little")
        return {start + n * self.page for n in np.flatnonzero(bits).tolist()}

    # what must be equal

    def check(self):
        self.check_shadows()
        self.check_host()
        self.check_tables()
        self.check_owed()
        self.check_intervals()
        self.check_reverse(range(self.data, self.data_end, 509 * self.page))
        self.vm.check()

    def check_shadows(self):
        contexts = {c.index: c for c in self.vm.contexts}
        for index, want in enumerate(self.model.contexts):
            if want.key is None:
                assert index not in contexts or not contexts[index].entries
                continue
            ctx = contexts[index]
            assert (ctx.vmid, ctx.enabled, ctx.entries, ctx.refs) == (
                want.vmid, want.enabled, len(want.leaves), want.refs,
            )  # fmt: skip
            names = ["ipa", "cipa", "pa", "size", "perm", "memattr", "sh", "young", "guest_level"]
            rows = self.vm.shadow(index)[names].tolist()
            assert rows == [
                (ipa, s.cipa, s.pa, s.size, s.perm, s.memattr, s.sh, int(s.young), s.guest_level)
                for ipa, s in sorted(want.leaves.items())
            ]
        stats = self.vm.stats
        assert stats.installed - stats.removed == stats.live == sum(len(c.leaves) for c in self.model.contexts)

    def check_intervals(self):
        """What the contexts' interval maps know and have forgotten, where there are any."""
        if self.vm.teardown == "interval-map":
            for ctx in self.vm.contexts:
                assert self.vm.intervals(ctx.index).tolist() == self.model.contexts[ctx.index].ranges.rows()

    def check_host(self):
        rows = self.vm.host.leaves()[["cipa", "pa", "size", "perm", "memattr"]].tolist()
        assert rows == [(b, h.pa, h.size, h.now, h.memattr) for b, h in sorted(self.model.host.items())]

    def check_tables(self):
        for address, word in self.theirs.words.items():
            assert self.ours.read64(address) == word, hex(address)

    def check_reverse(self, pages):
        for page in pages:
            rows = self.vm.reverse(page)[["context", "ipa", "size"]].tolist()
            assert sorted(rows) == self.model.reverse(page)

    def check_hardware(self):
        """The tables, walked by another walker under the registers that go with them: leaf by leaf what the model has,
        with hardware's eyes. The canonical table has the shape of a shadow made while L1's stage 2 is off."""
        for ctx in self.vm.contexts:
            mem = self.outside(ctx.index)
            cfg = Config(ctx.host_vttbr, ctx.host_vtcr, self.model.features, ctx.host_hcr)
            assert cfg.fault is None and cfg.vmid == ctx.host_vmid
            self.check_leaves(mem, cfg, self.model.contexts[ctx.index].leaves)
            if not ctx.enabled:
                root = self.vm.tables()[0][0].item()
                vttbr = root & 0xFFFF_FFFF_FFFF | root >> 48 << 2
                cfg = Config(vttbr, ctx.host_vtcr, self.model.features, ctx.host_hcr)
                self.check_leaves(self.outside(None), cfg, self.model.host)

    def check_leaves(self, mem, cfg, leaves):
        every = 1 + len(leaves) // 500
        for ipa, leaf in sorted(leaves.items())[::every]:
            offset = leaf.size // 2 + 8
            found = walk(mem, cfg, ipa + offset, 0, update=False)
            perm = leaf.now if isinstance(leaf, HostLeaf) else leaf.perm
            assert found.fault is None or not leaf.young and found.fault[0] == "access"
            if leaf.young:
                got = found.pa, found.size, found.perm, found.memattr, found.contiguous
                assert got == (leaf.pa + offset, leaf.size, perm, leaf.memattr, 0)
                assert found.sh == getattr(leaf, "sh", 3)
            after = ipa + leaf.size
            if after not in leaves and after >> cfg.ia_bits == 0:
                assert walk(mem, cfg, after, 0, update=False).fault[0] == "translation"

    def outside(self, index):
        """What a walker that has only the engine's table reads."""
        addresses, pages = self.vm.tables(index)
        return Outside(dict(zip(addresses.tolist(), pages.view("<u8"), strict=True)), self.page)

    def check_owed(self):
        """Every leaf that went, moved or lost a permission since the last time is covered by what is owed."""
        owed, now = self.vm.take_tlbis(), self.held()
        for key, (pa, perm) in self.seen.items():
            new_pa, new_perm = now.get(key, (pa, 0))
            if pa != new_pa or perm & ~new_perm:
                assert covered(owed, *key), (key, owed)
        self.seen = now

    def held(self):
        """{(host VMID, ipa, size): (pa, permissions)} of all contexts."""
        return {
            (ctx.host_vmid, ipa, size): (pa, perm)
            for ctx in self.vm.contexts
            for ipa, size, pa, perm in self.vm.shadow(ctx.index)[["ipa", "size", "pa", "perm"]].tolist()
        }


class Outside:
    """Table pages as another machine sees them."""

    def __init__(self, pages, size):
        self.pages, self.size = pages, size

    def read(self, address):
        page = self.pages.get(address & -self.size)
        return None if page is None else int(page[address % self.size // 8])


class Loose(Pair):
    """For policies that drop more than they must: the same answers, host table and dirty pages, from fewer leaves.

    L1 always invalidates after an edit: else the engine's fresh walk would differ from the model's stale leaf.
    """

    def same_fault(self, got, want):
        kinds = {s2shadow.HIT: s2shadow.MAPPED}
        assert kinds.get(got.kind, got.kind) == kinds.get(want.kind, want.kind)
        names = ("fsc", "level", "context", "ipa", "cipa", "pa", "hpfar")
        assert {n: int(getattr(got, n)) for n in names} == {n: getattr(want, n) for n in names}

    def write64(self, address, word):
        super().write64(address, word)
        if hasattr(self, "tables"):
            self.vm.vcpus[0].tlbi("ALLE1IS")
            self.model.tlbi_all()

    def check(self):
        self.check_host()
        self.check_tables()
        self.vm.check()

    def translate(self, n, ipa, access):
        """A hit tells the truth."""
        n %= self.vcpus
        if self.model.vcpus[n].index is not None:
            got = self.vm.vcpus[n].translate(ipa, access)
            base, leaf = self.model.translate(n, ipa, access)
            assert got.kind != s2shadow.HIT or leaf is None or got.pa == leaf.pa + ipa - base

    def tlbi(self, n, op, vmid):
        self.vm.vcpus[n % self.vcpus].tlbi(op, hcr=HCR_VM, **self.registers(vmid))
        self.model.tlbi_all() if op.startswith("ALLE1") else self.model.tlbi_vmid(**self.registers(vmid))

    def tlbi_ipa(self, n, ipa, vmid):
        self.vm.vcpus[n % self.vcpus].tlbi("IPAS2E1IS", ipa >> 12, hcr=HCR_VM, **self.registers(vmid))
        self.model.tlbi_ipa(address=ipa, **self.registers(vmid))

    def do_host_map(self, cipa, pa, size, perm="rwx", memattr=None):
        memattr = self.normal if memattr is None else memattr
        self.vm.host.map(cipa, pa, size, perm, memattr)
        self.model.host_map(cipa, pa, size, perm, memattr)

    def unmap(self, page, length, partial="split"):
        start, end = self.range(page, length)
        self.vm.unmap(start, end, partial or "split")
        self.model.unmap(start, end, partial or "split")

    def unmap_all(self):
        self.vm.unmap(0, 1 << self.pa_bits)
        self.model.unmap(0, 1 << self.pa_bits)

    def protect(self, page, length, perm):
        start, end = self.range(page, length)
        self.vm.host.protect(start, end, perm)
        self.model.protect(start, end, perm)

    def log_dirty(self, page, length, on=True):
        start, end = self.log_range(page, length)
        self.vm.log_dirty(start, end, on)
        self.model.log_dirty(start, end, on)

    def young(self, page, length, clear):
        start, end = self.range(page, length)
        (self.vm.age if clear else self.vm.test_young)(start, end)
        self.model.young_pages(start, end, clear)


class Row:
    """A row of a batch, as attributes."""

    def __init__(self, row):
        for name in row.dtype.names:
            setattr(self, name, row[name].item())


def covered(rows, host_vmid, ipa, size):
    for row in rows:
        if row["op"] == ALL or (row["op"] == VMALLS12 and row["host_vmid"] == host_vmid):
            return True
        if row["op"] == IPA and row["host_vmid"] == host_vmid and row["start"] <= ipa and ipa + size <= row["end"]:
            return True
    return False
