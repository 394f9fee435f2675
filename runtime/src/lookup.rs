//! Prompt lookup: what followed the last tokens where they stood before is proposed, and the decoder runs all of it in one pass
//! (Saxena, 2023, "Prompt Lookup Decoding"; Yang et al., 2023, "Inference with Reference"). What greedy decoding would have chosen
//! stays, so the answer is the same.

/// Most tokens that are proposed at once: with the token before them 16 rows, which cost little more than one to read weights for.
const MOST: usize = 15;
/// Tokens that must have stood in the same order before: as many as possible of these.
const LENGTHS: [usize; 2] = [3, 2];

/// What prompt lookup did for an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LookupReport {
    /// Runs of the decoder after the prompt's.
    pub passes: usize,
    /// Tokens that were proposed.
    pub proposed: usize,
    /// Those of them that greedy decoding chose.
    pub accepted: usize,
}

impl LookupReport {
    /// Share of the proposals that were accepted, from 0 to 1; `None` if there were none.
    pub fn acceptance(&self) -> Option<f64> {
        (self.proposed > 0).then(|| self.accepted as f64 / self.proposed as f64)
    }

    /// Tokens that a run of the decoder chose, on average; `None` if there was none. Without proposals it is 1.
    pub fn tokens_per_pass(&self) -> Option<f64> {
        (self.passes > 0).then(|| (self.passes + self.accepted) as f64 / self.passes as f64)
    }
}

/// Proposes tokens: more after all were accepted, fewer after some were not.
pub(crate) struct Lookup {
    most: usize,
}

impl Lookup {
    pub(crate) fn new() -> Self {
        Self { most: MOST.div_ceil(4) }
    }

    /// At most `room` tokens that may follow `tokens`; none if the last two never stood together before.
    pub(crate) fn propose(&self, tokens: &[i64], room: usize) -> Vec<i64> {
        let count = self.most.min(room);
        let found = LENGTHS.iter().find_map(|n| {
            let (last, before) = (tokens.len().checked_sub(*n)?, tokens.len().checked_sub(1)?);
            tokens[..before].windows(*n).rposition(|w| w == &tokens[last..]).map(|at| at + n)
        });
        let Some(from) = found else { return vec![] };
        // What repeats itself is taken to go on so: the copy may run into what it has made.
        let mut out = Vec::with_capacity(count);
        for i in from..from + count {
            out.push(tokens.get(i).copied().unwrap_or_else(|| out[i - tokens.len()]));
        }
        out
    }

    /// How many of `proposed` tokens were accepted.
    pub(crate) fn learn(&mut self, proposed: usize, accepted: usize) {
        if proposed > 0 {
            self.most = if accepted == proposed { (2 * self.most).min(MOST) } else { accepted + 1 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_and_latest_match_goes_on() {
        let all = Lookup { most: MOST };
        assert_eq!(all.propose(&[1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], 2), [4, 9], "three tokens before two");
        assert_eq!(all.propose(&[2, 3, 4, 7, 2, 3, 5, 8, 2, 3], 3), [5, 8, 2], "the later of two");
        assert_eq!(all.propose(&[7, 2, 3, 8, 2, 3], 6), [8, 2, 3, 8, 2, 3], "a copy goes on in itself");
        assert_eq!(all.propose(&[6, 6, 6], 4), [6; 4]);
        for none in [&[][..], &[1], &[1, 1], &[1, 2, 1], &[1, 2, 3, 4]] {
            assert!(all.propose(none, 4).is_empty(), "{none:?}");
        }
        assert!(all.propose(&[1, 2, 3, 1, 2], 0).is_empty());
    }

    #[test]
    fn proposals_follow_their_success() {
        let mut l = Lookup::new();
        let tokens = [1, 2].repeat(9);
        assert_eq!(l.propose(&tokens, 99).len(), 4);
        l.learn(4, 4);
        assert_eq!(l.propose(&tokens, 99).len(), 8);
        l.learn(3, 3);
        assert_eq!(l.propose(&tokens, 99).len(), MOST);
        l.learn(15, 2);
        assert_eq!(l.propose(&tokens, 99).len(), 3);
        l.learn(0, 0);
        assert_eq!(l.propose(&tokens, 99).len(), 3, "nothing was learnt");
        l.learn(3, 0);
        assert_eq!(l.propose(&tokens, 99).len(), 1);
    }
}
