// Decoding of nf4 and fp4 on the CPU, and the product with one token: what peftlab.compile_decoding compiles.
//
// A block's 16 values are its scale times the book, rounded where they are bfloat16. They are formed once a block; then an entry is one look-up.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if !defined(__AVX2__) || !defined(__FMA__)
#error the kernels look values up with instructions of AVX2 and FMA, or of AVX-512, which this processor lacks
#endif
#include <immintrin.h>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
constexpr int CODES = 16, PARTS = CODES / LANES;
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

// What the 16 codes stand for
struct Values {
  Floats part[PARTS];
};

inline Floats load(const float* at) {
  Floats found;
  std::memcpy(&found, at, sizeof found);
  return found;
}

inline Values load_book(const float* at) {
  Values found;
  for (int i = 0; i < PARTS; i++) found.part[i] = load(at + LANES * i);
  return found;
}

// a + x y, rounded once
inline Floats plus_product(Floats a, Floats x, Floats y) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)a);
#else
  return (Floats)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)a);
#endif
}

// LANES bytes, as numbers
inline Ints widen(const uint8_t* at) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)at));
#else
  return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)at));
#endif
}

// values[code & 15]
inline Floats look_up(const Values& values, Ints code) {
#if defined(__AVX512F__)
  return (Floats)_mm512_permutexvar_ps((__m512i)code, (__m512)values.part[0]);
#else
  const __m256 lower = _mm256_permutevar8x32_ps((__m256)values.part[0], (__m256i)code), upper = _mm256_permutevar8x32_ps((__m256)values.part[1], (__m256i)code);
  return (Floats)_mm256_blendv_ps(lower, upper, (__m256)(code << 28));  // bit 3 of the code, as a sign
#endif
}

// The scale of a block: as it is, or coded, with the absmax of 256 scales and the mean of all
struct Scales {
  const void* absmax;
  const float *nested, *offset, *book;

  float operator()(int64_t k) const {
    if (nested == nullptr) return static_cast<const float*>(absmax)[k];
    return book[static_cast<const uint8_t*>(absmax)[k]] * nested[k / 256] + *offset;  // rounded twice: not to be contracted
  }
};

// The nearest bfloat16, the even one of two; not for NaN
inline Floats nearest_bfloat16(Floats x) {
  const Ints bits = (Ints)x;
  return (Floats)((bits + 0x7fff + ((bits >> 16) & 1)) & -0x10000);
}

// The values of a block with this scale
inline Values scaled(const Values& book, float top, bool round) {
  Values found;
  for (int i = 0; i < PARTS; i++) {
    const Floats exact = book.part[i] * top;
    found.part[i] = round ? nearest_bfloat16(exact) : exact;
    if (round && !std::isfinite(top))
      for (int j = 0; j < LANES; j++)
        if (std::isnan(exact[j])) found.part[i][j] = NAN;
  }
  return found;
}

void decode_narrow(const uint8_t* codes, const Values& values, char* out, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += LANES) {
    const Ints byte = widen(codes + i);
    const Ints pairs = (((Ints)look_up(values, byte >> 4) >> 16) & 0xffff) | (Ints)look_up(values, byte);  // the first entry in the lower half
    std::memcpy(out + 4 * i, &pairs, sizeof pairs);
  }
}

void decode_wide(const uint8_t* codes, const Values& values, char* out, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += LANES) {
    uint8_t each[2 * LANES];
    for (int j = 0; j < LANES; j++) each[2 * j] = codes[i + j] >> 4, each[2 * j + 1] = codes[i + j];
    for (int j = 0; j < 2; j++) {
      const Floats found = look_up(values, widen(each + LANES * j));
      std::memcpy(out + 8 * i + 4 * LANES * j, &found, sizeof found);
    }
  }
}

inline float widened(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float found;
  std::memcpy(&found, &bits, sizeof found);
  return found;
}

inline uint16_t narrowed(float x) {
  if (std::isnan(x)) return 0x7fc0;
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

inline float read(const void* from, int64_t i, bool narrow) {
  return narrow ? widened(static_cast<const uint16_t*>(from)[i]) : static_cast<const float*>(from)[i];
}

}  // namespace

extern "C" {

// In both: codes: two a byte, the first entry in the upper half. absmax, nested, offset, scale_book: a scale a block of b entries, see Scales; nested is
// null where they are not coded. book: what the 16 codes stand for. round: values are rounded to bfloat16. narrow: tensors are bfloat16, else float32.

// out: the values of `count` blocks from `first` on; codes begin with them, scales with block 0.
void decode(const uint8_t* codes, const void* absmax, const float* nested, const float* offset, const float* scale_book, const float* book, void* out,
            int64_t first, int64_t count, int64_t b, bool round, bool narrow, int threads) {
  const Scales scales{absmax, nested, offset, scale_book};
  const Values values = load_book(book);
  char* const to = static_cast<char*>(out);
#pragma omp parallel for num_threads(threads)
  for (int64_t k = 0; k < count; k++) {
    const Values here = scaled(values, scales(first + k), round || narrow);
    if (narrow)
      decode_narrow(codes + k * b / 2, here, to + 2 * k * b, b / 2);
    else
      decode_wide(codes + k * b / 2, here, to + 4 * k * b, b / 2);
  }
}

// y = W x + bias, (n_out,), summed in float32; n_in is a multiple of b, bias may be null.
void multiply(const uint8_t* codes, const void* absmax, const float* nested, const float* offset, const float* scale_book, const float* book, const void* x,
              const void* bias, void* y, int64_t n_out, int64_t n_in, int64_t b, bool round, bool narrow, int threads) {
  const Scales scales{absmax, nested, offset, scale_book};
  const Values values = load_book(book);
  std::vector<float> first(n_in / 2), second(n_in / 2);  // the even and the odd entries of x
  for (int64_t j = 0; j < n_in / 2; j++) first[j] = read(x, 2 * j, narrow), second[j] = read(x, 2 * j + 1, narrow);
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < n_out; i++) {
    Floats even = {}, odd = {};
    const uint8_t* at = codes + i * n_in / 2;
    for (int64_t k = 0; k < n_in / b; k++) {
      const Values here = scaled(values, scales(i * (n_in / b) + k), round);
      for (int64_t j = k * b / 2; j < (k + 1) * b / 2; j += LANES) {
        const Ints byte = widen(at + j);
        even = plus_product(even, look_up(here, byte >> 4), load(&first[j]));
        odd = plus_product(odd, look_up(here, byte), load(&second[j]));
      }
    }
    even += odd;
    float sum = 0;
    for (int j = 0; j < LANES; j++) sum += even[j];
    if (bias != nullptr) sum += read(bias, i, narrow);
    if (narrow)
      static_cast<uint16_t*>(y)[i] = narrowed(sum);
    else
      static_cast<float*>(y)[i] = sum;
  }
}
}
