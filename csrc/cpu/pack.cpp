// Codes into words and back, eight codes, a run, at a time. Nothing outside of a row is touched.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "bits8.h"
#include "multiversion.h"
#include "omniquant.h"

using namespace omniquant;

namespace {

constexpr int64_t RUN = 8;  // codes

OMNIQUANT_ALWAYS_INLINE uint64_t load_some(const uint8_t *from, int64_t bytes) {
    uint64_t value = 0;
    std::memcpy(&value, from, static_cast<size_t>(std::min<int64_t>(bytes, sizeof value)));
    return value;
}

OMNIQUANT_ALWAYS_INLINE void store_some(uint8_t *to, uint64_t value, int64_t bytes) {
    std::memcpy(to, &value, static_cast<size_t>(std::min<int64_t>(bytes, sizeof value)));
}

// How many steps of `step` bytes leave `room` bytes from their begin on.
constexpr int64_t steps_with_room(int64_t bytes, int64_t step, int64_t room) {
    return bytes < room ? 0 : (bytes - room) / step + 1;
}

// Runs whose bytes are a number of the processor go one by one. Others are read and written as
// eight bytes, what is too much being masked or written over by the next, until the row has none to
// spare.
struct Stream {
    template <int bits>
    static constexpr int64_t room = (bits & (bits - 1)) == 0 ? bits : RUN;

    template <int bits>
    static OMNIQUANT_ALWAYS_INLINE void pack(const uint8_t *__restrict codes,
                                             uint8_t *__restrict words, int64_t columns,
                                             int64_t bytes) {
        const int64_t fast = std::min(columns / RUN, steps_with_room(bytes, bits, room<bits>));
        for (int64_t i = 0; i < fast; ++i) {
            store_bytes<room<bits>>(words + i * bits,
                                    gather<bits>(load_bytes<RUN>(codes + i * RUN)));
        }
        int64_t done = fast * bits;
        for (int64_t begin = fast * RUN; begin < columns; begin += RUN) {
            const int64_t width = std::min<int64_t>(bits, bytes - done);
            store_some(words + done, gather<bits>(load_some(codes + begin, columns - begin)),
                       width);
            done += width;
        }
        std::memset(words + done, 0, static_cast<size_t>(bytes - done));
    }

    template <int bits>
    static OMNIQUANT_ALWAYS_INLINE void unpack(const uint8_t *__restrict words,
                                               uint8_t *__restrict codes, int64_t columns,
                                               int64_t bytes) {
        const int64_t fast = std::min(columns / RUN, steps_with_room(bytes, bits, room<bits>));
        for (int64_t i = 0; i < fast; ++i) {
            store_bytes<RUN>(codes + i * RUN,
                             spread<bits>(load_bytes<room<bits>>(words + i * bits)));
        }
        for (int64_t i = fast; i * RUN < columns; ++i) {
            const uint64_t run = load_some(words + i * bits, bytes - i * bits);
            store_some(codes + i * RUN, spread<bits>(run), columns - i * RUN);
        }
    }
};

// Of widths that divide 32 this is the stream. A word of 3 bit holds a run and two codes more.
struct Words {
    template <int bits>
    static constexpr int64_t each = 32 / bits;

    // Codes that are read or written with those of a word.
    template <int bits>
    static constexpr int64_t room = each<bits> > RUN ? 2 * RUN : RUN;

    template <int bits>
    static OMNIQUANT_ALWAYS_INLINE uint64_t gather_word(uint64_t first, uint64_t second) {
        constexpr uint64_t used = (uint64_t{1} << (bits * each<bits>)) - 1;
        uint64_t word = gather<bits>(first);
        if constexpr (each<bits> > RUN) {
            word |= gather<bits>(second) << (RUN * bits);
        }
        return word & used;
    }

    template <int bits>
    static OMNIQUANT_ALWAYS_INLINE void pack(const uint8_t *__restrict codes,
                                             uint8_t *__restrict words, int64_t columns,
                                             int64_t bytes) {
        if constexpr (32 % bits == 0) {
            Stream::pack<bits>(codes, words, columns, bytes);
        } else {
            const int64_t fast = steps_with_room(columns, each<bits>, room<bits>);
            for (int64_t i = 0; i < fast; ++i) {
                const uint8_t *from = codes + i * each<bits>;
                const uint64_t second = each<bits> > RUN ? load_bytes<RUN>(from + RUN) : 0;
                store_bytes<4>(words + 4 * i, gather_word<bits>(load_bytes<RUN>(from), second));
            }
            for (int64_t i = fast; 4 * i < bytes; ++i) {
                const uint8_t *from = codes + i * each<bits>;
                const int64_t count = std::min(columns - i * each<bits>, each<bits>);
                const uint64_t second = count > RUN ? load_some(from + RUN, count - RUN) : 0;
                store_bytes<4>(words + 4 * i, gather_word<bits>(load_some(from, count), second));
            }
        }
    }

    template <int bits>
    static OMNIQUANT_ALWAYS_INLINE void unpack(const uint8_t *__restrict words,
                                               uint8_t *__restrict codes, int64_t columns,
                                               int64_t bytes) {
        if constexpr (32 % bits == 0) {
            Stream::unpack<bits>(words, codes, columns, bytes);
        } else {
            const int64_t fast = steps_with_room(columns, each<bits>, room<bits>);
            for (int64_t i = 0; i < fast; ++i) {
                const uint64_t word = load_bytes<4>(words + 4 * i);
                uint8_t *to = codes + i * each<bits>;
                store_bytes<RUN>(to, spread<bits>(word));
                if constexpr (each<bits> > RUN) {
                    store_bytes<RUN>(to + RUN, spread<bits>(word >> (RUN * bits)));
                }
            }
            for (int64_t i = fast; 4 * i < bytes; ++i) {
                const uint64_t word = load_bytes<4>(words + 4 * i);
                const int64_t count = std::min(columns - i * each<bits>, each<bits>);
                store_some(codes + i * each<bits>, spread<bits>(word), count);
                if (count > RUN) {
                    store_some(codes + i * each<bits> + RUN, spread<bits>(word >> (RUN * bits)),
                               count - RUN);
                }
            }
        }
    }
};

// The plane of `width` bits holds the code's bits from `shift` on; it stands behind wider planes.
struct Planes {
    template <int bits, int width>
    static constexpr int shift = bits & ~(2 * width - 1);

    template <int bits, int width>
    static OMNIQUANT_ALWAYS_INLINE void pack_plane(const uint8_t *__restrict codes,
                                                   uint8_t *__restrict words, int64_t columns,
                                                   int64_t runs) {
        if constexpr ((bits & width) != 0) {
            constexpr int low = shift<bits, width>;
            uint8_t *__restrict plane = words + runs * low;
            const int64_t whole = columns / RUN;
            for (int64_t i = 0; i < whole; ++i) {
                const uint64_t run = load_bytes<RUN>(codes + i * RUN);
                store_bytes<width>(plane + i * width, gather<width>(run >> low));
            }
            for (int64_t i = whole; i < runs; ++i) {
                const int64_t rest = columns - i * RUN;
                const uint64_t run = rest > 0 ? load_some(codes + i * RUN, rest) : 0;
                store_bytes<width>(plane + i * width, gather<width>(run >> low));
            }
        }
    }

    template <int bits>
    static OMNIQUANT_ALWAYS_INLINE void pack(const uint8_t *codes, uint8_t *words, int64_t columns,
                                             int64_t bytes) {
        const int64_t runs = bytes / bits;
        pack_plane<bits, 8>(codes, words, columns, runs);
        pack_plane<bits, 4>(codes, words, columns, runs);
        pack_plane<bits, 2>(codes, words, columns, runs);
        pack_plane<bits, 1>(codes, words, columns, runs);
    }

    template <int bits, int width>
    static OMNIQUANT_ALWAYS_INLINE uint64_t take(const uint8_t *words, int64_t runs, int64_t i) {
        if constexpr ((bits & width) != 0) {
            constexpr int low = shift<bits, width>;
            return spread<width>(load_bytes<width>(words + runs * low + i * width)) << low;
        } else {
            return 0;
        }
    }

    template <int bits>
    static OMNIQUANT_ALWAYS_INLINE uint64_t take_all(const uint8_t *words, int64_t runs,
                                                     int64_t i) {
        return take<bits, 8>(words, runs, i) | take<bits, 4>(words, runs, i) |
               take<bits, 2>(words, runs, i) | take<bits, 1>(words, runs, i);
    }

    template <int bits>
    static OMNIQUANT_ALWAYS_INLINE void unpack(const uint8_t *__restrict words,
                                               uint8_t *__restrict codes, int64_t columns,
                                               int64_t bytes) {
        const int64_t runs = bytes / bits;
        const int64_t whole = columns / RUN;
        for (int64_t i = 0; i < whole; ++i) {
            store_bytes<RUN>(codes + i * RUN, take_all<bits>(words, runs, i));
        }
        if (const int64_t rest = columns % RUN; rest != 0) {
            store_some(codes + whole * RUN, take_all<bits>(words, runs, whole), rest);
        }
    }
};

struct Rows {
    int64_t columns;
    int64_t words_per_row;
    int64_t begin;
    int64_t end;
};

template <class Layout, int bits>
OMNIQUANT_ALWAYS_INLINE void pack_rows(const uint8_t *codes, uint32_t *words, const Rows &rows) {
    for (int64_t row = rows.begin; row < rows.end; ++row) {
        auto *to = reinterpret_cast<uint8_t *>(words + row * rows.words_per_row);
        Layout::template pack<bits>(codes + row * rows.columns, to, rows.columns,
                                    rows.words_per_row * 4);
    }
}

template <class Layout, int bits>
OMNIQUANT_ALWAYS_INLINE void unpack_rows(const uint32_t *words, uint8_t *codes, const Rows &rows) {
    for (int64_t row = rows.begin; row < rows.end; ++row) {
        const auto *from = reinterpret_cast<const uint8_t *>(words + row * rows.words_per_row);
        Layout::template unpack<bits>(from, codes + row * rows.columns, rows.columns,
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
