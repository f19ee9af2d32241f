"""The list of mistakes that .ci/long/mutants makes in the engine still fits the engine."""

import pytest

import mutantlist

MUTANTS = mutantlist.load()
ROOMS = {"arch", "config", "walker", "memory", "combine", "table", "rmap", "leaf", "tlbi", "maintenance", "fault",
         "plain", "lock", "host", "dirty", "owed", "context", "eviction", "intervals", "capi"}  # fmt: skip


def test_there_are_enough_everywhere():
    """No two of one name, each rule of the engine is broken, and each room."""
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names) >= 45
    assert {name.partition("-")[0] for name in names} >= ROOMS
    assert {mutant.rule[0] for mutant in MUTANTS if mutant.rule[1:2] == ":"} == set("12345678")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_stands_in_the_sources_once(mutant):
    if not (mutantlist.ROOT / "s2shadow" / "fault.pyx").exists():
        pytest.skip("the sources are not here")
    assert mutant.mutated(mutantlist.ROOT) != (mutantlist.ROOT / mutant.file).read_text()
    assert mutant.tests and all((mutantlist.ROOT / test).exists() for test in mutant.tests)
