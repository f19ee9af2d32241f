"""What toy_mmu reads through its shadows, against the same words read from the simulator's memory directly."""

import numpy as np
from toy_mmu import ToyMmu, count_hits

import s2shadow

PAGE, PAGES = 4096, 64
ROOT, LEVEL_2, LEVEL_3, DATA = 0x1000, 0x2000, 0x3000, 0x10000
DESC_PAGE = 0x7FF           # valid page, MemAttr 1111, S2AP rw, inner shareable, AF
VTCR = 25 | 1 << 6 | 5 << 16        # 4 KiB granule, 39 bits of IPA, tables from level 1 on, 48 bits of output

memory = np.zeros(1 << 20, dtype=np.uint8)
words = memory.view(np.uint64)
words[ROOT // 8] = LEVEL_2 | 3
words[LEVEL_2 // 8] = LEVEL_3 | 3
frames = np.arange(PAGES, dtype=np.uint64) * 37 % PAGES
words[LEVEL_3 // 8 : LEVEL_3 // 8 + PAGES] = DATA + frames * PAGE | DESC_PAGE
words[DATA // 8 : DATA // 8 + PAGES * 512] = np.random.default_rng(1).integers(0, 1 << 40, PAGES * 512)

pages = words[DATA // 8 : DATA // 8 + PAGES * 512].reshape(PAGES, 512)[frames]
mmu = ToyMmu(memory)
mmu.enter(ROOT, VTCR)
assert mmu.sum(0, PAGES * 512) == int(pages.sum()) and mmu.populated == PAGES
assert mmu.sum(5 * PAGE + 8, 600) == int(pages.reshape(-1)[5 * 512 + 1 :][:600].sum())
assert mmu.take_away(DATA, DATA + 2 * PAGE) == 2
assert mmu.sum(0, PAGES * 512) == int(pages.sum()) and mmu.populated == PAGES + 2
try:
    mmu.sum(PAGES * PAGE - 8, 2)
except LookupError as error:
    assert str(error) == f"L1 has nothing at {PAGES * PAGE:#x}", error
else:
    raise AssertionError("read beyond what L1 maps")

mem = s2shadow.GuestMemory()
mem.add(0, buffer=memory)
vm = s2shadow.NestedVM(mem)
vm.host.populate = "linear"
vm.vcpus[0].load(ROOT, VTCR)
vm.vcpus[0].fault_many(np.arange(0, PAGES * PAGE, 2 * PAGE, dtype=np.uint64))
assert count_hits(vm, 0, PAGES) == PAGES // 2
print(f"{PAGES * 512} words through the shadows, as they stand in memory")
