// SPDX-License-Identifier: Apache-2.0
#include "common.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <exception>
#include <mutex>
#include <thread>

namespace tqkv_cli {

void check(tq_status status, const std::string &what) {
  if (status == TQ_OK) return;
  const char *sentence = tq_last_error();
  throw Error(what + ": " + (*sentence ? sentence : tq_status_string(status)));
}

std::string printable(std::string_view text) {
  std::string result;
  for (const char c : text) {
    if (static_cast<unsigned char>(c) >= 0x20 && c != 0x7f) {
      result += c;
    } else {
      char escaped[5];
      std::snprintf(escaped, sizeof escaped, "\\x%02x", static_cast<unsigned char>(c));
      result += escaped;
    }
  }
  return result;
}

std::string in_quotes(std::string_view text) {
  constexpr size_t kMaxBytes = 100;
  return "'" + printable(text.substr(0, kMaxBytes)) + (text.size() > kMaxBytes ? "'..." : "'");
}

Codec make_codec(const tq_config &config, const std::string &what) {
  tq_codec *codec = nullptr;
  check(tq_create(&config, &codec), what);
  return Codec(codec);
}

void Buffer::refill(size_t bytes) {
  constexpr size_t kAlignment = 256;
  bytes = (std::max<size_t>(bytes, 1) + kAlignment - 1) / kAlignment * kAlignment;
  if (bytes <= bytes_) return;
  memory_.reset();
  memory_.reset(std::aligned_alloc(kAlignment, bytes));
  if (!memory_) throw std::bad_alloc();
  std::memset(memory_.get(), 0, bytes);
  bytes_ = bytes;
}

void parallel_for(int64_t count, const std::function<void(int64_t)> &body) {
  std::atomic<int64_t> next = 0;
  std::exception_ptr failure;
  std::mutex mutex;
  const auto work = [&] {
    try {
      for (int64_t i; (i = next++) < count;) body(i);
    } catch (...) {
      next = count;
      const std::lock_guard lock(mutex);
      if (!failure) failure = std::current_exception();
    }
  };
  const int64_t workers = std::min<int64_t>(std::max(1u, std::thread::hardware_concurrency()), count);
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < workers; ++i) threads.emplace_back(work);
  work();
  for (std::thread &thread : threads) thread.join();
  if (failure) std::rethrow_exception(failure);
}

std::vector<Preset> presets(const std::vector<std::string> &names) {
  std::vector<Preset> all;
  for (int32_t i = 0; const char *name = tq_preset_name(i); ++i) {
    tq_config config;
    check(tq_config_init(&config, sizeof config, name), "preset " + in_quotes(name));
    const auto same = std::find_if(all.begin(), all.end(), [&](const Preset &p) {
      return p.k_bits == config.k.bits && p.v_bits == config.v.bits;
    });
    if (same == all.end()) {
      all.push_back({name, {}, config.k.bits, config.v.bits});
    } else {
      same->aliases.push_back(name);
    }
  }
  if (names.empty()) return all;
  std::vector<Preset> chosen;
  for (const std::string &name : names) {
    const auto found = std::find_if(all.begin(), all.end(), [&](const Preset &p) {
      return p.name == name || std::find(p.aliases.begin(), p.aliases.end(), name) != p.aliases.end();
    });
    if (found == all.end()) throw Error("--preset: there is no preset " + in_quotes(name) + "; tqkv info lists them");
    chosen.push_back(*found);
  }
  return chosen;
}

std::map<std::string, int32_t> rotation_names() {
  return {{"hadamard", TQ_ROTATION_HADAMARD}, {"dense", TQ_ROTATION_DENSE}, {"none", TQ_ROTATION_NONE}};
}

double now_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace tqkv_cli
