// Runs blocks one after another, the threads of a block as fibers. Asynchronous copies are made as
// early or as late as they may be, threads run forwards or backwards: code that is right in all
// four has its barriers and waits where they belong. What is read must lie in a buffer that was
// announced.
#include <cuda_runtime.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

dim3 threadIdx;
dim3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace omniquant {

constexpr size_t kSharedBytes = 256 * 1024;
alignas(128) uint4 packed_shared[kSharedBytes / sizeof(uint4)];

}  // namespace omniquant

namespace emulation {
namespace {

constexpr size_t kStackBytes = 64 * 1024;

struct Copy {
    void *to;
    const void *from;  // null: zeros
    size_t bytes;
};

enum class State { kReady, kAtWarp, kAtBlock, kDone };

// Entered through a context of its own; from then on it jumps, which is ten times as fast.
struct Fiber {
    ucontext_t context;
    jmp_buf place;
    bool is_entered;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    State state = State::kDone;
    std::deque<std::vector<Copy>> copies;  // the last group is open
};

struct Settings {
    int processors = 1;
    int shared_bytes = 0;
    bool is_eager = false;
    bool is_backwards = false;
};

struct Buffer {
    const char *begin;
    size_t bytes;
};

Settings settings;
std::vector<Buffer> buffers;
int bad_reads = 0;
std::deque<Fiber> fibers;
size_t threads;
ucontext_t unused;
jmp_buf scheduler;
Fiber *current;
std::function<void()> body;
uint32_t shown[32][kWarp * 8];

void leave(State state) {
    current->state = state;
    if (_setjmp(current->place) == 0) {
        _longjmp(scheduler, 1);
    }
}

void enter() {
    body();
    leave(State::kDone);
}

void resume(size_t thread) {
    current = &fibers[thread];
    threadIdx.x = static_cast<unsigned>(thread);
    if (_setjmp(scheduler) != 0) {
        return;
    }
    if (current->is_entered) {
        _longjmp(current->place, 1);
    }
    current->is_entered = true;
    swapcontext(&unused, &current->context);
}

// Releases threads [begin, end) where all of them, but for the finished, wait in `state`.
bool release(size_t begin, size_t end, State state) {
    bool any = false;
    for (size_t i = begin; i < end; ++i) {
        if (fibers[i].state != state && fibers[i].state != State::kDone) {
            return false;
        }
        any = any || fibers[i].state == state;
    }
    for (size_t i = begin; i < end; ++i) {
        if (fibers[i].state == state) {
            fibers[i].state = State::kReady;
        }
    }
    return any;
}

bool advance() {
    bool any = false;
    for (size_t k = 0; k < threads; ++k) {
        const size_t i = settings.is_backwards ? threads - 1 - k : k;
        if (fibers[i].state == State::kReady) {
            resume(i);
            any = true;
        }
    }
    for (size_t begin = 0; begin < threads; begin += kWarp) {
        any = release(begin, begin + kWarp, State::kAtWarp) || any;
    }
    return release(0, threads, State::kAtBlock) || any;
}

bool is_done() {
    for (size_t i = 0; i < threads; ++i) {
        if (fibers[i].state != State::kDone) {
            return false;
        }
    }
    return true;
}

void run_block() {
    std::memset(omniquant::packed_shared, 0xff, omniquant::kSharedBytes);  // NaN
    while (fibers.size() < threads) {
        fibers.emplace_back();
    }
    for (size_t i = 0; i < threads; ++i) {
        Fiber &fiber = fibers[i];
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStackBytes;
        fiber.state = State::kReady;
        fiber.is_entered = false;
        fiber.copies.assign(1, {});
        makecontext(&fiber.context, enter, 0);
    }
    while (advance()) {
    }
    if (!is_done()) {
        std::fprintf(stderr, "threads wait for each other\n");
        std::abort();
    }
}

void make(const Copy &copy) {
    if (copy.from == nullptr) {
        std::memset(copy.to, 0, copy.bytes);
    } else {
        std::memcpy(copy.to, copy.from, copy.bytes);
    }
}

}  // namespace

void run(const cudaLaunchConfig_t &config, const std::function<void()> &kernel) {
    if (config.dynamicSmemBytes > static_cast<size_t>(settings.shared_bytes)) {
        std::fprintf(stderr, "too much shared memory: %zu\n", config.dynamicSmemBytes);
        std::abort();
    }
    body = kernel;
    threads = config.blockDim.x;
    blockDim = config.blockDim;
    gridDim = config.gridDim;
    for (unsigned y = 0; y < gridDim.y; ++y) {
        for (unsigned x = 0; x < gridDim.x; ++x) {
            blockIdx = dim3(x, y);
            run_block();
        }
    }
}

void wait_for_warp() {
    leave(State::kAtWarp);
}

void wait_for_block() {
    leave(State::kAtBlock);
}

uint32_t *warp_memory() {
    return shown[threadIdx.x / kWarp];
}

void check_read(const void *from, size_t bytes) {
    const auto *begin = static_cast<const char *>(from);
    for (const Buffer &buffer : buffers) {
        if (begin >= buffer.begin && begin + bytes <= buffer.begin + buffer.bytes &&
            reinterpret_cast<uintptr_t>(begin) % bytes == 0) {
            return;
        }
    }
    ++bad_reads;
}

cudaError_t attribute(int *value, int which) {
    *value = which == cudaDevAttrMultiProcessorCount ? settings.processors : settings.shared_bytes;
    return cudaSuccess;
}

void copy_async(void *to, const void *from, size_t bytes, bool present) {
    if (present) {
        check_read(from, bytes);
    }
    const Copy copy = {to, present ? from : nullptr, bytes};
    if (settings.is_eager) {
        make(copy);
    } else {
        current->copies.back().push_back(copy);
    }
}

void commit_copies() {
    current->copies.emplace_back();
}

void wait_for_copies(size_t groups) {
    while (current->copies.size() > groups + 1) {
        for (const Copy &copy : current->copies.front()) {
            make(copy);
        }
        current->copies.pop_front();
    }
}

}  // namespace emulation

extern "C" {

void emulation_configure(int processors, int shared_bytes, int is_eager, int is_backwards) {
    emulation::settings = {processors, shared_bytes, is_eager != 0, is_backwards != 0};
    emulation::buffers.clear();
    emulation::bad_reads = 0;
}

void emulation_announce(const void *begin, size_t bytes) {
    emulation::buffers.push_back({static_cast<const char *>(begin), bytes});
}

int emulation_bad_reads() {
    return emulation::bad_reads;
}
}
