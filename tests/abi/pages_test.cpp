// SPDX-License-Identifier: Apache-2.0
// Pages, byte for byte: store, load and copy against the independent reader, in pools of every geometry.
#include <algorithm>
#include <cstring>

#include "support.hpp"

namespace {

// Bytes of the image that the given slots own.
std::vector<char> owned_bytes(const oracle::Codec &codec, const PoolImage &image, const std::vector<int64_t> &slots) {
  std::vector<char> owned(image.bytes.size(), 0);
  const oracle::Pool pool = image.view(codec);
  for (int64_t slot : slots) {
    for (int head = 0; head < codec.kv_heads; ++head) {
      for (int32_t side : {TQ_SIDE_K, TQ_SIDE_V}) {
        oracle::for_each_byte(codec, image.exact, pool, side, slot, head, [&](int64_t offset) {
          REQUIRE(offset >= 0);
          REQUIRE(offset < int64_t(owned.size()));
          REQUIRE(!owned[size_t(offset)]);  // a token owns its bytes alone
          owned[size_t(offset)] = 1;
        });
      }
    }
  }
  return owned;
}

bool same_elsewhere(const std::vector<uint8_t> &before, const std::vector<uint8_t> &after,
                    const std::vector<char> &owned) {
  for (size_t i = 0; i < before.size(); ++i) {
    if (!owned[i] && before[i] != after[i]) return false;
  }
  return true;
}

// Distinct slots of a pool, some of them -1: one after the other from anywhere, as a prompt has them, or in any order.
std::vector<int64_t> random_slots(Random &random, int64_t num_slots, int64_t count, double skip) {
  std::vector<int64_t> all(static_cast<size_t>(num_slots));
  for (int64_t i = 0; i < num_slots; ++i) all[size_t(i)] = i;
  count = std::min(count, num_slots);
  if (random.chance(0.5)) {
    std::shuffle(all.begin(), all.end(), random.engine());
  } else {
    all.erase(all.begin(), all.begin() + random.integer(0, num_slots - count));
    skip = random.pick({0.0, skip});
  }
  all.resize(size_t(count));
  for (int64_t &slot : all) {
    if (random.chance(skip)) slot = -1;
  }
  return all;
}

std::vector<int64_t> used(const std::vector<int64_t> &slots) {
  std::vector<int64_t> result;
  for (int64_t slot : slots) {
    if (slot >= 0) result.push_back(slot);
  }
  return result;
}

struct LoadCall {
  int32_t type = TQ_TYPE_F32;
  bool want_k = true, want_v = true;
  int64_t k_token = 0, k_head = 0, v_token = 0, v_head = 0;
  std::vector<int64_t> slots, exact_slots;
  std::vector<float> key_offset;
  const PoolImage *pool = nullptr, *exact_pool = nullptr;
  // results: the whole arrays
  std::vector<uint8_t> k, v;
  tq_faults faults{};
};

int64_t extent(int64_t tokens, int64_t token_stride, int heads, int64_t head_stride, int head_dim) {
  return tokens ? (tokens - 1) * token_stride + (heads - 1) * head_stride + head_dim : 0;
}

void load(const Target &target, const oracle::Codec &reader, const tq_codec *codec, LoadCall *call) {
  Device &device = *target.device;
  const int64_t tokens = int64_t(call->slots.size()), element = oracle::type_bytes(call->type);
  const int64_t kh = call->k_head ? call->k_head : reader.k.head_dim,
                kt = call->k_token ? call->k_token : int64_t(reader.kv_heads) * reader.k.head_dim,
                vh = call->v_head ? call->v_head : reader.v.head_dim,
                vt = call->v_token ? call->v_token : int64_t(reader.kv_heads) * reader.v.head_dim;
  const Bytes k(device, size_t(extent(tokens, kt, reader.kv_heads, kh, reader.k.head_dim) * element)),
      v(device, size_t(extent(tokens, vt, reader.kv_heads, vh, reader.v.head_dim) * element)),
      slots(device, call->slots), exact_slots(device, call->exact_slots), offset(device, call->key_offset),
      faults(device, std::vector<tq_faults>(1)), pool(device, call->pool->bytes),
      exact_pool(device, call->exact_pool ? call->exact_pool->bytes : std::vector<uint8_t>());
  const tq_pages pages = call->pool->at(pool.data());
  const tq_pages exact_pages = call->exact_pool ? call->exact_pool->at(exact_pool.data()) : tq_pages{};
  size_t workspace_bytes = 0;
  REQUIRE(tq_cache_workspace(codec, tokens, &workspace_bytes) == TQ_OK);
  const Bytes workspace(device, workspace_bytes);
  tq_load_args args = {};
  args.struct_size = sizeof args;
  args.output_type = call->type;
  args.num_tokens = tokens;
  args.k = call->want_k ? k.data() : nullptr;
  args.v = call->want_v ? v.data() : nullptr;
  args.k_token_stride = call->k_token;
  args.k_head_stride = call->k_head;
  args.v_token_stride = call->v_token;
  args.v_head_stride = call->v_head;
  args.pages = &pages;
  args.slots = slots.as<int64_t>();
  args.exact_pages = call->exact_pool ? &exact_pages : nullptr;
  args.exact_slots = call->exact_pool ? exact_slots.as<int64_t>() : nullptr;
  args.key_offset = call->key_offset.empty() ? nullptr : offset.as<float>();
  args.faults = faults.as<tq_faults>();
  args.workspace = workspace.data();
  args.workspace_bytes = workspace_bytes;
  const tq_status status = target.device->call([&](void *stream) {
    args.stream = stream;
    return tq_cache_load(codec, &args);
  });
  INFO("tq_cache_load: " << (status == TQ_OK ? "" : tq_last_error()));
  REQUIRE(status == TQ_OK);
  CHECK(pool.download() == call->pool->bytes);
  call->k = k.download();
  call->v = v.download();
  call->faults = faults.download<tq_faults>()[0];
}

// Stores `tokens` random tokens and checks every byte of the pools.
void check_store(const Target &target, Random &random, const tq_config &config) {
  const CodecPtr codec = make_codec(config);
  const tq_codec_info info = info_of(codec.get());
  const oracle::Codec reader(config, info);
  const int heads = reader.kv_heads;
  const int64_t blocks = random.integer(1, reader.block_size >= 64 ? 3 : 40);
  const int64_t exact_blocks = random.integer(1, reader.exact_block_size >= 64 ? 3 : 40);
  PoolImage pool = make_pool(random, reader, info.page_fingerprint, false, blocks, random_shape(random));
  PoolImage exact = make_pool(random, reader, info.exact_fingerprint, true, exact_blocks, random_shape(random));
  const std::vector<uint8_t> pool_before = pool.bytes, exact_before = exact.bytes;
  const bool with_exact = random.chance(0.6), with_offset = random.chance(0.5);

  StoreCall call;
  call.type = random.pick({TQ_TYPE_F32, TQ_TYPE_F16, TQ_TYPE_BF16});
  call.pool = &pool;
  call.slots = random_slots(random, blocks * reader.block_size, random.integer(0, 30), 0.2);
  const int64_t tokens = int64_t(call.slots.size());
  if (with_exact) {
    call.exact_pool = &exact;
    call.exact_slots = random_slots(random, exact_blocks * reader.exact_block_size, tokens, 0.4);
    call.exact_slots.resize(size_t(tokens), -1);
  }
  call.k = encode_elements(normals(random, tokens * heads * reader.k.head_dim, 3), call.type);
  call.v = encode_elements(normals(random, tokens * heads * reader.v.head_dim), call.type);
  if (with_offset) {
    for (int i = 0; i < heads * reader.k.head_dim; ++i) call.key_offset.push_back(float(random.normal()));
  }
  const tq_status status = store(target, codec.get(), &call);
  INFO("tq_cache_store: " << (status == TQ_OK ? "" : tq_last_error()) << " tokens " << tokens << " blocks " << blocks);
  REQUIRE(status == TQ_OK);
  CHECK(call.faults.first == 0);

  CHECK(same_elsewhere(pool_before, pool.bytes, owned_bytes(reader, pool, used(call.slots))));
  CHECK(same_elsewhere(exact_before, exact.bytes, owned_bytes(reader, exact, used(call.exact_slots))));

  // The codes are tq_encode's of the same vectors, keys with an offset less that in f32.
  const std::vector<double> k = decode_elements(call.k.data(), call.type, tokens * heads * reader.k.head_dim);
  std::vector<double> shifted = k;
  for (int64_t i = 0; i < int64_t(k.size()) && with_offset; ++i) {
    shifted[size_t(i)] = float(k[size_t(i)]) - call.key_offset[size_t(i % (heads * reader.k.head_dim))];
  }
  const Encoded keys = with_offset
                           ? encode(target, codec.get(), TQ_SIDE_K, encode_elements(shifted, TQ_TYPE_F32), TQ_TYPE_F32)
                           : encode(target, codec.get(), TQ_SIDE_K, call.k, call.type);
  const Encoded values = encode(target, codec.get(), TQ_SIDE_V, call.v, call.type);
  bool codes_same = true, scales_same = true, exact_same = true;
  for (int64_t token = 0; token < tokens; ++token) {
    for (int head = 0; head < heads; ++head) {
      for (int32_t which : {TQ_SIDE_K, TQ_SIDE_V}) {
        const oracle::Side &side = reader.side(false, which);
        const Encoded &want = which == TQ_SIDE_K ? keys : values;
        const int64_t index = token * heads + head;
        double scale;
        if (call.slots[size_t(token)] >= 0) {
          const std::vector<uint8_t> record =
              oracle::read_record(reader, false, pool.view(reader), which, call.slots[size_t(token)], head, &scale);
          codes_same = codes_same &&
                       std::memcmp(record.data(), &want.codes[size_t(index * side.code_bytes())], record.size()) == 0;
          if (!side.raw()) {
            scales_same = scales_same && scale == oracle::read_element(want.scales.data(), side.scale_type, index);
          }
        }
        if (with_exact && call.exact_slots[size_t(token)] >= 0) {
          const std::vector<uint8_t> record = oracle::read_record(reader, true, exact.view(reader), which,
                                                                  call.exact_slots[size_t(token)], head, &scale);
          const std::vector<uint8_t> &source = which == TQ_SIDE_K ? call.k : call.v;
          for (int c = 0; c < side.head_dim; ++c) {
            const double value = oracle::read_element(source.data(), call.type, index * side.head_dim + c);
            const std::vector<uint8_t> raw = encode_elements({value}, side.raw_type);
            exact_same = exact_same && std::memcmp(raw.data(), &record[size_t(2 * c)], 2) == 0;
          }
        }
      }
    }
  }
  CHECK(codes_same);
  CHECK(scales_same);
  CHECK(exact_same);

  // And back through tq_cache_load, in some other order, with strides.
  LoadCall back;
  back.type = random.pick({TQ_TYPE_F32, TQ_TYPE_F16, TQ_TYPE_BF16});
  back.pool = &pool;
  back.key_offset = call.key_offset;
  back.want_k = random.chance(0.85);
  back.want_v = !back.want_k || random.chance(0.85);
  std::vector<int64_t> order;
  for (int64_t token = 0; token < tokens; ++token) order.push_back(token);
  std::shuffle(order.begin(), order.end(), random.engine());
  const bool load_exact = with_exact && random.chance(0.7);
  if (load_exact) back.exact_pool = &exact;
  for (int64_t token : order) {
    back.slots.push_back(call.slots[size_t(token)]);
    if (load_exact) back.exact_slots.push_back(random.chance(0.7) ? call.exact_slots[size_t(token)] : -1);
  }
  if (random.chance(0.5)) {  // head-major output
    back.k_head = std::max<int64_t>(tokens, 1) * reader.k.head_dim + random.integer(0, 5);
    back.k_token = reader.k.head_dim;
    back.v_head = reader.v.head_dim + random.integer(0, 5);
    back.v_token = heads * back.v_head + random.integer(0, 5);
  }
  load(target, reader, codec.get(), &back);
  CHECK(back.faults.first == 0);
  const int64_t element = oracle::type_bytes(back.type);
  for (int32_t which : {TQ_SIDE_K, TQ_SIDE_V}) {
    const bool keys_side = which == TQ_SIDE_K;
    const oracle::Side &side = reader.side(false, which);
    const std::vector<uint8_t> &out = keys_side ? back.k : back.v;
    const int64_t head_stride =
        keys_side ? (back.k_head ? back.k_head : side.head_dim) : (back.v_head ? back.v_head : side.head_dim);
    const int64_t token_stride = keys_side ? (back.k_token ? back.k_token : heads * side.head_dim)
                                           : (back.v_token ? back.v_token : heads * side.head_dim);
    std::vector<char> owned(out.size(), 0);
    double worst = 0;
    for (int64_t i = 0; i < tokens && (keys_side ? back.want_k : back.want_v); ++i) {
      const bool exact_read = load_exact && back.exact_slots[size_t(i)] >= 0;
      if (!exact_read && back.slots[size_t(i)] < 0) continue;
      for (int head = 0; head < heads; ++head) {
        oracle::Vector want = oracle::load(reader, exact_read, (exact_read ? exact : pool).view(reader), which,
                                           exact_read ? back.exact_slots[size_t(i)] : back.slots[size_t(i)], head);
        for (int c = 0; c < side.head_dim && keys_side && !exact_read && with_offset; ++c) {
          want[size_t(c)] += call.key_offset[size_t(head * side.head_dim + c)];
        }
        // f32 arithmetic of the rotation as in codec_test, then one rounding to the output's type.
        const double type_error = back.type == TQ_TYPE_F16 ? 0x1p-11 : back.type == TQ_TYPE_BF16 ? 0x1p-8 : 0x1p-24;
        const double size = oracle::norm(want) + 4 * std::sqrt(double(side.head_dim)) * with_offset;
        for (int c = 0; c < side.head_dim; ++c) {
          const int64_t at = i * token_stride + head * head_stride + c;
          const double bound =
              0x1p-22 * std::sqrt(double(side.head_dim)) * size + type_error * std::fabs(want[size_t(c)]) + 0x1p-25;
          worst = std::max(worst, std::fabs(oracle::read_element(out.data(), back.type, at) - want[size_t(c)]) / bound);
          for (int64_t b = 0; b < element; ++b) owned[size_t(at * element + b)] = 1;
        }
      }
    }
    INFO("side " << which << " type " << back.type);
    CHECK(worst <= 1);
    CHECK(same_elsewhere(std::vector<uint8_t>(out.size(), 0xff), out, owned));
  }
}

}  // namespace

TEST_CASE("the layout's numbers follow from the byte order", "[slow]") {
  FRESH(random, "pages layout");
  for (int round = 0; round < 200; ++round) {
    ConfigStorage storage;
    const tq_config config =
        random_config(random, targets().front(), &storage, {.max_head_dim = 576, .allow_matrices = false});
    INFO(describe(config));
    const CodecPtr codec = make_codec(config);
    const oracle::Codec reader(config, info_of(codec.get()));
    for (bool exact : {false, true}) {
      const int32_t which = exact ? TQ_PAGES_EXACT : TQ_PAGES_CODED;
      const tq_layout layout = layout_of(codec.get(), which);
      const oracle::Side &k = reader.side(exact, TQ_SIDE_K), &v = reader.side(exact, TQ_SIDE_V);
      const int64_t tile = reader.tile_bytes(exact);
      CHECK(layout.block_size_tokens == reader.block(exact));
      CHECK(layout.tile_bytes == tile);
      CHECK(tile % 16 == 0);
      CHECK(layout.k_codes_offset == 0);
      CHECK(layout.v_codes_offset == 16 * k.code_bytes());
      CHECK(layout.k_scales_offset == 16 * (k.code_bytes() + v.code_bytes()));
      CHECK(layout.v_scales_offset == 16 * (k.code_bytes() + v.code_bytes() + k.scale_bytes()));
      CHECK(layout.head_stride_bytes == tile);
      CHECK(layout.tile_stride_bytes == reader.kv_heads * tile);
      CHECK(layout.block_stride_bytes == std::max(1, reader.block(exact) / 16) * reader.kv_heads * tile);
      CHECK(layout.bytes_per_token == reader.kv_heads * tile / 16);
      CHECK(layout.fingerprint ==
            (exact ? info_of(codec.get()).exact_fingerprint : info_of(codec.get()).page_fingerprint));
      for (int64_t blocks : {0, 1, 2, 7, 16, 17, 1000}) {
        int64_t bytes = -1;
        CHECK(tq_pages_bytes(codec.get(), which, blocks, &bytes) == TQ_OK);
        const int64_t storage_blocks =
            (blocks * reader.block(exact) + std::max(16, reader.block(exact)) - 1) / std::max(16, reader.block(exact));
        CHECK(bytes == storage_blocks * layout.block_stride_bytes);
      }
      int64_t bytes = -1;
      CHECK(tq_pages_bytes(codec.get(), which, INT64_MAX / 2, &bytes) == TQ_ERROR_OVERFLOW);
      CHECK(tq_pages_bytes(codec.get(), which, -1, &bytes) == TQ_ERROR_INVALID_ARGUMENT);
      CHECK(bytes == -1);
    }
  }
}

TEST_CASE("store, read by the oracle and by load, in pools of every geometry") {
  FRESH(random, "pages store");
  for (const Target &target : targets()) {
    for (int round = 0; round < 120; ++round) {
      ConfigStorage storage;
      const tq_config config = random_config(random, target, &storage, {.max_head_dim = 128});
      INFO(target.name << ' ' << describe(config));
      check_store(target, random, config);
    }
  }
}

TEST_CASE("every block size and width") {
  FRESH(random, "pages sizes");
  const Target &target = targets().back();
  for (int block : {1, 8, 16, 32, 64, 256}) {
    for (int bits : {1, 2, 3, 4, 8, 16}) {
      tq_config config = make_config(target, 48, bits, bits);  // an odd multiple of 16 ends in half words
      config.v.head_dim = 80;
      config.block_size_tokens = block;
      config.exact_block_size_tokens = block;
      config.kv_heads = 3;
      INFO(describe(config));
      check_store(target, random, config);
    }
  }
}

TEST_CASE("a bad slot writes nothing of its token and is counted") {
  FRESH(random, "pages bad slots");
  for (const Target &target : targets()) {
    for (int block : {1, 8, 16, 64}) {
      tq_config config = make_config(target, 64, 4, 3);
      config.kv_heads = 2;
      config.block_size_tokens = block;
      const CodecPtr codec = make_codec(config);
      const tq_codec_info info = info_of(codec.get());
      const oracle::Codec reader(config, info);
      PoolImage pool = make_pool(random, reader, info.page_fingerprint, false, 5, random_shape(random));
      PoolImage exact = make_pool(random, reader, info.exact_fingerprint, true, 2, random_shape(random));
      const std::vector<uint8_t> pool_before = pool.bytes, exact_before = exact.bytes;
      const int64_t end = 5 * block;
      StoreCall call;
      call.pool = &pool;
      call.exact_pool = &exact;
      call.slots = {-1, 0, -2, end, 1, INT64_MAX, INT64_MIN, 2, 3, 4};
      call.exact_slots = {0, 1, 2, 3, 32, 5, 6, -2, -1, 9};
      call.k = encode_elements(normals(random, 10 * 2 * 64), call.type);
      call.v = encode_elements(normals(random, 10 * 2 * 64), call.type);
      REQUIRE(store(target, codec.get(), &call) == TQ_OK);
      // Tokens 2, 3, 5, 6 have bad slots, 4 and 7 bad exact slots: index 2 is the lowest. Token 0 keeps its exact copy.
      CHECK(call.faults.count[TQ_FAULT_SLOT] == 6);
      CHECK(TQ_FAULT_FIRST_KIND(call.faults.first) == TQ_FAULT_SLOT);
      CHECK(TQ_FAULT_FIRST_INDEX(call.faults.first) == 2);
      CHECK(same_elsewhere(pool_before, pool.bytes, owned_bytes(reader, pool, {0, 3, 4})));
      CHECK(same_elsewhere(exact_before, exact.bytes, owned_bytes(reader, exact, {0, 1, 9})));
      const auto all_written = [&](const PoolImage &image, const std::vector<uint8_t> &before, int64_t slot) {
        const std::vector<char> owned = owned_bytes(reader, image, {slot});
        int64_t changed = 0;
        for (size_t i = 0; i < owned.size(); ++i) changed += owned[i] && image.bytes[i] != before[i];
        return changed > 0;
      };
      for (int64_t slot : {0, 3, 4}) CHECK(all_written(pool, pool_before, slot));
      for (int64_t slot : {0, 1, 9}) CHECK(all_written(exact, exact_before, slot));

      // Counters add up over calls, and the lowest index of a later call does not hide an earlier, lower one.
      call.slots = {0, 1, 2, 3, 4, -1, -1, -1, -1, end};
      call.exact_slots.assign(10, -1);
      REQUIRE(store(target, codec.get(), &call) == TQ_OK);
      CHECK(call.faults.count[TQ_FAULT_SLOT] == 7);
      CHECK(TQ_FAULT_FIRST_INDEX(call.faults.first) == 2);

      LoadCall back;
      back.pool = &pool;
      back.exact_pool = &exact;
      back.slots = {end, 0, -1, -5, 2};
      back.exact_slots = {-1, -1, -1, -1, 32};
      load(target, reader, codec.get(), &back);
      CHECK(back.faults.count[TQ_FAULT_SLOT] == 3);
      CHECK(TQ_FAULT_FIRST_INDEX(back.faults.first) == 0);
      const std::vector<double> k = decode_elements(back.k.data(), TQ_TYPE_F32, 5 * 2 * 64),
                                v = decode_elements(back.v.data(), TQ_TYPE_F32, 5 * 2 * 64);
      for (const std::vector<double> *side : {&k, &v}) {
        bool zeros = true, skipped = true, loaded = true;
        for (size_t i = 0; i < 128; ++i) {
          for (size_t bad : {0, 3, 4}) zeros = zeros && (*side)[bad * 128 + i] == 0;
          skipped = skipped && std::isnan((*side)[2 * 128 + i]);
          loaded = loaded && std::isfinite((*side)[128 + i]);
        }
        CHECK(zeros);
        CHECK(skipped);
        CHECK(loaded);
      }
    }
  }
}

TEST_CASE("a non-finite vector is stored as zero, codes and exact copy, and counted once") {
  FRESH(random, "pages non-finite");
  for (const Target &target : targets()) {
    for (int bits : {1, 2, 3, 4, 8, 16}) {
      tq_config config = make_config(target, 64, bits, bits);
      config.kv_heads = 3;
      const CodecPtr codec = make_codec(config);
      const tq_codec_info info = info_of(codec.get());
      const oracle::Codec reader(config, info);
      PoolImage pool = make_pool(random, reader, info.page_fingerprint, false, 2, PoolShape::kPacked);
      PoolImage exact = make_pool(random, reader, info.exact_fingerprint, true, 2, PoolShape::kPacked);
      StoreCall call;
      call.pool = &pool;
      call.exact_pool = &exact;
      for (int64_t i = 0; i < 20; ++i) call.slots.push_back(i + 3), call.exact_slots.push_back(i % 2 ? i : -1);
      std::vector<double> k = normals(random, 20 * 3 * 64), v = normals(random, 20 * 3 * 64);
      call.k = encode_elements(k, call.type), call.v = encode_elements(v, call.type);
      PoolImage clean_pool = pool, clean_exact = exact;
      StoreCall clean = call;
      clean.pool = &clean_pool;
      clean.exact_pool = &clean_exact;
      REQUIRE(store(target, codec.get(), &clean) == TQ_OK);
      // Token 7's key of head 1 and token 12's value of head 2.
      k[(7 * 3 + 1) * 64 + 9] = std::nan("");
      v[(12 * 3 + 2) * 64 + 63] = -std::numeric_limits<double>::infinity();
      call.k = encode_elements(k, call.type), call.v = encode_elements(v, call.type);
      REQUIRE(store(target, codec.get(), &call) == TQ_OK);
      CHECK(call.faults.count[TQ_FAULT_NON_FINITE] == 2);
      CHECK(TQ_FAULT_FIRST_KIND(call.faults.first) == TQ_FAULT_NON_FINITE);
      CHECK(TQ_FAULT_FIRST_INDEX(call.faults.first) == 7);
      bool zero = true, others_same = true;
      for (int64_t i = 0; i < 20; ++i) {
        for (int head = 0; head < 3; ++head) {
          for (int32_t side : {TQ_SIDE_K, TQ_SIDE_V}) {
            const bool bad = (side == TQ_SIDE_K && i == 7 && head == 1) || (side == TQ_SIDE_V && i == 12 && head == 2);
            for (bool in_exact : {false, true}) {
              if (in_exact && i % 2 == 0) continue;
              const int64_t slot = in_exact ? i : i + 3;
              const oracle::Vector got =
                  oracle::load(reader, in_exact, (in_exact ? exact : pool).view(reader), side, slot, head);
              const oracle::Vector want =
                  oracle::load(reader, in_exact, (in_exact ? clean_exact : clean_pool).view(reader), side, slot, head);
              if (bad) {
                zero = zero && oracle::norm(got) == 0;
              } else {
                others_same = others_same && got == want;
              }
            }
          }
        }
      }
      INFO(target.name << " bits " << bits);
      CHECK(zero);
      CHECK(others_same);
    }
  }
}

TEST_CASE("copy moves blocks whole, between pools of any geometry") {
  FRESH(random, "pages copy");
  for (const Target &target : targets()) {
    for (int round = 0; round < 60; ++round) {
      ConfigStorage storage;
      tq_config config = random_config(random, target, &storage, {.max_head_dim = 80, .allow_matrices = false});
      if (round < 12) config.block_size_tokens = config.exact_block_size_tokens = round % 2 ? 1 : 8;
      INFO(target.name << ' ' << describe(config));
      const CodecPtr codec = make_codec(config);
      const tq_codec_info info = info_of(codec.get());
      const oracle::Codec reader(config, info);
      const int64_t blocks = random.integer(2, 40), other_blocks = random.integer(2, 40);
      PoolImage src = make_pool(random, reader, info.page_fingerprint, false, blocks, random_shape(random));
      PoolImage dst = make_pool(random, reader, info.page_fingerprint, false, other_blocks, random_shape(random));
      PoolImage exact = make_pool(random, reader, info.exact_fingerprint, true, blocks, random_shape(random));
      const bool within = random.chance(0.5), with_exact = random.chance(0.5);

      // Destinations are distinct and, within a pool, no source. Sources may repeat.
      const auto make_pairs = [&](int64_t from_count, int64_t to_count, bool same) {
        std::vector<int64_t> ids = random_slots(random, to_count, to_count, 0);
        const int64_t half = random.integer(0, to_count / 2);
        std::vector<int64_t> pairs;
        for (int64_t i = 0; i < half; ++i) {
          const int64_t from =
              same ? ids[size_t(random.integer(half, to_count - 1))] : random.integer(0, from_count - 1);
          pairs.insert(pairs.end(), {from, ids[size_t(i)]});
          if (random.chance(0.2)) pairs.insert(pairs.end(), {-1, -1});
        }
        return pairs;
      };
      std::vector<int64_t> pairs = make_pairs(blocks, other_blocks, false);
      if (within) pairs = make_pairs(blocks, blocks, true);
      std::vector<int64_t> exact_pairs = make_pairs(blocks, blocks, true);
      // Bad pairs copy nothing.
      int64_t bad = 0, first_bad = -1;
      const int64_t limit = within ? blocks : other_blocks;
      for (const auto &[from, to] : {std::pair<int64_t, int64_t>{-1, 0},
                                     {0, -1},
                                     {blocks, 0},
                                     {0, limit},
                                     {INT64_MAX, 0},
                                     {INT64_MIN, INT64_MIN},
                                     {-2, -2}}) {
        if (!random.chance(0.3)) continue;
        if (first_bad < 0) first_bad = int64_t(pairs.size()) / 2;
        pairs.insert(pairs.end(), {from, to});
        ++bad;
      }

      Device &device = *target.device;
      const Bytes src_bytes(device, src.bytes), dst_bytes(device, dst.bytes), exact_bytes(device, exact.bytes),
          pair_bytes(device, pairs), exact_pair_bytes(device, exact_pairs), faults(device, std::vector<tq_faults>(1));
      const tq_pages src_pages = src.at(src_bytes.data()), dst_pages = dst.at(dst_bytes.data()),
                     exact_pages = exact.at(exact_bytes.data());
      tq_copy_args args = {};
      args.struct_size = sizeof args;
      args.src = &src_pages;
      args.dst = within ? (random.chance(0.5) ? &src_pages : nullptr) : &dst_pages;
      args.pairs = pair_bytes.as<int64_t>();
      args.num_pairs = int64_t(pairs.size()) / 2;
      if (with_exact) {
        args.exact_src = &exact_pages;
        args.exact_pairs = exact_pair_bytes.as<int64_t>();
        args.num_exact_pairs = int64_t(exact_pairs.size()) / 2;
      }
      args.faults = faults.as<tq_faults>();
      const tq_status status = target.device->call([&](void *stream) {
        args.stream = stream;
        return tq_cache_copy(codec.get(), &args);
      });
      INFO("tq_cache_copy: " << (status == TQ_OK ? "" : tq_last_error()));
      REQUIRE(status == TQ_OK);

      const auto model = [&](const PoolImage &from, PoolImage to, const std::vector<int64_t> &list, int block) {
        for (size_t i = 0; i < list.size(); i += 2) {
          if (list[i] < 0 || list[i] >= from.pages.num_blocks || list[i + 1] < 0 ||
              list[i + 1] >= to.pages.num_blocks) {
            continue;
          }
          for (int row = 0; row < block; ++row) {
            for (int head = 0; head < reader.kv_heads; ++head) {
              for (int32_t side : {TQ_SIDE_K, TQ_SIDE_V}) {
                std::vector<int64_t> offsets;
                oracle::for_each_byte(reader, from.exact, from.view(reader), side, list[i] * block + row, head,
                                      [&](int64_t offset) { offsets.push_back(offset); });
                size_t next = 0;
                oracle::for_each_byte(
                    reader, to.exact, to.view(reader), side, list[i + 1] * block + row, head,
                    [&](int64_t offset) { to.bytes[size_t(offset)] = from.bytes[size_t(offsets[next++])]; });
              }
            }
          }
        }
        return to.bytes;
      };
      CHECK(src_bytes.download() == (within ? model(src, src, pairs, reader.block_size) : src.bytes));
      CHECK(dst_bytes.download() == (within ? dst.bytes : model(src, dst, pairs, reader.block_size)));
      CHECK(exact_bytes.download() ==
            (with_exact ? model(exact, exact, exact_pairs, reader.exact_block_size) : exact.bytes));
      const tq_faults counted = faults.download<tq_faults>()[0];
      CHECK(counted.count[TQ_FAULT_BLOCK] == uint64_t(bad));
      if (bad) {
        CHECK(TQ_FAULT_FIRST_KIND(counted.first) == TQ_FAULT_BLOCK);
        CHECK(TQ_FAULT_FIRST_INDEX(counted.first) == first_bad);
      }
    }
  }
}

TEST_CASE("pages are position-independent") {
  FRESH(random, "pages move");
  const Target &target = targets().back();
  tq_config config = make_config(target, 128, 3, 2);
  config.kv_heads = 2;
  const CodecPtr codec = make_codec(config);
  const tq_codec_info info = info_of(codec.get());
  const oracle::Codec reader(config, info);
  PoolImage pool = make_pool(random, reader, info.page_fingerprint, false, 4, PoolShape::kPadded);
  StoreCall call;
  call.pool = &pool;
  for (int64_t i = 0; i < 64; ++i) call.slots.push_back(63 - i);
  call.k = encode_elements(normals(random, 64 * 2 * 128), call.type);
  call.v = encode_elements(normals(random, 64 * 2 * 128), call.type);
  REQUIRE(store(target, codec.get(), &call) == TQ_OK);
  LoadCall first, second;
  first.pool = second.pool = &pool;  // each load uploads the image to another place
  first.slots = second.slots = call.slots;
  load(target, reader, codec.get(), &first);
  const Bytes elsewhere(*target.device, size_t{123456});
  load(target, reader, codec.get(), &second);
  CHECK(first.k == second.k);
  CHECK(first.v == second.v);
}
