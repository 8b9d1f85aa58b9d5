// The register-blocked int8 product on VPDPBUSD: 8 rows x 32 columns of one panel, then int32 -> fp32 with both scales.
// https://www.intel.com/content/www/us/en/docs/intrinsics-guide (AVX512_VNNI: _mm512_dpbusd_epi32, _mm512_dpwssd_epi32)
// Included inside the variant's namespace.
#pragma once

// C tile (m tile, half) of a strip is at c + (m tile * 2 + half) * 256 floats.
struct Block8Args {
  const int8_t* left;       // tile (0, t0)
  int64_t left_stride;      // tiles from one row of tiles to the next
  const uint8_t* right;     // [2][kPanel8Tiles]
  const int32_t* start;     // per row: where the unsigned sums begin
  const float* row_scales;  // [row][row_groups]
  int64_t row_groups;
  const float* column_scales;  // 32
  float* c;
  int rows, tiles;
  bool accumulate;
  Ahead ahead;
};

// c (+)= sums * row scale * column scales for one row of 16 columns.
inline void flush8(__m512i sums, float row_scale, __m512 column_scales, bool accumulate, float* c) {
  const __m512 scales = _mm512_mul_ps(_mm512_set1_ps(row_scale), column_scales);
  const __m512 before = accumulate ? _mm512_loadu_ps(c) : _mm512_setzero_ps();
  _mm512_storeu_ps(c, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), scales, before));
}

// sums += unsigned bytes . signed bytes, per lane of four. As assembly, because GCC 12 copies the accumulators of its
// own intrinsic from register to register in loops.
inline void dot8(__m512i& sums, __m512i unsigned_bytes, __m512i signed_bytes) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(unsigned_bytes), "v"(signed_bytes));
}

// sums += pairs of signed words, per lane; likewise.
inline void dot_words(__m512i& sums, __m512i a, __m512i b) {
  __asm__("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
}

template <int Rows>
inline void multiply8_rows(const Block8Args& g, int tile, int row) {
  constexpr int kRightTiles = kMaxGroup8 / kSteps8;
  const int8_t* left = g.left + int64_t{tile} * g.left_stride * kTile8Bytes + row * kSteps8;
  __m512i acc[Rows][kStripTiles];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) acc[r][0] = acc[r][1] = _mm512_set1_epi32(g.start[tile * kTileRows + row + r]);
  for (int t = 0; t < g.tiles; ++t) {
    const uint8_t* right = g.right + t * kTile8Bytes;
    const int8_t* at = left + t * kTile8Bytes;
    for (int s = 0; s < kSteps8 / 4; ++s, right += 64, at += 4) {
      __asm__("" : "+r"(at));  // else GCC keeps an address per row, more than it has registers for
      const __m512i b0 = _mm512_loadu_si512(right), b1 = _mm512_loadu_si512(right + kRightTiles * kTile8Bytes);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        int32_t quad;
        __builtin_memcpy(&quad, at + r * kSteps8, 4);
        const __m512i a = _mm512_set1_epi32(quad);
        dot8(acc[r][0], b0, a);
        dot8(acc[r][1], b1, a);
      }
    }
  }
  float* c = g.c + (int64_t{tile} * kStripTiles * 16 + row) * 16;
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    const int at = tile * kTileRows + row + r;
    const float scale = at < g.rows ? g.row_scales[at * g.row_groups] : 0.0f;
    flush8(acc[r][0], scale, _mm512_loadu_ps(g.column_scales), g.accumulate, c + r * 16);
    flush8(acc[r][1], scale, _mm512_loadu_ps(g.column_scales + 16), g.accumulate, c + 256 + r * 16);
  }
}

inline void multiply8_vnni(const Block8Args& g) {
  Ahead ahead = g.ahead;
  const int blocks = g.tiles * kSteps8 / kBlock;
  for (int tile = 0; tile * kTileRows < g.rows; ++tile) {
    for (int row = 0; row < kTileRows && tile * kTileRows + row < g.rows; row += 8) {
      prefetch_codes(ahead, blocks);
      multiply8_rows<8>(g, tile, row);
    }
  }
}

// Bytes [8 pairs of columns][32 rows][2], which is half a block, as [row / 4][16 columns][4], XORed with `flip`.
inline void turn_pairs(uint8_t* to, const uint8_t* pairs, __m512i flip) {
  const __m512i by_column = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
  __m512i row[8], mixed[2][4];  // a 64-bit word: 4 rows of a pair
  for (int p = 0; p < 8; ++p)
    row[p] = _mm512_xor_si512(_mm512_shuffle_epi8(_mm512_loadu_si512(pairs + p * 64), by_column), flip);
  for (int p = 0; p < 4; ++p) {
    mixed[0][p] = _mm512_unpacklo_epi64(row[2 * p], row[2 * p + 1]);
    mixed[1][p] = _mm512_unpackhi_epi64(row[2 * p], row[2 * p + 1]);
  }
  for (int odd = 0; odd < 2; ++odd) {
    const auto& m = mixed[odd];
    for (int high = 0; high < 2; ++high) {
      const __m512i a = high ? _mm512_shuffle_i64x2(m[0], m[1], 0xee) : _mm512_shuffle_i64x2(m[0], m[1], 0x44);
      const __m512i b = high ? _mm512_shuffle_i64x2(m[2], m[3], 0xee) : _mm512_shuffle_i64x2(m[2], m[3], 0x44);
      _mm512_storeu_si512(to + (4 * high + odd) * 64, _mm512_shuffle_i64x2(a, b, 0x88));
      _mm512_storeu_si512(to + (4 * high + 2 + odd) * 64, _mm512_shuffle_i64x2(a, b, 0xdd));
    }
  }
}

// Multiply-adds on registers only.
inline double peak_of_vnni(int64_t iterations) {
  __m512i acc[16], a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(1);
  alignas(64) int32_t sink[16];
  __asm__ volatile("" : "+v"(a), "+v"(b));
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) acc[i] = _mm512_setzero_si512();
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      acc[i] = _mm512_dpbusd_epi32(acc[i], a, b);
      __asm__ volatile("" : "+v"(acc[i]));  // or the loop is folded away
    }
  }
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(sink, acc[i]);
  return 2.0 * 16 * 64 * static_cast<double>(iterations);
}
