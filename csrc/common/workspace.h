// One arena per process for everything a layer call needs besides its arguments: grown when a call needs more, shared
// by all layers, on huge pages where the system has them. Calls take turns through its lock.
#pragma once
#include <cstddef>
#include <cstdint>
#include <mutex>

namespace kt_sft {

class Workspace {
 public:
  // Locks the arena, empty, for the life of this object.
  Workspace();
  // 64-byte aligned; first counts (base null), then is laid out: see reserve().
  template <class T>
  T* take(size_t count) {
    return reinterpret_cast<T*>(take_bytes(count * sizeof(T)));
  }
  // Makes room for the bytes taken so far in a counting pass and starts the real pass.
  void reserve();

  static size_t capacity();
  static void set_poison(bool on);  // fill with NaN before every call: for tests

 private:
  char* take_bytes(size_t bytes);
  std::unique_lock<std::mutex> lock_;
  char* base_ = nullptr;
  size_t used_ = 0;
};

}  // namespace kt_sft
