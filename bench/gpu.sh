#!/usr/bin/env bash
# All that needs a GPU, most worth first, within nine minutes; results go to $OUT (default bench/results).
# Needs torch with CUDA, transformers and the packages of pyproject.toml; nothing is downloaded.
set -uo pipefail
cd "$(dirname "$0")/.."
export OUT="${OUT:-bench/results}"
mkdir -p "$OUT"
python setup.py --quiet build_ext --inplace || exit 1
failed=0
step() { # name, seconds, command: its output goes to a log, its failure is remembered
  local name=$1 limit=$2
  shift 2
  echo "== $name"
  timeout "$limit" "$@" >"$OUT/gpu-$name.log" 2>&1 || { echo "$name failed:"; tail -n 20 "$OUT/gpu-$name.log"; failed=1; }
}
step tests 240 python -m pytest -q -m gpu
step loop 240 python engine/launch.py configs/tiny.toml --run.directory="$OUT/tiny-cuda" --checkpoint.export=false
cp "$OUT/tiny-cuda/summary.json" "$OUT/tiny-cuda.json" 2>/dev/null
tar -C "$OUT" -czf "$OUT/gpu-logs.tar.gz" --remove-files $(cd "$OUT" && ls -d gpu-*.log tiny-cuda 2>/dev/null)
exit $failed
