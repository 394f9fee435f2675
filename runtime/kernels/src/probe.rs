//! What this machine can do at most: bytes read and arithmetic per second, by loops that do nothing else.

use crate::{
    Isa, Kernels,
    ints::Ints,
    isa::{IntTask, Task},
    lanes::{Lanes, N},
};
use std::{
    hint::black_box,
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

/// How long a loop runs at least, so that its start does not count.
const LONG_ENOUGH: Duration = Duration::from_millis(50);
/// Sums that are computed side by side: more than the latency of an addition needs, and as many as there are registers for, with
/// 32 of them and with 16.
const SUMS: usize = 12;
const FEW_SUMS: usize = 5;

/// A kind of arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Arithmetic {
    /// Products of bytes, summed in 32 bits.
    Int8,
    /// Products of bf16, summed in f32.
    Bf16,
    /// Products of f32, summed in f32.
    F32,
}

impl Kernels {
    /// Bytes per second that all threads together read of `data`, each a contiguous part of it, over and over.
    pub fn read_bandwidth(&self, data: &[u8]) -> f64 {
        per_second(|rounds| self.read(data, rounds))
    }

    /// Reads `data` as often as that, each thread a contiguous part of it, and says how many bytes that were.
    fn read(&self, data: &[u8], rounds: usize) -> usize {
        let vectors = data.as_chunks::<{ 4 * N }>().0;
        let parts: Vec<_> = vectors.chunks(vectors.len().div_ceil(self.pool.threads()).max(1)).collect();
        self.pool.run(parts.len(), |i| (0..rounds).for_each(|_| self.isa.run_ints(Read { vectors: parts[i] })));
        rounds * size_of_val(vectors)
    }

    /// How long reading all of `data` once takes, one after the other, the least of some times.
    pub fn read_time<'a>(&self, data: impl Iterator<Item = &'a [u8]> + Clone) -> Duration {
        let time = |_| {
            let start = Instant::now();
            data.clone().for_each(|data| _ = self.read(data, 1));
            start.elapsed()
        };
        (0..4).map(time).min().unwrap_or_default()
    }

    /// Multiplications and additions per second of all threads together, with the instructions that do the most of them at once;
    /// `None` if the instruction set in use has none for this arithmetic.
    pub fn peak(&self, arithmetic: Arithmetic) -> Option<f64> {
        let vectors = |rounds| match arithmetic {
            Arithmetic::Int8 => {
                let mut operations = 0;
                self.isa.run_ints(Dot { rounds, operations: &mut operations });
                Some(operations)
            }
            Arithmetic::Bf16 => bf16_products(self.isa, rounds),
            Arithmetic::F32 if self.isa.has_many_registers() => Some(self.isa.run(MultiplyAdd::<SUMS> { rounds })),
            Arithmetic::F32 => Some(self.isa.run(MultiplyAdd::<FEW_SUMS> { rounds })),
        };
        let loops = |rounds| tile_products(self.isa, arithmetic, rounds).or_else(|| vectors(rounds));
        loops(0)?;
        Some(per_second(|rounds| {
            let operations = AtomicUsize::new(0);
            self.pool.run(self.pool.threads(), |_| _ = operations.fetch_add(loops(rounds).unwrap_or(0), Ordering::Relaxed));
            operations.into_inner()
        }))
    }
}

impl Isa {
    fn has_many_registers(self) -> bool {
        matches!(self, Self::Avx512 | Self::Avx512Vnni | Self::Avx512Bf16 | Self::Amx)
    }
}

/// What `f` does per second, with as many rounds as take long enough.
fn per_second(f: impl Fn(usize) -> usize) -> f64 {
    let mut rounds = 1;
    loop {
        let start = Instant::now();
        let done = f(rounds);
        let time = start.elapsed();
        if time >= LONG_ENOUGH || done == 0 {
            return done as f64 / time.as_secs_f64().max(f64::MIN_POSITIVE);
        }
        rounds *= 2;
    }
}

struct Read<'a> {
    vectors: &'a [[u8; 4 * N]],
}

impl IntTask for Read<'_> {
    #[inline(always)]
    unsafe fn run<I: Ints>(self) {
        const SIDE_BY_SIDE: usize = 8;
        // SAFETY: the caller's promise.
        unsafe {
            let mut sums = [I::splat(0); SIDE_BY_SIDE];
            let (groups, rest) = self.vectors.as_chunks::<SIDE_BY_SIDE>();
            for vectors in groups {
                for (sum, v) in sums.iter_mut().zip(vectors) {
                    *sum = sum.add(I::load(v));
                }
            }
            for v in rest {
                sums[0] = sums[0].add(I::load(v));
            }
            finish(sums);
        }
    }
}

/// Uses sums, so that they must be computed.
///
/// # Safety
/// The CPU has the instruction set of `I`.
#[inline(always)]
unsafe fn finish<I: Ints, const S: usize>(sums: [I; S]) {
    for sum in sums {
        let mut bytes = [0; 4 * N];
        // SAFETY: the caller's promise.
        unsafe { sum.store(&mut bytes) };
        black_box(bytes);
    }
}

/// Vectors of codes that a round multiplies: they stay in the first cache.
const VECTORS: usize = 64;

struct Dot<'a> {
    rounds: usize,
    operations: &'a mut usize,
}

impl Dot<'_> {
    /// # Safety
    /// The CPU has the instruction set of `I`.
    #[inline(always)]
    unsafe fn sums<I: Ints, const S: usize>(self) {
        let codes = black_box([[3u8; 4 * N]; VECTORS]);
        let x: [i32; S] = black_box(std::array::from_fn(|i| i as i32 + 1));
        // SAFETY: the caller's promise.
        unsafe {
            let mut sums = [I::splat(0); S];
            for _ in 0..self.rounds {
                for codes in &codes {
                    let codes = I::load(codes);
                    for (sum, x) in sums.iter_mut().zip(x) {
                        *sum = sum.dot::<8>(codes, x);
                    }
                }
            }
            finish(sums);
        }
        *self.operations = self.rounds * VECTORS * S * 4 * N * 2;
    }
}

impl IntTask for Dot<'_> {
    #[inline(always)]
    unsafe fn run<I: Ints>(self) {
        // SAFETY: the caller's promise.
        unsafe { if I::MANY_REGISTERS { self.sums::<I, SUMS>() } else { self.sums::<I, FEW_SUMS>() } }
    }
}

struct MultiplyAdd<const S: usize> {
    rounds: usize,
}

impl<const S: usize> Task for MultiplyAdd<S> {
    type Out = usize;

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) -> usize {
        // The sums come to a limit, so that no number is ever special.
        let (factor, term) = black_box((0.5, 1.0));
        // SAFETY: the caller's promise.
        unsafe {
            let (factor, term) = (L::splat(factor), L::splat(term));
            let mut sums = [L::splat(0.0); S];
            for _ in 0..self.rounds * VECTORS {
                for sum in &mut sums {
                    *sum = sum.mul_add(factor, term);
                }
            }
            for sum in sums {
                let mut values = [0.0; N];
                sum.store(&mut values);
                black_box(values);
            }
        }
        self.rounds * VECTORS * S * N * 2
    }
}

/// Operations of that many rounds; `None` if there is no instruction.
#[cfg(target_arch = "x86_64")]
fn bf16_products(isa: Isa, rounds: usize) -> Option<usize> {
    use std::arch::x86_64::*;

    /// # Safety
    /// The CPU has AVX-512 F and BF16.
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn sums(rounds: usize) {
        // Two times 1.0: sums grow to 2^24 and stay there.
        let ones = _mm512_set1_epi32(black_box(0x3f80_3f80));
        // SAFETY: any bits of integers are bits of bf16.
        let ones: __m512bh = unsafe { std::mem::transmute(ones) };
        let mut sums = [_mm512_setzero_ps(); SUMS];
        for _ in 0..rounds * VECTORS {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, ones, ones);
            }
        }
        black_box(sums);
    }

    if !matches!(isa, Isa::Avx512Bf16 | Isa::Amx) {
        return None;
    }
    // SAFETY: the CPU has it: `Kernels` is made only with an instruction set that was found.
    unsafe { sums(rounds) };
    Some(rounds * VECTORS * SUMS * 2 * N * 2)
}

/// Operations of that many rounds in tiles; `None` if there are none, or none for this arithmetic.
#[cfg(target_arch = "x86_64")]
fn tile_products(isa: Isa, arithmetic: Arithmetic, rounds: usize) -> Option<usize> {
    use crate::amx;

    macro_rules! products {
        ($name:ident, $dot:literal) => {
            /// Two by two tiles of 16 rows of 64 bytes of `operand`, multiplied at least once.
            ///
            /// # Safety
            /// The CPU has AMX and the process may use it.
            unsafe fn $name(rounds: usize, operand: &[u8; 1024]) {
                // SAFETY: the caller's promise; all that is read is `operand`.
                unsafe {
                    amx::configure();
                    std::arch::asm!(
                        "tileloadd tmm4, [{operand} + {row}]",
                        "tileloadd tmm5, [{operand} + {row}]",
                        "tileloadd tmm6, [{operand} + {row}]",
                        "tileloadd tmm7, [{operand} + {row}]",
                        "tilezero tmm0",
                        "tilezero tmm1",
                        "tilezero tmm2",
                        "tilezero tmm3",
                        "2:",
                        concat!($dot, " tmm0, tmm4, tmm6"),
                        concat!($dot, " tmm1, tmm4, tmm7"),
                        concat!($dot, " tmm2, tmm5, tmm6"),
                        concat!($dot, " tmm3, tmm5, tmm7"),
                        "dec {rounds}",
                        "jnz 2b",
                        rounds = inout(reg) rounds.max(1) => _,
                        operand = in(reg) operand,
                        row = in(reg) 64usize,
                        out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                        out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                        options(nostack, readonly),
                    );
                    amx::release();
                }
            }
        };
    }
    products!(int8, "tdpbsud");
    products!(bf16, "tdpbf16ps");

    // Bytes of 1.0 in bf16, or some.
    let operand: [u8; 1024] = std::array::from_fn(|i| [0x80, 0x3f][i % 2]);
    let (products, of_a_sum): (unsafe fn(usize, &[u8; 1024]), usize) = match arithmetic {
        Arithmetic::Int8 => (int8, 64),
        Arithmetic::Bf16 => (bf16, 32),
        Arithmetic::F32 => return None,
    };
    if isa != Isa::Amx {
        return None;
    }
    // SAFETY: the CPU has it: `Kernels` is made only with an instruction set that was found.
    unsafe { products(rounds, &operand) };
    Some(rounds * 4 * 16 * 16 * of_a_sum * 2)
}

#[cfg(not(target_arch = "x86_64"))]
fn tile_products(_: Isa, _: Arithmetic, _: usize) -> Option<usize> {
    None
}

#[cfg(not(target_arch = "x86_64"))]
fn bf16_products(_: Isa, _: usize) -> Option<usize> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_instruction_set_is_measured() {
        let data: Vec<u8> = (0..100_000).map(|i| i as u8).collect();
        for isa in Isa::ALL {
            let Some(kernels) = Kernels::with_isa(2, isa) else { continue };
            assert!(kernels.read_bandwidth(&data) > 0.0, "{isa:?}");
            for arithmetic in [Arithmetic::Int8, Arithmetic::F32] {
                assert!(kernels.peak(arithmetic).is_some_and(|p| p > 0.0 && p.is_finite()), "{isa:?} {arithmetic:?}");
            }
            if let Some(peak) = kernels.peak(Arithmetic::Bf16) {
                assert!(isa.has_many_registers() && peak > 0.0, "{isa:?}");
            }
        }
        assert_eq!(Kernels::new(1).read_bandwidth(&[0; 10]), 0.0, "less than a vector is not read");
    }
}
