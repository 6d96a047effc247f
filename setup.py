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
ARCHITECTURES = ["80", "90a"]  # A100; H100 and H200

NVCC_FLAGS = ["-std=c++20", "-O3", "-lineinfo", "-Xcompiler", "-fPIC"]
NVCC_FLAGS += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}" for architecture in ARCHITECTURES]
NVCC_RULES = f"""
rule compile
  command = $nvcc {" ".join(NVCC_FLAGS)} -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $nvcc -shared -cudart static $in -o $out
"""


def sources(*patterns: str) -> list[str]:
    return sorted(str(path) for pattern in patterns for path in Path("csrc").glob(pattern))


HOST = Extension(
    "engine.ops._host",
    sources("bind/host.cpp", "pack/planner.cpp", "pack/cpu_pack.cpp"),
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
        if nvcc is not None:
            self._compile_cuda(nvcc)

    def _compile_cuda(self, nvcc: str) -> None:
        package = Path("engine/ops") if self.inplace else Path(self.build_lib, "engine/ops")
        objects = {source: Path(self.build_temp, source).with_suffix(".o") for source in sources("*/cuda/*.cu")}
        rules = [f"builddir = {self.build_temp}", f"nvcc = {nvcc}", NVCC_RULES]
        rules += [f"build {made}: compile {source}" for source, made in objects.items()]
        rules += [f"build {package / '_cuda.so'}: link {' '.join(map(str, objects.values()))}", ""]
        script = Path(self.build_temp, "cuda.ninja")
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text("\n".join(rules))
        subprocess.run(["ninja", "--quiet", "-f", script], check=True)


setup(ext_modules=[HOST, OPS], cmdclass={"build_ext": Build.with_options(use_ninja=True, no_python_abi_suffix=True)})
