"""Claims the run of `helpers.specs.spec` in the given folder, prints the outcome, and holds the claim for a minute."""

from __future__ import annotations

import sys
import time

from helpers.specs import spec
from scaling_lab.core.storage.store import RunStore

if __name__ == "__main__":
    print("claimed" if RunStore(sys.argv[1]).claim(spec()) else "refused", flush=True)
    time.sleep(60)
