"""The model under teardown="interval-map", from the description of the 2026 proposal for Linux.

Each context remembers, for ranges of L1's memory, the one nested address that maps them. A new leaf whose range
overlaps any remembered one makes a single UNKNOWN range of all that touch it. A host change that removes leaves asks
the ranges that it overlaps: a known one costs its leaf, an UNKNOWN one every leaf of the context, which then remembers
nothing. Whatever only takes permissions narrows every leaf there is; aging looks at the host's leaves.
"""

from dataclasses import dataclass, field

from .vm import VM, Context, perm_of
from .walk import WRITE

UNKNOWN = None


@dataclass
class Range:
    start: int
    end: int
    ipa: int | None


class Ranges:
    """A list that is searched from one end to the other."""

    def __init__(self):
        self.all = []

    def over(self, start, end):
        return [r for r in self.all if r.start < end and start < r.end]

    def remember(self, start, end, ipa):
        touched = self.over(start, end)
        if touched:
            self.all = [r for r in self.all if r not in touched]
            start, end = min(start, *(r.start for r in touched)), max(end, *(r.end for r in touched))
            ipa = UNKNOWN
        self.all.append(Range(start, end, ipa))

    def forget(self, ipa):
        self.all = [r for r in self.all if r.ipa is UNKNOWN or r.ipa != ipa]

    def rows(self):
        return sorted((r.start, r.end, 0 if r.ipa is UNKNOWN else r.ipa, int(r.ipa is UNKNOWN)) for r in self.all)


@dataclass
class IntervalContext(Context):
    ranges: Ranges = field(default_factory=Ranges)


class IntervalVM(VM):
    context_type = IntervalContext
    ever_logged = False

    def put_shadow(self, ctx, ipa, new):
        super().put_shadow(ctx, ipa, new)
        ctx.ranges.remember(new.cipa, new.cipa + new.size, ipa)

    def remove(self, ctx, ipa):
        super().remove(ctx, ipa)
        ctx.ranges.forget(ipa)

    def drop_all(self, ctx):
        dropped = len(ctx.leaves)
        ctx.leaves.clear()
        ctx.ranges = Ranges()
        return dropped

    def drop(self, start, end, chosen=lambda found: True):
        """Drops what the ranges over [start, end) lead to; of the known ones only those chosen."""
        dropped = 0
        for ctx in self.contexts:
            found = ctx.ranges.over(start, end)
            if any(r.ipa is UNKNOWN for r in found):
                dropped += self.drop_all(ctx)
                continue
            for r in filter(chosen, found):
                self.remove(ctx, r.ipa)
                dropped += 1
        return dropped

    def drop_sticking_out(self, start, end, whole_end):
        """A host block over [start, end) is to be split: drops the leaves that would stick out of the piece."""
        return self.drop(start, end, lambda r: r.start < start or r.end > whole_end)

    def narrow_all(self, keep):
        for ctx in self.contexts:
            for leaf in ctx.leaves.values():
                leaf.perm &= keep

    def settle(self):
        """Nothing is left to do: ranges and the narrowing of all leaves have done enough."""
        for ctx in self.contexts:
            for leaf in ctx.leaves.values():
                host = self.host_leaf(leaf.cipa)[1]
                assert host is not None and leaf.size <= host.size and not leaf.perm & ~host.now
        return 0

    def grant_write(self, cipa):
        """A leaf over the first byte of a host block that sticks out of its first piece is as large as the block."""
        base, leaf = self.host_leaf(cipa)
        if self.is_logged(base, base + leaf.size):
            for size in reversed([s for s in self.sizes if s < leaf.size]):
                base, _ = self.host_leaf(cipa)
                self.drop_sticking_out(base, base + 1, base + size)
                self.split(base)
        super().grant_write(cipa)

    def protect(self, start, end, perm):
        self.narrow_all(perm_of(perm))
        dropped = 0
        for base, leaf in self.host_overlapping(start, end):
            first, last = max(base, start), min(base + leaf.size, end)
            if leaf.perm != perm_of(perm) and last - first < leaf.size:
                dropped += self.drop_sticking_out(first, last, last)
        return dropped + super().protect(start, end, perm)

    def log_dirty(self, start, end, on=True):
        if on:
            self.narrow_all(~WRITE)
            self.ever_logged = True
        return super().log_dirty(start, end, on)

    def dirty_log(self, start, end):
        if self.ever_logged:
            self.narrow_all(~WRITE)
        return super().dirty_log(start, end)

    def all_leaves(self):
        """Those that aging looks at."""
        yield from list(self.host.items())

    def tlbi_all(self):
        """A context that is emptied whole remembers nothing, where leaves that go one by one leave UNKNOWN ranges."""
        return sum(self.drop_all(ctx) for ctx in self.contexts)

    def tlbi_vmid(self, vttbr, vtcr):
        return sum(self.drop_all(ctx) for ctx in self.of_vmid(vttbr, vtcr))
