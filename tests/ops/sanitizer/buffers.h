// Buffers of exactly the size asked for. On the heap the sanitizer sees what goes beyond; behind a
// guarded page also what it has no eyes for, the masked loads of vectors.
#ifndef BUFFERS_H
#define BUFFERS_H

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

inline bool guarded = false;

template <class T>
class Buffer {
  public:
    explicit Buffer(int64_t count) : count_(static_cast<size_t>(count)) {
        if (!guarded) {
            heap_.reset(new T[count_]());
            data_ = heap_.get();
            return;
        }
        const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
        const size_t whole = (count_ * sizeof(T) + page - 1) / page * page;
        size_ = whole + page;
        void *begin = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (begin == MAP_FAILED || mprotect(static_cast<char *>(begin) + whole, page, PROT_NONE) != 0) {
            std::perror("a guarded page");
            std::exit(2);
        }
        pages_ = static_cast<char *>(begin);
        data_ = reinterpret_cast<T *>(pages_ + whole - count_ * sizeof(T));
    }

    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;

    ~Buffer() {
        if (pages_ != nullptr) {
            munmap(pages_, size_);
        }
    }

    T *data() { return data_; }
    T &operator[](int64_t i) { return data_[i]; }
    int64_t size() const { return static_cast<int64_t>(count_); }

  private:
    size_t count_;
    size_t size_ = 0;
    std::unique_ptr<T[]> heap_;
    char *pages_ = nullptr;
    T *data_ = nullptr;
};

// Numbers that look random and are the same in every run.
class Random {
  public:
    uint32_t next() {
        state_ = state_ * 6364136223846793005u + 1442695040888963407u;
        return static_cast<uint32_t>(state_ >> 33);
    }

    int64_t below(int64_t end) { return next() % end; }

    float number() { return static_cast<float>(next() % 2001) / 1000.0f - 1.0f; }

    template <class T>
    T of(const std::vector<T> &values) {
        return values[next() % values.size()];
    }

  private:
    uint64_t state_ = 1;
};

inline void require(bool holds, const char *what) {
    if (!holds) {
        std::fprintf(stderr, "wrong: %s\n", what);
        std::exit(1);
    }
}

#endif
