// Random fused blocks: their weights and masks in memory of exactly the size that is needed, and
// what they compute, in double.
#pragma once

#include <algorithm>
#include <memory>

#include "fused.h"
#include "packed.h"
#include "row_blocks.h"

using Vector = std::vector<double>;

// Memory of exactly so many bytes, all ones, at a multiple of kLinearAlignment plus `offset`.
class Memory {
 public:
  explicit Memory(int64_t bytes, int64_t offset = 0)
      : bytes_(bytes), offset_(offset),
        data_(static_cast<char*>(std::aligned_alloc(64, (bytes + offset + 63) / 64 * 64))) {
    std::memset(data_.get(), 0xff, bytes + offset);
  }
  char* data() const { return data_.get() + offset_; }
  int64_t size() const { return bytes_; }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  int64_t bytes_, offset_;
  std::unique_ptr<char, Free> data_;
};

struct Linear {
  int64_t N, K;
  Vector w, b;
};

inline Vector multiply(const Vector& x, const Linear& l) {
  Vector y(l.b);
  for (int64_t n = 0; n < l.N; ++n) {
    for (int64_t k = 0; k < l.K; ++k) y[n] += x[k] * l.w[n * l.K + k];
  }
  return y;
}

// Draws a linear, rounded to float, and packs it.
inline Linear pack(const Memory& memory, Slot slot, int64_t N, int64_t K) {
  Block w(DType::kFloat32, N, K, 1 / std::sqrt(K + 1.0)), b(DType::kFloat32, 1, N, 0.1);
  const bool shifted = pick(0, 3) > 0;
  const VecView bias{shifted ? b.data() : nullptr, 1, nullptr};
  pack_linear(memory.data(), memory.size(), slot, DType::kFloat32, {w.data(), w.stride, 1}, bias,
              N, K);
  Linear l{N, K, Vector(N * K), Vector(N, 0.0)};
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t k = 0; k < K; ++k) l.w[n * K + k] = w.get(n, k);
    if (shifted) l.b[n] = b.get(0, n);
  }
  return l;
}

struct Model {
  PackSpec spec;
  std::unique_ptr<Memory> memory;
  Linear linear[kSlots];

  Vector norm(NormSlot slot, Vector x) const {
    const int i = static_cast<int>(slot);
    const Norm kind = static_cast<Norm>(spec.norm[i]);
    if (kind == Norm::kNone) return x;
    double mean = 0, square = 0;
    for (const double v : x) mean += kind == Norm::kLayer ? v / x.size() : 0;
    for (const double v : x) square += (v - mean) * (v - mean) / x.size();
    for (double& v : x) v = (v - mean) / std::sqrt(square + spec.eps[i]);
    return x;
  }
  const Linear& at(Slot slot) const { return linear[static_cast<int>(slot)]; }
};

constexpr int64_t kWidths[] = {1, 2, 5, 8, 16, 17, 31, 33, 48, 63, 65};
inline int64_t width() { return kWidths[pick(0, 10)]; }

inline Model make_model(PackKind kind, int64_t math) {
  Model m;
  PackSpec& s = m.spec;
  s.kind = static_cast<int64_t>(kind);
  s.math = math;
  const bool attends = kind == PackKind::kAttention || kind == PackKind::kEncoderLayer;
  const bool feeds = kind == PackKind::kFfn || kind == PackKind::kEncoderLayer;
  if (kind == PackKind::kLinear) {
    s.in = width();
    s.out = width();
  } else {
    s.hidden = width();
  }
  if (attends) {
    s.kv_heads = pick(0, 2);
    s.heads = s.kv_heads * pick(1, 3);
    s.head_dim = pick(0, 9) == 0 ? pick(64, 256) : width();
    s.causal = pick(0, 3) == 0;
    s.attention_residual = pick(0, 1);
    s.scale = 1 / std::sqrt(s.head_dim);
  }
  if (feeds) {
    s.channels = pick(0, 9) == 0 ? 0 : pick(0, 9) == 0 ? 800 : width();
    s.gated = pick(0, 1);
    s.activation = pick(0, kActivationCount - 1);
    s.ffn_residual = pick(0, 1);
  }
  for (int i = 0; i < kNormSlots; ++i) {
    s.norm[i] = (i < 2 ? attends : feeds) ? pick(0, 2) : 0;
    s.eps[i] = 0.01;
  }
  m.memory = std::make_unique<Memory>(pack_bytes(s));
  pack_begin(s, m.memory->data(), m.memory->size());
  const auto add = [&](Slot slot, int64_t N, int64_t K) {
    m.linear[static_cast<int>(slot)] = pack(*m.memory, slot, N, K);
  };
  if (kind == PackKind::kLinear) add(Slot::kLinear, s.out, s.in);
  if (attends) {
    add(Slot::kQkv, (s.heads + 2 * s.kv_heads) * s.head_dim, s.hidden);
    add(Slot::kProjection, s.hidden, s.heads * s.head_dim);
  }
  if (feeds) {
    add(Slot::kGate, s.channels, s.hidden);
    if (s.gated) add(Slot::kUp, s.channels, s.hidden);
    add(Slot::kDown, s.hidden, s.channels);
  }
  return m;
}

inline Vector add(Vector x, const Vector& y) {
  for (size_t i = 0; i < x.size(); ++i) x[i] += y[i];
  return x;
}

inline Vector ffn_exact(const Model& m, const Vector& x) {
  const Vector pre = m.norm(NormSlot::kFfnPre, x);
  Vector mid = multiply(pre, m.at(Slot::kGate));
  for (double& v : mid) v = activation_exact(static_cast<Activation>(m.spec.activation), v);
  if (m.spec.gated) {
    const Vector up = multiply(pre, m.at(Slot::kUp));
    for (size_t i = 0; i < mid.size(); ++i) mid[i] *= up[i];
  }
  const Vector y = multiply(mid, m.at(Slot::kDown));
  return m.norm(NormSlot::kFfnPost, m.spec.ffn_residual ? add(y, x) : y);
}

// The masks of a call, and what they say of key k of sequence s.
struct Masks {
  Mask mask;
  HeadBias bias;
  std::vector<int64_t> lengths;
  std::vector<char> keep;
  std::vector<float> added, heads;
  int64_t T;

  double at(const PackSpec& s, int64_t b, int64_t head, int64_t q, int64_t k) const {
    if (s.causal && k > q) return -INFINITY;
    double sum = heads.empty() ? 0 : heads[(head * T + q) * T + k];
    if (mask.kind == MaskKind::kLengths && k >= lengths[b]) return -INFINITY;
    if (mask.kind == MaskKind::kKeep && !keep[b * T + k]) return -INFINITY;
    if (mask.kind == MaskKind::kAdded) {
      if (added[b * T + k] <= kRemoved) return -INFINITY;
      sum += added[b * T + k];
    }
    return sum;
  }
  int64_t length(int64_t b) const {
    if (mask.kind == MaskKind::kNone) return T;
    if (mask.kind == MaskKind::kLengths) return lengths[b];
    int64_t n = T;
    while (n > 0 && (mask.kind == MaskKind::kKeep ? !keep[b * T + n - 1]
                                                  : added[b * T + n - 1] <= kRemoved)) {
      --n;
    }
    return n;
  }
};

inline std::unique_ptr<Masks> make_masks(const PackSpec& s, int64_t B, int64_t T) {
  auto m = std::make_unique<Masks>();
  m->T = T;
  m->mask.kind = static_cast<MaskKind>(pick(0, 3));
  for (int64_t b = 0; b < B; ++b) m->lengths.push_back(pick(0, T));
  for (int64_t i = 0; i < B * T; ++i) {
    m->keep.push_back(pick(0, 2) > 0);
    m->added.push_back(pick(0, 2) > 0 ? draw(1, Special::kNone) : -3.4e38f);
  }
  if (pick(0, 2) == 0) {
    for (int64_t i = 0; i < s.heads * T * T; ++i) m->heads.push_back(draw(1, Special::kNone));
    m->bias = {m->heads.data(), T * T, T, s.heads};
  }
  const void* data[] = {nullptr, m->lengths.data(), m->keep.data(), m->added.data()};
  const bool lengths = m->mask.kind == MaskKind::kLengths;
  m->mask.data = data[static_cast<int>(m->mask.kind)];
  m->mask.row_stride = lengths ? 1 : T;
  m->mask.col_stride = lengths ? 0 : 1;
  return m;
}

// Rows of a sequence after attention, its projection and what follows.
inline std::vector<Vector> attention_exact(const Model& m, const std::vector<Vector>& x, int64_t b,
                                    const Masks& masks) {
  const PackSpec& s = m.spec;
  const int64_t d = s.head_dim, n = static_cast<int64_t>(x.size());
  std::vector<Vector> qkv, out;
  for (const Vector& row : x) {
    qkv.push_back(multiply(m.norm(NormSlot::kAttentionPre, row), m.at(Slot::kQkv)));
  }
  for (int64_t q = 0; q < n; ++q) {
    Vector context(s.heads * d, 0.0);
    for (int64_t h = 0; h < s.heads; ++h) {
      const int64_t key = (s.heads + h / (s.heads / s.kv_heads)) * d, value = key + s.kv_heads * d;
      Vector score(n);
      double largest = -INFINITY, sum = 0;
      for (int64_t k = 0; k < n; ++k) {
        double dot = 0;
        for (int64_t i = 0; i < d; ++i) dot += qkv[q][h * d + i] * qkv[k][key + i];
        score[k] = s.scale * dot + masks.at(s, b, h, q, k);
        largest = std::max(largest, score[k]);
      }
      if (largest == -INFINITY) continue;
      for (double& v : score) sum += v = std::exp(v - largest);
      for (int64_t k = 0; k < n; ++k) {
        for (int64_t i = 0; i < d; ++i) context[h * d + i] += score[k] / sum * qkv[k][value + i];
      }
    }
    const Vector y = multiply(context, m.at(Slot::kProjection));
    out.push_back(m.norm(NormSlot::kAttentionPost, s.attention_residual ? add(y, x[q]) : y));
  }
  return out;
}

inline std::vector<Vector> exact(const Model& m, const std::vector<Vector>& x, int64_t b,
                          const Masks& masks) {
  const PackKind kind = static_cast<PackKind>(m.spec.kind);
  const bool attends = kind == PackKind::kAttention || kind == PackKind::kEncoderLayer;
  std::vector<Vector> rows = attends ? attention_exact(m, x, b, masks) : x;
  for (Vector& row : rows) {
    if (kind == PackKind::kLinear) row = multiply(row, m.at(Slot::kLinear));
    if (kind == PackKind::kFfn || kind == PackKind::kEncoderLayer) row = ffn_exact(m, row);
  }
  return rows;
}
