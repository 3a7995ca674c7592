"""Who makes the VMSA: the same image in each mode, its launch digests, and what they depend on.

sync is mainline KVM; page and direct are the proposals (v1, v2) for a VMSA of user space. Each
launch is made, not only predicted: here on simulated kernels.
"""

import sys

import kvmlaunch
from kvmlaunch import PlanOptions, VmsaChoice

IMAGE = sys.argv[1] if len(sys.argv) > 1 else b"\xf4"  # a flat real-mode guest of one HLT
KERNELS = {"sync": "7.0", "page": "vmsa-page", "direct": "direct-vmsa"}
VARIANTS = {
    "number of vCPUs": {"vcpus": 4},
    "CPU model": {"signature": 0xA10F10},  # Genoa's; in RDX at reset
    "GPA of the VMSA": {"vmsas": (VmsaChoice(gpa=0x9000),)},
    "a register of the VMSA": {"vmsas": (VmsaChoice(edits=(("rbx", 7),)),)},
}


def launched(mode, **options):
    """Launch the image; the digest that the firmware measured, as it was predicted."""
    plan = kvmlaunch.load_image(IMAGE, PlanOptions(vmsa_mode=mode, **options))
    platform = kvmlaunch.SimPlatform(KERNELS[mode])
    with platform, kvmlaunch.Guest(plan, platform) as guest:
        guest.launch()
        assert guest.witness().agrees, guest.witness()
        return guest.digest


print("platform: sim")
for mode, kernel in KERNELS.items():
    digest = launched(mode)
    # In mode sync there is nothing to choose: KVM makes the VMSAs, at GPA 0xfffffffff000.
    tried = {what: o for what, o in VARIANTS.items() if mode != "sync" or "vmsas" not in o}
    depends = [what for what, options in tried.items() if launched(mode, **options) != digest]
    print(f"{mode:<6} {digest.hex()}")
    print(f"       kernel {kernel}; depends on {', '.join(depends)}")
