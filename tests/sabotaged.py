"""The command line under torchrun, killed in one process: `KILL=RANK:POINT:NUMBER python -m tests.sabotaged ...`."""

from __future__ import annotations

import os
import sys

from diffusion2gan.cli import main
from tests import sabotage

if __name__ == "__main__":
    rank, point, number = os.environ["KILL"].split(":")
    if os.environ["RANK"] == rank:
        sabotage.kill_at(point, int(number))
    sys.exit(main())
