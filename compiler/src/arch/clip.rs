//! CLIP (Radford et al., 2021, arXiv 2103.00020) as transformers has it, and the towers that other layouts and LLaVA share with
//! it. Reference: transformers `modeling_clip.py`.

use super::{
    Architecture, Lowered, Preset, SideFiles,
    config::Section,
    decoder::{LAYERS, WIDTH},
    graph, images,
    nn::{self, CLIP_LAYER, Encoder},
    symbol,
};
use crate::{Error, Result};
use serde_json::{Value, json};
use std::borrow::Cow;
use vlmc_artifact::{
    Processor, Task, TextRules,
    program::{Binary, Reduce, Unary},
};
use vlmc_ir::{Builder, DType, Dim, Literal, Symbol, Val, W, Weights, ops::Mask};

pub(super) const ARCHITECTURE: Architecture = Architecture {
    model_types: &["clip"],
    alias: "clip",
    title: "CLIP",
    reference: "arXiv 2103.00020; transformers CLIPModel",
    notes: "Hugging Face layout. Both rules for the end of a text (`eos_token_id` 2 of old configs: the largest id; else the first end token), activations as the config says, other picture sizes by a stretched position table. Entries `image`, `text` and `score`. A LiT-style pair is the same two towers.",
    canonical_name: |name| Cow::Borrowed(name),
    ignored: |name| name.ends_with(".position_ids"),
    presets: &[
        preset!("clip-vit-base-patch32", "openai/clip-vit-base-patch32", 151_277_313, &BASE),
        preset!("clip-vit-base-patch16", "openai/clip-vit-base-patch16", 149_620_737, &Size { patch_size: 16, ..BASE }),
        preset!("clip-vit-large-patch14", "openai/clip-vit-large-patch14", 427_616_513, &LARGE),
        preset!("clip-vit-large-patch14-336", "openai/clip-vit-large-patch14-336", 427_944_193, &Size { image_size: 336, ..LARGE }),
    ],
    lower,
    processor,
};

struct Size {
    vision: [usize; 4],
    image_size: usize,
    patch_size: usize,
    text: [usize; 4],
    projection_dim: usize,
}

const BASE: Size = Size { vision: [768, 12, 12, 3072], image_size: 224, patch_size: 32, text: [512, 12, 8, 2048], projection_dim: 512 };
const LARGE: Size = Size { vision: [1024, 24, 16, 4096], image_size: 224, patch_size: 14, text: [768, 12, 12, 3072], projection_dim: 768 };

/// `config.json` as published on the hub.
fn config(p: &Size) -> Value {
    let [width, layers, heads, mlp] = p.vision;
    let [text_width, text_layers, text_heads, text_mlp] = p.text;
    json!({
        "architectures": ["CLIPModel"],
        "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592,
        "model_type": "clip",
        "projection_dim": p.projection_dim,
        "text_config": {
            "model_type": "clip_text_model", "vocab_size": 49408, "hidden_size": text_width, "intermediate_size": text_mlp,
            "num_hidden_layers": text_layers, "num_attention_heads": text_heads, "max_position_embeddings": 77,
            "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": p.projection_dim,
            "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1
        },
        "torch_dtype": "float32",
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers,
            "num_attention_heads": heads, "image_size": p.image_size, "patch_size": p.patch_size, "num_channels": 3,
            "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": p.projection_dim
        }
    })
}

fn files(p: &Size) -> Vec<(&'static str, Value)> {
    vec![(
        "preprocessor_config.json",
        json!({"crop_size": p.image_size, "do_center_crop": true, "do_normalize": true, "do_resize": true,
            "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": images::CLIP_MEAN, "image_std": images::CLIP_STD,
            "resample": 3, "size": p.image_size}),
    )]
}

/// Names of the image tower's weights.
pub(super) struct VisionNames {
    pub(super) class: &'static str,
    pub(super) patches: &'static str,
    pub(super) positions: &'static str,
    pub(super) norm_before: &'static str,
    pub(super) layers: &'static str,
    pub(super) norm_after: &'static str,
}

const VISION_NAMES: VisionNames = VisionNames {
    class: "embeddings.class_embedding",
    patches: "embeddings.patch_embedding",
    positions: "embeddings.position_embedding.weight",
    norm_before: "pre_layrnorm",
    layers: "encoder.layers",
    norm_after: "post_layernorm",
};

/// The image tower: a ViT with a norm before its layers.
pub(super) struct Vision {
    pub(super) encoder: Encoder,
    pub(super) layers: usize,
    pub(super) image_size: usize,
    pub(super) patch_size: usize,
    pub(super) channels: usize,
    pub(super) names: VisionNames,
}

/// Width, layers, heads, MLP width, picture and patch that a config leaves out.
pub(super) struct VisionDefaults(pub(super) [usize; 6]);

/// `CLIPVisionConfig` of transformers.
pub(super) const VISION_DEFAULTS: VisionDefaults = VisionDefaults([768, 12, 12, 3072, 224, 32]);

impl Vision {
    pub(super) fn new(c: &Section<'_>, defaults: &VisionDefaults) -> Result<Self> {
        // Only the whole model projects, to the width that is named beside the towers.
        c.ignore(&["projection_dim", "vocab_size"]);
        let VisionDefaults([width, layers, heads, mlp, image_size, patch_size]) = *defaults;
        let (image_size, patch_size) = nn::square_grid(c, image_size, patch_size)?;
        Ok(Self {
            encoder: encoder(c, [width, heads, mlp], Unary::QuickGelu, 1e-5)?,
            layers: c.opt_int("num_hidden_layers", LAYERS)?.unwrap_or(layers),
            image_size,
            patch_size,
            channels: c.opt_int("num_channels", 1..=64)?.unwrap_or(3),
            names: VISION_NAMES,
        })
    }

    /// Patches along a side.
    pub(super) fn side(&self) -> usize {
        self.image_size / self.patch_size
    }

    /// `pixels f32[n, channels, height, width]` to the input of the first layer and the results of the first `layers` layers,
    /// `f32[n, 1 + patches, width]` each.
    pub(super) fn hidden_states<'g>(&self, g: &'g Builder<'g>, w: W<'g>, pixels: Val<'g>, layers: usize) -> Vec<Val<'g>> {
        let (n, width, side) = (&self.names, self.encoder.width, self.side());
        let scope = g.scope(w.path());
        let patches = nn::patch_embedding(g, w / n.patches, pixels, self.patch_size, width, false);
        let class = g.table(w / n.class, &[width]);
        let positions = g.table(w / n.positions, &[1 + side * side, width]);
        let x = nn::with_class_token(g, patches, class, positions, side);
        let mut states = vec![g.layer_norm(x, w / n.norm_before, self.encoder.eps)];
        drop(scope);
        for i in 0..layers {
            states.push(self.encoder.layer(g, w / n.layers / i, states[i], Mask::Full, None));
        }
        states
    }

    /// The entry `image`: `pixel_values f32[images, channels, height, width]` to `image_embeds f32[images, embed]`, of length 1;
    /// `project` makes them of the class token.
    pub(super) fn image<'g>(&self, g: &'g Builder<'g>, w: W<'g>, project: impl FnOnce(Val<'g>) -> Val<'g>) {
        let shape = [Dim::symbol("images"), self.channels.into(), Dim::symbol("height"), Dim::symbol("width")];
        let pixels = g.input("pixel_values", DType::F32, shape);
        let states = self.hidden_states(g, w, pixels, self.layers);
        let class = g.reshape(g.slice(states[self.layers], 1, 0, 1), [Dim::symbol("images"), self.encoder.width.into()]);
        let pooled = g.layer_norm(class, w / self.names.norm_after, self.encoder.eps);
        g.output("image_embeds", nn::normalized(g, project(pooled)));
    }
}

/// Layers of a tower; `defaults` are its width, heads and MLP width.
pub(super) fn encoder(c: &Section<'_>, [width, heads, mlp]: [usize; 3], act: Unary, eps: f64) -> Result<Encoder> {
    let int = |field: &str, default: usize| Ok::<_, Error>(c.opt_int(field, WIDTH)?.unwrap_or(default));
    let (width, heads) = (int("hidden_size", width)?, int("num_attention_heads", heads)?);
    nn::head_dim(c, "hidden_size", width, "num_attention_heads", heads)?;
    Ok(Encoder {
        width,
        heads,
        mlp: int("intermediate_size", mlp)?,
        eps: c.positive("layer_norm_eps")?.unwrap_or(eps),
        act: nn::activation(c, "hidden_act", act)?,
        names: CLIP_LAYER,
    })
}

/// Names of the text tower's weights.
pub(super) struct TextNames {
    pub(super) tokens: &'static str,
    pub(super) positions: &'static str,
    pub(super) layers: &'static str,
    pub(super) norm: &'static str,
}

/// Names of the text tower's weights in transformers, for CLIP and SigLIP.
pub(super) const TEXT_NAMES: TextNames = TextNames {
    tokens: "embeddings.token_embedding",
    positions: "embeddings.position_embedding.weight",
    layers: "encoder.layers",
    norm: "final_layer_norm",
};

/// Which position of a text stands for it.
#[derive(Clone, Copy)]
pub(super) enum Pool {
    /// The first that has this id, or the first of all if none has.
    First(i64),
    /// The first that has the largest id: that of the end, which was the last of the vocabulary.
    Largest,
    /// The last, whatever it is.
    Last,
}

/// The text tower.
pub(super) struct Text {
    pub(super) encoder: Encoder,
    pub(super) layers: usize,
    pub(super) vocab_size: usize,
    pub(super) context: usize,
    /// Whether a token sees only those before it.
    pub(super) causal: bool,
    pub(super) pool: Pool,
    pub(super) names: TextNames,
}

impl Text {
    /// Inputs of the entry `text`, `input_ids i64[texts, seq]` and `attention_mask i64[texts, seq]`, to the token that stands for
    /// each text, after the last norm: `f32[texts, width]`.
    pub(super) fn pooled<'g>(&self, g: &'g Builder<'g>, w: W<'g>) -> Val<'g> {
        let [texts, seq] = ["texts", "seq"].map(Dim::symbol);
        let shape = [texts.clone(), seq.clone()];
        let ids = g.input("input_ids", DType::I64, shape.clone());
        let attention_mask = g.input("attention_mask", DType::I64, shape);
        let (n, width) = (&self.names, self.encoder.width);
        let scope = g.scope(w.path());
        let positions = g.slice(g.table(w / n.positions, &[self.context, width]), 0, 0, seq.clone());
        let mut x = g.embedding(ids, w / n.tokens, self.vocab_size, width) + positions;
        let (kind, mask) = if self.causal {
            (Mask::Causal, attention_mask)
        } else {
            let live = g.cast(attention_mask, DType::Bool);
            (Mask::Given, g.reshape(live, [texts.clone(), 1.into(), 1.into(), seq.clone()]))
        };
        drop(scope);
        for i in 0..self.layers {
            x = self.encoder.layer(g, w / n.layers / i, x, kind, Some(mask));
        }
        let _scope = g.scope(w.path());
        let at = match self.pool {
            Pool::Last => g.dim(&seq - &Dim::from(1)),
            Pool::First(id) => first(g, nn::is_any(g, ids, &[id])),
            Pool::Largest => first(g, g.binary(Binary::Eq, ids, g.unsqueeze(g.reduce(Reduce::Max, ids, &[1]), 1))),
        };
        let rows = g.iota(texts.clone()) * g.dim(seq.clone()) + at;
        let pooled = g.gather(g.reshape(x, [&texts * &seq, width.into()]), rows, 0);
        g.layer_norm(pooled, w / n.norm, self.encoder.eps)
    }
}

/// Column of the first true element of each row of `found bool[rows, columns]`, 0 if there is none (`argmax`): `i64[rows]`.
fn first<'g>(g: &'g Builder<'g>, found: Val<'g>) -> Val<'g> {
    let columns = found.dim(1);
    let left = g.dim(columns.clone()) - g.iota(columns.clone());
    let most = g.reduce(Reduce::Max, g.select(found, left, g.literal(Literal::scalar(DType::I64, 0.0))), &[1]);
    g.binary(Binary::Mod, g.dim(columns.clone()) - most, g.dim(columns))
}

/// The entry `score`: `image_embeds f32[images, embed]` and `text_embeds f32[texts, embed]` to `logits_per_image f32[images,
/// texts]` and `logits_per_text`, products times `exp(logit_scale)`, plus `bias`. `scale_shape` is that of the scalars.
pub(super) fn score<'g>(g: &'g Builder<'g>, embed: usize, scale_shape: &[usize], bias: bool) {
    let image = g.input("image_embeds", DType::F32, [Dim::symbol("images"), embed.into()]);
    let text = g.input("text_embeds", DType::F32, [Dim::symbol("texts"), embed.into()]);
    let scale = g.unary(Unary::Exp, g.table(g.weights("logit_scale"), scale_shape));
    let logits = g.matmul(text, g.transpose(image, &[1, 0])) * scale;
    let logits = if bias { logits + g.table(g.weights("logit_bias"), scale_shape) } else { logits };
    g.output("logits_per_image", g.transpose(logits, &[1, 0]));
    g.output("logits_per_text", logits);
}

/// Symbols of a pair of towers.
pub(super) fn symbols(patch: usize, context: usize) -> Vec<Symbol> {
    let mut symbols = nn::picture_symbols(patch);
    symbols.extend([symbol("texts", 1..=65536), symbol("seq", 1..=context)]);
    symbols
}

/// The id with which texts are filled: the tokenizer's, or the config's.
pub(super) fn pad_token_id(c: &Section<'_>, files: &SideFiles, default: i64) -> Result<i64> {
    let token = files.tokenizer_config.as_ref().and_then(|c| c.get("pad_token"));
    let token = token.and_then(|t| t.as_str().or_else(|| t.get("content")?.as_str()));
    match token.and_then(|t| files.token_id(t)) {
        Some(id) => Ok(id),
        None => Ok(c.get("pad_token_id")?.unwrap_or(default)),
    }
}

fn lower(c: &Section<'_>, weights: &Weights<'_>, files: &SideFiles) -> Result<Lowered> {
    c.ignore(&["logit_scale_init_value", "text_config_dict", "vision_config_dict"]);
    let (v, t) = (c.section_or_empty("vision_config")?, c.section_or_empty("text_config")?);
    let vision = Vision::new(&v, &VISION_DEFAULTS)?;
    let text = Text {
        encoder: encoder(&t, [512, 8, 2048], Unary::QuickGelu, 1e-5)?,
        layers: t.opt_int("num_hidden_layers", LAYERS)?.unwrap_or(12),
        vocab_size: t.opt_int("vocab_size", 1..=1 << 24)?.unwrap_or(49408),
        context: t.opt_int("max_position_embeddings", WIDTH)?.unwrap_or(77),
        causal: true,
        // Files of before the end's id was right have 2.
        pool: match t.get::<i64>("eos_token_id")?.unwrap_or(49407) {
            2 => Pool::Largest,
            id => Pool::First(id),
        },
        names: TEXT_NAMES,
    };
    t.ignore(&["projection_dim"]);
    let embed = c.opt_int("projection_dim", WIDTH)?.unwrap_or(512);
    Ok(Lowered {
        symbols: symbols(vision.patch_size, text.context),
        graphs: vec![
            graph("image", weights, |g| {
                vision.image(g, g.weights("vision_model"), |x| g.linear(x, g.weights("visual_projection"), embed));
            })?,
            graph("text", weights, |g| {
                let x = text.pooled(g, g.weights("text_model"));
                g.output("text_embeds", nn::normalized(g, g.linear(x, g.weights("text_projection"), embed)));
            })?,
            graph("score", weights, |g| score(g, embed, &[], false))?,
        ],
        task: Task::Contrast(TextRules {
            max_length: text.context,
            pad_to_max: false,
            pad_token_id: pad_token_id(&t, files, 1)?,
            sigmoid: false,
        }),
    })
}

fn processor(_: &Section<'_>, files: &SideFiles) -> Result<Option<Processor>> {
    images::read(files, |c| images::standard(c, &images::CLIP, 0))
}
