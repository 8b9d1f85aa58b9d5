// SwiGLU and its derivative, as loops that the compiler vectorises for the variant's ISA.
//   H = silu(G) * U    dU = w Z silu(G)    dG = w Z U (sig + G sig (1 - sig))    with sig = 1 / (1 + exp(-G))
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

inline void to_bf16_row(const float* __restrict from, int n, uint16_t* __restrict to) {
  for (int i = 0; i < n; ++i) to[i] = static_cast<uint16_t>(round_bits(from[i]));
}

inline void swiglu(const float* __restrict g, const float* __restrict u, int n, float* __restrict h,
                   uint16_t* __restrict g_saved, uint16_t* __restrict u_saved) {
  for (int i = 0; i < n; ++i) h[i] = g[i] * sigmoid(g[i]) * u[i];
  if (g_saved == nullptr) return;
  for (int i = 0; i < n; ++i) g_saved[i] = static_cast<uint16_t>(round_bits(g[i]));
  for (int i = 0; i < n; ++i) u_saved[i] = static_cast<uint16_t>(round_bits(u[i]));
}

inline void swiglu_hidden(const uint16_t* __restrict g, const uint16_t* __restrict u, int n, uint16_t* __restrict h) {
  for (int i = 0; i < n; ++i) {
    const float gate = from_bf16(g[i]);
    h[i] = static_cast<uint16_t>(round_bits(gate * sigmoid(gate) * from_bf16(u[i])));
  }
}

inline void swiglu_backward(const uint16_t* __restrict g, const uint16_t* __restrict u, const float* __restrict z,
                            float w, int n, float* __restrict dg, float* __restrict du, float* __restrict dw_parts) {
  for (int i0 = 0; i0 < n; i0 += kBlock) {
    const int count = min_int(kBlock, n - i0);
    alignas(64) float product[kBlock] = {};
    for (int i = 0; i < count; ++i) {
      const float gate = from_bf16(g[i0 + i]), up = from_bf16(u[i0 + i]), zi = z[i0 + i];
      const float sig = sigmoid(gate), act = gate * sig;
      const float h = float_of(round_bits(act * up) << 16);  // as the down projection saw it
      product[i] = zi * h;
      du[i0 + i] = w * zi * act;
      dg[i0 + i] = w * zi * up * (sig + act * (1.0f - sig));
    }
    for (int half = kBlock / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) product[i] += product[i + half];
    dw_parts[i0 / kBlock] = product[0];
  }
}
