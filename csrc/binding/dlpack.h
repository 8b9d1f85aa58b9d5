// The part of DLPack's exchange API by which newer torch describes a tensor to C code, without a call of Python: the
// structs of version 1.x, https://dmlc.github.io/dlpack/latest/c_api.html.
#pragma once
#include <cstdint>

namespace kt_sft {

constexpr char kDLCapsule[] = "dlpack_exchange_api";  // of torch.Tensor.__dlpack_c_exchange_api__
constexpr uint32_t kDLMajor = 1;                      // the layout below
constexpr int32_t kDLCpu = 1;

struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  DLDataType dtype;
  const int64_t *shape, *strides;  // both of ndim elements, owned by the tensor
  uint64_t byte_offset;
};

struct DLExchangeApi {
  uint32_t major, minor;
  const DLExchangeApi* earlier;
  void (*allocate)();
  void (*take)();
  void (*give)();
  int (*describe)(void* object, DLTensor* out);  // may be null; -1 with a Python error set
  void (*current_stream)();
};

}  // namespace kt_sft
