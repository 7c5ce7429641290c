"""A process that holds a lease until it loses it: says `held`, then `lost`, and exits with 3."""

from __future__ import annotations

import os
import sys
import time

from stillhouse.embedded.parts import Store
from tests.integration.test_leases import SHORT, State
from tests.support.shards import store_of


def main() -> int:
    from stillhouse.chassis.leases import LeaseLost, acquire

    access, secret = os.environ["HOLDER_KEYS"].split()
    part = Store(os.environ["HOLDER_ENDPOINT"], os.environ["HOLDER_BUCKET"], access, secret)
    lease = acquire(store_of(part), sys.argv[1], "stopped", model=State, initial=State, times=SHORT)
    assert lease is not None
    with lease:
        print("held", flush=True)
        while True:
            try:
                lease.check()
            except LeaseLost:
                print("lost", flush=True)
                return 3
            time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())
