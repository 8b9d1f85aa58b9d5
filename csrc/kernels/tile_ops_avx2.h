// Tile operations on AVX2 and FMA: float tiles. Included inside the variant's namespace.
#pragma once

struct Mac {
  using Elem = float;
  using Acc = __m256;
  using Right = __m256;
  static constexpr int kLanes = 8, kVecs = 2;
  static constexpr int kRows = 4, kTiles = 1;  // 8 accumulators of the 16 registers; 6 loads feed 8 multiply-adds
  static constexpr int kSteps = kTileSteps;
  static Acc zero_acc() { return _mm256_setzero_ps(); }
  static Acc load_acc(const float* p) { return _mm256_loadu_ps(p); }
  static void store_acc(float* p, Acc v) { _mm256_storeu_ps(p, v); }
  static Right load_right(const Elem* tile, int step, int vec) { return _mm256_loadu_ps(tile + step * 16 + vec * 8); }
  static __m256 broadcast_left(const Elem* row, int step) { return _mm256_broadcast_ss(row + step); }
  static Acc madd(Acc acc, __m256 a, __m256 b) { return _mm256_fmadd_ps(a, b, acc); }
};

#include "kernels/vec_avx2.h"

struct Ops {
  using Elem = float;
  static void store_right(Elem* tile, int pair, Vec::F32 even, Vec::F32 odd) {
    store_left(tile + (2 * pair) * 16, even);
    store_left(tile + (2 * pair + 1) * 16, odd);
  }
  static void store_left(Elem* row, Vec::F32 v) { Vec::store(row, Vec::as_f32(Vec::round_bf16(v))); }
  static constexpr bool kInterleaves = false;  // the products take all registers
  static constexpr bool kMultipliesCodes = false;
  static constexpr int kInterleavedLeftRows = 0;
  static constexpr int kRowsStripByStrip = 0, kRowsHeld = 0;
  static constexpr bool kLoadsCodes = false, kWideTasks = true, kSigned8 = false;
  static constexpr bool kDecoderAsks = false;  // products do
  template <class Decoder>
  static void multiply(const BlockArgs& g, Decoder& decoder) {
    multiply_tiles<Mac>(g, decoder);
  }
  static double peak(int64_t iterations) { return peak_of_registers<Mac>(iterations); }
  static void begin() {}
  static void end() {}
};
