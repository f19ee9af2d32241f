"""TLBI operations: names, encodings and scopes, generated from the encoding rules (Arm ARM, SYS instruction space).

What an operation removes from the shadows is in ``maintenance.pyx``.
"""

from __future__ import annotations

from typing import NamedTuple


class UndefinedInstruction(ValueError):
    """The operation does not exist, or the features lack it."""


class Operation(NamedTuple):
    """One TLBI: its encoding and what kind of thing it names."""

    name: str
    op1: int
    crn: int
    crm: int
    op2: int
    kind: str            # "IPA", "RIPA", "VMALLS12", "ALL", or "S1" for stage-1 operations
    shareability: str    # NSH, ISH, OSH
    feature: str         # "", "OS" or "RANGE"
    nxs: bool
    operand: bool


_SHAREABILITY = {"": "NSH", "IS": "ISH", "OS": "OSH"}


def _operations():
    """Every EL1&0 and EL2 operation of the base architecture, FEAT_TLBIOS, FEAT_TLBIRANGE and FEAT_XS."""
    plain = {"OS": 1, "IS": 3, "": 7}
    ranged = {"IS": 2, "OS": 5, "": 6}
    for crn, nxs in ((8, ""), (9, "nXS")):

        def op(name, op1, crm, op2, kind, suffix, feature, operand, crn=crn, nxs=nxs):
            return Operation(name + suffix + nxs, op1, crn, crm, op2, kind, _SHAREABILITY[suffix], feature, bool(nxs),
                             operand)

        for suffix, crm in plain.items():
            feature = "OS" if suffix == "OS" else ""
            for name, op2 in (("VMALLE1", 0), ("VAE1", 1), ("ASIDE1", 2), ("VAAE1", 3), ("VALE1", 5), ("VAALE1", 7)):
                yield op(name, 0, crm, op2, "S1", suffix, feature, name != "VMALLE1")
            for name, op2, kind in (("ALLE2", 0, "S1"), ("VAE2", 1, "S1"), ("ALLE1", 4, "ALL"), ("VALE2", 5, "S1"),
                                    ("VMALLS12E1", 6, "VMALLS12")):
                yield op(name, 4, crm, op2, kind, suffix, feature, name in ("VAE2", "VALE2"))
        for suffix, crm in ranged.items():
            for name, op2 in (("RVAE1", 1), ("RVAAE1", 3), ("RVALE1", 5), ("RVAALE1", 7)):
                yield op(name, 0, crm, op2, "S1", suffix, "RANGE", True)
            for name, op2 in (("RVAE2", 1), ("RVALE2", 5)):
                yield op(name, 4, crm, op2, "S1", suffix, "RANGE", True)
        for last, base in (("", 0), ("L", 4)):
            for suffix, crm, one, many in (("IS", 0, 1, 2), ("OS", 4, 0, 3), ("", 4, 1, 2)):
                feature = "OS" if suffix == "OS" else ""
                yield op(f"IPAS2{last}E1", 4, crm, base + one, "IPA", suffix, feature, True)
                yield op(f"RIPAS2{last}E1", 4, crm, base + many, "RIPA", suffix, "RANGE", True)


OPERATIONS = {operation.name.upper(): operation for operation in _operations()}
_BY_ENCODING = {(o.op1, o.crn, o.crm, o.op2): o for o in OPERATIONS.values()}


def find_operation(op, features) -> Operation:
    """The operation of a name, of (op1, CRn, CRm, op2), or of a 32-bit SYS word.

    Raises ``UndefinedInstruction`` when there is none or ``features`` lack it, ``TypeError`` for other types.
    """
    if isinstance(op, str):
        found = OPERATIONS.get(op.upper())
        shown = op
    elif isinstance(op, tuple):
        found = _BY_ENCODING.get(tuple(op))
        shown = f"op1={op[0]}, CRn={op[1]}, CRm={op[2]}, op2={op[3]}" if len(op) == 4 else repr(op)
    elif isinstance(op, int):
        found = None
        if op & 0xFFF80000 == 0xD5080000 and op >> 32 == 0:
            found = _BY_ENCODING.get((op >> 16 & 7, op >> 12 & 15, op >> 8 & 15, op >> 5 & 7))
        shown = f"{op:#010x}"
    else:
        raise TypeError(f"op must be a name, (op1, CRn, CRm, op2) or a 32-bit word, got {type(op).__name__}")
    if found is None:
        raise UndefinedInstruction(f"no TLBI operation {shown}")
    if (found.nxs and not features.xs) or (found.feature == "OS" and not features.tlbios) \
            or (found.feature == "RANGE" and not features.range) \
            or (found.feature == "RANGE" and found.shareability == "OSH" and not features.tlbios):
        raise UndefinedInstruction(f"TLBI {found.name} needs a feature that is absent")
    return found


def ipa_operand(xt: int, pa_bits: int) -> int:
    """IPA that an IPAS2 operand names: bits 35:0 are IPA[47:12], bits 39:36 IPA[51:48] with a 52-bit PARange."""
    return (xt & ((1 << 40) - 1 if pa_bits >= 52 else (1 << 36) - 1)) << 12


def has_level_hint(xt: int) -> bool:
    """Whether the TTL field says anything: 00xx does not."""
    return bool(xt >> 46 & 3)
