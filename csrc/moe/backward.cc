#include <algorithm>

#include "common/bf16.h"
#include "common/thread_pool.h"
#include "moe/plan.h"

namespace kt_sft {
namespace {

struct Backward {
  Plan plan;
  const LayerGrads& grads;
  const bool recompute, lora, saved;  // saved: forward left s X A^T
  GateUpBuffers gate_up;
  uint16_t *gate = nullptr, *up = nullptr;  // (wave rows, F) bf16, when recomputing
  void* dout = nullptr;                     // right tiles (rows, D)
  float* z_sum = nullptr;                   // (wave rows, F): Z of the turns before the last, with several nodes
  void* dgate_up[2] = {};                   // right tiles (rows, F): dG and dU
  Int8Rows dout8, dgate_up8[2];             // the same for int8 products, the scales of W's rows folded in
  float* dw_parts = nullptr;                // (wave rows, F / 32)
  // Only with LoRA; "small" is (wave rows, R) fp32, "rows" is (wave rows, F) bf16.
  float *small_a[3] = {}, *small_b[3] = {};  // s X A^T, s dLin B per projection; those of down times w
  void *small_b_tiles[3] = {}, *h_tiles = nullptr;
  void* turned[3][2] = {};                             // small^T per projection, for the gradients of b and of a
  uint16_t *dgate_up_rows[2] = {}, *h_rows = nullptr;  // the former also where the driver folds and quantises

  Backward(const ExpertWeights& weights, const LayerCall& call, const LayerGrads& grads)
      : plan(weights, call),
        grads(grads),
        recompute(call.gate == nullptr),
        lora(call.lora.any()),
        saved(call.low_rank != nullptr && !recompute) {}

  const LoraFactors& factors(int projection) const { return plan.call.lora.factors[projection]; }
  int hidden() const { return plan.weights.hidden; }
  int intermediate() const { return plan.weights.intermediate; }
  bool int8() const { return plan.call.gradient_compute == Compute::int8; }
  bool folded_ahead(int p) const { return int8() && per_channel(plan.weights.matrix(0, static_cast<Projection>(p))); }
  int64_t wave_row(const Segment& s) const { return int64_t{s.tile0} * kTileRows; }
  char* tiles_of(void* tiles, const Segment& s, int q) const {
    return plan.tile(tiles, s.tile0, ceil_div(q, kTileSteps));
  }
  const uint16_t* gate_row(const Segment& s, int r, bool of_up) const {
    if (recompute) return (of_up ? up : gate) + (wave_row(s) + r) * intermediate();
    return (of_up ? plan.call.up : plan.call.gate) + int64_t{s.row0 + r} * intermediate();
  }

  void take(Workspace& ws) {
    const int D = hidden(), F = intermediate();
    const int64_t rows = plan.wave_rows();
    plan.take(ws);
    dout = plan.take_tiles(ws, D);
    if (plan.nodes > 1) z_sum = ws.take<float>(rows * F);
    if (folded_ahead(kDown)) dout8.take(ws, plan.wave_tile_limit, D, kInputGroup8);
    for (int p : {kGate, kUp}) {
      dgate_up[p] = plan.take_tiles(ws, F);
      if (folded_ahead(p)) dgate_up8[p].take(ws, plan.wave_tile_limit, F, kHiddenGroup8);
      if (factors(p).rank > 0 || (int8() && !folded_ahead(p))) dgate_up_rows[p] = ws.take<uint16_t>(rows * F);
    }
    dw_parts = ws.take<float>(rows * ceil_div(F, kBlock));
    if (recompute || (lora && !saved)) gate_up.take(plan, ws);
    if (recompute) gate = ws.take<uint16_t>(rows * F), up = ws.take<uint16_t>(rows * F);
    if (!lora) return;
    for (int p : {kGate, kUp, kDown}) {
      const bool own = p == kDown || saved;
      small_a[p] = own ? ws.take<float>(rows * factors(p).rank) : gate_up.xa[p];
      small_b[p] = ws.take<float>(rows * factors(p).rank);
      small_b_tiles[p] = plan.take_tiles(ws, factors(p).rank);
      for (bool of_a : {true, false}) {
        int64_t rows = rank_rows(p);
        if (of_a && p != kDown) rows = p == kGate ? rank_rows(kGate) + rank_rows(kUp) : 0;
        turned[p][of_a] = ws.take<char>(plan.wave_tile_limit * rows / kTileRows * plan.kernels.tile_bytes);
      }
    }
    if (factors(kDown).rank == 0) return;
    h_tiles = plan.take_tiles(ws, F);
    h_rows = ws.take<uint16_t>(rows * F);
  }

  ColumnTasks column_tasks(const Wave& wave, int columns, int64_t pieces, int turn) const {
    return {plan, columns, kBlock, plan.column_step(columns, pieces, plan.task_columns(wave)), pieces, turn};
  }

  template <class Fn>
  void for_columns(const Wave& wave, int columns, Fn&& fn) const {
    for_tasks(wave, column_tasks(wave, columns, wave.end - wave.begin, 0),
              [&](const Segment& s, const ColumnTask& t, const Plan::ThreadBuffers& b) { fn(s, t.c0, t.nc, b); });
  }

  // Columns of Z, dG and dU: whole groups where these are quantised.
  template <class Fn>
  void for_gradient_columns(const Wave& wave, int turn, Fn&& fn) const {
    const int F = intermediate(), pieces = wave.end - wave.begin;
    for_tasks(
        wave,
        int8() ? ColumnTasks(plan, F, kHiddenGroup8, kHiddenGroup8, pieces, turn) : column_tasks(wave, F, pieces, turn),
        fn);
  }

  template <class Fn>
  void for_tasks(const Wave& wave, const ColumnTasks& tasks, Fn&& fn) const {
    parallel_for(tasks.by_node(), [&](int64_t task, int thread) {
      const ColumnTask t = tasks[task];
      fn(plan.segments[wave.begin + t.piece], t, plan.thread[thread]);
    });
  }

  template <class Fn>
  void for_segments(const Wave& wave, Fn&& fn) const {
    parallel_for(wave.end - wave.begin,
                 [&](int64_t task, int thread) { fn(plan.segments[wave.begin + task], plan.thread[thread]); });
  }

  // s dLin B of one segment, where dLin are right tiles.
  void small_product(int p, const Segment& s, void* dlin, int width, const Plan::ThreadBuffers& b) const {
    const LoraFactors& f = factors(p);
    if (f.rank == 0) return;
    rank_product(plan, b, s.rows,
                 {Side::right, tiles_of(dlin, s, width), width, factor_b(f, s.expert, width, Reduce::features), f.rank,
                  plan.call.lora.scaling, small_b[p] + wave_row(s) * f.rank, tiles_of(small_b_tiles[p], s, f.rank)});
  }

  void scale_by_routing(const Segment& s, float* small, int rank) const {
    for (int r = 0; r < s.rows; ++r)
      for (int i = 0; i < rank; ++i) small[(wave_row(s) + r) * rank + i] *= plan.routing_weight(s.row0 + r);
  }

  void recompute_gate_up(const Wave& wave) const {
    for_columns(wave, intermediate(), [&](const Segment& s, int c0, int nc, const Plan::ThreadBuffers& b) {
      gate_up.compute(plan, b, s, c0, nc, nullptr);
      for (int r = 0; r < s.rows; ++r) {
        const int64_t at = (wave_row(s) + r) * intermediate() + c0;
        plan.kernels.activate(plan.weights.activation, b.rows[0] + r * nc, b.rows[1] + r * nc, nc, b.rows[2], gate + at,
                              up + at);
      }
    });
  }

  // The addends of one gradient product: dLin W over the rows of W that a node has, and what adapters add in bf16.
  struct Addends {
    NodeRows rows[2];
    DenseView factors[2];
    GemmTerm terms[4];
    Gemm8Term terms8[2];
    int count = 0, count8 = 0;
  };

  void add_weights(const Segment& s, int p, int node, Addends& to) const {
    const int width = p == kDown ? hidden() : intermediate(), group = p == kDown ? kInputGroup8 : kHiddenGroup8;
    NodeRows& rows = to.rows[p == kUp];
    rows = rows_of_node(plan.weights.matrix(s.expert, static_cast<Projection>(p)), node, plan.nodes,
                        int8() ? group : kBlock);
    if (plan.gradient_in_int8(s)) {
      to.terms8[to.count8++] = int8_term(s, p, rows);
      return;
    }
    const int all_tiles = static_cast<int>(ceil_div(width, kTileSteps));
    const char* tiles = tiles_of(p == kDown ? dout : dgate_up[p], s, width);
    to.terms[to.count++] = {tiles + rows.begin / kTileSteps * plan.kernels.tile_bytes, rows.packed.rows, &rows.packed,
                            nullptr, all_tiles};
  }

  Gemm8Term int8_term(const Segment& s, int p, const NodeRows& rows) const {
    if (folded_ahead(p))
      return (p == kDown ? dout8 : dgate_up8[p]).term(s.tile0, rows.packed, rows.begin, rows.packed.rows);
    Gemm8Term term{};
    term.q = rows.packed.rows, term.packed = &rows.packed;
    term.group = p == kDown ? kInputGroup8 : kHiddenGroup8;
    if (p == kDown) {
      term.rows = {grads.grad_out + rows.begin, false, hidden(), 1, plan.token + s.row0};
    } else {
      term.rows = {dgate_up_rows[p] + wave_row(s) * intermediate() + rows.begin, false, intermediate(), 1};
    }
    return term;
  }

  // s dLin B times the factor a.
  void add_adapter(const Segment& s, int p, Addends& to) const {
    const LoraFactors& f = factors(p);
    DenseView& factor = to.factors[p == kUp];
    factor = factor_a(f, s.expert, p == kDown ? intermediate() : hidden(), Reduce::rank);
    to.terms[to.count++] = {tiles_of(small_b_tiles[p], s, f.rank), f.rank, nullptr, &factor};
  }

  // Their sum for columns [c0, c0 + nc); `spare` is not read where all is computed in one type.
  void multiply(const Addends& a, const Segment& s, int c0, int nc, float* out, float* spare,
                const Plan::ThreadBuffers& b) const {
    float* bf16 = a.count8 > 0 ? spare : out;
    if (a.count8 > 0) plan.kernels.gemm8({Side::right, a.terms8, a.count8, s.rows, c0, nc, out, nc, b.gemm});
    if (a.count > 0) plan.kernels.gemm({Side::right, a.terms, a.count, s.rows, c0, nc, bf16, nc, b.gemm});
    if (a.count == 0 || a.count8 == 0) return;
    for (int64_t i = 0; i < int64_t{s.rows} * nc; ++i) out[i] += bf16[i];
  }

  // What a node adds to Z before the last turn.
  void z_part(const Segment& s, const ColumnTask& t, bool first, const Plan::ThreadBuffers& b) const {
    Addends base;
    add_weights(s, kDown, t.node, base);
    multiply(base, s, t.c0, t.nc, b.rows[0], b.rows[2], b);
    for (int r = 0; r < s.rows; ++r) {
      const float* from = b.rows[0] + r * t.nc;
      float* to = z_sum + (wave_row(s) + r) * intermediate() + t.c0;
      for (int c = 0; c < t.nc; ++c) to[c] = first ? from[c] : to[c] + from[c];
    }
  }

  // Z of one column block into rows[0] (ld nc), the dropped-out LoRA part included.
  void z_block(const Segment& s, const ColumnTask& t, const Plan::ThreadBuffers& b) const {
    const int c0 = t.c0, nc = t.nc;
    const LoraFactors& f = factors(kDown);
    const Lora& l = plan.call.lora;
    const bool apart = f.rank > 0 && l.down_keep != nullptr;
    Addends base, dropped;
    add_weights(s, kDown, t.node, base);
    if (f.rank > 0) add_adapter(s, kDown, apart ? dropped : base);
    multiply(base, s, c0, nc, b.rows[0], b.rows[2], b);
    for (int r = 0; r < s.rows && z_sum != nullptr; ++r) {
      const float* from = z_sum + (wave_row(s) + r) * intermediate() + c0;
      for (int c = 0; c < nc; ++c) b.rows[0][r * nc + c] += from[c];
    }
    if (!apart) return;
    multiply(dropped, s, c0, nc, b.rows[1], b.rows[2], b);
    for (int r = 0; r < s.rows; ++r) {
      const uint8_t* keep = l.down_keep + int64_t{plan.order[s.row0 + r]} * intermediate() + c0;
      for (int c = 0; c < nc; ++c) b.rows[0][r * nc + c] += keep[c] ? l.keep_scale * b.rows[1][r * nc + c] : 0.0f;
    }
  }

  // H of the block gets its dropout, and the other layout that the down adapter's gradients read.
  void hidden_block(const Segment& s, int c0, int nc) const {
    const Lora& l = plan.call.lora;
    const int F = intermediate();
    uint16_t* first = h_rows + wave_row(s) * F + c0;
    for (int r = 0; r < s.rows && l.down_keep != nullptr; ++r) {
      uint16_t* h = first + int64_t{r} * F;
      const uint8_t* keep = l.down_keep + int64_t{plan.order[s.row0 + r]} * F + c0;
      for (int c = 0; c < nc; ++c) h[c] = keep[c] ? h[c] : 0;  // keep_scale goes into the rank-sized products
    }
    plan.kernels.pack({Side::left,
                       {first, false, F, 1},
                       0,
                       s.rows,
                       0,
                       nc,
                       tiles_of(h_tiles, s, F) + c0 / kTileSteps * plan.left_tile_bytes(s.rows),
                       ceil_div(F, kTileSteps),
                       s.rows <= kSkinnyRows});
  }

  void gradient_block(const Segment& s, const ColumnTask& t, const Plan::ThreadBuffers& b) const {
    const int F = intermediate(), c0 = t.c0, nc = t.nc;
    const int64_t parts = ceil_div(F, kBlock), f_tiles = ceil_div(F, kTileSteps);
    z_block(s, t, b);
    for (int r = 0; r < s.rows; ++r) {
      const int64_t row = wave_row(s) + r;
      plan.kernels.activate_backward(plan.weights.activation, gate_row(s, r, false) + c0, gate_row(s, r, true) + c0,
                                     b.rows[0] + r * nc, plan.routing_weight(s.row0 + r), nc, b.rows[1] + r * nc,
                                     b.rows[2] + r * nc, dw_parts + row * parts + c0 / kBlock,
                                     h_rows == nullptr ? nullptr : h_rows + row * F + c0);
    }
    for (int p : {kGate, kUp}) {
      const DenseView view{b.rows[1 + p], true, nc, 1};
      if (!plan.gradient_in_int8(s) || factors(p).rank > 0)
        plan.kernels.pack({Side::right, view, 0, s.rows, 0, nc,
                           tiles_of(dgate_up[p], s, F) + c0 / kTileSteps * plan.kernels.tile_bytes, f_tiles});
      if (plan.gradient_in_int8(s) && folded_ahead(p)) {
        const PackedMatrix w = plan.weights.matrix(s.expert, static_cast<Projection>(p));
        const PackedMatrix fold = w.block_rows(c0 / kBlock, w.row_blocks());
        dgate_up8[p].quantize(plan.kernels, s.tile0, c0, view, 0, s.rows, nc, &fold);
      }
      if (dgate_up_rows[p] == nullptr) continue;
      uint16_t* rows = dgate_up_rows[p] + wave_row(s) * F + c0;
      for (int r = 0; r < s.rows; ++r) plan.kernels.to_bf16(b.rows[1 + p] + r * nc, nc, rows + int64_t{r} * F);
    }
    if (factors(kDown).rank > 0) hidden_block(s, c0, nc);
  }

  // <dO, b> of one routed row.
  float bias_gradient(const float* bias, int sorted_row) const {
    constexpr int kLanes = 16;
    const uint16_t* row = grads.grad_out + int64_t{plan.token[sorted_row]} * hidden();
    float lanes[kLanes] = {}, sum = 0;
    int c = 0;
    for (; c + kLanes <= hidden(); c += kLanes)
      for (int i = 0; i < kLanes; ++i) lanes[i] += bf16_to_float(row[c + i]) * bias[c + i];
    for (; c < hidden(); ++c) sum += bf16_to_float(row[c]) * bias[c];
    for (float lane : lanes) sum += lane;
    return sum;
  }

  void weight_gradients(const Wave& wave) const {
    const int64_t parts = ceil_div(intermediate(), kBlock);
    for_segments(wave, [&](const Segment& s, const Plan::ThreadBuffers&) {
      const float* bias = plan.weights.bias(s.expert, kDown);
      for (int r = 0; r < s.rows; ++r) {
        float sum = bias == nullptr ? 0.0f : bias_gradient(bias, s.row0 + r);
        for (int64_t i = 0; i < parts; ++i) sum += dw_parts[(wave_row(s) + r) * parts + i];
        grads.grad_weights[plan.order[s.row0 + r]] = sum;
      }
    });
  }

  // grad[:, c0 : c0 + nc] += the given terms for every segment of the wave.
  void input_block(const Wave& wave, const ColumnTask& t, bool base, bool adapters, float* grad,
                   const Plan::ThreadBuffers& b) const {
    const int c0 = t.c0, nc = t.nc;
    for (int i = wave.begin; i < wave.end; ++i) {
      const Segment& s = plan.segments[i];
      Addends sum;
      for (int p : {kGate, kUp}) {
        if (base) add_weights(s, p, t.node, sum);
        if (adapters && factors(p).rank > 0) add_adapter(s, p, sum);
      }
      if (sum.count + sum.count8 == 0) return;
      multiply(sum, s, c0, nc, b.rows[0], b.rows[1], b);
      for (int r = 0; r < s.rows; ++r) {
        float* to = grad + int64_t{plan.token[s.row0 + r]} * hidden() + c0;
        plan.kernels.add_scaled(b.rows[0] + r * nc, 1.0f, nc, to);
      }
    }
  }

  // grad (R, width) = small^T big, or its transpose in (width, R), for columns [c0, c0 + nc) of one segment; added to
  // what the expert's earlier segments left.
  struct FactorGradient {
    void* small;  // left tiles of small^T
    int rank;
    DenseView big;  // (c = column, q = row of the segment)
    int width;
    float* grad;
    bool transposed;
  };

  void factor_gradient(const Segment& s, const FactorGradient& g, int c0, int nc, const Plan::ThreadBuffers& b) const {
    const int64_t ld = g.transposed ? g.rank : g.width;
    for (int r0 = 0; r0 < g.rank; r0 += kMaxRows) {
      const int ranks = std::min(kMaxRows, g.rank - r0);
      const GemmTerm term{plan.tile(g.small, r0 / kTileRows, ceil_div(s.rows, kTileSteps)), s.rows, nullptr, &g.big};
      float* grad = g.grad + (g.transposed ? int64_t{c0} * ld + r0 : r0 * ld + c0);
      if (starts_expert(s)) {
        plan.kernels.gemm({Side::left, &term, 1, ranks, c0, nc, grad, ld, b.gemm, g.transposed});
        continue;
      }
      const int rows = g.transposed ? nc : ranks, columns = g.transposed ? ranks : nc;
      plan.kernels.gemm({Side::left, &term, 1, ranks, c0, nc, b.rows[0], columns, b.gemm, g.transposed});
      add_rows(b.rows[0], rows, columns, grad, ld);
    }
  }

  bool starts_expert(const Segment& s) const { return &s == plan.segments || (&s)[-1].expert != s.expert; }

  static void add_rows(const float* from, int rows, int columns, float* to, int64_t ld) {
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < columns; ++c) to[r * ld + c] += from[int64_t{r} * columns + c];
  }

  // Gradients of a of gate and up at once, where they fit: both multiply X, which has to be packed for it.
  bool gate_up_together() const {
    return factors(kGate).rank > 0 && factors(kUp).rank > 0 && rank_rows(kGate) + factors(kUp).rank <= kMaxRows;
  }
  void gate_up_gradient(const Segment& s, int c0, int nc, const Plan::ThreadBuffers& b) const {
    const FactorGradient gate = gradient_of(s, kGate, true);
    const GemmTerm term{gate.small, s.rows, nullptr, &gate.big};
    const int rows = static_cast<int>(rank_rows(kGate)) + factors(kUp).rank;
    plan.kernels.gemm({Side::left, &term, 1, rows, c0, nc, b.rows[0], nc, b.gemm});
    for (int p : {kGate, kUp}) {
      const float* from = b.rows[0] + (p == kUp ? rank_rows(kGate) * nc : 0);
      float* to = gradient_of(s, p, true).grad + c0;
      for (int r = 0; r < factors(p).rank && starts_expert(s); ++r)
        std::copy_n(from + r * nc, nc, to + int64_t{r} * gate.width);
      if (!starts_expert(s)) add_rows(from, factors(p).rank, nc, to, gate.width);
    }
  }

  FactorGradient gradient_of(const Segment& s, int p, bool of_a) const {
    const LoraFactors& f = factors(p);
    const int D = hidden(), F = intermediate();
    const int width = of_a == (p == kDown) ? F : D;
    const int64_t row = wave_row(s);
    FactorGradient g{};
    g.rank = f.rank, g.width = width, g.transposed = !of_a;
    g.grad = (of_a ? f.grad_a : f.grad_b) + int64_t{s.expert} * f.rank * width;
    g.small = turned_tiles(s, p, of_a);
    const int32_t* tokens = plan.token + s.row0;
    if (p == kDown) {
      g.big = of_a ? DenseView{h_rows + row * F, false, 1, F} : DenseView{grads.grad_out, false, 1, D, nullptr, tokens};
    } else {
      const uint16_t* x = plan.call.lora.x != nullptr ? plan.call.lora.x : plan.call.x;
      g.big = of_a ? DenseView{x, false, 1, D, nullptr, tokens} : DenseView{dgate_up_rows[p] + row * F, false, 1, F};
    }
    return g;
  }

  // One task owns one column block of one factor of one expert, over all segments of that expert in the wave.
  void factor_gradients(const Wave& wave) const {
    const auto over_segments = [&](int width, auto&& fn) {
      for_columns(wave, width, [&](const Segment& first, int c0, int nc, const Plan::ThreadBuffers& b) {
        const Segment* s = &first;
        if (s > plan.segments + wave.begin && s[-1].expert == s->expert) return;
        for (; s < plan.segments + wave.end && s->expert == first.expert; ++s) fn(*s, c0, nc, b);
      });
    };
    for (int p : {kGate, kUp, kDown}) {
      if (factors(p).rank == 0) continue;
      for (bool of_a : {true, false}) {
        if (of_a && p != kDown && gate_up_together()) continue;
        over_segments(of_a == (p == kDown) ? intermediate() : hidden(),
                      [&](const Segment& s, int c0, int nc, const Plan::ThreadBuffers& b) {
                        factor_gradient(s, gradient_of(s, p, of_a), c0, nc, b);
                      });
      }
    }
    if (!gate_up_together()) return;
    over_segments(hidden(), [&](const Segment& s, int c0, int nc, const Plan::ThreadBuffers& b) {
      gate_up_gradient(s, c0, nc, b);
    });
  }

  // Gradients of the experts without rows.
  void clear_idle_factors() const {
    parallel_for(int64_t{plan.weights.num_experts} * 3, [&](int64_t task, int) {
      const LoraFactors& f = factors(static_cast<int>(task % 3));
      const int64_t expert = task / 3, a_width = task % 3 == kDown ? intermediate() : hidden();
      const int64_t a_size = f.rank * a_width, b_size = int64_t{f.rank} * (hidden() + intermediate()) - a_size;
      if (plan.counts[expert] > 0) return;
      std::fill_n(f.grad_a + expert * a_size, a_size, 0.0f);
      std::fill_n(f.grad_b + expert * b_size, b_size, 0.0f);
    });
  }

  void load_low_rank(const Segment& s) const {
    const int ld = plan.call.lora.input_rank();
    for (int p : {kGate, kUp}) {
      const int rank = factors(p).rank;
      float* to = small_a[p] + wave_row(s) * rank;
      const uint16_t* from = plan.call.low_rank + int64_t{s.row0} * ld + (p == kUp ? ld - rank : 0);
      for (int r = 0; r < s.rows; ++r)
        for (int i = 0; i < rank; ++i) to[int64_t{r} * rank + i] = bf16_to_float(from[int64_t{r} * ld + i]);
    }
  }

  void lora_products(const Wave& wave) const {
    for_segments(wave, [&](const Segment& s, const Plan::ThreadBuffers& b) {
      const LoraFactors& f = factors(kDown);
      if (saved) load_low_rank(s);
      small_product(kGate, s, dgate_up[kGate], intermediate(), b);
      small_product(kUp, s, dgate_up[kUp], intermediate(), b);
      if (f.rank == 0) return;
      const Lora& l = plan.call.lora;
      const float keep_scale = l.down_keep != nullptr ? l.keep_scale : 1.0f;
      rank_product(plan, b, s.rows,
                   {Side::left, tiles_of(h_tiles, s, intermediate()), intermediate(),
                    factor_a(f, s.expert, intermediate(), Reduce::features), f.rank, l.scaling * keep_scale,
                    small_a[kDown] + wave_row(s) * f.rank, nullptr});
      scale_by_routing(s, small_a[kDown], f.rank);
      scale_by_routing(s, small_b[kDown], f.rank);
      float* dob = small_b[kDown] + wave_row(s) * f.rank;
      for (int64_t i = 0; i < int64_t{s.rows} * f.rank; ++i) dob[i] *= keep_scale;
    });
    parallel_for(int64_t{wave.end - wave.begin} * 6, [&](int64_t task, int) {
      const Segment& s = plan.segments[wave.begin + task / 6];
      const int p = static_cast<int>(task % 3), rank = factors(p).rank;
      const bool of_a = task % 6 < 3;
      if (rank == 0) return;
      const float* small = of_a ? small_b[p] : small_a[p];
      plan.kernels.pack({Side::left,
                         {small + wave_row(s) * rank, true, 1, rank},
                         0,
                         rank,
                         0,
                         s.rows,
                         turned_tiles(s, p, of_a),
                         ceil_div(s.rows, kTileSteps)});
    });
  }

  // small^T of a segment as left tiles [R tile][row tile]: as many as its 16-row tiles at most. For the gradients of a,
  // those of up follow those of gate.
  void* turned_tiles(const Segment& s, int p, bool of_a) const {
    const int64_t row_tiles = ceil_div(s.rows, kTileSteps), gate_tiles = rank_rows(kGate) / kTileRows;
    if (!of_a || p == kDown) return plan.tile(turned[p][of_a], s.tile0, rank_rows(p) / kTileRows);
    char* gate = plan.tile(turned[kGate][true], s.tile0, gate_tiles + rank_rows(kUp) / kTileRows);
    return p == kGate ? gate : plan.tile(gate, gate_tiles, row_tiles);
  }
  int64_t rank_rows(int p) const { return round_up(factors(p).rank, kTileRows); }

  void run_wave(const Wave& wave) const {
    const int D = hidden();
    if (recompute || (lora && !saved)) gate_up.prepare(plan, wave);
    if (recompute) recompute_gate_up(wave);
    pack_tokens(plan, wave, Side::right, grads.grad_out, D, dout, int8() && factors(kDown).rank == 0);
    if (folded_ahead(kDown)) quantize_tokens(plan, wave, grads.grad_out, D, dout8, kDown);
    if (factors(kDown).rank > 0)
      for_segments(wave, [&](const Segment& s, const Plan::ThreadBuffers& b) { small_product(kDown, s, dout, D, b); });
    for (int turn = 0; turn + 1 < plan.nodes; ++turn)
      for_gradient_columns(wave, turn, [&](const Segment& s, const ColumnTask& t, const Plan::ThreadBuffers& b) {
        z_part(s, t, turn == 0, b);
      });
    for_gradient_columns(
        wave, plan.nodes - 1,
        [&](const Segment& s, const ColumnTask& t, const Plan::ThreadBuffers& b) { gradient_block(s, t, b); });
    weight_gradients(wave);
    if (lora) lora_products(wave);
    const bool apart = plan.call.lora.x != nullptr;
    for (int turn = 0; turn < plan.nodes; ++turn) {
      const ColumnTasks tasks = column_tasks(wave, D, 1, turn);
      const bool last = turn + 1 == plan.nodes;  // factors belong to no node: their terms are added once
      parallel_for(tasks.by_node(), [&](int64_t task, int thread) {
        const ColumnTask t = tasks[task];
        input_block(wave, t, true, last && !apart, grads.grad_x, plan.thread[thread]);
        if (last && apart) input_block(wave, t, false, true, grads.grad_lora_x, plan.thread[thread]);
      });
    }
    if (lora) factor_gradients(wave);
  }

  void run() {
    plan.cut();
    const int64_t count = plan.call.tokens * hidden();
    std::fill_n(grads.grad_x, count, 0.0f);
    std::fill_n(grads.grad_weights, plan.call.tokens * plan.call.top_k, 0.0f);
    if (plan.call.lora.x != nullptr) std::fill_n(grads.grad_lora_x, count, 0.0f);
    if (lora) clear_idle_factors();
    for (int i = 0; i < plan.num_waves; ++i) run_wave(plan.waves[i]);
  }
};

}  // namespace

void experts_backward(const ExpertWeights& weights, const LayerCall& call, const LayerGrads& grads) {
  Workspace workspace;
  Backward backward(weights, call, grads);
  backward.take(workspace);
  workspace.reserve();
  backward.take(workspace);
  backward.run();
}

}  // namespace kt_sft
