// Torch tensors read through their Python attributes, every property checked before the address is used. No libtorch.
#pragma once
#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "common/check.h"

namespace kt_sft {

namespace py = pybind11;

enum class Dtype { bf16, f32, i64, i32, u8 };
constexpr const char* kDtypeNames[] = {"bfloat16", "float32", "int64", "int32", "uint8"};

// An attribute name or dictionary key: the Python string is made once.
struct Name {
  explicit Name(const char* text) : text(text), object(PyUnicode_InternFromString(text)) {}
  const char* text;
  PyObject* object;  // never released
};

// What every call looks up in torch.
struct Torch {
  Name dtype{"dtype"}, shape{"shape"}, is_cpu{"is_cpu"}, is_contiguous{"is_contiguous"}, data_ptr{"data_ptr"};
  py::object tensor_type, dtypes[std::size(kDtypeNames)];  // a torch.dtype is a singleton

  Torch() {
    const auto torch = py::module_::import("torch");
    tensor_type = torch.attr("Tensor");
    for (size_t i = 0; i < std::size(kDtypeNames); ++i) dtypes[i] = torch.attr(kDtypeNames[i]);
  }
  static const Torch& get() {
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

inline void check_is_tensor(py::handle value, const char* name) {
  PyTypeObject* type = Py_TYPE(value.ptr());
  KT_CHECK(PyType_IsSubtype(type, reinterpret_cast<PyTypeObject*>(Torch::get().tensor_type.ptr())), name,
           ": expected a torch tensor, got ", text(py::handle(reinterpret_cast<PyObject*>(type))));
}

inline std::vector<int64_t> shape_of(py::handle tensor) {
  const py::tuple shape = attribute(tensor, Torch::get().shape);
  std::vector<int64_t> sizes(shape.size());
  for (size_t i = 0; i < sizes.size(); ++i) sizes[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), i));
  return sizes;
}

inline std::string dims(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + ")";
}

inline uintptr_t address(py::handle tensor) {
  return reinterpret_cast<uintptr_t>(PyLong_AsVoidPtr(call(tensor, Torch::get().data_ptr).ptr()));
}

inline Dtype checked_dtype(py::handle tensor, const char* name, std::initializer_list<Dtype> allowed) {
  const Torch& torch = Torch::get();
  const py::object dtype = attribute(tensor, torch.dtype);
  std::string expected;
  for (Dtype d : allowed)
    if (dtype.is(torch.dtypes[static_cast<int>(d)])) return d;
  for (Dtype d : allowed)
    expected += (expected.empty() ? "torch." : " or torch.") + std::string(kDtypeNames[static_cast<int>(d)]);
  fail(name, ": expected dtype ", expected, ", got ", text(dtype));
}

// The memory of a contiguous CPU tensor of one of the dtypes and of the shape.
template <class T>
T* tensor(py::handle value, const char* name, std::initializer_list<Dtype> dtypes, const std::vector<int64_t>& shape,
          Dtype* dtype_out = nullptr) {
  const Torch& torch = Torch::get();
  check_is_tensor(value, name);
  const Dtype dtype = checked_dtype(value, name, dtypes);
  KT_CHECK(attribute(value, torch.is_cpu).is(py::handle(Py_True)), name, ": expected a CPU tensor, got one on ",
           text(value.attr("device")));
  const std::vector<int64_t> got = shape_of(value);
  KT_CHECK(got == shape, name, ": expected shape ", dims(shape), ", got ", dims(got));
  KT_CHECK(call(value, torch.is_contiguous).is(py::handle(Py_True)), name,
           ": expected a contiguous tensor; call .contiguous()");
  if (dtype_out != nullptr) *dtype_out = dtype;
  return reinterpret_cast<T*>(address(value));
}

}  // namespace kt_sft
