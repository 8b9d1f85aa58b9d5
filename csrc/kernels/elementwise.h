// The gated activation H = a(G) b(U) and its derivative, as loops that the compiler vectorises for the variant's ISA.
//   dU = w Z a(G) b'(U)    dG = w Z b(U) a'(G)    with sig(x) = 1 / (1 + exp(-x))
// silu              a(G) = G sig(G)                                   b(U) = U
// clamped_swiglu    a(G) = C sig(alpha C), C = min(G, limit)          b(U) = min(max(U, -limit), limit) + 1
// Clamps have slope 1 up to and at their bounds, as in torch, and 0 beyond; saving G and U as bf16 keeps the side.
// Included inside the variant's namespace.
#pragma once

// exp(x) to 2e-7 relative near 0 and 1e-5 at |x| = 80: 2^n 2^f, n = round(x log2 e), Taylor series of 2^f on |f| <=
// 1/2.
inline float fast_exp(float x) {
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float t = x * 1.44269504088896f, shifted = t + 12582912.0f;  // 1.5 * 2^23: the integer ends up in the low bits
  const float n = shifted - 12582912.0f, f = t - n;
  float p = 1.54035304e-4f;
  p = p * f + 1.33335581e-3f;
  p = p * f + 9.61812911e-3f;
  p = p * f + 5.55041087e-2f;
  p = p * f + 2.40226507e-1f;
  p = p * f + 6.93147181e-1f;
  p = p * f + 1.0f;
  return p * float_of(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}

inline float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }
// The same rounding as to_bf16 without its NaN branch, which would keep the loops from vectorising.
inline uint32_t round_bits(float v) {
  const uint32_t bits = bits_of(v);
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
inline float from_bf16(uint16_t bits) { return float_of(uint32_t{bits} << 16); }

// NaN stays NaN.
inline void to_bf16_row(const float* __restrict from, int n, uint16_t* __restrict to) {
  for (int i = 0; i < n; ++i) {
    const uint32_t nan = (bits_of(from[i]) & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : 0u;
    to[i] = static_cast<uint16_t>(round_bits(from[i]) | nan);
  }
}

inline void add_scaled_row(const float* __restrict from, float w, int n, float* __restrict to) {
  for (int i = 0; i < n; ++i) to[i] += w * from[i];
}

struct Silu {
  explicit Silu(const Activation&) {}
  float act(float g) const { return g * sigmoid(g); }
  float factor(float u) const { return u; }
  float act_slope(float g, float* act) const {
    const float sig = sigmoid(g);
    *act = g * sig;
    return sig + *act * (1.0f - sig);
  }
  float factor_slope(float) const { return 1.0f; }
  uint32_t saved(float x) const { return round_bits(x); }
};

struct ClampedSwiglu {
  float alpha, limit;
  uint32_t limit_bits;
  explicit ClampedSwiglu(const Activation& a) : alpha(a.alpha), limit(a.limit), limit_bits(bits_of(a.limit)) {}
  float act(float g) const {
    const float c = g > limit ? limit : g;
    return c * sigmoid(alpha * c);
  }
  float factor(float u) const {
    const float below = u > limit ? limit : u;
    return (below < -limit ? -limit : below) + 1.0f;
  }
  float act_slope(float g, float* act) const {
    const float c = g > limit ? limit : g, sig = sigmoid(alpha * c);
    *act = c * sig;
    const float slope = sig + alpha * *act * (1.0f - sig);
    return g > limit ? 0.0f : slope;
  }
  float factor_slope(float u) const { return u > limit || u < -limit ? 0.0f : 1.0f; }
  // The nearest bf16 on the same side of the bound: one step away from 0 or towards it where rounding has crossed it.
  uint32_t saved(float x) const {
    const uint32_t bits = round_bits(x);
    return bits + beyond(bits_of(x)) - beyond(bits << 16);
  }
  // |x| > limit, of a float's bits: as whole numbers the loop vectorises.
  uint32_t beyond(uint32_t bits) const { return (bits & 0x7fffffffu) > limit_bits ? 1u : 0u; }
};

template <class Rule>
inline void activate_rows(Rule rule, const float* __restrict g, const float* __restrict u, int n, float* __restrict h,
                          uint16_t* __restrict g_saved, uint16_t* __restrict u_saved) {
  for (int i = 0; i < n; ++i) h[i] = rule.act(g[i]) * rule.factor(u[i]);
  if (g_saved == nullptr) return;
  for (int i = 0; i < n; ++i) g_saved[i] = static_cast<uint16_t>(rule.saved(g[i]));
  for (int i = 0; i < n; ++i) u_saved[i] = static_cast<uint16_t>(rule.saved(u[i]));
}

template <class Rule>
inline void activate_backward_rows(Rule rule, const uint16_t* __restrict g, const uint16_t* __restrict u,
                                   const float* __restrict z, float w, int n, float* __restrict dg,
                                   float* __restrict du, float* __restrict dw_parts, uint16_t* __restrict h) {
  for (int i0 = 0; i0 < n; i0 += kBlock) {
    const int count = min_int(kBlock, n - i0);
    alignas(64) float product[kBlock] = {};
    alignas(64) uint16_t hidden[kBlock];
    for (int i = 0; i < count; ++i) {
      const float up = from_bf16(u[i0 + i]), factor = rule.factor(up), zi = z[i0 + i];
      float act;
      const float slope = rule.act_slope(from_bf16(g[i0 + i]), &act);
      const uint32_t seen = round_bits(act * factor);  // by the down projection
      hidden[i] = static_cast<uint16_t>(seen);
      product[i] = zi * float_of(seen << 16);
      du[i0 + i] = w * zi * act * rule.factor_slope(up);
      dg[i0 + i] = w * zi * factor * slope;
    }
    for (int half = kBlock / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) product[i] += product[i + half];
    dw_parts[i0 / kBlock] = product[0];
    if (h != nullptr) __builtin_memcpy(h + i0, hidden, count * sizeof *h);
  }
}

inline void activate(const Activation& a, const float* g, const float* u, int n, float* h, uint16_t* g_saved,
                     uint16_t* u_saved) {
  if (a.kind == ActivationKind::silu)
    activate_rows(Silu(a), g, u, n, h, g_saved, u_saved);
  else
    activate_rows(ClampedSwiglu(a), g, u, n, h, g_saved, u_saved);
}

inline void activate_backward(const Activation& a, const uint16_t* g, const uint16_t* u, const float* z, float w, int n,
                              float* dg, float* du, float* dw_parts, uint16_t* h) {
  if (a.kind == ActivationKind::silu)
    activate_backward_rows(Silu(a), g, u, z, w, n, dg, du, dw_parts, h);
  else
    activate_backward_rows(ClampedSwiglu(a), g, u, z, w, n, dg, du, dw_parts, h);
}
