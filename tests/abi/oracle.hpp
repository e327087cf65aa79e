// SPDX-License-Identifier: Apache-2.0
// An independent reader of everything the library writes, and attention as tqkv.h defines it, in double precision.
// Written from the text of the public header and of the rotation generator alone; slow and obvious on purpose. All
// pointers are host memory.
#pragma once

#include <tqkv/tqkv.h>

#include <cstdint>
#include <functional>
#include <set>
#include <vector>

namespace oracle {

using Vector = std::vector<double>;

double from_f16(uint16_t bits);
double from_bf16(uint16_t bits);
uint16_t to_f16(double value);   // round to nearest even, overflow to infinity
uint16_t to_bf16(double value);  // likewise, for values a float holds exactly
int64_t type_bytes(int32_t type);
double read_element(const void *array, int32_t type, int64_t index);
void write_element(void *array, int32_t type, int64_t index, double value);

struct Matrix {
  int n = 0;
  Vector a;  // row-major
  Matrix() = default;
  explicit Matrix(int size) : n(size), a(size_t(size) * size) {}
  double &operator()(int row, int column) { return a[size_t(row) * n + column]; }
  double operator()(int row, int column) const { return a[size_t(row) * n + column]; }
};
Vector multiply(const Matrix &matrix, const Vector &x);
Vector multiply_transposed(const Matrix &matrix, const Vector &x);
double norm(const Vector &x);
double dot(const Vector &x, const Vector &y);

// The random rotations, from their written specification.
bool hadamard_exists(int head_dim);
Matrix base_hadamard(int order);  // 1, 12, 20, 28, 36: entries +-1
std::vector<int> rotation_signs(int head_dim, int32_t side, int round, uint64_t seed);  // +-1
Matrix hadamard_rotation(int head_dim, int32_t side, int rounds, uint64_t seed);
Matrix dense_rotation(int head_dim, int32_t side, uint64_t seed);

// How one side's vectors are stored.
struct Side {
  int head_dim = 0, bits = 0;
  int32_t scale_type = 0;  // of coded vectors
  int32_t raw_type = 0;    // of raw ones
  double level_unit = 1;
  std::vector<int> grid;  // ascending; empty at 8 bits
  bool rotated = false;
  Matrix rotation;

  bool raw() const { return bits == 16; }
  int64_t code_bytes() const { return int64_t(head_dim) * bits / 8; }
  int64_t scale_bytes() const { return raw() ? 0 : type_bytes(scale_type); }
  // The value in steps of a code from read_codes: grid + 1/2.
  double step(int code) const { return (bits == 8 ? code : grid[size_t(code)]) + 0.5; }
};

struct Codec {
  Side k, v, exact_k, exact_v;
  int kv_heads = 1, block_size = 16, exact_block_size = 16;

  // The configuration gives what the caller chose, the info what the defaults resolved to and the fitted levels.
  Codec(const tq_config &config, const tq_codec_info &info);
  const Side &side(bool exact, int32_t which) const {
    return which == TQ_SIDE_K ? (exact ? exact_k : k) : (exact ? exact_v : v);
  }
  int block(bool exact) const { return exact ? exact_block_size : block_size; }
  int64_t tile_bytes(bool exact) const;
};

// Codes of a token record in channel order: the ascending level index, at 8 bits the int8 grid value.
std::vector<int> read_codes(const uint8_t *record, int head_dim, int bits);
// Rotated domain, then the original one.
Vector decode_rotated(const Side &side, const uint8_t *record, double scale);
Vector decode(const Side &side, const uint8_t *record, double scale);

// A pool's geometry with its defaults filled in.
struct Pool {
  const uint8_t *base = nullptr;
  int64_t num_blocks = 0, block_stride = 0, tile_stride = 0, head_stride = 0;
  Pool() = default;
  Pool(const Codec &codec, bool exact, const tq_pages &pages);
  int64_t num_slots(const Codec &codec, bool exact) const { return num_blocks * codec.block(exact); }
  int64_t bytes(const Codec &codec, bool exact) const;  // from base to the end of the last tile
};

// Calls visit(offset from base) for each byte of a token's codes in record order, then for each byte of its scale.
void for_each_byte(const Codec &codec, bool exact, const Pool &pool, int32_t side, int64_t slot, int head,
                   const std::function<void(int64_t)> &visit);
// The token's record as tq_encode writes it, and its scale.
std::vector<uint8_t> read_record(const Codec &codec, bool exact, const Pool &pool, int32_t side, int64_t slot, int head,
                                 double *scale);
Vector load(const Codec &codec, bool exact, const Pool &pool, int32_t side, int64_t slot, int head);

struct Attention {
  int64_t num_tokens = 0;
  int q_heads = 0, head_dim_v = 0;
  std::vector<char> written;  // [num_tokens]: rows that belong to a sequence
  Vector out;                 // [num_tokens, q_heads, head_dim_v]
  Vector lse;                 // [num_tokens, q_heads]
  Vector magnitude;           // [num_tokens, q_heads]: norm of sum p_j |v_j|, what rounding errors are relative to
  Vector logit;               // [num_tokens, q_heads]: largest sum of a logit's terms' magnitudes, of keys that matter
  Vector query_rounding;      // [num_tokens, q_heads]: see below
  std::set<int64_t> coded_slots, exact_slots, new_rows;   // read by some query
  std::vector<int32_t> fault;                             // [num_seqs]: -1 or the TQ_FAULT kind
  std::vector<std::set<int64_t>> entries, exact_entries;  // [num_seqs]: columns of the tables that are needed
};
// `args` with host pointers. Pages are decoded by `load` above, or by `loader` where given (same arguments).
using Loader = std::function<Vector(bool exact, int32_t side, int64_t slot, int head)>;
Attention attention(const Codec &codec, const tq_attention_args &args, const Loader &loader = nullptr);

// What a logit is wrong by (four standard deviations) if the rotated query is rounded to 2^-15 of its largest channel;
// `norm` is the largest of decoded keys that matter.
double query_rounding(const Side &k, const Vector &q, double scale, double norm);

}  // namespace oracle
