// Received rows listed by local expert, for kernels that want the rows of an expert side by side.
#pragma once

#include "../args.h"

namespace moe_a2a::cpu {

// False where the list has too few places: a row names an expert twice.
bool group(const GroupArgs& args);

}  // namespace moe_a2a::cpu
