// SPDX-License-Identifier: Apache-2.0
// Every head_dim, bit width, type and stride: one warp a vector, in shared memory, by the functions that the CPU path
// runs. The head sizes of common models have kernels of their own (encode.cuh, decode.cuh); these are the reference
// that those are compared with, and what all others get.
#pragma once

#include "kernels/device/rotation.cuh"
#include "kernels/device/vector.cuh"

namespace tqkv::cuda {

inline constexpr int kGenericWarps = 4;

// Per warp 10 KB of shared memory.
struct GenericScratch {
  float a[kMaxDim], b[kMaxDim];
  int32_t y[kMaxDim], z[kMaxDim];
  uint8_t codes[kMaxDim];
  uint8_t record[2 * kMaxDim];
};

// Y of quantize.hpp, where no matrix was applied.
__device__ inline void rotate_integers(const SideParams &side, int lane, int32_t *y, int32_t *scratch) {
  for (int round = 0; round < side.rounds; ++round) {
    flip_signs(side, round, lane, y);
    apply_base(side, false, lane, y, scratch);
    butterflies(side, lane, y);
  }
  if (side.rounds < 2) return;
  for (int c = lane; c < side.head_dim; c += 32) y[c] = to_integer(float(y[c]), side.round_gain);
  __syncwarp();
}

// squared_norm() of quantize.hpp: a lane is a cell.
__device__ inline float warp_squared_norm(const float *x, int n, int lane) {
  float cell = 0;
  for (int c = lane; c < n; c += kCells) cell = __fmaf_rn(x[c], x[c], cell);
  for (int stride = 1; stride < kCells; stride *= 2) cell = cell + __shfl_xor_sync(kAll, cell, stride);
  return cell;
}

// encode_vector of src/codec/cpu_scalar.cpp. `load(c)` gives coordinate c, rotated already if `exponents` say so.
template <class Load>
__device__ Outcome encode_one(const SideParams &side, const int32_t *exponent_at, Load &&load, int lane,
                              GenericScratch &s, float *scale) {
  const int n = side.head_dim;
  for (int i = lane; i < n * side.bits / 8; i += 32) s.record[i] = 0;
  for (int c = lane; c < n; c += 32) s.a[c] = load(c);
  __syncwarp();
  *scale = 0;
  int exponent = 0;
  if (exponent_at != nullptr) {
    exponent = *exponent_at;
    if (exponent == kNonFiniteRow) return kNonFinite;
    if (exponent == kZeroRow) return kFine;
  }
  float norm2 = warp_squared_norm(s.a, n, lane);
  if (exponent_at == nullptr && !(norm2 >= kMinSquaredNorm && norm2 <= kMaxSquaredNorm)) {
    float largest = 0;
    bool finite = true;
    for (int c = lane; c < n; c += 32) {
      finite = finite && isfinite(s.a[c]);
      largest = fmaxf(largest, fabsf(s.a[c]));
    }
    if (__any_sync(kAll, !finite)) return kNonFinite;
    largest = warp_max(largest);
    if (largest == 0) return kFine;
    exponent = exponent_of(largest);
    for (int c = lane; c < n; c += 32) s.a[c] = times_power_of_two(s.a[c], -exponent);
    __syncwarp();
    norm2 = warp_squared_norm(s.a, n, lane);
  }
  const float norm = sqrtf(norm2), gain = side.steps / norm;
  for (int c = lane; c < n; c += 32) s.y[c] = to_integer(s.a[c], gain);
  __syncwarp();
  rotate_integers(side, lane, s.y, s.z);

  int64_t dot = 0;
  int uu = 0, largest = 0;
  for (int c = lane; c < n; c += 32) largest = max(largest, abs(s.y[c]));
  const float grid_gain = gain8(warp_max(largest));
  for (int c = lane; c < n; c += 32) {
    int u;
    if (side.bits == 8) {
      const int grid = choose_grid8(s.y[c], grid_gain);
      u = 2 * grid + 1;
      s.record[c] = uint8_t(grid);
    } else {
      const unsigned code = choose_code(s.y[c], side.thresholds, side.bits);
      u = int(side.levels[code]);
      s.codes[c] = uint8_t(code);
    }
    dot += int64_t{s.y[c]} * u;
    uu += u * u;
  }
  __syncwarp();
  if (side.bits != 8) {
    // A lane's 32 channels share no byte with those of another.
    for (int c = 32 * lane; c < n && c < 32 * lane + 32; ++c) put_code(s.record, n, side.bits, c, s.codes[c]);
  }
  const float value = choose_scale(side.scale_rule, norm, warp_sum(dot), warp_sum(uu), side.scale_gain);
  *scale = exponent == 0 ? value : times_power_of_two(value, exponent);
  __syncwarp();
  return kFine;
}

// A raw copy of a vector as its record.
template <class Load>
__device__ Outcome encode_raw(const SideShape &side, Load &&load, int lane, GenericScratch &s) {
  const int n = side.head_dim;
  const float limit = raw_limit(side.raw_type);
  bool finite = true, clamped = false;
  for (int c = lane; c < n; c += 32) {
    const float x = load(c);
    finite = finite && isfinite(x);
    clamped = clamped || fabsf(x) > limit;
    store_element(s.record, side.raw_type, c, x < -limit ? -limit : x > limit ? limit : x);
  }
  finite = __all_sync(kAll, finite);
  clamped = __any_sync(kAll, clamped);
  if (!finite) {
    for (int c = lane; c < n; c += 32) store_element(s.record, side.raw_type, c, 0);
  }
  __syncwarp();
  return !finite ? kNonFinite : clamped ? kClamped : kFine;
}

// Calls move(offset in the tile's codes, byte of the record) for the bytes that this lane handles.
template <class Move>
__device__ void for_each_byte(const SideShape &side, int row, int lane, Move &&move) {
  const int bytes = record_bytes(side.head_dim, side.bits), first = plane_bytes(side.head_dim, side.bits, 0);
  for (int e = lane; e < bytes; e += 32) {
    const int plane = e >= first, start = plane * first, in_plane = plane ? bytes - first : first;
    const bool interleaved = side.is_v && side.bits != kRawBits;
    move(kTileTokens * start + (interleaved ? v_plane_offset(in_plane, e - start, row) : row * in_plane + e - start),
         e);
  }
}

__device__ inline void write_tile(const SideShape &side, const Tiles &tiles, int64_t slot, int head, int lane,
                                  const uint8_t *record, float scale, Outcome *outcome) {
  uint8_t *tile = tile_at(tiles, slot, head);
  const int row = int(slot % kTileTokens);
  for_each_byte(side, row, lane, [&](int at, int e) { tile[tiles.codes_offset + at] = record[e]; });
  const int bytes = scale_bytes(side);
  if (bytes == 0 || lane != 0) return;
  const Outcome stored = store_scale(scale, side.scale_type, tile + tiles.scales_offset + row * bytes);
  if (*outcome == kFine) *outcome = stored;
}

// The side of exact pages.
__device__ inline SideShape raw_shape(const SideShape &side) {
  return {side.head_dim, kRawBits, 0, side.raw_type, side.is_v};
}

__global__ void __launch_bounds__(32 * kGenericWarps) encode_generic_kernel(const __grid_constant__ VectorCall call) {
  __shared__ GenericScratch scratch[kGenericWarps];
  const int lane = threadIdx.x % 32;
  GenericScratch &s = scratch[threadIdx.x / 32];
  const VectorSide &v = call.side[blockIdx.y];
  const SideParams &side = v.side;
  const int n = side.head_dim;
  const int64_t vectors = call.tokens * call.heads;
  for (int64_t vector = int64_t{blockIdx.x} * kGenericWarps + threadIdx.x / 32; vector < vectors;
       vector += int64_t{gridDim.x} * kGenericWarps) {
    const int64_t token = vector / call.heads;
    const int head = int(vector % call.heads);
    Slots slots;
    if (call.slots != nullptr) {
      slots = read_slots(call, v, token);
      if (slots.bad) {
        if (lane == 0 && head == 0 && v.counts_slots) count_fault(call.faults, TQ_FAULT_SLOT, call.first_token + token);
        continue;
      }
    }
    const int64_t row = token * v.rows.token_stride + head * v.rows.head_stride;
    const float *offset = v.offset == nullptr ? nullptr : v.offset + head * n;
    const auto original = [&](int c) { return load_element(v.rows.data, v.rows.type, row + c); };
    const auto coded = [&](int c) {
      if (v.rotated != nullptr) return v.rotated[vector * n + c];
      return offset == nullptr ? original(c) : original(c) - offset[c];
    };
    Outcome outcome = kFine;
    if (call.slots == nullptr || slots.coded != -1) {
      float scale = 0;
      outcome = side.bits == kRawBits
                    ? encode_raw(side, coded, lane, s)
                    : encode_one(side, v.exponents == nullptr ? nullptr : v.exponents + vector, coded, lane, s, &scale);
      __syncwarp();
      if (call.slots != nullptr) {
        write_tile(side, v.tiles, slots.coded, head, lane, s.record, scale, &outcome);
      } else {
        uint8_t *codes = v.flat.codes + vector * v.flat.codes_stride;
        for (int e = lane; e < record_bytes(n, side.bits); e += 32) codes[e] = s.record[e];
        if (lane == 0 && scale_bytes(side) != 0) {
          const Outcome stored = store_scale(scale, side.scale_type, v.flat.scales + vector * v.flat.scales_stride);
          if (outcome == kFine) outcome = stored;
        }
      }
      __syncwarp();
    }
    if (slots.exact != -1) {
      const SideShape raw = raw_shape(side);
      const Outcome copied = encode_raw(raw, original, lane, s);
      Outcome ignored = kFine;
      write_tile(raw, v.exact, slots.exact, head, lane, s.record, 0, &ignored);
      if (outcome == kFine) outcome = copied;
      __syncwarp();
    }
    if (lane == 0) count_outcome(call.faults, outcome, call.first_token + token);
  }
}

__device__ inline void read_tile(const SideShape &side, const Tiles &tiles, int64_t slot, int head, int lane,
                                 uint8_t *record, float *scale) {
  const uint8_t *tile = tile_at(tiles, slot, head);
  const int row = int(slot % kTileTokens);
  for_each_byte(side, row, lane, [&](int at, int e) { record[e] = tile[tiles.codes_offset + at]; });
  const int bytes = scale_bytes(side);
  *scale = bytes == 0 ? 1.0f : load_scale(side.scale_type, tile + tiles.scales_offset + row * bytes);
}

// The record becomes values in s.a.
__device__ inline void decode_raw(const SideShape &side, int lane, GenericScratch &s) {
  __syncwarp();
  for (int c = lane; c < side.head_dim; c += 32) s.a[c] = load_element(s.record, side.raw_type, c);
  __syncwarp();
}

__device__ inline void decode_one(const SideParams &side, float scale, int lane, GenericScratch &s) {
  if (side.bits == kRawBits) return decode_raw(side, lane, s);
  const int n = side.head_dim;
  __syncwarp();
  for (int c = lane; c < n; c += 32) {
    const unsigned code = get_code(s.record, n, side.bits, c);
    s.a[c] = side.bits == 8 ? float(2 * int(int8_t(code)) + 1) : side.levels[code];
  }
  __syncwarp();
  rotate_back(side, lane, s.a, s.b);
  const float gain = decode_gain(scale, side.decode_gain);
  for (int c = lane; c < n; c += 32) {
    const bool flipped = side.rounds > 0 && (side.signs[0][c >> 5] >> (c & 31) & 1) != 0;
    const float x = __fmaf_rn(flipped ? -s.a[c] : s.a[c], gain, 0.0f);
    s.a[c] = flipped ? -x : x;
  }
  __syncwarp();
}

// `rows`: where dense rotations left the values, or null.
__global__ void __launch_bounds__(32 * kGenericWarps)
    decode_generic_kernel(const __grid_constant__ VectorCall call, const float *rows) {
  __shared__ GenericScratch scratch[kGenericWarps];
  const int lane = threadIdx.x % 32;
  GenericScratch &s = scratch[threadIdx.x / 32];
  const VectorSide &v = call.side[blockIdx.y];
  const SideParams &side = v.side;
  const int n = side.head_dim;
  const int64_t vectors = call.tokens * call.heads;
  for (int64_t vector = int64_t{blockIdx.x} * kGenericWarps + threadIdx.x / 32; vector < vectors;
       vector += int64_t{gridDim.x} * kGenericWarps) {
    const int64_t token = vector / call.heads;
    const int head = int(vector % call.heads);
    const int64_t row = token * v.rows.token_stride + head * v.rows.head_stride;
    Slots slots;
    float scale = 0;
    bool coded = true;
    if (call.slots != nullptr) {
      slots = read_load_slots(call, v, token);
      if (slots.bad) {
        if (lane == 0 && head == 0 && v.counts_slots) count_fault(call.faults, TQ_FAULT_SLOT, call.first_token + token);
        for (int c = lane; c < n; c += 32) store_element(v.rows.data, v.rows.type, row + c, 0);
        continue;
      }
      coded = slots.coded != -1;
      if (!coded && slots.exact == -1) continue;
    }
    if (!coded) {
      const SideShape raw = raw_shape(side);
      read_tile(raw, v.exact, slots.exact, head, lane, s.record, &scale);
      decode_raw(raw, lane, s);
    } else if (rows != nullptr) {
      for (int c = lane; c < n; c += 32) s.a[c] = rows[vector * n + c];
      __syncwarp();
    } else {
      if (call.slots != nullptr) {
        read_tile(side, v.tiles, slots.coded, head, lane, s.record, &scale);
      } else {
        const uint8_t *codes = v.flat.codes + vector * v.flat.codes_stride;
        for (int e = lane; e < record_bytes(n, side.bits); e += 32) s.record[e] = codes[e];
        if (side.bits != kRawBits) scale = load_scale(side.scale_type, v.flat.scales + vector * v.flat.scales_stride);
      }
      decode_one(side, scale, lane, s);
    }
    const float *offset = coded && v.offset != nullptr ? v.offset + head * n : nullptr;
    for (int c = lane; c < n; c += 32) {
      store_element(v.rows.data, v.rows.type, row + c, offset == nullptr ? s.a[c] : s.a[c] + offset[c]);
    }
    __syncwarp();
  }
}

// Before a dense rotation: finite rows of any magnitude become rows whose largest value is in [1, 2).
__global__ void __launch_bounds__(32 * kGenericWarps)
    prepare_kernel(const __grid_constant__ VectorCall call, int which, float *rows, int32_t *exponents) {
  const int lane = threadIdx.x % 32;
  const VectorSide &v = call.side[which];
  const int n = v.side.head_dim;
  const int64_t vectors = call.tokens * call.heads;
  for (int64_t vector = int64_t{blockIdx.x} * kGenericWarps + threadIdx.x / 32; vector < vectors;
       vector += int64_t{gridDim.x} * kGenericWarps) {
    const int64_t token = vector / call.heads;
    const int head = int(vector % call.heads);
    const int64_t row = token * v.rows.token_stride + head * v.rows.head_stride;
    constexpr int kPerLane = kMaxDim / 32;
    float x[kPerLane], largest = 0;
    bool finite = true;
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      const int c = lane + 32 * k;
      x[k] = 0;
      if (c < n) x[k] = load_element(v.rows.data, v.rows.type, row + c);
      if (c < n && v.offset != nullptr) x[k] = x[k] - v.offset[head * n + c];
      finite = finite && isfinite(x[k]);
      largest = fmaxf(largest, fabsf(x[k]));
    }
    largest = warp_max(largest);
    finite = __all_sync(kAll, finite);
    const int exponent = !finite ? kNonFiniteRow : largest == 0 ? kZeroRow : exponent_of(largest);
    if (lane == 0) exponents[vector] = exponent;
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      const int c = lane + 32 * k;
      if (c < n) rows[vector * n + c] = !finite || largest == 0 ? 0 : times_power_of_two(x[k], -exponent);
    }
  }
}

}  // namespace tqkv::cuda
