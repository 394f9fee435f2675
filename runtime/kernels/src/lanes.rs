//! Sixteen `f32` at a time: one AVX-512 register, two AVX2 registers, or an array.

use half::{bf16, f16};
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::__cpuid;
use std::sync::LazyLock;

/// Number of lanes.
pub(crate) const N: usize = 16;

/// Operations on 16 lanes.
///
/// # Safety
/// All methods need the CPU to have the implementor's instruction set.
#[allow(clippy::missing_safety_doc)]
pub(crate) trait Lanes: Copy {
    /// Registers are enough for 24 sums at once.
    const MANY_REGISTERS: bool;
    unsafe fn load(a: &[f32; N]) -> Self;
    unsafe fn load_bf16(a: &[bf16; N]) -> Self;
    unsafe fn load_f16(a: &[f16; N]) -> Self;
    unsafe fn load_i8(a: &[i8; N]) -> Self;
    unsafe fn store(self, a: &mut [f32; N]);
    unsafe fn splat(v: f32) -> Self;
    unsafe fn add(self, o: Self) -> Self;
    unsafe fn sub(self, o: Self) -> Self;
    unsafe fn mul(self, o: Self) -> Self;
    unsafe fn div(self, o: Self) -> Self;
    unsafe fn max(self, o: Self) -> Self;
    unsafe fn min(self, o: Self) -> Self;
    /// `self * a + b`, rounded once (or twice without SIMD).
    unsafe fn mul_add(self, a: Self, b: Self) -> Self;
    /// To the nearest integer.
    unsafe fn round(self) -> Self;
    /// `self 2^n` for integers `n` from -126 to 127.
    unsafe fn scale(self, n: Self) -> Self;
    /// `1 / self` to about 1 ulp, for normal numbers from 1 to `2^126`.
    unsafe fn reciprocal(self) -> Self;
    /// The nearest integers, of two the even one, from -127 to 127.
    unsafe fn store_i8(self, a: &mut [i8; N]);
    unsafe fn sum(self) -> f32;
    /// The sum of each.
    unsafe fn sums(of: &[[f32; N]; N]) -> Self;
    unsafe fn largest(self) -> f32;
}

/// `e^x` to about 1 ulp: `2^n e^r` with `x = n ln 2 + r` and a polynomial in `r` (Cephes `expf.c`). Below -87.3 it gives the
/// smallest normal number instead of a subnormal, which no caller can tell from 0; above 88 it saturates at `e^88`.
///
/// # Safety
/// As [`Lanes`].
#[inline(always)]
pub(crate) unsafe fn exp<L: Lanes>(x: L) -> L {
    // SAFETY: the caller's promise.
    unsafe {
        let s = |v: f32| L::splat(v);
        let x = x.min(s(88.0)).max(s(-87.3));
        let n = x.mul(s(std::f32::consts::LOG2_E)).round();
        let r = n.mul_add(s(-0.693_359_4), x);
        let r = n.mul_add(s(2.121_944_4e-4), r);
        let mut p = s(1.987_569_1e-4);
        for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
            p = p.mul_add(r, s(c));
        }
        let y = p.mul_add(r.mul(r), r).add(s(1.0));
        y.scale(n)
    }
}

/// Where [`prefetch`] brings a cache line to: a hint of `_mm_prefetch`.
pub(crate) mod into {
    /// The first cache, from where it goes before all else that is there: what is read once.
    pub(crate) const ONCE: i32 = 0;
    /// The second cache only, whose misses are more than the first one's.
    pub(crate) const SECOND: i32 = 2;
    /// The first cache.
    pub(crate) const FIRST: i32 = 3;
}

/// Asks for the cache line at `place`, to one of [`into`]. Nothing is read, so there need not be one.
#[inline(always)]
pub(crate) fn prefetch<const INTO: i32, T>(place: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 CPU has the instruction, and it takes any address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<INTO>(place.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = place;
}

/// Asks for what lies [`FAR`] behind `place`, and is read once.
#[inline(always)]
pub(crate) fn prefetch_far<T>(place: *const T) {
    prefetch::<{ into::ONCE }, _>(place.cast::<u8>().wrapping_add(FAR));
}

/// Bytes that a core reads until memory answers.
const FAR: usize = 6144;

/// Whether this CPU reads memory faster if what is read in order is asked for [`FAR`] ahead: Zen 5 and later (a third, with weights in 4 bits).
/// Of others, Zen 4 was measured, whose own prefetching does as much, and what is asked for far ahead comes in its way.
pub(crate) static ASK_FAR: LazyLock<bool> = LazyLock::new(|| {
    #[cfg(target_arch = "x86_64")]
    {
        // Of AMD's family 0x1a, which is the base family, 15, and the extended one (Programmer's Manual, volume 3, appendix E.3.1 and E.3.2).
        let (vendor, version) = (__cpuid(0), __cpuid(1).eax);
        let amd = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat() == b"AuthenticAMD";
        amd && (version >> 8 & 0xf) + (version >> 20 & 0xff) >= 0x1a
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
});

/// Without SIMD.
#[derive(Clone, Copy)]
pub(crate) struct Scalar([f32; N]);

impl Lanes for Scalar {
    const MANY_REGISTERS: bool = false;

    #[inline(always)]
    unsafe fn load(a: &[f32; N]) -> Self {
        Self(*a)
    }
    #[inline(always)]
    unsafe fn load_bf16(a: &[bf16; N]) -> Self {
        Self(a.map(bf16::to_f32))
    }
    #[inline(always)]
    unsafe fn load_f16(a: &[f16; N]) -> Self {
        Self(a.map(f16::to_f32))
    }
    #[inline(always)]
    unsafe fn load_i8(a: &[i8; N]) -> Self {
        Self(a.map(f32::from))
    }
    #[inline(always)]
    unsafe fn store(self, a: &mut [f32; N]) {
        *a = self.0;
    }
    #[inline(always)]
    unsafe fn splat(v: f32) -> Self {
        Self([v; N])
    }
    #[inline(always)]
    unsafe fn add(self, o: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] + o.0[i]))
    }
    #[inline(always)]
    unsafe fn sub(self, o: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] - o.0[i]))
    }
    #[inline(always)]
    unsafe fn mul(self, o: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] * o.0[i]))
    }
    #[inline(always)]
    unsafe fn div(self, o: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] / o.0[i]))
    }
    #[inline(always)]
    unsafe fn max(self, o: Self) -> Self {
        Self(std::array::from_fn(|i| if self.0[i] > o.0[i] { self.0[i] } else { o.0[i] }))
    }
    #[inline(always)]
    unsafe fn min(self, o: Self) -> Self {
        Self(std::array::from_fn(|i| if self.0[i] < o.0[i] { self.0[i] } else { o.0[i] }))
    }
    #[inline(always)]
    unsafe fn mul_add(self, a: Self, b: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] * a.0[i] + b.0[i]))
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        Self(self.0.map(f32::round_ties_even))
    }
    #[inline(always)]
    unsafe fn scale(self, n: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] * f32::from_bits(((n.0[i] as i32 + 127) as u32) << 23)))
    }
    #[inline(always)]
    unsafe fn reciprocal(self) -> Self {
        Self(self.0.map(f32::recip))
    }
    #[inline(always)]
    unsafe fn store_i8(self, a: &mut [i8; N]) {
        *a = self.0.map(|v| v.round_ties_even() as i8);
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        self.0.iter().sum()
    }
    #[inline(always)]
    unsafe fn sums(of: &[[f32; N]; N]) -> Self {
        Self(std::array::from_fn(|i| of[i].iter().sum()))
    }
    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        self.0.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Lanes, N, bf16, f16};
    use std::arch::x86_64::*;

    #[derive(Clone, Copy)]
    pub(crate) struct Avx512(pub(crate) __m512);

    // SAFETY of all methods: the trait asks for the instruction set; loads and stores are of arrays of 16 elements.
    impl Lanes for Avx512 {
        const MANY_REGISTERS: bool = true;

        #[inline(always)]
        unsafe fn load(a: &[f32; N]) -> Self {
            unsafe { Self(_mm512_loadu_ps(a.as_ptr())) }
        }
        #[inline(always)]
        unsafe fn load_bf16(a: &[bf16; N]) -> Self {
            unsafe { Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(a.as_ptr().cast()))))) }
        }
        #[inline(always)]
        unsafe fn load_f16(a: &[f16; N]) -> Self {
            unsafe { Self(_mm512_cvtph_ps(_mm256_loadu_si256(a.as_ptr().cast()))) }
        }
        #[inline(always)]
        unsafe fn load_i8(a: &[i8; N]) -> Self {
            unsafe { Self(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(a.as_ptr().cast())))) }
        }
        #[inline(always)]
        unsafe fn store(self, a: &mut [f32; N]) {
            unsafe { _mm512_storeu_ps(a.as_mut_ptr(), self.0) }
        }
        #[inline(always)]
        unsafe fn splat(v: f32) -> Self {
            unsafe { Self(_mm512_set1_ps(v)) }
        }
        #[inline(always)]
        unsafe fn add(self, o: Self) -> Self {
            unsafe { Self(_mm512_add_ps(self.0, o.0)) }
        }
        #[inline(always)]
        unsafe fn sub(self, o: Self) -> Self {
            unsafe { Self(_mm512_sub_ps(self.0, o.0)) }
        }
        #[inline(always)]
        unsafe fn mul(self, o: Self) -> Self {
            unsafe { Self(_mm512_mul_ps(self.0, o.0)) }
        }
        #[inline(always)]
        unsafe fn div(self, o: Self) -> Self {
            unsafe { Self(_mm512_div_ps(self.0, o.0)) }
        }
        #[inline(always)]
        unsafe fn max(self, o: Self) -> Self {
            unsafe { Self(_mm512_max_ps(self.0, o.0)) }
        }
        #[inline(always)]
        unsafe fn min(self, o: Self) -> Self {
            unsafe { Self(_mm512_min_ps(self.0, o.0)) }
        }
        #[inline(always)]
        unsafe fn mul_add(self, a: Self, b: Self) -> Self {
            unsafe { Self(_mm512_fmadd_ps(self.0, a.0, b.0)) }
        }
        #[inline(always)]
        unsafe fn round(self) -> Self {
            unsafe { Self(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT }>(self.0)) }
        }
        #[inline(always)]
        unsafe fn scale(self, n: Self) -> Self {
            unsafe { Self(_mm512_scalef_ps(self.0, n.0)) }
        }
        #[inline(always)]
        unsafe fn reciprocal(self) -> Self {
            unsafe {
                // To 14 bits; a step of Newton's method doubles that.
                let near = _mm512_rcp14_ps(self.0);
                Self(_mm512_mul_ps(near, _mm512_fnmadd_ps(self.0, near, _mm512_set1_ps(2.0))))
            }
        }
        #[inline(always)]
        unsafe fn store_i8(self, a: &mut [i8; N]) {
            unsafe { _mm_storeu_si128(a.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(self.0))) }
        }
        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            unsafe { _mm512_reduce_add_ps(self.0) }
        }
        #[inline(always)]
        unsafe fn sums(of: &[[f32; N]; N]) -> Self {
            // Of four vectors to quarters: the sums of the first quarters of all four, then of the second ones, ...
            #[inline(always)]
            unsafe fn quarters(of: &[[f32; N]]) -> __m512 {
                unsafe {
                    let (a, b) = (_mm512_loadu_ps(of[0].as_ptr()), _mm512_loadu_ps(of[1].as_ptr()));
                    let (c, d) = (_mm512_loadu_ps(of[2].as_ptr()), _mm512_loadu_ps(of[3].as_ptr()));
                    let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
                    let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
                    let [ab, cd] = [_mm512_castps_pd(ab), _mm512_castps_pd(cd)];
                    _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)))
                }
            }
            // The sum of even and of odd quarters of both.
            #[inline(always)]
            unsafe fn pairs(a: __m512, b: __m512) -> __m512 {
                unsafe { _mm512_add_ps(_mm512_shuffle_f32x4::<0b10_00_10_00>(a, b), _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b)) }
            }
            unsafe {
                let first = pairs(quarters(&of[..4]), quarters(&of[4..8]));
                let second = pairs(quarters(&of[8..12]), quarters(&of[12..]));
                Self(pairs(first, second))
            }
        }
        #[inline(always)]
        unsafe fn largest(self) -> f32 {
            unsafe { _mm512_reduce_max_ps(self.0) }
        }
    }

    #[derive(Clone, Copy)]
    pub(crate) struct Avx2(pub(crate) __m256, pub(crate) __m256);

    impl Avx2 {
        #[inline(always)]
        unsafe fn array(self) -> [f32; N] {
            let mut a = [0.0; N];
            unsafe { self.store(&mut a) };
            a
        }
    }

    // SAFETY of all methods: as above.
    impl Lanes for Avx2 {
        const MANY_REGISTERS: bool = false;

        #[inline(always)]
        unsafe fn load(a: &[f32; N]) -> Self {
            unsafe { Self(_mm256_loadu_ps(a.as_ptr()), _mm256_loadu_ps(a.as_ptr().add(8))) }
        }
        #[inline(always)]
        unsafe fn load_bf16(a: &[bf16; N]) -> Self {
            unsafe {
                let widen = |p: *const bf16| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()))));
                Self(widen(a.as_ptr()), widen(a.as_ptr().add(8)))
            }
        }
        #[inline(always)]
        unsafe fn load_f16(a: &[f16; N]) -> Self {
            unsafe {
                let widen = |p: *const f16| _mm256_cvtph_ps(_mm_loadu_si128(p.cast()));
                Self(widen(a.as_ptr()), widen(a.as_ptr().add(8)))
            }
        }
        #[inline(always)]
        unsafe fn load_i8(a: &[i8; N]) -> Self {
            unsafe {
                let bytes = _mm_loadu_si128(a.as_ptr().cast());
                let widen = |b: __m128i| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b));
                Self(widen(bytes), widen(_mm_srli_si128::<8>(bytes)))
            }
        }
        #[inline(always)]
        unsafe fn store(self, a: &mut [f32; N]) {
            unsafe {
                _mm256_storeu_ps(a.as_mut_ptr(), self.0);
                _mm256_storeu_ps(a.as_mut_ptr().add(8), self.1);
            }
        }
        #[inline(always)]
        unsafe fn splat(v: f32) -> Self {
            unsafe { Self(_mm256_set1_ps(v), _mm256_set1_ps(v)) }
        }
        #[inline(always)]
        unsafe fn add(self, o: Self) -> Self {
            unsafe { Self(_mm256_add_ps(self.0, o.0), _mm256_add_ps(self.1, o.1)) }
        }
        #[inline(always)]
        unsafe fn sub(self, o: Self) -> Self {
            unsafe { Self(_mm256_sub_ps(self.0, o.0), _mm256_sub_ps(self.1, o.1)) }
        }
        #[inline(always)]
        unsafe fn mul(self, o: Self) -> Self {
            unsafe { Self(_mm256_mul_ps(self.0, o.0), _mm256_mul_ps(self.1, o.1)) }
        }
        #[inline(always)]
        unsafe fn div(self, o: Self) -> Self {
            unsafe { Self(_mm256_div_ps(self.0, o.0), _mm256_div_ps(self.1, o.1)) }
        }
        #[inline(always)]
        unsafe fn max(self, o: Self) -> Self {
            unsafe { Self(_mm256_max_ps(self.0, o.0), _mm256_max_ps(self.1, o.1)) }
        }
        #[inline(always)]
        unsafe fn min(self, o: Self) -> Self {
            unsafe { Self(_mm256_min_ps(self.0, o.0), _mm256_min_ps(self.1, o.1)) }
        }
        #[inline(always)]
        unsafe fn mul_add(self, a: Self, b: Self) -> Self {
            unsafe { Self(_mm256_fmadd_ps(self.0, a.0, b.0), _mm256_fmadd_ps(self.1, a.1, b.1)) }
        }
        #[inline(always)]
        unsafe fn round(self) -> Self {
            const MODE: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
            unsafe { Self(_mm256_round_ps::<MODE>(self.0), _mm256_round_ps::<MODE>(self.1)) }
        }
        #[inline(always)]
        unsafe fn scale(self, n: Self) -> Self {
            unsafe {
                let one = |v: __m256, n: __m256| {
                    let n = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
                    _mm256_mul_ps(v, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(n)))
                };
                Self(one(self.0, n.0), one(self.1, n.1))
            }
        }
        #[inline(always)]
        unsafe fn reciprocal(self) -> Self {
            unsafe { Self(_mm256_div_ps(_mm256_set1_ps(1.0), self.0), _mm256_div_ps(_mm256_set1_ps(1.0), self.1)) }
        }
        #[inline(always)]
        unsafe fn store_i8(self, a: &mut [i8; N]) {
            unsafe {
                // Packing goes by halves of registers: put the quarters in order again.
                let both = _mm256_packs_epi32(_mm256_cvtps_epi32(self.0), _mm256_cvtps_epi32(self.1));
                let both = _mm256_permute4x64_epi64::<0b11_01_10_00>(both);
                let bytes = _mm_packs_epi16(_mm256_castsi256_si128(both), _mm256_extracti128_si256::<1>(both));
                _mm_storeu_si128(a.as_mut_ptr().cast(), bytes);
            }
        }
        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            unsafe { self.array().iter().sum() }
        }
        #[inline(always)]
        unsafe fn sums(of: &[[f32; N]; N]) -> Self {
            // Of four vectors: the sums of their even quarters, then of the odd ones.
            #[inline(always)]
            unsafe fn halves(of: &[[f32; N]]) -> __m256 {
                unsafe {
                    let mut halves = [_mm256_setzero_ps(); 4];
                    for (half, of) in halves.iter_mut().zip(of) {
                        *half = _mm256_add_ps(_mm256_loadu_ps(of.as_ptr()), _mm256_loadu_ps(of[8..].as_ptr()));
                    }
                    let [a, b, c, d] = halves;
                    _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d))
                }
            }
            #[inline(always)]
            unsafe fn eight(of: &[[f32; N]]) -> __m256 {
                unsafe {
                    let (a, b) = (halves(&of[..4]), halves(&of[4..8]));
                    _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b))
                }
            }
            unsafe { Self(eight(of), eight(&of[8..])) }
        }
        #[inline(always)]
        unsafe fn largest(self) -> f32 {
            unsafe { self.array().into_iter().fold(f32::NEG_INFINITY, f32::max) }
        }
    }
}
