// What every kernel asks of its arguments, checked once at its door. A violation is a defect of the caller (a layer or
// the runner), not of the user's input: Error(kInternal) naming the tensor and both shapes.
#pragma once

#include "core/attention/kernel.h"

namespace dattn {

void check_args(const AttendArgs& args);
void check_args(const AttendGradArgs& args);

}  // namespace dattn
