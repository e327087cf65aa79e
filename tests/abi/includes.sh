#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# includes.sh SOURCE_DIR: who may include whose headers. "tqkv" is the public header, everyone's.
set -eu
cd "$1"
status=0

# check DIRECTORY ALLOWED...: quoted includes and <tqkv/...> of DIRECTORY name their own directory's files (no slash)
# or begin with one of ALLOWED.
check() {
  directory=$1
  shift
  test -d "$directory" || return 0
  allowed=$(echo "tqkv $*" | tr ' ' '|')
  bad=$(grep -rnE '^[[:space:]]*#[[:space:]]*include[[:space:]]*("|<tqkv/)' "$directory" \
    --include='*.c' --include='*.h' --include='*.cpp' --include='*.hpp' --include='*.inl' --include='*.cu' --include='*.cuh' |
    grep -vE "include[[:space:]]*(\"[^/\"]+\"|[\"<]($allowed)/[^.])" || true)
  test -z "$bad" && return 0
  printf '%s may include only its own files and: tqkv %s\n%s\n' "$directory" "$*" "$bad" >&2
  status=1
}

check src/runtime runtime
check src/codec codec runtime kernels
check src/cache cache codec runtime kernels
check src/attention attention cache codec runtime kernels
check kernels kernels codec
check src/metrics metrics
check src/plan plan metrics codec runtime
check src/api api attention cache codec plan runtime
check src/cli cli metrics
check bench bench cli  # reads the same files
check tests/abi
check tests/emulation abi codec emulation kernels
check tests/consume
check bindings

# The C header stands on the two headers that C99 has everywhere, the C++ one on the standard library and the C header.
test "$(grep -h '#include' include/tqkv/tqkv.h | tr '\n' ' ')" = '#include <stddef.h> #include <stdint.h> ' || {
  echo 'include/tqkv/tqkv.h may include only <stddef.h> and <stdint.h>' >&2
  status=1
}
if grep -n '#include' include/tqkv/tqkv.hpp | grep -vE '<(tqkv/tqkv\.h|[a-z_]+)>$' >&2; then
  echo 'include/tqkv/tqkv.hpp may include only the standard library and <tqkv/tqkv.h>' >&2
  status=1
fi
exit $status
