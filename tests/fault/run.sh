#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Malformed files through the real command: each is refused with exit status 1 and one sentence on stderr that names
# the file and what was wrong; nothing crashes. Usage: run.sh PATH_OF_TQKV
set -u
tqkv=$1
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
cases=0
failures=0

# le64 N: 8 little-endian bytes
le64() {
  n=$1
  i=0
  while [ $i -lt 8 ]; do
    # shellcheck disable=SC2059
    printf "\\$(printf %03o $((n & 255)))"
    n=$((n >> 8))
    i=$((i + 1))
  done
}

# file NAME HEADER [DATA_BYTES]: a safetensors file whose data are zeros
file() {
  { le64 ${#2}; printf %s "$2"; head -c "${3:-0}" /dev/zero; } >"$dir/$1"
}

fail() {
  failures=$((failures + 1))
  printf 'FAILED: %s\n' "$1" >&2
  sed 's/^/  stderr: /' "$dir/stderr" >&2
}

# refused STATUS NAME WORDS COMMAND...: stderr is one line that has the name and the words
refused() {
  status=$1 name=$2 words=$3
  shift 3
  cases=$((cases + 1))
  "$tqkv" "$@" >"$dir/stdout" 2>"$dir/stderr"
  rc=$?
  if [ $rc -ne "$status" ]; then fail "$name: exit status $rc, not $status: tqkv $*"; return; fi
  if ! grep -qF -- "$name" "$dir/stderr"; then fail "stderr does not name $name: tqkv $*"; return; fi
  if ! grep -qF -- "$words" "$dir/stderr"; then fail "stderr does not say '$words': tqkv $*"; return; fi
  if [ "$status" -eq 1 ] && [ "$(wc -l <"$dir/stderr")" -ne 1 ]; then fail "not one line: tqkv $*"; return; fi
  if grep -q '[[:cntrl:]]' "$dir/stderr"; then fail "control bytes in the message: tqkv $*"; fi
}

# bad NAME WORDS HEADER [DATA_BYTES]: eval refuses the file; demo reads with the same eyes
bad() {
  file "$1" "$3" "${4:-0}"
  refused 1 "$1" "$2" eval "$dir/$1"
}

tensor() { # tensor NAME DTYPE SHAPE BEGIN END
  printf '"%s":{"dtype":"%s","shape":%s,"data_offsets":[%s,%s]}' "$1" "$2" "$3" "$4" "$5"
}

# --- the file as a whole
refused 1 missing.safetensors 'No such file' eval "$dir/missing.safetensors"
refused 1 "$dir" 'not a regular file' eval "$dir"
: >"$dir/empty"
refused 1 empty 'too short' eval "$dir/empty"
printf 'abcde' >"$dir/short"
refused 1 short 'too short' eval "$dir/short"
{ le64 100; printf '{}'; } >"$dir/truncated_header"
refused 1 truncated_header 'given as 100 bytes, but the file has 10' eval "$dir/truncated_header"
{ printf '\377\377\377\377\377\377\377\377'; printf '{}'; } >"$dir/hostile_header_size"
refused 1 hostile_header_size '18446744073709551615' eval "$dir/hostile_header_size"
{ le64 9223372036854775800; printf '{}'; } >"$dir/hostile_header_size2"
refused 1 hostile_header_size2 '9223372036854775800' eval "$dir/hostile_header_size2"
le64 40000000 >"$dir/large_header"
dd if=/dev/null of="$dir/large_header" bs=1 seek=50000000 2>/dev/null
refused 1 large_header 'at most 16777216' eval "$dir/large_header"
refused 1 large_header 'at most 16777216' demo --data "$dir/large_header"

# --- the header as JSON
bad json_truncated 'not valid JSON at byte' '{"a.k":{"dtype":"F32"'
bad json_garbage 'not valid JSON at byte' 'hello, world'
bad json_trailing 'not valid JSON at byte' '{} {}'
bad json_empty 'not valid JSON' ''
bad json_array 'not a JSON object' '[]'
bad json_number 'not a JSON object' '3'
bad json_utf8 'not valid JSON' "$(printf '{"\377":1}')"
bad json_deep "tensor 'a': field 'shape' holds an array" '{"a":{"shape":[[[[[[[[[[[['
bad no_tensors 'no tensor is named <prefix>.k' '{}'

# --- fields of a tensor
bad tensor_number "tensor 'a.k' is a number" '{"a.k":7}'
bad tensor_array "tensor 'a.k' is an array" '{"a.k":[]}'
bad tensor_null "tensor 'a.k' is null" '{"a.k":null}'
bad dtype_missing "tensor 'a.k': field 'dtype' is missing" '{"a.k":{"shape":[1],"data_offsets":[0,4]}}' 4
bad shape_missing "tensor 'a.k': field 'shape' is missing" '{"a.k":{"dtype":"F32","data_offsets":[0,4]}}' 4
bad offsets_missing "tensor 'a.k': field 'data_offsets' is missing" '{"a.k":{"dtype":"F32","shape":[1]}}' 4
bad dtype_number "field 'dtype' is a number" '{"a.k":{"dtype":1,"shape":[1],"data_offsets":[0,4]}}' 4
bad dtype_array "field 'dtype' is an array" '{"a.k":{"dtype":[],"shape":[1],"data_offsets":[0,4]}}' 4
bad dtype_unknown "field 'dtype' is 'F31'" "{$(tensor a.k F31 '[1]' 0 4)}" 4
bad dtype_empty "field 'dtype' is ''" "{$(tensor a.k '' '[1]' 0 4)}" 4
bad field_unknown "field 'colour' is not known" '{"a.k":{"colour":1}}'
bad field_twice "field 'dtype' is given twice" '{"a.k":{"dtype":"F32","dtype":"F16"}}'
bad tensor_twice "tensor 'a.k' is given twice" "{$(tensor a.k F32 '[1]' 0 4),$(tensor a.k F32 '[1]' 4 8)}" 8
bad shape_string "field 'shape' is a string" '{"a.k":{"dtype":"F32","shape":"1","data_offsets":[0,4]}}' 4
bad shape_object "field 'shape' is an object" '{"a.k":{"dtype":"F32","shape":{},"data_offsets":[0,4]}}' 4
bad shape_text "field 'shape' holds a string" "{$(tensor a.k F32 '["1"]' 0 4)}" 4
bad shape_negative "field 'shape' holds a negative number" "{$(tensor a.k F32 '[-1]' 0 4)}" 4
bad shape_float "field 'shape' holds a number that is no 64-bit integer" "{$(tensor a.k F32 '[1.5]' 0 4)}" 4
bad shape_over64 "field 'shape' holds a number that is no 64-bit" "{$(tensor a.k F32 '[18446744073709551616]' 0 4)}" 4
bad shape_overflow "field 'shape' has a product" "{$(tensor a.k F32 '[4294967296,4294967296]' 0 4)}" 4
bad shape_overflow2 "field 'shape' has a product" "{$(tensor a.k F32 '[18446744073709551615]' 0 4)}" 4
bad shape_wraps "field 'shape' has a product" "{$(tensor a.k F32 '[4611686018427387905]' 0 4)}" 4
bad shape_rank "field 'shape' has too many entries" \
  "{$(tensor a.k F32 '[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]' 0 4)}" 4
bad offsets_one "field 'data_offsets' must have 2" '{"a.k":{"dtype":"F32","shape":[1],"data_offsets":[0]}}' 4
bad offsets_three "field 'data_offsets' has too many" '{"a.k":{"dtype":"F32","shape":[1],"data_offsets":[0,4,8]}}' 8
bad offsets_reversed "field 'data_offsets' ends before it begins" "{$(tensor a.k F32 '[1]' 4 0)}" 4
bad offsets_past_end "field 'data_offsets' ends at byte 4 of the data, but the file holds 3" \
  "{$(tensor a.k F32 '[1]' 0 4)}" 3
bad offsets_hostile "field 'data_offsets' ends at byte 18446744073709551615" \
  "{$(tensor a.k F32 '[1]' 18446744073709551611 18446744073709551615)}" 4
bad offsets_size "field 'data_offsets' spans 8 bytes, but dtype and shape take 4" "{$(tensor a.k F32 '[1]' 0 8)}" 8
bad overlap "tensor 'b': field 'data_offsets' overlaps" "{$(tensor a F32 '[2]' 0 8),$(tensor b F32 '[2]' 4 12)}" 12
bad hole "tensor 'b': field 'data_offsets' leaves a hole" "{$(tensor a F32 '[1]' 0 4),$(tensor b F32 '[1]' 8 12)}" 12
bad trailing_bytes 'the last 5 bytes belong to no tensor' "{$(tensor a F32 '[1]' 0 4)}" 9
bad metadata_number "__metadata__: field 'x' is a number, not a string" '{"__metadata__":{"x":1}}'
bad metadata_nested "__metadata__: field 'x' is an object" '{"__metadata__":{"x":{}}}'
bad metadata_array '__metadata__ is an array' '{"__metadata__":[]}'
bad escape_in_name '\x1b[31mred' '{"\u001b[31mred":1}'

# --- tensors that are no cache
pair() { # pair K_DTYPE K_SHAPE K_BYTES V_DTYPE V_SHAPE V_BYTES
  printf '{%s,%s}' "$(tensor a.k "$1" "$2" 0 "$3")" "$(tensor a.v "$4" "$5" "$3" $(($3 + $6)))"
}
bad no_values "no tensor 'a.v'" "{$(tensor a.k F32 '[1]' 0 4)}" 4
bad k_is_f64 "tensor 'a.k': field 'dtype' is F64" "$(pair F64 '[1,1,16]' 128 F32 '[1,1,16]' 64)" 192
bad k_rank "tensor 'a.k': field 'shape' has 2 dimensions" "$(pair F32 '[1,16]' 64 F32 '[1,1,16]' 64)" 128
bad k_empty "tensor 'a.k': field 'shape' holds nothing" "$(pair F32 '[0,1,16]' 0 F32 '[1,1,16]' 64)" 64
bad v_dtype "tensor 'a.v': field 'dtype' is F16, but the keys are F32" "$(pair F32 '[1,1,16]' 64 F16 '[1,1,16]' 32)" 96
bad v_tokens "tensor 'a.v': field 'shape' has 2 tokens" "$(pair F32 '[1,1,16]' 64 F32 '[2,1,16]' 128)" 192
bad v_heads "tensor 'a.v': field 'shape' has 2 heads" "$(pair F32 '[1,1,16]' 64 F32 '[1,2,16]' 128)" 192
bad head_dim 'head_dim' "$(pair F32 '[1,1,17]' 68 F32 '[1,1,17]' 68)" 136
bad heads "field 'shape' has more than 1024 heads" "$(pair F16 '[1,1025,16]' 32800 F16 '[1,1025,16]' 32800)" 65600
triple() { # triple Q_DTYPE Q_SHAPE Q_BYTES
  printf '{%s,%s,%s}' "$(tensor a.k F32 '[2,2,16]' 0 256)" "$(tensor a.v F32 '[2,2,16]' 256 512)" \
    "$(tensor a.q "$1" "$2" 512 $((512 + $3)))"
}
bad q_positions "tensor 'a.q': field 'shape' has 3 positions" "$(triple F32 '[3,2,16]' 384)" 896
bad q_heads "tensor 'a.q': field 'shape' has 3 heads" "$(triple F32 '[1,3,16]' 192)" 704
bad q_head_dim "tensor 'a.q': field 'shape' has head_dim 32" "$(triple F32 '[1,2,32]' 256)" 768
bad q_dtype "tensor 'a.q': field 'dtype' is I32" "$(triple I32 '[1,2,16]' 128)" 640

{
  header=$(pair F32 '[1,1,16]' 64 F32 '[1,1,16]' 64)
  le64 ${#header}; printf %s "$header"; head -c 64 /dev/zero; printf '\000\000\300\177'; head -c 60 /dev/zero
} >"$dir/nan"
refused 1 nan "tensor 'a.v': holds a NaN or an infinity at token 0, head 0" eval "$dir/nan"

file good "$(pair F32 '[1,1,16]' 64 F32 '[1,1,16]' 64)" 128
refused 1 good "no tensor 'x' (--k)" eval "$dir/good" --k x --v a.v
refused 1 --k 'needed together' eval "$dir/good" --k a.k
refused 1 --preset "no preset 'k9v9'" eval "$dir/good" --preset k9v9
refused 2 --bits '5' validate --bits 5
refused 1 --head-dim 'head_dim' validate --head-dim 17 --vectors 1
refused 2 --rotation 'spin' validate --rotation spin
refused 2 --memory 'not recognized' plan "$dir/good" --memory 80XB
refused 2 subcommand 'required'

# --- a model's config
config() { printf %s "$2" >"$dir/$1"; }
refused 1 missing.json 'No such file' plan "$dir/missing.json"
refused 1 "$dir" 'directory' plan "$dir"
config config_empty ''
refused 1 config_empty 'JSON' plan "$dir/config_empty"
config config_truncated '{"num_hidden_layers": 2'
refused 1 config_truncated 'JSON' plan "$dir/config_truncated"
config config_array '[]'
refused 1 config_array 'object' plan "$dir/config_array"
config config_missing '{"num_hidden_layers": 2}'
refused 1 config_missing 'num_' plan "$dir/config_missing"
config config_type '{"num_hidden_layers": "two", "num_attention_heads": 8, "head_dim": 128}'
refused 1 config_type 'num_hidden_layers' plan "$dir/config_type" --context 1024
config config_negative '{"num_hidden_layers": -2, "num_attention_heads": 8, "head_dim": 128}'
refused 1 config_negative 'num_hidden_layers' plan "$dir/config_negative" --context 1024
config config_float '{"num_hidden_layers": 2.5, "num_attention_heads": 8, "head_dim": 128}'
refused 1 config_float 'num_hidden_layers' plan "$dir/config_float" --context 1024
config config_huge '{"num_hidden_layers": 1e300, "num_attention_heads": 8, "head_dim": 128}'
refused 1 config_huge 'num_hidden_layers' plan "$dir/config_huge" --context 1024
dd if=/dev/null of="$dir/config_large" bs=1 seek=20000000 2>/dev/null
refused 1 config_large 'too large' plan "$dir/config_large"

# --- a full disk is not success
if [ -w /dev/full ]; then
  cases=$((cases + 1))
  if "$tqkv" info >/dev/full 2>"$dir/stderr"; then fail 'info >/dev/full succeeded'; fi
fi

# --- what is well-formed is read, so that the refusals above are about what they name
cases=$((cases + 1))
if ! "$tqkv" eval "$dir/good" --json >"$dir/stdout" 2>"$dir/stderr"; then fail 'a good file was refused'; fi

# --- a file larger than the memory it may take: 1.2 GB of zeros in a sparse file, in under 512 MB
tokens=300000
side=$((tokens * 8 * 128 * 2))
header=$(pair BF16 "[$tokens,8,128]" $side BF16 "[$tokens,8,128]" $side)
{ le64 ${#header}; printf %s "$header"; } >"$dir/sparse"
dd if=/dev/null of="$dir/sparse" bs=1 seek=$((8 + ${#header} + 2 * side)) 2>/dev/null
cases=$((cases + 1))
if "$tqkv" eval "$dir/sparse" --preset raw --json >"$dir/stdout" 2>"$dir/stderr"; then
  peak=$(sed -n 's/.*"peak_memory_bytes": \([0-9]*\).*/\1/p' "$dir/stdout")
  if [ -z "$peak" ] || [ "$peak" -ge 512000000 ]; then fail "eval of 1.2 GB took ${peak:-an unknown number of} bytes"; fi
else
  fail 'the sparse file was refused'
fi

printf '%s cases, %s failures\n' "$cases" "$failures"
[ "$failures" -eq 0 ]
