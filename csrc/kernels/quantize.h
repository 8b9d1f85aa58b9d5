// Quantise 32 rows of a weight matrix and store them in the packed block layout.
//   scale = bf16, code = the one nearest to w / scale, per row and group of columns
// int8 (-127 to 127) takes max|w| / 127 rounded up to bf16, so that nothing is clipped; int4 (16 uneven levels, see
// Iq4NlLevels) the scale of either sign that level_search.h finds. kt_sft/ops/quantize.py is the oracle, bit for bit.
// Rows are lanes: a block of 32 x 32 weights is turned once, after which every step treats 16 rows alike and the codes
// leave in the order of the block. Included inside the variant's namespace.
#pragma once

constexpr int kInfinityBits = 0x7f800000, kMagnitude = 0x7fffffff;
constexpr int kAhead = 8;  // blocks between the prefetch of a source line and its use: 32 rows of 64 bytes per block

// 32 columns of 32 rows: [half][column][16 rows].
struct WeightTile {
  alignas(64) float w[kStripTiles][kBlock][kTileRows];
};

// ---- reading the source
// ----------------------------------------------------------------------------------------------

// Pointers to 32 columns of 16 rows, from (row0, col0); what the matrix lacks is zeros in `edge` ([16][32]).
template <class Src>
inline void source_rows(const QuantizeArgs& a, int row0, int col0, Src* edge, const Src** rows) {
  const PackedMatrix& m = *a.dst;
  const int count = min_int(kBlock, m.cols - col0);
  for (int i = 0; i < kTileRows; ++i) {
    const Src* from = static_cast<const Src*>(a.weights) + int64_t{row0 + i} * m.cols + col0;
    if (row0 + i < m.rows && count == kBlock) {
      rows[i] = from;
      const int64_t ahead = int64_t{kAhead} * kBlock;
      if (col0 + ahead < m.cols) __builtin_prefetch(from + ahead);
      continue;
    }
    rows[i] = edge + i * kBlock;
    for (int k = 0; k < kBlock; ++k) edge[i * kBlock + k] = row0 + i < m.rows && k < count ? from[k] : Src{0};
  }
}

// 16 rows of 32 bf16 weights -> 16 x 16 words: pair p of row i at [p][i], as bf16 blocks store them.
inline void turn_pairs(const uint16_t* const* rows, uint32_t* pairs) {
  const uint32_t* words[kTileRows];
  for (int i = 0; i < kTileRows; ++i) words[i] = reinterpret_cast<const uint32_t*>(rows[i]);
  transpose16(words, pairs);
}

inline void load_tile(const QuantizeArgs& a, int kb, WeightTile& tile) {
  for (int half = 0; half < kStripTiles; ++half) {
    const int row0 = a.nb * kBlock + half * kTileRows;
    float* out = tile.w[half][0];
    if (a.is_float) {
      alignas(64) float edge[kTileRows * kBlock];
      const float* rows[kTileRows];
      source_rows(a, row0, kb * kBlock, edge, rows);
      for (int k = 0; k < kBlock; k += 16) {
        const uint32_t* words[kTileRows];
        for (int i = 0; i < kTileRows; ++i) words[i] = reinterpret_cast<const uint32_t*>(rows[i] + k);
        transpose16(words, reinterpret_cast<uint32_t*>(out + k * kTileRows));
      }
      continue;
    }
    alignas(64) uint16_t edge[kTileRows * kBlock];
    alignas(64) uint32_t pairs[kPairs * kTileRows];
    const uint16_t* rows[kTileRows];
    source_rows(a, row0, kb * kBlock, edge, rows);
    turn_pairs(rows, pairs);
    for (int p = 0; p < kPairs; ++p, out += 2 * kTileRows) {
      const auto words = Vec::load_i32(pairs + p * kTileRows);
      Vec::store(out, Vec::as_f32(Vec::shift_left<16>(words)));
      Vec::store(out + kTileRows, Vec::as_f32(Vec::high_half(words)));
    }
  }
}

// ---- scales and codes of 16 rows
// --------------------------------------------------------------------------------------

inline Scale bf16_at_least(Vec::F32 v) {
  const auto bits = Vec::round_bf16(v);
  const auto nearest = Vec::as_f32(bits), above = Vec::as_f32(Vec::add_i32(bits, Vec::splat_i32(0x10000)));
  return with_inverse(Vec::select_less(nearest, v, above, nearest));
}

// Largest |w| per row as bits: those of magnitudes order like magnitudes, with Inf and NaN at the top.
inline Vec::I32 peak_bits(const float (*w)[kTileRows], Vec::I32 peak) {
  for (int k = 0; k < kBlock; ++k) peak = Vec::max_i32(peak, Vec::bits(magnitude(Vec::load(w[k]))));
  return peak;
}

inline Vec::F32 highest_of(const float (*w)[kTileRows], Vec::F32 highest) {
  for (int k = 0; k < kBlock; ++k) highest = Vec::max(highest, Vec::load(w[k]));
  return highest;
}

inline Scale scale_of_peak(Vec::I32 peak) { return bf16_at_least(Vec::div(Vec::as_f32(peak), Vec::broadcast(127))); }

inline void store_scale(const Scale& scale, uint16_t* to) {
  Vec::store_low16(to, Vec::shift_right<16>(Vec::bits(scale.value)));
}

// ---- 32 rows
// ----------------------------------------------------------------------------------------------------------

inline bool all_finite(Vec::I32 peak) {
  alignas(64) int lanes[kTileRows];
  Vec::store_i32(lanes, peak);
  for (const int lane : lanes)
    if (lane >= kInfinityBits) return false;
  return true;
}

// Block columns [kb0, kb1), one scale per row.
template <class Codes>
inline bool quantize_group(const QuantizeArgs& a, int kb0, int kb1, uint16_t* scales) {
  WeightTile tile;
  const auto each_block = [&](auto&& visit) {
    for (int kb = kb0; kb < kb1; ++kb) {
      if (kb1 - kb0 > 1) load_tile(a, kb, tile);
      for (int half = 0; half < kStripTiles; ++half) visit(kb, half, tile.w[half]);
    }
  };
  if (kb1 - kb0 == 1) load_tile(a, kb0, tile);
  Vec::I32 peak[kStripTiles] = {Vec::splat_i32(0), Vec::splat_i32(0)};
  const auto lowest = Vec::broadcast(float_of(0xff800000u));  // -Inf
  Vec::F32 highest[kStripTiles] = {lowest, lowest};
  each_block([&](int, int half, auto w) {
    peak[half] = peak_bits(w, peak[half]);
    if (Codes::kSearchesScale) highest[half] = highest_of(w, highest[half]);
  });
  Scale scale[kStripTiles];
  for (int half = 0; half < kStripTiles; ++half) {
    if (!all_finite(peak[half])) return false;
    if constexpr (!Codes::kSearchesScale) scale[half] = scale_of_peak(peak[half]);
  }
  if constexpr (Codes::kSearchesScale) {
    LevelSearch search[kStripTiles];
    for (int half = 0; half < kStripTiles; ++half) search[half].start(Vec::as_f32(peak[half]), highest[half]);
    each_block([&](int kb, int half, auto w) { search[half].add(w, min_int(kBlock, a.dst->cols - kb * kBlock)); });
    for (int half = 0; half < kStripTiles; ++half) scale[half] = search[half].best();
  }
  each_block([&](int kb, int half, auto w) {
    const auto code = [&](int k) { return Codes::nearest(Vec::mul(Vec::load(w[k]), scale[half].inverse)); };
    auto* to = const_cast<uint8_t*>(a.dst->block(a.nb, kb)) + half * kTileRows * Codes::kRowBytes;
    for (int p = 0; p < kPairs; ++p) Codes::encode(code(2 * p), code(2 * p + 1), to, p);
  });
  for (int half = 0; half < kStripTiles; ++half) store_scale(scale[half], scales + half * kTileRows);
  return true;
}

// The peaks of 16 rows of bf16 weights over columns [col0, col1), read as they lie: no tile is turned for them. Words
// are ordered by their upper halves, whatever the lower ones are.
inline Vec::I32 peak_bits_of_rows(const QuantizeArgs& a, int row0, int col0, int col1) {
  const PackedMatrix& m = *a.dst;
  alignas(64) int peaks[kTileRows] = {}, lanes[kTileRows];
  const auto magnitude_bits = Vec::splat_i32(kMagnitude);
  for (int i = 0; i < min_int(kTileRows, m.rows - row0); ++i) {
    const auto* row = static_cast<const uint16_t*>(a.weights) + int64_t{row0 + i} * m.cols;
    auto even = Vec::splat_i32(0), odd = even;
    int k = col0;
    for (; k + kBlock <= col1; k += kBlock) {
      const auto words = Vec::load_i32(row + k);
      even = Vec::max_i32(even, Vec::bit_and(Vec::shift_left<16>(words), magnitude_bits));
      odd = Vec::max_i32(odd, Vec::bit_and(words, magnitude_bits));
    }
    Vec::store_i32(lanes, Vec::max_i32(even, odd));
    for (; k < col1; ++k) peaks[i] = max_int(peaks[i], (row[k] << 16) & kMagnitude);
    for (const int lane : lanes) peaks[i] = max_int(peaks[i], lane & ~0xffff);
  }
  return Vec::load_i32(peaks);
}

// As quantize_group, of bf16 weights and codes whose scale is the peak's, where a group has several blocks.
template <class Codes>
inline bool quantize_rows(const QuantizeArgs& a, int kb0, int kb1, uint16_t* scales) {
  for (int half = 0; half < kStripTiles; ++half) {
    const int row0 = a.nb * kBlock + half * kTileRows;
    const auto peak = peak_bits_of_rows(a, row0, kb0 * kBlock, min_int(kb1 * kBlock, a.dst->cols));
    if (!all_finite(peak)) return false;
    const auto scale = scale_of_peak(peak);
    store_scale(scale, scales + half * kTileRows);
    for (int kb = kb0; kb < kb1; ++kb) {
      alignas(64) uint16_t edge[kTileRows * kBlock];
      alignas(64) uint32_t pairs[kPairs * kTileRows];
      const uint16_t* rows[kTileRows];
      source_rows(a, row0, kb * kBlock, edge, rows);
      turn_pairs(rows, pairs);
      auto* to = const_cast<uint8_t*>(a.dst->block(a.nb, kb)) + half * kTileRows * Codes::kRowBytes;
      for (int p = 0; p < kPairs; ++p) {
        const auto words = Vec::load_i32(pairs + p * kTileRows);
        const auto even = Vec::as_f32(Vec::shift_left<16>(words)), odd = Vec::as_f32(Vec::high_half(words));
        const auto code = [&](Vec::F32 w) { return Codes::nearest(Vec::mul(w, scale.inverse)); };
        Codes::encode(code(even), code(odd), to, p);
      }
    }
  }
  return true;
}

template <class Codes>
inline bool quantize_strip_as(const QuantizeArgs& a) {
  const PackedMatrix& m = *a.dst;
  const int group_blocks = m.group_size / kBlock;
  for (int kb = 0; kb < m.col_blocks(); kb += group_blocks) {
    auto* scales = reinterpret_cast<uint16_t*>(const_cast<uint8_t*>(m.plane_at(0, a.nb, kb)));
    const int end = min_int(kb + group_blocks, m.col_blocks());
    if constexpr (!Codes::kSearchesScale) {
      if (!a.is_float && end - kb > 1) {
        if (!quantize_rows<Codes>(a, kb, end, scales)) return false;
        continue;
      }
    }
    if (!quantize_group<Codes>(a, kb, end, scales)) return false;
  }
  return true;
}

// bf16 weights are their own codes.
template <>
inline bool quantize_strip_as<Bf16>(const QuantizeArgs& a) {
  const PackedMatrix& m = *a.dst;
  alignas(64) float edge_f32[kTileRows * kBlock];
  alignas(64) uint16_t edge[kTileRows * kBlock];
  auto peak = Vec::splat_i32(0);
  for (int kb = 0; kb < m.col_blocks(); ++kb) {
    for (int half = 0; half < kStripTiles; ++half) {
      const uint16_t* rows[kTileRows];
      const int row0 = a.nb * kBlock + half * kTileRows;
      if (a.is_float) {
        const float* wide[kTileRows];
        source_rows(a, row0, kb * kBlock, edge_f32, wide);
        for (int i = 0; i < kTileRows; ++i) {
          rows[i] = edge + i * kBlock;
          for (int k = 0; k < kBlock; ++k) edge[i * kBlock + k] = to_bf16(wide[i][k]);
        }
      } else {
        source_rows(a, row0, kb * kBlock, edge, rows);
      }
      alignas(64) uint32_t pairs[kPairs * kTileRows];
      turn_pairs(rows, pairs);
      auto* block = const_cast<uint8_t*>(m.block(a.nb, kb)) + half * kTileRows * 4;
      for (int p = 0; p < kPairs; ++p) {
        const auto words = Vec::load_i32(pairs + p * kTileRows);
        peak = Vec::max_i32(peak, Vec::bits(magnitude(Vec::as_f32(Vec::shift_left<16>(words)))));
        peak = Vec::max_i32(peak, Vec::bits(magnitude(Vec::as_f32(words))));
        Vec::store_i32(block + p * kBlock * 4, words);
      }
    }
  }
  return all_finite(peak);
}

inline bool quantize_strip(const QuantizeArgs& a) {
  switch (a.dst->format) {
    case kt_sft::Format::bf16:
      return quantize_strip_as<Bf16>(a);
    case kt_sft::Format::int8:
      return quantize_strip_as<Int8>(a);
    case kt_sft::Format::int4:
      return quantize_strip_as<Iq4Nl>(a);
    default:
      return false;  // refused by the caller
  }
}
