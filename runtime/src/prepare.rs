//! Requests as tensors, named as in the Hugging Face forward signature: what [`crate::Pipeline`] and [`crate::forward`] take, for
//! those who run models without talking to them.

use crate::{
    Error, Result, Tensor, Tensors,
    chat::{ChatTemplate, Content, Message},
    cross,
    image::{MAX_PIXELS, Rgb},
    processor, prompt,
    tokenizer::Tokenizer,
    vectors,
};
use std::path::PathBuf;
use vlmc_artifact::{Positions, Processor, PromptRules, Task, TextRules};

/// Tokens of a text that stands for one where there is no tokenizer.
const SYNTHETIC_TOKENS: usize = 16;
/// Side of a picture that stands for one where a processor takes any, in pixels.
const SYNTHETIC_SIDE: usize = 224;

/// Makes tensors of pictures and texts.
pub struct Preparer {
    task: Task,
    processor: Option<Processor>,
    tokenizer: Option<Tokenizer>,
    template: Option<ChatTemplate>,
}

impl Preparer {
    /// For a model of `task`; `path` finds the files of its tokenizer and chat template, of an artifact or a checkpoint, by name.
    ///
    /// # Errors
    /// A file is not what its name says.
    pub fn new(task: Task, processor: Option<Processor>, path: impl Fn(&str) -> Option<PathBuf>) -> Result<Self> {
        Ok(Self {
            tokenizer: path("tokenizer.json").map(|p| Tokenizer::open(&p)).transpose()?,
            template: ChatTemplate::open(path, task.prompt().and_then(|p| p.template.as_deref()))?,
            task,
            processor,
        })
    }

    /// The tensors of one picture with one text: of a prompt with the model's own instructions around it, of a pair, or of the
    /// picture alone where the model takes no texts. A prompt may come with its `answer`.
    ///
    /// # Errors
    /// The model takes no pictures or no texts, or the checkpoint had no preprocessor config, tokenizer or chat template to make
    /// tensors of them.
    pub fn request(&self, picture: Option<&Rgb>, text: Option<&str>, answer: Option<&str>) -> Result<Tensors> {
        let pixels = picture.map(|p| processor::image(self.processor()?, p)).transpose()?;
        match &self.task {
            Task::Generate(rules) => {
                let text = text.ok_or_else(|| Error::Input("the model answers prompts, but there is no text".into()))?;
                let (tokenizer, template) = (self.tokenizer()?, self.template.as_ref().ok_or_else(|| missing("chat template"))?);
                let mut content = vec![Content::Text { text: text.into() }];
                if pixels.is_some() {
                    content.insert(0, Content::Image);
                }
                let mut messages = vec![Message { role: "user".into(), content }];
                if let Some(answer) = answer {
                    messages.push(Message { role: "assistant".into(), content: vec![Content::Text { text: answer.into() }] });
                }
                let text = template.render(&messages, answer.is_none())?;
                self.prompt(rules, &tokenizer.encode(&text)?, pixels)
            }
            Task::Contrast(rules) => {
                let mut out = pixels.map(|p| p.inputs).unwrap_or_default();
                if let Some(text) = text {
                    out.extend(vectors::tokens(self.tokenizer()?, rules, &[text.to_string()])?);
                }
                Ok(out)
            }
            Task::Classify { .. } if text.is_some() => Err(Error::Input("the model labels pictures; it takes no text".into())),
            Task::Classify { .. } => Ok(pixels.map(|p| p.inputs).unwrap_or_default()),
        }
    }

    /// The tensors of a made-up picture of noise, and of a made-up text of as many tokens, the same every time: for models without
    /// data to run them on. Needs neither tokenizer nor chat template; without a preprocessor config there is no picture.
    ///
    /// # Errors
    /// The processor takes no such picture.
    pub fn synthetic(&self) -> Result<Tensors> {
        let picture = synthetic_picture(SYNTHETIC_SIDE, SYNTHETIC_SIDE);
        let pixels = self.processor.as_ref().zip(picture.as_ref()).map(|(p, picture)| processor::image(p, picture)).transpose()?;
        match &self.task {
            Task::Generate(rules) => {
                let mut ids = synthetic_prompt(rules, SYNTHETIC_TOKENS);
                let pixels = pixels.filter(|_| rules.image_token_id.is_some());
                if let (Some(_), Some(image)) = (&pixels, rules.image_token_id) {
                    let place = match rules.positions {
                        Positions::Absolute { image_span: [start, end], .. } => vec![start, image, end],
                        _ => vec![image],
                    };
                    ids.splice(SYNTHETIC_TOKENS / 4..SYNTHETIC_TOKENS / 4, place);
                }
                self.prompt(rules, &ids, pixels)
            }
            Task::Contrast(rules) => {
                let mut out = pixels.map(|p| p.inputs).unwrap_or_default();
                out.extend(synthetic_text(rules)?);
                Ok(out)
            }
            Task::Classify { .. } => Ok(pixels.map(|p| p.inputs).unwrap_or_default()),
        }
    }

    /// A prompt whose picture is a single placeholder.
    fn prompt(&self, rules: &PromptRules, ids: &[i64], pixels: Option<processor::Pixels>) -> Result<Tensors> {
        let tokens: Vec<usize> = pixels.iter().map(|p| p.tokens).collect();
        let ids = prompt::expand(ids, rules, &tokens, &[])?;
        let mut out = Tensors::new();
        if let (Some(Processor::Mllama(p)), Some(pixels)) = (&self.processor, &pixels) {
            let tiles = pixels.clip.grid.iter().product::<i64>() as usize;
            out.insert(cross::MASK.into(), cross::mask(&ids, 0, rules.image_token_id.unwrap_or(-1), &[tiles], p.max_image_tiles)?);
        }
        out.extend(pixels.map(|p| p.inputs).unwrap_or_default());
        out.insert("input_ids".into(), Tensor::new([1, ids.len()], ids)?);
        Ok(out)
    }

    fn processor(&self) -> Result<&Processor> {
        self.processor.as_ref().ok_or_else(|| missing("preprocessor_config.json"))
    }

    fn tokenizer(&self) -> Result<&Tokenizer> {
        self.tokenizer.as_ref().ok_or_else(|| missing("tokenizer.json"))
    }
}

fn missing(what: &str) -> Error {
    Error::Unsupported(format!("the checkpoint had no {what}, so the model can run tensors but not pictures and texts"))
}

/// Numbers without a pattern (Steele et al., 2014: SplitMix64), the same on every machine.
fn random(i: u64) -> u64 {
    let mut z = i.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A picture of noise, the same every time; `None` if it has no pixels, or more than a file may have.
pub fn synthetic_picture(width: usize, height: usize) -> Option<Rgb> {
    let pixels = width.checked_mul(height).filter(|n| *n <= MAX_PIXELS)?;
    Rgb::new(width, height, (0..pixels * 3).map(|i| random(i as u64) as u8).collect())
}

/// `n` tokens without a pattern, the same every time, none of which stands for a picture or video.
pub fn synthetic_prompt(rules: &PromptRules, n: usize) -> Vec<i64> {
    let span = if let Positions::Absolute { image_span, .. } = rules.positions { image_span.map(Some) } else { [None; 2] };
    let special = [rules.image_token_id, rules.video_token_id, span[0], span[1]];
    token_ids(n, rules.vocab_size, |id| special.contains(&Some(id)))
}

/// `n` tokens of a vocabulary that have no meaning of their own.
fn token_ids(n: usize, vocab_size: usize, special: impl Fn(i64) -> bool) -> Vec<i64> {
    let tried = 0..(n as u64).saturating_mul(16).max(1 << 16);
    tried.map(|i| (random(i) % vocab_size.max(1) as u64) as i64).filter(|id| !special(*id)).take(n).collect()
}

/// A text of a pair, within the range that all tokenizers of such models have.
///
/// # Errors
/// It cannot be made a tensor.
pub fn synthetic_text(rules: &TextRules) -> Result<Tensors> {
    const TOKENS: usize = 128;
    let seq = if rules.pad_to_max { rules.max_length } else { rules.max_length.min(SYNTHETIC_TOKENS) };
    let ids = token_ids(seq, TOKENS, |id| id == rules.pad_token_id);
    Ok([("input_ids".into(), Tensor::new([1, seq], ids)?)].into())
}
