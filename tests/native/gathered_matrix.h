// Random matrices, gathered and strided, on memory of exactly the size that they need.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "indexed.h"

namespace slimkern {
namespace {

std::mt19937_64 rng;

int64_t pick(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(rng);
}

int64_t size() {
  static const int64_t kSizes[] = {0, 1, 2, 5, 17, 31, 32, 33, 63, 95, 97, 130, 255, 257, 300};
  return kSizes[pick(0, 14)];
}

struct Matrix {
  DType dtype;
  int64_t rows, cols;  // as they are selected
  std::vector<int64_t> row_index, col_index;
  std::vector<char> bytes;
  MatView view;
  Extent extent;
};

size_t item(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

double read(DType dtype, const void* data, int64_t at) {
  if (dtype == DType::kFloat64) return static_cast<const double*>(data)[at];
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[at];
  return widen(static_cast<const bf16_t*>(data)[at]);
}

void write(DType dtype, void* data, int64_t at, double value) {
  if (dtype == DType::kFloat64) static_cast<double*>(data)[at] = value;
  if (dtype == DType::kFloat32) static_cast<float*>(data)[at] = static_cast<float>(value);
  if (dtype == DType::kBFloat16) static_cast<bf16_t*>(data)[at] = to_bf16(static_cast<float>(value));
}

std::vector<int64_t> subset(int64_t kept, int64_t of) {
  std::vector<int64_t> index;
  for (int64_t i = 0; i < of; ++i) {
    if (pick(0, of - i - 1) < kept - static_cast<int64_t>(index.size())) index.push_back(i);
  }
  return index;
}

// A matrix of which rows x cols are selected; gathered and strided at random.
Matrix matrix(DType dtype, int64_t rows, int64_t cols) {
  Matrix m{dtype, rows, cols, {}, {}, {}, {}, {rows, cols}};
  if (pick(0, 1)) m.row_index = subset(rows, m.extent.rows = rows + pick(0, 20));
  if (pick(0, 1)) m.col_index = subset(cols, m.extent.cols = cols + pick(0, 20));
  const int64_t inner = pick(0, 3) == 0 ? 2 : 1;
  const bool transposed = pick(0, 1);
  const int64_t major = transposed ? m.extent.cols : m.extent.rows;
  const int64_t minor = transposed ? m.extent.rows : m.extent.cols;
  const int64_t pitch = minor * inner + pick(0, 3);
  const int64_t count = major == 0 || minor == 0 ? 0 : (major - 1) * pitch + (minor - 1) * inner + 1;
  m.bytes.resize(count * item(dtype));
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < count; ++i) write(dtype, m.bytes.data(), i, normal(rng));
  m.view = {m.bytes.data(), transposed ? inner : pitch, transposed ? pitch : inner,
            m.row_index.empty() ? nullptr : m.row_index.data(),
            m.col_index.empty() ? nullptr : m.col_index.data()};
  return m;
}

int64_t place(const Matrix& m, int64_t i, int64_t j) {
  const int64_t row = m.view.row_index ? m.view.row_index[i] : i;
  const int64_t col = m.view.col_index ? m.view.col_index[j] : j;
  return row * m.view.row_stride + col * m.view.col_stride;
}

double get(const Matrix& m, int64_t i, int64_t j) {
  return read(m.dtype, m.view.data, place(m, i, j));
}

}  // namespace
}  // namespace slimkern
