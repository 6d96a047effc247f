#!/usr/bin/env bash
# tests/driver/cuda.sh PROGRAM: the driver with the CUDA kernels for a GPU, to run by itself or under compute-sanitizer.
set -euo pipefail
cd "$(dirname "$0")/../.."
program=$1
objects=$(mktemp -d)
nvcc=(nvcc -std=c++20 -O2 -lineinfo -DLEEWAY_CUDA -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90a,code=sm_90a)
for source in csrc/*/cpu*.cpp csrc/*/cuda/*.cu tests/driver/*.c*; do
  made="$objects/${source//\//-}.o"
  case $source in
    csrc/*.cpp) echo g++ -std=c++20 -O2 -fopenmp-simd -c "$source" -o "$made" ;;
    *.cpp) echo "${nvcc[@]}" -x c++ -c "$source" -o "$made" ;;  # no device code: the host's compiler, with CUDA's headers
    *) echo "${nvcc[@]}" -c "$source" -o "$made" ;;
  esac
done | xargs -P "$(nproc)" -d '\n' -I{} sh -c '{}'
"${nvcc[@]}" "$objects"/*.o -o "$program"
