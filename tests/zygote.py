"""Runs command lines in forked processes: the imports, most of a short command's time, are done once.

Reads one JSON object a line: {"argv": [...], "kill_at": [point, number] or null, "slow": seconds or null,
"environment": {...}, "out": path, "err": path}; answers with {"pid": n} when the child runs and {"code": n} when it has
ended. It runs no work itself, and has no threads that its children would miss; without the setting Arrow's spare allocator starts one at
its import. A child that a library crashes says on its stderr where.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from typing import Any


def _child(order: dict[str, Any]) -> None:
    for path, stream in ((order["out"], 1), (order["err"], 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.environ.update(order.get("environment", {}))
    from diffusion2gan.cli import main
    from tests import sabotage

    if order.get("kill_at"):
        sabotage.kill_at(*order["kill_at"])
    if order.get("slow"):
        sabotage.slow_down(order["slow"])
    code = main(order["argv"])
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the interpreter's own tidying up: with torch loaded it takes longer than many a command.
    os._exit(code)


if __name__ == "__main__":
    os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"
    faulthandler.enable()
    from diffusers import StableDiffusionPipeline  # noqa: F401

    import diffusion2gan.run  # noqa: F401
    from diffusion2gan.report import curves
    from tests.no_network import forbid

    forbid()
    curves({}, "", "")  # matplotlib's imports and fonts

    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _child(json.loads(line))
        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)
