// Random blocks, masks, strides and threads through the fused blocks of every instruction set and
// math, in buffers of exactly the size that is needed: built with sanitizers, one element too far
// is an error. Results are compared with loops in double; odd values and damaged packs must not do
// harm. Arguments: seconds to run, seed.
#include <chrono>
#include <stdexcept>

#include "fused_exact.h"

namespace {

void fail(const char* what, const PackSpec& s, int64_t B, int64_t T, double got, double want) {
  std::fprintf(stderr,
               "FAILED: %s, isa %s, math %d, kind %d, %lld x %lld x %lld, heads %lld of %lld x "
               "%lld, channels %lld, got %.9g, want %.9g\n",
               what, isa_name(active_isa()), static_cast<int>(s.math), static_cast<int>(s.kind),
               static_cast<long long>(B), static_cast<long long>(T),
               static_cast<long long>(s.hidden), static_cast<long long>(s.heads),
               static_cast<long long>(s.kv_heads), static_cast<long long>(s.head_dim),
               static_cast<long long>(s.channels), got, want);
  std::exit(1);
}

// One call in scratch of exactly the size it asks for.
void run(const Model& m, const Hidden& rows, const Masks& masks, int threads) {
  const PackView view{m.memory->data(), m.memory->size()};
  const PackKind kind = static_cast<PackKind>(m.spec.kind);
  const bool attends = kind == PackKind::kAttention || kind == PackKind::kEncoderLayer;
  const int64_t M = rows.B * rows.T;
  const int64_t bytes = kind == PackKind::kLinear ? packed_linear_scratch(view, M, threads)
                        : attends ? layer_scratch(view, rows.B, rows.T, threads)
                                  : ffn_scratch(view, M, threads);
  const Memory memory(bytes, pick(0, 63));
  const Scratch scratch{memory.data(), bytes};
  if (kind == PackKind::kLinear) packed_linear(view, rows, m.spec.out, threads, scratch);
  if (kind == PackKind::kFfn) ffn(view, rows, threads, scratch);
  if (attends) layer(view, rows, masks.mask, masks.bias, threads, scratch);
}

struct Call {
  int64_t B, T;
  Block x, out;
  Hidden rows;
  std::unique_ptr<Masks> masks;
};

Call make_call(const Model& m, Special special) {
  const bool linear = m.spec.kind == static_cast<int64_t>(PackKind::kLinear);
  const int64_t in = linear ? m.spec.in : m.spec.hidden, out = linear ? m.spec.out : in;
  static const int64_t kLengths[] = {0, 1, 3, 13, 16, 40, 97, 140};
  const int64_t B = pick(0, 4), T = kLengths[pick(0, 7)];
  const DType dtype = pick(0, 1) ? DType::kFloat32 : DType::kBFloat16;
  Call c{B, T, Block(dtype, B * T, in, 1, special), Block(dtype, B * T, out), {}, {}};
  c.out.stride = out;
  c.out.start = 0;
  c.out.bytes.assign(B * T * out * c.out.item(), '\xff');
  c.rows = {dtype, c.x.data(), T * c.x.stride, c.x.stride, B, T, in, c.out.data()};
  c.masks = make_masks(m.spec, B, T);
  return c;
}

void try_block(PackKind kind, int64_t math) {
  const Model m = make_model(kind, math);
  Call c = make_call(m, Special::kNone);
  const bool attends = kind == PackKind::kAttention || kind == PackKind::kEncoderLayer;
  run(m, c.rows, *c.masks, static_cast<int>(pick(1, 3)));
  const bool low = math == static_cast<int64_t>(Math::kBf16) || c.x.dtype == DType::kBFloat16;
  const double bound = low ? 0.15 : 1e-4;  // of rows whose entries are about one
  const int64_t sample = c.B > 0 ? pick(0, c.B - 1) : -1;
  for (int64_t b = 0; b < c.B; ++b) {
    const int64_t length = attends ? c.masks->length(b) : c.T;
    for (int64_t t = length; t < c.T; ++t) {
      for (int64_t j = 0; j < c.out.cols; ++j) {
        if (c.out.get(b * c.T + t, j) != 0) fail("padding", m.spec, c.B, c.T, 1, 0);
      }
    }
    if (b != sample) continue;
    std::vector<Vector> x(length, Vector(c.x.cols));
    for (int64_t t = 0; t < length; ++t) {
      for (int64_t j = 0; j < c.x.cols; ++j) x[t][j] = c.x.get(b * c.T + t, j);
    }
    const std::vector<Vector> want = exact(m, x, b, *c.masks);
    for (int64_t t = 0; t < length; ++t) {
      double size = 1;
      for (const double v : want[t]) size = std::max(size, std::fabs(v));
      for (int64_t j = 0; j < c.out.cols; ++j) {
        const double got = c.out.get(b * c.T + t, j);
        if (!(std::fabs(got - want[t][j]) <= bound * size)) {
          fail("value", m.spec, c.B, c.T, got, want[t][j]);
        }
      }
    }
  }
}

// NaN, infinities and the like; and packs of which one byte is another.
void try_harm(PackKind kind, int64_t math) {
  const Model m = make_model(kind, math);
  const Call odd = make_call(m, Special::kAll);
  run(m, odd.rows, *odd.masks, static_cast<int>(pick(1, 3)));
  const Call c = make_call(m, Special::kNone);
  m.memory->data()[pick(0, sizeof(PackSpec) - 1)] ^= static_cast<char>(1 << pick(0, 7));
  try {
    run(m, c.rows, *c.masks, 1);
  } catch (const std::invalid_argument&) {
  }
}

// Several layers in one call, in scratch of exactly the size it asks for, are bit by bit the layers
// one after the other.
void try_layers(int64_t math) {
  const Model models[] = {make_model(PackKind::kEncoderLayer, math),
                          make_model(PackKind::kEncoderLayer, math),
                          make_model(PackKind::kAttention, math)};
  const Call c = make_call(models[0], pick(0, 1) ? Special::kNone : Special::kAll);
  Mask mask = c.masks->mask;
  std::vector<PackView> packs;
  for (const Model& m : models) {
    if (m.spec.hidden == models[0].spec.hidden) packs.push_back({m.memory->data(), m.memory->size()});
  }
  if (packs.size() == 1) packs.push_back(packs[0]);
  const PackList list{packs.data(), static_cast<int64_t>(packs.size())};
  const int threads = static_cast<int>(pick(1, 3));
  const int64_t bytes = layers_scratch(list, c.rows, threads);
  const Memory memory(bytes, pick(0, 63));
  layers(list, c.rows, mask, {}, threads, {memory.data(), bytes});

  const int64_t size = c.rows.B * c.rows.T * c.rows.hidden * c.out.item();
  Hidden at = c.rows;
  std::vector<Memory> between;
  for (const PackView& pack : packs) {
    between.emplace_back(size);
    at.out = between.back().data();
    const int64_t own = layer_scratch(pack, at.B, at.T, threads);
    const Memory scratch(own);
    layer(pack, at, mask, {}, threads, {scratch.data(), own});
    at.x = at.out;
    at.row_stride = at.hidden;
    at.batch_stride = at.T * at.hidden;
  }
  if (size > 0 && std::memcmp(at.out, c.rows.out, size) != 0) {
    fail("layers", models[0].spec, c.B, c.T, 0, 0);
  }
}

template <class F>
void must_refuse(const char* what, const Model& m, const F& f) {
  try {
    f();
  } catch (const std::invalid_argument&) {
    return;
  }
  fail(what, m.spec, 0, 0, 0, 0);
}

void try_refusals(int64_t math) {
  const Model m = make_model(PackKind::kEncoderLayer, math);
  Call c = make_call(m, Special::kNone);
  const PackView view{m.memory->data(), m.memory->size()};
  const int64_t bytes = layer_scratch(view, c.B, c.T, 2);
  must_refuse("small scratch", m, [&] {
    layer(view, c.rows, c.masks->mask, c.masks->bias, 2, {nullptr, bytes - 1});
  });
  must_refuse("short pack", m, [&] { layer_scratch({view.data, view.bytes - 64}, 1, 1, 1); });
  must_refuse("moved pack", m, [&] {
    const Memory moved(view.bytes, 4);
    std::memcpy(moved.data(), view.data, view.bytes);
    layer_scratch({moved.data(), view.bytes}, 1, 1, 1);
  });
  must_refuse("another kind", m, [&] { ffn_scratch(view, 1, 1); });
  must_refuse("no layer", m, [&] { layers({}, c.rows, c.masks->mask, {}, 2, {nullptr, 0}); });
  must_refuse("small scratch of layers", m, [&] {
    const int64_t needed = layers_scratch({&view, 1}, c.rows, 2);
    layers({&view, 1}, c.rows, c.masks->mask, {}, 2, {nullptr, needed - 1});
  });
  if (c.B == 0 || c.T == 0) return;
  std::vector<int64_t> lengths(c.B, c.T);
  lengths[pick(0, c.B - 1)] = pick(0, 1) ? -1 : c.T + 1;
  const Memory memory(bytes);
  must_refuse("a length out of range", m, [&] {
    layer(view, c.rows, {MaskKind::kLengths, lengths.data(), 1, 0}, {}, 2, {memory.data(), bytes});
  });
}

}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 5;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  rng.seed(seed);
  const auto start = std::chrono::steady_clock::now();
  int64_t rounds = 0;
  double spent = 0;
  do {
    for (int i = 0; i < kIsaCount; ++i) {
      if (!set_active_isa(static_cast<Isa>(i))) continue;
      for (int64_t math = 0; math < kMathCount; ++math) {
        if (!has_math(active_table(), math)) continue;
        for (int kind = 0; kind < kPackKinds; ++kind) {
          try_block(static_cast<PackKind>(kind), math);
          try_harm(static_cast<PackKind>(kind), math);
        }
        try_layers(math);
        try_refusals(math);
      }
    }
    ++rounds;
    spent = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  } while (spent < seconds);
  std::printf("fuzz_fused: %lld rounds, seed %llu, best isa %s: clean\n",
              static_cast<long long>(rounds), static_cast<unsigned long long>(seed),
              isa_name(active_isa()));
}
