"""Lines of ftrace text, for traces that the tests make up."""


class Trace:
    """Collects lines; the clock goes on by 100 us with each."""

    def __init__(self):
        self.lines = ["# tracer: nop"]
        self.time = 1_000_000

    def add(self, event, task="CPU 0/KVM", pid=100, cpu=0):
        self.time += 100
        clock = f"{self.time // 1_000_000:5}.{self.time % 1_000_000:06}"
        self.lines.append(f"{task:>16}-{pid:<7} [{cpu:03}] ..... {clock}: {event}")

    def vcpu(self, number, event):
        self.add(event, f"CPU {number}/KVM", 100 + number, number)

    def fault(self, vcpu, ipa, write=False):
        esr = 0x92000007 | write << 6
        self.vcpu(vcpu, f"kvm_guest_fault: ipa 0x{ipa:x}, hsr 0x{esr:x}, hxfar 0x0, pc 0x00000000001000")

    def enter_l2(self, vcpu, hcr=0x2403C807D223F):
        self.vcpu(vcpu, f"kvm_nested_eret: elr_el2: 0x0 spsr_el2: 0x000003c5 (M: EL1h) hcr_el2: {hcr:x}")

    def exit_l2(self, vcpu):
        self.vcpu(vcpu, "kvm_inject_nested_exception: SYNC: esr_el2 0x5a000000 elr_el2: 0x0 spsr_el2: 0x000003c5 "
                        "(M: EL1h) hcr_el2: 2403c807d223f")

    def tlbi_ipa(self, vcpu, ipa):
        self.vcpu(vcpu, f"h_ipas2e1is: (handle_ipas2e1is+0x0/0x120) op1=4 crm=0 op2=1 val=0x{ipa >> 12:x}")

    def unmap_hva(self, start, end):
        self.add(f"kvm_unmap_hva_range: mmu notifier unmap range: 0x{start:016x} -- 0x{end:016x}", "kswapd0", 50)

    def probe(self, name, arguments, vcpu=0):
        self.vcpu(vcpu, f"{name}: ({name}+0x0/0x100) {arguments}")

    def map(self, root, ipa, pa, size=4096, prot=0xF, vcpu=0):
        self.probe("map", f"pgd=0x{root:x} ipa=0x{ipa:x} size=0x{size:x} pa=0x{pa:x} prot=0x{prot:x}", vcpu)

    def write(self, file):
        file.write_text("\n".join(self.lines) + "\n")
        return file
