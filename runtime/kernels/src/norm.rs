//! Normalisations over the last axis, and the rotary embedding.

use crate::{
    Kernels, Src,
    isa::Task,
    lanes::{Lanes, N},
};

/// Rows per piece of work, so that a piece is worth a thread.
fn rows_per_piece(n: usize) -> usize {
    (16_384 / n.max(1)).max(1)
}

struct Norm<'a> {
    weight: &'a [f32],
    /// Layer norm if there is one, RMS norm else.
    bias: Option<&'a [f32]>,
    eps: f32,
    rows: &'a mut [f32],
}

impl Task for Norm<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let n = self.weight.len();
        for row in self.rows.chunks_exact_mut(n) {
            // SAFETY: the caller's promise.
            unsafe {
                let mean = if self.bias.is_some() { sum::<L>(row, 0.0, |x| x) / n as f32 } else { 0.0 };
                let centre = L::splat(mean);
                let squares = sum::<L>(row, mean, |x| {
                    let d = x.sub(centre);
                    d.mul(d)
                });
                let scale = 1.0 / (squares / n as f32 + self.eps).sqrt();
                match self.bias {
                    Some(bias) => {
                        for ((x, w), b) in row.iter_mut().zip(self.weight).zip(bias) {
                            *x = (*x - mean) * scale * w + b;
                        }
                    }
                    None => row.iter_mut().zip(self.weight).for_each(|(x, w)| *x = *x * scale * w),
                }
            }
        }
    }
}

/// Sum of `f` over the row, whose last vector is filled up with `fill`, for which `f` must be 0.
///
/// # Safety
/// The CPU has the instruction set of `L`.
#[inline(always)]
unsafe fn sum<L: Lanes>(row: &[f32], fill: f32, f: impl Fn(L) -> L) -> f32 {
    let (chunks, tail) = row.as_chunks::<N>();
    // SAFETY: the caller's promise.
    unsafe {
        let mut acc = L::splat(0.0);
        for c in chunks {
            acc = acc.add(f(L::load(c)));
        }
        if !tail.is_empty() {
            let mut last = [fill; N];
            last[..tail.len()].copy_from_slice(tail);
            acc = acc.add(f(L::load(&last)));
        }
        acc.sum()
    }
}

impl Kernels {
    /// `(x - mean) / sqrt(var + eps) * weight + bias` over rows as long as `weight`.
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn layer_norm(&self, x: Src<'_, f32>, weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
        assert_eq!(weight.len(), bias.len(), "weight and bias must have one length");
        self.norm(x, weight, Some(bias), eps, out);
    }

    /// `x / sqrt(mean(x²) + eps) * weight` over rows as long as `weight`.
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn rms_norm(&self, x: Src<'_, f32>, weight: &[f32], eps: f32, out: &mut [f32]) {
        self.norm(x, weight, None, eps, out);
    }

    fn norm(&self, x: Src<'_, f32>, weight: &[f32], bias: Option<&[f32]>, eps: f32, out: &mut [f32]) {
        let n = weight.len();
        if n == 0 || out.is_empty() {
            return;
        }
        assert!(out.len().is_multiple_of(n), "rows must be as long as weight");
        if let Src::Slice(x) = x {
            assert_eq!(x.len(), out.len(), "x and out must have one length");
        }
        let piece = rows_per_piece(n) * n;
        self.pool.chunks(out, piece, |i, rows| {
            if let Src::Slice(x) = x {
                rows.copy_from_slice(&x[i * piece..i * piece + rows.len()]);
            }
            self.isa.run(Norm { weight, bias, eps, rows });
        });
    }

    /// `x [lead, heads, s, d]`, `cos` and `sin [lead, s, d/2]` to the rotation of the pairs `(i, i + d/2)`.
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn rotary(&self, x: &[f32], cos: &[f32], sin: &[f32], [lead, heads, s, d]: [usize; 4], out: &mut [f32]) {
        let half = d / 2;
        assert!(x.len() == lead * heads * s * d && out.len() == x.len() && d == 2 * half, "x must be [lead, heads, s, d] with even d");
        assert!(cos.len() == lead * s * half && sin.len() == cos.len(), "cos and sin must be [lead, s, d/2]");
        if out.is_empty() {
            return;
        }
        self.pool.chunks(out, s * d, |head, out| {
            let angles = head / heads * s * half;
            let x = &x[head * s * d..][..s * d];
            for (row, (x, out)) in x.chunks_exact(d).zip(out.chunks_exact_mut(d)).enumerate() {
                let at = angles + row * half;
                let (cos, sin) = (&cos[at..at + half], &sin[at..at + half]);
                let ((x1, x2), (o1, o2)) = (x.split_at(half), out.split_at_mut(half));
                for i in 0..half {
                    o1[i] = x1[i] * cos[i] - x2[i] * sin[i];
                    o2[i] = x2[i] * cos[i] + x1[i] * sin[i];
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn norms_match_their_formulas(n in 1usize..70, m in 0usize..9, threads in 1usize..3, offset in -3f32..3.0, seed: u32) {
            let value = |i: usize| ((i as f32 + seed as f32 % 97.0) * 0.7).sin() + offset;
            let x: Vec<f32> = (0..m * n).map(value).collect();
            let (w, b): (Vec<f32>, Vec<f32>) = (0..n).map(|i| (1.0 + value(i) * 0.1, value(i + 7))).unzip();
            for isa in Isa::ALL.into_iter().filter(|i| i.is_supported()) {
                let k = Kernels::with_isa(threads, isa).unwrap();
                let (mut ln, mut rms, mut in_place) = (vec![0.0; m * n], vec![0.0; m * n], x.clone());
                k.layer_norm(Src::Slice(&x), &w, &b, 1e-6, &mut ln);
                k.rms_norm(Src::Slice(&x), &w, 1e-6, &mut rms);
                k.layer_norm(Src::InPlace, &w, &b, 1e-6, &mut in_place);
                prop_assert_eq!(&in_place, &ln);
                for (r, row) in x.chunks_exact(n).enumerate() {
                    let row: Vec<f64> = row.iter().map(|v| f64::from(*v)).collect();
                    let mean = row.iter().sum::<f64>() / n as f64;
                    let var = row.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / n as f64;
                    let square = row.iter().map(|v| v * v).sum::<f64>() / n as f64;
                    for c in 0..n {
                        let (w, b) = (f64::from(w[c]), f64::from(b[c]));
                        let expected = [(row[c] - mean) / (var + 1e-6).sqrt() * w + b, row[c] / (square + 1e-6).sqrt() * w];
                        for (got, e) in [ln[r * n + c], rms[r * n + c]].into_iter().zip(expected) {
                            // With few elements the variance may be nothing but rounding.
                            let slack = if var < 1e-6 { 0.2 } else { 2e-4 };
                            prop_assert!((f64::from(got) - e).abs() <= slack * (1.0 + e.abs()), "{isa:?} {got} {e}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn rotary_turns_pairs() {
        let x = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0];
        let (cos, sin) = ([0.0, 1.0], [1.0, 0.0]);
        let mut out = [0.0; 8];
        Kernels::new(1).rotary(&x, &cos, &sin, [1, 2, 1, 4], &mut out);
        assert_eq!(out, [-3.0, 2.0, 1.0, 4.0, -7.0, 6.0, 5.0, 8.0]);
    }
}
