"""Processes, servers and waits of the tests: what a test starts ends with it, and waits have no short limits."""

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time

from lib.web import listen, make_server

LIMIT = 600  # seconds: a busy machine never needs them, only what hangs does


def wait_for(condition):
    """Wait until condition() is true, and return that."""
    end = time.monotonic() + LIMIT
    while not (found := condition()):
        assert time.monotonic() < end, f"waited for {LIMIT} seconds"
        time.sleep(0.01)
    return found


@contextlib.contextmanager
def started(command, **options):
    """A process in a session of its own, as Popen; it and all that it started end with the context."""
    with subprocess.Popen(command, start_new_session=True, **options) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def run(command, **options):
    """A command that ends by itself: CompletedProcess with its output as text."""
    with started(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        printed = process.communicate(timeout=LIMIT)
    return subprocess.CompletedProcess(command, process.returncode, *printed)


def free_ports(n):
    """Numbers of n ports that nobody listens at now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(n)]
        return [free.getsockname()[1] for free in sockets]


@contextlib.contextmanager
def serve_app(app):
    """The port of a server of an app, in a thread."""
    server, listening = make_server(app, log_level="error"), listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started or not thread.is_alive())
        assert server.started
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(LIMIT)
        listening.close()
        assert not thread.is_alive()
