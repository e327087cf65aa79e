// SPDX-License-Identifier: Apache-2.0
#include "codec/codebook.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "codec/exact_math.hpp"

namespace tqkv {
namespace {

// Integrals of the positive half of a symmetric density of unit variance, by Simpson's rule on cells of 2^-9 sigma.
class Source {
 public:
  explicit Source(int head_dim) : head_dim_(head_dim), limit_(head_dim == 0 ? 10.0 : std::sqrt(double(head_dim))) {
    limit_ = std::min(limit_, 10.0);  // the mass beyond is below 1e-20
    const int cells = int(limit_ / kStep);
    cumulative_.resize(size_t(cells) + 1);
    for (int i = 0; i < cells; ++i) {
      const Moments cell = simpson(i * kStep, (i + 1) * kStep);
      cumulative_[size_t(i) + 1] = {cumulative_[size_t(i)].mass + cell.mass, cumulative_[size_t(i)].mean + cell.mean,
                                    cumulative_[size_t(i)].square + cell.square};
    }
    const Moments total = to(limit_);
    mass_unit_ = 0.5 / total.mass;
    // The truncated density's own second moment is the variance that errors are relative to.
    variance_ = 2 * mass_unit_ * total.square;
  }

  // Mean error, per unit of variance, of quantising to +-levels with midpoint thresholds and the best common factor.
  double least_mse(std::span<const double> levels) const {
    double xc = 0, cc = 0;
    Moments low{};
    for (size_t k = 0; k < levels.size(); ++k) {
      const Moments high = to(k + 1 < levels.size() ? (levels[k] + levels[k + 1]) / 2 : limit_);
      xc += levels[k] * (high.mean - low.mean);
      cc += levels[k] * levels[k] * (high.mass - low.mass);
      low = high;
    }
    xc *= 2 * mass_unit_;
    cc *= 2 * mass_unit_;
    return 1 - xc * xc / cc / variance_;
  }

  // Probabilities of the cells of positive levels.
  std::vector<double> cell_masses(std::span<const double> levels) const {
    std::vector<double> masses;
    double low = 0;
    for (size_t k = 0; k < levels.size(); ++k) {
      const double high = to(k + 1 < levels.size() ? (levels[k] + levels[k + 1]) / 2 : limit_).mass;
      masses.push_back(2 * mass_unit_ * (high - low));
      low = high;
    }
    return masses;
  }

  std::vector<double> lloyd_max(int count) const {
    std::vector<double> levels(static_cast<size_t>(count));
    for (int k = 0; k < count; ++k) levels[size_t(k)] = std::min(3.0, limit_) * (k + 0.5) / count;
    for (int iteration = 0; iteration < 20000; ++iteration) {
      double change = 0;
      Moments low{};
      std::vector<double> next = levels;
      for (size_t k = 0; k < levels.size(); ++k) {
        const Moments high = to(k + 1 < levels.size() ? (levels[k] + levels[k + 1]) / 2 : limit_);
        next[k] = (high.mean - low.mean) / (high.mass - low.mass);
        change = std::max(change, std::fabs(next[k] - levels[k]));
        low = high;
      }
      levels = next;
      if (change < 1e-12) break;
    }
    return levels;
  }

 private:
  static constexpr double kStep = 1.0 / 512;
  struct Moments {
    double mass = 0, mean = 0, square = 0;
  };

  double density(double x) const {  // not normalised
    if (head_dim_ == 0) return exact_exp(-x * x / 2);
    const double base = std::max(0.0, 1 - x * x / head_dim_);  // (d - 3) / 2 = (d - 4) / 2 + 1/2, d is even
    double power = std::sqrt(base), square = base;
    for (int e = (head_dim_ - 4) / 2; e > 0; e /= 2) {
      if (e % 2 == 1) power *= square;
      square *= square;
    }
    return power;
  }

  Moments simpson(double a, double b) const {
    const double m = (a + b) / 2, h = (b - a) / 6;
    const double fa = density(a), fm = 4 * density(m), fb = density(b);
    return {h * (fa + fm + fb), h * (a * fa + m * fm + b * fb), h * (a * a * fa + m * m * fm + b * b * fb)};
  }

  Moments to(double x) const {
    x = std::min(x, limit_);
    const size_t cell = std::min(size_t(x / kStep), cumulative_.size() - 1);
    const Moments &base = cumulative_[cell], rest = simpson(double(cell) * kStep, x);
    return {base.mass + rest.mass, base.mean + rest.mean, base.square + rest.square};
  }

  int head_dim_;
  double limit_, mass_unit_ = 1, variance_ = 1;
  std::vector<Moments> cumulative_;
};

double mse_at(const Source &source, const Codebook &book, double steps_per_sigma) {
  double levels[kMaxMagnitudes];
  for (int k = 0; k < book.count; ++k) levels[k] = (book.magnitude[size_t(k)] + 0.5) / steps_per_sigma;
  return source.least_mse({levels, size_t(book.count)});
}

// Minimum of a function of one positive variable that has one minimum in [low, high].
template <class Function>
double minimise(double low, double high, Function &&f) {
  for (int i = 0; i < 60; ++i) {
    const double a = low + (high - low) / 3, b = high - (high - low) / 3;
    (f(a) <= f(b) ? high : low) = f(a) <= f(b) ? b : a;
  }
  return (low + high) / 2;
}

void finish(const Source &source, Codebook &book, double steps, double reference_mse) {
  book.steps_per_sigma = minimise(steps * 0.9, steps * 1.1, [&](double s) { return mse_at(source, book, s); });
  book.mse = mse_at(source, book, book.steps_per_sigma);
  book.loss = book.mse / reference_mse - 1;
}

// The rounding of `levels` (positive, in sigmas) to half-integers m + 1/2 with m <= 127 that keeps their ratios best: the
// least mean square of what the levels move, apart from a common factor, or the smallest integers for which it is this
// unimportant part of the error.
Codebook fit_to_grid(const Source &source, std::span<const double> levels, double reference_mse, double unimportant) {
  const std::vector<double> masses = source.cell_masses(levels);
  Codebook best;
  double best_steps = 0, best_shift = 0;
  constexpr int kParts = 16;  // candidates a step of the largest level
  for (int part = kParts; part < 128 * kParts; ++part) {
    const double steps = double(part) / kParts / levels.back();
    Codebook book;
    book.count = int(levels.size());
    bool ascending = true;
    double ll = 0, lc = 0, cc = 0;
    for (size_t k = 0; k < levels.size(); ++k) {
      book.magnitude[k] = uint8_t(levels[k] * steps);
      ascending &= k == 0 || book.magnitude[k] > book.magnitude[k - 1];
      const double c = book.magnitude[k] + 0.5;
      ll += masses[k] * levels[k] * levels[k];
      lc += masses[k] * levels[k] * c;
      cc += masses[k] * c * c;
    }
    const double shift = ll - lc * lc / cc;
    // Equal shifts keep the smaller integers: they keep tables small.
    if (ascending && (best.count == 0 || shift < best_shift - 1e-12 * ll)) {
      best = book, best_steps = cc / lc, best_shift = shift;
      if (shift < unimportant * reference_mse) break;
    }
  }
  if (best.count != 0) finish(source, best, best_steps, reference_mse);
  return best;
}

}  // namespace

std::array<double, kMaxMagnitudes> lloyd_max_levels(int bits, int head_dim) {
  std::array<double, kMaxMagnitudes> result{};
  std::ranges::copy(Source(head_dim).lloyd_max(1 << (bits - 1)), result.begin());
  return result;
}

Codebook lloyd_max_codebook(int bits, int head_dim) {
  const Source source(head_dim);
  const std::vector<double> levels = source.lloyd_max(1 << (bits - 1));
  return fit_to_grid(source, levels, source.least_mse(levels), 1e-3);
}

Codebook uniform_codebook(int bits, int head_dim) {
  const Source source(head_dim);
  Codebook book;
  book.count = 1 << (bits - 1);
  for (int k = 0; k < book.count; ++k) book.magnitude[size_t(k)] = uint8_t(k);
  const double steps = minimise(0.2, 8.0, [&](double s) { return mse_at(source, book, s); });
  finish(source, book, steps, mse_at(source, book, steps));
  return book;
}

Codebook custom_codebook(std::span<const double> positive, int head_dim) {
  const Source source(head_dim);
  std::vector<double> levels(positive.begin(), positive.end());
  const auto scaled = [&](double factor) {
    std::vector<double> result;
    for (double level : positive) result.push_back(level * factor / positive.back());
    return result;
  };
  const double top = minimise(0.2, 8.0, [&](double factor) { return source.least_mse(scaled(factor)); });
  levels = scaled(top);
  return fit_to_grid(source, levels, source.least_mse(levels), 0);  // the caller's, as near as can be
}

}  // namespace tqkv
