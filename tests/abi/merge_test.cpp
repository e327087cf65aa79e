// SPDX-License-Identifier: Apache-2.0
// Merging partial attention: the formula, and that the parts of a split sequence make the whole.
#include <algorithm>
#include <cstring>

#include "scenario.hpp"

namespace {

struct Merged {
  std::vector<double> out;
  std::vector<float> lse;
};

Merged merge(const Target &target, const tq_codec *codec, int32_t type, const std::vector<uint8_t> &states,
             const std::vector<float> &lse, int num_states, int64_t rows, int head_dim, bool in_place, bool want_lse) {
  Device &device = *target.device;
  const Bytes state_bytes(device, states), lse_bytes(device, lse),
      out(device, size_t(rows * head_dim * oracle::type_bytes(type))), out_lse(device, size_t(rows) * 4);
  tq_merge_args args = {};
  args.struct_size = sizeof args;
  args.num_states = num_states;
  args.num_rows = rows;
  args.head_dim = head_dim;
  args.type = type;
  args.states = state_bytes.data();
  args.lse = lse_bytes.as<float>();
  args.out = in_place ? state_bytes.data() : out.data();
  args.out_lse = !want_lse ? nullptr : in_place ? lse_bytes.as<float>() : out_lse.as<float>();
  const tq_status status = target.device->call([&](void *stream) {
    args.stream = stream;
    return tq_merge_states(codec, &args);
  });
  INFO("tq_merge_states: " << (status == TQ_OK ? "" : tq_last_error()));
  REQUIRE(status == TQ_OK);
  Merged merged;
  const std::vector<uint8_t> image = in_place ? state_bytes.download() : out.download();
  merged.out = decode_elements(image.data(), type, rows * head_dim);
  merged.lse = in_place ? lse_bytes.download<float>() : out_lse.download<float>();
  merged.lse.resize(size_t(rows));
  if (!in_place) {
    CHECK(state_bytes.download() == states);
  } else {
    // Only the first state and the first row of lse may change.
    const std::vector<uint8_t> after = state_bytes.download();
    const size_t first = size_t(rows * head_dim * oracle::type_bytes(type));
    CHECK(std::equal(after.begin() + std::ptrdiff_t(first), after.end(), states.begin() + std::ptrdiff_t(first)));
  }
  return merged;
}

}  // namespace

TEST_CASE("merging follows its formula, in place or not") {
  FRESH(random, "merge formula");
  for (const Target &target : targets()) {
    const CodecPtr codec = make_codec(make_config(target, 64, 4, 4));
    for (int round = 0; round < 60; ++round) {
      const int num_states = int(random.integer(1, 9)), head_dim = int(random.pick({1, 3, 64, 80, 257}));
      const int64_t rows = random.integer(0, 12);
      const int32_t type = random.pick({TQ_TYPE_F32, TQ_TYPE_F16, TQ_TYPE_BF16});
      std::vector<uint8_t> states = encode_elements(normals(random, num_states * rows * head_dim), type);
      std::vector<float> lse;
      for (int64_t i = 0; i < num_states * rows; ++i) {
        lse.push_back(random.chance(0.2) ? -std::numeric_limits<float>::infinity() : float(20 * random.normal()));
      }
      const int64_t element = oracle::type_bytes(type);
      for (int64_t i = 0; i < num_states * rows; ++i) {  // whatever an ignored state holds
        if (std::isinf(lse[size_t(i)])) {
          std::fill_n(states.begin() + i * head_dim * element, head_dim * element, uint8_t(0xff));
        }
      }
      const bool in_place = random.chance(0.4), want_lse = random.chance(0.8);
      INFO(target.name << " states " << num_states << " rows " << rows << " head_dim " << head_dim << " type " << type
                       << " in place " << in_place);
      const Merged got = merge(target, codec.get(), type, states, lse, num_states, rows, head_dim, in_place, want_lse);
      for (int64_t row = 0; row < rows; ++row) {
        double maximum = -std::numeric_limits<double>::infinity(), z = 0;
        for (int i = 0; i < num_states; ++i) maximum = std::max(maximum, double(lse[size_t(i * rows + row)]));
        oracle::Vector sum(size_t(head_dim), 0.0);
        for (int i = 0; i < num_states; ++i) {
          const double weight = std::exp(double(lse[size_t(i * rows + row)]) - maximum);
          if (std::isinf(lse[size_t(i * rows + row)])) continue;
          z += weight;
          for (int c = 0; c < head_dim; ++c) {
            sum[size_t(c)] += weight * oracle::read_element(states.data(), type, (i * rows + row) * head_dim + c);
          }
        }
        if (z == 0) {
          for (int c = 0; c < head_dim; ++c) CHECK(got.out[size_t(row * head_dim + c)] == 0);
          if (want_lse) CHECK(got.lse[size_t(row)] == -std::numeric_limits<float>::infinity());
          continue;
        }
        const double rounding = type == TQ_TYPE_F16 ? 0x1p-11 : type == TQ_TYPE_BF16 ? 0x1p-8 : 0;
        double worst = 0;
        for (int c = 0; c < head_dim; ++c) {
          const double want = sum[size_t(c)] / z;
          // Weights are exp of differences up to about 100, whose f32 rounding is 2^-18 relative at worst.
          worst = std::max(worst, std::fabs(got.out[size_t(row * head_dim + c)] - want) - rounding * std::fabs(want));
        }
        CHECK(worst <= 2e-5);
        if (want_lse) {
          CHECK(std::fabs(got.lse[size_t(row)] - (maximum + std::log(z))) <= 1e-6 + 0x1p-22 * std::fabs(maximum));
        }
      }
    }
  }
}

TEST_CASE("parts of a split sequence merge to the whole") {
  FRESH(random, "merge parts");
  for (const Target &target : targets()) {
    if (target.device->kind() != TQ_DEVICE_CPU) continue;  // attention is computed on the CPU only
    for (int round = 0; round < 30; ++round) {
      // Keys [0, a), [a, b), [b, length): the parts are made by starts and by shorter lengths, the positions given.
      const std::unique_ptr<Scenario> scenario = random_scenario(
          random.bits(), target, {.config = {.max_head_dim = 96, .allow_matrices = false}, .faults = false});
      Scenario &s = *scenario;
      s.call.args.out_type = TQ_TYPE_F32;
      s.call.args.out_head_stride = s.call.args.out_token_stride = 0;
      s.call.k_new.clear(), s.call.v_new.clear();
      s.call.args.k_new_head_stride = s.call.args.k_new_token_stride = 0;
      s.call.args.v_new_head_stride = s.call.args.v_new_token_stride = 0;
      s.call.sinks.clear();  // they belong to one state only
      s.call.exact_pool = nullptr, s.call.exact_table.clear();
      s.call.args.exact_columns = s.call.args.exact_table_stride = 0;
      s.call.args.exact_first_tokens = s.call.args.exact_recent_tokens = 0;
      s.call.starts.clear();
      if (s.call.lengths.empty()) continue;
      const bool csr = !s.call.block_indptr.empty();
      for (size_t i = 0; i < s.call.lengths.size(); ++i) {
        const int64_t columns = csr ? s.call.block_indptr[i + 1] - s.call.block_indptr[i] : s.call.args.table_columns;
        s.call.lengths[i] = int32_t(std::min<int64_t>(s.call.lengths[i], columns * s.reader->block_size));
      }
      if (s.call.q_positions.empty()) {  // the same in every part
        s.call.q_positions.assign(size_t(s.call.args.num_tokens), 0);
        for (size_t i = 0; i < s.call.lengths.size(); ++i) {
          const int32_t row0 = s.call.cu_seqlens.empty() ? int32_t(i) : s.call.cu_seqlens[i];
          const int32_t row1 = s.call.cu_seqlens.empty() ? int32_t(i) + 1 : s.call.cu_seqlens[i + 1];
          for (int32_t row = row0; row < row1; ++row) {
            s.call.q_positions[size_t(row)] = s.call.lengths[i] - (row1 - row0) + row - row0;
          }
        }
      }
      INFO(target.name << " round " << round << ' ' << s.describe());
      const AttentionRun whole = s.run_on(target);
      REQUIRE(whole.status == TQ_OK);
      const oracle::Attention want = expected(*s.reader, s.call);
      const std::vector<int32_t> lengths = s.call.lengths;
      std::vector<uint8_t> states;
      std::vector<float> lse;
      std::vector<int32_t> cuts(lengths.size(), 0);
      for (int part = 0; part < 3; ++part) {
        s.call.starts = cuts;
        for (size_t i = 0; i < lengths.size(); ++i) {
          cuts[i] = part == 2 ? lengths[i] : int32_t(random.integer(cuts[i], lengths[i]));
        }
        s.call.lengths = cuts;
        const AttentionRun piece = s.run_on(target);
        REQUIRE(piece.status == TQ_OK);
        states.insert(states.end(), piece.raw_out.begin(), piece.raw_out.end());
        lse.insert(lse.end(), piece.lse.begin(), piece.lse.end());
      }
      const int head_dim = s.reader->v.head_dim;
      const int64_t rows = int64_t(s.call.args.num_tokens) * s.call.args.q_heads;
      const Merged merged = merge(target, s.codec.get(), TQ_TYPE_F32, states, lse, 3, rows, head_dim, false, true);
      for (int64_t row = 0; row < rows; ++row) {
        if (!want.written[size_t(row / s.call.args.q_heads)]) continue;
        double error = 0;
        for (int c = 0; c < head_dim; ++c) {
          error += std::pow(merged.out[size_t(row * head_dim + c)] - whole.out[size_t(row * head_dim + c)], 2);
        }
        INFO("row " << row);
        if (std::isinf(want.lse[size_t(row)])) {
          CHECK(error == 0);
          CHECK(std::isinf(merged.lse[size_t(row)]));
          continue;
        }
        CHECK(std::sqrt(error) <= 2 * attention_tolerance(target) * want.magnitude[size_t(row)]);
        CHECK(std::fabs(merged.lse[size_t(row)] - whole.lse[size_t(row)]) <=
              2 * attention_tolerance(target) + 0x1p-21 * std::fabs(whole.lse[size_t(row)]));
      }
    }
  }
}
