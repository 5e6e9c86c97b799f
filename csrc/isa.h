// Which instruction sets the machine has, which of them slimkern has kernels for, and the choice.
#pragma once

#include "kernel_table.h"

namespace slimkern {

// In rising order: a later one is preferred where it can be used.
enum class Isa { kScalar, kAvx2, kAvx512, kAvx512Bf16, kAmx };
constexpr int kIsaCount = 5;

const char* isa_name(Isa isa);

// The processor has it and the operating system saves its registers (for amx: and has permitted
// this process to use the tiles).
bool isa_detected(Isa isa);

// Its kernels, or null: not built for this target, not detected, or served by a lower level.
const KernelTable* isa_table(Isa isa);

Isa active_isa();
const KernelTable& active_table();

// False, and nothing changes, where isa_table(isa) is null.
bool set_active_isa(Isa isa);

}  // namespace slimkern
