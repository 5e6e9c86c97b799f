#include "isa.h"

#include <atomic>
#include <cstdint>

#if defined(__x86_64__) && !defined(SLIMKERN_SCALAR_ONLY)
#define SLIMKERN_X86 1
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace slimkern {
namespace {

struct Detected {
  bool has[kIsaCount] = {true, false, false, false, false};
};

#if SLIMKERN_X86

struct Cpuid {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Cpuid cpuid(uint32_t leaf, uint32_t subleaf) {
  Cpuid r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

bool bit(uint32_t word, int position) { return (word >> position) & 1u; }

// XCR0: the register files that the operating system saves on a context switch.
uint64_t xcr0() {
  uint32_t lo = 0, hi = 0;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (static_cast<uint64_t>(hi) << 32) | lo;
}

// Linux hands out the 8 KiB of tile data only to processes that ask for it, once.
bool amx_permitted() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Detected detect() {
  Detected d;
  const Cpuid one = cpuid(1, 0);
  const bool osxsave = bit(one.ecx, 27);
  if (!osxsave) return d;
  const uint64_t os = xcr0();
  const bool os_ymm = (os & 0x6) == 0x6;                // SSE, AVX
  const bool os_zmm = os_ymm && (os & 0xe0) == 0xe0;    // opmask, upper halves, upper sixteen
  const bool os_tiles = (os & 0x60000) == 0x60000;      // tile configuration, tile data
  const Cpuid seven = cpuid(7, 0);
  const Cpuid seven1 = cpuid(7, 1);

  const bool fma = bit(one.ecx, 12), f16c = bit(one.ecx, 29), avx = bit(one.ecx, 28);
  const bool avx2 = os_ymm && avx && fma && f16c && bit(seven.ebx, 5);
  const bool foundation = bit(seven.ebx, 16), dq = bit(seven.ebx, 17);
  const bool bw = bit(seven.ebx, 30), vl = bit(seven.ebx, 31);
  const bool avx512 = avx2 && os_zmm && foundation && dq && bw && vl;
  const bool avx512_bf16 = avx512 && bit(seven1.eax, 5);
  const bool amx_bf16 = bit(seven.edx, 22), amx_tile = bit(seven.edx, 24);
  const bool amx = avx512_bf16 && amx_tile && amx_bf16 && os_tiles && amx_permitted();

  d.has[static_cast<int>(Isa::kAvx2)] = avx2;
  d.has[static_cast<int>(Isa::kAvx512)] = avx512;
  d.has[static_cast<int>(Isa::kAvx512Bf16)] = avx512_bf16;
  d.has[static_cast<int>(Isa::kAmx)] = amx;
  return d;
}

#else

Detected detect() { return {}; }

#endif

const Detected& detected() {
  static const Detected d = detect();
  return d;
}

Isa best() {
  for (int i = kIsaCount - 1; i > 0; --i) {
    if (isa_table(static_cast<Isa>(i)) != nullptr) return static_cast<Isa>(i);
  }
  return Isa::kScalar;
}

std::atomic<Isa>& active() {
  static std::atomic<Isa> isa{best()};
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) {
  constexpr const char* kNames[kIsaCount] = {"scalar", "avx2", "avx512", "avx512_bf16", "amx"};
  return kNames[static_cast<int>(isa)];
}

bool isa_detected(Isa isa) { return detected().has[static_cast<int>(isa)]; }

const KernelTable* isa_table(Isa isa) {
  if (!isa_detected(isa)) return nullptr;
  switch (isa) {
    case Isa::kScalar:
      return &kScalar;
#if SLIMKERN_X86
    case Isa::kAvx2:
      return &kAvx2;
    case Isa::kAvx512:
      return &kAvx512;
    case Isa::kAvx512Bf16:
      return &kAvx512Bf16;
    case Isa::kAmx:
      return &kAmx;
#endif
    default:
      return nullptr;  // not for this target
  }
}

Isa active_isa() { return active().load(std::memory_order_relaxed); }

const KernelTable& active_table() { return *isa_table(active_isa()); }

bool set_active_isa(Isa isa) {
  if (isa_table(isa) == nullptr) return false;
  active().store(isa, std::memory_order_relaxed);
  return true;
}

}  // namespace slimkern
