// Rows over threads that wait for work. A product of a millisecond is over before a thread of an
// ordinary pool has woken: the caller starts at once, and whoever wakes takes what is left.
#ifndef OMNIQUANT_PARALLEL_H
#define OMNIQUANT_PARALLEL_H

#include <cstdint>

namespace omniquant {

// Works on [begin, end) as the thread `worker`, from 0 on.
using Task = void (*)(const void *context, int32_t worker, int64_t begin, int64_t end);

// Calls `task` for pieces of [0, count), `piece` long, on at most `threads` threads, the caller one
// of them. If other work holds the threads, or none can be started, the caller does it all.
void parallel_for(int64_t count, int64_t piece, int32_t threads, Task task, const void *context);

}  // namespace omniquant

#endif
