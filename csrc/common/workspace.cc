#include "common/workspace.h"

#include "common/huge_pages.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <new>
#include <utility>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace kt_sft {
namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kGap = 64;  // between two buffers, out of bounds
#else
constexpr size_t kGap = 0;
#endif
#ifdef KT_SFT_POISON
constexpr bool kAlwaysPoison = true;
#else
constexpr bool kAlwaysPoison = false;
#endif

std::mutex* arena_mutex = new std::mutex;  // never destroyed: a call may be running at interpreter exit
char* arena = nullptr;
std::atomic<size_t> arena_bytes{0};
std::atomic<bool> poison{kAlwaysPoison};

// All of the arena is within bounds, or only what take_bytes has handed out.
void set_bounds([[maybe_unused]] void* at, [[maybe_unused]] size_t bytes, [[maybe_unused]] bool inside) {
#ifdef __SANITIZE_ADDRESS__
  if (inside) {
    __asan_unpoison_memory_region(at, bytes);
  } else {
    __asan_poison_memory_region(at, bytes);
  }
#endif
}

void grow(size_t bytes) {
  if (bytes <= arena_bytes) return;
  bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  // First forgotten, then freed: a process forked in between must not find memory that is gone.
  char* const old = std::exchange(arena, nullptr);
  const size_t old_bytes = arena_bytes.exchange(0);
  if (old != nullptr) {
    set_bounds(old, old_bytes, true);
    munmap(old, old_bytes);
  }
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  advise_huge_pages(memory, bytes);
  arena = static_cast<char*>(memory), arena_bytes = bytes;
}

void replace_lock_after_fork() { arena_mutex = new std::mutex; }

[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, replace_lock_after_fork);

}  // namespace

Workspace::Workspace() : lock_(*arena_mutex) {}

char* Workspace::take_bytes(size_t bytes) {
  char* at = base_ == nullptr ? nullptr : base_ + used_;
  if (at != nullptr) set_bounds(at, bytes, true);
  used_ += (bytes + 63) / 64 * 64 + kGap;
  return at;
}

void Workspace::reserve() {
  grow(used_);
  if (poison) {
    set_bounds(arena, arena_bytes, true);
    std::fill_n(reinterpret_cast<uint16_t*>(arena), arena_bytes / 2, uint16_t{0x7fc0});  // NaN as bf16 and fp32
  }
  set_bounds(arena, arena_bytes, false);
  base_ = arena, used_ = 0;
}

size_t Workspace::capacity() { return arena_bytes; }
void Workspace::set_poison(bool on) { poison = on || kAlwaysPoison; }

}  // namespace kt_sft
