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
  static void load(const void* p, int64_t row = 64) {
    for (int i = 0; i < 16; ++i) __builtin_memcpy(tile(T)[i], static_cast<const char*>(p) + i * row, sizeof(float[16]));
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
  static void load(const void* p, int64_t row = 64) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(row), "i"(T) : "memory");
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

template <int I>
struct Index {
  static constexpr int value = I;
};

// Bytes from one row of a tile to the next, from one reduction tile and from one of the tiles beside each other.
struct Tiles {
  const uint8_t* at;
  int64_t row, q, next;
};

// C tiles 0..3, left tiles 4 and 5, right tiles 6 and 7: four products per four loads. While the tile unit multiplies,
// the vector units decode the next panel: half a unit for four products takes them no time of their own, a whole one
// does (63 cycles of products, about 80 of decoding, 108 together), so the halves are spread where products suffice.
template <int I, int J, class Decoder>
inline void multiply_amx(const BlockArgs& g, const uint16_t* left, const Tiles& right, float* c, const Ahead& ahead,
                         bool spread, Decoder& decoder) {
  const int q_tiles = g.q_tiles;
  if (g.accumulate && !g.sums_held) {
    TileUnit::load<0>(c);
    if constexpr (J > 1) TileUnit::load<1>(c + g.c_j);
    if constexpr (I > 1) TileUnit::load<2>(c + g.c_i);
    if constexpr (I > 1 && J > 1) TileUnit::load<3>(c + g.c_i + g.c_j);
  } else if (!g.accumulate) {
    TileUnit::zero<0>(), TileUnit::zero<1>(), TileUnit::zero<2>(), TileUnit::zero<3>();
  }
  int q = 0;
  const auto step = [&]() __attribute__((always_inline)) {
    const uint16_t* l = left + q * kTileElems;
    const uint8_t* r = right.at + q * right.q;
    TileUnit::load<4>(l);
    TileUnit::load<6>(r, right.row);
    TileUnit::dot<0, 4, 6>();
    if constexpr (J > 1) {
      TileUnit::load<7>(r + right.next, right.row);
      TileUnit::dot<1, 4, 7>();
    }
    if constexpr (I > 1) {
      TileUnit::load<5>(l + g.left_stride * kTileElems);
      TileUnit::dot<2, 5, 6>();
      if constexpr (J > 1) TileUnit::dot<3, 5, 7>();
    }
    ++q;
  };
  if constexpr (Decoder::kAny) {
    while (q < q_tiles && decoder.more()) {
      step();
      const auto unit = decoder.take();
      unit.half(0);
      if (spread && q < q_tiles) step();
      unit.half(1);
    }
  }
  const int lines = Decoder::kAny ? 0 : min_int(ahead.lines, ahead.share);
  while (q < q_tiles) {
    for (int i = 0; i < lines; ++i) ask_for(ahead.at + q * ahead.stride + i * kLine);
    step();
  }
  if (g.hold_sums) return;
  TileUnit::store<0>(c);
  if constexpr (J > 1) TileUnit::store<1>(c + g.c_j);
  if constexpr (I > 1) TileUnit::store<2>(c + g.c_i);
  if constexpr (I > 1 && J > 1) TileUnit::store<3>(c + g.c_i + g.c_j);
}

// One tile of one side times N of the other, 1 to 4: blocks of 2 x 2 would have two sums, which wait for themselves.
template <bool kOneLeft, int N>
inline void multiply_one(const Tiles& one, const Tiles& many, float* c, int64_t c_next, int q_tiles, bool accumulate) {
  const auto each = [](auto&& use) __attribute__((always_inline)) {
    use(Index<0>{});
    if constexpr (N > 1) use(Index<1>{});
    if constexpr (N > 2) use(Index<2>{});
    if constexpr (N > 3) use(Index<3>{});
  };
  each([&](auto i) __attribute__((always_inline)) {
    accumulate ? TileUnit::load<i.value>(c + i.value * c_next) : TileUnit::zero<i.value>();
  });
  for (int q = 0; q < q_tiles; ++q) {
    TileUnit::load<6>(one.at + q * one.q, one.row);
    each([&](auto i) __attribute__((always_inline)) {
      constexpr int kTile = i.value % 2 ? 5 : 4;
      TileUnit::load<kTile>(many.at + q * many.q + i.value * many.next, many.row);
      TileUnit::dot<i.value, kOneLeft ? 6 : kTile, kOneLeft ? kTile : 6>();
    });
  }
  each([&](auto i) __attribute__((always_inline)) { TileUnit::store<i.value>(c + i.value * c_next); });
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
  static constexpr bool kDecoderAsks = true;             // for the codes further on, not the products
  static constexpr int kRowsStripByStrip = 128;          // of 2,048 columns they fill a quarter of L2
  static constexpr int kRowsHeld = 2 * kTileRows;        // whose sums stay in the tile unit for all panels of a strip
  static constexpr bool kLoadsCodes = true;              // loads_codes
  static constexpr bool kWideTasks = true;               // KernelTable::wide_tasks
  static constexpr bool kSigned8 = true;                 // int8 products take both factors signed
  static constexpr int kInterleavedLeftRows = kMaxRows;  // the tile unit leaves the vector units free
  template <class Decoder>
  static void multiply(const BlockArgs& g, Decoder& decoder) {
    const int left_tiles = (g.rows + kTileRows - 1) / kTileRows;
    Tiles right = g.right_codes ? Tiles{nullptr, 2 * kLine, kBlock * kBlock * sizeof(uint16_t), kLine}
                                : Tiles{nullptr, kLine, kTileElems * 2, g.right_stride * kTileElems * 2};
    if constexpr (!Decoder::kAny) {
      const Tiles left{static_cast<const uint8_t*>(g.left), kLine, kTileElems * 2, g.left_stride * kTileElems * 2};
      right.at = static_cast<const uint8_t*>(g.right);
      if (g.right_tiles == 1 && left_tiles > 2) return multiply_many<false>(right, left, left_tiles, g, g.c_i);
      if (left_tiles == 1 && g.right_tiles > 2) return multiply_many<true>(left, right, g.right_tiles, g, g.c_j);
    }
    Ahead ahead = g.ahead;
    ahead.share *= 4;  // a block of 2 x 2 tiles has four times the rows that Ahead counts with
    bool spread = false;
    if constexpr (Decoder::kAny) {
      const int blocks = (left_tiles + 1) / 2 * ((g.right_tiles + 1) / 2);
      spread = blocks * g.q_tiles >= 2 * decoder.units();
    }
    for (int i = 0; i < left_tiles; i += 2) {
      const auto* left = static_cast<const uint16_t*>(g.left) + i * g.left_stride * kTileElems;
      for (int j = 0; j < g.right_tiles; j += 2) {
        right.at = static_cast<const uint8_t*>(g.right) + j * right.next;
        float* c = g.c + i * g.c_i + j * g.c_j;
        const auto run = i + 1 < left_tiles
                             ? (j + 1 < g.right_tiles ? multiply_amx<2, 2, Decoder> : multiply_amx<2, 1, Decoder>)
                             : (j + 1 < g.right_tiles ? multiply_amx<1, 2, Decoder> : multiply_amx<1, 1, Decoder>);
        run(g, left, right, c, ahead, spread, decoder);
        const int asked = min_int(ahead.lines, ahead.share);
        ahead.at += asked * kLine, ahead.lines -= asked;
      }
    }
  }

  template <bool kOneLeft>
  static void multiply_many(const Tiles& one, Tiles many, int count, const BlockArgs& g, int64_t c_next) {
    for (int i = 0; i < count; i += 4, many.at += 4 * many.next) {
      const int n = min_int(4, count - i);
      const auto run = n == 4   ? multiply_one<kOneLeft, 4>
                       : n == 3 ? multiply_one<kOneLeft, 3>
                       : n == 2 ? multiply_one<kOneLeft, 2>
                                : multiply_one<kOneLeft, 1>;
      run(one, many, g.c + i * c_next, c_next, g.q_tiles, g.accumulate);
    }
  }

  static void begin8() { begin(); }
  static void store_quads(uint8_t* to, const uint8_t* first, const uint8_t* second) {
    _mm512_storeu_si512(to, quads(first, second));
  }
  static void store_turned(uint8_t* to, const uint8_t* pairs) { turn_pairs(to, pairs, _mm512_setzero_si512()); }
  // TDPBSSD takes both factors signed: g.start is not needed. The sums of two tiles of rows are scaled and added to C
  // while the next ones are multiplied.
  static void multiply8(const Block8Args& g) {
    const int m_tiles = (g.rows + kTileRows - 1) / kTileRows;
    alignas(64) int32_t sums[2][2][256];
    Ahead ahead = g.ahead;
    ahead.share *= 4;  // two tiles have four times the rows that Ahead counts with
    for (int i = 0; i < m_tiles; i += 2) {
      const int8_t* left = g.left + i * g.left_stride * kTile8Bytes;
      const bool two = i + 1 < m_tiles;
      two ? products8<2>(left, g, ahead) : products8<1>(left, g, ahead);
      if (i > 0) add_sums8(g, i - 2, sums);
      TileUnit::store<0>(sums[0][0]), TileUnit::store<1>(sums[0][1]);
      if (two) TileUnit::store<2>(sums[1][0]), TileUnit::store<3>(sums[1][1]);
    }
    add_sums8(g, (m_tiles - 1) / 2 * 2, sums);
  }
  template <int I>
  static void products8(const int8_t* left, const Block8Args& g, Ahead& ahead) {
    constexpr int kBlocks = kSteps8 / kBlock;
    const int lines = min_int(ahead.lines, ahead.share);
    TileUnit::zero<0>(), TileUnit::zero<1>(), TileUnit::zero<2>(), TileUnit::zero<3>();
    for (int t = 0; t < g.tiles; ++t) {
      const uint8_t* right = g.right + t * kTile8Bytes;
      for (int q = kBlocks * t; q < kBlocks * (t + 1); ++q)
        for (int i = 0; i < lines; ++i) ask_for(ahead.at + q * ahead.stride + i * kLine);
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
    ahead.at += lines * kLine, ahead.lines -= lines;
  }
  // Of row tiles i and i + 1.
  static void add_sums8(const Block8Args& g, int i, const int32_t (&sums)[2][2][256]) {
    const __m512 scales[kStripTiles] = {_mm512_loadu_ps(g.column_scales), _mm512_loadu_ps(g.column_scales + kTileRows)};
    const bool accumulate = g.accumulate;
    for (int t = 0; t < 2 && (i + t) * kTileRows < g.rows; ++t) {
      const int rows = min_int(g.rows - (i + t) * kTileRows, kTileRows);
      const float* row_scale = g.row_scales + (i + t) * kTileRows * g.row_groups;
      float* c = g.c + (i + t) * kStripTiles * 256;
      for (int r = 0; r < rows; ++r, row_scale += g.row_groups)
#pragma GCC unroll 2
        for (int h = 0; h < kStripTiles; ++h)
          flush8(_mm512_load_si512(sums[t][h] + r * kTileRows), *row_scale, scales[h], accumulate,
                 c + h * 256 + r * kTileRows);
    }
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
