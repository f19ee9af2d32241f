"""A lockstep.Pair that also issues every TLBI, under registers of its own, and the random operations for it."""

from collections import Counter

from lockstep import GRANULES, SLOTS, VMIDS, K, Pair
from model import tlbi as book
from model.tlbi import HCR_E2H, HCR_TGE, OPERATIONS
from model.vm import guest_leaf_size
from s2shadow import HCR_VM

VS, DS = 1 << 19, 1 << 32
TG = {4 * K: 1, 16 * K: 2, 64 * K: 3}
IPA_OPS = [op.name for op in OPERATIONS.values() if op.scope == "IPA" and not op.range]
RANGE_OPS = [op.name for op in OPERATIONS.values() if op.scope == "IPA" and op.range]
WHOLE_OPS = [op.name for op in OPERATIONS.values() if op.regime == "EL10_S12"]
STAGE1_OPS = [op.name for op in OPERATIONS.values() if op.regime in ("EL10_S1", "EL2_S1")]
RIGHT = "right"  # a hint or granule as L1's leaf has it
TTLS = (RIGHT, RIGHT, 0, 0, *range(16))
TGS = (RIGHT, RIGHT, RIGHT, 0, 1, 2, 3)
RANGE_TTLS = (0, 0, RIGHT, RIGHT, 1, 2, 3)
HIGH = (0, 0, 0, 0, 1 << 36, 1 << 38, 1 << 39, 1 << 42, 1 << 47)
HCRS = (HCR_VM, HCR_VM, 0, HCR_VM | HCR_E2H, HCR_VM | HCR_E2H | HCR_TGE)
WHO = ("same", "same", "same", "junk", "wide", "wide-junk", "other")
WIDE_VMID = 0x101  # with VTCR.VS=0 it is VMID 1


def class_of(op):
    """The counters that an operation belongs to."""
    if op.regime in ("EL10_S1", "EL2_S1"):
        return "STAGE1"
    return ("RANGE" if op.range else "IPA") if op.scope == "IPA" else op.scope


FORGETTING = ("IPAS2E1IS", "IPAS2E1", "IPAS2E1OSNXS", "RIPAS2E1IS", "RIPAS2E1", "VMALLS12E1IS", "VMALLS12E1", "ALLE1")


class TlbiPair(Pair):
    def __init__(self, granules=GRANULES[0], vcpus=1, dialect="exact", contexts=5, **options):
        self.dialect, self.done, self.forgotten = dialect, Counter(), 0
        super().__init__(granules, vcpus, contexts=contexts, tlbi=dialect, **options)
        self.tables[1].vtcr |= VS

    def issue(self, n, name, xt, vttbr, vtcr, hcr=HCR_VM):
        """On both sides; the leaves that are left are compared by check()."""
        before = self.owners()
        got = self.vm.vcpus[n % self.vcpus].tlbi(name, xt, vttbr=vttbr, vtcr=vtcr, hcr=hcr)
        gone, had_to = book.apply(self.model, name, xt, vttbr, vtcr, self.dialect)
        assert (got.name, got.removed, got.required) == (name, len(gone), len(had_to))
        if self.dialect == "exact":
            assert got.removed == got.required
        assert self.owners() == before
        kind = class_of(OPERATIONS[name])
        self.done += Counter({
            (kind, "operations"): 1,
            (kind, "contexts"): got.contexts,
            (kind, "removed"): len(gone),
            (kind, "required"): len(had_to),
        })  # fmt: skip

    def owners(self):
        """Who has which context: a TLBI never changes that."""
        return [(c.index, c.vmid, c.vttbr, c.vtcr, c.enabled, c.refs, c.host_vmid) for c in self.vm.contexts]

    def check_shadows(self):
        super().check_shadows()
        counted = self.vm.stats.tlbis
        for kind, counters in counted.items():
            for name in ("operations", "contexts", "removed", "required"):
                assert getattr(counters, name) == self.done[kind, name], (kind, name)

    # lockstep.Pair's own

    def tlbi(self, n, op, vmid):
        self.issue(n, op, 0, **self.registers(vmid))

    def tlbi_ipa(self, n, ipa, vmid):
        self.issue(n, "IPAS2E1IS", ipa >> 12, **self.registers(vmid))

    def forget_table(self, table, ipa):
        """By any operation that is enough for it, under every VMID that the table is used with."""
        tables = self.tables[table]
        self.forgotten += 1
        op = FORGETTING[self.forgotten % len(FORGETTING)]
        if op.startswith("RIPAS2"):
            shift = 16 if self.model.features.lpa2 and tables.vtcr & DS else tables.page_bits
            xt = TG[tables.granule] << 46 | (ipa >> shift) & (1 << 37) - 1
        else:
            hint = TG[tables.granule] << 2 | 3 if self.forgotten % 2 else 0  # tables above that level go all the same
            xt = ipa >> 12 | hint << 44
        for vmid in {*VMIDS, WIDE_VMID if table else 1}:
            n = self.forgotten // 7 % self.vcpus
            self.issue(n, op, xt, vttbr=tables.base | vmid << 48, vtcr=tables.vtcr)

    # aimed at what is there

    def target_leaf(self, pick, inside):
        """(address, context, leaf): somewhere in what L1's leaf around a live leaf spans; or in an empty slot."""
        live = [(index, ipa) for index, ctx in enumerate(self.model.contexts) for ipa in sorted(ctx.leaves)]
        if not live:
            return (
                self.bases[pick % SLOTS] + inside % 16 * 4 * K,
                self.model.contexts[self.model.vcpus[0].index or 0],
                None,
            )
        index, ipa = live[pick % len(live)]
        ctx = self.model.contexts[index]
        leaf = ctx.leaves[ipa]
        size = guest_leaf_size(ctx.granule, leaf.guest_level) if ctx.enabled else leaf.size
        return (ipa & -size) + size // 1024 * inside // (4 * K) * 4 * K, ctx, leaf

    def registers_for(self, ctx, who, table, flip_ds=False):
        """VTTBR and VTCR as L1 might hold them for the VMID of this context; BADDR is that of either table."""
        vmid, vtcr = ctx.vmid, self.tables[table].vtcr & ~VS
        vmid = {"junk": vmid & 0xFF | 0xA500, "wide-junk": vmid | 0xA500, "other": vmid + 1}.get(who, vmid)
        vtcr |= (VS if who.startswith("wide") or vmid == WIDE_VMID and who == "same" else 0) | (DS if flip_ds else 0)
        return {"vttbr": self.tables[table].base | vmid << 48, "vtcr": vtcr}

    def tlbi_address(self, n, op, pick, inside, ttl, who, table, junk=0, hcr=HCR_VM):
        address, ctx, leaf = self.target_leaf(pick, inside)
        if ttl == RIGHT:
            ttl = TG[ctx.granule] << 2 | leaf.guest_level & 3 if leaf else 0
        res0 = (junk & 0xF0 if self.pa_bits == 52 else junk & 0xFF) << 36 | (junk >> 8 & 0xFFFF) << 48
        xt = address >> 12 | ttl << 44 | res0
        self.issue(n, op, xt, **self.registers_for(ctx, who, table), hcr=hcr)

    def tlbi_range(self, n, op, pick, inside, size, tg, ttl, back, high, who, table, ds, junk=0, hcr=HCR_VM):
        """size is (SCALE, NUM); back moves the base before the address by quarters of the range."""
        address, ctx, leaf = self.target_leaf(pick, inside)
        tg = TG[ctx.granule] if tg == RIGHT else tg
        if ttl == RIGHT:
            ttl = leaf.guest_level & 3 if leaf else 0
        scale, num = size
        ds_in_force = self.model.features.lpa2 and (self.tables[table].vtcr & DS or ds)
        shift = 16 if ds_in_force else 10 + 2 * (tg or 3)
        span = (num + 1 << 5 * scale + 1) << 10 + 2 * (tg or 3)
        base = (max(address - span * back // 4, 0) | high) >> shift & (1 << 37) - 1
        xt = tg << 46 | scale << 44 | num << 39 | ttl << 37 | base | (junk & 0xFFFF) << 48
        self.issue(n, op, xt, **self.registers_for(ctx, who, table, ds), hcr=hcr)

    def tlbi_whole(self, n, op, pick, who, table, xt=0, hcr=HCR_VM):
        """An operation without an address, or one of stage 1: xt is anything."""
        ctx = self.target_leaf(pick, 0)[1]
        self.issue(n, op, xt, **self.registers_for(ctx, who, table), hcr=hcr)

    def load_wide(self, n, vmid):
        """A VMID of 16 bits: table 1 has VTCR.VS=1."""
        self.load(n, vmid, 1)


# A seeded stream, for randomops.run


def tlbi_address(rng, pair):
    pair.tlbi_address(
        rng.randrange(2), rng.choice(IPA_OPS), rng.randrange(1 << 16), rng.randrange(1024), rng.choice(TTLS),
        rng.choice(WHO), rng.randrange(2), rng.choice((0, 0, rng.getrandbits(24))), rng.choice(HCRS),
    )  # fmt: skip


def tlbi_range(rng, pair):
    size = rng.choice(((0, 0), (0, 3), (0, rng.randrange(32)), (1, 0), (1, rng.randrange(32)), (2, 5), (3, 31)))
    pair.tlbi_range(
        rng.randrange(2), rng.choice(RANGE_OPS), rng.randrange(1 << 16), rng.randrange(1024), size, rng.choice(TGS),
        rng.choice(RANGE_TTLS), rng.choice((0, 0, 1, 2, 3, 4, 5)), rng.choice(HIGH), rng.choice(WHO),
        rng.randrange(2), rng.random() < 0.2, rng.choice((0, rng.getrandbits(16))), rng.choice(HCRS),
    )  # fmt: skip


def tlbi_whole(rng, pair):
    pair.tlbi_whole(rng.randrange(2), rng.choice(WHOLE_OPS), rng.randrange(1 << 16), rng.choice(WHO), rng.randrange(2),
                    rng.getrandbits(64), rng.choice(HCRS))  # fmt: skip


def tlbi_stage1(rng, pair):
    pair.tlbi_whole(rng.randrange(2), rng.choice(STAGE1_OPS), rng.randrange(1 << 16), rng.choice(WHO),
                    rng.randrange(2), rng.getrandbits(64), rng.choice(HCRS))  # fmt: skip


def load_wide(rng, pair):
    pair.load_wide(rng.randrange(2), rng.choice((1, WIDE_VMID)))


TLBIS = {tlbi_address: 120, tlbi_range: 120, tlbi_whole: 3, tlbi_stage1: 20, load_wide: 20}
