"""TLBI operations: names, encodings and operands (spec 03, sections 1, 2 and 6; Arm ARM, TLBI).

The 126 operations of the base architecture, FEAT_TLBIOS, FEAT_TLBIRANGE and FEAT_XS are generated from the encoding
rules. What an operation removes from the shadows is in ``maintenance.pyx``.
"""

from collections import namedtuple

from libc.string cimport memset

from s2shadow.arguments cimport as_u64
from s2shadow.config cimport fill_features

from s2shadow.features import Features

REGIMES = ("EL10_S1", "EL2_S1", "EL10_S2", "EL10_S12")
SCOPES = ("VMALL", "VA", "VAA", "ASID", "IPA", "ALL", "VMALLS12")
SHAREABILITIES = ("NSH", "IS", "OS")

LAST_LEVEL = {"VALE1", "VAALE1", "VALE2", "RVALE1", "RVAALE1", "RVALE2", "IPAS2LE1", "RIPAS2LE1"}

cdef enum:
    OPERATIONS = 256            # by CRn-8, op1 (0 or 4), CRm, op2

cdef tlbi_op_t operations[OPERATIONS]
cdef dict names_by_encoding = {}
cdef dict encodings_by_name = {}


class UndefinedInstruction(ValueError):
    """The operation does not exist, is outside EL1 and EL2, or the features lack it."""


_Tlbi = namedtuple("Tlbi", "name regime scope start end level granule last_level shareability nxs asid takes_operand")


class Tlbi(_Tlbi):
    """A decoded TLBI. ``start`` and ``end`` are the addresses that the operand names, before any extent rule, or None
    where it names nothing or the operation has no address; ``level`` and ``granule`` (bytes) are the hint, or None;
    ``asid`` is None where none is named. ``regime``, ``scope`` and ``shareability`` are spelled EL10_S1, EL2_S1,
    EL10_S2, EL10_S12; VMALL, VA, VAA, ASID, IPA, ALL, VMALLS12; NSH, IS, OS."""

    __slots__ = ()


cdef inline uint32_t table_index(uint32_t op1, uint32_t crn, uint32_t crm, uint32_t op2) noexcept nogil:
    return (crn - 8) << 7 | (op1 >> 2) << 6 | crm << 3 | op2


cdef tlbi_class_t class_of(int regime, int scope, bint is_range) noexcept:
    if scope == SCOPE_IPA:
        return CLASS_RANGE if is_range else CLASS_IPA
    if scope == SCOPE_VMALLS12:
        return CLASS_VMALLS12
    return CLASS_ALL if scope == SCOPE_ALL and regime != REGIME_EL2_S1 else CLASS_STAGE1


def _define(str name, int op1, int crm, int op2, int regime, int scope, str share, bint is_range=False,
            bint operand=True, bint asid=False):
    """One operation and its nXS twin."""
    cdef tlbi_op_t *op
    for crn, twin in ((8, ""), (9, "NXS")):
        op = &operations[table_index(op1, crn, crm, op2)]
        op.known = 1
        op.regime = regime
        op.scope = scope
        op.is_range = is_range
        op.last_level = name in LAST_LEVEL
        op.shareability = SHAREABILITIES.index(share or "NSH")
        op.nxs = crn == 9
        op.needs = (NEED_OS if share == "OS" else 0) | (NEED_RANGE if is_range else 0) | (NEED_XS if crn == 9 else 0)
        op.takes_operand = operand
        op.takes_asid = asid
        op.kind = class_of(regime, scope, is_range)
        names_by_encoding[(op1, crn, crm, op2)] = name + share + twin
        encodings_by_name[name + share + twin] = (op1, crn, crm, op2)


def _define_all():
    for share, crm in (("OS", 1), ("IS", 3), ("", 7)):
        _define("VMALLE1", 0, crm, 0, REGIME_EL10_S1, SCOPE_VMALL, share, operand=False)
        _define("VAE1", 0, crm, 1, REGIME_EL10_S1, SCOPE_VA, share, asid=True)
        _define("ASIDE1", 0, crm, 2, REGIME_EL10_S1, SCOPE_ASID, share, asid=True)
        _define("VAAE1", 0, crm, 3, REGIME_EL10_S1, SCOPE_VAA, share)
        _define("VALE1", 0, crm, 5, REGIME_EL10_S1, SCOPE_VA, share, asid=True)
        _define("VAALE1", 0, crm, 7, REGIME_EL10_S1, SCOPE_VAA, share)
        _define("ALLE2", 4, crm, 0, REGIME_EL2_S1, SCOPE_ALL, share, operand=False)
        _define("VAE2", 4, crm, 1, REGIME_EL2_S1, SCOPE_VA, share, asid=True)
        _define("ALLE1", 4, crm, 4, REGIME_EL10_S12, SCOPE_ALL, share, operand=False)
        _define("VALE2", 4, crm, 5, REGIME_EL2_S1, SCOPE_VA, share, asid=True)
        _define("VMALLS12E1", 4, crm, 6, REGIME_EL10_S12, SCOPE_VMALLS12, share, operand=False)
    for share, crm in (("IS", 2), ("OS", 5), ("", 6)):
        _define("RVAE1", 0, crm, 1, REGIME_EL10_S1, SCOPE_VA, share, True, asid=True)
        _define("RVAAE1", 0, crm, 3, REGIME_EL10_S1, SCOPE_VAA, share, True)
        _define("RVALE1", 0, crm, 5, REGIME_EL10_S1, SCOPE_VA, share, True, asid=True)
        _define("RVAALE1", 0, crm, 7, REGIME_EL10_S1, SCOPE_VAA, share, True)
        _define("RVAE2", 4, crm, 1, REGIME_EL2_S1, SCOPE_VA, share, True, asid=True)
        _define("RVALE2", 4, crm, 5, REGIME_EL2_S1, SCOPE_VA, share, True, asid=True)
    for last, base in (("", 0), ("L", 4)):
        for share, crm, one, many in (("IS", 0, 1, 2), ("OS", 4, 0, 3), ("", 4, 1, 2)):
            _define(f"IPAS2{last}E1", 4, crm, base + one, REGIME_EL10_S2, SCOPE_IPA, share)
            _define(f"RIPAS2{last}E1", 4, crm, base + many, REGIME_EL10_S2, SCOPE_IPA, share, True)


memset(operations, 0, sizeof(operations))
_define_all()

cdef enum:
    PAGE_BITS = 12              # operands count addresses in 4 KiB whatever the granule


cdef inline uint64_t bits(uint64_t value, int shift, int width) noexcept nogil:
    return (value >> shift) & ((<uint64_t>1 << width) - 1)


cdef tlbi_status_t tlbi_lookup(uint32_t op1, uint32_t crn, uint32_t crm, uint32_t op2, const features_t *features,
                               tlbi_op_t *op) noexcept nogil:
    if crn < 8 or crn > 9 or crm > 7 or op2 > 7 or (op1 != 0 and op1 != 4):
        return TLBI_UNDEFINED
    op[0] = operations[table_index(op1, crn, crm, op2)]
    if not op.known:
        return TLBI_UNDEFINED
    if ((op.needs & NEED_OS and not features.tlbios) or (op.needs & NEED_RANGE and not features.range)
            or (op.needs & NEED_XS and not features.xs)):
        return TLBI_FEATURE
    return TLBI_OK


cdef tlbi_status_t tlbi_lookup_word(uint32_t word, const features_t *features, tlbi_op_t *op) noexcept nogil:
    """A SYS instruction: 0xD5080000 | op1 << 16 | CRn << 12 | CRm << 8 | op2 << 5 | Rt."""
    if word & 0xFFF80000u != 0xD5080000u:
        return TLBI_UNDEFINED
    return tlbi_lookup(word >> 16 & 7, word >> 12 & 15, word >> 8 & 15, word >> 5 & 7, features, op)


cdef inline void decode_single_hint(uint64_t xt, const features_t *features, tlbi_t *out) noexcept nogil:
    """TTL: granule and level; what names no leaf size of that granule is no hint."""
    cdef int granule = <int>bits(xt, 46, 2), level = <int>bits(xt, 44, 2)
    out.ttl = <uint8_t>bits(xt, 44, 4)
    if not features.ttl or granule == 0:
        return
    if level == 0 and not (granule == 1 and features.lpa2):
        return
    if level == 1 and ((granule == 2 and not features.lpa2) or (granule == 3 and not features.lpa)):
        return
    out.granule_bits = <uint8_t>(10 + 2 * granule)
    out.level = <int8_t>level


cdef void decode_range(uint64_t xt, const features_t *features, bint ds, bint kvm72, tlbi_t *out) noexcept nogil:
    """TG, SCALE, NUM, TTL and BaseADDR. TG=00 names nothing; Linux takes it for 64K."""
    cdef int tg = <int>bits(xt, 46, 2), scale = <int>bits(xt, 44, 2)
    cdef uint64_t pages = (bits(xt, 39, 5) + 1) << (5 * scale + 1)
    cdef int shift
    if tg == 0:
        if not kvm72:
            out.names_nothing = 1
            return
        tg = 3
    out.granule_bits = <uint8_t>(10 + 2 * tg)
    out.ttl = <uint8_t>bits(xt, 37, 2)
    if out.ttl and not (out.ttl == 1 and tg == 2 and not features.lpa2):
        out.level = <int8_t>out.ttl
    shift = 16 if ds else out.granule_bits
    out.start = bits(xt, 0, 37) << shift
    out.end = out.start + (pages << out.granule_bits)


cdef inline void clamp_ipa(tlbi_t *out, int ia_bits) noexcept nogil:
    """An address beyond the input size names nothing; a range ends there."""
    if out.start >> ia_bits:
        out.names_nothing = 1
    elif out.end >> ia_bits:
        out.end = <uint64_t>1 << ia_bits


cdef void clamp_ipa_kvm72(tlbi_t *out, int ia_bits) noexcept nogil:
    """Linux sign-extends the base of a range at bit 48 (spec 03, O9)."""
    cdef uint64_t size = out.end - out.start
    out.start = bits(out.start, 0, 49)
    if out.start >> 48:
        out.names_nothing = 1
        return
    out.end = out.start + size
    clamp_ipa(out, ia_bits)


cdef void decode_va(uint64_t xt, tlbi_t *out) noexcept nogil:
    """VA[55:12], sign-extended."""
    out.start = bits(xt, 0, 44) << PAGE_BITS
    if out.start >> 55 & 1:
        out.start |= <uint64_t>0xFF << 56
    out.end = out.start + (<uint64_t>1 << PAGE_BITS)


cdef void extend_va_range(tlbi_t *out) noexcept nogil:
    """Sign-extend the base from the top bit of its field; a range does not cross from one half to the other."""
    cdef int top = 36 + out.granule_bits
    cdef uint64_t size = out.end - out.start
    if out.start >> top & 1:
        out.start |= ~<uint64_t>0 << top
        if out.start + size < out.start:
            size = -out.start
    elif (out.start + size) >> top & 1:
        size = (<uint64_t>1 << top) - out.start
    out.end = out.start + size


cdef void tlbi_decode(const tlbi_op_t *op, uint64_t xt, const features_t *features, uint64_t vtcr, bint kvm72,
                      tlbi_t *out) noexcept nogil:
    """Decode an operand. ``vtcr`` gives DS and the input size. Reserved bits are ignored."""
    cdef int ia_bits
    tlbi_no_operand(op, out)
    if op.takes_asid:
        out.asid = <uint16_t>(xt >> 48)
    if op.scope == SCOPE_IPA:
        ia_bits = <int>(64 - bits(vtcr, 0, 6))
        if ia_bits > 52:
            ia_bits = 52
        if op.is_range:
            decode_range(xt, features, features.lpa2 and bits(vtcr, 32, 1) and not kvm72, kvm72, out)
        else:
            decode_single_hint(xt, features, out)
            out.start = bits(xt, 0, 40 if features.pa_bits >= 52 else 36) << PAGE_BITS
            out.end = out.start + (<uint64_t>1 << PAGE_BITS)
        if not out.names_nothing:
            if kvm72 and op.is_range:
                clamp_ipa_kvm72(out, 48 if ia_bits > 48 else ia_bits)
            elif not kvm72:
                clamp_ipa(out, ia_bits)
    elif op.scope == SCOPE_VA or op.scope == SCOPE_VAA:
        if op.is_range:
            decode_range(xt, features, False, kvm72, out)
            if not out.names_nothing:
                extend_va_range(out)
        else:
            decode_single_hint(xt, features, out)
            decode_va(xt, out)


cdef str refusal(int op1, int crn, int crm, int op2):
    """Why an encoding that the architecture has, or may have, is not an operation here."""
    if op1 == 6 and crn in (8, 9):
        if (crm, op2) in ((7, 4), (1, 4), (4, 3), (4, 7)) and crn == 8:
            name = {(7, 4): "PAALL", (1, 4): "PAALLOS", (4, 3): "RPAOS", (4, 7): "RPALOS"}[(crm, op2)]
            return f"{name} is a FEAT_RME operation of EL3"
        return "an operation of EL3"
    if op1 == 4 and crn in (8, 9) and op2 == 2 and crm in (2, 5, 6):
        share = {6: "", 2: "IS", 5: "OS"}[crm]
        return f"VMALLWS2E1{share} (FEAT_TLBIW) is not supported"
    return ""


cdef str refused_name(str name):
    """The same by name."""
    plain = name.removesuffix("NXS")
    if plain.startswith("TLBIP ") or plain.endswith("P128"):
        return "128-bit operands (FEAT_D128) are not supported"
    for suffix in ("IS", "OS", ""):
        if plain.endswith(suffix):
            stem = plain[:len(plain) - len(suffix)]
            if stem == "VMALLWS2E1":
                return "VMALLWS2E1 (FEAT_TLBIW) is not supported"
            if stem in ("PAALL", "RPA", "RPAL"):
                return "a FEAT_RME operation of EL3"
            if stem in ("ALLE3", "VAE3", "VALE3", "RVAE3", "RVALE3"):
                return "an operation of EL3"
    return ""


cdef object tlbi_encoding(object op, const features_t *features):
    """(op1, CRn, CRm, op2) of a name, of such a tuple, or of a 32-bit SYS word, checked against the features.

    Raises ``UndefinedInstruction`` when there is none or the features lack it, ``TypeError`` for other types.
    """
    cdef tlbi_op_t found
    cdef tlbi_status_t status
    if isinstance(op, str):
        shown = op
        name = op.upper()
        encoding = encodings_by_name.get(name)
        why = refused_name(name)
    elif isinstance(op, tuple):
        if len(op) != 4 or not all(isinstance(field, int) for field in op):
            raise TypeError(f"op must be (op1, CRn, CRm, op2), got {op!r}")
        shown = f"op1={op[0]}, CRn={op[1]}, CRm={op[2]}, op2={op[3]}"
        encoding = op if op in names_by_encoding else None
        why = refusal(op[0], op[1], op[2], op[3]) if all(0 <= field < 16 for field in op) else ""
    elif hasattr(op, "__index__"):
        word = op.__index__()
        shown = f"{word:#010x}"
        encoding, why = None, ""
        if 0 <= word >> 32 < 1:
            fields = (word >> 16 & 7, word >> 12 & 15, word >> 8 & 15, word >> 5 & 7)
            if word & 0xFFF80000 == 0xD5080000:
                encoding = fields if fields in names_by_encoding else None
                why = refusal(fields[0], fields[1], fields[2], fields[3])
            elif word & 0xFFF80000 == 0xD5480000 and fields[1] in (8, 9):
                why = "TLBIP: 128-bit operands (FEAT_D128) are not supported"
    else:
        raise TypeError(f"op must be a name, (op1, CRn, CRm, op2) or a 32-bit word, got {type(op).__name__}")
    if encoding is None:
        raise UndefinedInstruction(f"TLBI {shown}: {why}" if why else f"no TLBI operation {shown}")
    status = tlbi_lookup(encoding[0], encoding[1], encoding[2], encoding[3], features, &found)
    if status != TLBI_OK:
        needs = ((NEED_OS, "FEAT_TLBIOS"), (NEED_RANGE, "FEAT_TLBIRANGE"), (NEED_XS, "FEAT_XS"))
        lacking = [name for bit, name in needs if found.needs & bit]
        raise UndefinedInstruction(f"TLBI {names_by_encoding[encoding]} needs {' and '.join(lacking)}")
    return encoding


def operation_name(op1, crn, crm, op2):
    """Name of an operation by its encoding; KeyError where there is none."""
    return names_by_encoding[(op1, crn, crm, op2)]


def decode_tlbi(op, xt=0, *, features=None, vtcr=None, dialect="exact"):
    """What a TLBI names -> ``Tlbi``.

    ``op`` is a name, (op1, CRn, CRm, op2) or a 32-bit SYS word; ``xt`` its operand. ``vtcr`` gives DS and the input
    size; without it DS=0 and 48 bits. ``dialect``: ``"exact"`` follows the architecture, ``"kvm72"`` Linux 7.2 (a
    range with TG=00 counts as 64K, its base is sign-extended at bit 48). Reserved operand bits are ignored; a range
    with TG=00, or an IPA beyond the input size, names nothing; a TTL that names no leaf size is no hint.
    Raises ``UndefinedInstruction``. Source: Arm ARM, TLBI; the range base shift follows VTCR_EL2.DS.
    """
    cdef features_t f
    cdef tlbi_op_t found
    cdef tlbi_t out
    cdef uint64_t operand = as_u64(xt, "xt")
    if dialect not in ("exact", "kvm72"):
        raise ValueError(f"dialect must be 'exact' or 'kvm72', got {dialect!r}")
    fill_features(Features() if features is None else features, &f)
    encoding = tlbi_encoding(op, &f)
    tlbi_lookup(encoding[0], encoding[1], encoding[2], encoding[3], &f, &found)
    tlbi_decode(&found, operand, &f, 16 if vtcr is None else as_u64(vtcr, "vtcr"), dialect == "kvm72", &out)
    has_address = found.scope in (SCOPE_VA, SCOPE_VAA, SCOPE_IPA) and not out.names_nothing
    return Tlbi(names_by_encoding[encoding], REGIMES[found.regime], SCOPES[found.scope],
                out.start if has_address else None, (out.end or 1 << 64) if has_address else None,
                out.level if out.level != NO_LEVEL else None, 1 << out.granule_bits if out.granule_bits else None,
                bool(found.last_level), SHAREABILITIES[found.shareability], bool(found.nxs),
                out.asid if found.takes_asid else None, bool(found.takes_operand))
