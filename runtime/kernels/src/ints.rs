//! Sixteen `i32` at a time, and products of the bytes in them.

use crate::lanes::{Lanes, N, Scalar};

/// Operations on 16 lanes of 4 bytes. Integer sums wrap, and are the same with every instruction set.
///
/// # Safety
/// All methods need the CPU to have the implementor's instruction set.
#[allow(clippy::missing_safety_doc)]
pub(crate) trait Ints: Copy {
    /// Floats of the same instruction set.
    type Floats: Lanes;
    /// Registers are enough for 24 sums at once.
    const MANY_REGISTERS: bool;
    unsafe fn load(a: &[u8; 4 * N]) -> Self;
    unsafe fn store(self, a: &mut [u8; 4 * N]);
    unsafe fn splat(v: i32) -> Self;
    unsafe fn add(self, o: Self) -> Self;
    unsafe fn sub(self, o: Self) -> Self;
    unsafe fn mul(self, o: Self) -> Self;
    unsafe fn and(self, o: Self) -> Self;
    /// Shifts zeros in.
    unsafe fn shift_right<const BITS: u32>(self) -> Self;
    /// Shifts zeros in.
    unsafe fn shift_left<const BITS: u32>(self) -> Self;
    /// Differences of 16 bits each.
    unsafe fn sub_16(self, o: Self) -> Self;
    /// Products of signed 16 bits each, divided by 2^15 and rounded; those of -2^15 with itself excluded.
    unsafe fn mul_round_16(self, o: Self) -> Self;
    /// `self` + the products of a lane's four unsigned bytes of `codes`, of which only the low `BITS` (3, 4 or 8) bits are set,
    /// with the four signed bytes of `x`, -128 excluded.
    unsafe fn dot<const BITS: u8>(self, codes: Self, x: i32) -> Self;
    unsafe fn to_f32(self) -> Self::Floats;
}

/// Without SIMD.
#[derive(Clone, Copy)]
pub(crate) struct ScalarInts([i32; N]);

impl ScalarInts {
    #[inline(always)]
    fn zip(self, o: Self, f: impl Fn(i32, i32) -> i32) -> Self {
        Self(std::array::from_fn(|i| f(self.0[i], o.0[i])))
    }

    #[inline(always)]
    fn zip_16(self, o: Self, f: impl Fn(i16, i16) -> i16) -> Self {
        self.zip(o, |a, b| {
            let [low, high] = [0, 16].map(|at| u32::from(f((a >> at) as i16, (b >> at) as i16) as u16));
            (low | high << 16) as i32
        })
    }
}

impl Ints for ScalarInts {
    type Floats = Scalar;
    const MANY_REGISTERS: bool = false;

    #[inline(always)]
    unsafe fn load(a: &[u8; 4 * N]) -> Self {
        Self(std::array::from_fn(|i| i32::from_le_bytes(std::array::from_fn(|j| a[4 * i + j]))))
    }
    #[inline(always)]
    unsafe fn store(self, a: &mut [u8; 4 * N]) {
        for (a, v) in a.as_chunks_mut::<4>().0.iter_mut().zip(self.0) {
            *a = v.to_le_bytes();
        }
    }
    #[inline(always)]
    unsafe fn splat(v: i32) -> Self {
        Self([v; N])
    }
    #[inline(always)]
    unsafe fn add(self, o: Self) -> Self {
        self.zip(o, i32::wrapping_add)
    }
    #[inline(always)]
    unsafe fn sub(self, o: Self) -> Self {
        self.zip(o, i32::wrapping_sub)
    }
    #[inline(always)]
    unsafe fn mul(self, o: Self) -> Self {
        self.zip(o, i32::wrapping_mul)
    }
    #[inline(always)]
    unsafe fn and(self, o: Self) -> Self {
        self.zip(o, |a, b| a & b)
    }
    #[inline(always)]
    unsafe fn shift_right<const BITS: u32>(self) -> Self {
        Self(self.0.map(|v| (v as u32 >> BITS) as i32))
    }
    #[inline(always)]
    unsafe fn shift_left<const BITS: u32>(self) -> Self {
        Self(self.0.map(|v| v << BITS))
    }
    #[inline(always)]
    unsafe fn sub_16(self, o: Self) -> Self {
        self.zip_16(o, i16::wrapping_sub)
    }
    #[inline(always)]
    unsafe fn mul_round_16(self, o: Self) -> Self {
        self.zip_16(o, |a, b| ((i32::from(a) * i32::from(b) + (1 << 14)) >> 15) as i16)
    }
    #[inline(always)]
    unsafe fn dot<const BITS: u8>(self, codes: Self, x: i32) -> Self {
        let x = x.to_le_bytes();
        self.zip(codes, |sum, codes| {
            let products = codes.to_le_bytes().into_iter().zip(x).map(|(c, x)| i32::from(c) * i32::from(x as i8));
            products.fold(sum, i32::wrapping_add)
        })
    }
    #[inline(always)]
    unsafe fn to_f32(self) -> Scalar {
        // SAFETY: needs nothing.
        unsafe { Scalar::load(&self.0.map(|v| v as f32)) }
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Ints256, Ints512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Ints, N};
    use crate::lanes::{Avx2, Avx512};
    use std::arch::x86_64::*;

    /// AVX-512, with VNNI or without.
    #[derive(Clone, Copy)]
    pub(crate) struct Ints512<const VNNI: bool>(__m512i);

    // SAFETY of all methods: the trait asks for the instruction set; loads and stores are of arrays of 64 bytes.
    impl<const VNNI: bool> Ints for Ints512<VNNI> {
        type Floats = Avx512;
        const MANY_REGISTERS: bool = true;

        #[inline(always)]
        unsafe fn load(a: &[u8; 4 * N]) -> Self {
            unsafe { Self(_mm512_loadu_si512(a.as_ptr().cast())) }
        }
        #[inline(always)]
        unsafe fn store(self, a: &mut [u8; 4 * N]) {
            unsafe { _mm512_storeu_si512(a.as_mut_ptr().cast(), self.0) }
        }
        #[inline(always)]
        unsafe fn splat(v: i32) -> Self {
            unsafe { Self(_mm512_set1_epi32(v)) }
        }
        #[inline(always)]
        unsafe fn add(self, o: Self) -> Self {
            unsafe { Self(_mm512_add_epi32(self.0, o.0)) }
        }
        #[inline(always)]
        unsafe fn sub(self, o: Self) -> Self {
            unsafe { Self(_mm512_sub_epi32(self.0, o.0)) }
        }
        #[inline(always)]
        unsafe fn mul(self, o: Self) -> Self {
            unsafe { Self(_mm512_mullo_epi32(self.0, o.0)) }
        }
        #[inline(always)]
        unsafe fn and(self, o: Self) -> Self {
            unsafe { Self(_mm512_and_si512(self.0, o.0)) }
        }
        #[inline(always)]
        unsafe fn shift_right<const BITS: u32>(self) -> Self {
            unsafe { Self(_mm512_srli_epi32::<BITS>(self.0)) }
        }
        #[inline(always)]
        unsafe fn shift_left<const BITS: u32>(self) -> Self {
            unsafe { Self(_mm512_slli_epi32::<BITS>(self.0)) }
        }
        #[inline(always)]
        unsafe fn sub_16(self, o: Self) -> Self {
            unsafe { Self(_mm512_sub_epi16(self.0, o.0)) }
        }
        #[inline(always)]
        unsafe fn mul_round_16(self, o: Self) -> Self {
            unsafe { Self(_mm512_mulhrs_epi16(self.0, o.0)) }
        }
        #[inline(always)]
        unsafe fn dot<const BITS: u8>(self, codes: Self, x: i32) -> Self {
            unsafe {
                let x = _mm512_set1_epi32(x);
                if VNNI {
                    return Self(_mm512_dpbusd_epi32(self.0, codes.0, x));
                }
                let sums = if BITS <= 4 {
                    // Two products are at most 2 * 15 * 127, so 16 bits hold them.
                    _mm512_madd_epi16(_mm512_maddubs_epi16(codes.0, x), _mm512_set1_epi16(1))
                } else {
                    let even = _mm512_madd_epi16(
                        _mm512_and_si512(codes.0, _mm512_set1_epi16(0xff)),
                        _mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(x)),
                    );
                    let odd = _mm512_madd_epi16(_mm512_srli_epi16::<8>(codes.0), _mm512_srai_epi16::<8>(x));
                    _mm512_add_epi32(even, odd)
                };
                Self(_mm512_add_epi32(self.0, sums))
            }
        }
        #[inline(always)]
        unsafe fn to_f32(self) -> Avx512 {
            unsafe { Avx512(_mm512_cvtepi32_ps(self.0)) }
        }
    }

    /// AVX2, with AVX-VNNI or without.
    #[derive(Clone, Copy)]
    pub(crate) struct Ints256<const VNNI: bool>(__m256i, __m256i);

    impl<const VNNI: bool> Ints256<VNNI> {
        #[inline(always)]
        unsafe fn half_dot<const BITS: u8>(sum: __m256i, codes: __m256i, x: __m256i) -> __m256i {
            unsafe {
                if VNNI {
                    return _mm256_dpbusd_avx_epi32(sum, codes, x);
                }
                let sums = if BITS <= 4 {
                    // Two products are at most 2 * 15 * 127, so 16 bits hold them.
                    _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), _mm256_set1_epi16(1))
                } else {
                    let even = _mm256_madd_epi16(
                        _mm256_and_si256(codes, _mm256_set1_epi16(0xff)),
                        _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(x)),
                    );
                    let odd = _mm256_madd_epi16(_mm256_srli_epi16::<8>(codes), _mm256_srai_epi16::<8>(x));
                    _mm256_add_epi32(even, odd)
                };
                _mm256_add_epi32(sum, sums)
            }
        }
    }

    // SAFETY of all methods: as above.
    impl<const VNNI: bool> Ints for Ints256<VNNI> {
        type Floats = Avx2;
        const MANY_REGISTERS: bool = false;

        #[inline(always)]
        unsafe fn load(a: &[u8; 4 * N]) -> Self {
            unsafe { Self(_mm256_loadu_si256(a.as_ptr().cast()), _mm256_loadu_si256(a.as_ptr().add(32).cast())) }
        }
        #[inline(always)]
        unsafe fn store(self, a: &mut [u8; 4 * N]) {
            unsafe {
                _mm256_storeu_si256(a.as_mut_ptr().cast(), self.0);
                _mm256_storeu_si256(a.as_mut_ptr().add(32).cast(), self.1);
            }
        }
        #[inline(always)]
        unsafe fn splat(v: i32) -> Self {
            unsafe { Self(_mm256_set1_epi32(v), _mm256_set1_epi32(v)) }
        }
        #[inline(always)]
        unsafe fn add(self, o: Self) -> Self {
            unsafe { Self(_mm256_add_epi32(self.0, o.0), _mm256_add_epi32(self.1, o.1)) }
        }
        #[inline(always)]
        unsafe fn sub(self, o: Self) -> Self {
            unsafe { Self(_mm256_sub_epi32(self.0, o.0), _mm256_sub_epi32(self.1, o.1)) }
        }
        #[inline(always)]
        unsafe fn mul(self, o: Self) -> Self {
            unsafe { Self(_mm256_mullo_epi32(self.0, o.0), _mm256_mullo_epi32(self.1, o.1)) }
        }
        #[inline(always)]
        unsafe fn and(self, o: Self) -> Self {
            unsafe { Self(_mm256_and_si256(self.0, o.0), _mm256_and_si256(self.1, o.1)) }
        }
        #[inline(always)]
        unsafe fn shift_right<const BITS: u32>(self) -> Self {
            unsafe {
                let by = _mm_cvtsi32_si128(BITS as i32);
                Self(_mm256_srl_epi32(self.0, by), _mm256_srl_epi32(self.1, by))
            }
        }
        #[inline(always)]
        unsafe fn shift_left<const BITS: u32>(self) -> Self {
            unsafe {
                let by = _mm_cvtsi32_si128(BITS as i32);
                Self(_mm256_sll_epi32(self.0, by), _mm256_sll_epi32(self.1, by))
            }
        }
        #[inline(always)]
        unsafe fn sub_16(self, o: Self) -> Self {
            unsafe { Self(_mm256_sub_epi16(self.0, o.0), _mm256_sub_epi16(self.1, o.1)) }
        }
        #[inline(always)]
        unsafe fn mul_round_16(self, o: Self) -> Self {
            unsafe { Self(_mm256_mulhrs_epi16(self.0, o.0), _mm256_mulhrs_epi16(self.1, o.1)) }
        }
        #[inline(always)]
        unsafe fn dot<const BITS: u8>(self, codes: Self, x: i32) -> Self {
            unsafe {
                let x = _mm256_set1_epi32(x);
                Self(Self::half_dot::<BITS>(self.0, codes.0, x), Self::half_dot::<BITS>(self.1, codes.1, x))
            }
        }
        #[inline(always)]
        unsafe fn to_f32(self) -> Avx2 {
            unsafe { Avx2(_mm256_cvtepi32_ps(self.0), _mm256_cvtepi32_ps(self.1)) }
        }
    }
}
