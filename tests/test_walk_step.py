"""``walk_step``: the same walk with the caller as memory."""

import pytest

import s2shadow as s2

TABLE, PAGE, AF = 3, 3, 1 << 10
ROOT, L3 = 0x10_0000, 0x10_2000
VTCR = 64 - 34 | 0 << 6 | 5 << 16 | 1 << 31          # 4K, starts at level 2, 16 tables side by side
HA, HD = 1 << 21, 1 << 22
DBM = 1 << 51


@pytest.fixture
def mem():
    mem = s2.GuestMemory()
    mem.add(ROOT, 1 << 20)
    return mem


def config(vtcr=VTCR, hafdbs=2, **keywords):
    return s2.Stage2Config(ROOT, vtcr, s2.Features(hafdbs=hafdbs), **keywords)


def serve(step, mem):
    """Answer every request from ``mem`` as a little-endian machine does; how many there were."""
    asked = 0
    while step.request is not None:
        request = step.request
        asked += 1
        word = mem.read64(request.address)
        if request.kind == "swap" and word == request.expected:
            mem.write64(request.address, request.desired)
        step.feed(word)
    return asked


@pytest.mark.parametrize("big_endian", [False, True])
def test_one_request_for_each_level_and_one_for_the_swap(mem, big_endian):
    def put(address, desc):
        mem.write64(address, int.from_bytes(desc.to_bytes(8, "little"), "big") if big_endian else desc)

    put(ROOT, L3 | TABLE)
    put(L3 + 8, 0x8000_0000 | PAGE | 1 << 6 | DBM)
    cfg = config(VTCR | HA | HD, big_endian=big_endian)
    step = s2.walk_step(cfg, 0x1234, s2.WRITE)
    assert step.request == s2.WalkRequest("read", ROOT, None, None)
    with pytest.raises(RuntimeError, match="wants the descriptor at 0x100000"):
        _ = step.result
    assert serve(step, mem) == 3
    assert (step.result.status, step.result.pa, step.result.updated) == (0, 0x8000_0234, 1)
    assert repr(step.result) == repr(s2.walk(mem, cfg, 0x1234, s2.WRITE))
    with pytest.raises(RuntimeError, match="the walk is done"):
        step.feed(0)
    with pytest.raises(RuntimeError, match="the walk is done"):
        step.abort()


def test_a_lost_swap_goes_on_from_what_memory_holds(mem):
    mem.write64(ROOT, L3 | TABLE)
    mem.write64(L3, 0x8000_0000 | PAGE | 3 << 6)
    step = s2.walk_step(config(VTCR | HA), 0, s2.READ)
    step.feed(mem.read64(ROOT))
    step.feed(mem.read64(L3))
    assert step.request.kind == "swap" and step.request.desired == mem.read64(L3) | AF
    step.feed(0x9000_0000 | PAGE | AF | 3 << 6)     # L1 was first: another page, and its access flag is set
    assert step.request is None and step.result.pa == 0x9000_0000 and not step.result.updated


def test_aborts(mem):
    step = s2.walk_step(config(), 0)
    step.feed(L3 | TABLE)
    step.abort()
    assert step.result.fault == "external abort on table walk, level 3"
    step = s2.walk_step(config(VTCR | HA), 0)
    step.feed(L3 | TABLE)
    step.feed(0x8000_0000 | PAGE | 3 << 6)
    step.abort()                                    # read-only memory refuses the swap
    assert step.result.fault == "external abort on table walk, level 3" and step.result.pa == 0


def test_what_needs_no_memory_is_done_at_once():
    assert s2.walk_step(config(), 1 << 40).result.fault == "translation fault, level 0"
    assert s2.walk_step(config(hcr=0), 0x5000).result.pa == 0x5000


def test_arguments_are_checked(mem):
    with pytest.raises(ValueError, match="access"):
        s2.walk_step(config(), 0, 64)
    step = s2.walk_step(config(), 0)
    with pytest.raises((ValueError, OverflowError), match="value"):
        step.feed(1 << 64)
    with pytest.raises(TypeError, match="value"):
        step.feed("x")
    assert step.request.kind == "read"              # nothing was lost


def test_many_in_flight(mem):
    """Steps share nothing: a timing simulator interleaves them as it likes."""
    mem.write64(ROOT, L3 | TABLE)
    for page in range(64):
        mem.write64(L3 + 8 * page, 0x8000_0000 + 0x3000 * page | PAGE | AF | 3 << 6)
    cfg = config()
    steps = [s2.walk_step(cfg, page << 12) for page in range(64)]
    while any(step.request for step in steps):
        for step in reversed([step for step in steps if step.request]):
            step.feed(mem.read64(step.request.address))
    assert [step.result.pa for step in steps] == [0x8000_0000 + 0x3000 * page for page in range(64)]
