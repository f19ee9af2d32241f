"""The storm harness: its workloads, its index, its rounds, and the result that it hands out."""

import json
from pathlib import Path

import numpy as np
import pytest

import s2shadow as s2
from s2shadow import storm
from s2shadow.storm import (
    BLOCK,
    DEFAULT_POLICIES,
    PAGE,
    POLICIES,
    HostPlan,
    LeafIndex,
    Rig,
    StormConfig,
    StormError,
    build,
    run,
)

CAPTURES = Path(__file__).parent / "data" / "captures"

SHAPES = [
    {"contexts": 1, "pages": 1},
    {"contexts": 3, "pages": 513},
    {"contexts": 2, "pages": 700, "aliases": 3},
    {"contexts": 2, "pages": 2048, "block_mix": 0.5},
    {"contexts": 2, "pages": 2048, "block_mix": 1.0, "aliases": 2},
    {"contexts": 2, "pages": 1100, "block_mix": 0.9},
]
SHAPE_IDS = ["one-page", "three-contexts", "aliases", "half-blocks", "all-blocks-aliased", "ragged"]
SNAPSHOTS = ["a_storm_max_7.2/10_final", "b_linux_l2_thp_7.2/09_final", "b2_linux_l2_4k_7.2/00_booting",
             "d_vmid_rollover_nvhe_7.2/00_vms_110", "g_nested_7.2/10_final"]


def small(**changes):
    values = {"synthetic": True, "contexts": 2, "pages": 600, "events": 30, "seconds": 0.05}
    return StormConfig(**values | changes)


def expected_walks(workload):
    """What L1's tables say about every touch: per context the canonical address of each IPA."""
    for number, plan in enumerate(workload.contexts):
        cfg = s2.Stage2Config(plan.vttbr, plan.vtcr, features=workload.features, hcr=plan.hcr)
        walks = s2.walk_many(workload.mem, cfg, plan.ipas, update=False)
        yield number, plan, cfg, walks


# --- workloads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_synthetic_tables_say_what_the_index_says(shape):
    config = StormConfig(synthetic=True, **shape)
    workload = build(config)
    seen = set()
    for number, plan, cfg, walks in expected_walks(workload):
        assert not walks["status"].any() and (walks["perm"] == 39).all()
        assert len(s2.leaves(workload.mem, cfg)) == len(plan.ipas)
        seen |= set(zip(walks["pa"].tolist(), walks["size"].tolist(), [number] * len(walks), plan.ipas.tolist(),
                        strict=True))
    indexed = {(start, leaves.size, context, ipa) for leaves in workload.index.classes
               for start, context, ipa in zip(leaves.starts.tolist(), leaves.contexts.tolist(), leaves.ipas.tolist(),
                                              strict=True)}
    assert seen == indexed
    pages = {start + offset for start, size, _, _ in indexed for offset in range(0, size, PAGE)}
    assert len(pages) == workload.host.total_pages == config.contexts * config.pages


def test_contexts_have_canonical_pages_of_their_own_and_vmids_of_their_own():
    workload = build(small(contexts=5, pages=64))
    outputs = [set(walks["pa"].tolist()) for _, _, _, walks in expected_walks(workload)]
    assert len(set.union(*outputs)) == 5 * 64
    assert len({cfg.vmid for _, _, cfg, _ in expected_walks(workload)}) == 5


def test_block_mix_is_a_fraction_of_the_bytes():
    assert build(small(pages=4096, block_mix=0.5)).leaf_counts() == {"4K": 2 * 2048, "2M": 2 * 4}
    assert build(small(pages=4096, block_mix=1.0)).leaf_counts() == {"2M": 2 * 8}
    assert build(small(pages=4096)).leaf_counts() == {"4K": 2 * 4096}


def test_layout_depends_on_the_seed_alone():
    first, again, other = build(small()), build(small()), build(small(seed=2))
    assert first.index.classes[0].ipas.tolist() == again.index.classes[0].ipas.tolist()
    assert first.index.classes[0].ipas.tolist() != other.index.classes[0].ipas.tolist()


@pytest.mark.parametrize("snapshot", SNAPSHOTS)
def test_captured_tables_say_what_the_index_says(snapshot):
    """Each shadow leaf of the index is inside the guest leaf that a walk of its IPA finds."""
    workload = build(StormConfig(capture=CAPTURES / snapshot, contexts=2))
    where = {(context, ipa): (start, leaves.size) for leaves in workload.index.classes
             for start, context, ipa in zip(leaves.starts.tolist(), leaves.contexts.tolist(), leaves.ipas.tolist(),
                                            strict=True)}
    for number, plan, cfg, walks in expected_walks(workload):
        assert not walks["status"].any() and not walks["updated"].any()
        starts, sizes = np.array([where[number, ipa] for ipa in plan.ipas.tolist()], dtype=np.uint64).T
        assert (starts == walks["pa"]).all() and (sizes <= walks["size"]).all()
        assert int(sizes.sum()) == int(s2.leaves(workload.mem, cfg)["size"].sum())


def test_largest_vm_by_default_and_any_by_number():
    largest = build(StormConfig(capture=CAPTURES / "a_storm_max_7.2/10_final", contexts=1))
    other = build(StormConfig(capture=CAPTURES / "a_storm_max_7.2/10_final", contexts=1, vm=1))
    assert len(other.index) < len(largest.index)
    with pytest.raises(ValueError, match="no VM 9; it has 0, 1, 2, 4"):
        build(StormConfig(capture=CAPTURES / "a_storm_max_7.2/10_final", vm=9))


def test_vms_of_52_bits_are_left_out_and_refused():
    """Shadows have 48-bit addresses so far: the largest VM that fits is taken, the wide one is named."""
    wide = CAPTURES / "c_storm_lpa2_7.2/07_ksm_merged"
    assert build(StormConfig(capture=wide, contexts=1)).leaf_counts()["4K"] > 1000
    with pytest.raises(ValueError, match="VM 2 cannot be shadowed: under 48-bit physical addresses its 52-bit stage 2"):
        build(StormConfig(capture=wide, contexts=1, vm=2))


def test_writes_touch_only_writable_leaves():
    config = StormConfig(capture=CAPTURES / "b2_linux_l2_4k_7.2/09_final", contexts=1)
    reading, writing = build(config), build(StormConfig(capture=config.capture, contexts=1, write=True))
    assert 0 < len(writing.index) < len(reading.index)


def test_vmids_run_out():
    with pytest.raises(ValueError, match="contexts must be at most 255 with 8-bit VMIDs, got 256"):
        build(StormConfig(capture=CAPTURES / "d_vmid_rollover_nvhe_7.2/00_vms_110", contexts=256))


def test_shadow_units():
    """Blocks of 2 MiB stay, larger ones are cut into them, odd ones and those that share a block become pages."""
    ipas = np.array([0, 1 << 30, 3 << 30, 4 << 30, 5 << 30], dtype=np.uint64)
    outputs = np.array([8 << 30, 9 << 30, (10 << 30) + PAGE, 11 << 30, (11 << 30) + 7 * PAGE], dtype=np.uint64)
    sizes = np.array([1 << 30, BLOCK, 4 * PAGE, BLOCK, PAGE], dtype=np.uint64)
    found = list(zip(*(column.tolist() for column in storm.shadow_units(ipas, outputs, sizes)), strict=True))
    assert found[:512] == [(i * BLOCK, (8 << 30) + i * BLOCK, BLOCK) for i in range(512)]
    assert found[512] == (1 << 30, 9 << 30, BLOCK)
    assert found[513:517] == [((3 << 30) + i * PAGE, (10 << 30) + (i + 1) * PAGE, PAGE) for i in range(4)]
    assert found[517:1029] == [((4 << 30) + i * PAGE, (11 << 30) + i * PAGE, PAGE) for i in range(512)]
    assert found[1029:] == [(5 << 30, (11 << 30) + 7 * PAGE, PAGE)]


# --- index, host, events ---------------------------------------------------------------------------------------


def test_index_against_a_plain_search():
    rng = np.random.default_rng(5)
    n = 400
    sizes = np.where(rng.random(n) < 0.2, BLOCK, PAGE).astype(np.uint64)
    starts = rng.integers(0, 4 * BLOCK, n, dtype=np.uint64) & ~(sizes - np.uint64(1))
    contexts = rng.integers(0, 3, n)
    ipas = np.arange(n, dtype=np.uint64) << np.uint64(21)
    index = LeafIndex(starts, sizes, contexts, ipas)
    assert len(index) == n
    for _ in range(200):
        low = int(rng.integers(0, 1024)) * PAGE
        high = low + int(rng.integers(1, 600)) * PAGE
        hit = (starts < high) & (starts + sizes > low)
        context, ipa = index.overlapping(low, high)
        assert sorted(zip(context.tolist(), ipa.tolist(), strict=True)) == \
            sorted(zip(contexts[hit].tolist(), ipas[hit].tolist(), strict=True))
        assert (np.diff(context) >= 0).all()
        assert index.required(np.array([low]), np.array([high]))[0] == hit.sum()


class Recorder:
    """A host that remembers what was mapped and unmapped."""

    def __init__(self):
        self.host = self
        self.calls = []

    def map(self, cipa, pa, size):
        self.calls.append(("map", cipa, size))
        assert (pa % BLOCK == 0) == (size == BLOCK)

    def unmap(self, start, end):
        self.calls.append(("unmap", start, end - start))


def host_plan():
    pages = np.array([0, 1, 2, 10, 11], dtype=np.uint64) * np.uint64(PAGE)
    return HostPlan(pages, np.array([BLOCK, 3 * BLOCK], dtype=np.uint64))


@pytest.mark.parametrize("start, end, calls", [
    (PAGE, 2 * PAGE, [("map", PAGE, PAGE)]),
    (2 * PAGE, 11 * PAGE, [("map", 2 * PAGE, PAGE), ("map", 10 * PAGE, PAGE)]),
    (5 * PAGE, 6 * PAGE, []),
    (BLOCK + PAGE, BLOCK + 2 * PAGE, [("unmap", BLOCK, BLOCK), ("map", BLOCK, BLOCK)]),
    (11 * PAGE, BLOCK + PAGE, [("map", 11 * PAGE, PAGE), ("unmap", BLOCK, BLOCK), ("map", BLOCK, BLOCK)]),
    (2 * BLOCK, 3 * BLOCK, []),
])
def test_giving_back_is_what_was_there(start, end, calls):
    vm = Recorder()
    host_plan().give_back(vm, start, end)
    assert vm.calls == calls


def test_host_maps_runs_and_blocks():
    vm = Recorder()
    host_plan().map_all(vm)
    assert vm.calls == [("map", 0, 3 * PAGE), ("map", 10 * PAGE, 2 * PAGE),
                        ("map", BLOCK, BLOCK), ("map", 3 * BLOCK, BLOCK)]


def test_events_hit_mapped_pages_evenly_and_by_seed():
    plan = host_plan()
    events = plan.pick_events(20_000, 1, 7)
    assert events.tolist() == plan.pick_events(20_000, 1, 7).tolist() != plan.pick_events(20_000, 1, 8).tolist()
    in_blocks = (events >= BLOCK).mean()
    assert 1024 / 1029 - 0.01 < in_blocks < 1
    assert set((events[events < BLOCK] // PAGE).tolist()) == {0, 1, 2, 10, 11}
    assert not ((events >= 2 * BLOCK) & (events < 3 * BLOCK)).any()


def test_long_events_end_inside_the_set():
    plan = host_plan()
    assert int(plan.pick_events(1000, 1029, 1).max()) + 1029 * PAGE <= 4 * BLOCK
    with pytest.raises(ValueError, match="event_pages 1,030 is more than the 1,029 canonical pages"):
        plan.pick_events(1, 1030, 1)


# --- rounds ----------------------------------------------------------------------------------------------------


def expected_removals(workload, policy, config, start, end):
    """What maps the pages; where they have aliases an interval map gives up the whole contexts; or everything."""
    if policy.startswith("blow-away"):
        return len(workload.index)
    contexts, _ = workload.index.overlapping(start, end)
    if policy == "interval-map" and config.aliases > 1:
        return sum(len(workload.contexts[number].ipas) for number in set(contexts.tolist()))
    return len(contexts)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_rounds_remove_and_restore(shape, policy):
    """After every round the set is whole, and what went is what the policy must take."""
    config = StormConfig(synthetic=True, **shape)
    workload = build(config)
    rig = Rig(workload, policy, config)
    ns, filled = rig.fill()
    assert ns > 0 and filled == rig.full == rig.vm.stats.live
    rng = np.random.default_rng(2)
    for start in workload.host.pick_events(12, 1, 3).tolist():
        end = start + PAGE * int(rng.integers(1, min(4, config.pages) + 1))
        required = int(workload.index.required(start, end))
        done = rig.round(start, end, required)
        assert done.removed == done.refaults == expected_removals(workload, policy, config, start, end)
        rig.vm.check()
    rig.verify()


@pytest.mark.parametrize("snapshot", SNAPSHOTS)
def test_rounds_on_captures(snapshot):
    config = StormConfig(capture=CAPTURES / snapshot, contexts=2)
    workload = build(config)
    rig = Rig(workload, "reverse-map", config)
    rig.fill()
    for start in workload.host.pick_events(20, 3, 1).tolist():
        required = int(workload.index.required(start, start + 3 * PAGE))
        assert rig.round(start, start + 3 * PAGE, required).removed == required >= 2
    rig.verify()
    rig.vm.check()


def test_harness_finds_what_went_too_far():
    """Leaves that vanish beside the event are noticed by the count, searched for, and faulted in."""
    config = small()
    workload = build(config)
    rig = Rig(workload, "reverse-map", config)
    rig.fill()
    start, other = workload.host.pick_events(2, 1, 1).tolist()
    assert start != other
    rig.vm.unmap(other, other + PAGE)
    workload.host.give_back(rig.vm, other, other + PAGE)
    done = rig.round(start, start + PAGE, 1)
    assert (done.removed, done.refaults) == (1, 2)
    rig.verify()


def test_harness_refuses_an_engine_that_keeps_too_much(monkeypatch):
    """A leaf that survives its host page must fail the run, not flatter it."""
    config = small()
    workload = build(config)
    rig = Rig(workload, "reverse-map", config)
    rig.fill()
    start = int(workload.host.pick_events(1, 1, 1)[0])
    monkeypatch.setattr(workload.host, "give_back", lambda *_: None)
    with pytest.raises(StormError, match="was answered HOST_FAULT"):
        rig.round(start, start + PAGE, 1)
    with pytest.raises(StormError, match="was not mapped at the end"):
        rig.verify()


# --- results ---------------------------------------------------------------------------------------------------

TOP = {"schema", "machine", "config", "policies", "ratios", "workload", "floor", "interrupted"}
POLICY_KEYS = {"events", "fault_ns", "faults_per_s", "teardown_ns_per_event", "refaults_per_event",
               "refault_ns_per_event", "total_ns_per_event", "entries_removed", "entries_required", "table_bytes",
               "reverse_map_bytes_per_entry", "leaves", "kernel_steps"}


@pytest.fixture(scope="module")
def result():
    return run(small(events=200))


def test_schema(result):
    assert set(result) == TOP and result["schema"] == 1 and result["interrupted"] is False
    assert list(result["policies"]) == list(DEFAULT_POLICIES)
    for row in result["policies"].values():
        assert set(row) >= POLICY_KEYS
        assert set(row["teardown_ns_per_event"]) == {"p50", "p99", "max", "mean"}
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert set(result["machine"]) >= {"system", "cpu", "cpus", "python", "numpy", "s2shadow", "timer_ns"}
    assert result["config"]["events"] == 200 and result["config"]["seed"] == 1


def test_figures_fit_together(result):
    rows = result["policies"]
    exact, blown = rows["reverse-map"], rows["blow-away"]
    assert exact["events"] == 200 and exact["entries_removed"] == exact["entries_required"] == 200
    assert exact["refaults_per_event"] == 1
    for row in rows.values():
        assert row["events"] >= 5 and row["leaves"] == 1200
        spread = row["teardown_ns_per_event"]
        assert 0 < spread["p50"] <= spread["p99"] <= spread["max"]
        assert row["total_ns_per_event"] == pytest.approx(spread["mean"] + row["refault_ns_per_event"])
        assert row["faults_per_s"] == pytest.approx(1e9 / row["fault_ns"])
    assert blown["entries_removed"] == blown["events"] * 1200
    assert blown["refaults_per_event"] == 1200 and blown["kernel_steps"] > 0
    assert exact["kernel_steps"] == 0


def test_ratios(result):
    rows, ratios = result["policies"], result["ratios"]
    assert set(ratios) == {"teardown_p50", "total", "refaults"}
    for name in ("blow-away", "blow-away-lean"):
        assert ratios["refaults"][name] == 1200
        assert ratios["total"][name] == pytest.approx(
            rows[name]["total_ns_per_event"] / rows["reverse-map"]["total_ns_per_event"])
        assert ratios["teardown_p50"][name] == pytest.approx(
            rows[name]["teardown_ns_per_event"]["p50"] / rows["reverse-map"]["teardown_ns_per_event"]["p50"])
    assert run(small(teardown=("blow-away-lean",)))["ratios"] == {"teardown_p50": {}, "total": {}, "refaults": {}}


def test_three_designs_side_by_side():
    """Without aliases the interval map takes what the reverse map takes; with them whole contexts, and the steps."""
    designs = ("reverse-map", "interval-map", "blow-away")
    plain = run(small(events=30, teardown=designs))["policies"]
    assert [plain[name]["refaults_per_event"] for name in designs] == [1, 1, 1200]
    assert plain["interval-map"]["kernel_steps"] == 0
    assert plain["interval-map"]["reverse_map_bytes_per_entry"] == 104
    result = run(small(events=30, aliases=2, teardown=designs))
    rows = result["policies"]
    assert [rows[name]["refaults_per_event"] for name in designs] == [2, 1200, 2400]
    assert rows["interval-map"]["kernel_steps"] == rows["interval-map"]["events"] << 18
    assert list(result["ratios"]["refaults"].values()) == [600, 1200]


def test_floor(result):
    assert result["floor"]["bytes"] > 1200 * 8
    assert 0.2 < result["floor"]["ns_per_load"] < 2000


def test_reverse_map_costs_nothing_where_there_is_none(result):
    assert result["policies"]["reverse-map"]["reverse_map_bytes_per_entry"] > 8
    assert result["policies"]["blow-away"]["reverse_map_bytes"] < 8192        # an empty root


def test_slow_policies_stop_in_time_but_not_too_soon():
    rows = run(small(events=100_000, seconds=0.001, min_events=7, teardown=("blow-away",)))["policies"]
    assert 7 <= rows["blow-away"]["events"] < 1000


def test_progress_is_told():
    told = []
    run(small(events=600), lambda policy, done: told.append((policy, done)))
    assert [policy for policy, done in told if done == 1.0][-1] == "blow-away-lean"
    assert {policy for policy, _ in told} == set(DEFAULT_POLICIES)
    assert all(0 <= done <= 1 for _, done in told)


def test_tracking_can_be_off():
    rows = run(small(track_tlbis=False))["policies"]
    assert all(row["tlbis_per_event"] == 0 for row in rows.values())
    rows = run(small())["policies"]
    assert all(row["tlbis_per_event"] > 0 for row in rows.values())


def test_extent_of_tlbis_is_recorded_and_used(monkeypatch):
    """A storm has no TLBI of L1 in it, so that the leaves are the same either way."""
    seen = []
    real = s2.NestedVM
    monkeypatch.setattr("s2shadow.engine.NestedVM", lambda *args, **kw: seen.append(kw["tlbi"]) or real(*args, **kw))
    for mode in ("exact", "kvm72"):
        result = run(small(tlbi=mode, teardown=("reverse-map",)))
        assert result["config"]["tlbi"] == mode
        assert result["policies"]["reverse-map"]["entries_removed"] == 30
    assert seen == ["exact", "kvm72"]


def test_interrupt_keeps_complete_rounds():
    def interrupt(policy, done):
        if policy == "blow-away" and done:
            raise KeyboardInterrupt
    result = run(small(events=300, seconds=5), interrupt)
    assert result["interrupted"] is True
    assert list(result["policies"]) == ["reverse-map", "blow-away"]
    assert result["policies"]["reverse-map"]["events"] == 300
    assert result["policies"]["blow-away"]["events"] >= 1 and result["policies"]["blow-away"]["interrupted"]
    assert result["ratios"]["refaults"] == {"blow-away": 1200}


def test_interrupt_before_the_first_round():
    def interrupt(policy, done):
        raise KeyboardInterrupt
    result = run(small(), interrupt)
    assert result["interrupted"] is True and result["policies"] == {}


def test_garbage_collection_is_on_again():
    import gc

    run(small(events=5))
    assert gc.isenabled()


@pytest.mark.parametrize("wrong, message", [
    ({"contexts": 0}, "contexts must be at least 1, got 0"),
    ({"pages": -1}, "pages must be at least 1, got -1"),
    ({"event_pages": 0}, "event_pages must be at least 1"),
    ({"block_mix": 2}, "block_mix must be between 0 and 1, got 2"),
    ({"seed": -1}, "seed must not be negative"),
    ({"seconds": 0}, "seconds must be positive"),
    ({"teardown": ()}, "teardown names no policy"),
    ({"teardown": ("prayer",)},
     "teardown must be of reverse-map, interval-map, blow-away, blow-away-lean, got 'prayer'"),
    ({"tlbi": "loose"}, "tlbi must be one of exact, kvm72, got 'loose'"),
    ({"capture": "x"}, "capture and synthetic exclude each other"),
])
def test_wrong_configurations(wrong, message):
    with pytest.raises(ValueError, match=message):
        small(**wrong)
