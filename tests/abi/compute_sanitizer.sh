#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# compute_sanitizer.sh TOOL PROGRAM [PROCESSES [TESTS]]: runs tqkv_abi_tests, PROGRAM, on the first GPU under racecheck,
# memcheck or initcheck, a process a test case and PROCESSES (8) of them at a time. TESTS, as Catch2 takes them, are the
# suites of attention, its accuracy, codec, pages, merging and golden records if not given. Fails where something is found,
# and prints what was said.
set -euo pipefail
export TOOL=$1 PROGRAM
PROGRAM=$(realpath "$2")
processes=${3:-8} tests=${4:-[#attention_test],[#attention_accuracy_test]~[slow],[#codec_test],[#pages_test],[#merge_test],[#golden_test]}
cd "$(dirname "$0")"
export TQKV_TEST_DEVICE=cuda
export TQKV_TEST_CONFIGURATIONS=${TQKV_TEST_CONFIGURATIONS:-12}  # fewer repetitions

check() {
  local begin=$SECONDS said
  if said=$(compute-sanitizer --tool "$TOOL" --require-cuda-init no --error-exitcode 99 "$PROGRAM" "${1//,/\\,}" 2>&1) &&
    [[ $said != *'No tests ran'* ]]; then
    echo "clean after $((SECONDS - begin)) s: $1"
  else
    printf '%s\nFAILED under %s: %s\n' "$said" "$TOOL" "$1"
    return 1
  fi
}
export -f check

list=--list-test-names-only  # of Catch2 2, whose exit status is their number
"$PROGRAM" --help | grep -q -e $list || list='--list-tests --verbosity quiet'
# shellcheck disable=SC2086
names=$("$PROGRAM" $list --filenames-as-tags "$tests" | grep -v ^TQKV_TEST_SEED=) || test -n "$names"
# shellcheck disable=SC2016
xargs -d '\n' -n 1 -P "$processes" bash -c 'check "$1"' check <<<"$names"
