//! DeepSeek-VL (Lu et al., 2024, arXiv 2403.05525), with SigLIP alone or with SAM beside it, in its own layout and in that of
//! transformers. References: `deepseek_vl` of github.com/deepseek-ai/DeepSeek-VL; transformers `modeling_deepseek_vl.py` and
//! `modeling_deepseek_vl_hybrid.py`.

use super::{
    Architecture, Lowered, Preset, SideFiles,
    config::Section,
    decoder::{Decoder, LLAMA, WIDTH},
    graph, nn,
    sam::{self, Sam},
    symbol,
    timm::{self, Tower},
};
use crate::{Error, Result};
use serde_json::{Value, json};
use std::borrow::Cow;
use vlmc_artifact::{DeepseekVlProcessor, DeepseekVlView, Processor, PromptRules, Resample, Task, program::Unary};
use vlmc_ir::{Builder, Dim, Val, W, Weights, ops::Filter};

pub(super) const ARCHITECTURE: Architecture = Architecture {
    model_types: &["multi_modality", "deepseek_vl", "deepseek_vl_hybrid"],
    alias: "deepseek-vl",
    title: "DeepSeek-VL",
    reference: "arXiv 2403.05525; github.com/deepseek-ai/DeepSeek-VL; transformers DeepseekVLForConditionalGeneration, DeepseekVLHybridForConditionalGeneration",
    notes: "SigLIP-L alone (1.3B) or beside SAM-B (7B): windowed and global attention with decomposed relative positions, both necks, \
        the bilinear resize and the normalisation that the official hybrid model does inside. Official layout, and that of transformers \
        with its two inputs. Sizes come from the model's name in the config, or from `params`.",
    canonical_name,
    ignored: |name| {
        let unused = ["vision_model.vision_tower.attn_pool.", "vision_model.high_layer_norm.", "vision_model.low_layer_norm."];
        unused.iter().any(|prefix| name.starts_with(prefix)) || name.ends_with("rotary_emb.inv_freq")
    },
    // Without SigLIP's pooling (12.6 M), which published files have and nothing uses. With it, 7.34 B is the published figure for the
    // larger model; for the smaller one none could be confirmed.
    presets: &[
        Preset {
            name: "deepseek-vl-1.3b",
            hub: "deepseek-ai/deepseek-vl-1.3b-chat",
            parameters: 1_943_766_016,
            config: || config(false),
            files: || files(false),
        },
        Preset {
            name: "deepseek-vl-7b",
            hub: "deepseek-ai/deepseek-vl-7b-chat",
            parameters: 7_331_390_721,
            config: || config(true),
            files: || files(true),
        },
    ],
    lower,
    processor,
};

/// OpenAI CLIP's statistics.
const CLIP_MEAN: [f64; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
const CLIP_STD: [f64; 3] = [0.268_629_54, 0.261_302_58, 0.275_777_11];

/// `config.json` as published on the hub, of the 1.3B model or the hybrid one of 7B. The language configs leave most fields to the
/// defaults of Llama's.
fn config(hybrid: bool) -> Value {
    let low = |params: Value| {
        let mut low = json!({"image_size": 384, "model_name": "siglip_large_patch16_384", "select_feature": "same", "select_layer": -1});
        if let (Some(low), Some(params)) = (low.as_object_mut(), params.as_object()) {
            low.extend(params.clone());
        }
        low
    };
    let (vision, aligner, language) = if hybrid {
        let high = json!({"ckpt_path": "", "image_size": 1024, "model_name": "sam_b_downsample", "output_dim": 1024, "pixel_mean": CLIP_MEAN,
            "pixel_std": CLIP_STD, "select_feature": "same", "select_layer": -1});
        let low = low(json!({"ckpt_path": "", "output_dim": 1024, "pixel_mean": [0.5, 0.5, 0.5], "pixel_std": [0.5, 0.5, 0.5]}));
        (
            json!({"cls": "HybridVisionTower", "model_type": "vision", "params": {"concat_type": "tuple", "freeze_high": true,
                "freeze_low": true, "high_res_cfg": high, "low_res_cfg": low}}),
            json!({"depth": 2, "input_dim": 1024, "n_embed": 4096, "projector_type": "low_high_hybrid_split_mlp_gelu"}),
            json!({"max_position_embeddings": 16384, "model_type": "llama", "num_hidden_layers": 30, "torch_dtype": "float16",
                "vocab_size": 102_400}),
        )
    } else {
        (
            json!({"cls": "CLIPVisionTower", "model_type": "vision", "params": low(json!({}))}),
            json!({"depth": 2, "input_dim": 1024, "n_embed": 2048, "projector_type": "mlp_gelu"}),
            json!({"hidden_size": 2048, "intermediate_size": 5504, "max_position_embeddings": 16384, "model_type": "llama",
                "num_attention_heads": 16, "num_hidden_layers": 24, "num_key_value_heads": 16, "torch_dtype": "float16", "vocab_size": 102_400}),
        )
    };
    json!({
        "aligner_config": {"cls": "MlpProjector", "model_type": "aligner", "params": aligner},
        "architectures": ["MultiModalityCausalLM"],
        "language_config": language,
        "model_type": "multi_modality",
        "torch_dtype": "float16",
        "transformers_version": "4.38.2",
        "vision_config": vision
    })
}

/// Special tokens of a synthetic tokenizer in their published places, from id 100000 on.
const SPECIALS: [&str; 16] = [
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<extra_2>",
    "<extra_3>",
    "<extra_4>",
    "<extra_5>",
    "<extra_6>",
    "<extra_7>",
    "<extra_8>",
    "<extra_9>",
    "<extra_10>",
    "<extra_11>",
    "<extra_12>",
    "<extra_13>",
    "<extra_14>",
    IMAGE_TOKEN,
];

/// The other files of a synthetic checkpoint.
fn files(hybrid: bool) -> Vec<(&'static str, Value)> {
    let half = [0.5; 3];
    let (mean, std) = if hybrid { (CLIP_MEAN, CLIP_STD) } else { (half, half) };
    vec![
        ("generation_config.json", json!({"bos_token_id": 100_000, "eos_token_id": 100_001})),
        (
            "preprocessor_config.json",
            json!({"background_color": mean.map(|m| (m * 255.0) as u8), "do_normalize": !hybrid, "image_mean": mean, "image_std": std,
                "image_processor_type": "VLMImageProcessor", "image_size": if hybrid { 1024 } else { 384 }, "min_size": 14,
                "processor_class": "VLChatProcessor", "rescale_factor": 1.0 / 255.0}),
        ),
        (
            "processor_config.json",
            json!({"add_special_token": false, "ignore_id": -100, "image_tag": IMAGE_TOKEN, "mask_prompt": true, "num_image_tokens": 576,
                "processor_class": "VLChatProcessor", "sft_format": "deepseek"}),
        ),
        ("tokenizer.json", crate::synth::tokenizer(100_000, &SPECIALS)),
        (
            "tokenizer_config.json",
            json!({"bos_token": SPECIALS[0], "eos_token": SPECIALS[1], "pad_token": null, "model_max_length": 16384,
                "tokenizer_class": "LlamaTokenizer"}),
        ),
    ]
}

/// Placeholder of a picture, unless the processor has another.
const IMAGE_TOKEN: &str = "<image_placeholder>";
/// Its id in the published vocabulary.
const IMAGE_TOKEN_ID: i64 = 100_015;

const SYSTEM: &str = "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, \
                      and assist the user with a variety of tasks using natural language.";

/// The format `deepseek` of the references' `conversation.py`, which published checkpoints have no chat template for.
pub(super) fn template(system: &str, user: &str, assistant: &str, image: &str) -> String {
    let text = "\
{%- if '@SYSTEM@' and (not messages or messages[0]['role'] != 'system') -%}{{- '@SYSTEM@\\n\\n' -}}{%- endif -%}
{%- for message in messages -%}
{%- set text -%}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '@IMAGE@' -}}{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endset -%}
{%- if message['role'] == 'system' -%}{%- if text | trim -%}{{- text | trim ~ '\\n\\n' -}}{%- endif -%}
{%- elif message['role'] == 'user' -%}{{- '@USER@: ' ~ text | trim ~ '\\n\\n' -}}
{%- else -%}{{- '@ASSISTANT@: ' ~ text | trim ~ eos_token -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '@ASSISTANT@:' -}}{%- endif -%}
";
    [("@SYSTEM@", system), ("@USER@", user), ("@ASSISTANT@", assistant), ("@IMAGE@", image)]
        .iter()
        .fold(text.to_string(), |text, (slot, value)| text.replace(slot, value))
}

/// Names of transformers become official ones, and SigLIP stands under one path, alone or beside SAM.
fn canonical_name(name: &str) -> Cow<'_, str> {
    /// What parts of a name become.
    type Parts = &'static [(&'static str, &'static str)];
    const LOW: &str = "vision_model.vision_tower.";
    const HIGH: &str = "vision_model.vision_tower_high.vision_tower.";
    const CONVOLUTIONS: Parts = &[("conv1.", "0."), ("layer_norm1.", "1."), ("conv2.", "2."), ("layer_norm2.", "3.")];
    const RENAMED: &[(&str, &str, Parts)] = &[
        ("vision_model.vision_tower_low.vision_tower.", LOW, &[]),
        ("lm_head.", "language_model.lm_head.", &[]),
        ("model.language_model.", "language_model.model.", &[]),
        (
            "model.aligner.",
            "aligner.",
            &[
                ("linear1.", "layers.0."),
                ("linear2.", "layers.2."),
                ("high_res_vision_proj.", "high_up_proj."),
                ("vision_proj.", "low_up_proj."),
                ("proj.", "layers.1."),
            ],
        ),
        ("model.high_res_vision_model.vision_encoder.neck.", "vision_model.vision_tower_high.vision_tower.neck.", CONVOLUTIONS),
        ("model.high_res_vision_neck.", "vision_model.vision_tower_high.vision_tower.neck_hd.", CONVOLUTIONS),
        ("model.high_res_vision_proj.", "vision_model.vision_tower_high.vision_tower.downsamples.", &[("conv1.", "0."), ("conv2.", "1.")]),
        ("model.high_res_vision_alpha", "vision_model.vision_tower_high.vision_tower.hd_alpha_downsamples", &[]),
        (
            "model.high_res_vision_model.vision_encoder.patch_embed.projection.",
            "vision_model.vision_tower_high.vision_tower.patch_embed.proj.",
            &[],
        ),
    ];
    for (from, to, parts) in RENAMED {
        if let Some(rest) = name.strip_prefix(from) {
            let part = parts.iter().find_map(|(a, b)| Some(format!("{b}{}", rest.strip_prefix(a)?)));
            return format!("{to}{}", part.as_deref().unwrap_or(rest)).into();
        }
    }
    // Layers have their number in the middle.
    let layers = |rest: &str, parts: &[(&str, &str)]| {
        let renamed = parts.iter().fold(format!(".{rest}"), |name, (a, b)| name.replace(a, b));
        renamed[1..].to_string()
    };
    if let Some(rest) = name.strip_prefix("model.high_res_vision_model.vision_encoder.") {
        return format!("{HIGH}{}", layers(rest, &[(".layers.", ".blocks."), (".layer_norm", ".norm")])).into();
    }
    if let Some(rest) = name.strip_prefix("model.vision_model.") {
        const PARTS: Parts = &[
            (".embeddings.patch_embedding.", ".patch_embed.proj."),
            (".embeddings.position_embedding.weight", ".pos_embed"),
            (".encoder.layers.", ".blocks."),
            (".self_attn.out_proj.", ".attn.proj."),
            (".self_attn.", ".attn."),
            (".post_layernorm.", ".norm."),
            (".layer_norm", ".norm"),
            (".head.", ".attn_pool."),
        ];
        return format!("{LOW}{}", layers(rest.strip_prefix("vision_model.").unwrap_or(rest), PARTS)).into();
    }
    name.into()
}

/// Mean and deviation of channels.
type Statistics = [[f64; 3]; 2];

/// The towers, and how the model takes pictures.
struct Vision {
    low: Tower,
    high: Option<Sam>,
    /// How the graph resizes and normalises: the official hybrid model takes pictures in the larger size with values from 0 to 1.
    inside: Option<Inside>,
}

/// What happens to pictures inside of the model.
struct Inside {
    low: Option<Statistics>,
    high: Option<Statistics>,
}

impl Vision {
    fn new(c: &Section<'_>) -> Result<Self> {
        if c.require::<String>("model_type")? != "multi_modality" {
            let vision = c.require_section("vision_config")?;
            vision.only("num_channels", &[json!(3)])?;
            vision.without_effect(&["vision_use_head"]);
            let high = if c.require::<String>("model_type")? == "deepseek_vl_hybrid" {
                Some(Sam::transformers(&c.require_section("high_res_vision_config")?)?)
            } else {
                None
            };
            return Ok(Self { low: Tower::transformers(&vision)?, high, inside: None });
        }
        let vision = c.require_section("vision_config")?;
        let tower = vision.require_section("params")?;
        match vision.get::<String>("cls")?.as_deref() {
            Some("CLIPVisionTower") => {
                let inside = statistics(&tower)?.map(|low| Inside { low: Some(low), high: None });
                Ok(Self { low: official_tower(&tower)?, high: None, inside })
            }
            Some("HybridVisionTower") => {
                tower.only("concat_type", &[json!("tuple")])?;
                tower.without_effect(&["freeze_high", "freeze_low"]);
                let (low, high) = (tower.require_section("low_res_cfg")?, tower.require_section("high_res_cfg")?);
                let inside = Inside { low: statistics(&low)?, high: statistics(&high)? };
                Ok(Self { low: official_tower(&low)?, high: Some(Sam::new(&high)?), inside: Some(inside) })
            }
            other => {
                let message = format!("{other:?} is not supported; supported: CLIPVisionTower, HybridVisionTower");
                Err(Error::config(vision.path("cls"), message))
            }
        }
    }

    /// Pixels per side of a picture as the processor gives it, or the larger of two.
    fn image_size(&self) -> usize {
        self.high.as_ref().map_or(self.low.image_size, |high| high.image_size)
    }

    /// Features of pictures: SigLIP's and, beside it, SAM's.
    fn apply<'g>(&self, g: &'g Builder<'g>) -> (Val<'g>, Option<Val<'g>>) {
        let (low, images) = (g.weights("vision_model.vision_tower"), Dim::symbol("images"));
        let Some(sam) = &self.high else {
            let pixels = self.low.input(g, "pixel_values", &[images]);
            return (self.low.apply(g, low, normalized(g, pixels, self.inside.as_ref().and_then(|i| i.low))), None);
        };
        let high = g.weights("vision_model.vision_tower_high.vision_tower");
        let (low_pixels, high_pixels) = match &self.inside {
            None => {
                let low = self.low.input(g, "pixel_values", std::slice::from_ref(&images));
                (low, sam.input(g, "high_res_pixel_values", images))
            }
            Some(inside) => {
                let pixels = sam.input(g, "pixel_values", images);
                let small = sam::resized(g, pixels, self.low.image_size, Filter::BilinearAntialias);
                (normalized(g, small, inside.low), normalized(g, pixels, inside.high))
            }
        };
        (self.low.apply(g, low, low_pixels), Some(sam.apply(g, high, high_pixels, self.low.grid())))
    }
}

/// A `CLIPVisionTower` of the official layout, whose sizes follow from its name.
fn official_tower(c: &Section<'_>) -> Result<Tower> {
    let sizes = match c.get::<String>("model_name")?.as_deref() {
        None | Some("siglip_large_patch16_384") => timm::LARGE,
        Some("siglip_so400m_patch14_384" | "siglip_so400m_patch14_224") => timm::SO400M,
        Some(other) => {
            let message = format!("'{other}' is not supported; supported: siglip_large_patch16_384, siglip_so400m_patch14_384");
            return Err(Error::config(c.path("model_name"), message));
        }
    };
    c.without_effect(&["ckpt_path", "output_dim", "select_feature"]);
    // The class leaves out the last layer unless told otherwise.
    Tower::new(c, &sizes, Unary::Gelu)?.cut_to(c, c.get("select_layer")?.unwrap_or(-2))
}

fn statistics(c: &Section<'_>) -> Result<Option<Statistics>> {
    let (mean, std) = (c.get::<[f64; 3]>("pixel_mean")?, c.get::<[f64; 3]>("pixel_std")?);
    if let Some(std) = std.filter(|std| std.iter().any(|s| *s <= 0.0)) {
        return Err(Error::config(c.path("pixel_std"), format!("{std:?} must be above 0")));
    }
    Ok(mean.zip(std).map(|(mean, std)| [mean, std]))
}

fn normalized<'g>(g: &'g Builder<'g>, pixels: Val<'g>, statistics: Option<Statistics>) -> Val<'g> {
    let Some(statistics) = statistics else { return pixels };
    let [mean, std] = statistics.map(|v| g.reshape(g.floats(v), [3, 1, 1]));
    (pixels - mean) / std
}

/// From the towers' features to the decoder's.
struct Aligner {
    depth: usize,
    out: usize,
}

impl Aligner {
    fn new(c: &Section<'_>, vision: &Vision, hidden_size: usize) -> Result<Self> {
        let depth = match c.section("aligner_config")? {
            // As transformers has it.
            None => 2,
            Some(aligner) => {
                let p = aligner.require_section("params")?;
                aligner.without_effect(&["cls"]);
                let kind = if vision.high.is_some() { "low_high_hybrid_split_mlp_gelu" } else { "mlp_gelu" };
                p.only("projector_type", &[json!(kind)])?;
                let widths = [
                    ("input_dim", Some(vision.low.width())),
                    ("input_dim", vision.high.as_ref().map(Sam::out)),
                    ("n_embed", Some(hidden_size)),
                ];
                for (field, width) in widths {
                    if let Some(width) = width.filter(|w| !matches!(p.opt_int(field, WIDTH), Ok(Some(have)) if have == *w)) {
                        return Err(Error::config(p.path(field), format!("must be {width}, a width of the model's other parts")));
                    }
                }
                p.opt_int("depth", 1..=64)?.unwrap_or(1)
            }
        };
        if vision.high.is_some() && !hidden_size.is_multiple_of(2) {
            return Err(Error::config("hidden_size", format!("{hidden_size} is odd: the two towers have a half each")));
        }
        Ok(Self { depth, out: hidden_size })
    }

    fn apply<'g>(&self, g: &'g Builder<'g>, w: W<'g>, low: Val<'g>, high: Option<Val<'g>>) -> Val<'g> {
        let _scope = g.scope(w.path());
        let (first, mut x) = match high {
            None => (2, g.linear_bias(low, w / "layers" / 0, self.out)),
            Some(high) => {
                let half = |x: Val<'g>, name: &str| g.linear_bias(x, w / name, self.out / 2);
                (1, g.concat(&[half(high, "high_up_proj"), half(low, "low_up_proj")], 2))
            }
        };
        for i in 1..self.depth {
            x = g.linear_bias(g.unary(Unary::Gelu, x), w / "layers" / (first + 2 * (i - 1)), self.out);
        }
        x
    }
}

fn language(c: &Section<'_>) -> Result<Decoder> {
    let name = if c.require::<String>("model_type")? == "multi_modality" { "language_config" } else { "text_config" };
    let language = c.require_section(name)?;
    language.only("model_type", &[json!("llama")])?;
    language.only("attention_bias", &[json!(false)])?;
    language.only("mlp_bias", &[json!(false)])?;
    Decoder::new(&language, Some(&LLAMA))
}

fn lower(c: &Section<'_>, weights: &Weights<'_>, files: &SideFiles) -> Result<Lowered> {
    let text = language(c)?;
    let vision = Vision::new(c)?;
    let aligner = Aligner::new(c, &vision, text.hidden_size)?;
    let vision_graph = graph("vision", weights, |g| {
        let (low, high) = vision.apply(g);
        g.output("image_features", aligner.apply(g, g.weights("aligner"), low, high));
    })?;
    let size = [text.vocab_size, text.hidden_size];
    let embed_graph = graph("embed", weights, |g| nn::embed_masked(g, g.weights("language_model.model.embed_tokens"), size))?;
    let tied =
        !weights.contains("language_model.lm_head.weight").unwrap_or(!c.get("tie_word_embeddings")?.unwrap_or(text.tie_word_embeddings));
    let head = if tied { "language_model.model.embed_tokens" } else { "language_model.lm_head" };
    let decoder_graph = graph("decoder", weights, |g| text.graph(g, g.weights("language_model.model"), g.weights(head)))?;

    let context = text.max_position_embeddings;
    let mut symbols = nn::decoder_symbols(context);
    symbols.push(symbol("images", 1..=context));
    let image_token = files.processor.as_ref().and_then(|p| p.get("image_tag")?.as_str()).unwrap_or(IMAGE_TOKEN);
    Ok(Lowered {
        symbols,
        graphs: vec![vision_graph, embed_graph, decoder_graph],
        task: Task::Generate(PromptRules {
            image_token_id: c.get("image_token_id")?.or(files.token_id(image_token)).or(Some(IMAGE_TOKEN_ID)),
            video_token_id: None,
            hidden_size: text.hidden_size,
            vocab_size: text.vocab_size,
            max_positions: context,
            positions: vlmc_artifact::Positions::Sequential,
            tile_side: None,
            template: Some(template(SYSTEM, "User", "Assistant", image_token)),
        }),
    })
}

fn processor(c: &Section<'_>, files: &SideFiles) -> Result<Option<Processor>> {
    let Some(file) = &files.preprocessor else { return Ok(None) };
    let vision = Vision::new(c)?;
    let official = c.require::<String>("model_type")? == "multi_modality";
    let read = || {
        let p = Section::root(file)?;
        for flag in ["do_resize", "do_rescale", "do_pad"] {
            p.only(flag, &[json!(true)])?;
        }
        let side = |field: &str, expected: usize| -> Result<usize> {
            let sizes = match p.section(field) {
                Ok(Some(size)) => vec![size.opt_int("height", 1..=1 << 16)?, size.opt_int("width", 1..=1 << 16)?],
                _ => vec![p.opt_int(field, 1..=1 << 16)?],
            };
            match sizes.iter().flatten().find(|s| **s != expected) {
                Some(other) => Err(Error::config(field, format!("{other} is not the model's image size {expected}"))),
                None => Ok(expected),
            }
        };
        let view = |prefix: &str, size: usize| -> Result<DeepseekVlView> {
            let rgb = |field: &str, default: [f64; 3]| Ok::<_, Error>(p.get::<[f64; 3]>(&format!("{prefix}{field}"))?.unwrap_or(default));
            let (mean, std) = (rgb("image_mean", CLIP_MEAN)?, rgb("image_std", CLIP_STD)?);
            let normalize = p.get("do_normalize")?.unwrap_or(true);
            Ok(DeepseekVlView {
                size,
                background: mean.map(|m| (m * 255.0) as u8),
                image_mean: if normalize { mean.map(|m| m as f32) } else { [0.0; 3] },
                image_std: if normalize { std.map(|s| s as f32) } else { [1.0; 3] },
                resample: match p.get::<u32>(&format!("{prefix}resample"))?.filter(|_| !official) {
                    None | Some(3) => Resample::Bicubic,
                    Some(2) => Resample::Bilinear,
                    Some(1) => Resample::Lanczos,
                    Some(n) => {
                        let message = format!("{n} is not supported; supported: 1 (lanczos), 2 (bilinear), 3 (bicubic)");
                        return Err(Error::config(format!("{prefix}resample"), message));
                    }
                },
            })
        };
        let two = !official && vision.high.is_some();
        let first = if official {
            view("", side("image_size", vision.image_size())?)?
        } else if two {
            view("high_res_", side("high_res_size", vision.image_size())?)?
        } else {
            view("", side("size", vision.image_size())?)?
        };
        let second = if two { Some(view("", side("size", vision.low.image_size)?)?) } else { None };
        Ok(Processor::DeepseekVl(DeepseekVlProcessor {
            first,
            second,
            min_size: p.opt_int("min_size", 1..=1 << 16)?.unwrap_or(14),
            round: !official,
            rescale_factor: p.positive("rescale_factor")?.unwrap_or(1.0 / 255.0),
            tokens: vision.low.grid() * vision.low.grid(),
        }))
    };
    read().map(Some).map_err(|e| match e {
        Error::Config { field, message } => {
            Error::File { path: "preprocessor_config.json".into(), message: format!("`{field}`: {message}") }
        }
        e => e,
    })
}
