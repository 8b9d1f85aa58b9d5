// Vector vocabulary on AVX512 F/BW/DQ/VL: 16 x 32-bit lanes. Included inside the variant's namespace.
#pragma once

struct Vec {
  using F32 = __m512;
  using I32 = __m512i;
  static constexpr int kLanes = 16;

  static I32 load_i32(const void* p) { return _mm512_loadu_si512(p); }
  static I32 load_i16(const void* p) {
    return _mm512_cvtepi16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
  }
  static I32 load_i8(const void* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
  static I32 load_u8(const void* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
  static F32 load_f16(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
  // By any number of bits, zeros from above.
  static I32 shift_right_by(I32 v, int n) { return (I32)((__v16su)v >> n); }
  static I32 shift_left_by(I32 v, int n) { return (I32)((__v16su)v << n); }
  template <int N>
  static I32 shift_left(I32 v) {
    return _mm512_slli_epi32(v, N);
  }
  template <int N>
  static I32 shift_right(I32 v) {
    return _mm512_srai_epi32(v, N);
  }
  static I32 high_half(I32 v) { return _mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(0xffff0000u))); }
  static F32 as_f32(I32 v) { return _mm512_castsi512_ps(v); }
  static F32 to_f32(I32 v) { return _mm512_cvtepi32_ps(v); }
  // The lowest four bits of every lane as a signed number.
  static F32 low_nibble(I32 v) {
    return _mm512_permutexvar_ps(v, _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1));
  }
  // levels[the lowest four bits of every lane].
  static F32 look_up(I32 v, const float* levels) { return _mm512_permutexvar_ps(v, load(levels)); }
  // Lanes 0, 0, 1, 1, ... 7, 7 and 8, 8, ... 15, 15.
  static F32 twice_low(F32 v) {
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7), v);
  }
  static F32 twice_high(F32 v) {
    return _mm512_permutexvar_ps(_mm512_setr_epi32(8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15), v);
  }
  static F32 load_bf16(const uint16_t* p) { return as_f32(shift_left<16>(load_i16(p))); }
  static F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
  static F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
  static F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
  static F32 zero() { return _mm512_setzero_ps(); }
  static F32 broadcast(float v) { return _mm512_set1_ps(v); }
  static F32 load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F32 v) { _mm512_storeu_ps(p, v); }
  // p[0], p[1], p[0], p[1], ...
  static F32 broadcast2(const float* p) {
    double pair;
    __builtin_memcpy(&pair, p, 8);
    return _mm512_castpd_ps(_mm512_set1_pd(pair));
  }
  // Sums of neighbouring lanes: eight of a, then eight of b.
  static F32 add_pairs(F32 a, F32 b) {
    const I32 even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const I32 odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return _mm512_add_ps(_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b));
  }

  static I32 splat_i32(int v) { return _mm512_set1_epi32(v); }
  static F32 sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
  static F32 div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
  static F32 min(F32 a, F32 b) { return _mm512_min_ps(a, b); }
  static F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
  static F32 round(F32 v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F32 select_less(F32 a, F32 b, F32 then, F32 otherwise) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), otherwise, then);
  }
  static I32 bits(F32 v) { return _mm512_castps_si512(v); }
  static I32 to_i32(F32 v) { return _mm512_cvtps_epi32(v); }  // to nearest even
  static I32 add_i32(I32 a, I32 b) { return _mm512_add_epi32(a, b); }
  static I32 max_i32(I32 a, I32 b) { return _mm512_max_epi32(a, b); }
  static I32 bit_and(I32 a, I32 b) { return _mm512_and_si512(a, b); }
  static I32 bit_or(I32 a, I32 b) { return _mm512_or_si512(a, b); }
  static void store_i32(void* p, I32 v) { _mm512_storeu_si512(p, v); }

  // Lanes as two signed words each: products >> 16, products / 2^15 rounded, a * b summed over the two.
  static I32 mul_high16(I32 a, I32 b) { return _mm512_mulhi_epi16(a, b); }
  static I32 mul_round16(I32 a, I32 b) { return _mm512_mulhrs_epi16(a, b); }
  static I32 dot16(I32 a, I32 b) { return _mm512_madd_epi16(a, b); }
  static I32 splat16(int v) { return _mm512_set1_epi16(static_cast<short>(v)); }
  static I32 min16(I32 a, I32 b) { return _mm512_min_epi16(a, b); }
  static I32 max16(I32 a, I32 b) { return _mm512_max_epi16(a, b); }
  // v, one more where a >= b.
  static I32 count_reached16(I32 v, I32 a, I32 b) {
    return _mm512_mask_add_epi16(v, _mm512_cmpge_epi16_mask(a, b), v, splat16(1));
  }
  // table[the lowest four bits of every word].
  static I32 look_up16(I32 v, const int16_t* table) {
    return _mm512_permutexvar_epi16(v,
                                    _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(table))));
  }
  static void store_low16(void* p, I32 v) { _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(v)); }

#ifdef __AVX512VNNI__
  // 32 signed bytes as words.
  static I32 widen8(const void* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
  // table[the lowest six bits of every byte].
  static I32 look_up6(I32 v, const uint8_t* table) { return _mm512_permutexvar_epi8(v, load_i32(table)); }
  // The low words of all lanes, those of b above those of a.
  static I32 low_words(I32 a, I32 b) { return _mm512_mask_mov_epi16(a, 0xaaaaaaaa, shift_left<16>(b)); }
  // Words w of up to 32639 as 256 high + low, both signed bytes: of eight words, the high bytes of words 0 4 1 5, the
  // low ones, then those of words 2 6 3 7.
  static I32 byte_quads(I32 v) {
    const I32 order = _mm512_broadcast_i32x4(_mm_setr_epi8(1, 9, 3, 11, 0, 8, 2, 10, 5, 13, 7, 15, 4, 12, 6, 14));
    return _mm512_shuffle_epi8(bit_xor(_mm512_add_epi16(v, splat16(128)), splat16(128)), order);
  }
  // The largest of 32 words that are not negative.
  static int largest16(I32 v) {
    const __m256i half = _mm256_max_epi16(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
    const __m128i quarter = _mm_max_epi16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    return 0xffff ^ _mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(quarter, _mm_set1_epi16(-1))), 0);
  }
  // The sums of all lanes of four.
  static void store_sums4(int32_t* to, const I32 (&v)[4]) {
    const I32 first = _mm512_add_epi32(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
    const I32 second = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
    const I32 all = _mm512_add_epi32(_mm512_unpacklo_epi64(first, second), _mm512_unpackhi_epi64(first, second));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    const __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), sums);
  }
#endif

#ifdef __AVX512BF16__
  // 16 pairs of bf16 from their values in memory order.
  static I32 to_pairs(F32 first, F32 second) { return (I32)_mm512_cvtne2ps_pbh(second, first); }
  // As load_i32, but once: GCC would rather load twice than keep a register.
  static I32 load_once(const void* p) {
    I32 v = load_i32(p);
    __asm__("" : "+v"(v));
    return v;
  }
  // levels[the lowest four bits of every word], which bf16 holds exactly.
  static I32 look_up_bf16(I32 v, const float* levels) {
    const __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(load(levels)), 16));
    return _mm512_permutexvar_epi16(v, _mm512_broadcast_i64x4(half));  // by five bits: the fifth picks a copy
  }
  // Bytes: sizes (of -128: 0x80), table[the low seven bits] of 128, the sign bits of `from`, `byte` where none is set.
  static I32 abs8(I32 v) { return _mm512_abs_epi8(v); }
  static I32 look_up7(I32 index, const uint8_t* table) {
    return _mm512_permutex2var_epi8(load_i32(table), index, load_i32(table + 64));
  }
  static I32 with_sign8(I32 v, I32 from) {
    return _mm512_ternarylogic_epi32(v, from, _mm512_set1_epi8(-128), 0xf8);  // v | (from & 0x80)
  }
  static I32 unless_sign8(I32 v, uint8_t byte) {
    return _mm512_shuffle_epi8(_mm512_set1_epi8(static_cast<char>(byte)), v);
  }
  static I32 bit_xor(I32 a, I32 b) { return _mm512_xor_si512(a, b); }
  // Words of their low and high bytes: 0 to 7 of every sixteen, then 8 to 15.
  static void to_words(I32 low, I32 high, I32& first, I32& second) {
    first = _mm512_unpacklo_epi8(low, high);
    second = _mm512_unpackhi_epi8(low, high);
  }
  // From the order of to_words to that of memory.
  static void unmix_rows(F32& a, F32& b) {
    const I32 first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const I32 second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    const __m512d low = _mm512_castps_pd(a), high = _mm512_castps_pd(b);
    a = _mm512_castpd_ps(_mm512_permutex2var_pd(low, first, high));
    b = _mm512_castpd_ps(_mm512_permutex2var_pd(low, second, high));
  }
  // And back.
  static void mix_rows(F32& a, F32& b) {
    const I32 first = _mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13);
    const I32 second = _mm512_setr_epi64(2, 3, 6, 7, 10, 11, 14, 15);
    const __m512d low = _mm512_castps_pd(a), high = _mm512_castps_pd(b);
    a = _mm512_castpd_ps(_mm512_permutex2var_pd(low, first, high));
    b = _mm512_castpd_ps(_mm512_permutex2var_pd(low, second, high));
  }
#endif

  // Round to nearest even bf16, kept in the high halves. NaN payloads are not of interest here.
  static I32 round_bf16(F32 v) {
    const I32 bits = _mm512_castps_si512(v);
    const I32 odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return high_half(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))));
  }
};

// (a[0], b[0]), (a[1], b[1]) ... of 16 words each.
inline void interleave16(const uint16_t* a, const uint16_t* b, uint16_t* out) {
  const auto words = [](const uint16_t* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  };
  _mm512_storeu_si512(out, _mm512_or_si512(words(a), _mm512_slli_epi32(words(b), 16)));
}

// 16 x 16 transpose of 32-bit words, rows given by pointer, result contiguous: out[j * 16 + i] = rows[i][j].
inline void transpose16(const uint32_t* const* rows, uint32_t* out) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(rows[i]);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  // a[4g + c] holds, per 128-bit lane l, column 4l + c of rows 4g .. 4g + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512i lo01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x44), hi01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xee);
    const __m512i lo23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x44);
    const __m512i hi23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xee);
    _mm512_storeu_si512(out + c * 16, _mm512_shuffle_i32x4(lo01, lo23, 0x88));
    _mm512_storeu_si512(out + (4 + c) * 16, _mm512_shuffle_i32x4(lo01, lo23, 0xdd));
    _mm512_storeu_si512(out + (8 + c) * 16, _mm512_shuffle_i32x4(hi01, hi23, 0x88));
    _mm512_storeu_si512(out + (12 + c) * 16, _mm512_shuffle_i32x4(hi01, hi23, 0xdd));
  }
}
