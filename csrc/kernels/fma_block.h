// The register-blocked product of broadcast kernels (AVX512-BF16, AVX512, AVX2), over the multiply-add vocabulary Mac:
//   C[i][j] += sum_q left[i][q] * right[q][j]   on tiles as panel.h defines them.
// Mac gives: Elem, Acc (one register), kRows and kTiles (register block: kRows x kTiles * 16 columns), kVecs registers
// per tile row, kSteps multiply-add steps per tile, load_right / broadcast_left / madd, load_acc / store_acc /
// zero_acc. Included inside the variant's namespace.
#pragma once

constexpr int min_int(int a, int b) { return a < b ? a : b; }
constexpr int max_int(int a, int b) { return a > b ? a : b; }

// Codes that the next panel decodes: for every reduction tile q, `lines` cache lines at `at` + q * stride. Each
// register block asks for `share` of them, so that they arrive while it multiplies.
struct Ahead {
  const uint8_t* at;
  int64_t stride;
  int lines, share;
};

// Into L2: a request for L1 keeps one of its few miss buffers until memory answers, and those are soon all taken.
inline void ask_for(const uint8_t* line) { __builtin_prefetch(line, 0, 2); }

// One block's share for all reduction tiles at once.
inline void prefetch_codes(Ahead& ahead, int q_tiles) {
  const int lines = min_int(ahead.lines, ahead.share);
  for (int q = 0; q < q_tiles; ++q)
    for (int i = 0; i < lines; ++i) ask_for(ahead.at + q * ahead.stride + i * 64);
  ahead.at += lines * 64, ahead.lines -= lines;
}

// Nothing to decode beside a product; PanelDecoder of decode.h is the other kind.
struct NoDecoder {
  static constexpr bool kAny = false;
};

// C tile (i, j) is at c + i * c_i + j * c_j, [16][16] floats.
struct BlockArgs {
  const void* left;
  const void* right;
  float* c;
  int64_t left_stride, right_stride;  // tiles from one row of tiles to the next
  int64_t c_i, c_j;                   // floats
  int rows;                           // left rows that matter
  int right_tiles, q_tiles;
  bool accumulate;  // else C starts from zero
  Ahead ahead;
  bool right_codes = false;                   // right tiles are read from packed bf16 codes: loads_codes
  bool sums_held = false, hold_sums = false;  // in the tile unit, from the product before and for the next one
};

// use(step) for all steps, kTogether of them unrolled: what depends on a step's place among those is a constant.
template <int kSteps, int kTogether, class Use>
inline __attribute__((always_inline)) void each_step(const Use& use) {
  static_assert(kSteps % kTogether == 0 && kTogether <= 4);
  for (int first = 0; first < kSteps; first += kTogether)
#pragma GCC unroll 4
    for (int i = 0; i < kTogether; ++i) use(first + i);
}

// One reduction tile; each(step) is done between the steps, of which so many are unrolled.
template <int kUnroll, class Mac, int Rows, int Tiles, class Each>
inline __attribute__((always_inline)) void multiply_steps(typename Mac::Acc (&acc)[Rows][Tiles * Mac::kVecs],
                                                          const typename Mac::Elem* left,
                                                          const typename Mac::Elem* right, int64_t right_stride,
                                                          const Each& each) {
  constexpr int kV = Mac::kVecs;
  each_step<Mac::kSteps, kUnroll>([&](int s) __attribute__((always_inline)) {
    typename Mac::Right b[Tiles * kV];
#pragma GCC unroll 4
    for (int v = 0; v < Tiles * kV; ++v)
      b[v] = Mac::load_right(right + (v / kV) * right_stride * kTileElems, s, v % kV);
    each(s);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const auto a = Mac::broadcast_left(left + r * kTileSteps, s);
#pragma GCC unroll 4
      for (int v = 0; v < Tiles * kV; ++v) acc[r][v] = Mac::madd(acc[r][v], a, b[v]);
    }
  });
}

// Decodes the next panel meanwhile.
template <class Mac, int Rows, int Tiles, class Decoder>
inline void multiply_block(const typename Mac::Elem* left, const typename Mac::Elem* right, int64_t right_stride,
                           float* c, int64_t c_j, int q_tiles, bool accumulate, Ahead& ahead, Decoder& decoder) {
  constexpr int kV = Mac::kVecs;
  typename Mac::Acc acc[Rows][Tiles * kV];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < Tiles * kV; ++v)
      acc[r][v] = accumulate ? Mac::load_acc(c + r * 16 + (v / kV) * c_j + (v % kV) * Mac::kLanes) : Mac::zero_acc();
  }
  const int lines = min_int(ahead.lines, ahead.share);
  for (int q = 0; q < q_tiles; ++q) {
    for (int i = 0; i < lines; ++i) ask_for(ahead.at + q * ahead.stride + i * 64);
    const auto* l = left + int64_t{q} * kTileElems;
    const auto* r = right + int64_t{q} * kTileElems;
    if constexpr (Decoder::kAny) {
      static_assert(Mac::kSteps == kPairs);
      if (decoder.more()) {
        const auto unit = decoder.take();
        multiply_steps<Decoder::kPairsTogether, Mac, Rows, Tiles>(
            acc, l, r, right_stride, [&](int step) __attribute__((always_inline)) { unit.pair(step); });
        continue;
      }
    }
    constexpr int kTogether = Mac::kSteps == kPairs ? 1 : 4;  // steps of pairs gain nothing by it
    multiply_steps<kTogether, Mac, Rows, Tiles>(acc, l, r, right_stride, [](int) {});
  }
  ahead.at += lines * 64, ahead.lines -= lines;
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < Tiles * kV; ++v)
      Mac::store_acc(c + r * 16 + (v / kV) * c_j + (v % kV) * Mac::kLanes, acc[r][v]);
  }
}

// Rows of a left tile times right tiles [j, j_end): Rows at a time, the rest, which a tile pads with zeros, in halves.
template <class Mac, int Rows, int Tiles, class Decoder>
inline void multiply_rows(const BlockArgs& g, int tile, int row, int rows, int j_begin, int j_end, Ahead& ahead,
                          Decoder& decoder) {
  using Elem = typename Mac::Elem;
  const Elem* left = static_cast<const Elem*>(g.left) + tile * g.left_stride * kTileElems;
  const Elem* right = static_cast<const Elem*>(g.right);
  constexpr int kLess = Rows > 4 ? Rows / 2 : 0;
  NoDecoder none;
  auto& beside = [&]() -> auto& {
    if constexpr (Rows * Tiles == Mac::kRows * Mac::kTiles)
      return decoder;
    else
      return none;
  }();
  for (; rows - row > kLess; row += Rows)
    for (int j = j_begin; j < j_end; j += Tiles)
      multiply_block<Mac, Rows, Tiles>(left + row * kTileSteps, right + j * g.right_stride * kTileElems, g.right_stride,
                                       g.c + tile * g.c_i + row * 16 + j * g.c_j, g.c_j, g.q_tiles, g.accumulate, ahead,
                                       beside);
  if constexpr (kLess > 0)
    if (row < rows) multiply_rows<Mac, kLess, Tiles>(g, tile, row, rows, j_begin, j_end, ahead, decoder);
}

template <class Mac, class Decoder>
inline void multiply_tiles(const BlockArgs& g, Decoder& decoder) {
  constexpr int kRows = Mac::kRows, kTiles = Mac::kTiles;
  const int whole = g.right_tiles / kTiles * kTiles;
  Ahead ahead = g.ahead;
  for (int tile = 0; tile * kTileRows < g.rows; ++tile) {
    const int rows = g.rows - tile * kTileRows < kTileRows ? g.rows - tile * kTileRows : kTileRows;
    multiply_rows<Mac, kRows, kTiles>(g, tile, 0, rows, 0, whole, ahead, decoder);
    if constexpr (kTiles > 1)
      multiply_rows<Mac, kRows * kTiles, 1>(g, tile, 0, rows, whole, g.right_tiles, ahead, decoder);
  }
}

// Multiply-adds on registers only: what the unit can do. Returns the floating-point operations done.
template <class Mac>
inline double peak_of_registers(int64_t iterations) {
  constexpr int kAcc = Mac::kRows * Mac::kTiles * Mac::kVecs;
  alignas(64) typename Mac::Elem ones[kTileElems] = {};
  alignas(64) float sink[16];
  typename Mac::Acc acc[kAcc];
  const auto a = Mac::broadcast_left(ones, 0);
  const auto b = Mac::load_right(ones, 0, 0);
#pragma GCC unroll 16
  for (int i = 0; i < kAcc; ++i) acc[i] = Mac::zero_acc();
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 16
    for (int i = 0; i < kAcc; ++i) {
      acc[i] = Mac::madd(acc[i], a, b);
      __asm__ volatile("" : "+v"(acc[i]));  // or the loop is folded away
    }
  }
  for (int i = 0; i < kAcc; ++i) Mac::store_acc(sink, acc[i]);
  return 2.0 * kAcc * Mac::kLanes * (kTileSteps / Mac::kSteps) * static_cast<double>(iterations);
}
