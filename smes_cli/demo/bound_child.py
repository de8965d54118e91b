"""Run a program that cannot outlive its parent: ``python bound_child.py PARENT_PID PROGRAM ARGUMENT …``.

This script asks the kernel to send it SIGKILL when its parent dies (``prctl(PR_SET_PDEATHSIG)``, Linux only), and then
replaces itself by the program with ``exec``, which keeps that setting. It is a script and not a ``preexec_fn`` because
Python code between fork and exec can deadlock in a parent with threads. It is run by its path, isolated from
site-packages, and therefore imports the standard library only.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> None:
    """Bind this process to its parent, then become the program."""
    parent_pid, program = int(argv[1]), argv[2:]
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
            sys.exit(f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent_pid:  # the parent died before the request above, so no signal will follow
        sys.exit(f"parent {parent_pid} is gone")
    try:
        os.execvp(program[0], program)  # noqa: S606 - becoming the caller's program is the purpose
    except OSError as error:
        sys.exit(f"{program[0]}: {error.strerror}")


if __name__ == "__main__":
    main(sys.argv)
