"""What a process started ends with it, however it ends."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from pathlib import Path

PARENT = """
import subprocess, sys, threading
from rlaif.orphans import end_children_with_this_process
watcher = end_children_with_this_process()
assert end_children_with_this_process() is watcher
children = []
thread = threading.Thread(target=lambda: children.append(subprocess.Popen(["sleep", "600"])))
thread.start(), thread.join()
print(watcher.pid, children[0].pid, flush=True)
sys.stdin.read()
"""


def test_the_children_of_a_killed_process_are_killed() -> None:
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        watcher, child = map(int, parent.stdout.readline().split())
        ends = [os.pidfd_open(pid) for pid in (child, watcher)]
        until = time.monotonic() + 60
        while not any("pidfd" in os.readlink(fd) for fd in Path(f"/proc/{watcher}/fd").iterdir()):
            assert time.monotonic() < until, "the watcher has not seen the child"
            time.sleep(0.05)
        assert not select.select(ends, [], [], 0)[0]
        parent.kill()
        for end in ends:
            assert select.select([end], [], [], 60)[0], "it outlives the process that started it"
            os.close(end)
