"""Which build of torch the driver and the cards of this computer can run. No torch here: it isn't installed yet.

    python lib/build.py     prints what pip needs for it: --extra-index-url URL; nothing where pip's own build will do
"""

import re
import subprocess
import sys

URL = "https://download.pytorch.org/whl/"
BUILDS = [  # of torch 2.13.0, the first that fits is taken: name, oldest driver, oldest and newest card (capability)
    ("", 580, 7.5, 99),  # pip's own, of CUDA 13.0: T4, RTX 20 and newer
    ("cu126", 525, 5.0, 9.0),  # GTX 10, P100, V100; up to H100 with an older driver
    ("cu129", 570, 7.0, 12.1),  # RTX 50, B200 with an older driver
]


def choose_build(listed):
    """The build for what nvidia-smi lists, a line a card: "550.54.15, 8.6" -> "cu126". "" is pip's own, also where it
    lists none or no build fits. Of cards that have no build in common the newest counts.
    """
    found = re.findall(r"^(\d+)[\d.]*, (\d+\.\d+)$", listed, re.MULTILINE)
    drivers, cards = [int(driver) for driver, _ in found], sorted(float(card) for _, card in found)
    for least in cards[:1] + cards[-1:]:
        for name, driver, oldest, newest in BUILDS:
            if drivers[0] >= driver and oldest <= least and cards[-1] <= newest:
                return name
    return ""


def main():
    command = ["nvidia-smi", "--query-gpu=driver_version,compute_cap", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):  # nvidia-smi is missing, or it hangs
        listed = ""
    build = choose_build(listed)
    if build:
        print(f"driver and capability {listed.splitlines()[0]}: taking torch's build {build}", file=sys.stderr)
        print(f"--extra-index-url {URL}{build}")


if __name__ == "__main__":
    main()
