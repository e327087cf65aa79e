// SPDX-License-Identifier: Apache-2.0
// Random rotations from a seed, the same on every machine.
//
// GENERATOR. mix(z): z = (z ^ z>>30) * 0xbf58476d1ce4e5b9; z = (z ^ z>>27) * 0x94d049bb133111eb; z ^ z>>31 (the
// finaliser of SplitMix64). Stream p of side s (K 0, V 1) has the state mix(seed + 0x9e3779b97f4a7c15 * (1 + 8 s + p));
// its outputs are mix(state += 0x9e3779b97f4a7c15). Streams 0, 1, 2 belong to the Hadamard rounds, 3 to the dense
// matrix.
//
// HADAMARD. Round r multiplies channel c by -1 where bit c & 63 of output c >> 6 of stream r is set, then applies
// H = H_base (x) H_pow2 with head_dim = base * 2^k: first channels 2^k apart by H_base, then butterflies (a + b, a - b)
// at strides 1, 2, 4, .., 2^(k-1). Every round is followed by 1 / sqrt(head_dim), all of which the code folds into one
// factor. base is 1, or 12, 20, 28 or 36 where head_dim is no power of two.
// H_base, chi the quadratic character: orders 12 and 20 by Paley's first construction with q = base - 1:
// H = I + S, S = [0 1; -1 Q], Q[i][j] = chi(i - j) mod q. Orders 28 and 36 by his second with q = base / 2 - 1:
// C = [0 1; 1 Q], each zero of C replaced by [1 -1; -1 -1], each +-1 by +-[1 1; 1 -1].
// A row of H_base is summed in groups of four, (s0 x0 + s1 x1) + (s2 x2 + s3 x3), one group after the other.
//
// DENSE. head_dim^2 standard normals, row after row, by Marsaglia's polar method: pairs u, v = 2 w - 1 with w the top 53
// bits of an output times 2^-53, accepted if 0 < q = u^2 + v^2 < 1, giving u f, v f with f = sqrt(-2 ln(q) / q). The rows
// are orthonormalised by modified Gram-Schmidt, two sweeps a row, in doubles.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace tqkv {

// Base order of the Hadamard matrix of this size: 1, 12, 20, 28 or 36; 0 where there is none.
int hadamard_base(int head_dim);

// H_base, row-major, +-1.
std::vector<int8_t> hadamard_matrix(int base);

// 0 or 0x80000000 per channel: what a round's signs do to the sign bit.
std::vector<uint32_t> hadamard_signs(uint64_t seed, int side, int round, int head_dim);

// [head_dim, head_dim] row-major, orthogonal to within float rounding.
std::vector<float> dense_rotation(uint64_t seed, int side, int head_dim);

// Largest |(M M^T - I)[i][j]|.
double orthogonality_error(std::span<const float> matrix, int head_dim);

}  // namespace tqkv
