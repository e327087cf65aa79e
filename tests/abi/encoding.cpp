// SPDX-License-Identifier: Apache-2.0
#include "encoding.hpp"

#include <algorithm>

#include "catch.hpp"

namespace {

// Where rows are rotated in bf16 matrix and coordinates are rounded: each moves a coordinate by at most 2^-9 of the
// vector's length.
constexpr double kBf16Slack = 0x1p-8;

// Coordinates are known to within `slack`. Empty (low > high) if there is no factor.
Interval factors(const oracle::Side &side, const Record &record, const oracle::Vector &y, double slack) {
  Interval interval;
  const int lowest = side.bits == 8 ? -128 : 0, highest = side.bits == 8 ? 127 : (1 << side.bits) - 1;
  for (size_t c = 0; c < y.size(); ++c) {
    const int code = record.codes[c];
    const double upper =
        code == highest ? std::numeric_limits<double>::infinity() : (side.step(code) + side.step(code + 1)) / 2;
    const double lower =
        code == lowest ? -std::numeric_limits<double>::infinity() : (side.step(code) + side.step(code - 1)) / 2;
    // lower <= factor * y' <= upper for some y' within slack of y.
    const double smallest = y[c] - slack, largest = y[c] + slack;
    if (largest > 0) {
      interval.low = std::max(interval.low, lower / largest);
    } else if (lower > 0) {
      interval.high = -1;  // a value that is surely negative can not have a positive level
    } else if (largest < 0 && std::isfinite(lower)) {
      interval.high = std::min(interval.high, lower / largest);
    }
    if (smallest < 0) {
      interval.low = std::max(interval.low, upper / smallest);
    } else if (upper < 0) {
      interval.high = -1;
    } else if (smallest > 0) {
      interval.high = std::min(interval.high, upper / smallest);
    }
  }
  return interval;
}

double scale_formula(int32_t rule, const oracle::Vector &y, const oracle::Vector &levels) {
  const double xx = oracle::dot(y, y), xc = oracle::dot(y, levels), cc = oracle::dot(levels, levels);
  if (rule == TQ_SCALE_LEAST_MSE) return xc / cc;
  if (rule == TQ_SCALE_NORM) return std::sqrt(xx / cc);
  return xx / xc;
}

// Half a unit in the last place of a scale of this type, what f32 arithmetic may add, and what the coordinates' roundings
// do to the rules that have <y, levels> in them. bf16 inputs are multiples of steps which the factor to integers may bring
// close to 1: then roundings are not random, all make the vector longer or all shorter, at worst by half an integer a
// coordinate.
double scale_tolerance(int32_t rule, const oracle::Side &side, int32_t input_type, double scale) {
  const double longer = input_type == TQ_TYPE_BF16 ? 0.5 * std::sqrt(double(side.head_dim)) / kIntegers : 0;
  const double coordinates = rule == TQ_SCALE_NORM ? 0 : std::max(kCoordinateSlack, longer);
  const double arithmetic = (8 * 0x1p-24 + coordinates) * scale;
  if (side.scale_type == TQ_TYPE_F32) return arithmetic + 0x1p-149;
  return arithmetic + std::max(0x1p-11 * scale, 0x1p-25);
}

}  // namespace

Record record_at(const oracle::Side &side, const Encoded &encoded, int64_t index) {
  Record record;
  const uint8_t *bytes = encoded.codes.data() + index * side.code_bytes();
  record.bytes.assign(bytes, bytes + side.code_bytes());
  if (side.raw()) return record;
  record.codes = oracle::read_codes(bytes, side.head_dim, side.bits);
  record.scale = oracle::read_element(encoded.scales.data(), side.scale_type, index);
  return record;
}

oracle::Vector levels_of(const oracle::Side &side, const Record &record) {
  oracle::Vector levels;
  for (int code : record.codes) levels.push_back(side.level_unit * side.step(code));
  return levels;
}

bool rotates_in_bf16(const Target &target, const tq_side_info &side, int32_t type) {
  const int n = side.head_dim;
  return target.device->kind() == TQ_DEVICE_CUDA && type == TQ_TYPE_BF16 && side.bits <= 4 &&
         (side.rotation == TQ_ROTATION_DENSE || side.rotation == TQ_ROTATION_CUSTOM) &&
         (n == 64 || n == 96 || n == 128 || n == 256);
}

Interval check_record(const oracle::Side &side, int32_t rule, const Record &record, const oracle::Vector &y,
                      int32_t input_type, bool in_bf16) {
  const double coarse = in_bf16 ? kBf16Slack : 0;
  const Interval interval = factors(side, record, y, (kCoordinateSlack + coarse) * oracle::norm(y));
  CHECK(interval.low <= interval.high);
  double formula = scale_formula(rule, y, levels_of(side, record));
  if (side.scale_type == TQ_TYPE_F16) formula = std::min(formula, 65504.0);
  CHECK(std::fabs(record.scale - formula) <= scale_tolerance(rule, side, input_type, formula) + coarse * formula);
  return interval;
}
