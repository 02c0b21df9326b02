// What ops.cpp gives to others.
#pragma once

#include "core.h"

#include <ATen/core/Generator.h>

namespace sim {

// The tensor's bytes as a tensor of the CPU, which owns nothing.
at::Tensor on_host(const at::Tensor& tensor);
void add_access(Command& command, const at::Tensor& tensor, bool writes);
void submit_on_current(int device, std::shared_ptr<Command> command);
// Where in Python the caller is, while races are looked for.
std::string place();
const at::Generator& default_generator(int device);

}  // namespace sim
