// Packed blocks decoded into tiles. A panel is cut into units of half a block, and these into pairs of columns, so that
// the product of one panel can decode the next one between its own steps: products and decoding use different ports.
// Included inside the variant's namespace after Ops.
#pragma once

// 32 weight columns and some reduction tiles of a matrix, in blocks.
struct Panel {
  int strip, q0, q_tiles;
};

// 16 rows n x 32 columns k of a block on their way to tiles.
template <class R, Side kSide, class Target = Ops>
struct DecodeUnit {
  using Codes = typename R::Codes;
  using Elem = typename Target::Elem;
  static constexpr bool kRight = kSide == Side::right, kPairTiles = sizeof(Elem) == 2;
  static constexpr bool kCopied = kRight && kPairTiles && !R::Scales::kAny;
  // Codes that lie in the tile's order: no shuffles, the scales are doubled instead.
  static constexpr bool kOrdered = kRight && kPairTiles && R::Scales::kAny && Codes::kOrdered;

  const uint8_t* codes;
  Elem* to;  // right: the tile; left: its half of row 0
  Weights<R> weights;
  Vec::F32 first_scale, second_scale;

  DecodeUnit(const PackedMatrix& w, int nb, int kb, int half, Elem* to)
      : codes(w.block(nb, kb) + half * kTileRows * Codes::kPairBytes), to(to), weights(w, nb, kb, half) {
    if constexpr (kOrdered)
      first_scale = Vec::twice_low(weights.scales[0]), second_scale = Vec::twice_high(weights.scales[0]);
  }

  // Columns 2p and 2p + 1.
  void pair(int p) const {
    if constexpr (kCopied) {
      __builtin_memcpy(to + p * kBlock, codes + p * kBlock * 4, 64);
    } else if constexpr (kOrdered) {
      Vec::F32 first, second;
      Codes::decode_pairs(codes, p, first, second);
      Target::store_pairs(to + p * kBlock, Vec::mul(first, first_scale), Vec::mul(second, second_scale));
    } else {
      Vec::F32 even, odd;
      Codes::decode(codes, p, even, odd);
      even = weights.of(even, p), odd = weights.of(odd, p);
      if constexpr (kRight) {
        Target::store_right(to, p, even, odd);
      } else {
        constexpr int kNextTile = kPanelTiles * kTileElems - kTileElems;  // beyond row 15
        Elem* row = to + 2 * p * kTileSteps + (p & kTileRows / 2) * (kNextTile / (kTileRows / 2));
        Target::store_left(row, even);
        Target::store_left(row + kTileSteps, odd);
      }
    }
  }
  void all() const {
    for (int p = 0; p < kPairs; ++p) pair(p);
  }
};

// A panel as tiles [2][q tile], which start kPanelTiles apart.
//   right: strip = 32 rows n (block row), q = k        left: strip = 32 columns k (block column), q = n
template <class R, Side kSide>
class PanelDecoder {
 public:
  static constexpr bool kAny = true;
  PanelDecoder(const PackedMatrix& w, const Panel& at, Ops::Elem* dst) : w_(w), at_(at), dst_(dst) {}

  bool more() const { return unit_ < at_.q_tiles * kStripTiles; }
  DecodeUnit<R, kSide> take() {
    const int q = unit_ / kStripTiles, half = unit_ % kStripTiles;
    ++unit_;
    if constexpr (kSide == Side::right)
      return {w_, at_.strip, at_.q0 + q, half, dst_ + (half * kPanelTiles + q) * kTileElems};
    else
      return {w_, at_.q0 + q, at_.strip, half, dst_ + q * kTileElems + half * kTileRows};
  }
  void finish() {
    while (more()) take().all();
  }

 private:
  const PackedMatrix& w_;
  Panel at_;
  Ops::Elem* dst_;
  int unit_ = 0;
};

// use(decoder) for the matrix's format.
template <class Use>
inline void with_decoder(Side weight_side, const PackedMatrix& w, const Panel& at, Ops::Elem* dst, const Use& use) {
  switch (w.format) {
#define KT_FORMAT(name, Codes, Scales, bits, ...)                                                             \
  case kt_sft::Format::name:                                                                                  \
    return weight_side == Side::right ? use(PanelDecoder<Row<kt_sft::Format::name>, Side::right>(w, at, dst)) \
                                      : use(PanelDecoder<Row<kt_sft::Format::name>, Side::left>(w, at, dst));
#include "kernels/registry.inc"
  }
}
