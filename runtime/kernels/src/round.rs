//! Rounding to 8 bits: of what is multiplied with quantized weights, and of rows of a KV cache.

use crate::{
    Kernels,
    isa::Task,
    lanes::{Lanes, N},
};

/// Steps per 1 and 1 step of numbers that are rounded to 8 bits.
///
/// # Safety
/// The CPU has the instruction set of `L`.
#[inline(always)]
pub(crate) unsafe fn steps<L: Lanes>(x: &[f32]) -> (f32, f32) {
    let (chunks, tail) = x.as_chunks::<N>();
    // SAFETY: the caller's promise.
    let largest = unsafe {
        let mut largest = L::splat(tail.iter().fold(0.0, |m, v| v.abs().max(m)));
        for c in chunks {
            let v = L::load(c);
            largest = largest.max(v.max(L::splat(0.0).sub(v)));
        }
        largest.largest()
    };
    // Zeros have no largest number; any step serves them.
    (127.0 / largest.max(1e-30), largest / 127.0)
}

/// Rows for a state: `[rows, width]` to 8 bits with a scale for each.
struct Keep<'a> {
    rows: &'a [f32],
    width: usize,
    codes: &'a mut [i8],
    scales: &'a mut [f32],
}

impl Task for Keep<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let rows = self.rows.chunks_exact(self.width).zip(self.codes.chunks_exact_mut(self.width));
        for ((x, codes), kept) in rows.zip(self.scales) {
            // SAFETY: the caller's promise.
            unsafe {
                let (inverse, scale) = steps::<L>(x);
                for (x, codes) in x.chunks(N).zip(codes.chunks_mut(N)) {
                    let (mut padded, mut bytes) = ([0.0; N], [0; N]);
                    padded[..x.len()].copy_from_slice(x);
                    L::load(&padded).mul(L::splat(inverse)).store_i8(&mut bytes);
                    codes.copy_from_slice(&bytes[..x.len()]);
                }
                *kept = scale;
            }
        }
    }
}

/// Rounds `x * inverse`, of up to 16 numbers, to `codes` and gives the integers; those that are missing count as zeros.
///
/// # Safety
/// The CPU has the instruction set of `L`.
#[inline(always)]
pub(crate) unsafe fn round_to<L: Lanes>(x: &[f32], inverse: L, codes: &mut [i8; N]) -> L {
    let mut padded = [0.0; N];
    let x = x.as_array().unwrap_or_else(|| {
        padded[..x.len()].copy_from_slice(x);
        &padded
    });
    // SAFETY: the caller's promise.
    unsafe {
        let v = L::load(x).mul(inverse).round();
        v.store_i8(codes);
        v
    }
}

impl Kernels {
    /// `rows [n, width]` rounded to -127..=127, `codes [n, width]`, in steps of max|row| / 127, `scales [n]`.
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn round(&self, rows: &[f32], width: usize, codes: &mut [i8], scales: &mut [f32]) {
        assert!(rows.len() == codes.len() && rows.len() == scales.len() * width, "codes must be [n, width] and scales [n]");
        if width > 0 {
            self.isa.run(Keep { rows, width, codes, scales });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn rows_are_rounded_to_the_nearest_of_127_steps(n in 0usize..5, width in 1usize..70, mut seed: u32) {
            let mut next = || {
                seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (seed >> 8) as f32 / (1 << 23) as f32 - 1.0
            };
            let x: Vec<f32> = (0..n * width).map(|_| next()).collect();
            let row = |x: &[f32]| {
                let largest = x.iter().fold(0f32, |m, v| m.max(v.abs()));
                x.iter().map(|v| (v * (127.0 / largest.max(1e-30))).round_ties_even() * (largest / 127.0)).collect::<Vec<_>>()
            };
            let expected: Vec<f32> = x.chunks(width).flat_map(row).collect();
            for isa in Isa::ALL.into_iter().filter(|i| i.is_supported()) {
                let (mut codes, mut scales) = (vec![0; n * width], vec![0.0; n]);
                Kernels::with_isa(1, isa).unwrap().round(&x, width, &mut codes, &mut scales);
                let numbers = codes.iter().enumerate().map(|(i, c)| f32::from(*c) * scales[i / width]).collect::<Vec<_>>();
                prop_assert_eq!(&numbers, &expected);
            }
        }
    }
}
