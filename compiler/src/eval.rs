//! `vlmc eval`: what quantization costs on a user's own data.

use crate::{
    Error, Result,
    samples::Sample,
    verify::{Request, kl},
};
use serde::Serialize;
use vlmc_runtime::{Artifact, EngineOptions, Pipeline, Scored, open_engine, prepare::Preparer, tokenizer::Tokenizer};

/// A model that answers prompts greedily.
pub struct Evaluated {
    pipeline: Pipeline,
    tokenizer: Tokenizer,
}

/// A greedy answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// Its tokens, with the one that ended it.
    pub ids: Vec<i64>,
    /// Its text.
    pub text: String,
    /// For each token, the logits that it was chosen by.
    pub logits: Vec<Vec<f32>>,
}

/// How an artifact does on some samples.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Score {
    /// Samples.
    pub samples: usize,
    /// Those with an `answer` that the artifact gave.
    pub right: usize,
    /// Those with an `answer`.
    pub known: usize,
    /// Those where it answered as the reference did.
    pub same: usize,
    /// Kullback-Leibler divergence (nats) of the probabilities of a token from the reference's, which it also follows: mean over all
    /// tokens of the reference's answers.
    pub mean_kl: f64,
    /// The largest.
    pub max_kl: f64,
}

/// The tensors that an artifact takes of samples.
///
/// # Errors
/// A sample does not fit the artifact's model, or its picture cannot be read.
pub fn requests(artifact: &Artifact, samples: &[Sample]) -> Result<Vec<Request>> {
    let manifest = artifact.manifest();
    let preparer = Preparer::new(manifest.task.clone(), manifest.processor.clone(), |name| artifact.path(name))?;
    samples.iter().map(|s| Ok(Request { name: s.name.clone(), tensors: s.tensors(&preparer)? })).collect()
}

impl Evaluated {
    /// # Errors
    /// The artifact cannot be loaded, answers no prompts, or has no tokenizer.
    pub fn open(artifact: &Artifact, options: &EngineOptions) -> Result<Self> {
        let tokenizer = artifact.path("tokenizer.json").ok_or_else(|| Error::Model {
            model: artifact.manifest().architecture.clone(),
            message: "has no tokenizer.json, so its answers cannot be read".into(),
        })?;
        Ok(Self { pipeline: Pipeline::new(open_engine(artifact, options)?)?, tokenizer: Tokenizer::open(&tokenizer)? })
    }

    /// The answer to a request, of at most `limit` tokens; of a given answer, the first tokens are these.
    ///
    /// # Errors
    /// The request does not fit the model.
    pub fn answer(&mut self, request: &Request, given: &[i64], limit: usize) -> Result<Answer> {
        let failed = |e: vlmc_runtime::Error| Error::Model { model: request.name.clone(), message: e.to_string() };
        self.pipeline.clear()?;
        let features = self.pipeline.features(&request.tensors).map_err(failed)?;
        let logits = self.pipeline.prefill(&request.tensors, &features, Scored::Last).map_err(failed)?;
        let mut row = logits.f32()?.to_vec();
        let ends = self.pipeline.engine().manifest().generation.eos_token_ids.clone();
        let mut answer = Answer { ids: vec![], text: String::new(), logits: vec![] };
        loop {
            let at = answer.ids.len();
            let id = given.get(at).copied().unwrap_or_else(|| best(&row));
            answer.ids.push(id);
            answer.logits.push(row);
            if at + 1 >= limit.max(given.len()) || (at + 1 >= given.len() && ends.contains(&id)) {
                break;
            }
            row = self.pipeline.extend(&[id]).map_err(failed)?.f32()?.to_vec();
        }
        let said = if answer.ids.last().is_some_and(|id| ends.contains(id)) { answer.ids.len() - 1 } else { answer.ids.len() };
        answer.text = self.tokenizer.decode(&answer.ids[..said])?;
        Ok(answer)
    }

    /// Answers all requests.
    ///
    /// # Errors
    /// As [`Self::answer`].
    pub fn answers(&mut self, requests: &[Request], limit: usize) -> Result<Vec<Answer>> {
        requests.iter().map(|r| self.answer(r, &[], limit)).collect()
    }

    /// How it does on `samples`, where the reference has given `answers`.
    ///
    /// # Errors
    /// As [`Self::answer`].
    pub fn score(&mut self, samples: &[Sample], requests: &[Request], answers: &[Answer], limit: usize) -> Result<Score> {
        let mut score = Score { samples: samples.len(), ..Score::default() };
        let (mut sum, mut tokens) = (0.0, 0);
        for ((sample, request), reference) in samples.iter().zip(requests).zip(answers) {
            let followed = self.answer(request, &reference.ids, limit)?;
            for (got, reference) in followed.logits.iter().zip(&reference.logits) {
                let kl = kl(got, reference);
                sum += kl;
                tokens += 1;
                score.max_kl = score.max_kl.max(kl);
            }
            let same = followed.logits.iter().zip(&reference.ids).all(|(logits, id)| best(logits) == *id);
            score.same += usize::from(same);
            if let Some(right) = &sample.answer {
                let text = if same { reference.text.clone() } else { self.answer(request, &[], limit)?.text };
                score.known += 1;
                score.right += usize::from(text.trim() == right.trim());
            }
        }
        score.mean_kl = sum / f64::from(tokens.max(1));
        Ok(score)
    }
}

/// The most probable token; the first of equals.
fn best(logits: &[f32]) -> i64 {
    logits.iter().enumerate().fold((0, f32::NEG_INFINITY), |best, (i, v)| if *v > best.1 { (i, *v) } else { best }).0 as i64
}
