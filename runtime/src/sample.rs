//! The choice of the next token. Processors and their order are those of transformers' `generate`: repetition penalty,
//! temperature, top-k, top-p.

use crate::pipeline::argmax;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha12Rng;
use std::borrow::Cow;

/// How tokens are chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Draw by probability; else the most probable token.
    pub do_sample: bool,
    /// Divides the logits.
    pub temperature: f32,
    /// Keep the k most probable tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the most probable tokens whose probabilities reach p.
    pub top_p: f32,
    /// Divides (positive) or multiplies (negative) the logits of tokens that were there before.
    pub repetition_penalty: f32,
    /// The same seed draws the same tokens, on every machine.
    pub seed: u64,
}

/// Chooses tokens.
pub struct Sampler {
    settings: Sampling,
    rng: ChaCha12Rng,
}

impl Sampler {
    /// # Errors
    /// A setting has no meaning.
    pub fn new(settings: Sampling) -> Result<Self, String> {
        let Sampling { do_sample, temperature, top_p, repetition_penalty, .. } = settings;
        if do_sample && !(temperature.is_finite() && temperature > 0.0) {
            return Err(format!("temperature must be more than 0, is {temperature}"));
        }
        if !(0.0..=1.0).contains(&top_p) {
            return Err(format!("top_p must be from 0 to 1, is {top_p}"));
        }
        if !(repetition_penalty.is_finite() && repetition_penalty > 0.0) {
            return Err(format!("repetition_penalty must be more than 0, is {repetition_penalty}"));
        }
        Ok(Self { rng: ChaCha12Rng::seed_from_u64(settings.seed), settings })
    }

    /// The next token after `history`, from its `logits [vocab]`.
    pub fn next(&mut self, logits: &[f32], history: &[i64]) -> i64 {
        let logits = self.penalized(logits, history);
        if !self.settings.do_sample {
            return argmax(&logits);
        }
        let p = self.probabilities(logits.into_owned());
        let mut left = self.rng.random::<f64>() * p.iter().map(|v| f64::from(*v)).sum::<f64>();
        for (i, p) in p.iter().enumerate() {
            left -= f64::from(*p);
            if left < 0.0 {
                return i as i64;
            }
        }
        argmax(&p)
    }

    /// Whether [`Self::next`] looks at the largest of the logits only.
    pub(crate) fn is_greedy(&self) -> bool {
        !self.settings.do_sample && self.settings.repetition_penalty == 1.0
    }

    fn penalized<'a>(&self, logits: &'a [f32], history: &[i64]) -> Cow<'a, [f32]> {
        let penalty = self.settings.repetition_penalty;
        if penalty == 1.0 {
            return logits.into();
        }
        let mut logits = logits.to_vec();
        let seen: std::collections::BTreeSet<_> =
            history.iter().filter_map(|i| usize::try_from(*i).ok()).filter(|i| *i < logits.len()).collect();
        for i in seen {
            logits[i] = if logits[i] < 0.0 { logits[i] * penalty } else { logits[i] / penalty };
        }
        logits.into()
    }

    /// Probabilities that are drawn from.
    fn probabilities(&self, mut logits: Vec<f32>) -> Vec<f32> {
        let Sampling { temperature, top_k, top_p, .. } = self.settings;
        logits.iter_mut().for_each(|l| *l /= temperature);
        if top_k > 0 && top_k < logits.len() {
            let mut sorted = logits.clone();
            let (_, kth, _) = sorted.select_nth_unstable_by(top_k - 1, |a, b| b.total_cmp(a));
            let kth = *kth;
            logits.iter_mut().filter(|l| **l < kth).for_each(|l| *l = f32::NEG_INFINITY);
        }
        if top_p < 1.0 {
            // The least probable tokens go as long as they sum to no more than 1 - p; the most probable one stays.
            let p = softmax(&logits);
            let mut order: Vec<usize> = (0..p.len()).collect();
            order.sort_by(|a, b| p[*a].total_cmp(&p[*b]));
            let mut sum = 0.0;
            for i in &order[..order.len().saturating_sub(1)] {
                sum += p[*i];
                if sum > 1.0 - top_p {
                    break;
                }
                logits[*i] = f32::NEG_INFINITY;
            }
        }
        softmax(&logits)
    }
}

fn softmax(logits: &[f32]) -> Vec<f32> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let e: Vec<f32> = logits.iter().map(|l| (l - largest).exp()).collect();
    let sum: f32 = e.iter().sum();
    e.iter().map(|v| v / sum).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Sampling {
        Sampling { do_sample: true, temperature: 1.0, top_k: 0, top_p: 1.0, repetition_penalty: 1.0, seed: 7 }
    }

    #[test]
    fn draws_follow_the_probabilities_and_the_seed() {
        let logits: Vec<f32> = [0.5f32, 0.3, 0.2].iter().map(|p| p.ln()).collect();
        let draw = |s: Sampling, n: usize| {
            let mut sampler = Sampler::new(s).unwrap();
            (0..n).map(|_| sampler.next(&logits, &[])).collect::<Vec<_>>()
        };
        let drawn = draw(settings(), 20_000);
        for (token, p) in [0.5, 0.3, 0.2].iter().enumerate() {
            let share = drawn.iter().filter(|t| **t == token as i64).count() as f64 / 20_000.0;
            assert!((share - p).abs() < 0.02, "token {token}: {share} instead of {p}");
        }
        assert_eq!(draw(settings(), 50), draw(settings(), 50));
        assert_ne!(draw(settings(), 50), draw(Sampling { seed: 8, ..settings() }, 50));
        assert!(draw(Sampling { top_k: 2, ..settings() }, 500).iter().all(|t| *t < 2));
        assert!(draw(Sampling { top_p: 0.49, ..settings() }, 500).iter().all(|t| *t == 0));
        assert!(draw(Sampling { top_p: 0.75, ..settings() }, 500).iter().all(|t| *t < 2));
        assert!(draw(Sampling { do_sample: false, ..settings() }, 9).iter().all(|t| *t == 0));
    }

    #[test]
    fn the_penalty_is_of_tokens_seen() {
        let mut s = Sampler::new(Sampling { do_sample: false, repetition_penalty: 2.0, ..settings() }).unwrap();
        assert_eq!(s.next(&[4.0, 3.0, -1.0], &[]), 0);
        assert_eq!(s.next(&[4.0, 3.0, -1.0], &[0, 0, 99]), 1);
        assert_eq!(s.next(&[-4.0, -3.0, -5.0], &[1, 0]), 2);
    }

    #[test]
    fn settings_without_meaning_are_refused() {
        for bad in [
            Sampling { temperature: 0.0, ..settings() },
            Sampling { top_p: 1.5, ..settings() },
            Sampling { repetition_penalty: -1.0, ..settings() },
        ] {
            assert!(Sampler::new(bad).is_err());
        }
    }
}
