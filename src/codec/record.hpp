// SPDX-License-Identifier: Apache-2.0
// Where the bits of a code are: the token record and its place in a tile. The byte order itself is specified in
// tqkv.h ("BYTE ORDER"); this is its only implementation, shared by the CPU path and the kernels.
#pragma once

#include <cstdint>

#include "codec/host_device.hpp"

namespace tqkv {

inline constexpr int kTileTokens = 16;
inline constexpr int kRawBits = 16;

// A code is, at 4 bits, sign << 3 | magnitude index; at 1 to 3 bits the ascending level index; at 8 bits the int8 grid
// value as a byte.

// Planes of a record, in order: the bytes of one token in plane p, 0 where there is none.
TQKV_HOST_DEVICE int plane_bytes(int head_dim, int bits, int plane) {
  if (bits == 3) return plane == 0 ? head_dim / 4 : plane == 1 ? head_dim / 8 : 0;
  return plane == 0 ? head_dim * bits / 8 : 0;
}

TQKV_HOST_DEVICE int record_bytes(int head_dim, int bits) {
  return head_dim * bits / 8;
}

// Bit position within the 2-bit plane of channel c.
TQKV_HOST_DEVICE int plane2_bit(int c) {
  return 32 * (c >> 4) + 4 * (c & 7) + 2 * ((c >> 3) & 1);
}

// Bit position within the 1-bit plane of channel c. A half word ends the plane where head_dim is an odd multiple of 16.
TQKV_HOST_DEVICE int plane1_bit(int c, int head_dim) {
  if (c >= (head_dim & ~31)) return (head_dim & ~31) + 4 * (c & 3) + ((c >> 2) & 3);
  constexpr unsigned kBits = 0x0312;  // nibbles: {2, 1, 3, 0}
  return 32 * (c >> 5) + 4 * (c & 7) + int((kBits >> (4 * ((c >> 3) & 3))) & 3);
}

TQKV_HOST_DEVICE int nibble_sign_bit(int c) {
  const int j = c & 7;
  return 32 * (c >> 3) + (j < 4 ? 8 * j + 7 : 8 * (j - 4) + 3);
}

TQKV_HOST_DEVICE void or_bits(uint8_t *bytes, int bit, unsigned value) {
  bytes[bit >> 3] = uint8_t(bytes[bit >> 3] | value << (bit & 7));
}

// Writes the code of channel c into a record whose bits there are zero. The two planes of a 3-bit record follow each
// other.
TQKV_HOST_DEVICE void put_code(uint8_t *record, int head_dim, int bits, int c, unsigned code) {
  switch (bits) {
    case 8:
      record[c] = uint8_t(code);
      break;
    case 4:
      or_bits(record, 4 * c, code & 7);
      or_bits(record, nibble_sign_bit(c), code >> 3);
      break;
    case 3:
      or_bits(record, plane2_bit(c), code & 3);
      or_bits(record + head_dim / 4, plane1_bit(c, head_dim), code >> 2);
      break;
    case 2:
      or_bits(record, plane2_bit(c), code);
      break;
    default:
      or_bits(record, plane1_bit(c, head_dim), code);
      break;
  }
}

TQKV_HOST_DEVICE unsigned bits_at(const uint8_t *bytes, int bit, unsigned mask) {
  return unsigned(bytes[bit >> 3]) >> (bit & 7) & mask;
}

TQKV_HOST_DEVICE unsigned get_code(const uint8_t *record, int head_dim, int bits, int c) {
  switch (bits) {
    case 8:
      return record[c];
    case 4:
      return bits_at(record, 4 * c, 7) | bits_at(record, nibble_sign_bit(c), 1) << 3;
    case 3:
      return bits_at(record, plane2_bit(c), 3) | bits_at(record + head_dim / 4, plane1_bit(c, head_dim), 1) << 2;
    case 2:
      return bits_at(record, plane2_bit(c), 3);
    default:
      return bits_at(record, plane1_bit(c, head_dim), 1);
  }
}

// Offset of byte e of a token's record in a plane of the V side of a tile: bytes of 4 tokens interleaved, so that one
// 32-bit word holds the same channels of 4 tokens, which is what the second matrix product wants.
TQKV_HOST_DEVICE int v_plane_offset(int bytes_in_plane, int e, int token) {
  const int word_bytes = bytes_in_plane - (e & ~3) < 4 ? 2 : 4;
  return 64 * (e >> 2) + 4 * word_bytes * (token >> 2) + 4 * (e & 3) + (token & 3);
}

}  // namespace tqkv
