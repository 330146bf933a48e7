// Shares out work from several callers at once, and checks that every piece is done exactly once.
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "parallel.h"

namespace {

struct Work {
    std::vector<int64_t> done;      // written without a lock: each by its own piece
    std::vector<int64_t> by_worker;  // and each by its own worker
};

void add(const void *context, int32_t worker, int64_t begin, int64_t end) {
    Work &work = *static_cast<Work *>(const_cast<void *>(context));
    for (int64_t i = begin; i < end; ++i) {
        ++work.done[static_cast<size_t>(i)];
    }
    work.by_worker[static_cast<size_t>(worker)] += end - begin;
}

void call_often(int64_t count, int64_t piece, int32_t threads) {
    for (int round = 0; round < 300; ++round) {
        Work work = {std::vector<int64_t>(static_cast<size_t>(count)), std::vector<int64_t>(static_cast<size_t>(threads))};
        omniquant::parallel_for(count, piece, threads, add, &work);
        int64_t total = 0;
        for (const int64_t each : work.by_worker) {
            total += each;
        }
        for (const int64_t each : work.done) {
            total += each == 1 ? 0 : 1;
        }
        if (total != count) {
            std::fprintf(stderr, "wrong: a piece was left out or done twice\n");
            std::exit(1);
        }
        if (round % 50 == 0) {
            std::this_thread::sleep_for(std::chrono::milliseconds(1));  // until the others sleep
        }
    }
}

}  // namespace

int main() {
    std::vector<std::thread> callers;
    for (int32_t i = 0; i < 3; ++i) {
        callers.emplace_back(call_often, 10 + 90 * i, 1 + 3 * i, 2 + i);
    }
    for (std::thread &caller : callers) {
        caller.join();
    }
    call_often(0, 4, 3);
    call_often(64, 4, 5);
    std::printf("done\n");
    return 0;
}
