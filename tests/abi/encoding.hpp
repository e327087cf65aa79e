// SPDX-License-Identifier: Apache-2.0
// What encoded vectors must satisfy, from tqkv.h alone: nearest levels and the rules' formulas, in doubles.
#pragma once

#include "support.hpp"

struct Record {
  std::vector<int> codes;
  double scale = 1;
  std::vector<uint8_t> bytes;
};
Record record_at(const oracle::Side &side, const Encoded &encoded, int64_t index);

// Levels in units of level_unit.
oracle::Vector levels_of(const oracle::Side &side, const Record &record);

// Coordinates are coded from integers of which the rotated vector's root mean square is 2047. The sum of their
// roundings is random: six standard deviations of it, relative to a vector of this length.
inline constexpr double kIntegers = 2047;
inline constexpr double kCoordinateSlack = 6 * 0.289 / kIntegers;

// Whether rows of a side are rotated in bf16 (where they are contiguous and without offset).
bool rotates_in_bf16(const Target &target, const tq_side_info &side, int32_t type);

// The factors that make every code of a vector the nearest level to its coordinate times the factor.
struct Interval {
  double low = 0, high = std::numeric_limits<double>::infinity();
};
// Codes must be the nearest levels to y, the rotated vector, and the scale what the rule makes of them. Returns the
// factors of which the former is true.
Interval check_record(const oracle::Side &side, int32_t rule, const Record &record, const oracle::Vector &y,
                      int32_t input_type, bool in_bf16);
