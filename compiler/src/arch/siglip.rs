//! SigLIP (Zhai et al., 2023, arXiv 2303.15343) and SigLIP 2 (Tschannen et al., 2025, arXiv 2502.14786), whose checkpoints of
//! fixed size are SigLIP's; the others (NaFlex) take pictures of any shape. A pair of locked-image tuning (LiT, Zhai et al.,
//! 2022) is the same two towers. Reference: transformers `modeling_siglip.py`, `modeling_siglip2.py`.

use super::{
    Architecture, Lowered, Preset, SideFiles,
    clip::{self, Pool, TEXT_NAMES, Text},
    config::Section,
    decoder::{LAYERS, WIDTH},
    graph, images,
    nn::{self, Encoder},
    symbol,
};
use crate::{Error, Result};
use serde_json::{Value, json};
use std::borrow::Cow;
use vlmc_artifact::{
    NaflexProcessor, Processor, Resample, Resize, Task, TextRules,
    program::{Binary, Unary},
};
use vlmc_ir::{
    Builder, DType, Dim, Literal, Val, W, Weights,
    ops::{Filter, Mask},
};

pub(super) const SIGLIP: Architecture = Architecture {
    model_types: &["siglip"],
    alias: "siglip",
    title: "SigLIP, SigLIP 2 (fixed size)",
    reference: "arXiv 2303.15343, 2502.14786; transformers SiglipModel",
    notes: "SigLIP, and SigLIP 2 of fixed resolution: attention-pool head, sigmoid scores with scale and bias, padded texts that attend as they were trained. Other picture sizes by a stretched position table. A LiT-style pair is the same two towers.",
    canonical_name: |name| Cow::Borrowed(name),
    ignored: |name| name.ends_with(".position_ids"),
    presets: &[
        preset!("siglip-base-patch16-224", "google/siglip-base-patch16-224", 203_155_970, &BASE),
        preset!("siglip-base-patch16-256", "google/siglip-base-patch16-256", 203_202_050, &Size { image_size: 256, ..BASE }),
        preset!("siglip-base-patch16-384", "google/siglip-base-patch16-384", 203_447_810, &Size { image_size: 384, ..BASE }),
        preset!("siglip-base-patch16-512", "google/siglip-base-patch16-512", 203_791_874, &Size { image_size: 512, ..BASE }),
        preset!("siglip-large-patch16-256", "google/siglip-large-patch16-256", 652_150_786, &LARGE),
        preset!("siglip-large-patch16-384", "google/siglip-large-patch16-384", 652_478_466, &Size { image_size: 384, ..LARGE }),
        // 16, the length of its texts, is from memory.
        preset!(
            "siglip-so400m-patch14-224",
            "google/siglip-so400m-patch14-224",
            877_360_306,
            &Size { image_size: 224, text_context: 16, ..SO400M }
        ),
        preset!("siglip-so400m-patch14-384", "google/siglip-so400m-patch14-384", 877_960_498, &SO400M),
        preset!("siglip2-base-patch16-224", "google/siglip2-base-patch16-224", 375_187_970, &Size { vocab_size: GEMMA, ..BASE }),
        preset!(
            "siglip2-base-patch16-256",
            "google/siglip2-base-patch16-256",
            375_234_050,
            &Size { vocab_size: GEMMA, image_size: 256, ..BASE }
        ),
        preset!(
            "siglip2-base-patch16-384",
            "google/siglip2-base-patch16-384",
            375_479_810,
            &Size { vocab_size: GEMMA, image_size: 384, ..BASE }
        ),
        preset!(
            "siglip2-base-patch16-512",
            "google/siglip2-base-patch16-512",
            375_823_874,
            &Size { vocab_size: GEMMA, image_size: 512, ..BASE }
        ),
        preset!("siglip2-large-patch16-256", "google/siglip2-large-patch16-256", 881_526_786, &Size { vocab_size: GEMMA, ..LARGE }),
        preset!(
            "siglip2-large-patch16-384",
            "google/siglip2-large-patch16-384",
            881_854_466,
            &Size { vocab_size: GEMMA, image_size: 384, ..LARGE }
        ),
        preset!(
            "siglip2-so400m-patch14-224",
            "google/siglip2-so400m-patch14-224",
            1_135_463_602,
            &Size { vocab_size: GEMMA, image_size: 224, ..SO400M }
        ),
        preset!("siglip2-so400m-patch14-384", "google/siglip2-so400m-patch14-384", 1_136_008_498, &Size { vocab_size: GEMMA, ..SO400M }),
        preset!(
            "siglip2-so400m-patch16-256",
            "google/siglip2-so400m-patch16-256",
            1_135_670_962,
            &Size { vocab_size: GEMMA, image_size: 256, patch_size: 16, ..SO400M }
        ),
        preset!(
            "siglip2-so400m-patch16-384",
            "google/siglip2-so400m-patch16-384",
            1_136_039_602,
            &Size { vocab_size: GEMMA, patch_size: 16, ..SO400M }
        ),
        preset!(
            "siglip2-so400m-patch16-512",
            "google/siglip2-so400m-patch16-512",
            1_136_555_698,
            &Size { vocab_size: GEMMA, image_size: 512, patch_size: 16, ..SO400M }
        ),
    ],
    lower: lower_fixed,
    processor: processor_fixed,
};

pub(super) const SIGLIP2: Architecture = Architecture {
    model_types: &["siglip2"],
    alias: "siglip2",
    title: "SigLIP 2 (NaFlex)",
    reference: "arXiv 2502.14786; transformers Siglip2Model",
    notes: "NaFlex: pictures at their own aspect ratio in a budget of patches, the position table resized for each, padding masked in \
        the blocks and the head.",
    presets: &[
        preset!(
            "siglip2-base-patch16-naflex",
            "google/siglip2-base-patch16-naflex",
            375_234_050,
            &Size { naflex: true, vocab_size: GEMMA, ..BASE }
        ),
        preset!(
            "siglip2-so400m-patch16-naflex",
            "google/siglip2-so400m-patch16-naflex",
            1_135_670_962,
            &Size { naflex: true, vocab_size: GEMMA, patch_size: 16, ..SO400M }
        ),
    ],
    lower: lower_naflex,
    processor: processor_naflex,
    ..SIGLIP
};

/// Rows of the token table of SigLIP 2, whose tokenizer is Gemma's.
const GEMMA: usize = 256_000;

struct Size {
    /// Of both towers: width, layers, heads, MLP width.
    tower: [usize; 4],
    vocab_size: usize,
    text_context: usize,
    image_size: usize,
    patch_size: usize,
    naflex: bool,
}

const BASE: Size = Size { tower: [768, 12, 12, 3072], vocab_size: 32000, text_context: 64, image_size: 224, patch_size: 16, naflex: false };
const LARGE: Size = Size { tower: [1024, 24, 16, 4096], image_size: 256, ..BASE };
const SO400M: Size = Size { tower: [1152, 27, 16, 4304], image_size: 384, patch_size: 14, ..BASE };

/// `config.json` with what the one on the hub says or leaves to the defaults.
fn config(p: &Size) -> Value {
    let [width, layers, heads, mlp] = p.tower;
    let family = if p.naflex { "siglip2" } else { "siglip" };
    let mut vision = json!({
        "model_type": format!("{family}_vision_model"), "hidden_size": width, "intermediate_size": mlp,
        "num_hidden_layers": layers, "num_attention_heads": heads, "patch_size": p.patch_size
    });
    if p.naflex {
        vision["num_patches"] = json!(256);
    } else {
        vision["image_size"] = json!(p.image_size);
    }
    json!({
        "architectures": [if p.naflex { "Siglip2Model" } else { "SiglipModel" }],
        "initializer_factor": 1.0,
        "model_type": family,
        "text_config": {
            "model_type": format!("{family}_text_model"), "vocab_size": p.vocab_size, "hidden_size": width, "intermediate_size": mlp,
            "num_hidden_layers": layers, "num_attention_heads": heads, "max_position_embeddings": p.text_context
        },
        "torch_dtype": "float32",
        "vision_config": vision
    })
}

fn files(p: &Size) -> Vec<(&'static str, Value)> {
    let mut file = json!({"do_normalize": true, "do_rescale": true, "do_resize": true, "image_mean": images::HALF,
        "image_std": images::HALF, "rescale_factor": 1.0 / 255.0});
    if p.naflex {
        for (name, value) in [
            ("image_processor_type", json!("Siglip2ImageProcessor")),
            ("max_num_patches", json!(256)),
            ("patch_size", json!(p.patch_size)),
            ("resample", json!(2)),
        ] {
            file[name] = value;
        }
    } else {
        file["image_processor_type"] = json!("SiglipImageProcessor");
        file["resample"] = json!(if p.vocab_size == GEMMA { 2 } else { 3 });
        file["size"] = json!({"height": p.image_size, "width": p.image_size});
    }
    vec![("preprocessor_config.json", file)]
}

/// Layers of either tower.
fn encoder(c: &Section<'_>) -> Result<Encoder> {
    clip::encoder(c, [768, 12, 3072], Unary::GeluTanh, 1e-6)
}

/// The image tower after its embeddings.
struct Vision {
    encoder: Encoder,
    layers: usize,
    channels: usize,
    patch_size: usize,
}

impl Vision {
    fn new(c: &Section<'_>, patch_size: usize) -> Result<Self> {
        c.only("vision_use_head", &[json!(true)])?;
        Ok(Self {
            encoder: encoder(c)?,
            layers: c.opt_int("num_hidden_layers", LAYERS)?.unwrap_or(12),
            channels: c.opt_int("num_channels", 1..=64)?.unwrap_or(3),
            patch_size,
        })
    }

    /// Embedded patches `x f32[images, patches, width]` to `image_embeds f32[images, width]`, of length 1, and
    /// `vision_pooler_output`, the same of any length. `live bool[images, 1, 1, patches]` tells patches from padding.
    fn image<'g>(&self, g: &'g Builder<'g>, w: W<'g>, mut x: Val<'g>, live: Option<Val<'g>>) {
        let kind = if live.is_some() { Mask::Given } else { Mask::Full };
        for i in 0..self.layers {
            x = self.encoder.layer(g, w / "encoder" / "layers" / i, x, kind, live);
        }
        let x = g.layer_norm(x, w / "post_layernorm", self.encoder.eps);
        let pooled = self.attention_pool(g, w / "head", x, kind, live);
        g.output("image_embeds", nn::normalized(g, pooled));
        g.output("vision_pooler_output", pooled);
    }

    /// A learned query looks at all patches.
    fn attention_pool<'g>(&self, g: &'g Builder<'g>, w: W<'g>, x: Val<'g>, kind: Mask, live: Option<Val<'g>>) -> Val<'g> {
        let _scope = g.scope(w.path());
        let Encoder { width, heads, mlp, eps, act, .. } = self.encoder;
        let images = x.dim(0);
        let probe = g.table(w / "probe", &[1, 1, width]);
        let attention = w / "attention";
        let q = g.broadcast(nn::in_proj(g, attention, probe, width, 0..1), vec![images.clone(), 1.into(), width.into()]);
        let kv = nn::in_proj(g, attention, x, width, 1..3);
        let [q, k, v] = [q, g.slice(kv, 2, 0, width), g.slice(kv, 2, width, width)].map(|x| g.split_heads(x, heads));
        let y = g.attention(q, k, v, 1.0 / ((width / heads) as f64).sqrt(), kind, live);
        let y = g.linear_bias(g.merge_heads(y), attention / "out_proj", width);
        let h = g.layer_norm(y, w / "layernorm", eps);
        let y = y + g.linear_bias(g.unary(act, g.linear_bias(h, w / "mlp" / "fc1", mlp)), w / "mlp" / "fc2", width);
        g.reshape(y, [images, width.into()])
    }
}

/// The entries `text` and `score` and the rules of texts, with the entry `image` before them.
fn pair(c: &Section<'_>, weights: &Weights<'_>, files: &SideFiles, image: vlmc_ir::Graph, width: usize) -> Result<Lowered> {
    let t = c.section_or_empty("text_config")?;
    let text = Text {
        encoder: encoder(&t)?,
        layers: t.opt_int("num_hidden_layers", LAYERS)?.unwrap_or(12),
        vocab_size: t.opt_int("vocab_size", 1..=1 << 24)?.unwrap_or(32000),
        context: t.opt_int("max_position_embeddings", WIDTH)?.unwrap_or(64),
        causal: false,
        pool: Pool::Last,
        names: TEXT_NAMES,
    };
    let embed = t.opt_int("projection_size", WIDTH)?.unwrap_or(text.encoder.width);
    if embed != width {
        let message = format!("{embed} (width of the texts' embeddings) must equal that of the pictures', {width}");
        return Err(Error::config(t.path("projection_size"), message));
    }
    let text_graph = graph("text", weights, |g| {
        let w = g.weights("text_model");
        let pooled = g.linear_bias(text.pooled(g, w), w / "head", embed);
        g.output("text_embeds", nn::normalized(g, pooled));
        g.output("text_pooler_output", pooled);
    })?;
    Ok(Lowered {
        symbols: vec![],
        graphs: vec![image, text_graph, graph("score", weights, |g| clip::score(g, embed, &[1], true))?],
        task: Task::Contrast(TextRules {
            max_length: text.context,
            pad_to_max: true,
            pad_token_id: clip::pad_token_id(&t, files, 1)?,
            sigmoid: true,
        }),
    })
}

fn lower_fixed(c: &Section<'_>, weights: &Weights<'_>, files: &SideFiles) -> Result<Lowered> {
    let v = c.section_or_empty("vision_config")?;
    let (image_size, patch_size) = nn::square_grid(&v, 224, 16)?;
    let vision = Vision::new(&v, patch_size)?;
    let width = vision.encoder.width;
    let image = graph("image", weights, |g| {
        let w = g.weights("vision_model");
        let embeddings = w / "embeddings";
        let shape = [Dim::symbol("images"), vision.channels.into(), Dim::symbol("height"), Dim::symbol("width")];
        let pixels = g.input("pixel_values", DType::F32, shape);
        let scope = g.scope(embeddings.path());
        let (x, rows, columns) = nn::patch_embedding(g, embeddings / "patch_embedding", pixels, patch_size, width, true);
        let side = image_size / patch_size;
        let table = g.table(embeddings / "position_embedding" / "weight", &[side * side, width]);
        let x = x + nn::resized_positions(g, table, side, &rows, &columns, Filter::Bicubic);
        drop(scope);
        vision.image(g, w, x, None);
    })?;
    let mut lowered = pair(c, weights, files, image, width)?;
    lowered.symbols = clip::symbols(patch_size, context(&lowered.task));
    Ok(lowered)
}

fn lower_naflex(c: &Section<'_>, weights: &Weights<'_>, files: &SideFiles) -> Result<Lowered> {
    let v = c.section_or_empty("vision_config")?;
    let vision = Vision::new(&v, v.opt_int("patch_size", 1..=1024)?.unwrap_or(16))?;
    let count = v.opt_int("num_patches", WIDTH)?.unwrap_or(256);
    let side = count.isqrt();
    if side * side != count {
        return Err(Error::config(v.path("num_patches"), format!("{count} is not a square")));
    }
    let width = vision.encoder.width;
    let image = graph("image", weights, |g| {
        let [images, patches] = ["images", "patches"].map(Dim::symbol);
        let pixels = vision.channels * vision.patch_size * vision.patch_size;
        let pixels = g.input("pixel_values", DType::F32, [images.clone(), patches.clone(), pixels.into()]);
        let mask = g.input("pixel_attention_mask", DType::I64, [images.clone(), patches.clone()]);
        let shapes = g.input("spatial_shapes", DType::I64, [images.clone(), 2.into()]);
        let w = g.weights("vision_model");
        let embeddings = w / "embeddings";
        let scope = g.scope(embeddings.path());
        let table = g.table(embeddings / "position_embedding" / "weight", &[count, width]);
        let x = g.linear_bias(pixels, embeddings / "patch_embedding", width) + positions(g, table, side, shapes, &patches);
        let live = g.reshape(g.cast(mask, DType::Bool), [images, 1.into(), 1.into(), patches]);
        drop(scope);
        vision.image(g, w, x, Some(live));
    })?;
    let mut lowered = pair(c, weights, files, image, width)?;
    lowered.symbols = vec![
        symbol("images", 1..=4096),
        symbol("patches", 1..=65536),
        symbol("texts", 1..=65536),
        symbol("seq", 1..=context(&lowered.task)),
    ];
    Ok(lowered)
}

fn context(task: &Task) -> usize {
    if let Task::Contrast(rules) = task { rules.max_length } else { 1 }
}

/// The table `f32[side², width]` resized to each picture's rows and columns of patches, `shapes i64[images, 2]`: `f32[images,
/// patches, width]`. Patches of padding get the first position.
fn positions<'g>(g: &'g Builder<'g>, table: Val<'g>, side: usize, shapes: Val<'g>, patches: &Dim) -> Val<'g> {
    let images = shapes.dim(0);
    let size = |axis: usize| g.reshape(g.slice(shapes, 1, axis, 1), [images.clone()]);
    let (rows, columns) = (size(0), size(1));
    let index = g.unsqueeze(g.iota(patches.clone()), 0);
    let inside = g.binary(Binary::Lt, index, g.unsqueeze(rows * columns, 1));
    // Position of each patch, and where its row's and column's weights stand.
    let index = g.select(inside, index, g.literal(Literal::scalar(DType::I64, 0.0)));
    let columns_of = g.unsqueeze(columns, 1);
    let first = g.unsqueeze(g.iota(images.clone()) * g.dim(patches.clone()), 1);
    let weights = |size: Val<'g>, at: Val<'g>| {
        let all = g.resize_weights(size, patches.clone(), side, Filter::BilinearAntialias);
        g.gather(g.reshape(all, [&images * patches, side.into()]), at + first, 0)
    };
    let down = weights(rows, index / columns_of);
    let across = weights(columns, g.binary(Binary::Mod, index, columns_of));
    // Both at once, as a matrix over the whole table.
    let both = g.unsqueeze(down, 3) * g.unsqueeze(across, 2);
    g.matmul(g.reshape(both, [images, patches.clone(), (side * side).into()]), table)
}

fn processor_fixed(_: &Section<'_>, files: &SideFiles) -> Result<Option<Processor>> {
    let defaults = images::Defaults {
        resize: Resize::Exact { height: 224, width: 224 },
        crop: None,
        resample: Resample::Bicubic,
        mean: images::HALF,
        std: images::HALF,
    };
    images::read(files, |c| images::standard(c, &defaults, 0))
}

fn processor_naflex(_: &Section<'_>, files: &SideFiles) -> Result<Option<Processor>> {
    images::read(files, |c| {
        c.only("do_resize", &[json!(true)])?;
        let (image_mean, image_std) = images::statistics(c, images::HALF, images::HALF)?;
        Ok(Processor::Naflex(NaflexProcessor {
            patch_size: c.opt_int("patch_size", 1..=1024)?.unwrap_or(16),
            max_num_patches: c.opt_int("max_num_patches", 1..=65536)?.unwrap_or(256),
            resample: images::resample(c, Resample::Bilinear)?,
            image_mean,
            image_std,
            rescale_factor: images::rescale_factor(c)?,
        }))
    })
}
