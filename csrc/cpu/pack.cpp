// Packs and unpacks codes, a run of eight at a time. Nothing outside of a row is touched.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "bits8.h"
#include "multiversion.h"
#include "omniquant.h"

using namespace omniquant;

namespace {

constexpr int64_t kRun = 8;  // codes

OMNIQUANT_INLINE uint64_t load_some(const uint8_t *from, int64_t bytes) {
    uint64_t value = 0;
    std::memcpy(&value, from, static_cast<size_t>(std::min<int64_t>(bytes, sizeof value)));
    return value;
}

OMNIQUANT_INLINE void store_some(uint8_t *to, uint64_t value, int64_t bytes) {
    std::memcpy(to, &value, static_cast<size_t>(std::min<int64_t>(bytes, sizeof value)));
}

// Number of steps of `step` bytes that have `room` bytes from their begin on.
constexpr int64_t steps_with_room(int64_t bytes, int64_t step, int64_t room) {
    return bytes < room ? 0 : (bytes - room) / step + 1;
}

// A run of 1, 2, 4 or 8 bytes is read and written as one number. Other runs are read and written as
// eight bytes: a mask or the next run removes the excess. The last runs of a row, which lack the
// room for that, take the slow loop.
struct Stream {
    template <int kBits>
    static constexpr int64_t kRoom = (kBits & (kBits - 1)) == 0 ? kBits : kRun;

    template <int kBits>
    static OMNIQUANT_INLINE void pack(const uint8_t *__restrict codes, uint8_t *__restrict words,
                                      int64_t columns, int64_t bytes) {
        const int64_t fast = std::min(columns / kRun, steps_with_room(bytes, kBits, kRoom<kBits>));
        for (int64_t i = 0; i < fast; ++i) {
            store_bytes<kRoom<kBits>>(words + i * kBits,
                                      gather<kBits>(load_bytes<kRun>(codes + i * kRun)));
        }
        int64_t done = fast * kBits;
        for (int64_t begin = fast * kRun; begin < columns; begin += kRun) {
            const int64_t count = std::min<int64_t>(kBits, bytes - done);
            store_some(words + done, gather<kBits>(load_some(codes + begin, columns - begin)),
                       count);
            done += count;
        }
        std::memset(words + done, 0, static_cast<size_t>(bytes - done));
    }

    template <int kBits>
    static OMNIQUANT_INLINE void unpack(const uint8_t *__restrict words, uint8_t *__restrict codes,
                                        int64_t columns, int64_t bytes) {
        const int64_t fast = std::min(columns / kRun, steps_with_room(bytes, kBits, kRoom<kBits>));
        for (int64_t i = 0; i < fast; ++i) {
            store_bytes<kRun>(codes + i * kRun,
                              spread<kBits>(load_bytes<kRoom<kBits>>(words + i * kBits)));
        }
        for (int64_t i = fast; i * kRun < columns; ++i) {
            const uint64_t run = load_some(words + i * kBits, bytes - i * kBits);
            store_some(codes + i * kRun, spread<kBits>(run), columns - i * kRun);
        }
    }
};

// For widths that divide 32 this is the stream. A word of 3 bit holds a run and two more codes.
struct Words {
    template <int kBits>
    static constexpr int64_t kEach = 32 / kBits;

    // Codes that the fast loop reads or writes for each word.
    template <int kBits>
    static constexpr int64_t kRoom = kEach<kBits> > kRun ? 2 * kRun : kRun;

    template <int kBits>
    static OMNIQUANT_INLINE uint64_t gather_word(uint64_t first, uint64_t second) {
        constexpr uint64_t kUsed = (uint64_t{1} << (kBits * kEach<kBits>)) - 1;
        uint64_t word = gather<kBits>(first);
        if constexpr (kEach<kBits> > kRun) {
            word |= gather<kBits>(second) << (kRun * kBits);
        }
        return word & kUsed;
    }

    template <int kBits>
    static OMNIQUANT_INLINE void pack(const uint8_t *__restrict codes, uint8_t *__restrict words,
                                      int64_t columns, int64_t bytes) {
        if constexpr (32 % kBits == 0) {
            Stream::pack<kBits>(codes, words, columns, bytes);
        } else {
            const int64_t fast = steps_with_room(columns, kEach<kBits>, kRoom<kBits>);
            for (int64_t i = 0; i < fast; ++i) {
                const uint8_t *from = codes + i * kEach<kBits>;
                const uint64_t second = kEach<kBits> > kRun ? load_bytes<kRun>(from + kRun) : 0;
                store_bytes<4>(words + 4 * i, gather_word<kBits>(load_bytes<kRun>(from), second));
            }
            for (int64_t i = fast; 4 * i < bytes; ++i) {
                const uint8_t *from = codes + i * kEach<kBits>;
                const int64_t count = std::min(columns - i * kEach<kBits>, kEach<kBits>);
                const uint64_t second = count > kRun ? load_some(from + kRun, count - kRun) : 0;
                store_bytes<4>(words + 4 * i, gather_word<kBits>(load_some(from, count), second));
            }
        }
    }

    template <int kBits>
    static OMNIQUANT_INLINE void unpack(const uint8_t *__restrict words, uint8_t *__restrict codes,
                                        int64_t columns, int64_t bytes) {
        if constexpr (32 % kBits == 0) {
            Stream::unpack<kBits>(words, codes, columns, bytes);
        } else {
            const int64_t fast = steps_with_room(columns, kEach<kBits>, kRoom<kBits>);
            for (int64_t i = 0; i < fast; ++i) {
                const uint64_t word = load_bytes<4>(words + 4 * i);
                uint8_t *to = codes + i * kEach<kBits>;
                store_bytes<kRun>(to, spread<kBits>(word));
                if constexpr (kEach<kBits> > kRun) {
                    store_bytes<kRun>(to + kRun, spread<kBits>(word >> (kRun * kBits)));
                }
            }
            for (int64_t i = fast; 4 * i < bytes; ++i) {
                const uint64_t word = load_bytes<4>(words + 4 * i);
                const int64_t count = std::min(columns - i * kEach<kBits>, kEach<kBits>);
                store_some(codes + i * kEach<kBits>, spread<kBits>(word), count);
                if (count > kRun) {
                    store_some(codes + i * kEach<kBits> + kRun,
                               spread<kBits>(word >> (kRun * kBits)), count - kRun);
                }
            }
        }
    }
};

// The plane of kWidth bits holds the code's bits from kShift on and follows the wider planes.
struct Planes {
    template <int kBits, int kWidth>
    static constexpr int kShift = kBits & ~(2 * kWidth - 1);

    template <int kBits, int kWidth>
    static OMNIQUANT_INLINE void pack_plane(const uint8_t *__restrict codes,
                                            uint8_t *__restrict words, int64_t columns,
                                            int64_t runs) {
        if constexpr ((kBits & kWidth) != 0) {
            constexpr int kLow = kShift<kBits, kWidth>;
            uint8_t *__restrict plane = words + runs * kLow;
            const int64_t whole = columns / kRun;
            for (int64_t i = 0; i < whole; ++i) {
                const uint64_t run = load_bytes<kRun>(codes + i * kRun);
                store_bytes<kWidth>(plane + i * kWidth, gather<kWidth>(run >> kLow));
            }
            for (int64_t i = whole; i < runs; ++i) {
                const int64_t rest = columns - i * kRun;
                const uint64_t run = rest > 0 ? load_some(codes + i * kRun, rest) : 0;
                store_bytes<kWidth>(plane + i * kWidth, gather<kWidth>(run >> kLow));
            }
        }
    }

    template <int kBits>
    static OMNIQUANT_INLINE void pack(const uint8_t *codes, uint8_t *words, int64_t columns,
                                      int64_t bytes) {
        const int64_t runs = bytes / kBits;
        pack_plane<kBits, 8>(codes, words, columns, runs);
        pack_plane<kBits, 4>(codes, words, columns, runs);
        pack_plane<kBits, 2>(codes, words, columns, runs);
        pack_plane<kBits, 1>(codes, words, columns, runs);
    }

    template <int kBits, int kWidth>
    static OMNIQUANT_INLINE uint64_t take(const uint8_t *words, int64_t runs, int64_t i) {
        if constexpr ((kBits & kWidth) != 0) {
            constexpr int kLow = kShift<kBits, kWidth>;
            return spread<kWidth>(load_bytes<kWidth>(words + runs * kLow + i * kWidth)) << kLow;
        } else {
            return 0;
        }
    }

    template <int kBits>
    static OMNIQUANT_INLINE uint64_t take_all(const uint8_t *words, int64_t runs, int64_t i) {
        return take<kBits, 8>(words, runs, i) | take<kBits, 4>(words, runs, i) |
               take<kBits, 2>(words, runs, i) | take<kBits, 1>(words, runs, i);
    }

    template <int kBits>
    static OMNIQUANT_INLINE void unpack(const uint8_t *__restrict words, uint8_t *__restrict codes,
                                        int64_t columns, int64_t bytes) {
        const int64_t runs = bytes / kBits;
        const int64_t whole = columns / kRun;
        for (int64_t i = 0; i < whole; ++i) {
            store_bytes<kRun>(codes + i * kRun, take_all<kBits>(words, runs, i));
        }
        if (const int64_t rest = columns % kRun; rest != 0) {
            store_some(codes + whole * kRun, take_all<kBits>(words, runs, whole), rest);
        }
    }
};

struct Rows {
    int64_t columns;
    int64_t words_per_row;
    int64_t begin;
    int64_t end;
};

template <typename Layout, int kBits>
OMNIQUANT_INLINE void pack_rows(const uint8_t *codes, uint32_t *words, const Rows &rows) {
    for (int64_t row = rows.begin; row < rows.end; ++row) {
        auto *to = reinterpret_cast<uint8_t *>(words + row * rows.words_per_row);
        Layout::template pack<kBits>(codes + row * rows.columns, to, rows.columns,
                                     rows.words_per_row * 4);
    }
}

template <typename Layout, int kBits>
OMNIQUANT_INLINE void unpack_rows(const uint32_t *words, uint8_t *codes, const Rows &rows) {
    for (int64_t row = rows.begin; row < rows.end; ++row) {
        const auto *from = reinterpret_cast<const uint8_t *>(words + row * rows.words_per_row);
        Layout::template unpack<kBits>(from, codes + row * rows.columns, rows.columns,
                                       rows.words_per_row * 4);
    }
}

// The width becomes a constant of the code.
#define OMNIQUANT_FOR_BITS(function, Layout, ...)    \
    switch (bits) {                                  \
        case 1:                                      \
            return function<Layout, 1>(__VA_ARGS__); \
        case 2:                                      \
            return function<Layout, 2>(__VA_ARGS__); \
        case 3:                                      \
            return function<Layout, 3>(__VA_ARGS__); \
        case 4:                                      \
            return function<Layout, 4>(__VA_ARGS__); \
        case 5:                                      \
            return function<Layout, 5>(__VA_ARGS__); \
        case 6:                                      \
            return function<Layout, 6>(__VA_ARGS__); \
        case 7:                                      \
            return function<Layout, 7>(__VA_ARGS__); \
        default:                                     \
            return function<Layout, 8>(__VA_ARGS__); \
    }

#define OMNIQUANT_FOR_LAYOUT(function, ...)                   \
    switch (layout) {                                         \
        case OMNIQUANT_STREAM:                                \
            OMNIQUANT_FOR_BITS(function, Stream, __VA_ARGS__) \
        case OMNIQUANT_WORDS:                                 \
            OMNIQUANT_FOR_BITS(function, Words, __VA_ARGS__)  \
        default:                                              \
            OMNIQUANT_FOR_BITS(function, Planes, __VA_ARGS__) \
    }

}  // namespace

OMNIQUANT_MULTIVERSION
void omniquant_pack(const uint8_t *codes, uint32_t *words, int64_t columns, int64_t words_per_row,
                    int64_t begin, int64_t end, int32_t bits, int32_t layout) {
    const Rows rows = {columns, words_per_row, begin, end};
    OMNIQUANT_FOR_LAYOUT(pack_rows, codes, words, rows)
}

OMNIQUANT_MULTIVERSION
void omniquant_unpack(const uint32_t *words, uint8_t *codes, int64_t columns, int64_t words_per_row,
                      int64_t begin, int64_t end, int32_t bits, int32_t layout) {
    const Rows rows = {columns, words_per_row, begin, end};
    OMNIQUANT_FOR_LAYOUT(unpack_rows, words, codes, rows)
}
