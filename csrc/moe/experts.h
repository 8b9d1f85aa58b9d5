// Forward and backward of the routed experts of one layer, on packed weights, through KernelTable only.
//
//   G = X Wg^T + s (X' Ag^T) Bg^T + bg    U = X Wu^T + s (X' Au^T) Bu^T + bu    H = a(G) b(U), e.g. silu(G) * U
//   Y = H Wd^T + s ((H o mask) Ad^T) Bd^T + bd    out[t] = sum_k w[t,k] Y
// Backward, with Z = dO Wd + s ((dO Bd) Ad) o mask:
//   dw[t,k] = <Z, H> + <dO, bd>    dH = w Z    dU, dG by the activation
//   dX = dG Wg + s (dG Bg) Ag + dU Wu + s (dU Bu) Au
//   dB = s dLin^T (X A^T)    dA = s (dLin B)^T X    per projection
// T tokens, D hidden, F intermediate, E experts, K top-k, N = T K routed rows, R LoRA rank.
// Results do not depend on the number of threads: every output element is summed by one task in a fixed order.
#pragma once
#include <cstdint>

#include "kernels/kernel_table.h"

namespace kt_sft {

enum Projection { kGate = 0, kUp = 1, kDown = 2 };

struct MatrixFormat {
  Format format;
  int group_size;  // 0: per channel
};

// Frozen experts in one flat buffer: [expert][gate (F, D) | up (F, D) | down (D, F)], each as PackedMatrix lays it out.
class ExpertWeights {
 public:
  int num_experts, hidden, intermediate;
  const uint8_t* storage = nullptr;
  Activation activation{};
  const float* biases[3] = {};  // by projection: (E, F), (E, F), (E, D), or null

  ExpertWeights(int num_experts, int hidden, int intermediate, const MatrixFormat (&formats)[3]);
  const float* bias(int expert, Projection projection) const {
    const float* all = biases[projection];
    return all == nullptr ? nullptr : all + int64_t{expert} * (projection == kDown ? hidden : intermediate);
  }
  PackedMatrix matrix(int expert, Projection projection) const;
  int64_t expert_bytes() const { return expert_bytes_; }

 private:
  PackedMatrix matrices_[3];
  int64_t starts_[3], expert_bytes_ = 0;
};

// Factors of one projection for all experts: a (E, R, in), b (E, out, R), contiguous, fp32 or bf16. rank 0: none.
struct LoraFactors {
  int rank = 0;
  const void* a = nullptr;
  const void* b = nullptr;
  bool a_float = false, b_float = false;
  float* grad_a = nullptr;  // fp32, shaped like a and b, overwritten; null in forward
  float* grad_b = nullptr;
};

struct Lora {
  LoraFactors factors[3];
  float scaling = 1.0f;
  const uint16_t* x = nullptr;         // (T, D) bf16 input of the gate and up adapters; null: the hidden states
  const uint8_t* down_keep = nullptr;  // (T, K, F) 0 or 1: dropout of the down adapter's input; null: none
  float keep_scale = 1.0f;             // 1 / (1 - p)
  int input_rank() const { return factors[kGate].rank + factors[kUp].rank; }
  bool any() const { return input_rank() + factors[kDown].rank > 0; }
};

// Of the products with packed weights: bf16 (codes decoded to bf16) or int8 (int8 codes as they are, activations, or
// gradients with the codes' scales folded in, quantised in groups of columns; needs format int8 and an ISA with int8
// dot products). Adapters and their gradients are always computed in bf16.
enum class Compute { bf16, int8 };

struct LayerCall {
  int64_t tokens;
  int top_k;
  const uint16_t* x;     // (T, D) bf16
  const int64_t* ids;    // (T, K), checked by the caller; -1: this slot is left out
  const float* weights;  // (T, K)
  Lora lora;
  Compute compute = Compute::bf16;           // of the forward products, also where backward recomputes them
  Compute gradient_compute = Compute::bf16;  // of Z and dX
  uint16_t* gate =
      nullptr;  // (N, F) bf16, rows sorted by expert: written by forward, read by backward; null: recompute
  uint16_t* up = nullptr;
  uint16_t* low_rank = nullptr;  // (N, Rg + Ru) bf16, likewise, or null: s X' Ag^T, s X' Au^T
};

struct LayerGrads {
  const uint16_t* grad_out;  // (T, D) bf16
  float* grad_x;             // (T, D), overwritten
  float* grad_lora_x;        // (T, D), overwritten; only if lora.x
  float* grad_weights;       // (T, K), overwritten
};

// (T, D), overwritten: one of the two. The sums behind bf16 lie in the workspace.
struct LayerOutput {
  float* f32;
  uint16_t* bf16;
};

void experts_forward(const ExpertWeights& weights, const LayerCall& call, const LayerOutput& output);
void experts_backward(const ExpertWeights& weights, const LayerCall& call, const LayerGrads& grads);

// Stable counting sort of the T * K slots by expert, without those of id -1: counts (E), order (N) = slots t * K + k.
void sort_by_expert(const int64_t* ids, int64_t slots, int num_experts, int32_t* counts, int32_t* order);

}  // namespace kt_sft
