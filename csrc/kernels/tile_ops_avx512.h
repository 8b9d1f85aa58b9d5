// Tile operations on AVX512: VDPBF16PS on bf16 tiles where there is AVX512_BF16, fp32 FMA on float tiles elsewhere.
// https://www.intel.com/content/www/us/en/docs/intrinsics-guide (AVX512_BF16: _mm512_dpbf16_ps, _mm512_cvtne2ps_pbh)
// Included inside the variant's namespace.
#pragma once

struct Mac {
  using Acc = __m512;
  static constexpr int kLanes = 16, kVecs = 1;
  static constexpr int kRows = 8, kTiles = 2;  // 16 accumulators hide the latency; 10 loads feed 16 multiply-adds
  static Acc zero_acc() { return _mm512_setzero_ps(); }
  static Acc load_acc(const float* p) { return _mm512_loadu_ps(p); }
  static void store_acc(float* p, Acc v) { _mm512_storeu_ps(p, v); }

#ifdef __AVX512BF16__
  using Elem = uint16_t;
  using Right = __m512i;
  static constexpr int kSteps = kTileSteps / 2;
  static Right load_right(const Elem* tile, int step, int) { return _mm512_loadu_si512(tile + step * 32); }
  static __m512i broadcast_left(const Elem* row, int step) {
    int32_t pair;
    __builtin_memcpy(&pair, row + step * 2, 4);
    return _mm512_set1_epi32(pair);
  }
  static Acc madd(Acc acc, __m512i a, __m512i b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
#else
  using Elem = float;
  using Right = __m512;
  static constexpr int kSteps = kTileSteps;
  static Right load_right(const Elem* tile, int step, int) { return _mm512_loadu_ps(tile + step * 16); }
  static __m512 broadcast_left(const Elem* row, int step) { return _mm512_set1_ps(row[step]); }
  static Acc madd(Acc acc, __m512 a, __m512 b) { return _mm512_fmadd_ps(a, b, acc); }
#endif
};

#include "kernels/vec_avx512.h"
#ifdef __AVX512VNNI__
#include "kernels/tile_ops_vnni.h"
#endif

struct Ops {
  using Elem = Mac::Elem;

#ifdef __AVX512BF16__
  // 16 pairs in memory order.
  static void store_pairs(Elem* to, __m512 first, __m512 second) {
    _mm512_storeu_si512(to, Vec::to_pairs(first, second));
  }
  // Rows 2p and 2p + 1 of a right tile, interleaved.
  static void store_right(Elem* tile, int pair, __m512 even, __m512 odd) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i words = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    _mm512_storeu_si512(tile + pair * 32, _mm512_permutexvar_epi16(order, words));
  }
  // 16 reduction steps of one row of a left tile.
  static void store_left(Elem* row, __m512 v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row), (__m256i)_mm512_cvtneps_pbh(v));
  }
#else
  static void store_right(Elem* tile, int pair, __m512 even, __m512 odd) {
    store_left(tile + (2 * pair) * 16, even);
    store_left(tile + (2 * pair + 1) * 16, odd);
  }
  static void store_left(Elem* row, __m512 v) { Vec::store(row, Vec::as_f32(Vec::round_bf16(v))); }
#endif
  static constexpr bool kInterleaves = Mac::kSteps == kPairs;  // of bf16 tiles a step is a pair
  static constexpr int kInterleavedLeftRows = 32;
  static constexpr int kRowsStripByStrip = 0, kRowsHeld = 0;
  static constexpr bool kLoadsCodes = false, kWideTasks = !kInterleaves, kSigned8 = false;
  static constexpr bool kDecoderAsks = false;             // products do
  static constexpr bool kMultipliesCodes = kInterleaves;  // with codes decoded in registers (direct.h)
  template <class Decoder>
  static void multiply(const BlockArgs& g, Decoder& decoder) {
    multiply_tiles<Mac>(g, decoder);
  }
  static double peak(int64_t iterations) { return peak_of_registers<Mac>(iterations); }
#ifdef __AVX512VNNI__
  // 16 rows x 4 reduction steps from two rows of pairs, as unsigned codes + 128.
  static void store_quads(uint8_t* to, const uint8_t* first, const uint8_t* second) {
    _mm512_storeu_si512(to, _mm512_xor_si512(quads(first, second), _mm512_set1_epi32(int(0x80808080))));
  }
  static __m512i quads(const uint8_t* first, const uint8_t* second) {
    const auto words = [](const uint8_t* p) {
      return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    };
    return _mm512_or_si512(words(first), _mm512_slli_epi32(words(second), 16));
  }
  static void store_turned(uint8_t* to, const uint8_t* pairs) {
    turn_pairs(to, pairs, _mm512_set1_epi32(int(0x80808080)));
  }
  static void multiply8(const Block8Args& g) { multiply8_vnni(g); }
  static double peak_int8(int64_t iterations) { return peak_of_vnni(iterations); }
  static void begin8() {}
#endif
  static void begin() {}
  static void end() {}
};
