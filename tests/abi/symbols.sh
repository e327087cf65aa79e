#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# symbols.sh LIBRARY HEADER LIST: the library exports exactly LIST, LIST is exactly what the header declares, and the
# library needs nothing but libc and libstdc++ at run time.
set -eu
library=$1 header=$2 list=$3
temp=$(mktemp -d)
trap 'rm -rf "$temp"' EXIT

nm -D --defined-only "$library" | awk '$2 != "A" { print $3 }' | LC_ALL=C sort >"$temp/exported"
diff -u "$list" "$temp/exported" || { echo "exported symbols differ from $list" >&2; exit 1; }

grep '^TQKV_API' "$header" | grep -o 'tq_[a-z_]*(' | tr -d '(' | sed 's/$/@@TQKV_1/' | LC_ALL=C sort >"$temp/declared"
diff -u "$list" "$temp/declared" || { echo "declared functions differ from $list" >&2; exit 1; }

needed=$(readelf -d "$library" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p' |
  grep -vE '^(libc|libm|libgcc_s|libstdc\+\+|ld-linux[-a-z0-9_]*)\.so\.[0-9]+$' || true)
test -z "$needed" || { echo "unexpected run-time dependencies: $needed" >&2; exit 1; }
