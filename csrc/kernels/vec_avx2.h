// Vector vocabulary on AVX2: 16 x 32-bit lanes as two registers. Included inside the variant's namespace.
#pragma once

struct Vec {
  struct F32 {
    __m256 lo, hi;
  };
  struct I32 {
    __m256i lo, hi;
  };
  static constexpr int kLanes = 8;  // of one register

  static const __m256i* at(const void* p, int bytes) {
    return reinterpret_cast<const __m256i*>(static_cast<const char*>(p) + bytes);
  }
  static __m128i half(const void* p, int bytes) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at(p, bytes)));
  }
  static I32 load_i32(const void* p) { return {_mm256_loadu_si256(at(p, 0)), _mm256_loadu_si256(at(p, 32))}; }
  static I32 load_i16(const void* p) { return {_mm256_cvtepi16_epi32(half(p, 0)), _mm256_cvtepi16_epi32(half(p, 16))}; }
  static I32 load_i8(const void* p) {
    const __m128i bytes = half(p, 0);
    return {_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))};
  }
  static I32 load_u8(const void* p) {
    const __m128i bytes = half(p, 0);
    return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
  }
  static F32 load_f16(const void* p) { return {_mm256_cvtph_ps(half(p, 0)), _mm256_cvtph_ps(half(p, 16))}; }
  // By any number of bits, zeros from above.
  static I32 shift_right_by(I32 v, int n) { return {(__m256i)((__v8su)v.lo >> n), (__m256i)((__v8su)v.hi >> n)}; }
  static I32 shift_left_by(I32 v, int n) { return {(__m256i)((__v8su)v.lo << n), (__m256i)((__v8su)v.hi << n)}; }
  template <int N>
  static I32 shift_left(I32 v) {
    return {_mm256_slli_epi32(v.lo, N), _mm256_slli_epi32(v.hi, N)};
  }
  template <int N>
  static I32 shift_right(I32 v) {
    return {_mm256_srai_epi32(v.lo, N), _mm256_srai_epi32(v.hi, N)};
  }
  static I32 high_half(I32 v) {
    const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    return {_mm256_and_si256(v.lo, mask), _mm256_and_si256(v.hi, mask)};
  }
  static F32 as_f32(I32 v) { return {_mm256_castsi256_ps(v.lo), _mm256_castsi256_ps(v.hi)}; }
  static F32 to_f32(I32 v) { return {_mm256_cvtepi32_ps(v.lo), _mm256_cvtepi32_ps(v.hi)}; }
  // The lowest four bits of every lane as a signed number.
  static F32 low_nibble(I32 v) { return to_f32(shift_right<28>(shift_left<28>(v))); }
  // levels[the lowest four bits of every lane].
  static F32 look_up(I32 v, const float* levels) {
    const F32 table = load(levels);
    const auto of = [&](__m256i index) {
      return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.lo, index), _mm256_permutevar8x32_ps(table.hi, index),
                              _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));  // by the fourth bit
    };
    return {of(v.lo), of(v.hi)};
  }
  static F32 load_bf16(const uint16_t* p) { return as_f32(shift_left<16>(load_i16(p))); }
  static F32 mul(F32 a, F32 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
  static F32 add(F32 a, F32 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
  static F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
  static F32 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static F32 broadcast(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
  static F32 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void store(float* p, F32 v) { _mm256_storeu_ps(p, v.lo), _mm256_storeu_ps(p + 8, v.hi); }
  // p[0], p[1], p[0], p[1], ...
  static F32 broadcast2(const float* p) {
    double pair;
    __builtin_memcpy(&pair, p, 8);
    const __m256 pairs = _mm256_castpd_ps(_mm256_set1_pd(pair));
    return {pairs, pairs};
  }
  // Sums of neighbouring lanes: eight of a, then eight of b.
  static F32 add_pairs(F32 a, F32 b) { return {add_pairs(a.lo, a.hi), add_pairs(b.lo, b.hi)}; }
  static __m256 add_pairs(__m256 a, __m256 b) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(_mm256_hadd_ps(a, b)), 0xd8));
  }
  // Lanes 0, 0, 1, 1, ... 7, 7 and 8, 8, ... 15, 15.
  static F32 twice_low(F32 v) { return twice(v.lo); }
  static F32 twice_high(F32 v) { return twice(v.hi); }
  static F32 twice(__m256 v) {
    return {_mm256_permutevar8x32_ps(v, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3)),
            _mm256_permutevar8x32_ps(v, _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7))};
  }

  static I32 splat_i32(int v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
  static F32 sub(F32 a, F32 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
  static F32 div(F32 a, F32 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
  static F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
  static F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
  static F32 round(F32 v) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(v.lo, kNearest), _mm256_round_ps(v.hi, kNearest)};
  }
  static F32 select_less(F32 a, F32 b, F32 then, F32 otherwise) {
    return {_mm256_blendv_ps(otherwise.lo, then.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
            _mm256_blendv_ps(otherwise.hi, then.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
  }
  static I32 bits(F32 v) { return {_mm256_castps_si256(v.lo), _mm256_castps_si256(v.hi)}; }
  static I32 to_i32(F32 v) { return {_mm256_cvtps_epi32(v.lo), _mm256_cvtps_epi32(v.hi)}; }  // to nearest even
  static I32 add_i32(I32 a, I32 b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
  static I32 max_i32(I32 a, I32 b) { return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)}; }
  static I32 bit_and(I32 a, I32 b) { return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)}; }
  static I32 bit_or(I32 a, I32 b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
  // Lanes as two signed words each: products >> 16, products / 2^15 rounded, a * b summed over the two.
  static I32 mul_high16(I32 a, I32 b) { return {_mm256_mulhi_epi16(a.lo, b.lo), _mm256_mulhi_epi16(a.hi, b.hi)}; }
  static I32 mul_round16(I32 a, I32 b) { return {_mm256_mulhrs_epi16(a.lo, b.lo), _mm256_mulhrs_epi16(a.hi, b.hi)}; }
  static I32 dot16(I32 a, I32 b) { return {_mm256_madd_epi16(a.lo, b.lo), _mm256_madd_epi16(a.hi, b.hi)}; }
  static I32 splat16(int v) {
    const __m256i words = _mm256_set1_epi16(static_cast<short>(v));
    return {words, words};
  }
  static I32 min16(I32 a, I32 b) { return {_mm256_min_epi16(a.lo, b.lo), _mm256_min_epi16(a.hi, b.hi)}; }
  static I32 max16(I32 a, I32 b) { return {_mm256_max_epi16(a.lo, b.lo), _mm256_max_epi16(a.hi, b.hi)}; }
  // v, one more where a >= b.
  static I32 count_reached16(I32 v, I32 a, I32 b) {
    const auto of = [](__m256i v, __m256i a, __m256i b) {
      return _mm256_add_epi16(_mm256_add_epi16(v, _mm256_set1_epi16(1)), _mm256_cmpgt_epi16(b, a));
    };
    return {of(v.lo, a.lo, b.lo), of(v.hi, a.hi, b.hi)};
  }
  // table[the lowest four bits of every word]: the low bytes and the high ones are looked up apart.
  static I32 look_up16(I32 v, const int16_t* table) {
    const __m256i words = _mm256_load_si256(reinterpret_cast<const __m256i*>(table)), byte = _mm256_set1_epi16(0xff);
    const auto bytes = [](__m256i w) {  // of 16 words below 256, in both halves
      const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi16(w, w), 0xd8);
      return _mm256_permute2x128_si256(packed, packed, 0);
    };
    const __m256i low = bytes(_mm256_and_si256(words, byte)), high = bytes(_mm256_srli_epi16(words, 8));
    const auto of = [&](__m256i v) {
      const __m256i index = _mm256_and_si256(v, _mm256_set1_epi16(15));
      const __m256i both = _mm256_or_si256(index, _mm256_slli_epi16(index, 8));
      return _mm256_blendv_epi8(_mm256_shuffle_epi8(high, both), _mm256_shuffle_epi8(low, both), byte);
    };
    return {of(v.lo), of(v.hi)};
  }
  static void store_i32(void* p, I32 v) {
    auto* out = static_cast<__m256i*>(p);
    _mm256_storeu_si256(out, v.lo), _mm256_storeu_si256(out + 1, v.hi);
  }
  // The low 16 bits of each lane, in order.
  static __m256i low16(I32 v) {
    const __m256i mask = _mm256_set1_epi32(0xffff);
    const __m256i mixed = _mm256_packus_epi32(_mm256_and_si256(v.lo, mask), _mm256_and_si256(v.hi, mask));
    return _mm256_permute4x64_epi64(mixed, 0xd8);  // packing works within 128-bit halves
  }
  static void store_low16(void* p, I32 v) { _mm256_storeu_si256(static_cast<__m256i*>(p), low16(v)); }

  static __m256i round_half(__m256 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  }
  static I32 round_bf16(F32 v) { return high_half({round_half(v.lo), round_half(v.hi)}); }
};

// 16 x 16 transpose of 32-bit words, rows given by pointer, result contiguous: out[j * 16 + i] = rows[i][j].
inline void transpose16(const uint32_t* const* rows, uint32_t* out) {
  for (int i0 = 0; i0 < 16; i0 += 8) {
    for (int j0 = 0; j0 < 16; j0 += 8) {
      __m256 a[8], b[8];
      for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(rows[i0 + i] + j0));
      for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
      }
      for (int i = 0; i < 8; i += 4) {
        a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
        a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
        a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
        a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
      }
      for (int c = 0; c < 4; ++c) {
        float* low = reinterpret_cast<float*>(out + (j0 + c) * 16 + i0);
        float* high = reinterpret_cast<float*>(out + (j0 + 4 + c) * 16 + i0);
        _mm256_storeu_ps(low, _mm256_permute2f128_ps(a[c], a[4 + c], 0x20));
        _mm256_storeu_ps(high, _mm256_permute2f128_ps(a[c], a[4 + c], 0x31));
      }
    }
  }
}
