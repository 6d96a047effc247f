"""Stops an SGLang server for ever in the middle of a version: with this directory on its path and LEEWAY_HALF a named
pipe, whatever it loads once there is a file of that name and ".armed" stops after `FEW` tensors, of which a byte
through the pipe tells."""

import os
import signal
import sys
from importlib.machinery import PathFinder

FEW = 5


class Half:
    """The model as `guest.load` sees it."""

    def __init__(self, model):
        self.model = model

    def load_weights(self, weights):
        def few():
            for number, item in enumerate(weights):
                if number == FEW:
                    with open(os.environ["LEEWAY_HALF"], "wb", 0) as pipe:
                        pipe.write(b".")
                    signal.pause()
                yield item

        self.model.load_weights(few())


class Finder:
    def find_spec(self, name, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target) if name == "engine.generators.guest" else None
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_wrap(module):
                run(module)
                wrap(module)

            spec.loader.exec_module = run_and_wrap
        return spec


def wrap(module):
    load, armed = module.load, os.environ["LEEWAY_HALF"] + ".armed"

    def half(model, named_tensors):
        load(Half(model) if os.path.exists(armed) else model, named_tensors)

    module.load = half


if "LEEWAY_HALF" in os.environ:
    sys.meta_path.insert(0, Finder())
