"""A launch step by step, as one would type it in a REPL: hello.elf on the simulated host."""

from pathlib import Path

import kvmlaunch

HELLO = Path(__file__).parent / "guests" / "hello.elf"

plan = kvmlaunch.load_image(HELLO)
print(plan)
for step in plan.steps:
    print(f"  {step.gpa:#x} {step.npages} {step.type.name} {step.label}")

predicted = kvmlaunch.measure(plan)
print("predicted", predicted)

platform = kvmlaunch.SimPlatform("6.12")
with kvmlaunch.Guest(plan, platform) as guest:
    guest.start()
    for record in guest.update():
        print(record)
    for record in guest.finish():
        print(record)
    print(guest.state)
    print(guest.witness())
    assert guest.digest == predicted.digest
