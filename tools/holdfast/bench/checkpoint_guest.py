"""The guest of `holdfast.bench.checkpoint`: writes 4 KiB somewhere, one at a time, until its stdin ends.

A process of its own, so that what the benchmark does beside it is not measured. For each write it records
when it began (CLOCK_MONOTONIC, which all processes of a host share) and how long it took, both in
nanoseconds, and leaves all of them behind as a numpy array.
"""

import random
import select
import sys
import time
from array import array

import click
import numpy as np

from daemonkit.cli import run_main
from holdfast.guest.nbd import NbdClient

WRITE_BYTES = 4096
# Between two looks at stdin; a power of two of writes.
CHUNK = 64


@click.command()
@click.argument("uri")
@click.argument("out")
@click.option("--seed", default=1)
def main(uri: str, out: str, seed: int) -> None:
    """Write to URI until stdin ends; the samples go to OUT."""
    rng = random.Random(seed)
    taken = array("Q")
    with NbdClient(uri, reply_seconds_max=120.0) as disk:
        blocks = disk.size_bytes // WRITE_BYTES
        print("ready", flush=True)
        while not select.select([sys.stdin], [], [], 0)[0]:
            for _ in range(CHUNK):
                data = rng.randbytes(8) * (WRITE_BYTES // 8)
                offset = rng.randrange(blocks) * WRITE_BYTES
                began = time.monotonic_ns()
                disk.write(offset, data)
                taken.append(began)
                taken.append(time.monotonic_ns() - began)
    np.save(out, np.frombuffer(taken, np.uint64).reshape(-1, 2))


if __name__ == "__main__":
    run_main(main)
