from typing import NamedTuple

from s2shadow.features import Features

REGIMES: tuple[str, ...]
SCOPES: tuple[str, ...]
SHAREABILITIES: tuple[str, ...]
LAST_LEVEL: set[str]

class UndefinedInstruction(ValueError): ...

class Tlbi(NamedTuple):
    name: str
    regime: str
    scope: str
    start: int | None
    end: int | None
    level: int | None
    granule: int | None
    last_level: bool
    shareability: str
    nxs: bool
    asid: int | None
    takes_operand: bool

def decode_tlbi(
    op: str | tuple[int, int, int, int] | int,
    xt: int = 0,
    *,
    features: Features | None = None,
    vtcr: int | None = None,
    dialect: str = "exact",
) -> Tlbi: ...
def operation_name(op1: int, crn: int, crm: int, op2: int) -> str: ...
