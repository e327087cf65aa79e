// SPDX-License-Identifier: Apache-2.0
#include "support.hpp"

#include <algorithm>
#include <cstring>
#include <sstream>
#include <stdexcept>

namespace {

uint64_t hash_of(const char *text) {
  uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a
  for (; *text; ++text) hash = (hash ^ uint8_t(*text)) * 0x100000001b3u;
  return hash;
}

}  // namespace

const std::vector<Target> &targets() {
  static CpuDevice cpu;
  static const std::vector<Target> all = [] {
    std::vector<Target> found;
    const std::pair<int32_t, const char *> sets[] = {{TQ_SIMD_SCALAR, "cpu scalar"},
                                                     {TQ_SIMD_AVX2, "cpu AVX2"},
                                                     {TQ_SIMD_AVX512, "cpu AVX-512"},
                                                     {TQ_SIMD_NEON, "cpu NEON"}};
    for (const auto &[simd, name] : sets) {
      tq_config config;
      if (tq_config_init(&config, sizeof config, nullptr) != TQ_OK) continue;
      config.k.head_dim = 64;
      config.simd = simd;
      if (tq_supports(&config) == TQ_OK) found.push_back({&cpu, simd, name});
    }
    const char *device = std::getenv("TQKV_TEST_DEVICE");
    if (device != nullptr && std::string(device) == "cuda") {
      found.resize(1);
      for (const bool captured : {false, true}) {
        Device *cuda = cuda_device(captured);
        if (cuda == nullptr) throw std::runtime_error("tqkv test skipped: there is no CUDA device");
        found.push_back({cuda, 0, captured ? "cuda, captured" : "cuda"});
      }
    }
    return found;
  }();
  return all;
}

Random::Random(const char *salt) : seed_(tqkv_test::seed()), engine_(tqkv_test::seed() ^ hash_of(salt)) {}

tq_config make_config(const Target &target, int head_dim, int bits_k, int bits_v) {
  tq_config config{};
  config.struct_size = sizeof config;
  config.device = target.device->kind();
  config.device_ordinal = target.device->ordinal();
  config.k.head_dim = head_dim;
  config.k.bits = bits_k;
  config.v.bits = bits_v;
  config.simd = target.simd;
  if (config.device == TQ_DEVICE_CPU) config.threads = 2;
  return config;
}

std::string describe(const tq_config &config) {
  std::ostringstream text;
  const auto side = [&](const char *name, const tq_side_config &s) {
    text << name << ": head_dim " << s.head_dim << " bits " << s.bits << " rotation " << s.rotation << " rounds "
         << s.hadamard_rounds << " codebook " << s.codebook << " rule " << s.scale_rule << " scale_type "
         << s.scale_type << "; ";
  };
  side("k", config.k);
  side("v", config.v);
  text << "kv_heads " << config.kv_heads << " seed " << config.seed << " block " << config.block_size_tokens
       << " exact block " << config.exact_block_size_tokens << " raw_type " << config.raw_type << " simd "
       << config.simd << " threads " << config.threads;
  return text.str();
}

CodecPtr make_codec(const tq_config &config) {
  tq_codec *codec = nullptr;
  const tq_status status = tq_create(&config, &codec);
  INFO("tq_create: " << describe(config) << ": " << (status == TQ_OK ? "" : tq_last_error()));
  REQUIRE(status == TQ_OK);
  REQUIRE(codec != nullptr);
  return CodecPtr(codec);
}

tq_codec_info info_of(const tq_codec *codec) {
  tq_codec_info info;
  std::memset(&info, 0xff, sizeof info);
  info.struct_size = sizeof info;
  REQUIRE(tq_info(codec, &info) == TQ_OK);
  return info;
}

tq_layout layout_of(const tq_codec *codec, int32_t which) {
  tq_layout layout;
  std::memset(&layout, 0xff, sizeof layout);
  layout.struct_size = sizeof layout;
  REQUIRE(tq_page_layout(codec, which, &layout) == TQ_OK);
  return layout;
}

std::vector<float> random_orthogonal(Random &random, int n) {
  oracle::Matrix m(n);
  for (int row = 0; row < n; ++row) {
    for (int c = 0; c < n; ++c) m(row, c) = random.normal();
    for (int sweep = 0; sweep < 2; ++sweep) {
      for (int other = 0; other < row; ++other) {
        double overlap = 0;
        for (int c = 0; c < n; ++c) overlap += m(row, c) * m(other, c);
        for (int c = 0; c < n; ++c) m(row, c) -= overlap * m(other, c);
      }
    }
    double square = 0;
    for (int c = 0; c < n; ++c) square += m(row, c) * m(row, c);
    for (int c = 0; c < n; ++c) m(row, c) /= std::sqrt(square);
  }
  return std::vector<float>(m.a.begin(), m.a.end());
}

namespace {
// On CUDA: the most, and what the kernel of few rows takes.
constexpr int kMostAttentionDim = 256;
constexpr int kAttentionDims[] = {64, 80, 96, 112, 128, 192, 256};
}  // namespace

bool attends(const Target &target, const tq_config &config) {
  if (target.device->kind() != TQ_DEVICE_CUDA) return true;
  return std::max(config.k.head_dim, config.v.head_dim) <= kMostAttentionDim;
}

tq_config random_config(Random &random, const Target &target, ConfigStorage *storage, const ConfigLimits &limits) {
  tq_config config = make_config(target, 0, 0, 0);
  const bool on_cuda = limits.attends && target.device->kind() == TQ_DEVICE_CUDA;
  const bool for_kernel = on_cuda && random.chance(0.6);  // for the kernel of few rows
  const int max_head_dim = on_cuda ? std::min(limits.max_head_dim, kMostAttentionDim) : limits.max_head_dim;
  // As often as not one of the head sizes that kernels are specialised for, which takes both sides alike.
  int special = random.pick({64, 96, 128, 256});
  bool both_special = special <= max_head_dim && random.chance(0.5);
  if (for_kernel) {
    both_special = true;
    do special = kAttentionDims[random.integer(0, std::ssize(kAttentionDims) - 1)];
    while (special > max_head_dim);
  }
  if (limits.many_rows) both_special = true, special = 128;
  const auto side = [&](tq_side_config *s, std::vector<float> *matrix, std::vector<float> *levels) {
    s->head_dim = both_special ? special : int32_t(16 * random.integer(1, max_head_dim / 16));
    s->bits = limits.many_rows ? random.pick({2, 3, 4})
              : for_kernel     ? random.pick({2, 3, 4, 8})
                               : random.pick({1, 2, 3, 4, 8, 16});
    if (s->bits == 16) return;
    std::vector<int32_t> rotations = {TQ_ROTATION_NONE};
    if (limits.allow_matrices) rotations.insert(rotations.end(), {TQ_ROTATION_DENSE, TQ_ROTATION_CUSTOM});
    if (oracle::hadamard_exists(s->head_dim)) {
      rotations.insert(rotations.end(), {TQ_ROTATION_DEFAULT, TQ_ROTATION_HADAMARD, TQ_ROTATION_HADAMARD});
    }
    s->rotation = random.pick(rotations);
    if (s->rotation == TQ_ROTATION_HADAMARD) s->hadamard_rounds = int32_t(random.integer(0, 3));
    if (s->rotation == TQ_ROTATION_CUSTOM) {
      *matrix = random_orthogonal(random, s->head_dim);
      s->matrix = matrix->data();
    }
    s->codebook = s->bits == 8 ? random.pick({TQ_CODEBOOK_DEFAULT, TQ_CODEBOOK_UNIFORM})
                               : random.pick({TQ_CODEBOOK_DEFAULT, TQ_CODEBOOK_GAUSSIAN, TQ_CODEBOOK_BETA,
                                              TQ_CODEBOOK_UNIFORM, TQ_CODEBOOK_CUSTOM});
    if (limits.many_rows && s->bits == 2 && random.chance(0.7)) s->codebook = TQ_CODEBOOK_UNIFORM;
    if (s->codebook == TQ_CODEBOOK_CUSTOM) {
      s->num_levels = 1 << s->bits;
      std::vector<float> positive;
      float level = 0;
      for (int i = 0; i < s->num_levels / 2; ++i) positive.push_back(level += float(random.uniform(0.2, 1.0)));
      levels->clear();
      for (size_t i = positive.size(); i > 0; --i) levels->push_back(-positive[i - 1]);
      levels->insert(levels->end(), positive.begin(), positive.end());
      s->levels = levels->data();
    }
    s->scale_rule = random.pick({TQ_SCALE_DEFAULT, TQ_SCALE_LEAST_MSE, TQ_SCALE_NORM, TQ_SCALE_UNBIASED});
    s->scale_type = limits.many_rows ? 0 : random.pick({0, int(TQ_TYPE_F16), int(TQ_TYPE_F32)});
  };
  side(&config.k, &storage->k_matrix, &storage->k_levels);
  side(&config.v, &storage->v_matrix, &storage->v_levels);
  config.kv_heads = int32_t(random.integer(0, 4));
  config.seed = random.bits();
  config.block_size_tokens =
      limits.many_rows ? random.pick({16, 32, 48, 64}) : random.pick({0, 1, 8, 16, 32, 48, 64, 256});
  config.exact_block_size_tokens = random.pick({0, 1, 8, 16, 32, 64});
  config.raw_type = random.pick({0, int(TQ_TYPE_F16), int(TQ_TYPE_BF16)});
  if (config.device == TQ_DEVICE_CPU) config.threads = int32_t(random.integer(1, 3));
  return config;
}

std::vector<uint8_t> encode_elements(const std::vector<double> &values, int32_t type) {
  std::vector<uint8_t> bytes(values.size() * size_t(oracle::type_bytes(type)));
  for (size_t i = 0; i < values.size(); ++i) oracle::write_element(bytes.data(), type, int64_t(i), values[i]);
  return bytes;
}

std::vector<double> decode_elements(const void *data, int32_t type, int64_t count) {
  std::vector<double> values;
  values.reserve(size_t(count));
  for (int64_t i = 0; i < count; ++i) values.push_back(oracle::read_element(data, type, i));
  return values;
}

std::vector<double> normals(Random &random, int64_t count, double sigma) {
  std::vector<double> values;
  values.reserve(size_t(count));
  for (int64_t i = 0; i < count; ++i) values.push_back(sigma * random.normal());
  return values;
}

double relative_error(const std::vector<double> &want, const double *got) {
  double error = 0, square = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    error += (got[i] - want[i]) * (got[i] - want[i]);
    square += want[i] * want[i];
  }
  return std::sqrt(error / square);
}

Encoded encode(const Target &target, const tq_codec *codec, int32_t side, const std::vector<uint8_t> &input,
               int32_t type) {
  const tq_codec_info info = info_of(codec);
  const tq_side_info &s = side == TQ_SIDE_K ? info.k : info.v;
  const int64_t count = int64_t(input.size()) / (s.head_dim * oracle::type_bytes(type));
  Device &device = *target.device;
  const Bytes in(device, input), codes(device, size_t(count * s.code_bytes)),
      scales(device, size_t(count * s.scale_bytes)), faults(device, std::vector<tq_faults>(1));
  size_t workspace_bytes = 0;
  REQUIRE(tq_vectors_workspace(codec, side, count, &workspace_bytes) == TQ_OK);
  const Bytes workspace(device, workspace_bytes);
  tq_encode_args args = {};
  args.struct_size = sizeof args;
  args.side = side;
  args.count = count;
  args.input = in.data();
  args.input_type = type;
  args.codes = codes.data();
  args.scales = s.scale_bytes ? scales.data() : nullptr;
  args.faults = faults.as<tq_faults>();
  args.workspace = workspace.data();
  args.workspace_bytes = workspace_bytes;
  const tq_status status = target.device->call([&](void *stream) {
    args.stream = stream;
    return tq_encode(codec, &args);
  });
  INFO("tq_encode: " << (status == TQ_OK ? "" : tq_last_error()));
  REQUIRE(status == TQ_OK);
  CHECK(in.download() == input);
  workspace.download();
  return {codes.download(), scales.download(), faults.download<tq_faults>()[0]};
}

std::vector<double> decode(const Target &target, const tq_codec *codec, int32_t side, const Encoded &encoded,
                           int64_t count, int32_t type) {
  const tq_codec_info info = info_of(codec);
  const tq_side_info &s = side == TQ_SIDE_K ? info.k : info.v;
  Device &device = *target.device;
  const Bytes codes(device, encoded.codes), scales(device, encoded.scales),
      out(device, size_t(count * s.head_dim * oracle::type_bytes(type)));
  size_t workspace_bytes = 0;
  REQUIRE(tq_vectors_workspace(codec, side, count, &workspace_bytes) == TQ_OK);
  const Bytes workspace(device, workspace_bytes);
  tq_decode_args args = {};
  args.struct_size = sizeof args;
  args.side = side;
  args.count = count;
  args.codes = codes.data();
  args.scales = s.scale_bytes ? scales.data() : nullptr;
  args.output = out.data();
  args.output_type = type;
  args.workspace = workspace.data();
  args.workspace_bytes = workspace_bytes;
  const tq_status status = target.device->call([&](void *stream) {
    args.stream = stream;
    return tq_decode(codec, &args);
  });
  INFO("tq_decode: " << (status == TQ_OK ? "" : tq_last_error()));
  REQUIRE(status == TQ_OK);
  CHECK(codes.download() == encoded.codes);
  CHECK(scales.download() == encoded.scales);
  workspace.download();
  return decode_elements(out.download().data(), type, count * s.head_dim);
}

PoolShape random_shape(Random &random) {
  return random.pick({PoolShape::kPacked, PoolShape::kPadded, PoolShape::kHeadMajor, PoolShape::kHeadsInBlock});
}

PoolImage make_pool(Random &random, const oracle::Codec &codec, uint64_t fingerprint, bool exact, int64_t num_blocks,
                    PoolShape shape) {
  PoolImage image;
  image.exact = exact;
  image.pages.struct_size = sizeof image.pages;
  image.pages.num_blocks = num_blocks;
  image.pages.fingerprint = fingerprint;
  const int64_t tile = codec.tile_bytes(exact), tiles = std::max(1, codec.block(exact) / 16), heads = codec.kv_heads;
  const int64_t groups = (num_blocks * codec.block(exact) + 16 * tiles - 1) / (16 * tiles);
  const auto pad = [&] { return 16 * random.integer(0, 3); };
  tq_pages &pages = image.pages;
  switch (shape) {
    case PoolShape::kPacked:
      break;  // zeros: the documented defaults
    case PoolShape::kPadded:
      pages.head_stride_bytes = tile + pad();
      pages.tile_stride_bytes = heads * pages.head_stride_bytes + pad();
      pages.block_stride_bytes = tiles * pages.tile_stride_bytes + pad();
      break;
    case PoolShape::kHeadMajor:
      pages.tile_stride_bytes = tile + pad();
      pages.block_stride_bytes = tiles * pages.tile_stride_bytes + pad();
      pages.head_stride_bytes = std::max<int64_t>(groups, 1) * pages.block_stride_bytes + pad();
      break;
    case PoolShape::kHeadsInBlock:
      pages.tile_stride_bytes = tile + pad();
      pages.head_stride_bytes = tiles * pages.tile_stride_bytes + pad();
      pages.block_stride_bytes = heads * pages.head_stride_bytes + pad();
      break;
  }
  image.bytes.resize(size_t(image.view(codec).bytes(codec, exact)));
  for (size_t i = 0; i < image.bytes.size(); i += 8) {
    const uint64_t word = random.bits();
    std::memcpy(&image.bytes[i], &word, std::min<size_t>(8, image.bytes.size() - i));
  }
  return image;
}

tq_status store(const Target &target, const tq_codec *codec, StoreCall *call) {
  Device &device = *target.device;
  const Bytes k(device, call->k), v(device, call->v), slots(device, call->slots),
      exact_slots(device, call->exact_slots), offset(device, call->key_offset),
      faults(device, std::vector<tq_faults>{call->faults}), pool(device, call->pool->bytes),
      exact_pool(device, call->exact_pool ? call->exact_pool->bytes : std::vector<uint8_t>());
  const tq_pages pages = call->pool->at(pool.data());
  const tq_pages exact_pages = call->exact_pool ? call->exact_pool->at(exact_pool.data()) : tq_pages{};
  size_t workspace_bytes = 0;
  REQUIRE(tq_cache_workspace(codec, int64_t(call->slots.size()), &workspace_bytes) == TQ_OK);
  const Bytes workspace(device, workspace_bytes);
  tq_store_args args = {};
  args.struct_size = sizeof args;
  args.input_type = call->type;
  args.num_tokens = int64_t(call->slots.size());
  args.k = k.data();
  args.v = v.data();
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
    return tq_cache_store(codec, &args);
  });
  call->pool->bytes = pool.download();
  if (call->exact_pool) call->exact_pool->bytes = exact_pool.download();
  call->faults = faults.download<tq_faults>()[0];
  CHECK(k.download() == call->k);
  CHECK(v.download() == call->v);
  workspace.download();
  return status;
}

namespace {

template <class T>
const T *pointer_or_null(const std::vector<T> &vector) {
  return vector.empty() ? nullptr : vector.data();
}

// The sizes that follow from the call's vectors.
void fill_sizes(const AttentionCall &call, tq_attention_args *args) {
  args->struct_size = sizeof *args;
  args->num_seqs = int32_t(call.lengths.size());
  args->num_block_indices = int64_t(call.block_indices.size());
}

}  // namespace

// Of an array that the call has, however short: never null.
template <class T>
static const T *pointer_to(const std::vector<T> &values) {
  static const T none{};
  return values.empty() ? &none : values.data();
}

tq_attention_args AttentionCall::host_args(tq_pages *pages, tq_pages *exact_pages) const {
  tq_attention_args host = args;
  fill_sizes(*this, &host);
  *pages = pool->at(const_cast<uint8_t *>(pool->bytes.data()));
  if (exact_pool) *exact_pages = exact_pool->at(const_cast<uint8_t *>(exact_pool->bytes.data()));
  host.q = q.data();
  host.k_new = pointer_or_null(k_new);
  host.v_new = pointer_or_null(v_new);
  host.cu_seqlens_q = pointer_or_null(cu_seqlens);
  host.q_positions = pointer_or_null(q_positions);
  host.pages = pages;
  host.block_table = block_indptr.empty() ? pointer_to(block_table) : nullptr;
  host.block_indptr = pointer_or_null(block_indptr);
  host.block_indices = block_indptr.empty() ? nullptr : pointer_to(block_indices);
  host.lengths = lengths.data();
  host.starts = pointer_or_null(starts);
  host.exact_pages = exact_pool ? exact_pages : nullptr;
  host.exact_table = exact_pool ? pointer_to(exact_table) : nullptr;
  host.sinks = pointer_or_null(sinks);
  host.alibi_slopes = pointer_or_null(alibi_slopes);
  host.key_offset = pointer_or_null(key_offset);
  return host;
}

bool same_bits(const AttentionRun &a, const AttentionRun &b) {
  const auto bits = [](const std::vector<float> &values) {
    std::vector<uint32_t> result;
    for (float value : values) {
      uint32_t pattern;
      std::memcpy(&pattern, &value, sizeof pattern);
      result.push_back(pattern);
    }
    return result;
  };
  return a.raw_out == b.raw_out && bits(a.lse) == bits(b.lse);
}

AttentionCaller::AttentionCaller(const Target &target, const tq_codec *codec, const AttentionCall &call, int head_dim_v,
                                 bool want_lse)
    : device_(*target.device),
      call_(call),
      args_(call.args),
      head_dim_v_(head_dim_v),
      q_(device_, call.q),
      k_new_(device_, call.k_new),
      v_new_(device_, call.v_new),
      cu_(device_, call.cu_seqlens),
      positions_(device_, call.q_positions),
      table_(device_, call.block_table),
      indptr_(device_, call.block_indptr),
      indices_(device_, call.block_indices),
      lengths_(device_, call.lengths),
      starts_(device_, call.starts),
      exact_table_(device_, call.exact_table),
      sinks_(device_, call.sinks),
      alibi_(device_, call.alibi_slopes),
      offset_(device_, call.key_offset),
      pool_(device_, call.pool->bytes),
      exact_pool_(device_, call.exact_pool ? call.exact_pool->bytes : std::vector<uint8_t>()) {
  tq_attention_args &args = args_;
  fill_sizes(call, &args);
  if (args.num_tokens > 0) extent_ = out_index(args.num_tokens - 1, args.q_heads - 1, head_dim_v - 1) + 1;
  out_.emplace(device_, size_t(extent_ * oracle::type_bytes(args.out_type)));
  lse_.emplace(device_, size_t(args.num_tokens) * size_t(args.q_heads) * sizeof(float));
  pages_ = call.pool->at(pool_.data());
  args.q = q_.data();
  if (!call.k_new.empty()) args.k_new = k_new_.data();
  if (!call.v_new.empty()) args.v_new = v_new_.data();
  if (!call.cu_seqlens.empty()) args.cu_seqlens_q = cu_.as<int32_t>();
  if (!call.q_positions.empty()) args.q_positions = positions_.as<int32_t>();
  args.pages = &pages_;
  if (call.block_indptr.empty()) {
    args.block_table = table_.as<int32_t>();
  } else {
    args.block_indptr = indptr_.as<int32_t>();
    args.block_indices = indices_.as<int32_t>();
  }
  args.lengths = lengths_.as<int32_t>();
  if (!call.starts.empty()) args.starts = starts_.as<int32_t>();
  if (call.exact_pool) {
    exact_pages_ = call.exact_pool->at(exact_pool_.data());
    args.exact_pages = &exact_pages_;
    args.exact_table = exact_table_.as<int32_t>();
  }
  if (!call.sinks.empty()) args.sinks = sinks_.as<float>();
  if (!call.alibi_slopes.empty()) args.alibi_slopes = alibi_.as<float>();
  if (!call.key_offset.empty()) args.key_offset = offset_.as<float>();
  args.out = out_->data();
  args.lse = want_lse ? lse_->as<float>() : nullptr;
  args.faults = faults_.as<tq_faults>();
  status_ = tq_attention_workspace(codec, &args, &args.workspace_bytes);
  if (status_ != TQ_OK) return;
  workspace_.emplace(device_, args.workspace_bytes);
  args.workspace = workspace_->data();
  make_ = device_.repeatable([this, codec](void *stream) {
    args_.stream = stream;
    return tq_paged_attention(codec, &args_);
  });
}

int64_t AttentionCaller::out_index(int64_t token, int64_t head, int64_t channel) const {
  const int64_t head_stride = args_.out_head_stride ? args_.out_head_stride : head_dim_v_;
  const int64_t token_stride = args_.out_token_stride ? args_.out_token_stride : args_.q_heads * head_dim_v_;
  return token * token_stride + head * head_stride + channel;
}

void AttentionCaller::change(const std::vector<int32_t> &lengths, const std::vector<int32_t> &block_table) {
  lengths_.upload(lengths.data());
  table_.upload(block_table.data());
}

AttentionRun AttentionCaller::run() {
  AttentionRun result;
  result.integer_queries = device_.kind() == TQ_DEVICE_CUDA;
  result.status = status_;
  if (status_ != TQ_OK) return result;
  for (Bytes *written : {&*out_, &*lse_}) written->upload(std::vector<uint8_t>(written->size(), 0xff).data());
  faults_.upload(std::vector<tq_faults>(1).data());
  result.status = make_();
  INFO("tq_paged_attention: " << (result.status == TQ_OK ? "" : tq_last_error()));
  REQUIRE(result.status == TQ_OK);

  workspace_->download();
  CHECK(pool_.download() == call_.pool->bytes);
  if (call_.exact_pool) CHECK(exact_pool_.download() == call_.exact_pool->bytes);
  CHECK(q_.download() == call_.q);
  result.raw_out = out_->download();
  result.faults = faults_.download<tq_faults>()[0];
  result.has_lse = args_.lse != nullptr;
  result.lse = lse_->download<float>();
  std::vector<char> owned(size_t(extent_), 0);
  for (int64_t token = 0; token < args_.num_tokens; ++token) {
    for (int64_t h = 0; h < args_.q_heads; ++h) {
      for (int64_t c = 0; c < head_dim_v_; ++c) {
        const int64_t index = out_index(token, h, c);
        owned[size_t(index)] = 1;
        result.out.push_back(oracle::read_element(result.raw_out.data(), args_.out_type, index));
      }
    }
  }
  bool gaps_intact = true;
  const int64_t element = oracle::type_bytes(args_.out_type);
  for (int64_t i = 0; i < extent_ * element; ++i) {
    if (!owned[size_t(i / element)]) gaps_intact = gaps_intact && result.raw_out[size_t(i)] == 0xff;
  }
  CHECK(gaps_intact);
  return result;
}

AttentionRun run(const Target &target, const tq_codec *codec, const AttentionCall &call, int head_dim_v,
                 bool want_lse) {
  return AttentionCaller(target, codec, call, head_dim_v, want_lse).run();
}

oracle::Attention expected(const oracle::Codec &codec, const AttentionCall &call, const oracle::Loader &loader) {
  tq_pages pages, exact_pages;
  return oracle::attention(codec, call.host_args(&pages, &exact_pages), loader);
}

double attention_tolerance(const Target &target, int32_t out_type) {
  if (target.device->kind() == TQ_DEVICE_CUDA) return out_type == TQ_TYPE_F32 ? 3e-4 : 8e-4;  // as tqkv.h says
  return target.simd == TQ_SIMD_SCALAR ? 1e-5 : 2e-4;
}

void check_attention(const AttentionRun &run, const oracle::Attention &expected, int32_t out_type, double tolerance) {
  // Rounding the result to its type: at most half a unit in the last place, 2^-11 or 2^-8 of each value, and 2^-25
  // absolute among the subnormals of f16. A weight below 1e-38 of the largest (a sink's) is subnormal in f32.
  const double rounding = out_type == TQ_TYPE_F16 ? 0x1p-11 : out_type == TQ_TYPE_BF16 ? 0x1p-8 : 0;
  const double smallest = out_type == TQ_TYPE_F16 ? 0x1p-25 : 1e-33;
  // A logit is an f32 sum of head_dim products; its error, relative to the sum of their magnitudes, is that of a few
  // units in the last place. It is an error of exp and so a relative one of each weight. What the figure allows covers
  // logits up to about 16.
  const auto allowed = [&](size_t index) {
    const double logit = expected.logit[index];
    return tolerance + 8 * 0x1p-24 * std::max(0.0, logit - 16) +
           (run.integer_queries ? expected.query_rounding[index] : 0);
  };

  const int d = expected.head_dim_v;
  double total_error = 0, total_square = 0, most_allowed = tolerance;
  bool rows_untouched = true, faulty_rows_zero = true, finite = true;
  for (int64_t row = 0; row < expected.num_tokens; ++row) {
    for (int h = 0; h < expected.q_heads; ++h) {
      const size_t index = size_t(row * expected.q_heads + h);
      const double *got = run.out.data() + index * size_t(d), *want = expected.out.data() + index * size_t(d);
      const float got_lse = run.lse[index];
      if (!expected.written[size_t(row)]) {
        for (int c = 0; c < d; ++c) rows_untouched = rows_untouched && std::isnan(got[c]);
        rows_untouched = rows_untouched && std::isnan(got_lse);
        continue;
      }
      double error = 0, square = 0;
      for (int c = 0; c < d; ++c) {
        finite = finite && std::isfinite(got[c]);
        error += (got[c] - want[c]) * (got[c] - want[c]);
        square += want[c] * want[c];
      }
      if (std::isinf(expected.lse[index])) {
        faulty_rows_zero = faulty_rows_zero && error == 0;
        if (run.has_lse) faulty_rows_zero = faulty_rows_zero && got_lse == -std::numeric_limits<float>::infinity();
        continue;
      }
      total_error += error;
      total_square += square;
      most_allowed = std::max(most_allowed, allowed(index));
      const double bound =
          allowed(index) * expected.magnitude[index] + rounding * std::sqrt(square) + smallest * std::sqrt(double(d));
      if (!(std::sqrt(error) <= bound)) {
        INFO("row " << row << " head " << h << " |error| " << std::sqrt(error) << " bound " << bound << " |out| "
                    << std::sqrt(square) << " logits " << expected.logit[index]);
        CHECK(std::sqrt(error) <= bound);
      }
      if (run.has_lse) {
        const double lse_bound = allowed(index) + 0x1p-22 * std::fabs(expected.lse[index]);
        INFO("row " << row << " head " << h);
        CHECK(std::fabs(double(got_lse) - expected.lse[index]) <= lse_bound);
      }
    }
  }
  CHECK(rows_untouched);
  CHECK(faulty_rows_zero);
  CHECK(finite);
  CHECK(std::sqrt(total_error) <=
        (most_allowed + rounding) * std::sqrt(total_square) + smallest * std::sqrt(double(run.out.size())));

  // Each sequence at fault counts once; `first` is the one with the lowest index.
  uint64_t counts[TQ_FAULT_KINDS] = {};
  uint64_t first = 0;
  for (size_t s = expected.fault.size(); s > 0; --s) {
    const int32_t kind = expected.fault[s - 1];
    if (kind < 0) continue;
    ++counts[kind];
    first = ((0x00ffffffffffffffu - (s - 1)) << 8) | uint64_t(kind);
  }
  for (int kind = 0; kind < TQ_FAULT_KINDS; ++kind) {
    INFO("fault kind " << kind);
    CHECK(run.faults.count[kind] == counts[kind]);
  }
  CHECK(run.faults.first == first);
}
