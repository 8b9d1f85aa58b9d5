// Quantise 32 rows of a weight matrix and store them in the packed block layout.
//   scale = bf16, code = clamp(rint(w / scale), least, most) per row and group of columns
// int8 (-127 to 127) takes max|w| / 127 rounded up to bf16, so that nothing is clipped. int4 (-8 to 7) gives the scale
// the sign that makes the code of the largest |w| negative, where there is one code more, and takes the size, of nine,
// with the least squared error: sum of (code - w / scale)^2, times scale^2, in fp32, added column by column within 32
// columns, then block by block. kt_sft/ops/quantize.py is the oracle, bit for bit.
// Rows are lanes: a block of 32 x 32 weights is turned once, after which every step treats 16 rows alike and the codes
// leave in the order of the block. Included inside the variant's namespace.
#pragma once

constexpr float kSmallestScale = 1.17549435e-38f;  // below, 1 / scale may overflow: such weights become zeros
constexpr int kInfinityBits = 0x7f800000;
constexpr int kMagnitudeBits = 0x7fffffff;
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

struct Scale {
  Vec::F32 value, inverse;
};

inline Scale with_inverse(Vec::F32 value) {
  const auto inverse = Vec::div(Vec::broadcast(1.0f), value);
  return {value, Vec::select_less(value, Vec::broadcast(kSmallestScale), Vec::zero(), inverse)};
}

inline Scale bf16_at_least(Vec::F32 v) {
  const auto bits = Vec::round_bf16(v);
  const auto nearest = Vec::as_f32(bits), above = Vec::as_f32(Vec::add_i32(bits, Vec::splat_i32(0x10000)));
  return with_inverse(Vec::select_less(nearest, v, above, nearest));
}

inline Vec::F32 magnitude(Vec::F32 v) {
  return Vec::as_f32(Vec::bit_and(Vec::bits(v), Vec::splat_i32(kMagnitudeBits)));
}

// Largest |w| per row as bits: those of magnitudes order like magnitudes, with Inf and NaN at the top.
inline Vec::I32 peak_bits(const float (*w)[kTileRows], Vec::I32 peak) {
  for (int k = 0; k < kBlock; ++k) peak = Vec::max_i32(peak, Vec::bits(magnitude(Vec::load(w[k]))));
  return peak;
}

// The scales that are tried, three at a time: as many accumulators as registers allow.
constexpr int kTogether = 3, kTrials = 9;
// Of max|w|; the first is rounded up, so that weights of seven equal steps up and down stay exact.
constexpr float kFractions[kTrials] = {1.0 / 7,  1.04 / 8, 1.00 / 8, 0.95 / 8, 0.90 / 8,
                                       0.85 / 8, 0.80 / 8, 0.75 / 8, 0.70 / 8};

struct Trials {
  Scale scale[kTrials];
  Vec::F32 error[kTrials];  // in units of scale^2
};

// highest: max w per row. Where it is the peak, scales are negative.
inline void start_trials(Vec::F32 peak, Vec::F32 highest, const Scale& first, Trials& t) {
  const auto sign = Vec::select_less(highest, peak, Vec::broadcast(1.0f), Vec::broadcast(-1.0f));
  for (int i = 0; i < kTrials; ++i) {
    const Scale s =
        i == 0 ? first : with_inverse(Vec::as_f32(Vec::round_bf16(Vec::mul(peak, Vec::broadcast(kFractions[i])))));
    t.scale[i] = {Vec::mul(s.value, sign), Vec::mul(s.inverse, sign)};
    t.error[i] = Vec::zero();
  }
}

inline Vec::F32 highest_of(const float (*w)[kTileRows], Vec::F32 highest) {
  for (int k = 0; k < kBlock; ++k) highest = Vec::max(highest, Vec::load(w[k]));
  return highest;
}

// Adds the squared errors of 32 columns.
template <class Codes>
inline void add_errors(const float (*w)[kTileRows], Trials& t) {
  const auto least = Vec::broadcast(Codes::kLeastCode), most = Vec::broadcast(Codes::kLargestCode);
  for (int i = 0; i < kTrials; i += kTogether) {
    Vec::F32 sum[kTogether];
    for (auto& s : sum) s = Vec::zero();
    for (int k = 0; k < kBlock; ++k) {
      const auto weight = Vec::load(w[k]);
#pragma GCC unroll 3
      for (int j = 0; j < kTogether; ++j) {
        const auto exact = Vec::mul(weight, t.scale[i + j].inverse);
        const auto d = Vec::sub(Vec::max(Vec::min(Vec::round(exact), most), least), exact);
        sum[j] = Vec::add(sum[j], Vec::mul(d, d));
      }
    }
    for (int j = 0; j < kTogether; ++j) t.error[i + j] = Vec::add(t.error[i + j], sum[j]);
  }
}

// The trial with the least error, the first of equals.
inline Scale best_trial(const Trials& t) {
  Scale best = t.scale[0];
  Vec::F32 least = Vec::mul(Vec::mul(t.error[0], best.value), best.value);
  for (int i = 1; i < kTrials; ++i) {
    const Scale& s = t.scale[i];
    const auto error = Vec::mul(Vec::mul(t.error[i], s.value), s.value);
    best.value = Vec::select_less(error, least, s.value, best.value);
    best.inverse = Vec::select_less(error, least, s.inverse, best.inverse);
    least = Vec::select_less(error, least, error, least);
  }
  return best;
}

template <class Codes>
inline Vec::I32 code(const float* w, Vec::F32 inverse) {
  const auto exact = Vec::mul(Vec::load(w), inverse);
  return Vec::to_i32(Vec::max(Vec::min(exact, Vec::broadcast(Codes::kLargestCode)), Vec::broadcast(Codes::kLeastCode)));
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
  Trials trials[kStripTiles];
  for (int half = 0; half < kStripTiles; ++half) {
    if (!all_finite(peak[half])) return false;
    scale[half] = bf16_at_least(Vec::div(Vec::as_f32(peak[half]), Vec::broadcast(Codes::kLargestCode)));
    if (Codes::kSearchesScale) start_trials(Vec::as_f32(peak[half]), highest[half], scale[half], trials[half]);
  }
  if (Codes::kSearchesScale) {
    each_block([&](int, int half, auto w) { add_errors<Codes>(w, trials[half]); });
    for (int half = 0; half < kStripTiles; ++half) scale[half] = best_trial(trials[half]);
  }
  each_block([&](int kb, int half, auto w) {
    auto* pairs = const_cast<uint8_t*>(a.dst->block(a.nb, kb)) + half * kTileRows * Codes::kPairBytes;
    for (int k = 0; k < kBlock; k += 2, pairs += kBlock * Codes::kPairBytes)
      Codes::encode(code<Codes>(w[k], scale[half].inverse), code<Codes>(w[k + 1], scale[half].inverse), pairs);
  });
  for (int half = 0; half < kStripTiles; ++half)
    Vec::store_low16(scales + half * kTileRows, Vec::shift_right<16>(Vec::bits(scale[half].value)));
  return true;
}

template <class Codes>
inline bool quantize_strip_as(const QuantizeArgs& a) {
  const PackedMatrix& m = *a.dst;
  const int group_blocks = m.group_size / kBlock;
  auto* scales = reinterpret_cast<uint16_t*>(const_cast<uint8_t*>(m.scale_plane(0, a.nb)));
  for (int kb = 0; kb < m.col_blocks(); kb += group_blocks, scales += kBlock)
    if (!quantize_group<Codes>(a, kb, min_int(kb + group_blocks, m.col_blocks()), scales)) return false;
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
      return quantize_strip_as<Int4>(a);
    default:
      return false;  // refused by the caller
  }
}
