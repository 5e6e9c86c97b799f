// Addresses and sizes in, nothing of torch: with bindings_training.cpp all that knows Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "embeddings.h"
#include "fused.h"
#include "isa.h"
#include "packed.h"

namespace py = pybind11;

namespace slimkern {
void bind_training(py::module_& m);  // bindings_training.cpp
}  // namespace slimkern

using namespace slimkern;

namespace {

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (isa_table(isa) != nullptr) names.emplace_back(isa_name(isa));
  }
  return names;
}

std::map<std::string, bool> features() {
  std::map<std::string, bool> found;
  for (int i = 0; i < kIsaCount; ++i) {
    found[isa_name(static_cast<Isa>(i))] = isa_detected(static_cast<Isa>(i));
  }
  return found;
}

void set_isa(const std::string& name) {
  for (int i = 0; i < kIsaCount; ++i) {
    if (name == isa_name(static_cast<Isa>(i)) && set_active_isa(static_cast<Isa>(i))) return;
  }
  std::string accepted;
  for (const std::string& available : available_isas()) {
    accepted += (accepted.empty() ? "" : ", ") + available;
  }
  throw std::invalid_argument("isa is '" + name + "'; this machine accepts: " + accepted);
}

std::vector<std::string> maths() {
  constexpr const char* kNames[kMathCount] = {"fp32", "bf16", "bf16x3", "bf16x6"};
  std::vector<std::string> names;
  for (int i = 0; i < kMathCount; ++i) {
    if (has_math(active_table(), i)) names.emplace_back(kNames[i]);
  }
  return names;
}

// kind, math; in, out; hidden; heads, kv_heads, head_dim, causal, residual; channels, gated,
// activation, residual; the four norms
using PySpec = std::array<int64_t, 18>;
// eps of the four norms, scale
using PySpecFloats = std::array<double, 5>;

PackSpec spec(const PySpec& v, const PySpecFloats& f) {
  PackSpec s;
  int i = 0;
  for (int64_t* field :
       {&s.kind, &s.math, &s.in, &s.out, &s.hidden, &s.heads, &s.kv_heads, &s.head_dim, &s.causal,
        &s.attention_residual, &s.channels, &s.gated, &s.activation, &s.ffn_residual}) {
    *field = v[i++];
  }
  for (int64_t& norm : s.norm) norm = v[i++];
  for (int n = 0; n < kNormSlots; ++n) s.eps[n] = f[n];
  s.scale = f[kNormSlots];
  return s;
}

int64_t py_pack_bytes(const PySpec& ints, const PySpecFloats& floats) {
  PackSpec wanted = spec(ints, floats);
  return pack_bytes(wanted);
}

void py_pack_begin(const PySpec& ints, const PySpecFloats& floats, int64_t data, int64_t bytes) {
  pack_begin(spec(ints, floats), address(data), bytes);
}

void py_pack_linear(int64_t data, int64_t bytes, int64_t slot, int dtype, const PyMat& w,
                    const PyVec& bias) {
  pack_linear(address(data), bytes, static_cast<Slot>(slot), static_cast<DType>(dtype), mat(w),
              vec(bias), w[4], w[6]);
}

void py_pack_norm(int64_t data, int64_t bytes, int64_t slot, int dtype, const PyVec& gamma,
                  const PyVec& beta, int64_t hidden) {
  pack_norm(address(data), bytes, static_cast<NormSlot>(slot), static_cast<DType>(dtype),
            vec(gamma), vec(beta), hidden);
}

// dtype, address, batch stride, row stride, B, T, hidden, address of the result
using PyHidden = std::array<int64_t, 8>;
// kind, address, row stride, column stride
using PyMask = std::array<int64_t, 4>;
// address, head stride, row stride, heads
using PyBias = std::array<int64_t, 4>;

PackView pack_view(const PyMemory& v) { return {address(v[0]), v[1]}; }
Hidden hidden(const PyHidden& v) {
  return {static_cast<DType>(v[0]), address(v[1]), v[2], v[3], v[4], v[5], v[6], address(v[7])};
}

void py_packed_linear(const PyMemory& pack, const PyHidden& rows, int64_t N, int threads,
                      const PyMemory& scratch) {
  packed_linear(pack_view(pack), hidden(rows), N, threads, scratch_of(scratch));
}

void py_ffn(const PyMemory& pack, const PyHidden& rows, int threads, const PyMemory& scratch) {
  ffn(pack_view(pack), hidden(rows), threads, scratch_of(scratch));
}

std::vector<PackView> pack_views(const std::vector<PyMemory>& packs) {
  std::vector<PackView> views;
  for (const PyMemory& pack : packs) views.push_back(pack_view(pack));
  return views;
}

PackList list(const std::vector<PackView>& views) {
  return {views.data(), static_cast<int64_t>(views.size())};
}

void py_layers(const std::vector<PyMemory>& packs, const PyHidden& rows, const PyMask& mask,
               const PyBias& bias, int threads, const PyMemory& scratch) {
  const Mask keys{static_cast<MaskKind>(mask[0]), address(mask[1]), mask[2], mask[3]};
  const HeadBias added{static_cast<const float*>(address(bias[0])), bias[1], bias[2],
                       bias[3]};
  const std::vector<PackView> views = pack_views(packs);
  layers(list(views), hidden(rows), keys, added, threads, scratch_of(scratch));
}

// data, rows, row stride, ids, batch stride, token stride, step
using PyTable = std::array<int64_t, 7>;
// dtype, B, T, hidden, gamma, beta, address of the result
using PyEmbedded = std::array<int64_t, 7>;

Embeddings embedded(const std::vector<PyTable>& tables, const PyEmbedded& v, double eps) {
  Embeddings e;
  e.dtype = static_cast<DType>(v[0]);
  e.tables = static_cast<int>(tables.size());
  for (size_t i = 0; i < tables.size() && i < kMostTables; ++i) {
    const PyTable& t = tables[i];
    e.table[i] = {address(t[0]), t[1], t[2], index(t[3]), t[4], t[5], t[6]};
  }
  e.B = v[1], e.T = v[2], e.hidden = v[3];
  e.gamma = static_cast<const float*>(address(v[4]));
  e.beta = static_cast<const float*>(address(v[5]));
  e.eps = static_cast<float>(eps);
  e.out = address(v[6]);
  return e;
}

void numbers(py::module_& m, const char* name, std::initializer_list<const char*> names) {
  py::dict values;
  int i = 0;
  for (const char* key : names) values[key] = i++;
  m.attr(name) = values;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("FLOAT32") = static_cast<int>(DType::kFloat32);
  m.attr("BFLOAT16") = static_cast<int>(DType::kBFloat16);
  m.attr("FLOAT64") = static_cast<int>(DType::kFloat64);
  m.def("isa", [] { return std::string(isa_name(active_isa())); });
  m.def("set_isa", &set_isa);
  m.def("available_isas", &available_isas);
  m.def("features", &features);
  const py::call_guard<py::gil_scoped_release> no_gil;
  bind_training(m);

  // Numbers of the enumerations, in their order.
  numbers(m, "MATHS", {"fp32", "bf16", "bf16x3", "bf16x6"});
  numbers(m, "ACTIVATIONS",
          {"none", "relu", "squared_relu", "gelu", "gelu_tanh", "quick_gelu", "silu"});
  numbers(m, "NORMS", {"none", "layer", "rms"});
  numbers(m, "PACKS", {"linear", "ffn", "attention_block", "encoder_layer"});
  numbers(m, "SLOTS", {"linear", "qkv", "projection", "gate", "up", "down"});
  numbers(m, "NORM_SLOTS", {"attention_pre", "attention_post", "ffn_pre", "ffn_post"});
  numbers(m, "MASKS", {"none", "lengths", "keep", "added"});
  m.attr("REMOVED") = kRemoved;
  m.def("maths", &maths);
  m.def("pack_bytes", &py_pack_bytes);
  m.def("pack_begin", &py_pack_begin);
  m.def("pack_linear", &py_pack_linear, no_gil);
  m.def("pack_norm", &py_pack_norm, no_gil);
  m.def("packed_linear_scratch", [](const PyMemory& pack, int64_t M, int threads) {
    return packed_linear_scratch(pack_view(pack), M, threads);
  });
  m.def("ffn_scratch", [](const PyMemory& pack, int64_t M, int threads) {
    return ffn_scratch(pack_view(pack), M, threads);
  });
  m.def("layers_scratch",
        [](const std::vector<PyMemory>& packs, const PyHidden& rows, int threads) {
          const std::vector<PackView> views = pack_views(packs);
          return layers_scratch(list(views), hidden(rows), threads);
        });
  m.def("packed_linear", &py_packed_linear, no_gil);
  m.def("ffn", &py_ffn, no_gil);
  m.def("layers", &py_layers, no_gil);
  m.def("embeddings_scratch", [](const PyEmbedded& rows, int threads) {
    return embeddings_scratch(embedded({}, rows, 0), threads);
  });
  m.def("embeddings", [](const std::vector<PyTable>& tables, const PyEmbedded& rows, double eps,
                         int threads, const PyMemory& scratch) {
    embeddings(embedded(tables, rows, eps), threads, scratch_of(scratch));
  }, no_gil);
}
