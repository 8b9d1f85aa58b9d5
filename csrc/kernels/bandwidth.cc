#include "kernels/bandwidth.h"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>
#include <vector>

#include "common/check.h"
#include "common/thread_pool.h"
#include "kernels/kernel_table.h"

namespace kt_sft {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;
constexpr int64_t kPrefetchDistances[] = {0, 512, 2048, 4096};  // bytes

constexpr int kLine = 8;  // words of a cache line: threads do not share one

class Buffer {
 public:
  Buffer(int64_t bytes, bool huge_pages) : bytes_(round_up(bytes, kHugePage) + kHugePage) {
    base_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    madvise(base_, bytes_, huge_pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { munmap(base_, bytes_); }
  char* data() const {
    return reinterpret_cast<char*>(round_up(static_cast<int64_t>(reinterpret_cast<uintptr_t>(base_)), kHugePage));
  }

 private:
  int64_t bytes_;
  void* base_;
};

// Distinct words; returns their exclusive or.
uint64_t fill(char* data, int64_t bytes) {
  uint64_t result = 0;
  for (int64_t i = 0; i < bytes / 8; ++i) {
    const uint64_t word = static_cast<uint64_t>(i) * 0x9e3779b97f4a7c15u;
    std::memcpy(data + i * 8, &word, 8);
    result ^= word;
  }
  return result;
}

}  // namespace

double read_bandwidth(int64_t bytes_per_thread, int64_t passes, bool huge_pages) {
  KT_CHECK(bytes_per_thread > 0 && bytes_per_thread % 512 == 0,
           "bytes_per_thread: expected a positive multiple of 512, got ", bytes_per_thread);
  KT_CHECK(passes > 0, "passes: expected at least 1, got ", passes);
  const int threads = num_threads();
  const NodeTasks parts = split_over_nodes(threads, nodes().count());  // each read by the node that fills it
  const Buffer buffer(bytes_per_thread * threads, huge_pages);
  const auto part = [&](int64_t task) { return buffer.data() + task * bytes_per_thread; };
  std::vector<uint64_t> sums(threads * kLine), expected(threads * kLine);
  parallel_for(parts, [&](int64_t task, int) { expected[task * kLine] = fill(part(task), bytes_per_thread); });
  double best = 0;
  for (const int64_t ahead : kPrefetchDistances) {
    const auto start = std::chrono::steady_clock::now();
    parallel_for(parts, [&](int64_t task, int) {
      uint64_t sum = 0;
      for (int64_t n = 0; n < passes; ++n) sum += kernels().read(part(task), bytes_per_thread, ahead);
      sums[task * kLine] = sum;
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, static_cast<double>(bytes_per_thread) * passes * threads / seconds.count());
  }
  for (int i = 0; i < threads; ++i)
    KT_CHECK(sums[i * kLine] == expected[i * kLine] * passes, "read_bandwidth: the loop did not read every word");
  return best;
}

}  // namespace kt_sft
