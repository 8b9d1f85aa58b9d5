// Quantise 32 rows of a weight matrix and store them in the packed block layout.
//   scale = bf16, code = clamp(rint(w / scale), -q, q) per row and group of columns; q = 127 (int8), 7 (int4)
// int8 takes max|w| / q rounded up to bf16, so that nothing is clipped; int4 takes, of nine fractions of max|w| / q,
// the one with the least squared error. kt_sft/ops/quantize.py is the oracle, bit for bit. Included inside the
// variant's namespace.
#pragma once

constexpr float kSmallestScale = 1.17549435e-38f;  // below, 1 / scale may overflow: such weights become zeros
constexpr uint32_t kInfinityBits = 0x7f800000;

inline float max_of(float a, float b) { return a > b ? a : b; }
inline float min_of(float a, float b) { return a < b ? a : b; }

// Largest |w| as bits; at least kInfinityBits if any is NaN or Inf. Bit patterns of magnitudes order like magnitudes.
inline uint32_t peak_bits(const float* w, int n) {
  uint32_t peak = 0;
  for (int i = 0; i < n; ++i) {
    const uint32_t bits = bits_of(w[i]) & 0x7fffffff;
    peak = bits > peak ? bits : peak;
  }
  return peak;
}

inline uint16_t bf16_at_least(float v) {
  const uint16_t nearest = to_bf16(v);
  return from_bf16(nearest) < v ? nearest + 1 : nearest;
}

inline void codes_of(const float* w, int n, float scale, float qmax, float* codes) {
  const float inverse = scale >= kSmallestScale ? 1.0f / scale : 0.0f;
  for (int i = 0; i < n; ++i) {
    const float rounded = (w[i] * inverse + 12582912.0f) - 12582912.0f;  // to nearest even, for magnitudes below 2^22
    codes[i] = max_of(-qmax, min_of(qmax, rounded));
  }
}

inline double squared_error(const float* w, const float* codes, int n, float scale) {
  constexpr int kLanes = 8;
  double lanes[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; ++j) {
      const double d = codes[i + j] * scale - w[i + j];
      lanes[j] += d * d;
    }
  for (; i < n; ++i) {
    const double d = codes[i] * scale - w[i];
    lanes[0] += d * d;
  }
  double sum = 0;
  for (double lane : lanes) sum += lane;
  return sum;
}

// Codes of one group into `codes`; `trial` is scratch of the same size. Returns the scale as bf16 bits.
inline uint16_t quantize_group(Format format, const float* w, int n, float peak, float* codes, float* trial) {
  const float qmax = format == Format::int8 ? 127.0f : 7.0f;
  uint16_t best = bf16_at_least(peak / qmax);
  codes_of(w, n, from_bf16(best), qmax, codes);
  if (format != Format::int4) return best;
  double least = squared_error(w, codes, n, from_bf16(best));
  constexpr float kFractions[] = {0.96 / 7, 0.92 / 7, 0.88 / 7, 0.84 / 7, 0.80 / 7, 0.76 / 7, 0.72 / 7, 0.68 / 7};
  for (const float fraction : kFractions) {
    const uint16_t scale = to_bf16(peak * fraction);
    codes_of(w, n, from_bf16(scale), qmax, trial);
    const double error = squared_error(w, trial, n, from_bf16(scale));
    if (error >= least) continue;
    least = error, best = scale;
    __builtin_memcpy(codes, trial, n * sizeof(float));
  }
  return best;
}

// Row of `cols` weights as floats, zeros up to `padded`.
inline void load_row(const QuantizeArgs& a, int row, int padded, float* out) {
  const int cols = row < a.dst->rows ? a.dst->cols : 0;
  const int64_t at = int64_t{row} * a.dst->cols;
  if (a.is_float) {
    for (int i = 0; i < cols; ++i) out[i] = static_cast<const float*>(a.weights)[at + i];
  } else {
    for (int i = 0; i < cols; ++i) out[i] = from_bf16(static_cast<const uint16_t*>(a.weights)[at + i]);
  }
  for (int i = cols; i < padded; ++i) out[i] = 0;
}

// values: [32 rows][padded], what the pairs hold. bf16 bits are 16 bits wide, codes 8.
template <class Value>
inline void store_blocks(const PackedMatrix& w, int nb, const Value* values, int padded) {
  for (int kb = 0; kb < w.col_blocks(); ++kb) {
    auto* block = const_cast<uint8_t*>(w.block(nb, kb));
    for (int p = 0; p < kPairs; ++p) {
      const Value* from = values + kb * kBlock + 2 * p;
      for (int i = 0; i < kBlock; ++i, from += padded) {
        if (w.format == Format::int4) {
          block[p * kBlock + i] = static_cast<uint8_t>((from[0] & 0xf) | (from[1] << 4));
        } else {
          __builtin_memcpy(block + (p * kBlock + i) * 2 * sizeof(Value), from, 2 * sizeof(Value));
        }
      }
    }
  }
}

// Rows [32 nb, 32 nb + 32) of the matrix. Returns false, with the blocks unspecified, if a weight is NaN or Inf.
inline bool quantize_strip(const QuantizeArgs& a) {
  const PackedMatrix& m = *a.dst;
  const int padded = m.col_blocks() * kBlock, groups = m.groups();
  auto* row = static_cast<float*>(a.scratch);  // quantize_scratch_bytes(padded)
  float *codes = row + padded, *trial = codes + padded;
  auto* narrow = reinterpret_cast<int8_t*>(trial + padded);
  auto* wide = reinterpret_cast<uint16_t*>(narrow);
  auto* scales = const_cast<uint16_t*>(m.scales) + int64_t{a.nb} * groups * kBlock;
  for (int i = 0; i < kBlock; ++i) {
    load_row(a, a.nb * kBlock + i, padded, row);
    if (m.format == Format::bf16) {
      for (int k = 0; k < padded; ++k) wide[i * padded + k] = static_cast<uint16_t>(round_bits(row[k]));
      uint32_t peak = peak_bits(row, padded);
      if (peak >= kInfinityBits || round_bits(float_of(peak)) >= 0x7f80) return false;
      continue;
    }
    for (int g = 0; g < groups; ++g) {
      const int k = g * m.group_size, n = min_int(m.group_size, padded - k);
      const uint32_t peak = peak_bits(row + k, n);
      if (peak >= kInfinityBits) return false;
      scales[g * kBlock + i] = quantize_group(m.format, row + k, n, float_of(peak), codes + k, trial);
    }
    for (int k = 0; k < padded; ++k) narrow[i * padded + k] = static_cast<int8_t>(static_cast<int32_t>(codes[k]));
  }
  if (m.format == Format::bf16) {
    store_blocks(m, a.nb, wide, padded);
  } else {
    store_blocks(m, a.nb, narrow, padded);
  }
  return true;
}
