"""Wall time and peak memory of a command with all its children: `python benchmarks/measure_command.py make demo`.

Memory is the proportional set size summed over the process tree (shared pages counted once), sampled twice a
second from /proc, so Linux only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import date
from pathlib import Path


def descendants(root: int) -> list[int]:
    """The process and everything it started that is still alive."""
    found = [root]
    for pid in found:
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                found += [int(child) for child in task.read_text().split()]
            except OSError:
                continue
    return found


def pss_bytes(pid: int) -> int:
    """Proportional set size of one process; 0 once it has ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")) * 1024


def main(command: list[str]) -> int:
    """Run the command; print one JSON line with what it took."""
    started = time.monotonic()
    process = subprocess.Popen(command)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(map(pss_bytes, descendants(process.pid))))
        time.sleep(0.5)
    print(
        json.dumps(
            {
                "command": " ".join(command),
                "exit_code": process.returncode,
                "seconds": round(time.monotonic() - started, 1),
                "peak_memory_gib": round(peak / 2**30, 2),
                "cpu_cores": os.cpu_count(),
                "date": date.today().isoformat(),
            }
        )
    )
    return process.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
