#include "moe/plan.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "common/thread_pool.h"

namespace kt_sft {

ExpertWeights::ExpertWeights(int num_experts, int hidden, int intermediate, const MatrixFormat (&formats)[3])
    : num_experts(num_experts), hidden(hidden), intermediate(intermediate) {
  for (int p : {kGate, kUp, kDown}) {
    const int rows = p == kDown ? hidden : intermediate, cols = p == kDown ? intermediate : hidden;
    matrices_[p] = PackedMatrix(formats[p].format, rows, cols, formats[p].group_size);
    starts_[p] = expert_bytes_;
    expert_bytes_ += matrices_[p].nbytes();
  }
}

PackedMatrix ExpertWeights::matrix(int expert, Projection projection) const {
  PackedMatrix m = matrices_[projection];
  m.codes = storage + expert * expert_bytes_ + starts_[projection];
  m.scales = m.codes + m.all_blocks_bytes();
  return m;
}

void sort_by_expert(const int64_t* ids, int64_t slots, int num_experts, int32_t* counts, int32_t* order) {
  std::fill(counts, counts + num_experts, 0);
  for (int64_t i = 0; i < slots; ++i)
    if (ids[i] >= 0) ++counts[ids[i]];
  int32_t begin = 0;
  for (int e = 0; e < num_experts; ++e) {  // counts hold the next free place while sorting, and become counts again
    const int32_t n = counts[e];
    counts[e] = begin;
    begin += n;
  }
  for (int64_t i = 0; i < slots; ++i)
    if (ids[i] >= 0) order[counts[ids[i]]++] = static_cast<int32_t>(i);
  for (int e = num_experts - 1; e > 0; --e) counts[e] -= counts[e - 1];
}

int64_t routed_slots(const LayerCall& call) {
  return std::count_if(call.ids, call.ids + call.tokens * call.top_k, [](int64_t id) { return id >= 0; });
}

Plan::Plan(const ExpertWeights& weights, const LayerCall& call)
    : weights(weights),
      call(call),
      kernels(kt_sft::kernels()),
      threads(num_threads()),
      nodes(kt_sft::nodes().count()),
      slots(routed_slots(call)) {
  const int64_t most_tiles = slots / kTileRows + std::min<int64_t>(slots, weights.num_experts) + slots / kMaxRows;
  wave_tile_limit = std::min<int64_t>(std::max<int64_t>(most_tiles, 1), kWaveTiles);
}

void Plan::take(Workspace& workspace) {
  const int64_t most_segments = std::min<int64_t>(slots, weights.num_experts) + slots / kMaxRows + 1;
  thread = workspace.take<ThreadBuffers>(threads);  // first: they lie where they were first touched, call for call
  const bool real = thread != nullptr;
  for (int t = 0; t < threads; ++t) {
    ThreadBuffers b;
    b.gemm = workspace.take<char>(kernels.gemm_scratch_bytes);
    for (auto& rows : b.rows) rows = workspace.take<float>(int64_t{kMaxRows} * kMaxCols);
    if (real) thread[t] = b;
  }
  counts = workspace.take<int32_t>(weights.num_experts);
  order = workspace.take<int32_t>(slots);
  token = workspace.take<int32_t>(slots);
  segments = workspace.take<Segment>(most_segments);
  waves = workspace.take<Wave>(most_segments);
}

void Plan::cut() {
  sort_by_expert(call.ids, call.tokens * call.top_k, weights.num_experts, counts, order);
  for (int64_t i = 0; i < slots; ++i) token[i] = order[i] / call.top_k;
  num_segments = num_waves = 0;
  int row = 0;
  int64_t tile = 0;
  for (int e = 0; e < weights.num_experts; ++e) {
    const int pieces = static_cast<int>(ceil_div(counts[e], kMaxRows));
    for (int p = 0, left = counts[e]; p < pieces; ++p) {
      const int rows = static_cast<int>(std::min<int64_t>(left, round_up(ceil_div(left, pieces - p), kTileRows)));
      const int64_t need = ceil_div(rows, kTileRows);
      if (num_waves == 0 || tile + need > wave_tile_limit) {
        waves[num_waves++] = {num_segments, num_segments};
        tile = 0;
      }
      segments[num_segments++] = {e, row, rows, static_cast<int>(tile)};
      waves[num_waves - 1].end = num_segments;
      tile += need, row += rows, left -= rows;
    }
  }
}

int Plan::column_step(int columns, int64_t pieces, int most) const {
  const int64_t per_thread = most > kMaxCols ? 2 : 4;  // four balance; two leave long runs of codes
  const int64_t wanted = ceil_div(per_thread * threads, std::max<int64_t>(pieces, 1));
  const int64_t tasks = std::max<int64_t>(wanted, ceil_div(columns, most));
  return static_cast<int>(std::max<int64_t>(round_up(ceil_div(columns, tasks), kBlock), kBlock));
}

int Plan::most_rows(const Wave& wave) const {
  int most = 0;
  for (int i = wave.begin; i < wave.end; ++i) most = std::max(most, segments[i].rows);
  return most;
}

// Sums of a task: an eighth of L2, and not more than its buffers hold.
static int most_sums() {
  const long l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);  // 0 or -1 where the system does not know it
  return static_cast<int>(std::min<long>(l2 / 8 / static_cast<long>(sizeof(float)), kMaxRows * kMaxCols));
}

int Plan::task_columns(const Wave& wave) const {
  const int rows = most_rows(wave);
  if (!kernels.wide_tasks || rows <= kSkinnyRows) return kMaxCols;
  static const int sums = most_sums();
  const int fit = sums / static_cast<int>(round_up(rows, kTileRows));
  return std::clamp(fit / kBlock * kBlock, kMaxCols, kFewRowsCols);
}

int Plan::forward_columns(const Wave& wave) const {
  return most_rows(wave) <= kSkinnyRows ? kFewRowsCols : task_columns(wave);
}

ColumnTasks::ColumnTasks(const Plan& plan, int columns, int unit, int step, int64_t pieces, int turn)
    : columns_(columns),
      unit_(unit),
      step_(step),
      turn_(turn),
      blocks_(split_over_nodes(ceil_div(columns, unit), plan.nodes)) {
  tasks_.nodes = plan.nodes;
  for (int n = 0; n < plan.nodes; ++n) {
    const int group = (n + turn) % plan.nodes;
    tasks_.end[n] = tasks_.begin(n) + pieces * ceil_div(first_column(group + 1) - first_column(group), step);
  }
}

ColumnTask ColumnTasks::operator[](int64_t task) const {
  int node = 0;
  while (task >= tasks_.end[node]) ++node;
  const int group = (node + turn_) % tasks_.nodes;
  const int begin = first_column(group), width = first_column(group + 1) - begin;
  const int64_t per_piece = ceil_div(width, step_);
  task -= tasks_.begin(node);
  const int at = static_cast<int>(task % per_piece) * step_;
  return {static_cast<int>(task / per_piece), begin + at, std::min(step_, width - at), node};
}

bool ColumnTasks::after(int64_t task, int threads, ColumnTask* next) const {
  if (task + threads >= tasks_.total()) return false;
  *next = (*this)[task + threads];
  return true;
}

void rank_product(const Plan& plan, const Plan::ThreadBuffers& buffers, int rows, const RankProduct& p) {
  for (int c0 = 0; c0 < p.rank; c0 += kMaxCols) {
    const int nc = std::min(kMaxCols, p.rank - c0);
    const GemmTerm term{p.act, p.q, nullptr, &p.factor, 0, rows <= kSkinnyRows};
    plan.kernels.gemm({p.side, &term, 1, rows, c0, nc, p.small + c0, p.rank, buffers.gemm});
  }
  for (int64_t i = 0; i < int64_t{rows} * p.rank; ++i) p.small[i] *= p.scale;
  if (p.tiles == nullptr) return;
  plan.kernels.pack({p.side,
                     {p.small, true, p.rank, 1},
                     0,
                     rows,
                     0,
                     p.rank,
                     p.tiles,
                     ceil_div(p.rank, kTileSteps),
                     rows <= kSkinnyRows});
}

void segment_product(const Plan& plan, const Plan::ThreadBuffers& buffers, const Segment& s, int c0, int nc,
                     const SegmentProduct& p) {
  const bool adapted = p.adapter != nullptr;
  if (!plan.in_int8(s)) {
    const GemmTerm base{p.act, p.q, &p.packed, nullptr, 0, s.rows <= kSkinnyRows};
    const GemmTerm terms[2] = {base, adapted ? *p.adapter : base};
    plan.kernels.gemm({Side::left, terms, adapted ? 2 : 1, s.rows, c0, nc, p.out, nc, buffers.gemm, false, p.upcoming});
    return;
  }
  const Gemm8Term base = p.act8.term(s.tile0, p.packed, 0, p.q);
  plan.kernels.gemm8({Side::left, &base, 1, s.rows, c0, nc, p.out, nc, buffers.gemm});
  if (!adapted) return;
  plan.kernels.gemm({Side::left, p.adapter, 1, s.rows, c0, nc, p.spare, nc, buffers.gemm});
  for (int64_t i = 0; i < int64_t{s.rows} * nc; ++i) p.out[i] += p.spare[i];
}

void add_bias(const float* bias, int c0, int nc, int rows, float* to) {
  if (bias == nullptr) return;
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < nc; ++c) to[r * nc + c] += bias[c0 + c];
}

void pack_tokens(const Plan& plan, const Wave& wave, Side side, const uint16_t* matrix, int width, void* tiles,
                 bool few_rows_only) {
  constexpr int kRowsPerTask = 4 * kTileRows;
  const int64_t q_tiles = ceil_div(width, kTileSteps);
  const int most = plan.most_rows(wave);
  const int64_t tasks = ceil_div(most, kRowsPerTask);
  const auto lies = [&](int rows) { return side == Side::left && plan.is_left_tiles(rows, width); };
  if (lies(most)) return;
  parallel_for((wave.end - wave.begin) * tasks, [&](int64_t task, int) {
    const Segment& s = plan.segments[wave.begin + task / tasks];
    const int row = static_cast<int>(task % tasks) * kRowsPerTask;
    if (row >= s.rows || (few_rows_only && s.rows > kSkinnyRows) || lies(s.rows)) return;
    const DenseView view{matrix, false, width, 1, plan.token + s.row0};
    plan.kernels.pack({side, view, row, std::min(kRowsPerTask, s.rows - row), 0, width,
                       plan.tile(tiles, s.tile0 + row / kTileRows, q_tiles), q_tiles, s.rows <= kSkinnyRows});
  });
}

void quantize_tokens(const Plan& plan, const Wave& wave, const uint16_t* matrix, int width, const Int8Rows& rows,
                     int folded) {
  const int64_t tasks = ceil_div(plan.most_rows(wave), kTileRows);
  parallel_for((wave.end - wave.begin) * tasks, [&](int64_t task, int) {
    const Segment& s = plan.segments[wave.begin + task / tasks];
    const int tile = static_cast<int>(task % tasks), row = tile * kTileRows;
    if (row >= s.rows || s.rows <= kSkinnyRows) return;
    PackedMatrix weights;
    if (folded >= 0) weights = plan.weights.matrix(s.expert, static_cast<Projection>(folded));
    rows.quantize(plan.kernels, s.tile0 + tile, 0, {matrix, false, width, 1, plan.token}, s.row0 + row,
                  std::min(kTileRows, s.rows - row), width, folded >= 0 ? &weights : nullptr);
  });
}

void GateUpBuffers::take(const Plan& plan, Workspace& workspace) {
  const Lora& lora = plan.call.lora;
  x = plan.take_tiles(workspace, plan.weights.hidden);
  x_lora = lora.x != nullptr ? plan.take_tiles(workspace, plan.weights.hidden) : x;
  if (plan.int8()) x8.take(workspace, plan.wave_tile_limit, plan.weights.hidden, kInputGroup8);
  for (int p : {kGate, kUp}) {
    const int rank = lora.factors[p].rank;
    xa[p] = workspace.take<float>(plan.wave_rows() * rank);
    xa_tiles[p] = plan.take_tiles(workspace, rank);
  }
}

void GateUpBuffers::prepare(const Plan& plan, const Wave& wave) const {
  const Lora& lora = plan.call.lora;
  const int D = plan.weights.hidden;
  const bool adapted = lora.factors[kGate].rank + lora.factors[kUp].rank > 0;
  pack_tokens(plan, wave, Side::left, plan.call.x, D, x, plan.int8() && !(adapted && x_lora == x));
  if (plan.int8()) quantize_tokens(plan, wave, plan.call.x, D, x8);
  if (lora.x != nullptr) pack_tokens(plan, wave, Side::left, lora.x, D, x_lora);
  if (!adapted) return;
  parallel_for(int64_t{wave.end - wave.begin} * 2, [&](int64_t task, int thread) {
    const Segment& s = plan.segments[wave.begin + task / 2];
    const LoraFactors& f = lora.factors[task % 2];
    if (f.rank == 0) return;
    rank_product(plan, plan.thread[thread], s.rows,
                 {Side::left, plan.left_tiles(s, lora.x != nullptr ? lora.x : plan.call.x, D, x_lora), D,
                  factor_a(f, s.expert, D, Reduce::features), f.rank, lora.scaling,
                  xa[task % 2] + int64_t{s.tile0} * kTileRows * f.rank,
                  plan.tile(xa_tiles[task % 2], s.tile0, ceil_div(f.rank, kTileSteps))});
  });
}

void GateUpBuffers::compute(const Plan& plan, const Plan::ThreadBuffers& buffers, const Segment& s, int c0, int nc,
                            const Upcoming* upcoming) const {
  const int D = plan.weights.hidden, F = plan.weights.intermediate;
  for (int p : {kGate, kUp}) {
    const LoraFactors& f = plan.call.lora.factors[p];
    const PackedMatrix packed = plan.weights.matrix(s.expert, static_cast<Projection>(p));
    DenseView factor;
    GemmTerm adapter{};
    if (f.rank > 0) {
      factor = factor_b(f, s.expert, F, Reduce::rank);
      adapter = {plan.tile(xa_tiles[p], s.tile0, ceil_div(f.rank, kTileSteps)),
                 f.rank,
                 nullptr,
                 &factor,
                 0,
                 s.rows <= kSkinnyRows};
    }
    const Upcoming up{plan.weights.matrix(s.expert, kUp), c0};
    segment_product(plan, buffers, s, c0, nc,
                    {packed, left_tiles(plan, s), x8, D, f.rank > 0 ? &adapter : nullptr, buffers.rows[p],
                     buffers.rows[2], p == kGate ? &up : upcoming});
    add_bias(plan.weights.bias(s.expert, static_cast<Projection>(p)), c0, nc, s.rows, buffers.rows[p]);
  }
}

}  // namespace kt_sft
