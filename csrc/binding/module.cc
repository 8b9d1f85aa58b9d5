// Python binding: checks every argument, releases the GIL around the kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstring>
#include <iterator>
#include <string>
#include <vector>

#include "binding/tensor.h"
#include "common/check.h"
#include "common/huge_pages.h"
#include "common/map_file.h"
#include "common/nodes.h"
#include "common/thread_pool.h"
#include "common/workspace.h"
#include "kernels/bandwidth.h"
#include "kernels/kernel_table.h"
#include "kernels/pack.h"
#include "moe/experts.h"
#include "moe/product.h"

namespace kt_sft {
namespace {

constexpr const char* kFormatNames[] = {
#define KT_FORMAT(name, Codes, Scales, bits, ...) #name,
#include "kernels/registry.inc"
};

// (format, group size) of gate, up and down.
using Layout = std::array<std::pair<std::string, int>, 3>;

Format parse_format(const std::string& name) {
  std::string known;
  for (size_t i = 0; i < std::size(kFormatNames); ++i) {
    if (name == kFormatNames[i]) return static_cast<Format>(i);
    known += (i ? ", " : "") + std::string(kFormatNames[i]);
  }
  fail("weight_format: expected one of ", known, "; got '", name, "'");
}

ExpertWeights expert_weights(int experts, int hidden, int intermediate, const Layout& layout) {
  KT_CHECK(experts >= 1 && hidden >= 1 && intermediate >= 1, "experts: expected positive sizes, got E=", experts,
           " D=", hidden, " F=", intermediate);
  MatrixFormat formats[3];
  for (int p = 0; p < 3; ++p) {
    const auto& [format, group_size] = layout[p];
    KT_CHECK(group_size >= 0 && group_size % kBlock == 0, "group_size: expected 0 (per channel) or a multiple of ",
             kBlock, ", got ", group_size);
    formats[p] = {parse_format(format), group_size};
  }
  return ExpertWeights(experts, hidden, intermediate, formats);
}

// The packed experts of one layer: E * expert_bytes of storage, checked once and kept alive.
class PackedHandle {
 public:
  PackedHandle(const py::object& storage, int experts, int hidden, int intermediate, const Layout& layout)
      : storage_(storage), weights_(expert_weights(experts, hidden, intermediate, layout)) {
    weights_.storage = tensor<uint8_t>(storage, "storage", {Dtype::u8}, {experts * weights_.expert_bytes()});
    KT_CHECK(reinterpret_cast<uintptr_t>(weights_.storage) % 16 == 0, "storage: expected 16-byte aligned memory");
  }
  void set_activation(const std::string& kind, float alpha, float limit) {
    KT_CHECK(kind == "silu" || kind == "clamped_swiglu", "activation: expected silu or clamped_swiglu, got '", kind,
             "'");
    KT_CHECK(std::isfinite(alpha) && limit >= 0, "activation: expected a finite alpha and a limit of at least 0, got ",
             alpha, " and ", limit);
    weights_.activation = {kind == "silu" ? ActivationKind::silu : ActivationKind::clamped_swiglu, alpha, limit};
  }
  void set_biases(const py::object& gate, const py::object& up, const py::object& down) {
    const int64_t E = weights_.num_experts, F = weights_.intermediate, D = weights_.hidden;
    const float* data[3] = {tensor<float>(gate, "gate bias", {Dtype::f32}, {E, F}),
                            tensor<float>(up, "up bias", {Dtype::f32}, {E, F}),
                            tensor<float>(down, "down bias", {Dtype::f32}, {E, D})};
    std::copy(std::begin(data), std::end(data), weights_.biases);
    biases_ = py::make_tuple(gate, up, down);  // kept alive
  }
  const ExpertWeights& weights() const {
    KT_CHECK(Tensor(storage_, "storage").address() == weights_.storage,
             "storage: expected the memory that these experts were made of, got a tensor that was moved since");
    return weights_;
  }

 private:
  py::object storage_, biases_;
  ExpertWeights weights_;
};

PackedMatrix checked_matrix(const ExpertWeights& w, int expert, int projection) {
  KT_CHECK(expert >= 0 && expert < w.num_experts, "expert: expected 0 to ", w.num_experts - 1, ", got ", expert);
  KT_CHECK(projection >= 0 && projection <= 2, "projection: expected 0, 1 or 2, got ", projection);
  return w.matrix(expert, static_cast<Projection>(projection));
}

// Memory of a CPU tensor that has not been written yet.
void wish_huge_pages(const py::object& tensor, bool wish) {
  advise_huge_pages(Tensor(tensor, "tensor").address(), tensor.attr("nbytes").cast<size_t>(), wish);
}

// Mapped memory of a CPU tensor from a page's beginning on, whose last page holds nothing else.
void map_file(const py::object& tensor, int fd, int64_t offset) {
  void* memory = Tensor(tensor, "tensor").address();
  const auto bytes = tensor.attr("nbytes").cast<size_t>();
  const size_t page = page_bytes();
  KT_CHECK(reinterpret_cast<uintptr_t>(memory) % page == 0 && offset % static_cast<int64_t>(page) == 0,
           "tensor, offset: expected both at the beginning of a page");
  py::gil_scoped_release release;
  map_file_over(memory, bytes, fd, offset);
}

void pack(const PackedHandle& packed, int expert, int projection, const py::object& weights) {
  const PackedMatrix m = checked_matrix(packed.weights(), expert, projection);
  KT_CHECK(quantises(m.format), "weights: expected codes for a matrix packed as ", info(m.format).name,
           ", got values: only bf16, int8 and int4 are made from values");
  Dtype dtype;
  const void* data = tensor<void>(weights, "weights", {Dtype::bf16, Dtype::f32}, {m.rows, m.cols}, &dtype);
  bool finite;
  {
    py::gil_scoped_release release;
    finite = pack_matrix(m, data, dtype == Dtype::f32);
  }
  KT_CHECK(finite, "weights: expected finite values, got NaN or Inf");
}

void pack_quantised(const PackedHandle& packed, int expert, int projection, const py::object& codes,
                    const std::vector<py::object>& planes) {
  const PackedMatrix m = checked_matrix(packed.weights(), expert, projection);
  const int bits = info(m.format).bits;
  KT_CHECK(bits <= 8, "codes: expected a format of at most 8 bits, got ", info(m.format).name);
  KT_CHECK(m.cols % source_columns(m.format) == 0, "codes: ", info(m.format).name, " expected a multiple of ",
           source_columns(m.format), " columns, got ", m.cols);
  const uint8_t* code_data = tensor<uint8_t>(codes, "codes", {Dtype::u8}, {m.rows, source_row_bytes(m.format, m.cols)});
  const uint8_t* plane_data[kMaxPlanes] = {};
  int count = 0;
  for (; count < kMaxPlanes && m.plane(count).lanes > 0; ++count) {
    const Plane plane = m.plane(count);
    KT_CHECK(ceil_div(m.cols, plane.columns) == m.plane_groups(count),
             "group_size: expected groups that end within the last 32 columns, got ", plane.columns);
    KT_CHECK(count < static_cast<int>(planes.size()), "planes: expected more than ", planes.size());
    plane_data[count] =
        tensor<uint8_t>(planes[count], "scales", {Dtype::u8},
                        {plane.lanes == 1 ? m.row_blocks() : m.rows, int64_t{m.plane_groups(count)} * plane.bytes});
  }
  KT_CHECK(count == static_cast<int>(planes.size()), "planes: expected ", count, ", got ", planes.size());
  if (m.format == Format::fp8 || m.format == Format::fp8_channel) {
    const int64_t scales = int64_t{m.plane(0).lanes == 1 ? m.row_blocks() : m.rows} * m.plane_groups(0);
    for (int64_t i = 0; i < scales; ++i) {
      float scale;
      std::memcpy(&scale, plane_data[0] + i * sizeof scale, sizeof scale);
      KT_CHECK(std::abs(scale) < kFp8ScalesBelow, "scales: expected values below ", kFp8ScalesBelow, " for ",
               info(m.format).name, ", got ", scale);
    }
  }
  py::gil_scoped_release release;
  pack_codes(m, code_data, plane_data);
}

void copy(const PackedHandle& to, const PackedHandle& from) {
  const ExpertWeights &dst = to.weights(), &src = from.weights();
  for (const Projection p : {kGate, kUp, kDown}) {
    const PackedMatrix a = dst.matrix(0, p), b = src.matrix(0, p);
    KT_CHECK(dst.num_experts == src.num_experts && a.rows == b.rows && a.cols == b.cols && a.format == b.format &&
                 a.group_size == b.group_size,
             "copy: expected experts of the same sizes, weight format and group size");
  }
  py::gil_scoped_release release;
  for (int expert = 0; expert < dst.num_experts; ++expert)
    for (const Projection p : {kGate, kUp, kDown}) copy_matrix(dst.matrix(expert, p), src.matrix(expert, p));
}

void unpack(const PackedHandle& packed, int expert, int projection, const py::object& out) {
  const PackedMatrix m = checked_matrix(packed.weights(), expert, projection);
  float* data = tensor<float>(out, "out", {Dtype::f32}, {m.rows, m.cols});
  py::gil_scoped_release release;
  unpack_matrix(m, data);
}

void product(const PackedHandle& packed, int expert, int projection, bool transposed, const py::object& act,
             const py::object& out) {
  const PackedMatrix m = checked_matrix(packed.weights(), expert, projection);
  const Tensor left(act, "act");
  const Tensor::Shape shape = left.shape();
  KT_CHECK(shape.size() == 2, "act: expected two dimensions, got ", dims(shape));
  const uint16_t* act_data = left.data<uint16_t>({Dtype::bf16}, {shape[0], transposed ? m.rows : m.cols});
  float* out_data = tensor<float>(out, "out", {Dtype::f32}, {shape[0], transposed ? m.cols : m.rows});
  py::gil_scoped_release release;
  packed_product(m, transposed ? Side::right : Side::left, act_data, shape[0], out_data);
}

void check_int8(const PackedMatrix& m) {
  KT_CHECK(kernels().gemm8 != nullptr, "int8 products: the kernels of ", kernels().name, " have none");
  KT_CHECK(m.format == Format::int8 && (m.group_size % kSteps8 == 0 || m.plane_groups(0) == 1),
           "int8 products: expected int8 weights per channel or in groups of a multiple of ", kSteps8,
           ", got groups of ", m.group_size);
}

void product_int8(const PackedHandle& packed, int expert, int projection, bool transposed, const py::object& act,
                  int group, const py::object& out) {
  const PackedMatrix m = checked_matrix(packed.weights(), expert, projection);
  check_int8(m);
  const Tensor left(act, "act");
  const Tensor::Shape shape = left.shape();
  KT_CHECK(shape.size() == 2, "act: expected two dimensions, got ", dims(shape));
  KT_CHECK(group > 0 && group % kSteps8 == 0 && group <= kMaxGroup8, "group: expected a multiple of ", kSteps8,
           " up to ", kMaxGroup8, ", got ", group);
  const uint16_t* act_data = left.data<uint16_t>({Dtype::bf16}, {shape[0], transposed ? m.rows : m.cols});
  float* out_data = tensor<float>(out, "out", {Dtype::f32}, {shape[0], transposed ? m.cols : m.rows});
  py::gil_scoped_release release;
  packed_product8(m, transposed ? Side::right : Side::left, act_data, shape[0], group, out_data);
}

// The value of a key, or null.
py::handle item(const py::dict& dict, const Name& key) { return PyDict_GetItemWithError(dict.ptr(), key.object); }

struct FactorNames {
  Name a, b, grad_a, grad_b;
};

const FactorNames& factor_names(Projection projection) {
  static const FactorNames names[] = {
      {Name("gate_a"), Name("gate_b"), Name("grad_gate_a"), Name("grad_gate_b")},
      {Name("up_a"), Name("up_b"), Name("grad_up_a"), Name("grad_up_b")},
      {Name("down_a"), Name("down_b"), Name("grad_down_a"), Name("grad_down_b")},
  };
  return names[projection];
}

LoraFactors lora_factors(const py::dict& lora, const FactorNames& names, int experts, int in, int out) {
  const py::handle a = item(lora, names.a), b = item(lora, names.b);
  KT_CHECK(bool(a) == bool(b), "lora: expected both or none of ", names.a.text, " and ", names.b.text);
  LoraFactors f;
  if (!a) return f;
  const Tensor first(a, names.a.text);
  const Tensor::Shape shape = first.shape();
  KT_CHECK(shape.size() == 3 && shape[1] >= 1 && shape[1] <= 65536, names.a.text, ": expected shape (E, R, ", in,
           "), got ", dims(shape));
  f.rank = static_cast<int>(shape[1]);
  Dtype dtype;
  f.a = first.data<void>({Dtype::bf16, Dtype::f32}, {experts, f.rank, in}, &dtype);
  f.a_float = dtype == Dtype::f32;
  f.b = tensor<void>(b, names.b.text, {Dtype::bf16, Dtype::f32}, {experts, out, f.rank}, &dtype);
  f.b_float = dtype == Dtype::f32;
  if (const py::handle grad_a = item(lora, names.grad_a), grad_b = item(lora, names.grad_b); grad_a && grad_b) {
    f.grad_a = tensor<float>(grad_a, names.grad_a.text, {Dtype::f32}, {experts, f.rank, in});
    f.grad_b = tensor<float>(grad_b, names.grad_b.text, {Dtype::f32}, {experts, out, f.rank});
  }
  return f;
}

Lora lora_args(const py::dict& dict, const ExpertWeights& w, int64_t T, int64_t K) {
  static const Name scaling("scaling"), x("x"), down_keep("down_keep");
  Lora lora;
  lora.factors[kGate] = lora_factors(dict, factor_names(kGate), w.num_experts, w.hidden, w.intermediate);
  lora.factors[kUp] = lora_factors(dict, factor_names(kUp), w.num_experts, w.hidden, w.intermediate);
  lora.factors[kDown] = lora_factors(dict, factor_names(kDown), w.num_experts, w.intermediate, w.hidden);
  if (const py::handle value = item(dict, scaling)) lora.scaling = value.cast<float>();
  if (const py::handle value = item(dict, x)) lora.x = tensor<uint16_t>(value, "lora x", {Dtype::bf16}, {T, w.hidden});
  if (const py::handle value = item(dict, down_keep)) {
    lora.down_keep = tensor<uint8_t>(value, "down_keep", {Dtype::u8}, {T, K, w.intermediate});
    lora.keep_scale = dict["keep_scale"].cast<float>();
  }
  return lora;
}

LayerCall layer_call(const ExpertWeights& w, const Tensor& x, const Tensor& ids, const Tensor& weights,
                     const py::dict& lora, const py::object& gate_up, bool int8) {
  const Tensor::Shape shape = ids.shape();
  KT_CHECK(shape.size() == 2 && shape[1] >= 1, "topk_ids: expected shape (T, K), got ", dims(shape));
  const int64_t T = shape[0], K = shape[1], D = w.hidden, F = w.intermediate;
  KT_CHECK(T * K < (int64_t{1} << 31), "topk_ids: at most 2^31 - 1 routed rows in one call, got ", T * K);
  LayerCall c{};
  if (int8)
    for (Projection p : {kGate, kUp, kDown}) check_int8(w.matrix(0, p));
  c.compute = int8 ? Compute::int8 : Compute::bf16;
  c.tokens = T, c.top_k = static_cast<int>(K);
  c.x = x.data<uint16_t>({Dtype::bf16}, {T, D});
  c.ids = ids.data<int64_t>({Dtype::i64}, {T, K});
  c.weights = weights.data<float>({Dtype::f32}, {T, K});
  static const Name share("share");  // other processes compute the slots of id -1
  const int64_t lowest = item(lora, share) ? -1 : 0;
  for (int64_t i = 0; i < T * K; ++i)
    KT_CHECK(c.ids[i] >= lowest && c.ids[i] < w.num_experts, "topk_ids: expected expert ids 0 to ", w.num_experts - 1,
             ", got ", c.ids[i], " for token ", i / K);
  if (!lora.empty()) c.lora = lora_args(lora, w, T, K);
  if (!gate_up.is_none()) {
    c.gate = tensor<uint16_t>(gate_up, "saved gate and up", {Dtype::bf16}, {2, T * K, F});
    c.up = c.gate + T * K * F;
  }
  static const Name low_rank("low_rank");
  if (const py::handle value = item(lora, low_rank))
    c.low_rank = tensor<uint16_t>(value, "saved low_rank", {Dtype::bf16}, {T * K, c.lora.input_rank()});
  return c;
}

// A result of its own in bf16, or None if the tensors are not as the kernels take them or x has more numbers than
// `most`. One call of what every token passes, whose lines have left the caches since the one before.
py::object few_tokens(const PackedHandle& packed, const py::object& x, const py::object& ids, const py::object& weights,
                      int64_t most) {
  const Tensor x_tensor(x, "hidden_states"), ids_tensor(ids, "topk_ids"), weights_tensor(weights, "topk_weights");
  if (!x_tensor.is(Dtype::bf16) || x_tensor.elements() > most || !ids_tensor.is(Dtype::i64) ||
      !weights_tensor.is(Dtype::f32))
    return py::none();
  const ExpertWeights& w = packed.weights();
  LayerCall call;
  try {
    call = layer_call(w, x_tensor, ids_tensor, weights_tensor, py::dict(), py::none(), false);
  } catch (const std::invalid_argument&) {
    return py::none();
  }
  const py::object out = py::reinterpret_steal<py::object>(PyObject_CallOneArg(Torch::get().empty_like.ptr(), x.ptr()));
  if (!out) throw py::error_already_set();
  LayerOutput output{};
  output.bf16 = tensor<uint16_t>(out, "out", {Dtype::bf16}, {call.tokens, w.hidden});
  {
    py::gil_scoped_release release;
    experts_forward(w, call, output);
  }
  return out;
}

void forward(const PackedHandle& packed, const py::object& x, const py::object& ids, const py::object& weights,
             const py::dict& lora, const py::object& gate_up, bool int8, const py::object& out) {
  const ExpertWeights& w = packed.weights();
  const LayerCall call = layer_call(w, Tensor(x, "hidden_states"), Tensor(ids, "topk_ids"),
                                    Tensor(weights, "topk_weights"), lora, gate_up, int8);
  Dtype dtype;
  void* out_data = tensor<void>(out, "out", {Dtype::f32, Dtype::bf16}, {call.tokens, w.hidden}, &dtype);
  LayerOutput output{};
  if (dtype == Dtype::bf16) {
    output.bf16 = static_cast<uint16_t*>(out_data);
  } else {
    output.f32 = static_cast<float*>(out_data);
  }
  py::gil_scoped_release release;
  experts_forward(w, call, output);
}

void backward(const PackedHandle& packed, const py::object& x, const py::object& ids, const py::object& weights,
              const py::dict& lora, const py::object& gate_up, bool int8, bool int8_gradients,
              const py::object& grad_out, const py::object& grad_x, const py::object& grad_lora_x,
              const py::object& grad_weights) {
  const ExpertWeights& w = packed.weights();
  KT_CHECK(int8 || !int8_gradients, "gradients: int8 products need int8 products in forward, too");
  LayerCall call = layer_call(w, Tensor(x, "hidden_states"), Tensor(ids, "topk_ids"), Tensor(weights, "topk_weights"),
                              lora, gate_up, int8);
  call.gradient_compute = int8_gradients ? Compute::int8 : Compute::bf16;
  const int64_t T = call.tokens, D = w.hidden;
  LayerGrads g{};
  g.grad_out = tensor<uint16_t>(grad_out, "grad_out", {Dtype::bf16}, {T, D});
  g.grad_x = tensor<float>(grad_x, "grad_x", {Dtype::f32}, {T, D});
  if (call.lora.x != nullptr) g.grad_lora_x = tensor<float>(grad_lora_x, "grad_lora_x", {Dtype::f32}, {T, D});
  g.grad_weights = tensor<float>(grad_weights, "grad_weights", {Dtype::f32}, {T, call.top_k});
  for (const LoraFactors& f : call.lora.factors)
    KT_CHECK(f.rank == 0 || (f.grad_a != nullptr && f.grad_b != nullptr),
             "lora: backward needs grad_* buffers for every factor");
  py::gil_scoped_release release;
  experts_backward(w, call, g);
}

// Operations per second of all threads on registers only.
double peak_rate(double (*peak)(int64_t), int64_t iterations) {
  py::gil_scoped_release release;
  const int threads = num_threads();
  std::vector<double> done(threads);
  const auto start = std::chrono::steady_clock::now();
  parallel_for(threads, [&](int64_t task, int) { done[task] = peak(iterations); });
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  double total = 0;
  for (double d : done) total += d;
  return total / seconds.count();
}

double peak_flops(int64_t iterations) { return peak_rate(kernels().peak, iterations); }

double peak_int8(int64_t iterations) {
  KT_CHECK(kernels().peak_int8 != nullptr, "peak_int8: the kernels of ", kernels().name, " have no int8 products");
  return peak_rate(kernels().peak_int8, iterations);
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
  m.def(
      "set_num_threads",
      [](int threads) {
        py::gil_scoped_release release;
        Workspace between_calls;  // a running call has buffers for the threads it began with
        set_num_threads(threads);
      },
      py::arg("threads"));
  m.def("nodes", [] { return nodes().cpus; }, "the CPUs of each NUMA node that the work is split over");
  m.def(
      "set_nodes",
      [](const std::vector<std::vector<int>>& cpus) {
        py::gil_scoped_release release;
        Workspace between_calls;  // a running call has cut its work for the nodes it began with
        set_nodes(cpus);
      },
      py::arg("cpus"));
  m.def("peak_flops", peak_flops, py::arg("iterations"), "measured multiply-add rate of all threads, from registers");
  m.def("peak_int8", peak_int8, py::arg("iterations"), "the same of int8 multiply-adds");
  m.def("computes_int8", [] { return kernels().gemm8 != nullptr; });
  py::class_<ReadProbe>(m, "ReadProbe", "memory for every thread, to measure the rate at which they read it")
      .def(py::init<int64_t, bool>(), py::arg("bytes_per_thread"), py::arg("huge_pages"))
      .def("best", &ReadProbe::best, py::arg("passes"), py::call_guard<py::gil_scoped_release>(),
           "bytes per second that all threads read together, at the best prefetch distance")
      .def("read", &ReadProbe::read, py::arg("passes"), py::call_guard<py::gil_scoped_release>(),
           "the same at the distance that best found");
  m.def("workspace_bytes", Workspace::capacity);
  m.def("set_workspace_poison", Workspace::set_poison, py::arg("on"));
  m.def("packed_bytes", [](int experts, int hidden, int intermediate, const Layout& layout) {
    return experts * expert_weights(experts, hidden, intermediate, layout).expert_bytes();
  });
  m.def("sort_by_expert", [](const py::object& ids, int experts, const py::object& counts, const py::object& order) {
    const auto slots = ids.attr("numel")().cast<int64_t>();
    const int64_t* data = tensor<int64_t>(ids, "ids", {Dtype::i64}, {slots});
    for (int64_t i = 0; i < slots; ++i)
      KT_CHECK(data[i] >= 0 && data[i] < experts, "ids: expected expert ids 0 to ", experts - 1, ", got ", data[i]);
    sort_by_expert(data, slots, experts, tensor<int32_t>(counts, "counts", {Dtype::i32}, {experts}),
                   tensor<int32_t>(order, "order", {Dtype::i32}, {slots}));
  });
  py::class_<PackedHandle>(m, "PackedHandle", "The packed experts of one layer, as the calls below take them first")
      .def(py::init<py::object, int, int, int, Layout>(), py::arg("storage"), py::arg("experts"), py::arg("hidden"),
           py::arg("intermediate"), py::arg("layout"))
      .def("set_activation", &PackedHandle::set_activation, py::arg("kind"), py::arg("alpha"), py::arg("limit"))
      .def("set_biases", &PackedHandle::set_biases, py::arg("gate"), py::arg("up"), py::arg("down"),
           "fp32 (E, F), (E, F) and (E, D), read where they lie");
  m.def("wish_huge_pages", wish_huge_pages, "transparent huge pages, or none, for a fresh CPU tensor");
  m.def("map_file_over", map_file, "exchange the mapped memory of a tensor for a file of the same contents");
  m.def("pack", pack);
  m.def("pack_codes", pack_quantised, "codes and scale planes as they are: csrc/kernels/pack.h");
  m.def("copy", copy, "the bytes of other experts of the same kind, by the threads of the nodes that own them");
  m.def("unpack", unpack);
  m.def("product", product, "out = act W^T, or act W if transposed; W is one projection of one expert");
  m.def("product_int8", product_int8,
        "the same in native int8: act, or act times the scales of W's rows, quantised per row and group of columns");
  m.def("few_tokens", few_tokens);
  m.def("forward", forward);
  m.def("backward", backward);
}
