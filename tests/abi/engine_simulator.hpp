// SPDX-License-Identifier: Apache-2.0
// A random scheduler of a serving engine that drives the library and knows what every result must be: chunked prefill,
// ragged decode, rejected drafts, forks, beams, prefix hits, preemption, swapping, exact pages, sliding windows.
//
// Truth is kept a token at a time: the vectors as given, what their codes decode to (tq_encode and tq_decode, once, when
// the token is made) and their raw 16-bit values. Every byte of every pool is predicted; attention is computed in double
// precision from the tokens of a sequence, never from pages or tables.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>

#include "support.hpp"

namespace simulator {

// What an engine, or the library behind it, could get wrong. A simulation that makes the mistake must fail.
enum class Mistake {
  kNone,
  kWindowTooWide,
  kNotCausal,
  kPositionsIgnored,
  kStartsIgnored,
  kSinksIgnored,
  kSoftCapIgnored,
  kSlopesIgnored,
  kKeyOffsetForgotten,
  kQueryHeadsSwapped,
  kTablesSwapped,
  kRollbackForgotten,
  kExactWindowTooWide,
  kExactFirstIgnored,
  kRingTooShort,
  kTokenNotStored,
  kNoCopyOnWrite,
  kBlockNotSwapped,
  kFreedTooEarly,
  kCount
};
const char *name_of(Mistake mistake);

// The library or the simulated engine broke a promise. The text says how to repeat it.
class Failure : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Options {
  Target target;
  int configuration = 0;  // together with the seed of the run it decides everything
  int steps = 0;
  Mistake mistake = Mistake::kNone;
};

using Events = std::map<std::string, int64_t>;  // how often each thing happened

// Draws a model, a codec and pools, and runs an engine on them. Throws Failure.
void simulate(const Options &options, Events *events);

}  // namespace simulator
