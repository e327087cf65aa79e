// SPDX-License-Identifier: Apache-2.0
#include "operations.hpp"

#include <algorithm>
#include <cstring>

namespace {

constexpr int kHeadDim = 128, kHeads = 2, kTokens = 40, kBlocks = 8;
constexpr int kStates = 3, kRows = 20;

Target cpu_target() {
  static CpuDevice device;
  return {&device, 0, "cpu"};
}

}  // namespace

const char *name_of(Operation operation) {
  constexpr const char *kNames[] = {"encode", "decode", "store", "load", "copy", "merge"};
  return kNames[int(operation)];
}

OperationInputs make_inputs(Random &random, int32_t rotation) {
  OperationInputs inputs;
  const Target target = cpu_target();
  inputs.config = make_config(target, kHeadDim, 4, 3);
  inputs.config.kv_heads = kHeads;
  inputs.config.k.rotation = inputs.config.v.rotation = rotation;
  inputs.config.seed = random.bits();
  const CodecPtr codec = make_codec(inputs.config);
  const tq_codec_info info = info_of(codec.get());
  const oracle::Codec reader(inputs.config, info);

  std::vector<double> k = normals(random, kTokens * kHeads * kHeadDim);
  k[size_t(random.integer(0, int64_t(k.size()) - 1))] = std::nan("");  // a fault to count
  inputs.k = encode_elements(k, TQ_TYPE_BF16);
  inputs.v = encode_elements(normals(random, kTokens * kHeads * kHeadDim), TQ_TYPE_BF16);
  for (int i = 0; i < kHeads * kHeadDim; ++i) inputs.key_offset.push_back(float(random.normal()));
  inputs.encoded = encode(target, codec.get(), TQ_SIDE_K, inputs.k, TQ_TYPE_BF16);

  // Five of the eight blocks of 16 hold tokens; the others are free to be copied to.
  for (std::vector<int64_t> *slots : {&inputs.slots, &inputs.exact_slots}) {
    for (int64_t slot = 0; slot < 5 * 16; ++slot) slots->push_back(slot);
    std::shuffle(slots->begin(), slots->end(), random.engine());
    slots->resize(kTokens);
  }
  inputs.slots[3] = kBlocks * 16;  // a fault
  inputs.exact_slots[5] = -1;
  inputs.pairs = {0, 5, 4, 7, -1, -1, 2, 6, kBlocks, 3};  // the last one a fault
  inputs.empty = make_pool(random, reader, info.page_fingerprint, false, kBlocks, PoolShape::kPacked);
  inputs.exact_empty = make_pool(random, reader, info.exact_fingerprint, true, kBlocks, PoolShape::kPadded);
  inputs.pool = inputs.empty;
  inputs.exact_pool = inputs.exact_empty;
  StoreCall call;
  call.type = TQ_TYPE_BF16;
  call.k = inputs.k;
  call.v = inputs.v;
  call.slots = inputs.slots;
  call.exact_slots = inputs.exact_slots;
  call.key_offset = inputs.key_offset;
  call.pool = &inputs.pool;
  call.exact_pool = &inputs.exact_pool;
  REQUIRE(store(target, codec.get(), &call) == TQ_OK);

  inputs.states = encode_elements(normals(random, kStates * kRows * kHeadDim), TQ_TYPE_F32);
  for (int i = 0; i < kStates * kRows; ++i) inputs.lse.push_back(float(random.uniform(-5, 5)));
  return inputs;
}

tq_config config_for(const Target &target, const OperationInputs &inputs) {
  tq_config config = inputs.config;
  const tq_config other = make_config(target, kHeadDim, 4, 3);
  config.device = other.device;
  config.device_ordinal = other.device_ordinal;
  config.simd = other.simd;
  config.threads = other.threads;
  return config;
}

Outputs run(Operation operation, const Target &target, const tq_codec *codec, const OperationInputs &inputs) {
  Device &device = *target.device;
  const bool dense = inputs.config.k.rotation == TQ_ROTATION_DENSE;
  size_t workspace_bytes = 0;
  // Fused rotations take no workspace, as the query would say: nothing is asked before the call itself.
  if (dense && (operation == Operation::kEncode || operation == Operation::kDecode)) {
    REQUIRE(tq_vectors_workspace(codec, TQ_SIDE_K, kTokens * kHeads, &workspace_bytes) == TQ_OK);
  } else if (dense) {
    REQUIRE(tq_cache_workspace(codec, kTokens, &workspace_bytes) == TQ_OK);
  }
  const Bytes workspace(device, workspace_bytes), faults(device, std::vector<tq_faults>(1));
  const auto call = [&](auto &args, auto function) {
    args.struct_size = sizeof args;
    const tq_status status = device.call([&](void *stream) {
      args.stream = stream;
      return function(codec, &args);
    });
    INFO(name_of(operation) << " on " << target.name << ": " << (status == TQ_OK ? "" : tq_last_error()));
    REQUIRE(status == TQ_OK);
  };
  constexpr size_t kValues = size_t{kTokens} * kHeads * kHeadDim;
  switch (operation) {
    case Operation::kEncode: {
      const Bytes in(device, inputs.k), codes(device, inputs.encoded.codes.size()),
          scales(device, inputs.encoded.scales.size());
      tq_encode_args args = {};
      args.side = TQ_SIDE_K;
      args.count = kTokens * kHeads;
      args.input = in.data();
      args.input_type = TQ_TYPE_BF16;
      args.codes = codes.data();
      args.scales = scales.data();
      args.faults = faults.as<tq_faults>();
      args.workspace = workspace.data();
      args.workspace_bytes = workspace_bytes;
      call(args, tq_encode);
      return {codes.download(), scales.download(), faults.download()};
    }
    case Operation::kDecode: {
      const Bytes codes(device, inputs.encoded.codes), scales(device, inputs.encoded.scales), out(device, kValues * 4);
      tq_decode_args args = {};
      args.side = TQ_SIDE_K;
      args.count = kTokens * kHeads;
      args.codes = codes.data();
      args.scales = scales.data();
      args.output = out.data();
      args.output_type = TQ_TYPE_F32;
      args.workspace = workspace.data();
      args.workspace_bytes = workspace_bytes;
      call(args, tq_decode);
      return {out.download()};
    }
    case Operation::kStore: {
      const Bytes k(device, inputs.k), v(device, inputs.v), slots(device, inputs.slots),
          exact_slots(device, inputs.exact_slots), offset(device, inputs.key_offset), pool(device, inputs.empty.bytes),
          exact_pool(device, inputs.exact_empty.bytes);
      const tq_pages pages = inputs.empty.at(pool.data()), exact_pages = inputs.exact_empty.at(exact_pool.data());
      tq_store_args args = {};
      args.input_type = TQ_TYPE_BF16;
      args.num_tokens = kTokens;
      args.k = k.data();
      args.v = v.data();
      args.pages = &pages;
      args.slots = slots.as<int64_t>();
      args.exact_pages = &exact_pages;
      args.exact_slots = exact_slots.as<int64_t>();
      args.key_offset = offset.as<float>();
      args.faults = faults.as<tq_faults>();
      args.workspace = workspace.data();
      args.workspace_bytes = workspace_bytes;
      call(args, tq_cache_store);
      return {pool.download(), exact_pool.download(), faults.download()};
    }
    case Operation::kLoad: {
      // The even tokens from their exact copies.
      std::vector<int64_t> chosen = inputs.exact_slots;
      for (size_t i = 1; i < chosen.size(); i += 2) chosen[i] = -1;
      const Bytes k(device, kValues * 2), v(device, kValues * 2), slots(device, inputs.slots),
          exact_slots(device, chosen), offset(device, inputs.key_offset), pool(device, inputs.pool.bytes),
          exact_pool(device, inputs.exact_pool.bytes);
      const tq_pages pages = inputs.pool.at(pool.data()), exact_pages = inputs.exact_pool.at(exact_pool.data());
      tq_load_args args = {};
      args.output_type = TQ_TYPE_BF16;
      args.num_tokens = kTokens;
      args.k = k.data();
      args.v = v.data();
      args.pages = &pages;
      args.slots = slots.as<int64_t>();
      args.exact_pages = &exact_pages;
      args.exact_slots = exact_slots.as<int64_t>();
      args.key_offset = offset.as<float>();
      args.faults = faults.as<tq_faults>();
      args.workspace = workspace.data();
      args.workspace_bytes = workspace_bytes;
      call(args, tq_cache_load);
      return {k.download(), v.download(), faults.download()};
    }
    case Operation::kCopy: {
      const Bytes pairs(device, inputs.pairs), pool(device, inputs.pool.bytes),
          exact_pool(device, inputs.exact_pool.bytes);
      const tq_pages pages = inputs.pool.at(pool.data()), exact_pages = inputs.exact_pool.at(exact_pool.data());
      tq_copy_args args = {};
      args.src = &pages;
      args.pairs = pairs.as<int64_t>();
      args.num_pairs = int64_t(inputs.pairs.size()) / 2;
      args.exact_src = &exact_pages;
      args.exact_pairs = pairs.as<int64_t>();
      args.num_exact_pairs = args.num_pairs;
      args.faults = faults.as<tq_faults>();
      call(args, tq_cache_copy);
      return {pool.download(), exact_pool.download(), faults.download()};
    }
    case Operation::kMerge: {
      const Bytes states(device, inputs.states), lse(device, inputs.lse), out(device, size_t{kRows} * kHeadDim * 4),
          out_lse(device, size_t{kRows} * 4);
      tq_merge_args args = {};
      args.num_states = kStates;
      args.num_rows = kRows;
      args.head_dim = kHeadDim;
      args.type = TQ_TYPE_F32;
      args.states = states.data();
      args.lse = lse.as<float>();
      args.out = out.data();
      args.out_lse = out_lse.as<float>();
      call(args, tq_merge_states);
      return {out.download(), out_lse.download()};
    }
  }
  return {};
}

bool agree(Operation operation, const Outputs &a, const Outputs &b) {
  if (operation != Operation::kMerge) return a == b;
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i].size() != b[i].size()) return false;
    const int64_t count = int64_t(a[i].size()) / 4;
    for (int64_t j = 0; j < count; ++j) {
      const double x = oracle::read_element(a[i].data(), TQ_TYPE_F32, j),
                   y = oracle::read_element(b[i].data(), TQ_TYPE_F32, j);
      if (!(std::fabs(x - y) <= 1e-5 * std::max(1.0, std::fabs(y)))) return false;
    }
  }
  return true;
}
