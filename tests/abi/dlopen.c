/* SPDX-License-Identifier: Apache-2.0
 *
 * dlopen LIBRARY: a C99 program that is not linked with libtqkv finds everything through dlopen and tq_get_api,
 * compresses vectors and pages, computes attention, and checks the numbers against plain double precision. */
#define _POSIX_C_SOURCE 200809L
#include <tqkv/tqkv.h>

#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { kHeadDim = 128, kKvHeads = 2, kQHeads = 4, kTokens = 53, kBlock = 16, kBlocks = 7, kRow = kKvHeads * kHeadDim };

static const tq_api *api;

#define REQUIRE(condition)                                                                    \
  do {                                                                                        \
    if (!(condition)) {                                                                       \
      fprintf(stderr, "%s:%d: failed: %s (last error: %s)\n", __FILE__, __LINE__, #condition, \
              api ? api->last_error() : "no table");                                          \
      exit(1);                                                                                \
    }                                                                                         \
  } while (0)

static uint64_t random_state;

static double random_unit(void) {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return ((double)(random_state >> 11) + 0.5) / 9007199254740992.0;
}

static void fill_normal(float *values, int count) {
  for (int i = 0; i < count; ++i)
    values[i] = (float)(sqrt(-2.0 * log(random_unit())) * cos(6.283185307179586 * random_unit()));
}

static void *aligned(size_t bytes) {
  void *memory = NULL;
  REQUIRE(posix_memalign(&memory, 256, bytes ? bytes : 1) == 0);
  memset(memory, 0xa5, bytes ? bytes : 1);
  return memory;
}

static double squared_error(const float *a, const float *b, int count) {
  double sum = 0;
  for (int i = 0; i < count; ++i) sum += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
  return sum;
}

static double squared_norm(const float *a, int count) {
  double sum = 0;
  for (int i = 0; i < count; ++i) sum += (double)a[i] * a[i];
  return sum;
}

static void check_table(const char *path) {
  void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) fprintf(stderr, "%s\n", dlerror());
  REQUIRE(library);
  tq_status (*get_api)(uint32_t, const tq_api **);
  *(void **)&get_api = dlsym(library, "tq_get_api");
  REQUIRE(get_api);

  const tq_api *table = NULL;
  REQUIRE(get_api(0, &table) == TQ_ERROR_NOT_SUPPORTED && !table);
  REQUIRE(get_api(TQKV_ABI_VERSION + 1, &table) == TQ_ERROR_NOT_SUPPORTED && !table);
  REQUIRE(get_api(TQKV_ABI_VERSION, NULL) == TQ_ERROR_NULL_POINTER);
  REQUIRE(get_api(TQKV_ABI_VERSION, &table) == TQ_OK && table);
  api = table;
  REQUIRE(api->struct_size >= sizeof(tq_api) && api->abi_version == TQKV_ABI_VERSION);
  REQUIRE(api->version() == TQKV_VERSION_MAJOR * 10000 + TQKV_VERSION_MINOR * 100 + TQKV_VERSION_PATCH);
  void *slot;
  for (size_t at = offsetof(tq_api, status_string); at < sizeof(tq_api); at += sizeof slot) {
    memcpy(&slot, (const char *)api + at, sizeof slot);
    REQUIRE(slot);
  }
}

static void check_refusals(void) {
  tq_config config;
  REQUIRE(api->config_init(&config, sizeof config, "no such preset") == TQ_ERROR_INVALID_ARGUMENT);
  REQUIRE(strstr(api->last_error(), "no such preset"));
  REQUIRE(api->config_init(&config, sizeof config, NULL) == TQ_OK);
  config.k.head_dim = 24;
  tq_codec *codec = NULL;
  REQUIRE(api->create(&config, &codec) == TQ_ERROR_INVALID_ARGUMENT && !codec);
  REQUIRE(strstr(api->last_error(), "24"));
  config.k.head_dim = kHeadDim;
  config.device = TQ_DEVICE_CUDA;
  int32_t devices = -1;
  const char *reason = NULL;
  REQUIRE(api->device_count(TQ_DEVICE_CUDA, &devices, &reason) == TQ_OK && devices >= 0);
  if (devices == 0) {
    REQUIRE(reason && *reason);
    REQUIRE(api->create(&config, &codec) != TQ_OK && !codec && *api->last_error());
  }
}

static void check_vectors(const tq_codec *codec, const float *input, int32_t side, float *decoded) {
  tq_codec_info info;
  info.struct_size = sizeof info;
  REQUIRE(api->info(codec, &info) == TQ_OK);
  const tq_side_info *sided = side == TQ_SIDE_K ? &info.k : &info.v;
  REQUIRE(sided->code_bytes == kHeadDim / 2 && sided->scale_bytes == 2);

  const int count = kTokens * kKvHeads;
  size_t workspace_bytes = 0;
  REQUIRE(api->vectors_workspace(codec, side, count, &workspace_bytes) == TQ_OK);
  void *workspace = aligned(workspace_bytes);
  void *codes = aligned((size_t)(count * sided->code_bytes));
  void *scales = aligned((size_t)(count * sided->scale_bytes));
  tq_faults faults;
  memset(&faults, 0, sizeof faults);
  tq_encode_args encode = {sizeof encode};
  encode.side = side;
  encode.count = count;
  encode.input = input;
  encode.input_type = TQ_TYPE_F32;
  encode.codes = codes;
  encode.scales = scales;
  encode.faults = &faults;
  encode.workspace = workspace;
  encode.workspace_bytes = workspace_bytes;
  REQUIRE(api->encode(codec, &encode) == TQ_OK && faults.first == 0);
  tq_decode_args decode = {sizeof decode};
  decode.side = side;
  decode.count = count;
  decode.codes = codes;
  decode.scales = scales;
  decode.output = decoded;
  decode.output_type = TQ_TYPE_F32;
  decode.workspace = workspace;
  decode.workspace_bytes = workspace_bytes;
  REQUIRE(api->decode(codec, &decode) == TQ_OK);
  /* 4 bits lose .0095 of a rotated vector's energy in the mean; the mean of 106 vectors strays from it by about 1%. */
  const double mse = squared_error(decoded, input, count * kHeadDim) / squared_norm(input, count * kHeadDim);
  printf("%s: relative squared error %.5f\n", side == TQ_SIDE_K ? "keys" : "values", mse);
  REQUIRE(mse > 0.0085 && mse < 0.0105);
  free(workspace);
  free(codes);
  free(scales);
}

/* Attention of one query token over the loaded keys and values, for comparison. */
static void check_attention_row(const float *q, const float *k, const float *v, int head, const float *out, float lse) {
  const int kv_head = head / (kQHeads / kKvHeads);
  double logits[kTokens], sum = 0, expected[kHeadDim] = {0}, max = -INFINITY;
  for (int j = 0; j < kTokens; ++j) {
    double dot = 0;
    for (int c = 0; c < kHeadDim; ++c) dot += (double)q[head * kHeadDim + c] * k[j * kRow + kv_head * kHeadDim + c];
    logits[j] = dot / sqrt(kHeadDim);
    if (logits[j] > max) max = logits[j];
  }
  for (int j = 0; j < kTokens; ++j) {
    const double weight = exp(logits[j] - max);
    sum += weight;
    for (int c = 0; c < kHeadDim; ++c) expected[c] += weight * v[j * kRow + kv_head * kHeadDim + c];
  }
  double error = 0, norm = 0;
  for (int c = 0; c < kHeadDim; ++c) {
    expected[c] /= sum;
    error += (out[head * kHeadDim + c] - expected[c]) * (out[head * kHeadDim + c] - expected[c]);
    norm += expected[c] * expected[c];
  }
  printf("head %d: relative error %.2e, log-sum-exp error %.2e\n", head, sqrt(error / norm), lse - (max + log(sum)));
  /* The header's figure for integer paths; a logit of size 4 with 2^-14 relative error in its terms gives 3e-4. */
  REQUIRE(sqrt(error / norm) < 2e-4);
  REQUIRE(fabs(lse - (max + log(sum))) < 3e-4);
}

static void check_pages(const tq_codec *codec, const float *k, const float *v, const float *k_decoded,
                        const float *v_decoded) {
  tq_layout layout;
  layout.struct_size = sizeof layout;
  REQUIRE(api->page_layout(codec, TQ_PAGES_CODED, &layout) == TQ_OK);
  REQUIRE(layout.block_size_tokens == kBlock && layout.bytes_per_token == kKvHeads * 132);
  int64_t pool_bytes = 0;
  REQUIRE(api->pages_bytes(codec, TQ_PAGES_CODED, kBlocks, &pool_bytes) == TQ_OK);
  tq_pages pages = {sizeof pages};
  pages.base = aligned((size_t)pool_bytes);
  pages.num_blocks = kBlocks;
  pages.fingerprint = layout.fingerprint;

  const int32_t block_table[] = {5, 0, 6, 2};
  int64_t slots[kTokens];
  for (int t = 0; t < kTokens; ++t) slots[t] = block_table[t / kBlock] * kBlock + t % kBlock;
  size_t workspace_bytes = 0;
  REQUIRE(api->cache_workspace(codec, kTokens, &workspace_bytes) == TQ_OK);
  void *workspace = aligned(workspace_bytes);
  tq_faults faults;
  memset(&faults, 0, sizeof faults);
  tq_store_args store = {sizeof store};
  store.input_type = TQ_TYPE_F32;
  store.num_tokens = kTokens;
  store.k = k;
  store.v = v;
  store.pages = &pages;
  store.slots = slots;
  store.faults = &faults;
  store.workspace = workspace;
  store.workspace_bytes = workspace_bytes;
  REQUIRE(api->cache_store(codec, &store) == TQ_OK);
  float *k_loaded = aligned(sizeof(float) * kTokens * kRow), *v_loaded = aligned(sizeof(float) * kTokens * kRow);
  tq_load_args load = {sizeof load};
  load.output_type = TQ_TYPE_F32;
  load.num_tokens = kTokens;
  load.k = k_loaded;
  load.v = v_loaded;
  load.pages = &pages;
  load.slots = slots;
  load.faults = &faults;
  load.workspace = workspace;
  load.workspace_bytes = workspace_bytes;
  REQUIRE(api->cache_load(codec, &load) == TQ_OK && faults.first == 0);
  /* The same codes decoded by the same arithmetic. */
  REQUIRE(memcmp(k_loaded, k_decoded, sizeof(float) * kTokens * kRow) == 0);
  REQUIRE(memcmp(v_loaded, v_decoded, sizeof(float) * kTokens * kRow) == 0);
  free(workspace);

  float q[kQHeads * kHeadDim], out[kQHeads * kHeadDim], lse[kQHeads];
  fill_normal(q, kQHeads * kHeadDim);
  memset(out, 0xff, sizeof out);
  memset(lse, 0xff, sizeof lse);
  const int32_t length = kTokens;
  tq_attention_args attention = {sizeof attention};
  attention.flags = TQ_ATTENTION_CAUSAL;
  attention.num_seqs = attention.num_tokens = 1;
  attention.q_heads = kQHeads;
  attention.q_type = attention.out_type = TQ_TYPE_F32;
  attention.q = q;
  attention.pages = &pages;
  attention.block_table = block_table;
  attention.table_columns = 4;
  attention.lengths = &length;
  attention.out = out;
  attention.lse = lse;
  attention.faults = &faults;
  REQUIRE(api->attention_workspace(codec, &attention, &workspace_bytes) == TQ_OK);
  attention.workspace = workspace = aligned(workspace_bytes);
  attention.workspace_bytes = workspace_bytes;
  REQUIRE(api->paged_attention(codec, &attention) == TQ_OK && faults.first == 0);
  for (int h = 0; h < kQHeads; ++h) check_attention_row(q, k_loaded, v_loaded, h, out, lse[h]);
  free(workspace);
  free(pages.base);
  free(k_loaded);
  free(v_loaded);
}

int main(int argc, char **argv) {
  if (argc != 2) return fprintf(stderr, "usage: dlopen LIBRARY\n"), 2;
  const char *seed = getenv("TQKV_TEST_SEED");
  random_state = seed ? strtoull(seed, NULL, 0) : (uint64_t)time(NULL);
  printf("TQKV_TEST_SEED=%llu\n", (unsigned long long)random_state);
  check_table(argv[1]);
  check_refusals();

  tq_config config;
  REQUIRE(api->config_init(&config, sizeof config, "k4v4") == TQ_OK);
  config.k.head_dim = kHeadDim;
  config.kv_heads = kKvHeads;
  REQUIRE(api->supports(&config) == TQ_OK);
  tq_codec *codec = NULL;
  REQUIRE(api->create(&config, &codec) == TQ_OK && codec);
  static float k[kTokens * kRow], v[kTokens * kRow], k_decoded[kTokens * kRow], v_decoded[kTokens * kRow];
  fill_normal(k, kTokens * kRow);
  fill_normal(v, kTokens * kRow);
  check_vectors(codec, k, TQ_SIDE_K, k_decoded);
  check_vectors(codec, v, TQ_SIDE_V, v_decoded);
  check_pages(codec, k, v, k_decoded, v_decoded);
  api->destroy(codec);
  puts("ok");
  return 0;
}
