// SPDX-License-Identifier: Apache-2.0
// Catch2 under either major version, and the seed of every random test.
#ifndef TQKV_TESTS_CATCH_HPP_
#define TQKV_TESTS_CATCH_HPP_

#if __has_include(<catch2/catch_test_macros.hpp>)
#include <catch2/catch_approx.hpp>
#include <catch2/catch_message.hpp>
#include <catch2/catch_template_test_macros.hpp>
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <catch2/generators/catch_generators_range.hpp>
#else
#include <catch2/catch.hpp>
#endif

#include <cstdint>

namespace tqkv_test {

#if __has_include(<catch2/catch_test_macros.hpp>)
using Catch::Approx;
#else
using Catch::Detail::Approx;
#endif

// The seed of this run: TQKV_TEST_SEED, or a fresh one. It is printed before the first test; not for static initialisers.
std::uint64_t seed();

}  // namespace tqkv_test

#endif  // TQKV_TESTS_CATCH_HPP_
