// Forward products of a few activation rows with codes that are whole numbers, in whole numbers. 128 activations of a
// row share a power of two that makes them 16 bits: those of at least 1/128 of the largest stay exact (bf16 has eight
// significant bits), smaller ones are off by 2^-15 of it at most. Codes of eight bits are widened and multiplied in
// pairs; codes of four are looked up as bytes and multiplied in quads, by the high and the low bytes of the
// activations (dot_words and dot8 of tile_ops_vnni.h). A line of codes then takes 3 to 6 cycles, less than memory needs
// to deliver it. Included by skinny.h.
#pragma once

constexpr int kFixedBlocks = 4;  // blocks whose activations share a power of two: their sums stay below 2^31

// Quads take as many products as bf16 pairs do: of more rows, the decoding that they save no longer counts.
template <class R, int Rows>
constexpr bool kMultipliesFixed =
    kScalesSums<R> && (R::Codes::kWhole == Whole::pairs || (R::Codes::kWhole == Whole::quads && Rows <= 2));

// Bytes that prefetching runs ahead. Pairs are multiplied faster than memory delivers, and the hardware's own
// prefetching keeps up best if it is asked for little more than what is read; quads need the latency of DRAM covered.
template <class R>
constexpr int kFixedAhead = R::Codes::kWhole == Whole::pairs ? 512 : 6 << 10;

// Asks for a line just here: GCC would rather ask for all lines of a block before it reads the first.
inline void ask_here(const uint8_t* line) { __asm__ volatile("prefetcht1 %0" : : "m"(*line) : "memory"); }

// The activations of a row and a chunk of reduction steps: x = number * scale.
struct FixedRow {
  alignas(64) int32_t words[kSkinnySteps / 2];  // pairs: [block][pair]; quads: [block][8 columns][2 quads][high, low]
  int32_t start[kSkinnySteps / kBlock];  // quads: what a block's sums begin with, for codes that are 128 too large
  float scale[kSkinnySteps / (kFixedBlocks * kBlock)];
};
static_assert(sizeof(FixedRow) <= kSkinnySteps * sizeof(float));

// The bits of the largest of some blocks of a row of left tiles, without its sign.
inline int largest_of(const Ops::Elem* row, int64_t tile_elems, int blocks) {
  Vec::I32 sizes = Vec::splat_i32(0);
  for (int b = 0; b < blocks; ++b)
    sizes = Vec::max16(sizes, Vec::bit_and(Vec::load_i32(row + b * tile_elems), Vec::splat16(0x7fff)));
  return Vec::largest16(sizes);
}

// Blocks of a row that share an exponent, kFixedBlocks or, the last, fewer: their words and starts.
template <class Codes>
inline void fix_blocks(const Ops::Elem* row, int64_t tile_elems, int blocks, int exponent, int32_t* words,
                       int32_t* start) {
  const Vec::F32 factor = Vec::broadcast(float_of(static_cast<uint32_t>(268 - exponent) << 23));  // 2^14 / 2^exponent
  Vec::I32 sums[kFixedBlocks] = {};
#pragma GCC unroll 4
  for (int b = 0; b < kFixedBlocks && b < blocks; ++b) {
    const Vec::I32 pairs = Vec::load_i32(row + b * tile_elems);
    const auto even = Vec::to_i32(Vec::mul(Vec::as_f32(Vec::shift_left<16>(pairs)), factor));
    const auto odd = Vec::to_i32(Vec::mul(Vec::as_f32(Vec::high_half(pairs)), factor));
    Vec::I32 both = Vec::low_words(even, odd);
    if constexpr (Codes::kWhole == Whole::quads) {
      sums[b] = Vec::dot16(both, Vec::splat16(-128));
      both = Vec::byte_quads(both);
    }
    Vec::store_i32(words + b * kPairs, both);
  }
  if constexpr (Codes::kWhole == Whole::quads) Vec::store_sums4(start, sums);
}

// All exponents first: one pass waits for the activations, which may have left the cache, the other computes.
template <class Codes>
inline void fix_rows(const Ops::Elem* tiles, int64_t tile_elems, int rows, int blocks, FixedRow* to) {
  constexpr int kInfinity = 0x7f80;  // bits of bf16
  for (int r = 0; r < rows; ++r, tiles += kTileSteps, ++to) {
    int exponents[kSkinnySteps / (kFixedBlocks * kBlock)];
    for (int b = 0, part = 0; b < blocks; b += kFixedBlocks, ++part) {
      const int largest = largest_of(tiles + b * tile_elems, tile_elems, min_int(kFixedBlocks, blocks - b));
      // The number below 2^15 whose two bytes are signed is 32639: a significand of all ones takes the next exponent.
      // Those below 2^-112 stay there, where scales are normal numbers.
      exponents[part] = max_int((largest + 1) >> 7, 15);
      const float scale = float_of(static_cast<uint32_t>(exponents[part] - 14) << 23) / Codes::kWholeUnit;
      to->scale[part] = largest < kInfinity ? scale : __builtin_nanf("");
    }
    for (int b = 0, part = 0; b < blocks; b += kFixedBlocks, ++part)
      fix_blocks<Codes>(tiles + b * tile_elems, tile_elems, blocks - b, exponents[part], to->words + b * kPairs,
                        to->start + b);
  }
}

// Whole sums of a block row: [half][row of x][pairs: those of even and of odd pairs; quads: of high and of low bytes].
template <int Rows>
using FixedSums = Vec::I32[kStripTiles][Rows][2];

// acc += the products of block b of x; ahead: what is asked for meanwhile.
template <class R, int Rows>
inline void multiply_fixed_pairs(const uint8_t* block, const uint8_t* ahead, int b, const FixedRow* x,
                                 FixedSums<Rows>& acc) {
  for (int p = 0; p < kPairs; p += 4) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      ask_here(ahead + (p + i) * 64);
      Vec::I32 codes[kStripTiles];
      R::Codes::template whole_pairs<Vec>(block, p + i, codes);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        const Vec::I32 pair = Vec::splat_i32(x[r].words[b * kPairs + p + i]);
        dot_words(acc[0][r][i % 2], codes[0], pair);
        dot_words(acc[1][r][i % 2], codes[1], pair);
      }
    }
  }
}

template <class R, int Rows>
inline void multiply_fixed_quads(const uint8_t* block, const uint8_t* ahead, int b, const FixedRow* x,
                                 FixedSums<Rows>& acc) {
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
    for (int half = 0; half < kStripTiles; ++half)
      acc[half][r][1] = Vec::add_i32(acc[half][r][1], Vec::splat_i32(x[r].start[b]));
#pragma GCC unroll 4
  for (int w = 0; w < kBlock / 8; ++w) {
    Vec::I32 quads[kStripTiles][2];
#pragma GCC unroll 2
    for (int half = 0; half < kStripTiles; ++half) {
      ask_here(ahead + (w * kStripTiles + half) * 64);
      R::Codes::template whole_quads<Vec>(block, w, half, quads[half]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        const int32_t* at = x[r].words + b * kPairs + w * 4 + i * 2;
        const Vec::I32 high = Vec::splat_i32(at[0]), low = Vec::splat_i32(at[1]);
#pragma GCC unroll 2
        for (int half = 0; half < kStripTiles; ++half) {
          dot8(acc[half][r][0], quads[half][i], high);
          dot8(acc[half][r][1], quads[half][i], low);
        }
      }
  }
}

// total += whole sums * scale of a column.
template <class R, int Rows>
inline void add_fixed(const FixedSums<Rows>& acc, const Vec::F32 (&scale)[kStripTiles],
                      Vec::F32 (&total)[kStripTiles][Rows]) {
#pragma GCC unroll 2
  for (int half = 0; half < kStripTiles; ++half)
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      Vec::I32 first = acc[half][r][0];
      if constexpr (R::Codes::kWhole == Whole::quads) first = Vec::shift_left<8>(first);
      const Vec::F32 sum = Vec::to_f32(Vec::add_i32(first, acc[half][r][1]));
      total[half][r] = Vec::fma(sum, scale[half], total[half][r]);
    }
}

// skinny_forward in whole numbers; x: the rows from block kb0 on.
template <class R, int Rows>
inline void fixed_forward(const PackedMatrix& w, int nb, int kb0, int blocks, const FixedRow* x,
                          const CodeStream& stream, float* out, int64_t ldo) {
  const int group = w.group_size / kBlock, block_bytes = w.block_bytes();
  const uint8_t* block = w.block(nb, kb0);
  WalkingScales<R> scales(w, nb, kb0, true);
  for (int b = 0, group_end = group - kb0 % group; b < blocks;) {
    const int part = b / kFixedBlocks, end = min_int(blocks, (part + 1) * kFixedBlocks);
    Vec::F32 total[kStripTiles][Rows];
#pragma GCC unroll 2
    for (auto& half : total)
#pragma GCC unroll 4
      for (auto& row : half) row = Vec::zero();
    while (b < end) {
      if (b == group_end) group_end += group;
      const BlockScales<R> of_group = scales;
      FixedSums<Rows> acc;
#pragma GCC unroll 2
      for (auto& half : acc)
#pragma GCC unroll 4
        for (auto& row : half) row[0] = row[1] = Vec::splat_i32(0);
      for (const int stop = min_int(end, group_end); b < stop; ++b, block += block_bytes, scales.next()) {
        const uint8_t* ahead = stream.after(block + kFixedAhead<R>);
        if constexpr (R::Codes::kWhole == Whole::quads) {
          multiply_fixed_quads<R, Rows>(block, ahead, b, x, acc);
        } else {
          multiply_fixed_pairs<R, Rows>(block, ahead, b, x, acc);
        }
        for (int own = R::kCodeBytes; own < block_bytes; own += kLine) ask_here(ahead + own);
      }
      // Read last: the hardware's prefetching follows a stream that runs forward.
      const Vec::F32 scale[kStripTiles] = {of_group.scale(0, 0), of_group.scale(1, 0)};
      add_fixed<R, Rows>(acc, scale, total);
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
      for (int half = 0; half < kStripTiles; ++half) {
        float* to = out + r * ldo + half * kTileRows;
        Vec::store(to, Vec::fma(total[half][r], Vec::broadcast(x[r].scale[part]), Vec::load(to)));
      }
  }
}

// The products of a chunk with block rows [first, first + strips).
template <class R, int Rows>
inline void fixed_packed(const SkinnyChunk& c, int first, int strips) {
  const int kb = c.q0 / kBlock, blocks = static_cast<int>(ceil_div(c.nq, kBlock));
  auto* x = reinterpret_cast<FixedRow*>(c.rows);
  const int64_t elems = left_tile_elems(c.g, c.term);
  fix_rows<typename R::Codes>(static_cast<const Ops::Elem*>(c.term.act) + kb * elems, elems, Rows, blocks, x);
  for (int s = 0; s < strips; ++s)
    fixed_forward<R, Rows>(*c.term.packed, first + s, kb, blocks, x, c.stream(first + s), c.out + s * kBlock, c.ldo);
}
