"""Sweeps: specs, the journal, executors whose workers die, results that go on where they stopped."""

import builtins
import io
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from dataclasses import fields
from itertools import product
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s2shadow import storm, sweepreport
from s2shadow.cli import main
from s2shadow.journal import Journal, JournalError
from s2shadow.storm import DEFAULT_POLICIES, POLICIES, StormConfig
from s2shadow.sweep import SweepError, WorkerPool, run_sweep
from s2shadow.sweepspec import EXAMPLE, KEYS, SpecError, load_spec, parse_spec, points
from sweepwork import TINY, Deadly, read_csv

CAPTURES = Path(__file__).parent / "data" / "captures"


@pytest.fixture
def spec(tmp_path):
    """Write a spec of tiny storms and load it."""
    def write(text, name="spec.toml"):
        (tmp_path / name).write_text(TINY + text)
        return load_spec(tmp_path / name)
    return write


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out.csv"


class Here(Executor):
    """Runs each point where it is submitted, and remembers what ran."""

    def __init__(self):
        self.ran = []

    def submit(self, run, config):
        self.ran.append(config)
        future = Future()
        future.set_result(run(config))
        return future


# --- specs -----------------------------------------------------------------------------------------------------


def test_every_setting_of_a_storm_is_a_key():
    assert set(KEYS) == {item.name for item in fields(StormConfig)} - {"synthetic"}


def test_the_example_is_a_spec(tmp_path):
    (tmp_path / "example.toml").write_text(EXAMPLE)
    found = points(load_spec(tmp_path / "example.toml"))
    assert len(found) == len(set(found)) == 3 * 2 * 2 * 2 * 2
    assert {(config.event_pages, config.events) for config in found} == {(1, 2000), (512, 200)}
    assert {config.teardown for config in found} == {("reverse-map", "blow-away")}
    assert all(config.synthetic for config in found)


def test_the_example_with_its_last_grid(tmp_path):
    """Captures beside generated tables: what is said of the latter does not stand in the way."""
    text, last = EXAMPLE.split("# [[grid]]")
    (tmp_path / "example.toml").write_text(text + "[[grid]] #" + last.replace("# capture", "capture"))
    found = points(load_spec(tmp_path / "example.toml"))
    assert len(found) == 48 + 3 * 2
    assert [(config.contexts, config.seed) for config in found if not config.synthetic] == \
        list(product([1, 4, 16], [1, 2]))


def test_order_and_defaults(spec):
    found = points(spec("seed = [1, 2]\ncontexts = [3, 1]"))
    assert [(config.seed, config.contexts) for config in found] == [(1, 3), (1, 1), (2, 3), (2, 1)]
    plain = StormConfig(synthetic=True, contexts=3, events=6, seconds=0.001, min_events=2)
    assert found[0] == plain


def test_grids_are_a_union_over_what_is_above(spec):
    found = points(spec("""
        contexts = [1, 2]
        teardown = "reverse-map"
        [[grid]]
        pages = [8, 16]
        [[grid]]
        pages = [16, 32]
        teardown = ["reverse-map", "blow-away"]
        contexts = 2
    """))
    assert [(c.contexts, c.pages, c.teardown) for c in found] == [
        (1, 8, ("reverse-map",)), (1, 16, ("reverse-map",)), (2, 8, ("reverse-map",)),
        (2, 16, ("reverse-map", "blow-away")), (2, 32, ("reverse-map", "blow-away"))]


def test_captures_are_found_from_the_spec(tmp_path):
    (tmp_path / "spec.toml").write_text('capture = ["shipped", "snap/one"]\n')
    shipped, other = points(load_spec(tmp_path / "spec.toml"))
    assert (shipped.capture, shipped.synthetic) == (None, False)
    assert (other.capture, other.synthetic) == (str(tmp_path / "snap" / "one"), False)


AXES = {
    "contexts": st.integers(1, 9), "pages": st.integers(1, 99), "aliases": st.integers(1, 4),
    "block_mix": st.sampled_from([0.0, 0.25, 1.0]), "event_pages": st.integers(1, 5), "seed": st.integers(0, 2**63 - 1),
    "write": st.booleans(), "tlbi": st.sampled_from(["exact", "kvm72"]), "events": st.integers(1, 50)}


@given(st.fixed_dictionaries({}, optional={name: st.lists(values, min_size=1, max_size=3, unique=True)
                                           for name, values in AXES.items()}))
def test_points_are_the_cross_product(axes):
    text = "".join(f"{name} = {json.dumps(values)}\n" for name, values in axes.items())
    found = points(parse_spec(text.encode(), "x.toml", Path()))
    expected = list(product(*axes.values()))
    assert [tuple(getattr(config, name) for name in axes) for config in found] == expected


TOML_VALUES = st.recursive(
    st.booleans() | st.integers(-2**70, 2**70) | st.floats() | st.text("abcé\"\\ -", max_size=6)
    | st.sampled_from(["exact", "shipped", "reverse-map"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "seed"]), inner, max_size=2),
    max_leaves=5)


def toml(value):
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


@given(st.dictionaries(st.sampled_from([*KEYS, "grid", "synthetic", "x"]), TOML_VALUES, max_size=4))
def test_any_other_spec_is_refused_by_name_or_taken(table):
    """Whatever the types: a SpecError of one line that names the file, or storms that could be run and stored."""
    text = "".join(f"{key} = {toml(value)}\n" for key, value in table.items())
    try:
        found = points(parse_spec(text.encode(), "x.toml", Path()))
    except SpecError as error:
        assert str(error).startswith("x.toml") and "\n" not in str(error)
        return
    assert found
    for config in found:
        json.dumps(storm.config_dict(config), allow_nan=False)
        for key in set(table) - {"grid", "capture", "teardown"}:
            values = table[key] if isinstance(table[key], list) else [table[key]]
            assert any(getattr(config, key) == value and isinstance(value, bool) == (KEYS[key] is bool)
                       for value in values) or "grid" in table


@pytest.mark.parametrize("text, message", [
    ("contexts = [1, 2", "Unclosed array"),
    ("contexts = 1\ncontexts = 2", "Cannot overwrite a value"),
    ("context = 1", "no key 'context'; did you mean contexts?"),
    ("qqq = 1", "no key 'qqq'; there are capture, vm, contexts"),
    ("[storm]\npages = 1", "no key 'storm'"),
    ("pages = []", "pages is an empty list"),
    ("pages = 'many'", 'pages must be a whole number, got "many"'),
    ("pages = true", "pages must be a whole number, got true"),
    ("pages = [1, 2.5]", "pages must be a whole number, got 2.5"),
    ("pages = [[1]]", "pages must be a whole number, got a list"),
    ("pages = {from = 1}", "pages must be a whole number, got a table"),
    ("pages = 2020-01-01", "pages must be a whole number, got 2020-01-01"),
    ("pages = 0", "pages must be at least 1, got 0"),
    ("seed = -1", "seed must not be negative"),
    ("seed = 9223372036854775808", "seed must be below 2^63"),
    ("block_mix = nan", "block_mix must be a number, got nan"),
    ("seconds = inf", "seconds must be a number, got inf"),
    ("block_mix = [0, 1.5]", "block_mix must be between 0 and 1, got 1.5"),
    ("write = 1", "write must be true or false, got 1"),
    ("tlbi = 'loose'", "tlbi must be one of exact, kvm72"),
    ("teardown = 'prayer'", "teardown must be of reverse-map"),
    ("teardown = []", "teardown is an empty list"),
    ("vm = 0", "vm needs a capture"),
    ("capture = 'shipped'\npages = 4", "pages is for generated tables, and capture is given"),
    ("capture = 'shipped'\n[[grid]]\npages = 4", "pages is for generated tables"),
    ("capture = 3", "capture must be text, got 3"),
    ("grid = 3", "grid must be a table, written [[grid]]"),
    ("grid = []", "grid must be a table, written [[grid]]"),
    ("[[grid]]\nseed = 1\n[[grid]]\nseeds = 1", "grid 2: no key 'seeds'; did you mean seed?"),
    ("[[grid]]\nseed = 1\n[[grid]]\nseed = -1", "grid 2: seed must not be negative"),
    (f"seed = {list(range(400))}\npages = {list(range(1, 401))}", "makes 160,000 points; at most 100,000"),
])
def test_mistakes_in_specs(tmp_path, text, message):
    file = tmp_path / "spec.toml"
    file.write_text(text)
    with pytest.raises(SpecError) as caught:
        load_spec(file)
    assert str(caught.value).startswith(str(file)) and message in str(caught.value)


def test_files_that_are_no_specs(tmp_path):
    with pytest.raises(SpecError, match=f"cannot read {tmp_path}/none.toml: No such file"):
        load_spec(tmp_path / "none.toml")
    with pytest.raises(SpecError, match="cannot read .*: Is a directory"):
        load_spec(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(SpecError, match="binary.toml: not UTF-8 text"):
        load_spec(tmp_path / "binary.toml")


# --- the journal -----------------------------------------------------------------------------------------------


def write_journal(file, records):
    with Journal(file, "test") as journal:
        for record in records:
            journal.append(record)


def read_journal(file):
    with Journal(file, "test") as journal:
        return list(journal.records)


def test_journal_gives_back_what_it_got(tmp_path):
    file = tmp_path / "j"
    write_journal(file, [{"a": 1}, {"b": "ü\n"}])
    write_journal(file, [{"c": [None, 2.5]}])
    assert read_journal(file) == [{"a": 1}, {"b": "ü\n"}, {"c": [None, 2.5]}]


@given(st.lists(st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=5), max_size=2), min_size=1,
                max_size=4), st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_journal_cut_anywhere_holds_what_was_whole(tmp_path, monkeypatch, records, data):
    monkeypatch.setattr(os, "fsync", lambda file: None)
    file = tmp_path / "j"
    file.unlink(missing_ok=True)
    write_journal(file, records)
    whole = file.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    file.write_bytes(whole[:cut])
    kept = max(0, whole[:cut].count(b"\n") - 1)
    assert read_journal(file) == records[:kept]
    write_journal(file, [{"new": 1}])
    assert read_journal(file) == [*records[:kept], {"new": 1}]


def test_journal_leaves_nothing_for_nothing(tmp_path):
    write_journal(tmp_path / "j", [])
    assert not (tmp_path / "j").exists()


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("text", ["precious notes", "precious notes\n", '{"journal": "other"}\n', "3\n"])
def test_no_other_file_is_taken_for_a_journal(tmp_path, text, restart):
    file = tmp_path / "j"
    file.write_text(text)
    with pytest.raises(JournalError, match="not a journal of a test"):
        Journal(file, "test", restart)
    assert file.read_text() == text


def test_journal_with_a_damaged_line(tmp_path):
    file = tmp_path / "j"
    write_journal(file, [{"a": 1}, {"a": 2}])
    file.write_bytes(file.read_bytes().replace(b'{"a": 1', b'{"a"; 1'))
    with pytest.raises(JournalError, match="line 2 is damaged"):
        read_journal(file)


def test_one_writer_at_a_time(tmp_path):
    with Journal(tmp_path / "j", "test") as journal:
        journal.append({})
        with pytest.raises(JournalError, match="another process is writing to it"):
            Journal(tmp_path / "j", "test")
    assert read_journal(tmp_path / "j") == [{}]


def test_journal_on_a_full_disk(tmp_path, monkeypatch):
    """What could not be written whole is taken back."""
    real = os.write
    with Journal(tmp_path / "j", "test") as journal:
        journal.append({"a": 1})

        def full(file, data):
            if len(data) > 10:
                return real(file, data[:10])
            raise OSError(28, "No space left on device")
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            journal.append({"b": "x" * 20})
        monkeypatch.setattr(os, "write", real)
        journal.append({"c": 3})
    assert read_journal(tmp_path / "j") == [{"a": 1}, {"c": 3}]


# --- results ---------------------------------------------------------------------------------------------------


def test_rows_are_the_storms_of_the_spec(spec, output):
    """Every exact figure of every row is that of the same storm run on its own."""
    found = spec("contexts = [1, 2]\npages = [8, 600]\nblock_mix = [0, 0.9]\nwrite = true")
    result = run_sweep(found, Here(), output)
    assert (result.points, result.finished, result.failed, result.before) == (8, 8, 0, 0)
    assert [(row["point"], row["policy"]) for row in result.rows] == list(product(range(1, 9), DEFAULT_POLICIES))
    plan = points(found)
    for row in result.rows:
        config = plan[row["point"] - 1]
        assert row["error"] is None and row["capture"] is None and row["seed"] == config.seed
        assert (row["contexts"], row["pages"], row["block_mix"], row["write"], row["events_limit"]) == \
            (config.contexts, config.pages, config.block_mix, True, 6)
    for number in (1, 4, 7):
        alone = storm.run(plan[number - 1])["policies"]
        for row in result.rows[3 * number - 3:3 * number]:
            same = alone[row["policy"]]
            assert (row["leaves"], row["table_bytes"], row["reverse_map_bytes"], row["refaults_per_event"]) == \
                (same["leaves"], same["table_bytes"], same["reverse_map_bytes"], same["refaults_per_event"])
            assert row["entries_removed"] / row["events"] == same["entries_removed"] / same["events"]


def test_every_policy_can_be_swept(spec, output):
    result = run_sweep(spec(f"pages = 8\nteardown = {json.dumps(POLICIES)}"), Here(), output)
    assert [row["policy"] for row in result.rows] == list(POLICIES)
    assert all(row["error"] is None and row["entries_removed"] > 0 for row in result.rows)
    text = "\n".join(line.text for line in sweepreport.summary_lines(result))
    assert all(f"\n{policy} " in text for policy in POLICIES)


def test_ratios_are_against_the_reverse_map_of_the_same_point(spec, output):
    rows = run_sweep(spec("pages = [8, 16]"), Here(), output).rows
    for row in rows:
        base = next(r for r in rows if r["point"] == row["point"] and r["policy"] == "reverse-map")
        assert row["total_times_reverse_map"] == row["total_ns_per_event"] / base["total_ns_per_event"]


def test_csv_and_parquet_hold_the_rows(spec, tmp_path):
    found = spec("pages = [8, 4]\nevent_pages = [1, 5]\ncontexts = 1")      # 5 pages of 4: that point fails
    result = run_sweep(found, Here(), tmp_path / "out.csv")
    assert (result.finished, result.failed) == (3, 1)
    rows = read_csv(tmp_path / "out.csv")
    assert len(rows) == len(result.rows) == 12
    for read, row in zip(rows, result.rows, strict=True):
        assert read == {name: "" if value is None else str(value) for name, value in row.items()}
    failed = [row for row in result.rows if row["error"] is not None]
    assert {row["error"] for row in failed} == {"event_pages 5 is more than the 4 canonical pages of the set"}
    assert [row["policy"] for row in failed] == list(DEFAULT_POLICIES) and all(row["events"] is None for row in failed)

    polars = pytest.importorskip("polars", reason="Parquet needs polars, which is not installed")
    again = run_sweep(found, Here(), tmp_path / "out.parquet")
    frame = polars.read_parquet(tmp_path / "out.parquet")
    assert frame.to_dicts() == again.rows and frame.columns == list(result.rows[0])
    assert frame.schema["capture"] == polars.String and frame.schema["vm"] == polars.Int64
    assert polars.Null not in frame.dtypes


def test_a_failed_first_point_does_not_change_the_columns(spec, tmp_path):
    bad_first = run_sweep(spec("pages = 4\nevent_pages = [5, 1]\ncontexts = 1"), Here(), tmp_path / "a.csv")
    good = run_sweep(spec("pages = 4\nevent_pages = 1\ncontexts = 1"), Here(), tmp_path / "b.csv")
    assert bad_first.rows[0]["error"] and list(bad_first.rows[0]) == list(good.rows[0])


def test_captures_can_be_swept(spec, output):
    snapshot = CAPTURES / "d_vmid_rollover_nvhe_7.2" / "00_vms_110"
    result = run_sweep(spec(f"capture = {json.dumps(str(snapshot))}\ncontexts = [1, 300]\nteardown = 'reverse-map'"),
                       Here(), output)
    good, bad = result.rows
    assert good["capture"] == str(snapshot) and good["pages"] is None and good["entries_removed"] >= 6
    assert bad["error"] == "contexts must be at most 255 with 8-bit VMIDs, got 300"


def test_a_name_that_cannot_be_shown_fails_its_point_alone(spec, tmp_path):
    """Twice, so that the journal is read again."""
    name = str(tmp_path / "a\u200db")
    for _ in range(2):
        found = spec(f"capture = {json.dumps(name)}\nteardown = 'reverse-map'")
        result = run_sweep(found, Here(), tmp_path / "out.csv")
        (row,) = result.rows
        assert "a\ufffdb" in row["error"]


def test_a_point_without_memory_fails_alone(spec, output, monkeypatch):
    real = storm.run

    def run(config):
        if config.seed == 2:
            raise MemoryError("the engine's tables")
        return real(config)
    monkeypatch.setattr("s2shadow.sweepworkers.run", run)
    result = run_sweep(spec("pages = 8\nseed = [1, 2, 3]\nteardown = 'reverse-map'"), Here(), output)
    assert [row["error"] for row in result.rows] == [None, "out of memory: the engine's tables", None]


def test_no_two_storms_at_once_in_one_process(spec, output, monkeypatch):
    """Threads of an executor take turns: what is timed runs alone."""
    at_once, most = 0, 0
    real = storm.run

    def run(config):
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        time.sleep(0.01)
        at_once -= 1
        return real(config)
    monkeypatch.setattr("s2shadow.sweepworkers.run", run)
    with ThreadPoolExecutor(4) as threads:
        result = run_sweep(spec("pages = 8\nseed = [1, 2, 3, 4, 5, 6]"), threads, output)
    assert result.finished == 6 and most == 1


@pytest.mark.parametrize("name", ["out.txt", "out", "out.csv.gz"])
def test_unknown_formats(spec, tmp_path, name):
    with pytest.raises(SweepError, match=r"the name must end in \.csv or \.parquet"):
        run_sweep(spec("pages = 8"), Here(), tmp_path / name)
    assert [file.name for file in tmp_path.iterdir()] == ["spec.toml"]


# --- going on --------------------------------------------------------------------------------------------------


def stop_after(count):
    def progress(done, total, failed):
        if done == count:
            raise KeyboardInterrupt
    return progress


def test_an_interrupted_sweep_goes_on(spec, output):
    found = spec("pages = [8, 16]\nseed = [1, 2, 3]")
    first, second = Here(), Here()
    result = run_sweep(found, first, output, stop_after(2), in_flight=1)
    assert result.interrupted and result.finished == 2 and len(read_csv(output)) == 6
    told = []
    result = run_sweep(found, second, output, lambda *numbers: told.append(numbers))
    assert not result.interrupted and (result.before, result.finished) == (2, 6) and len(read_csv(output)) == 18
    assert told == [(done, 6, 0) for done in range(2, 7)]
    ran = Counter(first.ran + second.ran)
    assert set(ran) == set(points(found)) and sum(ran.values()) <= 7       # one point may have run and not counted
    third = Here()
    assert run_sweep(found, third, output).before == 6 and third.ran == []


@pytest.mark.parametrize("where", ["write", "fsync"])
def test_an_interrupt_while_a_point_is_stored(spec, output, monkeypatch, where):
    """Half a record in the journal, or a whole one that is not counted yet."""
    found = spec("pages = 8\nseed = [1, 2, 3]\nteardown = 'reverse-map'")
    real, calls = getattr(os, where), []

    def interrupt(file, *data):
        calls.append(file)
        if len(calls) != 3:             # the heading, a point, a point
            return real(file, *data)
        if where == "write":
            real(file, data[0][:-5])
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(os, where, interrupt)
        result = run_sweep(found, Here(), output, in_flight=1)
    kept = 1 if where == "write" else 2
    assert result.interrupted and result.finished == len(result.rows) == len(read_csv(output)) == kept
    again = Here()
    assert run_sweep(found, again, output).before == kept and len(again.ran) == 3 - kept


def test_a_sweep_cut_off_at_any_byte_goes_on(spec, output):
    """As after a power failure: whatever the journal still holds is kept, and no more is run than what is missing."""
    found = spec("pages = 8\nseed = [1, 2, 3]\nteardown = 'reverse-map'")
    journal = Path(f"{output}.journal")
    before = run_sweep(found, Here(), output).rows
    whole = journal.read_bytes()
    ends = [match.end() for match in re.finditer(b"\n", whole)]
    for cut in {*ends, *(end - 1 for end in ends), *(end + 1 for end in ends[:-1]), len(whole) // 2}:
        journal.write_bytes(whole[:cut])
        output.unlink()
        again = Here()
        rows = run_sweep(found, again, output).rows
        kept = sum(end <= cut for end in ends) - 1
        assert len(again.ran) == 3 - max(kept, 0)
        assert rows[:max(kept, 0)] == before[:max(kept, 0)] and len(rows) == 3


def test_a_spec_may_grow(spec, output):
    small = spec("pages = 8\nseed = [1, 2]\nteardown = 'blow-away'")
    before = run_sweep(small, Here(), output).rows
    executor = Here()
    grown = spec("pages = [4, 8]\nseed = [3, 2, 1]\nteardown = ['reverse-map', 'blow-away']")
    result = run_sweep(grown, executor, output)
    assert len(result.rows) == 12 and result.before == 0
    missing = {(config.pages, config.seed): config.teardown for config in executor.ran}
    both = ("reverse-map", "blow-away")
    assert missing == {(4, 1): both, (4, 2): both, (4, 3): both, (8, 3): both,
                       (8, 1): ("reverse-map",), (8, 2): ("reverse-map",)}
    kept = [row for row in result.rows if row["pages"] == 8 and row["policy"] == "blow-away" and row["seed"] < 3]
    figures = {"total_ns_per_event", "finished", "events"}
    assert sorted([row["seed"], *(row[name] for name in figures)] for row in kept) == \
        sorted([row["seed"], *(row[name] for name in figures)] for row in before)
    assert all(row["total_times_reverse_map"] > 0 for row in result.rows)


@pytest.mark.parametrize("other, message", [
    ("pages = 8\nseed = 1", "such as reverse-map with pages = 8, events = 6, seed = 2, seconds = 0.001"),
    ("pages = 8\nseed = [1, 2]\nteardown = 'reverse-map'", "such as blow-away with pages = 8"),
    ("pages = 9\nseed = [1, 2]", "does not ask for"),
])
def test_a_spec_that_asks_for_less_is_refused(spec, output, other, message):
    run_sweep(spec("pages = 8\nseed = [1, 2]"), Here(), output)
    before = output.read_bytes(), Path(f"{output}.journal").read_bytes()
    executor = Here()
    with pytest.raises(SweepError) as caught:
        run_sweep(spec(other), executor, output)
    assert message in str(caught.value) and str(output) in str(caught.value)
    assert executor.ran == [] and (output.read_bytes(), Path(f"{output}.journal").read_bytes()) == before
    result = run_sweep(spec(other), executor, output, restart=True)
    assert result.finished == len(executor.ran) == len(points(spec(other)))


def test_a_result_without_its_journal_is_not_overwritten(spec, output):
    output.write_text("precious\n")
    with pytest.raises(SweepError, match=r"out\.csv is there, but not its journal"):
        run_sweep(spec("pages = 8"), Here(), output)
    assert output.read_text() == "precious\n" and not Path(f"{output}.journal").exists()


def test_what_failed_is_tried_again(spec, output, monkeypatch):
    found = spec("pages = 8\nseed = [1, 2]\nteardown = 'reverse-map'")
    with monkeypatch.context() as patch:
        patch.setattr("s2shadow.sweepworkers.run", lambda config: 1 // 0)
        assert [row["error"] for row in run_sweep(found, Here(), output).rows] == \
            ["ZeroDivisionError: integer division or modulo by zero"] * 2
    result = run_sweep(found, Here(), output)
    assert (result.before, result.finished, result.failed) == (0, 2, 0)
    assert [row["error"] for row in result.rows] == [None, None]


def unsealed(text):
    """As a version without checksums wrote it."""
    return re.sub(r', "crc32": "\w+"', "", text)


def test_results_of_another_version_are_not_guessed_at(spec, output):
    found = spec("pages = 8\nteardown = 'reverse-map'")
    run_sweep(found, Here(), output)
    journal = Path(f"{output}.journal")
    journal.write_text(unsealed(journal.read_text()).replace('"aliases"', '"new_setting"'))
    with pytest.raises(SweepError, match="a record of another version: .*new_setting"):
        run_sweep(found, Here(), output)


def test_a_setting_that_is_new_has_its_default_in_old_results(spec, output):
    found = spec("pages = 8\nteardown = 'reverse-map'")
    run_sweep(found, Here(), output)
    journal = Path(f"{output}.journal")
    text = journal.read_text()
    assert '"aliases": 1, ' in text
    journal.write_text(unsealed(text).replace('"aliases": 1, ', ""))
    assert run_sweep(found, Here(), output).before == 1


# --- workers that die ------------------------------------------------------------------------------------------


def test_a_dead_worker_costs_a_retry(spec, output, tmp_path):
    """Two workers; two points kill theirs the first time. Nothing is lost, and only points that were under way were
    tried again."""
    found = spec("pages = 8\nseed = [1, 2, 3, 4, 5, 6, 7, 8, 9]\nteardown = 'reverse-map'")
    marks = tmp_path / "marks"
    marks.mkdir()
    result = run_sweep(found, lambda: Deadly(WorkerPool(2), {3, 8}, marks), output, workers=2, in_flight=2)
    assert (result.finished, result.failed) == (9, 0) and {file.name for file in marks.iterdir()} == {"3", "8"}
    deaths = {row["seed"]: row["worker_deaths"] for row in result.rows}
    assert deaths[3] >= 1 and deaths[8] >= 1 and 2 <= result.retried == sum(deaths.values()) <= 4
    assert {row["workers"] for row in result.rows} == {2}


def test_a_deadly_point_fails_alone(spec, output):
    found = spec("pages = 8\nseed = [1, 2, 3, 4, 5]\nteardown = 'reverse-map'")
    result = run_sweep(found, lambda: Deadly(WorkerPool(2), {2}), output, retries=1, workers=2, in_flight=2)
    assert {row["seed"]: row["error"] for row in result.rows} == \
        {1: None, 2: "the worker died, 2 times", 3: None, 4: None, 5: None}
    assert (result.finished, result.failed) == (4, 1)
    again = run_sweep(found, lambda: WorkerPool(1), output)
    assert (again.before, again.finished, again.failed) == (4, 5, 0)


def test_an_executor_that_cannot_be_replaced(spec, output):
    """What was finished is kept, and the next sweep goes on."""
    found = spec("pages = 8\nseed = [1, 2, 3]\nteardown = 'reverse-map'")
    with WorkerPool(1) as pool, pytest.raises(SweepError, match="give run_sweep a callable.*; 1 of 3 points are in"):
        run_sweep(found, Deadly(pool, {2}), output, in_flight=1)
    assert [row["seed"] for row in read_csv(output)] == ["1"]
    assert run_sweep(found, Here(), output).before == 1


class Refusing(Here):
    """Breaks before it has taken anything, or after so many points."""

    def __init__(self, error, after):
        super().__init__()
        self.error, self.after = error, after

    def submit(self, run, config):
        if len(self.ran) == self.after:
            raise self.error
        return super().submit(run, config)


def test_workers_that_never_start(spec, output):
    with pytest.raises(SweepError, match="the workers cannot be started: the worker died; 0 of 1 points"):
        run_sweep(spec("pages = 8"), lambda: Refusing(BrokenExecutor(), 0), output)
    assert not output.exists() and not Path(f"{output}.journal").exists()


def test_an_executor_that_was_shut_down(spec, output):
    error = RuntimeError("cannot schedule new futures after shutdown")
    with pytest.raises(SweepError, match="takes no more work: cannot schedule new futures after shutdown; 2 of 3"):
        run_sweep(spec("pages = 8\nseed = [1, 2, 3]"), Refusing(error, 2), output, in_flight=1)
    assert len(read_csv(output)) == 6


def test_a_pool_that_breaks_between_two_points(spec, output):
    """No point was under way: none is charged for it."""
    made = []

    def make():
        made.append(Refusing(BrokenExecutor(), 1 if not made else 99))
        return made[-1]
    result = run_sweep(spec("pages = 8\nseed = [1, 2, 3]"), make, output, in_flight=1)
    assert len(made) == 2 and (result.finished, result.retried) == (3, 0)


# --- what users read -------------------------------------------------------------------------------------------


def row(policy="reverse-map", total=100.0, **changes):
    base = {"point": 1, "policy": policy, "capture": None, "vm": None, "contexts": 1, "pages": 8, "aliases": 1,
            "block_mix": 0.0, "events_limit": 6, "event_pages": 1, "write": False, "tlbi": "exact", "seed": 1,
            "seconds_limit": 1.0, "min_events": 5, "track_tlbis": True, "error": None, "events": 6,
            "teardown_ns_per_event_p50": total / 2, "refaults_per_event": 1.0, "total_ns_per_event": total,
            "total_times_reverse_map": None, "host": "a", "cpu": "arm", "workers": 1, "worker_deaths": 0}
    return base | changes


def test_axes_are_what_varies():
    rows = [row(pages=pages, seed=seed, event_pages=shape, events_limit=events)
            for pages in (8, 512) for seed in (1, 2) for shape, events in ((1, 1000), (512, 10))]
    assert sweepreport.axes_of(rows) == {"pages": [8, 512], "event_pages": [1, 512], "seed": [1, 2]}
    assert sweepreport.choose_x({"capture": ["a", "b"], "pages": [1, 2, 3], "contexts": [1, 2], "seed": [1, 2, 3, 4]}) \
        == "pages"
    assert sweepreport.choose_x({"capture": ["a", "b"], "seed": [1, 2, 3]}) == "capture"
    assert sweepreport.choose_x({}) == "contexts"
    assert sweepreport.axes_of([row(write=True), row(write=False), row(capture="x"), row()]) == \
        {"capture": [None, "x"], "write": [False, True]}


def test_panels_are_axes_with_few_values():
    axes = {"contexts": list(range(9)), "pages": [1, 2, 3, 4, 5], "aliases": [1, 2], "seed": [1, 2]}
    assert sweepreport.panel_axes(axes, "contexts") == ("pages", "aliases")
    assert sweepreport.panel_axes(axes, "pages") == ("aliases", None)
    assert sweepreport.panel_axes({"pages": [1, 2]}, "pages") == (None, None)


def test_summary_is_of_medians(spec, output):
    result = run_sweep(spec("pages = [8, 16, 64]\ncontexts = [1, 2]\nseed = [1, 2]"), Here(), output, workers=1)
    text = "\n".join(line.text for line in sweepreport.summary_lines(result))
    assert "12 points over contexts, pages, seed" in text and "1 worker on" in text
    rows = read_csv(output)
    for policy in DEFAULT_POLICIES:
        totals = [float(row["total_ns_per_event"]) for row in rows if row["policy"] == policy]
        line = next(line for line in text.splitlines() if line.startswith(policy + " "))
        assert re.split(r" {2,}", line)[1] == "12"
        for value in (statistics.median(totals), min(totals), max(totals)):
            assert sweepreport.time_text(value) in line
    at16 = [float(row["total_ns_per_event"]) for row in rows if row["pages"] == "16" and row["policy"] == "blow-away"]
    line = next(line for line in text.splitlines() if line.startswith("pages 16 "))
    assert sweepreport.time_text(statistics.median(at16)) in line
    assert not any(line.startswith("seed") for line in text.splitlines())
    assert "36 rows, one per point and policy" in text


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_pictures(tmp_path, suffix):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib, which is not installed")
    rows = [row(policy, total=pages * contexts * (1 + seed / 10) * (1 if policy == "reverse-map" else 1000),
                pages=pages, contexts=contexts, seed=seed, block_mix=mix)
            for policy in ("reverse-map", "blow-away") for pages in (8, 64, 512) for contexts in (1, 4)
            for mix in (0.0, 0.5) for seed in (1, 2)]
    rows.append(row(error="lost", total=math.nan))
    file = tmp_path / f"picture{suffix}"
    sweepreport.plot(rows, file)
    data = file.read_bytes()
    assert data.startswith({".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix]) and len(data) > 5000


def test_a_picture_shows_median_and_extent(monkeypatch):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib, which is not installed")
    from matplotlib.figure import Figure

    rows = [row(total=total, pages=pages, seed=seed)
            for pages, totals in ((8, (10.0, 20.0, 90.0)), (64, (5.0, 6.0, 8.0))) for seed, total in enumerate(totals)]
    panel = Figure().subplots()
    sweepreport.draw_panel(panel, rows, "pages", [8, 64])
    assert panel.lines[0].get_xydata().tolist() == [[8, 20], [64, 6]]
    corners = {tuple(point) for point in panel.collections[0].get_paths()[0].vertices.tolist()}
    assert {(8, 10), (8, 90), (64, 5), (64, 8)} <= corners
    with pytest.raises(ValueError, match="nothing to plot"):
        sweepreport.plot([row(error="lost")], "x.png")


# --- the command -----------------------------------------------------------------------------------------------


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """``main`` in this process, in a folder of its own -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*argv):
        code = main(["sweep", *map(str, argv)])
        out, err = capsys.readouterr()
        return code, out, err
    return call


def test_command_runs_and_goes_on(run, spec):
    spec("pages = [8, 16]")
    code, out, err = run("spec.toml")
    assert (code, err) == (0, "") and "spec.toml: 2 points over pages" in out and "6 rows" in out
    assert len(read_csv("spec.csv")) == 6
    code, out, _ = run("spec.toml", "--json")
    found = json.loads(out)
    assert code == 0 and (found["schema"], found["points"], found["before"]) == (1, 2, 2) and len(found["rows"]) == 6
    code, out, _ = run("spec.toml", "--csv")
    assert out == Path("spec.csv").read_text()


def test_command_says_what_failed(run, spec):
    spec("pages = 4\nevent_pages = [1, 5]\ncontexts = 1")
    code, out, err = run("spec.toml", "-o", "x.csv")
    assert (code, err) == (1, "")
    assert "failed       point 2 (event_pages 5): event_pages 5 is more than the 4 canonical pages" in out
    assert "1 of 2 points are in x.csv" in out


def test_command_draws(run, spec):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib, which is not installed")
    spec("pages = [8, 16]\ncontexts = [1, 2]")
    assert run("spec.toml", "--plot", "x.svg", "--x", "contexts")[0] == 0
    assert "nested VMs (contexts)" in Path("x.svg").read_text()


def test_command_without_running(run, spec):
    spec("pages = [8, 16]\nseed = 4")
    code, out, _ = run("--example")
    assert (code, out) == (0, EXAMPLE)
    code, out, _ = run("spec.toml", "--list")
    assert code == 0 and [line.split() for line in out.splitlines()] == \
        [["point", "pages", "policies"], ["1", "8", *DEFAULT_POLICIES], ["2", "16", *DEFAULT_POLICIES]]
    assert not Path("spec.csv").exists()


def test_command_reads_stdin(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{TINY}pages = [8, 16]\n".encode())))
    code, out, _ = run("-", "-o", "x.csv")
    assert code == 0 and "stdin: 2 points over pages" in out and len(read_csv("x.csv")) == 6


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.mark.parametrize("rich", [True, False], ids=["rich", "plain"])
def test_progress_is_for_terminals(monkeypatch, rich):
    from s2shadow.commands.common import progress_bar
    from s2shadow.commands.sweep import PointsBar, PointsCounter

    def progress(stream):
        return progress_bar(stream, PointsBar, PointsCounter)

    if rich:
        pytest.importorskip("rich", reason="rich (the extra cli) is not installed")
    else:
        monkeypatch.setitem(sys.modules, "rich.progress", None)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with progress(stream) as show:
        show(10, 120, 0)
        show(40, 120, 2)
    text = stream.getvalue()
    assert "40 of 120 points, 2 failed" in text and "left" in text and "\x1b[3" not in text
    assert text.endswith("\x1b[K") or "\x1b[2K" in text           # gone at the end
    with progress(io.StringIO()) as show:
        assert show is None


@pytest.mark.parametrize("argv, message", [
    ([], "sweep needs a SPEC.toml; --example prints one"),
    (["none.toml"], "cannot read none.toml: No such file"),
    (["spec.toml", "--executor", "threads"], "must be processes or dask:ADDRESS, got 'threads'"),
    (["spec.toml", "--executor", "dask:"], "must be processes or dask:ADDRESS"),
    (["spec.toml", "--executor", "dask:h:1", "--workers", "2"], "--workers is for --executor processes"),
    (["spec.toml", "-o", "x.txt"], "cannot write x.txt: the name must end in .csv or .parquet"),
    (["spec.toml", "-o", "no/x.csv"], "cannot write no/x.csv: no folder no"),
    (["spec.toml", "--csv", "spec.csv"], "must be different files"),
    (["spec.toml", "--workers", "0"], "must be at least 1"),
    (["spec.toml", "--retries", "-1"], "must be at least 0"),
    (["spec.toml", "--x", "pages"], "--x needs --plot"),
    (["spec.toml", "--plot", "x.svg", "--x", "seed"], "--x seed: not varied on its own by spec.toml; it varies pages"),
    (["spec.toml", "--plot", "x.svg", "--x", "page"], "--x must be a key of the spec, got 'page'"),
    (["capture.toml"], "capture: no folder"),
    (["-"], "a spec from stdin needs --output"),
])
def test_command_line_mistakes(run, spec, argv, message, monkeypatch):
    pytest.importorskip("matplotlib", reason="--plot needs matplotlib, which is not installed")
    spec("pages = [8, 16]")
    Path("capture.toml").write_text("capture = 'gone'\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"pages = 8")))
    code, out, err = run(*argv)
    assert (code, out) == (2, "") and err.startswith("s2shadow: ") and err.count("\n") == 1 and message in err, err
    assert sorted(file.name for file in Path().iterdir()) == ["capture.toml", "spec.toml"]


@pytest.mark.parametrize("package, argv, message", [
    ("polars", ["-o", "x.parquet"], "Parquet needs polars, which is not installed: pip install 's2shadow[trace]'"),
    ("distributed", ["--executor", "dask:h:1"], "needs distributed, which is not installed: pip install"),
])
def test_extras_that_are_missing(run, spec, monkeypatch, package, argv, message):
    real = builtins.__import__

    def refuse(name, *rest):
        if name == package or name.startswith(f"{package}."):
            raise ImportError(name)
        return real(name, *rest)
    monkeypatch.setattr(builtins, "__import__", refuse)
    spec("pages = 8")
    code, out, err = run("spec.toml", *argv)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1
    assert [file.name for file in Path().iterdir()] == ["spec.toml"]


def alive_in_group(group):
    """Processes of a group that still run (what init has not reaped is dead)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group = stat.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if int(process_group) == group and state not in "ZX":
            found.append(int(stat.parent.name))
    return found


def wait_until(what):
    for _ in range(600):
        if what():
            return
        time.sleep(0.05)
    raise AssertionError("waited for half a minute")


@pytest.mark.parametrize("ending", ["interrupt", "kill"])
def test_a_sweep_that_is_stopped_leaves_its_points_and_no_process(spec, tmp_path, ending):
    """Ctrl-C on a terminal reaches the whole group; kill -9 only the sweep itself."""
    spec("seed = [1, 2, 3]\n[[grid]]\npages = 8\n[[grid]]\npages = 262144\nseconds = 60\nteardown = 'blow-away'")
    journal = tmp_path / "out.csv.journal"
    command = [sys.executable, "-m", "s2shadow", "sweep", str(tmp_path / "spec.toml"), "-o", str(tmp_path / "out.csv")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    wait_until(lambda: journal.exists() and journal.read_bytes().count(b"\n") == 4)
    if ending == "interrupt":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.kill()
    out, err = process.communicate(timeout=60)
    wait_until(lambda: not alive_in_group(process.pid))
    if ending == "interrupt":
        assert err == ""                # after a kill, Python itself tidies up and says so
        assert process.returncode == 130
        assert "Interrupted: 3 of 6 points are in" in out and len(read_csv(tmp_path / "out.csv")) == 9
    result = run_sweep(spec("pages = 8\nseed = [1, 2, 3]"), Here(), tmp_path / "out.csv")
    assert result.before == result.finished == 3
