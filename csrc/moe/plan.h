// How the routed rows of one call are cut into pieces, and the buffers of a piece.
#pragma once
#include "common/nodes.h"
#include "common/workspace.h"
#include "kernels/kernel_table.h"
#include "moe/experts.h"
#include "moe/int8_rows.h"

namespace kt_sft {

// Up to kMaxRows rows of one expert.
struct Segment {
  int expert;
  int row0, rows;  // in the order sorted by expert
  int tile0;       // first 16-row tile in the buffers of its wave
};

// Segments that are computed together: bounds the workspace, whatever the number of tokens.
struct Wave {
  int begin, end;  // segments
};

constexpr int kWaveTiles = 256;  // 4096 rows

struct Plan {
  const ExpertWeights& weights;
  const LayerCall& call;
  const KernelTable& kernels;
  int threads, nodes;
  int64_t slots;            // routed: T * K less those that the call leaves out
  int64_t wave_tile_limit;  // tiles that the buffers of a wave hold

  int32_t *counts, *order, *token;  // (E), (N) slot of a sorted row, (N) token of a sorted row
  Segment* segments;
  Wave* waves;
  int num_segments, num_waves;

  struct ThreadBuffers {
    void* gemm;
    float* rows[3];  // kMaxRows x kMaxCols each, or fewer rows of more columns
  };
  ThreadBuffers* thread;

  Plan(const ExpertWeights& weights, const LayerCall& call);
  void take(Workspace& workspace);  // both passes of Workspace
  void cut();                       // routing -> segments and waves, after reserve()

  char* tile(void* tiles, int64_t tile, int64_t q_tiles) const {
    return static_cast<char*>(tiles) + tile * q_tiles * static_cast<int64_t>(kernels.tile_bytes);
  }
  void* take_tiles(Workspace& workspace, int64_t q) const {
    return workspace.take<char>(wave_tile_limit * ceil_div(q, kTileSteps) * kernels.tile_bytes);
  }
  // From one left tile of a segment of so many rows to the next: few rows lie alone.
  int64_t left_tile_bytes(int rows) const {
    return static_cast<int64_t>(kernels.tile_bytes) / kTileRows * (rows <= kSkinnyRows ? rows : kTileRows);
  }
  // Whether a single row of a (T, width) bf16 matrix is what its left tiles would be.
  bool is_left_tiles(int rows, int width) const {
    return rows == 1 && width % kTileSteps == 0 && kernels.tile_bytes == kTileRows * kTileSteps * sizeof(uint16_t);
  }
  // The left tiles of a segment: its row of the matrix, or where pack_tokens puts them.
  const void* left_tiles(const Segment& s, const uint16_t* matrix, int width, void* tiles) const {
    if (is_left_tiles(s.rows, width)) return matrix + int64_t{token[s.row0]} * width;
    return tile(tiles, s.tile0, ceil_div(width, kTileSteps));
  }
  // A product of a segment with columns from c0 on of a projection.
  Upcoming upcoming(const Segment& s, Projection projection, int c0, const void* act) const {
    const PackedMatrix packed = weights.matrix(s.expert, projection);
    const int64_t tiles = ceil_div(packed.cols, kTileSteps);
    return {packed, c0, act, s.rows <= kSkinnyRows ? tiles * left_tile_bytes(s.rows) : 0};
  }
  int64_t wave_rows() const { return wave_tile_limit * kTileRows; }
  // Columns of a task: enough tasks for all threads, and at most so many columns.
  int column_step(int columns, int64_t pieces, int most) const;
  int most_rows(const Wave& wave) const;  // of a segment
  // How many a task may have, and a forward one: long runs of codes where experts have few rows.
  int task_columns(const Wave& wave) const;
  int forward_columns(const Wave& wave) const;
  bool int8() const { return call.compute == Compute::int8; }
  // Products of a few rows are bound by the codes and need no quantised activations.
  bool in_int8(const Segment& s) const { return int8() && s.rows > kSkinnyRows; }
  bool gradient_in_int8(const Segment& s) const {
    return call.gradient_compute == Compute::int8 && s.rows > kSkinnyRows;
  }
  float routing_weight(int sorted_row) const { return call.weights[order[sorted_row]]; }
};

// One task: columns [c0, c0 + nc) of a segment, or of all segments, for a thread of `node`.
struct ColumnTask {
  int piece, c0, nc, node;
};

// Columns cut into tasks. The columns are laid out over the nodes like block rows of a packed matrix (as multiples of
// `unit`); a forward product of these columns reads rows of the node alone. A product that sums over the rows takes as
// many turns as there are nodes: at each, node n adds what its rows give to the columns of node n + turn, so that no
// two nodes write to the same place and the order of a sum is fixed for a number of nodes and the rows of a call.
class ColumnTasks {
 public:
  ColumnTasks(const Plan& plan, int columns, int unit, int step, int64_t pieces, int turn = 0);
  ColumnTask operator[](int64_t task) const;
  // The task that a thread probably takes after this one, if there is one: all threads take theirs in turn.
  bool after(int64_t task, int threads, ColumnTask* next) const;
  const NodeTasks& by_node() const { return tasks_; }

 private:
  int first_column(int group) const {
    const int64_t column = blocks_.begin(group) * unit_;
    return static_cast<int>(column < columns_ ? column : columns_);
  }
  int columns_, unit_, step_, turn_;
  NodeTasks blocks_, tasks_;
};

// The part of a packed product's reduction that a node computes: its block rows of W, and where they begin.
struct NodeRows {
  int begin;
  PackedMatrix packed;
};
// They begin at a multiple of `unit`, which is one of kBlock: a block row that this moves is read from another node.
inline NodeRows rows_of_node(const PackedMatrix& packed, int node, int nodes, int unit = kBlock) {
  const int blocks = unit / kBlock, all = packed.row_blocks();
  const NodeTasks units = split_over_nodes(ceil_div(all, blocks), nodes);
  const auto block = [&](int64_t at) {
    return static_cast<int>(at) * blocks < all ? static_cast<int>(at) * blocks : all;
  };
  const int begin = block(units.begin(node)), end = block(units.end[node]);
  return {begin * kBlock, packed.block_rows(begin, end)};
}

// Dense view of one expert's factor. a: (R, in), b: (out, R), row-major.
enum class Reduce { rank, features };  // which index is the reduction q; the other one is c
inline DenseView factor_a(const LoraFactors& f, int expert, int64_t features, Reduce reduce) {
  const char* base = static_cast<const char*>(f.a) + int64_t{expert} * f.rank * features * (f.a_float ? 4 : 2);
  if (reduce == Reduce::features) return {base, f.a_float, features, 1};
  return {base, f.a_float, 1, features};
}
inline DenseView factor_b(const LoraFactors& f, int expert, int64_t features, Reduce reduce) {
  const char* base = static_cast<const char*>(f.b) + int64_t{expert} * f.rank * features * (f.b_float ? 4 : 2);
  if (reduce == Reduce::rank) return {base, f.b_float, f.rank, 1};
  return {base, f.b_float, 1, f.rank};
}

// small[row][r] = scale * sum_q act[row][q] factor(r, q) for one segment, and the same as tiles (bf16) of `side`.
struct RankProduct {
  Side side;
  const void* act;  // packed tiles of the segment
  int q;
  DenseView factor;
  int rank;
  float scale;
  float* small;  // (rows, rank)
  void* tiles;   // of the segment, or null if only the numbers are wanted
};
void rank_product(const Plan& plan, const Plan::ThreadBuffers& buffers, int rows, const RankProduct& product);

// Gate and up of the segments of a wave, shared by forward and by a recomputing backward.
struct GateUpBuffers {
  void *x, *x_lora;   // for Plan::left_tiles (rows, D); x_lora == x unless the call has its own
  Int8Rows x8;        // X, for segments computed in int8
  float* xa[2];       // (wave rows, R): s X' A^T
  void* xa_tiles[2];  // the same as left tiles
  void take(const Plan& plan, Workspace& workspace);
  void prepare(const Plan& plan, const Wave& wave) const;  // packs x, computes xa
  const void* left_tiles(const Plan& plan, const Segment& s) const {
    return plan.left_tiles(s, plan.call.x, plan.weights.hidden, x);
  }
  // gate and up of columns [c0, c0 + nc) into buffers.rows[0] and [1], ld = nc.
  void compute(const Plan& plan, const Plan::ThreadBuffers& buffers, const Segment& segment, int c0, int nc,
               const Upcoming* upcoming) const;
};

// One product of a segment: packed weights (in int8 if the segment is) plus an optional adapter term, into `out`.
struct SegmentProduct {
  const PackedMatrix& packed;
  const void* act;       // left tiles of the segment; not read if it is computed in int8
  const Int8Rows& act8;  // of the wave
  int q;
  const GemmTerm* adapter;   // or null
  float *out, *spare;        // kMaxRows x kMaxCols each
  const Upcoming* upcoming;  // or null
};
void segment_product(const Plan& plan, const Plan::ThreadBuffers& buffers, const Segment& segment, int c0, int nc,
                     const SegmentProduct& product);

// rows[r][c] += bias[c0 + c] for rows of leading dimension nc; nothing if bias is null.
void add_bias(const float* bias, int c0, int nc, int rows, float* to);

// Packs gathered rows of a (T, width) bf16 matrix for every segment of the wave, or only for those of few rows. Rows
// that are left tiles as they lie are left there.
void pack_tokens(const Plan& plan, const Wave& wave, Side side, const uint16_t* matrix, int width, void* tiles,
                 bool few_rows_only = false);
// Quantises them for every segment of more rows; folded: a projection whose scales of rows are multiplied in, or -1.
void quantize_tokens(const Plan& plan, const Wave& wave, const uint16_t* matrix, int width, const Int8Rows& rows,
                     int folded = -1);

}  // namespace kt_sft
