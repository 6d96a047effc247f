#!/usr/bin/env bash
# All that needs a GPU, most worth first, within nine minutes; results go to $OUT (default bench/results).
# Needs torch with CUDA, nvcc, transformers and the packages of pyproject.toml; nothing is downloaded.
set -uo pipefail
cd "$(dirname "$0")/.."
export OUT="${OUT:-bench/results}"
mkdir -p "$OUT"
failed=0
step() { # name, seconds, command: its output goes to a log, its failure is remembered
  local name=$1 limit=$2
  shift 2
  echo "== $name"
  timeout "$limit" "$@" >"$OUT/gpu-$name.log" 2>&1 || { echo "$name failed:"; tail -n 20 "$OUT/gpu-$name.log"; failed=1; }
}
driver=$(mktemp -d)/driver
bash tests/driver/cuda.sh "$driver" >"$OUT/gpu-driver-build.log" 2>&1 &
python setup.py --quiet build_ext --inplace || exit 1
wait
step tests 130 python -m pytest -q -m gpu
step driver 30 "$driver"
step token-loss 60 python bench/token_loss.py --device cuda
step linear-loss 60 python bench/linear_loss.py --device cuda
for tool in memcheck racecheck initcheck synccheck; do
  step "$tool" 30 compute-sanitizer --tool "$tool" --error-exitcode 1 "$driver"
done
step weights 40 python bench/weights.py --device cuda
step flatten 30 python bench/flatten.py --device cuda
step packing 20 python bench/packing.py --device cuda
step gae 15 python bench/gae.py --device cuda
step loop 90 python engine/launch.py configs/tiny.toml --run.directory="$OUT/tiny-cuda" --checkpoint.export=false
step loop-ipc 45 python engine/launch.py configs/tiny.toml --weights.route=cuda_ipc --run.steps=5 \
  --evaluation.before_after=false --run.directory="$OUT/tiny-ipc" --checkpoint.export=false
cp "$OUT/tiny-cuda/summary.json" "$OUT/tiny-cuda.json" 2>/dev/null
tar -C "$OUT" -czf "$OUT/gpu-logs.tar.gz" --remove-files $(cd "$OUT" && ls -d gpu-*.log tiny-cuda tiny-ipc 2>/dev/null)
tar -C "$OUT" -czf "$OUT/gpu-results.tar.gz" $(cd "$OUT" && ls ./*-cuda.json 2>/dev/null)
exit $failed
