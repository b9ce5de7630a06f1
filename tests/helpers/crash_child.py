"""A fork of this process that ends at a chosen moment."""

import os
import select
import signal
import sys
import time

from crash_results import PLACE


def in_child(run, *, point=None, kill_after=None):
    """Run in a fork, and end it at a chosen moment.

    Returns its exit status (a negative signal), what it said, and how many operations and seconds.

    Args:
        run: what is run.
        point: it ends itself by SIGKILL before its so-and-so-many-th operation on files below the
            watched place.
        kill_after: seconds after the first such operation when it is killed from here.
    """
    reader, writer = os.pipe()
    said, say = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            watch(writer, point)
            text = run() or ""
            os.write(say, str(text).encode()[:60000])
            os._exit(0)
        except BaseException as error:
            os.write(say, f"{type(error).__name__}: {error}".encode()[:60000])
            os._exit(1)
    os.close(writer)
    os.close(say)
    first = os.read(reader, 1)  # or the end
    start = time.perf_counter()
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    text = b""
    while chunk := os.read(said, 65536):
        text += chunk
    _, status = os.waitpid(pid, 0)
    seconds = time.perf_counter() - start
    counted = first
    while select.select([reader], [], [], 0)[0] and (chunk := os.read(reader, 65536)):
        counted += chunk
    os.close(reader)
    os.close(said)
    return os.waitstatus_to_exitcode(status), text.decode(), (len(counted), seconds)


def watch(writer, point):
    """Count operations on files below the place, and end the process at one of them.

    Each operation writes a byte into a pipe.
    """
    count = 0

    def hook(event, arguments):
        nonlocal count
        known = event in ("open", "crash.call") or event.startswith(("os.", "shutil.", "tempfile."))
        if not known or not (event == "crash.call" or any(PLACE in str(a) for a in arguments[:2])):
            return
        os.write(writer, b".")
        count += 1
        if count == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def audited(call):
        def run(*arguments):
            sys.audit("crash.call")
            return call(*arguments)

        return run

    for name in ("pwrite", "fsync"):  # of which Python itself tells nothing
        setattr(os, name, audited(getattr(os, name)))
    sys.addaudithook(hook)
