//! Qwen2-VL (Wang et al., 2024, arXiv 2409.12191). Reference: transformers `modeling_qwen2_vl.py`.

use super::{Architecture, Lowered, SideFiles, config::Section, graph, nn, symbol};
use crate::{Error, Result};
use serde_json::{Value, json};
use std::borrow::Cow;
use vlmc_artifact::{Positions, Processor, PromptRules, Qwen2VlProcessor, Resample, Task, program::Unary};
use vlmc_ir::{Builder, DType, Dim, Val, Weights, ops::Mask};

pub(super) const ARCHITECTURE: Architecture = Architecture {
    model_type: "qwen2_vl",
    title: "Qwen2-VL",
    reference: "arXiv 2409.12191; transformers Qwen2VLForConditionalGeneration",
    canonical_name,
    ignored: |name| name.ends_with("rotary_emb.inv_freq") || name.ends_with("rotary_pos_emb.inv_freq"),
    lower,
    processor,
};

/// transformers since 4.52 may write `model.visual.` and `model.language_model.` for `visual.` and `model.`.
fn canonical_name(name: &str) -> Cow<'_, str> {
    if let Some(rest) = name.strip_prefix("model.visual.") {
        return format!("visual.{rest}").into();
    }
    match name.strip_prefix("model.language_model.") {
        Some(rest) => format!("model.{rest}").into(),
        None => name.into(),
    }
}

/// LayerNorm epsilon of the vision tower, fixed in the reference.
const VISION_EPS: f64 = 1e-6;

struct VisionConfig {
    depth: usize,
    embed_dim: usize,
    num_heads: usize,
    head_dim: usize,
    mlp_dim: usize,
    in_channels: usize,
    patch_size: usize,
    temporal_patch_size: usize,
    spatial_merge_size: usize,
    rope_theta: f64,
    act: Unary,
}

struct TextConfig {
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    attention: nn::CachedAttention,
    rms_norm_eps: f64,
    rope_theta: f64,
    mrope_section: [usize; 3],
    vocab_size: usize,
    max_position_embeddings: usize,
    act: Unary,
    tie_word_embeddings: bool,
}

const WIDTH: std::ops::RangeInclusive<usize> = 1..=1 << 20;
const LAYERS: std::ops::RangeInclusive<usize> = 1..=1000;

impl VisionConfig {
    fn new(c: &Section<'_>, text_hidden_size: usize) -> Result<Self> {
        let (embed_dim, num_heads) = (c.int("embed_dim", WIDTH)?, c.int("num_heads", WIDTH)?);
        let head_dim = nn::head_dim(c, "embed_dim", embed_dim, "num_heads", num_heads)?;
        if !head_dim.is_multiple_of(4) {
            return Err(Error::config(
                c.path("num_heads"),
                format!("head width {head_dim} is not a multiple of 4, which 2-D rotary positions need"),
            ));
        }
        let hidden_size = c.int("hidden_size", WIDTH)?;
        if hidden_size != text_hidden_size {
            let message = format!("{hidden_size} (output of the merger) must equal the decoder's hidden_size {text_hidden_size}");
            return Err(Error::config(c.path("hidden_size"), message));
        }
        let rope = c.section("rope_parameters")?;
        if let Some(rope) = &rope {
            rope.only("rope_type", &[json!("default"), json!("axial")])?;
        }
        let rope_theta = rope.as_ref().map(|r| r.positive("rope_theta")).transpose()?.flatten();
        Ok(Self {
            depth: c.int("depth", LAYERS)?,
            embed_dim,
            num_heads,
            head_dim,
            mlp_dim: embed_dim * c.opt_int("mlp_ratio", 1..=64)?.unwrap_or(4),
            in_channels: c.opt_int("in_chans", 1..=64)?.or(c.opt_int("in_channels", 1..=64)?).unwrap_or(3),
            patch_size: c.int("patch_size", 1..=1024)?,
            temporal_patch_size: c.opt_int("temporal_patch_size", 1..=64)?.unwrap_or(2),
            spatial_merge_size: c.opt_int("spatial_merge_size", 1..=64)?.unwrap_or(2),
            rope_theta: rope_theta.unwrap_or(10_000.0),
            act: nn::activation(c, "hidden_act", Unary::QuickGelu)?,
        })
    }

    /// Elements of a patch.
    fn patch_dim(&self) -> usize {
        self.in_channels * self.temporal_patch_size * self.patch_size * self.patch_size
    }
}

impl TextConfig {
    fn new(c: &Section<'_>) -> Result<Self> {
        c.only("use_sliding_window", &[json!(false)])?;
        if let Some(types) = c.get::<Vec<Value>>("layer_types")?
            && let Some(other) = types.iter().find(|t| **t != json!("full_attention"))
        {
            return Err(Error::config(c.path("layer_types"), format!("{other} is not supported; supported: \"full_attention\"")));
        }
        let (hidden_size, heads) = (c.int("hidden_size", WIDTH)?, c.int("num_attention_heads", WIDTH)?);
        let head_dim = match c.opt_int("head_dim", WIDTH)? {
            Some(d) => d,
            None => nn::head_dim(c, "hidden_size", hidden_size, "num_attention_heads", heads)?,
        };
        let kv_heads = c.opt_int("num_key_value_heads", WIDTH)?.unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            let message = format!("{kv_heads} kv heads do not divide num_attention_heads {heads}");
            return Err(Error::config(c.path("num_key_value_heads"), message));
        }
        // Old files: rope_theta at the top and rope_scaling; new ones: all of it in rope_parameters.
        let (field, rope) = match c.section("rope_parameters")? {
            Some(rope) => ("rope_parameters", Some(rope)),
            None => ("rope_scaling", c.section("rope_scaling")?),
        };
        let rope = rope.ok_or_else(|| Error::config(c.path(field), "is missing; it holds `mrope_section`"))?;
        for kind in ["type", "rope_type"] {
            rope.only(kind, &[json!("mrope"), json!("default")])?;
        }
        let mrope_section: [usize; 3] = rope.require("mrope_section")?;
        if mrope_section.iter().try_fold(0usize, |n, s| n.checked_add(*s)) != Some(head_dim / 2) || !head_dim.is_multiple_of(2) {
            let message = format!("{mrope_section:?} must sum to half of the head width {head_dim}");
            return Err(Error::config(rope.path("mrope_section"), message));
        }
        let rope_theta = rope.positive("rope_theta")?.or(c.positive("rope_theta")?);
        Ok(Self {
            hidden_size,
            intermediate_size: c.int("intermediate_size", WIDTH)?,
            num_hidden_layers: c.int("num_hidden_layers", LAYERS)?,
            attention: nn::CachedAttention { hidden_size, heads, kv_heads, head_dim, qkv_bias: true },
            rms_norm_eps: c.positive("rms_norm_eps")?.ok_or_else(|| Error::config(c.path("rms_norm_eps"), "is missing"))?,
            rope_theta: rope_theta.ok_or_else(|| Error::config(c.path("rope_theta"), "is missing"))?,
            mrope_section,
            vocab_size: c.int("vocab_size", 1..=1 << 24)?,
            max_position_embeddings: c.opt_int("max_position_embeddings", 1..=1 << 24)?.unwrap_or(32768),
            act: nn::activation(c, "hidden_act", Unary::Silu)?,
            tie_word_embeddings: c.get("tie_word_embeddings")?.unwrap_or(false),
        })
    }
}

fn lower(c: &Section<'_>, weights: &Weights<'_>, _: &SideFiles) -> Result<Lowered> {
    c.only("quantization_config", &[])?;
    let text = TextConfig::new(&c.section_or_self("text_config")?)?;
    let vision_section = c.section("vision_config")?.ok_or_else(|| Error::config("vision_config", "is missing"))?;
    let vision = VisionConfig::new(&vision_section, text.hidden_size)?;
    let token = |field: &str, default: i64| Ok::<i64, Error>(c.get(field)?.unwrap_or(default));
    let (image_token_id, video_token_id) = (token("image_token_id", 151_655)?, token("video_token_id", 151_656)?);
    let context = text.max_position_embeddings;

    let vision_graph = graph("vision", weights, |g| vision_tower(g, &vision, text.hidden_size))?;
    let embed_graph = graph("embed", weights, |g| {
        let ids = g.input("input_ids", DType::I64, ["batch", "seq"].map(Dim::symbol));
        let features = g.input("image_features", DType::F32, [Dim::symbol("features"), text.hidden_size.into()]);
        let embeds = g.embedding(ids, g.weights("model.embed_tokens"), text.vocab_size, text.hidden_size);
        let here = nn::is_any(g, ids, &[image_token_id, video_token_id]);
        g.output("inputs_embeds", g.merge_features(embeds, here, features));
    })?;
    let tied = !weights.contains("lm_head.weight").unwrap_or(!text.tie_word_embeddings);
    let decoder_graph = graph("decoder", weights, |g| decoder(g, &text, tied))?;

    Ok(Lowered {
        symbols: vec![
            symbol("batch", 1..=1024),
            symbol("seq", 1..=context),
            symbol("past", 0..=context),
            symbol("scored", 1..=context),
            symbol("images", 1..=context),
            symbol("image_tokens", 1..=context),
            symbol("features", 0..=context),
        ],
        graphs: vec![vision_graph, embed_graph, decoder_graph],
        task: Task::Generate(PromptRules {
            image_token_id: Some(image_token_id),
            video_token_id: Some(video_token_id),
            hidden_size: text.hidden_size,
            vocab_size: text.vocab_size,
            max_positions: context,
            positions: Positions::Mrope { spatial_merge_size: vision.spatial_merge_size, tokens_per_second: None },
            template: None,
        }),
    })
}

/// Patches of any number of pictures and videos to rows for the decoder, one per `spatial_merge_size`² patches.
fn vision_tower<'g>(g: &'g Builder<'g>, c: &VisionConfig, hidden_size: usize) {
    let merge_area = c.spatial_merge_size * c.spatial_merge_size;
    let tokens = Dim::symbol("image_tokens");
    let patches = &tokens * merge_area;
    let pixels = g.input("pixel_values", DType::F32, [patches.clone(), c.patch_dim().into()]);
    let grid = g.input("image_grid_thw", DType::I64, [Dim::symbol("images"), 3.into()]);
    let w = g.weights("visual");

    let _scope = g.scope("visual");
    let [row, col, frame] = g.grid_positions(grid, patches, c.spatial_merge_size);
    let rope = g.rotary_2d(row, col, c.head_dim, c.rope_theta);
    // A convolution whose stride is its kernel is a matrix product.
    let kernel = [c.embed_dim, c.in_channels, c.temporal_patch_size, c.patch_size, c.patch_size];
    let proj = g.weight_as(w / "patch_embed" / "proj" / "weight", &kernel, &[c.embed_dim, c.patch_dim()]);
    let mut x = g.linear_with(pixels, proj, None);
    for i in 0..c.depth {
        let w = w / "blocks" / i;
        let _scope = g.scope(w.path());
        let h = g.layer_norm(x, w / "norm1", VISION_EPS);
        x = x + vision_attention(g, c, h, rope, frame, i);
        let h = g.layer_norm(x, w / "norm2", VISION_EPS);
        let h = g.unary(c.act, g.linear_bias(h, w / "mlp" / "fc1", c.mlp_dim));
        x = x + g.linear_bias(h, w / "mlp" / "fc2", c.embed_dim);
    }
    let w = w / "merger";
    let _scope = g.scope(w.path());
    let merged = c.embed_dim * merge_area;
    let x = g.reshape(g.layer_norm(x, w / "ln_q", VISION_EPS), [tokens, merged.into()]);
    let x = g.unary(Unary::Gelu, g.linear_bias(x, w / "mlp" / 0, merged));
    g.output("image_features", g.linear_bias(x, w / "mlp" / 2, hidden_size));
}

/// Attention within each frame; q, k and v come from one matrix.
fn vision_attention<'g>(
    g: &'g Builder<'g>,
    c: &VisionConfig,
    x: Val<'g>,
    rope: (Val<'g>, Val<'g>),
    frame: Val<'g>,
    block: usize,
) -> Val<'g> {
    let w = g.weights("visual") / "blocks" / block / "attn";
    let qkv = g.linear_bias(x, w / "qkv", 3 * c.embed_dim);
    let part = |i: usize| g.split_heads(g.slice(qkv, 1, i * c.embed_dim, c.embed_dim), c.num_heads);
    let (q, k, v) = (g.rotary(part(0), rope), g.rotary(part(1), rope), part(2));
    let y = g.attention(q, k, v, 1.0 / (c.head_dim as f64).sqrt(), Mask::Segments, Some(frame));
    g.linear_bias(g.merge_heads(y), w / "proj", c.embed_dim)
}

/// Qwen2 with multimodal rotary positions; logits only for the positions asked for.
fn decoder<'g>(g: &'g Builder<'g>, c: &TextConfig, tied: bool) {
    let [batch, seq, past, scored] = ["batch", "seq", "past", "scored"].map(Dim::symbol);
    let mut x = g.input("inputs_embeds", DType::F32, [batch.clone(), seq.clone(), c.hidden_size.into()]);
    let position_ids = g.input("position_ids", DType::I64, [3.into(), batch.clone(), seq.clone()]);
    let attention_mask = g.input("attention_mask", DType::I64, [batch, &past + seq]);
    let logit_positions = g.input("logit_positions", DType::I64, [scored]);
    let w = g.weights("model");

    let _scope = g.scope(w.path());
    let rope = g.mrope(position_ids, c.attention.head_dim, c.rope_theta, c.mrope_section);
    for i in 0..c.num_hidden_layers {
        let w = w / "layers" / i;
        let _scope = g.scope(w.path());
        let h = g.rms_norm(x, w / "input_layernorm", c.rms_norm_eps);
        x = x + c.attention.apply(g, w / "self_attn", i, h, rope, attention_mask);
        let h = g.rms_norm(x, w / "post_attention_layernorm", c.rms_norm_eps);
        x = x + nn::gated_mlp(g, w / "mlp", h, c.act, c.intermediate_size, c.hidden_size);
    }
    let x = g.rms_norm(g.gather(x, logit_positions, 1), w / "norm", c.rms_norm_eps);
    let head = if tied { w / "embed_tokens" } else { g.weights("lm_head") };
    g.output("logits", g.linear(x, head, c.vocab_size));
}

fn processor(_: &Section<'_>, files: &SideFiles) -> Result<Option<Processor>> {
    let Some(image) = &files.preprocessor else { return Ok(None) };
    let file = |e: Error| match e {
        Error::Config { field, message } => {
            Error::File { path: "preprocessor_config.json".into(), message: format!("`{field}`: {message}") }
        }
        e => e,
    };
    let read = || {
        let c = Section::root(image)?;
        let patch_size = c.opt_int("patch_size", 1..=1024)?.unwrap_or(14);
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
            // OpenAI CLIP's statistics, the class defaults.
            image_mean: rgb("image_mean", [0.481_454_66, 0.457_827_5, 0.408_210_73])?,
            image_std: rgb("image_std", [0.268_629_54, 0.261_302_6, 0.275_777_1])?,
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
