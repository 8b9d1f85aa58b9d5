// The scale of a group of int4 weights: the one with the least squared error, of nine.
// In units of the scale s that gives the largest |w| the lowest level, -127, each trial t assigns levels and is judged
// by the scale that fits them best:
//   x = w / s     q(t) = the level nearest to x / t     d = sum q x     n = sum q^2     scale(t) = bf16(s d / n)
//   gain(t) = sum x^2 - sum (x - f q)^2 = f (2 d - f n),   f = scale(t) / s
// The tenth candidate is s itself with the levels of t = 1, so that plain scaling never wins but by the rounding of x.
// x is a 16-bit fixed-point number, two columns to a lane, and the sums are whole numbers: exact, in whatever order.
// They become fp32 once per 32 columns, added block by block. kt_sft/ops/quantize.py is the oracle, bit for bit.
// Included inside the variant's namespace.
#pragma once

constexpr float kSmallestScale = 1.17549435e-38f;  // below, 1 / scale may overflow: such weights become zeros

struct Scale {
  Vec::F32 value, inverse;
};

inline Vec::F32 magnitude(Vec::F32 v) { return Vec::as_f32(Vec::bit_and(Vec::bits(v), Vec::splat_i32(0x7fffffff))); }

inline Scale with_inverse(Vec::F32 value) {
  const auto size = magnitude(value), smallest = Vec::broadcast(kSmallestScale);
  const auto inverse = Vec::div(Vec::broadcast(1.0f), value);
  return {value, Vec::select_less(size, smallest, Vec::zero(), inverse)};
}

// By the number of a cell, 16 around zero: its midpoint, times 128, and the level below.
struct LevelTables {
  static constexpr int kUnit = 128;
  alignas(32) int16_t midpoints[16]{}, levels[16]{};
  constexpr LevelTables() {
    for (int i = 0; i < 16; ++i) {
      midpoints[(i + 8) % 16] = static_cast<int16_t>(kLevelCells.midpoints[i] * kUnit);
      levels[(i + 8) % 16] = static_cast<int16_t>(Iq4NlLevels::kLevels[i]);
    }
  }
};
constexpr LevelTables kLevelTables;

struct LevelSearch {
  static constexpr int kTogether = 3, kTrials = 9;  // at a time as many as registers hold the sums of
  // Chosen so that Gaussian, Laplacian and uniform weights lose least; below zero the peak gets a level above zero.
  static constexpr double kSizes[kTrials] = {1, 0.80, 0.88, 0.94, 0.98, 1.04, 1.16, -1.04, -1.12};
  static constexpr float kOne = 256;  // of x: |x| <= 127 (1 + 2^-8)

  static constexpr int inverse_of(double size) {  // times 2^14: rounded products are x / t in units of 1 / kUnit
    return static_cast<int>((1 << 14) / size + (size < 0 ? -0.5 : 0.5));
  }

  Scale plain;
  Vec::F32 products[kTrials], squares[kTrials];

  // Per row the largest |w| and the largest w, which tell the sign of the peak.
  void start(Vec::F32 peak, Vec::F32 highest) {
    const auto size = Vec::as_f32(Vec::round_bf16(Vec::div(peak, Vec::broadcast(127))));
    const auto sign = Vec::select_less(highest, peak, Vec::broadcast(1.0f), Vec::broadcast(-1.0f));
    plain = with_inverse(Vec::mul(size, sign));
    for (int i = 0; i < kTrials; ++i) products[i] = squares[i] = Vec::zero();
  }

  // `columns` of the 32 belong to the matrix; the others hold zeros, whose level is 1.
  void add(const float (*w)[kTileRows], int columns) {
    alignas(64) int32_t x[kPairs][kTileRows];
    const auto fixed = [&](int k) {
      return Vec::to_i32(Vec::mul(Vec::mul(Vec::load(w[k]), plain.inverse), Vec::broadcast(kOne)));
    };
    for (int p = 0; p < kPairs; ++p)
      Vec::store_i32(x[p], Vec::bit_or(Vec::bit_and(fixed(2 * p), Vec::splat_i32(0xffff)),
                                       Vec::template shift_left<16>(fixed(2 * p + 1))));
    for (int i = 0; i < kTrials; i += kTogether) {
      Vec::I32 product[kTogether], square[kTogether];
      for (int j = 0; j < kTogether; ++j) product[j] = Vec::splat_i32(0), square[j] = Vec::splat_i32(columns - kBlock);
      for (int p = 0; p < kPairs; ++p) {
        const auto pair = Vec::load_i32(x[p]);
#pragma GCC unroll 3
        for (int j = 0; j < kTogether; ++j) {
          const auto level = nearest(Vec::mul_round16(pair, Vec::splat16(inverse_of(kSizes[i + j]))));
          product[j] = Vec::add_i32(product[j], Vec::dot16(level, pair));
          square[j] = Vec::add_i32(square[j], Vec::dot16(level, level));
        }
      }
      for (int j = 0; j < kTogether; ++j) {
        products[i + j] = Vec::add(products[i + j], Vec::to_f32(product[j]));
        squares[i + j] = Vec::add(squares[i + j], Vec::to_f32(square[j]));
      }
    }
  }

  static Vec::I32 nearest(Vec::I32 exact) {
    constexpr int kLast = LevelCells::kLast * LevelTables::kUnit, kFirst = LevelCells::kFirst * LevelTables::kUnit;
    const auto within = Vec::max16(Vec::min16(exact, Vec::splat16(kLast)), Vec::splat16(kFirst));
    const auto cell = Vec::mul_high16(within, Vec::splat16(LevelCells::kCells));
    const auto code = Vec::count_reached16(cell, exact, Vec::look_up16(cell, kLevelTables.midpoints));
    return Vec::look_up16(code, kLevelTables.levels);
  }

  // The candidate with the most gain, the first of equals. A scale below kSmallestScale is zero.
  Scale best() const {
    const auto gain = [&](int i, Vec::F32 fit) {
      const auto twice = Vec::add(products[i], products[i]);
      return Vec::mul(fit, Vec::sub(twice, Vec::mul(fit, squares[i])));
    };
    Vec::F32 value = plain.value, most = gain(0, Vec::broadcast(kOne));
    for (int i = 0; i < kTrials; ++i) {
      const auto fit = Vec::mul(Vec::div(products[i], squares[i]), Vec::broadcast(1 / kOne));
      const auto scale = Vec::as_f32(Vec::round_bf16(Vec::mul(plain.value, fit)));
      const auto found = gain(i, Vec::mul(Vec::mul(scale, plain.inverse), Vec::broadcast(kOne)));
      value = Vec::select_less(most, found, scale, value);
      most = Vec::select_less(most, found, found, most);
    }
    const auto tiny = Vec::broadcast(kSmallestScale);
    return with_inverse(Vec::select_less(magnitude(value), tiny, Vec::zero(), value));
  }
};
