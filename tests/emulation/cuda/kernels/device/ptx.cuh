// SPDX-License-Identifier: Apache-2.0
// Stands in for kernels/device/ptx.cuh: the same functions with the meaning that the PTX manual gives the instructions,
// and matrix products, which the kernels to come are written with.
#pragma once

#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

namespace tqkv::cuda {

// The shared memory that the launch asked for.
inline void *dynamic_shared() {
  return ::emulation::dynamic_shared();
}

// Where shared memory's addresses count from: a block's own begins after a kilobyte, as on a device.
inline uintptr_t shared_window() {
  return reinterpret_cast<uintptr_t>(dynamic_shared()) - 1024;
}

inline uint32_t pinned(uint32_t x) {
  return x;
}
inline int thread_index_now() {
  return int(threadIdx.x);
}

inline uint32_t shared_address(const void *pointer) {
  const uintptr_t offset = reinterpret_cast<uintptr_t>(pointer) - shared_window();
  if (offset != uint32_t(offset)) ::emulation::stop("%p is not in shared memory", pointer);
  return uint32_t(offset);
}

// ld.shared.u8
inline uint32_t load_shared_byte(uint32_t address) {
  return *reinterpret_cast<const uint8_t *>(shared_window() + address);
}

// ld.shared.u32
inline uint32_t load_shared_word(uint32_t address) {
  return *reinterpret_cast<const uint32_t *>(shared_window() + address);
}

// ld.global.nc
inline uint4 load_once(const void *global) {
  return __ldg(static_cast<const uint4 *>(global));
}

// cp.async
inline void copy_to_shared(uint32_t shared, const void *global) {
  ::emulation::async_copy(reinterpret_cast<void *>(shared_window() + shared), global, false, 8);
}
inline void copies_wait() {
  ::emulation::copies_wait();
}

inline void prefetch_l1(const void *) {}
inline void prefetch_l2(const void *) {}

inline void keep_branch() {}

inline int current_lane() {
  return int(::emulation::lane());
}

// prmt.b32, default mode: a selector's bit 3 takes the sign of the byte, eight times.
inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t result = __byte_perm(a, b, selector & 0x7777);
  for (int i = 0; i < 32; i += 8) {
    const uint32_t byte = 0xffu << i;
    if (selector >> (i / 2) & 8) result = (result >> i & 0x80) != 0 ? result | byte : result & ~byte;
  }
  return result;
}

inline uint32_t sign_masks(uint32_t bytes) {
  return permute_bytes(bytes, 0, 0xba98);
}

// cvt.rn to a 16-bit format of `kDigits` significant bits, whose least exponent of a normal number is `kLeast`; a NaN
// becomes 0x7fff.
template <int kDigits, int kLeast>
uint32_t round_to_16_bits(float x) {
  const uint32_t sign = signbit(x) ? 0x8000 : 0;
  constexpr uint32_t kOne = 1u << (kDigits - 1), kInfinity = uint32_t(3 - 2 * kLeast) << (kDigits - 1);
  if (isnan(x)) return 0x7fff;
  if (isinf(x)) return sign | kInfinity;
  if (x == 0) return sign;
  const int exponent = std::max(ilogbf(x), kLeast);
  // In units of the last place; what rounds up to the next power of two, or to infinity, carries into the exponent.
  const double units = nearbyint(ldexp(fabs(double(x)), kDigits - 1 - exponent));
  return sign | std::min(uint32_t(exponent - kLeast) * kOne + uint32_t(units), kInfinity);
}

// cvt.rn.f16x2.f32, cvt.rn.bf16x2.f32
inline uint32_t pack_f16(float low, float high) {
  return round_to_16_bits<11, -14>(high) << 16 | round_to_16_bits<11, -14>(low);
}
inline uint32_t pack_bf16(float low, float high) {
  return round_to_16_bits<8, -126>(high) << 16 | round_to_16_bits<8, -126>(low);
}

// cvt.pack.sat.{u2,u4,s4}.s32.b32
template <int kBits, int kLeast>
uint32_t pack_saturated(int32_t high, int32_t low, uint32_t rest) {
  constexpr int kCount = 1 << kBits;
  const auto field = [](int32_t x) {
    return uint32_t(std::clamp(x, kLeast, kLeast + kCount - 1)) & uint32_t(kCount - 1);
  };
  return rest << (2 * kBits) | field(high) << kBits | field(low);
}
inline uint32_t pack_u2(int32_t high, int32_t low, uint32_t rest) {
  return pack_saturated<2, 0>(high, low, rest);
}
inline uint32_t pack_u4(int32_t high, int32_t low, uint32_t rest) {
  return pack_saturated<4, 0>(high, low, rest);
}
inline uint32_t pack_s4(int32_t high, int32_t low, uint32_t rest) {
  return pack_saturated<4, -8>(high, low, rest);
}

inline void f32_pair_from_f16(uint32_t packed, float &low, float &high) {
  low = __half2float(__ushort_as_half(uint16_t(packed)));
  high = __half2float(__ushort_as_half(uint16_t(packed >> 16)));
}

// ex2.approx.ftz.f32, rcp.approx.ftz.f32: as exact as the host's, which a device is not.
inline float flush_subnormal(float x) {
  return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x;
}
inline float exp2_approx(float x) {
  return flush_subnormal(exp2f(x));
}
inline float log2_approx(float x) {
  return log2f(x);
}

inline float divide_usual(float a, float b) {
  return a / b;
}
inline float root_usual(float x) {
  return std::sqrt(x);
}
inline float reciprocal_approx(float x) {
  return flush_subnormal(1.0f / flush_subnormal(x));
}

// movmatrix.sync.aligned.m8n8.trans.b16, all 32 lanes together: of a matrix of 16-bit numbers whose row g lanes 4 g + t have,
// columns 2 t and 2 t + 1 each, its transpose.
inline uint32_t transpose_halves(uint32_t row) {
  uint32_t column = 0;
  struct Words {
    uint32_t row, *column;
  } mine{row, &column};
  ::emulation::collective("movmatrix", 0xffffffff, mine, [](const ::emulation::Exchanges<Words> &all) {
    all.for_each([&](unsigned lane, Words &words) {
      for (unsigned i = 0; i < 2; ++i) {
        const unsigned r = lane % 4 * 2 + i, c = lane / 4;
        *words.column |= (all[4 * r + c / 2].row >> (16 * (c % 2)) & 0xffff) << (16 * i);
      }
    });
  });
  return column;
}

// mma.sync.aligned.m16n8k32.row.col.s32.{u8,s8}.{u8,s8}.s32: d = A B + c, A [16, 32] of bytes A, B [32, 8] of bytes B,
// all 32 lanes together. Of lane 4 g + t (g = 0 .. 7, t = 0 .. 3):
//   a[0], a[2]: row g, columns 4 t .. 4 t + 3 and those + 16; a[1], a[3]: the same of row g + 8
//   b[0], b[1]: column g, rows 4 t .. 4 t + 3 and those + 16
//   c, d [0], [1]: row g, columns 2 t and 2 t + 1; [2], [3]: the same of row g + 8
// Sums wrap around.
template <class A, class B>
void mma_m16n8k32(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const int32_t (&c)[4]) {
  static_assert(std::is_same_v<A, uint8_t> || std::is_same_v<A, int8_t>);
  static_assert(std::is_same_v<B, uint8_t> || std::is_same_v<B, int8_t>);
  struct Fragments {
    const uint32_t *a, *b;
    const int32_t *c;
    int32_t *d;
  } mine{a, b, c, d};
  ::emulation::collective("mma.m16n8k32", 0xffffffff, mine, [](const ::emulation::Exchanges<Fragments> &all) {
    const auto byte = [](uint32_t word, unsigned k) { return word >> (8 * (k % 4)); };
    uint32_t product[16][8] = {};
    for (unsigned row = 0; row < 16; ++row) {
      for (unsigned column = 0; column < 8; ++column) {
        for (unsigned k = 0; k < 32; ++k) {
          const unsigned t = k % 16 / 4;
          const A x = A(byte(all[4 * (row % 8) + t].a[row / 8 + 2 * (k / 16)], k));
          const B y = B(byte(all[4 * column + t].b[k / 16], k));
          product[row][column] += uint32_t(int(x) * int(y));
        }
      }
    }
    all.for_each([&](unsigned lane, Fragments &f) {
      for (unsigned i = 0; i < 4; ++i) {
        f.d[i] = int32_t(product[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] + uint32_t(f.c[i]));
      }
    });
  });
}

inline double f64_from_f16(uint32_t bits) {
  const uint32_t exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double size = exponent == 0 ? ldexp(double(mantissa), -24) : ldexp(double(1024 + mantissa), int(exponent) - 25);
  return (bits & 0x8000) != 0 ? -size : size;
}

// mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 of finite numbers whose sums are exact; stops at one that is not. Of
// lane 4 g + t:
//   a[0], a[2]: row g, columns 2 t, 2 t + 1 and those + 8; a[1], a[3]: the same of row g + 8
//   b[0], b[1]: column g, rows 2 t, 2 t + 1 and those + 8
//   c, d: as above
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
  struct Fragments {
    const uint32_t *a, *b;
    const float *c;
    float *d;
  } mine{a, b, c, d};
  ::emulation::collective("mma.m16n8k16", 0xffffffff, mine, [](const ::emulation::Exchanges<Fragments> &all) {
    const auto half = [](uint32_t word, unsigned k) { return f64_from_f16(word >> (16 * (k % 2)) & 0xffff); };
    double product[16][8] = {};
    for (unsigned row = 0; row < 16; ++row) {
      for (unsigned column = 0; column < 8; ++column) {
        for (unsigned k = 0; k < 16; ++k) {
          const unsigned t = k % 8 / 2;
          product[row][column] +=
              half(all[4 * (row % 8) + t].a[row / 8 + 2 * (k / 8)], k) * half(all[4 * column + t].b[k / 8], k);
        }
      }
    }
    all.for_each([&](unsigned lane, Fragments &f) {
      for (unsigned i = 0; i < 4; ++i) {
        const double sum = product[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] + double(f.c[i]);
        if (double(float(sum)) != sum) ::emulation::stop("mma.m16n8k16: %a is no f32 number", sum);
        f.d[i] = float(sum);
      }
    });
  });
}

// wgmma.mma_async.sync.aligned.m64n{64,32}k16.f32.f16.f16, of one of a warpgroup's warps, as mma.m16n8k16; done at once. b: B
// [16, kColumns] in shared memory as matrices [8 columns][8 rows], the first one's address, the strides to that of the
// other 8 rows and to that of the next 8 columns, in units of 16 bytes.
inline constexpr bool kHasWgmma = true;
inline uint64_t wgmma_descriptor(uint32_t address, uint32_t rows_stride, uint32_t columns_stride) {
  return address >> 4 | uint64_t{rows_stride >> 4} << 16 | uint64_t{columns_stride >> 4} << 32;
}
inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int kLeft, int kCount>
void wgmma_wait(float (&)[kCount]) {}
inline void wgmma_memory_fence() {}
template <int kColumns, bool kFirst, bool kMinus>
void wgmma_m64k16(float (&d)[kColumns / 2], const uint32_t (&a)[4], uint64_t b) {
  struct Fragments {
    const uint32_t *a;
    float *d;
    uint64_t b;
  } mine{a, d, b};
  ::emulation::collective("wgmma.m64k16", 0xffffffff, mine, [](const ::emulation::Exchanges<Fragments> &all) {
    const uint64_t descriptor = all[0].b;
    all.for_each([&](unsigned, Fragments &f) {
      if (f.b != descriptor) ::emulation::stop("wgmma.m64k16: descriptors differ");
    });
    double x[16][16];
    for (unsigned row = 0; row < 16; ++row) {
      for (unsigned k = 0; k < 16; ++k) {
        const uint32_t word = all[4 * (row % 8) + k % 8 / 2].a[row / 8 + 2 * (k / 8)];
        x[row][k] = f64_from_f16(word >> (16 * (k % 2)) & 0xffff);
      }
    }
    const uintptr_t base = shared_window() + 16 * (descriptor & 0x3fff);
    const uintptr_t rows_stride = 16 * (descriptor >> 16 & 0x3fff), columns_stride = 16 * (descriptor >> 32 & 0x3fff);
    for (unsigned column = 0; column < kColumns; ++column) {
      double y[16];
      for (unsigned k = 0; k < 16; ++k) {
        const uintptr_t at = base + k / 8 * rows_stride + column / 8 * columns_stride + 16 * (column % 8) + 2 * (k % 8);
        y[k] = f64_from_f16(*reinterpret_cast<const uint16_t *>(at)) * (kMinus ? -1 : 1);
      }
      for (unsigned row = 0; row < 16; ++row) {
        float &to = all[4 * (row % 8) + column % 8 / 2].d[column / 8 * 4 + row / 8 * 2 + column % 2];
        double sum = kFirst ? 0.0 : double(to);
        for (unsigned k = 0; k < 16; ++k) sum += x[row][k] * y[k];
        if (double(float(sum)) != sum) ::emulation::stop("wgmma.m64k16: %a is no f32 number", sum);
        to = float(sum);
      }
    }
  });
}

inline double f64_from_bf16(uint32_t bits) {
  return double(std::bit_cast<float>(bits << 16));
}

template <bool kBf16>
double f64_from_half(uint32_t bits) {
  if (kBf16) return f64_from_bf16(bits);
  if ((bits & 0x7c00) != 0x7c00) return f64_from_f16(bits);
  return (bits & 1023) != 0 ? double(NAN) : (bits & 0x8000) != 0 ? -HUGE_VAL : HUGE_VAL;
}

// wgmma.m64k16 of f16 or bf16, d += A B or d = A B: sums in double precision, rounded once. The warp's rows of A are in
// registers, or null where `a_descriptor` tells where they are.
template <bool kBf16, int kColumns, bool kFirst, bool kTransposed>
void wgmma_rounded(float (&d)[kColumns / 2], const uint32_t *a, uint64_t a_descriptor, uint64_t b) {
  struct Fragments {
    const uint32_t *a;
    float *d;
    uint64_t a_descriptor, b;
    unsigned warp;
  } mine{a, d, a_descriptor, b, ::emulation::position.thread.x / 32 % 4};
  ::emulation::collective("wgmma.m64k16", 0xffffffff, mine, [](const ::emulation::Exchanges<Fragments> &all) {
    const uint64_t left = all[0].a_descriptor, right = all[0].b;
    all.for_each([&](unsigned, Fragments &f) {
      if (f.a_descriptor != left || f.b != right) ::emulation::stop("wgmma.m64k16: descriptors differ");
    });
    // Matrices of 8 rows of 16 bytes: (x, y) is y % 8 of row x % 8 of one of them.
    const auto element = [](uint64_t descriptor, unsigned x, unsigned y, uint64_t x_stride, uint64_t y_stride) {
      const uintptr_t at = shared_window() + 16 * (descriptor & 0x3fff) + x / 8 * 16 * x_stride +
                           y / 8 * 16 * y_stride + 16 * (x % 8) + 2 * (y % 8);
      return f64_from_half<kBf16>(*reinterpret_cast<const uint16_t *>(at));
    };
    const auto k_stride = [](uint64_t descriptor) { return descriptor >> 16 & 0x3fff; };
    const auto other_stride = [](uint64_t descriptor) { return descriptor >> 32 & 0x3fff; };
    double x[16][16];
    for (unsigned row = 0; row < 16; ++row) {
      for (unsigned k = 0; k < 16; ++k) {
        const uint32_t *words = all[4 * (row % 8) + k % 8 / 2].a;
        x[row][k] = words == nullptr ? element(left, 16 * all[0].warp + row, k, other_stride(left), k_stride(left))
                                     : f64_from_half<kBf16>(words[row / 8 + 2 * (k / 8)] >> (16 * (k % 2)) & 0xffff);
      }
    }
    for (unsigned column = 0; column < kColumns; ++column) {
      double y[16];
      for (unsigned k = 0; k < 16; ++k) {
        y[k] = kTransposed ? element(right, k, column, k_stride(right), other_stride(right))
                           : element(right, column, k, other_stride(right), k_stride(right));
      }
      for (unsigned row = 0; row < 16; ++row) {
        float &to = all[4 * (row % 8) + column % 8 / 2].d[column / 8 * 4 + row / 8 * 2 + column % 2];
        double sum = kFirst ? 0.0 : double(to);
        for (unsigned k = 0; k < 16; ++k) sum += x[row][k] * y[k];
        to = float(sum);
      }
    }
  });
}
template <bool kBf16, bool kFirst>
void wgmma_m64n64k16_shared(float (&d)[32], uint64_t a, uint64_t b) {
  wgmma_rounded<kBf16, 64, kFirst, false>(d, nullptr, a, b);
}
template <bool kBf16, int kColumns>
void wgmma_m64k16_transposed(float (&d)[kColumns / 2], const uint32_t (&a)[4], uint64_t b) {
  wgmma_rounded<kBf16, kColumns, false, true>(d, a, 0, b);
}

// mma.sync.aligned.m16n8k16 of f16 or bf16, d += A B: sums in double precision, rounded once.
template <bool kBf16>
void mma_add_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Fragments {
    uint32_t a[4], b[2];
    float *d;
  } mine{{a[0], a[1], a[2], a[3]}, {b0, b1}, d};
  ::emulation::collective("mma_add.m16n8k16", 0xffffffff, mine, [](const ::emulation::Exchanges<Fragments> &all) {
    double left[16][16], right[16][8];
    const auto half = [](uint32_t word, unsigned k) { return f64_from_half<kBf16>(word >> (16 * (k % 2)) & 0xffff); };
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned t = k % 8 / 2;
      for (unsigned row = 0; row < 16; ++row) left[row][k] = half(all[4 * (row % 8) + t].a[row / 8 + 2 * (k / 8)], k);
      for (unsigned column = 0; column < 8; ++column) right[k][column] = half(all[4 * column + t].b[k / 8], k);
    }
    all.for_each([&](unsigned lane, Fragments &f) {
      for (unsigned i = 0; i < 4; ++i) {
        const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        double sum = double(f.d[i]);
        for (unsigned k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
        f.d[i] = float(sum);
      }
    });
  });
}

// ldmatrix.x4: lane 8 m + i names row i, of 16 bytes, of matrix m.
template <bool kTransposed>
void load_matrices_of(uint32_t (&d)[4], uint32_t address) {
  struct Lane {
    const uint16_t *row;
    uint32_t *d;
  } mine{reinterpret_cast<const uint16_t *>(shared_window() + address), d};
  if (address % 16 != 0) ::emulation::stop("ldmatrix: %#x is not aligned", address);
  ::emulation::collective(
      kTransposed ? "ldmatrix.trans" : "ldmatrix", 0xffffffff, mine, [](const ::emulation::Exchanges<Lane> &all) {
        all.for_each([&](unsigned lane, Lane &to) {
          const unsigned g = lane / 4, t = lane % 4;
          for (unsigned m = 0; m < 4; ++m) {
            uint32_t word = 0;
            for (unsigned i = 0; i < 2; ++i) {
              const unsigned row = kTransposed ? 2 * t + i : g, column = kTransposed ? g : 2 * t + i;
              word |= uint32_t{all[8 * m + row].row[column]} << (16 * i);
            }
            to.d[m] = word;
          }
        });
      });
}
inline void load_matrices(uint32_t (&d)[4], uint32_t address) {
  load_matrices_of<false>(d, address);
}
inline void load_matrices_transposed(uint32_t (&d)[4], uint32_t address) {
  load_matrices_of<true>(d, address);
}

// fma.rn.f16x2 where the sums are exact in double.
inline uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  float sum[2];
  for (int i = 0; i < 2; ++i) {
    const auto half = [&](uint32_t word) { return f64_from_f16(word >> (16 * i) & 0xffff); };
    const double exact = half(a) * half(b) + half(c);
    sum[i] = float(exact);
    if (double(sum[i]) != exact) ::emulation::stop("fma.f16x2: %a would be rounded twice", exact);
  }
  return pack_f16(sum[0], sum[1]);
}

// bar.sync, mbarrier, cp.async.bulk: block.hpp
inline void group_barrier(int id, int threads) {
  ::emulation::group_barrier(id, threads);
}
template <int kRegisters, bool kMore>
void set_registers() {}
inline bool elected() {
  int all = 0;
  ::emulation::collective("elect.sync", ~0u, all, [](auto) {});
  return ::emulation::lane() == 0;
}
inline void barrier_init(uint64_t *barrier, uint32_t count) {
  ::emulation::barrier_init(barrier, count);
}
inline void barrier_init_fence() {
  ::emulation::barrier_init_fence();
}
inline void barrier_arrive(uint64_t *barrier, uint32_t count = 1) {
  ::emulation::barrier_arrive(barrier, 0, count);
}
inline void barrier_expect(uint64_t *barrier, uint32_t bytes) {
  ::emulation::barrier_expect(barrier, bytes);
}
inline void barrier_arrive_expect(uint64_t *barrier, uint32_t bytes) {
  ::emulation::barrier_arrive(barrier, bytes, 1);
}
inline void barrier_wait(uint64_t *barrier, uint32_t parity) {
  ::emulation::barrier_wait(barrier, parity);
}
inline void bulk_copy(void *shared, const void *global, uint32_t bytes, uint64_t *barrier) {
  ::emulation::bulk_copy(shared, global, bytes, barrier);
}

// cp.async
inline void async_copy(void *shared, const void *global, bool zeros) {
  ::emulation::async_copy(shared, global, zeros);
}
inline void barrier_arrive_copied(uint64_t *barrier) {
  ::emulation::barrier_arrive_copied(barrier);
}

inline void bulk_copy_fence() {}

inline void add_released(uint32_t *count) {
  atomicAdd(count, 1);
}
inline uint32_t load_acquired(const uint32_t *count) {
  return *count;
}

// griddepcontrol: one kernel runs after the other.
inline void grid_dependency_wait() {}
inline void grid_dependency_launch() {}

}  // namespace tqkv::cuda
