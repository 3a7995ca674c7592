"""Make the simulated firmware refuse the third page, and see what a launcher reports.

``@3+`` is "from the third on": one refusal alone is hidden by KVM, which reports progress for
the pages before, and then the next call goes through.
"""

import kvmlaunch

image = bytes(5 * 4096)
platform = kvmlaunch.SimPlatform("6.12", faults=["SNP_LAUNCH_UPDATE:fw=0x1a@3+"])

with kvmlaunch.Guest(kvmlaunch.load_image(image), platform) as guest:
    try:
        guest.launch()
    except kvmlaunch.KvmLaunchError as error:
        print(error)
    print(f"{len(guest.records)} pages were taken before; the launch is {guest.state}")
