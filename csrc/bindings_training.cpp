// Python's view of the operations that training is made of.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "bindings.h"
#include "indexed.h"
#include "plain_linear.h"
#include "training_rows.h"

namespace py = pybind11;

namespace slimkern {
namespace {

void py_gemm(const PyMat& a, const PyMat& b, const PyMat& c, const PyVec& bias, int64_t M,
             int64_t N, int64_t K, int threads, int64_t scratch, int64_t scratch_size) {
  const GemmArgs args{mat(a), mat(b), mat(c), vec(bias), M, N, K};
  const GemmExtents extents{extent(a), extent(b), extent(c), bias[3]};
  gemm(args, extents, threads, static_cast<double*>(address(scratch)), scratch_size);
}

void py_column_sum(int dtype, const PyMat& a, int64_t rows, int64_t cols, const PyVec& out,
                   int threads) {
  column_sum(static_cast<DType>(dtype), mat(a), rows, cols, vec(out), out[3], threads);
}

// dtype, math, M, N, K
using PyCall = std::array<int64_t, 5>;
// address (0: everything is kept), rows, bytes of a row, block, weight
using PyBits = std::array<int64_t, 7>;

BlockBits block_bits(const PyBits& v) {
  return {static_cast<const uint8_t*>(address(v[0])), v[1], v[2], v[3], v[4], v[5], v[6]};
}

PlainLinear plain_linear_of(const PyCall& call, const PyRows& x, const PyMat& w, const PyVec& bias,
                            const PyBits& kept, bool turned, int64_t y) {
  return {static_cast<DType>(call[0]), static_cast<Math>(call[1]), call[2], call[3], call[4],
          address(x[0]), x[1], mat(w), extent(w), vec(bias), bias[3], block_bits(kept), turned,
          address(y)};
}

PlainGradient plain_gradient_of(const PyCall& call, const PyRows& dy, const PyRows& x,
                                const PyMat& dw, const PyBits& kept) {
  return {static_cast<DType>(call[0]), static_cast<Math>(call[1]), call[2], call[3], call[4],
          address(dy[0]), dy[1], address(x[0]), x[1], mat(dw), extent(dw), block_bits(kept)};
}

int64_t py_plain_linear_scratch(const PyCall& call, const PyRows& x, const PyMat& w,
                                const PyVec& bias, const PyBits& kept, bool turned, int64_t y,
                                int threads) {
  return plain_linear_scratch(plain_linear_of(call, x, w, bias, kept, turned, y), threads);
}

void py_plain_linear(const PyCall& call, const PyRows& x, const PyMat& w, const PyVec& bias,
                     const PyBits& kept, bool turned, int64_t y, int threads,
                     const PyMemory& scratch) {
  plain_linear(plain_linear_of(call, x, w, bias, kept, turned, y), threads, scratch_of(scratch));
}

int64_t py_plain_gradient_scratch(const PyCall& call, const PyRows& dy, const PyRows& x,
                                  const PyMat& dw, const PyBits& kept, int threads) {
  return plain_gradient_scratch(plain_gradient_of(call, dy, x, dw, kept), threads);
}

void py_plain_gradient(const PyCall& call, const PyRows& dy, const PyRows& x, const PyMat& dw,
                       const PyBits& kept, int threads, const PyMemory& scratch) {
  plain_gradient(plain_gradient_of(call, dy, x, dw, kept), threads, scratch_of(scratch));
}

RowsOf rows_of(const PyRows& v) { return {address(v[0]), v[1]}; }

void py_activate(int dtype, int a, const PyRows& x, const PyRows& out, int64_t rows, int64_t cols,
                 int threads) {
  activate(static_cast<DType>(dtype), static_cast<Activation>(a), rows_of(x), rows_of(out), rows,
           cols, threads);
}

// grad, x, dx, value; the sums
void py_activation_grad(int dtype, int a, const std::array<PyRows, 4>& v, int64_t sums,
                        int64_t rows, int64_t cols, int threads, int64_t scratch,
                        int64_t scratch_size) {
  const ActivationGrad at{rows_of(v[0]), rows_of(v[1]), rows_of(v[2]), rows_of(v[3]), nullptr};
  activation_grad(static_cast<DType>(dtype), static_cast<Activation>(a), at,
                  static_cast<float*>(address(sums)), rows, cols, threads,
                  static_cast<float*>(address(scratch)), scratch_size);
}

// x, residual, out, sum; address of the stats, gamma, beta
void py_norm_forward(int x_type, int dtype, const std::array<PyRows, 4>& v,
                     const std::array<int64_t, 3>& floats, float eps, int64_t rows, int64_t cols,
                     int threads) {
  const auto at = [&](int i) { return static_cast<float*>(address(floats[i])); };
  const NormForward args{rows_of(v[0]), rows_of(v[1]), rows_of(v[2]), rows_of(v[3]),
                         at(0),         at(1),         at(2),         eps};
  norm_forward(static_cast<DType>(x_type), static_cast<DType>(dtype), args, rows, cols, threads);
}

// grad, sum, to_residual, to_x; address of the stats, gamma, sums; scratch and its size
void py_norm_grad(int x_type, int dtype, const std::array<PyRows, 4>& v,
                  const std::array<int64_t, 3>& floats, int64_t rows, int64_t cols, int threads,
                  int64_t scratch, int64_t scratch_size) {
  const auto at = [&](int i) { return static_cast<float*>(address(floats[i])); };
  const NormGrad args{rows_of(v[0]), rows_of(v[1]), rows_of(v[2]), rows_of(v[3]), at(0), at(1)};
  norm_grad(static_cast<DType>(x_type), static_cast<DType>(dtype), args, at(2), rows, cols, threads,
            static_cast<float*>(address(scratch)), scratch_size);
}

// Address of the seed (int64), which is read here.
void py_drop(int dtype, int64_t seed, uint32_t threshold, float scale, int64_t x, int64_t out,
             int64_t count, int threads) {
  const Dropout by{*static_cast<const uint64_t*>(address(seed)), threshold, scale};
  drop(static_cast<DType>(dtype), by, address(x), address(out), count, threads);
}

bool py_zero_columns(int bits, const PyRows& w, int64_t rows, int64_t cols, int64_t dead,
                     int threads) {
  return zero_columns(bits, address(w[0]), w[1], rows, cols, address(dead), threads);
}

}  // namespace

void bind_training(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> no_gil;
  m.def("gemm_scratch", &gemm_scratch);
  m.def("gemm", &py_gemm, no_gil);
  m.def("column_sum", &py_column_sum, no_gil);
  m.def("plain_linear_scratch", &py_plain_linear_scratch);
  m.def("plain_linear", &py_plain_linear, no_gil);
  m.def("plain_gradient_scratch", &py_plain_gradient_scratch);
  m.def("plain_gradient", &py_plain_gradient, no_gil);
  m.def("activate", &py_activate, no_gil);
  m.def("activation_grad", &py_activation_grad, no_gil);
  m.def("row_sums_scratch", &row_sums_scratch);
  m.def("norm_forward", &py_norm_forward, no_gil);
  m.def("norm_grad", &py_norm_grad, no_gil);
  m.def("drop", &py_drop, no_gil);
  m.def("zero_columns", &py_zero_columns, no_gil);
}

}  // namespace slimkern
