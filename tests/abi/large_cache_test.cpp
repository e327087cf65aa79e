// SPDX-License-Identifier: Apache-2.0
// Addresses beyond 4 GiB and beyond 2^31 and 2^32 elements, in real arrays of that size of which little is touched.
#include <algorithm>
#include <cstring>
#include <map>
#include <set>

#include "gpu.hpp"

namespace {

constexpr int kHeadDim = 128, kHeads = 8;
constexpr int64_t kPoolBytes = int64_t{9} << 29;  // 4.5 GiB, coded or exact

// A pool that is too large to keep an image of.
struct LargePool {
  int block_size = 0;
  tq_pages pages{};
  int64_t block_stride = 0, head_stride = 0, bytes = 0;

  // Head-major: the tiles of a head follow each other, so that the heads are far apart.
  LargePool(const tq_layout &layout, bool head_major) : block_size(layout.block_size_tokens) {
    pages.struct_size = sizeof pages;
    pages.fingerprint = layout.fingerprint;
    pages.num_blocks = kPoolBytes / layout.block_stride_bytes + 1;
    bytes = pages.num_blocks * layout.block_stride_bytes;
    block_stride = layout.block_stride_bytes;
    head_stride = layout.head_stride_bytes;
    if (head_major) {
      block_stride = layout.block_stride_bytes / kHeads;
      head_stride = pages.num_blocks * block_stride;
      pages.tile_stride_bytes = layout.tile_bytes;
      pages.block_stride_bytes = block_stride;
      pages.head_stride_bytes = head_stride;
    }
  }
  int64_t num_slots() const { return pages.num_blocks * block_size; }
  // The block whose bytes, of some head, contain this one.
  int64_t block_at(int64_t byte) const {
    return (head_stride > block_stride ? byte % head_stride : byte) / block_stride;
  }
};

// Blocks around the marks, where an address that lost its upper bits would lead, the first, the last, and random ones.
std::set<int64_t> interesting_blocks(Random &random, const LargePool &pool) {
  const int64_t elements_of_slot = int64_t{2} * kHeads * kHeadDim;
  std::set<int64_t> blocks = {0, pool.pages.num_blocks - 1};
  const auto around = [&](int64_t block) {
    for (int64_t i = block - 1; i <= block + 1; ++i) {
      if (i >= 0 && i < pool.pages.num_blocks) blocks.insert(i);
    }
  };
  const auto add = [&](int64_t byte, int64_t element) {
    around(pool.block_at(byte));
    around(element / elements_of_slot / pool.block_size);
  };
  for (int power : {31, 32}) {
    const int64_t mark = int64_t{1} << power;
    add(mark, mark);
  }
  for (int i = 0; i < 6; ++i) {
    // Beyond a mark, and where 31 or 32 bits of that would lead.
    const int64_t byte = random.integer(int64_t{1} << 32, pool.bytes - 1);
    const int64_t element =
        random.integer(int64_t{1} << 32, std::max(int64_t{1} << 32, pool.num_slots() * elements_of_slot - 1));
    for (int64_t mask : {int64_t{-1}, int64_t{0x7fffffff}, int64_t{0xffffffff}}) add(byte & mask, element & mask);
  }
  for (int i = 0; i < 20; ++i) blocks.insert(random.integer(0, pool.pages.num_blocks - 1));
  return blocks;
}

std::vector<uint8_t> rows_of(const std::vector<uint8_t> &array, const std::vector<int64_t> &tokens, size_t row) {
  std::vector<uint8_t> rows;
  for (int64_t token : tokens) {
    const auto first = array.begin() + token * int64_t(row);
    rows.insert(rows.end(), first, first + int64_t(row));
  }
  return rows;
}

// Everything of one codec on a target.
struct Cache {
  const Target &target;
  const tq_codec *codec;
  tq_pages pages, exact_pages;

  struct Loaded {
    std::vector<uint8_t> k, v;
    tq_faults faults;
  };
  // With `exact_slots` from the exact pool where these are not -1.
  Loaded load(const std::vector<int64_t> &slots, const std::vector<int64_t> &exact_slots, int32_t type) const {
    Device &device = *target.device;
    const size_t bytes = slots.size() * kHeads * kHeadDim * size_t(oracle::type_bytes(type));
    const Bytes k(device, bytes), v(device, bytes), at(device, slots), exact_at(device, exact_slots),
        faults(device, std::vector<tq_faults>(1));
    tq_load_args args = {};
    args.struct_size = sizeof args;
    args.output_type = type;
    args.num_tokens = int64_t(slots.size());
    args.k = k.data();
    args.v = v.data();
    args.pages = &pages;
    args.slots = at.as<int64_t>();
    if (!exact_slots.empty()) {
      args.exact_pages = &exact_pages;
      args.exact_slots = exact_at.as<int64_t>();
    }
    args.faults = faults.as<tq_faults>();
    const tq_status status = device.call([&](void *stream) {
      args.stream = stream;
      return tq_cache_load(codec, &args);
    });
    INFO("tq_cache_load: " << (status == TQ_OK ? "" : tq_last_error()));
    REQUIRE(status == TQ_OK);
    return {k.download(), v.download(), faults.download<tq_faults>()[0]};
  }
};

bool no_faults(const tq_faults &faults) {
  return std::all_of(faults.count, faults.count + TQ_FAULT_KINDS, [](uint64_t count) { return count == 0; });
}

void check_large_cache(const Target &target, int32_t block_size, bool head_major) {
  FRESH(random, "large cache");
  Device &device = *target.device;
  tq_config config = make_config(target, kHeadDim, 4, 3);
  config.kv_heads = kHeads;
  config.block_size_tokens = config.exact_block_size_tokens = block_size;
  config.seed = random.bits();
  INFO(target.name << ' ' << describe(config) << " head-major " << head_major);
  const CodecPtr codec = make_codec(config);
  LargePool pool(layout_of(codec.get(), TQ_PAGES_CODED), head_major);
  LargePool exact(layout_of(codec.get(), TQ_PAGES_EXACT), head_major);
  REQUIRE(pool.bytes > int64_t{1} << 32);
  REQUIRE(exact.bytes > int64_t{1} << 32);
  REQUIRE(pool.num_slots() * 2 * kHeads * kHeadDim > int64_t{1} << 32);
  REQUIRE(exact.num_slots() * 2 * kHeads * kHeadDim > int64_t{1} << 31);
  const Memory memory(device, size_t(pool.bytes)), exact_memory(device, size_t(exact.bytes));
  pool.pages.base = memory.data();
  exact.pages.base = exact_memory.data();
  const Cache cache{target, codec.get(), pool.pages, exact.pages};

  // Whole blocks, their slots in random order; every second token has an exact copy.
  const std::set<int64_t> blocks = interesting_blocks(random, pool), exact_blocks = interesting_blocks(random, exact);
  std::vector<int64_t> slots, exact_slots;
  for (int64_t block : blocks) {
    for (int row = 0; row < block_size; ++row) slots.push_back(block * block_size + row);
  }
  for (int64_t block : exact_blocks) {
    for (int row = 0; row < block_size; ++row) exact_slots.push_back(block * block_size + row);
  }
  const size_t tokens = std::max(slots.size(), exact_slots.size());
  slots.resize(tokens, -1);
  exact_slots.resize(tokens, -1);
  std::shuffle(slots.begin(), slots.end(), random.engine());
  std::shuffle(exact_slots.begin(), exact_slots.end(), random.engine());

  const int64_t values = int64_t(tokens) * kHeads * kHeadDim;
  const std::vector<uint8_t> k = encode_elements(normals(random, values), TQ_TYPE_BF16),
                             v = encode_elements(normals(random, values), TQ_TYPE_BF16);
  {
    const Bytes k_bytes(device, k), v_bytes(device, v), at(device, slots), exact_at(device, exact_slots),
        faults(device, std::vector<tq_faults>(1));
    tq_store_args args = {};
    args.struct_size = sizeof args;
    args.input_type = TQ_TYPE_BF16;
    args.num_tokens = int64_t(tokens);
    args.k = k_bytes.data();
    args.v = v_bytes.data();
    args.pages = &cache.pages;
    args.slots = at.as<int64_t>();
    args.exact_pages = &cache.exact_pages;
    args.exact_slots = exact_at.as<int64_t>();
    args.faults = faults.as<tq_faults>();
    const tq_status status = device.call([&](void *stream) {
      args.stream = stream;
      return tq_cache_store(codec.get(), &args);
    });
    INFO("tq_cache_store: " << (status == TQ_OK ? "" : tq_last_error()));
    REQUIRE(status == TQ_OK);
    CHECK(no_faults(faults.download<tq_faults>()[0]));
  }

  // What the CPU decodes from its own codes.
  tq_config cpu_config = config;
  cpu_config.device = TQ_DEVICE_CPU;
  cpu_config.device_ordinal = cpu_config.simd = 0;
  const CodecPtr cpu_codec = make_codec(cpu_config);
  CpuDevice cpu;
  const Target cpu_target{&cpu, 0, "cpu"};
  const auto decoded = [&](int32_t side, const std::vector<uint8_t> &input) {
    const Encoded encoded = encode(cpu_target, cpu_codec.get(), side, input, TQ_TYPE_BF16);
    return encode_elements(decode(cpu_target, cpu_codec.get(), side, encoded, int64_t(tokens) * kHeads), TQ_TYPE_F32);
  };
  const std::vector<uint8_t> want_k = decoded(TQ_SIDE_K, k), want_v = decoded(TQ_SIDE_V, v);

  // Tokens by their slot, to ask for some of them.
  std::map<int64_t, int64_t> token_at, exact_token_at;
  for (size_t i = 0; i < tokens; ++i) {
    if (slots[i] >= 0) token_at[slots[i]] = int64_t(i);
    if (exact_slots[i] >= 0) exact_token_at[exact_slots[i]] = int64_t(i);
  }
  // `at` and `exact_at` hold these tokens.
  const auto check_coded = [&](const std::vector<int64_t> &at, const std::vector<int64_t> &which) {
    const Cache::Loaded got = cache.load(at, {}, TQ_TYPE_F32);
    CHECK(no_faults(got.faults));
    CHECK(got.k == rows_of(want_k, which, kHeads * kHeadDim * 4));
    CHECK(got.v == rows_of(want_v, which, kHeads * kHeadDim * 4));
  };
  const auto check_exact = [&](const std::vector<int64_t> &at, const std::vector<int64_t> &which) {
    const Cache::Loaded got = cache.load(std::vector<int64_t>(at.size(), -1), at, TQ_TYPE_BF16);
    CHECK(no_faults(got.faults));
    CHECK(got.k == rows_of(k, which, kHeads * kHeadDim * 2));
    CHECK(got.v == rows_of(v, which, kHeads * kHeadDim * 2));
  };
  const auto check_all = [&] {
    std::vector<int64_t> at, which;
    for (const auto &[slot, token] : token_at) at.push_back(slot), which.push_back(token);
    check_coded(at, which);
    at.clear(), which.clear();
    for (const auto &[slot, token] : exact_token_at) at.push_back(slot), which.push_back(token);
    check_exact(at, which);
  };
  check_all();

  // Blocks copied across the mark, upwards and downwards, to blocks that nobody uses.
  const auto make_pairs = [&](const std::set<int64_t> &used, const LargePool &p) {
    const int64_t middle = p.block_at(int64_t{1} << 32);
    std::vector<int64_t> sources(used.begin(), used.end()), pairs;
    std::set<int64_t> taken = used;
    for (int i = 0; i < 24; ++i) {
      const int64_t from = i == 0 ? 0 : i == 1 ? p.pages.num_blocks - 1 : random.pick(sources);
      int64_t to;
      do {
        to = i % 2 == 0 ? random.integer(middle, p.pages.num_blocks - 1) : random.integer(0, middle - 1);
      } while (!taken.insert(to).second);
      pairs.insert(pairs.end(), {from, to});
    }
    return pairs;
  };
  const std::vector<int64_t> pairs = make_pairs(blocks, pool), exact_pairs = make_pairs(exact_blocks, exact);
  {
    const Bytes at(device, pairs), exact_at(device, exact_pairs), faults(device, std::vector<tq_faults>(1));
    tq_copy_args args = {};
    args.struct_size = sizeof args;
    args.src = &cache.pages;
    args.pairs = at.as<int64_t>();
    args.num_pairs = int64_t(pairs.size()) / 2;
    args.exact_src = &cache.exact_pages;
    args.exact_pairs = exact_at.as<int64_t>();
    args.num_exact_pairs = int64_t(exact_pairs.size()) / 2;
    args.faults = faults.as<tq_faults>();
    const tq_status status = device.call([&](void *stream) {
      args.stream = stream;
      return tq_cache_copy(codec.get(), &args);
    });
    INFO("tq_cache_copy: " << (status == TQ_OK ? "" : tq_last_error()));
    REQUIRE(status == TQ_OK);
    CHECK(no_faults(faults.download<tq_faults>()[0]));
  }
  const auto copied = [&](const std::vector<int64_t> &list, const std::map<int64_t, int64_t> &held,
                          std::vector<int64_t> *at, std::vector<int64_t> *which) {
    for (size_t i = 0; i < list.size(); i += 2) {
      for (int row = 0; row < block_size; ++row) {
        at->push_back(list[i + 1] * block_size + row);
        which->push_back(held.at(list[i] * block_size + row));
      }
    }
  };
  std::vector<int64_t> at, which;
  copied(pairs, token_at, &at, &which);
  check_coded(at, which);
  at.clear(), which.clear();
  copied(exact_pairs, exact_token_at, &at, &which);
  check_exact(at, which);
  check_all();  // and nothing else was written
}

// Flat vectors, codes and scales whose strides reach beyond 2^32 elements.
void check_large_strides(const Target &target) {
  FRESH(random, "large strides");
  Device &device = *target.device;
  constexpr int64_t kCount = 9, kStride = (int64_t{1} << 29) + 64, kCodesStride = (int64_t{1} << 29) + 16;
  tq_config config = make_config(target, kHeadDim, 4, 4);
  const CodecPtr codec = make_codec(config);
  const tq_side_info side = info_of(codec.get()).k;
  const std::vector<uint8_t> input = encode_elements(normals(random, kCount * kHeadDim), TQ_TYPE_BF16);
  const Encoded want = encode(target, codec.get(), TQ_SIDE_K, input, TQ_TYPE_BF16);
  const std::vector<uint8_t> want_output =
      encode_elements(decode(target, codec.get(), TQ_SIDE_K, want, kCount, TQ_TYPE_BF16), TQ_TYPE_BF16);

  // Codes and scales share an array: the scale follows the codes.
  const Memory rows(device, size_t(((kCount - 1) * kStride + kHeadDim) * 2)),
      codes(device, size_t((kCount - 1) * kCodesStride + side.code_bytes + side.scale_bytes));
  constexpr size_t kRowBytes = kHeadDim * 2;
  for (int64_t i = 0; i < kCount; ++i) rows.upload(&input[size_t(i) * kRowBytes], kRowBytes, size_t(i * kStride) * 2);
  tq_encode_args args = {};
  args.struct_size = sizeof args;
  args.side = TQ_SIDE_K;
  args.count = kCount;
  args.input = rows.data();
  args.input_type = TQ_TYPE_BF16;
  args.input_stride = kStride;
  args.codes = codes.data();
  args.codes_stride_bytes = kCodesStride;
  args.scales = codes.data() + side.code_bytes;
  args.scales_stride_bytes = kCodesStride;
  REQUIRE(device.call([&](void *stream) {
    args.stream = stream;
    return tq_encode(codec.get(), &args);
  }) == TQ_OK);
  for (int64_t i = 0; i < kCount; ++i) {
    INFO("vector " << i);
    std::vector<uint8_t> record(size_t(side.code_bytes + side.scale_bytes));
    codes.download(record.data(), record.size(), size_t(i * kCodesStride));
    CHECK(std::memcmp(record.data(), &want.codes[size_t(i * side.code_bytes)], size_t(side.code_bytes)) == 0);
    CHECK(std::memcmp(&record[size_t(side.code_bytes)], &want.scales[size_t(i * side.scale_bytes)],
                      size_t(side.scale_bytes)) == 0);
  }
  const std::vector<uint8_t> poison(kRowBytes, 0xff);
  for (int64_t i = 0; i < kCount; ++i) rows.upload(poison.data(), kRowBytes, size_t(i * kStride) * 2);
  tq_decode_args back = {};
  back.struct_size = sizeof back;
  back.side = TQ_SIDE_K;
  back.count = kCount;
  back.codes = args.codes;
  back.codes_stride_bytes = kCodesStride;
  back.scales = args.scales;
  back.scales_stride_bytes = kCodesStride;
  back.output = rows.data();
  back.output_type = TQ_TYPE_BF16;
  back.output_stride = kStride;
  REQUIRE(device.call([&](void *stream) {
    back.stream = stream;
    return tq_decode(codec.get(), &back);
  }) == TQ_OK);
  for (int64_t i = 0; i < kCount; ++i) {
    INFO("vector " << i);
    std::vector<uint8_t> row(kRowBytes);
    rows.download(row.data(), kRowBytes, size_t(i * kStride) * 2);
    CHECK(std::memcmp(row.data(), &want_output[size_t(i) * kRowBytes], kRowBytes) == 0);
  }
}

}  // namespace

TEST_CASE("caches and arrays of more than 4 GiB on a GPU", "[gpu]") {
  Device *device = gpu_or_skip();
  if (device == nullptr) return;
  const Target target = gpu_target(device);
  check_large_cache(target, 16, false);
  check_large_cache(target, 64, true);
  check_large_strides(target);
}

TEST_CASE("caches and arrays of more than 4 GiB on the CPU", "[long]") {
  const Target &target = targets().back();
  if (target.device->kind() != TQ_DEVICE_CPU) return;
  check_large_cache(target, 16, false);
  check_large_cache(target, 64, true);
  check_large_strides(target);
}
