// Products of bfloat16 matrices with the matrix units of a processor (AMX), and how they read their factors.
//
// A unit multiplies a tile of 16 rows of 32 numbers with one of 32 x 16 numbers, in which two rows are interleaved
// ("pairs"), and adds to a tile of 16 x 16 numbers in float32. All sizes here are whole numbers of tiles, and an
// even number of tiles in both directions of the result.

#if HALF && defined(__linux__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define TILES 1
#include <sys/syscall.h>
#include <unistd.h>

namespace {

typedef uint16_t Half;
constexpr int64_t SIDE = 16, DEPTH = 32, TILE = SIDE * DEPTH;

inline int64_t padded(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

// Asks the system for the use of tiles, once in a process.
bool tiles_allowed() {
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool allowed = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    return allowed;
}

// Sets up the tiles of this thread while it exists; other code sets up its own.
struct Tiles {
    Tiles() {
        // Static, because some compilers do not see that all of it is read.
        struct alignas(64) Shape {
            uint8_t palette = 1, start = 0, unused[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        };
        static const Shape shape;
        _tile_loadconfig(&shape);
    }
    ~Tiles() { _tile_release(); }
};

// The second factor of a product: tiles of 32 x 16 numbers, in pairs, with `across` and `down` numbers between them.
struct Pairs { const Half* start; int64_t across, down; };

// Computes A B, added to C if `add`, in blocks of 2 x 2 tiles. A (16 m, step_a), B (32 k, 16 n), C (16 m, step_c)
void multiply(
    const Half* a, int64_t step_a, Pairs b, float* c, int64_t step_c, int64_t m, int64_t n, int64_t k, bool add) {
    asm volatile("" ::: "memory");  // loads of tiles do not say what they read
    for (int64_t i = 0; i < m; i += 2)
        for (int64_t j = 0; j < n; j += 2) {
            const Half *rows = a + i * SIDE * step_a, *columns = b.start + j * b.across;
            float *above = c + i * SIDE * step_c + j * SIDE, *below = above + SIDE * step_c;
            if (add) {
                _tile_loadd(0, above, step_c * 4);
                _tile_loadd(1, above + SIDE, step_c * 4);
                _tile_loadd(2, below, step_c * 4);
                _tile_loadd(3, below + SIDE, step_c * 4);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            for (int64_t s = 0; s < k; s++) {
                _tile_loadd(4, rows + s * DEPTH, step_a * 2);
                _tile_loadd(6, columns + s * b.down, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, columns + b.across + s * b.down, 64);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(5, rows + SIDE * step_a + s * DEPTH, step_a * 2);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, above, step_c * 4);
            _tile_stored(1, above + SIDE, step_c * 4);
            _tile_stored(2, below, step_c * 4);
            _tile_stored(3, below + SIDE, step_c * 4);
        }
}

// Exchanges rows and columns of 16 x 16 numbers of 32 bits.
inline void transpose(__m512i x[16]) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 4
    for (int d = 1; d < 16; d *= 2) {
        const __mmask16 odd = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(d));
        const __m512i other = _mm512_add_epi32(lane, _mm512_set1_epi32(16));
        const __m512i upper = _mm512_mask_sub_epi32(lane, odd, other, _mm512_set1_epi32(d));
        const __m512i lower = _mm512_mask_mov_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(d)), odd, other);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
            if ((i & d) == 0) {
                const __m512i a = x[i], b = x[i + d];
                x[i] = _mm512_permutex2var_epi32(a, upper, b);
                x[i + d] = _mm512_permutex2var_epi32(a, lower, b);
            }
    }
}

// Vectors of a head, (tokens, heads, SIZE), from a token on. Vectors after `size` are read as zeros.
struct Vectors {
    const Half* start;
    int64_t step, size;

    Vectors(const Half* all, int64_t heads, int64_t head, int64_t first, int64_t count)
        : start(all + (first * heads + head) * SIZE), step(heads * SIZE), size(count) {}

    __m512i part(int64_t token, int64_t d) const {
        return token < size ? _mm512_loadu_si512(start + token * step + d) : _mm512_setzero_si512();
    }
};

// Writes vectors as rows, (count, SIZE).
void write_rows(Vectors from, int64_t count, Half* to) {
    for (int64_t t = 0; t < count; t++)
        for (int d = 0; d < SIZE; d += DEPTH) _mm512_store_si512(to + t * SIZE + d, from.part(t, d));
}

// The tiles of vectors that are the columns of a factor, (SIZE, tokens).
inline Pairs as_columns(const Half* tiles) { return {tiles, SIZE / DEPTH * TILE, TILE}; }

// Writes these tiles, the columns' matrix as rows, (SIZE, step), or both.
void write_columns(Vectors from, int64_t count, Half* to, Half* rows = nullptr, int64_t step = 0) {
    for (int64_t t = 0; t < count; t += SIDE)
        for (int d = 0; d < SIZE; d += DEPTH) {
            __m512i x[16];
            for (int i = 0; i < 16; i++) x[i] = from.part(t + i, d);
            transpose(x);
            Half* tile = to ? to + (t / SIDE * (SIZE / DEPTH) + d / DEPTH) * TILE : nullptr;
            for (int i = 0; i < 16; i++) {
                if (tile) _mm512_store_si512(tile + i * DEPTH, x[i]);
                if (rows) {  // a number of 32 bits has those of two rows
                    Half* row = rows + (d + 2 * i) * step + t;
                    _mm256_store_si256((__m256i*)row, _mm512_cvtepi32_epi16(x[i]));
                    _mm256_store_si256((__m256i*)(row + step), _mm512_cvtepi32_epi16(_mm512_srli_epi32(x[i], 16)));
                }
            }
        }
}

// The tiles of vectors that are the rows of a factor, (tokens, SIZE).
inline Pairs as_rows(const Half* tiles) { return {tiles, TILE, SIZE / SIDE * TILE}; }

// The order that interleaves the numbers of two vectors: the first or the second half of each.
inline __m512i interleaving(int first) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i one = _mm512_add_epi32(lane, _mm512_set1_epi32(first));
    return _mm512_or_si512(one, _mm512_slli_epi32(_mm512_add_epi32(one, _mm512_set1_epi32(32)), 16));
}

// Writes these tiles; the vectors become the rows of the factor from `first` on.
void write_pairs(Vectors from, int64_t first, int64_t count, Half* to) {
    const __m512i low = interleaving(0), high = interleaving(16);
    for (int64_t t = 0; t < count; t += 2)
        for (int d = 0; d < SIZE; d += DEPTH) {
            const __m512i a = from.part(t, d), b = from.part(t + 1, d);
            const int64_t row = first + t;
            Half* tile = to + (row / DEPTH * (SIZE / SIDE) + d / SIDE) * TILE + row % DEPTH / 2 * DEPTH;
            _mm512_store_si512(tile, _mm512_permutex2var_epi16(a, low, b));
            _mm512_store_si512(tile + TILE, _mm512_permutex2var_epi16(a, high, b));
        }
}

}  // namespace

#else
#define TILES 0
#endif
