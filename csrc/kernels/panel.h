// THE layout contract of packed weights and of the tiles that the micro-kernels read.
//
// Packed matrix W (n rows, k columns; both padded to multiples of 32):
//   blocks of 32 x 32, block (nb, kb) at codes + (nb * KB + kb) * block_bytes(), KB = k / 32.
//   Inside a block the unit is a pair (W[n][2p], W[n][2p+1]); pair (p, n) is number p * 32 + n.
//     16 bits: 4 bytes (low half first)   8 bits: 2 bytes (low half first)
//     4 bits: 4 bytes hold pairs 4w to 4w + 3 of a row and are number w * 32 + n; in their low half the first columns,
//     in their high half the second ones, the lowest nibble first
//     5 and 6 bits: 1 byte (low nibble first), then the high bits of a pair: 2 bits at byte [p / 4][n] from bit
//     2 (p % 4), or 4 bits at byte [p / 2][n] from bit 4 (p % 2); the first column's bits first
//   scales: block row after block row, in each the planes of its format: [group of columns][lane = 32 n, or 1]. A plane
//     with one group for each block, of whole cache lines, lies behind the codes of its block instead: what is read
//     together is then one stream, which memory delivers faster.
//   The value that enters a product, in both directions, is bf16_rne(code * scale + offset), in fp32 before; products
//   of up to kSkinnyRows rows take it without that rounding.
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
constexpr int kLine = 64;           // bytes of a cache line
constexpr int kTileRows = 16;       // rows c of a tile
constexpr int kTileSteps = 32;      // reduction steps q of a tile
constexpr int kTileElems = kTileRows * kTileSteps;
constexpr int kStripTiles = kBlock / kTileRows;  // weight tiles decoded together
constexpr int kSkinnyRows = 4;                   // activation rows up to which a product is bound by reading the codes
constexpr int kMaxRows = 512;      // activation rows of one call: bounds the fp32 accumulators of a thread
constexpr int kMaxCols = 128;      // output columns of one call: 512 x 128 x 4 B = 256 KiB, a share of L2
constexpr int kFewRowsCols = 512;  // of fewer rows, as many as fit into the same, at most: codes come in longer runs
constexpr int kPanelTiles = 8;     // reduction tiles decoded at once: 32 x 256 bf16 = 16 KiB, a third of L1

// Native int8 products: tiles of 16 rows or columns x 64 reduction steps, see gemm8.h.
constexpr int kSteps8 = 64, kTile8Bytes = kTileRows * kSteps8;
constexpr int kMaxGroup8 = 256;                         // reduction steps that share an activation scale, at most
constexpr int kInputGroup8 = 256, kHiddenGroup8 = 128;  // of the layer's input; of H, which has heavier tails

constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }
constexpr int64_t ceil_div(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }

enum class Format : int {
#define KT_FORMAT(name, Codes, Scales, bits, ...) name,
#include "kernels/registry.inc"
};

// What a scale plane holds: one element of so many bytes per group of columns (0: the matrix's group size) and lane.
struct Plane {
  int columns, lanes, bytes;
};
constexpr Plane kNoPlane{0, 0, 0};
constexpr Plane kGroup8{0, kBlock, 1}, kGroup16{0, kBlock, 2}, kGroup32{0, kBlock, 4};
constexpr Plane kBlock32{0, 1, 4};                                                       // one for all 32 rows
constexpr Plane kSuper16{256, kBlock, 2}, kSub32{32, kBlock, 1}, kSub16{16, kBlock, 1};  // of GGUF's super-blocks
constexpr int kMaxPlanes = 4;

struct FormatInfo {
  const char* name;
  int bits;
  Plane planes[kMaxPlanes];
};

inline constexpr FormatInfo kFormats[] = {
#define KT_FORMAT(name, Codes, Scales, bits, ...) {#name, bits, {__VA_ARGS__}},
#include "kernels/registry.inc"
};
constexpr const FormatInfo& info(Format format) { return kFormats[static_cast<int>(format)]; }

// One packed matrix, not owned.
struct PackedMatrix {
  const uint8_t* codes = nullptr;
  const uint8_t* scales = nullptr;
  Format format = Format::bf16;
  int rows = 0, cols = 0;  // n, k as given; blocks cover the padded sizes
  int group_size = 0;      // along k, a multiple of 32; the padded k when per channel
  // Planes begin so many bytes behind the start of their block, or of their block row's scales.
  int plane_start[kMaxPlanes] = {}, own_bytes = 0, scale_row_bytes = 0;

  PackedMatrix() = default;
  PackedMatrix(Format format, int rows, int cols, int group)  // group 0: per channel
      : format(format), rows(rows), cols(cols), group_size(group > 0 ? group : col_blocks() * kBlock) {
    for (int p = 0; p < kMaxPlanes; ++p) {
      if (in_block(p)) {
        plane_start[p] = code_bytes() + own_bytes;
        own_bytes += group_bytes(p);
      } else {
        plane_start[p] = scale_row_bytes;
        scale_row_bytes += plane_groups(p) * group_bytes(p);
      }
    }
  }

  Plane plane(int p) const {
    const Plane plane = info(format).planes[p];
    return {plane.columns > 0 ? plane.columns : group_size, plane.lanes, plane.bytes};
  }
  int group_bytes(int p) const { return plane(p).lanes * plane(p).bytes; }
  bool in_block(int p) const {
    return plane(p).columns == kBlock && plane(p).lanes == kBlock && group_bytes(p) % kLine == 0;
  }
  int plane_groups(int p) const { return static_cast<int>(ceil_div(int64_t{col_blocks()} * kBlock, plane(p).columns)); }
  int row_blocks() const { return static_cast<int>(ceil_div(rows, kBlock)); }
  int col_blocks() const { return static_cast<int>(ceil_div(cols, kBlock)); }
  int code_bytes() const { return kPairs * kBlock * info(format).bits / 4; }  // of a block
  int block_bytes() const { return code_bytes() + own_bytes; }
  int64_t all_blocks_bytes() const { return int64_t{row_blocks()} * col_blocks() * block_bytes(); }
  int64_t nbytes() const { return round_up(all_blocks_bytes() + int64_t{row_blocks()} * scale_row_bytes, 64); }
  const uint8_t* block(int nb, int kb) const { return codes + (int64_t{nb} * col_blocks() + kb) * block_bytes(); }
  // The group of block (nb, kb) in a plane.
  const uint8_t* plane_at(int p, int nb, int kb) const {
    if (in_block(p)) return block(nb, kb) + plane_start[p];
    return scales + int64_t{nb} * scale_row_bytes + plane_start[p] + kb * kBlock / plane(p).columns * group_bytes(p);
  }
  // Block rows [nb0, nb1), a matrix of their own.
  PackedMatrix block_rows(int nb0, int nb1) const {
    PackedMatrix part = *this;
    part.codes = block(nb0, 0), part.scales = scales + int64_t{nb0} * scale_row_bytes;
    part.rows = (nb1 < row_blocks() ? nb1 * kBlock : rows) - nb0 * kBlock;
    return part;
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
