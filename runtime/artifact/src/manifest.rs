//! `manifest.json`: the one file that says what an artifact holds and how to feed it.

use crate::{DType, Dim, Symbol};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// File name of the manifest inside an artifact directory.
pub const MANIFEST: &str = "manifest.json";
/// File name of the compiled program of a `cpu` artifact.
pub const PROGRAM: &str = "program.json";
/// Artifact format that this version reads and writes.
pub const FORMAT: u32 = 2;
/// Key of a weight file's safetensors `__metadata__` that holds the SHA-256 (hex) of its data section.
pub const DATA_SHA256: &str = "data_sha256";

/// Whether a file of an artifact has the format of safetensors, by its name: transformers.js looks for weights under one of its own.
pub fn is_weights(name: &str) -> bool {
    name.ends_with(".safetensors") || name.ends_with(".onnx_data")
}

/// The content of `manifest.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Must equal [`FORMAT`].
    pub format: u32,
    /// Version of the compiler, e.g. `vlmc 0.1.0`.
    pub compiler: String,
    /// Target name, e.g. `cpu` or `onnx-cpu`.
    pub target: String,
    /// Client whose files the artifact has, e.g. `genai`; absent if it is for vlmc's own runtime.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layout: Option<String>,
    /// `model_type` of the checkpoint, e.g. `qwen2_vl`.
    pub architecture: String,
    /// Number of weights, each tensor counted once.
    pub parameters: u64,
    /// What the artifact was compiled from.
    pub source: Source,
    /// Symbols that occur in shapes, with their ranges.
    pub symbols: Vec<Symbol>,
    /// Callable graphs, in the order a request runs them.
    pub entries: Vec<Entry>,
    /// What the model is for.
    pub task: Task,
    /// How pictures become `pixel_values`; absent if the checkpoint has no preprocessor config.
    pub processor: Option<Processor>,
    /// Defaults from `generation_config.json`.
    pub generation: Generation,
    /// Every other file of the artifact, by its path relative to the manifest.
    pub files: BTreeMap<String, FileEntry>,
    /// What `vlmc verify` found; absent before it has run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<Certificate>,
}

/// A comparison of the artifact with the reference interpretation of its checkpoint. Numbers have three digits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Certificate {
    /// What compared, e.g. `vlmc 0.1.0`.
    pub compiler: String,
    /// Whether the artifact does what the checkpoint says, as far as the storage of its weights lets it.
    pub right: bool,
    /// SHA-256 (hex) of the tensors of each request that both ran.
    pub requests: Vec<String>,
    /// Nodes with weights that were compared on their own.
    pub nodes: usize,
    /// Nodes with weights that the artifact computes together with others, so that only what follows could be compared.
    pub nodes_not_compared: usize,
    /// Where the worst of them stands, measured by what the storage of its weights explains.
    pub worst_scope: Option<String>,
    /// Its weights.
    pub worst_weights: Vec<String>,
    /// Its relative error for the same operands.
    pub worst_relative_error: Option<f64>,
    /// Largest relative error of an output of the model.
    pub output_relative_error: Option<f64>,
    /// Divergence of the logits' probabilities from the reference's in nats, mean over positions.
    pub logit_kl_mean: Option<f64>,
    /// The largest of them.
    pub logit_kl_max: Option<f64>,
    /// Share of positions whose most probable token is the reference's.
    pub top1_agreement: Option<f64>,
}

/// Where an artifact comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// SHA-256 (hex) of `config.json`.
    pub config_sha256: String,
    /// Checkpoint files, by name, with the SHA-256 (hex) of their headers: the JSON of safetensors, the pickles of PyTorch files.
    pub weights: BTreeMap<String, String>,
}

/// A file of the artifact.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Length in bytes.
    pub bytes: u64,
    /// SHA-256 (hex) of the file; for a `.safetensors` file of its data section, which its own header repeats under
    /// [`DATA_SHA256`]: so a part of another artifact is noticed without reading gigabytes at each load.
    pub sha256: String,
    /// Of a checkpoint's own file, whose header does not repeat the digest: SHA-256 (hex) of its header's JSON.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub header_sha256: Option<String>,
}

/// A named tensor at the boundary of a graph.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// Name, as in the Hugging Face forward signature.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Shape.
    pub shape: Vec<Dim>,
}

/// A tensor that an entry keeps between calls (KV cache).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Input name of an ONNX graph: `past_key_values.0.key`.
    pub past: String,
    /// Output name of an ONNX graph: `present.0.key`.
    pub present: String,
    /// Element type; of a `cpu` artifact how rows are kept, see [`crate::program::StateDecl`].
    pub dtype: DType,
    /// Shape before a call, e.g. `[batch, 2, past, 128]`.
    pub shape: Vec<Dim>,
    /// Axis that grows.
    pub axis: usize,
    /// Whether past and present of an ONNX graph may be one buffer with room for more positions than there are: the graph writes the
    /// new ones behind the others, whose number it takes from other inputs.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub in_place: bool,
}

impl State {
    /// Whether it grows with the text. Others grow with pictures (keys and values of cross-attention).
    pub fn follows_text(&self) -> bool {
        self.shape.get(self.axis).and_then(Dim::as_scaled_symbol) == Some((1, "past"))
    }
}

/// A callable graph.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// `vision`, `embed` or `decoder`.
    pub name: String,
    /// File that holds the graph.
    pub file: String,
    /// Inputs, without states.
    pub inputs: Vec<Port>,
    /// Outputs, without states.
    pub outputs: Vec<Port>,
    /// States, in layer order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub states: Vec<State>,
    /// At most so many bytes of results are in use at once (CPU runtime only), without weights, states and what kernels work
    /// with. The runtime places them so that they take hardly more (`vlmc inspect --context` tells how much a request takes).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arena: Option<Dim>,
    /// Options of ONNX Runtime's execution provider for the target, for this graph.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub provider_options: BTreeMap<String, String>,
}

/// What a model is for, and what a client must know to feed it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Task {
    /// Answers to prompts with pictures. Entries: `vision` makes features of pictures, `embed` puts them among the token
    /// embeddings, `decoder` makes logits. An output of an entry is an input of that name of a later one.
    Generate(PromptRules),
    /// Scores of pairs of pictures and texts. Entries: `image`, `text`, `score`.
    Contrast(TextRules),
    /// Labels of pictures. Entry: `classify`.
    Classify {
        /// By index of the logits; empty if the model has no classifier.
        labels: Vec<String>,
    },
}

impl Task {
    /// What a model of this task does, as the end of a sentence about it.
    pub fn purpose(&self) -> &'static str {
        match self {
            Self::Generate(_) => "answers prompts",
            Self::Contrast(_) => "scores pairs of pictures and texts",
            Self::Classify { .. } => "labels pictures",
        }
    }

    /// The rules of a model that answers prompts.
    pub fn prompt(&self) -> Option<&PromptRules> {
        if let Self::Generate(rules) = self { Some(rules) } else { None }
    }
}

/// How texts become the `input_ids` of a model of pairs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TextRules {
    /// Most tokens of a text.
    pub max_length: usize,
    /// Whether every text is padded to `max_length`, as the model was trained (SigLIP), rather than to the longest of a batch.
    pub pad_to_max: bool,
    /// Fills shorter texts.
    pub pad_token_id: i64,
    /// Whether a pair's probability is the sigmoid of its logit (SigLIP) rather than a softmax over texts (CLIP).
    pub sigmoid: bool,
}

/// Token ids with a meaning, and how position ids follow from a prompt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PromptRules {
    /// Placeholder for a picture; absent if only a tokenizer could tell it, and there was none.
    pub image_token_id: Option<i64>,
    /// Placeholder for a video.
    pub video_token_id: Option<i64>,
    /// Width of the decoder's embeddings.
    pub hidden_size: usize,
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Longest context the checkpoint declares (`max_position_embeddings`).
    pub max_positions: usize,
    /// Rule for `position_ids`.
    pub positions: Positions,
    /// Tokens per side of a tile, where pictures are cut into a number of tiles that `images_spatial_crop` tells (DeepSeek-VL2).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tile_side: Option<usize>,
    /// How messages become a prompt where the checkpoint has no chat template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
}

/// Rule for `position_ids`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Positions {
    /// Multimodal rotary positions `[3, batch, seq]` (Qwen2-VL paper, section 2.1): temporal, height and width rows; a
    /// modality starts at the largest position of the previous one, plus 1.
    Mrope {
        /// Grid cells per token along height and width.
        spatial_merge_size: usize,
        /// Temporal positions per second of a video (Qwen2.5-VL); absent if frames are counted.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tokens_per_second: Option<f64>,
        /// How the frames of a video stand in a prompt one by one, each with its time (Qwen3-VL); absent if they stand together.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        frame_text: Option<FrameText>,
    },
    /// `[batch, seq]`: each token that is not padding counts.
    Sequential,
    /// Places in the sequence, padding included, which the graphs count themselves (Qwen-VL). They take `prompt_length` instead: a
    /// prompt beyond the trained length changes the rotary frequencies.
    Absolute {
        /// Tokens of the training.
        trained: usize,
        /// How many kinds of frequencies there are: one more for each time that the trained length is doubled.
        levels: usize,
        /// Tokens before and after the placeholders of a picture, which may be of any ids.
        image_span: [i64; 2],
    },
}

/// What becomes of a video's place in a prompt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrameText {
    /// The place.
    pub video: String,
    /// What stands there for each group of frames; `{seconds}` is its time.
    pub frame: String,
}

/// How pictures and videos become `pixel_values`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Processor {
    /// `Qwen2VLImageProcessor`: resize to multiples of `patch_size * merge_size` within a pixel budget, then cut patches.
    Qwen2Vl(Qwen2VlProcessor),
    /// Resize, crop, normalise: ViT, CLIP, SigLIP, LLaVA.
    Standard(StandardProcessor),
    /// `Siglip2ImageProcessor`: as many patches as a budget allows, at the picture's own aspect ratio.
    Naflex(NaflexProcessor),
    /// `MllamaImageProcessor` (Llama 3.2 Vision): resize into the best arrangement of tiles, then cut.
    Mllama(MllamaProcessor),
    /// `VLMImageProcessor` of DeepSeek-VL: the longer side to one size, then a square around it.
    DeepseekVl(DeepseekVlProcessor),
    /// `DeepseekVLV2Processor`: a global view, and the picture in the best of some sizes cut into tiles.
    #[serde(rename = "deepseek_vl2")]
    DeepseekVl2(DeepseekVl2Processor),
}

/// Settings of processors that make every picture one size: `pixel_values f32[1, 3, height, width]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StandardProcessor {
    /// First step; absent if pictures keep their size.
    pub resize: Option<Resize>,
    /// Second step.
    pub crop: Option<CenterCrop>,
    /// Pillow filter of the resize.
    pub resample: Resample,
    /// Mean per channel, after `rescale_factor`.
    pub image_mean: [f32; 3],
    /// Standard deviation per channel, after `rescale_factor`.
    pub image_std: [f32; 3],
    /// Usually 1/255.
    pub rescale_factor: f64,
    /// Tokens that a picture takes in a prompt; 0 for models without prompts.
    pub tokens: usize,
}

/// How a picture is made smaller or larger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Resize {
    /// To this size, whatever its shape.
    Exact {
        /// Rows.
        height: usize,
        /// Columns.
        width: usize,
    },
    /// Its shorter side to this length, the other in proportion, rounded down.
    ShortestEdge {
        /// Pixels.
        edge: usize,
    },
}

/// The middle of a picture; what lies outside of it is black.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CenterCrop {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// Where it cannot be in the middle: at the nearest even offset (torchvision), or at the smaller one (transformers).
    pub nearest_even: bool,
}

/// Settings of `Siglip2ImageProcessor`; names as in `preprocessor_config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NaflexProcessor {
    /// Pixels per patch side.
    pub patch_size: usize,
    /// Most patches of a picture, and the number to which they are padded.
    pub max_num_patches: usize,
    /// Pillow filter of the resize.
    pub resample: Resample,
    /// Mean per channel, after `rescale_factor`.
    pub image_mean: [f32; 3],
    /// Standard deviation per channel, after `rescale_factor`.
    pub image_std: [f32; 3],
    /// Usually 1/255.
    pub rescale_factor: f64,
}

/// Settings of `MllamaImageProcessor`; names as in `preprocessor_config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MllamaProcessor {
    /// Pixels per side of a tile.
    pub tile_size: usize,
    /// Most tiles of a picture.
    pub max_image_tiles: usize,
    /// Mean per channel, after `rescale_factor`.
    pub image_mean: [f32; 3],
    /// Standard deviation per channel, after `rescale_factor`.
    pub image_std: [f32; 3],
    /// Usually 1/255.
    pub rescale_factor: f64,
    /// Pillow filter of the resize.
    pub resample: Resample,
}

/// Settings of `VLMImageProcessor`, and of `DeepseekVLImageProcessor` and `DeepseekVLHybridImageProcessor` of transformers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeepseekVlProcessor {
    /// What the picture becomes.
    pub first: DeepseekVlView,
    /// A smaller copy of that, if the model takes both.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub second: Option<DeepseekVlView>,
    /// Shortest side of a resized picture.
    pub min_size: usize,
    /// Whether the shorter side is rounded (transformers) or truncated.
    pub round: bool,
    /// Usually 1/255.
    pub rescale_factor: f64,
    /// Tokens that a picture takes.
    pub tokens: usize,
}

/// A square that a picture is fitted into.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeepseekVlView {
    /// Pixels per side.
    pub size: usize,
    /// Colour beside the picture.
    pub background: [u8; 3],
    /// Mean per channel, after `rescale_factor`.
    pub image_mean: [f32; 3],
    /// Standard deviation per channel.
    pub image_std: [f32; 3],
    /// Pillow filter of the resize.
    pub resample: Resample,
}

/// Settings of `DeepseekVLV2Processor`; names as in `processor_config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeepseekVl2Processor {
    /// Pixels per side of a tile.
    pub tile_size: usize,
    /// Tokens per side of a tile.
    pub tile_side: usize,
    /// Sizes (width, height) that pictures are fitted into before they are cut, in multiples of `tile_size`.
    pub candidate_resolutions: Vec<[usize; 2]>,
    /// Mean per channel, of values from 0 to 1.
    pub image_mean: [f32; 3],
    /// Standard deviation per channel.
    pub image_std: [f32; 3],
}

/// Settings of `Qwen2VLImageProcessor`; names as in `preprocessor_config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Qwen2VlProcessor {
    /// Pixels per patch side.
    pub patch_size: usize,
    /// Frames per patch.
    pub temporal_patch_size: usize,
    /// Patches per token side.
    pub merge_size: usize,
    /// Pixel budget of a picture, lower bound.
    pub min_pixels: usize,
    /// Pixel budget of a picture, upper bound.
    pub max_pixels: usize,
    /// Pixel budget of a video frame, lower bound.
    pub video_min_pixels: usize,
    /// Pixel budget of a video frame, upper bound.
    pub video_max_pixels: usize,
    /// Whether the budgets of video frames are for all frames of a video together (Qwen3-VL).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub video_budget_of_clip: bool,
    /// Mean per channel, after `rescale_factor`.
    pub image_mean: [f32; 3],
    /// Standard deviation per channel, after `rescale_factor`.
    pub image_std: [f32; 3],
    /// Usually 1/255.
    pub rescale_factor: f64,
    /// Pillow filter of the resize.
    pub resample: Resample,
    /// Frames per second of videos, whose pace files do not tell.
    pub fps: f32,
}

/// Pillow's resampling filters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Resample {
    /// Triangle filter, support 1.
    Bilinear,
    /// Keys' cubic with a = -0.5, support 2.
    Bicubic,
    /// Windowed sinc, support 3.
    Lanczos,
}

/// Defaults for generation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Generation {
    /// Tokens that end an answer.
    pub eos_token_ids: Vec<i64>,
    /// Token for padded positions.
    pub pad_token_id: Option<i64>,
    /// Sample instead of taking the most probable token.
    pub do_sample: bool,
    /// Divides logits before sampling.
    pub temperature: f32,
    /// Keep the k most probable tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the smallest set of tokens whose probability reaches p.
    pub top_p: f32,
    /// Divides (positive) or multiplies (negative) the logits of tokens already seen; 1 is off.
    pub repetition_penalty: f32,
}

impl Default for Generation {
    fn default() -> Self {
        Self {
            eos_token_ids: vec![],
            pad_token_id: None,
            do_sample: false,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            repetition_penalty: 1.0,
        }
    }
}
