#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# abi.sh check|update BUILD_DIR: compares the ABI of BUILD_DIR's library (built with -g) with the dump checked in here,
# or writes that dump anew. Any difference fails but one: fields appended to a struct that begins with struct_size.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
library=$2/src/libtqkv.so.1

# Types that the public header does not define, such as the inside of tq_codec, are left out.
dump() {
  abidw --headers-dir "$here/../../include/tqkv" --drop-private-types --exported-interfaces-only --no-corpus-path \
    --no-comp-dir-path --no-show-locs --type-id-style hash --out-file "$1" "$library"
}

case $1 in
  update)
    dump "$here/tqkv.abi"
    ;;
  check)
    new=$(mktemp)
    trap 'rm -f "$new"' EXIT
    dump "$new"
    abidiff --leaf-changes-only --suppressions "$here/append.suppr" "$here/tqkv.abi" "$new"
    # abidiff's suppression of appended fields also hides changes to the fields before them.
    if abidiff --leaf-changes-only "$here/tqkv.abi" "$new" | grep -E 'data member (change|deletion)'; then
      abidiff --leaf-changes-only "$here/tqkv.abi" "$new"
      exit 1
    fi
    ;;
  *)
    echo "usage: abi.sh check|update BUILD_DIR" >&2
    exit 2
    ;;
esac
