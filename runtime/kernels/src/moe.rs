//! Mixtures of experts: each chosen expert's product over the rows that chose it.

use crate::{
    Kernels, Panels,
    linear::{BadIndex, Floats, ROWS},
};
use vlmc_artifact::program::{PANEL, Unary};

/// A stack of matrices `[e, n, k]`, each in panels.
#[derive(Clone, Copy, Debug)]
pub struct Experts<'a> {
    data: Floats<'a>,
    e: usize,
    n: usize,
    k: usize,
}

impl<'a> Experts<'a> {
    /// `None` if `data` is not as long.
    pub fn new(data: Floats<'a>, e: usize, n: usize, k: usize) -> Option<Self> {
        let len = n.div_ceil(PANEL).checked_mul(data.panel_len(k)?)?.checked_mul(e)?;
        (data.len() == len).then_some(Self { data, e, n, k })
    }

    fn expert(&self, i: usize) -> Option<Panels<'a>> {
        let len = self.data.len() / self.e.max(1);
        Panels::new(self.data.slice(i * len..(i + 1) * len), self.n, self.k)
    }
}

/// Weights of [`Kernels::moe`].
#[derive(Clone, Copy, Debug)]
pub struct Moe<'a> {
    /// `[e, m, h]`.
    pub gate: Experts<'a>,
    /// `[e, m, h]`.
    pub up: Experts<'a>,
    /// `[e, h, m]`.
    pub down: Experts<'a>,
    /// Activation of the gate.
    pub act: Unary,
    /// Whether what the matrices multiply is rounded to 8 bits first; they must be quantized then.
    pub dynamic: bool,
}

/// Rows of an expert that are computed at once: bounds the memory that it takes. A multiple of the rows of a tile, so that a
/// row's result is the same as that of all at once, but for what many rows are rounded to.
const BLOCK: usize = 20 * ROWS;

/// Floats that [`Kernels::moe`] needs for `n` rows of width `h`, `k` of `e` experts for each, of width `m`: where each expert's rows
/// begin, the order of the rows by expert, and what an expert takes and makes for a block of rows. Saturates.
pub fn moe_scratch(n: usize, h: usize, m: usize, k: usize, e: usize) -> usize {
    let places = n.saturating_mul(k).saturating_add(e).saturating_add(2);
    places.saturating_add(n.min(BLOCK).saturating_mul(h.saturating_add(m).saturating_mul(2)))
}

impl Kernels {
    /// For each row of `x [n, h]` the sum over its `experts [n, k]` of `weights [n, k]` times `down(act(gate x) * up x)`, to `out
    /// [n, h]`. `scratch` is of [`moe_scratch`] floats.
    ///
    /// # Errors
    /// An expert that does not exist.
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn moe(
        &self,
        x: &[f32],
        experts: &[i64],
        weights: &[f32],
        w: &Moe<'_>,
        scratch: &mut [f32],
        out: &mut [f32],
    ) -> Result<(), BadIndex> {
        let (h, m) = (w.gate.k, w.gate.n);
        assert!(x.len() == out.len() && h > 0 && experts.len() == weights.len(), "x and out must be [n, h]");
        let n = x.len() / h;
        if n == 0 {
            return Ok(());
        }
        let k = experts.len() / n;
        assert!(experts.len() == n * k && u32::try_from(experts.len()).is_ok(), "experts must be [n, k]");
        assert!(scratch.len() >= moe_scratch(n, h, m, k, w.gate.e), "scratch is too small");
        let (places, scratch) = scratch.split_at_mut(n * k + w.gate.e + 2);
        let (order, starts) = bytemuck::cast_slice_mut::<f32, u32>(places).split_at_mut(n * k);
        // Choices by expert, those of each in the order of the rows: a counting sort. What is counted two places on becomes the
        // start of an expert one place on, and, when its choices have been placed, that of the next one.
        starts.fill(0);
        for expert in experts {
            let count = usize::try_from(*expert).ok().and_then(|e| starts[2..].get_mut(e));
            *count.ok_or(BadIndex { index: *expert, len: w.gate.e })? += 1;
        }
        for e in 2..starts.len() {
            starts[e] += starts[e - 1];
        }
        for (choice, expert) in experts.iter().enumerate() {
            let place = &mut starts[*expert as usize + 1];
            order[*place as usize] = choice as u32;
            *place += 1;
        }
        out.fill(0.0);
        let block = n.min(BLOCK);
        let (rows, scratch) = scratch.split_at_mut(block * h);
        let (gate, scratch) = scratch.split_at_mut(block * m);
        let (up, scratch) = scratch.split_at_mut(block * m);
        let y = &mut scratch[..block * h];
        for e in 0..w.gate.e {
            let (Some(wg), Some(wu), Some(wd)) = (w.gate.expert(e), w.up.expert(e), w.down.expert(e)) else { continue };
            for chosen in order[starts[e] as usize..starts[e + 1] as usize].chunks(block) {
                let count = chosen.len();
                let (rows, y) = (&mut rows[..count * h], &mut y[..count * h]);
                let (gate, up) = (&mut gate[..count * m], &mut up[..count * m]);
                for (to, choice) in rows.chunks_exact_mut(h).zip(chosen) {
                    to.copy_from_slice(&x[*choice as usize / k * h..][..h]);
                }
                self.linear(&*rows, &wg, None, Some(w.act), w.dynamic, gate);
                self.linear(&*rows, &wu, None, None, w.dynamic, up);
                gate.iter_mut().zip(&*up).for_each(|(g, u)| *g *= u);
                self.linear(&*gate, &wd, None, None, w.dynamic, y);
                for (choice, y) in chosen.iter().map(|c| *c as usize).zip(y.chunks_exact(h)) {
                    out[choice / k * h..][..h].iter_mut().zip(y).for_each(|(o, y)| *o += weights[choice] * y);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Isa, Src, pack_panels};
    use vlmc_artifact::{
        Scheme,
        quant::{self, Codes, Method},
    };

    #[test]
    fn moe_matches_its_formula() {
        // More rows than a block for one expert, and none for another.
        let (n, h, m, e, k) = (5 * 100, 7, 19, 4, 2);
        let mut state = 1u32;
        let mut floats = |n: usize| -> Vec<f32> {
            let next = |_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            };
            (0..n).map(next).collect()
        };
        let (x, weights) = (floats(n * h), floats(n * k));
        let (gate, up, down) = (floats(e * m * h), floats(e * m * h), floats(e * h * m));
        let experts = [0, 3, 3, 1, 0, 1, 3, 0, 1, 0].repeat(100);
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        let mut expected = vec![0.0; n * h];
        for (i, (expert, weight)) in experts.iter().zip(&weights).enumerate() {
            let (row, at) = (&x[i / k * h..][..h], *expert as usize);
            let inner: Vec<f32> = (0..m)
                .map(|j| {
                    let g = dot(row, &gate[(at * m + j) * h..][..h]);
                    (g / (1.0 + (-g).exp()) * dot(row, &up[(at * m + j) * h..][..h])) as f32
                })
                .collect();
            for (c, o) in expected[i / k * h..][..h].iter_mut().enumerate() {
                *o += f64::from(*weight) * dot(&inner, &down[(at * h + c) * m..][..m]);
            }
        }
        let packed = |w: &[f32], rows: usize, k: usize| w.chunks_exact(rows * k).flat_map(|w| pack_panels(w, rows, k)).collect::<Vec<_>>();
        let (gate, up, down) = (packed(&gate, m, h), packed(&up, m, h), packed(&down, h, m));
        let stack = |w, n, k| Experts::new(Floats::F32(w), e, n, k).unwrap();
        let w = Moe { gate: stack(&gate, m, h), up: stack(&up, m, h), down: stack(&down, h, m), act: Unary::Silu, dynamic: false };
        for isa in Isa::ALL.into_iter().filter(|i| i.is_supported()) {
            let kernels = Kernels::with_isa(2, isa).unwrap();
            let mut out = vec![f32::NAN; n * h];
            let mut scratch = vec![f32::NAN; moe_scratch(n, h, m, k, e)];
            kernels.moe(&x, &experts, &weights, &w, &mut scratch, &mut out).unwrap();
            for (o, e) in out.iter().zip(&expected) {
                assert!((f64::from(*o) - e).abs() < 1e-4, "{isa:?}: {o} instead of {e}");
            }
            let bad = kernels.moe(&x, &vec![9; n * k], &weights, &w, &mut scratch, &mut out).unwrap_err();
            assert_eq!((bad.index, bad.len), (9, 4));
        }
    }
    #[test]
    fn quantized_experts_multiply_as_linear_does() {
        let (h, m, e) = (40, 19, 3);
        let noise = |n: usize, seed: usize| (0..n).map(|i| ((i * 7919 + seed) % 251) as f32 / 125.0 - 1.0).collect::<Vec<_>>();
        let scheme: Scheme = "int4g32z".parse().unwrap();
        let bytes = |n: usize, k: usize, seed| {
            let codes = |i| Codes::of(&noise(n * k, seed + i), k, scheme, Method::Round);
            (0..e).flat_map(|i| quant::pack_panels(&codes(i), k, scheme)).collect::<Vec<_>>()
        };
        let (gate, up, down) = (bytes(m, h, 1), bytes(m, h, 50), bytes(h, m, 99));
        let stack = |w, n, k| Experts::new(Floats::Quant(w, scheme), e, n, k).unwrap();
        assert!(Experts::new(Floats::Quant(&gate, scheme), e, m, h + 8).is_none());
        let (x, experts, weights) = (noise(2 * h, 3), [2, 0, 1, 2], [0.5, 0.25, 1.0, -1.0]);
        let kernels = Kernels::new(2);
        for dynamic in [false, true] {
            let w = Moe { gate: stack(&gate, m, h), up: stack(&up, m, h), down: stack(&down, h, m), act: Unary::Silu, dynamic };
            let product = |x: &[f32], of: &Experts<'_>, e: i64| {
                let mut out = vec![0.0; of.n];
                kernels.linear(x, &of.expert(e as usize).unwrap(), None, None, dynamic, &mut out);
                out
            };
            let mut expected = vec![0.0; 2 * h];
            for (i, (expert, weight)) in experts.iter().zip(weights).enumerate() {
                let x = &x[i / 2 * h..][..h];
                let mut inner = product(x, &w.gate, *expert);
                kernels.unary(Unary::Silu, Src::InPlace, &mut inner);
                inner.iter_mut().zip(product(x, &w.up, *expert)).for_each(|(g, u)| *g *= u);
                expected[i / 2 * h..].iter_mut().zip(product(&inner, &w.down, *expert)).for_each(|(o, y)| *o += weight * y);
            }
            let mut out = vec![f32::NAN; 2 * h];
            kernels.moe(&x, &experts, &weights, &w, &mut [f32::NAN; 1000], &mut out).unwrap();
            for (o, e) in out.iter().zip(&expected) {
                assert!((o - e).abs() <= 1e-5 * (1.0 + e.abs()), "{dynamic}: {o} instead of {e}");
            }
        }
    }
}
