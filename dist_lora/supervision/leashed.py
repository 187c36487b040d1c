"""Runs a program that ends with the process that asked for it: a script of its own, which needs no package.

``python leashed.py PROGRAM ARGUMENTS...``, as the leader of a process group, with a pipe as its standard input. When the
other end of the pipe is closed, as the kernel does for a process that was killed, the whole group is killed: the program,
and what it has started. Its exit code is the program's, or 128 + N where signal N has ended it, as a shell tells it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

NOT_STARTED = 127


def _kill_once_closed() -> None:
    while os.read(0, 1024):
        pass
    os.killpg(0, signal.SIGKILL)


def main() -> int:
    """The program's exit code; ``NOT_STARTED`` where it can't be started."""
    threading.Thread(target=_kill_once_closed, daemon=True).start()
    try:
        code = subprocess.call(sys.argv[1:], stdin=subprocess.DEVNULL)
    except OSError as error:
        print(f"{sys.argv[1]}: can't be started: {error.strerror or error}", file=sys.stderr)
        return NOT_STARTED
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    # Not by sys.exit: that waits for the thread's standard input.
    exit_code = main()
    sys.stderr.flush()
    os._exit(exit_code)
