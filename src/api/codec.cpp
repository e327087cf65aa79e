// SPDX-License-Identifier: Apache-2.0
#include <cstring>
#include <iterator>

#include "api/handle.hpp"
#include "codec/presets.hpp"

using namespace tqkv;

tq_status tq_config_init(tq_config *config, uint32_t struct_size, const char *preset) {
  return guard([&]() -> tq_status {
    if (config == nullptr) return fail(TQ_ERROR_NULL_POINTER, "config is NULL");
    if (struct_size < sizeof(tq_config)) {
      return fail(TQ_ERROR_STRUCT_SIZE, "struct_size is %u; tq_config takes at least %zu", struct_size,
                  sizeof(tq_config));
    }
    int k_bits = 0, v_bits = 0;
    if (!find_preset(preset, &k_bits, &v_bits)) {
      return fail(TQ_ERROR_INVALID_ARGUMENT, "preset \"%.60s\" is unknown; see tq_preset_name", preset);
    }
    std::memset(static_cast<void *>(config), 0, struct_size);
    config->struct_size = struct_size;
    set_preset_bits(config->k, k_bits);
    set_preset_bits(config->v, v_bits);
    return TQ_OK;
  });
}

const char *tq_preset_name(int32_t index) {
  return index >= 0 && size_t(index) < std::size(kPresets) ? kPresets[index].name : nullptr;
}

tq_status tq_supports(const tq_config *config) {
  return guard([&]() -> tq_status {
    tq_config known{};
    TQKV_TRY(read_struct(config, "config", &known));
    return make_codec(known, nullptr);
  });
}

tq_status tq_create(const tq_config *config, tq_codec **codec) {
  return guard([&]() -> tq_status {
    tq_config known{};
    TQKV_TRY(read_struct(config, "config", &known));
    if (codec == nullptr) return fail(TQ_ERROR_NULL_POINTER, "codec is NULL");
    auto handle = std::make_unique<tq_codec>();
    TQKV_TRY(make_codec(known, &handle->codec));
    *codec = handle.release();
    return TQ_OK;
  });
}

void tq_destroy(tq_codec *codec) {
  delete codec;
}

tq_status tq_info(const tq_codec *codec, tq_codec_info *info) {
  return guard([&]() -> tq_status {
    TQKV_TRY(check_codec(codec));
    const Codec &c = *codec->codec;
    tq_codec_info known{};
    known.device = c.device;
    known.device_ordinal = c.device_ordinal;
    known.kv_heads = c.kv_heads;
    known.k = describe(c.k);
    known.v = describe(c.v);
    known.seed = c.seed;
    known.tile_fingerprint = c.tile_fingerprint;
    known.page_fingerprint = c.page_fingerprint;
    known.exact_fingerprint = c.exact_fingerprint;
    known.block_size_tokens = c.block_size;
    known.exact_block_size_tokens = c.exact_block_size;
    known.raw_type = c.raw_type;
    known.simd = c.simd;
    known.threads = c.parallel != nullptr ? c.parallel->threads() : 0;
    return write_struct(known, info, "info");
  });
}
