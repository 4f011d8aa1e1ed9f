// Random bits of elements, and stochastic rounding with them. Part of cpu_kernels.h.

// Where the elements of a vector stand in the Weyl sequence of a stream, but for the place of the first.
INLINE U weyl_lanes(const Noise& noise) { return (U)lane_numbers() * WEYL + noise.key0; }

// reference.random_bits before a half is taken: the words of the vector that starts at element `start`.
INLINE U random_words(U lanes, uint64_t start, const Noise& noise) {
    U word = lanes + (uint32_t)start * WEYL;
    word = (word ^ word >> 16) * 0x7FEB352Du;
    word = (word ^ word >> 15 ^ noise.key1) * 0x846CA68Bu;
    return word ^ word >> 16;
}

// Which half of a word a role takes.
INLINE I half_of(U word, const Noise& noise) { return (I)(noise.lower_half ? word & 0xffff : word >> 16); }

// 16 random bits for each element of the group that starts at element `start`.
INLINE void random_bits(I (&bits)[4], uint64_t start, const Noise& noise) {
    const U lanes = weyl_lanes(noise);
    for (int k = 0; k < 4; ++k) bits[k] = half_of(random_words(lanes, start + k * LANES, noise), noise);
}

// reference.round_stochastically, then the code of its result: the steps counted from the format's smallest binade.
template <int Type>
INLINE I stochastic_code(F real, I bits) {
    constexpr int mantissa = Spec<Type>::mantissa, smallest = Spec<Type>::stochastic_field;
    constexpr int kept = 23 - mantissa < 16 ? 23 - mantissa : 16;
    const Parts of = parts<Type>(real);
    const F uniform = __builtin_convertvector(bits >> (16 - kept), F) * floats(1.0f / (1 << kept));
    const I field = larger(of.magnitude >> 23, integers(smallest));
    const F steps_per_unit = (F)((254 + mantissa - field) << 23);
    const F steps = (F)of.magnitude * steps_per_unit + uniform;  // not negative: truncation is floor
    const I whole = __builtin_convertvector(steps, I);
    if constexpr (Type == BF16) {
        const I rounded = (I)(__builtin_convertvector(whole, F) * (F)((field - mantissa) << 23));
        return signed_code<Type>((I)((U)rounded >> 16), of);
    }
    return signed_code<Type>(whole + ((field - smallest) << mantissa), of);
}

template <int Type>
INLINE void encode_stochastically(uint8_t* to, const Group& real, const I (&bits)[4]) {
    I codes[4];
    for (int k = 0; k < 4; ++k) codes[k] = stochastic_code<Type>(real[k], bits[k]);
    if constexpr (SIZE[Type] == 2)
        store_halves(to, codes);
    else
        store_bytes(to, codes);
}
