// SPDX-License-Identifier: Apache-2.0
// What people read: aligned tables, numbers, and a progress bar.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace tqkv_cli {

// Columns are as wide as their widest cell; the first is left-aligned, and others too where their title ends in a tab.
class Table {
 public:
  // A title may have two lines, separated by '\n'.
  explicit Table(std::vector<std::string> titles);
  void row(std::vector<std::string> cells);
  void section(std::string title);  // a line of text between rows
  void print() const;

 private:
  struct Row {
    std::vector<std::string> cells;
    std::string section;
  };
  std::vector<std::string> titles_;
  std::vector<bool> left_;
  std::vector<Row> rows_;
};

// Drawn on stderr where that is a terminal, from the moment that the work is seen to take more than two seconds.
class Progress {
 public:
  Progress(std::string what, int64_t total);
  ~Progress();  // wipes the bar
  void advance(int64_t amount);

 private:
  std::string what_;
  int64_t total_, done_ = 0;
  double start_seconds_, drawn_seconds_ = 0;
  bool terminal_, visible_ = false;
};

// "0" for an exact zero, 3e-07 for what would look like one, "-" for what is not finite.
std::string fixed(double value, int digits);
std::string grouped(int64_t value);     // 1 234 567
std::string bytes_text(int64_t bytes);  // "1.50 GiB"

// Prints a paragraph wrapped at 100 columns.
void print_paragraph(const std::string &text);

// The same beside a label that takes the first `width` columns.
void print_item(const std::string &label, size_t width, const std::string &text);

}  // namespace tqkv_cli
