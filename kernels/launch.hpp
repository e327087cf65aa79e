// SPDX-License-Identifier: Apache-2.0
// What the rest of the library sees of the kernels: plain structs and functions, no CUDA header. Every function returns
// a cudaError_t as an int, 0 for success. Launches are asynchronous and read nothing on the host.
#pragma once

#include <tqkv/tqkv.h>

#include <cstddef>
#include <cstdint>

namespace tqkv::cuda {

inline constexpr int kMaxDim = 576;
inline constexpr int kSignWords = kMaxDim / 32;
inline constexpr int kMaxBase = 36;

// What decides where a side's bytes are.
struct SideShape {
  int32_t head_dim, bits, scale_type, raw_type, is_v;
};

// A Side (src/codec/side.hpp) as the kernels want it: passed by value, no device memory.
struct SideParams : SideShape {
  int32_t rounds, base, scale_rule;
  int32_t half_cells;  // more cells than |Y| can reach, a multiple of 4
  int32_t thresholds[8];
  float levels[16];
  float cells, steps, round_gain, scale_gain, decode_gain;
  uint32_t signs[3][kSignWords];  // bit c & 31 of word c >> 5: channel c is negated in that round
  uint64_t base_rows[kMaxBase];   // bit j of row i: entry (i, j) of the base matrix is -1
};

// Dense rows [tokens, heads, head_dim] of the caller, strides in elements.
struct Rows {
  void *data;
  int64_t token_stride, head_stride;
  int32_t type;
  int32_t aligned;  // base and strides are multiples of 16 bytes
};

// Compressed vectors one after the other.
struct FlatCodes {
  uint8_t *codes, *scales;
  int64_t codes_stride, scales_stride;
  int32_t alignment;  // of codes and stride in bytes: 16, 4 or 1
};

// One side of a pool of pages.
struct Tiles {
  uint8_t *base;
  int64_t num_slots, block_stride, tile_stride, head_stride, codes_offset, scales_offset;
  int32_t storage_tokens, storage_shift;  // shift: log2 of storage_tokens, or -1
};

struct VectorSide {
  SideParams side;
  Rows rows;
  const float *offset;       // [heads, head_dim] or null
  const float *rotated;      // encode, dense rotation: [tokens, heads, head_dim], already rotated; with exponents
  const int32_t *exponents;  // [tokens, heads]
  const float *matrix;       // encode, dense rotation: [head_dim, head_dim] if `rows` are rotated bf16 that may be
  Rows original;             // written, of these; only what encodes_fast() takes
  FlatCodes flat;
  Tiles tiles;
  Tiles exact;
  int32_t counts_slots;  // this side counts bad slots
};

// Exponents of rows that hold only zeros, or something that is no number.
inline constexpr int32_t kZeroRow = INT32_MIN, kNonFiniteRow = INT32_MIN + 1;

// One call of encode, decode, store or load. Without slots the codes are flat and vectors are tokens of one head.
struct VectorCall {
  VectorSide side[2];
  int32_t num_sides, heads;
  int64_t tokens;
  int64_t first_token;  // what faults count from: a call may be one part of several
  const int64_t *slots;
  const int64_t *exact_slots;  // null: no exact pages
  tq_faults *faults;
};

struct CopyCall {
  uint8_t *src, *dst;
  int64_t src_block_stride, src_tile_stride, src_head_stride, src_blocks;
  int64_t dst_block_stride, dst_tile_stride, dst_head_stride, dst_blocks;
  int32_t block_size, heads;
  int64_t tile_bytes;
  SideShape k, v;  // used where a block is half a tile or less
  int64_t k_codes, v_codes, k_scales, v_scales;
  const int64_t *pairs;
  int64_t num_pairs;
  tq_faults *faults;
};

// Pairs that travel as a kernel's argument, when the caller has them in host memory.
inline constexpr int kHostPairs = 96;
struct HostPairs {
  int64_t pair[2 * kHostPairs];
};

struct MergeCall {
  const void *states;
  const float *lse;
  void *out;
  float *out_lse;
  int64_t num_rows;
  int32_t num_states, head_dim, type;
};

struct DeviceLimits {
  int32_t multiprocessors, compute_capability;
  int32_t shared_bytes;  // that a block can have
};

// Restores the calling thread's current device.
class DeviceScope {
 public:
  explicit DeviceScope(int ordinal);
  ~DeviceScope();
  DeviceScope(const DeviceScope &) = delete;
  DeviceScope &operator=(const DeviceScope &) = delete;
  int error() const { return error_; }

 private:
  int previous_ = -1, error_ = 0;
};

const char *error_text(int error);
int device_limits(int ordinal, DeviceLimits *limits);
// Loads every kernel of this library onto the current device.
int load_kernels();
int upload(const void *host, size_t bytes, void **device);
void release(void *device);
int clear(void *device, size_t bytes, void *stream);
int synchronize(void *stream);

// Whether launch_encode takes the call to a kernel of its head_dim.
bool encodes_fast(const VectorCall &call, const DeviceLimits &limits);
int launch_encode(const VectorCall &call, const DeviceLimits &limits, void *stream);
int launch_decode(const VectorCall &call, const DeviceLimits &limits, void *stream);
// Dense rotations. Splits the rows of a side into powers of two (`exponents`) and f32 rows [tokens, heads, head_dim],
// the offset subtracted.
int launch_prepare(const VectorCall &call, int side, float *rows, int32_t *exponents, void *stream);
// Writes rows of a side that were decoded and rotated back to the caller's array: slots, exact copies, offset and type.
int launch_finish(const VectorCall &call, int side, const float *rows, void *stream);
// Pairs [first_pair, first_pair + count); with `host_pairs` these are its first ones.
int launch_copy(const CopyCall &call, const HostPairs *host_pairs, int64_t first_pair, int64_t count, void *stream);
int launch_merge(const MergeCall &call, void *stream);

}  // namespace tqkv::cuda
