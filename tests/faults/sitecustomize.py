"""Puts `kill -9` into named phases. With this directory on PYTHONPATH,

    LEEWAY_FAULTS=folder;module:Class.function@Type:count:moment:victim;...

means: when that function is called for the `count`-th time in some process, the `victim` (a role of `ROLES`) of the
same job is killed, `before` or `after` the call. `@Type`, where given, counts only calls with such an argument. The
faults strike in their order, each once: number i counts calls only when 0 to i-1 have struck, which files in `folder`
say. A victim that is not there yet is struck at a later call. Nothing of the product knows of it.
"""

import contextlib
import functools
import importlib.machinery
import os
import signal
import sys

VARIABLE = "LEEWAY_FAULTS"
ROLES = {  # by the command line, the first that fits
    "launcher": b"/torchrun\0",
    "learner": b"engine/launch.py\0",
    "coordinator": b"\0engine.coordinator_loop\0",
    "generator": b"\0engine.actor_loop\0",
    "reward worker": b"\0rewards.worker\0",
}


def members(value: str) -> dict[int, str]:
    """The living processes of the job whose variable has this value, each with its role."""
    wanted, found = f"{VARIABLE}={value}".encode(), {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            with open(f"/proc/{name}/environ", "rb") as file:
                if wanted not in file.read().split(b"\0"):
                    continue
            with open(f"/proc/{name}/cmdline", "rb") as file:
                line = file.read()
            found[int(name)] = next((role for role, words in ROLES.items() if words in line), "other")
    return found


class Fault:
    """One kill; number `number` of the job's."""

    def __init__(self, folder: str, number: int, text: str):
        self.module, path, count, self.moment, self.victim = text.split(":")
        path, _, self.kind = path.partition("@")
        *self.owners, self.name = path.split(".")
        self.left = int(count)
        self.previous, self.mark = (os.path.join(folder, str(place)) for place in (number - 1, number))
        self.first = number == 0

    def install(self, module):
        owner = functools.reduce(getattr, self.owners, module)
        setattr(owner, self.name, self.wrap(getattr(owner, self.name)))

    def wrap(self, function):
        @functools.wraps(function)
        def faulty(*args, **kwargs):
            due = self.counts(args)
            if due and self.moment == "before":
                self.strike()
            result = function(*args, **kwargs)
            if due and self.moment == "after":
                self.strike()
            return result

        return faulty

    def counts(self, args) -> bool:
        """Whether this call is the one, or a later one while the victim was missing."""
        if self.kind and self.kind not in (type(arg).__name__ for arg in args):
            return False
        if os.path.exists(self.mark) or not (self.first or os.path.exists(self.previous)):
            return False
        self.left -= 1
        return self.left <= 0

    def strike(self):
        victims = [pid for pid, role in members(os.environ[VARIABLE]).items() if role == self.victim]
        if not victims:
            return
        with contextlib.suppress(FileExistsError):
            open(self.mark, "x").close()
            os.kill(os.getpid() if os.getpid() in victims else victims[0], signal.SIGKILL)


class Finder:
    """Installs faults in the modules that they name as these are imported."""

    def __init__(self, faults):
        self.faults = faults

    def find_spec(self, name, path=None, target=None):
        faults = [fault for fault in self.faults if fault.module == name]
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if faults else None
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            for fault in faults:
                fault.install(module)

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get(VARIABLE):
    folder, *texts = os.environ[VARIABLE].split(";")
    sys.meta_path.insert(0, Finder([Fault(folder, number, text) for number, text in enumerate(texts)]))
