// Runs the real AMX kernels on a processor without AMX: each of their instructions is an illegal
// one there, and the handler of that signal does what it would have done, with EmulatedTiles.
#pragma once

#include "isa.h"
#include "simd/tiles_emulated.h"

#if defined(__x86_64__) && defined(__linux__) && !defined(SLIMKERN_SCALAR_ONLY)
#include <cpuid.h>
#include <signal.h>
#include <ucontext.h>

namespace slimkern {
namespace {

// The fields of one instruction of the VEX map that AMX lies in.
struct TileInstruction {
  const uint8_t* code;
  const greg_t* registers;
  int prefix, opcode, reg, rm, vvvv, length;
  bool memory;
  const uint8_t* address;  // of the first row
  int64_t stride;

  int64_t general(int number) const {
    static constexpr int kOrder[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                       REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                       REG_R12, REG_R13, REG_R14, REG_R15};
    return registers[kOrder[number]];
  }

  bool decode() {
    if (code[0] != 0xc4 || (code[1] & 0x1f) != 2) return false;  // three-byte VEX, map 0F 38
    const int x = code[1] & 0x40 ? 0 : 8, b = code[1] & 0x20 ? 0 : 8;
    prefix = code[2] & 3;
    vvvv = ~(code[2] >> 3) & 15;
    opcode = code[3];
    const int mod = code[4] >> 6;
    reg = (code[4] >> 3) & 7;
    rm = code[4] & 7;
    length = 5;
    memory = mod != 3;
    if (!memory) return true;
    int64_t base = 0;
    stride = 0;
    if (rm == 4) {
      const int sib = code[length++], index = (sib >> 3 & 7) | x;
      if (index != 4) stride = general(index) << (sib >> 6);
      if ((sib & 7) == 5 && mod == 0) return false;
      base = general((sib & 7) | b);
    } else {
      if (rm == 5 && mod == 0) return false;
      base = general(rm | b);
    }
    if (mod == 1) base += static_cast<int8_t>(code[length]);
    if (mod == 2) {
      int32_t offset;
      __builtin_memcpy(&offset, code + length, 4);
      base += offset;
    }
    length += mod == 1 ? 1 : mod == 2 ? 4 : 0;
    address = reinterpret_cast<const uint8_t*>(base);
    return true;
  }

  bool run() const {
    using E = EmulatedTiles;
    constexpr int kNone = 0, kF3 = 2, kF2 = 3;
    if (opcode == 0x49 && prefix == kNone && memory && reg == 0) {
      uint8_t config[64];
      __builtin_memcpy(config, address, 64);
      E::configure(config);
    } else if (opcode == 0x49 && prefix == kNone && code[4] == 0xc0) {
      E::release();
    } else if (opcode == 0x49 && prefix == kF2 && !memory) {
      E::tiles[reg] = {E::tiles[reg].rows, E::tiles[reg].bytes, {}};
    } else if (opcode == 0x4b && prefix == kF2 && memory) {
      E::load(E::tiles[reg], address, stride);
    } else if (opcode == 0x4b && prefix == kF3 && memory) {
      E::store(E::tiles[reg], const_cast<uint8_t*>(address), stride);
    } else if (opcode == 0x5c && prefix == kF3 && !memory) {
      E::dot(E::tiles[reg], E::tiles[rm], E::tiles[vvvv]);
    } else {
      return false;
    }
    return true;
  }
};

void run_trapped(int signal_number, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  TileInstruction instruction{};
  instruction.code = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
  instruction.registers = registers;
  if (instruction.decode() && instruction.run()) {
    registers[REG_RIP] += instruction.length;
  } else {
    signal(signal_number, SIG_DFL);  // another one: it is met again, and ends the process
  }
}

// kAmx, where it may be called although there is no AMX; else null.
const KernelTable* trapped_table() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!isa_detected(Isa::kAvx512Bf16) || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    return nullptr;
  }
  if (d >> 24 & 1) return nullptr;  // the instructions are there
  struct sigaction action = {};
  action.sa_sigaction = run_trapped;
  action.sa_flags = SA_SIGINFO;
  return sigaction(SIGILL, &action, nullptr) == 0 ? &kAmx : nullptr;
}

}  // namespace
}  // namespace slimkern

#else

namespace slimkern {
namespace {
const KernelTable* trapped_table() { return nullptr; }
}  // namespace
}  // namespace slimkern

#endif
