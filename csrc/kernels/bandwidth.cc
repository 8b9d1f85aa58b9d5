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

constexpr int kLineWords = kLine / sizeof(uint64_t);  // threads do not share one

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

int64_t checked(int64_t bytes_per_thread) {
  KT_CHECK(bytes_per_thread > 0 && bytes_per_thread % 512 == 0,
           "bytes_per_thread: expected a positive multiple of 512, got ", bytes_per_thread);
  return bytes_per_thread;
}

}  // namespace

ReadProbe::Buffer::Buffer(int64_t bytes, bool huge_pages) : bytes_(round_up(bytes, kHugePage) + kHugePage) {
  base_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base_ == MAP_FAILED) throw std::bad_alloc();
  madvise(base_, bytes_, huge_pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
}

ReadProbe::Buffer::~Buffer() { munmap(base_, bytes_); }

char* ReadProbe::Buffer::data() const {
  return reinterpret_cast<char*>(round_up(static_cast<int64_t>(reinterpret_cast<uintptr_t>(base_)), kHugePage));
}

ReadProbe::ReadProbe(int64_t bytes_per_thread, bool huge_pages)
    : bytes_per_thread_(checked(bytes_per_thread)),
      threads_(num_threads()),
      buffer_(bytes_per_thread * threads_, huge_pages),
      expected_(threads_ * kLineWords) {
  parallel_for(split_over_nodes(threads_, nodes().count()), [&](int64_t task, int) {
    expected_[task * kLineWords] = fill(buffer_.data() + task * bytes_per_thread_, bytes_per_thread_);
  });
}

double ReadProbe::read(int64_t passes) const {
  KT_CHECK(passes > 0, "passes: expected at least 1, got ", passes);
  KT_CHECK(num_threads() == threads_, "threads: the probe was made for ", threads_, ", now they are ", num_threads());
  std::vector<uint64_t> sums(threads_ * kLineWords);
  const auto start = std::chrono::steady_clock::now();
  // Each part is read by the node that filled it.
  parallel_for(split_over_nodes(threads_, nodes().count()), [&](int64_t task, int) {
    uint64_t sum = 0;
    const char* part = buffer_.data() + task * bytes_per_thread_;
    for (int64_t n = 0; n < passes; ++n) sum += kernels().read(part, bytes_per_thread_, ahead_);
    sums[task * kLineWords] = sum;
  });
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  for (int i = 0; i < threads_; ++i)
    KT_CHECK(sums[i * kLineWords] == expected_[i * kLineWords] * passes, "read: the loop did not read every word");
  return static_cast<double>(bytes_per_thread_) * passes * threads_ / seconds.count();
}

double ReadProbe::best(int64_t passes) {
  double best = 0;
  int64_t fastest = 0;
  for (const int64_t distance : kPrefetchDistances) {
    ahead_ = distance;
    if (const double rate = read(passes); rate > best) best = rate, fastest = distance;
  }
  ahead_ = fastest;
  return best;
}

}  // namespace kt_sft
