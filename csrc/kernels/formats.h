// One format: codes of 16 pairs, without scales:
//   decode        two vectors of 16 floats: column 2p and column 2p + 1 of 16 rows n
//   decode_pairs  the same in memory order: (n, 2p), (n, 2p + 1) of rows 0 to 7, then of rows 8 to 15; kOrdered says
//                 that this is the cheaper one
//   encode        stores two vectors of 16 codes from kLeastCode to kLargestCode; kSearchesScale: see quantize.h
// Written once over the vector vocabulary V of the ISA; included inside the variant's namespace.
#pragma once

struct Bf16 {
  static constexpr int kPairBytes = 4;
  static constexpr bool kOrdered = false;
  template <class V>
  static void decode(const uint8_t* pairs, typename V::F32& even, typename V::F32& odd) {
    const auto words = V::load_i32(pairs);
    even = V::as_f32(V::template shift_left<16>(words));
    odd = V::as_f32(V::high_half(words));
  }
};

struct Int8 {
  static constexpr int kPairBytes = 2;
  static constexpr bool kOrdered = true;
  template <class V>
  static void decode_pairs(const uint8_t* pairs, typename V::F32& first, typename V::F32& second) {
    first = V::to_f32(V::load_i8(pairs));
    second = V::to_f32(V::load_i8(pairs + 16));
  }
  template <class V>
  static void decode(const uint8_t* pairs, typename V::F32& even, typename V::F32& odd) {
    const auto words = V::load_i16(pairs);  // sign-extended to 32 bits
    even = V::to_f32(V::template shift_right<24>(V::template shift_left<24>(words)));
    odd = V::to_f32(V::template shift_right<8>(words));
  }
  static constexpr float kLeastCode = -127, kLargestCode = 127;
  static constexpr bool kSearchesScale = false;
  template <class V>
  static void encode(typename V::I32 even, typename V::I32 odd, uint8_t* pairs) {
    V::store_low16(pairs, V::bit_or(V::bit_and(even, V::splat_i32(0xff)), V::template shift_left<8>(odd)));
  }
};

struct Int4 {
  static constexpr int kPairBytes = 1;
  static constexpr bool kOrdered = false;
  template <class V>
  static void decode(const uint8_t* pairs, typename V::F32& even, typename V::F32& odd) {
    const auto words = V::load_i8(pairs);
    even = V::low_nibble(words);
    odd = V::low_nibble(V::template shift_right<4>(words));
  }
  static constexpr float kLeastCode = -8, kLargestCode = 7;
  static constexpr bool kSearchesScale = true;
  template <class V>
  static void encode(typename V::I32 even, typename V::I32 odd, uint8_t* pairs) {
    V::store_low8(pairs, V::bit_or(V::bit_and(even, V::splat_i32(0xf)), V::template shift_left<4>(odd)));
  }
};
