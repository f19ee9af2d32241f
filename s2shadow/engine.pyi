from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from s2shadow.constants import Access, Kind
from s2shadow.features import Features
from s2shadow.mapping import HostMapping, Linear
from s2shadow.memory import GuestMemory

FAULT_DTYPE: np.dtype[np.void]
SHADOW_DTYPE: np.dtype[np.void]
REVERSE_DTYPE: np.dtype[np.void]
INTERVAL_DTYPE: np.dtype[np.void]
HOST_LEAF_DTYPE: np.dtype[np.void]
HW_TLBI_DTYPE: np.dtype[np.void]
TLBI_OP_DTYPE: np.dtype[np.void]
TLBI_CLASSES: tuple[str, ...]

_Rows: TypeAlias = npt.NDArray[np.void]
_Populate: TypeAlias = Linear | Callable[[int, Access], HostMapping | None] | Literal["linear"] | None

class InvariantError(AssertionError): ...

class Invalidation:
    @property
    def leaves(self) -> int: ...
    @property
    def ticket(self) -> int: ...
    def __init__(self, leaves: int, ticket: int) -> None: ...
    def __iter__(self) -> Iterator[int]: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

class TlbiResult(NamedTuple):
    name: str
    removed: int
    required: int
    contexts: int

class TlbiCounters(NamedTuple):
    operations: int
    contexts: int
    removed: int
    required: int

@dataclass(frozen=True, slots=True)
class Context:
    index: int
    vmid: int
    vttbr: int
    vtcr: int
    enabled: bool
    host_vmid: int
    host_vttbr: int
    host_vtcr: int
    host_hcr: int
    entries: int
    table_bytes: int
    refs: int

@dataclass(frozen=True, slots=True)
class Stats:
    faults: int
    hits: int
    mapped: int
    l1_faults: int
    host_faults: int
    mmio: int
    retries: int
    no_memory: int
    installed: int
    removed: int
    relaxed: int
    replaced: int
    narrowed: int
    live: int
    invalidations: int
    kernel_steps: int
    unknown_unmaps: int
    contexts_recycled: int
    evictions: int
    host_leaves: int
    table_bytes: int
    link_bytes: int
    rmap_bytes: int
    memory_bytes: int
    tlbis: dict[str, TlbiCounters]
    @property
    def reverse_map_bytes_per_entry(self) -> float: ...

class Fault:
    @property
    def kind(self) -> Kind: ...
    @property
    def fsc(self) -> int: ...
    @property
    def level(self) -> int: ...
    @property
    def perm(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def ipa(self) -> int: ...
    @property
    def cipa(self) -> int: ...
    @property
    def pa(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def hpfar(self) -> int: ...

class HostStage2:
    populate: _Populate
    def map(
        self, cipa: int, pa: int, size: int, perm: str | int = "rwx", memattr: str | int = "normal"
    ) -> Invalidation: ...
    def protect(self, start: int, end: int, perm: str | int) -> Invalidation: ...
    def load(
        self, addresses: npt.NDArray[np.uint64], pages: npt.NDArray[np.uint8], vttbr: int, vtcr: int
    ) -> Invalidation: ...
    def leaves(self) -> _Rows: ...

class VCPU:
    @property
    def index(self) -> int: ...
    def load(self, vttbr: int, vtcr: int, hcr: int = 1, big_endian: bool = False, s2pir: int = 0) -> Context: ...
    def put(self) -> None: ...
    def fault(self, ipa: int, access: int = ...) -> Fault: ...
    def fault_many(self, ipas: npt.ArrayLike, access: int | npt.ArrayLike = ..., out: _Rows | None = None) -> _Rows: ...
    def translate(self, ipa: int, access: int = ...) -> Fault: ...
    def translate_many(
        self, ipas: npt.ArrayLike, access: int | npt.ArrayLike = ..., out: _Rows | None = None
    ) -> _Rows: ...
    def tlbi(
        self,
        op: str | tuple[int, int, int, int] | int,
        xt: int = 0,
        vttbr: int | None = None,
        vtcr: int | None = None,
        hcr: int | None = None,
    ) -> TlbiResult: ...

class NestedVM:
    def __init__(
        self,
        mem: GuestMemory,
        vcpus: int = 1,
        contexts: int | None = None,
        features: Features | None = None,
        *,
        teardown: str = "reverse-map",
        tlbi: str = "exact",
        attributes: str = "architectural",
        max_table_bytes: int | None = None,
        table_base: int | None = None,
        track_tlbis: bool = True,
    ) -> None: ...
    @property
    def host(self) -> HostStage2: ...
    @property
    def vcpus(self) -> tuple[VCPU, ...]: ...
    @property
    def mem(self) -> GuestMemory: ...
    @property
    def features(self) -> Features: ...
    @property
    def teardown(self) -> str: ...
    @property
    def contexts(self) -> tuple[Context, ...]: ...
    @property
    def stats(self) -> Stats: ...
    def unmap(self, start: int, end: int, partial: Literal["split", "drop"] | None = None) -> Invalidation: ...
    def log_dirty(self, start: int, end: int, on: bool = True) -> Invalidation: ...
    def dirty_log(self, start: int, end: int) -> npt.NDArray[np.uint8]: ...
    def age(self, start: int, end: int) -> npt.NDArray[np.uint8]: ...
    def test_young(self, start: int, end: int) -> npt.NDArray[np.uint8]: ...
    def shadow(self, index: int) -> _Rows: ...
    def reverse(self, cipa: int) -> _Rows: ...
    def intervals(self, index: int) -> _Rows: ...
    def tables(self, index: int | None = None) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8]]: ...
    def tlbi_many(self, ops: _Rows) -> npt.NDArray[np.uint64]: ...
    def take_tlbis(self, limit: int | None = None) -> _Rows: ...
    def check(self) -> None: ...
    @property
    def _c_handle(self) -> object: ...
