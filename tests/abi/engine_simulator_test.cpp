// SPDX-License-Identifier: Apache-2.0
#include "engine_simulator.hpp"

#include <algorithm>
#include <cstdlib>

#include "catch.hpp"

namespace {

using simulator::Events;
using simulator::Mistake;

// TQKV_TEST_CONFIGURATION runs one configuration alone, to repeat a failure; TQKV_TEST_CONFIGURATIONS at most so many.
void run_engines(int configurations, int steps, Events *events) {
  int first = 0;
  if (const char *text = std::getenv("TQKV_TEST_CONFIGURATIONS")) {
    configurations = std::min(configurations, std::atoi(text));
  }
  if (const char *text = std::getenv("TQKV_TEST_CONFIGURATION")) {
    first = std::atoi(text);
    configurations = 1;
  }
  for (int i = first; i < first + configurations; ++i) {
    simulator::Options options;
    options.target = targets()[size_t(i) % targets().size()];
    options.configuration = i;
    options.steps = steps;
    try {
      simulator::simulate(options, events);
    } catch (const simulator::Failure &failure) {
      FAIL(failure.what());
    }
  }
}

}  // namespace

TEST_CASE("a serving engine gets what its tokens say", "[engine]") {
  Events events;
  run_engines(80, 60, &events);
}

TEST_CASE("a serving engine gets what its tokens say over many steps", "[engine][.][long]") {
  Events events;
  run_engines(400, 250, &events);
  for (const char *event : {"admit",
                            "prefill",
                            "decode",
                            "speculate",
                            "rollback",
                            "idle sequence in a batch",
                            "padding row",
                            "copy on write",
                            "exact copy on write",
                            "fork",
                            "beam permutation",
                            "prefix hit",
                            "exact refill",
                            "preempt",
                            "swap out",
                            "swap in",
                            "finish",
                            "block left the window",
                            "load",
                            "merge",
                            "repeated attention",
                            "repeated alone",
                            "attention with new tokens raw",
                            "bad slot",
                            "bad exact slot",
                            "non-finite vector",
                            "bad length",
                            "bad row offset",
                            "bad block",
                            "bad exact block",
                            "bad pair of blocks"}) {
    INFO(event);
    CHECK(events[event] > 0);
  }
}

// The simulation proves nothing unless it notices an engine, or a library, that goes wrong.
TEST_CASE("the engine simulator notices mistakes", "[engine][simulator][slow]") {
  for (int m = 1; m < int(Mistake::kCount); ++m) {
    bool noticed = false;
    Events events;
    for (int i = 0; i < 200 && !noticed; ++i) {
      simulator::Options options;
      options.target = targets()[size_t(i) % targets().size()];
      options.configuration = i;
      options.steps = 40;
      options.mistake = Mistake(m);
      try {
        simulator::simulate(options, &events);
      } catch (const simulator::Failure &) {
        noticed = true;
      }
    }
    INFO(simulator::name_of(Mistake(m)));
    CHECK(noticed);
  }
}
