// Products of activations, the left operand, with codes that are decoded in registers, a pair of columns and 32 rows of
// W at a time, again for every 8 rows of activations: permutes use the ports that VDPBF16PS leaves free, so that they
// cost next to nothing, and nothing is stored. Scales are applied to sums. For formats that skinny.h multiplies as
// pairs of bf16. Included inside the variant's namespace.
#pragma once

constexpr int kDirectTiles = 64;  // reduction tiles from one visit of the sums to the next

// Of more rows the decoding for every 8 costs more than one for all into a panel: soon where an operation takes its
// unit for two halves, so that permutes delay products. Codes of 16 bits are not decoded.
template <class R>
inline int direct_rows() {
  return R::kInfo.bits < 16 && cpu_features().halves_512 ? 8 : 64;
}

inline bool multiplies_codes(const GemmArgs& g, const GemmTerm& term) {
  if (!ActiveOps::kMultipliesCodes || g.side != Side::left || term.packed == nullptr) return false;
  switch (term.packed->format) {
#define KT_FORMAT(name, Codes, Scales, bits, ...) \
  case kt_sft::Format::name:                      \
    return kMultipliesPairs<Row<kt_sft::Format::name>> && g.m <= direct_rows<Row<kt_sft::Format::name>>();
#include "kernels/registry.inc"
  }
  return false;
}

// Sums of some rows and 32 columns, in the order in which codes are decoded.
template <int Rows>
using CodeSums = Vec::F32[Rows][kStripTiles];

// Reduction tiles [q0, q1) of a block row: sums = left * codes.
template <class R, int Rows>
inline __attribute__((always_inline)) void multiply_blocks(const uint8_t* block, int block_bytes, const Ops::Elem* left,
                                                           int q0, int q1, const Ahead& ahead, int lines,
                                                           CodeSums<Rows>& sums) {
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) sums[r][0] = sums[r][1] = Vec::zero();
  for (int q = q0; q < q1; ++q) {
    const uint8_t* codes = block + q * block_bytes;
    const Ops::Elem* tile = left + q * kTileElems;
    for (int i = 0; i < lines; ++i) ask_for(ahead.at + q * ahead.stride + i * 64);
    Vec::I32 next[kStripTiles];
    R::Codes::template pairs<Vec>(codes, 0, next);
    each_step<kPairs, max_int(2, R::Codes::kPairsTogether)>([&](int p) __attribute__((always_inline)) {
      const Vec::I32 pairs[kStripTiles] = {next[0], next[1]};
      if (p + 1 < kPairs) R::Codes::template pairs<Vec>(codes, p + 1, next);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const auto pair = Mac::broadcast_left(tile + r * kTileSteps, p);
#pragma GCC unroll 2
        for (int half = 0; half < kStripTiles; ++half) sums[r][half] = Mac::madd(sums[r][half], pair, pairs[half]);
      }
    });
  }
}

// C (+)= sums.
template <class R, int Rows>
inline void store_sums(CodeSums<Rows>& sums, float* c, bool accumulate) {
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    R::Codes::template unmix<Vec>(sums[r][0], sums[r][1]);
#pragma GCC unroll 2
    for (int half = 0; half < kStripTiles; ++half) {
      float* to = c + half * 256 + r * kTileRows;
      Vec::store(to, accumulate ? Vec::add(Vec::load(to), sums[r][half]) : sums[r][half]);
    }
  }
}

// use(row, half, scale) for all sums.
template <class R, int Rows, class Use>
inline __attribute__((always_inline)) void each_sum(const BlockScales<R>& scales, const Use& use) {
  Vec::F32 scale[kStripTiles] = {scales.scale(0, 0), scales.scale(1, 0)};
  R::Codes::template mix<Vec>(scale[0], scale[1]);
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
    for (int half = 0; half < kStripTiles; ++half) use(r, half, scale[half]);
}

template <class R, int Rows>
inline void multiply_codes(const PackedMatrix& w, const Panel& at, const Ops::Elem* left, float* c, bool accumulate,
                           float* scratch, Ahead& ahead) {
  const int lines = min_int(ahead.lines, ahead.share), all = at.q_tiles;
  const uint8_t* block = w.block(at.strip, at.q0);
  const int group = w.group_size / kBlock;
  int stop = R::Scales::kAny ? group - at.q0 % group : all;
  CodeSums<Rows> sums;
  if (stop >= all) {
    multiply_blocks<R, Rows>(block, w.block_bytes(), left, 0, all, ahead, lines, sums);
    if constexpr (R::Scales::kAny)
      each_sum<R, Rows>({w, at.strip, at.q0}, [&](int r, int half, Vec::F32 scale) __attribute__((always_inline)) {
        sums[r][half] = Vec::mul(sums[r][half], scale);
      });
  } else if constexpr (R::Scales::kAny) {
    // A group's sums, times their scales, pass through memory: both would fill the registers twice.
    const auto place = [&](int r, int half) { return scratch + (2 * r + half) * kTileRows; };
    WalkingScales<R> scales(w, at.strip, at.q0, true);
    __builtin_memset(scratch, 0, sizeof sums);
    for (int q = 0; q < all; stop += group) {
      const BlockScales<R> of_group = scales;
      const int end = min_int(all, stop);
      multiply_blocks<R, Rows>(block, w.block_bytes(), left, q, end, ahead, lines, sums);
      for (; q < end; ++q) scales.next();
      each_sum<R, Rows>(of_group, [&](int r, int half, Vec::F32 scale) __attribute__((always_inline)) {
        Vec::store(place(r, half), Vec::fma(sums[r][half], scale, Vec::load(place(r, half))));
      });
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
      for (int half = 0; half < kStripTiles; ++half) sums[r][half] = Vec::load(place(r, half));
  }
  store_sums<R, Rows>(sums, c, accumulate);
  ahead.at += lines * 64, ahead.lines -= lines;
}

template <class R>
inline void multiply_codes(const PackedMatrix& w, const Panel& at, const BlockArgs& g, float* scratch) {
  Ahead ahead = g.ahead;
  for (int row = 0; row < g.rows; row += 8) {
    const int tile = row / kTileRows, within = row % kTileRows;
    const Ops::Elem* left =
        static_cast<const Ops::Elem*>(g.left) + tile * g.left_stride * kTileElems + within * kTileSteps;
    float* c = g.c + tile * g.c_i + within * kTileRows;
    if (g.rows - row > 4) {
      multiply_codes<R, 8>(w, at, left, c, g.accumulate, scratch, ahead);
    } else {
      multiply_codes<R, 4>(w, at, left, c, g.accumulate, scratch, ahead);
    }
  }
}

// As ActiveOps::multiply, with the codes of a panel for the right operand; scratch of 8 x 32 floats.
inline void multiply_codes(const PackedMatrix& w, const Panel& at, const BlockArgs& g, float* scratch) {
  switch (w.format) {
#define KT_FORMAT(name, Codes, Scales, bits, ...)                   \
  case kt_sft::Format::name:                                        \
    if constexpr (kMultipliesPairs<Row<kt_sft::Format::name>>)      \
      multiply_codes<Row<kt_sft::Format::name>>(w, at, g, scratch); \
    return;
#include "kernels/registry.inc"
  }
}
