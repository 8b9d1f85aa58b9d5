// Products of a few activation rows (decoding a token, thinly used experts), which are bound by reading the codes: the
// codes are streamed once in the order in which they lie, multiplied without being written anywhere, and scales are
// applied to sums instead of to codes where one scale serves a block's columns. Forward products multiply whole numbers
// where codes are whole (skinny_fixed.h) or bf16 pairs where bf16 holds them exactly, if the instruction set does; all
// others multiply fp32 lanes. Here a weight is its value in fp32, not rounded to bf16. Included inside the variant's
// namespace after gemm.h's packing.
#pragma once

constexpr int kSkinnySteps = 4096;     // reduction steps converted at once: 4 rows x 16 KiB
constexpr int kSkinnyAhead = 8 << 10;  // bytes that prefetching runs ahead of the arithmetic: the latency of DRAM

// Elements from one left tile of a term to the next.
inline int64_t left_tile_elems(const GemmArgs& g, const GemmTerm& term) {
  return term.few_rows ? g.m * kTileSteps : kTileElems;
}

// Activations [q0, q0 + nq) of all rows, from tiles of either side to fp32 rows [m][kSkinnySteps]; zeros up to 32.
inline void skinny_rows(const GemmArgs& g, const GemmTerm& term, int q0, int nq, float* rows) {
  constexpr int kStepsPerWord = 4 / sizeof(Ops::Elem);  // a word of a tile: a pair of bf16 or one float
  const int64_t elems = g.side == Side::left ? left_tile_elems(g, term) : kTileElems;
  for (int q = 0; q < round_up(nq, kTileSteps); q += kTileSteps) {
    const Ops::Elem* tile = static_cast<const Ops::Elem*>(term.act) + (q0 + q) / kTileSteps * elems;
    for (int r = 0; r < g.m; ++r) {
      float* to = rows + r * kSkinnySteps + q;
      if (g.side == Side::left) {
        for (int i = 0; i < kTileSteps; ++i) convert(tile[r * kTileSteps + i], to[i]);
      } else {
        for (int w = 0; w < kTileSteps / kStepsPerWord; ++w)
          for (int i = 0; i < kStepsPerWord; ++i)
            convert(tile[(w * kTileRows + r) * kStepsPerWord + i], to[w * kStepsPerWord + i]);
      }
    }
  }
}

inline void convert_exact(uint16_t from, float& to) { convert(from, to); }
inline void convert_exact(float from, float& to) { to = from; }

// The lines of a block: its codes and, behind them, the scales of its own.
template <class R>
inline void prefetch_block(const uint8_t* at, int block_bytes) {
  for (int i = 0; i < R::kCodeBytes; i += kLine) ask_for(at + i);
  for (int i = R::kCodeBytes; i < block_bytes; i += kLine) ask_for(at + i);
}

// Codes that are read in the order in which they lie, up to `end`; those at `next` are read after them.
struct CodeStream {
  const uint8_t *end, *next;

  const uint8_t* after(const uint8_t* at) const { return at < end ? at : next + (at - end); }
  template <class R>
  void prefetch(const uint8_t* block, int block_bytes) const {
    prefetch_block<R>(after(block + kSkinnyAhead), block_bytes);
  }
};

// Scales that are the same for all columns of a block, and nothing added: they are applied to sums. Others to weights.
template <class R>
constexpr bool kScalesSums = R::Scales::kAny && R::Scales::kParts == 1 && !R::Scales::kOffset;

// Codes that are multiplied as pairs of bf16, by activations straight from left tiles. Others in fp32, by fp32 rows.
template <class R>
constexpr bool kMultipliesPairs = sizeof(Ops::Elem) == 2 && R::Codes::kBf16 && (kScalesSums<R> || !R::Scales::kAny);

// The activations of some reduction steps: left tiles and, where a format needs them, the fp32 rows made of them.
struct SkinnyInput {
  const Ops::Elem* tiles;
  int64_t tile_elems;
  const float* rows;

  template <class R>
  auto pair(int row, int block, int p) const {
    if constexpr (kMultipliesPairs<R>) {
      return tiles + block * tile_elems + row * kTileSteps + 2 * p;
    } else {
      return rows + row * kSkinnySteps + block * kBlock + 2 * p;
    }
  }
};

// Pair p of 16 rows: what is multiplied, before the scales of sums.
template <class R>
inline void skinny_pair(const Weights<R>& weights, const uint8_t* codes, int p, Vec::F32& first, Vec::F32& second) {
  if constexpr (R::Codes::kOrdered) {
    R::Codes::decode_pairs(codes, p, first, second);
    if constexpr (R::Codes::kPairUnit != 1) {
      const auto unit = Vec::broadcast(R::Codes::kPairUnit);
      first = Vec::mul(first, unit), second = Vec::mul(second, unit);
    }
  } else {
    R::Codes::decode(codes, p, first, second);
    if constexpr (!kScalesSums<R>) first = weights.of(first, p), second = weights.of(second, p);
  }
}

// Sums of a block row: [half of its 32 rows c][row of x][pair modulo so many, so that few additions wait for another].
template <int Rows>
constexpr int kSkinnySums = Rows <= 2 ? 4 : 2;
template <int Rows>
using SkinnySums = Vec::F32[kStripTiles][Rows][kSkinnySums<Rows>];

// acc += the products of pairs [p, p + 4) of a block; x(row, pair) points at the activations.
template <class R, int Rows, class X>
inline void multiply_pairs(const uint8_t* block, int p, const X& x, SkinnySums<Rows>& acc) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    Vec::I32 pairs[kStripTiles];
    R::Codes::template pairs<Vec>(block, p + i, pairs);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const auto pair = Mac::broadcast_left(x(r, p + i), 0);
#pragma GCC unroll 2
      for (int half = 0; half < kStripTiles; ++half) {
        auto& sum = acc[half][r][i % kSkinnySums<Rows>];
        sum = Mac::madd(sum, pair, pairs[half]);
      }
    }
  }
}

// acc += the products of pair p of 16 rows of a block.
template <class R, int Rows, class X>
inline void multiply_lanes(const Weights<R>& weights, const uint8_t* codes, int p, const X& x,
                           Vec::F32 (&acc)[Rows][kSkinnySums<Rows>]) {
  Vec::F32 first, second;
  skinny_pair<R>(weights, codes, p, first, second);
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    if constexpr (R::Codes::kOrdered) {
      const Vec::F32 pair = Vec::broadcast2(x(r, p));
      acc[r][0] = Vec::fma(first, pair, acc[r][0]);
      acc[r][1] = Vec::fma(second, pair, acc[r][1]);
    } else {
      acc[r][0] = Vec::fma(first, Vec::broadcast(x(r, p)[0]), acc[r][0]);
      acc[r][1] = Vec::fma(second, Vec::broadcast(x(r, p)[1]), acc[r][1]);
    }
  }
}

// out[row][c] += scale of c times the sums.
template <class R, int Rows>
inline void add_sums(const SkinnySums<Rows>& acc, const BlockScales<R>& scales, float* out, int64_t ldo) {
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    Vec::F32 sums[kStripTiles];
#pragma GCC unroll 2
    for (int half = 0; half < kStripTiles; ++half) {
      if constexpr (R::Codes::kOrdered && !kMultipliesPairs<R>) {
        sums[half] = Vec::add_pairs(acc[half][r][0], acc[half][r][1]);
      } else {
        sums[half] = Vec::add(acc[half][r][0], acc[half][r][1]);
        if constexpr (kSkinnySums<Rows> == 4 && kMultipliesPairs<R>)
          sums[half] = Vec::add(sums[half], Vec::add(acc[half][r][2], acc[half][r][3]));
      }
    }
    if constexpr (kMultipliesPairs<R>) R::Codes::template unmix<Vec>(sums[0], sums[1]);
#pragma GCC unroll 2
    for (int half = 0; half < kStripTiles; ++half) {
      float* to = out + r * ldo + half * kTileRows;
      if constexpr (kScalesSums<R>) sums[half] = Vec::mul(sums[half], scales.scale(half, 0));
      Vec::store(to, Vec::add(Vec::load(to), sums[half]));
    }
  }
}

// out[m][c] += sum_k x[m][k] W[c][k] for 32 rows c of W (block row nb), blocks [kb0, kb0 + blocks); x begins there.
template <class R, int Rows>
inline void skinny_forward(const PackedMatrix& w, int nb, int kb0, int blocks, const SkinnyInput& x,
                           const CodeStream& stream, float* out, int64_t ldo) {
  using Codes = typename R::Codes;
  const int group = kScalesSums<R> ? w.group_size / kBlock : kb0 + blocks;
  const uint8_t* block = w.block(nb, kb0);
  const int block_bytes = w.block_bytes();
  for (int b = 0, stop = min_int(blocks, group - kb0 % group); b < blocks; stop = min_int(blocks, stop + group)) {
    const BlockScales<R> scales(w, nb, kb0 + b);
    SkinnySums<Rows> acc;
#pragma GCC unroll 2
    for (auto& half : acc)
#pragma GCC unroll 4
      for (auto& row : half)
#pragma GCC unroll 4
        for (auto& sum : row) sum = Vec::zero();
    for (; b < stop; ++b, block += block_bytes) {
      stream.prefetch<R>(block, block_bytes);
      const auto pair = [&](int row, int p) { return x.pair<R>(row, b, p); };
      if constexpr (kMultipliesPairs<R>) {
        for (int p = 0; p < kPairs; p += 4) multiply_pairs<R, Rows>(block, p, pair, acc);
      } else {
        const Weights<R> weights[kStripTiles] = {{w, nb, kb0 + b, 0}, {w, nb, kb0 + b, 1}};
        each_step<kPairs, Codes::kPairsTogether>([&](int p) __attribute__((always_inline)) {
#pragma GCC unroll 2
          for (int half = 0; half < kStripTiles; ++half)
            multiply_lanes<R, Rows>(weights[half], block + half * kTileRows * Codes::kRowBytes, p, pair, acc[half]);
        });
      }
    }
    add_sums<R, Rows>(acc, scales, out, ldo);
  }
}

// out[m][k] += sum_n rows[m][n] W[n][k] for columns of `blocks` block columns from kb0, 32 n (block row nb). Sums over
// n stay apart in lanes: lanes[row][block][pair][2 or 1 vectors], folded by skinny_fold.
template <class R, int Rows>
inline void skinny_backward(const PackedMatrix& w, int nb, int kb0, int blocks, const float* rows, float* lanes) {
  using Codes = typename R::Codes;
  constexpr int kVectors = Codes::kOrdered ? 1 : 2;
  const uint8_t* block = w.block(nb, kb0);
  const int block_bytes = w.block_bytes();
  const int64_t ahead = int64_t{w.col_blocks()} * block_bytes * ((kSkinnyAhead - 1) / (blocks * block_bytes) + 1);
  for (int b = 0; b < blocks; ++b, block += block_bytes) {
    prefetch_block<R>(block + ahead, block_bytes);
    const Weights<R> weights[kStripTiles] = {{w, nb, kb0 + b, 0}, {w, nb, kb0 + b, 1}};
    Vec::F32 d[Rows][kStripTiles];
    for (int r = 0; r < Rows; ++r)
      for (int half = 0; half < kStripTiles; ++half) {
        d[r][half] = Vec::load(rows + r * kSkinnySteps + half * kTileRows);
        if constexpr (kScalesSums<R>) d[r][half] = Vec::mul(d[r][half], weights[half].scales[0]);
      }
    float* to = lanes + int64_t{b} * kPairs * kVectors * kTileRows;
    const int64_t row_lanes = int64_t{blocks} * kPairs * kVectors * kTileRows;
    each_step<kPairs, Codes::kPairsTogether>([&](int p) __attribute__((always_inline)) {
      Vec::F32 v[kStripTiles][2];
#pragma GCC unroll 2
      for (int half = 0; half < kStripTiles; ++half)
        skinny_pair<R>(weights[half], block + half * kTileRows * Codes::kRowBytes, p, v[half][0], v[half][1]);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        float* at = to + p * kVectors * kTileRows + r * row_lanes;
        if constexpr (Codes::kOrdered) {
          Vec::F32 sum = Vec::load(at);
#pragma GCC unroll 2
          for (int half = 0; half < kStripTiles; ++half) {
            sum = Vec::fma(v[half][0], Vec::twice_low(d[r][half]), sum);
            sum = Vec::fma(v[half][1], Vec::twice_high(d[r][half]), sum);
          }
          Vec::store(at, sum);
        } else {
#pragma GCC unroll 2
          for (int odd = 0; odd < 2; ++odd) {
            Vec::F32 sum = Vec::load(at + odd * kTileRows);
            sum = Vec::fma(v[0][odd], d[r][0], sum);
            sum = Vec::fma(v[1][odd], d[r][1], sum);
            Vec::store(at + odd * kTileRows, sum);
          }
        }
      }
    });
  }
}

// out[c] += the sums of the lanes of column c.
template <bool Ordered>
inline void skinny_fold(const float* lanes, int columns, float* out) {
  for (int c = 0; c < columns; ++c) {
    const float* at = lanes + (Ordered ? c / 2 * kTileRows + c % 2 : c * kTileRows);
    float sum = 0;
    for (int i = 0; i < kTileRows; i += Ordered ? 2 : 1) sum += at[i];
    out[c] += sum;
  }
}

// Some reduction steps of a term, and where their sums go: out[m][ldo] is added to, whole blocks of columns.
struct SkinnyChunk {
  const GemmArgs& g;
  const GemmTerm& term;
  int q0, nq;
  float *rows, *lanes, *out;
  int64_t ldo;

  void make_rows() const { skinny_rows(g, term, q0, nq, rows); }
  // Block row `nb` of the chunk, and what is read after it: the next one, the next chunk or the caller's next codes.
  CodeStream stream(int nb) const {
    const PackedMatrix& w = *term.packed;
    const int last = (g.c0 + g.nc - 1) / kBlock, stop = static_cast<int>(ceil_div(q0 + nq, kBlock));
    const uint8_t* end = w.block(nb, stop);
    if (nb < last) return {end, w.block(nb + 1, q0 / kBlock)};
    if (stop < w.col_blocks()) return {end, w.block(g.c0 / kBlock, stop)};
    return {end, g.upcoming != nullptr ? g.upcoming->packed.block(g.upcoming->c0 / kBlock, 0) : end};
  }
};

#ifdef __AVX512VNNI__
#include "kernels/skinny_fixed.h"
#else
template <class R, int Rows>
constexpr bool kMultipliesFixed = false;
template <class R, int Rows>
inline void fixed_packed(const SkinnyChunk&, int, int) {}
#endif

template <class R, int Rows>
inline void skinny_packed(const SkinnyChunk& c) {
  const GemmArgs& g = c.g;
  const PackedMatrix& w = *c.term.packed;
  const int first = g.c0 / kBlock, strips = static_cast<int>(ceil_div(g.nc, kBlock));
  const int kb = c.q0 / kBlock, blocks = static_cast<int>(ceil_div(c.nq, kBlock));
  if (g.side == Side::left) {
    if constexpr (kMultipliesFixed<R, Rows>) return fixed_packed<R, Rows>(c, first, strips);
    if constexpr (!kMultipliesPairs<R>) c.make_rows();
    const int64_t elems = left_tile_elems(g, c.term);
    const SkinnyInput x{static_cast<const Ops::Elem*>(c.term.act) + kb * elems, elems, c.rows};
    for (int s = 0; s < strips; ++s)
      skinny_forward<R, Rows>(w, first + s, kb, blocks, x, c.stream(first + s), c.out + s * kBlock, c.ldo);
    return;
  }
  c.make_rows();
  const int64_t row_lanes = int64_t{strips} * kBlock * kTileRows / (R::Codes::kOrdered ? 2 : 1);
  __builtin_memset(c.lanes, 0, Rows * row_lanes * sizeof(float));
  for (int b = 0; b < blocks; ++b) skinny_backward<R, Rows>(w, kb + b, first, strips, c.rows + b * kBlock, c.lanes);
  for (int r = 0; r < Rows; ++r)
    skinny_fold<R::Codes::kOrdered>(c.lanes + r * row_lanes, strips * kBlock, c.out + r * c.ldo);
}

template <class R>
inline void skinny_format(const SkinnyChunk& c) {
  switch (c.g.m) {
    case 1:
      return skinny_packed<R, 1>(c);
    case 2:
      return skinny_packed<R, 2>(c);
    case 3:
      return skinny_packed<R, 3>(c);
    default:
      return skinny_packed<R, 4>(c);
  }
}

// out[m][ldo] += sum_q rows[m][q] F[c][q] of a dense factor, which has one index running contiguously.
template <class Src>
inline void skinny_dense(const GemmArgs& g, const DenseView& v, int q0, int nq, const float* rows, float* out,
                         int64_t ldo) {
  const auto* base = static_cast<const Src*>(v.base);
  const auto row_of = [](const int32_t* index, int i) { return int64_t{index ? index[i] : i}; };
  if (v.qs == 1) {
    for (int c = 0; c < g.nc; ++c) {
      const Src* factor = base + row_of(v.cidx, g.c0 + c) * v.cs + q0;
      for (int r = 0; r < g.m; ++r) {
        const float* x = rows + r * kSkinnySteps;
        float lanes[kTileRows] = {};
        int q = 0;
        for (; q + kTileRows <= nq; q += kTileRows)
          for (int i = 0; i < kTileRows; ++i) {
            float value;
            convert_exact(factor[q + i], value);
            lanes[i] += x[q + i] * value;
          }
        float sum = 0;
        for (; q < nq; ++q) {
          float value;
          convert_exact(factor[q], value);
          sum += x[q] * value;
        }
        for (float lane : lanes) sum += lane;
        out[r * ldo + c] += sum;
      }
    }
    return;
  }
  for (int q = 0; q < nq; ++q) {
    const Src* factor = base + row_of(v.qidx, q0 + q) * v.qs + g.c0;
    for (int r = 0; r < g.m; ++r) {
      const float x = rows[r * kSkinnySteps + q];
      float* to = out + r * ldo;
      for (int c = 0; c < g.nc; ++c) {
        float value;
        convert_exact(factor[c], value);
        to[c] += x * value;
      }
    }
  }
}

constexpr size_t kSkinnyScratch =
    sizeof(float) * kSkinnyRows * (kSkinnySteps + kFewRowsCols + int64_t{kFewRowsCols} * kTileRows);

inline void skinny_gemm(const GemmArgs& g) {
  auto* rows = static_cast<float*>(g.scratch);
  float *sums = rows + kSkinnyRows * kSkinnySteps, *lanes = sums + kSkinnyRows * kFewRowsCols;
  const bool apart = g.transposed || g.nc % kBlock != 0;
  float* out = apart ? sums : g.out;
  const int64_t ldo = apart ? kFewRowsCols : g.ldo;
  if (g.upcoming != nullptr) {
    const auto* act = static_cast<const uint8_t*>(g.upcoming->act);
    for (int64_t at = 0; at < g.upcoming->act_bytes; at += kLine) ask_for(act + at);
  }
  for (int r = 0; r < g.m; ++r) __builtin_memset(out + r * ldo, 0, round_up(g.nc, kBlock) * sizeof(float));
  for (int t = 0; t < g.num_terms; ++t) {
    const GemmTerm& term = g.terms[t];
    for (int q0 = 0; q0 < term.q; q0 += kSkinnySteps) {
      const int nq = min_int(kSkinnySteps, term.q - q0);
      const SkinnyChunk chunk{g, term, q0, nq, rows, lanes, out, ldo};
      if (term.packed == nullptr) {
        chunk.make_rows();
        term.dense->is_float ? skinny_dense<float>(g, *term.dense, q0, nq, rows, out, ldo)
                             : skinny_dense<uint16_t>(g, *term.dense, q0, nq, rows, out, ldo);
        continue;
      }
      switch (term.packed->format) {
#define KT_FORMAT(name, Codes, Scales, bits, ...)    \
  case kt_sft::Format::name:                         \
    skinny_format<Row<kt_sft::Format::name>>(chunk); \
    break;
#include "kernels/registry.inc"
      }
    }
  }
  const int64_t row = g.transposed ? 1 : g.ldo, column = g.transposed ? g.ldo : 1;
  for (int r = 0; apart && r < g.m; ++r)
    for (int c = 0; c < g.nc; ++c) g.out[r * row + c * column] = sums[r * kFewRowsCols + c];
}
