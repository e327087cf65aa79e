#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# run.sh PREFIX LIBDIR CC WORK_DIR: main.c against the copy installed in PREFIX.
set -eu
prefix=$1 libdir=$2 cc=$3 work=$4
mkdir -p "$work"
export PKG_CONFIG_PATH="$prefix/$libdir/pkgconfig"
requires=$(pkg-config --print-requires --print-requires-private tqkv)
test -z "$requires" || { echo "tqkv.pc must require nothing, not: $requires" >&2; exit 1; }
# shellcheck disable=SC2046
"$cc" -std=c99 -Wall -Werror "$(dirname "$0")/main.c" $(pkg-config --cflags --libs tqkv) \
  -Wl,-rpath,"$(pkg-config --variable=libdir tqkv)" -o "$work/consumer"
"$work/consumer"
