// Addresses and sizes in, nothing of torch: the only file that knows Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "indexed.h"
#include "isa.h"

namespace py = pybind11;
using namespace slimkern;

namespace {

// address, row stride, column stride, row index, rows there, column index, columns there
using PyMat = std::array<int64_t, 7>;
// address, stride, index, entries there
using PyVec = std::array<int64_t, 4>;

void* address(int64_t value) { return reinterpret_cast<void*>(value); }
const int64_t* index(int64_t value) { return reinterpret_cast<const int64_t*>(value); }

MatView mat(const PyMat& v) { return {address(v[0]), v[1], v[2], index(v[3]), index(v[5])}; }
Extent extent(const PyMat& v) { return {v[4], v[6]}; }
VecView vec(const PyVec& v) { return {address(v[0]), v[1], index(v[2])}; }

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

int64_t py_gemm_scratch(int dtype, int64_t M, int64_t N, int64_t K, int threads) {
  return gemm_scratch(static_cast<DType>(dtype), M, N, K, threads);
}

void py_gemm(int dtype, const PyMat& a, const PyMat& b, const PyMat& c, const PyVec& bias,
             int64_t M, int64_t N, int64_t K, int threads, int64_t scratch, int64_t scratch_size) {
  const GemmArgs args{mat(a), mat(b), mat(c), vec(bias), M, N, K};
  const GemmExtents extents{extent(a), extent(b), extent(c), bias[3]};
  gemm(static_cast<DType>(dtype), args, extents, threads, address(scratch), scratch_size);
}

void py_column_sum(int dtype, const PyMat& a, int64_t rows, int64_t cols, const PyVec& out,
                   int threads) {
  column_sum(static_cast<DType>(dtype), mat(a), rows, cols, vec(out), out[3], threads);
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
  m.def("gemm_scratch", &py_gemm_scratch);
  const py::call_guard<py::gil_scoped_release> no_gil;
  m.def("gemm", &py_gemm, no_gil);
  m.def("column_sum", &py_column_sum, no_gil);
}
