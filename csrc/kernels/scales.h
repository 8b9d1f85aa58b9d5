// How the scales of a packed block become fp32 factors of 16 rows, and what its weights then are:
//   weight = code * scale, or code * scale + offset, with one rounding at most beyond those of the format itself.
// One struct per kind of scale. kParts: a block of 32 columns has so many scales per row, side by side.
//   scale, offset   of rows [lane, lane + 16) and part; planes points at the block's group in every plane
// Written over the vector vocabulary Vec; included inside the variant's namespace.
#pragma once

using Planes = const uint8_t* const*;

struct NoScales {
  static constexpr bool kAny = false, kOffset = false;
  static constexpr int kParts = 1;
};

struct OneScale {
  static constexpr bool kAny = true, kOffset = false;
  static constexpr int kParts = 1;
};

struct ScaleBf16 : OneScale {
  static Vec::F32 scale(Planes planes, int lane, int) {
    return Vec::load_bf16(reinterpret_cast<const uint16_t*>(planes[0]) + lane);
  }
};

struct ScaleF16 : OneScale {
  static Vec::F32 scale(Planes planes, int lane, int) { return Vec::load_f16(planes[0] + 2 * lane); }
};

struct ScaleF32 : OneScale {
  static Vec::F32 scale(Planes planes, int lane, int) {
    return Vec::load(reinterpret_cast<const float*>(planes[0]) + lane);
  }
};

// One for all rows of the block.
struct ScaleBlock : OneScale {
  static Vec::F32 scale(Planes planes, int, int) {
    float value;
    __builtin_memcpy(&value, planes[0], sizeof value);
    return Vec::broadcast(value);
  }
};

// 2^(byte - 127); byte 0 is the subnormal 2^-127 (OCP Microscaling formats 1.0, section 5.4.1).
struct ScaleE8m0 : OneScale {
  static Vec::F32 scale(Planes planes, int lane, int) {
    const auto bits = Vec::template shift_left<23>(Vec::load_u8(planes[0] + lane));
    return Vec::as_f32(Vec::max_i32(bits, Vec::splat_i32(1 << 22)));
  }
};

// (code - zero) * scale with a scale of 16 bits, so that zero * scale and the sum are exact.
template <class Scale>
struct ScaleZero : Scale {
  static constexpr bool kOffset = true;
  static Vec::F32 offset(Planes planes, int lane, int part) {
    const auto zero = Vec::to_f32(Vec::load_u8(planes[1] + lane));
    return Vec::sub(Vec::zero(), Vec::mul(zero, Scale::scale(planes, lane, part)));
  }
};

// GGUF's super-blocks of 256 columns: (d * scale) * code - (dmin * minimum), scale and minimum of 32 columns.
struct ScaleMinimum : OneScale {
  static constexpr bool kOffset = true;
  static Vec::F32 scale(Planes planes, int lane, int) { return product(planes[0], planes[2], lane); }
  static Vec::F32 offset(Planes planes, int lane, int) {
    return Vec::sub(Vec::zero(), product(planes[1], planes[3], lane));
  }
  static Vec::F32 product(const uint8_t* half, const uint8_t* bytes, int lane) {
    return Vec::mul(Vec::load_f16(half + 2 * lane), Vec::to_f32(Vec::load_u8(bytes + lane)));
  }
};

// (d * scale) * code, with a signed scale per 16 columns.
struct ScaleSub16 : OneScale {
  static constexpr int kParts = 2;
  static Vec::F32 scale(Planes planes, int lane, int part) {
    return Vec::mul(Vec::load_f16(planes[0] + 2 * lane), Vec::to_f32(Vec::load_i8(planes[1] + part * kBlock + lane)));
  }
};

// A row of registry.inc as types.
template <Format>
struct Row;
#define KT_FORMAT(name, CodesOf, ScalesOf, bits, ...)               \
  template <>                                                       \
  struct Row<kt_sft::Format::name> {                                \
    using Codes = CodesOf;                                          \
    using Scales = ScalesOf;                                        \
    static constexpr FormatInfo kInfo = info(kt_sft::Format::name); \
    static constexpr int kCodeBytes = kPairs * kBlock * bits / 4;   \
  };
#include "kernels/registry.inc"

// The scales of block (nb, kb).
template <class R>
struct BlockScales {
  static constexpr const Plane* kPlanes = R::kInfo.planes;
  const uint8_t* planes[kMaxPlanes];

  BlockScales(const PackedMatrix& m, int nb, int kb) {
    for (int p = 0; p < kMaxPlanes && kPlanes[p].lanes > 0; ++p) planes[p] = m.plane_at(p, nb, kb);
  }
  Vec::F32 scale(int half, int part) const { return R::Scales::scale(planes, half * kTileRows, part); }
  Vec::F32 offset(int half, int part) const { return R::Scales::offset(planes, half * kTileRows, part); }
};

// The scales of one block after another, along a block row or down a block column.
template <class R>
class WalkingScales : public BlockScales<R> {
  using BlockScales<R>::kPlanes;

 public:
  WalkingScales(const PackedMatrix& m, int nb, int kb, bool along) : BlockScales<R>(m, nb, kb) {
    for (int p = 0; p < kMaxPlanes && kPlanes[p].lanes > 0; ++p) {
      const int columns = along ? m.plane(p).columns : kBlock, group = m.group_bytes(p);
      blocks_[p] = columns > kBlock ? columns / kBlock : 1;
      left_[p] = blocks_[p] - kb % blocks_[p];
      if (m.in_block(p)) {
        step_[p] = m.block_bytes() * (along ? 1 : m.col_blocks());
      } else {
        step_[p] = !along ? m.scale_row_bytes : columns < kBlock ? kBlock / columns * group : group;
      }
    }
  }
  void next() {
    for (int p = 0; p < kMaxPlanes && kPlanes[p].lanes > 0; ++p)
      if (--left_[p] == 0) left_[p] = blocks_[p], this->planes[p] += step_[p];
  }

 private:
  int blocks_[kMaxPlanes], left_[kMaxPlanes], step_[kMaxPlanes];  // of a group; until the next one; bytes to it
};

// The weights of 16 rows of a block: code * scale (+ offset).
template <class R>
struct Weights {
  using Scales = typename R::Scales;
  Vec::F32 scales[Scales::kParts], offsets[Scales::kParts];

  Weights(const PackedMatrix& m, int nb, int kb, int half) : Weights(BlockScales<R>(m, nb, kb), half) {}
  Weights(const BlockScales<R>& block, int half) {
    if constexpr (Scales::kAny) {
      for (int part = 0; part < Scales::kParts; ++part) {
        scales[part] = block.scale(half, part);
        if constexpr (Scales::kOffset) offsets[part] = block.offset(half, part);
      }
    }
  }
  Vec::F32 of(Vec::F32 code, int pair) const {
    const int part = pair * Scales::kParts / kPairs;
    if constexpr (!Scales::kAny) {
      return code;
    } else if constexpr (Scales::kOffset) {
      return Vec::fma(code, scales[part], offsets[part]);
    } else {
      return Vec::mul(code, scales[part]);
    }
  }
};
