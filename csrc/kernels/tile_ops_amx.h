// Tile operations on AMX: TDPBF16PS on 2 x 2 tiles; decoding and stores are AVX512's.
// https://www.intel.com/content/www/us/en/docs/intrinsics-guide (AMX-TILE, AMX-BF16)
// With KT_SFT_TILE_MODEL the tile unit is a software model, so that the same code is tested where there is no AMX.
// Included inside the variant's namespace.
#pragma once

#include "kernels/tile_ops_avx512.h"

#ifdef KT_SFT_TILE_MODEL
struct TileUnit {
  // Poisoned when the configuration is dropped, so that a product on unloaded tiles cannot pass a test.
  static float (&tile(int index))[16][16] {
    static thread_local float tiles[8][16][16];
    return tiles[index];
  }
  static void configure(const void*) {}
  static void release() {
    for (int i = 0; i < 8; ++i) __builtin_memset(tile(i), 0xff, sizeof(float[16][16]));
  }
  template <int T>
  static void zero() {
    __builtin_memset(tile(T), 0, sizeof(float[16][16]));
  }
  template <int T>
  static void load(const void* p) {
    __builtin_memcpy(tile(T), p, sizeof(float[16][16]));
  }
  template <int T>
  static void store(void* p) {
    __builtin_memcpy(p, tile(T), sizeof(float[16][16]));
  }
  static float half(float word, int high) {
    uint32_t bits;
    __builtin_memcpy(&bits, &word, 4);
    bits = high ? bits & 0xffff0000u : bits << 16;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
  }
  template <int C, int A, int B>
  static void dot() {
    for (int m = 0; m < 16; ++m)
      for (int k = 0; k < 16; ++k)
        for (int n = 0; n < 16; ++n)
          for (int h = 0; h < 2; ++h) tile(C)[m][n] += half(tile(A)[m][k], h) * half(tile(B)[k][n], h);
  }
  template <int C, int A, int B>
  static void dot8() {
    alignas(64) int8_t a[16][16][4], b[16][16][4];
    alignas(64) int32_t c[16][16];
    __builtin_memcpy(a, tile(A), sizeof a), __builtin_memcpy(b, tile(B), sizeof b);
    __builtin_memcpy(c, tile(C), sizeof c);
    for (int m = 0; m < 16; ++m)
      for (int k = 0; k < 16; ++k)
        for (int n = 0; n < 16; ++n)
          for (int i = 0; i < 4; ++i) c[m][n] += a[m][k][i] * b[k][n][i];
    __builtin_memcpy(tile(C), c, sizeof c);
  }
};
#else
// Inline assembly instead of GCC 12's intrinsics: those take literal register numbers only and tell the compiler that a
// configuration reads 8 of its 64 bytes and a tile load reads no memory.
struct TileUnit {
  static void configure(const void* config) { __asm__ volatile("ldtilecfg (%0)" ::"r"(config) : "memory"); }
  static void release() { __asm__ volatile("tilerelease" ::: "memory"); }
  template <int T>
  static void zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
  }
  template <int T>
  static void load(const void* p) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(int64_t{64}), "i"(T) : "memory");
  }
  template <int T>
  static void store(void* p) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(int64_t{64}), "i"(T) : "memory");
  }
  template <int C, int A, int B>
  static void dot() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
  template <int C, int A, int B>
  static void dot8() {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
};
#endif

// C tiles 0..3, left tiles 4 and 5, right tiles 6 and 7: four products per four loads. While the tile unit multiplies,
// the vector units decode the next panel.
template <int I, int J, class Decoder>
inline void multiply_amx(const uint16_t* left, int64_t left_stride, const uint16_t* right, int64_t right_stride,
                         float* c, int64_t c_i, int64_t c_j, int q_tiles, bool accumulate, Decoder& decoder) {
  if (accumulate) {
    TileUnit::load<0>(c);
    if constexpr (J > 1) TileUnit::load<1>(c + c_j);
    if constexpr (I > 1) TileUnit::load<2>(c + c_i);
    if constexpr (I > 1 && J > 1) TileUnit::load<3>(c + c_i + c_j);
  } else {
    TileUnit::zero<0>(), TileUnit::zero<1>(), TileUnit::zero<2>(), TileUnit::zero<3>();
  }
  for (int q = 0; q < q_tiles; ++q, left += kTileElems, right += kTileElems) {
    TileUnit::load<4>(left);
    TileUnit::load<6>(right);
    TileUnit::dot<0, 4, 6>();
    if constexpr (J > 1) {
      TileUnit::load<7>(right + right_stride * kTileElems);
      TileUnit::dot<1, 4, 7>();
    }
    if constexpr (I > 1) {
      TileUnit::load<5>(left + left_stride * kTileElems);
      TileUnit::dot<2, 5, 6>();
      if constexpr (J > 1) TileUnit::dot<3, 5, 7>();
    }
    if constexpr (Decoder::kAny)
      if (decoder.more()) decoder.take().all();
  }
  TileUnit::store<0>(c);
  if constexpr (J > 1) TileUnit::store<1>(c + c_j);
  if constexpr (I > 1) TileUnit::store<2>(c + c_i);
  if constexpr (I > 1 && J > 1) TileUnit::store<3>(c + c_i + c_j);
}

struct AmxOps : Ops {
  static constexpr bool kMultipliesCodes = false;
  static void begin() {
    struct alignas(64) Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static_assert(sizeof(Config) == 64);
    const Config config;
    TileUnit::configure(&config);
  }
  static void end() { TileUnit::release(); }

  static constexpr bool kInterleaves = true;
  static constexpr int kInterleavedLeftRows = kMaxRows;  // the tile unit leaves the vector units free
  template <class Decoder>
  static void multiply(const BlockArgs& g, Decoder& decoder) {
    const int left_tiles = (g.rows + kTileRows - 1) / kTileRows;
    Ahead ahead = g.ahead;
    ahead.share *= 4;  // a block of 2 x 2 tiles has four times the rows that Ahead counts with
    for (int i = 0; i < left_tiles; i += 2) {
      const auto* left = static_cast<const uint16_t*>(g.left) + i * g.left_stride * kTileElems;
      for (int j = 0; j < g.right_tiles; j += 2) {
        const auto* right = static_cast<const uint16_t*>(g.right) + j * g.right_stride * kTileElems;
        float* c = g.c + i * g.c_i + j * g.c_j;
        prefetch_codes(ahead, g.q_tiles);
        const auto run = i + 1 < left_tiles
                             ? (j + 1 < g.right_tiles ? multiply_amx<2, 2, Decoder> : multiply_amx<2, 1, Decoder>)
                             : (j + 1 < g.right_tiles ? multiply_amx<1, 2, Decoder> : multiply_amx<1, 1, Decoder>);
        run(left, g.left_stride, right, g.right_stride, c, g.c_i, g.c_j, g.q_tiles, g.accumulate, decoder);
      }
    }
  }

  static void begin8() { begin(); }
  static void store_quads(uint8_t* to, const uint8_t* first, const uint8_t* second) {
    _mm512_storeu_si512(to, quads(first, second));
  }
  static void store_turned(uint8_t* to, const uint8_t* pairs) { turn_pairs(to, pairs, _mm512_setzero_si512()); }
  // TDPBSSD takes both factors signed: g.start is not needed.
  static void multiply8(const Block8Args& g) {
    const int m_tiles = (g.rows + kTileRows - 1) / kTileRows;
    Ahead ahead = g.ahead;
    ahead.share *= 4;  // two tiles have four times the rows that Ahead counts with
    for (int i = 0; i < m_tiles; i += 2) {
      prefetch_codes(ahead, g.tiles * kSteps8 / kBlock);
      alignas(64) int32_t sums[2][2][256];
      const int8_t* left = g.left + i * g.left_stride * kTile8Bytes;
      i + 1 < m_tiles ? sums8<2>(left, g, sums) : sums8<1>(left, g, sums);
      for (int t = 0; t < 2 && i + t < m_tiles; ++t)
        for (int h = 0; h < kStripTiles; ++h)
          for (int r = 0; r < kTileRows && (i + t) * kTileRows + r < g.rows; ++r)
            flush8(_mm512_load_si512(sums[t][h] + r * 16), g.row_scales[((i + t) * kTileRows + r) * g.row_groups],
                   _mm512_loadu_ps(g.column_scales + h * 16), g.accumulate,
                   g.c + ((i + t) * kStripTiles + h) * 256 + r * 16);
    }
  }
  template <int I>
  static void sums8(const int8_t* left, const Block8Args& g, int32_t (&sums)[2][2][256]) {
    TileUnit::zero<0>(), TileUnit::zero<1>(), TileUnit::zero<2>(), TileUnit::zero<3>();
    for (int t = 0; t < g.tiles; ++t) {
      const uint8_t* right = g.right + t * kTile8Bytes;
      TileUnit::load<4>(left + t * kTile8Bytes);
      TileUnit::load<6>(right);
      TileUnit::dot8<0, 4, 6>();
      TileUnit::load<7>(right + kMaxGroup8 / kSteps8 * kTile8Bytes);
      TileUnit::dot8<1, 4, 7>();
      if constexpr (I > 1) {
        TileUnit::load<5>(left + (g.left_stride + t) * kTile8Bytes);
        TileUnit::dot8<2, 5, 6>();
        TileUnit::dot8<3, 5, 7>();
      }
    }
    TileUnit::store<0>(sums[0][0]), TileUnit::store<1>(sums[0][1]);
    if constexpr (I > 1) TileUnit::store<2>(sums[1][0]), TileUnit::store<3>(sums[1][1]);
  }

  static double peak_int8(int64_t iterations) {
    return 2.0 * peak_of([] { dots<true>(); }, iterations);
  }
  static double peak(int64_t iterations) {
    return peak_of([] { dots<false>(); }, iterations);
  }
  template <bool kInt8>
  static void dots() {
    if constexpr (kInt8) {
      TileUnit::dot8<0, 4, 6>(), TileUnit::dot8<1, 4, 7>(), TileUnit::dot8<2, 5, 6>(), TileUnit::dot8<3, 5, 7>();
    } else {
      TileUnit::dot<0, 4, 6>(), TileUnit::dot<1, 4, 7>(), TileUnit::dot<2, 5, 6>(), TileUnit::dot<3, 5, 7>();
    }
  }
  // Floating-point operations of bf16 dots; int8 ones do twice as many.
  template <class Dots>
  static double peak_of(Dots dots, int64_t iterations) {
    alignas(64) static const uint16_t ones[kTileElems] = {};
    begin();
    TileUnit::load<4>(ones), TileUnit::load<5>(ones), TileUnit::load<6>(ones), TileUnit::load<7>(ones);
    TileUnit::zero<0>(), TileUnit::zero<1>(), TileUnit::zero<2>(), TileUnit::zero<3>();
    for (int64_t n = 0; n < iterations; ++n) dots();
    end();
    return 4.0 * 2 * 16 * 16 * kTileSteps * static_cast<double>(iterations);
  }
};
