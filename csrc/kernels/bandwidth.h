// Measured read bandwidth of all threads together, for the benchmarks.
#pragma once
#include <cstdint>
#include <vector>

namespace kt_sft {

// Anonymous memory for every thread, on 2 MiB pages (where the system gives them) or on 4 KiB pages, filled at once.
class ReadProbe {
 public:
  ReadProbe(int64_t bytes_per_thread, bool huge_pages);
  // Bytes per second: every thread reads its own memory `passes` times with the widest loads of the selected ISA, at
  // the prefetch distance that was the fastest when best() tried them.
  double read(int64_t passes) const;
  double best(int64_t passes);  // of several prefetch distances

 private:
  class Buffer {
   public:
    Buffer(int64_t bytes, bool huge_pages);
    Buffer(const Buffer&) = delete;
    ~Buffer();
    char* data() const;

   private:
    int64_t bytes_;
    void* base_;
  };
  int64_t bytes_per_thread_;
  int64_t ahead_ = 0;  // bytes; 0 asks for nothing
  int threads_;
  Buffer buffer_;
  std::vector<uint64_t> expected_;
};

}  // namespace kt_sft
