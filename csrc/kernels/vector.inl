// One vector register of T for the instruction set this file is compiled for. Included by kernels_isa.cpp only.

#if defined(__AVX512F__)
constexpr std::int64_t kVectorBytes = 64;
constexpr std::int64_t kVectorsPerTile = 3;
constexpr std::int64_t kStripColumns = 8;  // 3 x 8 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr std::int64_t kVectorBytes = 32;
constexpr std::int64_t kVectorsPerTile = 3;
constexpr std::int64_t kStripColumns = 4;  // 3 x 4 accumulators of 16 registers
#else
constexpr std::int64_t kVectorBytes = 16;
constexpr std::int64_t kVectorsPerTile = 2;
constexpr std::int64_t kStripColumns = 4;
#endif

#define MINIQUANT_INLINE inline __attribute__((always_inline))

template <typename T>
struct VectorOf {
  using type __attribute__((vector_size(kVectorBytes), may_alias)) = T;
  using unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias)) = T;
};
template <typename T>
using Vector = VectorOf<T>::type;

template <typename T>
constexpr std::int64_t kLanes = kVectorBytes / static_cast<std::int64_t>(sizeof(T));

/// Lanes (rows of W in a sweep) that one call of the innermost loop serves.
template <typename T>
constexpr std::int64_t kTileRows = kVectorsPerTile * kLanes<T>;
static_assert(kPanelColumns % kTileRows<float> == 0 && kPanelColumns % kStripColumns == 0);
static_assert(kSpareRows >= kStripColumns - 1);

template <typename T>
MINIQUANT_INLINE Vector<T> load(const T* from) {
  return *reinterpret_cast<const VectorOf<T>::unaligned*>(from);
}

template <typename T>
MINIQUANT_INLINE void store(T* to, Vector<T> value) {
  *reinterpret_cast<VectorOf<T>::unaligned*>(to) = value;
}

template <typename T>
MINIQUANT_INLINE Vector<T> broadcast(T value) {
  return value - Vector<T>{};
}

/// a * b + c, fused where the instruction set has it.
MINIQUANT_INLINE Vector<float> multiply_add(Vector<float> a, Vector<float> b, Vector<float> c) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vector<float>>(
      _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
  return reinterpret_cast<Vector<float>>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
  return a * b + c;
#endif
}

MINIQUANT_INLINE Vector<double> multiply_add(Vector<double> a, Vector<double> b, Vector<double> c) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vector<double>>(
      _mm512_fmadd_pd(reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b), reinterpret_cast<__m512d>(c)));
#elif defined(__FMA__)
  return reinterpret_cast<Vector<double>>(
      _mm256_fmadd_pd(reinterpret_cast<__m256d>(a), reinterpret_cast<__m256d>(b), reinterpret_cast<__m256d>(c)));
#else
  return a * b + c;
#endif
}

/// `Count` values of T. Overloads below, as GCC converts no vectors of a dependent type.
template <typename T, std::int64_t Count>
struct ShortVector {
  using type __attribute__((vector_size(Count * sizeof(T)))) = T;
  using unaligned __attribute__((vector_size(Count * sizeof(T)), aligned(1), may_alias)) = T;
};

/// to[lane] = value[lane], which are integers within int8.
MINIQUANT_INLINE void store_codes(std::int8_t* to, Vector<float> value) {
  const auto integers = __builtin_convertvector(value, ShortVector<std::int32_t, kLanes<float>>::type);
  *reinterpret_cast<ShortVector<std::int8_t, kLanes<float>>::unaligned*>(to) =
      __builtin_convertvector(integers, ShortVector<std::int8_t, kLanes<float>>::type);
}

MINIQUANT_INLINE void store_codes(std::int8_t* to, Vector<double> value) {
  for (std::int64_t lane = 0; lane < kLanes<double>; ++lane) {
    to[lane] = static_cast<std::int8_t>(static_cast<std::int32_t>(value[lane]));
  }
}
