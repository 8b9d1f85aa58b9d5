// Packed blocks -> rows of bf16: the values that enter every product, bf16_rne(code * scale).
// Blocks are decoded as for a product, pairs of columns with 16 rows in the lanes, and turned. Included inside the
// variant's namespace.
#pragma once

// 16 rows of a block -> [16 rows][32 columns].
template <class Format, bool Scaled>
inline void unpack_tile(const uint8_t* pairs, const uint16_t* scales, uint16_t* out) {
  alignas(64) uint32_t words[kPairs * kTileRows];
  const uint32_t* rows[kPairs];
  Vec::F32 scale{};
  if constexpr (Scaled) scale = Vec::load_bf16(scales);
  for (int p = 0; p < kPairs; ++p, pairs += kBlock * Format::kPairBytes) {
    Vec::F32 even, odd;
    Format::template decode<Vec>(pairs, even, odd);
    if constexpr (Scaled) even = Vec::mul(even, scale), odd = Vec::mul(odd, scale);
    const auto low = Vec::bit_and(Vec::shift_right<16>(Vec::round_bf16(even)), Vec::splat_i32(0xffff));
    Vec::store_i32(words + p * kTileRows, Vec::bit_or(low, Vec::round_bf16(odd)));
    rows[p] = words + p * kTileRows;
  }
  transpose16(rows, reinterpret_cast<uint32_t*>(out));
}

template <class Format, bool Scaled>
inline void unpack_strip_as(const PackedMatrix& m, int nb, uint16_t* out) {
  alignas(64) uint16_t tile[kBlock * kBlock];
  const int rows = min_int(kBlock, m.rows - nb * kBlock);
  for (int kb = 0; kb < m.col_blocks(); ++kb) {
    const uint16_t* scales = m.block_scales(nb, kb);
    for (int row = 0; row < kBlock; row += kTileRows)
      unpack_tile<Format, Scaled>(m.block(nb, kb) + row * Format::kPairBytes, Scaled ? scales + row : nullptr,
                                  tile + row * kBlock);
    const int cols = min_int(kBlock, m.cols - kb * kBlock);
    for (int i = 0; i < rows; ++i) {
      uint16_t* to = out + (int64_t{nb} * kBlock + i) * m.cols + kb * kBlock;
      __builtin_memcpy(to, tile + i * kBlock, cols * sizeof *to);
    }
  }
}

// Rows [32 nb, 32 nb + 32) of the matrix into row-major out (rows, cols).
inline void unpack_strip(const PackedMatrix& m, int nb, uint16_t* out) {
  switch (m.format) {
#define KT_FORMAT(name, Struct, pair_bytes, has_scales) \
  case kt_sft::Format::name:                            \
    return unpack_strip_as<Struct, has_scales>(m, nb, out);
#include "kernels/registry.inc"
  }
}
