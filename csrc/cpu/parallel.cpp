#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include "ceil_divide.h"

namespace omniquant {
namespace {

using Clock = std::chrono::steady_clock;

// How long a thread looks for the next product, or the caller for the end of the last piece, before
// it sleeps. Layers of a model follow each other within this time.
constexpr std::chrono::microseconds kPatience{50};

struct Job {
    Task task;
    const void *context;
    int64_t count;
    int64_t piece;
    std::atomic<int64_t> next{0};

    void work(int32_t worker) {
        for (int64_t begin = next.fetch_add(piece, std::memory_order_relaxed); begin < count;
             begin = next.fetch_add(piece, std::memory_order_relaxed)) {
            task(context, worker, begin, std::min(begin + piece, count));
        }
    }
};

template <typename Condition>
bool soon(const Condition &condition) {
    const Clock::time_point end = Clock::now() + kPatience;
    while (!condition()) {
        if (Clock::now() > end) {
            return false;
        }
        std::this_thread::yield();
    }
    return true;
}

class Pool {
  public:
    // Returns false if the pool works for another caller.
    bool run(Job &job, int32_t threads) {
        if (busy_.exchange(true, std::memory_order_acquire)) {
            return false;
        }
        grow(threads - 1);
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            job_ = &job;
            places_ = threads - 1;
            calls_.fetch_add(1, std::memory_order_release);
        }
        if (sleeping_.load() > 0) {
            wake_.notify_all();
        }
        job.work(0);
        finish();
        busy_.store(false, std::memory_order_release);
        return true;
    }

  private:
    void grow(int32_t threads) {
        try {
            for (; started_ < threads; ++started_) {
                std::thread(&Pool::serve, this, started_ + 1).detach();
            }
        } catch (const std::system_error &) {
            // Fewer threads do the same work.
        }
    }

    // No thread joins from here on; the pool waits for those that have joined.
    void finish() {
        std::unique_lock<std::mutex> lock(mutex_);
        job_ = nullptr;
        lock.unlock();
        const auto done = [this] { return working_.load(std::memory_order_acquire) == 0; };
        if (!soon(done)) {
            lock.lock();
            done_.wait(lock, done);
        }
    }

    void serve(int32_t worker) {
        uint64_t seen = 0;
        for (;;) {
            const auto called = [&] { return calls_.load(std::memory_order_acquire) != seen; };
            soon(called);
            std::unique_lock<std::mutex> lock(mutex_);
            sleeping_.fetch_add(1);
            wake_.wait(lock, called);
            sleeping_.fetch_sub(1);
            seen = calls_.load(std::memory_order_relaxed);
            Job *const job = worker <= places_ ? job_ : nullptr;
            if (job == nullptr) {
                continue;
            }
            working_.fetch_add(1, std::memory_order_relaxed);
            lock.unlock();
            job->work(worker);
            lock.lock();
            if (working_.fetch_sub(1, std::memory_order_release) == 1) {
                done_.notify_all();
            }
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_;
    std::condition_variable done_;
    std::atomic<bool> busy_{false};
    std::atomic<uint64_t> calls_{0};
    std::atomic<int32_t> sleeping_{0};
    std::atomic<int32_t> working_{0};
    Job *job_ = nullptr;
    int32_t places_ = 0;
    int32_t started_ = 0;
};

// Never destroyed: its threads outlive the interpreter. A forked process has none of them and
// begins with a new pool.
std::atomic<Pool *> pool{nullptr};

#if defined(__unix__) || defined(__APPLE__)
void forget_pool() {
    pool.store(nullptr);
}

[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
#endif

Pool &the_pool() {
    Pool *current = pool.load(std::memory_order_acquire);
    if (current == nullptr) {
        Pool *const created = new Pool;
        if (pool.compare_exchange_strong(current, created)) {
            return *created;
        }
        delete created;
    }
    return *current;
}

}  // namespace

void parallel_for(int64_t count, int64_t piece, int32_t threads, Task task, const void *context) {
    if (count <= 0) {
        return;
    }
    const int64_t pieces = ceil_divide(count, piece);
    threads = static_cast<int32_t>(std::min<int64_t>(threads, pieces));
    if (threads > 1) {
        Job job{task, context, count, piece};
        if (the_pool().run(job, threads)) {
            return;
        }
    }
    task(context, 0, 0, count);
}

}  // namespace omniquant
