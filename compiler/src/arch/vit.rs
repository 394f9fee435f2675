//! ViT (Dosovitskiy et al., 2021, arXiv 2010.11929). Reference: transformers `modeling_vit.py`.

use super::{
    Architecture, Lowered, Preset, SideFiles,
    config::Section,
    decoder::{LAYERS, WIDTH},
    graph, images,
    nn::{self, Encoder, LayerNames, Qkv},
};
use crate::{Error, Result};
use serde_json::{Map, Value, json};
use std::borrow::Cow;
use vlmc_artifact::{Processor, Resample, Resize, Task, program::Unary};
use vlmc_ir::{Builder, DType, Dim, Weights, ops::Mask};

pub(super) const ARCHITECTURE: Architecture = Architecture {
    model_types: &["vit"],
    alias: "vit",
    title: "ViT",
    reference: "arXiv 2010.11929; transformers ViTForImageClassification, ViTModel",
    notes: "Classifiers and bare models, with or without pooler; other picture sizes by a stretched position table; labels from the config.",
    canonical_name,
    ignored: |name| name == "vit.embeddings.mask_token",
    presets: &[
        preset!("vit-base-patch16-224", "google/vit-base-patch16-224", 86_567_656, &BASE16),
        preset!("vit-base-patch16-384", "google/vit-base-patch16-384", 86_859_496, &Size { image_size: 384, ..BASE16 }),
        preset!("vit-base-patch32-384", "google/vit-base-patch32-384", 88_297_192, &Size { image_size: 384, patch_size: 32, ..BASE16 }),
        preset!("vit-large-patch16-224", "google/vit-large-patch16-224", 304_326_632, &LARGE16),
        preset!("vit-large-patch16-384", "google/vit-large-patch16-384", 304_715_752, &Size { image_size: 384, ..LARGE16 }),
        preset!("vit-large-patch32-384", "google/vit-large-patch32-384", 306_632_680, &Size { image_size: 384, patch_size: 32, ..LARGE16 }),
        preset!("vit-base-patch16-224-in21k", "google/vit-base-patch16-224-in21k", 86_389_248, &Size { classifier: false, ..BASE16 }),
        preset!(
            "vit-base-patch32-224-in21k",
            "google/vit-base-patch32-224-in21k",
            88_045_824,
            &Size { classifier: false, patch_size: 32, ..BASE16 }
        ),
        preset!("vit-large-patch16-224-in21k", "google/vit-large-patch16-224-in21k", 304_351_232, &Size { classifier: false, ..LARGE16 }),
        preset!(
            "vit-large-patch32-224-in21k",
            "google/vit-large-patch32-224-in21k",
            306_560_000,
            &Size { classifier: false, patch_size: 32, ..LARGE16 }
        ),
        preset!("vit-huge-patch14-224-in21k", "google/vit-huge-patch14-224-in21k", 632_404_480, &HUGE14),
    ],
    lower,
    processor,
};

struct Size {
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    intermediate_size: usize,
    image_size: usize,
    patch_size: usize,
    /// Of ImageNet's 1000 classes; a pooler without.
    classifier: bool,
}

const BASE16: Size = Size {
    hidden_size: 768,
    num_hidden_layers: 12,
    num_attention_heads: 12,
    intermediate_size: 3072,
    image_size: 224,
    patch_size: 16,
    classifier: true,
};
const LARGE16: Size = Size { hidden_size: 1024, num_hidden_layers: 24, num_attention_heads: 16, intermediate_size: 4096, ..BASE16 };
const HUGE14: Size = Size {
    hidden_size: 1280,
    num_hidden_layers: 32,
    num_attention_heads: 16,
    intermediate_size: 5120,
    patch_size: 14,
    classifier: false,
    ..BASE16
};

/// `config.json` as published on the hub, but for the names of the classes.
fn config(p: &Size) -> Value {
    let mut config = json!({
        "architectures": [if p.classifier { "ViTForImageClassification" } else { "ViTModel" }],
        "attention_probs_dropout_prob": 0.0,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": p.hidden_size,
        "image_size": p.image_size,
        "initializer_range": 0.02,
        "intermediate_size": p.intermediate_size,
        "layer_norm_eps": 1e-12,
        "model_type": "vit",
        "num_attention_heads": p.num_attention_heads,
        "num_channels": 3,
        "num_hidden_layers": p.num_hidden_layers,
        "patch_size": p.patch_size,
        "qkv_bias": true,
        "transformers_version": "4.13.0.dev0"
    });
    if p.classifier {
        config["id2label"] = (0..1000).map(|i| (i.to_string(), json!(format!("LABEL_{i}")))).collect::<Map<_, _>>().into();
        config["label2id"] = (0..1000).map(|i| (format!("LABEL_{i}"), json!(i))).collect::<Map<_, _>>().into();
    }
    config
}

fn files(p: &Size) -> Vec<(&'static str, Value)> {
    let size = json!({"height": p.image_size, "width": p.image_size});
    vec![(
        "preprocessor_config.json",
        json!({"do_normalize": true, "do_rescale": true, "do_resize": true, "image_mean": images::HALF, "image_std": images::HALF,
            "image_processor_type": "ViTImageProcessor", "resample": 2, "rescale_factor": 1.0 / 255.0, "size": size}),
    )]
}

/// Names of transformers 5 and what the hub has for them.
const RENAMED: [(&str, &str); 6] = [
    (".attention.q_proj.", ".attention.attention.query."),
    (".attention.k_proj.", ".attention.attention.key."),
    (".attention.v_proj.", ".attention.attention.value."),
    (".attention.o_proj.", ".attention.output.dense."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
];

/// The names of a classifier on the hub. A bare model has them without `vit.`.
fn canonical_name(name: &str) -> Cow<'_, str> {
    if name.starts_with("classifier.") {
        return name.into();
    }
    let rest = name.strip_prefix("vit.").unwrap_or(name);
    match rest.strip_prefix("layers.") {
        None => format!("vit.{rest}").into(),
        Some(layer) => RENAMED.iter().fold(format!("vit.encoder.layer.{layer}"), |name, (new, old)| name.replace(new, old)).into(),
    }
}

const QKV: [&str; 3] = ["attention.attention.query", "attention.attention.key", "attention.attention.value"];

struct Config {
    encoder: Encoder,
    layers: usize,
    image_size: usize,
    patch_size: usize,
    channels: usize,
    /// Number of classes, if there is a classifier.
    classes: Option<usize>,
    /// Width of the pooler, if there is one.
    pooler: Option<usize>,
}

impl Config {
    fn new(c: &Section<'_>, weights: &Weights<'_>, labels: usize) -> Result<Self> {
        let int = |field: &str, default: usize| Ok::<_, Error>(c.opt_int(field, WIDTH)?.unwrap_or(default));
        let (width, heads) = (int("hidden_size", 768)?, int("num_attention_heads", 12)?);
        nn::head_dim(c, "hidden_size", width, "num_attention_heads", heads)?;
        let qkv = if c.get("qkv_bias")?.unwrap_or(true) { Qkv::Split(QKV) } else { Qkv::Unbiased(QKV) };
        let names = LayerNames {
            norm1: "layernorm_before",
            qkv,
            out: "attention.output.dense",
            norm2: "layernorm_after",
            fc1: "intermediate.dense",
            fc2: "output.dense",
        };
        let (image_size, patch_size) = nn::square_grid(c, 224, 16)?;
        // The class says which head there is; a file without its tensors is of the bare model.
        let classes: Vec<String> = c.get("architectures")?.unwrap_or_default();
        let classifies = classes.is_empty() || classes.iter().any(|a| a.ends_with("ForImageClassification"));
        let classifies = classifies && weights.contains("classifier.weight").unwrap_or(true);
        let pools = !classifies && weights.contains("vit.pooler.dense.weight").unwrap_or(true);
        if pools {
            c.only("pooler_act", &[json!("tanh")])?;
        } else {
            c.ignore(&["pooler_act", "pooler_output_size"]);
        }
        Ok(Self {
            encoder: Encoder {
                width,
                heads,
                mlp: int("intermediate_size", 3072)?,
                eps: c.positive("layer_norm_eps")?.unwrap_or(1e-12),
                act: nn::activation(c, "hidden_act", Unary::Gelu)?,
                names,
            },
            layers: c.opt_int("num_hidden_layers", LAYERS)?.unwrap_or(12),
            image_size,
            patch_size,
            channels: c.opt_int("num_channels", 1..=64)?.unwrap_or(3),
            classes: classifies.then_some(labels),
            pooler: if pools { Some(int("pooler_output_size", width)?) } else { None },
        })
    }

    /// `pixel_values f32[images, channels, height, width]` to `logits f32[images, classes]`, `last_hidden_state f32[images, 1 +
    /// patches, hidden]` after the last norm, and `pooler_output`, as far as there are such heads.
    fn classify<'g>(&self, g: &'g Builder<'g>) {
        let width = self.encoder.width;
        let shape = [Dim::symbol("images"), self.channels.into(), Dim::symbol("height"), Dim::symbol("width")];
        let pixels = g.input("pixel_values", DType::F32, shape);
        let w = g.weights("vit");
        let embeddings = w / "embeddings";
        let scope = g.scope(embeddings.path());
        let patches = nn::patch_embedding(g, embeddings / "patch_embeddings" / "projection", pixels, self.patch_size, width, true);
        let from = self.image_size / self.patch_size;
        let class = g.table(embeddings / "cls_token", &[1, 1, width]);
        let positions = g.reshape(g.table(embeddings / "position_embeddings", &[1, 1 + from * from, width]), [1 + from * from, width]);
        let mut x = nn::with_class_token(g, patches, class, positions, from);
        drop(scope);
        for i in 0..self.layers {
            x = self.encoder.layer(g, w / "encoder" / "layer" / i, x, Mask::Full, None);
        }
        let x = g.layer_norm(x, w / "layernorm", self.encoder.eps);
        let class = g.reshape(g.slice(x, 1, 0, 1), [Dim::symbol("images"), width.into()]);
        if let Some(classes) = self.classes {
            g.output("logits", g.linear_bias(class, g.weights("classifier"), classes));
        }
        g.output("last_hidden_state", x);
        if let Some(width) = self.pooler {
            g.output("pooler_output", g.unary(Unary::Tanh, g.linear_bias(class, w / "pooler" / "dense", width)));
        }
    }
}

fn lower(c: &Section<'_>, weights: &Weights<'_>, _: &SideFiles) -> Result<Lowered> {
    let labels = labels(c)?;
    let model = Config::new(c, weights, labels.len())?;
    Ok(Lowered {
        symbols: nn::picture_symbols(model.patch_size),
        graphs: vec![graph("classify", weights, |g| model.classify(g))?],
        task: Task::Classify { labels: if model.classes.is_some() { labels } else { vec![] } },
    })
}

/// Names of the classes, from `id2label`; without it there are `num_labels` of them, or 2.
fn labels(c: &Section<'_>) -> Result<Vec<String>> {
    let Some(named) = c.get::<Map<String, Value>>("id2label")?.filter(|m| !m.is_empty()) else {
        let count = c.opt_int("num_labels", 1..=1 << 24)?.unwrap_or(2);
        return Ok((0..count).map(|i| format!("LABEL_{i}")).collect());
    };
    let label = |i: usize| named.get(&i.to_string()).map(|v| v.as_str().map_or_else(|| v.to_string(), str::to_string));
    (0..named.len()).map(|i| label(i).ok_or_else(|| Error::config("id2label", format!("class {i} is missing")))).collect()
}

fn processor(_: &Section<'_>, files: &SideFiles) -> Result<Option<Processor>> {
    let defaults = images::Defaults {
        resize: Resize::Exact { height: 224, width: 224 },
        crop: None,
        resample: Resample::Bilinear,
        mean: images::HALF,
        std: images::HALF,
    };
    images::read(files, |c| images::standard(c, &defaults, 0))
}
