//! How far numbers are from what they should be.

use serde::{Deserialize, Serialize};

/// A tensor against its reference.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Errors {
    /// Cosine of the angle between them; 1 if both are zero.
    pub cosine: f64,
    /// Length of the difference, divided by that of the reference; infinite if only the reference is zero, or a number is not finite.
    pub relative: f64,
    /// Largest absolute difference.
    pub largest: f64,
}

impl Errors {
    /// Of tensors of the same length.
    pub(super) fn of(got: &[f32], reference: &[f32]) -> Self {
        let (mut dot, mut gg, mut rr, mut dd, mut largest) = (0.0, 0.0, 0.0, 0.0, 0f64);
        for (g, r) in got.iter().zip(reference) {
            let (g, r) = (f64::from(*g), f64::from(*r));
            dot += g * r;
            gg += g * g;
            rr += r * r;
            dd += (g - r) * (g - r);
            largest = largest.max((g - r).abs());
        }
        if !dd.is_finite() {
            return Self { cosine: 0.0, relative: f64::INFINITY, largest: f64::INFINITY };
        }
        let cosine = if gg == 0.0 && rr == 0.0 { 1.0 } else { dot / (gg * rr).sqrt().max(f64::MIN_POSITIVE) };
        let relative = if dd == 0.0 { 0.0 } else { (dd / rr).sqrt() };
        Self { cosine, relative, largest }
    }

    /// The worse of two, number by number.
    pub(super) fn worse(self, other: Self) -> Self {
        Self {
            cosine: self.cosine.min(other.cosine),
            relative: self.relative.max(other.relative),
            largest: self.largest.max(other.largest),
        }
    }
}

/// Kullback-Leibler divergence, in nats, of the softmax of `got` from that of `reference`.
pub(crate) fn kl(got: &[f32], reference: &[f32]) -> f64 {
    let (p, q) = (log_softmax(reference), log_softmax(got));
    let sum: f64 = p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum();
    // Rounding may leave a little less than nothing.
    if sum.is_nan() { f64::INFINITY } else { sum.max(0.0) }
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let largest = logits.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
    let sum: f64 = logits.iter().map(|v| f64::from(v - largest).exp()).sum();
    logits.iter().map(|v| f64::from(v - largest) - sum.ln()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors() {
        let e = Errors::of(&[3.0, 4.0], &[3.0, 0.0]);
        assert!((e.cosine - 0.6).abs() < 1e-12 && (e.relative - 4.0 / 3.0).abs() < 1e-12);
        assert_eq!(e.largest, 4.0);
        assert_eq!(Errors::of(&[0.0; 2], &[0.0; 2]), Errors { cosine: 1.0, relative: 0.0, largest: 0.0 });
        assert_eq!(Errors::of(&[1.0], &[0.0]).relative, f64::INFINITY);
        assert_eq!(Errors::of(&[f32::NAN], &[0.0]).relative, f64::INFINITY);
    }

    #[test]
    fn divergence() {
        // Of (1/2, 1/2) from (1/4, 3/4) in nats, whatever is added to all logits.
        let logits = |p: [f32; 2], c: f32| p.map(|p| p.ln() + c);
        let expected = 0.25 * 0.5f64.ln() + 0.75 * 1.5f64.ln();
        assert!((kl(&logits([0.5, 0.5], 3.0), &logits([0.25, 0.75], -7.0)) - expected).abs() < 1e-6);
        assert_eq!(kl(&[1.0, 2.0], &[1.0, 2.0]), 0.0);
        assert_eq!(kl(&[f32::NAN, 0.0], &[0.0, 0.0]), f64::INFINITY);
    }
}
