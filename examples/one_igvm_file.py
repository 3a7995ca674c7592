"""One IGVM file, one ID block, any number of vCPUs: the file fixes pages, VMSA and its GPA.

Built from examples/guests/hello.elf and signed by a key made here, then launched on a simulated
kernel with VMSA pages (proposal v2) with 1 and 4 vCPUs: firmware checks the digest each time.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import kvmlaunch
from kvmlaunch.abi.idblock import IdBlock
from kvmlaunch.abi.idblock_sign import Signer, sign_id_block
from kvmlaunch.images.igvm.build import for_igvm
from kvmlaunch.launch.igvm_build import write_igvm

HELLO = Path(__file__).parent / "guests" / "hello.elf"
IMAGE = sys.argv[1] if len(sys.argv) > 1 else HELLO

plan = for_igvm(kvmlaunch.load_image(IMAGE, kvmlaunch.PlanOptions(vmsa_mode="direct")))
digest = kvmlaunch.measure(plan).digest
block = IdBlock(ld=digest, policy=plan.policy)
auth = sign_id_block(block, Signer.generate())
plan = replace(plan, id_block=block.encode(), id_auth=auth.encode())
with tempfile.TemporaryDirectory() as folder:
    file = f"{folder}/hello.igvm"
    print(f"built: {write_igvm(file, plan)} bytes, launch digest {digest.hex()}")
    for vcpus in (1, 4):
        loaded = kvmlaunch.load_image(file, kvmlaunch.PlanOptions(vcpus=vcpus))
        with kvmlaunch.SimPlatform("direct-vmsa") as sim, kvmlaunch.Guest(loaded, sim) as guest:
            guest.launch()  # SNP_LAUNCH_FINISH with the ID block
            assert guest.digest == digest, guest.witness()
            text = []
            outcome = kvmlaunch.run_guest(guest, console=text.append)
            print(f"{vcpus} vCPUs: {b''.join(text).decode().splitlines()[0]}; {outcome}")
