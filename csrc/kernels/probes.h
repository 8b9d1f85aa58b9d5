// What memory delivers to this variant's widest loads. Included inside the variant's namespace.
#pragma once

#ifdef __AVX512F__
constexpr int kWidestBytes = 64;
#else
constexpr int kWidestBytes = 32;
#endif

// Reads `bytes` (a multiple of 512) from an address aligned to a cache line, and asks for the line `ahead` bytes
// further on the way (0: leaves that to the hardware). The result depends on every byte, so that no load can be left
// out.
inline uint64_t read_stream(const void* data, int64_t bytes, int64_t ahead) {
  using Wide = uint64_t __attribute__((vector_size(kWidestBytes), may_alias));
  constexpr int kLoads = 8;  // independent accumulators: more than loads in flight per cycle times their latency in L1
  Wide sums[kLoads] = {};
  const char* p = static_cast<const char*>(data);
  for (const char* end = p + bytes; p != end; p += kLoads * kWidestBytes) {
    if (ahead != 0)
      for (int line = 0; line < kLoads * kWidestBytes; line += 64) __builtin_prefetch(p + ahead + line);
#pragma GCC unroll 8
    for (int i = 0; i < kLoads; ++i) sums[i] ^= *reinterpret_cast<const Wide*>(p + i * kWidestBytes);
  }
  uint64_t result = 0;
  for (const Wide& sum : sums)
    for (int lane = 0; lane < kWidestBytes / 8; ++lane) result ^= sum[lane];
  return result;
}
