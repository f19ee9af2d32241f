"""Shadow stage-2 page tables for arm64 nested virtualization."""

from importlib.metadata import version as _version

from s2shadow import constants as _constants
from s2shadow.capi import _C_API as _C_API
from s2shadow.capi import get_include
from s2shadow.combine import Combined, combine
from s2shadow.config import Stage2Config
from s2shadow.constants import *  # noqa: F403
from s2shadow.descriptor import WalkLevel
from s2shadow.engine import (
    FAULT_DTYPE,
    HOST_LEAF_DTYPE,
    HW_TLBI_DTYPE,
    INTERVAL_DTYPE,
    REVERSE_DTYPE,
    SHADOW_DTYPE,
    TLBI_OP_DTYPE,
    VCPU,
    Context,
    Fault,
    HostStage2,
    Invalidation,
    InvariantError,
    NestedVM,
    Stats,
    TlbiCounters,
    TlbiResult,
)
from s2shadow.features import Features
from s2shadow.mapping import HostMapping, Linear
from s2shadow.memory import GuestMemory, Region
from s2shadow.tlbi import Tlbi, UndefinedInstruction, decode_tlbi
from s2shadow.tlbmodel import TlbEntry, TlbModel
from s2shadow.walker import (
    LEAF_DTYPE,
    WALK_DTYPE,
    Walk,
    WalkRequest,
    WalkStep,
    leaves,
    walk,
    walk_many,
    walk_step,
)

__version__ = _version("s2shadow")

__all__ = [
    *_constants.__all__,
    "FAULT_DTYPE",
    "HOST_LEAF_DTYPE",
    "HW_TLBI_DTYPE",
    "INTERVAL_DTYPE",
    "LEAF_DTYPE",
    "REVERSE_DTYPE",
    "SHADOW_DTYPE",
    "TLBI_OP_DTYPE",
    "VCPU",
    "WALK_DTYPE",
    "Combined",
    "Context",
    "Fault",
    "Features",
    "GuestMemory",
    "HostMapping",
    "HostStage2",
    "Invalidation",
    "InvariantError",
    "Linear",
    "NestedVM",
    "Region",
    "Stage2Config",
    "Stats",
    "Tlbi",
    "TlbiCounters",
    "TlbEntry",
    "TlbModel",
    "TlbiResult",
    "UndefinedInstruction",
    "Walk",
    "WalkLevel",
    "WalkRequest",
    "WalkStep",
    "combine",
    "decode_tlbi",
    "get_include",
    "leaves",
    "walk",
    "walk_many",
    "walk_step",
]
