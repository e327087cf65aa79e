// SPDX-License-Identifier: Apache-2.0
#include "codec/rotation.hpp"

#include <algorithm>
#include <bit>
#include <cmath>

#include "codec/exact_math.hpp"

namespace tqkv {
namespace {

constexpr uint64_t kGolden = 0x9e3779b97f4a7c15;

uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

class Stream {
 public:
  Stream(uint64_t seed, int side, int purpose) : state_(mix(seed + kGolden * uint64_t(1 + 8 * side + purpose))) {}
  uint64_t next() { return mix(state_ += kGolden); }

 private:
  uint64_t state_;
};

// Quadratic character modulo a prime.
int chi(int a, int q) {
  a = (a % q + q) % q;
  if (a == 0) return 0;
  for (int x = 1; x < q; ++x) {
    if (x * x % q == a) return 1;
  }
  return -1;
}

// Eight partial sums, so that the compiler can use vectors without changing the order.
double dot(const double *a, const double *b, int n) {
  double sums[8] = {};
  for (int i = 0; i < n; i += 8) {
    for (int j = 0; j < 8; ++j) sums[j] += a[i + j] * b[i + j];
  }
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

}  // namespace

int hadamard_base(int head_dim) {
  for (int base : {1, 12, 20, 28, 36}) {
    if (head_dim % base == 0 && std::has_single_bit(unsigned(head_dim / base))) return base;
  }
  return 0;
}

std::vector<int8_t> hadamard_matrix(int base) {
  const size_t n = size_t(base);
  if (base == 1) return {1};
  std::vector<int8_t> h(n * n);
  if (base == 12 || base == 20) {
    const int q = base - 1;
    for (int i = 0; i < base; ++i) {
      for (int j = 0; j < base; ++j) {
        const int s = i == 0 ? (j == 0 ? 0 : 1) : j == 0 ? -1 : chi(i - j, q);
        h[size_t(i) * n + size_t(j)] = int8_t(s + (i == j));
      }
    }
    return h;
  }
  const int q = base / 2 - 1;
  for (int i = 0; i <= q; ++i) {
    for (int j = 0; j <= q; ++j) {
      const int c = i == 0 && j == 0 ? 0 : i == 0 || j == 0 ? 1 : chi(i - j, q);
      const int block[2][2] = {{c == 0 ? 1 : c, c == 0 ? -1 : c}, {c == 0 ? -1 : c, c == 0 ? -1 : -c}};
      for (int a = 0; a < 2; ++a) {
        for (int b = 0; b < 2; ++b) h[size_t(2 * i + a) * n + size_t(2 * j + b)] = int8_t(block[a][b]);
      }
    }
  }
  return h;
}

std::vector<uint32_t> hadamard_signs(uint64_t seed, int side, int round, int head_dim) {
  Stream stream(seed, side, round);
  std::vector<uint32_t> signs(static_cast<size_t>(head_dim));
  uint64_t word = 0;
  for (size_t c = 0; c < signs.size(); ++c) {
    if (c % 64 == 0) word = stream.next();
    signs[c] = (word >> (c % 64) & 1) != 0 ? 0x80000000u : 0;
  }
  return signs;
}

std::vector<float> dense_rotation(uint64_t seed, int side, int head_dim) {
  Stream stream(seed, side, 3);
  const size_t n = size_t(head_dim);
  std::vector<double> rows(n * n);
  const auto uniform = [&] { return 2 * (double(stream.next() >> 11) * 0x1p-53) - 1; };
  for (size_t i = 0; i < rows.size(); i += 2) {  // head_dim is even
    double u = 0, v = 0, q = 0;
    do {
      u = uniform();
      v = uniform();
      q = u * u + v * v;
    } while (!(q > 0 && q < 1));
    const double f = std::sqrt(-2 * exact_log(q) / q);
    rows[i] = u * f;
    rows[i + 1] = v * f;
  }
  for (size_t i = 0; i < n; ++i) {
    double *row = &rows[i * n];
    for (int sweep = 0; sweep < 2; ++sweep) {
      for (size_t j = 0; j < i; ++j) {
        const double *other = &rows[j * n], along = dot(row, other, head_dim);
        for (size_t c = 0; c < n; ++c) row[c] -= along * other[c];
      }
    }
    const double norm = std::sqrt(dot(row, row, head_dim));
    for (size_t c = 0; c < n; ++c) row[c] /= norm;
  }
  return {rows.begin(), rows.end()};
}

double orthogonality_error(std::span<const float> matrix, int head_dim) {
  const size_t n = size_t(head_dim);
  const std::vector<double> rows(matrix.begin(), matrix.end());
  double worst = 0;
  for (size_t i = 0; i < n; ++i) {
    for (size_t j = 0; j <= i; ++j) {
      const double error = dot(&rows[i * n], &rows[j * n], head_dim) - (i == j);
      worst = error == error ? std::max(worst, std::fabs(error)) : INFINITY;
    }
  }
  return worst;
}

}  // namespace tqkv
