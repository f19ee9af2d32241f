"""``examples/toy_timing.py``: its walks are those of ``walk``, and its cycles add up."""

import numpy as np
import pytest

import examples
import s2shadow as s2

PAGES = 4096
toy = examples.load("toy_timing")


@pytest.fixture
def config():
    return s2.Stage2Config(toy.TABLES, toy.VTCR)


def addresses(rng, count=300):
    """Mapped ones, and some beyond L1's pages and beyond the input size, which need fewer words or none."""
    ipas = toy.PAGE * rng.integers(0, PAGES, count)
    ipas[::7] += 1 << 30
    ipas[::11] = 1 << 45
    return ipas.tolist()


@pytest.mark.parametrize("walkers", [1, 3, 16])
def test_results_are_those_of_walk_however_many_are_in_flight(config, rng, walkers):
    ipas = addresses(rng)
    mem, other = toy.tables(PAGES), toy.tables(PAGES)
    outcome = toy.simulate(config, toy.Memory(mem), ipas, walkers)
    for ipa, result in zip(ipas, outcome.results, strict=True):
        expected = s2.walk(other, config, ipa, s2.READ)
        assert (result.status, result.fsc, result.pa, result.desc) == (
            expected.status, expected.fsc, expected.pa, expected.desc)  # fmt: skip
    size = mem.regions[0].size
    assert mem.read(toy.TABLES, size) == other.read(toy.TABLES, size)  # the same access flags are set


def test_cycles_of_one_walk(config):
    memory = toy.Memory(toy.tables(PAGES))
    outcome = toy.simulate(config, memory, [0], walkers=4)
    assert (memory.misses, memory.hits) == (3, 1)  # a line for each level; the swap finds the last one
    assert outcome.cycles == 3 * memory.miss + memory.hit == outcome.latencies[0]


def test_one_walker_does_one_after_the_other_and_many_go_as_fast_as_memory(config, rng):
    ipas = addresses(rng)
    alone, memory = toy.simulate(config, toy.Memory(toy.tables(PAGES)), ipas, 1), toy.Memory(toy.tables(PAGES))
    assert alone.cycles == sum(alone.latencies)
    crowd = toy.simulate(config, memory, ipas, 64)
    assert memory.pace * (memory.misses - 1) + memory.miss <= crowd.cycles < alone.cycles / 4
    assert np.mean(crowd.latencies) > np.mean(alone.latencies)  # they stand in each other's way


def test_main(capsys):
    rows = toy.main(walks=200, pages=PAGES)
    cycles = [cycles for _walkers, cycles in rows]
    assert cycles == sorted(cycles, reverse=True)
    assert "walkers" in capsys.readouterr().out
