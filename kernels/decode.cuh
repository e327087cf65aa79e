// SPDX-License-Identifier: Apache-2.0
// Decode and load of one head_dim after one Hadamard round: int8 grid values times a matrix of +-1, exact in integers. At
// head_dim 128, 4 bits and bf16 a vector moves 66 + 256 bytes; an H200 has about 22 issue slots an element in that time.
#pragma once

#include "kernels/device/launch.cuh"
#include "kernels/device/rows.cuh"
#include "kernels/inst.hpp"

namespace tqkv::cuda {

constexpr int decode_warps(int head_dim) {
  return head_dim == 256 ? 12 : 8;
}
constexpr int decode_blocks(int head_dim) {  // a multiprocessor
  return head_dim == 256 ? 1 : 2;
}

// The codes of a lane: words of its run in rows g and g + 8.
template <int kHeadDim, int kBits>
struct RowCodes {
  static constexpr int kSteps = kHeadDim / 32;  // chunks of 8 channels a lane has of a row
  static constexpr int kPlaneBits = kBits == 3 ? 2 : kBits == 1 ? 0 : kBits;
  static constexpr bool kOnes = kBits == 3 || kBits == 1;
  static constexpr int kPlane0 = kHeadDim * kPlaneBits / 8, kPlane1 = kHeadDim / 8;
  // Words that hold the 8 kSteps channels from 8 kSteps q on, and where the first begins.
  static constexpr int kWords = kPlaneBits == 2 ? (kSteps + 1) / 2 : kSteps * kPlaneBits / 4;
  static constexpr int kOnesWords = kSteps % 4 == 0 ? kSteps / 4 : kSteps == 2 ? 1 : 2;
  __device__ static int first_word() { return kPlaneBits == 2 ? kSteps * lane_part() / 2 : kWords * lane_part(); }
  __device__ static int first_ones() { return kSteps * lane_part() / 4; }
  uint32_t word[kWords > 0 ? kWords : 1], ones[kOnes ? kOnesWords : 1];

  // Whether the lane has word i of its run in the 1-bit plane.
  __device__ static bool has_ones(int i) { return i == 0 || first_ones() + i < kPlane1 / 4; }

  // Of a token's own bytes; `wide`: those are aligned to 16.
  __device__ void load_record(const uint8_t *plane0, const uint8_t *plane1, bool wide) {
    load_words<kWords>(plane0 + 4 * first_word(), wide && kHeadDim % 128 == 0, word);
    if constexpr (kOnes) {
#pragma unroll
      for (int i = 0; i < kOnesWords; ++i) {
        ones[i] = 0;
        if (has_ones(i)) load_words<1>(plane1 + 4 * (first_ones() + i), false, ones + i);
      }
    }
  }

  // Of V, where bytes of four tokens are interleaved.
  __device__ void load_v(const uint8_t *plane0, const uint8_t *plane1, int row) {
    const auto read = [&](const uint8_t *plane, int index) {
      const uint32_t pick = uint32_t(row & 3) * 0x11 + 0x40;
      const uint4 v = __ldg(reinterpret_cast<const uint4 *>(plane + 64 * index + 16 * (row >> 2)));
      return __byte_perm(__byte_perm(v.x, v.y, pick), __byte_perm(v.z, v.w, pick), 0x5410);
    };
#pragma unroll
    for (int i = 0; i < kWords; ++i) word[i] = read(plane0, first_word() + i);
    if constexpr (kOnes) {
#pragma unroll
      for (int i = 0; i < kOnesWords; ++i) ones[i] = has_ones(i) ? read(plane1, first_ones() + i) : 0;
    }
  }

  // Grid values of chunk t as signed bytes. `table`: those of magnitudes at 4 bits, of ascending indices below.
  __device__ __forceinline__ void grid(int t, uint2 table, uint32_t &low, uint32_t &high) const {
    if constexpr (kBits == 8) {
      low = word[2 * t];
      high = word[2 * t + 1];
    } else if constexpr (kBits == 4) {
      const uint32_t index = word[t] & 0x77777777;
      low = __byte_perm(table.x, table.y, index & 0xffff) ^ sign_masks(word[t]);
      high = __byte_perm(table.x, table.y, index >> 16) ^ sign_masks(word[t] << 4);
    } else {
      uint32_t index = 0;
      if constexpr (kPlaneBits == 2) index = field(word, t, kSteps * lane_part() % 2, 2) & 0x33333333;
      if constexpr (kOnes) index |= (ones_field(t) & 0x11111111) << (kBits == 3 ? 2 : 0);
      low = __byte_perm(table.x, table.y, index & 0xffff);
      high = __byte_perm(table.x, table.y, index >> 16);
    }
  }

 private:
  // The chunk that is the (skipped + t)th of two in a word. Which words these are is known to the compiler where
  // kSteps is even, when `skipped` is 0.
  template <int kCount>
  __device__ static uint32_t field(const uint32_t (&words)[kCount], int t, int skipped, int bits) {
    if constexpr (kSteps % 2 == 0) return words[t / 2] >> (t % 2 * bits);
    const uint32_t even = words[t / 2] >> (t % 2 * bits), odd = words[(t + 1) / 2] >> ((t + 1) % 2 * bits);
    return skipped == 0 ? even : odd;
  }
  __device__ uint32_t ones_field(int t) const {
    constexpr uint32_t kAt = 0x0312;  // nibbles: {2, 1, 3, 0}
    const int chunk = kSteps * lane_part() % 4 + t;
    if constexpr (kSteps % 4 == 0) return ones[t / 4] >> (kAt >> (4 * (t % 4)) & 3);
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kOnesWords; ++i) bits = chunk / 4 == i ? ones[i] : bits;
    return bits >> (kAt >> (4 * (chunk % 4)) & 3);
  }
};

// What the warp's rows are, one a lane of the first 16; the others repeat them.
struct DecodeRow {
  const uint8_t *plane0 = nullptr, *plane1 = nullptr;  // of the record, or of V's tile
  int64_t exact_slot = -1;
  float scale = 0;
  int row = 0;  // in the tile
  bool coded = false, bad = false;
};

// Copies rows that are kept exact; the slot of row i is lane i's.
static __device__ __noinline__ void load_exact(const VectorSide &v, uint32_t rows, int64_t own_slot, int64_t first,
                                               int head) {
  for (; rows != 0; rows &= rows - 1) {
    const int row = __ffs(int(rows)) - 1, n = v.side.head_dim;
    const int64_t slot = __shfl_sync(kAll, own_slot, row);
    const uint8_t *tile = tile_at(v.exact, slot, head) + v.exact.codes_offset;
    const int64_t at = (first + row) * v.rows.token_stride + head * v.rows.head_stride;
    for (int c = lane_index(); c < n; c += 32) {
      store_element(v.rows.data, v.rows.type, at + c, load_element(tile, v.side.raw_type, slot % kTileTokens * n + c));
    }
  }
}

template <int kHeadDim, int kBits>
__device__ void decode_rows(const VectorCall &call, const VectorSide &v, uint2 table, const uint32_t *matrix) {
  using Codes = RowCodes<kHeadDim, kBits>;
  constexpr int kSteps = Codes::kSteps;
  const SideParams &side = v.side;
  const uint32_t heads = uint32_t(call.heads), items = uint32_t((call.tokens + kRows - 1) / kRows) * heads;
  for (uint32_t item = blockIdx.x + threadIdx.x / 32 * gridDim.x; item < items; item += gridDim.x * (blockDim.x / 32)) {
    // Heads first: neighbours read whole tokens.
    const int head = int(item % heads);
    const int64_t first = int64_t{item / heads} * kRows;
    DecodeRow own;
    const int64_t own_token = first + lane_index() % kRows;
    if (own_token < call.tokens) {
      if (call.slots == nullptr) {
        own.coded = true;
        own.plane0 = v.flat.codes + own_token * v.flat.codes_stride;
        own.plane1 = own.plane0 + Codes::kPlane0;
        own.scale = load_scale(side.scale_type, v.flat.scales + own_token * v.flat.scales_stride);
      } else {
        const Slots slots = read_load_slots(call, v, own_token);
        own.bad = slots.bad;
        if (own.bad && lane_index() < kRows && head == 0 && v.counts_slots) {
          count_fault(call.faults, TQ_FAULT_SLOT, call.first_token + own_token);
        }
        own.coded = !own.bad && slots.coded != -1;
        if (!own.bad) own.exact_slot = slots.exact;
        if (own.coded) {
          const uint8_t *tile = tile_at(v.tiles, slots.coded, head);
          own.row = int(slots.coded) % kTileTokens;
          own.plane0 = tile + v.tiles.codes_offset;
          own.plane1 = own.plane0 + kTileTokens * Codes::kPlane0;
          if (!side.is_v) {
            own.plane0 += own.row * Codes::kPlane0;
            own.plane1 += own.row * Codes::kPlane1;
          }
          own.scale = load_scale(side.scale_type, tile + v.tiles.scales_offset + own.row * scale_bytes(side));
        }
      }
    }
    const uint32_t coded = __ballot_sync(kAll, own.coded), bad = __ballot_sync(kAll, own.bad);
    const uint32_t exact = __ballot_sync(kAll, own.exact_slot != -1);
    if ((coded | bad | exact) == 0) continue;

    uint32_t a[kSteps][4];
    float gain[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = lane_row() + 8 * r;
      const auto *plane0 = reinterpret_cast<const uint8_t *>(__shfl_sync(kAll, uint64_t(own.plane0), row));
      const auto *plane1 = reinterpret_cast<const uint8_t *>(__shfl_sync(kAll, uint64_t(own.plane1), row));
      const int in_tile = __shfl_sync(kAll, own.row, row);
      gain[r] = __shfl_sync(kAll, own.scale, row) * side.decode_gain;
      Codes codes{};
      if ((coded >> row & 1) != 0) {
        if (call.slots != nullptr && side.is_v) {
          codes.load_v(plane0, plane1, in_tile);
        } else {
          codes.load_record(plane0, plane1, call.slots != nullptr || v.flat.alignment == 16);
        }
      }
#pragma unroll
      for (int t = 0; t < kSteps; ++t) codes.grid(t, table, a[t][r], a[t][r + 2]);
    }

    // Levels are 2 grid + 1: the sum of the +-1 in an output's column, halved, is where its sum begins. That is
    // sign * head_dim for channel 0 and nothing for the others where the matrix is Sylvester's.
    const float *offset = v.offset == nullptr ? nullptr : v.offset + head * kHeadDim;
    const int32_t *halves = reinterpret_cast<const int32_t *>(matrix + kHeadDim * kHeadDim / 4);
    const int64_t at = (first + lane_row()) * v.rows.token_stride + head * v.rows.head_stride + 8 * lane_part();
    const int64_t next = 8 * v.rows.token_stride;
    const bool plain = offset == nullptr && coded == kAll;
    gain[0] *= 2, gain[1] *= 2;
#pragma unroll 1
    for (int t = 0; t < kSteps; ++t) {
      const int channel = 8 * (4 * t + lane_part());
      float x[2][8];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int2 begin = *reinterpret_cast<const int2 *>(halves + channel + 2 * i);
        int32_t sum[4] = {begin.x, begin.y, begin.x, begin.y};
#pragma unroll
        for (int s = 0; s < kSteps; s += kRotationRun<kSteps>) {
          uint32_t b[kRotationRun<kSteps>][2];
          load_rotation<kSteps>(matrix, 4 * t + i, s, b);
#pragma unroll
          for (int k = 0; k < kRotationRun<kSteps>; ++k) mma_m16n8k32<int8_t, int8_t>(sum, a[s + k], b[k], sum);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {  // sums began with the bits of kRoundingBias
          x[j / 2][2 * i + j % 2] = __fmaf_rn(__int_as_float(sum[j]) - kRoundingBias, gain[j / 2], 0.0f);
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = lane_row() + 8 * r;
        if (!plain) {
          if (offset != nullptr) {
#pragma unroll
            for (int i = 0; i < 8; ++i) x[r][i] = x[r][i] + offset[channel + i];
          }
          if ((bad >> row & 1) != 0) {
#pragma unroll
            for (int i = 0; i < 8; ++i) x[r][i] = 0;
          }
          if (((coded | bad) >> row & 1) == 0) continue;
        }
        store_chunk(v.rows, at + r * next + 32 * t, x[r]);
      }
    }
    if (exact != 0) load_exact(v, exact & 0xffff, own.exact_slot, first, head);
  }
}

// Grid values as signed bytes.
__device__ inline uint2 level_table(const SideParams &side) {
  uint64_t bytes = 0;
  const int count = side.bits == 8 ? 0 : side.bits == 4 ? 8 : 1 << side.bits;
  for (int i = 0; i < count; ++i) {
    const int grid = (int(side.levels[i]) - 1) / 2;  // odd: exact below zero too
    bytes |= uint64_t(uint8_t(grid)) << (8 * i);
  }
  return make_uint2(uint32_t(bytes), uint32_t(bytes >> 32));
}

// Where the sums of each channel begin, as the bits of kRoundingBias plus half of the column's sum.
template <int kHeadDim>
__device__ void fill_halves(const SideParams &side, int32_t *halves) {
  for (int c = int(threadIdx.x); c < kHeadDim; c += int(blockDim.x)) {
    int sum = 0;
    for (int k = 0; k < kHeadDim; k += 4) sum += 4 - 2 * __popc(hadamard_signs4(side, c, k, true));
    if ((side.signs[0][c >> 5] >> (c & 31) & 1) != 0) sum = -sum;
    halves[c] = __float_as_int(kRoundingBias) + sum / 2;
  }
}

template <int kHeadDim>
__global__ void __launch_bounds__(32 * decode_warps(kHeadDim), decode_blocks(kHeadDim))
    decode_kernel(const __grid_constant__ VectorCall call) {
  const VectorSide &v = call.side[blockIdx.y];
  auto *matrix = static_cast<uint32_t *>(dynamic_shared());
  fill_rotation<kHeadDim, true>(v.side, matrix);
  fill_halves<kHeadDim>(v.side, reinterpret_cast<int32_t *>(matrix + kHeadDim * kHeadDim / 4));
  __syncthreads();
  const uint2 table = level_table(v.side);
  switch (v.side.bits) {
    case 1:
      return decode_rows<kHeadDim, 1>(call, v, table, matrix);
    case 2:
      return decode_rows<kHeadDim, 2>(call, v, table, matrix);
    case 3:
      return decode_rows<kHeadDim, 3>(call, v, table, matrix);
    case 4:
      return decode_rows<kHeadDim, 4>(call, v, table, matrix);
    default:
      return decode_rows<kHeadDim, 8>(call, v, table, matrix);
  }
}

template <int kHeadDim>
constexpr int decode_shared_bytes() {
  return kHeadDim * kHeadDim + 4 * kHeadDim;
}

// The rest is for the generic kernels.
template <int kHeadDim>
bool takes_decode(const VectorSide &v, bool tiles, const DeviceLimits &limits) {
  return v.side.rounds == 1 && v.rows.aligned != 0 && (tiles || v.flat.alignment >= 4) &&
         decode_shared_bytes<kHeadDim>() <= limits.shared_bytes;
}

template <int kHeadDim>
int load_decode() {
  return cudaFuncSetAttribute(decode_kernel<kHeadDim>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              decode_shared_bytes<kHeadDim>());
}

template <int kHeadDim>
int launch_decode_fast(const VectorCall &call, const DeviceLimits &limits, void *stream) {
  constexpr int kWarps = decode_warps(kHeadDim);
  const int64_t items = (call.tokens + kRows - 1) / kRows * call.heads;
  const int64_t resident = int64_t{limits.multiprocessors} * decode_blocks(kHeadDim) / call.num_sides;
  return launch(decode_kernel<kHeadDim>, dim3(unsigned(items < resident ? items : resident), unsigned(call.num_sides)),
                32 * kWarps, decode_shared_bytes<kHeadDim>(), stream, call);
}

}  // namespace tqkv::cuda
