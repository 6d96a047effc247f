"""Builds csrc/. Everything else about the project is in pyproject.toml."""

from pathlib import Path

import pybind11
import torch
from setuptools import Extension, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CUDAExtension


def sources(*patterns: str) -> list[str]:
    return sorted(str(path) for pattern in patterns for path in Path("csrc").glob(pattern))


def extensions() -> list[Extension]:
    """`_host` is plain pybind11: it does not link torch, so the processes without torch can load it."""
    host = Extension(
        "engine.ops._host",
        sources("bind/host.cpp", "pack/*.cpp"),
        include_dirs=[pybind11.get_include()],
        extra_compile_args=["-std=c++20", "-O3", "-Wall", "-Wextra", "-fvisibility=hidden"],
        language="c++",
    )
    kernels = sources("*/cuda/*.cu")
    if not kernels or torch.version.cuda is None or CUDA_HOME is None:
        return [host]
    return [host, CUDAExtension("engine.ops._cuda", kernels, extra_compile_args={"nvcc": ["-std=c++20", "-O3"]})]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)})
