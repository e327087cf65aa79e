// SPDX-License-Identifier: Apache-2.0
// Every bad argument of every function: its documented status, a sentence that names the argument, nothing written.
#include <algorithm>
#include <cstring>
#include <functional>

#include "support.hpp"

namespace {

template <class Args>
struct Case {
  const char *word;  // must be in the sentence
  tq_status status;
  std::function<void(Args &)> change;
};

const Target &scalar() {
  return targets().front();
}

bool names(const char *word) {
  return std::string(tq_last_error()).find(word) != std::string::npos;
}

// The struct as a caller of a later version would have it: `extra` unknown bytes behind it.
template <class Args>
struct Longer {
  Args args;
  uint8_t extra[24] = {};
};

// `call` takes the struct and gives the status; `untouched` says whether every output still holds its poison; `good` is
// a valid call, made last to prove that each refusal was due to its one change.
template <class Args, class Call, class Untouched>
void refuse(const Args &good, const std::vector<Case<Args>> &cases, Call call, Untouched untouched) {
  for (const Case<Args> &c : cases) {
    Args bad = good;
    c.change(bad);
    const tq_status status = call(&bad);
    INFO("refused: " << c.word << " (status " << status << ") " << tq_last_error());
    CHECK(status == c.status);
    CHECK(names(c.word));
    CHECK(untouched());
  }
  CHECK(call(nullptr) == TQ_ERROR_NULL_POINTER);
  for (uint32_t size : {0u, 4u, uint32_t(sizeof(Args) - 1)}) {
    Args small = good;
    small.struct_size = size;
    CHECK(call(&small) == TQ_ERROR_STRUCT_SIZE);
    CHECK(names("struct_size"));
    CHECK(untouched());
  }
  Longer<Args> longer{good};
  longer.args.struct_size = sizeof longer;
  longer.extra[23] = 1;
  CHECK(call(&longer.args) == TQ_ERROR_RESERVED_NOT_ZERO);
  CHECK(untouched());
  alignas(16) uint8_t shifted[sizeof(Args) + 1];
  std::memcpy(shifted + 1, &good, sizeof good);
  CHECK(call(reinterpret_cast<const Args *>(shifted + 1)) == TQ_ERROR_MISALIGNED);
  CHECK(untouched());
  longer.extra[23] = 0;
  const tq_status status = call(&longer.args);
  INFO(tq_last_error());
  CHECK(status == TQ_OK);
  Args again = good;
  CHECK(call(&again) == TQ_OK);
}

template <class T>
T *misaligned(const T *pointer, size_t by = 1) {
  return reinterpret_cast<T *>(reinterpret_cast<uintptr_t>(pointer) + by);
}

using Config = tq_config;

tq_config good_config() {
  tq_config config = make_config(scalar(), 64, 4, 3);
  config.kv_heads = 2;
  return config;
}

}  // namespace

TEST_CASE("statuses have names") {
  for (tq_status status : {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 20, 21, 40, 41, 42, 43, 60}) {
    CHECK(std::string(tq_status_string(status)) != "unknown status");
    CHECK(std::string(tq_status_string(status)).size() > 1);
  }
  for (tq_status status : {-1, 10, 19, 44, 61, 1000000})
    CHECK(std::string(tq_status_string(status)) == "unknown status");
}

TEST_CASE("tq_config_init refuses and clears") {
  tq_config config;
  std::memset(&config, 0xff, sizeof config);
  const tq_config poison = config;
  CHECK(tq_config_init(nullptr, sizeof config, nullptr) == TQ_ERROR_NULL_POINTER);
  CHECK(tq_config_init(&config, sizeof config - 1, nullptr) == TQ_ERROR_STRUCT_SIZE);
  CHECK(tq_config_init(&config, sizeof config, "k5v5") == TQ_ERROR_INVALID_ARGUMENT);
  CHECK(names("k5v5"));
  CHECK(tq_config_init(&config, sizeof config, "") == TQ_ERROR_INVALID_ARGUMENT);
  CHECK(tq_config_init(&config, sizeof config, std::string(5000, 'x').c_str()) == TQ_ERROR_INVALID_ARGUMENT);
  CHECK(std::memcmp(&config, &poison, sizeof config) == 0);

  Longer<tq_config> longer;
  std::memset(static_cast<void *>(&longer), 0xff, sizeof longer);
  CHECK(tq_config_init(&longer.args, sizeof longer, "k3v2") == TQ_OK);
  CHECK(longer.args.struct_size == sizeof longer);
  CHECK(longer.args.k.bits == 3);
  CHECK(longer.args.v.bits == 2);
  for (uint8_t byte : longer.extra) CHECK(byte == 0);
}

TEST_CASE("presets have their documented sizes") {
  const std::pair<const char *, int> sizes[] = {{"k4v4", 132},      {"safe", 132},    {"k4v3", 116}, {"balanced", 116},
                                                {"k3v3", 100},      {"compact", 100}, {"k4v2", 100}, {"k3v2", 84},
                                                {"aggressive", 84}, {"k2v2", 68},     {"raw", 512}};
  for (const auto &[name, bytes] : sizes) {
    tq_config config;
    REQUIRE(tq_config_init(&config, sizeof config, name) == TQ_OK);
    config.k.head_dim = 128;
    CHECK(layout_of(make_codec(config).get(), TQ_PAGES_CODED).bytes_per_token == bytes);
  }
  std::vector<std::string> listed;
  for (int32_t i = 0; tq_preset_name(i); ++i) listed.push_back(tq_preset_name(i));
  for (const auto &[name, bytes] : sizes) CHECK(std::count(listed.begin(), listed.end(), name) == 1);
  CHECK(tq_preset_name(-1) == nullptr);
  CHECK(tq_preset_name(INT32_MAX) == nullptr);
  tq_config config;
  for (const std::string &name : listed) CHECK(tq_config_init(&config, sizeof config, name.c_str()) == TQ_OK);
}

TEST_CASE("tq_create and tq_supports refuse alike") {
  FRESH(random, "refusals create");
  static float matrix[64 * 64], levels[16], bad_levels[16];
  const std::vector<float> orthogonal = random_orthogonal(random, 64);
  std::copy(orthogonal.begin(), orthogonal.end(), matrix);
  for (int i = 0; i < 16; ++i) levels[i] = float(2 * i - 15);
  const auto custom = [](Config &c, int which) {
    std::copy(levels, levels + 16, bad_levels);
    c.k.codebook = TQ_CODEBOOK_CUSTOM;
    c.k.num_levels = 16;
    c.k.levels = bad_levels;
    if (which == 0) bad_levels[3] = bad_levels[2];  // not ascending
    if (which == 1) bad_levels[15] = 40;            // not symmetric
    if (which == 2) bad_levels[4] = std::nanf("");
    if (which == 3) bad_levels[15] = std::numeric_limits<float>::infinity();
  };
  const std::vector<Case<Config>> cases = {
      {"device", TQ_ERROR_UNKNOWN_ENUM, [](Config &c) { c.device = 7; }},
      {"device", TQ_ERROR_UNKNOWN_ENUM, [](Config &c) { c.device = -1; }},
      {"device_ordinal", TQ_ERROR_INVALID_ARGUMENT, [](Config &c) { c.device_ordinal = 1; }},
      {"kv_heads", TQ_ERROR_INVALID_ARGUMENT, [](Config &c) { c.kv_heads = -1; }},
      {"1025", TQ_ERROR_INVALID_ARGUMENT, [](Config &c) { c.kv_heads = 1025; }},
      {"k.head_dim", TQ_ERROR_INVALID_ARGUMENT, [](Config &c) { c.k.head_dim = 0; }},
      {"k.head_dim", TQ_ERROR_INVALID_ARGUMENT, [](Config &c) { c.k.head_dim = 24; }},
      {"v.head_dim", TQ_ERROR_INVALID_ARGUMENT, [](Config &c) { c.v.head_dim = 592; }},
      {"-64", TQ_ERROR_INVALID_ARGUMENT, [](Config &c) { c.v.head_dim = -64; }},
      {"k.bits", TQ_ERROR_INVALID_ARGUMENT, [](Config &c) { c.k.bits = 5; }},
      {"v.bits", TQ_ERROR_INVALID_ARGUMENT, [](Config &c) { c.v.bits = -4; }},
      {"rotation", TQ_ERROR_UNKNOWN_ENUM, [](Config &c) { c.k.rotation = 5; }},
      {"rotation", TQ_ERROR_UNKNOWN_ENUM, [](Config &c) { c.v.rotation = -1; }},
      {"hadamard_rounds", TQ_ERROR_INVALID_ARGUMENT, [](Config &c) { c.k.hadamard_rounds = 4; }},
      {"hadamard_rounds", TQ_ERROR_INVALID_ARGUMENT, [](Config &c) { c.k.hadamard_rounds = -1; }},
      {"hadamard_rounds", TQ_ERROR_INVALID_ARGUMENT,
       [](Config &c) { c.k.hadamard_rounds = 2, c.k.rotation = TQ_ROTATION_NONE; }},
      {"Hadamard", TQ_ERROR_NOT_SUPPORTED, [](Config &c) { c.k.head_dim = 208; }},
      {"codebook", TQ_ERROR_UNKNOWN_ENUM, [](Config &c) { c.v.codebook = 5; }},
      {"codebook", TQ_ERROR_NOT_SUPPORTED, [](Config &c) { c.v.bits = 8, c.v.codebook = TQ_CODEBOOK_BETA; }},
      {"scale_rule", TQ_ERROR_UNKNOWN_ENUM, [](Config &c) { c.v.scale_rule = 4; }},
      {"scale_type", TQ_ERROR_UNKNOWN_ENUM, [](Config &c) { c.v.scale_type = 9; }},
      {"scale_type", TQ_ERROR_UNKNOWN_ENUM, [](Config &c) { c.v.scale_type = TQ_TYPE_BF16; }},
      {"num_levels", TQ_ERROR_INVALID_ARGUMENT, [&](Config &c) { custom(c, 9), c.k.num_levels = 8; }},
      {"levels", TQ_ERROR_NULL_POINTER, [&](Config &c) { custom(c, 9), c.k.levels = nullptr; }},
      {"levels", TQ_ERROR_INVALID_ARGUMENT, [&](Config &c) { custom(c, 0); }},
      {"levels", TQ_ERROR_INVALID_ARGUMENT, [&](Config &c) { custom(c, 1); }},
      {"levels", TQ_ERROR_INVALID_ARGUMENT, [&](Config &c) { custom(c, 2); }},
      {"levels", TQ_ERROR_INVALID_ARGUMENT, [&](Config &c) { custom(c, 3); }},
      {"levels", TQ_ERROR_INVALID_ARGUMENT, [](Config &c) { c.k.levels = levels; }},
      {"matrix", TQ_ERROR_NULL_POINTER, [](Config &c) { c.k.rotation = TQ_ROTATION_CUSTOM; }},
      {"matrix", TQ_ERROR_INVALID_ARGUMENT, [](Config &c) { c.k.matrix = matrix; }},
      {"raw", TQ_ERROR_NOT_SUPPORTED, [](Config &c) { c.v.bits = 16, c.v.rotation = TQ_ROTATION_HADAMARD; }},
      {"reserved", TQ_ERROR_RESERVED_NOT_ZERO, [](Config &c) { c.k.reserved[3] = 1; }},
      {"reserved", TQ_ERROR_RESERVED_NOT_ZERO, [](Config &c) { c.v.reserved[0] = 1; }},
      {"reserved", TQ_ERROR_RESERVED_NOT_ZERO, [](Config &c) { c.reserved = 1; }},
      {"block_size_tokens", TQ_ERROR_INVALID_ARGUMENT, [](Config &c) { c.block_size_tokens = 2; }},
      {"block_size_tokens", TQ_ERROR_INVALID_ARGUMENT, [](Config &c) { c.block_size_tokens = 24; }},
      {"block_size_tokens", TQ_ERROR_INVALID_ARGUMENT, [](Config &c) { c.block_size_tokens = 272; }},
      {"block_size_tokens", TQ_ERROR_INVALID_ARGUMENT, [](Config &c) { c.block_size_tokens = -16; }},
      {"exact_block_size_tokens", TQ_ERROR_INVALID_ARGUMENT, [](Config &c) { c.exact_block_size_tokens = 4; }},
      {"raw_type", TQ_ERROR_UNKNOWN_ENUM, [](Config &c) { c.raw_type = TQ_TYPE_F32; }},
      {"raw_type", TQ_ERROR_UNKNOWN_ENUM, [](Config &c) { c.raw_type = 77; }},
      {"simd", TQ_ERROR_UNKNOWN_ENUM, [](Config &c) { c.simd = 5; }},
      {"threads", TQ_ERROR_INVALID_ARGUMENT, [](Config &c) { c.threads = -1; }},
      {"threads", TQ_ERROR_INVALID_ARGUMENT,
       [](Config &c) { c.parallel_for = [](void *, int64_t, void (*)(void *, int64_t), void *) {}; }},
  };
  refuse(
      good_config(), cases, [](const Config *config) { return tq_supports(config); }, [] { return true; });
  tq_codec *const poison = reinterpret_cast<tq_codec *>(0x1234);
  tq_codec *codec = poison;
  refuse(
      good_config(), cases,
      [&](const Config *config) {
        codec = poison;
        const tq_status status = tq_create(config, &codec);
        if (status == TQ_OK) {
          tq_destroy(codec);
          codec = poison;
        }
        return status;
      },
      [&] { return codec == poison; });
  const tq_config config = good_config();
  CHECK(tq_create(&config, nullptr) == TQ_ERROR_NULL_POINTER);
  CHECK(names("codec"));
}

TEST_CASE("a CUDA codec without a CUDA device is refused with the reason") {
  int32_t count = -1;
  const char *reason = nullptr;
  REQUIRE(tq_device_count(TQ_DEVICE_CUDA, &count, &reason) == TQ_OK);
  if (count > 0) return;
  REQUIRE(reason != nullptr);
  CHECK(std::string(reason).size() > 10);
  tq_config config = good_config();
  config.simd = config.threads = 0;
  config.device = TQ_DEVICE_CUDA;
  CHECK(tq_supports(&config) == TQ_ERROR_NO_DEVICE);
  CHECK(names(reason));
  tq_codec *codec = nullptr;
  CHECK(tq_create(&config, &codec) == TQ_ERROR_NO_DEVICE);
  CHECK(codec == nullptr);
}

TEST_CASE("devices and builds") {
  int32_t count = -1;
  CHECK(tq_device_count(9, &count, nullptr) == TQ_ERROR_UNKNOWN_ENUM);
  CHECK(tq_device_count(TQ_DEVICE_CPU, nullptr, nullptr) == TQ_ERROR_NULL_POINTER);
  CHECK(count == -1);
  CHECK(tq_device_count(TQ_DEVICE_CPU, &count, nullptr) == TQ_OK);
  CHECK(count == 1);
  tq_device_info info;
  std::memset(&info, 0xff, sizeof info);
  const tq_device_info poison = info;
  info.struct_size = sizeof info - 1;
  CHECK(tq_device_get_info(TQ_DEVICE_CPU, 0, &info) == TQ_ERROR_STRUCT_SIZE);
  CHECK(tq_device_get_info(TQ_DEVICE_CPU, 0, nullptr) == TQ_ERROR_NULL_POINTER);
  info.struct_size = sizeof info;
  CHECK(tq_device_get_info(9, 0, &info) == TQ_ERROR_UNKNOWN_ENUM);
  CHECK(tq_device_get_info(TQ_DEVICE_CPU, 1, &info) != TQ_OK);
  CHECK(tq_device_get_info(TQ_DEVICE_CPU, -1, &info) != TQ_OK);
  CHECK(std::memcmp(reinterpret_cast<uint8_t *>(&info) + 4, reinterpret_cast<const uint8_t *>(&poison) + 4,
                    sizeof info - 4) == 0);
  CHECK(tq_device_get_info(TQ_DEVICE_CPU, 0, &info) == TQ_OK);
  CHECK(info.processors > 0);
  CHECK(info.memory_bytes > 0);
  CHECK(info.compute_capability == 0);
  CHECK(std::memchr(info.name, 0, sizeof info.name) != nullptr);

  tq_build build = {};
  CHECK(tq_build_info(nullptr) == TQ_ERROR_NULL_POINTER);
  CHECK(tq_build_info(&build) == TQ_ERROR_STRUCT_SIZE);
  const tq_api *api = nullptr;
  CHECK(tq_get_api(1, nullptr) == TQ_ERROR_NULL_POINTER);
  CHECK(tq_get_api(0, &api) == TQ_ERROR_NOT_SUPPORTED);
  CHECK(tq_get_api(2, &api) == TQ_ERROR_NOT_SUPPORTED);
  CHECK(api == nullptr);
  CHECK(tq_get_api(TQKV_ABI_VERSION, &api) == TQ_OK);
  REQUIRE(api != nullptr);
  CHECK(api->struct_size == sizeof(tq_api));
  CHECK(api->abi_version == tq_abi_version());
  CHECK(api->version() == tq_version());
  CHECK(tq_version() == TQKV_VERSION_MAJOR * 10000 + TQKV_VERSION_MINOR * 100 + TQKV_VERSION_PATCH);
}

TEST_CASE("queries of a codec refuse") {
  const CodecPtr codec = make_codec(good_config());
  tq_codec_info info;
  std::memset(&info, 0xff, sizeof info);
  CHECK(tq_info(nullptr, &info) == TQ_ERROR_NULL_POINTER);
  CHECK(tq_info(codec.get(), nullptr) == TQ_ERROR_NULL_POINTER);
  info.struct_size = sizeof info - 4;
  CHECK(tq_info(codec.get(), &info) == TQ_ERROR_STRUCT_SIZE);
  CHECK(info.device == -1);
  Longer<tq_codec_info> longer;
  std::memset(static_cast<void *>(&longer), 0xff, sizeof longer);
  longer.args.struct_size = sizeof longer;
  CHECK(tq_info(codec.get(), &longer.args) == TQ_OK);
  for (uint8_t byte : longer.extra) CHECK(byte == 0xff);  // filled up to what the library knows
  CHECK(longer.args.struct_size == sizeof longer);

  tq_layout layout;
  std::memset(&layout, 0xff, sizeof layout);
  layout.struct_size = sizeof layout;
  CHECK(tq_page_layout(nullptr, TQ_PAGES_CODED, &layout) == TQ_ERROR_NULL_POINTER);
  CHECK(tq_page_layout(codec.get(), 2, &layout) == TQ_ERROR_UNKNOWN_ENUM);
  CHECK(tq_page_layout(codec.get(), TQ_PAGES_CODED, nullptr) == TQ_ERROR_NULL_POINTER);
  layout.struct_size = 8;
  CHECK(tq_page_layout(codec.get(), TQ_PAGES_CODED, &layout) == TQ_ERROR_STRUCT_SIZE);
  CHECK(layout.tile_bytes == -1);
  int64_t bytes = -1;
  CHECK(tq_pages_bytes(nullptr, TQ_PAGES_CODED, 1, &bytes) == TQ_ERROR_NULL_POINTER);
  CHECK(tq_pages_bytes(codec.get(), 7, 1, &bytes) == TQ_ERROR_UNKNOWN_ENUM);
  CHECK(tq_pages_bytes(codec.get(), TQ_PAGES_CODED, 1, nullptr) == TQ_ERROR_NULL_POINTER);
  CHECK(bytes == -1);
  size_t size = 77;
  CHECK(tq_vectors_workspace(nullptr, TQ_SIDE_K, 1, &size) == TQ_ERROR_NULL_POINTER);
  CHECK(tq_vectors_workspace(codec.get(), 2, 1, &size) == TQ_ERROR_UNKNOWN_ENUM);
  CHECK(tq_vectors_workspace(codec.get(), TQ_SIDE_K, -1, &size) == TQ_ERROR_INVALID_ARGUMENT);
  CHECK(tq_vectors_workspace(codec.get(), TQ_SIDE_K, 1, nullptr) == TQ_ERROR_NULL_POINTER);
  CHECK(tq_cache_workspace(nullptr, 1, &size) == TQ_ERROR_NULL_POINTER);
  CHECK(tq_cache_workspace(codec.get(), -1, &size) == TQ_ERROR_INVALID_ARGUMENT);
  CHECK(tq_cache_workspace(codec.get(), 1, nullptr) == TQ_ERROR_NULL_POINTER);
  CHECK(size == 77);
}

TEST_CASE("tq_encode and tq_decode refuse") {
  Device &device = *scalar().device;
  const CodecPtr codec = make_codec(good_config());
  tq_config raw_config = good_config();
  raw_config.k.bits = 16;
  const CodecPtr raw = make_codec(raw_config);
  const Bytes input(device, std::vector<float>(64 * 4, 1.0f)), codes(device, size_t{4 * 32}), scales(device, size_t{8}),
      faults(device, std::vector<tq_faults>(1)), raw_codes(device, size_t{4 * 128});
  tq_encode_args good = {};
  good.struct_size = sizeof good;
  good.count = 4;
  good.input = input.data();
  good.input_type = TQ_TYPE_F32;
  good.codes = codes.data();
  good.scales = scales.data();
  good.faults = faults.as<tq_faults>();
  using A = tq_encode_args;
  const std::vector<Case<A>> cases = {
      {"side", TQ_ERROR_UNKNOWN_ENUM, [](A &a) { a.side = 2; }},
      {"count", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.count = -1; }},
      {"input", TQ_ERROR_NULL_POINTER, [](A &a) { a.input = nullptr; }},
      {"input", TQ_ERROR_MISALIGNED, [](A &a) { a.input = misaligned(static_cast<const char *>(a.input)); }},
      {"input_type", TQ_ERROR_UNKNOWN_ENUM, [](A &a) { a.input_type = 0; }},
      {"input_type", TQ_ERROR_UNKNOWN_ENUM, [](A &a) { a.input_type = 4; }},
      {"reserved", TQ_ERROR_RESERVED_NOT_ZERO, [](A &a) { a.reserved = 1; }},
      {"input", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.input_stride = 63; }},
      {"input", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.input_stride = -64; }},
      {"input", TQ_ERROR_OVERFLOW, [](A &a) { a.input_stride = INT64_MAX / 2; }},
      {"codes", TQ_ERROR_NULL_POINTER, [](A &a) { a.codes = nullptr; }},
      {"codes", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.codes_stride_bytes = 31; }},
      {"codes", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.codes_stride_bytes = -32; }},
      {"codes", TQ_ERROR_OVERFLOW, [](A &a) { a.codes_stride_bytes = INT64_MAX / 2; }},
      {"scales", TQ_ERROR_NULL_POINTER, [](A &a) { a.scales = nullptr; }},
      {"scales", TQ_ERROR_MISALIGNED, [](A &a) { a.scales = misaligned(static_cast<char *>(a.scales)); }},
      {"scales", TQ_ERROR_MISALIGNED, [](A &a) { a.scales_stride_bytes = 3; }},
      {"scales", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.scales_stride_bytes = -2; }},
      {"scales", TQ_ERROR_OVERFLOW, [](A &a) { a.scales_stride_bytes = INT64_MAX / 4 * 2; }},
      {"faults", TQ_ERROR_MISALIGNED, [](A &a) { a.faults = misaligned(a.faults, 4); }},
      {"", TQ_ERROR_OVERFLOW, [](A &a) { a.count = INT64_MAX; }},
  };
  CHECK(tq_encode(nullptr, &good) == TQ_ERROR_NULL_POINTER);
  refuse(
      good, cases, [&](const A *a) { return tq_encode(codec.get(), a); },
      [&] { return codes.poisoned() && scales.poisoned(); });
  A raw_good = good;
  raw_good.codes = raw_codes.data();
  raw_good.scales = nullptr;
  const std::vector<Case<A>> raw_cases = {
      {"scales", TQ_ERROR_INVALID_ARGUMENT, [&](A &a) { a.scales = scales.data(); }},
      {"codes", TQ_ERROR_MISALIGNED, [](A &a) { a.codes = misaligned(static_cast<char *>(a.codes)); }},
      {"codes", TQ_ERROR_MISALIGNED, [](A &a) { a.codes_stride_bytes = 129; }},
  };
  refuse(
      raw_good, raw_cases, [&](const A *a) { return tq_encode(raw.get(), a); }, [&] { return raw_codes.poisoned(); });

  const Bytes output(device, size_t{64 * 4 * 4});
  tq_decode_args back = {};
  back.struct_size = sizeof back;
  back.count = 4;
  back.codes = codes.data();
  back.scales = scales.data();
  back.output = output.data();
  back.output_type = TQ_TYPE_F32;
  using D = tq_decode_args;
  const std::vector<Case<D>> decode_cases = {
      {"side", TQ_ERROR_UNKNOWN_ENUM, [](D &a) { a.side = -1; }},
      {"count", TQ_ERROR_INVALID_ARGUMENT, [](D &a) { a.count = INT64_MIN; }},
      {"output", TQ_ERROR_NULL_POINTER, [](D &a) { a.output = nullptr; }},
      {"output", TQ_ERROR_MISALIGNED, [](D &a) { a.output = misaligned(static_cast<char *>(a.output), 2); }},
      {"output_type", TQ_ERROR_UNKNOWN_ENUM, [](D &a) { a.output_type = 9; }},
      {"output", TQ_ERROR_INVALID_ARGUMENT, [](D &a) { a.output_stride = 1; }},
      {"reserved", TQ_ERROR_RESERVED_NOT_ZERO, [](D &a) { a.reserved = 5; }},
      {"codes", TQ_ERROR_NULL_POINTER, [](D &a) { a.codes = nullptr; }},
      {"scales", TQ_ERROR_NULL_POINTER, [](D &a) { a.scales = nullptr; }},
      {"codes", TQ_ERROR_INVALID_ARGUMENT, [](D &a) { a.codes_stride_bytes = 8; }},
      {"", TQ_ERROR_OVERFLOW, [](D &a) { a.count = INT64_MAX / 2; }},
  };
  CHECK(tq_decode(nullptr, &back) == TQ_ERROR_NULL_POINTER);
  refuse(
      back, decode_cases, [&](const D *a) { return tq_decode(codec.get(), a); }, [&] { return output.poisoned(); });
}

namespace {

// Pools, slots and dense arrays of a small codec, all poisoned.
struct Small {
  CodecPtr codec = make_codec(good_config());
  tq_codec_info info = info_of(codec.get());
  tq_layout layout = layout_of(codec.get(), TQ_PAGES_CODED), exact_layout = layout_of(codec.get(), TQ_PAGES_EXACT);
  Device &device = *scalar().device;
  Bytes pool{device, size_t(4 * layout.block_stride_bytes)}, exact{device, size_t(4 * exact_layout.block_stride_bytes)};
  Bytes other{device, size_t(4 * layout.block_stride_bytes)};
  tq_pages pages{sizeof(tq_pages), 0, pool.data(), 4, 0, 0, 0, info.page_fingerprint};
  tq_pages exact_pages{sizeof(tq_pages), 0, exact.data(), 4, 0, 0, 0, info.exact_fingerprint};
  tq_pages other_pages{sizeof(tq_pages), 0, other.data(), 4, 0, 0, 0, info.page_fingerprint};
  Bytes slots{device, std::vector<int64_t>{0, 1, 2}}, exact_slots{device, std::vector<int64_t>{3, -1, 4}};
  Bytes k{device, std::vector<float>(3 * 2 * 64, 1.0f)}, v{device, std::vector<float>(3 * 2 * 64, 1.0f)};
  Bytes faults{device, std::vector<tq_faults>(1)};
};

// What can be wrong with a pool's description; `word` is the field's name in the struct that holds it.
struct BadPages {
  const char *word;
  tq_status status;
  std::function<void(tq_pages &)> change;
};

std::vector<BadPages> bad_pages() {
  return {
      {"struct_size", TQ_ERROR_STRUCT_SIZE, [](tq_pages &p) { p.struct_size = 8; }},
      {"base", TQ_ERROR_NULL_POINTER, [](tq_pages &p) { p.base = nullptr; }},
      {"base", TQ_ERROR_MISALIGNED, [](tq_pages &p) { p.base = misaligned(static_cast<char *>(p.base), 8); }},
      {"reserved", TQ_ERROR_RESERVED_NOT_ZERO, [](tq_pages &p) { p.reserved = 1; }},
      {"num_blocks", TQ_ERROR_INVALID_ARGUMENT, [](tq_pages &p) { p.num_blocks = -1; }},
      {"overflow", TQ_ERROR_OVERFLOW, [](tq_pages &p) { p.num_blocks = INT64_MAX / 4; }},
      {"block_stride_bytes", TQ_ERROR_MISALIGNED, [](tq_pages &p) { p.block_stride_bytes = 1000001; }},
      {"tile_stride_bytes", TQ_ERROR_MISALIGNED, [](tq_pages &p) { p.tile_stride_bytes = 1000008; }},
      {"head_stride_bytes", TQ_ERROR_MISALIGNED, [](tq_pages &p) { p.head_stride_bytes = 1000004; }},
      {"block_stride_bytes", TQ_ERROR_INVALID_ARGUMENT, [](tq_pages &p) { p.block_stride_bytes = 16; }},
      {"block_stride_bytes", TQ_ERROR_INVALID_ARGUMENT, [](tq_pages &p) { p.block_stride_bytes = -4096; }},
      {"head_stride_bytes", TQ_ERROR_INVALID_ARGUMENT, [](tq_pages &p) { p.head_stride_bytes = 32; }},
      {"block_stride_bytes", TQ_ERROR_OVERFLOW, [](tq_pages &p) { p.block_stride_bytes = INT64_MAX / 2 / 16 * 16; }},
      {"fingerprint", TQ_ERROR_FINGERPRINT_MISMATCH, [](tq_pages &p) { p.fingerprint ^= 1; }},
      {"fingerprint", TQ_ERROR_FINGERPRINT_MISMATCH, [](tq_pages &p) { p.fingerprint = 0; }},
  };
}

// Cases of `Args` for the pool that `member` points to. The changed descriptions live in `storage`.
template <class Args>
std::vector<Case<Args>> pages_cases(const tq_pages *Args::*member, std::vector<std::unique_ptr<tq_pages>> *storage,
                                    bool skip_pointers = false) {
  std::vector<Case<Args>> cases;
  for (const BadPages &bad : bad_pages()) {
    if (skip_pointers && std::string(bad.word) == "base") continue;
    cases.push_back({bad.word, bad.status, [member, storage, change = bad.change](Args &args) {
                       storage->push_back(std::make_unique<tq_pages>(*(args.*member)));
                       change(*storage->back());
                       args.*member = storage->back().get();
                     }});
  }
  return cases;
}

}  // namespace

TEST_CASE("tq_cache_store refuses") {
  Small s;
  std::vector<std::unique_ptr<tq_pages>> storage;
  using A = tq_store_args;
  A good = {};
  good.struct_size = sizeof good;
  good.input_type = TQ_TYPE_F32;
  good.num_tokens = 3;
  good.k = s.k.data();
  good.v = s.v.data();
  good.pages = &s.pages;
  good.slots = s.slots.as<int64_t>();
  good.exact_pages = &s.exact_pages;
  good.exact_slots = s.exact_slots.as<int64_t>();
  good.faults = s.faults.as<tq_faults>();
  const Bytes offset(s.device, std::vector<float>(2 * 64, 0.0f));
  std::vector<Case<A>> cases = {
      {"input_type", TQ_ERROR_UNKNOWN_ENUM, [](A &a) { a.input_type = 0; }},
      {"num_tokens", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.num_tokens = -1; }},
      {"", TQ_ERROR_OVERFLOW, [](A &a) { a.num_tokens = INT64_MAX / 8; }},
      {"k", TQ_ERROR_NULL_POINTER, [](A &a) { a.k = nullptr; }},
      {"v", TQ_ERROR_NULL_POINTER, [](A &a) { a.v = nullptr; }},
      {"k", TQ_ERROR_MISALIGNED, [](A &a) { a.k = misaligned(static_cast<const char *>(a.k), 2); }},
      {"v", TQ_ERROR_MISALIGNED, [](A &a) { a.v = misaligned(static_cast<const char *>(a.v)); }},
      {"args.k", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.k_token_stride = -1; }},
      {"args.k", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.k_head_stride = 63; }},
      {"args.v", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.v_token_stride = 63; }},
      {"args.v", TQ_ERROR_OVERFLOW, [](A &a) { a.v_head_stride = INT64_MAX; }},
      {"pages", TQ_ERROR_NULL_POINTER, [](A &a) { a.pages = nullptr; }},
      {"slots", TQ_ERROR_NULL_POINTER, [](A &a) { a.slots = nullptr; }},
      {"slots", TQ_ERROR_MISALIGNED, [](A &a) { a.slots = misaligned(a.slots, 4); }},
      {"exact_slots", TQ_ERROR_NULL_POINTER, [](A &a) { a.exact_slots = nullptr; }},
      {"exact_slots", TQ_ERROR_MISALIGNED, [](A &a) { a.exact_slots = misaligned(a.exact_slots, 4); }},
      {"exact_pages", TQ_ERROR_NULL_POINTER, [](A &a) { a.exact_pages = nullptr; }},
      {"exact_pages", TQ_ERROR_FINGERPRINT_MISMATCH, [&](A &a) { a.exact_pages = &s.pages; }},
      {"pages", TQ_ERROR_FINGERPRINT_MISMATCH, [&](A &a) { a.pages = &s.exact_pages; }},
      {"key_offset", TQ_ERROR_MISALIGNED, [&](A &a) { a.key_offset = misaligned(offset.as<float>(), 2); }},
      {"faults", TQ_ERROR_MISALIGNED, [](A &a) { a.faults = misaligned(a.faults, 4); }},
  };
  for (const auto &c : pages_cases<A>(&A::pages, &storage)) cases.push_back(c);
  for (const auto &c : pages_cases<A>(&A::exact_pages, &storage)) cases.push_back(c);
  CHECK(tq_cache_store(nullptr, &good) == TQ_ERROR_NULL_POINTER);
  refuse(
      good, cases, [&](const A *a) { return tq_cache_store(s.codec.get(), a); },
      [&] { return s.pool.poisoned() && s.exact.poisoned(); });
}

TEST_CASE("tq_cache_load refuses") {
  Small s;
  std::vector<std::unique_ptr<tq_pages>> storage;
  const Bytes k(s.device, size_t{3 * 2 * 64 * 2}), v(s.device, size_t{3 * 2 * 64 * 2});
  using A = tq_load_args;
  A good = {};
  good.struct_size = sizeof good;
  good.output_type = TQ_TYPE_BF16;
  good.num_tokens = 3;
  good.k = k.data();
  good.v = v.data();
  good.pages = &s.pages;
  good.slots = s.slots.as<int64_t>();
  good.exact_pages = &s.exact_pages;
  good.exact_slots = s.exact_slots.as<int64_t>();
  good.faults = s.faults.as<tq_faults>();
  std::vector<Case<A>> cases = {
      {"output_type", TQ_ERROR_UNKNOWN_ENUM, [](A &a) { a.output_type = 4; }},
      {"num_tokens", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.num_tokens = -5; }},
      {"k", TQ_ERROR_MISALIGNED, [](A &a) { a.k = misaligned(static_cast<char *>(a.k)); }},
      {"v", TQ_ERROR_MISALIGNED, [](A &a) { a.v = misaligned(static_cast<char *>(a.v)); }},
      {"args.k", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.k_head_stride = 1; }},
      {"args.v", TQ_ERROR_OVERFLOW, [](A &a) { a.v_token_stride = INT64_MAX / 2; }},
      {"pages", TQ_ERROR_NULL_POINTER, [](A &a) { a.pages = nullptr; }},
      {"slots", TQ_ERROR_NULL_POINTER, [](A &a) { a.slots = nullptr; }},
      {"exact_slots", TQ_ERROR_NULL_POINTER, [](A &a) { a.exact_slots = nullptr; }},
      {"exact_pages", TQ_ERROR_NULL_POINTER, [](A &a) { a.exact_pages = nullptr; }},
      {"faults", TQ_ERROR_MISALIGNED, [](A &a) { a.faults = misaligned(a.faults, 4); }},
  };
  for (const auto &c : pages_cases<A>(&A::pages, &storage)) cases.push_back(c);
  for (const auto &c : pages_cases<A>(&A::exact_pages, &storage)) cases.push_back(c);
  CHECK(tq_cache_load(nullptr, &good) == TQ_ERROR_NULL_POINTER);
  refuse(
      good, cases, [&](const A *a) { return tq_cache_load(s.codec.get(), a); },
      [&] { return k.poisoned() && v.poisoned(); });
}

TEST_CASE("tq_cache_copy refuses") {
  Small s;
  std::vector<std::unique_ptr<tq_pages>> storage;
  const Bytes pairs(s.device, std::vector<int64_t>{0, 1, 2, 3}), exact_pairs(s.device, std::vector<int64_t>{1, 0});
  // Sources hold zeros, so that a copy would show over the poison.
  const std::vector<uint8_t> zeros(s.pool.size(), 0);
  s.pool.upload(zeros.data());
  using A = tq_copy_args;
  A good = {};
  good.struct_size = sizeof good;
  good.src = &s.pages;
  good.dst = &s.other_pages;
  good.pairs = pairs.as<int64_t>();
  good.num_pairs = 2;
  good.exact_src = &s.exact_pages;
  good.exact_pairs = exact_pairs.as<int64_t>();
  good.num_exact_pairs = 1;
  good.faults = s.faults.as<tq_faults>();
  std::vector<Case<A>> cases = {
      {"pairs_on_host", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.pairs_on_host = 2; }},
      {"src", TQ_ERROR_NULL_POINTER, [](A &a) { a.src = nullptr; }},
      {"src", TQ_ERROR_NULL_POINTER, [](A &a) { a.src = a.dst = nullptr; }},
      {"exact_src", TQ_ERROR_NULL_POINTER, [](A &a) { a.exact_src = nullptr; }},
      {"pairs", TQ_ERROR_NULL_POINTER, [](A &a) { a.pairs = nullptr; }},
      {"exact_pairs", TQ_ERROR_NULL_POINTER, [](A &a) { a.exact_pairs = nullptr; }},
      {"pairs", TQ_ERROR_MISALIGNED, [](A &a) { a.pairs = misaligned(a.pairs, 4); }},
      {"num_pairs", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.num_pairs = -1; }},
      {"num_exact_pairs", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.num_exact_pairs = -1; }},
      {"num_pairs", TQ_ERROR_OVERFLOW, [](A &a) { a.num_pairs = INT64_MAX; }},
      {"faults", TQ_ERROR_MISALIGNED, [](A &a) { a.faults = misaligned(a.faults, 4); }},
  };
  for (const auto &c : pages_cases<A>(&A::src, &storage)) cases.push_back(c);
  for (const auto &c : pages_cases<A>(&A::dst, &storage)) cases.push_back(c);
  for (const auto &c : pages_cases<A>(&A::exact_src, &storage)) cases.push_back(c);
  CHECK(tq_cache_copy(nullptr, &good) == TQ_ERROR_NULL_POINTER);
  refuse(
      good, cases, [&](const A *a) { return tq_cache_copy(s.codec.get(), a); },
      [&] { return s.other.poisoned() && s.exact.poisoned(); });
}

TEST_CASE("tq_paged_attention and tq_attention_workspace refuse alike") {
  Small s;
  std::vector<std::unique_ptr<tq_pages>> storage;
  Device &device = s.device;
  const Bytes q(device, std::vector<float>(3 * 4 * 64, 0.5f)), cu(device, std::vector<int32_t>{0, 2, 3}),
      table(device, std::vector<int32_t>{0, 1, 2, 3}), lengths(device, std::vector<int32_t>{5, 7}),
      exact_table(device, std::vector<int32_t>{0, 1, 2, 3}), indptr(device, std::vector<int32_t>{0, 2, 4}),
      out(device, size_t{3 * 4 * 64 * 4}), lse(device, size_t{3 * 4 * 4}),
      floats(device, std::vector<float>(128, 0.0f)), ints(device, std::vector<int32_t>(8, 0)),
      news(device, std::vector<float>(3 * 2 * 64, 1.0f));
  // Both sides must be finite where they are read.
  const std::vector<uint8_t> zeros(s.pool.size(), 0), exact_zeros(s.exact.size(), 0);
  s.pool.upload(zeros.data());
  s.exact.upload(exact_zeros.data());
  using A = tq_attention_args;
  A good = {};
  good.struct_size = sizeof good;
  good.num_seqs = 2;
  good.num_tokens = 3;
  good.q_heads = 4;
  good.q_type = TQ_TYPE_F32;
  good.q = q.data();
  good.cu_seqlens_q = cu.as<int32_t>();
  good.pages = &s.pages;
  good.block_table = table.as<int32_t>();
  good.table_columns = 2;
  good.lengths = lengths.as<int32_t>();
  good.exact_pages = &s.exact_pages;
  good.exact_table = exact_table.as<int32_t>();
  good.exact_columns = 2;
  good.out = out.data();
  good.out_type = TQ_TYPE_F32;
  good.lse = lse.as<float>();
  good.faults = s.faults.as<tq_faults>();
  size_t needed = 0;
  REQUIRE(tq_attention_workspace(s.codec.get(), &good, &needed) == TQ_OK);
  REQUIRE(needed > 0);
  const Bytes workspace(device, needed);
  good.workspace = workspace.data();
  good.workspace_bytes = needed;
  const float nan = std::nanf("");

  // What needs no pointer: the workspace query refuses it too.
  std::vector<Case<A>> cases = {
      {"flags", TQ_ERROR_UNKNOWN_ENUM, [](A &a) { a.flags = 2; }},
      {"flags", TQ_ERROR_UNKNOWN_ENUM, [](A &a) { a.flags = INT32_MIN; }},
      {"num_seqs", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.num_seqs = -1; }},
      {"num_tokens", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.num_tokens = -1; }},
      {"num_tokens", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.cu_seqlens_q = nullptr; }},
      {"q_heads", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.q_heads = 0; }},
      {"q_heads", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.q_heads = 3; }},
      {"q_heads", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.q_heads = -4; }},
      {"q_type", TQ_ERROR_UNKNOWN_ENUM, [](A &a) { a.q_type = 0; }},
      {"out_type", TQ_ERROR_UNKNOWN_ENUM, [](A &a) { a.out_type = 4; }},
      {"max_q_len", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.max_q_len = -1; }},
      {"max_length_tokens", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.max_length_tokens = -1; }},
      {"args.q", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.q_token_stride = -256; }},
      {"args.q", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.q_head_stride = 63; }},
      {"args.q", TQ_ERROR_OVERFLOW, [](A &a) { a.q_token_stride = INT64_MAX / 2; }},
      {"args.out", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.out_token_stride = 10; }},
      {"args.out", TQ_ERROR_OVERFLOW, [](A &a) { a.out_head_stride = INT64_MAX / 2; }},
      {"v_new", TQ_ERROR_NULL_POINTER, [&](A &a) { a.k_new = news.data(); }},
      {"k_new", TQ_ERROR_NULL_POINTER, [&](A &a) { a.v_new = news.data(); }},
      {"args.k_new", TQ_ERROR_INVALID_ARGUMENT,
       [&](A &a) { a.k_new = a.v_new = news.data(), a.k_new_head_stride = 5; }},
      {"args.v_new", TQ_ERROR_OVERFLOW,
       [&](A &a) { a.k_new = a.v_new = news.data(), a.v_new_token_stride = INT64_MAX / 3; }},
      {"pages", TQ_ERROR_NULL_POINTER, [](A &a) { a.pages = nullptr; }},
      {"block_table", TQ_ERROR_INVALID_ARGUMENT,
       [&](A &a) { a.block_indptr = indptr.as<int32_t>(), a.block_indices = table.as<int32_t>(); }},
      {"table_columns", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.table_columns = -1; }},
      {"block_table_stride", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.block_table_stride = 1; }},
      {"block_table_stride", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.block_table_stride = -2; }},
      {"num_block_indices", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.num_block_indices = -1; }},
      {"exact_pages", TQ_ERROR_NULL_POINTER, [](A &a) { a.exact_pages = nullptr; }},
      {"exact_pages", TQ_ERROR_FINGERPRINT_MISMATCH, [&](A &a) { a.exact_pages = &s.pages; }},
      {"exact_columns", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.exact_columns = -1; }},
      {"exact_table_stride", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.exact_table_stride = 1; }},
      {"exact_first_tokens", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.exact_first_tokens = -1; }},
      {"exact_recent_tokens", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.exact_recent_tokens = -1; }},
      {"scale", TQ_ERROR_INVALID_ARGUMENT, [&](A &a) { a.scale = nan; }},
      {"scale", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.scale = std::numeric_limits<float>::infinity(); }},
      {"soft_cap", TQ_ERROR_INVALID_ARGUMENT, [&](A &a) { a.soft_cap = nan; }},
      {"soft_cap", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.soft_cap = -1; }},
      {"window_tokens", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.window_tokens = -1; }},
      {"split_tokens", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.split_tokens = 8; }},
      {"split_tokens", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.split_tokens = -16; }},
      {"reserved", TQ_ERROR_RESERVED_NOT_ZERO, [](A &a) { a.reserved = 1; }},
      {"overflow", TQ_ERROR_OVERFLOW,
       [](A &a) {
         a.num_tokens = INT32_MAX, a.q_heads = INT32_MAX - 1, a.table_columns = INT64_MAX / 64;
         a.block_table_stride = 0, a.split_tokens = 16, a.q_token_stride = a.out_token_stride = 64;
         a.q_head_stride = a.out_head_stride = 64;
       }},
  };
  for (const auto &c : pages_cases<A>(&A::pages, &storage, true)) cases.push_back(c);
  for (const auto &c : pages_cases<A>(&A::exact_pages, &storage, true)) cases.push_back(c);
  size_t bytes = 77;
  refuse(
      good, cases,
      [&](const A *a) {
        bytes = 77;
        const tq_status status = tq_attention_workspace(s.codec.get(), a, &bytes);
        if (status == TQ_OK) bytes = 77;
        return status;
      },
      [&] { return bytes == 77; });
  CHECK(tq_attention_workspace(nullptr, &good, &bytes) == TQ_ERROR_NULL_POINTER);
  CHECK(tq_attention_workspace(s.codec.get(), &good, nullptr) == TQ_ERROR_NULL_POINTER);
  // It looks at no array: pointers to nothing will do.
  A no_pointers = good;
  const auto nowhere = [](size_t by) { return reinterpret_cast<void *>(0x10000 + by); };
  no_pointers.q = nowhere(1);
  no_pointers.out = nowhere(1);
  no_pointers.lse = nullptr;
  no_pointers.lengths = nullptr;
  no_pointers.cu_seqlens_q = static_cast<int32_t *>(nowhere(3));
  no_pointers.block_table = nullptr;
  no_pointers.exact_table = nullptr;
  no_pointers.workspace = nullptr;
  no_pointers.workspace_bytes = 0;
  CHECK(tq_attention_workspace(s.codec.get(), &no_pointers, &bytes) == TQ_OK);
  CHECK(bytes == needed);

  for (const Case<A> &c : std::vector<Case<A>>{
           {"block_table", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.block_table = nullptr; }},
           {"block_indices", TQ_ERROR_NULL_POINTER,
            [&](A &a) { a.block_table = nullptr, a.table_columns = 0, a.block_indptr = indptr.as<int32_t>(); }},
           {"exact_table", TQ_ERROR_NULL_POINTER, [](A &a) { a.exact_table = nullptr; }},
           {"args.q", TQ_ERROR_NULL_POINTER, [](A &a) { a.q = nullptr; }},
           {"args.q", TQ_ERROR_MISALIGNED, [](A &a) { a.q = misaligned(static_cast<const char *>(a.q), 2); }},
           {"args.out", TQ_ERROR_NULL_POINTER, [](A &a) { a.out = nullptr; }},
           {"args.out", TQ_ERROR_MISALIGNED, [](A &a) { a.out = misaligned(static_cast<char *>(a.out), 2); }},
           {"lengths", TQ_ERROR_NULL_POINTER, [](A &a) { a.lengths = nullptr; }},
           {"lengths", TQ_ERROR_MISALIGNED, [](A &a) { a.lengths = misaligned(a.lengths, 2); }},
           {"cu_seqlens_q", TQ_ERROR_MISALIGNED, [](A &a) { a.cu_seqlens_q = misaligned(a.cu_seqlens_q); }},
           {"q_positions", TQ_ERROR_MISALIGNED, [&](A &a) { a.q_positions = misaligned(ints.as<int32_t>()); }},
           {"starts", TQ_ERROR_MISALIGNED, [&](A &a) { a.starts = misaligned(ints.as<int32_t>()); }},
           {"block_table", TQ_ERROR_MISALIGNED, [](A &a) { a.block_table = misaligned(a.block_table, 2); }},
           {"exact_table", TQ_ERROR_MISALIGNED, [](A &a) { a.exact_table = misaligned(a.exact_table, 2); }},
           {"sinks", TQ_ERROR_MISALIGNED, [&](A &a) { a.sinks = misaligned(floats.as<float>()); }},
           {"alibi_slopes", TQ_ERROR_MISALIGNED, [&](A &a) { a.alibi_slopes = misaligned(floats.as<float>()); }},
           {"key_offset", TQ_ERROR_MISALIGNED, [&](A &a) { a.key_offset = misaligned(floats.as<float>()); }},
           {"lse", TQ_ERROR_MISALIGNED, [](A &a) { a.lse = misaligned(a.lse); }},
           {"faults", TQ_ERROR_MISALIGNED, [](A &a) { a.faults = misaligned(a.faults, 4); }},
           {"workspace", TQ_ERROR_NULL_POINTER, [](A &a) { a.workspace = nullptr; }},
           {"workspace", TQ_ERROR_MISALIGNED,
            [](A &a) { a.workspace = misaligned(static_cast<char *>(a.workspace), 128); }},
           {"workspace", TQ_ERROR_WORKSPACE_TOO_SMALL, [](A &a) { --a.workspace_bytes; }},
           {"workspace", TQ_ERROR_WORKSPACE_TOO_SMALL, [](A &a) { a.workspace_bytes = 0; }},
       }) {
    cases.push_back(c);
  }
  for (const auto &c : pages_cases<A>(&A::pages, &storage)) cases.push_back(c);
  CHECK(tq_paged_attention(nullptr, &good) == TQ_ERROR_NULL_POINTER);
  refuse(
      good, cases, [&](const A *a) { return tq_paged_attention(s.codec.get(), a); },
      [&] { return out.poisoned() && lse.poisoned() && workspace.poisoned(); });
}

TEST_CASE("tq_merge_states refuses") {
  Device &device = *scalar().device;
  const CodecPtr codec = make_codec(good_config());
  const Bytes states(device, std::vector<float>(2 * 3 * 16, 1.0f)), lse(device, std::vector<float>(6, 0.0f)),
      out(device, size_t{3 * 16 * 4}), out_lse(device, size_t{3 * 4});
  using A = tq_merge_args;
  A good = {};
  good.struct_size = sizeof good;
  good.num_states = 2;
  good.num_rows = 3;
  good.head_dim = 16;
  good.type = TQ_TYPE_F32;
  good.states = states.data();
  good.lse = lse.as<float>();
  good.out = out.data();
  good.out_lse = out_lse.as<float>();
  const std::vector<Case<A>> cases = {
      {"num_states", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.num_states = 0; }},
      {"num_states", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.num_states = -1; }},
      {"num_rows", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.num_rows = -1; }},
      {"head_dim", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.head_dim = 0; }},
      {"head_dim", TQ_ERROR_INVALID_ARGUMENT, [](A &a) { a.head_dim = 65537; }},
      {"type", TQ_ERROR_UNKNOWN_ENUM, [](A &a) { a.type = 0; }},
      {"states", TQ_ERROR_NULL_POINTER, [](A &a) { a.states = nullptr; }},
      {"states", TQ_ERROR_MISALIGNED, [](A &a) { a.states = misaligned(static_cast<const char *>(a.states)); }},
      {"lse", TQ_ERROR_NULL_POINTER, [](A &a) { a.lse = nullptr; }},
      {"lse", TQ_ERROR_MISALIGNED, [](A &a) { a.lse = misaligned(a.lse); }},
      {"out", TQ_ERROR_NULL_POINTER, [](A &a) { a.out = nullptr; }},
      {"out", TQ_ERROR_MISALIGNED, [](A &a) { a.out = misaligned(static_cast<char *>(a.out)); }},
      {"out_lse", TQ_ERROR_MISALIGNED, [](A &a) { a.out_lse = misaligned(a.out_lse); }},
      {"overflow", TQ_ERROR_OVERFLOW, [](A &a) { a.num_rows = INT64_MAX; }},
      {"overflow", TQ_ERROR_OVERFLOW, [](A &a) { a.num_rows = INT64_MAX / 100; }},
  };
  CHECK(tq_merge_states(nullptr, &good) == TQ_ERROR_NULL_POINTER);
  refuse(
      good, cases, [&](const A *a) { return tq_merge_states(codec.get(), a); },
      [&] { return out.poisoned() && out_lse.poisoned(); });
}

TEST_CASE("pages of another codec are refused") {
  // Whatever decides a byte is in the fingerprint.
  FRESH(random, "refusals fingerprint");
  const tq_config base = good_config();
  const tq_codec_info info = info_of(make_codec(base).get());
  static float levels[16];
  for (int i = 0; i < 16; ++i) levels[i] = float(2 * i - 15);
  const std::vector<std::function<void(tq_config &)>> changes = {
      [](tq_config &c) { c.k.head_dim = 80; },
      [](tq_config &c) { c.v.head_dim = 80; },
      [](tq_config &c) { c.k.bits = 3; },
      [](tq_config &c) { c.v.bits = 16; },
      [](tq_config &c) { c.seed = 1; },
      [](tq_config &c) { c.k.rotation = TQ_ROTATION_NONE; },
      [](tq_config &c) { c.v.hadamard_rounds = 2; },
      [](tq_config &c) { c.k.rotation = TQ_ROTATION_DENSE; },
      [](tq_config &c) { c.k.codebook = TQ_CODEBOOK_UNIFORM; },
      [](tq_config &c) { c.k.codebook = TQ_CODEBOOK_CUSTOM, c.k.num_levels = 16, c.k.levels = levels; },
      [](tq_config &c) { c.k.scale_type = TQ_TYPE_F32; },
      [](tq_config &c) { c.k.scale_rule = TQ_SCALE_UNBIASED; },
      [](tq_config &c) { c.k.scale_rule = TQ_SCALE_LEAST_MSE; },
  };
  for (size_t i = 0; i < changes.size(); ++i) {
    tq_config changed = base;
    changes[i](changed);
    const tq_codec_info other = info_of(make_codec(changed).get());
    INFO("change " << i << ' ' << describe(changed));
    CHECK(other.tile_fingerprint != info.tile_fingerprint);
    CHECK(other.page_fingerprint != info.page_fingerprint);
  }
  for (const auto &change : std::vector<std::function<void(tq_config &)>>{
           [](tq_config &c) { c.block_size_tokens = 32; }, [](tq_config &c) { c.kv_heads = 3; }}) {
    tq_config changed = base;
    change(changed);
    const tq_codec_info other = info_of(make_codec(changed).get());
    CHECK(other.tile_fingerprint == info.tile_fingerprint);
    CHECK(other.page_fingerprint != info.page_fingerprint);
  }
  tq_config same = base;
  same.threads = 1;
  same.simd = TQ_SIMD_AUTO;
  same.k.hadamard_rounds = 1;
  same.k.scale_type = TQ_TYPE_F16;
  same.v.head_dim = 64;
  CHECK(info_of(make_codec(same).get()).page_fingerprint == info.page_fingerprint);
  CHECK(info.page_fingerprint != info.exact_fingerprint);
}
