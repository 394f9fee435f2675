//! Answers, token by token.

use crate::{
    Error, Result,
    lookup::{Lookup, LookupReport},
    pipeline::Pipeline,
    sample::{Sampler, Sampling},
    tokenizer::Tokenizer,
};
use std::time::{Duration, Instant};
use vlmc_artifact::Generation;

/// How to answer.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOptions {
    /// Most tokens of an answer.
    pub max_new_tokens: usize,
    /// Choice of tokens.
    pub sampling: Sampling,
    /// Texts that end an answer and are not part of it.
    pub stop: Vec<String>,
    /// Proposes what followed the last tokens before, and so runs several tokens at once where an answer quotes. The answer is the
    /// same. Only for the most probable token ([`Sampling::do_sample`] must be off).
    pub prompt_lookup: bool,
}

impl GenerateOptions {
    /// The defaults of a model.
    pub fn new(defaults: &Generation) -> Self {
        let &Generation { do_sample, temperature, top_k, top_p, repetition_penalty, .. } = defaults;
        Self {
            max_new_tokens: 512,
            sampling: Sampling { do_sample, temperature, top_k, top_p, repetition_penalty, seed: 0 },
            stop: vec![],
            prompt_lookup: false,
        }
    }

    /// What chooses the tokens.
    ///
    /// # Errors
    /// A setting has no meaning, or not together with others.
    pub(crate) fn sampler(&self) -> Result<Sampler> {
        let Sampling { do_sample, temperature, .. } = self.sampling;
        if self.prompt_lookup && do_sample {
            let why = "prompt_lookup runs ahead of the most probable tokens, but do_sample is on";
            return Err(Error::Input(format!("{why} (temperature {temperature}): turn one of them off, the latter by temperature 0")));
        }
        Sampler::new(self.sampling.clone()).map_err(Error::Input)
    }
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// The model ended it.
    Eos,
    /// A stop text came.
    Stop,
    /// It has as many tokens as it may, or the context is full.
    Length,
}

/// An answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Reply {
    /// The text, without stop text and special tokens.
    pub text: String,
    /// Its tokens, without the one that ended it.
    pub ids: Vec<i64>,
    /// Why it ended.
    pub finish: Finish,
    /// Tokens of the prompt that were run; the rest was in the cache.
    pub prompt_tokens: usize,
    /// Tokens of the prompt that were in the cache.
    pub cached_tokens: usize,
    /// Pictures and videos that were run through the model for it. Of others the features or the tokens were in a cache.
    pub images_encoded: usize,
    /// From the call to the first token, pictures included.
    pub first_token: Duration,
    /// From the first token to the last.
    pub decoding: Duration,
    /// What prompt lookup did, if it was on.
    pub lookup: Option<LookupReport>,
}

/// What an answer starts from.
pub(crate) struct Start {
    /// Tokens so far.
    pub(crate) history: Vec<i64>,
    /// Tokens that were run for it.
    pub(crate) prompt_tokens: usize,
    /// Tokens that were in the cache.
    pub(crate) cached_tokens: usize,
    /// Pictures and videos that were run for it.
    pub(crate) images_encoded: usize,
    /// Chooses tokens.
    pub(crate) sampler: Sampler,
    /// When the request came.
    pub(crate) since: Instant,
}

/// Generates an answer to the prompt that `pipeline` ran last, and gives out its text as it comes. What the pipeline's cache holds afterwards is the prompt and all
/// tokens of the answer but the last.
pub(crate) fn generate(
    pipeline: &mut Pipeline,
    tokenizer: &Tokenizer,
    eos: &[i64],
    options: &GenerateOptions,
    start: Start,
    on_text: &mut dyn FnMut(&str),
) -> Result<Reply> {
    let Start { mut history, prompt_tokens, cached_tokens, images_encoded, mut sampler, since } = start;
    let room = pipeline.rules().max_positions - pipeline.past();
    let limit = options.max_new_tokens.min(room + 1);
    let mut text = Stopper::new(&options.stop);
    let mut stream = tokenizer.stream();
    let mut ids = vec![];
    let mut finish = Finish::Length;
    let mut steps = Steps::new(pipeline, sampler.is_greedy(), options.prompt_lookup);
    let mut first = None;
    while ids.len() < limit {
        let id = sampler.next(steps.logits()?, &history);
        first.get_or_insert_with(Instant::now);
        if eos.contains(&id) {
            finish = Finish::Eos;
            break;
        }
        ids.push(id);
        history.push(id);
        let (piece, stopped) = text.push(&stream.push(id)?);
        if !piece.is_empty() {
            on_text(&piece);
        }
        if stopped {
            finish = Finish::Stop;
            break;
        }
        if ids.len() < limit {
            // The last token is not run.
            steps.advance(&history, limit - ids.len() - 1)?;
        }
    }
    let lookup = steps.finish()?;
    if finish != Finish::Stop {
        let (piece, stopped) = text.push(&stream.finish()?);
        let rest = piece + &if stopped { String::new() } else { text.rest() };
        if !rest.is_empty() {
            on_text(&rest);
        }
    }
    let first = first.unwrap_or_else(Instant::now);
    Ok(Reply {
        text: text.given,
        ids,
        finish,
        prompt_tokens,
        cached_tokens,
        images_encoded,
        first_token: first - since,
        decoding: first.elapsed(),
        lookup,
    })
}

/// The logits after each token of an answer, which may have been run before it was chosen.
struct Steps<'p> {
    pipeline: &'p mut Pipeline,
    /// Tokens of the last run: the last one chosen then, and those that were run ahead. The one at `i` leads to row `i` of the logits.
    ran: Vec<i64>,
    /// The row that follows the last token.
    row: usize,
    /// Only the largest logits are asked for.
    greedy: bool,
    lookup: Option<(Lookup, LookupReport)>,
}

impl<'p> Steps<'p> {
    fn new(pipeline: &'p mut Pipeline, greedy: bool, prompt_lookup: bool) -> Self {
        let lookup = prompt_lookup.then(|| (Lookup::new(), LookupReport::default()));
        Self { pipeline, ran: vec![], row: 0, greedy, lookup }
    }

    /// Of the next token, `[vocab]`.
    fn logits(&self) -> Result<&[f32]> {
        let logits = self.pipeline.logits()?;
        let vocab = logits.shape().last().copied().unwrap_or(0);
        Ok(&logits.f32()?[self.row * vocab..][..vocab])
    }

    /// Runs the last of `tokens`, if it has not been run, and with it at most `room` others.
    fn advance(&mut self, tokens: &[i64], room: usize) -> Result<()> {
        let Some(last) = tokens.last() else { return Ok(()) };
        if self.ran.get(self.row + 1) == Some(last) {
            self.row += 1;
            return Ok(());
        }
        self.settle()?;
        self.ran.push(*last);
        if let Some((lookup, report)) = &mut self.lookup {
            self.ran.extend(lookup.propose(tokens, room));
            report.passes += 1;
        }
        let run = if self.greedy { Pipeline::extend_greedily } else { Pipeline::extend };
        run(self.pipeline, &self.ran).map(drop)
    }

    /// Forgets the tokens that were run ahead and not chosen.
    fn settle(&mut self) -> Result<()> {
        let (proposed, accepted) = (self.ran.len().saturating_sub(1), std::mem::take(&mut self.row));
        self.ran.clear();
        if let Some((lookup, report)) = &mut self.lookup {
            report.proposed += proposed;
            report.accepted += accepted;
            lookup.learn(proposed, accepted);
        }
        self.pipeline.retract(proposed - accepted)
    }

    fn finish(mut self) -> Result<Option<LookupReport>> {
        self.settle()?;
        Ok(self.lookup.map(|(_, report)| report))
    }
}

/// Holds back text that may be the beginning of a stop text.
struct Stopper<'a> {
    stop: &'a [String],
    given: String,
    held: String,
}

impl<'a> Stopper<'a> {
    fn new(stop: &'a [String]) -> Self {
        Self { stop, given: String::new(), held: String::new() }
    }

    /// Text that can be given out, and whether a stop text has come.
    fn push(&mut self, text: &str) -> (String, bool) {
        self.held.push_str(text);
        let found = self.stop.iter().filter(|s| !s.is_empty()).filter_map(|s| self.held.find(s.as_str())).min();
        let safe = found.unwrap_or_else(|| {
            let may_stop = |i: &usize| self.stop.iter().any(|s| s.starts_with(&self.held[*i..]));
            self.held.char_indices().map(|(i, _)| i).find(may_stop).unwrap_or(self.held.len())
        });
        let rest = self.held.split_off(safe);
        let out = std::mem::replace(&mut self.held, rest);
        self.given.push_str(&out);
        (out, found.is_some())
    }

    /// What was held back and turned out to be no stop text.
    fn rest(&mut self) -> String {
        let out = std::mem::take(&mut self.held);
        self.given.push_str(&out);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stop_texts_never_show() {
        let stop = ["END".to_string(), "##".to_string()];
        let mut s = Stopper::new(&stop);
        assert_eq!(s.push("a E"), ("a ".into(), false));
        assert_eq!(s.push("N"), (String::new(), false));
        assert_eq!(s.push("x E"), ("ENx ".into(), false));
        assert_eq!(s.push("NDrest"), (String::new(), true));
        assert_eq!(s.given, "a ENx ");
        let mut s = Stopper::new(&stop);
        assert_eq!(s.push("tail #"), ("tail ".into(), false));
        assert_eq!(s.rest(), "#");
    }
}
