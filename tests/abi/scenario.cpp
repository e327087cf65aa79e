// SPDX-License-Identifier: Apache-2.0
#include "scenario.hpp"

#include <algorithm>
#include <sstream>

std::string Scenario::describe() const {
  const tq_attention_args &a = call.args;
  std::ostringstream text;
  text << ::describe(config) << "\n  q_heads " << a.q_heads << " q_type " << a.q_type << " out_type " << a.out_type
       << " flags " << a.flags << " tokens " << a.num_tokens << " scale " << a.scale << " soft_cap " << a.soft_cap
       << " window " << a.window_tokens << " split " << a.split_tokens << " max_q_len " << a.max_q_len << " max_length "
       << a.max_length_tokens << " columns " << a.table_columns << " csr " << !call.block_indptr.empty() << " new "
       << !call.k_new.empty() << " sinks " << !call.sinks.empty() << " alibi " << !call.alibi_slopes.empty()
       << " offset " << !call.key_offset.empty();
  if (call.exact_pool) {
    text << " exact S " << a.exact_first_tokens << " W " << a.exact_recent_tokens << " columns " << a.exact_columns;
  }
  const auto list = [&](const char *name, const std::vector<int32_t> &values) {
    if (values.empty()) return;
    text << "\n  " << name;
    for (int32_t value : values) text << ' ' << value;
  };
  list("lengths", call.lengths);
  list("cu_seqlens", call.cu_seqlens);
  list("positions", call.q_positions);
  list("starts", call.starts);
  list("indptr", call.block_indptr);
  return text.str();
}

void fill_pool(Random &random, const Target &target, const Scenario &scenario, PoolImage *pool) {
  const oracle::Codec &reader = *scenario.reader;
  const int64_t slots = pool->view(reader).num_slots(reader, pool->exact);
  // The codes' pool is always part of a store; an exact pool is filled with the codes skipped.
  PoolImage scratch = scenario.pool;
  StoreCall call;
  call.pool = pool->exact ? &scratch : pool;
  for (int64_t slot = 0; slot < slots; ++slot) call.slots.push_back(pool->exact ? -1 : slot);
  if (pool->exact) {
    call.exact_pool = pool;
    for (int64_t slot = 0; slot < slots; ++slot) call.exact_slots.push_back(slot);
  }
  // Keys with a few strong channels and a mean, as models have them.
  std::vector<double> k, v = normals(random, slots * reader.kv_heads * reader.v.head_dim);
  std::vector<double> gain, mean;
  for (int c = 0; c < reader.k.head_dim; ++c) {
    gain.push_back(random.chance(0.05) ? 4 : 1);
    mean.push_back(random.chance(0.1) ? 2 * random.normal() : 0);
  }
  for (int64_t i = 0; i < slots * reader.kv_heads; ++i) {
    for (int c = 0; c < reader.k.head_dim; ++c) k.push_back(gain[size_t(c)] * random.normal() + mean[size_t(c)]);
  }
  call.k = encode_elements(k, call.type);
  call.v = encode_elements(v, call.type);
  const tq_status status = store(target, scenario.codec.get(), &call);
  INFO("tq_cache_store: " << (status == TQ_OK ? "" : tq_last_error()));
  REQUIRE(status == TQ_OK);
  REQUIRE(call.faults.first == 0);
}

std::unique_ptr<Scenario> random_scenario(uint64_t seed, const Target &target, const ScenarioLimits &limits) {
  Random random("scenario");
  random.engine().seed(seed);
  auto scenario = std::make_unique<Scenario>();
  Scenario &s = *scenario;
  ConfigLimits config_limits = limits.config;
  config_limits.attends = true;
  s.config = random_config(random, target, &s.storage, config_limits);
  s.codec = make_codec(s.config);
  s.info = info_of(s.codec.get());
  s.reader = std::make_unique<oracle::Codec>(s.config, s.info);
  const oracle::Codec &reader = *s.reader;
  AttentionCall &call = s.call;
  tq_attention_args &args = call.args;
  const int heads = reader.kv_heads, block = reader.block_size, exact_block = reader.exact_block_size;

  const bool many_rows = limits.config.many_rows;
  args.q_heads = heads * (many_rows ? random.pick({4, 5, 8, 12, 16, 32}) : random.pick({1, 1, 2, 3, 4, 5, 6, 7, 8}));
  args.q_type = random.pick({TQ_TYPE_F32, TQ_TYPE_F16, TQ_TYPE_BF16});
  args.out_type = random.pick({TQ_TYPE_F32, TQ_TYPE_F32, TQ_TYPE_F16, TQ_TYPE_BF16});
  if (random.chance(0.6)) args.flags = TQ_ATTENTION_CAUSAL;
  const int num_seqs = int(random.integer(0, limits.max_seqs));

  // Rows of queries.
  const bool ragged = random.chance(0.6);
  int longest_q = 1;
  if (ragged) {
    call.cu_seqlens.push_back(int32_t(random.integer(0, 1)));
    for (int i = 0; i < num_seqs; ++i) {
      const int q_len = many_rows ? random.pick({0, 2, 3, 4, 6}) : random.pick({0, 1, 1, 2, 3, 5});
      longest_q = std::max(longest_q, q_len);
      call.cu_seqlens.push_back(call.cu_seqlens.back() + q_len);
    }
    args.num_tokens = call.cu_seqlens.back() + int32_t(random.integer(0, 2));
    if (random.chance(0.5)) args.max_q_len = longest_q + int32_t(random.integer(0, 2));
  } else {
    args.num_tokens = num_seqs;
  }
  const auto q_len_of = [&](int i) { return ragged ? call.cu_seqlens[size_t(i) + 1] - call.cu_seqlens[size_t(i)] : 1; };
  const bool with_new = random.chance(0.3);

  // Pages, tables and lengths.
  const int64_t capacity_blocks = std::max<int64_t>(1, random.integer(1, limits.max_blocks_of_16) * 16 / block);
  const int64_t num_blocks = random.integer(1, 2 * capacity_blocks + 3);
  s.pool = make_pool(random, reader, s.info.page_fingerprint, false, num_blocks, random_shape(random));
  fill_pool(random, target, s, &s.pool);
  call.pool = &s.pool;
  const bool csr = random.chance(0.35);
  args.table_columns = csr ? 0 : capacity_blocks;
  if (!csr && random.chance(0.4)) args.block_table_stride = capacity_blocks + random.integer(0, 3);
  const int64_t table_stride = args.block_table_stride ? args.block_table_stride : capacity_blocks;
  if (csr) call.block_indptr.push_back(0);
  for (int i = 0; i < num_seqs; ++i) {
    const int64_t columns = csr ? random.integer(0, capacity_blocks) : capacity_blocks;
    const int64_t capacity = columns * block, q_len = with_new ? q_len_of(i) : 0;
    int64_t length =
        random.pick({int64_t{0}, int64_t{1}, int64_t{block - 1}, int64_t{block}, int64_t{block + 1}, capacity + q_len,
                     random.integer(0, capacity), random.integer(0, capacity), random.integer(0, capacity)});
    length = std::min(length, capacity + q_len);
    if (length > 0) length = std::max(length, q_len);
    if (limits.faults && random.chance(0.08)) {
      length = random.pick({int64_t{-1}, int64_t{INT32_MIN}, capacity + q_len + 1, int64_t{INT32_MAX}});
    }
    call.lengths.push_back(int32_t(length));
    std::vector<int32_t> &table = csr ? call.block_indices : call.block_table;
    for (int64_t column = 0; column < (csr ? columns : table_stride); ++column) {
      int32_t entry = int32_t(random.integer(0, num_blocks - 1));
      if (limits.faults && random.chance(0.15 / double(capacity_blocks))) {
        entry = random.pick({-1, int32_t(num_blocks), INT32_MIN, INT32_MAX});
      }
      table.push_back(entry);
    }
    if (csr) call.block_indptr.push_back(int32_t(call.block_indices.size()));
  }
  int32_t longest = 1;
  for (int32_t length : call.lengths) longest = std::max(longest, length);
  if (longest < INT32_MAX / 2 && random.chance(0.4)) args.max_length_tokens = longest + int32_t(random.integer(0, 40));

  // Positions and what they limit.
  if (random.chance(0.2)) {
    for (int i = 0; i < args.num_tokens; ++i) {
      call.q_positions.push_back(int32_t(random.integer(-3, capacity_blocks * block + 3)));
    }
  }
  if (random.chance(0.3)) args.window_tokens = int32_t(random.integer(1, capacity_blocks * block));
  if (random.chance(0.3)) {
    for (int i = 0; i < num_seqs; ++i) {
      call.starts.push_back(
          int32_t(random.pick({int64_t{0}, random.integer(0, capacity_blocks * block), random.integer(0, 20)})));
    }
  }

  // Exact pages, with holes in the table and blocks that repeat.
  if (random.chance(0.4)) {
    const int64_t exact_blocks = random.integer(1, exact_block >= 32 ? 4 : 12);
    s.exact = make_pool(random, reader, s.info.exact_fingerprint, true, exact_blocks, random_shape(random));
    fill_pool(random, target, s, &s.exact);
    call.exact_pool = &s.exact;
    args.exact_columns = random.integer(1, std::max<int64_t>(1, capacity_blocks * block / exact_block + 2));
    if (random.chance(0.4)) args.exact_table_stride = args.exact_columns + random.integer(0, 3);
    const int64_t stride = args.exact_table_stride ? args.exact_table_stride : args.exact_columns;
    for (int64_t i = 0; i < num_seqs * stride; ++i) {
      int32_t entry = random.chance(0.3) ? random.pick({-1, -1, INT32_MIN}) : int32_t(i % exact_blocks);
      if (limits.faults && random.chance(0.1 / double(stride))) entry = random.pick({int32_t(exact_blocks), INT32_MAX});
      call.exact_table.push_back(entry);
    }
    if (call.exact_table.empty()) call.exact_table.push_back(-1);
    args.exact_first_tokens = random.chance(0.6) ? int32_t(random.integer(0, 40)) : 0;
    args.exact_recent_tokens = random.chance(0.6) ? int32_t(random.integer(0, 70)) : 0;
  }

  if (random.chance(0.3)) {
    for (int h = 0; h < args.q_heads; ++h) {
      const double drawn = 2 * random.normal();  // and sinks whose exp overflows, or that are none
      const float special = random.pick({100.0f, -100.0f, -std::numeric_limits<float>::infinity()});
      call.sinks.push_back(random.chance(0.1) ? special : float(drawn));
    }
  }
  if (random.chance(0.25)) {
    for (int h = 0; h < args.q_heads; ++h) call.alibi_slopes.push_back(float(std::exp2(-random.uniform(3, 8))));
  }
  if (random.chance(0.35)) {
    for (int c = 0; c < heads * reader.k.head_dim; ++c) {
      call.key_offset.push_back(random.chance(0.1) ? float(3 * random.normal()) : 0.0f);
    }
  }
  if (random.chance(0.3)) args.soft_cap = float(random.uniform(5, 50));
  if (random.chance(0.4)) args.scale = float(random.uniform(0.02, 0.2)) * (random.chance(0.1) ? -1.0f : 1.0f);
  if (random.chance(0.3)) args.split_tokens = int32_t(16 * random.integer(1, 12));

  // Queries whose logits have the wanted spread: keys have about unit variance, so <q, k> has that of |q|.
  const double spread = limits.peak > 0 ? limits.peak : random.pick({0.5, 1.0, 2.0, 3.0});
  const double scale = args.scale != 0 ? std::fabs(double(args.scale)) : 1 / std::sqrt(double(reader.k.head_dim));
  const double q_sigma = spread / (scale * std::sqrt(double(reader.k.head_dim)) * 1.4);
  const auto rows = [&](int rows_heads, int head_dim, double sigma, int64_t *token_stride, int64_t *head_stride) {
    if (random.chance(0.3)) {
      *head_stride = head_dim + random.integer(0, 5);
      *token_stride = *head_stride * rows_heads + random.integer(0, 5);
    } else if (random.chance(0.2)) {  // head-major
      *token_stride = head_dim + random.integer(0, 5);
      *head_stride = *token_stride * std::max(1, args.num_tokens) + random.integer(0, 5);
    }
    const int64_t ts = *token_stride ? *token_stride : int64_t(rows_heads) * head_dim,
                  hs = *head_stride ? *head_stride : head_dim;
    const int64_t elements = args.num_tokens ? (args.num_tokens - 1) * ts + (rows_heads - 1) * hs + head_dim : 0;
    std::vector<double> values(size_t(elements), std::nan(""));  // NaN in the gaps
    for (int64_t t = 0; t < args.num_tokens; ++t) {
      for (int h = 0; h < rows_heads; ++h) {
        for (int c = 0; c < head_dim; ++c) values[size_t(t * ts + h * hs + c)] = sigma * random.normal();
      }
    }
    return encode_elements(values, args.q_type);
  };
  call.q = rows(args.q_heads, reader.k.head_dim, q_sigma, &args.q_token_stride, &args.q_head_stride);
  if (with_new) {
    call.k_new = rows(heads, reader.k.head_dim, 1, &args.k_new_token_stride, &args.k_new_head_stride);
    call.v_new = rows(heads, reader.v.head_dim, 1, &args.v_new_token_stride, &args.v_new_head_stride);
    if (call.k_new.empty()) call.k_new.resize(4), call.v_new.resize(4);  // no tokens, but given
  }
  if (random.chance(0.3)) {
    args.out_head_stride = reader.v.head_dim + random.integer(0, 5);
    args.out_token_stride = args.out_head_stride * args.q_heads + random.integer(0, 5);
  }
  return scenario;
}

void spoil_unseen(Random &random, const oracle::Attention &expected, Scenario *scenario) {
  Scenario &s = *scenario;
  const oracle::Codec &reader = *s.reader;
  for (PoolImage *image : {&s.pool, &s.exact}) {
    std::vector<uint8_t> spoiled(image->bytes.size(), 0xff);
    if (image->bytes.empty()) continue;
    for (int64_t slot : image->exact ? expected.exact_slots : expected.coded_slots) {
      for (int head = 0; head < reader.kv_heads; ++head) {
        for (int32_t side : {TQ_SIDE_K, TQ_SIDE_V}) {
          oracle::for_each_byte(reader, image->exact, image->view(reader), side, slot, head,
                                [&](int64_t offset) { spoiled[size_t(offset)] = image->bytes[size_t(offset)]; });
        }
      }
    }
    image->bytes = spoiled;
  }
  AttentionCall &call = s.call;
  const auto spoil_rows = [&](std::vector<uint8_t> *bytes, int64_t token_stride, int64_t head_stride, int heads,
                              int head_dim, const std::function<bool(int64_t)> &seen) {
    const int64_t element = oracle::type_bytes(call.args.q_type);
    const int64_t ts = token_stride ? token_stride : int64_t(heads) * head_dim,
                  hs = head_stride ? head_stride : head_dim;
    for (int64_t row = 0; row < call.args.num_tokens; ++row) {
      if (seen(row)) continue;
      for (int head = 0; head < heads; ++head) {
        std::fill_n(bytes->begin() + (row * ts + head * hs) * element, head_dim * element, uint8_t(0xff));
      }
    }
  };
  const tq_attention_args &a = call.args;
  spoil_rows(&call.q, a.q_token_stride, a.q_head_stride, a.q_heads, reader.k.head_dim,
             [&](int64_t row) { return expected.written[size_t(row)] != 0; });
  const auto seen_new = [&](int64_t row) { return expected.new_rows.count(row) != 0; };
  if (!call.k_new.empty()) {
    spoil_rows(&call.k_new, a.k_new_token_stride, a.k_new_head_stride, reader.kv_heads, reader.k.head_dim, seen_new);
    spoil_rows(&call.v_new, a.v_new_token_stride, a.v_new_head_stride, reader.kv_heads, reader.v.head_dim, seen_new);
  }
  const auto garbage = [&] {
    return random.pick({INT32_MIN, INT32_MAX, -1, 1 << 20, int32_t(s.pool.pages.num_blocks)});
  };
  for (size_t i = 0; i < call.lengths.size(); ++i) {
    if (expected.fault[i] >= 0) continue;
    const bool csr = !call.block_indptr.empty();
    std::vector<int32_t> &table = csr ? call.block_indices : call.block_table;
    const int64_t stride = call.args.block_table_stride ? call.args.block_table_stride : call.args.table_columns;
    const int64_t first = csr ? call.block_indptr[i] : int64_t(i) * stride;
    const int64_t end = csr ? call.block_indptr[i + 1] : first + stride;
    for (int64_t at = first; at < end && at < int64_t(table.size()); ++at) {
      if (!expected.entries[i].count(at - first)) table[size_t(at)] = garbage();
    }
    const int64_t exact_stride = call.args.exact_table_stride ? call.args.exact_table_stride : call.args.exact_columns;
    for (int64_t column = 0; column < exact_stride && call.exact_pool; ++column) {
      if (!expected.exact_entries[i].count(column)) {
        call.exact_table[size_t(int64_t(i) * exact_stride + column)] = garbage();
      }
    }
  }
}
