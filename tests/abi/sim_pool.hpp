// SPDX-License-Identifier: Apache-2.0
// A pool of pages in device memory together with a prediction of all its bytes, and a block allocator.
#pragma once

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "support.hpp"

namespace simulator {

class Pool {
 public:
  Pool(Random &random, Device &device, const oracle::Codec &codec, uint64_t fingerprint, bool exact,
       int64_t num_blocks);

  int64_t num_blocks() const { return image_.pages.num_blocks; }
  int64_t num_slots() const { return num_blocks() * block_; }
  int block_size() const { return block_; }
  const PoolImage &image() const { return image_; }  // the prediction
  tq_pages pages();                                  // the device's

  // Predictions. A record is the bytes of one token and head: K codes, K scale, V codes, V scale.
  void write(int64_t slot, int head, const std::vector<uint8_t> &record);
  void copy(const Pool &source, int64_t source_block, int64_t block);
  // Fills a block with NaN patterns or noise, here and on the device.
  void poison(Random &random, int64_t block);
  // True if the device's bytes are the predicted ones.
  bool as_predicted();

 private:
  int64_t tile_of(int64_t slot, int head) const;  // its offset

  bool exact_;
  int block_, heads_;
  std::array<std::vector<int64_t>, 16> row_bytes_;  // a token's bytes in a tile
  PoolImage image_;
  oracle::Pool strides_;
  Bytes memory_;
  bool stale_ = true;  // the device lacks some poison
};

// Reference-counted block ids, handed out at random or lowest first: then sequences tend to own runs of blocks.
class Allocator {
 public:
  Allocator(int64_t num_blocks, bool lowest_first) : lowest_first_(lowest_first), references_(size_t(num_blocks), 0) {
    for (int64_t block = 0; block < num_blocks; ++block) free_.push_back(int32_t(block));
  }
  int64_t available() const { return int64_t(free_.size()); }
  bool shared(int32_t block) const { return references_[size_t(block)] > 1; }
  int32_t any_free() const { return free_.back(); }
  int32_t allocate(Random &random) {
    auto chosen = lowest_first_ ? std::min_element(free_.begin(), free_.end())
                                : free_.begin() + std::ptrdiff_t(random.integer(0, available() - 1));
    std::swap(*chosen, free_.back());
    const int32_t block = free_.back();
    free_.pop_back();
    references_[size_t(block)] = 1;
    return block;
  }
  void share(int32_t block) { ++references_[size_t(block)]; }
  // True if that was the last reference.
  bool release(int32_t block) {
    if (--references_[size_t(block)] > 0) return false;
    free_.push_back(block);
    return true;
  }

 private:
  bool lowest_first_;
  std::vector<int32_t> references_, free_;
};

}  // namespace simulator
