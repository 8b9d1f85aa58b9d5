#include <algorithm>

#include "common/thread_pool.h"
#include "moe/plan.h"

namespace kt_sft {
namespace {

struct Forward {
  Plan plan;
  GateUpBuffers gate_up;
  void *h = nullptr, *h_lora = nullptr;  // left tiles (rows, F); h_lora == h without dropout
  Int8Rows h8;                           // H, for segments computed in int8
  float* ha = nullptr;                   // (wave rows, R): s H A^T
  void* ha_tiles = nullptr;
  LayerOutput output;
  float* out;  // (T, D): the sums

  Forward(const ExpertWeights& weights, const LayerCall& call, const LayerOutput& output)
      : plan(weights, call), output(output), out(output.f32) {}

  void take(Workspace& workspace) {
    const Lora& lora = plan.call.lora;
    const int F = plan.weights.intermediate, rank = lora.factors[kDown].rank;
    plan.take(workspace);
    gate_up.take(plan, workspace);
    h = plan.take_tiles(workspace, F);
    h_lora = lora.down_keep != nullptr ? plan.take_tiles(workspace, F) : h;
    if (plan.int8()) h8.take(workspace, plan.wave_tile_limit, F, kHiddenGroup8);
    ha = workspace.take<float>(plan.wave_rows() * rank);
    ha_tiles = plan.take_tiles(workspace, rank);
    if (output.bf16 != nullptr) out = workspace.take<float>(plan.call.tokens * plan.weights.hidden);
  }

  // H of one column block of one segment, into tiles; G and U saved for backward.
  void hidden_block(const Segment& s, int c0, int nc, const Upcoming* upcoming, const Plan::ThreadBuffers& b) const {
    const int F = plan.weights.intermediate;
    const int64_t f_tiles = ceil_div(F, kTileSteps);
    const LayerCall& call = plan.call;
    gate_up.compute(plan, b, s, c0, nc, upcoming);
    float* hidden = b.rows[2];
    for (int r = 0; r < s.rows; ++r) {
      const int64_t saved = int64_t{s.row0 + r} * F + c0;
      const bool keep = call.gate != nullptr;
      plan.kernels.activate(plan.weights.activation, b.rows[0] + r * nc, b.rows[1] + r * nc, nc, hidden + r * nc,
                            keep ? call.gate + saved : nullptr, keep ? call.up + saved : nullptr);
    }
    const PackArgs pack{Side::left,
                        {hidden, true, nc, 1},
                        0,
                        s.rows,
                        0,
                        nc,
                        plan.tile(h, s.tile0, f_tiles) + c0 / kTileSteps * plan.left_tile_bytes(s.rows),
                        f_tiles,
                        s.rows <= kSkinnyRows};
    if (plan.in_int8(s)) h8.quantize(plan.kernels, s.tile0, c0, pack.view, 0, s.rows, nc);
    if (!plan.in_int8(s) || (h_lora == h && call.lora.factors[kDown].rank > 0)) plan.kernels.pack(pack);
    if (h_lora == h) return;
    for (int r = 0; r < s.rows; ++r) {
      const uint8_t* keep = call.lora.down_keep + int64_t{plan.order[s.row0 + r]} * F + c0;
      for (int c = 0; c < nc; ++c) hidden[r * nc + c] *= keep[c] ? call.lora.keep_scale : 0.0f;
    }
    PackArgs dropped = pack;
    dropped.dst = plan.tile(h_lora, s.tile0, f_tiles) + c0 / kTileSteps * plan.left_tile_bytes(s.rows);
    plan.kernels.pack(dropped);
  }

  void down_rank_products(const Wave& wave) const {
    const LoraFactors& f = plan.call.lora.factors[kDown];
    const int F = plan.weights.intermediate;
    if (f.rank == 0) return;
    parallel_for(wave.end - wave.begin, [&](int64_t task, int thread) {
      const Segment& s = plan.segments[wave.begin + task];
      rank_product(
          plan, plan.thread[thread], s.rows,
          {Side::left, plan.tile(h_lora, s.tile0, ceil_div(F, kTileSteps)), F,
           factor_a(f, s.expert, F, Reduce::features), f.rank, plan.call.lora.scaling,
           ha + int64_t{s.tile0} * kTileRows * f.rank, plan.tile(ha_tiles, s.tile0, ceil_div(f.rank, kTileSteps))});
    });
  }

  // s X' A^T of gate and up, for backward.
  void save_low_rank(const Wave& wave) const {
    const Lora& lora = plan.call.lora;
    const int ld = lora.input_rank();
    if (plan.call.low_rank == nullptr) return;
    parallel_for(wave.end - wave.begin, [&](int64_t task, int) {
      const Segment& s = plan.segments[wave.begin + task];
      for (int p : {kGate, kUp}) {
        const int rank = lora.factors[p].rank;
        const float* from = gate_up.xa[p] + int64_t{s.tile0} * kTileRows * rank;
        uint16_t* to = plan.call.low_rank + int64_t{s.row0} * ld + (p == kUp ? ld - rank : 0);
        for (int r = 0; r < s.rows; ++r) plan.kernels.to_bf16(from + r * rank, rank, to + int64_t{r} * ld);
      }
    });
  }

  // out[:, c0 : c0 + nc] += w Y for every segment of the wave: one task owns these columns.
  void combine_block(const Wave& wave, int c0, int nc, const Plan::ThreadBuffers& b) const {
    const int D = plan.weights.hidden, F = plan.weights.intermediate;
    const LoraFactors& f = plan.call.lora.factors[kDown];
    for (int i = wave.begin; i < wave.end; ++i) {
      const Segment& s = plan.segments[i];
      const PackedMatrix packed = plan.weights.matrix(s.expert, kDown);
      DenseView factor;
      GemmTerm adapter{};
      if (f.rank > 0) {
        factor = factor_b(f, s.expert, D, Reduce::rank);
        adapter = {plan.tile(ha_tiles, s.tile0, ceil_div(f.rank, kTileSteps)),
                   f.rank,
                   nullptr,
                   &factor,
                   0,
                   s.rows <= kSkinnyRows};
      }
      const bool last = i + 1 == wave.end;
      const Segment& next = plan.segments[last ? i : i + 1];
      const Upcoming upcoming = plan.upcoming(next, kDown, c0, plan.tile(h, next.tile0, ceil_div(F, kTileSteps)));
      segment_product(plan, b, s, c0, nc,
                      {packed, plan.tile(h, s.tile0, ceil_div(F, kTileSteps)), h8, F, f.rank > 0 ? &adapter : nullptr,
                       b.rows[0], b.rows[1], last ? nullptr : &upcoming});
      add_bias(plan.weights.bias(s.expert, kDown), c0, nc, s.rows, b.rows[0]);
      for (int r = 0; r < s.rows; ++r) {
        float* to = out + int64_t{plan.token[s.row0 + r]} * D + c0;
        plan.kernels.add_scaled(b.rows[0] + r * nc, plan.routing_weight(s.row0 + r), nc, to);
      }
    }
  }

  // The sums of these columns, which are complete, as bf16.
  void round_block(int c0, int nc) const {
    const int D = plan.weights.hidden;
    for (int64_t at = c0; at < plan.call.tokens * D; at += D) plan.kernels.to_bf16(out + at, nc, output.bf16 + at);
  }

  void run() {
    const int D = plan.weights.hidden, F = plan.weights.intermediate;
    plan.cut();
    std::fill_n(out, plan.call.tokens * D, 0.0f);  // no memset: out may be null without tokens
    if (output.bf16 != nullptr && plan.num_waves == 0) round_block(0, D);
    for (int i = 0; i < plan.num_waves; ++i) {
      const Wave& wave = plan.waves[i];
      const int64_t pieces = wave.end - wave.begin;
      gate_up.prepare(plan, wave);
      save_low_rank(wave);
      const int most = plan.forward_columns(wave);
      const ColumnTasks hidden_tasks = plan.int8()
                                           ? ColumnTasks(plan, F, kHiddenGroup8, kHiddenGroup8, pieces)
                                           : ColumnTasks(plan, F, kBlock, plan.column_step(F, pieces, most), pieces);
      parallel_for(hidden_tasks.by_node(), [&](int64_t task, int thread) {
        const ColumnTask t = hidden_tasks[task];
        ColumnTask next;
        Upcoming upcoming;
        const bool more = hidden_tasks.after(task, plan.threads, &next);
        if (more) {
          const Segment& s = plan.segments[wave.begin + next.piece];
          upcoming = plan.upcoming(s, kGate, next.c0, gate_up.left_tiles(plan, s));
        }
        hidden_block(plan.segments[wave.begin + t.piece], t.c0, t.nc, more ? &upcoming : nullptr, plan.thread[thread]);
      });
      down_rank_products(wave);
      const ColumnTasks out_tasks(plan, D, kBlock, plan.column_step(D, 1, most), 1);
      parallel_for(out_tasks.by_node(), [&](int64_t task, int thread) {
        const ColumnTask t = out_tasks[task];
        combine_block(wave, t.c0, t.nc, plan.thread[thread]);
        if (output.bf16 != nullptr && i + 1 == plan.num_waves) round_block(t.c0, t.nc);
      });
    }
  }
};

}  // namespace

void experts_forward(const ExpertWeights& weights, const LayerCall& call, const LayerOutput& output) {
  Workspace workspace;
  Forward forward(weights, call, output);
  forward.take(workspace);
  workspace.reserve();
  forward.take(workspace);
  forward.run();
}

}  // namespace kt_sft
