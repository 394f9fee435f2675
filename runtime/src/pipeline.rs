//! The graphs of a model that answers prompts, run in turn: `vision` makes features of pictures, `embed` puts them among the
//! token embeddings, `decoder` makes logits. What one entry gives and a later one takes under the same name is passed on.

use crate::{
    Engine, Error, Result, Tensor,
    binding::{bind, extents},
    cross::{self, Cross},
    forward,
    forward::Tensors,
    processor::deepseek_vl2,
    prompt::{self, Clip, Grid},
};
use smallvec::{SmallVec, smallvec};
use std::{num::NonZero, ops::Range};
use vlmc_artifact::{Bindings, Entry, Port, Positions, PromptRules};

/// Tokens of a prompt that run through the decoder at once: enough to use each weight well, and few enough that what a long prompt
/// works in stays small beside them.
pub(crate) const PREFILL_BLOCK: usize = 512;

/// Outputs of `vision`, in the order of the manifest. Their first axis is that of the features, in the order of the
/// placeholders in the prompt.
pub type Outputs = Vec<(String, Tensor)>;

/// Features of pictures and videos.
#[derive(Clone, Debug, Default)]
pub struct Features {
    /// Of the pictures.
    pub image: Option<Outputs>,
    /// Of the videos.
    pub video: Option<Outputs>,
}

/// Positions of a prompt whose logits are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scored {
    /// All.
    All,
    /// The last one.
    Last,
}

/// What videos are called where pictures have a name of their own in the forward signature (Qwen2-VL).
const VIDEO_NAMES: [(&str, &str); 2] = [("pixel_values", "pixel_values_videos"), ("image_grid_thw", "video_grid_thw")];

/// Inputs that belong to prompts and not to a graph.
const PROMPT_INPUTS: [&str; 6] =
    ["input_ids", "attention_mask", "position_ids", "second_per_grid_ts", "images_seq_mask", "images_emb_mask"];

/// An engine and the state of the sequences it works on.
pub struct Pipeline {
    engine: Box<dyn Engine>,
    rules: PromptRules,
    /// `[batch, past]`: which positions of the cache are live.
    mask: Vec<Vec<i64>>,
    /// Position of each row's next token.
    next: Vec<i64>,
    /// Tokens of the first prompt, which may decide the frequencies of positions.
    prompt_length: usize,
    /// The pictures that the decoder attends to, if it does.
    cross: Cross,
    /// Tokens of a prompt that run at once.
    block: usize,
    /// What `embed` and `decoder` took last, by name; the next token uses their memory.
    taken: Taken,
    /// What they gave last.
    embedded: Vec<Tensor>,
    decoded: Vec<Tensor>,
}

/// Tensors by name.
#[derive(Default)]
struct Taken(Vec<(String, Tensor)>);

impl Taken {
    /// The tensor of a name, to be filled.
    fn place(&mut self, name: &str) -> &mut Tensor {
        let at = self.0.iter().position(|(n, _)| n == name).unwrap_or_else(|| {
            self.0.push((name.into(), Tensor::default()));
            self.0.len() - 1
        });
        &mut self.0[at].1
    }

    /// Those that an entry takes.
    fn of(&self, entry: &Entry) -> SmallVec<[(&str, &Tensor); 16]> {
        self.0.iter().filter(|(n, _)| entry.inputs.iter().any(|p| p.name == *n)).map(|(n, t)| (n.as_str(), t)).collect()
    }
}

/// A prompt as the decoder takes it.
struct Prompt {
    ids: Tensor,
    /// Which tokens stand for pictures, and which have a row of `features`: `[batch * seq]` each.
    images: Vec<i64>,
    placed: Vec<bool>,
    features: Outputs,
    positions: Tensor,
    /// For decoders that attend to pictures.
    states: Option<Tensor>,
    cross_mask: Option<Tensor>,
}

impl Pipeline {
    /// Over an engine without states.
    ///
    /// # Errors
    /// Its model answers no prompts.
    pub fn new(engine: Box<dyn Engine>) -> Result<Self> {
        let manifest = engine.manifest();
        let rules = manifest.task.prompt().cloned();
        let rules = rules.ok_or_else(|| {
            let (kind, does) = (&manifest.architecture, manifest.task.purpose());
            Error::Unsupported(format!("the model (of type {kind}) {does}; it cannot answer prompts"))
        })?;
        Ok(Self {
            engine,
            rules,
            mask: vec![],
            next: vec![],
            prompt_length: 0,
            cross: Cross::default(),
            block: PREFILL_BLOCK,
            taken: Taken::default(),
            embedded: vec![],
            decoded: vec![],
        })
    }

    /// The engine.
    pub fn engine(&self) -> &dyn Engine {
        &*self.engine
    }

    /// Special tokens and positions.
    pub fn rules(&self) -> &PromptRules {
        &self.rules
    }

    /// Positions in the cache.
    pub fn past(&self) -> usize {
        self.engine.past()
    }

    /// Runs at most so many tokens of a prompt at once, 512 if this is not called. A batch of several prompts runs as one, and a
    /// prompt with pictures of Qwen-VL, whose graphs tell them by the tokens around them.
    pub fn set_prefill_block(&mut self, tokens: NonZero<usize>) {
        self.block = tokens.get();
    }

    /// Tokens of the prompt that the cache began with.
    pub(crate) fn prompt_length(&self) -> usize {
        self.prompt_length
    }

    /// Forgets all sequences.
    ///
    /// # Errors
    /// What the engine says.
    pub fn clear(&mut self) -> Result<()> {
        self.mask.clear();
        self.next.clear();
        self.cross.clear();
        self.engine.truncate(0)
    }

    /// Keeps the first `len` positions of all sequences. What comes next must come with its own positions.
    ///
    /// # Errors
    /// There are fewer.
    pub fn truncate(&mut self, len: usize) -> Result<()> {
        if len == 0 {
            return self.clear();
        }
        self.engine.truncate(len)?;
        self.mask.iter_mut().for_each(|m| m.truncate(len));
        Ok(())
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        forward::entry(self.engine(), name)
    }

    /// Names of tensors that this model takes.
    pub fn inputs(&self) -> Vec<&str> {
        let entries = &self.engine.manifest().entries;
        let mut names: Vec<&str> = entries.iter().flat_map(|e| &e.inputs).map(|p| p.name.as_str()).collect();
        names.extend(PROMPT_INPUTS);
        if self.rules.video_token_id.is_some() {
            names.extend(VIDEO_NAMES.map(|(_, video)| video));
        }
        names
    }

    /// Features of the pictures and videos of a batch.
    ///
    /// # Errors
    /// Pixels without what belongs to them, or tensors that do not fit each other or the model.
    pub fn features(&mut self, inputs: &Tensors) -> Result<Features> {
        let mut image = self.encode(inputs, false)?;
        if let (Some(outputs), Some(mask)) = (&mut image, inputs.get("images_emb_mask")) {
            for (_, features) in outputs {
                *features = chosen(features, mask)?;
            }
        }
        let video = if self.rules.video_token_id.is_some() { self.encode(inputs, true)? } else { None };
        Ok(Features { image, video })
    }

    /// Runs `vision` on pictures or videos; `None` if there are none.
    fn encode(&mut self, inputs: &Tensors, video: bool) -> Result<Option<Outputs>> {
        let Some(fitted) = self.pixels(inputs, video)? else { return Ok(None) };
        let outputs: Vec<String> = self.entry("vision")?.outputs.iter().map(|p| p.name.clone()).collect();
        let feed: Vec<(&str, &Tensor)> = fitted.iter().map(|(n, t)| (n.as_str(), t)).collect();
        let results = self.engine.run("vision", &feed)?;
        Ok(Some(outputs.into_iter().zip(results).collect()))
    }

    /// Names and shapes of the features of pictures, which are not run; empty if there are no pictures.
    pub(crate) fn feature_shapes(&self, inputs: &Tensors) -> Result<Vec<(String, Vec<usize>)>> {
        let Some(fitted) = self.pixels(inputs, false)? else { return Ok(vec![]) };
        let entry = self.entry("vision")?;
        let feed: Vec<(&str, &Tensor)> = fitted.iter().map(|(n, t)| (n.as_str(), t)).collect();
        let mut symbols = Bindings::default();
        bind(&self.engine.manifest().symbols, entry, &feed, |_| None::<[usize; 0]>, &mut symbols)?;
        let shape = |p: &Port| Ok((p.name.clone(), extents(&p.shape, &symbols).map_err(Error::Input)?));
        entry.outputs.iter().map(shape).collect()
    }

    /// What `vision` takes of pictures or videos; `None` if there are none.
    fn pixels(&self, inputs: &Tensors, video: bool) -> Result<Option<Outputs>> {
        let entry = self.entry("vision")?;
        let name = |port: &str| VIDEO_NAMES.iter().find(|(image, _)| video && *image == port).map_or(port, |(_, video)| video).to_string();
        let names: Vec<String> = entry.inputs.iter().map(|p| name(&p.name)).collect();
        let Some(there) = names.iter().find(|n| inputs.contains_key(*n)) else { return Ok(None) };
        let mut fitted = vec![];
        for (port, name) in entry.inputs.iter().zip(&names) {
            match inputs.get(name) {
                Some(t) => fitted.push(forward::fit(t, port)?),
                None if port.name == "feature_positions" => {
                    let count = self.placeholders(inputs)?;
                    fitted.push(Tensor::new([count], (0..count as i64).collect::<Vec<_>>())?);
                }
                None => return Err(Error::Input(format!("'{there}' is given without '{name}'"))),
            }
        }
        let named = |name: &str| entry.inputs.iter().position(|p| p.name == name).map(|i| &fitted[i]);
        if let (Some(side), Some(crop), Some(places)) = (self.rules.tile_side, named("images_spatial_crop"), named("feature_positions")) {
            check_tiles(crop, side, places.data().len())?;
        }
        if let Positions::Mrope { spatial_merge_size, .. } = self.rules.positions {
            check_grid(&fitted, [&names[0], &names[1]], spatial_merge_size, &self.rules)?;
        }
        Ok(Some(entry.inputs.iter().map(|p| p.name.clone()).zip(fitted).collect()))
    }

    /// How many placeholders for pictures the prompts have.
    fn placeholders(&self, inputs: &Tensors) -> Result<usize> {
        if let Some(mask) = inputs.get("images_seq_mask") {
            return Ok(mask.i64()?.iter().filter(|m| **m != 0).count());
        }
        let ids = inputs.get("input_ids").ok_or_else(|| Error::Input("'input_ids' is missing".into()))?.i64()?;
        Ok(ids.iter().filter(|i| Some(**i) == self.rules.image_token_id).count())
    }

    /// Runs prompts through the decoder, after what is in the cache: `f32[batch, seq or 1, vocab]`.
    ///
    /// # Errors
    /// Tensors that do not fit each other or the model; a context that the model does not have.
    pub fn prefill(&mut self, inputs: &Tensors, features: &Features, scored: Scored) -> Result<Tensor> {
        let ids = inputs.get("input_ids").ok_or_else(|| Error::Input("'input_ids' is missing".into()))?;
        let &[batch, seq] = ids.shape() else {
            return Err(Error::Input(format!("'input_ids' must be [batch, seq], is {:?}", ids.shape())));
        };
        if batch == 0 || seq == 0 {
            return Err(Error::Input(format!("'input_ids' is empty: {:?}", ids.shape())));
        }
        let mask = match inputs.get("attention_mask") {
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
            self.prompt_length = seq;
        } else if self.mask.len() != batch {
            return Err(Error::Input(format!("the cache is of {} sequences, the batch of {batch}", self.mask.len())));
        }
        let axes = self.position_axes(batch, seq);
        let (positions, next) = match inputs.get("position_ids") {
            Some(p) if p.shape() == &axes[..] => (p.clone(), self.next_after(p, &mask, batch, seq)?),
            Some(p) => return Err(Error::Input(format!("'position_ids' must be {axes:?}, is {:?}", p.shape()))),
            None => self.positions(ids, &mask, inputs)?,
        };
        let (images, placed, merged) = self.place(ids, inputs.get("images_seq_mask"), features)?;
        let states = features.image.iter().flatten().find(|(n, _)| n == cross::STATES).map(|(_, t)| t);
        let states = states.or(inputs.get(cross::STATES));
        let (states, cross_mask) = (states.cloned(), inputs.get(cross::MASK).cloned());
        let prompt = Prompt { ids: ids.clone(), images, placed, features: merged, positions, states, cross_mask };
        self.fits(seq)?;
        let pictures = prompt.placed.contains(&true);
        let whole = batch > 1 || seq <= self.block || runs_whole(&self.rules, pictures);
        let block = if whole { seq } else { self.block };
        let mut all = vec![];
        for from in (0..seq).step_by(block) {
            let n = block.min(seq - from);
            let part = if whole { &prompt } else { &prompt.part(from, from + n)? };
            let scored = match scored {
                Scored::All => 0..n,
                Scored::Last => n - usize::from(from + n == seq)..n,
            };
            self.run_prompt(part, &mask, [from, n], scored)?;
            if !whole {
                all.extend_from_slice(self.logits()?.f32()?);
            }
        }
        self.next = next;
        // Tokens need less memory than prompts.
        (self.taken, self.embedded) = Default::default();
        let logits = self.logits()?;
        if whole {
            return Ok(logits.clone());
        }
        let vocab = logits.shape().last().copied().unwrap_or(0);
        Tensor::new([1, all.len() / vocab.max(1), vocab], all)
    }

    /// Runs a prompt, or a part of one, after what is in the cache. `mask [batch, seq]` is of all of it, `n` tokens from `from` on
    /// are the part, of which those `scored` get logits.
    fn run_prompt(&mut self, prompt: &Prompt, mask: &[i64], [from, n]: [usize; 2], scored: Range<usize>) -> Result<()> {
        self.run_embed(prompt.ids.i64()?, n, |i| prompt.images[i] != 0, &prompt.features)?;
        self.take_pictures(prompt.states.as_ref(), prompt.cross_mask.as_ref(), n)?;
        *self.taken.place("position_ids") = prompt.positions.clone();
        let row = mask.len() / self.mask.len();
        self.decode(n, |r, i| mask[r * row + from + i], scored)
    }

    /// What the decoder takes of pictures besides embeddings, with `n` tokens of each sequence.
    fn take_pictures(&mut self, states: Option<&Tensor>, mask: Option<&Tensor>, n: usize) -> Result<()> {
        let decoder = forward::entry(&*self.engine, "decoder")?;
        if Cross::is_of(decoder) {
            for (name, tensor) in self.cross.inputs(decoder, states, mask, [self.mask.len(), n])? {
                *self.taken.place(&name) = tensor;
            }
        }
        Ok(())
    }

    /// Whether the decoder attends to pictures instead of having them among its tokens.
    pub(crate) fn attends_to_pictures(&self) -> bool {
        self.entry("decoder").is_ok_and(Cross::is_of)
    }

    /// `ids [batch, n]`, one token after the other, after what is in the cache, as text: `f32[batch, n, vocab]`. After as many tokens
    /// before, it takes no memory on the `cpu` target, but for pictures that a decoder attends to.
    ///
    /// # Errors
    /// The batch is not that of the prompts; a context that the model does not have.
    pub fn extend(&mut self, ids: &[i64]) -> Result<&Tensor> {
        let batch = self.mask.len();
        if ids.is_empty() || batch == 0 || !ids.len().is_multiple_of(batch) {
            return Err(Error::Input(format!("{} tokens for {batch} sequences", ids.len())));
        }
        let n = ids.len() / batch;
        self.fits(n)?;
        self.run_embed(ids, n, |_| false, &[])?;
        self.take_pictures(None, None, n)?;
        let axes = self.position_axes(batch, n);
        let kinds = axes.iter().product::<usize>() / ids.len();
        let row = |next: &i64| *next..*next + n as i64;
        self.taken.place("position_ids").fill(&axes, (0..kinds).flat_map(|_| self.next.iter().flat_map(row)))?;
        self.decode(n, |_, _| 1, 0..n)?;
        self.next.iter_mut().for_each(|next| *next += n as i64);
        self.logits()
    }

    /// [`Self::extend`] for the most probable tokens: the largest of each row of logits is right, and where it is, the others are smaller.
    /// Less may be read of the weights.
    ///
    /// # Errors
    /// As [`Self::extend`].
    pub fn extend_greedily(&mut self, ids: &[i64]) -> Result<&Tensor> {
        self.engine.only_largest(true);
        let result = self.extend(ids).map(drop);
        self.engine.only_largest(false);
        result?;
        self.logits()
    }

    /// What the last run gave, `f32[batch, scored, vocab]`.
    ///
    /// # Errors
    /// Nothing has run, or the artifact gives none.
    pub fn logits(&self) -> Result<&Tensor> {
        self.decoded.first().ok_or_else(|| Error::Input("the decoder has not given logits".into()))
    }

    /// Forgets the last `n` tokens, which [`Self::extend`] ran: what comes next takes their positions.
    ///
    /// # Errors
    /// There are fewer in the cache.
    pub fn retract(&mut self, n: usize) -> Result<()> {
        if n == 0 {
            return Ok(());
        }
        let kept = self.past().checked_sub(n).ok_or_else(|| Error::Input(format!("{n} tokens of {} to forget", self.past())))?;
        self.truncate(kept)?;
        self.next.iter_mut().for_each(|next| *next -= n as i64);
        Ok(())
    }

    /// `i64[batch, n]` of the most probable tokens, the first of which follows from `logits f32[batch, seq, vocab]`.
    ///
    /// # Errors
    /// As [`Self::extend`].
    pub fn continue_greedily(&mut self, logits: &Tensor, n: usize) -> Result<Tensor> {
        let &[batch, seq, vocab] = logits.shape() else { return Err(Error::Input("logits must have 3 axes".into())) };
        let mut last: Vec<i64> = logits.f32()?.chunks_exact(seq * vocab).map(|row| argmax(&row[(seq - 1) * vocab..])).collect();
        let mut out = vec![vec![]; batch];
        for i in 0..n {
            out.iter_mut().zip(&last).for_each(|(o, id)| o.push(*id));
            if i + 1 < n {
                let rows = self.extend_greedily(&last)?.f32()?.chunks_exact(vocab);
                last.iter_mut().zip(rows).for_each(|(last, row)| *last = argmax(row));
            }
        }
        Tensor::new([batch, n], out.concat())
    }

    /// Which tokens of a prompt stand for pictures, which have features, and these in the order of the prompt, because pictures and
    /// videos may alternate.
    fn place(&self, ids: &Tensor, images_mask: Option<&Tensor>, features: &Features) -> Result<(Vec<i64>, Vec<bool>, Outputs)> {
        if self.attends_to_pictures() {
            let n = ids.data().len();
            return Ok((vec![0; n], vec![false; n], vec![]));
        }
        let ids_of = ids.i64()?;
        let images = match images_mask {
            Some(m) if m.shape() == ids.shape() => m.i64()?.to_vec(),
            Some(m) => {
                return Err(Error::Input(format!("'images_seq_mask' must be {:?} like 'input_ids', is {:?}", ids.shape(), m.shape())));
            }
            None => prompt::images(ids_of, ids.shape()[1], &self.rules).into_iter().map(i64::from).collect(),
        };
        let videos: Vec<i64> = ids_of.iter().map(|i| i64::from(Some(*i) == self.rules.video_token_id)).collect();
        let rows = |outputs: &Option<Outputs>| outputs.as_ref().and_then(|o| o.first()).map_or(0, |(_, t)| prompt_rows(t));
        for (mask, outputs, what) in [(&images, &features.image, "image"), (&videos, &features.video, "video")] {
            let (wanted, have) = (mask.iter().filter(|m| **m != 0).count(), rows(outputs));
            if wanted != have {
                return Err(Error::Input(format!(
                    "the prompt has {wanted} {what} placeholders, but the {what}s given make {have} features"
                )));
            }
        }
        let merged = match (&features.image, &features.video) {
            (Some(image), Some(video)) => interleaved(image, video, &images, &videos)?,
            (Some(one), None) | (None, Some(one)) => one.clone(),
            (None, None) => vec![],
        };
        let placed = images.iter().zip(&videos).map(|(image, video)| image + video != 0).collect();
        Ok((images, placed, merged))
    }

    /// Runs `embed` on `ids [batch, n]`; `pictured` says which of them stand for pictures. Features that there are none of are empty.
    /// A placeholder beyond the features, which only the model itself can have written, is a token like any other.
    fn run_embed(&mut self, ids: &[i64], n: usize, pictured: impl Fn(usize) -> bool, features: &[(String, Tensor)]) -> Result<()> {
        let vocab_size = self.rules.vocab_size;
        if let Some(bad) = ids.iter().find(|i| !(0..vocab_size as i64).contains(i)) {
            return Err(Error::Input(format!("'input_ids' has {bad}, which is not in the vocabulary of {vocab_size}")));
        }
        let entry = forward::entry(&*self.engine, "embed")?;
        let shape = [ids.len() / n, n];
        for port in &entry.inputs {
            let to = self.taken.place(&port.name);
            match port.name.as_str() {
                "input_ids" => to.fill(&shape, ids.iter().copied())?,
                "images_seq_mask" => to.fill(&shape, (0..ids.len()).map(&pictured))?,
                name => match features.iter().find(|(n, _)| n == name) {
                    Some((_, t)) => *to = forward::fit(t, port)?,
                    None => forward::empty(port, to)?,
                },
            }
        }
        self.engine.run_into("embed", &self.taken.of(entry), &mut self.embedded)?;
        for (port, tensor) in forward::entry(&*self.engine, "embed")?.outputs.iter().zip(&mut self.embedded) {
            std::mem::swap(self.taken.place(&port.name), tensor);
        }
        Ok(())
    }

    /// Shape of `position_ids`.
    pub fn position_axes(&self, batch: usize, seq: usize) -> SmallVec<[usize; 3]> {
        match self.rules.positions {
            Positions::Mrope { .. } => smallvec![3, batch, seq],
            Positions::Sequential | Positions::Absolute { .. } => smallvec![batch, seq],
        }
    }

    fn positions(&self, ids: &Tensor, mask: &[i64], inputs: &Tensors) -> Result<(Tensor, Vec<i64>)> {
        let [batch, seq] = [ids.shape()[0], ids.shape()[1]];
        let (images, videos) = (grids(inputs.get("image_grid_thw"))?, grids(inputs.get("video_grid_thw"))?);
        let seconds = match inputs.get("second_per_grid_ts") {
            Some(s) if s.shape() == [videos.len()] => s.f32()?.to_vec(),
            Some(s) => {
                return Err(Error::Input(format!("'second_per_grid_ts' must be [{}], one per video, is {:?}", videos.len(), s.shape())));
            }
            None => vec![1.0; videos.len()],
        };
        let images: Vec<Clip> = images.into_iter().map(Clip::picture).collect();
        let videos: Vec<Clip> = videos.into_iter().zip(seconds).map(|(grid, seconds_per_grid)| Clip { grid, seconds_per_grid }).collect();
        let mut p = prompt::positions(ids.i64()?, mask, seq, &self.rules, &images, &videos)?;
        // After earlier turns, everything is shifted by where they ended.
        for (i, id) in p.ids.iter_mut().enumerate() {
            if mask[i % mask.len()] != 0 {
                *id += self.next[i / seq % batch];
            }
        }
        p.next.iter_mut().zip(&self.next).for_each(|(n, before)| *n += before);
        Ok((Tensor::new(self.position_axes(batch, seq).to_vec(), p.ids)?, p.next))
    }

    /// With given positions, decoding goes on after those of the last token, as transformers' `generate` does. By the rule of
    /// [`prompt::positions`] they are the largest; by others an earlier video may have larger ones.
    fn next_after(&self, positions: &Tensor, mask: &[i64], batch: usize, seq: usize) -> Result<Vec<i64>> {
        let p = positions.i64()?;
        let kinds = p.len() / (batch * seq);
        let last = |row: usize| {
            let column = (0..seq).rev().find(|i| mask[row * seq + i] != 0)?;
            (0..kinds).map(|k| p[(k * batch + row) * seq + column] + 1).max()
        };
        Ok((0..batch).map(|row| last(row).unwrap_or(0)).collect())
    }

    /// Whether so many more tokens fit into the context.
    fn fits(&self, seq: usize) -> Result<()> {
        let (past, longest) = (self.past(), self.rules.max_positions);
        if past + seq > longest {
            return Err(Error::Input(format!("{past} + {seq} tokens are more than the model's context of {longest}")));
        }
        Ok(())
    }

    /// Runs `decoder` on `n` tokens of each sequence, whose embeddings and positions are there; `mask` says which tokens of which
    /// sequence are live. Those `scored` get logits.
    fn decode(&mut self, n: usize, mask: impl Fn(usize, usize) -> i64, scored: Range<usize>) -> Result<()> {
        let past = self.past();
        self.mask.iter_mut().enumerate().for_each(|(row, m)| m.extend((0..n).map(|i| mask(row, i))));
        let result = self.run_decoder(past + n, scored);
        if result.is_err() {
            self.mask.iter_mut().for_each(|m| m.truncate(past));
        }
        result
    }

    fn run_decoder(&mut self, len: usize, scored: Range<usize>) -> Result<()> {
        let taken = &mut self.taken;
        taken.place("attention_mask").fill(&[self.mask.len(), len], self.mask.iter().flatten().copied())?;
        taken.place("prompt_length").fill(&[1], [self.prompt_length as i64].into_iter())?;
        taken.place("logit_positions").fill(&[scored.len()], scored.map(|i| i as i64))?;
        let entry = forward::entry(&*self.engine, "decoder")?;
        self.engine.run_into("decoder", &taken.of(entry), &mut self.decoded)?;
        if let Some((_, mask)) = self.taken.0.iter().find(|(n, _)| n == cross::MASK) {
            self.cross.advance(mask)?;
        }
        Ok(())
    }
}

/// Whether a prompt must run at once, however long: where a graph finds the places of pictures by the tokens around them.
pub(crate) fn runs_whole(rules: &PromptRules, pictures: bool) -> bool {
    pictures && matches!(rules.positions, Positions::Absolute { .. })
}

impl Prompt {
    /// The tokens `from..to` of a batch of one. New pictures that a decoder attends to come with the first of them.
    fn part(&self, from: usize, to: usize) -> Result<Self> {
        let (seq, n) = (self.placed.len(), to - from);
        let rows = |upto: usize| self.placed[..upto].iter().filter(|p| **p).count();
        let (first, last) = (rows(from), rows(to));
        let row = |(name, t): &(String, Tensor)| {
            let width = t.shape().last().copied().unwrap_or(0);
            let rows = t.f32()?.get(first * width..last * width);
            let rows = rows.ok_or_else(|| Error::Input(format!("'{name}' has {} rows, the prompt takes more", prompt_rows(t))))?;
            Ok((name.clone(), Tensor::new([last - first, width], rows.to_vec())?))
        };
        let columns: Vec<i64> = self.positions.i64()?.chunks_exact(seq).flat_map(|row| &row[from..to]).copied().collect();
        let mut axes = self.positions.shape().to_vec();
        axes.pop();
        axes.push(n);
        let seen = |mask: &Tensor| {
            if !mask.shape().starts_with(&[1, seq]) {
                return Err(Error::Input(format!("'{}' must be [1, {seq}, pictures, tiles], is {:?}", cross::MASK, mask.shape())));
            }
            let tiles = mask.data().len() / seq;
            Tensor::new([1, n, tiles], mask.i64()?[from * tiles..to * tiles].to_vec())
        };
        Ok(Self {
            ids: Tensor::new([1, n], self.ids.i64()?[from..to].to_vec())?,
            images: self.images[from..to].to_vec(),
            placed: self.placed[from..to].to_vec(),
            features: self.features.iter().map(row).collect::<Result<_>>()?,
            positions: Tensor::new(axes, columns)?,
            states: self.states.clone().filter(|_| from == 0),
            cross_mask: self.cross_mask.as_ref().map(seen).transpose()?,
        })
    }
}

/// Index of the largest value; the first of equals.
pub(crate) fn argmax(row: &[f32]) -> i64 {
    // In lanes first, which is many times faster than to carry an index along.
    let (chunks, rest) = row.as_chunks::<16>();
    let lanes = chunks.iter().fold([f32::NEG_INFINITY; 16], |lanes, c| std::array::from_fn(|i| lanes[i].max(c[i])));
    let largest = lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max);
    row.iter().position(|v| *v == largest).unwrap_or(0) as i64
}

/// Rows of features, whatever the number of leading axes.
fn prompt_rows(features: &Tensor) -> usize {
    features.shape().split_last().map_or(0, |(_, lead)| lead.iter().product())
}

/// The rows of `features [..., width]` whose `mask` is not 0.
fn chosen(features: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let (rows, mask) = (prompt_rows(features), mask.i64()?);
    if mask.len() != rows {
        return Err(Error::Input(format!("'images_emb_mask' has {} elements for {rows} features", mask.len())));
    }
    if mask.iter().all(|m| *m != 0) {
        return Ok(features.clone());
    }
    let width = features.shape().last().copied().unwrap_or(0);
    let kept = features.f32()?.chunks_exact(width.max(1)).zip(mask).filter(|(_, m)| **m != 0);
    let kept: Vec<f32> = kept.flat_map(|(row, _)| row).copied().collect();
    Tensor::new([kept.len() / width.max(1), width], kept)
}

/// Features of pictures and videos in the order of their placeholders.
fn interleaved(image: &Outputs, video: &Outputs, images: &[i64], videos: &[i64]) -> Result<Outputs> {
    image
        .iter()
        .zip(video)
        .map(|((name, a), (_, b))| {
            let width = a.shape().last().copied().unwrap_or(0);
            let (mut from_a, mut from_b) = (a.f32()?.chunks_exact(width.max(1)), b.f32()?.chunks_exact(width.max(1)));
            let mut rows = Vec::with_capacity(a.data().len() + b.data().len());
            for (is_image, is_video) in images.iter().zip(videos) {
                let row = if *is_image != 0 {
                    from_a.next()
                } else if *is_video != 0 {
                    from_b.next()
                } else {
                    None
                };
                rows.extend_from_slice(row.unwrap_or_default());
            }
            Ok((name.clone(), Tensor::new([rows.len() / width.max(1), width], rows)?))
        })
        .collect()
}

/// As many placeholders as the tiles of `images_spatial_crop i64[batch, pictures, 2]` (columns, rows; 0 is no picture) give tokens.
fn check_tiles(crop: &Tensor, side: usize, placeholders: usize) -> Result<()> {
    let of = |[across, down]: &[i64; 2]| match (usize::try_from(*across), usize::try_from(*down)) {
        (Ok(0), _) | (_, Ok(0)) => Ok(0),
        (Ok(across), Ok(down)) => Ok(deepseek_vl2::tokens(across, down, side)),
        _ => Err(Error::Input(format!("'images_spatial_crop' has a picture of {across} x {down} tiles"))),
    };
    let tokens = crop.i64()?.as_chunks::<2>().0.iter().try_fold(0usize, |n, c| Ok::<_, Error>(n.saturating_add(of(c)?)))?;
    if tokens == placeholders {
        return Ok(());
    }
    Err(Error::Input(format!(
        "the prompt has {placeholders} image placeholders, but 'images_spatial_crop' is of pictures of {tokens} tokens"
    )))
}

/// Pixels and grid of one modality must fit.
fn check_grid(fitted: &[Tensor], [pixels_name, grid_name]: [&String; 2], merge: usize, rules: &PromptRules) -> Result<()> {
    let [pixels, grid, ..] = fitted else { return Ok(()) };
    let tokens = grids(Some(grid))?.iter().try_fold(0usize, |n, g| Ok::<_, Error>(n.saturating_add(prompt::tokens(*g, rules)?)))?;
    let patches = tokens.saturating_mul(merge * merge);
    if pixels.shape().first() != Some(&patches) {
        let have = pixels.shape();
        return Err(Error::Input(format!("'{grid_name}' is of {patches} patches, but '{pixels_name}' has shape {have:?}")));
    }
    Ok(())
}

fn grids(t: Option<&Tensor>) -> Result<Vec<Grid>> {
    let Some(t) = t else { return Ok(vec![]) };
    match t.shape() {
        [_, 3] => Ok(t.i64()?.as_chunks::<3>().0.to_vec()),
        other => Err(Error::Input(format!("a grid_thw must be i64[n, 3], is {}{other:?}", t.dtype()))),
    }
}
