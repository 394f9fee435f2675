//! What a service links: [`Model`] loads an artifact, a [`Conversation`] asks it.

use crate::{
    Engine, EngineOptions, Error, Provider, Result, Tensor,
    artifact_dir::Artifact,
    boxes::{self, Region},
    chat::{ChatTemplate, Content, Message},
    cross, features,
    features::{Digest, FeatureCache},
    forward::Tensors,
    generate::{GenerateOptions, Reply, Start, generate},
    image::Rgb,
    pipeline::{self, Features, Outputs, Pipeline, Scored},
    processor::{self, Pixels},
    prompt::{self, Clip},
    tokenizer::Tokenizer,
};
use std::{path::Path, time::Instant};
use vlmc_artifact::{Manifest, Processor, PromptRules};

/// The engine of an artifact: vlmc's own for `cpu`, ONNX Runtime for `onnx-*`.
///
/// # Errors
/// The artifact is of another target, cannot be loaded, or its engine has not the provider that is asked for.
pub fn open_engine(artifact: &Artifact, options: &EngineOptions) -> Result<Box<dyn Engine>> {
    artifact.check_layout()?;
    match (artifact.manifest().target.as_str(), options.provider) {
        ("cpu", None | Some(Provider::Cpu)) => Ok(Box::new(crate::cpu::CpuEngine::open(artifact, options)?)),
        ("cpu", Some(gpu)) => {
            let gpu = gpu.name();
            Err(Error::Unsupported(format!("target 'cpu' has no provider '{gpu}': compile for onnx-cuda or onnx-tensorrt to run on a GPU")))
        }
        #[cfg(feature = "ort")]
        (target, _) if target.starts_with("onnx-") => Ok(Box::new(crate::ort::OrtEngine::open(artifact, options)?)),
        #[cfg(not(feature = "ort"))]
        (target, _) if target.starts_with("onnx-") => {
            Err(Error::Unsupported("this build has no ONNX Runtime engine: build it with the feature `ort`".into()))
        }
        (other, _) => Err(Error::Unsupported(format!("no engine runs artifacts of target '{other}'"))),
    }
}

/// A loaded artifact.
pub struct Model {
    pipeline: Pipeline,
    tokenizer: Option<Tokenizer>,
    template: Option<ChatTemplate>,
    cached: Cached,
    features: FeatureCache,
}

/// What stands in the KV cache.
#[derive(Default)]
struct Cached {
    /// Tokens whose keys and values are there.
    ids: Vec<i64>,
    /// The pictures and videos that their placeholders stand for, in prompt order; `true` for a video.
    media: Vec<(bool, Digest)>,
}

/// A part of what a user says.
#[derive(Clone, Debug)]
pub enum Part {
    /// Text.
    Text(String),
    /// A picture.
    Image(Rgb),
    /// Frames of a video.
    Video(Vec<Rgb>),
}

impl Model {
    /// Loads an artifact.
    ///
    /// # Errors
    /// It is not an artifact, is damaged, or no engine runs it.
    pub fn open(dir: &Path, options: &EngineOptions) -> Result<Self> {
        let artifact = Artifact::open(dir)?;
        Ok(Self {
            tokenizer: artifact.path("tokenizer.json").map(|p| Tokenizer::open(&p)).transpose()?,
            template: ChatTemplate::open(
                |name| artifact.path(name),
                artifact.manifest().task.prompt().and_then(|p| p.template.as_deref()),
            )?,
            pipeline: Pipeline::new(open_engine(&artifact, options)?)?,
            cached: Cached::default(),
            features: FeatureCache::default(),
        })
    }

    /// Features of pictures that were seen are kept, so that the same picture costs only its tokens in another conversation: at
    /// most `limit` bytes (256 MiB if this is not called), of which those go first that were not used for the longest time. A
    /// conversation holds on to its own as well.
    pub fn limit_image_cache(&mut self, limit: usize) {
        self.features.set_limit(limit);
    }

    /// Keeps features of pictures in files of the directory `dir` as well, which is made if it is not there. A file is named by
    /// digests of the artifact and of what its processor made of the picture; one that is damaged is written anew. None is removed.
    ///
    /// # Errors
    /// The directory cannot be made.
    pub fn cache_images_in(&mut self, dir: &Path) -> Result<()> {
        self.features.set_dir(dir, self.pipeline.engine().manifest())
    }

    /// The manifest.
    pub fn manifest(&self) -> &Manifest {
        self.pipeline.engine().manifest()
    }

    /// The model's defaults for answers.
    pub fn defaults(&self) -> GenerateOptions {
        GenerateOptions::new(&self.manifest().generation)
    }

    /// A new conversation; `system` replaces the template's own instructions. What its prompt has in common with the last
    /// conversation's (tokens, and the pictures they stand for) is still in the cache and is not run again.
    ///
    /// # Errors
    /// The artifact has no tokenizer or no chat template.
    pub fn conversation(&mut self, system: Option<&str>) -> Result<Conversation<'_>> {
        let missing = |what: &str| {
            Error::Unsupported(format!("the checkpoint had no {what}, so the artifact can run tensors (`vlmc exec`) but not text"))
        };
        let tokenizer = self.tokenizer.as_ref().ok_or_else(|| missing("tokenizer.json"))?;
        let template = self.template.as_ref().ok_or_else(|| missing("chat template"))?;
        let text = |s: &str| Message { role: "system".into(), content: vec![Content::Text { text: s.into() }] };
        Ok(Conversation {
            messages: system.map(text).into_iter().collect(),
            media: vec![],
            made_for: 0,
            cached: &mut self.cached,
            features: &mut self.features,
            pipeline: &mut self.pipeline,
            tokenizer,
            template,
        })
    }
}

/// A picture or video of a conversation.
struct Media {
    pixels: Pixels,
    digest: Digest,
    /// The picture, absent for a video.
    picture: Option<Rgb>,
    /// Seconds of each group of frames of a video.
    times: Vec<f64>,
    /// Made when they are first needed.
    features: Option<Outputs>,
}

impl Media {
    fn is_video(&self) -> bool {
        self.picture.is_none()
    }
}

/// Turns of a user and a model. What the turns have in common stays in the cache: a question costs its own tokens only.
pub struct Conversation<'m> {
    pipeline: &'m mut Pipeline,
    tokenizer: &'m Tokenizer,
    template: &'m ChatTemplate,
    messages: Vec<Message>,
    /// In prompt order.
    media: Vec<Media>,
    /// How many pictures the conversation had when tensors were made of them.
    made_for: usize,
    cached: &'m mut Cached,
    features: &'m mut FeatureCache,
}

impl Conversation<'_> {
    /// Tokens whose keys and values are in the cache: prompts with their placeholders, and answers.
    pub fn tokens(&self) -> &[i64] {
        &self.cached.ids
    }

    /// Places in the pictures that an answer names.
    ///
    /// # Errors
    /// Its tokens cannot be decoded.
    pub fn regions(&self, reply: &Reply) -> Result<Vec<Region>> {
        Ok(boxes::regions(&self.tokenizer.decode_all(&reply.ids)?))
    }

    /// Says `parts` and gives the model's answer, whose text is given out as it comes. After an error the conversation is as
    /// before.
    ///
    /// # Errors
    /// A picture cannot be processed, the context is full, or an option has no meaning.
    pub fn send(&mut self, parts: &[Part], options: &GenerateOptions, on_text: &mut dyn FnMut(&str)) -> Result<Reply> {
        let (messages, media) = (self.messages.len(), self.media.len());
        let reply = self.answer(parts, options, on_text);
        match &reply {
            Ok(reply) => {
                let content = vec![Content::Text { text: reply.text.clone() }];
                self.messages.push(Message { role: "assistant".into(), content });
            }
            Err(_) => {
                self.messages.truncate(messages);
                self.media.truncate(media);
                // What the cache holds is uncertain.
                *self.cached = Cached::default();
                self.pipeline.clear()?;
            }
        }
        reply
    }

    fn answer(&mut self, parts: &[Part], options: &GenerateOptions, on_text: &mut dyn FnMut(&str)) -> Result<Reply> {
        let since = Instant::now();
        let encoded = self.features.made;
        let sampler = options.sampler()?;
        let new = parts.iter().filter(|p| matches!(p, Part::Image(_))).count();
        let pictures = self.media.iter().filter(|m| m.picture.is_some()).count() + new;
        if pictures > 0 && processor::changes(self.processor()?, self.made_for, pictures) {
            self.process_again(pictures)?;
        }
        self.made_for = pictures;
        let mut content = vec![];
        for part in parts {
            content.push(match part {
                Part::Text(text) => Content::Text { text: text.clone() },
                Part::Image(picture) => {
                    self.add(processor::image_among(self.processor()?, picture, pictures)?, Some(picture.clone()), vec![]);
                    Content::Image
                }
                Part::Video(frames) => {
                    let times = processor::times(self.processor()?, frames.len());
                    self.add(processor::video(self.processor()?, frames)?, None, times);
                    Content::Video
                }
            });
        }
        self.messages.push(Message { role: "user".into(), content });
        let text = self.template.render(&self.messages, true)?;
        let rules = self.pipeline.rules().clone();
        let of = |video: bool| self.media.iter().filter(move |m| m.is_video() == video).map(|m| &m.pixels);
        // The frames of a video may stand apart.
        let tokens = |video: bool| {
            let runs = |p: &Pixels| if video { p.clip.runs(&rules).len().max(1) } else { 1 };
            of(video).flat_map(|p| std::iter::repeat_n(p.tokens / runs(p), runs(p))).collect::<Vec<_>>()
        };
        let times: Vec<Vec<f64>> = self.media.iter().filter(|m| m.is_video()).map(|m| m.times.clone()).collect();
        let text = prompt::with_times(&text, &rules, &times);
        let clips = |video: bool| of(video).map(|p| p.clip).collect::<Vec<Clip>>();
        let ids = prompt::expand(&self.tokenizer.encode(&text)?, &rules, &tokens(false), &tokens(true))?;
        let positions = prompt::positions(&ids, &vec![1; ids.len()], ids.len(), &rules, &clips(false), &clips(true))?.ids;

        let keep = self.keep(&ids, &rules);
        self.pipeline.truncate(keep)?;
        self.cached.ids.truncate(keep);
        let fresh = &ids[keep..];
        let columns: Vec<i64> = positions.chunks_exact(ids.len()).flat_map(|row| &row[keep..]).copied().collect();
        let features = self.features(&ids, keep, &rules)?;
        let axes = self.pipeline.position_axes(1, fresh.len());
        let mut inputs = Tensors::from([
            ("input_ids".into(), Tensor::new([1, fresh.len()], fresh.to_vec())?),
            ("position_ids".into(), Tensor::new(axes.to_vec(), columns)?),
        ]);
        if self.pipeline.attends_to_pictures() {
            inputs.insert(cross::MASK.into(), self.cross_mask(&ids, keep, &rules)?);
        }
        self.pipeline.prefill(&inputs, &features, Scored::Last)?;
        // They are in the cache now, and the answer needs memory of its own.
        drop((inputs, features));
        let eos = self.pipeline.engine().manifest().generation.eos_token_ids.clone();
        let start = Start {
            history: ids.clone(),
            prompt_tokens: fresh.len(),
            cached_tokens: keep,
            images_encoded: self.features.made - encoded,
            sampler,
            since,
        };
        let reply = generate(self.pipeline, self.tokenizer, &eos, options, start, on_text)?;
        *self.cached = Cached { ids, media: self.media.iter().map(|m| (m.is_video(), m.digest)).collect() };
        self.cached.ids.extend(&reply.ids);
        self.cached.ids.truncate(self.pipeline.past());
        Ok(reply)
    }

    fn processor(&self) -> Result<&Processor> {
        let missing = || Error::Unsupported("the checkpoint had no preprocessor_config.json, so the artifact takes no pictures".into());
        self.pipeline.engine().manifest().processor.as_ref().ok_or_else(missing)
    }

    fn add(&mut self, pixels: Pixels, picture: Option<Rgb>, times: Vec<f64>) {
        self.media.push(Media { digest: features::digest(&pixels), pixels, picture, times, features: None });
    }

    /// Makes other tensors of the pictures so far, as suits a conversation of that many.
    fn process_again(&mut self, pictures: usize) -> Result<()> {
        let processor = self.processor()?.clone();
        for m in &mut self.media {
            if let Some(picture) = &m.picture {
                m.pixels = processor::image_among(&processor, picture, pictures)?;
                m.digest = features::digest(&m.pixels);
                m.features = None;
            }
        }
        Ok(())
    }

    /// How much of the cache the prompt `ids` can use: equal tokens up to another picture, not into the middle of one, and never
    /// all, because the last token must be run to get logits.
    fn keep(&self, ids: &[i64], rules: &PromptRules) -> usize {
        let mut keep = ids.iter().zip(&self.cached.ids).take_while(|(a, b)| a == b).count().min(ids.len() - 1);
        // A graph that tells pictures by the tokens around them must see the one before.
        let lead = usize::from(pipeline::runs_whole(rules, true));
        for (video, token) in [(false, rules.image_token_id), (true, rules.video_token_id)] {
            let mut places = (0..ids.len()).filter(|i| Some(ids[*i]) == token);
            let mut before = self.cached.media.iter().filter(|(v, _)| *v == video).map(|(_, digest)| digest);
            for m in self.media.iter().filter(|m| m.is_video() == video) {
                let places: Vec<usize> = places.by_ref().take(m.pixels.tokens).collect();
                let (Some(first), Some(last)) = (places.first(), places.last()) else { continue };
                if before.next() != Some(&m.digest) || keep <= *last {
                    keep = keep.min(first.saturating_sub(lead));
                }
            }
        }
        let pictures = |ids: &[i64]| ids.iter().filter(|i| Some(**i) == rules.image_token_id).count();
        // Keys at other rotary frequencies are of no use.
        if prompt::level(ids.len(), rules) != prompt::level(self.pipeline.prompt_length(), rules) {
            return 0;
        }
        // Where a decoder attends to pictures, tokens that may see none attend to all: new ones change what came before them.
        let stale =
            self.pipeline.attends_to_pictures() && [&ids[..keep], &self.cached.ids].iter().any(|kept| pictures(kept) != pictures(ids));
        if stale { 0 } else { keep }
    }

    /// Which of the tokens `ids[keep..]` may see which tiles of all pictures, for a decoder that attends to them.
    fn cross_mask(&self, ids: &[i64], keep: usize, rules: &PromptRules) -> Result<Tensor> {
        let tiles: Vec<usize> = self.media.iter().map(|m| m.pixels.clip.grid.iter().product::<i64>() as usize).collect();
        let max_tiles = match self.pipeline.engine().manifest().processor {
            Some(Processor::Mllama(ref p)) => p.max_image_tiles,
            _ => 0,
        };
        cross::mask(ids, keep, rules.image_token_id.unwrap_or(-1), &tiles, max_tiles)
    }

    /// Features of the pictures and videos whose placeholders are among `ids[keep..]`.
    fn features(&mut self, ids: &[i64], keep: usize, rules: &PromptRules) -> Result<Features> {
        let mut out = Features::default();
        for (video, token, slot) in [(false, rules.image_token_id, &mut out.image), (true, rules.video_token_id, &mut out.video)] {
            let mut skip = ids[..keep].iter().filter(|i| Some(**i) == token).count();
            for m in self.media.iter_mut().filter(|m| m.picture.is_none() == video) {
                if skip >= m.pixels.tokens {
                    skip -= m.pixels.tokens;
                    continue;
                }
                if m.features.is_none() {
                    // The pixels have served when they are seen.
                    m.features = self.features.get(m.digest, self.pipeline, &std::mem::take(&mut m.pixels.inputs))?;
                }
                if let Some(features) = &m.features {
                    append(slot, features, std::mem::take(&mut skip))?;
                }
            }
        }
        Ok(out)
    }
}

/// Adds a picture's features, `[..., width]` each, without the first `skip` rows, to those of the pictures before it.
fn append(all: &mut Option<Outputs>, features: &Outputs, skip: usize) -> Result<()> {
    for (name, t) in features {
        let all = all.get_or_insert_default();
        let width = t.shape().last().copied().unwrap_or(0);
        if skip == 0 && all.iter().all(|(n, _)| n != name) {
            all.push((name.clone(), t.reshaped([t.data().len() / width.max(1), width])?));
            continue;
        }
        let before = all.iter().position(|(n, _)| n == name).map(|i| all.remove(i).1);
        let mut rows = before.map_or(Ok(vec![]), |t| t.f32().map(<[f32]>::to_vec))?;
        rows.extend(t.f32()?.iter().skip(skip * width));
        all.push((name.clone(), Tensor::new([rows.len() / width.max(1), width], rows)?));
    }
    Ok(())
}
