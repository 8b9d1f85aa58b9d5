// Native int8 products: int8 codes times activations quantised per row and group of reduction steps, summed in int32.
//   forward   out[m][c] = sum_groups sa[m][g] sw[c][g] sum_{q in g} act[m][q] code[c][q]
//   gradient  out[m][c] = sum_groups sa[m][g] sum_{q in g} act[m][q] code[q][c], act quantised after times sw[q]
// Tiles of 1 KiB: left [16 c][64 q], right [q / 4][16 c][4] (the order of TDPBSSD and VPDPBUSD). VPDPBUSD takes its
// first factor unsigned: codes are stored there as code + 128 and the sums start at -128 sum_q act. Included inside the
// variant's namespace after gemm.h.
#pragma once

constexpr int kPanel8Tiles = kMaxGroup8 / kSteps8;
constexpr int kPanel8Bytes = kStripTiles * kPanel8Tiles * kTile8Bytes;
constexpr size_t kRows8Bytes =  // of the rows of a panel, quantised in the driver
    size_t{kMaxRows} * (kMaxGroup8 + sizeof(float) + kPanel8Tiles * sizeof(int32_t));
constexpr size_t kScratch8Bytes =
    kPanel8Bytes + kMaxRows * sizeof(int32_t) + kRows8Bytes + size_t{kMaxRows} * kMaxCols * sizeof(float);

// Largest |v|. Bit patterns of magnitudes order like magnitudes, and integer maxima vectorise.
inline float largest(const float* v, int n) {
  uint32_t peak = 0;
  for (int i = 0; i < n; ++i) {
    const uint32_t bits = bits_of(v[i]) & 0x7fffffff;
    peak = bits > peak ? bits : peak;
  }
  return float_of(peak);
}

// The scales of rows [q0, q0 + n) of an int8 matrix at a column.
inline void scales_of_rows(const PackedMatrix& w, int q0, int n, int column, float* to) {
  for (int q = 0; q < n; q += kTileRows)
    Vec::store(to + q, BlockScales<Row<kt_sft::Format::int8>>(w, (q0 + q) / kBlock, column / kBlock)
                           .scale((q0 + q) % kBlock / kTileRows, 0));
}

// One group of one row: n values, padded with zeros to whole tiles, which lie kTile8Bytes apart; returns the scale.
inline float quantize_group(float* values, int n, int8_t* to, int32_t* sums) {
  alignas(64) int8_t codes[kMaxGroup8];
  const int padded = static_cast<int>(round_up(n, kSteps8));
  for (int i = n; i < padded; ++i) values[i] = 0;
  const float scale = largest(values, padded) * (1.0f / 127.0f);
  const float inverse = scale >= kSmallestScale ? 1.0f / scale : 0.0f;
  for (int i = 0; i < padded; ++i) {
    const float rounded = (values[i] * inverse + 12582912.0f) - 12582912.0f;  // to nearest even
    codes[i] = static_cast<int8_t>(static_cast<int32_t>(rounded));
  }
  for (int t = 0; t < padded / kSteps8; ++t) {
    int32_t sum = 0;
    for (int i = 0; i < kSteps8; ++i) sum += codes[t * kSteps8 + i];
    sums[t] = sum;
    __builtin_memcpy(to + t * kTile8Bytes, codes + t * kSteps8, kSteps8);
  }
  return scale;
}

// Rows of one call as left tiles, with a scale per row and group and the sum of the codes per row and tile.
inline void quantize_rows(const QuantizeRowsArgs& a) {
  alignas(64) float values[kMaxGroup8], folded[kMaxGroup8];
  for (int q0 = 0; q0 < a.nq; q0 += a.group) {
    const int n = min_int(a.group, a.nq - q0), t0 = q0 / kSteps8;
    if (a.fold != nullptr) scales_of_rows(*a.fold, q0, n, a.fold_column, folded);
    for (int row = 0; row < round_up(a.rows, kTileRows); ++row) {
      int8_t* to = a.tiles + (int64_t{row / kTileRows} * a.q_stride + t0) * kTile8Bytes + row % kTileRows * kSteps8;
      if (row >= a.rows) {
        for (int t = 0; t * kSteps8 < n; ++t) __builtin_memset(to + t * kTile8Bytes, 0, kSteps8);
        continue;
      }
      const int64_t at = int64_t{a.view.cidx ? a.view.cidx[a.row0 + row] : a.row0 + row} * a.view.cs + q0;
      if (a.view.is_float) {
        __builtin_memcpy(values, static_cast<const float*>(a.view.base) + at, n * sizeof(float));
      } else {
        const uint16_t* from = static_cast<const uint16_t*>(a.view.base) + at;
        for (int i = 0; i < n; ++i) values[i] = from_bf16(from[i]);
      }
      for (int i = 0; i < n && a.fold != nullptr; ++i) values[i] *= folded[i];
      a.scales[row * a.groups + q0 / a.group] = quantize_group(values, n, to, a.sums + row * a.all_tiles + t0);
    }
  }
}

// 32 rows of codes (block row strip), reduction tiles [t0, t0 + tiles), as right tiles [2][kPanel8Tiles].
inline void decode8(const PackedMatrix& w, int strip, int t0, int tiles, uint8_t* panel) {
  constexpr int kQuads = kBlock / 4, kPairRow = kBlock * 2;  // of a block; bytes of one pair of all its rows
  const int blocks = min_int(2 * tiles, w.col_blocks() - 2 * t0);
  for (int b = 0; b < blocks; ++b) {
    const uint8_t* block = w.block(strip, 2 * t0 + b);
    for (int half = 0; half < kStripTiles; ++half) {
      uint8_t* to = panel + (half * kPanel8Tiles + b / 2) * kTile8Bytes + b % 2 * kQuads * 64;
      for (int i = 0; i < kQuads; ++i) {
        const uint8_t* pairs = block + 2 * i * kPairRow + half * kTileRows * 2;
        ActiveOps::store_quads(to + i * 64, pairs, pairs + kPairRow);
      }
    }
  }
}

// 32 columns of codes (block column strip), the reduction along the rows.
inline void decode8_turned(const PackedMatrix& w, int strip, int t0, int tiles, uint8_t* panel) {
  constexpr int kHalf = kPairs / 2 * kBlock * 2;  // bytes of 16 columns of a block
  const int blocks = min_int(2 * tiles, w.row_blocks() - 2 * t0);
  for (int b = 0; b < blocks; ++b)
    for (int half = 0; half < kStripTiles; ++half)
      ActiveOps::store_turned(panel + (half * kPanel8Tiles + b / 2) * kTile8Bytes + b % 2 * kHalf,
                              w.block(2 * t0 + b, strip) + half * kHalf);
}

// Reduction steps [q0, q0 + steps) of a term, with the activations that belong to them.
struct Slice8 {
  const Gemm8Term& term;
  int q0, steps;
  const int8_t* act;
  const float* scales;
  const int32_t* sums;
  int64_t q_tiles, groups;
};

// The codes that strip `strip` multiplies at q0.
inline Ahead codes_ahead8(const Gemm8Args& g, const Gemm8Term& term, int strip, int q0) {
  if (strip * kBlock >= g.nc) return {};
  const PackedMatrix& w = *term.packed;
  const int at = g.c0 / kBlock + strip, kb = q0 / kBlock, lines = w.block_bytes() / 64, blocks = (g.m + 7) / 8;
  if (q0 >= term.q) return {};
  const bool left = g.side == Side::left;
  return {left ? w.block(at, kb) : w.block(kb, at), int64_t{w.block_bytes()} * (left ? 1 : w.col_blocks()), lines,
          (lines + blocks - 1) / blocks};
}

// C (+)= the products of a slice with strips [begin, end).
inline void multiply_strips8(const Gemm8Args& g, const Slice8& s, int begin, int end, bool accumulate) {
  auto* panel = static_cast<uint8_t*>(g.scratch);
  auto* start = reinterpret_cast<int32_t*>(panel + kPanel8Bytes);
  auto* c = reinterpret_cast<float*>(reinterpret_cast<uint8_t*>(start + kMaxRows) + kRows8Bytes);
  const PackedMatrix& w = *s.term.packed;
  const int m_tiles = static_cast<int>(ceil_div(g.m, kTileRows));
  const int t0 = s.q0 / kSteps8, tiles = static_cast<int>(ceil_div(s.steps, kSteps8)), next = s.q0 + s.steps;
  for (int r = 0; !ActiveOps::kSigned8 && r < m_tiles * kTileRows; ++r) {
    int32_t sum = 0;
    for (int t = 0; t < tiles && r < g.m; ++t) sum += s.sums[r * s.q_tiles + t];
    start[r] = -128 * sum;
  }
  alignas(64) float ones[kBlock], column_scales[kBlock];
  for (float& one : ones) one = 1.0f;
  for (int strip = begin; strip < end; ++strip) {
    const int block = g.c0 / kBlock + strip;
    if (g.side == Side::left) {
      decode8(w, block, t0, tiles, panel);
      scales_of_rows(w, block * kBlock, kBlock, s.q0, column_scales);
    } else {
      decode8_turned(w, block, t0, tiles, panel);
    }
    const Ahead ahead = strip + 1 == end && next < s.term.q ? codes_ahead8(g, s.term, begin, next)
                        : strip + 1 < end                   ? codes_ahead8(g, s.term, strip + 1, s.q0)
                                                            : codes_ahead8(g, s.term, end, 0);
    ActiveOps::multiply8({s.act, s.q_tiles, panel, start, s.scales, s.groups,
                          g.side == Side::left ? column_scales : ones, accumulator(c, strip, m_tiles, 0, 0), g.m, tiles,
                          accumulate, ahead});
  }
}

// The same where each group of W's columns has scales of its own to be folded into the activations.
inline void multiply_groups8(const Gemm8Args& g, const Gemm8Term& term, int q0, int steps, bool accumulate) {
  auto* tiles = reinterpret_cast<int8_t*>(static_cast<uint8_t*>(g.scratch) + kPanel8Bytes + kMaxRows * sizeof(int32_t));
  auto* scales = reinterpret_cast<float*>(tiles + size_t{kMaxRows} * kMaxGroup8);
  auto* sums = reinterpret_cast<int32_t*>(scales + kMaxRows);
  DenseView rows = term.rows;
  rows.base = static_cast<const char*>(rows.base) + int64_t{q0} * (rows.is_float ? 4 : 2);
  const PackedMatrix fold = term.packed->block_rows(q0 / kBlock, term.packed->row_blocks());
  const int strips = static_cast<int>(ceil_div(g.nc, kBlock)), group = term.packed->group_size;
  for (int strip = 0, next; strip < strips; strip = next) {
    const int column = g.c0 + strip * kBlock;
    next = min_int(strips, strip + (group - column % group) / kBlock);
    quantize_rows({rows, 0, g.m, steps, kMaxGroup8, tiles, kPanel8Tiles, scales, sums, 1, kPanel8Tiles, &fold, column});
    multiply_strips8(g, {term, q0, steps, tiles, scales, sums, kPanel8Tiles, 1}, strip, next, accumulate);
  }
}

// C (+)= the products of a term with strips [begin, end); whether there were any.
inline bool multiply_term8(const Gemm8Args& g, const Gemm8Term& t, int begin, int end, bool accumulate) {
  const int step = g.side == Side::left ? min_int(t.group, t.packed->group_size) : t.group;
  for (int q0 = 0; q0 < t.q; q0 += step, accumulate = true) {
    const int steps = min_int(step, t.q - q0), t0 = q0 / kSteps8;
    if (t.rows.base != nullptr) {
      multiply_groups8(g, t, q0, steps, accumulate);
    } else {
      multiply_strips8(
          g,
          {t, q0, steps, t.act + int64_t{t0} * kTile8Bytes, t.scales + q0 / t.group, t.sums + t0, t.q_tiles, t.groups},
          begin, end, accumulate);
    }
  }
  return accumulate;
}

inline void gemm8(const Gemm8Args& g) {
  auto* c = reinterpret_cast<float*>(static_cast<uint8_t*>(g.scratch) + kPanel8Bytes + kMaxRows * sizeof(int32_t) +
                                     kRows8Bytes);
  const int strips = static_cast<int>(ceil_div(g.nc, kBlock));
  // Strip by strip C stays in L1; rows that are quantised here are so once for all strips.
  int together = ActiveOps::kSigned8 ? 1 : strips;
  for (int i = 0; i < g.num_terms; ++i)
    if (g.terms[i].rows.base != nullptr) together = strips;
  bool accumulate = false;
  ActiveOps::begin8();
  for (int strip = 0; strip < strips; strip += together) {
    accumulate = false;
    for (int i = 0; i < g.num_terms; ++i)
      accumulate = multiply_term8(g, g.terms[i], strip, strip + together, accumulate);
  }
  ActiveOps::end();
  if (!accumulate) __builtin_memset(c, 0, sizeof(float) * kBlock * strips * round_up(g.m, kTileRows));
  emit({Side::left, nullptr, 0, g.m, g.c0, g.nc, g.out, g.ldo, nullptr}, c);
}
