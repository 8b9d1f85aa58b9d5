// The one driver: batch-reduce product over packed or dense weights, and the packing of tiles.
//   out[m][c] = sum_terms sum_q act[m][q] * W[c][q]
// Loop order (Position has another one for few rows): reduction panels of kPanelTiles outermost, then strips of 32
// weight columns, then activation tiles. A decoded strip panel (16 KiB of bf16) stays in L1 for all rows; the
// activations of a panel and the accumulators stay in L2 for all strips; the codes are read once. Of few rows there is
// no panel where direct.h can do without. Included inside the variant's namespace after Ops.
#pragma once

#include "kernels/decode.h"

// ---- packing dense operands
// ------------------------------------------------------------------------------------------

inline uint32_t bits_of(float v) {
  uint32_t bits;
  __builtin_memcpy(&bits, &v, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float v;
  __builtin_memcpy(&v, &bits, 4);
  return v;
}
// Round to nearest even; NaN stays NaN.
inline uint16_t to_bf16(float v) {
  const uint32_t bits = bits_of(v);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(v != v ? 0x7fc0 : rounded);
}
inline void convert(uint16_t from, uint16_t& to) { to = from; }
inline void convert(uint16_t from, float& to) { to = float_of(uint32_t{from} << 16); }
inline void convert(float from, uint16_t& to) { to = to_bf16(from); }
inline void convert(float from, float& to) { to = float_of(uint32_t{to_bf16(from)} << 16); }

// Whole rows, a register at a time; Cols is 16 or 32.
template <int Cols>
inline void copy_row(const uint16_t* from, uint16_t* to) {
  __builtin_memcpy(to, from, Cols * sizeof *to);
}
template <int Cols>
inline void copy_row(const uint16_t* from, float* to) {
  for (int b = 0; b < Cols; ++b) convert(from[b], to[b]);
}
template <int Cols>
inline void copy_row(const float* from, Ops::Elem* to) {
  for (int b = 0; b < Cols; b += 16) Ops::store_left(to + b, Vec::load(from + b));
}

// What the loops read next is on its way meanwhile: reduction steps four tiles ahead, columns of the next strip.
template <int Rows, int Cols, class Src>
inline void prefetch_ahead(const Src* src) {
  constexpr int kAhead = Rows == kTileRows ? 4 * kTileSteps : kBlock;
  for (int i = 0; i < Cols; i += 64 / static_cast<int>(sizeof(Src))) __builtin_prefetch(src + kAhead + i);
}

// dst[a][b], a < Rows, b < Cols: element (a0 + a, b0 + b) of a matrix whose b runs contiguously; zeros outside na, nb.
template <int Rows, int Cols, class Src>
inline void copy_in(const Src* base, int64_t stride, const int32_t* index, int a0, int na, int b0, int nb,
                    Ops::Elem* dst) {
  for (int a = 0; a < Rows; ++a) {
    Ops::Elem* row = dst + a * Cols;
    if (a >= na || nb <= 0) {
      for (int b = 0; b < Cols; ++b) row[b] = 0;
      continue;
    }
    const Src* src = base + int64_t{index ? index[a0 + a] : a0 + a} * stride + b0;
    if (nb >= Cols) {
      prefetch_ahead<Rows, Cols>(src);
      copy_row<Cols>(src, row);
    } else {
      alignas(64) Src part[Cols] = {};  // converted like whole rows, a register at a time
      __builtin_memcpy(part, src, nb * sizeof *src);
      copy_row<Cols>(part, row);
    }
  }
}

template <int Rows, int Cols>
inline void copy_any(const DenseView& v, int64_t stride, const int32_t* index, int a0, int na, int b0, int nb,
                     Ops::Elem* dst) {
  if (v.is_float) {
    copy_in<Rows, Cols>(static_cast<const float*>(v.base), stride, index, a0, na, b0, nb, dst);
  } else {
    copy_in<Rows, Cols>(static_cast<const uint16_t*>(v.base), stride, index, a0, na, b0, nb, dst);
  }
}

// [16 c][32 q] -> right tile.
inline void right_from_rows(const Ops::Elem* rows, Ops::Elem* tile) {
  constexpr int kWords = kTileSteps * sizeof(Ops::Elem) / 4;  // 16 words of bf16 pairs, or 32 floats
  for (int w = 0; w < kWords; w += 16) {
    const uint32_t* at[16];
    for (int c = 0; c < 16; ++c) at[c] = reinterpret_cast<const uint32_t*>(rows + c * kTileSteps) + w;
    transpose16(at, reinterpret_cast<uint32_t*>(tile) + w * 16);
  }
}

// [32 q][16 c] -> right tile.
template <class Elem>
inline void right_from_columns(const Elem* columns, Elem* tile) {
  if constexpr (sizeof(Ops::Elem) == 2) {
    for (int p = 0; p < kPairs; ++p) interleave16(columns + 2 * p * 16, columns + (2 * p + 1) * 16, tile + p * 32);
  } else {
    __builtin_memcpy(tile, columns, kTileElems * sizeof(Ops::Elem));
  }
}

// [32 q][16 c] -> left tile: a transpose of 32-bit words, which are pairs of q in bf16.
inline void left_from_columns(const Ops::Elem* columns, Ops::Elem* tile) {
  constexpr int kWords = kTileSteps * sizeof(Ops::Elem) / 4;
  alignas(64) Ops::Elem pairs[kTileElems];
  alignas(64) uint32_t turned[256];
  right_from_columns(columns, pairs);
  for (int w = 0; w < kWords; w += 16) {
    const uint32_t* at[16];
    for (int i = 0; i < 16; ++i) at[i] = reinterpret_cast<const uint32_t*>(pairs) + (w + i) * 16;
    transpose16(at, turned);
    for (int c = 0; c < kTileRows; ++c)
      __builtin_memcpy(reinterpret_cast<uint32_t*>(tile + c * kTileSteps) + w, turned + c * 16, 64);
  }
}

// Whole right tiles of a bf16 matrix whose c runs contiguously, kTiles of them beside each other. Rows may lie
// anywhere, and often 4 KiB apart, where L1 keeps few: lines are read once. What the next tile to the right reads is on
// its way meanwhile.
template <int kTiles, class Elem>
inline void right_from_source(const PackArgs& p, int c, int q, Elem* tile) {
  const auto row = [&](int i) {
    return static_cast<const uint16_t*>(p.view.base) + int64_t{p.view.qidx ? p.view.qidx[q + i] : q + i} * p.view.qs +
           c;
  };
  for (int i = 0; i < kPairs; ++i) {
    const uint16_t *even = row(2 * i), *odd = row(2 * i + 1);
    __builtin_prefetch(even + kBlock), __builtin_prefetch(odd + kBlock);
    for (int t = 0; t < kTiles; ++t)
      interleave16(even + t * kTileRows, odd + t * kTileRows, tile + t * p.q_stride * kTileElems + i * kBlock);
  }
}

inline void pack_tile(const PackArgs& p, int c, int q, Ops::Elem* tile) {
  const int nc = min_int(kTileRows, p.nc - c), nq = min_int(kTileSteps, p.nq - q);
  alignas(64) Ops::Elem buffer[kTileElems];
  if (p.view.qs == 1) {
    Ops::Elem* rows = p.side == Side::left ? tile : buffer;
    copy_any<kTileRows, kTileSteps>(p.view, p.view.cs, p.view.cidx, p.c0 + c, nc, p.q0 + q, nq, rows);
    if (p.side == Side::right) right_from_rows(buffer, tile);
    return;
  }
  if constexpr (sizeof(Ops::Elem) == 2) {
    const bool whole = nc == kTileRows && nq == kTileSteps;
    if (whole && !p.view.is_float && p.side == Side::right) return right_from_source<1>(p, p.c0 + c, p.q0 + q, tile);
  }
  copy_any<kTileSteps, kTileRows>(p.view, p.view.qs, p.view.qidx, p.q0 + q, nq, p.c0 + c, nc, buffer);
  if (p.side == Side::right) {
    right_from_columns(buffer, tile);
  } else {
    left_from_columns(buffer, tile);
  }
}

// Left tiles of nc rows each.
template <class Src>
inline void pack_few_rows(const PackArgs& p) {
  for (int c = 0; c < p.nc; ++c) {
    const int64_t row = p.view.cidx ? p.view.cidx[p.c0 + c] : p.c0 + c;
    const Src* from = static_cast<const Src*>(p.view.base) + row * p.view.cs + p.q0;
    auto* to = static_cast<Ops::Elem*>(p.dst) + c * kTileSteps;
    for (int q = 0; q < p.nq; q += kTileSteps, from += kTileSteps, to += p.nc * kTileSteps) {
      if (p.nq - q >= kTileSteps) {
        copy_row<kTileSteps>(from, to);
      } else {
        for (int i = 0; i < kTileSteps; ++i) to[i] = 0;
        for (int i = 0; i < p.nq - q; ++i) convert(from[i], to[i]);
      }
    }
  }
}

inline void pack_tiles(const PackArgs& p) {
  if (p.few_rows && p.side == Side::left) return p.view.is_float ? pack_few_rows<float>(p) : pack_few_rows<uint16_t>(p);
  const auto tile = [&](int c, int q) {
    return static_cast<Ops::Elem*>(p.dst) + ((c / kTileRows) * p.q_stride + q / kTileSteps) * kTileElems;
  };
  int c = 0;
  if constexpr (sizeof(Ops::Elem) == 2) {
    if (p.side == Side::right && p.view.qs != 1 && !p.view.is_float)
      for (; p.nc - c >= kBlock; c += kBlock)
        for (int q = 0; q < p.nq; q += kTileSteps) {
          if (p.nq - q >= kTileSteps) {
            right_from_source<kStripTiles>(p, p.c0 + c, p.q0 + q, tile(c, q));
          } else {
            pack_tile(p, c, q, tile(c, q)), pack_tile(p, c + kTileRows, q, tile(c + kTileRows, q));
          }
        }
  }
  for (; c < p.nc; c += kTileRows)
    for (int q = 0; q < p.nq; q += kTileSteps) pack_tile(p, c, q, tile(c, q));
}

#include "kernels/skinny.h"
#include "kernels/direct.h"

// ---- the driver
// ------------------------------------------------------------------------------------------------------

constexpr int kPanelElems = kStripTiles * kPanelTiles * kTileElems;
constexpr int kPanels = ActiveOps::kInterleaves ? 2 : 1;  // one is multiplied while the next is decoded
static_assert(kSkinnyScratch <= size_t{kMaxRows} * kMaxCols * sizeof(float));
constexpr size_t kScratchBytes =
    kPanels * kPanelElems * sizeof(Ops::Elem) + size_t{kMaxRows} * kMaxCols * sizeof(float);

// Accumulator tile (m tile, weight tile) of a strip.
inline float* accumulator(float* c, int strip, int m_tiles, int m_tile, int w_tile) {
  return c + ((int64_t{strip} * m_tiles + m_tile) * kStripTiles + w_tile) * 256;
}

// Whether the codes of W are right tiles as they lie, their rows 128 bytes apart.
inline bool loads_codes(const GemmArgs& g, const GemmTerm& term) {
  return ActiveOps::kLoadsCodes && g.side == Side::left && term.packed != nullptr &&
         term.packed->format == kt_sft::Format::bf16;
}

// The panels of a call in their order: strips innermost, then the reduction, then the terms. Of up to kRowsStripByStrip
// left rows strips are outermost: codes are read as they lie, and the sums of a strip stay in L1.
struct Position {
  const GemmArgs* g;
  int strips, term = -1, q0 = 0, strip = 0;
  int all_q = 0;  // reduction tiles of the term
  bool strip_by_strip;

  explicit Position(const GemmArgs& g)
      : g(&g),
        strips((g.nc + kBlock - 1) / kBlock),
        strip_by_strip(g.side == Side::left && g.m <= ActiveOps::kRowsStripByStrip) {
    next_term();
  }
  bool valid() const { return term < g->num_terms; }
  const GemmTerm& of() const { return g->terms[term]; }
  int tiles() const { return multiplies_codes(*g, of()) ? kDirectTiles : kPanelTiles; }  // at once
  int q_tiles() const { return min_int(tiles(), all_q - q0); }
  Panel panel() const { return {g->c0 / kBlock + strip, q0, q_tiles()}; }
  void advance() {
    if (!valid()) return;
    if (strip_by_strip) {
      if ((q0 += tiles()) < all_q) return;
      next_term();
      if (!valid() && ++strip < strips) term = -1, next_term();
      return;
    }
    if (++strip < strips) return;
    strip = 0, q0 += tiles();
    if (q0 >= all_q) next_term();
  }

 private:
  void next_term() {  // that is not empty
    for (++term, q0 = 0; valid(); ++term)
      if ((all_q = (of().q + kTileSteps - 1) / kTileSteps) > 0) return;
  }
};

// The codes of the panel at `at`, those of its blocks, one for each q. Beyond the call's last panel they are the
// caller's next codes, from strip `beyond` on.
inline Ahead codes_ahead(const GemmArgs& g, const Position& at, int beyond) {
  const PackedMatrix* w;
  int next, q0 = 0;
  if (at.valid()) {
    w = at.of().packed, next = g.c0 / kBlock + at.strip, q0 = at.q0;
  } else {
    w = g.upcoming != nullptr ? &g.upcoming->packed : nullptr;
    next = g.upcoming != nullptr ? g.upcoming->c0 / kBlock + beyond : 0;
  }
  const bool right = g.side == Side::left;
  if (w == nullptr || next >= (right ? w->row_blocks() : w->col_blocks())) return {};
  const int lines = w->block_bytes() / 64, blocks = (g.m + 7) / 8;  // register blocks that share the work, at least
  return {right ? w->block(next, q0) : w->block(q0, next), int64_t{w->block_bytes()} * (right ? 1 : w->col_blocks()),
          lines, (lines + blocks - 1) / blocks};
}

inline BlockArgs panel_product(const Position& at, bool accumulate, const Ops::Elem* panel, float* c,
                               const Ahead& ahead) {
  const GemmArgs& g = *at.g;
  const GemmTerm& term = at.of();
  const int m_tiles = (g.m + kTileRows - 1) / kTileRows, q_tiles = at.q_tiles();
  const int all_q = term.act_tiles > 0 ? term.act_tiles : at.all_q;
  const auto* act = static_cast<const Ops::Elem*>(term.act) + int64_t{at.q0} * kTileElems;
  float* acc = accumulator(c, at.strip, m_tiles, 0, 0);
  const int w_tiles = min_int(kStripTiles, (g.nc - at.strip * kBlock + kTileRows - 1) / kTileRows);
  const bool codes = loads_codes(g, term);
  const void* right = codes ? static_cast<const void*>(term.packed->block(at.panel().strip, at.q0)) : panel;
  if (g.side == Side::left)
    return {act,     right,   acc,        all_q, kPanelTiles, kStripTiles * 256, 256, g.m,
            w_tiles, q_tiles, accumulate, ahead, codes};
  return {panel,   act,     acc,        kPanelTiles, all_q, 256, kStripTiles * 256, w_tiles * kTileRows,
          m_tiles, q_tiles, accumulate, ahead};
}

inline void load_panel(const Position& at, Ops::Elem* panel) {
  const GemmArgs& g = *at.g;
  const GemmTerm& term = at.of();
  if (multiplies_codes(g, term) || loads_codes(g, term)) return;  // there is none
  const Side weight_side = g.side == Side::left ? Side::right : Side::left;
  if (term.packed != nullptr)
    return with_decoder(weight_side, *term.packed, at.panel(), {}, panel, [](auto decoder) { decoder.finish(); });
  const int c = g.c0 + at.strip * kBlock, q = at.q0 * kTileSteps;
  const int nc = min_int(kBlock, g.c0 + g.nc - c), nq = min_int(at.q_tiles() * kTileSteps, term.q - q);
  pack_tiles({weight_side, *term.dense, c, nc, q, nq, panel, kPanelTiles});
}

// Whether a product decodes the next panel meanwhile. Two panels fill most of L1: with many left rows, which pass
// through it for every panel, that costs more than it hides.
inline bool interleaves(const GemmArgs& g) {
  if (!ActiveOps::kInterleaves || (g.side == Side::left && g.m > ActiveOps::kInterleavedLeftRows)) return false;
  for (int t = 0; t < g.num_terms; ++t)
    if (multiplies_codes(g, g.terms[t]) || loads_codes(g, g.terms[t])) return false;
  return true;
}

// One panel's product; meanwhile, or after it, the next panel is made ready.
inline void multiply_panel(const Position& at, const BlockArgs& product, Ops::Elem* panel, const Position& next,
                           Ops::Elem* next_panel, bool interleave) {
  if constexpr (ActiveOps::kInterleaves) {
    if (interleave && next.valid() && next.of().packed != nullptr) {
      const Side weight_side = next.g->side == Side::left ? Side::right : Side::left;
      const Ahead ahead = ActiveOps::kDecoderAsks ? product.ahead : Ahead{};
      return with_decoder(weight_side, *next.of().packed, next.panel(), ahead, next_panel, [&](auto decoder) {
        ActiveOps::multiply(product, decoder);
        decoder.finish();
      });
    }
  }
  NoDecoder none;
  if (multiplies_codes(*at.g, at.of())) {
    multiply_codes(*at.of().packed, at.panel(), product, reinterpret_cast<float*>(panel));
  } else {
    ActiveOps::multiply(product, none);
  }
  if (next.valid()) load_panel(next, next_panel);
}

inline void emit_tile(const float* tile, int rows, int cols, float* out, int64_t ldo) {
  if (cols == kTileRows) {
    for (int r = 0; r < rows; ++r) __builtin_memcpy(out + r * ldo, tile + r * 16, 16 * sizeof(float));
  } else {
    for (int r = 0; r < rows; ++r) __builtin_memcpy(out + r * ldo, tile + r * 16, cols * sizeof(float));
  }
}

// Accumulator tiles -> rows of out. Of left activations they are [m][c], of right ones [c][m].
inline void emit(const GemmArgs& g, const float* c) {
  const int m_tiles = (g.m + kTileRows - 1) / kTileRows;
  alignas(64) float turned[256];
  for (int w = 0; w * kTileRows < g.nc; ++w) {
    const int cols = min_int(kTileRows, g.nc - w * kTileRows);
    for (int i = 0; i < m_tiles; ++i) {
      const int rows = min_int(kTileRows, g.m - i * kTileRows);
      const float* tile = c + ((int64_t{w / kStripTiles} * m_tiles + i) * kStripTiles + w % kStripTiles) * 256;
      if ((g.side == Side::right) != g.transposed) {
        const uint32_t* at[16];
        for (int r = 0; r < 16; ++r) at[r] = reinterpret_cast<const uint32_t*>(tile) + r * 16;
        transpose16(at, reinterpret_cast<uint32_t*>(turned));
        tile = turned;
      }
      if (g.transposed) {
        emit_tile(tile, cols, rows, g.out + w * kTileRows * g.ldo + i * kTileRows, g.ldo);
      } else {
        emit_tile(tile, rows, cols, g.out + i * kTileRows * g.ldo + w * kTileRows, g.ldo);
      }
    }
  }
}

inline void gemm(const GemmArgs& g) {
  if (g.m <= kSkinnyRows) return skinny_gemm(g);
  auto* panels = static_cast<Ops::Elem*>(g.scratch);
  auto* c = reinterpret_cast<float*>(panels + kPanels * kPanelElems);
  Position at(g);  // Each walks for itself: a copy would wait until the accumulators before it are stored.
  if (at.valid()) {
    const bool two = interleaves(g);
    const auto panel = [&](int turn) { return panels + (two ? turn % kPanels * kPanelElems : 0); };
    ActiveOps::begin();
    load_panel(at, panels);
    Position next(g), later(g);
    next.advance(), later.advance(), later.advance();
    const int first = at.term;
    for (int turn = 0; at.valid(); ++turn, at.advance(), next.advance(), later.advance()) {
      const Ahead ahead = codes_ahead(g, two ? later : next, two && !next.valid() ? 1 : 0);  // for the next product
      BlockArgs product = panel_product(at, at.term > first || at.q0 > 0, panel(turn), c, ahead);
      if (at.strip_by_strip && g.m <= ActiveOps::kRowsHeld) {
        product.sums_held = product.accumulate;
        product.hold_sums = next.valid() && next.strip == at.strip;
      }
      multiply_panel(at, product, panel(turn), next, panel(turn + 1), two);
    }
    ActiveOps::end();
  } else {
    const int64_t strips = (g.nc + kBlock - 1) / kBlock;
    __builtin_memset(c, 0, sizeof(float) * kBlock * strips * round_up(g.m, kTileRows));
  }
  emit(g, c);
}
