// Python binding: reads torch tensors through data_ptr / shape / stride / dtype / device, checks every argument,
// releases the GIL around the kernels. No libtorch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/thread_pool.h"
#include "common/workspace.h"
#include "kernels/kernel_table.h"
#include "kernels/pack.h"
#include "moe/experts.h"
#include "moe/product.h"

namespace py = pybind11;

namespace kt_sft {
namespace {

constexpr const char* kFormatNames[] = {
#define KT_FORMAT(name, Struct, pair_bytes, has_scales) #name,
#include "kernels/registry.inc"
};

Format parse_format(const std::string& name) {
  std::string known;
  for (size_t i = 0; i < std::size(kFormatNames); ++i) {
    if (name == kFormatNames[i]) return static_cast<Format>(i);
    known += (i ? ", " : "") + std::string(kFormatNames[i]);
  }
  fail("weight_format: expected one of ", known, "; got '", name, "'");
}

std::string dims(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + ")";
}

// A contiguous CPU tensor of the given dtype and shape; -1 in `shape` is any size, written back.
template <class T>
T* tensor(const py::handle& value, const char* name, std::initializer_list<const char*> dtypes,
          std::vector<int64_t> shape, std::string* dtype_out = nullptr) {
  KT_CHECK(py::hasattr(value, "data_ptr"), name, ": expected a torch tensor, got ",
           py::str(py::type::of(value)).cast<std::string>());
  const std::string dtype = py::str(value.attr("dtype"));
  bool known = false;
  std::string expected;
  for (const char* d : dtypes) {
    known |= dtype == d;
    expected += (expected.empty() ? "" : " or ") + std::string(d);
  }
  KT_CHECK(known, name, ": expected dtype ", expected, ", got ", dtype);
  KT_CHECK(py::str(value.attr("device").attr("type")).cast<std::string>() == "cpu", name,
           ": expected a CPU tensor, got one on ", py::str(value.attr("device")).cast<std::string>());
  const auto got = value.attr("shape").cast<std::vector<int64_t>>();
  KT_CHECK(got == shape, name, ": expected shape ", dims(shape), ", got ", dims(got));
  KT_CHECK(value.attr("is_contiguous")().cast<bool>(), name, ": expected a contiguous tensor; call .contiguous()");
  if (dtype_out != nullptr) *dtype_out = dtype;
  return reinterpret_cast<T*>(value.attr("data_ptr")().cast<uintptr_t>());
}

constexpr const char* kBf16 = "torch.bfloat16";
constexpr const char* kF32 = "torch.float32";
constexpr const char* kI64 = "torch.int64";
constexpr const char* kU8 = "torch.uint8";

ExpertWeights expert_weights(int experts, int hidden, int intermediate, const std::string& format, int group_size) {
  KT_CHECK(experts >= 1 && hidden >= 1 && intermediate >= 1, "experts: expected positive sizes, got E=", experts,
           " D=", hidden, " F=", intermediate);
  KT_CHECK(group_size >= 0 && group_size % kBlock == 0, "group_size: expected 0 (per channel) or a multiple of ",
           kBlock, ", got ", group_size);
  return {experts, hidden, intermediate, parse_format(format), group_size, nullptr};
}

// The weights of a PackedExperts: its storage holds E * expert_bytes.
ExpertWeights expert_weights(const py::object& storage, int experts, int hidden, int intermediate,
                             const std::string& format, int group_size) {
  ExpertWeights w = expert_weights(experts, hidden, intermediate, format, group_size);
  w.storage = tensor<uint8_t>(storage, "storage", {kU8}, {experts * w.expert_bytes()});
  KT_CHECK(reinterpret_cast<uintptr_t>(w.storage) % 16 == 0, "storage: expected 16-byte aligned memory");
  return w;
}

PackedMatrix checked_matrix(const ExpertWeights& w, int expert, int projection) {
  KT_CHECK(expert >= 0 && expert < w.num_experts, "expert: expected 0 to ", w.num_experts - 1, ", got ", expert);
  KT_CHECK(projection >= 0 && projection <= 2, "projection: expected 0, 1 or 2, got ", projection);
  return w.matrix(expert, static_cast<Projection>(projection));
}

void pack(const py::object& storage, int experts, int hidden, int intermediate, const std::string& format,
          int group_size, int expert, int projection, const py::object& weights) {
  const ExpertWeights w = expert_weights(storage, experts, hidden, intermediate, format, group_size);
  const PackedMatrix m = checked_matrix(w, expert, projection);
  std::string dtype;
  const void* data = tensor<void>(weights, "weights", {kBf16, kF32}, {m.rows, m.cols}, &dtype);
  bool finite;
  {
    py::gil_scoped_release release;
    finite = pack_matrix(m, data, dtype == kF32);
  }
  KT_CHECK(finite, "weights: expected finite values, got NaN or Inf");
}

void unpack(const py::object& storage, int experts, int hidden, int intermediate, const std::string& format,
            int group_size, int expert, int projection, const py::object& out) {
  const ExpertWeights w = expert_weights(storage, experts, hidden, intermediate, format, group_size);
  const PackedMatrix m = checked_matrix(w, expert, projection);
  uint16_t* data = tensor<uint16_t>(out, "out", {kBf16}, {m.rows, m.cols});
  py::gil_scoped_release release;
  unpack_matrix(m, data);
}

void product(const py::object& storage, int experts, int hidden, int intermediate, const std::string& format,
             int group_size, int expert, int projection, bool transposed, const py::object& act,
             const py::object& out) {
  const ExpertWeights w = expert_weights(storage, experts, hidden, intermediate, format, group_size);
  const PackedMatrix m = checked_matrix(w, expert, projection);
  const auto shape = act.attr("shape").cast<std::vector<int64_t>>();
  KT_CHECK(shape.size() == 2, "act: expected two dimensions, got ", dims(shape));
  const uint16_t* act_data = tensor<uint16_t>(act, "act", {kBf16}, {shape[0], transposed ? m.rows : m.cols});
  float* out_data = tensor<float>(out, "out", {kF32}, {shape[0], transposed ? m.cols : m.rows});
  py::gil_scoped_release release;
  packed_product(m, transposed ? Side::right : Side::left, act_data, shape[0], out_data);
}

LoraFactors lora_factors(const py::dict& lora, const char* name, int experts, int in, int out) {
  const std::string a_name = std::string(name) + "_a", b_name = std::string(name) + "_b";
  KT_CHECK(lora.contains(a_name) == lora.contains(b_name), "lora: expected both or none of ", a_name, " and ", b_name);
  LoraFactors f;
  if (!lora.contains(a_name)) return f;
  const py::object a = lora[a_name.c_str()], b = lora[b_name.c_str()];
  const auto shape = a.attr("shape").cast<std::vector<int64_t>>();
  KT_CHECK(shape.size() == 3 && shape[1] >= 1 && shape[1] <= 65536, a_name, ": expected shape (E, R, ", in, "), got ",
           dims(shape));
  f.rank = static_cast<int>(shape[1]);
  std::string dtype;
  f.a = tensor<void>(a, a_name.c_str(), {kBf16, kF32}, {experts, f.rank, in}, &dtype);
  f.a_float = dtype == kF32;
  f.b = tensor<void>(b, b_name.c_str(), {kBf16, kF32}, {experts, out, f.rank}, &dtype);
  f.b_float = dtype == kF32;
  const std::string grad_a = "grad_" + a_name, grad_b = "grad_" + b_name;
  if (lora.contains(grad_a)) {
    f.grad_a = tensor<float>(lora[grad_a.c_str()], grad_a.c_str(), {kF32}, {experts, f.rank, in});
    f.grad_b = tensor<float>(lora[grad_b.c_str()], grad_b.c_str(), {kF32}, {experts, out, f.rank});
  }
  return f;
}

struct CallArgs {
  ExpertWeights weights;
  LayerCall call;
};

CallArgs layer_call(const ExpertWeights& w, const py::object& x, const py::object& ids, const py::object& weights,
                    const py::dict& lora, const py::object& gate, const py::object& up) {
  const auto shape = ids.attr("shape").cast<std::vector<int64_t>>();
  KT_CHECK(shape.size() == 2 && shape[1] >= 1, "topk_ids: expected shape (T, K), got ", dims(shape));
  const int64_t T = shape[0], K = shape[1], D = w.hidden, F = w.intermediate;
  KT_CHECK(T * K < (int64_t{1} << 31), "topk_ids: at most 2^31 - 1 routed rows in one call, got ", T * K);
  CallArgs args{w, {}};
  LayerCall& c = args.call;
  c.tokens = T, c.top_k = static_cast<int>(K);
  c.x = tensor<uint16_t>(x, "hidden_states", {kBf16}, {T, D});
  c.ids = tensor<int64_t>(ids, "topk_ids", {kI64}, {T, K});
  c.weights = tensor<float>(weights, "topk_weights", {kF32}, {T, K});
  for (int64_t i = 0; i < T * K; ++i)
    KT_CHECK(c.ids[i] >= 0 && c.ids[i] < w.num_experts, "topk_ids: expected expert ids 0 to ", w.num_experts - 1,
             ", got ", c.ids[i], " for token ", i / K);
  c.lora.factors[kGate] = lora_factors(lora, "gate", w.num_experts, w.hidden, w.intermediate);
  c.lora.factors[kUp] = lora_factors(lora, "up", w.num_experts, w.hidden, w.intermediate);
  c.lora.factors[kDown] = lora_factors(lora, "down", w.num_experts, w.intermediate, w.hidden);
  if (lora.contains("scaling")) c.lora.scaling = lora["scaling"].cast<float>();
  if (lora.contains("x")) c.lora.x = tensor<uint16_t>(lora["x"], "lora x", {kBf16}, {T, D});
  if (lora.contains("down_keep")) {
    c.lora.down_keep = tensor<uint8_t>(lora["down_keep"], "down_keep", {kU8}, {T, K, F});
    c.lora.keep_scale = lora["keep_scale"].cast<float>();
  }
  if (!gate.is_none()) {
    c.gate = tensor<uint16_t>(gate, "saved gate", {kBf16}, {T * K, F});
    c.up = tensor<uint16_t>(up, "saved up", {kBf16}, {T * K, F});
  }
  return args;
}

void forward(const py::object& storage, int experts, int hidden, int intermediate, const std::string& format,
             int group_size, const py::object& x, const py::object& ids, const py::object& weights,
             const py::dict& lora, const py::object& gate, const py::object& up, const py::object& out) {
  const CallArgs args = layer_call(expert_weights(storage, experts, hidden, intermediate, format, group_size), x, ids,
                                   weights, lora, gate, up);
  float* out_data = tensor<float>(out, "out", {kF32}, {args.call.tokens, hidden});
  py::gil_scoped_release release;
  experts_forward(args.weights, args.call, out_data);
}

void backward(const py::object& storage, int experts, int hidden, int intermediate, const std::string& format,
              int group_size, const py::object& x, const py::object& ids, const py::object& weights,
              const py::dict& lora, const py::object& gate, const py::object& up, const py::object& grad_out,
              const py::object& grad_x, const py::object& grad_lora_x, const py::object& grad_weights) {
  const CallArgs args = layer_call(expert_weights(storage, experts, hidden, intermediate, format, group_size), x, ids,
                                   weights, lora, gate, up);
  const int64_t T = args.call.tokens;
  LayerGrads g{};
  g.grad_out = tensor<uint16_t>(grad_out, "grad_out", {kBf16}, {T, hidden});
  g.grad_x = tensor<float>(grad_x, "grad_x", {kF32}, {T, hidden});
  if (args.call.lora.x != nullptr) g.grad_lora_x = tensor<float>(grad_lora_x, "grad_lora_x", {kF32}, {T, hidden});
  g.grad_weights = tensor<float>(grad_weights, "grad_weights", {kF32}, {T, args.call.top_k});
  for (const LoraFactors& f : args.call.lora.factors)
    KT_CHECK(f.rank == 0 || (f.grad_a != nullptr && f.grad_b != nullptr),
             "lora: backward needs grad_* buffers for every factor");
  py::gil_scoped_release release;
  experts_backward(args.weights, args.call, g);
}

// Floating-point operations per second of all threads on registers only.
double peak_flops(int64_t iterations) {
  py::gil_scoped_release release;
  const int threads = num_threads();
  std::vector<double> done(threads);
  const auto start = std::chrono::steady_clock::now();
  parallel_for(threads, [&](int64_t task, int) { done[task] = kernels().peak(iterations); });
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  double total = 0;
  for (double d : done) total += d;
  return total / seconds.count();
}

std::vector<std::string> isas() {
  int count;
  const char* const* names = runnable_isas(&count);
  return {names, names + count};
}

}  // namespace
}  // namespace kt_sft

PYBIND11_MODULE(_C, m) {
  using namespace kt_sft;
  m.doc() = "kt_sft kernels; use kt_sft.native";
  m.def("isa", [] { return std::string(kernels().name); });
  m.def("isas", isas, "ISAs that this CPU can run, best first");
  m.def("select_isa", [](const std::string& name) { select_isa(name.c_str()); }, py::arg("name"));
  m.def("formats", [] { return std::vector<std::string>(std::begin(kFormatNames), std::end(kFormatNames)); });
  m.def("num_threads", num_threads);
  m.def("set_num_threads", set_num_threads, py::arg("threads"));
  m.def("peak_flops", peak_flops, py::arg("iterations"), "measured multiply-add rate of all threads, from registers");
  m.def("workspace_bytes", Workspace::capacity);
  m.def("set_workspace_poison", Workspace::set_poison, py::arg("on"));
  m.def("packed_bytes", [](int experts, int hidden, int intermediate, const std::string& format, int group_size) {
    return experts * expert_weights(experts, hidden, intermediate, format, group_size).expert_bytes();
  });
  m.def("sort_by_expert", [](const py::object& ids, int experts, const py::object& counts, const py::object& order) {
    const auto slots = ids.attr("numel")().cast<int64_t>();
    const int64_t* data = tensor<int64_t>(ids, "ids", {kI64}, {slots});
    for (int64_t i = 0; i < slots; ++i)
      KT_CHECK(data[i] >= 0 && data[i] < experts, "ids: expected expert ids 0 to ", experts - 1, ", got ", data[i]);
    sort_by_expert(data, slots, experts, tensor<int32_t>(counts, "counts", {"torch.int32"}, {experts}),
                   tensor<int32_t>(order, "order", {"torch.int32"}, {slots}));
  });
  m.def("pack", pack);
  m.def("unpack", unpack);
  m.def("product", product, "out = act W^T, or act W if transposed; W is one projection of one expert");
  m.def("forward", forward);
  m.def("backward", backward);
}
