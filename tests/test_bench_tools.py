"""What the measuring tools compute (differences, budgets, limits, the page); the floors do the engine's work."""

import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

import attacks
import cases
import instructions
import report
import s2shadow as s2
from beds import scattered
from instructions import Row, compare, lowered, per_operation, read_dumps
from nest import BLOCK, DATA, HCR, PAGE, Nest, range_operand, u64
from s2shadow._floor import Lean, LeanWalk, bare_unmap_each, fault_each, tlbi_each, unmap_each, walk_each

BUDGETS = tomllib.loads(instructions.BUDGETS.read_text())


# --- counting ----------------------------------------------------------------------------------------------------


def test_fixed_cost_cancels():
    assert per_operation(5000 + 30 * 7, 5000 + 60 * 7, 30, 60) == 7


def test_dumps_are_read_by_label(tmp_path):
    (tmp_path / "dump.1").write_text("desc: Trigger: Client Request: a@10\nevents: Ir\nfn=(1)\n1 5\ntotals: 5\n")
    (tmp_path / "dump.2").write_text("desc: Trigger: Program termination\ntotals: 7\n")
    (tmp_path / "dump").write_text("")
    assert read_dumps(tmp_path) == {"a@10": (5, tmp_path / "dump.1")}


@pytest.mark.parametrize(
    ("measured", "most", "goal", "holds", "reached"),
    [
        (100.9, 100.0, 150, True, True),        # figures repeat to 1 %
        (101.1, 100.0, 150, False, True),
        (150.0, None, 150, True, True),
        (150.1, 160, 150, True, False),         # a goal is exact
        (5.4, 5.0, None, True, True),           # half an instruction is no growth
        (5.6, 5.0, None, False, True),
        (1e9, None, None, True, True),
    ],
)  # fmt: skip
def test_what_holds_and_what_reaches_its_goal(measured, most, goal, holds, reached):
    row = Row("x", measured, most, goal)
    assert (row.holds, row.reached) == (holds, reached)


def test_figures_are_compared_as_their_budgets_mean_them():
    figures = {"bare": 300.0, "one": 500.0, "eight": 1200.0}
    entries = {
        "bare": {},
        "one": {"beyond": "bare", "most": 199.0, "goal": 400},
        "eight": {"beyond": "one", "per_leaf": 7, "goal": 150},
        "not counted": {"goal": 1},
    }
    assert compare(figures, entries, True) == [
        Row("bare", 300.0, None, None), Row("one", 200.0, 199.0, 400), Row("eight", 100.0, None, 150),
    ]  # fmt: skip
    assert compare(figures, entries, False)[1].most is None


def test_budgets_are_lowered_and_never_raised():
    text = 'down = { most = 100, goal = 150 }\nup = { most = 10 }\nnew = {}\nrest = { goal = 3, beyond = "up" }\n'
    rows = [Row("down", 90.04, 100, 150), Row("up", 10.05, 10, None), Row("new", 7.26, None, None),
            Row("rest", -0.2, None, 3)]  # fmt: skip
    assert tomllib.loads(lowered(text, rows)) == {
        "down": {"most": 90.0, "goal": 150}, "up": {"most": 10}, "new": {"most": 7.3},
        "rest": {"most": 0.0, "goal": 3, "beyond": "up"},
    }  # fmt: skip


def test_every_budget_has_a_case_and_every_case_a_budget():
    curves = {name for points in cases.CURVES.values() for name in points.values()}
    assert set(BUDGETS["instructions"]) == set(cases.CASES) - curves | set(cases.FIGURES)
    order = list(BUDGETS["instructions"])
    for name, entry in BUDGETS["instructions"].items():
        assert set(entry) <= {"most", "goal", "beyond", "per_leaf"}
        if "beyond" in entry:
            assert order.index(entry["beyond"]) < order.index(name)
        assert "most" in entry


def test_the_cases_that_a_choice_needs():
    entries = {"bare": {}, "one": {"beyond": "bare"}, "other": {}}
    assert instructions.choose(entries, ["one"]) == ["bare", "one"]
    assert instructions.choose(entries, [""]) == ["bare", "one", "other"]
    assert instructions.choose(entries, ["nothing"]) == []


def test_compiler_is_read_from_a_module(tmp_path):
    module = tmp_path / "module.so"
    module.write_bytes(b"\x7fELF..\0GCC: (Debian 12.2.0-14) 12.2.0\0.shstrtab\0")
    assert instructions.compiler_of(module) == "GCC: (Debian 12.2.0-14) 12.2.0"
    module.write_bytes(b"\x7fELF")
    assert instructions.compiler_of(module) == "unknown"


def test_without_valgrind_nothing_is_counted_and_it_says_so(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert instructions.main([]) == instructions.NOT_COUNTED
    assert capsys.readouterr().err == (
        "instructions: not counted: valgrind is not installed (Debian: apt-get install valgrind)\n"
    )


def test_unknown_case(capsys):
    assert instructions.main(["--profile", "walks"]) == 2
    assert "no such case" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(set(BUDGETS["instructions"]) - set(cases.FIGURES)))
def test_each_case_does_what_it_counts(name):
    """Both sizes of a case return what they must, and the second is twice the first."""
    sizes = []

    def measure(prepare, n):
        for size in (n, 2 * n):
            run, expected = prepare(size)
            assert run() == expected
            sizes.append(size)

    cases.CASES[name](measure)
    assert sizes == [sizes[0], 2 * sizes[0]]


@pytest.mark.parametrize("name", sorted(cases.FIGURES))
def test_each_figure_is_what_the_budget_says(name):
    """Bytes are counted, not timed: the same on every machine."""
    entry = BUDGETS["instructions"][name]
    assert entry["most"] - 0.2 <= cases.FIGURES[name]() <= entry["most"] * instructions.REPEATS_TO
    assert entry["most"] <= entry["goal"]


# --- nests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"contexts": 3}, {"contexts": 3, "shared": True}, {"aliases": 3}, {"levels": 3, "spread": True},
     {"regions": 5, "unshadowed": 100}, {"size": BLOCK}],
    ids=str,
)  # fmt: skip
def test_a_nest_maps_what_it_says(options):
    nest = Nest(700, **options)
    for context, vcpu in enumerate(nest.vm.vcpus):
        rows = vcpu.fault_many(nest.ipas, s2.READ)
        assert (rows["kind"] == s2.MAPPED).all() and (rows["size"] == nest.size).all()
        assert (rows["cipa"] == nest.outputs(context)).all()
    nest.vm.check()
    for cipa in nest.canonical[::97].tolist():
        leaves = nest.vm.reverse(cipa)
        if cipa in nest.unshadowed:
            assert len(leaves) == 0
        else:
            contexts, ipas = nest.where(u64([cipa]))
            index = np.array([context.index for context in nest.loaded])
            assert sorted(zip(index[contexts], ipas, strict=True)) == sorted(
                zip(leaves["context"], leaves["ipa"], strict=True))  # fmt: skip


# --- loops over the engine ---------------------------------------------------------------------------------------


def test_loops_do_what_the_calls_do():
    nest, other = Nest(600), Nest(600)
    ipas = nest.ipas[scattered(600)]
    assert walk_each(nest.mem, nest.config(), ipas, s2.READ) == 600
    assert fault_each(nest.state, 0, ipas, s2.READ, s2.MAPPED) == 600
    assert fault_each(nest.state, 0, ipas, s2.READ, s2.HIT) == 600
    other.fill()
    starts = nest.canonical[scattered(600, 2)[:200]]
    assert unmap_each(nest.state, u64(starts), PAGE) == 200
    for start in starts.tolist():
        assert other.vm.unmap(start, start + PAGE).leaves == 1
    assert (nest.vm.shadow(0)["ipa"] == other.vm.shadow(0)["ipa"]).all()
    named = nest.ipas[:50] >> np.uint64(12)
    there = int(np.isin(nest.ipas[:50], nest.vm.shadow(0)["ipa"]).sum())
    assert tlbi_each(nest.state, cases.IPAS2E1IS, named, nest.vttbrs[0], nest.vtcr, HCR) == there > 0
    nest.vm.check()
    with pytest.raises(ValueError, match="no TLBI"):
        tlbi_each(nest.state, 0, named, 0, 0, 0)


def test_the_bare_notifier_leaves_the_same_canonical_table():
    nest, bare = Nest(600, load=False), Nest(600, load=False)
    starts = u64(nest.canonical[scattered(600)[:200]])
    assert unmap_each(nest.state, starts, PAGE) == 0
    assert bare_unmap_each(bare.state, starts, PAGE) == 200
    assert nest.vm.host.leaves().tolist() == bare.vm.host.leaves().tolist()
    assert nest.vm.stats == bare.vm.stats
    bare.vm.check()


@pytest.mark.parametrize("pages", [2, 64, 1 << 10, 1 << 16, 1 << 20])
def test_range_operands(pages):
    tlbi = s2.decode_tlbi(cases.RIPAS2E1IS, range_operand(8 * PAGE, pages), vtcr=1 << 31)
    assert (tlbi.start, tlbi.end) == (8 * PAGE, (8 + pages) * PAGE)


# --- floors ------------------------------------------------------------------------------------------------------


@pytest.fixture
def nest():
    return Nest(1500)


@pytest.fixture
def lean(nest):
    return Lean(LeanWalk(nest.images[0], nest.roots[0], 4), DATA, 1500, 1500)


@pytest.mark.parametrize("levels", [3, 4])
def test_lean_walks_find_what_walks_find(levels):
    nest = Nest(1500, levels=levels)
    ipas = nest.ipas[scattered(1500)]
    total = int(s2.walk_many(nest.mem, nest.config(), ipas)["pa"].sum())
    floor = LeanWalk(nest.images[0], nest.roots[0], levels)
    assert floor.serial(ipas)[1] == total
    for size in (1, 7, 64):
        assert floor.batch(ipas, size)[1] == total
    for size in (0, 65):
        with pytest.raises(ValueError, match="between 1 and 64"):
            floor.batch(ipas, size)


@pytest.mark.parametrize("how", ["faults", "batched", "fill"])
def test_lean_faults_put_every_leaf_on_the_list_of_its_page(nest, lean, how):
    if how == "faults":
        lean.faults(nest.ipas)
    elif how == "batched":
        lean.faults_batched(nest.ipas[scattered(1500)], 48)
    else:
        lean.fill(nest.ipas, nest.outputs(0))
    half = u64(nest.canonical[:700])
    assert lean.removals(half)[1] == 700 and lean.removals(half)[1] == 0
    assert lean.write_protect(DATA, 1500, 16)[1] == 800
    assert lean.range_removal(0, 1500, 16)[1] == 800
    assert lean.removals(u64(nest.canonical))[1] == 0


def test_lean_removals_follow_aliases():
    nest = Nest(300, aliases=4)
    lean = Lean(None, DATA, 300, 1200)
    lean.fill(nest.ipas, nest.outputs(0))
    assert lean.removals(u64(nest.canonical[:10]))[1] == 40
    lean.clear()
    assert lean.removals(u64(nest.canonical))[1] == 0


def test_a_floor_that_is_too_small_says_so(nest):
    lean = Lean(LeanWalk(nest.images[0], nest.roots[0], 4), DATA, 1500, 1)
    with pytest.raises(MemoryError, match="not as dense"):
        lean.fill(u64(np.arange(300) << 21), u64(np.full(300, DATA)))


# --- the page ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "row", "text", "kept"),
    [
        ({"ns": 45}, {"ns_per_operation": 45.0}, "45 ns", True),
        ({"ns": 45}, {"ns_per_operation": 45.1}, "45 ns", False),
        ({"ratio": 1.5, "text": "near"}, {"ns_per_operation": 1.0, "times_floor": 1.5}, "near", True),
        ({"ratio": 1.5, "text": "near"}, {"ns_per_operation": 1.0, "times_floor": 1.6}, "near", False),
        ({"speedup": 1.8}, {"ns_per_operation": 1.0, "speedup": 1.9}, "1.8 times one thread", True),
        ({"speedup": 1.8}, {"ns_per_operation": 1.0, "speedup": 1.7}, "1.8 times one thread", False),
    ],
)
def test_limits(limit, row, text, kept):
    assert report.judged(limit, row) == (text, kept)


def test_every_limit_names_a_benchmark():
    functions = "".join(path.read_text() for path in Path(report.HERE).glob("bench_*.py"))
    for name in BUDGETS["times"]:
        assert f"def {name.split('[')[0]}(" in functions


BENCHMARKS = [
    {"name": "bench_fault_random_batch", "group": "limits", "min": 1.0, "operations": 10, "ns_per_operation": 240.0,
     "floor_ns": 160.0, "times_floor": 1.5, "serial_floor_ns": 310.04},
    {"name": "bench_x", "group": "others", "min": 2e-6},
]  # fmt: skip
FIGURES = {"built": {"compiler": "GCC 1", "flags": "-O2"}, "figures": {"walk_3_levels": 151.0, "tlbi_ipa": 499.0}}


def test_page(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "benchmarks.json").write_text(json.dumps(BENCHMARKS))
    (tmp_path / "instructions.json").write_text(json.dumps(FIGURES))
    points = [{"x": 1, "ns": 10.0, "floor_ns": 5.0}, {"x": 4, "ns": 10.0, "floor_ns": 5.0}]
    (tmp_path / "scaling.json").write_text(json.dumps({"notifier_by_contexts": points}))
    assert report.main([str(tmp_path)]) == 0
    page = (tmp_path / "README.md").read_text()
    assert capsys.readouterr().out == f"{tmp_path / 'README.md'}\n"
    assert re.search(r"walk_3_levels` \| \*\*151\.0\*\* \| 150 \| \*\*not reached\*\* \| 774 \|", page)
    assert re.search(r"tlbi_ipa` \| \*\*499\.0\*\* \| 500 \| reached \|", page)
    assert re.search(r"bench_fault_random_batch` \| \*\*240\.0\*\* \| 160\.0 \| 1\.5 \| .* \| kept \|", page)
    assert re.search(r"bench_x` \| 2,000 \|", page)
    assert "(notifier_by_contexts.svg)" in page
    first = (tmp_path / "notifier_by_contexts.svg").read_bytes()
    report.main([str(tmp_path)])
    assert (tmp_path / "notifier_by_contexts.svg").read_bytes() == first


def test_a_page_says_what_is_missing(tmp_path, capsys):
    assert report.main([str(tmp_path / "nowhere")]) == 2
    assert "no folder" in capsys.readouterr().err
    assert report.main([str(tmp_path)]) == 2
    assert "nothing measured" in capsys.readouterr().err
    (tmp_path / "instructions.json").write_text(json.dumps(FIGURES))
    assert report.main([str(tmp_path)]) == 0
    assert "`benchmarks.json` is missing" in (tmp_path / "README.md").read_text()


def test_attacks(tmp_path):
    """Every attack, every event in one context and in many, and the TLBI, with few leaves: a row for each."""
    page = tmp_path / "attacks.md"
    assert attacks.main(["--small", "--markdown", str(page)]) == 0
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert len(rows) == 4 + len(attacks.ATTACKS) + 2 * 7 + 1        # four tables
    bounded = [row.split(" | ") for row in rows if row.count("MiB") == 2]
    assert len(bounded) == 4
    assert all(float(row[-3].split()[0]) <= float(row[-2].split()[0]) for row in bounded)
