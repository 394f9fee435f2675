//! Qwen2-VL (Wang et al., 2024, arXiv 2409.12191). Reference: transformers `modeling_qwen2_vl.py`.

use super::{
    Architecture, Lowered, Preset, SideFiles,
    config::Section,
    decoder::{Decoder, LAYERS, Positions, WIDTH},
    graph, nn, symbol,
};
use crate::{Error, Result};
use serde_json::{Value, json};
use std::borrow::Cow;
use vlmc_artifact::{Processor, PromptRules, Qwen2VlProcessor, Resample, Task, program::Unary};
use vlmc_ir::{Builder, DType, Dim, Graph, Literal, Val, W, Weights, ops::Mask};

pub(super) const ARCHITECTURE: Architecture = Architecture {
    model_types: &["qwen2_vl"],
    alias: "qwen2-vl",
    title: "Qwen2-VL",
    reference: "arXiv 2409.12191; transformers Qwen2VLForConditionalGeneration",
    notes: "Pictures of any size, several to a prompt, and videos (frames or GIF), mixed in one prompt; batches with left padding. \
        Attention of the tower is per frame; positions are multimodal rotary (M-RoPE), each modality starting at the previous one's \
        maximum plus 1 (the paper's rule, transformers up to 4.5x); `position_ids` that are given win. Old (`visual.`, `model.`) and \
        new (`model.visual.`, `model.language_model.`) layouts, flat and nested configs, tied or separate output matrix.",
    canonical_name,
    ignored,
    presets: &[
        Preset { name: "qwen2-vl-2b", hub: "Qwen/Qwen2-VL-2B-Instruct", parameters: 2_208_985_600, config: || config(&B2), files },
        Preset { name: "qwen2-vl-7b", hub: "Qwen/Qwen2-VL-7B-Instruct", parameters: 8_291_375_616, config: || config(&B7), files },
        Preset { name: "qwen2-vl-72b", hub: "Qwen/Qwen2-VL-72B-Instruct", parameters: 73_405_560_320, config: || config(&B72), files },
        // The 2B model's structure in a size for tests.
        Preset { name: "qwen2-vl-tiny", hub: "", parameters: 10_055_808, config: || config(&TINY), files },
    ],
    lower,
    processor,
};

/// Sizes of a decoder and of the vision tower.
struct Size {
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    vocab_size: usize,
    tie_word_embeddings: bool,
    vision_depth: usize,
    vision_embed_dim: usize,
    mrope_section: [usize; 3],
}

const B2: Size = Size {
    hidden_size: 1536,
    intermediate_size: 8960,
    num_hidden_layers: 28,
    num_attention_heads: 12,
    num_key_value_heads: 2,
    vocab_size: 151_936,
    tie_word_embeddings: true,
    vision_depth: 32,
    vision_embed_dim: 1280,
    mrope_section: [16, 24, 24],
};
const B7: Size = Size {
    hidden_size: 3584,
    intermediate_size: 18944,
    num_attention_heads: 28,
    num_key_value_heads: 4,
    vocab_size: 152_064,
    tie_word_embeddings: false,
    ..B2
};
const B72: Size = Size {
    hidden_size: 8192,
    intermediate_size: 29568,
    num_hidden_layers: 80,
    num_attention_heads: 64,
    num_key_value_heads: 8,
    vocab_size: 152_064,
    tie_word_embeddings: false,
    ..B2
};
const TINY: Size = Size {
    hidden_size: 64,
    intermediate_size: 128,
    num_hidden_layers: 2,
    num_attention_heads: 4,
    num_key_value_heads: 2,
    vision_depth: 2,
    vision_embed_dim: 64,
    mrope_section: [2, 3, 3],
    ..B2
};

/// `config.json` as published on the hub.
fn config(p: &Size) -> Value {
    json!({
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": 151_643,
        "eos_token_id": 151_645,
        "vision_start_token_id": 151_652,
        "vision_end_token_id": 151_653,
        "vision_token_id": 151_654,
        "image_token_id": 151_655,
        "video_token_id": 151_656,
        "hidden_act": "silu",
        "hidden_size": p.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": p.intermediate_size,
        "max_position_embeddings": 32768,
        "max_window_layers": p.num_hidden_layers,
        "model_type": "qwen2_vl",
        "num_attention_heads": p.num_attention_heads,
        "num_hidden_layers": p.num_hidden_layers,
        "num_key_value_heads": p.num_key_value_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": p.tie_word_embeddings,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": true,
        "use_sliding_window": false,
        "vision_config": {
            "depth": p.vision_depth,
            "embed_dim": p.vision_embed_dim,
            "mlp_ratio": 4,
            "num_heads": 16,
            "in_chans": 3,
            "hidden_size": p.hidden_size,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2
        },
        "rope_scaling": {"type": "mrope", "mrope_section": p.mrope_section},
        "vocab_size": p.vocab_size
    })
}

/// Special tokens from id 151643 on.
const SPECIALS: [&str; 14] = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
];

/// The other files of a synthetic checkpoint; the chat template gives the published one's text, in our own words.
pub(super) fn files() -> Vec<(&'static str, Value)> {
    let template = "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    vec![
        (
            "generation_config.json",
            json!({"bos_token_id": 151_643, "pad_token_id": 151_643, "do_sample": true, "eos_token_id": [151_645, 151_643],
                "repetition_penalty": 1.0, "temperature": 0.01, "top_p": 0.001, "top_k": 1}),
        ),
        (
            "preprocessor_config.json",
            json!({"min_pixels": 3136, "max_pixels": 12_845_056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
                "image_mean": [0.481_454_66, 0.457_827_5, 0.408_210_73], "image_std": [0.268_629_54, 0.261_302_58, 0.275_777_11],
                "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"}),
        ),
        ("tokenizer.json", crate::synth::tokenizer(151_643, &SPECIALS)),
        (
            "tokenizer_config.json",
            json!({"bos_token": null, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "model_max_length": 32768,
                "tokenizer_class": "Qwen2Tokenizer", "chat_template": template}),
        ),
    ]
}

/// Buffers that follow from the config.
pub(super) fn ignored(name: &str) -> bool {
    name.ends_with("rotary_emb.inv_freq") || name.ends_with("rotary_pos_emb.inv_freq")
}

/// transformers since 4.52 may write `model.visual.` and `model.language_model.` for `visual.` and `model.`.
pub(super) fn canonical_name(name: &str) -> Cow<'_, str> {
    if let Some(rest) = name.strip_prefix("model.visual.") {
        return format!("visual.{rest}").into();
    }
    match name.strip_prefix("model.language_model.") {
        Some(rest) => format!("model.{rest}").into(),
        None => name.into(),
    }
}

/// Epsilon of the vision tower's norms, fixed in the reference.
pub(super) const VISION_EPS: f64 = 1e-6;

/// What the vision towers of the family have in common.
pub(super) struct Tower {
    pub(super) depth: usize,
    pub(super) width: usize,
    heads: usize,
    head_dim: usize,
    in_channels: usize,
    pub(super) patch_size: usize,
    temporal_patch_size: usize,
    /// Patches per token side.
    pub(super) merge: usize,
    rope_theta: f64,
}

impl Tower {
    /// From `vision_config`, whose field `width` is the tower's width, and `out` that of the decoder.
    pub(super) fn new(
        c: &Section<'_>,
        width_field: &str,
        out_field: &str,
        text_hidden_size: usize,
        patch_size: Option<usize>,
    ) -> Result<Self> {
        let (width, heads) = (c.int(width_field, WIDTH)?, c.int("num_heads", WIDTH)?);
        let head_dim = nn::head_dim(c, width_field, width, "num_heads", heads)?;
        if !head_dim.is_multiple_of(4) {
            return Err(Error::config(
                c.path("num_heads"),
                format!("head width {head_dim} is not a multiple of 4, which 2-D rotary positions need"),
            ));
        }
        let out = c.int(out_field, WIDTH)?;
        if out != text_hidden_size {
            let message = format!("{out} (output of the merger) must equal the decoder's hidden_size {text_hidden_size}");
            return Err(Error::config(c.path(out_field), message));
        }
        let rope = c.section("rope_parameters")?;
        if let Some(rope) = &rope {
            rope.only("rope_type", &[json!("default"), json!("axial")])?;
        }
        let rope_theta = rope.as_ref().map(|r| r.positive("rope_theta")).transpose()?.flatten();
        Ok(Self {
            depth: c.int("depth", LAYERS)?,
            width,
            heads,
            head_dim,
            in_channels: c.opt_int("in_chans", 1..=64)?.or(c.opt_int("in_channels", 1..=64)?).unwrap_or(3),
            patch_size: match (c.opt_int("patch_size", 1..=1024)?, patch_size) {
                (Some(size), _) | (None, Some(size)) => size,
                (None, None) => c.int("patch_size", 1..=1024)?,
            },
            temporal_patch_size: c.opt_int("temporal_patch_size", 1..=64)?.unwrap_or(2),
            merge: c.opt_int("spatial_merge_size", 1..=64)?.unwrap_or(2),
            rope_theta: rope_theta.unwrap_or(10_000.0),
        })
    }

    /// Elements of a patch.
    fn patch_dim(&self) -> usize {
        self.in_channels * self.temporal_patch_size * self.patch_size * self.patch_size
    }

    /// Patches per token.
    pub(super) fn merge_area(&self) -> usize {
        self.merge * self.merge
    }

    /// The inputs of the entry `vision` and what follows from them, with weights below `w`.
    pub(super) fn patches<'g>(&self, g: &'g Builder<'g>, w: W<'g>, bias: bool) -> Patches<'g> {
        let tokens = Dim::symbol("image_tokens");
        let patches = &tokens * self.merge_area();
        let pixels = g.input("pixel_values", DType::F32, [patches.clone(), self.patch_dim().into()]);
        let grid = g.input("image_grid_thw", DType::I64, [Dim::symbol("images"), 3.into()]);
        let _scope = g.scope(w.path());
        let [row, col, frame] = g.grid_positions(grid, patches, self.merge);
        let rope = g.rotary_2d(row, col, self.head_dim, self.rope_theta);
        // A convolution whose stride is its kernel is a matrix product.
        let kernel = [self.width, self.in_channels, self.temporal_patch_size, self.patch_size, self.patch_size];
        let proj = w / "patch_embed" / "proj";
        let weight = g.weight_as(proj / "weight", &kernel, &[self.width, self.patch_dim()]);
        let x = g.linear_with(pixels, weight, bias.then(|| g.weight(proj / "bias", &[self.width])));
        Patches { tokens, grid, frame, rope, x }
    }

    /// Attention within segments; q, k and v come from one matrix.
    pub(super) fn attention<'g>(&self, g: &'g Builder<'g>, w: W<'g>, x: Val<'g>, rope: (Val<'g>, Val<'g>), segments: Val<'g>) -> Val<'g> {
        let qkv = g.linear_bias(x, w / "qkv", 3 * self.width);
        let part = |i: usize| g.split_heads(g.slice(qkv, 1, i * self.width, self.width), self.heads);
        let (q, k, v) = (g.rotary(part(0), rope), g.rotary(part(1), rope), part(2));
        let y = g.attention(q, k, v, 1.0 / (self.head_dim as f64).sqrt(), Mask::Segments, Some(segments));
        g.linear_bias(g.merge_heads(y), w / "proj", self.width)
    }

    /// Patches to tokens: the `merge²` patches of each, side by side, through two layers.
    pub(super) fn merged<'g>(
        &self,
        g: &'g Builder<'g>,
        [first, second]: [W<'g>; 2],
        x: Val<'g>,
        tokens: &Dim,
        hidden_size: usize,
    ) -> Val<'g> {
        let merged = self.width * self.merge_area();
        let x = g.reshape(x, [tokens.clone(), merged.into()]);
        g.linear_bias(g.unary(Unary::Gelu, g.linear_bias(x, first, merged)), second, hidden_size)
    }
}

/// Patches of any number of pictures and videos: `x f32[patches, width]`, the cos and sin of their positions, and the frame of
/// each, `i64[patches]`.
pub(super) struct Patches<'g> {
    pub(super) tokens: Dim,
    pub(super) grid: Val<'g>,
    pub(super) frame: Val<'g>,
    pub(super) rope: (Val<'g>, Val<'g>),
    pub(super) x: Val<'g>,
}

/// The Qwen2 decoder: Llama's with biases on q, k and v and multimodal rotary positions.
pub(super) fn text_config(c: &Section<'_>) -> Result<Decoder> {
    let c = c.section_or_self("text_config")?;
    let mut text = Decoder::new(&c, None)?;
    let Positions::Mrope { interleaved: false, .. } = text.positions else {
        return Err(Error::config(c.path("rope_scaling"), "must hold `mrope_section`, and not interleaved"));
    };
    text.attention.qkv_bias = true;
    Ok(text)
}

fn lower(c: &Section<'_>, weights: &Weights<'_>, _: &SideFiles) -> Result<Lowered> {
    let text = text_config(c)?;
    let vision = c.section("vision_config")?.ok_or_else(|| Error::config("vision_config", "is missing"))?;
    let tower = Tower::new(&vision, "embed_dim", "hidden_size", text.hidden_size, None)?;
    let mlp_dim = tower.width * vision.opt_int("mlp_ratio", 1..=64)?.unwrap_or(4);
    let act = nn::activation(&vision, "hidden_act", Unary::QuickGelu)?;
    let positions = vlmc_artifact::Positions::Mrope { spatial_merge_size: tower.merge, tokens_per_second: None, frame_text: None };
    let graph = graph("vision", weights, |g| vision_tower(g, &tower, mlp_dim, act, text.hidden_size))?;
    family(c, weights, &text, positions, graph)
}

/// What the models of the family share beside the vision tower: the entries `embed` and `decoder`, and the prompt's rules.
pub(super) fn family(
    c: &Section<'_>,
    weights: &Weights<'_>,
    text: &Decoder,
    positions: vlmc_artifact::Positions,
    vision: Graph,
) -> Result<Lowered> {
    let token = |field: &str, default: i64| Ok::<i64, Error>(c.get(field)?.unwrap_or(default));
    let (image_token_id, video_token_id) = (token("image_token_id", 151_655)?, token("video_token_id", 151_656)?);
    let context = text.max_position_embeddings;
    let embed = graph("embed", weights, |g| {
        let here = |ids| nn::is_any(g, ids, &[image_token_id, video_token_id]);
        let here = nn::embed_at(g, g.weights("model.embed_tokens"), [text.vocab_size, text.hidden_size], here);
        if text.deepstack > 0 {
            let width: Dim = (text.deepstack * text.hidden_size).into();
            let features = g.input("deepstack_features", DType::F32, [Dim::symbol("features"), width.clone()]);
            let none = g.broadcast(g.literal(Literal::scalar(DType::F32, 0.0)), vec![here.dim(0), here.dim(1), width]);
            g.output("deepstack_embeds", g.merge_features(none, here, features));
        }
    })?;
    let tied = !weights.contains("lm_head.weight").unwrap_or(!text.tie_word_embeddings);
    let head = if tied { "model.embed_tokens" } else { "lm_head" };
    let decoder = graph("decoder", weights, |g| text.graph(g, g.weights("model"), g.weights(head)))?;

    let mut symbols = nn::decoder_symbols(context);
    symbols.extend([symbol("images", 1..=context), symbol("image_tokens", 1..=context)]);
    Ok(Lowered {
        symbols,
        graphs: vec![vision, embed, decoder],
        task: Task::Generate(PromptRules {
            image_token_id: Some(image_token_id),
            video_token_id: Some(video_token_id),
            hidden_size: text.hidden_size,
            vocab_size: text.vocab_size,
            max_positions: context,
            positions,
            tile_side: None,
            template: None,
        }),
    })
}

/// Patches of any number of pictures and videos to rows for the decoder, one per `spatial_merge_size`² patches.
fn vision_tower<'g>(g: &'g Builder<'g>, t: &Tower, mlp_dim: usize, act: Unary, hidden_size: usize) {
    let w = g.weights("visual");
    let Patches { tokens, frame, rope, mut x, .. } = t.patches(g, w, false);
    for i in 0..t.depth {
        let w = w / "blocks" / i;
        let _scope = g.scope(w.path());
        let h = g.layer_norm(x, w / "norm1", VISION_EPS);
        x = x + t.attention(g, w / "attn", h, rope, frame);
        let h = g.layer_norm(x, w / "norm2", VISION_EPS);
        let h = g.unary(act, g.linear_bias(h, w / "mlp" / "fc1", mlp_dim));
        x = x + g.linear_bias(h, w / "mlp" / "fc2", t.width);
    }
    let w = w / "merger";
    let _scope = g.scope(w.path());
    let x = g.layer_norm(x, w / "ln_q", VISION_EPS);
    g.output("image_features", t.merged(g, [w / "mlp" / 0, w / "mlp" / 2], x, &tokens, hidden_size));
}

pub(super) fn processor(_: &Section<'_>, files: &SideFiles) -> Result<Option<Processor>> {
    // OpenAI CLIP's statistics.
    image_processor(files, [0.481_454_66, 0.457_827_5, 0.408_210_73], [0.268_629_54, 0.261_302_6, 0.275_777_1], 14)
}

/// `Qwen2VLImageProcessor` with these defaults.
pub(super) fn image_processor(files: &SideFiles, mean: [f32; 3], std: [f32; 3], patch_size: usize) -> Result<Option<Processor>> {
    let Some(image) = &files.preprocessor else { return Ok(None) };
    let file = |e: Error| match e {
        Error::Config { field, message } => {
            Error::File { path: "preprocessor_config.json".into(), message: format!("`{field}`: {message}") }
        }
        e => e,
    };
    let read = || {
        let c = Section::root(image)?;
        let patch_size = c.opt_int("patch_size", 1..=1024)?.unwrap_or(patch_size);
        let merge_size = c.opt_int("merge_size", 1..=64)?.unwrap_or(2);
        let (min_pixels, max_pixels) = pixel_budget(&c)?.unwrap_or((56 * 56, 28 * 28 * 1280));
        // Without a file of its own, a video frame gets 128 to 768 tokens (qwen-vl-utils VIDEO_MIN_PIXELS, VIDEO_MAX_PIXELS).
        let token = (patch_size * merge_size).pow(2);
        let video = files.video_preprocessor.as_ref().map(Section::root).transpose()?;
        let fps = video.as_ref().map(|v| v.positive("fps")).transpose()?.flatten();
        let video = video.map(|v| pixel_budget(&v)).transpose()?.flatten();
        let (video_min_pixels, video_max_pixels) = video.unwrap_or((128 * token, 768 * token));
        c.only("do_resize", &[json!(true)])?;
        c.only("do_rescale", &[json!(true)])?;
        c.only("do_normalize", &[json!(true)])?;
        let rgb = |field: &str, default: [f32; 3]| Ok::<_, Error>(c.get::<[f32; 3]>(field)?.unwrap_or(default));
        Ok(Processor::Qwen2Vl(Qwen2VlProcessor {
            patch_size,
            temporal_patch_size: c.opt_int("temporal_patch_size", 1..=64)?.unwrap_or(2),
            merge_size,
            min_pixels,
            max_pixels,
            video_min_pixels,
            video_max_pixels,
            video_budget_of_clip: false,
            image_mean: rgb("image_mean", mean)?,
            image_std: rgb("image_std", std)?,
            rescale_factor: c.positive("rescale_factor")?.unwrap_or(1.0 / 255.0),
            fps: fps.unwrap_or(2.0) as f32,
            resample: match c.get::<u32>("resample")? {
                None | Some(3) => Resample::Bicubic,
                Some(2) => Resample::Bilinear,
                Some(1) => Resample::Lanczos,
                Some(n) => {
                    return Err(Error::config(
                        "resample",
                        format!("{n} is not supported; supported: 1 (lanczos), 2 (bilinear), 3 (bicubic)"),
                    ));
                }
            },
        }))
    };
    read().map(Some).map_err(file)
}

/// Pixels per picture: `min_pixels` and `max_pixels`, or in newer files `size.shortest_edge` and `size.longest_edge`.
fn pixel_budget(c: &Section<'_>) -> Result<Option<(usize, usize)>> {
    const PIXELS: std::ops::RangeInclusive<usize> = 1..=1 << 40;
    let size = c.section("size")?;
    let edge = |field: &str| size.as_ref().map(|s| s.opt_int(field, PIXELS)).transpose().map(Option::flatten);
    let min = c.opt_int("min_pixels", PIXELS)?.or(edge("shortest_edge")?);
    let max = c.opt_int("max_pixels", PIXELS)?.or(edge("longest_edge")?);
    match (min, max) {
        (Some(min), Some(max)) if min > max => Err(Error::config("min_pixels", format!("{min} is more than max_pixels {max}"))),
        (Some(min), Some(max)) => Ok(Some((min, max))),
        _ => Ok(None),
    }
}
