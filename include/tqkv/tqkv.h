/* SPDX-License-Identifier: Apache-2.0
 *
 * libtqkv: compressed key/value caches for language models.
 *
 * Keys and values are stored at 1 to 8 bits a value (TurboQuant, arXiv:2504.19874: rotate, quantise each
 * coordinate with a codebook of its known distribution, keep one scale a vector) and attention is computed
 * straight from the compressed pages.
 *
 * CONVENTIONS (they hold for every function unless its comment says otherwise)
 *
 * Structs      begin with `uint32_t struct_size`, which the caller sets to sizeof. Fields are only ever appended.
 *              Zero means absent or default in every field, so `tq_encode_args a = {sizeof a};` is a valid start.
 *              A larger struct than the library knows is accepted if its unknown tail is zero. Enumerations travel
 *              as int32_t. Nested structs (tq_side_config) and tq_faults are frozen.
 * Errors       Every fallible function returns a tq_status. On anything but TQ_OK nothing was written and
 *              tq_last_error() holds, for this thread, one sentence that names the argument and the value.
 *              What depends on data (slots, lengths, block ids, NaNs) is not a status: it goes to tq_faults.
 * Memory       All arrays belong to the caller and live on the codec's device: host memory for a CPU codec, device
 *              memory for a CUDA codec. The structs themselves are host memory and are not kept after the call.
 * Strides      are counted in elements of the array unless the name ends in _bytes; zero means densely packed.
 * Hot path     tq_encode, tq_decode, tq_cache_store, tq_cache_load, tq_cache_copy, tq_paged_attention and
 *              tq_merge_states never allocate, never synchronise and never read device memory on the host.
 * Threads      A codec is immutable and may be used from any number of threads at once. CPU calls are synchronous.
 * Streams      `stream` is a cudaStream_t (NULL: the default stream); it is ignored by CPU codecs.
 *
 * All functions are available since version 0.1 (ABI 1).
 */
#ifndef TQKV_TQKV_H_
#define TQKV_TQKV_H_

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define TQKV_API
#elif defined(__GNUC__)
#define TQKV_API __attribute__((visibility("default")))
#else
#define TQKV_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define TQKV_VERSION_MAJOR 0
#define TQKV_VERSION_MINOR 1
#define TQKV_VERSION_PATCH 0
#define TQKV_ABI_VERSION 1

/* ---------------------------------------------------------------------------------------------------- status -- */

/* Result of a call. Values are pinned; groups leave gaps for later ones. */
typedef int32_t tq_status;
enum {
  TQ_OK = 0,
  /* what the caller passed */
  TQ_ERROR_INVALID_ARGUMENT = 1,     /* a value out of its documented range */
  TQ_ERROR_NULL_POINTER = 2,         /* a required pointer is NULL */
  TQ_ERROR_MISALIGNED = 3,           /* a pointer or stride misses its documented alignment */
  TQ_ERROR_STRUCT_SIZE = 4,          /* struct_size is smaller than the first version of the struct */
  TQ_ERROR_UNKNOWN_ENUM = 5,         /* an enumeration field holds no known value */
  TQ_ERROR_RESERVED_NOT_ZERO = 6,    /* a reserved field or the unknown tail of a struct is not zero */
  TQ_ERROR_OVERFLOW = 7,             /* sizes whose product does not fit in 63 bits */
  TQ_ERROR_WORKSPACE_TOO_SMALL = 8,  /* less workspace than the query function asked for */
  TQ_ERROR_FINGERPRINT_MISMATCH = 9, /* pages written under another description of the bytes */
  /* what this library, build or machine cannot do */
  TQ_ERROR_NOT_SUPPORTED = 20, /* a documented combination that is refused by name */
  TQ_ERROR_NO_DEVICE = 21,     /* no driver, or no such device */
  /* what went wrong while doing it */
  TQ_ERROR_OUT_OF_MEMORY = 40,
  TQ_ERROR_CUDA = 41,
  TQ_ERROR_CUBLAS = 42,
  TQ_ERROR_INTERNAL = 43,
  /* texts and files */
  TQ_ERROR_PARSE = 60 /* malformed JSON, or a field of the wrong type */
};

/* Static English name of a status, "unknown status" for other values. Never NULL. */
TQKV_API const char *tq_status_string(tq_status status);

/* The sentence for the last failed call of this thread; "" if none failed yet. Valid until this thread's next call. */
TQKV_API const char *tq_last_error(void);

/* ---------------------------------------------------------------------------------------------- enumerations -- */

/* tq_config.device */
enum { TQ_DEVICE_CPU = 0, TQ_DEVICE_CUDA = 1 };

/* element types of caller arrays */
enum { TQ_TYPE_F32 = 1, TQ_TYPE_F16 = 2, TQ_TYPE_BF16 = 3 };

/* the side of the cache a vector belongs to */
enum { TQ_SIDE_K = 0, TQ_SIDE_V = 1 };

/* tq_side_config.rotation */
enum {
  TQ_ROTATION_DEFAULT = 0,  /* randomised Hadamard (none where the side is stored raw) */
  TQ_ROTATION_NONE = 1,     /* quantise the coordinates as they are */
  TQ_ROTATION_HADAMARD = 2, /* 1 to 3 rounds of random signs and a Hadamard matrix; head_dim must be
                               2^k, 12*2^k, 20*2^k, 28*2^k or 36*2^k */
  TQ_ROTATION_DENSE = 3,    /* a dense random orthogonal matrix (Haar) from the seed */
  TQ_ROTATION_CUSTOM = 4    /* the caller's orthogonal matrix */
};

/* tq_side_config.codebook */
enum {
  TQ_CODEBOOK_DEFAULT = 0,  /* BETA at 1 to 4 bits, UNIFORM at 8 */
  TQ_CODEBOOK_GAUSSIAN = 1, /* Lloyd-Max for N(0, 1), the limit of large head_dim; 1 to 4 bits */
  TQ_CODEBOOK_BETA = 2,     /* Lloyd-Max for a coordinate of a random unit vector in head_dim dimensions; 1 to 4 bits */
  TQ_CODEBOOK_UNIFORM = 3,  /* equally spaced levels: +-1, +-3 at 2 bits (faster on GPUs, 1% more MSE), the whole int8
                               grid at 8 */
  TQ_CODEBOOK_CUSTOM = 4    /* the caller's symmetric levels; 1 to 4 bits */
};

/* How the stored scale is chosen, for a rotated vector x and its codebook vector c (decoded: scale * c). */
enum {
  TQ_SCALE_DEFAULT = 0,   /* what measured best on real keys and values for this side and bit width */
  TQ_SCALE_LEAST_MSE = 1, /* <x,c> / |c|^2 : least squared error */
  TQ_SCALE_NORM = 2,      /* |x| / |c|     : the decoded vector has the norm of x */
  TQ_SCALE_UNBIASED = 3   /* |x|^2 / <x,c> : inner products are unbiased, E<q,decoded> = <q,x> */
};

/* tq_config.simd, CPU codecs: the instruction set to use; tests force one, programs leave it zero */
enum {
  TQ_SIMD_AUTO = 0,
  TQ_SIMD_SCALAR = 1,
  TQ_SIMD_AVX2 = 2,   /* AVX2, FMA, F16C, BMI2 */
  TQ_SIMD_AVX512 = 3, /* AVX-512 F, BW, CD, DQ, VL */
  TQ_SIMD_NEON = 4
};

/* ------------------------------------------------------------------------------------------ version and build -- */

TQKV_API uint32_t tq_version(void);     /* major * 10000 + minor * 100 + patch of the loaded library */
TQKV_API uint32_t tq_abi_version(void); /* TQKV_ABI_VERSION of the loaded library */

/* What this build is. All strings are static. Output struct: filled up to min(struct_size, known). */
typedef struct tq_build {
  uint32_t struct_size;
  uint32_t abi_version;
  const char *version;      /* "0.1.0" */
  const char *compiler;     /* name and version of the C++ compiler */
  const char *simd_targets; /* compiled in, comma separated */
  const char *simd_target;  /* what TQ_SIMD_AUTO chooses on this machine */
  const char *cuda;         /* "not built", or the compute capabilities of the kernels */
} tq_build;
TQKV_API tq_status tq_build_info(tq_build *build);

/* Number of usable devices of a kind. Zero CUDA devices is TQ_OK; `*reason` (optional) then says why, statically. */
TQKV_API tq_status tq_device_count(int32_t device, int32_t *count, const char **reason);

/* Output struct. */
typedef struct tq_device_info {
  uint32_t struct_size;
  int32_t processors; /* cores or multiprocessors */
  char name[128];
  int64_t memory_bytes;
  int32_t compute_capability; /* CUDA: major * 10 + minor; CPU: 0 */
  int32_t reserved;
} tq_device_info;
TQKV_API tq_status tq_device_get_info(int32_t device, int32_t ordinal, tq_device_info *info);

/* ----------------------------------------------------------------------------------------------------- codec -- */

/* One side (K or V) of a codec. Frozen. */
typedef struct tq_side_config {
  int32_t head_dim;        /* 16 to 576 in steps of 16 */
  int32_t bits;            /* 1, 2, 3, 4, 8, or 16 for raw f16/bf16; 0: 4 */
  int32_t rotation;        /* TQ_ROTATION_*; a raw side takes none */
  int32_t hadamard_rounds; /* 1 to 3; 0: 1. Only with Hadamard */
  int32_t codebook;        /* TQ_CODEBOOK_* */
  int32_t scale_rule;      /* TQ_SCALE_* */
  int32_t scale_type;      /* TQ_TYPE_F16 (default) or TQ_TYPE_F32 */
  int32_t num_levels;      /* CODEBOOK_CUSTOM: 2^bits, at most 16 */
  const float *levels;     /* CODEBOOK_CUSTOM: num_levels ascending values, symmetric about zero, none zero; any unit.
                              They are fitted to the int8 grid; tq_info reports the loss. Copied */
  const float *matrix;     /* ROTATION_CUSTOM: [head_dim, head_dim] row-major, y = matrix * x, orthogonal within 1e-3
                              in each entry of matrix * transpose. Host memory, copied */
  int32_t reserved[4];
} tq_side_config;

/* A parallel loop given by the caller: run body(body_context, i) once for each i in [0, count), return when all are
 * done. May be called from several threads at once. */
typedef void (*tq_parallel_for)(void *context, int64_t count, void (*body)(void *body_context, int64_t index),
                                void *body_context);

/* Description of the storage of one kind of layer. */
typedef struct tq_config {
  uint32_t struct_size;
  int32_t device;         /* TQ_DEVICE_* */
  int32_t device_ordinal; /* CUDA ordinal; 0 on the CPU */
  int32_t kv_heads;       /* 1 to 1024; 0: 1 */
  tq_side_config k;
  tq_side_config v;                /* v.head_dim 0: that of k */
  uint64_t seed;                   /* of the random rotations; any value, 0 included */
  int32_t block_size_tokens;       /* 1, 8, or a multiple of 16 up to 256; 0: 16 */
  int32_t exact_block_size_tokens; /* of exact pages, likewise; 0: 16 */
  int32_t raw_type;                /* TQ_TYPE_BF16 (default) or TQ_TYPE_F16: raw sides and exact pages */
  int32_t simd;                    /* TQ_SIMD_*; CPU only, does not change any stored byte */
  int32_t threads;                 /* size of the codec's thread pool, caller included; 0: all cores. CPU only */
  int32_t reserved;
  tq_parallel_for parallel_for; /* instead of a pool; CPU only, then threads must be 0 */
  void *parallel_context;
} tq_config;

/* Sets `*config` (struct_size bytes of it) to a preset's bits, everything else to zero. The caller then sets
 * head_dim, kv_heads and whatever else differs. Presets, with bytes per token and head at head_dim 128 (K + V, fp16
 * scales):
 *   "k4v4" = "safe"        132 bytes    3.9 times smaller than bf16
 *   "k4v3" = "balanced"    116 bytes    4.4
 *   "k3v3" = "compact"     100 bytes    5.1
 *   "k4v2"                 100 bytes    5.1
 *   "k3v2" = "aggressive"   84 bytes    6.1
 *   "k2v2"                  68 bytes    7.5
 * and "raw" (512 bytes, no compression). Sides of 2 bits get the uniform codebook. NULL: "safe". README has the
 * measured quality of each.
 * Errors: NULL_POINTER, STRUCT_SIZE, INVALID_ARGUMENT (unknown preset). */
TQKV_API tq_status tq_config_init(tq_config *config, uint32_t struct_size, const char *preset);

/* The i-th preset or alias, in the order above, or NULL past the last. */
TQKV_API const char *tq_preset_name(int32_t index);

/* TQ_OK if tq_create would accept this configuration on this machine (memory aside), else the refusal it would give. */
TQKV_API tq_status tq_supports(const tq_config *config);

typedef struct tq_codec tq_codec;

/* Makes an immutable codec. A CPU codec owns its thread pool; a CUDA codec loads every kernel it may launch.
 * `*codec` is written only on success. End it with tq_destroy. */
TQKV_API tq_status tq_create(const tq_config *config, tq_codec **codec);

/* Ends a codec; NULL is allowed. Does not synchronise: no queued work or instantiated graph may still use it. */
TQKV_API void tq_destroy(tq_codec *codec);

/* What one side resolved to. Frozen. */
typedef struct tq_side_info {
  int32_t head_dim, bits, rotation, hadamard_rounds, codebook, scale_rule, scale_type, num_levels;
  int32_t code_bytes;  /* packed codes of one vector: head_dim * bits / 8 */
  int32_t scale_bytes; /* 2, 4, or 0 where raw */
  /* At most 4 bits: level i of num_levels (ascending) decodes to grid[i] + 1/2 steps; zero past num_levels.
   * 8 bits: code byte b decodes to b + 1/2 steps. decoded coordinate = scale * level_unit * (grid + 1/2) */
  int8_t grid[16];
  float level_unit; /* a power of two, so that scales stay in the range of fp16 */
  float reserved;
  double codebook_mse;  /* of the fitted codebook on its distribution at unit variance, least-MSE scale; 0 at 8 bits */
  double codebook_loss; /* fitted / unfitted MSE - 1 */
} tq_side_info;

/* Output struct. */
typedef struct tq_codec_info {
  uint32_t struct_size;
  int32_t device, device_ordinal, kv_heads;
  tq_side_info k, v;
  uint64_t seed;
  uint64_t tile_fingerprint;  /* hash of what decides the bytes of one head's tile */
  uint64_t page_fingerprint;  /* that, the block size and the number of heads; what tq_pages must carry */
  uint64_t exact_fingerprint; /* likewise for exact pages */
  int32_t block_size_tokens, exact_block_size_tokens, raw_type, simd, threads, reserved;
} tq_codec_info;
TQKV_API tq_status tq_info(const tq_codec *codec, tq_codec_info *info);

/* ---------------------------------------------------------------------------------------------------- faults -- */

/* kinds of data-dependent faults */
enum {
  TQ_FAULT_SLOT = 0,       /* slot below -1 or past the pool; index: token (or entry) of the call */
  TQ_FAULT_LENGTH = 1,     /* length below zero or over the table, bad row offsets; index: sequence */
  TQ_FAULT_BLOCK = 2,      /* a needed block id outside the pool; index: sequence, or pair of tq_cache_copy */
  TQ_FAULT_NON_FINITE = 3, /* vector with a NaN or infinity; index: token, or vector of tq_encode */
  TQ_FAULT_RANGE = 4,      /* vector whose scale exceeds the scale type and was clamped; index likewise */
  TQ_FAULT_KINDS = 5
};

/* Counters in the caller's memory (device memory for CUDA), 8-byte aligned; the caller zeroes them, calls add to them.
 * What a fault does: a bad slot writes nothing of its token. A non-finite vector is stored as the zero vector, codes
 * and exact copy alike. A sequence with a bad length or a bad needed block gives zero output and log-sum-exp -inf.
 * Everything else proceeds. `first` is 0, or packs kind and index of the fault with the lowest index. Frozen. */
typedef struct tq_faults {
  uint64_t first;
  uint64_t count[TQ_FAULT_KINDS];
  uint64_t reserved[2];
} tq_faults;
#define TQ_FAULT_FIRST_KIND(first) ((int32_t)((first)&0xff))
#define TQ_FAULT_FIRST_INDEX(first) ((int64_t)(0x00ffffffffffffff - ((first) >> 8)))

/* --------------------------------------------------------------------------------------------------- vectors -- */

/* Bytes of workspace for tq_encode or tq_decode of up to `count` vectors of one side (0 on the CPU). */
TQKV_API tq_status tq_vectors_workspace(const tq_codec *codec, int32_t side, int64_t count, size_t *bytes);

typedef struct tq_encode_args {
  uint32_t struct_size;
  int32_t side; /* TQ_SIDE_* */
  int64_t count;
  const void *input; /* [count, head_dim], aligned to its element */
  int32_t input_type;
  int32_t reserved;
  int64_t input_stride;
  void *codes;                /* [count, code_bytes]: the packed codes, in the byte order of "Token record" below;
                                 pointer and stride multiples of 2 where raw */
  int64_t codes_stride_bytes; /* 0: code_bytes. CUDA is fast when codes and stride are multiples of 16 */
  void *scales;               /* [count] of scale_type, aligned to it; must be NULL where raw */
  int64_t scales_stride_bytes;
  tq_faults *faults; /* optional */
  void *workspace;   /* 256-byte aligned */
  size_t workspace_bytes;
  void *stream;
} tq_encode_args;

/* Compresses vectors. A vector with a NaN or infinity is encoded as zero and counted; f32 vectors too large for an
 * fp16 scale are clamped and counted. count 0 is TQ_OK. With Hadamard or no rotation codes and scales are the same
 * bytes on every machine and device. With a dense or custom one CUDA's may differ from the CPU's, also with the type and
 * strides of the rows; the mean squared error is the same to 0.1%. */
TQKV_API tq_status tq_encode(const tq_codec *codec, const tq_encode_args *args);

typedef struct tq_decode_args {
  uint32_t struct_size;
  int32_t side;
  int64_t count;
  const void *codes;
  int64_t codes_stride_bytes;
  const void *scales;
  int64_t scales_stride_bytes;
  void *output; /* [count, head_dim] */
  int32_t output_type;
  int32_t reserved;
  int64_t output_stride;
  void *workspace;
  size_t workspace_bytes;
  void *stream;
} tq_decode_args;

/* The inverse of tq_encode up to quantisation. Zero vectors come back as zeros. */
TQKV_API tq_status tq_decode(const tq_codec *codec, const tq_decode_args *args);

/* ----------------------------------------------------------------------------------------------------- pages -- */

/* BYTE ORDER. All integers are little-endian.
 *
 * Token record: the packed codes of one vector, head_dim * bits / 8 bytes in one or two planes of 32-bit words.
 *   8 bits  byte c is the int8 grid value b of channel c; level b + 1/2.
 *   4 bits  channel c is in word c>>3; with j = c & 7 the magnitude index (3 bits, ascending) is at bits 4j..4j+2, the
 *           sign (1: negative) at bit 8j+7 for j < 4 and 8(j-4)+3 for j >= 4.
 *   3 bits  the level index (0..7, ascending) is split: bits 1..0 in a 2-bit plane, then bit 2 in a 1-bit plane.
 *   2 bits  the level index (0..3) in a 2-bit plane.  1 bit: (0..1) in a 1-bit plane.
 *   2-bit plane: channel c is in word c>>4, nibble c & 7, bits 2f and 2f+1 of it with f = (c>>3) & 1.
 *   1-bit plane: channel c is in word c>>5, nibble c & 7, bit {2,1,3,0}[(c>>3) & 3] of it. Where head_dim is an odd
 *           multiple of 16 the last 16 channels take a half word instead: nibble c & 3, bit (c>>2) & 3.
 *   raw     f16 or bf16 values in channel order.
 *
 * Tile: 16 tokens of one head: K codes, V codes, K scales [16], V scales [16] (no scales where raw).
 *   K codes plane by plane; in a plane token t's words follow each other: byte e of token t is at t * plane_bytes + e.
 *   V codes plane by plane, bytes of 4 tokens interleaved: byte e of token t is at
 *           64 * (e>>2) + 4 * w * (t>>2) + 4 * (e & 3) + (t & 3), with w = 4, or 2 in the half word that may end
 *           a plane.
 *   raw     token-major on both sides.
 * A token owns whole bytes: writing one never reads or changes another.
 *
 * Pool: slot s of head h is row s & 15 of the tile at
 *   base + (s / S) * block_stride_bytes + ((s % S) / 16) * tile_stride_bytes + h * head_stride_bytes
 *   with S = max(block_size, 16). A block of 8 is half a tile; with block size 1 a table lists slots. Token t of block
 *   b is slot b * block_size + t. Exact pages are the same with both sides raw. */

/* which pages */
enum { TQ_PAGES_CODED = 0, TQ_PAGES_EXACT = 1 };

/* Output struct: sizes of this codec's pages. Offsets are from the start of a tile. */
typedef struct tq_layout {
  uint32_t struct_size;
  int32_t block_size_tokens;
  int64_t tile_bytes; /* one head, 16 tokens; a multiple of 16 */
  int64_t k_codes_offset, v_codes_offset, k_scales_offset, v_scales_offset;
  int64_t head_stride_bytes;  /* of the packed pool: tile_bytes (the heads of a tile adjacent: the fast path) */
  int64_t tile_stride_bytes;  /* kv_heads * tile_bytes */
  int64_t block_stride_bytes; /* max(1, block_size / 16) * tile_stride_bytes */
  int64_t bytes_per_token;    /* all heads, K and V */
  uint64_t fingerprint;
} tq_layout;
TQKV_API tq_status tq_page_layout(const tq_codec *codec, int32_t which, tq_layout *layout);

/* A pool of blocks in the caller's memory. Position-independent: it may be moved, and mapped elsewhere. */
typedef struct tq_pages {
  uint32_t struct_size;
  uint32_t reserved;
  void *base; /* 16-byte aligned */
  int64_t num_blocks;
  int64_t block_stride_bytes; /* strides: multiples of 16, tiles must not overlap; 0: as in tq_layout */
  int64_t tile_stride_bytes;
  int64_t head_stride_bytes;
  uint64_t fingerprint; /* tq_layout.fingerprint of the codec that wrote it; another one is refused */
} tq_pages;

/* Bytes that a packed pool of num_blocks blocks takes. Errors: OVERFLOW, INVALID_ARGUMENT. */
TQKV_API tq_status tq_pages_bytes(const tq_codec *codec, int32_t which, int64_t num_blocks, int64_t *bytes);

/* Bytes of workspace for tq_cache_store or tq_cache_load of up to num_tokens tokens (0 on the CPU). */
TQKV_API tq_status tq_cache_workspace(const tq_codec *codec, int64_t num_tokens, size_t *bytes);

typedef struct tq_store_args {
  uint32_t struct_size;
  int32_t input_type; /* of k and v */
  int64_t num_tokens;
  const void *k; /* [num_tokens, kv_heads, head_dim_k], channels adjacent, aligned to the element */
  const void *v; /* [num_tokens, kv_heads, head_dim_v] */
  int64_t k_token_stride, k_head_stride, v_token_stride, v_head_stride;
  const tq_pages *pages;
  const int64_t *slots;        /* [num_tokens]; -1 skips the codes. No two tokens of a call may name one slot */
  const tq_pages *exact_pages; /* optional: also keep a raw copy */
  const int64_t *exact_slots;  /* [num_tokens]; -1 skips; required with exact_pages */
  const float *key_offset;     /* optional [kv_heads, head_dim_k]: subtracted from the keys before coding */
  tq_faults *faults;
  void *workspace;
  size_t workspace_bytes;
  void *stream;
} tq_store_args;

/* Compresses the keys and values of tokens into their slots, and copies them raw into their exact slots. The same
 * bytes as tq_encode's. A token with a bad slot (either one) writes nothing. */
TQKV_API tq_status tq_cache_store(const tq_codec *codec, const tq_store_args *args);

typedef struct tq_load_args {
  uint32_t struct_size;
  int32_t output_type;
  int64_t num_tokens;
  void *k; /* [num_tokens, kv_heads, head_dim_k]; NULL: not wanted (k or v) */
  void *v;
  int64_t k_token_stride, k_head_stride, v_token_stride, v_head_stride;
  const tq_pages *pages;
  const int64_t *slots;        /* [num_tokens]; -1: the token's output is not written */
  const tq_pages *exact_pages; /* optional */
  const int64_t *exact_slots;  /* [num_tokens]; where >= 0 the raw copy is read instead; required with exact_pages */
  const float *key_offset;     /* optional: added back to coded keys */
  tq_faults *faults;
  void *workspace;
  size_t workspace_bytes;
  void *stream;
} tq_load_args;

/* Decompresses tokens into dense arrays. A token with a bad slot gets zeros. */
TQKV_API tq_status tq_cache_load(const tq_codec *codec, const tq_load_args *args);

typedef struct tq_copy_args {
  uint32_t struct_size;
  int32_t pairs_on_host; /* CUDA: 1 if both arrays of pairs are host memory (read before the call returns) */
  const tq_pages *src;
  const tq_pages *dst;  /* NULL: src */
  const int64_t *pairs; /* [num_pairs, 2]: source block, destination block; (-1, -1) skips */
  int64_t num_pairs;
  const tq_pages *exact_src; /* optional, with pairs of their own */
  const tq_pages *exact_dst; /* NULL: exact_src */
  const int64_t *exact_pairs;
  int64_t num_exact_pairs;
  tq_faults *faults;
  void *stream;
} tq_copy_args;

/* Copies blocks, within a pool or between pools of one fingerprint (their strides may differ). In one call no
 * destination may also be a source or another pair's destination. A pair with a bad block copies nothing. */
TQKV_API tq_status tq_cache_copy(const tq_codec *codec, const tq_copy_args *args);

/* ------------------------------------------------------------------------------------------------- attention -- */

/* tq_attention_args.flags */
enum {
  TQ_ATTENTION_CAUSAL = 1 /* a query at position p sees only keys j <= p */
};

/* One attention call over compressed pages. Keys of sequence s have positions j = 0 .. lengths[s] - 1; the key at j is
 * in block table[s][j / block_size], row j % block_size. With k_new the last q_len keys are the call's own tokens.
 *
 * For a query at position p and head h with kv head g = h / (q_heads / kv_heads):
 *   x_j = scale * <q, k_j>              (for coded keys k_j = decoded + key_offset)
 *   x_j = soft_cap * tanh(x_j / soft_cap)                   if soft_cap > 0
 *   x_j = x_j + alibi_slopes[h] * (j - p)                   if alibi_slopes
 *   visible: starts[s] <= j < lengths[s]; j <= p if causal; p - j < window_tokens if window_tokens > 0
 *   m = max of visible x_j (and sinks[h]);  Z = sum exp(x_j - m) (+ exp(sinks[h] - m))
 *   out = sum exp(x_j - m) v_j / Z;  lse = m + log Z
 * A row that sees no key gives zeros and -inf, sinks or not. No byte outside the blocks of visible keys, and no byte of
 * an invisible key, changes a result; table entries that are not needed are never inspected. */
typedef struct tq_attention_args {
  uint32_t struct_size;
  int32_t flags;
  int32_t num_seqs;
  int32_t num_tokens; /* rows of q: at least cu_seqlens_q[num_seqs] */
  int32_t q_heads;    /* a multiple of kv_heads */
  int32_t q_type;     /* of q, k_new and v_new */
  const void *q;      /* [num_tokens, q_heads, head_dim_k], aligned to its element */
  int64_t q_token_stride, q_head_stride;
  const int32_t *cu_seqlens_q; /* [num_seqs + 1]; NULL: one token a sequence, num_tokens == num_seqs. Rows outside every
                                  sequence are not written */
  const int32_t *q_positions;  /* [num_tokens]; NULL: lengths[s] - q_len + i */
  int32_t max_q_len;           /* host bound on q_len; 0: num_tokens (1 without cu_seqlens_q) */
  int32_t max_length_tokens;   /* host bound on lengths; 0: what the table holds, with CSR all indices */

  const void *k_new; /* optional [num_tokens, kv_heads, head_dim_k]: the call's own keys, read raw; pages need not hold
                        them. With v_new */
  const void *v_new;
  int64_t k_new_token_stride, k_new_head_stride, v_new_token_stride, v_new_head_stride;

  const tq_pages *pages;
  const int32_t *block_table; /* [num_seqs, table_columns], or NULL with CSR */
  int64_t block_table_stride; /* 0: table_columns */
  int64_t table_columns;
  const int32_t *block_indptr;  /* CSR: [num_seqs + 1] */
  const int32_t *block_indices; /* CSR: [num_block_indices] */
  int64_t num_block_indices;
  const int32_t *lengths; /* [num_seqs], the call's own tokens included */
  const int32_t *starts;  /* optional [num_seqs]: first visible key (left padding); below zero counts as zero */

  const tq_pages *exact_pages; /* optional: key j is read raw iff exact_table[s][j / exact_block_size] >= 0 and
                                  (j - starts[s] < exact_first_tokens or j > P - exact_recent_tokens),
                                  P the position of the sequence's first query in this call. The table's entry e names
                                  block e; a ring is made by repeating blocks */
  const int32_t *exact_table;  /* [num_seqs, exact_columns]; keys past its columns are read coded */
  int64_t exact_table_stride;
  int64_t exact_columns;
  int32_t exact_first_tokens;
  int32_t exact_recent_tokens;

  float scale;           /* 0: 1 / sqrt(head_dim_k) */
  float soft_cap;        /* 0: none */
  int32_t window_tokens; /* 0: none */
  int32_t split_tokens;  /* 0: automatic; else a multiple of 16: keys are summed in splits of exactly this size, which
                            makes a sequence's bits independent of its neighbours, for a larger workspace */
  const float *sinks;    /* optional [q_heads] */
  const float *alibi_slopes; /* optional [q_heads] */
  const float *key_offset;   /* optional [kv_heads, head_dim_k]: the one that the store subtracted */

  void *out; /* [num_tokens, q_heads, head_dim_v] */
  int32_t out_type;
  int32_t reserved;
  int64_t out_token_stride, out_head_stride;
  float *lse; /* optional [num_tokens, q_heads]; to ask for it may change last bits of `out` */

  tq_faults *faults;
  void *workspace;
  size_t workspace_bytes;
  void *stream;
} tq_attention_args;

/* Makes every check of the call except those of pointers, and gives the workspace it needs: also the support query.
 * `pages` and `exact_pages` are read, their bases are not; of arrays only k_new, v_new and the tables are looked at, for
 * being given or not. */
TQKV_API tq_status tq_attention_workspace(const tq_codec *codec, const tq_attention_args *args, size_t *bytes);

/* On CUDA (compute capability 9.0 and later) head_dims are at most 256, and pages have bases and strides that are multiples of
 * 16 bytes. Calls of few query rows (max_q_len * q_heads / kv_heads at most 32) over K and V of 2, 3, 4 or 8 bits and one
 * head_dim of 64, 80, 96, 112, 128, 192 or 256 have kernels of their own; all others take those of prefill. Queries and
 * weights are rounded to 16 bits, in prefill with f32 or f16 out to more: f32 outputs are within 3e-4 of the exact ones,
 * relative to the norm, f16 and bf16 ones within 8e-4 before they are rounded to their type (prefill with bf16 out: while logits
 * spread by up to 3 nats; the error grows with them). Exact pages, and k_new of f32, are taken by scalar code, which is slow
 * in long chunks. The launches depend on the args alone: a captured call may be replayed with other lengths, tables and
 * contents, within the bounds. */
TQKV_API tq_status tq_paged_attention(const tq_codec *codec, const tq_attention_args *args);

typedef struct tq_merge_args {
  uint32_t struct_size;
  int32_t num_states;
  int64_t num_rows;   /* tokens * heads */
  int32_t head_dim;   /* 1 to 65536 */
  int32_t type;       /* of states and out */
  const void *states; /* [num_states, num_rows, head_dim] */
  const float *lse;   /* [num_states, num_rows], natural log */
  void *out;          /* [num_rows, head_dim]; may be states' first state */
  float *out_lse;     /* optional [num_rows]; may be lse's first row */
  void *stream;
} tq_merge_args;

/* Merges attention over disjoint sets of keys: out = sum_i exp(lse_i - m) states_i / sum_i exp(lse_i - m). States with
 * lse -inf are ignored whatever they hold; rows with no other state give zeros and -inf. Sinks may have been part of
 * one state only, one that sees a key. Summed in the order of the states. */
TQKV_API tq_status tq_merge_states(const tq_codec *codec, const tq_merge_args *args);

/* -------------------------------------------------------------------------------------------------- planning -- */

/* Memory of a model's cache under one preset. */
typedef struct tq_plan_args {
  uint32_t struct_size;
  int32_t block_size_tokens; /* 0: 16 */
  const char *config_json;   /* a Hugging Face config.json */
  size_t config_json_bytes;
  const char *preset;         /* a preset, "bf16" or "fp8"; NULL: "safe" */
  int64_t context_tokens;     /* 0: the config's max_position_embeddings */
  int64_t batch;              /* 0: 1 */
  int64_t memory_bytes;       /* 0: no limit, then max_context_tokens and max_batch are 0 */
  int64_t exact_first_tokens; /* exact tier, per sequence and layer */
  int64_t exact_recent_tokens;
} tq_plan_args;

/* Output struct. Sizes include page padding, the exact tier and block tables; the attention workspace is apart. */
typedef struct tq_plan_result {
  uint32_t struct_size;
  int32_t kv_layers;       /* layers that store keys and values of their own */
  int32_t full_layers;     /* of them: unbounded context */
  int32_t window_layers;   /* of them: sliding window */
  int32_t shared_layers;   /* layers that reuse another one's cache */
  int32_t uncached_layers; /* linear attention, recurrent or other layers without a KV cache */
  int64_t context_tokens, batch;
  int64_t bytes_per_token;            /* all layers, while no window is full */
  int64_t bytes_per_sequence;         /* at context_tokens */
  int64_t exact_bytes_per_sequence;   /* of them: the exact tier */
  int64_t padding_bytes_per_sequence; /* of them: tokens that round up to whole blocks */
  int64_t workspace_bytes;            /* of attention at batch and context */
  int64_t total_bytes;                /* batch * bytes_per_sequence + workspace_bytes */
  int64_t max_context_tokens;         /* at batch, within memory_bytes; 0 if not even one block fits */
  int64_t max_batch;                  /* at context_tokens, within memory_bytes */
} tq_plan_result;

/* Errors: PARSE (malformed or missing fields, naming them), NOT_SUPPORTED (MLA, by name), INVALID_ARGUMENT (context,
 * batch and exact tokens are at most 2^31 - 1, and so are the maxima in the result), OVERFLOW.
 * `json` (optional) receives the result as a JSON object, terminated; json_capacity bytes are available;
 * `*json_bytes` (optional) is set to what it takes, the terminator included, also when that is too much, in which case
 * nothing is written to json and the call fails with INVALID_ARGUMENT. */
TQKV_API tq_status tq_plan(const tq_plan_args *args, tq_plan_result *result, char *json, size_t json_capacity,
                           size_t *json_bytes);

/* Keys, values and queries of one layer, as a model made them (after position encoding), and what its cache should be.
 * Everything here is host memory; it is read during the call only. */
typedef struct tq_recommend_args {
  uint32_t struct_size;
  int32_t type;       /* TQ_TYPE_* of k, v and q */
  int64_t num_tokens; /* consecutive tokens of one sequence, 1 to 2^31 - 1; a thousand and more tell something */
  const void *k;      /* [num_tokens, kv_heads, head_dim_k], channels adjacent, aligned to the element */
  const void *v;      /* [num_tokens, kv_heads, head_dim_v] */
  int64_t k_token_stride, k_head_stride, v_token_stride, v_head_stride;
  const void *q;       /* optional [num_queries, q_heads, head_dim_k]: the queries of the last num_queries positions */
  int64_t num_queries; /* at most num_tokens; more than 256 MB of results allow are left out, the first ones first */
  int64_t q_token_stride, q_head_stride;
  int32_t kv_heads;           /* 1 to 1024; 0: 1 */
  int32_t q_heads;            /* a multiple of kv_heads, at most 65536; 0 without q */
  int32_t head_dim_k;         /* as in tq_side_config */
  int32_t head_dim_v;         /* 0: head_dim_k */
  float scale;                /* of the logits; 0: 1 / sqrt(head_dim_k) */
  int32_t threads;            /* caller included; 0: all cores */
  double max_output_error;    /* targets, 0: none; with no target at all max_output_error is 0.05 */
  double max_kl;              /* nats; needs q */
  double max_bytes_per_token; /* of all kv heads, exact copies included */
  int64_t context_tokens;     /* exact copies are paid once for as many tokens; 0: 32768 */
  int32_t exact_first_tokens; /* the exact ranges to consider; both 0: 4 and 128; -1 here: none */
  int32_t exact_recent_tokens;
  uint64_t seed; /* of the rotations */
} tq_recommend_args;

/* Output struct. */
typedef struct tq_recommend_result {
  uint32_t struct_size;
  int32_t meets_targets;      /* 0: no preset does; what is recommended comes closest */
  char preset[16];            /* a name for tq_config_init */
  int32_t use_key_offset;     /* 1: the mean of the keys, [kv_heads, head_dim_k], as key_offset */
  int32_t exact_first_tokens; /* 0 and 0 where exact copies do not pay */
  int32_t exact_recent_tokens;
  int32_t outlier_channels; /* of the keys, whose root mean square about the mean is over 4 times their head's median */
  double output_error;      /* measured with the recommendation */
  double kl;                /* NaN without q */
  double bytes_per_token;
  double key_mean_share; /* sum over channels of mean(k)^2 / mean(k^2): what a key offset takes away */
} tq_recommend_result;

/* Recommends how to store a layer: encodes the given keys and values on the CPU at every preset of different bits, without
 * and with the exact ranges, and attends to them as a decode step does, each query to the keys up to its position, in
 * double precision, with a_j the weights and o the output of the original keys and values, b_j and p those of the stored
 * ones:
 *   output error  |p - o| / |o| over all queries and heads
 *   KL            mean over queries and heads of sum_j a_j log(a_j / b_j)
 * Without q no attention can be measured: output_error is the larger of the root mean squares of |x - decoded| / |x| over
 * keys and over values, and exact ranges are not considered.
 * A key offset is used where it makes the KL (without q: the squared error of the keys) at 4 bits smaller by a tenth or
 * more. Of what meets all targets the fewest bytes are taken, of equal ones the smaller output error; with
 * max_bytes_per_token alone the smallest output error within it. "raw" is considered last, for nothing else meets a
 * target. Figures hold for this sample: a recommendation for a model wants one for each layer, from text like its users'.
 *
 * `json` as in tq_plan (16384 bytes are enough): the recommendation, "statistics", every candidate with its figures, and
 * "reasons", sentences.
 * Errors: NULL_POINTER, MISALIGNED, UNKNOWN_ENUM, OVERFLOW; NOT_SUPPORTED (a head_dim that no Hadamard matrix has);
 * INVALID_ARGUMENT (ranges; a NaN or an infinity, naming its token and head; json_capacity). */
TQKV_API tq_status tq_recommend(const tq_recommend_args *args, tq_recommend_result *result, char *json,
                                size_t json_capacity, size_t *json_bytes);

/* ------------------------------------------------------------------------------------------- table of functions -- */

/* For programs that dlopen the library: one symbol, tq_get_api, gives all others. Functions are only ever appended. */
typedef struct tq_api {
  uint32_t struct_size;
  uint32_t abi_version;
  const char *(*status_string)(tq_status);
  const char *(*last_error)(void);
  uint32_t (*version)(void);
  tq_status (*build_info)(tq_build *);
  tq_status (*device_count)(int32_t, int32_t *, const char **);
  tq_status (*device_get_info)(int32_t, int32_t, tq_device_info *);
  tq_status (*config_init)(tq_config *, uint32_t, const char *);
  const char *(*preset_name)(int32_t);
  tq_status (*supports)(const tq_config *);
  tq_status (*create)(const tq_config *, tq_codec **);
  void (*destroy)(tq_codec *);
  tq_status (*info)(const tq_codec *, tq_codec_info *);
  tq_status (*vectors_workspace)(const tq_codec *, int32_t, int64_t, size_t *);
  tq_status (*encode)(const tq_codec *, const tq_encode_args *);
  tq_status (*decode)(const tq_codec *, const tq_decode_args *);
  tq_status (*page_layout)(const tq_codec *, int32_t, tq_layout *);
  tq_status (*pages_bytes)(const tq_codec *, int32_t, int64_t, int64_t *);
  tq_status (*cache_workspace)(const tq_codec *, int64_t, size_t *);
  tq_status (*cache_store)(const tq_codec *, const tq_store_args *);
  tq_status (*cache_load)(const tq_codec *, const tq_load_args *);
  tq_status (*cache_copy)(const tq_codec *, const tq_copy_args *);
  tq_status (*attention_workspace)(const tq_codec *, const tq_attention_args *, size_t *);
  tq_status (*paged_attention)(const tq_codec *, const tq_attention_args *);
  tq_status (*merge_states)(const tq_codec *, const tq_merge_args *);
  tq_status (*plan)(const tq_plan_args *, tq_plan_result *, char *, size_t, size_t *);
  tq_status (*recommend)(const tq_recommend_args *, tq_recommend_result *, char *, size_t, size_t *);
} tq_api;

/* The table for an ABI version (1 .. TQKV_ABI_VERSION), static. Errors: NULL_POINTER, NOT_SUPPORTED. */
TQKV_API tq_status tq_get_api(uint32_t abi_version, const tq_api **api);

#ifdef __cplusplus
}
#endif

#endif /* TQKV_TQKV_H_ */
