#!/usr/bin/env bash
# Every check that needs a GPU, in 8 minutes: builds the package in place and its CUDA kernels, runs
# the GPU tests, compute-sanitizer on small shapes, and the benchmark, whose results go to
# benchmarks/results/<gpu>/. Nothing is downloaded: the Python that is there needs torch, triton,
# setuptools, pybind11, pytest and matplotlib, and for CUDA C++ cuda-core. Logs: build/gpu-check/.
# Each step has a time limit, none hides a later one; the exit status is 1 if any failed.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
logs=build/gpu-check
mkdir -p "$logs"
deadline=480 # seconds since the start
failed=()

# step NAME LIMIT COMMAND...: the command with a time limit in seconds, its output kept.
step() {
  local name=$1 limit=$2 left=$((deadline - SECONDS)) begin=$SECONDS status
  shift 2
  ((limit > left)) && limit=$left
  echo "== $name (at most $limit s)"
  if ((limit < 1)); then
    echo "no time left" | tee "$logs/$name.log"
    status=124
  else
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$logs/$name.log"
    status=${PIPESTATUS[0]}
  fi
  echo "== $name: $([ "$status" = 0 ] && echo good || echo "FAILED, status $status"), $((SECONDS - begin)) s"
  [ "$status" = 0 ] || failed+=("$name")
}

run_tests() {
  # Most of the time goes into Triton's compiler: several processes where pytest-xdist is there, and
  # beside them those kernels that only the sanitizer runs.
  local workers=() status
  "$python" -c 'import xdist' 2> /dev/null && workers=(-n 8)
  "$python" tools/small_shapes.py > "$logs/small-shapes.log" 2>&1 &
  "$python" -m pytest tests/test_gpu.py -q -p no:cacheprovider "${workers[@]}"
  status=$?
  wait $! || { status=1; cat "$logs/small-shapes.log"; }
  return $status
}

sanitize() {
  # Without torch's cache each tensor is an allocation of its own: a write past its end is seen.
  # Kernels are compiled before, so the tools see launches only. They run side by side.
  local tool part log status=0 jobs=()
  for tool in memcheck racecheck synccheck initcheck; do
    for part in PhaseSpace power_iteration "kick_ drift_ kick_drift_ kinetic_energy two_form gram"; do
      log=$tool-${part%% *}
      # shellcheck disable=SC2086
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
        "$python" tools/small_shapes.py $part > "$logs/$log.log" 2>&1 &
      jobs+=("$!:$log")
    done
  done
  for log in "${jobs[@]}"; do
    wait "${log%%:*}" || { status=1; echo "${log##*:} FAILED"; }
    echo "${log##*:}: $(tail -n 1 "$logs/${log##*:}.log")"
  done
  return $status
}
export -f run_tests sanitize
export python logs

if ! gpu=$("$python" -c '
import re, torch
name = torch.cuda.get_device_name().lower().removeprefix("nvidia ")
print(re.sub(r"[^a-z0-9]+", "-", name).strip("-"))' 2> "$logs/gpu.log"); then
  tail -n 1 "$logs/gpu.log"
  echo "no GPU that torch can use: nothing was checked"
  exit 1
fi
results=benchmarks/results/$gpu
mkdir -p "$results"

step build 80 "$python" setup.py -q build_ext --inplace
arch=$("$python" -c '
import torch
from gti_kernels.cuda_kernels.compiler import architecture
print(architecture(torch.cuda.get_device_capability()))')
step precompile 70 "$python" -m gti_kernels.cuda_kernels precompile --arch "$arch"
step doctor 30 "$python" -m gti_kernels.cli doctor
step tests 140 bash -c run_tests
step sanitizer 100 bash -c sanitize
step bench 170 "$python" -m gti_kernels.cli bench --device cuda --suite full --rounds 9 \
  --json "$results/bench.json" --plot "$results/bench.png"
cp "$logs/bench.log" "$results/bench.txt"

echo
if ((${#failed[@]})); then
  echo "FAILED: ${failed[*]} ($SECONDS s)"
  exit 1
fi
echo "all good ($SECONDS s); results in $results"
