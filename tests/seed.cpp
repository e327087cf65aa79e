// SPDX-License-Identifier: Apache-2.0
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "catch.hpp"

namespace {

std::uint64_t choose_seed() {
  std::random_device device;
  const char *text = std::getenv("TQKV_TEST_SEED");
  const std::uint64_t seed = text ? std::strtoull(text, nullptr, 0) : std::uint64_t{device()} << 32 | device();
  std::printf("TQKV_TEST_SEED=%" PRIu64 "\n", seed);
  std::fflush(stdout);
  return seed;
}

const std::uint64_t chosen_seed = choose_seed();

}  // namespace

std::uint64_t tqkv_test::seed() {
  return chosen_seed;
}
