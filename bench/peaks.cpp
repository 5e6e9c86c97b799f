// The machine's own peaks: how fast it multiplies and adds in registers, and how fast it reads
// working sets of any size. bench/probe.py compiles this file, loads it with ctypes and chooses.
//
// One file for every processor: what needs an instruction set says so in a target attribute, and
// the caller asks the processor first. Away from x86-64 only the portable kind is left.
// Threads are not pinned: the system places them, as it places those of the runtimes measured.
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "windows.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__x86_64__)
#define PEAKS_X86 1
#include <immintrin.h>
#if defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#define PEAKS_AMX 1
#endif
#define TARGET(name) __attribute__((target(name)))
#endif

#define PEAKS_API extern "C" __attribute__((visibility("default")))

namespace {

enum Kind : int { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx };

constexpr double kNotBuilt = -1;  // not with this compiler, or not on this family of processors

volatile float one = 1.0f;         // read at run time, so that no arithmetic is done by the compiler
thread_local volatile float sink;  // results end here, so that no loop is dead

// -- Arithmetic in registers --------------------------------------------------------------------
// Independent chains x = x * a + b, more of them than latency times ports. With a = b = 1/2 they
// settle at 1: no denormals, no infinities.

constexpr int64_t kSteps = 1024;  // of every chain, in one repeat

// Vectors of sixteen bytes are what every baseline has (SSE2: multiply, then add; NEON: fused).
void multiply_add_portable(int64_t repeats) {
  typedef float Four __attribute__((vector_size(16)));
  constexpr int kChains = 12;
  const Four a = Four{1, 1, 1, 1} * (one / 2), b = a;
  Four x[kChains];
  for (int c = 0; c < kChains; ++c) x[c] = a * static_cast<float>(c);
  for (int64_t step = 0; step < repeats * kSteps; ++step) {
    for (int c = 0; c < kChains; ++c) x[c] = x[c] * a + b;
  }
  for (int c = 1; c < kChains; ++c) x[0] += x[c];
  sink = x[0][0];
}
constexpr double kPortableFlops = 2.0 * 4 * 12;

#if PEAKS_X86

TARGET("avx2,fma") void multiply_add_avx2(int64_t repeats) {
  constexpr int kChains = 12;
  const __m256 a = _mm256_set1_ps(one / 2), b = a;
  __m256 x[kChains];
  for (int c = 0; c < kChains; ++c) x[c] = _mm256_set1_ps(static_cast<float>(c));
  for (int64_t step = 0; step < repeats * kSteps; ++step) {
    for (int c = 0; c < kChains; ++c) x[c] = _mm256_fmadd_ps(x[c], a, b);
  }
  for (int c = 1; c < kChains; ++c) x[0] = _mm256_add_ps(x[0], x[c]);
  sink = _mm256_cvtss_f32(x[0]);
}
constexpr double kAvx2Flops = 2.0 * 8 * 12;

TARGET("avx512f") void multiply_add_avx512(int64_t repeats) {
  constexpr int kChains = 16;
  const __m512 a = _mm512_set1_ps(one / 2), b = a;
  __m512 x[kChains];
  for (int c = 0; c < kChains; ++c) x[c] = _mm512_set1_ps(static_cast<float>(c));
  for (int64_t step = 0; step < repeats * kSteps; ++step) {
    for (int c = 0; c < kChains; ++c) x[c] = _mm512_fmadd_ps(x[c], a, b);
  }
  for (int c = 1; c < kChains; ++c) x[0] = _mm512_add_ps(x[0], x[c]);
  sink = _mm512_cvtss_f32(x[0]);
}
constexpr double kAvx512Flops = 2.0 * 16 * 16;

// Pairs (1, 1) against (1, -1): the sums stay where they are. The registers of pairs pass through
// an empty statement, so that the compiler can not know this.
TARGET("avx512f,avx512bf16") void dot_avx512_bf16(int64_t repeats) {
  constexpr int kChains = 16;
  __m512i a = _mm512_set1_epi32(0x3f803f80), b = _mm512_set1_epi32(0x3f80bf80);
  __asm__ volatile("" : "+v"(a), "+v"(b));
  __m512 x[kChains];
  for (int c = 0; c < kChains; ++c) x[c] = _mm512_set1_ps(static_cast<float>(c) * one);
  for (int64_t step = 0; step < repeats * kSteps; ++step) {
    for (int c = 0; c < kChains; ++c) x[c] = _mm512_dpbf16_ps(x[c], (__m512bh)a, (__m512bh)b);
  }
  for (int c = 1; c < kChains; ++c) x[0] = _mm512_add_ps(x[0], x[c]);
  sink = _mm512_cvtss_f32(x[0]);
}
constexpr double kBf16Flops = 2.0 * 2 * 16 * 16;

#endif

#if PEAKS_AMX

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};
};

// Linux hands out the tiles only to processes that ask.
bool tiles_permitted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Four tiles of 16 x 16 sums, two of 16 rows and two of 16 columns of 32 bf16: the tile kernel's
// own pattern. All are ones: a sum grows until 2 more no longer change it, and stays a number.
TARGET("amx-tile,amx-bf16") void dot_amx(int64_t repeats) {
  TileConfig config;
  for (int t = 0; t < 8; ++t) {
    config.bytes_per_row[t] = 64;
    config.rows[t] = 16;
  }
  alignas(64) uint16_t ones[16 * 32];
  alignas(64) float sums[16 * 16];
  for (uint16_t& value : ones) value = 0x3f80;
  // GCC's tile functions tell the compiler of too little of the memory that they read and write.
  __asm__ volatile("" : : "r"(&config), "r"(ones), "r"(sums) : "memory");
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, ones, 64);
  _tile_loadd(5, ones, 64);
  _tile_loadd(6, ones, 64);
  _tile_loadd(7, ones, 64);
  for (int64_t step = 0; step < repeats * kSteps; ++step) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, 64);
  _tile_release();
  __asm__ volatile("" : : "r"(sums) : "memory");
  sink = sums[0];
}
constexpr double kAmxFlops = 4 * 2.0 * 16 * 16 * 32;

#endif

template <class Run>
double flops_per_second(Run run, double flops_per_step, int threads, double seconds) {
  const auto body = [run](size_t, int64_t repeats) { run(repeats); };
  const double rate = best_rate(threads, seconds, body);
  return rate < 0 ? rate : rate * flops_per_step * static_cast<double>(kSteps);
}

// -- Reading ------------------------------------------------------------------------------------
// A repeat reads a slice once, page by page; every second one starts from its end, as a caller
// would who wants to find in the caches what the last pass left there. An empty statement takes
// each value from its register: the load stays and nothing else is done with it.

constexpr int64_t kPage = 4096;

const char* page_of(const char* slice, int64_t pages, int64_t index, int64_t repeat) {
  return slice + kPage * (repeat % 2 == 0 ? index : pages - 1 - index);
}

void read_portable(const char* slice, int64_t pages, int64_t repeats) {
  typedef uint64_t Two __attribute__((vector_size(16)));
  Two x[4] = {};
  for (int64_t repeat = 0; repeat < repeats; ++repeat) {
    for (int64_t index = 0; index < pages; ++index) {
      const Two* page = reinterpret_cast<const Two*>(page_of(slice, pages, index, repeat));
      for (int i = 0; i < kPage / 16; i += 4) {
        for (int j = 0; j < 4; ++j) x[j] |= page[i + j];
      }
      __asm__ volatile("" : : "r"(page) : "memory");  // the next pass reads again
    }
  }
  sink = static_cast<float>((x[0] | x[1] | x[2] | x[3])[0]);
}

#if PEAKS_X86

TARGET("avx2") void read_avx2(const char* slice, int64_t pages, int64_t repeats) {
  for (int64_t repeat = 0; repeat < repeats; ++repeat) {
    for (int64_t index = 0; index < pages; ++index) {
      const char* page = page_of(slice, pages, index, repeat);
      for (int i = 0; i < kPage; i += 512) {
        for (int j = 0; j < 512; j += 32) {
          __asm__ volatile("" : : "x"(*reinterpret_cast<const __m256i*>(page + i + j)));
        }
      }
    }
  }
}

TARGET("avx512f") void read_avx512(const char* slice, int64_t pages, int64_t repeats) {
  for (int64_t repeat = 0; repeat < repeats; ++repeat) {
    for (int64_t index = 0; index < pages; ++index) {
      const char* page = page_of(slice, pages, index, repeat);
      for (int i = 0; i < kPage; i += 1024) {
        for (int j = 0; j < 1024; j += 64) {
          __asm__ volatile("" : : "v"(*reinterpret_cast<const __m512i*>(page + i + j)));
        }
      }
    }
  }
}

#endif

}  // namespace

// Operations per second, a multiply-add counting as two: fp32 for the first three kinds, bf16 with
// fp32 sums for the others. Negative: see kNotBuilt and kNoThreads.
PEAKS_API double peaks_flops(int kind, int threads, double seconds) {
  switch (kind) {
    case kPortable:
      return flops_per_second(multiply_add_portable, kPortableFlops, threads, seconds);
#if PEAKS_X86
    case kAvx2:
      return flops_per_second(multiply_add_avx2, kAvx2Flops, threads, seconds);
    case kAvx512:
      return flops_per_second(multiply_add_avx512, kAvx512Flops, threads, seconds);
    case kAvx512Bf16:
      return flops_per_second(dot_avx512_bf16, kBf16Flops, threads, seconds);
#endif
#if PEAKS_AMX
    case kAmx:
      if (!tiles_permitted()) return kNotBuilt;
      return flops_per_second(dot_amx, kAmxFlops, threads, seconds);
#endif
    default:
      return kNotBuilt;
  }
}

// Memory to read from, `stride` bytes for each thread, written to by the thread that will read it;
// null where there is not enough. In large pages where the system has them to give.
PEAKS_API char* peaks_buffer(int64_t stride, int threads) {
  const size_t bytes = static_cast<size_t>(stride) * static_cast<size_t>(threads);
  void* memory = nullptr;
  if (posix_memalign(&memory, size_t{1} << 21, bytes) != 0) return nullptr;
#if defined(__linux__)
  madvise(memory, bytes, MADV_HUGEPAGE);  // advice: it may be refused, the pages are small then
#endif
  char* buffer = static_cast<char*>(memory);
  const auto body = [=](size_t thread, int64_t) {
    std::memset(buffer + thread * static_cast<size_t>(stride), 1, static_cast<size_t>(stride));
  };
  if (best_rate(threads, 0, body) < 0) {
    std::free(memory);
    return nullptr;
  }
  return buffer;
}

PEAKS_API void peaks_free(char* buffer) { std::free(buffer); }

// Bytes per second that `threads` threads read together, again and again, each its own `slice`
// (whole pages, at least one, at most `stride`) of a buffer of `peaks_buffer`.
PEAKS_API double peaks_read([[maybe_unused]] int kind, const char* buffer, int64_t stride,
                            int64_t slice, int threads, double seconds) {
  auto read = read_portable;
#if PEAKS_X86
  if (kind == kAvx2) read = read_avx2;
  if (kind >= kAvx512) read = read_avx512;
#endif
  const int64_t pages = slice / kPage;
  const auto body = [=](size_t thread, int64_t repeats) {
    read(buffer + static_cast<int64_t>(thread) * stride, pages, repeats);
  };
  const double rate = best_rate(threads, seconds, body);
  return rate < 0 ? rate : rate * static_cast<double>(pages * kPage);
}
