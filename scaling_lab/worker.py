"""`python -m scaling_lab.worker FOLDER`: one worker process, also under torchrun (code: launching/worker.py)."""

from __future__ import annotations

import sys

from scaling_lab.launching.worker import main

if __name__ == "__main__":
    sys.exit(main())
