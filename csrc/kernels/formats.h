// Decoders: 16 pairs of codes of one format -> two vectors of 16 floats (column 2p and column 2p+1 of 16 rows n).
// Written once over the vector vocabulary V of the ISA; included inside the variant's namespace.
#pragma once

struct Bf16 {
  template <class V>
  static void decode(const uint8_t* pairs, typename V::F32& even, typename V::F32& odd) {
    const auto words = V::load_i32(pairs);
    even = V::as_f32(V::template shift_left<16>(words));
    odd = V::as_f32(V::high_half(words));
  }
};

struct Int8 {
  template <class V>
  static void decode(const uint8_t* pairs, typename V::F32& even, typename V::F32& odd) {
    const auto words = V::load_i16(pairs);  // sign-extended to 32 bits
    even = V::to_f32(V::template shift_right<24>(V::template shift_left<24>(words)));
    odd = V::to_f32(V::template shift_right<8>(words));
  }
};

struct Int4 {
  template <class V>
  static void decode(const uint8_t* pairs, typename V::F32& even, typename V::F32& odd) {
    const auto words = V::load_i8(pairs);  // sign-extended to 32 bits
    even = V::to_f32(V::template shift_right<28>(V::template shift_left<28>(words)));
    odd = V::to_f32(V::template shift_right<4>(words));
  }
};
