// SPDX-License-Identifier: Apache-2.0
#include "terminal.hpp"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <sstream>
#include <utility>

#include "common.hpp"

namespace tqkv_cli {

Table::Table(std::vector<std::string> titles) : titles_(std::move(titles)) {
  for (std::string &title : titles_) {
    const bool left = left_.empty() || (!title.empty() && title.back() == '\t');
    left_.push_back(left);
    if (!title.empty() && title.back() == '\t') title.pop_back();
  }
}

void Table::row(std::vector<std::string> cells) {
  rows_.push_back({std::move(cells), {}});
}

void Table::section(std::string title) {
  rows_.push_back({{}, std::move(title)});
}

void Table::print() const {
  std::vector<std::string> upper, lower;
  for (const std::string &title : titles_) {
    const size_t split = title.find('\n');
    upper.push_back(split == std::string::npos ? "" : title.substr(0, split));
    lower.push_back(split == std::string::npos ? title : title.substr(split + 1));
  }
  std::vector<size_t> widths;
  for (size_t i = 0; i < titles_.size(); ++i) {
    size_t width = std::max(upper[i].size(), lower[i].size());
    for (const Row &row : rows_) {
      if (i < row.cells.size()) width = std::max(width, row.cells[i].size());
    }
    widths.push_back(width);
  }
  const auto print_line = [&](const std::vector<std::string> &cells) {
    std::string line;
    for (size_t i = 0; i < cells.size(); ++i) {
      const std::string pad(widths[i] - cells[i].size(), ' ');
      line += (i ? "  " : "") + (left_[i] ? cells[i] + pad : pad + cells[i]);
    }
    line.erase(line.find_last_not_of(' ') + 1);
    std::printf("%s\n", line.c_str());
  };
  if (std::any_of(upper.begin(), upper.end(), [](const std::string &s) { return !s.empty(); })) print_line(upper);
  print_line(lower);
  std::vector<std::string> rule;
  for (const size_t width : widths) rule.emplace_back(width, '-');
  print_line(rule);
  for (const Row &row : rows_) {
    if (row.cells.empty()) {
      std::printf("%s\n", row.section.c_str());
    } else {
      print_line(row.cells);
    }
  }
}

Progress::Progress(std::string what, int64_t total)
    : what_(std::move(what)), total_(total), start_seconds_(now_seconds()), terminal_(isatty(STDERR_FILENO) == 1) {}

Progress::~Progress() {
  if (visible_) std::fputs("\r\033[K", stderr);
}

void Progress::advance(int64_t amount) {
  done_ += amount;
  if (!terminal_ || total_ <= 0) return;
  const double now = now_seconds(), elapsed = now - start_seconds_;
  const double fraction = std::min(1.0, double(done_) / double(total_));
  const double left = fraction > 0 ? elapsed / fraction - elapsed : 0;
  if (!visible_ && (elapsed < 0.3 || elapsed + left < 2)) return;
  if (visible_ && now - drawn_seconds_ < 0.1) return;
  visible_ = true;
  drawn_seconds_ = now;
  constexpr int kWidth = 30;
  const int filled = int(fraction * kWidth);
  std::fprintf(stderr, "\r%s [%s%s] %3.0f%%  %.0f s left\033[K", what_.c_str(), std::string(filled, '#').c_str(),
               std::string(kWidth - filled, '.').c_str(), fraction * 100, left);
  std::fflush(stderr);
}

std::string fixed(double value, int digits) {
  if (!std::isfinite(value)) return "-";
  if (value == 0) return "0";
  std::array<char, 64> text;
  const bool looks_zero = std::fabs(value) < 0.5 * std::pow(10.0, -digits);
  std::snprintf(text.data(), text.size(), looks_zero ? "%.*e" : "%.*f", looks_zero ? 0 : digits, value);
  return text.data();
}

std::string grouped(int64_t value) {
  std::string text = std::to_string(value);
  const int first_digit = value < 0;
  for (int i = int(text.size()) - 3; i > first_digit; i -= 3) text.insert(size_t(i), 1, ' ');
  return text;
}

std::string bytes_text(int64_t bytes) {
  constexpr const char *kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
  double value = double(bytes);
  size_t unit = 0;
  for (; std::fabs(value) >= 1024 && unit + 1 < std::size(kUnits); ++unit) value /= 1024;
  return unit == 0 ? std::to_string(bytes) + " B" : fixed(value, 2) + " " + kUnits[unit];
}

void print_paragraph(const std::string &text) {
  print_item("", 0, text);
}

void print_item(const std::string &label, size_t width, const std::string &text) {
  constexpr size_t kColumns = 100;
  std::string line = label;
  line.resize(std::max(line.size(), width), ' ');
  std::istringstream words(text);
  std::string word;
  for (bool first_on_line = true; words >> word; first_on_line = false) {
    if (!first_on_line && line.size() + 1 + word.size() > kColumns) {
      std::printf("%s\n", line.c_str());
      line.assign(width, ' ');
      first_on_line = true;
    }
    line += (first_on_line ? "" : " ") + word;
  }
  std::printf("%s\n", line.c_str());
}

}  // namespace tqkv_cli
