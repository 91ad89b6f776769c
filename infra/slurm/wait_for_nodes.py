"""Wait until a Ray cluster has so many nodes: `python wait_for_nodes.py HOST:PORT COUNT`. Exits with 1 if it does not in time."""

from __future__ import annotations

import os
import sys
import time


def main(address: str, count: int, patience: float) -> int:
    import ray

    deadline, found = time.monotonic() + patience, 0
    while time.monotonic() < deadline:
        try:
            if not ray.is_initialized():
                ray.init(address=address, log_to_driver=False, logging_level="ERROR")
            found = sum(node["Alive"] for node in ray.nodes())
        except (ConnectionError, RuntimeError, TimeoutError):  # the head is still starting
            found = 0
        if found >= count:
            sys.stdout.write(f"Ray runs at {address} on {found} nodes\n")
            return 0
        time.sleep(1)
    sys.stderr.write(
        f"enat.sbatch: {found} of {count} nodes joined {address} in {patience:.0f} s; look for errors of `ray start` above, "
        "and check that nodes reach each other at these addresses, or raise ENAT_NODES_SECONDS\n"
    )
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), float(os.environ.get("ENAT_NODES_SECONDS", "300"))))
