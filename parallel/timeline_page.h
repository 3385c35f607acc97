// The page of timeline_html(), with the places __TITLE__ and __DATA__ to be filled in.
#pragma once

namespace dattn {

extern const char* const kTimelinePage;

}  // namespace dattn
