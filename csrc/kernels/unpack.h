// Packed blocks -> rows of fp32: the exact weights, before the rounding to bf16 with which they enter products.
// Blocks are decoded as for a product, pairs of columns with 16 rows in the lanes, and turned. Included inside the
// variant's namespace.
#pragma once

// 16 rows of a block -> [16 rows][32 columns].
template <class R>
inline void unpack_tile(const PackedMatrix& m, int nb, int kb, int half, float* out) {
  alignas(64) float columns[kBlock * kTileRows], turned[kTileRows * kTileRows];
  const uint8_t* codes = m.block(nb, kb) + half * kTileRows * R::Codes::kRowBytes;
  const Weights<R> weights(m, nb, kb, half);
  for (int p = 0; p < kPairs; ++p) {
    Vec::F32 even, odd;
    R::Codes::decode(codes, p, even, odd);
    Vec::store(columns + 2 * p * kTileRows, weights.of(even, p));
    Vec::store(columns + (2 * p + 1) * kTileRows, weights.of(odd, p));
  }
  for (int k = 0; k < kBlock; k += kTileRows) {
    const uint32_t* rows[kTileRows];
    for (int i = 0; i < kTileRows; ++i) rows[i] = reinterpret_cast<const uint32_t*>(columns + (k + i) * kTileRows);
    transpose16(rows, reinterpret_cast<uint32_t*>(turned));
    for (int i = 0; i < kTileRows; ++i)
      __builtin_memcpy(out + i * kBlock + k, turned + i * kTileRows, kTileRows * sizeof(float));
  }
}

template <class R>
inline void unpack_strip_as(const PackedMatrix& m, int nb, float* out) {
  alignas(64) float tile[kBlock * kBlock];
  const int rows = min_int(kBlock, m.rows - nb * kBlock);
  for (int kb = 0; kb < m.col_blocks(); ++kb) {
    for (int half = 0; half < kStripTiles; ++half) unpack_tile<R>(m, nb, kb, half, tile + half * kTileRows * kBlock);
    const int cols = min_int(kBlock, m.cols - kb * kBlock);
    for (int i = 0; i < rows; ++i) {
      float* to = out + (int64_t{nb} * kBlock + i) * m.cols + kb * kBlock;
      __builtin_memcpy(to, tile + i * kBlock, cols * sizeof *to);
    }
  }
}

// Rows [32 nb, 32 nb + 32) of the matrix into row-major out (rows, cols).
inline void unpack_strip(const PackedMatrix& m, int nb, float* out) {
  switch (m.format) {
#define KT_FORMAT(name, Codes, Scales, bits, ...) \
  case kt_sft::Format::name:                      \
    return unpack_strip_as<Row<kt_sft::Format::name>>(m, nb, out);
#include "kernels/registry.inc"
  }
}
