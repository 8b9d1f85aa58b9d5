// Memory exchanged for a file of the same contents while other threads read it: mremap(2) puts a finished mapping in
// the place of another in one step. https://man7.org/linux/man-pages/man2/mremap.2.html
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <system_error>

namespace kt_sft {

inline size_t page_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

// [memory, memory + bytes), begun and ended with whole pages of a private mapping: the file's bytes from `offset` on,
// privately. A part at a time, so that little is there twice; its pages are found before, so that no reader waits for
// faults. Throws std::system_error; what is not exchanged then is what it was.
inline void map_file_over(void* memory, size_t bytes, int fd, int64_t offset) {
  constexpr size_t kPart = size_t{64} << 20;
#ifdef MADV_POPULATE_READ
  constexpr int kPopulate = MADV_POPULATE_READ;
#else
  constexpr int kPopulate = 22;  // Linux 5.14; refused before, which only means faults later
#endif
  const size_t page = page_bytes();
  for (size_t done = 0; done < bytes; done += kPart) {
    const size_t size = (std::min(kPart, bytes - done) + page - 1) / page * page;
    void* part = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, offset + static_cast<int64_t>(done));
    if (part == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mapping packed experts");
    madvise(part, size, kPopulate);
    void* target = static_cast<char*>(memory) + done;
    if (mremap(part, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, target) == MAP_FAILED) {
      const int error = errno;
      munmap(part, size);
      throw std::system_error(error, std::generic_category(), "mapping packed experts");
    }
  }
}

}  // namespace kt_sft
