"""Puts a `kill -9` into a named phase: with this directory on PYTHONPATH and

    LEEWAY_FAULT=module:Class.function:count:moment:once

the process in which that function is called for the `count`-th time kills itself, `before` or `after` the call, and
creates the file `once`; while that file exists nothing is killed. Nothing of the product knows of it.
"""

import functools
import importlib.machinery
import os
import signal
import sys


class Fault:
    """A finder that wraps one function when its module is imported."""

    def __init__(self, text: str):
        self.module, path, count, self.moment, self.once = text.split(":")
        *self.owners, self.name = path.split(".")
        self.left = int(count)

    def find_spec(self, name, path=None, target=None):
        if name != self.module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            owner = functools.reduce(getattr, self.owners, module)
            setattr(owner, self.name, self.wrap(getattr(owner, self.name)))

        spec.loader.exec_module = exec_module
        return spec

    def wrap(self, function):
        @functools.wraps(function)
        def faulty(*args, **kwargs):
            self.left -= 1
            if self.left == 0 and self.moment == "before":
                self.kill()
            result = function(*args, **kwargs)
            if self.left == 0 and self.moment == "after":
                self.kill()
            return result

        return faulty

    def kill(self):
        if not os.path.exists(self.once):
            open(self.once, "x").close()
            os.kill(os.getpid(), signal.SIGKILL)


if os.environ.get("LEEWAY_FAULT"):
    sys.meta_path.insert(0, Fault(os.environ["LEEWAY_FAULT"]))
