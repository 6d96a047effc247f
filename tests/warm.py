"""SGLang servers that start in two seconds, for tests: forks of one process that has imported all of SGLang.

    PYTHON tests/warm.py SOCKET      # that process; PYTHON is that of SGLang's environment

`tests/warm_python`, in the place of `generator.sglang.python`, hands what it was called with to the process at
LEEWAY_WARM, of which a fork then is the server: with its environment, input and output, and with its end, for neither
outlives the other. SGLang's children are forks too, unless LEEWAY_SPAWN is set. All that follows the imports is real.
"""

import gc
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path


def main(path: str) -> None:
    import sglang.srt.entrypoints.http_server  # type: ignore[import-not-found]
    import sglang.srt.managers.scheduler  # type: ignore[import-not-found]
    import sglang.srt.models.registry  # type: ignore[import-not-found] # noqa: F401

    gc.freeze()  # else each fork goes through all that was imported, and copies it
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        print("warm", flush=True)
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                os._exit(serve(connection))
            connection.close()


def serve(connection: socket.socket) -> int:
    """The call that comes over `connection`, in this process; its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    called, fds, *_ = socket.recv_fds(connection, 1 << 20, 3)
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
    os.environ.clear()
    os.environ.update(json.loads(called), LEEWAY_PARENT=str(os.getppid()))
    threading.Thread(target=die_with, args=(connection,), daemon=True).start()
    try:
        begin()
        runpy.run_module("engine.generators.guest", run_name="__main__", alter_sys=True)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def begin() -> None:
    """What a fresh interpreter does with its environment; and SGLang, which asks for fresh ones, gets forks."""
    places = [place for place in os.environ["PYTHONPATH"].split(os.pathsep) if place]
    sys.path[:0] = places
    for site in (Path(place, "sitecustomize.py") for place in places):
        if site.exists():
            runpy.run_path(str(site))
    if "LEEWAY_SPAWN" not in os.environ:
        multiprocessing.set_start_method = lambda *_, **__: None


def die_with(connection: socket.socket) -> None:
    connection.recv(1)  # nothing comes but the end
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1])
