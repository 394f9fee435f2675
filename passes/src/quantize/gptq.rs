//! GPTQ (Frantar et al., 2023): codes of a matrix `W` that keep `W x` for the inputs `x` of calibration, not `W` itself.
//!
//! With `H = Σ x xᵀ`, codes that stand for `Q` have the error `tr((W - Q) H (W - Q)ᵀ)`. With `H = L Lᵀ`, that is for each row the
//! square of `Lᵀ (w - q)`, which is made small element by element, from the last to the first: what is rounded wrong in one column
//! is made up for in those that follow. (Babai's nearest plane, which Chen et al., 2025, show to be GPTQ; the original works with
//! a factor of the inverse of `H`.)

use rayon::prelude::*;
use vlmc_ir::{
    Scheme,
    quant::{self, Codes, Method},
};

/// Rows that are worked on together.
const LANES: usize = 16;
/// Columns of the factor that are found before the rest is brought up to date.
const PANEL: usize = 32;
/// What is added to the diagonal of `H`, as part of its mean, so that columns which inputs hardly use stay near their weights.
const DAMPING: f32 = 0.01;

type Lane = [f32; LANES];

/// `H`, factored, with its columns in the order in which codes are found: the last first.
pub struct Factor {
    k: usize,
    scheme: Scheme,
    /// The column at each position. Groups stay together: the group that counts most is last, and in it the column that counts most.
    order: Vec<usize>,
    /// Columns of each position's group end there.
    ends: Vec<usize>,
    /// `Lᵀ`, row-major; what is below the diagonal means nothing.
    upper: Vec<f32>,
}

impl Factor {
    /// Of `h`, symmetric `[k, k]`, for weights in `scheme`.
    pub fn new(h: &[f32], k: usize, scheme: Scheme) -> Self {
        let diagonal: Vec<f32> = (0..k).map(|i| h[i * k + i]).map(|d| if d.is_finite() { d } else { 0.0 }).collect();
        let mut groups: Vec<Vec<usize>> = (0..k).collect::<Vec<_>>().chunks(scheme.group_len(k)).map(<[usize]>::to_vec).collect();
        let weight = |group: &Vec<usize>| group.iter().map(|c| diagonal[*c]).sum::<f32>() / group.len().max(1) as f32;
        groups.iter_mut().for_each(|g| g.sort_by(|a, b| diagonal[*a].total_cmp(&diagonal[*b])));
        groups.sort_by(|a, b| weight(a).total_cmp(&weight(b)));
        let ends = groups
            .iter()
            .scan(0, |end, g| {
                Some({
                    *end += g.len();
                    vec![*end; g.len()]
                })
            })
            .flatten()
            .collect();
        let order = groups.concat();

        let mean = diagonal.iter().sum::<f32>() / k.max(1) as f32;
        let mut damping = DAMPING * if mean > 0.0 { mean } else { 1.0 };
        // Sums of many numbers may leave `H` a little off positive; ever more damping ends at a diagonal.
        let upper = loop {
            let mut a: Vec<f32> = vec![0.0; k * k];
            a.par_chunks_mut(k.max(1)).zip(&order).for_each(|(row, r)| {
                row.iter_mut().zip(&order).for_each(|(a, c)| *a = h[r * k + c]);
            });
            (0..k).for_each(|i| a[i * k + i] = diagonal[order[i]] + damping);
            if cholesky(&mut a, k) {
                break a;
            }
            damping *= 10.0;
            if !damping.is_finite() {
                break (0..k * k).map(|i| f32::from(i % (k + 1) == 0)).collect();
            }
        };
        Self { k, scheme, order, ends, upper }
    }

    /// Codes of rows of `k` columns. Scales are chosen group by group as `method` does, for what is then left to stand for.
    pub fn quantize(&self, rows: &[f32], method: Method) -> Codes {
        let (k, groups) = (self.k.max(1), self.scheme.groups(self.k));
        let n = rows.len() / k;
        if n == 0 {
            return Codes::default();
        }
        let mut out = Codes { codes: vec![0; n * k], scales: vec![0.0; n * groups], zeros: vec![0; n * groups] };
        let parts = out.codes.par_chunks_mut(LANES * k).zip(out.scales.par_chunks_mut(LANES * groups));
        let parts = parts.zip(out.zeros.par_chunks_mut(LANES * groups)).zip(rows.par_chunks(LANES * k));
        parts.for_each(|(((codes, scales), zeros), rows)| self.quantize_lanes(rows, method, codes, scales, zeros));
        out
    }

    fn quantize_lanes(&self, rows: &[f32], method: Method, codes: &mut [u8], scales: &mut [f32], zeros: &mut [u8]) {
        let (k, scheme) = (self.k, self.scheme);
        let (len, groups, n) = (scheme.group_len(k), scheme.groups(k), rows.len() / k.max(1));
        let of_column = |c: usize| -> Lane { std::array::from_fn(|lane| if lane < n { rows[lane * k + c] } else { 0.0 }) };
        // Weights less what their codes stand for, by position.
        let mut left: Vec<Lane> = vec![[0.0; LANES]; k];
        let mut end = k;
        while end > 0 {
            let start = self.ends[..end].iter().rposition(|e| *e != end).map_or(0, |p| p + 1);
            let group = self.order[start] / len;
            let behind: Vec<Lane> = (start..end).map(|j| self.dot(j, end, &left[end..])).collect();
            // The best real numbers for the group: what its scale is chosen for.
            let mut wanted: Vec<Lane> = vec![[0.0; LANES]; len];
            for j in (start..end).rev() {
                let made_up = self.dot(j, j + 1, &left[j + 1..end]);
                let w = of_column(self.order[j]);
                for lane in 0..LANES {
                    let shift = (behind[j - start][lane] + made_up[lane]) / self.upper[j * k + j];
                    left[j][lane] = -shift;
                    wanted[self.order[j] - group * len][lane] = w[lane] + shift;
                }
            }
            let chosen: Vec<(f32, u8)> = (0..n)
                .map(|lane| {
                    let x: Vec<f32> = wanted[..end - start].iter().map(|w| w[lane]).collect();
                    quant::choose_scale(&x, scheme, method)
                })
                .collect();
            for (lane, (scale, zero)) in chosen.iter().enumerate() {
                scales[lane * groups + group] = *scale;
                zeros[lane * groups + group] = *zero;
            }
            for j in (start..end).rev() {
                let made_up = self.dot(j, j + 1, &left[j + 1..end]);
                let w = of_column(self.order[j]);
                for (lane, (scale, zero)) in chosen.iter().enumerate() {
                    let wanted = w[lane] + (behind[j - start][lane] + made_up[lane]) / self.upper[j * k + j];
                    let inverse = if *scale == 0.0 { 0.0 } else { 1.0 / scale };
                    let code = quant::code_of(wanted, inverse, *zero, scheme);
                    codes[lane * k + self.order[j]] = code;
                    left[j][lane] = w[lane] - scale * f32::from(i16::from(code) - i16::from(*zero));
                }
            }
            end = start;
        }
    }

    /// Row `j` of the factor, from column `from` on, with as many rows of `x`.
    fn dot(&self, j: usize, from: usize, x: &[Lane]) -> Lane {
        let mut sum = [0.0; LANES];
        for (a, x) in self.upper[j * self.k + from..][..x.len()].iter().zip(x) {
            for lane in 0..LANES {
                sum[lane] += a * x[lane];
            }
        }
        sum
    }
}

/// The upper triangle of `a`, symmetric `[k, k]`, becomes `Lᵀ` with `L Lᵀ` = `a`. `false` if that does not exist.
fn cholesky(a: &mut [f32], k: usize) -> bool {
    for start in (0..k).step_by(PANEL) {
        let end = k.min(start + PANEL);
        let (done, rest) = a.split_at_mut(end * k);
        let panel = &mut done[start * k..];
        for j in start..end {
            let (above, row) = panel.split_at_mut((j - start) * k);
            for above in above.chunks_exact(k) {
                let factor = above[j];
                row[j..k].iter_mut().zip(&above[j..]).for_each(|(r, a)| *r -= factor * a);
            }
            let pivot = row[j];
            if !(pivot > 0.0 && pivot.is_finite()) {
                return false;
            }
            let root = pivot.sqrt();
            row[j..k].iter_mut().for_each(|r| *r /= root);
        }
        let panel = &*panel;
        rest.par_chunks_mut(k).enumerate().for_each(|(i, row)| {
            let r = end + i;
            for done in panel.chunks_exact(k) {
                let factor = done[r];
                row[r..].iter_mut().zip(&done[r..]).for_each(|(x, d)| *x -= factor * d);
            }
        });
    }
    true
}

/// `tr((W - Q) H (W - Q)ᵀ)` for `difference`, rows of `W - Q`.
pub fn output_error(difference: &[f32], h: &[f32], k: usize) -> f64 {
    let row = |d: &[f32]| -> f64 {
        let dot = |a: &[f32]| a.iter().zip(d).map(|(a, b)| f64::from(a * b)).sum::<f64>();
        h.chunks_exact(k.max(1)).zip(d).map(|(h, d)| if *d == 0.0 { 0.0 } else { dot(h) * f64::from(*d) }).sum()
    };
    // Summed in the order of the rows, whatever the number of threads.
    difference.par_chunks_exact(k.max(1)).map(row).collect::<Vec<_>>().iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(n: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1);
        let mut uniform = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 24) as f32
        };
        (0..n).map(|_| (0..6).map(|_| uniform()).sum::<f32>() - 3.0).collect()
    }

    /// `Σ x xᵀ` of inputs that vary together, as activations do.
    fn moments(k: usize, rows: usize) -> Vec<f32> {
        let (mix, x) = (noise(k * k, 5), noise(rows * k, 6));
        let mut h = vec![0.0; k * k];
        for x in x.chunks_exact(k) {
            let y: Vec<f32> = (0..k).map(|i| x[i] + 0.3 * mix[i * k..].iter().zip(x).take(6).map(|(m, x)| m * x).sum::<f32>()).collect();
            (0..k).for_each(|i| (0..k).for_each(|j| h[i * k + j] += y[i] * y[j]));
        }
        h
    }

    fn error(w: &[f32], codes: &Codes, h: &[f32], k: usize, scheme: Scheme) -> f64 {
        let q = codes.dequantize(k, scheme);
        output_error(&w.iter().zip(&q).map(|(w, q)| w - q).collect::<Vec<_>>(), h, k)
    }

    #[test]
    fn outputs_are_kept_better_than_by_rounding() {
        for (k, n, name) in [(96, 40, "int4g32"), (100, 3, "int4g32z"), (64, 16, "int4"), (33, 17, "int8"), (200, 5, "int4g128")] {
            let scheme: Scheme = name.parse().unwrap();
            let (w, h) = (noise(n * k, 1), moments(k, 300));
            let found = Factor::new(&h, k, scheme).quantize(&w, Method::Search);
            let (gptq, search) = (error(&w, &found, &h, k, scheme), error(&w, &Codes::of(&w, k, scheme, Method::Search), &h, k, scheme));
            assert!(gptq < 0.8 * search, "{name}: {gptq} of {search}");
        }
    }

    /// Inputs that do not vary together leave nothing to make up for.
    #[test]
    fn of_a_diagonal_it_is_rounding() {
        let (k, scheme) = (80, Scheme::INT4);
        let w = noise(7 * k, 2);
        let h: Vec<f32> = (0..k * k).map(|i| if i % (k + 1) == 0 { 1.0 + (i % 7) as f32 } else { 0.0 }).collect();
        for h in [h, vec![0.0; k * k]] {
            assert_eq!(Factor::new(&h, k, scheme).quantize(&w, Method::Round), Codes::of(&w, k, scheme, Method::Round));
        }
    }

    #[test]
    fn factor_times_its_transpose_is_the_matrix() {
        let k = 70;
        let h = moments(k, 200);
        let mut a = h.clone();
        assert!(cholesky(&mut a, k));
        for i in 0..k {
            for j in i..k {
                let product: f32 = (0..=i).map(|r| a[r * k + i] * a[r * k + j]).sum();
                assert!((product - h[i * k + j]).abs() < 1e-4 * h[i * k + i].max(h[j * k + j]), "{i} {j}");
            }
        }
        assert!(!cholesky(&mut [-1.0; 4], 2));
    }

    /// Fewer inputs than columns, inputs of one direction, numbers that are none: codes all the same.
    #[test]
    fn odd_moments() {
        let (k, scheme) = (48, Scheme::INT4);
        let w = noise(3 * k, 3);
        let one = noise(k, 4);
        let outer: Vec<f32> = one.iter().flat_map(|a| one.iter().map(move |b| a * b)).collect();
        for h in [moments(k, 5), outer, vec![f32::NAN; k * k], vec![f32::INFINITY; k * k], vec![1e30; k * k]] {
            let codes = Factor::new(&h, k, scheme).quantize(&w, Method::Search);
            assert!(codes.scales.iter().all(|s| s.is_finite()) && codes.codes.iter().all(|c| *c < 16));
        }
    }
}
