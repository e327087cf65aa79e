// SPDX-License-Identifier: Apache-2.0
#include "report.hpp"

#include <tqkv/tqkv.h>

#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <stdexcept>
#include <utility>

namespace tqkv_bench {
namespace {

std::string commit() {
  const char *given = std::getenv("TQKV_COMMIT");
  return given != nullptr && *given != 0 ? given : TQKV_BENCH_COMMIT;
}

std::string utc_now() {
  const std::time_t now = std::time(nullptr);
  char text[32];
  std::tm parts{};
  gmtime_r(&now, &parts);
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &parts);
  return text;
}

}  // namespace

double rounded(double value, double parts) {
  return std::round(value * parts) / parts;
}

void print_machine(const Machine &machine) {
  std::printf("%s, %d multiprocessors at %.0f MHz, driver %s, CUDA %s (driver), %s (runtime)\n", machine.device.c_str(),
              machine.multiprocessors, machine.clock_mhz, machine.driver.empty() ? "unknown" : machine.driver.c_str(),
              machine.cuda_driver.c_str(), machine.cuda_runtime.c_str());
  for (const Ceiling *read : {&machine.plain_read, &machine.bulk_read}) {
    if (read->kernel.empty()) continue;
    std::printf("best read: %7.1f GB/s, %s\n", double(machine.read_bytes) / read->seconds * 1e-9, read->kernel.c_str());
  }
}

nlohmann::ordered_json to_json(const Machine &machine) {
  using Json = nlohmann::ordered_json;
  const auto read = [&](const Ceiling &ceiling) -> Json {
    if (ceiling.kernel.empty()) return nullptr;
    return {{"gigabytes_per_second", rounded(double(machine.read_bytes) / ceiling.seconds * 1e-9, 10)},
            {"kernel", ceiling.kernel}};
  };
  tq_build build{};
  build.struct_size = sizeof build;
  if (tq_build_info(&build) != TQ_OK) throw std::runtime_error(tq_last_error());
  return {{"date", utc_now()},
          {"device", machine.device},
          {"compute_capability", machine.compute_capability},
          {"multiprocessors", machine.multiprocessors},
          {"clock_mhz", rounded(machine.clock_mhz, 1)},
          {"driver", machine.driver.empty() ? Json(nullptr) : Json(machine.driver)},
          {"cuda_driver", machine.cuda_driver},
          {"cuda_runtime", machine.cuda_runtime},
          {"library", build.version},
          {"kernels", build.cuda},
          {"commit", commit()},
          {"plain_read", read(machine.plain_read)},
          {"bulk_read", read(machine.bulk_read)}};
}

void append_times(int64_t bytes, const Timing &time, const Ceiling &ceiling, nlohmann::ordered_json *row) {
  (*row)["bytes"] = bytes;
  (*row)["microseconds"] = rounded(time.median * 1e6, 1000);
  (*row)["microseconds_min"] = rounded(time.least * 1e6, 1000);
  (*row)["microseconds_p90"] = rounded(time.p90 * 1e6, 1000);
  (*row)["gigabytes_per_second"] = rounded(double(bytes) / time.median * 1e-9, 10);
  (*row)["ceiling_microseconds"] = rounded(ceiling.seconds * 1e6, 1000);
  (*row)["ceiling_kernel"] = ceiling.kernel;
  (*row)["share"] = rounded(ceiling.seconds / time.median, 10000);
}

int conclude(const std::vector<std::string> &missed, bool check) {
  std::printf("\n%zu figures missed%s\n", missed.size(), missed.empty() ? "" : ":");
  for (const std::string &line : missed) std::printf("  %s\n", line.c_str());
  return check && !missed.empty() ? kMissed : 0;
}

AtomicFile::AtomicFile(std::string path) : path_(std::move(path)), partial_(path_ + ".partial"), out_(partial_) {
  if (!out_) throw std::runtime_error(partial_ + " cannot be written: " + std::strerror(errno));
}

AtomicFile::~AtomicFile() {
  if (!kept_) std::remove(partial_.c_str());
}

void AtomicFile::keep(const std::string &text) {
  out_ << text;
  out_.close();
  if (!out_) throw std::runtime_error(partial_ + " cannot be written: " + std::strerror(errno));
  if (std::rename(partial_.c_str(), path_.c_str()) != 0) {
    throw std::runtime_error(path_ + " cannot be replaced: " + std::strerror(errno));
  }
  kept_ = true;
}

}  // namespace tqkv_bench
