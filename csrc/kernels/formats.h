// The codes of a format: what they stand for before any scale.
//   decode        of pair p and 16 rows: two vectors of 16 floats, column 2p and column 2p + 1. `at` is where the block
//                 holds the first row's pair 0; kRowBytes of a row lie together, kPairsTogether of its pairs
//   decode_pairs  the same in memory order: (n, 2p), (n, 2p + 1) of rows 0 to 7, then of rows 8 to 15; kOrdered says
//                 that this is the cheaper one. Times kPairUnit, which a scale takes along for nothing
//   pairs         where kBf16: the codes, which bf16 holds exactly, as (2p, 2p + 1) of a block's 32 rows, over the
//                 vectors V of an instruction set that multiplies them; `unmix` puts sums of rows into memory's order
//   whole_pairs   where kWhole: the codes times kWholeUnit, whole numbers of eight bits, widened to words, as pairs
//   whole_quads   the same as bytes, 128 too large, of 16 rows: columns 0 4 1 5 and 2 6 3 7 of eight
// Of the formats that quantize.h makes:
//   nearest       the codes of 16 weights / scale; kSearchesScale: quantize.h looks for the scale
//   encode        stores pair p of 16 rows, from two vectors of codes; pairs come in order
// Written over the vector vocabulary Vec; included inside the variant's namespace.
#pragma once

enum class Whole { none, pairs, quads };

// Codes whose pairs come in memory's order.
struct InOrder {
  static constexpr Whole kWhole = Whole::none;
  template <class V>
  static void mix(typename V::F32&, typename V::F32&) {}
  template <class V>
  static void unmix(typename V::F32&, typename V::F32&) {}
};

// Codes whose pairs come as to_words gives them.
struct Mixed {
  static constexpr Whole kWhole = Whole::none;
  template <class V>
  static void mix(typename V::F32& a, typename V::F32& b) {
    V::mix_rows(a, b);
  }
  template <class V>
  static void unmix(typename V::F32& a, typename V::F32& b) {
    V::unmix_rows(a, b);
  }
};

// The bytes of 128 values that bf16 holds exactly; `flip` is in the high ones.
struct Bf16Bytes {
  alignas(64) uint8_t low[128]{}, high[128]{};
  template <class Value>
  constexpr Bf16Bytes(Value value, int flip) {
    for (int i = 0; i < 128; ++i) {
      const uint32_t bits = __builtin_bit_cast(uint32_t, value(i));
      low[i] = static_cast<uint8_t>(bits >> 16), high[i] = static_cast<uint8_t>((bits >> 24) ^ flip);
    }
  }
};

struct Bf16 : InOrder {
  static constexpr int kRowBytes = 4, kPairsTogether = 1;
  static constexpr bool kOrdered = false, kBf16 = true;
  template <class V>
  static void pairs(const uint8_t* block, int p, typename V::I32 (&to)[2]) {
    for (int half = 0; half < 2; ++half) to[half] = V::load_i32(block + (2 * p + half) * kTileRows * kRowBytes);
  }
  static void decode(const uint8_t* at, int p, Vec::F32& even, Vec::F32& odd) {
    const auto words = Vec::load_i32(at + p * kBlock * kRowBytes);
    even = Vec::as_f32(Vec::shift_left<16>(words));
    odd = Vec::as_f32(Vec::high_half(words));
  }
};

struct Int8 : Mixed {
  static constexpr int kRowBytes = 2, kPairsTogether = 1;
  static constexpr bool kOrdered = true, kBf16 = true;
  template <class V>
  static void pairs(const uint8_t* block, int p, typename V::I32 (&to)[2]) {
    const auto codes = V::load_once(block + p * kBlock * kRowBytes), size = V::abs8(codes);
    const auto high = V::bit_xor(V::look_up7(size, kSizes.high), V::unless_sign8(size, k128));
    V::to_words(V::look_up7(size, kSizes.low), V::with_sign8(high, codes), to[0], to[1]);
  }
  // -128 has the size 0x80, which is looked up as 0 and, unlike that, not turned back.
  static constexpr int k128 = 0x43;  // the high byte of 128, whose low one is 0
  static constexpr Bf16Bytes kSizes{[](int i) { return static_cast<float>(i); }, k128};
  static constexpr Whole kWhole = Whole::pairs;
  static constexpr float kWholeUnit = 1;
  template <class V>
  static void whole_pairs(const uint8_t* block, int p, typename V::I32 (&to)[2]) {
    for (int half = 0; half < 2; ++half) to[half] = V::widen8(block + (p * kBlock + half * kTileRows) * kRowBytes);
  }
  static constexpr float kPairUnit = 1;
  static void decode_pairs(const uint8_t* at, int p, Vec::F32& first, Vec::F32& second) {
    first = Vec::to_f32(Vec::load_i8(at + p * kBlock * kRowBytes));
    second = Vec::to_f32(Vec::load_i8(at + p * kBlock * kRowBytes + 16));
  }
  static void decode(const uint8_t* at, int p, Vec::F32& even, Vec::F32& odd) {
    const auto words = Vec::load_i16(at + p * kBlock * kRowBytes);  // sign-extended to 32 bits
    even = Vec::to_f32(Vec::shift_right<24>(Vec::shift_left<24>(words)));
    odd = Vec::to_f32(Vec::shift_right<8>(words));
  }
  static constexpr bool kSearchesScale = false;
  static Vec::I32 nearest(Vec::F32 exact) {
    return Vec::to_i32(Vec::max(Vec::min(exact, Vec::broadcast(127)), Vec::broadcast(-127)));
  }
  static void encode(Vec::I32 even, Vec::I32 odd, uint8_t* at, int p) {
    Vec::store_low16(at + p * kBlock * kRowBytes,
                     Vec::bit_or(Vec::bit_and(even, Vec::splat_i32(0xff)), Vec::shift_left<8>(odd)));
  }
};

// E4M3 (OCP 8-bit floating point specification 1.0): sign, four bits of exponent with bias 7, three of mantissa. Its
// seven low bits, as the top of an fp32's exponent and mantissa, are the value times 2^-120, subnormals included.
struct Fp8 : Mixed {
  static constexpr int kRowBytes = 2, kPairsTogether = 1;
  static constexpr bool kOrdered = true, kBf16 = true;
  template <class V>
  static void pairs(const uint8_t* block, int p, typename V::I32 (&to)[2]) {
    const auto codes = V::load_once(block + p * kBlock * kRowBytes);
    const auto high = V::with_sign8(V::look_up7(codes, kValues.high), codes);
    V::to_words(V::look_up7(codes, kValues.low), high, to[0], to[1]);
  }
  static constexpr Bf16Bytes kValues{[](int i) { return __builtin_bit_cast(float, i << 20) * 0x1p120f; }, 0};
  static constexpr float kPairUnit = 0x1p120f;
  static void decode_pairs(const uint8_t* at, int p, Vec::F32& first, Vec::F32& second) {
    first = number(Vec::shift_left<20>(Vec::load_i8(at + p * kBlock * kRowBytes)));
    second = number(Vec::shift_left<20>(Vec::load_i8(at + p * kBlock * kRowBytes + 16)));
  }
  static void decode(const uint8_t* at, int p, Vec::F32& even, Vec::F32& odd) {
    const auto words = Vec::load_i16(at + p * kBlock * kRowBytes);
    even = value(Vec::shift_right<4>(Vec::shift_left<24>(words)));
    odd = value(Vec::shift_right<4>(Vec::shift_left<16>(words)));
  }
  static Vec::F32 number(Vec::I32 bits) {  // the seven bits from bit 20 on, the sign from bit 27 on
    return Vec::as_f32(Vec::bit_and(bits, Vec::splat_i32(static_cast<int>(0x87f00000u))));
  }
  static Vec::F32 value(Vec::I32 bits) { return Vec::mul(number(bits), Vec::broadcast(kPairUnit)); }
};

// Four bits, each standing for one of 16 levels. Every word of 32 bits is a row's: four first columns of pairs in its
// low half, their second columns in its high half, so that one shift brings a pair to where both halves are looked up.
template <class Levels>
struct Nibbles : InOrder {
  static constexpr int kRowBytes = 4, kPairsTogether = 4;
  static constexpr bool kOrdered = false, kBf16 = true;
  static int offset(int p) { return p / kPairsTogether * kBlock * kRowBytes; }
  static int shift(int p) { return p % kPairsTogether * 4; }
  template <class V>
  static void pairs(const uint8_t* block, int p, typename V::I32 (&to)[2]) {
    for (int half = 0; half < 2; ++half) {
      const auto codes = V::load_i32(block + offset(p) + half * kTileRows * kRowBytes);
      to[half] = V::look_up_bf16(V::shift_right_by(codes, shift(p)), Levels::kLevels);
    }
  }
  static constexpr Whole kWhole = Whole::quads;
  static constexpr float kWholeUnit = Levels::kWholeUnit;
  struct Bytes {
    alignas(64) uint8_t bytes[64]{};
    constexpr Bytes() {
      for (int i = 0; i < 64; ++i) bytes[i] = static_cast<uint8_t>(Levels::kLevels[i % 16] * kWholeUnit + 128);
    }
  };
  static constexpr Bytes kBytes{};
  template <class V>
  static void whole_quads(const uint8_t* block, int w, int half, typename V::I32 (&to)[2]) {
    const auto codes = V::load_i32(block + w * kBlock * kRowBytes + half * kTileRows * kRowBytes);
    to[0] = V::look_up6(codes, kBytes.bytes);
    to[1] = V::look_up6(V::shift_right_by(codes, 4), kBytes.bytes);
  }
  static void decode(const uint8_t* at, int p, Vec::F32& even, Vec::F32& odd) {
    const auto codes = Vec::load_i32(at + offset(p));
    even = Levels::of(Vec::shift_right_by(codes, shift(p)));
    odd = Levels::of(Vec::shift_right_by(codes, 16 + shift(p)));
  }
};

struct SignedLevels {
  static constexpr float kWholeUnit = 1;
  static constexpr float kLevels[16] = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
  static Vec::F32 of(Vec::I32 words) { return Vec::low_nibble(words); }
};
struct UnsignedLevels {
  static constexpr float kWholeUnit = 1;
  static constexpr float kLevels[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  static Vec::F32 of(Vec::I32 words) { return Vec::to_f32(Vec::bit_and(words, Vec::splat_i32(15))); }
};
struct E2m1Levels {  // OCP Microscaling formats 1.0, section 5.3.3
  static constexpr float kWholeUnit = 2;
  static constexpr float kLevels[16] = {0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0f, -0.5, -1, -1.5, -2, -3, -4, -6};
  static Vec::F32 of(Vec::I32 words) { return Vec::look_up(words, kLevels); }
};
struct Iq4NlLevels {  // kvalues_iq4nl in ggml-common.h of llama.cpp
  static constexpr float kWholeUnit = 1;
  static constexpr float kLevels[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
  static Vec::F32 of(Vec::I32 words) { return Vec::look_up(words, kLevels); }
};

using Int4 = Nibbles<SignedLevels>;
using Uint4 = Nibbles<UnsignedLevels>;
using E2m1 = Nibbles<E2m1Levels>;

// Numbers in cells of 65536 / 37 / 128 = 13.8 that start at multiples of that size: 15 of them hold one midpoint
// between two levels each, in turn, if the first and the last reach to infinity. One comparison beyond the number of
// its cell finds the level nearest to a number.
struct LevelCells {
  static constexpr int kCells = 37;                  // per 2^16 / 128
  static constexpr float kFirst = -110, kLast = 96;  // in the first and the last cell
  float midpoints[16]{};
  constexpr LevelCells() {
    for (int i = 0; i < 15; ++i) midpoints[i] = (Iq4NlLevels::kLevels[i] + Iq4NlLevels::kLevels[i + 1]) / 2;
  }
  constexpr bool one_midpoint_each() const {
    for (int i = 1; i < 15; ++i) {
      const float start = (i - 8) * 512.0f / kCells;
      if (midpoints[i - 1] > start || midpoints[i] < start) return false;
    }
    return true;
  }
};
constexpr LevelCells kLevelCells;
static_assert(kLevelCells.one_midpoint_each());

struct Iq4Nl : Nibbles<Iq4NlLevels> {
  static constexpr bool kSearchesScale = true;
  static Vec::I32 nearest(Vec::F32 exact) {  // the upper one of two
    const auto within =
        Vec::max(Vec::min(exact, Vec::broadcast(LevelCells::kLast)), Vec::broadcast(LevelCells::kFirst));
    const auto cell = Vec::to_i32(Vec::fma(within, Vec::broadcast(LevelCells::kCells / 512.0f), Vec::broadcast(7.5f)));
    const auto below = Vec::bits(Vec::sub(exact, Vec::look_up(cell, kLevelCells.midpoints)));  // by its sign
    return Vec::add_i32(Vec::add_i32(cell, Vec::splat_i32(1)), Vec::shift_right<31>(below));
  }
  static void encode(Vec::I32 even, Vec::I32 odd, uint8_t* at, int p) {
    const auto pair = Vec::shift_left_by(Vec::bit_or(even, Vec::shift_left<16>(odd)), shift(p));
    Vec::store_i32(at + offset(p), shift(p) == 0 ? pair : Vec::bit_or(Vec::load_i32(at + offset(p)), pair));
  }
};

// Low nibbles, then kHigh more bits of every code; value = code - kZero.
template <int kHigh, int kZero>
struct SplitBits {
  static constexpr Whole kWhole = Whole::none;
  static constexpr int kRowBytes = 1, kPairsTogether = 1;
  static constexpr bool kOrdered = false, kBf16 = false;
  static void decode(const uint8_t* at, int p, Vec::F32& even, Vec::F32& odd) {
    constexpr int kPairsPerByte = 4 / kHigh;
    const auto low = Vec::load_u8(at + p * kBlock);
    const uint8_t* bytes = at + kPairs * kBlock + p / kPairsPerByte * kBlock;
    const auto high = Vec::shift_right_by(Vec::load_u8(bytes), p % kPairsPerByte * 2 * kHigh);
    even = value(Vec::bit_and(low, Vec::splat_i32(15)), high);
    odd = value(Vec::shift_right<4>(low), Vec::shift_right<kHigh>(high));
  }
  static Vec::F32 value(Vec::I32 low, Vec::I32 high) {
    const auto top = Vec::shift_left<4>(Vec::bit_and(high, Vec::splat_i32((1 << kHigh) - 1)));
    return Vec::to_f32(Vec::add_i32(Vec::bit_or(low, top), Vec::splat_i32(-kZero)));
  }
};
using Uint5 = SplitBits<1, 0>;
using Int6 = SplitBits<2, 32>;
