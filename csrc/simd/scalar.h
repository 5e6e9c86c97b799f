// The portable trait: one lane. The baseline of every target, and the path for double.
#pragma once

namespace slimkern {
namespace {

template <class T>
struct Scalar {
  using Acc = T;
  using Vec = T;
  static constexpr int kWidth = 1;
  static constexpr int kMr = 4;       // register tile: kMr rows ...
  static constexpr int kVectors = 4;  // ... of kVectors vectors

  static Vec zero() { return T(0); }
  static Vec load(const T* p) { return *p; }
  static void store(T* p, Vec v) { *p = v; }
  static Vec broadcast(const T* p) { return *p; }
  static Vec fmadd(Vec a, Vec b, Vec c) { return a * b + c; }
};

}  // namespace
}  // namespace slimkern
