//! The graphs of a vision-language model run in turn: `vision` makes features of pictures, `embed` puts them among the token
//! embeddings, `decoder` makes logits.

use crate::{
    Engine, Error, Result, Tensor,
    prompt::{self, Grid},
};

/// A batch of prompts as tensors, named as in the Hugging Face forward signature.
#[derive(Clone, Debug, Default)]
pub struct ModelInputs {
    /// `i64[batch, seq]`, with a placeholder id per row of features.
    pub input_ids: Option<Tensor>,
    /// `i64[batch, seq]` of 0 (left padding) and 1; all 1 if absent.
    pub attention_mask: Option<Tensor>,
    /// `i64[3, batch, seq]`; by the model's rule if absent.
    pub position_ids: Option<Tensor>,
    /// Patches of all pictures, `f32[patches, patch]`.
    pub pixel_values: Option<Tensor>,
    /// `i64[images, 3]`.
    pub image_grid_thw: Option<Tensor>,
    /// Patches of all videos.
    pub pixel_values_videos: Option<Tensor>,
    /// `i64[videos, 3]`.
    pub video_grid_thw: Option<Tensor>,
}

/// Features of pictures and videos, `f32[tokens, hidden]` each.
#[derive(Clone, Debug, Default)]
pub struct Features {
    /// Of the pictures.
    pub image: Option<Tensor>,
    /// Of the videos.
    pub video: Option<Tensor>,
}

/// Positions of a prompt whose logits are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scored {
    /// All.
    All,
    /// The last one.
    Last,
}

/// An engine and the state of the sequences it works on.
pub struct Pipeline {
    engine: Box<dyn Engine>,
    /// `[batch, past]`: which positions of the cache are live.
    mask: Vec<Vec<i64>>,
    /// Position of each row's next token.
    next: Vec<i64>,
}

impl Pipeline {
    /// Over an engine without states.
    pub fn new(engine: Box<dyn Engine>) -> Self {
        Self { engine, mask: vec![], next: vec![] }
    }

    /// The engine.
    pub fn engine(&self) -> &dyn Engine {
        &*self.engine
    }

    /// Positions in the cache.
    pub fn past(&self) -> usize {
        self.engine.past()
    }

    /// Forgets all sequences.
    ///
    /// # Errors
    /// What the engine says.
    pub fn clear(&mut self) -> Result<()> {
        self.mask.clear();
        self.next.clear();
        self.engine.truncate(0)
    }

    /// Keeps the first `len` positions of all sequences. What comes next must come with its own positions.
    ///
    /// # Errors
    /// There are fewer.
    pub fn truncate(&mut self, len: usize) -> Result<()> {
        self.engine.truncate(len)?;
        self.mask.iter_mut().for_each(|m| m.truncate(len));
        Ok(())
    }

    /// Features of the pictures and videos of a batch.
    ///
    /// # Errors
    /// Pixels without a grid or the other way round, or a grid that does not fit them.
    pub fn features(&mut self, inputs: &ModelInputs) -> Result<Features> {
        Ok(Features {
            image: self.encode(&inputs.pixel_values, &inputs.image_grid_thw, ["pixel_values", "image_grid_thw"])?,
            video: self.encode(&inputs.pixel_values_videos, &inputs.video_grid_thw, ["pixel_values_videos", "video_grid_thw"])?,
        })
    }

    fn encode(&mut self, pixels: &Option<Tensor>, grid: &Option<Tensor>, names: [&str; 2]) -> Result<Option<Tensor>> {
        let (pixels, grid) = match (pixels, grid) {
            (None, None) => return Ok(None),
            (Some(p), Some(g)) => (p, g),
            (None, _) => return Err(Error::Input(format!("'{}' is given without '{}'", names[1], names[0]))),
            (_, None) => return Err(Error::Input(format!("'{}' is given without '{}'", names[0], names[1]))),
        };
        let rules = &self.engine.manifest().prompt;
        let vlmc_artifact::Positions::Mrope { spatial_merge_size } = rules.positions;
        let tokens = grids(Some(grid))?.iter().try_fold(0usize, |n, g| Ok::<_, Error>(n.saturating_add(prompt::tokens(*g, rules)?)))?;
        let patches = tokens.saturating_mul(spatial_merge_size * spatial_merge_size);
        if pixels.shape().first() != Some(&patches) {
            let (have, [pixels_name, grid_name]) = (pixels.shape(), names);
            return Err(Error::Input(format!("'{grid_name}' is of {patches} patches, but '{pixels_name}' has shape {have:?}")));
        }
        let out = self.engine.run("vision", &[("pixel_values", pixels), ("image_grid_thw", grid)])?;
        Ok(out.into_iter().next())
    }

    /// Runs prompts through the decoder, after what is in the cache: `f32[batch, seq or 1, vocab]`.
    ///
    /// # Errors
    /// Tensors that do not fit each other or the model; a context that the model does not have.
    pub fn prefill(&mut self, inputs: &ModelInputs, features: &Features, scored: Scored) -> Result<Tensor> {
        let ids = inputs.input_ids.as_ref().ok_or_else(|| Error::Input("'input_ids' is missing".into()))?;
        let &[batch, seq] = ids.shape() else {
            return Err(Error::Input(format!("'input_ids' must be [batch, seq], is {:?}", ids.shape())));
        };
        if batch == 0 || seq == 0 {
            return Err(Error::Input(format!("'input_ids' is empty: {:?}", ids.shape())));
        }
        let mask = match &inputs.attention_mask {
            None => vec![1; batch * seq],
            Some(m) if m.shape() == ids.shape() => m.i64()?.to_vec(),
            Some(m) => {
                return Err(Error::Input(format!("'attention_mask' must be {:?} like 'input_ids', is {:?}", ids.shape(), m.shape())));
            }
        };
        if let Some(bad) = mask.iter().find(|m| !matches!(m, 0 | 1)) {
            return Err(Error::Input(format!("'attention_mask' must be of 0 and 1, has {bad}")));
        }
        let past = self.past();
        if past == 0 {
            self.mask = vec![vec![]; batch];
            self.next = vec![0; batch];
        } else if self.mask.len() != batch {
            return Err(Error::Input(format!("the cache is of {} sequences, the batch of {batch}", self.mask.len())));
        }
        let (positions, next) = match &inputs.position_ids {
            Some(p) if p.shape() == [3, batch, seq] => (p.clone(), self.next_after(p, &mask, batch, seq)?),
            Some(p) => return Err(Error::Input(format!("'position_ids' must be [3, {batch}, {seq}], is {:?}", p.shape()))),
            None => self.positions(ids, &mask, inputs)?,
        };
        let embeds = self.embed(ids, features)?;
        let logit_positions: Vec<i64> = match scored {
            Scored::All => (0..seq as i64).collect(),
            Scored::Last => vec![seq as i64 - 1],
        };
        let rows: Vec<Vec<i64>> = mask.chunks_exact(seq).map(<[i64]>::to_vec).collect();
        self.decode(embeds, positions, rows, logit_positions, next)
    }

    /// One more token for each sequence: `f32[batch, vocab]`.
    ///
    /// # Errors
    /// The batch is not that of the prompts; a context that the model does not have.
    pub fn step(&mut self, ids: &[i64]) -> Result<Tensor> {
        let batch = self.mask.len();
        if ids.len() != batch || batch == 0 {
            return Err(Error::Input(format!("{} tokens for {batch} sequences", ids.len())));
        }
        let ids = Tensor::new([batch, 1], ids.to_vec())?;
        let embeds = self.run_embed(&ids, vec![])?;
        let positions = Tensor::new([3, batch, 1], self.next.repeat(3))?;
        let next = self.next.iter().map(|n| n + 1).collect();
        let logits = self.decode(embeds, positions, vec![vec![1]; batch], vec![0], next)?;
        let vocab = logits.shape()[2];
        Tensor::new([batch, vocab], logits.data().clone())
    }

    /// `n` tokens for each prompt: always the most probable, whatever it is. Starts anew.
    ///
    /// # Errors
    /// As [`Self::prefill`].
    pub fn greedy(&mut self, inputs: &ModelInputs, features: &Features, n: usize) -> Result<Tensor> {
        self.clear()?;
        let logits = self.prefill(inputs, features, Scored::Last)?;
        self.continue_greedily(&logits, n)
    }

    /// `i64[batch, n]` of the most probable tokens, the first of which follows from `logits f32[batch, seq, vocab]`.
    ///
    /// # Errors
    /// As [`Self::step`].
    pub fn continue_greedily(&mut self, logits: &Tensor, n: usize) -> Result<Tensor> {
        let &[batch, seq, vocab] = logits.shape() else { return Err(Error::Input("logits must have 3 axes".into())) };
        let mut last: Vec<i64> = logits.f32()?.chunks_exact(seq * vocab).map(|row| argmax(&row[(seq - 1) * vocab..])).collect();
        let mut out = vec![vec![]; batch];
        for i in 0..n {
            out.iter_mut().zip(&last).for_each(|(o, id)| o.push(*id));
            if i + 1 < n {
                last = self.step(&last)?.f32()?.chunks_exact(vocab).map(argmax).collect();
            }
        }
        Tensor::new([batch, n], out.concat())
    }

    fn embed(&mut self, ids: &Tensor, features: &Features) -> Result<Tensor> {
        let rules = &self.engine.manifest().prompt;
        let hidden = rules.hidden_size;
        let ids_of = ids.i64()?;
        // Rows in prompt order: pictures and videos may alternate.
        let mut rows = Vec::new();
        let count = |token: Option<i64>, tensor: &Option<Tensor>, what: &str| {
            let wanted = ids_of.iter().filter(|i| Some(**i) == token).count();
            let have = tensor.as_ref().map_or(0, |t| t.shape()[0]);
            if wanted == have {
                return Ok(());
            }
            Err(Error::Input(format!("the prompt has {wanted} {what} placeholders, but the {what}s given make {have} features")))
        };
        count(Some(rules.image_token_id), &features.image, "image")?;
        count(rules.video_token_id, &features.video, "video")?;
        let data = |t: &'_ Option<Tensor>| t.as_ref().map(|t| t.f32().map(<[f32]>::to_vec)).transpose();
        let (image, video) = (data(&features.image)?.unwrap_or_default(), data(&features.video)?.unwrap_or_default());
        let (mut images, mut videos) = (image.chunks_exact(hidden), video.chunks_exact(hidden));
        for id in ids_of {
            let row = if *id == rules.image_token_id {
                images.next()
            } else if Some(*id) == rules.video_token_id {
                videos.next()
            } else {
                None
            };
            rows.extend_from_slice(row.unwrap_or_default());
        }
        self.run_embed(ids, rows)
    }

    /// Token embeddings, with `rows` of features in the places of the placeholders. A placeholder beyond the features, which only
    /// the model itself can have written, is a token like any other.
    fn run_embed(&mut self, ids: &Tensor, rows: Vec<f32>) -> Result<Tensor> {
        let &vlmc_artifact::PromptRules { hidden_size, vocab_size, .. } = &self.engine.manifest().prompt;
        if let Some(bad) = ids.i64()?.iter().find(|i| !(0..vocab_size as i64).contains(i)) {
            return Err(Error::Input(format!("'input_ids' has {bad}, which is not in the vocabulary of {vocab_size}")));
        }
        let features = Tensor::new([rows.len() / hidden_size.max(1), hidden_size], rows)?;
        let out = self.engine.run("embed", &[("input_ids", ids), ("image_features", &features)])?;
        out.into_iter().next().ok_or_else(|| Error::Input("the artifact's 'embed' has no output".into()))
    }

    fn positions(&self, ids: &Tensor, mask: &[i64], inputs: &ModelInputs) -> Result<(Tensor, Vec<i64>)> {
        let [batch, seq] = [ids.shape()[0], ids.shape()[1]];
        let (images, videos) = (grids(inputs.image_grid_thw.as_ref())?, grids(inputs.video_grid_thw.as_ref())?);
        let mut p = prompt::positions(ids.i64()?, mask, seq, &self.engine.manifest().prompt, &images, &videos)?;
        // After earlier turns, everything is shifted by where they ended.
        for (i, id) in p.ids.iter_mut().enumerate() {
            if mask[i % mask.len()] != 0 {
                *id += self.next[i / seq % batch];
            }
        }
        p.next.iter_mut().zip(&self.next).for_each(|(n, before)| *n += before);
        Ok((Tensor::new([3, batch, seq], p.ids)?, p.next))
    }

    /// With given positions, decoding goes on after the largest.
    fn next_after(&self, positions: &Tensor, mask: &[i64], batch: usize, seq: usize) -> Result<Vec<i64>> {
        let p = positions.i64()?;
        let largest = |row: usize| {
            let live = (0..3).flat_map(|k| (0..seq).map(move |i| (k, i))).filter(|(_, i)| mask[row * seq + i] != 0);
            live.map(|(k, i)| p[(k * batch + row) * seq + i]).max().map_or(0, |m| m + 1)
        };
        Ok((0..batch).map(largest).collect())
    }

    fn decode(
        &mut self,
        embeds: Tensor,
        positions: Tensor,
        new: Vec<Vec<i64>>,
        logit_positions: Vec<i64>,
        next: Vec<i64>,
    ) -> Result<Tensor> {
        let longest = self.engine.manifest().prompt.max_positions;
        let (past, seq) = (self.past(), embeds.shape()[1]);
        if past + seq > longest {
            return Err(Error::Input(format!("{past} + {seq} tokens are more than the model's context of {longest}")));
        }
        let batch = new.len();
        let mask: Vec<i64> = self.mask.iter().zip(&new).flat_map(|(a, b)| a.iter().chain(b)).copied().collect();
        let mask = Tensor::new([batch, past + seq], mask)?;
        let logit_positions = Tensor::new([logit_positions.len()], logit_positions)?;
        let inputs =
            [("inputs_embeds", &embeds), ("position_ids", &positions), ("attention_mask", &mask), ("logit_positions", &logit_positions)];
        let out = self.engine.run("decoder", &inputs)?;
        self.mask.iter_mut().zip(new).for_each(|(m, n)| m.extend(n));
        self.next = next;
        out.into_iter().next().ok_or_else(|| Error::Input("the artifact's 'decoder' has no output".into()))
    }
}

/// Index of the largest value; the first of equals.
pub(crate) fn argmax(row: &[f32]) -> i64 {
    row.iter().enumerate().fold((0, f32::NEG_INFINITY), |best, (i, v)| if *v > best.1 { (i, *v) } else { best }).0 as i64
}

fn grids(t: Option<&Tensor>) -> Result<Vec<Grid>> {
    let Some(t) = t else { return Ok(vec![]) };
    match t.shape() {
        [_, 3] => Ok(t.i64()?.as_chunks::<3>().0.to_vec()),
        other => Err(Error::Input(format!("a grid_thw must be i64[n, 3], is {}{other:?}", t.dtype()))),
    }
}
