// Shares out rows to threads that wait for work. A product of a millisecond is over before a thread
// of an ordinary pool wakes: here the caller starts at once, and the threads that wake take what is
// left.
#ifndef OMNIQUANT_PARALLEL_H
#define OMNIQUANT_PARALLEL_H

#include <cstdint>

namespace omniquant {

// Works on [begin, end) in the thread `worker`, counted from 0.
using Task = void (*)(const void *context, int32_t worker, int64_t begin, int64_t end);

// Calls `task` for pieces of [0, count), `piece` long, on at most `threads` threads, including the
// caller's. If other work holds the threads, or none can be started, the caller does all of it.
void parallel_for(int64_t count, int64_t piece, int32_t threads, Task task, const void *context);

}  // namespace omniquant

#endif
