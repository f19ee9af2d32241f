"""Small nested VMs whose every quantity is chosen: what the instruction counts and the scaling curves run on.

L1's tables map IPA 0 upward, in order, to canonical pages in random order. L0 maps every canonical page (or block)
by itself. 48-bit addresses, four levels everywhere unless said otherwise.
"""

import numpy as np

import s2shadow as s2
from beds import PAGE, scattered, stage2_tables

BLOCK = 2 << 20
DATA = 1 << 40              # canonical address of the first data page
TABLES = 1 << 44            # and of L1's tables
TABLES_STRIDE = 1 << 36     # between contexts
HOST_OFFSET = {PAGE: PAGE, BLOCK: BLOCK}    # not aligned to anything larger: no larger leaf fits
VTCR = {
    3: 25 | 1 << 6 | 3 << 12 | 5 << 16 | 1 << 19 | 1 << 31,     # 4K granule, 39-bit IPA, 48-bit output, 16-bit VMID
    4: 16 | 2 << 6 | 3 << 12 | 5 << 16 | 1 << 19 | 1 << 31,     # the same with a 48-bit IPA
}
HCR = s2.HCR_VM
LEAF = {PAGE: 3, BLOCK: 1}  # descriptor type


def u64(values):
    return np.ascontiguousarray(values, dtype=np.uint64)


class Nest:
    """An engine, its contexts loaded on a vCPU each, host mapped, shadows empty.

    ``pages`` leaves of ``size`` per context. ``shared``: all contexts map the same canonical pages, else each its own.
    ``aliases``: each canonical page stands at so many IPAs of its context. ``unshadowed``: further host pages that no
    L1 table names. ``regions``: memory in so many pieces, one of them for the tables; ``spread``: the tables of each
    level in a piece of their own. ``load=False``: L1 never entered an L2.
    """

    def __init__(self, pages, *, contexts=1, size=PAGE, levels=4, shared=False, aliases=1, unshadowed=0, regions=2,
                 spread=False, load=True, order=scattered, vcpus=None, **options):
        self.size = size
        self.mem = s2.GuestMemory()
        owned = 1 if shared else contexts
        self.canonical = DATA + u64(np.arange(pages * owned + unshadowed)) * np.uint64(size)
        self.unshadowed = self.canonical[pages * owned :]
        self.ipas = u64(np.arange(pages * aliases)) * np.uint64(size)
        self._add_data(len(self.canonical) * size, max(1, regions - 1))
        self.images = []            # the memory that the engine reads
        self.roots = []
        self._frames = []           # by context: canonical addresses in the order of IPAs
        self._orders = {}           # and how to sort them
        for context in range(contexts):
            own = self.canonical[: pages * owned].reshape(owned, pages)[0 if shared else context]
            self._frames.append(own[order(pages)])
            self._add_tables(TABLES + context * TABLES_STRIDE, np.tile(self._frames[-1], aliases), levels, spread)
        self.pages, self.owned = pages, owned
        self.vm = s2.NestedVM(self.mem, vcpus=vcpus or contexts, **options)
        offset = HOST_OFFSET[size]
        self.vm.host.map(DATA, DATA + offset, len(self.canonical) * size)
        self.state = self.vm._state()
        self.vtcr = VTCR[levels]
        self.vttbrs = [root | (context + 1) << 48 for context, root in enumerate(self.roots)]
        self.loaded = []
        if load:
            for vcpu, vttbr in zip(self.vm.vcpus, self.vttbrs, strict=False):
                self.loaded.append(vcpu.load(vttbr, self.vtcr, hcr=HCR))
                vcpu.fault(1 << 38, s2.READ)        # an L1 fault: from here on the vCPU sees this memory

    def _add_data(self, nbytes, pieces):
        step = -(-nbytes // pieces // PAGE) * PAGE
        for start in range(0, nbytes, step):
            self.mem.add(DATA + start, min(step, nbytes - start))

    def _add_tables(self, address, frames, levels, spread):
        if self.size == BLOCK:
            levels -= 1             # the last level of tables holds the blocks
        image, sizes = stage2_tables(address, frames, levels=levels, leaf=LEAF[self.size])
        self.images.append(image)
        self.roots.append(address)
        self.table_sizes = sizes
        if not spread:
            self.mem.add(address, buffer=image)
            return
        at = 0
        for nbytes in sizes:
            self.mem.add(address + at, buffer=image[at // 8 : (at + nbytes) // 8])
            at += nbytes

    def config(self, context=0):
        return s2.Stage2Config(self.vttbrs[context], self.vtcr, features=self.vm.features, hcr=HCR)

    def fill(self, contexts=None):
        """Fault every page in, in every context (or in those named)."""
        for vcpu in self.vm.vcpus[: len(self.roots)] if contexts is None else [self.vm.vcpus[i] for i in contexts]:
            kinds = vcpu.fault_many(self.ipas, s2.READ)["kind"]
            assert ((kinds == s2.MAPPED) | (kinds == s2.HIT)).all()
        self.drain()
        return self

    def outputs(self, context):
        """Canonical addresses, in the order of ``ipas``."""
        return np.resize(self._frames[context], len(self.ipas))

    def outputs_at(self, contexts, ipas):
        """Canonical addresses of pages named by context and IPA."""
        found = np.empty(len(ipas), dtype=np.uint64)
        for context in np.unique(contexts).tolist():
            mine = contexts == context
            place = (ipas[mine] // np.uint64(self.size)).astype(np.int64)
            found[mine] = self._frames[context][place % self.pages]
        return found

    def where(self, starts):
        """(contexts, IPAs) of every leaf that must map one of these pages."""
        place = (np.asarray(starts) - np.uint64(DATA)) // np.uint64(self.size)
        contexts, ipas = [], []
        for context, frames in enumerate(self._frames):
            mine = starts[(place // self.pages == context) | (self.owned == 1)]
            if len(mine):
                order = self._sorted(context)
                at = order[np.searchsorted(frames, mine, sorter=order)]
                for alias in range(len(self.ipas) // self.pages):
                    ipas.append(self.ipas[at + alias * self.pages])
                    contexts.append(np.full(len(at), context))
        return np.concatenate(contexts), np.concatenate(ipas)

    def _sorted(self, context):
        if context not in self._orders:
            self._orders[context] = np.argsort(self._frames[context])
        return self._orders[context]

    def drain(self):
        while len(self.vm.take_tlbis()):
            pass


def range_operand(start, pages):
    """RIPAS2* operand of ``pages`` 4K pages: a power of two from 2 to 2^21."""
    scale = 0
    while pages >> (5 * scale + 1) > 32:
        scale += 1
    num = (pages >> (5 * scale + 1)) - 1
    assert (num + 1) << (5 * scale + 1) == pages
    return 1 << 46 | scale << 44 | num << 39 | start >> 12
