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
  static constexpr bool kExact = !kPairTiles && !R::Scales::kAny;  // bf16 as it is: nothing to round
  // Codes that lie in the tile's order: no shuffles, the scales are doubled instead.
  static constexpr bool kOrdered = kRight && kPairTiles && R::Scales::kAny && Codes::kOrdered;

  const uint8_t* codes;
  Elem* to;  // right: the tile; left: its half of row 0
  Weights<R> weights;
  Vec::F32 first_scale, second_scale;

  DecodeUnit(const uint8_t* block, const BlockScales<R>& scales, int half, Elem* to)
      : codes(block + half * kTileRows * Codes::kRowBytes), to(to), weights(scales, half) {
    if constexpr (kOrdered) {
      const Vec::F32 scales = Vec::mul(weights.scales[0], Vec::broadcast(Codes::kPairUnit));
      first_scale = Vec::twice_low(scales), second_scale = Vec::twice_high(scales);
    }
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
      if constexpr (kRight && kExact) {
        Vec::store(to + 2 * p * kTileRows, even), Vec::store(to + (2 * p + 1) * kTileRows, odd);
      } else if constexpr (kRight) {
        Target::store_right(to, p, even, odd);
      } else {
        constexpr int kNextTile = kPanelTiles * kTileElems - kTileElems;  // beyond row 15
        Elem* row = to + 2 * p * kTileSteps + (p & kTileRows / 2) * (kNextTile / (kTileRows / 2));
        if constexpr (kExact) {
          Vec::store(row, even), Vec::store(row + kTileSteps, odd);
        } else {
          Target::store_left(row, even), Target::store_left(row + kTileSteps, odd);
        }
      }
    }
  }
  void all() const { half(0), half(1); }
  void half(int number) const {
    each_step<kPairs / 2, Codes::kPairsTogether>([&](int p)
                                                     __attribute__((always_inline)) { pair(number * kPairs / 2 + p); });
  }
};

// A panel as tiles [2][q tile], which start kPanelTiles apart. With every block decoded the one of `ahead` is asked
// for.
//   right: strip = 32 rows n (block row), q = k        left: strip = 32 columns k (block column), q = n
template <class R, Side kSide>
class PanelDecoder {
 public:
  static constexpr bool kAny = true;
  static constexpr int kPairsTogether = R::Codes::kPairsTogether;
  PanelDecoder(const PackedMatrix& w, const Panel& at, const Ahead& ahead, Ops::Elem* dst)
      : block_(kRight ? w.block(at.strip, at.q0) : w.block(at.q0, at.strip)),
        stride_(w.block_bytes() * int64_t{kRight ? 1 : w.col_blocks()}),
        scales_(w, kRight ? at.strip : at.q0, kRight ? at.q0 : at.strip, kRight),
        to_(dst),
        units_(at.q_tiles * kStripTiles),
        ahead_(ahead) {}

  int units() const { return units_; }
  bool more() const { return units_ > 0; }
  DecodeUnit<R, kSide> take() {
    const int half = units_-- % kStripTiles;  // an even number of them are left before the first half
    if (ahead_.lines > 0) ask(half);
    const DecodeUnit<R, kSide> unit(block_, scales_, half, to_ + half * kHalf);
    if (half == kStripTiles - 1) block_ += stride_, to_ += kTileElems, scales_.next();
    return unit;
  }
  void finish() {
    while (more()) take().all();
  }

 private:
  static constexpr bool kRight = kSide == Side::right;
  static constexpr int kHalf = kRight ? kPanelTiles * kTileElems : kTileRows;
  static_assert(kStripTiles == 2);

  void ask(int half) {
    constexpr int kHalfLines = kPairs * kBlock * R::kInfo.bits / 4 / kLine / kStripTiles;  // of codes
#pragma GCC unroll 16
    for (int i = 0; i < kHalfLines; ++i) ask_for(ahead_.at + (half * kHalfLines + i) * kLine);
    if (half == 0) return;
    for (int i = kStripTiles * kHalfLines; i < ahead_.lines; ++i) ask_for(ahead_.at + i * kLine);
    ahead_.at += ahead_.stride;
  }

  const uint8_t* block_;
  int64_t stride_;
  WalkingScales<R> scales_;
  Ops::Elem* to_;
  int units_;
  Ahead ahead_;
};

// use(decoder) for the matrix's format.
template <class Use>
inline void with_decoder(Side weight_side, const PackedMatrix& w, const Panel& at, const Ahead& ahead, Ops::Elem* dst,
                         const Use& use) {
  switch (w.format) {
#define KT_FORMAT(name, Codes, Scales, bits, ...)                                                                    \
  case kt_sft::Format::name:                                                                                         \
    return weight_side == Side::right ? use(PanelDecoder<Row<kt_sft::Format::name>, Side::right>(w, at, ahead, dst)) \
                                      : use(PanelDecoder<Row<kt_sft::Format::name>, Side::left>(w, at, ahead, dst));
#include "kernels/registry.inc"
  }
}
