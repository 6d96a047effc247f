"""Builds csrc/ into engine/ops/. Everything else about the project is in pyproject.toml.

    _host   pybind11, without torch: for processes that have none
    _ops    the torch operators and their CPU kernels
    _cuda   the CUDA kernels behind plain C: nvcc compiles them whether or not this torch knows CUDA

The kernels for AVX2 and AVX-512 stand in files of their own, which choose their instructions themselves.
"""

import shutil
import subprocess
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

FLAGS = ["-std=c++20", "-O3", "-Wall", "-Wextra", "-fvisibility=hidden"]
NVCC_FLAGS = ["-std=c++20", "-O3", "-lineinfo", "-shared", "-cudart", "static", "-Xcompiler", "-fPIC", "--threads", "0"]
ARCHITECTURES = {"80": "80", "90a": "90a"}  # A100; H100 and H200


def sources(*patterns: str) -> list[str]:
    return sorted(str(path) for pattern in patterns for path in Path("csrc").glob(pattern))


HOST = Extension(
    "engine.ops._host",
    sources("bind/host.cpp", "pack/planner.cpp"),
    include_dirs=[pybind11.get_include()],
    extra_compile_args=FLAGS,
    language="c++",
)
OPS = CppExtension(
    "engine.ops._ops",
    sorted({*sources("bind/*.cpp", "*/cpu*.cpp")} - {"csrc/bind/host.cpp"}),
    # OpenMP's functions are those of the libgomp that torch has loaded: a second one would have threads of its own.
    extra_compile_args=[*FLAGS, "-fopenmp", *(f"-isystem{path}" for path in include_paths())],
    extra_link_args=["-ldl"],
)


class Build(BuildExtension):
    def run(self) -> None:
        super().run()
        nvcc = shutil.which("nvcc")
        if nvcc is not None and sources("*/cuda/*.cu"):
            self._compile_cuda(nvcc)

    def _compile_cuda(self, nvcc: str) -> None:
        package = Path("engine/ops") if self.inplace else Path(self.build_lib, "engine/ops")
        package.mkdir(parents=True, exist_ok=True)
        targets = [f"-gencode=arch=compute_{a},code=sm_{b}" for a, b in ARCHITECTURES.items()]
        kernels = sources("*/cuda/*.cu")
        subprocess.run([nvcc, *NVCC_FLAGS, *targets, *kernels, "-o", str(package / "_cuda.so")], check=True)


setup(ext_modules=[HOST, OPS], cmdclass={"build_ext": Build.with_options(use_ninja=True, no_python_abi_suffix=True)})
