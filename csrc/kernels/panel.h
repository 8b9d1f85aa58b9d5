// THE layout contract of packed weights and of the tiles that the micro-kernels read.
//
// Packed matrix W (n rows, k columns; both padded with zeros to multiples of 32):
//   blocks of 32 x 32, block (nb, kb) at codes + (nb * KB + kb) * block_bytes, KB = k / 32.
//   Inside a block the unit is a pair (W[n][2p], W[n][2p+1]); pair (p, n) is number p * 32 + n.
//     bf16: 4 bytes (low half first)   int8: 2 bytes (low half first)   int4: 1 byte (low nibble first)
//   scales: bf16, [nb][group][32 n], groups of group_size along k (one group when per channel); none for bf16.
//   The value that enters a product, in both directions, is bf16_rne(code * scale); products of up to kSkinnyRows rows
//   take the exact code and apply the scale to fp32 sums.
//
// Tiles, 512 elements each, element = bf16 where the ISA multiplies bf16 pairs and float elsewhere:
//   left  tile: 16 rows c, 32 reduction steps q:  [c][q]
//   right tile: bf16: [q / 2][c][2] (the VNNI order of TDPBF16PS and VDPBF16PS); float: [q][c]
//   A packed operand is [c tile][q tile]. Left and right swap roles between the two directions, so that neither needs
//   the weights transposed:
//     forward         D[m][n] = left(X)[m][k] . right(W)[k][n]
//     input gradient  D[k][m] = left(W)[k][n] . right(dY)[n][m]   (D is transposed on its way out)
//
// Everything here is independent of ISA, threads and NUMA nodes.
#pragma once
#include <cstdint>

namespace kt_sft {

constexpr int kBlock = 32;          // rows and columns of a weight block
constexpr int kPairs = kBlock / 2;  // pairs of a block along k
constexpr int kTileRows = 16;       // rows c of a tile
constexpr int kTileSteps = 32;      // reduction steps q of a tile
constexpr int kTileElems = kTileRows * kTileSteps;
constexpr int kStripTiles = kBlock / kTileRows;  // weight tiles decoded together
constexpr int kSkinnyRows = 4;                   // activation rows up to which a product is bound by reading the codes
constexpr int kMaxRows = 512;   // activation rows of one call: bounds the fp32 accumulators of a thread
constexpr int kMaxCols = 128;   // output columns of one call: 512 x 128 x 4 B = 256 KiB, a share of L2
constexpr int kPanelTiles = 8;  // reduction tiles decoded at once: 32 x 256 bf16 = 16 KiB, a third of L1

// Native int8 products: tiles of 16 rows or columns x 64 reduction steps, see gemm8.h.
constexpr int kSteps8 = 64, kTile8Bytes = kTileRows * kSteps8;
constexpr int kMaxGroup8 = 256;                         // reduction steps that share an activation scale, at most
constexpr int kInputGroup8 = 256, kHiddenGroup8 = 128;  // of the layer's input; of H, which has heavier tails

constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }
constexpr int64_t ceil_div(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }

enum class Format : int {
#define KT_FORMAT(name, Struct, pair_bytes, has_scales) name,
#include "kernels/registry.inc"
};

constexpr int pair_bytes(Format format) {
  constexpr int bytes[] = {
#define KT_FORMAT(name, Struct, pair_bytes, has_scales) pair_bytes,
#include "kernels/registry.inc"
  };
  return bytes[static_cast<int>(format)];
}

constexpr bool has_scales(Format format) {
  constexpr bool scaled[] = {
#define KT_FORMAT(name, Struct, pair_bytes, has_scales) has_scales,
#include "kernels/registry.inc"
  };
  return scaled[static_cast<int>(format)];
}

// One packed matrix, not owned.
struct PackedMatrix {
  const uint8_t* codes;
  const uint16_t* scales;  // bf16 bits; null for bf16
  Format format;
  int rows, cols;  // n, k as given; blocks cover the padded sizes
  int group_size;  // along k, a multiple of 32; the padded k when per channel

  int row_blocks() const { return static_cast<int>(ceil_div(rows, kBlock)); }
  int col_blocks() const { return static_cast<int>(ceil_div(cols, kBlock)); }
  int groups() const {
    return has_scales(format) ? static_cast<int>(ceil_div(int64_t{col_blocks()} * kBlock, group_size)) : 0;
  }
  int block_bytes() const { return kPairs * kBlock * pair_bytes(format); }
  int64_t code_bytes() const { return int64_t{row_blocks()} * col_blocks() * block_bytes(); }
  int64_t scale_bytes() const { return int64_t{row_blocks()} * kBlock * groups() * 2; }
  int64_t nbytes() const { return round_up(code_bytes() + scale_bytes(), 64); }
  const uint8_t* block(int nb, int kb) const { return codes + (int64_t{nb} * col_blocks() + kb) * block_bytes(); }
  const uint16_t* block_scales(int nb, int kb) const {
    return scales == nullptr ? nullptr : scales + (int64_t{nb} * groups() + kb * kBlock / group_size) * kBlock;
  }
};

// A strided matrix as it lies in memory: element (c, q) at base[(cidx ? cidx[c] : c) * cs + (qidx ? qidx[q] : q) * qs].
// One of cs and qs is 1 (and has no index).
struct DenseView {
  const void* base;
  bool is_float;  // fp32, else bf16
  int64_t cs, qs;
  const int32_t* cidx = nullptr;
  const int32_t* qidx = nullptr;
};

}  // namespace kt_sft
