//! CLIP in the layout of OpenAI (`model.py` of openai/CLIP) and open_clip: a ViT or a modified ResNet, and no `config.json`; the
//! sizes follow from the tensors. Radford et al., 2021, arXiv 2103.00020. Reference: open_clip 3.3 `CLIP`, `ModifiedResNet`.

use super::{
    Architecture, Lowered, Preset, SideFiles,
    clip::{self, Pool, Text, TextNames, Vision, VisionNames},
    config::Section,
    decoder::{LAYERS, WIDTH},
    graph, images,
    nn::{self, Encoder, OPENAI_LAYER},
    symbol,
};
use crate::{Error, Result};
use serde_json::{Value, json};
use std::{borrow::Cow, collections::BTreeMap};
use vlmc_artifact::{
    CenterCrop, Processor, Resample, Resize, StandardProcessor, Task, TextRules,
    program::{Reduce, Unary},
};
use vlmc_ir::{Builder, DType, Dim, Val, W, Weights, ops::Mask};

pub(super) const ARCHITECTURE: Architecture = Architecture {
    model_types: &["clip_openai"],
    alias: "clip-openai",
    title: "CLIP (OpenAI's layout, with ResNets)",
    reference: "arXiv 2103.00020; openai/CLIP, open_clip CLIP",
    notes: "OpenAI's state dicts, which have no config: sizes follow from the shapes. The vision transformer with joint projections, and ModifiedResNet (RN50, RN101, RN50x4, x16, x64) with attention pooling and batch norms as scales and shifts. Safetensors, or `.pt` files including TorchScript archives; also open_clip repositories.",
    canonical_name: |name| Cow::Borrowed(name),
    ignored: |name| {
        matches!(name, "input_resolution" | "context_length" | "vocab_size" | "attn_mask") || name.ends_with(".num_batches_tracked")
    },
    // The published figures count no running statistics of norms.
    presets: &[
        preset!("clip-rn50", "timm/resnet50_clip.openai", 102_007_137, &RN50),
        preset!("clip-rn101", "timm/resnet101_clip.openai", 119_688_033, &Size { layers: &[3, 4, 23, 3], embed_dim: 512, ..RN50 }),
        preset!(
            "clip-rn50x4",
            "timm/resnet50x4_clip.openai",
            178_300_601,
            &Size { layers: &[4, 6, 10, 6], width: 80, image_size: 288, embed_dim: 640, text_width: 640, ..RN50 }
        ),
        preset!(
            "clip-rn50x16",
            "timm/resnet50x16_clip.openai",
            290_979_217,
            &Size { layers: &[6, 8, 18, 8], width: 96, image_size: 384, embed_dim: 768, text_width: 768, ..RN50 }
        ),
        preset!(
            "clip-rn50x64",
            "timm/resnet50x64_clip.openai",
            623_258_305,
            &Size { layers: &[3, 15, 36, 10], width: 128, image_size: 448, text_width: 1024, ..RN50 }
        ),
    ],
    lower,
    processor,
};

struct Size {
    layers: &'static [usize],
    width: usize,
    image_size: usize,
    embed_dim: usize,
    text_width: usize,
}

const RN50: Size = Size { layers: &[3, 4, 6, 3], width: 64, image_size: 224, embed_dim: 1024, text_width: 512 };

/// What [`inferred_config`] makes of the published file.
fn config(p: &Size) -> Value {
    json!({
        "model_type": MODEL_TYPE,
        "embed_dim": p.embed_dim,
        "quick_gelu": true,
        "vision_cfg": {"layers": p.layers, "width": p.width, "image_size": p.image_size},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": p.text_width, "heads": p.text_width / HEAD, "layers": 12}
    })
}

fn files(_: &Size) -> Vec<(&'static str, Value)> {
    vec![]
}

const MODEL_TYPE: &str = "clip_openai";
/// Width of an attention head in OpenAI's models.
const HEAD: usize = 64;
/// Pixels of a picture per position of a ResNet's last layer.
const REDUCTION: usize = 32;
const EPS: f64 = 1e-5;

/// The config of a state dict in this layout, in the form of `open_clip_config.json`, from the shapes of its tensors (`build_model`
/// of openai/CLIP) and what the file itself, if there is one, says of things that they do not tell. `None` if it is another layout.
///
/// # Errors
/// The file asks for a tower that is not supported.
pub(crate) fn inferred_config(shapes: &BTreeMap<&str, &[usize]>, open_clip: Option<&Value>) -> Result<Option<Value>> {
    let dim = |name: &str, axis: usize| shapes.get(name).and_then(|s| s.get(axis)).copied();
    let blocks = |prefix: &str| {
        let of = |name: &str| name.strip_prefix(prefix)?.split('.').next()?.parse::<usize>().ok();
        shapes.keys().filter_map(|n| of(n)).max().map_or(0, |n| n + 1)
    };
    let square = |count: Option<usize>| Some(count?.checked_sub(1)?.isqrt());
    let vision = || {
        Some(if let Some(patch) = dim("visual.conv1.weight", 2).filter(|_| shapes.contains_key("visual.proj")) {
            let image_size = patch.checked_mul(square(dim("visual.positional_embedding", 0))?)?;
            let layers = blocks("visual.transformer.resblocks.");
            json!({"layers": layers, "width": dim("visual.conv1.weight", 0)?, "image_size": image_size, "patch_size": patch})
        } else {
            let layers = [1, 2, 3, 4].map(|i| blocks(&format!("visual.layer{i}.")));
            let image_size = REDUCTION.checked_mul(square(dim("visual.attnpool.positional_embedding", 0))?)?;
            json!({"layers": layers, "width": dim("visual.layer1.0.conv1.weight", 0)?, "image_size": image_size})
        })
    };
    let text = || {
        let width = dim("ln_final.weight", 0)?;
        Some(json!({
            "context_length": dim("positional_embedding", 0)?, "vocab_size": dim("token_embedding.weight", 0)?, "width": width,
            "heads": (width / HEAD).max(1), "layers": blocks("transformer.resblocks.")
        }))
    };
    let (Some(mut vision), Some(mut text), Some(embed_dim)) = (vision(), text(), dim("text_projection", 1)) else { return Ok(None) };
    let mut config = json!({"model_type": MODEL_TYPE, "embed_dim": embed_dim, "quick_gelu": true});
    if let Some(file) = open_clip {
        let file = Section::root(file)?;
        let model = file.section_or_empty("model_cfg")?;
        // open_clip's own default differs from OpenAI's activation.
        config["quick_gelu"] = json!(model.get::<bool>("quick_gelu")?.unwrap_or(false));
        let (v, t) = (model.section_or_empty("vision_cfg")?, model.section_or_empty("text_cfg")?);
        for field in ["timm_model_name", "attentional_pool", "no_ln_pre", "final_ln_after_pool"] {
            v.only(field, &[json!(false), json!("")])?;
        }
        v.only("pool_type", &[json!("tok")])?;
        t.only("hf_model_name", &[json!("")])?;
        t.only("pool_type", &[json!("argmax")])?;
        t.only("no_causal_mask", &[json!(false)])?;
        if let Some(width) = v.opt_int("head_width", WIDTH)? {
            vision["head_width"] = json!(width);
        }
        if let Some(heads) = t.opt_int("heads", WIDTH)? {
            text["heads"] = json!(heads);
        }
        if let Some(preprocess) = file.get::<Value>("preprocess_cfg")? {
            config["preprocess_cfg"] = preprocess;
        }
    }
    config["vision_cfg"] = vision;
    config["text_cfg"] = text;
    Ok(Some(config))
}

const VISION_NAMES: VisionNames = VisionNames {
    class: "class_embedding",
    patches: "conv1",
    positions: "positional_embedding",
    norm_before: "ln_pre",
    layers: "transformer.resblocks",
    norm_after: "ln_post",
};
const TEXT_NAMES: TextNames =
    TextNames { tokens: "token_embedding", positions: "positional_embedding", layers: "transformer.resblocks", norm: "ln_final" };

/// The ResNet of CLIP: three convolutions before its layers, pooling instead of strides, attention instead of a mean at the end.
struct ResNet {
    layers: [usize; 4],
    width: usize,
    image_size: usize,
}

enum Tower {
    Vit(Vision),
    ResNet(ResNet),
}

impl Tower {
    fn new(c: &Section<'_>, act: Unary) -> Result<Self> {
        let (width, image_size) = (c.int("width", WIDTH)?, c.int("image_size", 1..=16384)?);
        if let Some(layers) = c.get::<Value>("layers")?.filter(Value::is_array) {
            let fail = |message: String| Error::config(c.path("layers"), message);
            let layers: [usize; 4] = serde_json::from_value(layers.clone()).map_err(|e| fail(format!("{layers}: {e}")))?;
            if layers.iter().any(|n| !LAYERS.contains(n)) {
                return Err(fail(format!("{layers:?} must be from {} to {}", LAYERS.start(), LAYERS.end())));
            }
            if !image_size.is_multiple_of(REDUCTION) {
                return Err(Error::config(c.path("image_size"), format!("{image_size} is not a multiple of {REDUCTION}")));
            }
            if !(width * 32).is_multiple_of(HEAD) {
                return Err(Error::config(c.path("width"), format!("{width} is odd")));
            }
            return Ok(Self::ResNet(ResNet { layers, width, image_size }));
        }
        let head = c.opt_int("head_width", WIDTH)?.unwrap_or(HEAD);
        if !width.is_multiple_of(head) {
            return Err(Error::config(c.path("width"), format!("{width} is not a multiple of the head width {head}")));
        }
        let (image_size, patch_size) = nn::square_grid(c, image_size, 32)?;
        Ok(Self::Vit(Vision {
            encoder: encoder(width, width / head, act),
            layers: c.int("layers", LAYERS)?,
            image_size,
            patch_size,
            channels: 3,
            names: VISION_NAMES,
        }))
    }
}

/// Layers of either transformer; the MLP is four times as wide.
fn encoder(width: usize, heads: usize, act: Unary) -> Encoder {
    Encoder { width, heads, mlp: 4 * width, eps: EPS, act, names: OPENAI_LAYER }
}

impl ResNet {
    /// The entry `image`: `pixel_values f32[images, 3, size, size]` to `image_embeds f32[images, embed]`, of length 1.
    fn image<'g>(&self, g: &'g Builder<'g>, w: W<'g>, embed_dim: usize) {
        let shape = [Dim::symbol("images"), 3.into(), self.image_size.into(), self.image_size.into()];
        let mut x = g.input("pixel_values", DType::F32, shape);
        let scope = g.scope(w.path());
        for (i, out, stride) in [(1, self.width / 2, 2), (2, self.width / 2, 1), (3, self.width, 1)] {
            x = relu(g, self.conv(g, x, w / format!("conv{i}"), w / format!("bn{i}"), [out, 3], stride));
        }
        x = average(g, x, 2);
        drop(scope);
        for (i, count) in self.layers.iter().enumerate() {
            let planes = self.width << i;
            for j in 0..*count {
                let stride = if i > 0 && j == 0 { 2 } else { 1 };
                x = self.bottleneck(g, w / format!("layer{}", i + 1) / j, x, planes, stride);
            }
        }
        let pooled = self.attention_pool(g, w / "attnpool", x, embed_dim);
        g.output("image_embeds", nn::normalized(g, pooled));
    }

    fn conv<'g>(&self, g: &'g Builder<'g>, x: Val<'g>, conv: W<'g>, bn: W<'g>, [out, side]: [usize; 2], stride: usize) -> Val<'g> {
        g.batch_norm(g.conv2d(x, conv, [out, side], stride, side / 2, false), bn, EPS)
    }

    /// Where a convolution would have a stride, the mean of as many pixels stands before the next one.
    fn bottleneck<'g>(&self, g: &'g Builder<'g>, w: W<'g>, x: Val<'g>, planes: usize, stride: usize) -> Val<'g> {
        let _scope = g.scope(w.path());
        let y = relu(g, self.conv(g, x, w / "conv1", w / "bn1", [planes, 1], 1));
        let y = relu(g, self.conv(g, y, w / "conv2", w / "bn2", [planes, 3], 1));
        let y = self.conv(g, average(g, y, stride), w / "conv3", w / "bn3", [4 * planes, 1], 1);
        let same = stride == 1 && x.dim(1) == (4 * planes).into();
        let shortcut =
            if same { x } else { self.conv(g, average(g, x, stride), w / "downsample" / 0, w / "downsample" / 1, [4 * planes, 1], 1) };
        relu(g, y + shortcut)
    }

    /// Attention of the mean over all positions to itself and them: `x f32[images, c, h, w]` to `f32[images, embed]`.
    fn attention_pool<'g>(&self, g: &'g Builder<'g>, w: W<'g>, x: Val<'g>, embed_dim: usize) -> Val<'g> {
        let _scope = g.scope(w.path());
        let (images, width) = (x.dim(0), self.width * 32);
        let side = self.image_size / REDUCTION;
        let x = g.transpose(g.reshape(x, [images.clone(), width.into(), (side * side).into()]), &[0, 2, 1]);
        let mean = g.unsqueeze(g.reduce(Reduce::Mean, x, &[1]), 1);
        let x = g.concat(&[mean, x], 1) + g.table(w / "positional_embedding", &[1 + side * side, width]);
        let project = |x: Val<'g>, name: &str| g.split_heads(g.linear_bias(x, w / name, width), width / HEAD);
        let (q, k, v) = (project(g.slice(x, 1, 0, 1), "q_proj"), project(x, "k_proj"), project(x, "v_proj"));
        let y = g.merge_heads(g.attention(q, k, v, 1.0 / (HEAD as f64).sqrt(), Mask::Full, None));
        g.linear_bias(g.reshape(y, [images, width.into()]), w / "c_proj", embed_dim)
    }
}

fn relu<'g>(g: &'g Builder<'g>, x: Val<'g>) -> Val<'g> {
    g.binary(vlmc_artifact::program::Binary::Max, x, g.literal(vlmc_ir::Literal::scalar(DType::F32, 0.0)))
}

/// Means of squares of `side` pixels, which divide the picture `x f32[n, c, h, w]`.
fn average<'g>(g: &'g Builder<'g>, x: Val<'g>, side: usize) -> Val<'g> {
    if side == 1 {
        return x;
    }
    let [n, c, h, w] = [0, 1, 2, 3].map(|i| x.dim(i));
    let (Some(h), Some(w)) = (h.exact_div(&side.into()), w.exact_div(&side.into())) else {
        return g.fail(format!("squares of {side} pixels do not divide {}", x.ty()));
    };
    let side = Dim::from(side);
    g.reduce(Reduce::Mean, g.reshape(x, [n, c, h, side.clone(), w, side]), &[3, 5])
}

fn lower(c: &Section<'_>, weights: &Weights<'_>, files: &SideFiles) -> Result<Lowered> {
    c.ignore(&["preprocess_cfg"]);
    let embed_dim = c.int("embed_dim", WIDTH)?;
    let act = if c.get("quick_gelu")?.unwrap_or(false) { Unary::QuickGelu } else { Unary::Gelu };
    let tower = Tower::new(&c.section_or_empty("vision_cfg")?, act)?;
    let t = c.section_or_empty("text_cfg")?;
    let (width, heads) = (t.int("width", WIDTH)?, t.int("heads", WIDTH)?);
    nn::head_dim(&t, "width", width, "heads", heads)?;
    let text = Text {
        encoder: encoder(width, heads, act),
        layers: t.int("layers", LAYERS)?,
        vocab_size: t.int("vocab_size", 1..=1 << 24)?,
        context: t.int("context_length", WIDTH)?,
        causal: true,
        pool: Pool::Largest,
        names: TEXT_NAMES,
    };
    // Both projections are stored the other way round.
    let image = graph("image", weights, |g| match &tower {
        Tower::Vit(vision) => vision.image(g, g.weights("visual"), |x| {
            g.linear_with(x, g.transposed(g.weights("visual.proj"), [vision.encoder.width, embed_dim]), None)
        }),
        Tower::ResNet(resnet) => resnet.image(g, g.weights("visual"), embed_dim),
    })?;
    let text_graph = graph("text", weights, |g| {
        let projection = g.transposed(g.weights("text_projection"), [width, embed_dim]);
        g.output("text_embeds", nn::normalized(g, g.linear_with(text.pooled(g, g.weights("")), projection, None)));
    })?;
    Ok(Lowered {
        symbols: match &tower {
            Tower::Vit(vision) => clip::symbols(vision.patch_size, text.context),
            Tower::ResNet(_) => vec![symbol("images", 1..=4096), symbol("texts", 1..=65536), symbol("seq", 1..=text.context)],
        },
        graphs: vec![image, text_graph, graph("score", weights, |g| clip::score(g, embed_dim, &[], false))?],
        task: Task::Contrast(TextRules {
            max_length: text.context,
            pad_to_max: false,
            pad_token_id: clip::pad_token_id(&t, files, 0)?,
            sigmoid: false,
        }),
    })
}

/// `image_transform` of open_clip, from `preprocess_cfg`.
fn processor(c: &Section<'_>, _: &SideFiles) -> Result<Option<Processor>> {
    let image_size = c.section_or_empty("vision_cfg")?.int("image_size", 1..=16384)?;
    let p = c.section_or_empty("preprocess_cfg")?;
    p.only("resize_mode", &[json!("shortest")])?;
    p.only("mode", &[json!("RGB")])?;
    let resample = match p.get::<String>("interpolation")?.as_deref() {
        None | Some("bicubic") => Resample::Bicubic,
        Some("bilinear") => Resample::Bilinear,
        Some(other) => {
            return Err(Error::config(p.path("interpolation"), format!("'{other}' is not supported; supported: bicubic, bilinear")));
        }
    };
    Ok(Some(Processor::Standard(StandardProcessor {
        resize: Some(Resize::ShortestEdge { edge: image_size }),
        crop: Some(CenterCrop { height: image_size, width: image_size, nearest_even: true }),
        resample,
        image_mean: p.get("mean")?.unwrap_or(images::CLIP_MEAN),
        image_std: p.get("std")?.unwrap_or(images::CLIP_STD),
        rescale_factor: 1.0 / 255.0,
        tokens: 0,
    })))
}
