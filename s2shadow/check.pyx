"""Verification of the engine's invariants. Slow and plain: nothing here is shared with the code that it checks,
but for finding the one leaf that an address leads to."""

from libc.stdint cimport uint8_t, uint16_t

from s2shadow.arch cimport (
    ACCESS_WRITE, DESC_AF, DESC_GUEST_DEVICE, DESC_HOST_W, DESC_MEMATTR_SHIFT, DESC_S2AP_SHIFT, DESC_S2AP_W,
    DESC_SH_SHIFT, DESC_TABLE, DESC_TAG, DESC_VALID, DESC_XN, FINAL_LEVEL, decode_oa, encode_oa, level_shift,
    level_span, s2ap_xn_to_perm,
)
from s2shadow.context cimport same_key
from s2shadow.dirty cimport is_logged
from s2shadow.intervals cimport (
    UNKNOWN_IPA, interval_t, intervals_bytes, intervals_find, intervals_known, intervals_start_of, intervals_t,
)
from s2shadow.memory cimport find_region, region_t
from s2shadow.rmap cimport HEAD_TAG, MARKER_BYTES, is_marker, known_head, link_next, link_prev, node_key, node_t
from s2shadow.table cimport (
    CANONICAL, GUEST_LEVELS, child_page, is_table, page_cost, page_tag, page_t, slot_ipa, table_find, table_t,
)
from s2shadow.vm cimport TEARDOWN_INTERVAL_MAP, TEARDOWN_REVERSE_MAP, context_t, is_active, read_tag

RULES = (
    "no finding",
    "a table page does not know its place (parent, level, address or owner)",
    "a table page miscounts its valid entries",
    "a table page miscounts the guest levels it holds",
    "a table is empty but was not freed",
    "a context without an owner is not empty",
    "two contexts share a key",
    "a live leaf has no host leaf under it",
    "a live leaf is larger than the host leaf under it",
    "a live leaf's PA differs from the host's",
    "a live leaf allows what the host does not",
    "a live leaf reaches outside its region, or writes a read-only one",
    "a live leaf has a guest level that its context cannot have",
    "a page that is logged and not dirty is writable",
    "a reverse-map entry is not a live leaf of its size",
    "a reverse-map list is not linked both ways",
    "a reverse-map node miscounts what it holds",
    "live leaves and reverse-map entries differ in number",
    "installed minus removed differs from the live leaves",
    "the bytes of tables do not add up",
    "the bytes of links do not add up",
    "the bytes of the reverse map do not add up",
    "a slot was left locked",
    "a leaf has bits that the engine never writes",
    "a live leaf is not covered by its context's interval map",
    "a known range of an interval map is not a live leaf",
    "the two directions of an interval map differ",
    "a live leaf lies beyond its context's input size",
)

cdef enum:
    R_PLACE = 1
    R_LIVE
    R_HOLDS
    R_EMPTY_TABLE
    R_ORPHANS
    R_KEYS
    R_NO_HOST
    R_TOO_LARGE
    R_PA
    R_PERM
    R_REGION
    R_GUEST_LEVEL
    R_LOGGED
    R_ENTRY
    R_LINKS
    R_NODE
    R_COUNT
    R_STATS
    R_TABLE_BYTES
    R_LINK_BYTES
    R_RMAP_BYTES
    R_LOCKED
    R_STRAY
    R_COVERED
    R_KNOWN
    R_DIRECTIONS
    R_INPUT_SIZE

# What the scan adds up.
cdef struct totals_t:
    uint64_t leaves
    uint64_t entries
    uint64_t table_pages
    uint64_t link_pages
    uint64_t inner_nodes
    uint64_t leaf_nodes
    uint64_t markers


cdef bint found(finding_t *finding, int rule, uint32_t slot, uint64_t seen, uint64_t wanted) noexcept nogil:
    """Note a broken rule, and stop the scan."""
    finding.rule = rule
    finding.slot = slot
    finding.seen = seen
    finding.wanted = wanted
    return False


cdef bint check_host_half(vm_t *vm, mem_view_t *view, uint32_t slot, uint64_t desc, uint64_t cipa, int level,
                          finding_t *finding) noexcept nogil:
    """Rules 1 and 2: a live leaf against the canonical table, the regions and the dirty log."""
    cdef int host_level = 0
    cdef uint64_t span = level_span(vm.arena.granule_bits, level), host_span, pa, page
    cdef uint64_t host = vm.arena.words[table_find(&vm.arena, &vm.canonical, cipa, &host_level)]
    cdef uint8_t perm = s2ap_xn_to_perm(desc, True)
    cdef const region_t *region = find_region(view, cipa)
    if is_active(vm, cipa):
        return True                         # an invalidation is at work there
    if not host & DESC_VALID:
        return found(finding, R_NO_HOST, slot, cipa, 0)
    if level < host_level:
        return found(finding, R_TOO_LARGE, slot, span, level_span(vm.arena.granule_bits, host_level))
    host_span = level_span(vm.arena.granule_bits, host_level)
    pa = (decode_oa(&vm.arena.oa, host) & ~(host_span - 1)) + (cipa & (host_span - 1))
    if decode_oa(&vm.arena.oa, desc) & ~(span - 1) != pa:
        return found(finding, R_PA, slot, decode_oa(&vm.arena.oa, desc) & ~(span - 1), pa)
    if perm & ~s2ap_xn_to_perm(host, True):
        return found(finding, R_PERM, slot, perm, s2ap_xn_to_perm(host, True))
    if region == NULL or cipa + span > region.start + region.size or (region.readonly and perm & ACCESS_WRITE):
        return found(finding, R_REGION, slot, cipa, span)
    if vm.dirty.active and perm & ACCESS_WRITE:
        page = cipa
        while page < cipa + span:
            if is_logged(&vm.dirty, page) and not is_marked(vm, page):
                return found(finding, R_LOGGED, slot, page, 0)
            page += <uint64_t>1 << vm.arena.granule_bits
    return True


cdef bint is_marked(const vm_t *vm, uint64_t cipa) noexcept nogil:
    cdef uint64_t page = cipa >> vm.dirty.page_bits
    return vm.dirty.dirty[page >> 6] >> (page & 63) & 1


cdef uint64_t written_bits(const vm_t *vm, int level, bint canonical) noexcept nogil:
    """The bits of a leaf that the engine may set: type, attributes, output address, software tag."""
    cdef uint64_t span = level_span(vm.arena.granule_bits, level)
    cdef uint64_t allowed = DESC_VALID | DESC_AF | DESC_XN | (<uint64_t>0xF << DESC_MEMATTR_SHIFT)
    allowed |= <uint64_t>3 << DESC_S2AP_SHIFT
    if not vm.arena.oa.implies_sh:
        allowed |= <uint64_t>3 << DESC_SH_SHIFT
    allowed |= DESC_HOST_W if canonical else DESC_TAG | DESC_GUEST_DEVICE
    if level == FINAL_LEVEL:
        allowed |= DESC_TABLE
    return allowed | encode_oa(&vm.arena.oa, ~(span - 1))


cdef bint check_bits(const vm_t *vm, uint32_t slot, uint64_t desc, int level, bint canonical,
                     finding_t *finding) noexcept nogil:
    """Another walker must read a leaf as we mean it."""
    cdef uint64_t allowed = written_bits(vm, level, canonical)
    if desc & ~allowed or (level == FINAL_LEVEL and not desc & DESC_TABLE):
        return found(finding, R_STRAY, slot, desc, desc & allowed)
    return True


cdef bint check_page(vm_t *vm, mem_view_t *view, const table_t *table, uint32_t page, uint32_t parent, int level,
                     uint64_t ipa, totals_t *totals, finding_t *finding) noexcept nogil:
    """One table page and all below it."""
    cdef const page_t *meta = &vm.arena.pages[page]
    cdef int shift = level_shift(vm.arena.granule_bits, level), tag
    cdef uint64_t i, desc, live = 0
    cdef uint64_t holds[GUEST_LEVELS]
    cdef uint32_t slot, child
    cdef const page_t *below
    for tag in range(GUEST_LEVELS):
        holds[tag] = 0
    if meta.parent != parent or meta.level != level or meta.ipa != ipa or meta.context != table.context:
        return found(finding, R_PLACE, page << vm.arena.slot_bits, meta.ipa, ipa)
    if meta.key != (ipa | page_tag(table.context, level)):
        return found(finding, R_PLACE, page << vm.arena.slot_bits, meta.key, ipa | page_tag(table.context, level))
    for i in range(<uint64_t>1 << vm.arena.slot_bits):
        slot = <uint32_t>((<uint64_t>page << vm.arena.slot_bits) + i)
        desc = vm.arena.words[slot]
        if desc == 0:
            continue
        if not desc & DESC_VALID:
            return found(finding, R_LOCKED, slot, desc, 0)
        live += 1
        if is_table(desc, level):
            child = child_page(&vm.arena, desc)
            if not check_page(vm, view, table, child, slot, level + 1, ipa + (i << shift), totals, finding):
                return False
            below = &vm.arena.pages[child]
            if not below.live and not vm.unfinished:
                return found(finding, R_EMPTY_TABLE, slot, child, 0)
            for tag in range(GUEST_LEVELS):
                holds[tag] += below.holds[tag] != 0
            continue
        holds[read_tag(desc) % GUEST_LEVELS] += 1
        if not check_bits(vm, slot, desc, level, table.context == CANONICAL, finding):
            return False
        if table.context != CANONICAL:
            totals.leaves += 1
            if not check_leaf(vm, view, slot, desc, level, finding):
                return False
        elif vm.dirty.active and desc & DESC_S2AP_W and level == FINAL_LEVEL:
            if is_logged(&vm.dirty, ipa + (i << shift)) and not is_marked(vm, ipa + (i << shift)):
                return found(finding, R_LOGGED, slot, ipa + (i << shift), 0)
    if live != meta.live:
        return found(finding, R_LIVE, page << vm.arena.slot_bits, meta.live, live)
    for tag in range(GUEST_LEVELS):
        if holds[tag] != meta.holds[tag]:
            return found(finding, R_HOLDS, page << vm.arena.slot_bits, meta.holds[tag], holds[tag])
    totals.table_pages += live != 0 or parent != 0
    totals.link_pages += meta.has_links
    return True


cdef bint check_leaf(vm_t *vm, mem_view_t *view, uint32_t slot, uint64_t desc, int level,
                     finding_t *finding) noexcept nogil:
    cdef int tag = <int>read_tag(desc)
    cdef uint16_t context = vm.arena.pages[slot >> vm.arena.slot_bits].context
    if (tag == 0) == (vm.contexts[context].config.enabled != 0) or tag >= GUEST_LEVELS:
        return found(finding, R_GUEST_LEVEL, slot, tag, 0)
    if tag and slot_ipa(&vm.arena, slot) >> vm.contexts[context].config.ia_bits:
        return found(finding, R_INPUT_SIZE, slot, slot_ipa(&vm.arena, slot),
                     <uint64_t>1 << vm.contexts[context].config.ia_bits)
    if vm.teardown == TEARDOWN_REVERSE_MAP:
        return True                         # the host half is checked from the lists, which know the cIPA
    if not check_host_half(vm, view, slot, desc, vm.arena.links[slot], level, finding):
        return False
    return vm.teardown != TEARDOWN_INTERVAL_MAP or check_covered(vm, slot, level, finding)


cdef bint check_covered(vm_t *vm, uint32_t slot, int level, finding_t *finding) noexcept nogil:
    """A host change of any of its pages must find a leaf: by a range that is its own, or by one that costs the whole
    context."""
    cdef interval_t interval
    cdef uint64_t cipa = vm.arena.links[slot], span = level_span(vm.arena.granule_bits, level)
    cdef intervals_t *maps = vm.contexts[vm.arena.pages[slot >> vm.arena.slot_bits].context].intervals
    if not intervals_find(maps, cipa, cipa + span, &interval):
        return found(finding, R_COVERED, slot, 0, cipa)
    if interval.ipa == UNKNOWN_IPA and interval.start <= cipa and cipa + span <= interval.end:
        return True
    if interval.ipa == slot_ipa(&vm.arena, slot) and interval.start == cipa and interval.end == cipa + span:
        return True
    return found(finding, R_COVERED, slot, interval.start, cipa)


cdef bint check_intervals(vm_t *vm, const context_t *context, uint64_t *rmap_bytes, finding_t *finding) noexcept nogil:
    """Every known range is one live leaf, in both directions."""
    cdef interval_t interval
    cdef uint64_t at = 0, known = 0
    cdef uint32_t slot
    cdef int level = 0
    while intervals_find(context.intervals, at, ~<uint64_t>0, &interval):
        at = interval.end
        if interval.ipa == UNKNOWN_IPA:
            continue
        known += 1
        slot = table_find(&vm.arena, &context.shadow, interval.ipa, &level)
        if (not vm.arena.words[slot] & DESC_VALID or slot_ipa(&vm.arena, slot) != interval.ipa
                or vm.arena.links[slot] != interval.start
                or interval.end - interval.start != level_span(vm.arena.granule_bits, level)):
            return found(finding, R_KNOWN, slot, interval.start, vm.arena.links[slot])
        if intervals_start_of(context.intervals, interval.ipa) != interval.start:
            return found(finding, R_DIRECTIONS, slot, intervals_start_of(context.intervals, interval.ipa),
                         interval.start)
    if known != intervals_known(context.intervals):
        return found(finding, R_DIRECTIONS, 0, intervals_known(context.intervals), known)
    rmap_bytes[0] += intervals_bytes(context.intervals)
    return True


cdef bint check_list(vm_t *vm, mem_view_t *view, uint32_t head, int level, uint64_t cipa, totals_t *totals,
                     finding_t *finding) noexcept nogil:
    cdef uint32_t slot = vm.rmap.heads[head], before = HEAD_TAG | head
    cdef bint after_marker = False
    while slot:
        if link_prev(&vm.arena, slot)[0] != before:
            return found(finding, R_LINKS, head, link_prev(&vm.arena, slot)[0], before)
        if is_marker(&vm.rmap, slot):
            if after_marker or known_head(&vm.rmap, slot) != head:
                return found(finding, R_LINKS, head, known_head(&vm.rmap, slot), head)
            totals.markers += 1
        elif not check_entry(vm, view, slot, level, cipa, totals, finding):
            return False
        after_marker = is_marker(&vm.rmap, slot)
        before = slot
        slot = link_next(&vm.arena, slot)[0]
    if after_marker:
        return found(finding, R_LINKS, head, before, 0)
    return True


cdef bint check_entry(vm_t *vm, mem_view_t *view, uint32_t slot, int level, uint64_t cipa, totals_t *totals,
                      finding_t *finding) noexcept nogil:
    """One element of a list against the leaf that it names."""
    cdef const page_t *page = &vm.arena.pages[slot >> vm.arena.slot_bits]
    cdef uint64_t desc = vm.arena.words[slot]
    if not desc & DESC_VALID or is_table(desc, page.level) or page.level != level or page.context == CANONICAL:
        return found(finding, R_ENTRY, slot, desc, level)
    totals.entries += 1
    if totals.entries > totals.leaves:
        return found(finding, R_COUNT, slot, totals.entries, totals.leaves)
    return check_host_half(vm, view, slot, desc, cipa, level, finding)


cdef bint check_node(vm_t *vm, mem_view_t *view, uint32_t node, uint32_t parent, totals_t *totals,
                     finding_t *finding) noexcept nogil:
    cdef uint64_t i, used = 0, cipa = vm.rmap.nodes[node].cipa
    cdef int level = vm.rmap.nodes[node].level, shift = level_shift(vm.arena.granule_bits, level)
    cdef uint32_t name
    if vm.rmap.nodes[node].parent != parent:
        return found(finding, R_NODE, parent, vm.rmap.nodes[node].parent, parent)
    if vm.rmap.nodes[node].key != node_key(cipa, level):
        return found(finding, R_NODE, parent, vm.rmap.nodes[node].key, node_key(cipa, level))
    for i in range(<uint64_t>1 << vm.arena.slot_bits):
        name = <uint32_t>((<uint64_t>node << vm.arena.slot_bits) + i)
        if vm.rmap.heads[name]:
            used += 1
            if not check_list(vm, view, name, level, cipa + (i << shift), totals, finding):
                return False
        if level < FINAL_LEVEL and vm.rmap.children[name]:
            used += 1
            if not check_node(vm, view, vm.rmap.children[name], name, totals, finding):
                return False
    if used != vm.rmap.nodes[node].used or (used == 0 and node != vm.rmap.root and not vm.unfinished):
        return found(finding, R_NODE, parent, vm.rmap.nodes[node].used, used)
    if level == FINAL_LEVEL:
        totals.leaf_nodes += 1
    else:
        totals.inner_nodes += 1
    return True


cdef bint check_table(vm_t *vm, mem_view_t *view, const table_t *table, totals_t *totals,
                      finding_t *finding) noexcept nogil:
    cdef uint64_t i
    cdef int shift = level_shift(vm.arena.granule_bits, table.start_level) + vm.arena.slot_bits
    for i in range(<uint64_t>1 << table.concatenated_bits):
        if not check_page(vm, view, table, table.root + <uint32_t>i, 0, table.start_level, i << shift, totals, finding):
            return False
    return True


cdef bint check_contexts(vm_t *vm, mem_view_t *view, totals_t *totals, finding_t *finding) noexcept nogil:
    cdef uint32_t i, j
    cdef uint64_t before
    for i in range(vm.context_count):
        before = totals.leaves
        if vm.contexts[i].generation == 0:
            continue                        # never had an owner
        if not check_table(vm, view, &vm.contexts[i].shadow, totals, finding):
            return False
        if not vm.contexts[i].valid:
            if totals.leaves != before and not vm.contexts[i].refs:
                return found(finding, R_ORPHANS, 0, totals.leaves - before, 0)
            continue
        for j in range(i):
            if vm.contexts[j].valid and same_key(&vm.contexts[i].config, &vm.contexts[j].config):
                return found(finding, R_KEYS, 0, j, i)
    return True


cdef void check_vm(vm_t *vm, mem_view_t *view, finding_t *finding) noexcept nogil:
    """Scan everything (exclusive side); ``finding`` is the first broken rule."""
    cdef totals_t totals
    cdef uint64_t installed = 0, rmap_bytes
    cdef uint64_t links = <uint64_t>8 << vm.arena.slot_bits, heads = <uint64_t>4 << vm.arena.slot_bits
    cdef uint32_t i
    totals.leaves = totals.entries = totals.table_pages = totals.link_pages = 0
    totals.inner_nodes = totals.leaf_nodes = totals.markers = 0
    found(finding, 0, 0, 0, 0)
    if not check_contexts(vm, view, &totals, finding) or not check_table(vm, view, &vm.canonical, &totals, finding):
        return
    if vm.teardown == TEARDOWN_REVERSE_MAP:
        if not check_node(vm, view, vm.rmap.root, 0, &totals, finding):
            return
        if totals.entries != totals.leaves:
            found(finding, R_COUNT, 0, totals.entries, totals.leaves)
            return
        rmap_bytes = (totals.inner_nodes * 2 + totals.leaf_nodes) * heads
        rmap_bytes += (totals.inner_nodes + totals.leaf_nodes) * sizeof(node_t) + totals.markers * MARKER_BYTES
        if vm.arena.rmap_bytes != rmap_bytes:
            found(finding, R_RMAP_BYTES, 0, vm.arena.rmap_bytes, rmap_bytes)
            return
    elif vm.teardown == TEARDOWN_INTERVAL_MAP:
        rmap_bytes = 0
        for i in range(vm.context_count):
            if vm.contexts[i].generation and not check_intervals(vm, &vm.contexts[i], &rmap_bytes, finding):
                return
        if vm.arena.rmap_bytes != rmap_bytes:
            found(finding, R_RMAP_BYTES, 0, vm.arena.rmap_bytes, rmap_bytes)
            return
    for i in range(vm.vcpu_count):
        installed += vm.vcpus[i].installed
    if installed - vm.removed != totals.leaves:
        found(finding, R_STATS, 0, installed - vm.removed, totals.leaves)
    elif vm.arena.table_bytes != totals.table_pages * page_cost(&vm.arena):
        found(finding, R_TABLE_BYTES, 0, vm.arena.table_bytes, totals.table_pages * page_cost(&vm.arena))
    elif vm.arena.link_bytes != totals.link_pages * links:
        found(finding, R_LINK_BYTES, 0, vm.arena.link_bytes, totals.link_pages * links)
