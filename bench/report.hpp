// SPDX-License-Identifier: Apache-2.0
// What the commands that measure a CUDA device share of their tables and files.
#pragma once

#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "gpu.hpp"

namespace tqkv_bench {

// Exit statuses: as of the tqkv command, and a figure that was missed.
constexpr int kFailed = 1, kUsage = 2, kMissed = 3;

double rounded(double value, double parts);

void print_machine(const Machine &machine);

// The date, the machine, the library and the best reads; results are to follow.
nlohmann::ordered_json to_json(const Machine &machine);
// The times of a row.
void append_times(int64_t bytes, const Timing &time, const Ceiling &ceiling, nlohmann::ordered_json *row);

// Says which figures were missed. Returns the exit status.
int conclude(const std::vector<std::string> &missed, bool check);

// A file that takes its name only when it is whole.
class AtomicFile {
 public:
  // Opened before anything is measured: a path that cannot be written is found at once.
  explicit AtomicFile(std::string path);
  ~AtomicFile();
  AtomicFile(const AtomicFile &) = delete;
  AtomicFile &operator=(const AtomicFile &) = delete;
  void keep(const std::string &text);

 private:
  std::string path_, partial_;
  std::ofstream out_;
  bool kept_ = false;
};

}  // namespace tqkv_bench
