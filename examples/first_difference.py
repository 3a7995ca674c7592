"""Two launches with different digests: name the first page that differs, and the field in it."""

import kvmlaunch
from kvmlaunch.abi.kvm_sync import synced
from kvmlaunch.abi.vmsa import diff

HALT = b"\xf4"  # a flat real-mode guest of one HLT

milan = kvmlaunch.load_image(HALT, kvmlaunch.PlanOptions(signature=0xA00F11))
genoa = kvmlaunch.load_image(HALT, kvmlaunch.PlanOptions(signature=0xA10F10))

print("milan", kvmlaunch.measure(milan))
print("genoa", kvmlaunch.measure(genoa))

for ours, theirs in zip(kvmlaunch.page_records(milan), kvmlaunch.page_records(genoa), strict=True):
    if ours != theirs:
        print("first difference:", ours.type.name, hex(ours.gpa), ours.origin)
        break

for field in diff(synced(milan.vcpus[0], sev_features=1), synced(genoa.vcpus[0], sev_features=1)):
    print(field)
