//! Models without prompts: [`Classifier`] labels pictures, [`PairScorer`] says how well pictures and texts go together, and both
//! make vectors of them. [`Loaded::open`] opens an artifact as what it is for.

use crate::{
    Engine, EngineOptions, Error, Model, Result, Tensor,
    artifact_dir::Artifact,
    forward::{Tensors, forward},
    image::Rgb,
    model::open_engine,
    processor,
    tokenizer::Tokenizer,
};
use std::path::Path;
use vlmc_artifact::{Manifest, Task, TextRules};

/// A loaded artifact, by what its model is for.
pub enum Loaded {
    /// Answers prompts.
    Answers(Box<Model>),
    /// Scores pairs of pictures and texts.
    Pairs(Box<PairScorer>),
    /// Labels pictures.
    Labels(Classifier),
}

impl Loaded {
    /// Loads an artifact.
    ///
    /// # Errors
    /// It is not an artifact, is damaged, or no engine runs it.
    pub fn open(dir: &Path, options: &EngineOptions) -> Result<Self> {
        Ok(match Artifact::open(dir)?.manifest().task {
            Task::Generate(_) => Self::Answers(Box::new(Model::open(dir, options)?)),
            Task::Contrast(_) => Self::Pairs(Box::new(PairScorer::open(dir, options)?)),
            Task::Classify { .. } => Self::Labels(Classifier::open(dir, options)?),
        })
    }
}

/// A model is not for what it was asked to do.
fn misused(manifest: &Manifest, asked: &str) -> Error {
    let Manifest { architecture, task, .. } = manifest;
    Error::Unsupported(format!("the model (of type {architecture}) {}; it cannot {asked}", task.purpose()))
}

/// A label of a picture.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Label {
    /// Its name.
    pub label: String,
    /// Between 0 and 1; all labels of a picture sum up to 1.
    pub probability: f32,
}

/// A model that labels pictures (ViT).
pub struct Classifier {
    engine: Box<dyn Engine>,
    labels: Vec<String>,
}

impl Classifier {
    /// Loads an artifact.
    ///
    /// # Errors
    /// It is not an artifact, is damaged, no engine runs it, or its model is for something else.
    pub fn open(dir: &Path, options: &EngineOptions) -> Result<Self> {
        let artifact = Artifact::open(dir)?;
        let Task::Classify { labels } = artifact.manifest().task.clone() else {
            return Err(misused(artifact.manifest(), "label pictures"));
        };
        Ok(Self { engine: open_engine(&artifact, options)?, labels })
    }

    /// The manifest.
    pub fn manifest(&self) -> &Manifest {
        self.engine.manifest()
    }

    /// The `top` most probable labels of each picture, the most probable first.
    ///
    /// # Errors
    /// The checkpoint had no classifier or no preprocessor config, or a picture is of a shape that the processor does not take.
    pub fn classify(&mut self, pictures: &[Rgb], top: usize) -> Result<Vec<Vec<Label>>> {
        if self.labels.is_empty() {
            return Err(Error::Unsupported("the checkpoint had no classifier, only the tower: it makes vectors, not labels".into()));
        }
        let logits = see(&mut *self.engine, pictures, "logits")?;
        let count = self.labels.len();
        let label = |(label, probability): (&String, f32)| Label { label: label.clone(), probability };
        let rows = logits.f32()?.chunks(count).map(|row| {
            let mut labels: Vec<Label> = self.labels.iter().zip(softmax(row)).map(label).collect();
            labels.sort_by(|a, b| b.probability.total_cmp(&a.probability));
            labels.truncate(top);
            labels
        });
        Ok(rows.collect())
    }

    /// Vectors of pictures, `f32[pictures, width]`: the pooled output of a model that has one, else that of the class token, which
    /// comes first.
    ///
    /// # Errors
    /// As [`Self::classify`], but for the classifier.
    pub fn embed_images(&mut self, pictures: &[Rgb]) -> Result<Tensor> {
        const POOLED: &str = "pooler_output";
        if self.engine.manifest().entries.iter().flat_map(|e| &e.outputs).any(|p| p.name == POOLED) {
            return see(&mut *self.engine, pictures, POOLED);
        }
        let states = see(&mut *self.engine, pictures, "last_hidden_state")?;
        let &[n, tokens, width] = states.shape() else { return Err(Error::Input("'last_hidden_state' must have 3 axes".into())) };
        let first = states.f32()?.chunks(tokens * width).flat_map(|p| &p[..width]).copied().collect::<Vec<_>>();
        Tensor::new([n, width], first)
    }
}

/// A model that scores pairs of pictures and texts (CLIP, SigLIP).
pub struct PairScorer {
    engine: Box<dyn Engine>,
    tokenizer: Option<Tokenizer>,
    rules: TextRules,
}

impl PairScorer {
    /// Loads an artifact.
    ///
    /// # Errors
    /// It is not an artifact, is damaged, no engine runs it, or its model is for something else.
    pub fn open(dir: &Path, options: &EngineOptions) -> Result<Self> {
        let artifact = Artifact::open(dir)?;
        let Task::Contrast(rules) = artifact.manifest().task.clone() else {
            return Err(misused(artifact.manifest(), "score pairs of pictures and texts"));
        };
        let tokenizer = artifact.path("tokenizer.json").map(|p| Tokenizer::open(&p)).transpose()?;
        Ok(Self { engine: open_engine(&artifact, options)?, tokenizer, rules })
    }

    /// The manifest.
    pub fn manifest(&self) -> &Manifest {
        self.engine.manifest()
    }

    /// Vectors of pictures, `f32[pictures, width]`, of length 1.
    ///
    /// # Errors
    /// The checkpoint had no preprocessor config, or a picture is of a shape that the processor does not take.
    pub fn embed_images(&mut self, pictures: &[Rgb]) -> Result<Tensor> {
        see(&mut *self.engine, pictures, "image_embeds")
    }

    /// Vectors of texts, `f32[texts, width]`, of length 1. What is too long for the model is cut off.
    ///
    /// # Errors
    /// The checkpoint had no tokenizer.
    pub fn embed_texts(&mut self, texts: &[String]) -> Result<Tensor> {
        let given = self.tokens(texts)?;
        take(forward(&mut *self.engine, &given)?, "text_embeds")
    }

    /// `input_ids` and `attention_mask` of texts, padded on the right.
    ///
    /// # Errors
    /// The checkpoint had no tokenizer, or there are no texts.
    pub fn tokens(&self, texts: &[String]) -> Result<Tensors> {
        let missing = || Error::Unsupported("the checkpoint had no tokenizer.json, so the artifact takes no texts".into());
        tokens(self.tokenizer.as_ref().ok_or_else(missing)?, &self.rules, texts)
    }

    /// Scores of all pairs, `logits_per_image f32[pictures, texts]`, from their vectors.
    ///
    /// # Errors
    /// The vectors are not those of this model.
    pub fn score(&mut self, images: &Tensor, texts: &Tensor) -> Result<Tensor> {
        let given = [("image_embeds".into(), images.clone()), ("text_embeds".into(), texts.clone())];
        take(forward(&mut *self.engine, &given.into())?, "logits_per_image")
    }

    /// Probabilities of the texts for one picture, from its row of [`Self::score`]: shares of 1 where the model chooses among texts
    /// (CLIP), else each text's own (SigLIP).
    pub fn probabilities(&self, scores: &[f32]) -> Vec<f32> {
        if self.rules.sigmoid { scores.iter().map(|s| 1.0 / (1.0 + (-s).exp())).collect() } else { softmax(scores) }
    }
}

/// `input_ids` and `attention_mask` of texts, padded on the right.
///
/// # Errors
/// There are no texts.
pub(crate) fn tokens(tokenizer: &Tokenizer, rules: &TextRules, texts: &[String]) -> Result<Tensors> {
    let TextRules { max_length, pad_to_max, pad_token_id, .. } = *rules;
    let rows = texts.iter().map(|t| tokenizer.encode_up_to(t, max_length)).collect::<Result<Vec<_>>>()?;
    let longest = rows.iter().map(Vec::len).max().ok_or_else(|| Error::Input("there are no texts".into()))?;
    let seq = if pad_to_max { max_length } else { longest.max(1) };
    let padded = |row: &Vec<i64>, fill: i64| row.iter().copied().chain(std::iter::repeat_n(fill, seq - row.len())).collect::<Vec<_>>();
    let ids: Vec<i64> = rows.iter().flat_map(|r| padded(r, pad_token_id)).collect();
    // Models that were trained with padding attend to it.
    let mask: Vec<i64> = rows.iter().flat_map(|r| padded(&vec![1; r.len()], i64::from(pad_to_max))).collect();
    let shape = [rows.len(), seq];
    Ok([("input_ids".into(), Tensor::new(shape, ids)?), ("attention_mask".into(), Tensor::new(shape, mask)?)].into())
}

/// Runs the entry that sees pictures and gives its output `name`, one row per picture. Pictures whose tensors have other shapes
/// than the first one's run on their own.
fn see(engine: &mut dyn Engine, pictures: &[Rgb], name: &str) -> Result<Tensor> {
    let missing = || Error::Unsupported("the checkpoint had no preprocessor_config.json, so the artifact takes no pictures".into());
    let processor = engine.manifest().processor.clone().ok_or_else(missing)?;
    let made = pictures.iter().map(|p| Ok(processor::image(&processor, p)?.inputs)).collect::<Result<Vec<_>>>()?;
    let first = made.first().ok_or_else(|| Error::Input("there are no pictures".into()))?;
    let shapes = |t: &Tensors| t.values().map(|t| t.shape().to_vec()).collect::<Vec<_>>();
    if made.iter().all(|t| shapes(t) == shapes(first)) {
        return take(forward(engine, &joined(&made)?)?, name);
    }
    let rows = made.iter().map(|t| Ok([(name.to_string(), take(forward(engine, t)?, name)?)].into())).collect::<Result<Vec<_>>>()?;
    take(joined(&rows)?, name)
}

fn take(mut outputs: Tensors, name: &str) -> Result<Tensor> {
    outputs.remove(name).ok_or_else(|| Error::Input(format!("the artifact gives no '{name}'")))
}

/// Tensors of the same names one after the other along their first axis.
fn joined(all: &[Tensors]) -> Result<Tensors> {
    let Some(first) = all.first() else { return Ok(Tensors::new()) };
    let join = |(name, t): (&String, &Tensor)| {
        let of = || all.iter().filter_map(|one| one.get(name));
        let rest = t.shape().get(1..).unwrap_or_default();
        if of().any(|t| t.shape().get(1..) != Some(rest)) {
            return Err(Error::Input(format!("the pictures' '{name}' have unlike shapes: they cannot be put together")));
        }
        let shape: Vec<usize> = std::iter::once(of().map(|t| t.shape()[0]).sum()).chain(rest.iter().copied()).collect();
        let tensor = match t.data() {
            crate::Data::I64(_) => Tensor::new(shape, of().map(|t| t.i64().map(<[i64]>::to_vec)).collect::<Result<Vec<_>>>()?.concat())?,
            _ => Tensor::new(shape, of().map(|t| t.f32().map(<[f32]>::to_vec)).collect::<Result<Vec<_>>>()?.concat())?,
        };
        Ok((name.clone(), tensor))
    };
    first.iter().map(join).collect()
}

fn softmax(scores: &[f32]) -> Vec<f32> {
    let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f64> = scores.iter().map(|s| f64::from(s - largest).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|w| (w / sum) as f32).collect()
}
