//! Answers, token by token.

use crate::{
    Error, Result, Tensor,
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
}

impl GenerateOptions {
    /// The defaults of a model.
    pub fn new(defaults: &Generation) -> Self {
        let &Generation { do_sample, temperature, top_k, top_p, repetition_penalty, .. } = defaults;
        Self { max_new_tokens: 512, sampling: Sampling { do_sample, temperature, top_k, top_p, repetition_penalty, seed: 0 }, stop: vec![] }
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
    /// From the call to the first token, pictures included.
    pub first_token: Duration,
    /// From the first token to the last.
    pub decoding: Duration,
}

/// What an answer starts from.
pub(crate) struct Start {
    /// Logits of the prompt's last position, `f32[1, 1, vocab]`.
    pub(crate) logits: Tensor,
    /// Tokens so far.
    pub(crate) history: Vec<i64>,
    /// Tokens that were run for it.
    pub(crate) prompt_tokens: usize,
    /// When the request came.
    pub(crate) since: Instant,
}

/// Generates an answer and gives out its text as it comes. What the pipeline's cache holds afterwards is the prompt and all
/// tokens of the answer but the last.
pub(crate) fn generate(
    pipeline: &mut Pipeline,
    tokenizer: &Tokenizer,
    eos: &[i64],
    options: &GenerateOptions,
    start: Start,
    on_text: &mut dyn FnMut(&str),
) -> Result<Reply> {
    let Start { logits, mut history, prompt_tokens, since } = start;
    let mut sampler = Sampler::new(options.sampling.clone()).map_err(Error::Input)?;
    let room = pipeline.rules().max_positions - pipeline.past();
    let limit = options.max_new_tokens.min(room + 1);
    let mut text = Stopper::new(&options.stop);
    let mut stream = tokenizer.stream();
    let mut ids = vec![];
    let mut finish = Finish::Length;
    let mut logits = logits;
    let mut first = None;
    while ids.len() < limit {
        let id = sampler.next(logits.f32()?, &history);
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
            logits = pipeline.step(&[id])?;
        }
    }
    if finish != Finish::Stop {
        let (piece, stopped) = text.push(&stream.finish()?);
        let rest = piece + &if stopped { String::new() } else { text.rest() };
        if !rest.is_empty() {
            on_text(&rest);
        }
    }
    let first = first.unwrap_or_else(Instant::now);
    Ok(Reply { text: text.given, ids, finish, prompt_tokens, first_token: first - since, decoding: first.elapsed() })
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
