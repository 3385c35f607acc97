// The target whose precompiled header all test binaries share: CMake lets a target reuse that of another, which it then waits
// for, so this one has nothing else.
int main() { return 0; }
