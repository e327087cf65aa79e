// SPDX-License-Identifier: Apache-2.0
// The PTX instructions that C++ has no expression for. No other file has inline assembly.
#pragma once

#include <cstdint>
#include <type_traits>

namespace tqkv::cuda {

// threadIdx.x, read again: what is computed from it needs no registers before. Not negative, so parts of it are shifts.
__device__ __forceinline__ int thread_index_now() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  __builtin_assume(index >= 0 && index < 1024);
  return index;
}

// x, which the compiler shall keep in a register: it cannot know how to compute it anew.
__device__ __forceinline__ uint32_t pinned(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

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

// ld.global.nc of what nobody reads again, in its turn: the compiler does not put it off.
__device__ __forceinline__ uint4 load_once(const void *global) {
  uint4 words;
  asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(__cvta_generic_to_global(global))
               : "memory");
  return words;
}

// cp.async: the thread copies 8 bytes, which are there for it after copies_wait().
__device__ __forceinline__ void copy_to_shared(uint32_t shared, const void *global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared), "l"(__cvta_generic_to_global(global))
               : "memory");
}
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// prefetch.global: brings the line of an address into the L1 or the L2 cache.
__device__ __forceinline__ void prefetch_l1(const void *address) {
  asm volatile("prefetch.global.L1 [%0];" ::"l"(__cvta_generic_to_global(address)));
}
__device__ __forceinline__ void prefetch_l2(const void *address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(address)));
}

// Shared memory whose size the launch gives; 16-byte aligned.
__device__ __forceinline__ void *dynamic_shared() {
  extern __shared__ uint4 memory[];
  return memory;
}

// Work that is seldom done stays behind a branch, instead of being done in vain.
__device__ __forceinline__ void keep_branch() {
  asm volatile("");
}

// The lane, worked out where it is asked for: what follows from it does not stay in registers from before a loop.
__device__ __forceinline__ int current_lane() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
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

// cvt.pack.sat: rest << 2 n | high << n | low, with the nearest number of n bits to each of the two: unsigned ones of 2 or
// 4 bits, signed ones of 4.
__device__ __forceinline__ uint32_t pack_u2(int32_t high, int32_t low, uint32_t rest) {
  uint32_t packed;
  asm("cvt.pack.sat.u2.s32.b32 %0, %1, %2, %3;" : "=r"(packed) : "r"(high), "r"(low), "r"(rest));
  return packed;
}
__device__ __forceinline__ uint32_t pack_u4(int32_t high, int32_t low, uint32_t rest) {
  uint32_t packed;
  asm("cvt.pack.sat.u4.s32.b32 %0, %1, %2, %3;" : "=r"(packed) : "r"(high), "r"(low), "r"(rest));
  return packed;
}
__device__ __forceinline__ uint32_t pack_s4(int32_t high, int32_t low, uint32_t rest) {
  uint32_t packed;
  asm("cvt.pack.sat.s4.s32.b32 %0, %1, %2, %3;" : "=r"(packed) : "r"(high), "r"(low), "r"(rest));
  return packed;
}

// The two f16 numbers of a word.
__device__ __forceinline__ void f32_pair_from_f16(uint32_t packed, float &low, float &high) {
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
      : "=f"(low), "=f"(high)
      : "r"(packed));
}

// ex2.approx.ftz.f32 and rcp.approx.ftz.f32: 2^x and 1/x within 2 and 1 ulp; subnormal numbers are zeros.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// lg2.approx.ftz.f32.
__device__ __forceinline__ float log2_approx(float x) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// a / b and sqrt(x) as IEEE rounds them, without the branches of `/` and sqrtf() for what is far from 1: what they do for
// all but that. For b and a / b of 2^-100 .. 2^100, x of 2^-100 .. 2^100, and a zero; of others the result is wrong.
__device__ __forceinline__ float divide_usual(float a, float b) {
  const float approx = reciprocal_approx(b);
  const float inverse = __fmaf_rn(approx, __fmaf_rn(-b, approx, 1.0f), approx);
  const float first = a * inverse, quotient = __fmaf_rn(inverse, __fmaf_rn(-b, first, a), first);
  return __fmaf_rn(inverse, __fmaf_rn(-b, quotient, a), quotient);
}
__device__ __forceinline__ float root_usual(float x) {
  float inverse;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  const float root = x * inverse, half = inverse * 0.5f;
  return __fmaf_rn(__fmaf_rn(-root, root, x), half, root);
}

// movmatrix.sync.aligned.m8n8.trans.b16, all 32 lanes together: of a matrix of 16-bit numbers whose row g lanes 4 g + t have,
// columns 2 t and 2 t + 1 each, its transpose.
__device__ __forceinline__ uint32_t transpose_halves(uint32_t row) {
  uint32_t column;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(column) : "r"(row));
  return column;
}

// mma.sync.aligned.m16n8k32.row.col.s32.{u8,s8}.{u8,s8}.s32: d = A B + c, A [16, 32] of bytes A, B [32, 8] of bytes B,
// all 32 lanes together. Of lane 4 g + t (g = 0 .. 7, t = 0 .. 3):
//   a[0], a[2]: row g, columns 4 t .. 4 t + 3 and those + 16; a[1], a[3]: the same of row g + 8
//   b[0], b[1]: column g, rows 4 t .. 4 t + 3 and those + 16
//   c, d [0], [1]: row g, columns 2 t and 2 t + 1; [2], [3]: the same of row g + 8
template <class A, class B>
__device__ __forceinline__ void mma_m16n8k32(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                             const int32_t (&c)[4]) {
  static_assert(std::is_same_v<A, uint8_t> || std::is_same_v<A, int8_t>);
  static_assert(std::is_same_v<B, uint8_t> || std::is_same_v<B, int8_t>);
#define TQKV_MMA(types)                                                                                               \
  asm("mma.sync.aligned.m16n8k32.row.col.s32." types ".s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};" \
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])                                                                \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]))
  if constexpr (std::is_same_v<A, int8_t> && std::is_same_v<B, int8_t>) {
    TQKV_MMA("s8.s8");
  } else if constexpr (std::is_same_v<A, int8_t>) {
    TQKV_MMA("s8.u8");
  } else if constexpr (std::is_same_v<B, int8_t>) {
    TQKV_MMA("u8.s8");
  } else {
    TQKV_MMA("u8.u8");
  }
#undef TQKV_MMA
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

// ld.shared.u32, as load_shared_byte.
__device__ __forceinline__ uint32_t load_shared_word(uint32_t address) {
  uint32_t word;
  asm("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address));
  return word;
}

// wgmma.mma_async.sync.aligned.m64n{64,32}k16.f32.f16.f16: d = A B, or d += A B, of a warpgroup: warps 4 i .. 4 i + 3 have
// 16 rows each of A and d; d += A -B where kMinus. Of each warp a is as above; d[4 i .. 4 i + 3] is as above of columns 8 i .. 8 i + 7.
// B [16, kColumns] is in shared memory, as matrices [8 columns][8 rows] of 128 bytes: `b` is a descriptor, of the first
// one's address, the bytes from there to that of the other 8 rows, and to that of the next 8 columns. Until it has been
// waited for, neither a nor d may be touched. Only code for compute capability 9.0a has it.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
inline constexpr bool kHasWgmma = true;
#define TQKV_WGMMA(...) asm volatile(__VA_ARGS__)
#else
inline constexpr bool kHasWgmma = false;
#define TQKV_WGMMA(...) __trap()
#endif

__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t address, uint32_t rows_stride, uint32_t columns_stride) {
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t(rows_stride >> 4) << 16 | uint64_t(columns_stride >> 4) << 32;
}

// Before the first product whose registers were written otherwise.
__device__ __forceinline__ void wgmma_fence() {
  TQKV_WGMMA("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  TQKV_WGMMA("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits for all but the last `kLeft` groups of products, and so for d.
template <int kLeft, int kCount>
__device__ __forceinline__ void wgmma_wait(float (&d)[kCount]) {
  TQKV_WGMMA("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");  // no use of it moves up
}
// For memory that wgmma is to read, between its last store and a barrier.
__device__ __forceinline__ void wgmma_memory_fence() {
  TQKV_WGMMA("fence.proxy.async.shared::cta;" ::: "memory");
}

// Operands of sums: constraints of 4, 16 registers from i on; names of those of 32 and 64 columns.
#define TQKV_D4(c, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define TQKV_D16(c, i) TQKV_D4(c, i), TQKV_D4(c, i + 4), TQKV_D4(c, i + 8), TQKV_D4(c, i + 12)
#define TQKV_N32 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}"
#define TQKV_N64                                                                                                    \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29," \
  "%30,%31}"
template <int kColumns, bool kFirst, bool kMinus>
__device__ __forceinline__ void wgmma_m64k16(float (&d)[kColumns / 2], const uint32_t (&a)[4], uint64_t b) {
  static_assert(kColumns == 64 || kColumns == 32);
#define TQKV_A "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(!kFirst)), "n"(kMinus ? -1 : 1)
  if constexpr (kColumns == 64 && kFirst) {
    TQKV_WGMMA("{ .reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " TQKV_N64
               ", {%32,%33,%34,%35}, %36, p, 1, %38, 0; }"
               : TQKV_D16("=f", 0), TQKV_D16("=f", 16)
               : TQKV_A);
  } else if constexpr (kColumns == 64) {
    TQKV_WGMMA("{ .reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " TQKV_N64
               ", {%32,%33,%34,%35}, %36, p, 1, %38, 0; }"
               : TQKV_D16("+f", 0), TQKV_D16("+f", 16)
               : TQKV_A);
  } else if constexpr (kFirst) {
    TQKV_WGMMA("{ .reg .pred p; setp.ne.b32 p, %21, 0; wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 " TQKV_N32
               ", {%16,%17,%18,%19}, %20, p, 1, %22, 0; }"
               : TQKV_D16("=f", 0)
               : TQKV_A);
  } else {
    TQKV_WGMMA("{ .reg .pred p; setp.ne.b32 p, %21, 0; wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 " TQKV_N32
               ", {%16,%17,%18,%19}, %20, p, 1, %22, 0; }"
               : TQKV_D16("+f", 0)
               : TQKV_A);
  }
#undef TQKV_A
}

// The same with f16 or bf16, whose sums may be rounded towards zero in any order. A [64, 16] in shared memory, as B is, with
// descriptor `a`, rows for columns and columns for rows; d = A B with kFirst, else d += A B.
#define TQKV_D32(c, i) TQKV_D16(c, i), TQKV_D16(c, i + 16)
#define TQKV_N128                                                                                                   \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29," \
  "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,"    \
  "%57,%58,%59,%60,%61,%62,%63}"
#define TQKV_N256                                                                                                   \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29," \
  "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,"    \
  "%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,"    \
  "%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,"   \
  "%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127}"
template <bool kBf16, bool kFirst>
__device__ __forceinline__ void wgmma_m64n64k16_shared(float (&d)[32], uint64_t a, uint64_t b) {
#define TQKV_MMA(c, type, add)                                                                                      \
  TQKV_WGMMA("{ .reg .pred p; setp.ne.b32 p, " add ", 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type \
             " " TQKV_N64 ", %32, %33, p, 1, 1, 0, 0; }"                                                            \
             : TQKV_D32(c, 0)                                                                                       \
             : "l"(a), "l"(b))
  if constexpr (kBf16 && kFirst) {
    TQKV_MMA("=f", "bf16", "0");
  } else if constexpr (kBf16) {
    TQKV_MMA("+f", "bf16", "1");
  } else if constexpr (kFirst) {
    TQKV_MMA("=f", "f16", "0");
  } else {
    TQKV_MMA("+f", "f16", "1");
  }
#undef TQKV_MMA
}

// d += A B, A in registers, B [16, kColumns] transposed: its matrices have a row of B's in 16 bytes.
template <bool kBf16, int kColumns>
__device__ __forceinline__ void wgmma_m64k16_transposed(float (&d)[kColumns / 2], const uint32_t (&a)[4], uint64_t b) {
  static_assert(kColumns == 64 || kColumns == 128 || kColumns == 256);
#define TQKV_MMA(type, columns, list, a0, a1, a2, a3, b0, ...)                                                         \
  TQKV_WGMMA("{ .reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type \
             " " list ", {" a0 "," a1 "," a2 "," a3 "}, " b0 ", p, 1, 1, 1; }"                                         \
             : __VA_ARGS__                                                                                             \
             : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define TQKV_MMA64(type) TQKV_MMA(type, "64", TQKV_N64, "%32", "%33", "%34", "%35", "%36", TQKV_D32("+f", 0))
#define TQKV_MMA128(type) \
  TQKV_MMA(type, "128", TQKV_N128, "%64", "%65", "%66", "%67", "%68", TQKV_D32("+f", 0), TQKV_D32("+f", 32))
#define TQKV_MMA256(type)                                                                                         \
  TQKV_MMA(type, "256", TQKV_N256, "%128", "%129", "%130", "%131", "%132", TQKV_D32("+f", 0), TQKV_D32("+f", 32), \
           TQKV_D32("+f", 64), TQKV_D32("+f", 96))
  if constexpr (kColumns == 64 && kBf16) {
    TQKV_MMA64("bf16");
  } else if constexpr (kColumns == 64) {
    TQKV_MMA64("f16");
  } else if constexpr (kColumns == 128 && kBf16) {
    TQKV_MMA128("bf16");
  } else if constexpr (kColumns == 128) {
    TQKV_MMA128("f16");
  } else if constexpr (kBf16) {
    TQKV_MMA256("bf16");
  } else {
    TQKV_MMA256("f16");
  }
#undef TQKV_MMA64
#undef TQKV_MMA128
#undef TQKV_MMA256
#undef TQKV_MMA
}
#undef TQKV_D4
#undef TQKV_D16
#undef TQKV_D32
#undef TQKV_N32
#undef TQKV_N64
#undef TQKV_N128
#undef TQKV_N256
#undef TQKV_WGMMA

// mma.sync.aligned.m16n8k16 of f16 or bf16 with f32 sums, d += A B: as above, but sums may be rounded towards zero in any
// order.
template <bool kBf16>
__device__ __forceinline__ void mma_add_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#define TQKV_MMA(type)                                             \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type       \
      ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])             \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (kBf16) {
    TQKV_MMA("bf16");
  } else {
    TQKV_MMA("f16");
  }
#undef TQKV_MMA
}

// ldmatrix.x4: four matrices of 8 rows of 16 bytes (8 elements of 16 bits); lane 8 m + i names row i of matrix m. Lane
// 4 g + t gets elements 2 t, 2 t + 1 of row g of each; transposed, rows 2 t and 2 t + 1 of column g.
__device__ __forceinline__ void load_matrices(uint32_t (&d)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(address));
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&d)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(address));
}

// fma.rn.f16x2: a b + c of both halves of the words.
__device__ __forceinline__ uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// What a thread on another multiprocessor has loaded by load_acquired() comes after what this one has seen before its
// add_released(), stores of its warp before __syncwarp() included.
__device__ __forceinline__ void add_released(uint32_t *count) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(__cvta_generic_to_global(count)) : "memory");
}

__device__ __forceinline__ uint32_t load_acquired(const uint32_t *count) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(__cvta_generic_to_global(count)) : "memory");
  return value;
}

// bar.sync: waits until `threads` threads, whole warps of them, have come to barrier `id` (1 .. 15; __syncthreads is 0).
// Orders memory among them.
__device__ __forceinline__ void group_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- Hopper: barriers that count arrivals and copied bytes, copies by hardware, launches that overlap. Code for earlier
// devices compiles, but traps; griddepcontrol does nothing there.
//
// A barrier is an object of 8 bytes in shared memory. Its phases are numbered from 0 and complete one after the other:
// each when `count` threads have arrived and all bytes that they said to expect have been copied. Waiting for a phase
// orders memory after the arrivals and the copies; whoever waits names the phase by its lowest bit, so it must not be two
// phases behind. For the phase before the first (parity 1) nobody has to wait.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define TQKV_HOPPER(...) asm volatile(__VA_ARGS__)
#else
#define TQKV_HOPPER(...) __trap()
#endif

// setmaxnreg: the registers that a thread has from here on, more or fewer than before; by all of a group of four warps. Only
// code for compute capability 9.0a has it, elsewhere registers stay as they are.
template <int kRegisters, bool kMore>
__device__ __forceinline__ void set_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if constexpr (kMore) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
  }
#endif
}

// elect.sync: true in one lane of the warp.
__device__ __forceinline__ bool elected() {
  uint32_t yes = 0;
  TQKV_HOPPER("{ .reg .pred yes; elect.sync _|yes, 0xffffffff; selp.u32 %0, 1, 0, yes; }" : "=r"(yes));
  return yes != 0;
}

__device__ __forceinline__ void barrier_init(uint64_t *barrier, uint32_t count) {
  TQKV_HOPPER("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

// After the thread's barrier_init, before __syncthreads: bulk_copy sees the barriers, too.
__device__ __forceinline__ void barrier_init_fence() {
  TQKV_HOPPER("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t *barrier) {
  TQKV_HOPPER("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// The same for `count` threads.
__device__ __forceinline__ void barrier_arrive(uint64_t *barrier, uint32_t count) {
  TQKV_HOPPER("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

// Adds `bytes` to what is to be copied in this phase, in which somebody has still to arrive.
__device__ __forceinline__ void barrier_expect(uint64_t *barrier, uint32_t bytes) {
  TQKV_HOPPER("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
              : "memory");
}

// Arrives and adds `bytes` to what is to be copied in this phase; the copies may come before or after.
__device__ __forceinline__ void barrier_arrive_expect(uint64_t *barrier, uint32_t bytes) {
  TQKV_HOPPER("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
              : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t *barrier, uint32_t parity) {
  const uint32_t address = shared_address(barrier);
  uint32_t complete = 0;
  do {
    TQKV_HOPPER(
        "{ .reg .pred complete; mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2; selp.u32 %0, 1, 0, "
        "complete; }"
        : "=r"(complete)
        : "r"(address), "r"(parity)
        : "memory");
  } while (complete == 0);
}

// cp.async.bulk: one thread starts the copy, which `barrier` counts. Addresses and size are multiples of 16 bytes. Shared
// memory that threads have read before may be overwritten once they have arrived at a barrier that this thread waited for.
// What is copied is read once: of the L2 cache it shall leave first, before code and what all blocks read.
__device__ __forceinline__ void bulk_copy(void *shared, const void *global, uint32_t bytes, uint64_t *barrier) {
  TQKV_HOPPER(
      "{ .reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy, 1.0;"
      " cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], policy; "
      "}" ::"r"(shared_address(shared)),
      "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// fence.proxy.async: what the thread has stored to shared memory comes before bulk copies that overwrite it later.
__device__ __forceinline__ void bulk_copy_fence() {
  TQKV_HOPPER("fence.proxy.async.shared::cta;" ::: "memory");
}
// cp.async: the thread copies 16 bytes, or writes zeros. barrier_arrive_copied() arrives when all such copies of the thread
// so far have been made; they come before what follows a wait for that phase.
__device__ __forceinline__ void async_copy(void *shared, const void *global, bool zeros) {
  TQKV_HOPPER("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
              "l"(__cvta_generic_to_global(global)), "r"(zeros ? 0 : 16)
              : "memory");
}

__device__ __forceinline__ void barrier_arrive_copied(uint64_t *barrier) {
  TQKV_HOPPER("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}
#undef TQKV_HOPPER

// griddepcontrol: waits until the kernels before have ended and their writes are visible; lets the next kernel start,
// once all blocks have said so or ended. See launch_dependent().
__device__ __forceinline__ void grid_dependency_wait() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void grid_dependency_launch() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace tqkv::cuda
