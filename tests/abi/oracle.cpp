// SPDX-License-Identifier: Apache-2.0
#include "oracle.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <stdexcept>
#include <tuple>

namespace oracle {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// The `index`-th output of a stream of the rotations' generator.
uint64_t stream_output(uint64_t seed, int32_t side, int stream, uint64_t index) {
  constexpr uint64_t kGamma = 0x9e3779b97f4a7c15u;
  const uint64_t state = mix(seed + kGamma * uint64_t(1 + 8 * side + stream));
  return mix(state + kGamma * (index + 1));
}

int hadamard_base_order(int head_dim) {
  for (int base : {1, 12, 20, 28, 36}) {
    for (int order = base; order <= head_dim; order *= 2) {
      if (order == head_dim) return base;
    }
  }
  return 0;
}

// The quadratic character modulo a prime q.
int chi(int a, int q) {
  a = ((a % q) + q) % q;
  if (a == 0) return 0;
  for (int r = 1; r < q; ++r) {
    if (r * r % q == a) return 1;
  }
  return -1;
}

bool bit_of(const uint8_t *bytes, int64_t bit) {
  return (bytes[bit / 8] >> (bit % 8)) & 1;
}

// Bit positions inside a plane, counted from its first byte.
int64_t two_bit_plane_position(int c) {
  return 32 * (c >> 4) + 4 * (c & 7) + 2 * ((c >> 3) & 1);
}

int64_t one_bit_plane_position(int c, int head_dim) {
  const bool half_word = head_dim % 32 == 16 && c >= head_dim - 16;
  if (half_word) return 32 * (c >> 5) + 4 * (c & 3) + ((c >> 2) & 3);
  constexpr int kBit[4] = {2, 1, 3, 0};
  return 32 * (c >> 5) + 4 * (c & 7) + kBit[(c >> 3) & 3];
}

// Sizes of a record's planes in bytes.
std::vector<int64_t> planes_of(const Side &side) {
  if (side.bits == 3) return {side.head_dim / 4, side.head_dim / 8};
  return {side.code_bytes()};
}

}  // namespace

double from_f16(uint16_t bits) {
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  if (exponent == 31) return mantissa ? std::numeric_limits<double>::quiet_NaN() : sign * kInfinity;
  if (exponent == 0) return sign * std::ldexp(mantissa, -24);
  return sign * std::ldexp(1024 + mantissa, exponent - 25);
}

double from_bf16(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

uint16_t to_f16(double value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double a = std::fabs(value);
  if (std::isnan(a)) return uint16_t(sign | 0x7e00);
  if (a == 0) return sign;
  if (std::isinf(a)) return uint16_t(sign | 0x7c00);
  const int exponent = std::max(std::ilogb(a), -14);
  const double quantum = std::ldexp(1.0, exponent - 10);
  const double units = std::nearbyint(a / quantum);  // 1024..2048, or less in the subnormals
  if (units * quantum >= 65520) return uint16_t(sign | 0x7c00);
  return uint16_t(sign + ((exponent + 14) << 10) + int(units));  // the implicit bit carries into the exponent
}

uint16_t to_bf16(double value) {
  const float narrow = float(value);
  uint32_t bits;
  std::memcpy(&bits, &narrow, 4);
  if (std::isnan(narrow)) return uint16_t((bits >> 16) | 0x40);
  const uint32_t rest = bits & 0xffff, odd = (bits >> 16) & 1;
  return uint16_t((bits >> 16) + (rest > 0x8000 || (rest == 0x8000 && odd)));
}

int64_t type_bytes(int32_t type) {
  return type == TQ_TYPE_F32 ? 4 : 2;
}

double read_element(const void *array, int32_t type, int64_t index) {
  if (type == TQ_TYPE_F32) {
    float value;
    std::memcpy(&value, static_cast<const char *>(array) + 4 * index, 4);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, static_cast<const char *>(array) + 2 * index, 2);
  return type == TQ_TYPE_F16 ? from_f16(bits) : from_bf16(bits);
}

void write_element(void *array, int32_t type, int64_t index, double value) {
  if (type == TQ_TYPE_F32) {
    const float narrow = float(value);
    std::memcpy(static_cast<char *>(array) + 4 * index, &narrow, 4);
    return;
  }
  const uint16_t bits = type == TQ_TYPE_F16 ? to_f16(value) : to_bf16(value);
  std::memcpy(static_cast<char *>(array) + 2 * index, &bits, 2);
}

Vector multiply(const Matrix &matrix, const Vector &x) {
  Vector y(size_t(matrix.n), 0.0);
  for (int r = 0; r < matrix.n; ++r) {
    for (int c = 0; c < matrix.n; ++c) y[size_t(r)] += matrix(r, c) * x[size_t(c)];
  }
  return y;
}

Vector multiply_transposed(const Matrix &matrix, const Vector &x) {
  Vector y(size_t(matrix.n), 0.0);
  for (int r = 0; r < matrix.n; ++r) {
    for (int c = 0; c < matrix.n; ++c) y[size_t(c)] += matrix(r, c) * x[size_t(r)];
  }
  return y;
}

double dot(const Vector &x, const Vector &y) {
  double sum = 0;
  for (size_t i = 0; i < x.size(); ++i) sum += x[i] * y[i];
  return sum;
}

double norm(const Vector &x) {
  double largest = 0;
  for (double value : x) largest = std::max(largest, std::fabs(value));
  if (largest == 0) return 0;
  double sum = 0;
  for (double value : x) sum += (value / largest) * (value / largest);
  return largest * std::sqrt(sum);
}

bool hadamard_exists(int head_dim) {
  return hadamard_base_order(head_dim) != 0;
}

Matrix base_hadamard(int order) {
  Matrix h(order);
  if (order == 1) {
    h(0, 0) = 1;
  } else if (order == 12 || order == 20) {
    const int q = order - 1;
    for (int i = 0; i < order; ++i) {
      for (int j = 0; j < order; ++j) {
        const double s = i == 0 && j == 0 ? 0 : i == 0 ? 1 : j == 0 ? -1 : chi(i - j, q);
        h(i, j) = (i == j ? 1 : 0) + s;
      }
    }
  } else if (order == 28 || order == 36) {
    const int q = order / 2 - 1;
    constexpr double kZero[2][2] = {{1, -1}, {-1, -1}};
    constexpr double kOne[2][2] = {{1, 1}, {1, -1}};
    for (int i = 0; i < order; ++i) {
      for (int j = 0; j < order; ++j) {
        const int a = i / 2, b = j / 2;
        const int c = a == 0 && b == 0 ? 0 : a == 0 || b == 0 ? 1 : chi(a - b, q);
        h(i, j) = c == 0 ? kZero[i % 2][j % 2] : c * kOne[i % 2][j % 2];
      }
    }
  } else {
    throw std::invalid_argument("no base matrix of this order");
  }
  return h;
}

std::vector<int> rotation_signs(int head_dim, int32_t side, int round, uint64_t seed) {
  std::vector<int> signs;
  for (int c = 0; c < head_dim; ++c) {
    signs.push_back((stream_output(seed, side, round, uint64_t(c) / 64) >> (c % 64)) & 1 ? -1 : 1);
  }
  return signs;
}

Matrix hadamard_rotation(int head_dim, int32_t side, int rounds, uint64_t seed) {
  const int base_order = hadamard_base_order(head_dim);
  const Matrix base = base_hadamard(base_order);
  Matrix h(head_dim);  // the base matrix (x) Sylvester's
  const int power = head_dim / base_order;
  for (int i = 0; i < head_dim; ++i) {
    for (int j = 0; j < head_dim; ++j) {
      int common = (i % power) & (j % power), parity = 0;
      for (; common; common &= common - 1) parity ^= 1;
      h(i, j) = (parity ? -1 : 1) * base(i / power, j / power) / std::sqrt(double(head_dim));
    }
  }
  const auto one_round = [&](int round) {
    const std::vector<int> signs = rotation_signs(head_dim, side, round, seed);
    Matrix m = h;
    for (int i = 0; i < head_dim; ++i) {
      for (int j = 0; j < head_dim; ++j) m(i, j) *= signs[size_t(j)];
    }
    return m;
  };
  Matrix rotation = one_round(0);
  for (int round = 1; round < rounds; ++round) {
    const Matrix next = one_round(round);
    Matrix product(head_dim);
    for (int i = 0; i < head_dim; ++i) {
      for (int k = 0; k < head_dim; ++k) {
        for (int j = 0; j < head_dim; ++j) product(i, j) += next(i, k) * rotation(k, j);
      }
    }
    rotation = product;
  }
  return rotation;
}

Matrix dense_rotation(int head_dim, int32_t side, uint64_t seed) {
  Matrix m(head_dim);
  uint64_t next = 0;
  const auto uniform = [&] { return 2 * std::ldexp(double(stream_output(seed, side, 3, next++) >> 11), -53) - 1; };
  for (size_t i = 0; i < m.a.size();) {
    const double u = uniform(), v = uniform(), q = u * u + v * v;
    if (!(q > 0 && q < 1)) continue;
    const double f = std::sqrt(-2 * std::log(q) / q);
    m.a[i++] = u * f;
    m.a[i++] = v * f;
  }
  const auto row_dot = [&](int a, int b) {
    double sum = 0;
    for (int c = 0; c < head_dim; ++c) sum += m(a, c) * m(b, c);
    return sum;
  };
  for (int row = 0; row < head_dim; ++row) {
    for (int sweep = 0; sweep < 2; ++sweep) {
      for (int other = 0; other < row; ++other) {
        const double overlap = row_dot(row, other);
        for (int c = 0; c < head_dim; ++c) m(row, c) -= overlap * m(other, c);
      }
    }
    const double length = std::sqrt(row_dot(row, row));
    for (int c = 0; c < head_dim; ++c) m(row, c) /= length;
  }
  return m;
}

Codec::Codec(const tq_config &config, const tq_codec_info &info)
    : kv_heads(info.kv_heads), block_size(info.block_size_tokens), exact_block_size(info.exact_block_size_tokens) {
  const auto fill = [&](Side *side, const tq_side_info &resolved, const tq_side_config &chosen, int32_t which) {
    side->head_dim = resolved.head_dim;
    side->bits = resolved.bits;
    side->scale_type = resolved.scale_type;
    side->raw_type = info.raw_type;
    side->level_unit = resolved.level_unit;
    for (int i = 0; i < resolved.num_levels && resolved.bits <= 4; ++i) side->grid.push_back(resolved.grid[i]);
    if (side->raw() || resolved.rotation == TQ_ROTATION_NONE) return;
    side->rotated = true;
    if (resolved.rotation == TQ_ROTATION_HADAMARD) {
      side->rotation = hadamard_rotation(side->head_dim, which, resolved.hadamard_rounds, info.seed);
    } else if (resolved.rotation == TQ_ROTATION_DENSE) {
      side->rotation = dense_rotation(side->head_dim, which, info.seed);
    } else {
      side->rotation = Matrix(side->head_dim);
      for (size_t i = 0; i < side->rotation.a.size(); ++i) side->rotation.a[i] = chosen.matrix[i];
    }
  };
  fill(&k, info.k, config.k, TQ_SIDE_K);
  fill(&v, info.v, config.v, TQ_SIDE_V);
  for (Side *side : {&exact_k, &exact_v}) {
    side->head_dim = side == &exact_k ? k.head_dim : v.head_dim;
    side->bits = 16;
    side->raw_type = info.raw_type;
  }
}

int64_t Codec::tile_bytes(bool exact) const {
  int64_t bytes = 0;
  for (int32_t which : {TQ_SIDE_K, TQ_SIDE_V}) {
    bytes += 16 * (side(exact, which).code_bytes() + side(exact, which).scale_bytes());
  }
  return bytes;
}

std::vector<int> read_codes(const uint8_t *record, int head_dim, int bits) {
  std::vector<int> codes;
  for (int c = 0; c < head_dim; ++c) {
    int code = 0;
    if (bits == 8) {
      code = int8_t(record[c]);
    } else if (bits == 4) {
      const int64_t word = 32 * (c >> 3);
      const int j = c & 7;
      int magnitude = 0;
      for (int b = 0; b < 3; ++b) magnitude |= bit_of(record, word + 4 * j + b) << b;
      const bool negative = bit_of(record, word + (j < 4 ? 8 * j + 7 : 8 * (j - 4) + 3));
      code = negative ? 7 - magnitude : 8 + magnitude;
    } else {
      const uint8_t *one_bit_plane = record;
      int one_bit_shift = 0;
      if (bits >= 2) {
        const int64_t position = two_bit_plane_position(c);
        code = bit_of(record, position) | bit_of(record, position + 1) << 1;
        one_bit_plane = record + head_dim / 4;
        one_bit_shift = 2;
      }
      if (bits != 2) code |= bit_of(one_bit_plane, one_bit_plane_position(c, head_dim)) << one_bit_shift;
    }
    codes.push_back(code);
  }
  return codes;
}

Vector decode_rotated(const Side &side, const uint8_t *record, double scale) {
  Vector values;
  if (side.raw()) {
    for (int c = 0; c < side.head_dim; ++c) values.push_back(read_element(record, side.raw_type, c));
    return values;
  }
  for (int code : read_codes(record, side.head_dim, side.bits)) {
    values.push_back(scale * side.level_unit * side.step(code));
  }
  return values;
}

Vector decode(const Side &side, const uint8_t *record, double scale) {
  const Vector values = decode_rotated(side, record, scale);
  return side.rotated ? multiply_transposed(side.rotation, values) : values;
}

Pool::Pool(const Codec &codec, bool exact, const tq_pages &pages)
    : base(static_cast<const uint8_t *>(pages.base)), num_blocks(pages.num_blocks) {
  const int64_t tile_bytes = codec.tile_bytes(exact);
  head_stride = pages.head_stride_bytes ? pages.head_stride_bytes : tile_bytes;
  tile_stride = pages.tile_stride_bytes ? pages.tile_stride_bytes : codec.kv_heads * tile_bytes;
  block_stride = pages.block_stride_bytes ? pages.block_stride_bytes
                                          : std::max(1, codec.block(exact) / 16) * codec.kv_heads * tile_bytes;
}

int64_t Pool::bytes(const Codec &codec, bool exact) const {
  const int64_t span = std::max(codec.block(exact), 16);
  const int64_t groups = (num_slots(codec, exact) + span - 1) / span;
  if (groups == 0) return 0;
  return (groups - 1) * block_stride + (span / 16 - 1) * tile_stride + (codec.kv_heads - 1) * head_stride +
         codec.tile_bytes(exact);
}

void for_each_byte(const Codec &codec, bool exact, const Pool &pool, int32_t which, int64_t slot, int head,
                   const std::function<void(int64_t)> &visit) {
  const Side &side = codec.side(exact, which);
  const Side &k = codec.side(exact, TQ_SIDE_K), &v = codec.side(exact, TQ_SIDE_V);
  const int64_t span = std::max(codec.block(exact), 16);
  const int64_t tile = slot / span * pool.block_stride + slot % span / 16 * pool.tile_stride + head * pool.head_stride;
  const int64_t t = slot % 16;
  int64_t offset = tile + (which == TQ_SIDE_V ? 16 * k.code_bytes() : 0);
  if (side.raw()) {
    for (int64_t e = 0; e < side.code_bytes(); ++e) visit(offset + t * side.code_bytes() + e);
    return;
  }
  for (int64_t plane_bytes : planes_of(side)) {
    for (int64_t e = 0; e < plane_bytes; ++e) {
      if (which == TQ_SIDE_K) {
        visit(offset + t * plane_bytes + e);
      } else {
        const int64_t w = plane_bytes % 4 != 0 && e >= plane_bytes - 2 ? 2 : 4;
        visit(offset + 64 * (e >> 2) + 4 * w * (t >> 2) + 4 * (e & 3) + (t & 3));
      }
    }
    offset += 16 * plane_bytes;
  }
  offset = tile + 16 * (k.code_bytes() + v.code_bytes()) + (which == TQ_SIDE_V ? 16 * k.scale_bytes() : 0);
  for (int64_t e = 0; e < side.scale_bytes(); ++e) visit(offset + t * side.scale_bytes() + e);
}

std::vector<uint8_t> read_record(const Codec &codec, bool exact, const Pool &pool, int32_t which, int64_t slot,
                                 int head, double *scale) {
  std::vector<uint8_t> bytes;
  for_each_byte(codec, exact, pool, which, slot, head, [&](int64_t offset) { bytes.push_back(pool.base[offset]); });
  const Side &side = codec.side(exact, which);
  *scale = side.raw() ? 1 : read_element(bytes.data() + side.code_bytes(), side.scale_type, 0);
  bytes.resize(size_t(side.code_bytes()));
  return bytes;
}

Vector load(const Codec &codec, bool exact, const Pool &pool, int32_t which, int64_t slot, int head) {
  double scale;
  const std::vector<uint8_t> record = read_record(codec, exact, pool, which, slot, head, &scale);
  return decode(codec.side(exact, which), record.data(), scale);
}

namespace {

// Where the bytes of a visible key are.
struct Place {
  enum { kCoded, kExact, kNew } kind;
  int64_t slot;  // or the row of k_new
};

}  // namespace

double query_rounding(const Side &k, const Vector &q, double scale, double norm) {
  double largest_channel = 0;
  for (const double y : k.rotated ? multiply(k.rotation, q) : q) {
    largest_channel = std::max(largest_channel, std::fabs(y));
  }
  return 4 * std::fabs(scale) * largest_channel * 0x1p-15 / std::sqrt(12.0) * norm;
}

Attention attention(const Codec &codec, const tq_attention_args &args, const Loader &loader) {
  Attention result;
  const int head_dim_k = codec.k.head_dim, head_dim_v = codec.v.head_dim, kv_heads = codec.kv_heads;
  const int q_heads = args.q_heads, group = q_heads / kv_heads;
  const int64_t rows = int64_t(args.num_tokens) * q_heads;
  result.num_tokens = args.num_tokens;
  result.q_heads = q_heads;
  result.head_dim_v = head_dim_v;
  result.written.assign(size_t(args.num_tokens), 0);
  result.out.assign(size_t(rows * head_dim_v), 0.0);
  result.lse.assign(size_t(rows), -kInfinity);
  result.magnitude.assign(size_t(rows), 0.0);
  result.logit.assign(size_t(rows), 0.0);
  result.query_rounding.assign(size_t(rows), 0.0);
  result.fault.assign(size_t(args.num_seqs), -1);
  result.entries.resize(size_t(args.num_seqs));
  result.exact_entries.resize(size_t(args.num_seqs));

  const Pool pool(codec, false, *args.pages);
  const Pool exact_pool = args.exact_pages ? Pool(codec, true, *args.exact_pages) : Pool();
  std::map<std::tuple<bool, int32_t, int64_t, int>, Vector> decoded;
  const auto fetch = [&](bool exact, int32_t side, int64_t slot, int head) -> const Vector & {
    Vector &vector = decoded[{exact, side, slot, head}];
    if (vector.empty()) {
      vector =
          loader ? loader(exact, side, slot, head) : load(codec, exact, exact ? exact_pool : pool, side, slot, head);
    }
    return vector;
  };
  const auto stride = [](int64_t given, int64_t dense) { return given ? given : dense; };
  const int64_t q_head_stride = stride(args.q_head_stride, head_dim_k);
  const int64_t q_token_stride = stride(args.q_token_stride, int64_t(q_heads) * head_dim_k);
  const int64_t kn_head_stride = stride(args.k_new_head_stride, head_dim_k);
  const int64_t kn_token_stride = stride(args.k_new_token_stride, int64_t(kv_heads) * head_dim_k);
  const int64_t vn_head_stride = stride(args.v_new_head_stride, head_dim_v);
  const int64_t vn_token_stride = stride(args.v_new_token_stride, int64_t(kv_heads) * head_dim_v);
  std::map<std::tuple<int32_t, int64_t, int>, Vector> given;
  const auto fetch_new = [&](int32_t side, int64_t row, int head) -> const Vector & {
    Vector &vector = given[{side, row, head}];
    if (!vector.empty()) return vector;
    const bool keys = side == TQ_SIDE_K;
    const int64_t first =
        keys ? row * kn_token_stride + head * kn_head_stride : row * vn_token_stride + head * vn_head_stride;
    for (int c = 0; c < (keys ? head_dim_k : head_dim_v); ++c) {
      vector.push_back(read_element(keys ? args.k_new : args.v_new, args.q_type, first + c));
    }
    return vector;
  };
  const double scale = args.scale != 0 ? double(args.scale) : 1 / std::sqrt(double(head_dim_k));

  int64_t rows_end = 0;
  for (int s = 0; s < args.num_seqs; ++s) {
    const int64_t row0 = args.cu_seqlens_q ? args.cu_seqlens_q[s] : s;
    const int64_t row1 = args.cu_seqlens_q ? args.cu_seqlens_q[s + 1] : s + 1;
    const int64_t q_len = row1 - row0, length = args.lengths[s];
    const int64_t max_q_len = !args.cu_seqlens_q ? 1 : args.max_q_len ? args.max_q_len : args.num_tokens;
    if (row0 < rows_end || row1 < row0 || row1 > args.num_tokens) {  // its rows are unknown: none is written
      result.fault[size_t(s)] = TQ_FAULT_LENGTH;
      continue;
    }
    rows_end = row1;
    for (int64_t row = row0; row < row1; ++row) result.written[size_t(row)] = 1;
    if (q_len > max_q_len) {
      result.fault[size_t(s)] = TQ_FAULT_LENGTH;
      continue;
    }
    if (length == 0) continue;  // nothing of its tables is needed
    int64_t columns = args.table_columns,
            first_column = int64_t(s) * stride(args.block_table_stride, args.table_columns);
    const int32_t *table = args.block_table;
    if (!table) {
      table = args.block_indices;
      first_column = args.block_indptr[s];
      columns = args.block_indptr[s + 1] - first_column;
      if (first_column < 0 || columns < 0 || first_column + columns > args.num_block_indices) {
        result.fault[size_t(s)] = TQ_FAULT_LENGTH;
        continue;
      }
    }
    const int64_t new_tokens = args.k_new ? q_len : 0;
    if (length < 0 || length - new_tokens > columns * codec.block_size || length < new_tokens ||
        (args.max_length_tokens && length > args.max_length_tokens)) {
      result.fault[size_t(s)] = TQ_FAULT_LENGTH;
      continue;
    }
    const int64_t start = args.starts ? args.starts[s] : 0;
    const auto position = [&](int64_t row) {
      return args.q_positions ? int64_t(args.q_positions[row]) : length - q_len + row - row0;
    };
    const auto visible = [&](int64_t j, int64_t p) {
      return j >= start && j < length && (!(args.flags & TQ_ATTENTION_CAUSAL) || j <= p) &&
             (args.window_tokens <= 0 || p - j < args.window_tokens);
    };

    // Where each key that some row sees is read from, and whether all of that exists.
    std::map<int64_t, Place> places;
    bool bad_block = false;
    for (int64_t j = std::max<int64_t>(start, 0); j < length && q_len > 0; ++j) {
      bool seen = false;
      for (int64_t row = row0; row < row1; ++row) seen = seen || visible(j, position(row));
      if (!seen) continue;
      if (j >= length - new_tokens) {
        places[j] = {Place::kNew, row0 + j - (length - q_len)};
        continue;
      }
      const int64_t exact_column = j / codec.exact_block_size;
      const bool in_range =
          j - start < args.exact_first_tokens || j > position(row0) - int64_t(args.exact_recent_tokens);
      if (args.exact_pages && in_range && exact_column < args.exact_columns) {
        const int64_t entry =
            args.exact_table[int64_t(s) * stride(args.exact_table_stride, args.exact_columns) + exact_column];
        result.exact_entries[size_t(s)].insert(exact_column);
        if (entry >= exact_pool.num_blocks) bad_block = true;
        if (entry >= 0) {
          places[j] = {Place::kExact, entry * codec.exact_block_size + j % codec.exact_block_size};
          continue;
        }
      }
      const int64_t column = j / codec.block_size;
      const int64_t entry = table[first_column + column];
      result.entries[size_t(s)].insert(column);
      if (entry < 0 || entry >= pool.num_blocks) bad_block = true;
      places[j] = {Place::kCoded, entry * codec.block_size + j % codec.block_size};
    }
    if (bad_block) {
      result.fault[size_t(s)] = TQ_FAULT_BLOCK;
      continue;
    }

    for (const auto &[j, place] : places) {
      if (place.kind == Place::kCoded) result.coded_slots.insert(place.slot);
      if (place.kind == Place::kExact) result.exact_slots.insert(place.slot);
      if (place.kind == Place::kNew) result.new_rows.insert(place.slot);
    }
    for (int64_t row = row0; row < row1; ++row) {
      const int64_t p = position(row);
      for (int h = 0; h < q_heads; ++h) {
        const int g = h / group;
        Vector q;
        for (int c = 0; c < head_dim_k; ++c) {
          q.push_back(read_element(args.q, args.q_type, row * q_token_stride + h * q_head_stride + c));
        }
        struct Key {
          double x, size, norm;  // the logit, the sum of the magnitudes of its terms, and the norm of what is coded
          const Vector *value;
        };
        std::vector<Key> keys;
        double maximum = args.sinks ? double(args.sinks[h]) : -kInfinity;
        for (const auto &[j, place] : places) {
          if (!visible(j, p)) continue;
          const auto [is_exact, slot, kind] = std::tuple(place.kind == Place::kExact, place.slot, place.kind);
          const Vector *value =
              kind == Place::kNew ? &fetch_new(TQ_SIDE_V, slot, g) : &fetch(is_exact, TQ_SIDE_V, slot, g);
          Vector key = kind == Place::kNew ? fetch_new(TQ_SIDE_K, slot, g) : fetch(is_exact, TQ_SIDE_K, slot, g);
          const double coded_norm = kind == Place::kCoded ? norm(key) : 0;
          for (int c = 0; c < head_dim_k && kind == Place::kCoded && args.key_offset; ++c) {
            key[size_t(c)] += args.key_offset[int64_t(g) * head_dim_k + c];
          }
          double x = scale * dot(q, key), size = 0;
          for (size_t c = 0; c < q.size(); ++c) size += std::fabs(scale * q[c] * key[c]);
          if (args.soft_cap > 0) x = double(args.soft_cap) * std::tanh(x / double(args.soft_cap));
          if (args.alibi_slopes) {
            x += double(args.alibi_slopes[h]) * double(j - p);
            size += std::fabs(double(args.alibi_slopes[h]) * double(j - p));
          }
          maximum = std::max(maximum, x);
          keys.push_back({x, size, coded_norm, value});
        }
        if (keys.empty()) continue;
        double z = args.sinks ? std::exp(double(args.sinks[h]) - maximum) : 0;
        Vector sum(size_t(head_dim_v), 0.0), absolute(size_t(head_dim_v), 0.0);
        double largest = 0, largest_norm = 0;
        for (const auto &[x, size, coded_norm, value] : keys) {
          const double weight = std::exp(x - maximum);
          z += weight;
          if (weight > 1e-9) {
            largest = std::max(largest, size);
            largest_norm = std::max(largest_norm, coded_norm);
          }
          for (int c = 0; c < head_dim_v; ++c) {
            sum[size_t(c)] += weight * (*value)[size_t(c)];
            absolute[size_t(c)] += weight * std::fabs((*value)[size_t(c)]);
          }
        }
        const size_t index = size_t(row * q_heads + h);
        for (int c = 0; c < head_dim_v; ++c) result.out[index * size_t(head_dim_v) + size_t(c)] = sum[size_t(c)] / z;
        result.lse[index] = maximum + std::log(z);
        result.magnitude[index] = norm(absolute) / z;
        result.logit[index] = largest;
        result.query_rounding[index] = query_rounding(codec.k, q, scale, largest_norm);
      }
    }
  }
  return result;
}

}  // namespace oracle
