// SPDX-License-Identifier: Apache-2.0
// The PTX instructions that C++ has no expression for. No other file has inline assembly.
#pragma once

#include <cstdint>
#include <type_traits>

namespace tqkv::cuda {

// The address of shared memory that ld.shared takes.
__device__ __forceinline__ uint32_t shared_address(const void *pointer) {
  return uint32_t(__cvta_generic_to_shared(pointer));
}

// ld.shared.u8. Not volatile: the compiler may move it, so only for memory that is not written any more.
__device__ __forceinline__ uint32_t load_shared_byte(uint32_t address) {
  uint32_t byte;
  asm("ld.shared.u8 %0, [%1];" : "=r"(byte) : "r"(address));
  return byte;
}

// prefetch.global.L2: brings the line of an address into the L2 cache.
__device__ __forceinline__ void prefetch_l2(const void *address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(address)));
}

// Shared memory whose size the launch gives; 16-byte aligned.
__device__ __forceinline__ void *dynamic_shared() {
  extern __shared__ uint4 memory[];
  return memory;
}

// prmt.b32 in the mode that repeats the sign: 0xff where a byte's highest bit is set, 0 where not.
__device__ __forceinline__ uint32_t sign_masks(uint32_t bytes) {
  uint32_t masks;
  asm("prmt.b32 %0, %1, 0, 0xba98;" : "=r"(masks) : "r"(bytes));
  return masks;
}

// cvt.rn.f16x2.f32 and cvt.rn.bf16x2.f32: two values rounded to a type, `low` in the lower half.
__device__ __forceinline__ uint32_t pack_f16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// mma.sync.aligned.m16n8k32.row.col.s32.{u8,s8}.s8.s32: d = A B + c, A [16, 32] of bytes A, B [32, 8] of signed bytes, all
// 32 lanes together. Of lane 4 g + t (g = 0 .. 7, t = 0 .. 3):
//   a[0], a[2]: row g, columns 4 t .. 4 t + 3 and those + 16; a[1], a[3]: the same of row g + 8
//   b[0], b[1]: column g, rows 4 t .. 4 t + 3 and those + 16
//   c, d [0], [1]: row g, columns 2 t and 2 t + 1; [2], [3]: the same of row g + 8
template <class A, class B>
__device__ __forceinline__ void mma_m16n8k32(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                             const int32_t (&c)[4]) {
  static_assert(sizeof(A) == 1 && std::is_same_v<B, int8_t>);
  if constexpr (std::is_same_v<A, int8_t>) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
  } else {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
  }
}

// mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32: d = A B + c, A [16, 16] and B [16, 8] of f16, subnormal ones
// included, all 32 lanes together; exact where every sum is. Of lane 4 g + t:
//   a[0], a[2]: row g, columns 2 t, 2 t + 1 and those + 8; a[1], a[3]: the same of row g + 8
//   b[0], b[1]: column g, rows 2 t, 2 t + 1 and those + 8
//   c, d: as above
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                             const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

}  // namespace tqkv::cuda
