#!/usr/bin/env bash
# What can be known of 64-bit ARM on another processor: builds with a cross compiler and runs the op cases under qemu.
#   scripts/arm-check.sh [op folder ...]      all folders take about 6 minutes
# On Debian: dpkg --add-architecture arm64 && apt-get update &&
#   apt-get install g++-aarch64-linux-gnu qemu-user libdnnl2:arm64 libdnnl-dev
set -euo pipefail
cd "$(dirname "$0")/.."
out=$PWD/out/arm
library=${PF_DNNL_LIBRARY:-/usr/lib/aarch64-linux-gnu/libdnnl.so.2}
modules=$PWD/node_modules
for tool in aarch64-linux-gnu-g++ qemu-aarch64 cmake; do
  command -v "$tool" >/dev/null || { echo "$tool is missing" >&2; exit 1; }
done

cmake -S . -B "$out/tree" --log-level=WARNING -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DPF_DNNL_INCLUDE="${PF_DNNL_INCLUDE:-/usr/include}" \
  -DPF_DNNL_LIBRARY="$library" -DPF_TESTS=ON -DPF_OUT="$out/lib" \
  -DNODE_API_HEADERS="$modules/node-api-headers/include" -DNODE_ADDON_API="$modules/node-addon-api"
cmake --build "$out/tree" -j "$(nproc)"

failed=0
for folder in "${@:-}"; do
  qemu-aarch64 "$out/tree/pf_op_test" --level cpu_neon --filter "$folder" || failed=1
done
exit $failed
