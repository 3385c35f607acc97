// The machine that this process runs on.
#pragma once

#include <string>

namespace dattn {

std::string host_name();

}  // namespace dattn
