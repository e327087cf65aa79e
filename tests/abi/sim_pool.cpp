// SPDX-License-Identifier: Apache-2.0
#include "sim_pool.hpp"

namespace simulator {

Pool::Pool(Random &random, Device &device, const oracle::Codec &codec, uint64_t fingerprint, bool exact,
           int64_t num_blocks)
    : exact_(exact),
      block_(codec.block(exact)),
      heads_(codec.kv_heads),
      image_(make_pool(random, codec, fingerprint, exact, num_blocks, random_shape(random))),
      strides_(image_.view(codec)),
      memory_(device, image_.bytes) {
  oracle::Pool one_tile;
  one_tile.num_blocks = num_blocks;
  for (int64_t row = 0; row < 16; ++row) {
    const auto visit = [&](int64_t offset) { row_bytes_[size_t(row)].push_back(offset); };
    // Token `row` of the pool's first tile: with all strides zero offsets are relative to the tile.
    oracle::for_each_byte(codec, exact, one_tile, TQ_SIDE_K, row, 0, visit);
    oracle::for_each_byte(codec, exact, one_tile, TQ_SIDE_V, row, 0, visit);
  }
}

tq_pages Pool::pages() {
  if (stale_) memory_.upload(image_.bytes.data());
  stale_ = false;
  return image_.at(memory_.data());
}

int64_t Pool::tile_of(int64_t slot, int head) const {
  const int64_t group = std::max(block_, 16);
  return slot / group * strides_.block_stride + slot % group / 16 * strides_.tile_stride + head * strides_.head_stride;
}

void Pool::write(int64_t slot, int head, const std::vector<uint8_t> &record) {
  const int64_t tile = tile_of(slot, head);
  const std::vector<int64_t> &bytes = row_bytes_[size_t(slot % 16)];
  for (size_t i = 0; i < bytes.size(); ++i) image_.bytes[size_t(tile + bytes[i])] = record[i];
}

void Pool::copy(const Pool &source, int64_t source_block, int64_t block) {
  for (int64_t token = 0; token < block_; ++token) {
    const int64_t from = source_block * block_ + token, to = block * block_ + token;
    for (int head = 0; head < heads_; ++head) {
      const int64_t from_tile = source.tile_of(from, head), to_tile = tile_of(to, head);
      for (size_t i = 0; i < row_bytes_[0].size(); ++i) {
        image_.bytes[size_t(to_tile + row_bytes_[size_t(to % 16)][i])] =
            source.image_.bytes[size_t(from_tile + source.row_bytes_[size_t(from % 16)][i])];
      }
    }
  }
}

void Pool::poison(Random &random, int64_t block) {
  // All ones and 0x7f: NaN in every float type. 0x7c: huge scales. Zero: plausible but wrong.
  const int pattern = random.pick({0xff, 0x7f, 0x7c, 0x00, -1});
  for (int64_t token = 0; token < block_; ++token) {
    const int64_t slot = block * block_ + token;
    for (int head = 0; head < heads_; ++head) {
      const int64_t tile = tile_of(slot, head);
      uint64_t noise = random.bits();
      for (int64_t offset : row_bytes_[size_t(slot % 16)]) {
        noise = noise * 6364136223846793005u + 1442695040888963407u;
        image_.bytes[size_t(tile + offset)] = pattern < 0 ? uint8_t(noise >> 56) : uint8_t(pattern);
      }
    }
  }
  stale_ = true;
}

bool Pool::as_predicted() {
  if (stale_) pages();
  return memory_.download() == image_.bytes;
}

}  // namespace simulator
