"""For the tests of the trace import: calls of it, and an independent, slow reader to compare it with.

The slow reader has str methods and one dict per line. It reads what ftrace wrote in the captures, field by field as the
events are described, and knows nothing of the import's templates.
"""

import io

import numpy as np

from s2shadow.events import EVENT_DTYPE, UNKNOWN
from s2shadow.events import EventKind as K
from s2shadow.trace import read_trace

UNSET = dict.fromkeys(EVENT_DTYPE.names, 0) | {"vm": UNKNOWN, "vcpu": UNKNOWN}
KINDS = {
    "kvm_guest_fault": K.GUEST_FAULT, "kvm_access_fault": K.ACCESS_FAULT, "kvm_unmap_hva_range": K.UNMAP_HVA,
    "kvm_age_hva": K.AGE_HVA, "kvm_test_age_hva": K.TEST_AGE_HVA, "kvm_exit": K.EXIT, "kvm_sys_access": K.SYS_ACCESS,
    "kvm_nested_eret": K.NESTED_ERET, "kvm_inject_nested_exception": K.NESTED_EXCEPTION, "map": K.MAP,
    "unmap": K.UNMAP, "wrprotect": K.WRPROTECT, "relax": K.RELAX, "mkyoung": K.MKYOUNG, "age": K.AGE,
    "split": K.SPLIT, "destroy": K.DESTROY, "gfn_unmap": K.GFN_UNMAP, "mn_start": K.MN_START, "mn_end": K.MN_END,
    "memslot": K.MEMSLOT, "tlb_ipa": K.TLB_IPA, "tlb_ipa_nsh": K.TLB_IPA_NSH, "tlb_range": K.TLB_RANGE,
    "tlb_vmid": K.TLB_VMID, "tlb_cpu": K.TLB_CPU, "tlb_allvm": K.TLB_ALL, "nested_unmap": K.NESTED_UNMAP,
    "nested_wp": K.NESTED_WRPROTECT, "nested_flush": K.NESTED_FLUSH, "shadow_unmap_range": K.SHADOW_UNMAP_RANGE,
    "shadow_unmap_ipa": K.SHADOW_UNMAP_IPA, "shadow_tlbi_s1e1": K.SHADOW_TLBI_S1, "shadow_lookup": K.SHADOW_LOOKUP,
    "walk_nested": K.WALK_NESTED, "s2_fault_inject": K.INJECT_FAULT, "h_ipas2e1is": K.HANDLE_TLBI,
    "h_ripas2e1is": K.HANDLE_TLBI, "h_vmalls12e1is": K.HANDLE_TLBI, "h_alle1is": K.HANDLE_TLBI,
    "h_tlbi_el1": K.HANDLE_TLBI, "h_tlbi_el2": K.HANDLE_TLBI, "tracing_mark_write": K.NOTE,
}
CSV_KINDS = {"TLBI": K.TLBI, "VTTBR": K.SET_VTTBR, "VTCR": K.SET_VTCR, "ENTRY": K.ENTER, "MARK": K.MARK, "FOLD": K.FOLD}
PAGE = 4096
CSV_HEADER = "seq,us,vcpu,el,event,op,insn,xt,x1,vttbr_el2,vtcr_el2,hcr_el2"


def read(data, **options):
    """Rows of a text or of bytes, and the reader that gave them."""
    stream = io.BytesIO(data.encode() if isinstance(data, str) else data)
    reader = read_trace(stream, **options)
    arrays = list(reader)
    return (np.concatenate(arrays) if arrays else np.zeros(0, EVENT_DTYPE)), reader


def fields(row):
    """What a row says, without the fields that are 0 or unknown."""
    values = dict(zip(EVENT_DTYPE.names, row.tolist(), strict=True))
    return {name: value for name, value in values.items() if value != UNSET[name]}


def event_of(line, number):
    """Fields of one ftrace line -> (name, dict), or None for a comment. Fields that are 0 or unknown are left out."""
    if line.startswith("#"):
        return None
    head, _, rest = line.partition("] ")
    task, _, cpu = head.rpartition("[")
    comm, _, pid = task.strip().rpartition("-")
    _flags, time, name, *body = rest.split(None, 3)
    name = name.rstrip(":")
    text = body[0].rstrip("\n") if body else ""
    seconds, _, micros = time.rstrip(":").partition(".")
    fields = {"time": int(seconds) * 10**9 + int(micros) * 1000, "seq": number, "pid": int(pid), "cpu": int(cpu)}
    if comm.startswith("CPU "):
        fields["vcpu"] = int(comm.split("/")[0][4:])
    if name in KINDS:
        fields["kind"] = int(KINDS[name])
        fields |= said(name, text)
        if "start" in fields:
            fields.setdefault("end", fields["start"])
    return name, fields


def said(name, text):
    words = text.replace(",", "").split()
    if name == "kvm_guest_fault":
        esr = int(words[3], 16)
        return {"start": int(words[1], 16), "value": esr, "va": int(words[5], 16), "pc": int(words[7], 16),
                "access": access_of(esr)}
    if name == "kvm_access_fault":
        return {"start": int(words[1], 16)}
    if name in ("kvm_unmap_hva_range", "kvm_age_hva"):
        return {"start": int(words[4], 16), "end": int(words[6], 16)}
    if name == "kvm_test_age_hva":
        return {"start": int(words[5], 16)}
    if name == "kvm_exit":
        return {"flags": {"IRQ:": 0, "SERROR:": 1, "TRAP:": 2}.get(words[0], 3), "value": int(words[2], 16),
                "pc": int(words[-1], 16)}
    if name == "kvm_nested_eret":
        return {"pc": int(words[1], 16), "value": int(words[3], 16), "hcr": int(words[-1], 16)}
    if name == "kvm_inject_nested_exception":
        return {"flags": {"SYNC:": 0, "IRQ:": 1}.get(words[0], 2), "value": int(words[2], 16),
                "pc": int(words[4], 16), "hcr": int(words[-1], 16)}
    if name == "tracing_mark_write":
        return {"note": text.strip()}
    return probed(name, {key: int(value, 0) for key, value in (word.split("=") for word in words[1:])})


def probed(name, given):
    fields = {}
    if "pgd" in given:
        fields["root"] = given["pgd"]
    if name.startswith("h_"):
        fields["insn"] = 0xD508_8000 | given["op1"] << 16 | given["crm"] << 8 | given["op2"] << 5
        fields["value"] = given.get("val", 0)
    elif name == "gfn_unmap":
        fields |= {"start": given["start"] * PAGE, "end": given["end"] * PAGE}
    elif name == "memslot":
        fields |= {"start": given["gpa"], "end": given["gpa"] + given["size"], "va": given["hva"],
                   "value": given["slot"], "flags": given["flags"]}
    else:
        start = given.get("ipa", given.get("start"))
        if start is not None:
            fields["start"] = start
        if "end" in given:
            fields["end"] = given["end"]
        if "size" in given:
            fields["end"] = start + given["size"]
        if "pages" in given:
            fields["end"] = start + given["pages"] * PAGE
        fields |= {"pa": given.get("pa", 0), "value": given.get("event", given.get("esr", given.get("prot", 0))),
                   "flags": given.get("mkold", given.get("may_block", 0))}
        if "level" in given:
            fields["level"] = given["level"] if -1 <= given["level"] <= 3 else -2
        if "prot" in given:
            bits = ((8, 1), (4, 2), (1, 4), (2, 32))       # R W PX UX -> READ WRITE EXEC EXEC_EL0
            fields["access"] = sum(access for bit, access in bits if given["prot"] & bit)
    return fields


def access_of(esr):
    code = esr >> 26
    if code not in (0x20, 0x21, 0x24, 0x25):
        return 0
    if esr & 1 << 7:        # a stage-1 walk
        return 16 | (2 if esr & 0b111100 == 0b001100 else 1)
    if code in (0x20, 0x21):
        return 4
    return 2 if esr & 1 << 6 else 1


def row_of(line):
    """Fields of one CSV line, in the usual order of the columns."""
    seq, us, vcpu, el, event, _op, insn, xt, x1, vttbr, vtcr, hcr = line.rstrip("\n").split(",")
    return {"seq": int(seq), "time": int(us) * 1000, "cpu": int(vcpu), "vcpu": int(vcpu), "el": int(el),
            "kind": int(CSV_KINDS[event]), "insn": int(insn, 16), "value": int(xt, 16), "start": int(x1, 16),
            "end": int(x1, 16), "vttbr": int(vttbr, 16), "vtcr": int(vtcr, 16), "hcr": int(hcr, 16)}
