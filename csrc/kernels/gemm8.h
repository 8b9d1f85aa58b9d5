// Native int8 products: int8 codes times activations quantised per row and group of reduction steps, summed in int32.
//   out[m][c] = sum_groups sa[m][g] sw[c][g] sum_{q in g} act[m][q] code[c][q]
// Tiles of 1 KiB: left [16 c][64 q], right [q / 4][16 c][4] (the order of TDPBSSD and VPDPBUSD). VPDPBUSD takes its
// first factor unsigned: codes are stored there as code + 128 and the sums start at -128 sum_q act. Included inside the
// variant's namespace after gemm.h.
#pragma once

constexpr int kPanel8Tiles = kMaxGroup8 / kSteps8;
constexpr int kPanel8Bytes = kStripTiles * kPanel8Tiles * kTile8Bytes;
constexpr size_t kScratch8Bytes =
    kPanel8Bytes + kMaxRows * sizeof(int32_t) + size_t{kMaxRows} * kMaxCols * sizeof(float);

// Largest |v|. Bit patterns of magnitudes order like magnitudes, and integer maxima vectorise.
inline float largest(const float* v, int n) {
  uint32_t peak = 0;
  for (int i = 0; i < n; ++i) {
    const uint32_t bits = bits_of(v[i]) & 0x7fffffff;
    peak = bits > peak ? bits : peak;
  }
  return float_of(peak);
}

// Rows of one call as left tiles, with a scale per row and group and the sum of the codes per row and tile.
inline void quantize_rows(const QuantizeRowsArgs& a) {
  alignas(64) float values[kMaxGroup8];
  alignas(64) int8_t codes[kMaxGroup8];
  const int tiles = static_cast<int>(ceil_div(a.nq, kSteps8));
  for (int row = 0; row < round_up(a.rows, kTileRows); ++row) {
    int8_t* to = a.tiles + (int64_t{row / kTileRows} * a.q_stride) * kTile8Bytes + row % kTileRows * kSteps8;
    if (row >= a.rows) {
      for (int t = 0; t < tiles; ++t) __builtin_memset(to + int64_t{t} * kTile8Bytes, 0, kSteps8);
      continue;
    }
    const int64_t at = int64_t{a.view.cidx ? a.view.cidx[a.row0 + row] : a.row0 + row} * a.view.cs;
    for (int q0 = 0; q0 < a.nq; q0 += a.group) {
      const int n = min_int(a.group, a.nq - q0), padded = static_cast<int>(round_up(n, kSteps8));
      for (int i = 0; i < n; ++i)
        values[i] = a.view.is_float ? static_cast<const float*>(a.view.base)[at + q0 + i]
                                    : from_bf16(static_cast<const uint16_t*>(a.view.base)[at + q0 + i]);
      for (int i = n; i < padded; ++i) values[i] = 0;
      const float scale = largest(values, padded) * (1.0f / 127.0f);
      const float inverse = scale >= kSmallestScale ? 1.0f / scale : 0.0f;
      for (int i = 0; i < padded; ++i) {
        const float rounded = (values[i] * inverse + 12582912.0f) - 12582912.0f;  // to nearest even
        codes[i] = static_cast<int8_t>(static_cast<int32_t>(rounded));
      }
      a.scales[row * a.groups + q0 / a.group] = scale;
      for (int t = 0; t < padded; t += kSteps8) {
        int32_t sum = 0;
        for (int i = 0; i < kSteps8; ++i) sum += codes[t + i];
        a.sums[row * a.all_tiles + (q0 + t) / kSteps8] = sum;
        __builtin_memcpy(to + int64_t{(q0 + t) / kSteps8} * kTile8Bytes, codes + t, kSteps8);
      }
    }
  }
}

// 32 rows of codes (block row strip), reduction tiles [t0, t0 + tiles), as right tiles [2][kPanel8Tiles].
inline void decode8(const PackedMatrix& w, int strip, int t0, int tiles, uint8_t* panel) {
  constexpr int kQuads = kBlock / 4, kPairRow = kBlock * 2;  // of a block; bytes of one pair of all its rows
  const int blocks = min_int(2 * tiles, w.col_blocks() - 2 * t0);
  for (int b = 0; b < blocks; ++b) {
    const uint8_t* block = w.block(strip, 2 * t0 + b);
    prefetch_ahead<kPairs * kPairRow>(block + kSkinnyAhead);
    for (int half = 0; half < kStripTiles; ++half) {
      uint8_t* to = panel + (half * kPanel8Tiles + b / 2) * kTile8Bytes + b % 2 * kQuads * 64;
      for (int i = 0; i < kQuads; ++i) {
        const uint8_t* pairs = block + 2 * i * kPairRow + half * kTileRows * 2;
        ActiveOps::store_quads(to + i * 64, pairs, pairs + kPairRow);
      }
    }
  }
}

inline void gemm8(const Gemm8Args& g) {
  auto* panel = static_cast<uint8_t*>(g.scratch);
  auto* start = reinterpret_cast<int32_t*>(panel + kPanel8Bytes);
  auto* c = reinterpret_cast<float*>(start + kMaxRows);
  const PackedMatrix& w = *g.packed;
  const int m_tiles = static_cast<int>(ceil_div(g.m, kTileRows)), strips = static_cast<int>(ceil_div(g.nc, kBlock));
  const int step = min_int(g.group, w.group_size), all_tiles = static_cast<int>(ceil_div(g.q, kSteps8));
  const int groups = static_cast<int>(ceil_div(g.q, g.group));
  ActiveOps::begin8();
  for (int q0 = 0; q0 < g.q; q0 += step) {
    const int t0 = q0 / kSteps8, tiles = static_cast<int>(ceil_div(min_int(step, g.q - q0), kSteps8));
    for (int r = 0; r < m_tiles * kTileRows; ++r) {
      int32_t sum = 0;
      for (int t = 0; t < tiles && r < g.m; ++t) sum += g.sums[int64_t{r} * all_tiles + t0 + t];
      start[r] = -128 * sum;
    }
    for (int strip = 0; strip < strips; ++strip) {
      const int nb = g.c0 / kBlock + strip;
      decode8(w, nb, t0, tiles, panel);
      alignas(64) float column_scales[kBlock];
      for (int half = 0; half < kStripTiles; ++half)
        Vec::store(column_scales + half * kTileRows,
                   BlockScales<Row<kt_sft::Format::int8>>(w, nb, q0 / kBlock).scale(half, 0));
      ActiveOps::multiply8({g.act + int64_t{t0} * kTile8Bytes, all_tiles, panel, start, g.scales + q0 / g.group, groups,
                            column_scales, accumulator(c, strip, m_tiles, 0, 0), g.m, tiles, q0 > 0});
    }
  }
  ActiveOps::end();
  emit({Side::left, nullptr, 0, g.m, g.c0, g.nc, g.out, g.ldo, nullptr}, c);
}
