// Torch tensors as the kernels take them, every property checked before the address is used. No libtorch: torch itself
// describes a tensor where it has DLPack's exchange API, else its Python attributes are read.
#pragma once
#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <numeric>
#include <string>
#include <vector>

#include "binding/dlpack.h"
#include "common/check.h"

namespace kt_sft {

namespace py = pybind11;

enum class Dtype { bf16, f32, i64, i32, u8 };
struct DtypeInfo {
  const char* name;
  DLDataType dl;
};
constexpr DtypeInfo kDtypes[] = {{"bfloat16", {4, 16, 1}},
                                 {"float32", {2, 32, 1}},
                                 {"int64", {0, 64, 1}},
                                 {"int32", {0, 32, 1}},
                                 {"uint8", {1, 8, 1}}};

// An attribute name or dictionary key: the Python string is made once.
struct Name {
  explicit Name(const char* text) : text(text), object(PyUnicode_InternFromString(text)) {}
  const char* text;
  PyObject* object;  // never released
};

// What every call looks up in torch.
struct Torch {
  Name dtype{"dtype"}, shape{"shape"}, is_cpu{"is_cpu"}, is_contiguous{"is_contiguous"}, data_ptr{"data_ptr"};
  py::object tensor_type, empty_like, dtypes[std::size(kDtypes)];  // a torch.dtype is a singleton
  decltype(DLExchangeApi::describe) describe = nullptr;

  Torch() {
    const auto torch = py::module_::import("torch");
    tensor_type = torch.attr("Tensor");
    empty_like = torch.attr("empty_like");
    for (size_t i = 0; i < std::size(kDtypes); ++i) dtypes[i] = torch.attr(kDtypes[i].name);
    const py::object capsule = py::getattr(tensor_type, "__dlpack_c_exchange_api__", py::none());
    if (!PyCapsule_IsValid(capsule.ptr(), kDLCapsule)) return;
    const auto* api = static_cast<const DLExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), kDLCapsule));
    if (api->major == kDLMajor) describe = api->describe;
  }
  static Torch& get() {
    PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<Torch> storage;
    return storage.call_once_and_store_result([] { return Torch(); }).get_stored();
  }
};

inline py::object attribute(py::handle value, const Name& name) {
  PyObject* found = PyObject_GetAttr(value.ptr(), name.object);
  if (found == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(found);
}

inline py::object call(py::handle value, const Name& method) {
  PyObject* result = PyObject_CallMethodNoArgs(value.ptr(), method.object);
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

inline std::string text(py::handle value) { return py::str(value); }

template <class Sizes>
std::string dims(const Sizes& shape) {
  std::string text;
  for (const int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "(" + text + ")";
}

// What a Python object that should be a tensor is. Looks at it only; it must not outlive the object.
class Tensor {
 public:
  struct Shape {
    const int64_t* sizes;
    size_t count;
    const int64_t* begin() const { return sizes; }
    const int64_t* end() const { return sizes + count; }
    size_t size() const { return count; }
    int64_t operator[](size_t i) const { return sizes[i]; }
  };

  Tensor(py::handle value, const char* name) : value_(value), name_(name) {
    PyTypeObject* type = Py_TYPE(value.ptr());
    KT_CHECK(PyType_IsSubtype(type, reinterpret_cast<PyTypeObject*>(Torch::get().tensor_type.ptr())), name,
             ": expected a torch tensor, got ", text(py::handle(reinterpret_cast<PyObject*>(type))));
    if (!described()) read_attributes();
  }
  Tensor(const Tensor&) = delete;

  Shape shape() const { return shape_; }
  void* address() const { return data_; }
  int64_t elements() const { return std::accumulate(shape_.begin(), shape_.end(), int64_t{1}, std::multiplies<>()); }
  bool is(Dtype dtype) const { return on_cpu_ && static_cast<int>(dtype) == dtype_; }

  // The memory of a contiguous CPU tensor of one of the dtypes and of the shape.
  template <class T>
  T* data(std::initializer_list<Dtype> dtypes, std::initializer_list<int64_t> shape, Dtype* dtype_out = nullptr) const {
    const auto is = [&](Dtype d) { return static_cast<int>(d) == dtype_; };
    if (std::none_of(dtypes.begin(), dtypes.end(), is)) fail_dtype(dtypes);
    KT_CHECK(on_cpu_, name_, ": expected a CPU tensor, got one on ", text(value_.attr("device")));
    KT_CHECK(std::equal(shape.begin(), shape.end(), shape_.begin(), shape_.end()), name_, ": expected shape ",
             dims(shape), ", got ", dims(shape_));
    KT_CHECK(contiguous_, name_, ": expected a contiguous tensor; call .contiguous()");
    if (dtype_out != nullptr) *dtype_out = static_cast<Dtype>(dtype_);
    return static_cast<T*>(data_);
  }

 private:
  bool described() {
    const auto describe = Torch::get().describe;
    if (describe == nullptr) return false;
    DLTensor t;
    if (describe(value_.ptr(), &t) != 0) {  // DLPack has no word for it
      PyErr_Clear();
      return false;
    }
    if (t.device_type != kDLCpu) return false;  // pinned memory may have a name of its own
    data_ = static_cast<char*>(t.data) + t.byte_offset;
    on_cpu_ = true;
    shape_ = {t.shape, static_cast<size_t>(t.ndim)};
    const auto same = [&](const DtypeInfo& d) {
      return d.dl.code == t.dtype.code && d.dl.bits == t.dtype.bits && d.dl.lanes == t.dtype.lanes;
    };
    const auto* found = std::find_if(std::begin(kDtypes), std::end(kDtypes), same);
    dtype_ = static_cast<int>(found - kDtypes);
    contiguous_ = true;
    int64_t stride = 1;
    for (int i = t.ndim - 1; i >= 0; stride *= t.shape[i--])
      contiguous_ = contiguous_ && (t.shape[i] == 1 || t.strides[i] == stride);
    contiguous_ = contiguous_ || stride == 0;  // no elements
    return true;
  }

  void read_attributes() {
    const Torch& torch = Torch::get();
    const py::object dtype = attribute(value_, torch.dtype);
    const auto* found = std::find_if(std::begin(torch.dtypes), std::end(torch.dtypes),
                                     [&](const py::object& known) { return dtype.is(known); });
    dtype_ = static_cast<int>(found - torch.dtypes);
    on_cpu_ = attribute(value_, torch.is_cpu).is(py::handle(Py_True));
    const py::tuple shape = attribute(value_, torch.shape);
    sizes_.resize(shape.size());
    for (size_t i = 0; i < sizes_.size(); ++i) sizes_[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), i));
    shape_ = {sizes_.data(), sizes_.size()};
    if (!on_cpu_) return;
    contiguous_ = call(value_, torch.is_contiguous).is(py::handle(Py_True));
    data_ = PyLong_AsVoidPtr(call(value_, torch.data_ptr).ptr());
  }

  [[noreturn]] void fail_dtype(std::initializer_list<Dtype> allowed) const {
    std::string expected;
    for (Dtype d : allowed)
      expected += (expected.empty() ? "torch." : " or torch.") + std::string(kDtypes[static_cast<int>(d)].name);
    fail(name_, ": expected dtype ", expected, ", got ", text(attribute(value_, Torch::get().dtype)));
  }

  py::handle value_;
  const char* name_;
  void* data_ = nullptr;
  int dtype_;  // of kDtypes, or its end
  bool on_cpu_ = false, contiguous_ = false;
  Shape shape_;
  std::vector<int64_t> sizes_;  // without a description
};

template <class T>
T* tensor(py::handle value, const char* name, std::initializer_list<Dtype> dtypes, std::initializer_list<int64_t> shape,
          Dtype* dtype_out = nullptr) {
  return Tensor(value, name).data<T>(dtypes, shape, dtype_out);
}

}  // namespace kt_sft
