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

// The factors that make every code of the vector the nearest level to its coordinate times the factor, given that
// coordinates are known to within `slack`. Empty (low > high) if there is none.
struct Interval {
  double low = 0, high = std::numeric_limits<double>::infinity();
};
Interval factors(const oracle::Side &side, const Record &record, const oracle::Vector &y, double slack);

double scale_formula(int32_t rule, const oracle::Vector &y, const oracle::Vector &levels);

// Coordinates are coded from integers of which the rotated vector's root mean square is 2047. The sum of their
// roundings is random: six standard deviations of it, relative to a vector of this length.
inline constexpr double kIntegers = 2047;
inline constexpr double kCoordinateSlack = 6 * 0.289 / kIntegers;

// Whether rows of a side are rotated in bf16 (where they are contiguous and without offset). Matrix and coordinates are
// rounded then: each moves a coordinate by at most 2^-9 of the vector's length.
bool rotates_in_bf16(const Target &target, const tq_config &config, int32_t which, int32_t type);
inline constexpr double kBf16Slack = 0x1p-8;

// Half a unit in the last place of a scale of this type, what f32 arithmetic may add, and what the coordinates' roundings
// do to the rules that have <y, levels> in them. bf16 inputs are multiples of steps which the factor to integers may bring
// close to 1: then roundings are not random, all make the vector longer or all shorter, at worst by half an integer a
// coordinate.
double scale_tolerance(int32_t rule, const oracle::Side &side, int32_t input_type, double scale);
