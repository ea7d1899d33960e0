#!/usr/bin/env bash
# Everything that only a GPU can show, in one go: builds the CUDA backend for the card at hand, runs the op cases on
# it, and, where Node and the built package are there, the recorded cases and the benches. Needs
# nvcc and g++; neither cmake nor oneDNN. Results: bench/results/<card>.json, and out/gpu/ for the rest.
#   scripts/gpu-check.sh [--sanitize]      --sanitize: also compute-sanitizer on the op cases (slow)
set -uo pipefail
cd "$(dirname "$0")/.."
node=${NODE:-node}
out=out/gpu
mkdir -p "$out/objects" build/Release
failed=0
# Where the toolkit lies when nobody put it into the path; and one order of cards for nvidia-smi and CUDA.
command -v nvcc >/dev/null || PATH=/usr/local/cuda/bin:$PATH
export CUDA_DEVICE_ORDER=PCI_BUS_ID
step() { printf '\n== %s\n' "$*" >&2; }
must() { "$@" || { echo "FAILED: $*" >&2; failed=1; }; }

step 'card'
nvidia-smi --query-gpu=name,compute_cap,driver_version,memory.total --format=csv,noheader || exit 1
card=$(nvidia-smi --query-gpu=name --format=csv,noheader -i 0 | tr 'A-Z ' 'a-z-' | tr -cd 'a-z0-9-')
arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader -i 0 | tr -d .)
[ "$arch" = 90 ] && arch=90a

step "build for sm_$arch"
folders=$(sed -n 's/^PF_OP(\([a-z0-9_]*\),.*/\1/p' native/ops.def | uniq)
cuda="native/backends/cuda/table.cc native/backends/cuda/memory_cuda.cc native/backends/cuda/cublaslt.cc $(echo native/backends/cuda/*.cu)"
ref="native/backends/ref/table.cc" tests="native/core/op_test_main.cc native/core/backend.cc"
for folder in $folders; do
  cuda+=" native/ops/$folder/${folder}_cuda.cu"
  ref+=" native/ops/$folder/${folder}_ref.cc"
  tests+=" native/ops/$folder/${folder}_test.cc"
done
gxx="g++ -std=gnu++20 -O2 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -Inative"
compile() {
  local object="$out/objects/$(basename "$1").o"
  case $1 in
    *backends/cuda* | *_cuda.cu) set -- nvcc -std=c++20 -O3 -arch=sm_$arch -Inative -Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off \
      -Xptxas=-v -MD -MF "$object.d" -c "$1" -o "$object" ;;
    *) set -- $gxx "-DPF_OUT_DIR=\"build/Release\"" -c "$1" -o "$object" ;;
  esac
  "$@" >"$object.txt" 2>&1 || { cat "$object.txt" >&2; return 1; }
}
export -f compile
export out arch gxx
printf '%s\n' $cuda $tests | xargs -P "$(nproc)" -I{} bash -c 'compile {}' || exit 1
objects() { for source in "$@"; do printf '%s ' "$out/objects/$(basename "$source").o"; done; }
# The linker replaces a library that may be in use by writing a new file.
rm -f build/Release/libpyraflow_cuda.so
nvcc -shared -cudart static -o build/Release/libpyraflow_cuda.so $(objects $cuda) -ldl || exit 1
$gxx -shared -o build/Release/libpyraflow_ref.so $ref || exit 1
$gxx -o "$out/pf_op_test" $(objects $tests) -ldl || exit 1

if grep -hE "wgmma.mma_async instructions are serialized|'setmaxnreg' ignored" "$out"/objects/*.txt; then
  echo 'FAILED: ptxas slows the kernels for compute capability 9.0 down' >&2
  failed=1
fi

# cases SECONDS HOPPER FOLDER [wrapper]: a process for each op folder, since a kernel that breaks takes the device's context
# with it, and a wait that never ends is a failure, too.
cases() { timeout "$1" env "PYRAFLOW_HOPPER=$2" "${@:4}" "$out/pf_op_test" --level cuda --filter "$3"; }
step 'op cases'
for folder in $folders; do must cases 240 off "$folder"; done
if [ "$arch" = 90a ]; then
  step 'attention by the kernels for 9.0'
  must cases 240 require attention
fi
if [ "${1:-}" = --sanitize ]; then
  # Without WGMMA, too: the tools are known to report TMA and WGMMA kernels that have no race.
  for hopper in off on; do
    only=$folders
    if [ "$hopper" = on ]; then
      [ "$arch" = 90a ] || continue
      only=attention
    fi
    for tool in memcheck racecheck synccheck; do
      step "compute-sanitizer $tool, kernels for 9.0 $hopper"
      for folder in $only; do
        report="$out/$tool-$hopper-$folder.txt"
        must cases 1800 "$hopper" "$folder" PF_REPEATS=0 compute-sanitizer --tool "$tool" --error-exitcode 1 >"$report" 2>&1
        tail -1 "$report"
      done
    done
  done
fi

if ! command -v "$node" >/dev/null || [ ! -f dist/lib/cli/main.js ]; then
  echo 'no Node or no built package here: recorded cases and benches are left out' >&2
  exit $failed
fi
step 'recorded cases'
cli="dist/lib/cli/main.js"
"$node" $cli info
must "$node" $cli verify test/golden --device cuda --json "$out/verify-f32.json"
must "$node" $cli verify test/golden --device cuda --dtype bf16 --json "$out/verify-bf16.json"

step 'benches'
must "$node" dist/bench/main.js --device cuda --json "bench/results/$card.json"
exit $failed
