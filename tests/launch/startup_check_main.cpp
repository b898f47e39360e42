#include <cstdio>

// Never reached: the processor check ends the process before main.
int main() { std::puts("main was reached"); }
