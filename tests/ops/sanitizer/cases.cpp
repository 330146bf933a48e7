// Runs the host's kernels over odd and hostile sizes, checks the results against plain loops and prints
// how many cases there were.
#include <algorithm>
#include <cfloat>
#include <cmath>

#include "buffers.h"
#include "half.h"
#include "omniquant.h"

namespace {

Random random_numbers;
int cases = 0;

// Bit `bit` of the code in a row, as the header describes the layouts.
int64_t bit_position(int64_t columns, int64_t column, int bits, int layout, int bit) {
    if (layout == OMNIQUANT_STREAM) {
        return column * bits + bit;
    }
    if (layout == OMNIQUANT_WORDS) {
        return column / (32 / bits) * 32 + column % (32 / bits) * bits + bit;
    }
    const int64_t padded = (columns + 31) / 32 * 32;
    int low = 0;
    for (int width = 8;; width /= 2) {
        if ((bits & width) != 0) {
            if (bit < low + width) {
                return padded * low + column * width + bit - low;
            }
            low += width;
        }
    }
}

int64_t words_per_row(int64_t columns, int bits, int layout) {
    const int64_t each = 32 / bits;
    return layout == OMNIQUANT_STREAM  ? (columns * bits + 31) / 32
           : layout == OMNIQUANT_WORDS ? (columns + each - 1) / each
                                       : (columns + 31) / 32 * bits;
}

void check_packing(int64_t rows, int64_t columns, int bits, int layout) {
    const int64_t length = words_per_row(columns, bits, layout);
    Buffer<uint8_t> codes(rows * columns);
    for (int64_t i = 0; i < codes.size(); ++i) {
        codes[i] = static_cast<uint8_t>(random_numbers.next());
    }
    Buffer<uint32_t> words(rows * length);
    std::fill(words.data(), words.data() + words.size(), 0xA5A5A5A5u);
    omniquant_pack(codes.data(), words.data(), columns, length, 0, rows, bits, layout);
    std::vector<uint32_t> expected(static_cast<size_t>(rows * length));
    for (int64_t i = 0; i < codes.size(); ++i) {
        for (int bit = 0; bit < bits; ++bit) {
            const int64_t at = bit_position(columns, i % columns, bits, layout, bit);
            expected[static_cast<size_t>(i / columns * length + at / 32)] |= (codes[i] >> bit & 1u) << at % 32;
        }
    }
    require(std::equal(expected.begin(), expected.end(), words.data()), "packed words");
    Buffer<uint8_t> back(rows * columns);
    omniquant_unpack(words.data(), back.data(), columns, length, 0, rows, bits, layout);
    for (int64_t i = 0; i < codes.size(); ++i) {
        require(back[i] == codes[i] % (1 << bits), "unpacked codes");
    }
    ++cases;
}

// An array of an element type, and its numbers.
struct Elements {
    Buffer<uint16_t> halves;
    Buffer<float> floats;
    int32_t dtype;

    Elements(int64_t count, int32_t dtype)
        : halves(dtype == OMNIQUANT_FLOAT32 ? 0 : count),
          floats(dtype == OMNIQUANT_FLOAT32 ? count : 0),
          dtype(dtype) {}

    void *data() {
        return dtype == OMNIQUANT_FLOAT32 ? static_cast<void *>(floats.data()) : static_cast<void *>(halves.data());
    }

    float get(int64_t i) { return omniquant::load_element(data(), dtype, i); }
    void set(int64_t i, float value) { omniquant::store_element(data(), dtype, i, value); }
};

struct Shape {
    int64_t tokens, columns, rows, group_size;
    int32_t bits, dtype, scale_dtype, threads, lanes;
    bool symmetric, hostile;
};

const float kHostile[] = {INFINITY, -INFINITY, NAN, FLT_MAX, -FLT_MAX, FLT_MIN / 8, -0.0f};

void check_product(const Shape &s) {
    const int64_t groups = (s.columns + s.group_size - 1) / s.group_size;
    const int64_t length = words_per_row(s.columns, s.bits, OMNIQUANT_PLANES);
    Buffer<uint8_t> codes(s.rows * s.columns), zeros(s.symmetric ? 0 : s.rows * groups);
    Buffer<uint32_t> words(s.rows * length);
    Elements x(s.tokens * s.columns, s.dtype), scale(s.rows * groups, s.scale_dtype), out(s.tokens * s.rows, s.dtype);
    for (int64_t i = 0; i < codes.size(); ++i) {
        codes[i] = static_cast<uint8_t>(random_numbers.below(1 << s.bits));
    }
    for (int64_t i = 0; i < zeros.size(); ++i) {
        zeros[i] = static_cast<uint8_t>(random_numbers.next());
    }
    for (int64_t i = 0; i < s.tokens * s.columns; ++i) {
        x.set(i, s.hostile ? kHostile[random_numbers.below(7)] : random_numbers.number());
    }
    for (int64_t i = 0; i < s.rows * groups; ++i) {
        scale.set(i, s.hostile ? kHostile[random_numbers.below(7)] : random_numbers.number() + 1.5f);
    }
    omniquant_pack(codes.data(), words.data(), s.columns, length, 0, s.rows, s.bits, OMNIQUANT_PLANES);
    Buffer<float> workspace(omniquant_packed_linear_workspace(s.tokens, s.columns, s.group_size, s.bits, s.threads));
    std::fill(workspace.data(), workspace.data() + workspace.size(), NAN);
    omniquant_packed_linear(x.data(), words.data(), scale.data(), s.symmetric ? nullptr : zeros.data(), out.data(),
                            workspace.data(), s.tokens, s.columns, s.rows, s.group_size, s.bits, s.dtype, s.scale_dtype,
                            s.threads, s.lanes);
    ++cases;
    for (int64_t i = 0; i < s.tokens * s.rows && !s.hostile; ++i) {
        const int64_t token = i / s.rows, row = i % s.rows;
        double sum = 0.0, size = 0.0;
        for (int64_t c = 0; c < s.columns; ++c) {
            const int64_t g = row * groups + c / s.group_size;
            const int zero = s.symmetric ? 1 << (s.bits - 1) : zeros[g];
            const double factor = static_cast<double>(scale.get(g)) * x.get(token * s.columns + c);
            sum += (codes[row * s.columns + c] - zero) * factor;
            size += (codes[row * s.columns + c] + zero + 256) * std::fabs(factor);
        }
        const double rounding = s.dtype == OMNIQUANT_FLOAT32 ? 0.0 : std::fabs(sum) / 256 + 1e-7;
        require(std::fabs(out.get(i) - sum) <= 1e-6 * size + rounding, "product");
    }
}

void check_fake_quantization(int64_t rows, int64_t columns, bool hostile) {
    Buffer<float> x(rows * columns), grad(rows * columns), out(rows * columns);
    Buffer<float> scale(rows), zero(rows), grad_scale(rows), grad_zero(rows);
    for (int64_t i = 0; i < x.size(); ++i) {
        x[i] = hostile ? kHostile[random_numbers.below(7)] : random_numbers.number();
        grad[i] = random_numbers.number();
    }
    for (int64_t i = 0; i < rows; ++i) {
        scale[i] = 0.1f;
        zero[i] = 7.0f;
    }
    Buffer<int64_t> low_at(rows), high_at(rows);
    if (columns > 0) {
        omniquant_row_extremes(x.data(), grad_scale.data(), grad_zero.data(), low_at.data(), high_at.data(), columns, 0,
                               rows);
    }
    for (int64_t i = 0; i < rows && columns > 0 && !hostile; ++i) {
        require(x[i * columns + low_at[i]] == grad_scale[i] && x[i * columns + high_at[i]] == grad_zero[i], "extremes");
    }
    omniquant_fake_quantize(x.data(), scale.data(), zero.data(), out.data(), columns, 0, rows, 0, 15);
    for (int64_t i = 0; i < x.size() && !hostile; ++i) {
        require(std::fabs(out[i]) <= 0.81f && std::fabs(out[i] - std::fmax(x[i], -0.7f)) <= 0.21f, "fake quantization");
    }
    omniquant_fake_quantize_backward(grad.data(), x.data(), scale.data(), zero.data(), out.data(), grad_scale.data(),
                                     grad_zero.data(), columns, 0, rows, 0, 15);
    for (int symmetric = 0; symmetric < 2; ++symmetric) {
        omniquant_dynamic_fake_quantize(x.data(), out.data(), columns, 0, rows, 4, symmetric);
        for (int64_t i = 0; i < x.size() && !hostile; ++i) {
            require(std::fabs(out[i] - x[i]) <= 0.15f, "dynamic fake quantization");
        }
        omniquant_dynamic_fake_quantize_backward(grad.data(), x.data(), out.data(), columns, 0, rows, 4, symmetric);
    }
    ++cases;
}

void run_all() {
    const std::vector<int64_t> sizes = {0, 1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257, 509};
    for (const int64_t columns : sizes) {
        for (int64_t rows = 0; rows < 3; ++rows) {
            for (int bits = 1; bits <= 8; ++bits) {
                for (int layout = 0; layout < 3; ++layout) {
                    check_packing(rows, columns, bits, layout);
                }
            }
            check_fake_quantization(rows, columns, false);
            check_fake_quantization(rows, columns, true);
        }
    }
    for (int i = 0; i < 600; ++i) {
        const int64_t columns = random_numbers.of(sizes);
        const std::vector<int64_t> groups = {32, 64, 96, 128, 256, std::max<int64_t>(columns, 1), columns + 1};
        check_product({random_numbers.below(7), columns, random_numbers.below(10), random_numbers.of(groups),
                       random_numbers.of<int32_t>({2, 3, 4, 8}), random_numbers.of<int32_t>({0, 1, 2}),
                       random_numbers.of<int32_t>({0, 1, 2}), random_numbers.of<int32_t>({1, 3}),
                       random_numbers.of<int32_t>({0, 16, 8, 1}), random_numbers.below(2) == 0,
                       random_numbers.below(5) == 0});
    }
    for (const int32_t bits : {2, 3, 4, 8}) {  // large enough for threads; more rows than fit at a time
        check_product({17, 509, 67, 64, bits, 0, 0, 3, 0, false, false});
    }
}

}  // namespace

int main() {
    run_all();
    guarded = true;
    run_all();
    std::printf("%d\n", cases);
    return 0;
}
