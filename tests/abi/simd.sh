#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# simd.sh OBJECTS...: objects compiled for more than the baseline processor. Of an inline function that several objects
# hold the linker keeps one copy, for every caller; static initialisers run on every processor. So neither may be here.
set -eu
status=0
for object; do
  if nm -C --defined-only "$object" | grep -E '^[0-9a-f]+ [WVu] '; then
    echo "$object defines functions that other objects may be given" >&2
    status=1
  fi
  if readelf -SW "$object" | grep -F .init_array; then
    echo "$object has a static initialiser" >&2
    status=1
  fi
done
exit $status
