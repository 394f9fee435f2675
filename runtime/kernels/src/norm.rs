//! Normalisations over the last axis, and the rotary embedding.

use crate::{
    Kernels, Panels, Rounded, Src,
    isa::Task,
    lanes::{Lanes, N},
};

/// Rows per piece of work, so that a piece is worth a thread.
fn rows_per_piece(n: usize) -> usize {
    (16_384 / n.max(1)).max(1)
}

/// Layer norm if there is a bias, RMS norm else, over rows as long as `weight`.
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct Norm<'a> {
    pub weight: &'a [f32],
    pub bias: Option<&'a [f32]>,
    pub eps: f32,
}

struct Normalize<'a> {
    norm: Norm<'a>,
    rows: &'a mut [f32],
}

impl Task for Normalize<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Norm { weight, bias, eps } = self.norm;
        let n = weight.len();
        for row in self.rows.chunks_exact_mut(n) {
            // SAFETY: the caller's promise.
            unsafe {
                let mean = if bias.is_some() { sum::<L>(row, 0.0, |x| x) / n as f32 } else { 0.0 };
                let centre = L::splat(mean);
                let squares = sum::<L>(row, mean, |x| {
                    let d = x.sub(centre);
                    d.mul(d)
                });
                let scale = 1.0 / (squares / n as f32 + eps).sqrt();
                match bias {
                    Some(bias) => {
                        for ((x, w), b) in row.iter_mut().zip(weight).zip(bias) {
                            *x = (*x - mean) * scale * w + b;
                        }
                    }
                    None => row.iter_mut().zip(weight).for_each(|(x, w)| *x = *x * scale * w),
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

/// A row `[x1, x2]` of two halves to `[x1 cos - x2 sin, x2 cos + x1 sin]`.
#[inline(always)]
pub(crate) fn rotate(row: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (first, second) = row.split_at_mut(cos.len());
    for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

/// What [`rotate`] makes of a row, times `scale`.
#[inline(always)]
pub(crate) fn rotated(row: &[f32], cos: &[f32], sin: &[f32], scale: f32, out: &mut [f32]) {
    let ((first, second), (out_first, out_second)) = (row.split_at(cos.len()), out.split_at_mut(cos.len()));
    let outs = out_first.iter_mut().zip(out_second);
    for ((((a, b), (x, y)), cos), sin) in first.iter().zip(second).zip(outs).zip(cos).zip(sin) {
        (*x, *y) = ((a * cos - b * sin) * scale, (b * cos + a * sin) * scale);
    }
}

impl Kernels {
    /// `(x - mean) / sqrt(var + eps) * weight + bias` over rows as long as `weight`.
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn layer_norm(&self, x: Src<'_, f32>, weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
        assert_eq!(weight.len(), bias.len(), "weight and bias must have one length");
        self.norm(x, Norm { weight, bias: Some(bias), eps }, out);
    }

    /// `x / sqrt(mean(x²) + eps) * weight` over rows as long as `weight`.
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn rms_norm(&self, x: Src<'_, f32>, weight: &[f32], eps: f32, out: &mut [f32]) {
        self.norm(x, Norm { weight, bias: None, eps }, out);
    }

    fn norm(&self, x: Src<'_, f32>, norm: Norm<'_>, out: &mut [f32]) {
        let n = norm.weight.len();
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
            self.isa.run(Normalize { norm, rows });
        });
    }

    /// The sum of two operands, one of which may be what `sum` holds, to `sum`, and its norm to `normed`. If a product with `next` is all
    /// that becomes of the norm, and rounds many rows, these are rounded as they are made: they are given back then, and what `normed`
    /// holds means nothing. That spares memory to write them and read them again.
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn add_norm(
        &self,
        terms: [Src<'_, f32>; 2],
        norm: Norm<'_>,
        sum: &mut [f32],
        normed: &mut [f32],
        next: Option<&Panels<'_>>,
    ) -> Option<Rounded> {
        let n = norm.weight.len();
        if n == 0 || sum.is_empty() {
            return None;
        }
        let fits = |x: &Src<'_, f32>| matches!(x, Src::Slice(x) if x.len() == sum.len()) || matches!(x, Src::InPlace);
        assert!(sum.len().is_multiple_of(n) && normed.len() == sum.len(), "rows must be as long as weight");
        assert!(terms.iter().all(fits) && norm.bias.is_none_or(|b| b.len() == n), "operands must have the lengths of the results");
        let make = |first: usize, sum: &mut [f32], normed: &mut [f32]| {
            let range = first..first + sum.len();
            match terms {
                [Src::Slice(x), Src::Slice(y)] => {
                    sum.iter_mut().zip(&x[range.clone()]).zip(&y[range]).for_each(|((s, x), y)| *s = x + y);
                }
                [Src::InPlace, Src::Slice(y)] => sum.iter_mut().zip(&y[range]).for_each(|(s, y)| *s += y),
                [Src::Slice(x), Src::InPlace] => sum.iter_mut().zip(&x[range]).for_each(|(s, x)| *s += x),
                [Src::InPlace, Src::InPlace] => sum.iter_mut().for_each(|s| *s += *s),
            }
            normed.copy_from_slice(sum);
            self.isa.run(Normalize { norm, rows: normed });
        };
        let grid = next.and_then(|next| self.rounding(next, sum.len() / n)).filter(|grid| grid.k == n);
        let rounded = grid.and_then(|grid| self.round_made(sum, normed, grid, make));
        if rounded.is_none() {
            let piece = rows_per_piece(n) * n;
            self.pool.pieces(sum.chunks_mut(piece).zip(normed.chunks_mut(piece)), |i, (sum, normed)| make(i * piece, sum, normed));
        }
        rounded
    }

    /// Rotates in place, as [`Self::rotary`], rows `first..first + s` of each head of `data [lead, heads, rows, d]`, whose heads
    /// are `head_stride` apart; `cos` and `sin` are `[lead, s, d/2]`.
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn rotate_rows(&self, data: &mut [f32], head_stride: usize, first: usize, cos: &[f32], sin: &[f32], [heads, s, d]: [usize; 3]) {
        let half = d / 2;
        if half * s == 0 {
            return;
        }
        assert!(d == 2 * half && (first + s) * d <= head_stride, "rows must be in the head, with even d");
        let lead = data.len() / head_stride / heads.max(1);
        assert!(cos.len() == lead * s * half && sin.len() == cos.len(), "cos and sin must be [lead, s, d/2]");
        self.pool.chunks(data, head_stride, |head, rows| {
            let angles = head / heads * s * half;
            for (i, row) in rows[first * d..(first + s) * d].chunks_exact_mut(d).enumerate() {
                let at = angles + i * half;
                rotate(row, &cos[at..at + half], &sin[at..at + half]);
            }
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
            out.copy_from_slice(x);
            for (i, row) in out.chunks_exact_mut(d).enumerate() {
                let at = angles + i * half;
                rotate(row, &cos[at..at + half], &sin[at..at + half]);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Floats, Isa, Rows, quantize};
    use proptest::prelude::*;
    use vlmc_artifact::quant::{Method, pack_panels};

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
                // The norm of a sum, with each operand in place and without.
                let y: Vec<f32> = (0..m * n).map(|i| value(i + 3)).collect();
                let total: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
                for bias in [Some(b.as_slice()), None] {
                    let mut expected = vec![0.0; m * n];
                    match bias {
                        Some(b) => k.layer_norm(Src::Slice(&total), &w, b, 1e-6, &mut expected),
                        None => k.rms_norm(Src::Slice(&total), &w, 1e-6, &mut expected),
                    }
                    let cases = [([Src::Slice(&x), Src::Slice(&y)], &x), ([Src::InPlace, Src::Slice(&y)], &x), ([Src::Slice(&x), Src::InPlace], &y)];
                    for (terms, held) in cases {
                        let (mut sum, mut normed) = (held.clone(), vec![f32::NAN; m * n]);
                        let norm = Norm { weight: &w, bias, eps: 1e-6 };
                        prop_assert!(k.add_norm(terms, norm, &mut sum, &mut normed, None).is_none());
                        prop_assert_eq!(&sum, &total);
                        prop_assert_eq!(&normed, &expected);
                    }
                }
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

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20))]
        /// Rows that are rounded as they are made give the product that they give if they are rounded later.
        #[test]
        fn rounded_norms_are_multiplied_as_norms(
            (scheme, k) in prop_oneof![(Just("int8"), 1usize..600), (Just("int4"), 1usize..600), (Just("int4g32"), 256usize..600)],
            m in 90usize..120, n in 1usize..70, threads in 1usize..4, with_bias: bool, seed: u32,
        ) {
            let scheme = scheme.parse().unwrap();
            let value = |i: usize| ((i as f32 + seed as f32 % 97.0) * 0.7).sin();
            let vector = |n: usize, at: usize| (at..at + n).map(value).collect::<Vec<f32>>();
            let [x, y] = [0, 3].map(|at| vector(m * k, at));
            let (weight, bias) = (vector(k, 5), vector(k, 7));
            let norm = Norm { weight: &weight, bias: with_bias.then_some(&bias), eps: 1e-6 };
            let bytes = pack_panels(&quantize(Isa::Scalar, &vector(n * k, 9), k, scheme, Method::Round), k, scheme);
            let w = Panels::new(Floats::Quant(&bytes, scheme), n, k).unwrap();
            for isa in Isa::ALL.into_iter().filter(|i| i.is_supported()) {
                let kernels = Kernels::with_isa(threads, isa).unwrap();
                let product = |next: Option<&Panels<'_>>| {
                    let (mut sum, mut normed, mut out) = (x.clone(), vec![f32::NAN; m * k], vec![f32::NAN; m * n]);
                    let rounded = kernels.add_norm([Src::InPlace, Src::Slice(&y)], norm, &mut sum, &mut normed, next);
                    let is_rounded = rounded.is_some();
                    kernels.linear(rounded.map_or(Rows::Floats(&normed), Rows::Rounded), &w, None, None, true, &mut out);
                    (is_rounded, sum, out)
                };
                let ((rounded, sum, out), (_, expected_sum, expected)) = (product(Some(&w)), product(None));
                prop_assert_eq!(rounded, kernels.rounding(&w, m).is_some());
                #[cfg(target_arch = "x86_64")]
                prop_assert_eq!(rounded, m > 96 && isa != Isa::Amx);
                prop_assert_eq!(sum, expected_sum);
                prop_assert_eq!(out, expected);
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
        // The second of two rows with room for a third, in place.
        let mut rows = [9.0; 24];
        rows[4..8].copy_from_slice(&x[..4]);
        rows[16..20].copy_from_slice(&x[4..]);
        Kernels::new(1).rotate_rows(&mut rows, 12, 1, &cos, &sin, [2, 1, 4]);
        assert_eq!((&rows[4..8], &rows[16..20]), (&out[..4], &out[4..]));
        assert!(rows.iter().enumerate().all(|(i, v)| matches!(i, 4..8 | 16..20) || *v == 9.0));
    }
}
