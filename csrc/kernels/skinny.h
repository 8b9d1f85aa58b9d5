// Products of a few activation rows (decoding a token, thinly used experts), which are bound by reading the codes: the
// codes are streamed once in the order in which they lie, multiplied in fp32 lanes without being written anywhere, and
// scales are applied to sums instead of to codes where one scale serves a block's columns. Here a weight is its value
// in fp32, not rounded to bf16. Included inside the variant's namespace after gemm.h's packing.
#pragma once

constexpr int kSkinnySteps = 4096;     // reduction steps converted at once: 4 rows x 16 KiB
constexpr int kSkinnyAhead = 4 << 10;  // bytes that prefetching runs ahead of the arithmetic: the latency of DRAM

// Activations [q0, q0 + nq) of all rows, from tiles of either side to fp32 rows [m][kSkinnySteps]; zeros up to 32.
inline void skinny_rows(const GemmArgs& g, const GemmTerm& term, int q0, int nq, float* rows) {
  for (int q = 0; q < round_up(nq, kTileSteps); q += kTileSteps) {
    const Ops::Elem* tile = static_cast<const Ops::Elem*>(term.act) + int64_t{(q0 + q) / kTileSteps} * kTileElems;
    for (int r = 0; r < g.m; ++r)
      for (int i = 0; i < kTileSteps; ++i) {
        const int right = sizeof(Ops::Elem) == 2 ? (i / 2 * kTileRows + r) * 2 + i % 2 : i * kTileRows + r;
        float value;
        convert(tile[g.side == Side::left ? r * kTileSteps + i : right], value);
        rows[r * kSkinnySteps + q + i] = value;
      }
  }
}

inline void convert_exact(uint16_t from, float& to) { convert(from, to); }
inline void convert_exact(float from, float& to) { to = from; }

template <int Bytes>
inline void prefetch_ahead(const uint8_t* at) {
  for (int i = 0; i < Bytes; i += 64) __builtin_prefetch(at + i);
}

// Scales that are the same for all columns of a block, and nothing added: they are applied to sums. Others to weights.
template <class R>
constexpr bool kScalesSums = R::Scales::kAny && R::Scales::kParts == 1 && !R::Scales::kOffset;

// Pair p of 16 rows: what is multiplied, before the scales of sums.
template <class R>
inline void skinny_pair(const Weights<R>& weights, const uint8_t* codes, int p, Vec::F32& first, Vec::F32& second) {
  if constexpr (R::Codes::kOrdered) {
    R::Codes::decode_pairs(codes, p, first, second);
  } else {
    R::Codes::decode(codes, p, first, second);
    if constexpr (!kScalesSums<R>) first = weights.of(first, p), second = weights.of(second, p);
  }
}

// out[m][c] += sum_k rows[m][k] W[c][k] for 32 rows c of W (block row nb), blocks [kb0, kb0 + blocks).
template <class R, int Rows>
inline void skinny_forward(const PackedMatrix& w, int nb, int kb0, int blocks, const float* rows, float* out,
                           int64_t ldo) {
  using Codes = typename R::Codes;
  const int group = kScalesSums<R> ? w.group_size / kBlock : kb0 + blocks;
  const uint8_t* block = w.block(nb, kb0);
  for (int b = 0; b < blocks;) {
    const int first_block = b, stop = min_int(blocks, ((kb0 + b) / group + 1) * group - kb0);
    Vec::F32 acc[Rows][kStripTiles][2];
    for (int r = 0; r < Rows; ++r)
      for (int i = 0; i < 2 * kStripTiles; ++i) acc[r][i / 2][i % 2] = Vec::zero();
    for (; b < stop; ++b, block += R::kBlockBytes) {
      prefetch_ahead<R::kBlockBytes>(block + kSkinnyAhead);
      const Weights<R> weights[kStripTiles] = {{w, nb, kb0 + b, 0}, {w, nb, kb0 + b, 1}};
      for (int p = 0; p < kPairs; ++p)
#pragma GCC unroll 2
        for (int half = 0; half < kStripTiles; ++half) {
          Vec::F32 first, second;
          skinny_pair<R>(weights[half], block + half * kTileRows * Codes::kPairBytes, p, first, second);
#pragma GCC unroll 4
          for (int r = 0; r < Rows; ++r) {
            const float* x = rows + r * kSkinnySteps + b * kBlock + 2 * p;
            if constexpr (Codes::kOrdered) {
              const Vec::F32 pair = Vec::broadcast2(x);
              acc[r][half][0] = Vec::fma(first, pair, acc[r][half][0]);
              acc[r][half][1] = Vec::fma(second, pair, acc[r][half][1]);
            } else {
              acc[r][half][0] = Vec::fma(first, Vec::broadcast(x[0]), acc[r][half][0]);
              acc[r][half][1] = Vec::fma(second, Vec::broadcast(x[1]), acc[r][half][1]);
            }
          }
        }
    }
    for (int half = 0; half < kStripTiles; ++half) {
      const Weights<R> weights(w, nb, kb0 + first_block, half);
      for (int r = 0; r < Rows; ++r) {
        Vec::F32 sum;
        if constexpr (Codes::kOrdered) {
          sum = Vec::add_pairs(acc[r][half][0], acc[r][half][1]);
        } else {
          sum = Vec::add(acc[r][half][0], acc[r][half][1]);
        }
        float* to = out + r * ldo + half * kTileRows;
        if constexpr (kScalesSums<R>) sum = Vec::mul(sum, weights.scales[0]);
        Vec::store(to, Vec::add(Vec::load(to), sum));
      }
    }
  }
}

// out[m][k] += sum_n rows[m][n] W[n][k] for columns of `blocks` block columns from kb0, 32 n (block row nb). Sums over
// n stay apart in lanes: lanes[row][block][pair][2 or 1 vectors], folded by skinny_fold.
template <class R, int Rows>
inline void skinny_backward(const PackedMatrix& w, int nb, int kb0, int blocks, const float* rows, float* lanes) {
  using Codes = typename R::Codes;
  constexpr int kVectors = Codes::kOrdered ? 1 : 2;
  const uint8_t* block = w.block(nb, kb0);
  const int64_t ahead = int64_t{w.col_blocks()} * R::kBlockBytes * ((kSkinnyAhead - 1) / (blocks * R::kBlockBytes) + 1);
  for (int b = 0; b < blocks; ++b, block += R::kBlockBytes) {
    prefetch_ahead<R::kBlockBytes>(block + ahead);
    const Weights<R> weights[kStripTiles] = {{w, nb, kb0 + b, 0}, {w, nb, kb0 + b, 1}};
    Vec::F32 d[Rows][kStripTiles];
    for (int r = 0; r < Rows; ++r)
      for (int half = 0; half < kStripTiles; ++half) {
        d[r][half] = Vec::load(rows + r * kSkinnySteps + half * kTileRows);
        if constexpr (kScalesSums<R>) d[r][half] = Vec::mul(d[r][half], weights[half].scales[0]);
      }
    float* to = lanes + int64_t{b} * kPairs * kVectors * kTileRows;
    const int64_t row_lanes = int64_t{blocks} * kPairs * kVectors * kTileRows;
    for (int p = 0; p < kPairs; ++p, to += kVectors * kTileRows) {
      Vec::F32 v[kStripTiles][2];
#pragma GCC unroll 2
      for (int half = 0; half < kStripTiles; ++half)
        skinny_pair<R>(weights[half], block + half * kTileRows * Codes::kPairBytes, p, v[half][0], v[half][1]);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        float* at = to + r * row_lanes;
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
    }
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

// One chunk of reduction steps of a packed term; out[m][kMaxCols] is added to.
template <class R, int Rows>
inline void skinny_packed(const GemmArgs& g, const PackedMatrix& w, int q0, int nq, const float* rows, float* lanes,
                          float* out) {
  const int first = g.c0 / kBlock, strips = static_cast<int>(ceil_div(g.nc, kBlock));
  const int blocks = static_cast<int>(ceil_div(nq, kBlock));
  if (g.side == Side::left) {
    for (int s = 0; s < strips; ++s)
      skinny_forward<R, Rows>(w, first + s, q0 / kBlock, blocks, rows, out + s * kBlock, kMaxCols);
    return;
  }
  const int64_t row_lanes = int64_t{strips} * kBlock * kTileRows / (R::Codes::kOrdered ? 2 : 1);
  __builtin_memset(lanes, 0, Rows * row_lanes * sizeof(float));
  for (int b = 0; b < blocks; ++b)
    skinny_backward<R, Rows>(w, q0 / kBlock + b, first, strips, rows + b * kBlock, lanes);
  for (int r = 0; r < Rows; ++r)
    skinny_fold<R::Codes::kOrdered>(lanes + r * row_lanes, strips * kBlock, out + r * kMaxCols);
}

template <class R>
inline void skinny_format(const GemmArgs& g, const PackedMatrix& w, int q0, int nq, const float* rows, float* lanes,
                          float* out) {
  switch (g.m) {
    case 1:
      return skinny_packed<R, 1>(g, w, q0, nq, rows, lanes, out);
    case 2:
      return skinny_packed<R, 2>(g, w, q0, nq, rows, lanes, out);
    case 3:
      return skinny_packed<R, 3>(g, w, q0, nq, rows, lanes, out);
    default:
      return skinny_packed<R, 4>(g, w, q0, nq, rows, lanes, out);
  }
}

// out[m][c] += sum_q rows[m][q] F[c][q] of a dense factor, which has one index running contiguously.
template <class Src>
inline void skinny_dense(const GemmArgs& g, const DenseView& v, int q0, int nq, const float* rows, float* out) {
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
        out[r * kMaxCols + c] += sum;
      }
    }
    return;
  }
  for (int q = 0; q < nq; ++q) {
    const Src* factor = base + row_of(v.qidx, q0 + q) * v.qs + g.c0;
    for (int r = 0; r < g.m; ++r) {
      const float x = rows[r * kSkinnySteps + q];
      float* to = out + r * kMaxCols;
      for (int c = 0; c < g.nc; ++c) {
        float value;
        convert_exact(factor[c], value);
        to[c] += x * value;
      }
    }
  }
}

constexpr size_t kSkinnyScratch =
    sizeof(float) * kSkinnyRows * (kSkinnySteps + kMaxCols + int64_t{kMaxCols} * kTileRows);

inline void skinny_gemm(const GemmArgs& g) {
  auto* rows = static_cast<float*>(g.scratch);
  float *out = rows + kSkinnyRows * kSkinnySteps, *lanes = out + kSkinnyRows * kMaxCols;
  __builtin_memset(out, 0, kSkinnyRows * kMaxCols * sizeof(float));
  for (int t = 0; t < g.num_terms; ++t) {
    const GemmTerm& term = g.terms[t];
    for (int q0 = 0; q0 < term.q; q0 += kSkinnySteps) {
      const int nq = min_int(kSkinnySteps, term.q - q0);
      skinny_rows(g, term, q0, nq, rows);
      if (term.packed == nullptr) {
        term.dense->is_float ? skinny_dense<float>(g, *term.dense, q0, nq, rows, out)
                             : skinny_dense<uint16_t>(g, *term.dense, q0, nq, rows, out);
        continue;
      }
      switch (term.packed->format) {
#define KT_FORMAT(name, Codes, Scales, bits, ...)                                        \
  case kt_sft::Format::name:                                                             \
    skinny_format<Row<kt_sft::Format::name>>(g, *term.packed, q0, nq, rows, lanes, out); \
    break;
#include "kernels/registry.inc"
      }
    }
  }
  for (int r = 0; r < g.m; ++r) {
    const int64_t row = g.transposed ? 1 : g.ldo, column = g.transposed ? g.ldo : 1;
    for (int c = 0; c < g.nc; ++c) g.out[r * row + c * column] = out[r * kMaxCols + c];
  }
}
