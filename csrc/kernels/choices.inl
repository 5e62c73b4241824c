// The vectors of a beam search: kBeamWidth choices for each of as many scales as one register has room for. Choices are
// numbered within their scale; no operation mixes those of two scales.

/// Partial choices that a beam search keeps.
constexpr std::int64_t kBeamWidth = 4;

/// Columns whose errors are gathered before they reach the columns after them.
constexpr std::int64_t kBeamColumns = 8;
static_assert(kPanelColumns % kBeamColumns == 0);

/// Searches that run side by side: one computes while the other waits for its own results.
constexpr std::int64_t kBeamsAtOnce = 3;

template <typename T>
constexpr std::int64_t kBeamLanes = kLanes<T> < kBeamWidth ? kBeamWidth : kLanes<T>;

template <typename T>
constexpr std::int64_t kScalesPerBeam = kBeamLanes<T> / kBeamWidth;

template <typename T>
struct BeamInteger;
template <>
struct BeamInteger<float> {
  using type = std::int32_t;
};
template <>
struct BeamInteger<double> {
  using type = std::int64_t;
};

/// One value for each choice.
template <typename T>
using Choices = ShortVector<T, kBeamLanes<T>>::type;

/// One integer for each choice.
template <typename T>
using ChoiceIntegers = ShortVector<typename BeamInteger<T>::type, kBeamLanes<T>>::type;

template <typename T>
MINIQUANT_INLINE Choices<T> for_each_choice(T value) {
  return value - Choices<T>{};
}

/// a * b + c, fused where the instruction set has it.
template <typename T>
MINIQUANT_INLINE Choices<T> multiply_add_choices(Choices<T> a, Choices<T> b, Choices<T> c) {
  if constexpr (kBeamLanes<T> == kLanes<T>) {
    return reinterpret_cast<Choices<T>>(
        multiply_add(reinterpret_cast<Vector<T>>(a), reinterpret_cast<Vector<T>>(b), reinterpret_cast<Vector<T>>(c)));
  } else {
    return a * b + c;
  }
}

/// 1 or -1.
template <typename T>
MINIQUANT_INLINE Choices<T> one_with_sign_of(Choices<T> values) {
  const Choices<T> sign = for_each_choice<T>(T(-0.0));
  const Choices<T> one = for_each_choice<T>(T(1));
  return reinterpret_cast<Choices<T>>(
      (reinterpret_cast<ChoiceIntegers<T>>(values) & reinterpret_cast<ChoiceIntegers<T>>(sign)) |
      reinterpret_cast<ChoiceIntegers<T>>(one));
}

/// Of each scale's choices, those numbered `from`, 0 to 3.
template <typename T>
MINIQUANT_INLINE Choices<T> permute(Choices<T> values, ChoiceIntegers<T> from) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == sizeof(float)) {
    return reinterpret_cast<Choices<T>>(
        _mm512_maskz_permutevar_ps(0xFFFF, reinterpret_cast<__m512>(values), reinterpret_cast<__m512i>(from)));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == sizeof(float)) {
    return reinterpret_cast<Choices<T>>(
        _mm256_permutevar_ps(reinterpret_cast<__m256>(values), reinterpret_cast<__m256i>(from)));
  }
#endif
  Choices<T> result;
  for (std::int64_t lane = 0; lane < kBeamLanes<T>; ++lane) {
    result[lane] = values[lane / kBeamWidth * kBeamWidth + from[lane]];
  }
  return result;
}

/// Each scale's integers with every kWith of them in the place of the next kWith.
template <std::int64_t kWith, typename T>
MINIQUANT_INLINE ChoiceIntegers<T> exchange(ChoiceIntegers<T> values) {
  static_assert(kWith == 1 || kWith == 2);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == sizeof(float)) {
    return reinterpret_cast<ChoiceIntegers<T>>(_mm512_maskz_shuffle_epi32(0xFFFF, reinterpret_cast<__m512i>(values),
                                                                          kWith == 1 ? _MM_PERM_CDAB : _MM_PERM_BADC));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == sizeof(float)) {
    return reinterpret_cast<ChoiceIntegers<T>>(
        _mm256_shuffle_epi32(reinterpret_cast<__m256i>(values), kWith == 1 ? 0xB1 : 0x4E));
  }
#endif
  ChoiceIntegers<T> result;
  for (std::int64_t lane = 0; lane < kBeamLanes<T>; ++lane) {
    result[lane] = values[lane / kWith % 2 == 0 ? lane + kWith : lane - kWith];
  }
  return result;
}

/// A value for each choice by its number among those of its scale.
template <typename T>
MINIQUANT_INLINE ChoiceIntegers<T> by_number(int first, int second, int third, int fourth) {
  const int values[kBeamWidth] = {first, second, third, fourth};
  ChoiceIntegers<T> result;
  for (std::int64_t lane = 0; lane < kBeamLanes<T>; ++lane) {
    result[lane] = values[lane % kBeamWidth];
  }
  return result;
}

/// One step of a sorting network: of a key and its partner, the smaller where `smaller` is not 0.
template <std::int64_t kWith, typename T>
MINIQUANT_INLINE ChoiceIntegers<T> compare_exchange(ChoiceIntegers<T> keys, ChoiceIntegers<T> smaller) {
  const ChoiceIntegers<T> partner = exchange<kWith, T>(keys);
  const ChoiceIntegers<T> low = keys < partner ? keys : partner;
  const ChoiceIntegers<T> high = keys < partner ? partner : keys;
  return smaller != 0 ? low : high;
}

/// Each scale's four keys in order: a bitonic sort.
template <bool kAscending, typename T>
MINIQUANT_INLINE ChoiceIntegers<T> sort(ChoiceIntegers<T> keys) {
  constexpr int kUp = kAscending ? 1 : 0;
  constexpr int kDown = 1 - kUp;
  keys = compare_exchange<1, T>(keys, by_number<T>(kUp, kDown, kDown, kUp));
  keys = compare_exchange<2, T>(keys, by_number<T>(kUp, kUp, kDown, kDown));
  return compare_exchange<1, T>(keys, by_number<T>(kUp, kDown, kUp, kDown));
}

/// Of a key, the values that number the choices of two vectors.
constexpr std::int64_t kChoicesPerKey = 2 * kBeamWidth;

/// An integer that orders choices by their losses, which are not negative, and then by their numbers.
template <typename T>
MINIQUANT_INLINE ChoiceIntegers<T> key_of(Choices<T> loss, ChoiceIntegers<T> number) {
  using Integer = BeamInteger<T>::type;
  return (reinterpret_cast<ChoiceIntegers<T>>(loss) & static_cast<Integer>(-kChoicesPerKey)) | number;
}
