//! LLaVA 1.5 (Liu et al., 2024, arXiv 2310.03744). Reference: transformers `modeling_llava.py`.

use super::{
    Architecture, Lowered, Preset, SideFiles,
    clip::{VISION_DEFAULTS, Vision, VisionDefaults},
    config::Section,
    decoder::{Decoder, LLAMA, Positions},
    graph, images, nn, symbol,
};
use crate::{Error, Result};
use serde_json::{Value, json};
use std::borrow::Cow;
use vlmc_artifact::{Processor, PromptRules, Task, program::Unary};
use vlmc_ir::{Builder, DType, Dim, Val, Weights};

pub(super) const ARCHITECTURE: Architecture = Architecture {
    model_types: &["llava"],
    alias: "llava",
    title: "LLaVA 1.5",
    reference: "arXiv 2310.03744; transformers LlavaForConditionalGeneration",
    notes: "LLaVA 1.5 in the layouts of transformers: feature layer from the config, one or a list of them, both select strategies, MLP projector with the activation and biases of the config, Llama and Vicuna decoders, with grouped heads or without.",
    canonical_name,
    ignored,
    // The published 7 063 427 072 and 13 351 494 656 less the last layer of the tower and its norm, which nothing reads.
    presets: &[
        preset!("llava-1.5-7b", "llava-hf/llava-1.5-7b-hf", 7_050_828_800, &VICUNA7),
        preset!("llava-1.5-13b", "llava-hf/llava-1.5-13b-hf", 13_338_896_384, &VICUNA13),
    ],
    lower,
    processor,
};

/// Width, layers, heads and MLP width of the decoder.
struct Size([usize; 4]);

const VICUNA7: Size = Size([4096, 32, 32, 11008]);
const VICUNA13: Size = Size([5120, 40, 40, 13824]);

/// `config.json` as published on the hub.
fn config(p: &Size) -> Value {
    let Size([width, layers, heads, mlp]) = p;
    json!({
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": 32000,
        "model_type": "llava",
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "text_config": {
            "model_type": "llama", "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": heads, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
            "vocab_size": 32064, "torch_dtype": "float16"
        },
        "tie_word_embeddings": false,
        "torch_dtype": "float16",
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
            "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": 32064
    })
}

/// The other files of a synthetic checkpoint; the chat template gives the published one's text, in our own words.
fn files(_: &Size) -> Vec<(&'static str, Value)> {
    let template = "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'] | upper }}: {% endif %}{% if message['content'] is string %}{{ message['content'] }} {% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }} {% endif %}{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}";
    vec![
        ("generation_config.json", json!({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32001})),
        (
            "preprocessor_config.json",
            json!({"crop_size": {"height": 336, "width": 336}, "do_center_crop": true, "do_convert_rgb": true, "do_normalize": true,
                "do_rescale": true, "do_resize": true, "image_mean": images::CLIP_MEAN, "image_std": images::CLIP_STD,
                "image_processor_type": "CLIPImageProcessor", "resample": 3, "rescale_factor": 1.0 / 255.0,
                "size": {"shortest_edge": 336}}),
        ),
        ("tokenizer.json", crate::synth::tokenizer(32000, &["<image>", "<pad>"])),
        (
            "tokenizer_config.json",
            json!({"bos_token": null, "eos_token": "Ġw256", "pad_token": "<pad>", "model_max_length": 4096,
                "tokenizer_class": "LlamaTokenizer", "chat_template": template}),
        ),
    ]
}

/// The hub's names. transformers since 4.52 may write `model.` before the parts, and the decoder and the tower without their
/// inner names.
fn canonical_name(name: &str) -> Cow<'_, str> {
    if name.starts_with("lm_head.") {
        return format!("language_model.{name}").into();
    }
    let part = name.strip_prefix("model.").unwrap_or(name);
    if let Some(inner) = part.strip_prefix("vision_tower.") {
        return format!("vision_tower.vision_model.{}", inner.strip_prefix("vision_model.").unwrap_or(inner)).into();
    }
    match part.strip_prefix("language_model.") {
        Some(inner) if part.len() < name.len() => format!("language_model.model.{inner}").into(),
        _ => part.into(),
    }
}

/// Buffers, and what comes after the last state that is taken: whole layers and the norm. A layer that is run uses all of its
/// tensors.
fn ignored(name: &str) -> bool {
    let tower = name.strip_prefix("vision_tower.vision_model.");
    let layer = tower.and_then(|n| n.strip_prefix("encoder.layers.")?.split_once('.'));
    let of_layer = |leaf: &str| ["layer_norm", "self_attn.", "mlp.fc"].iter().any(|part| leaf.starts_with(part));
    name.ends_with(".position_ids")
        || name.ends_with("rotary_emb.inv_freq")
        || tower.is_some_and(|n| n.starts_with("post_layernorm."))
        || layer.is_some_and(|(_, leaf)| of_layer(leaf))
}

/// The tower of a config without `vision_config`.
const LLAVA_VISION: VisionDefaults = VisionDefaults([1024, 24, 16, 4096, 336, 14]);

/// What becomes of a picture.
struct Config {
    vision: Vision,
    /// The states of the tower whose channels are joined, by index: 0 is the input of the first layer.
    states: Vec<usize>,
    /// Whether the class token is kept.
    full: bool,
    act: Unary,
    bias: bool,
}

impl Config {
    fn new(c: &Section<'_>) -> Result<Self> {
        let v = c.section("vision_config")?;
        let defaults = if v.is_some() { &VISION_DEFAULTS } else { &LLAVA_VISION };
        let v = c.section_or_empty("vision_config")?;
        v.only("model_type", &[json!("clip_vision_model")])?;
        let vision = Vision::new(&v, defaults)?;
        let layers = vision.layers as i64;
        let listed = match c.get::<Value>("vision_feature_layer")? {
            None => vec![-2],
            Some(Value::Array(_)) => c.require::<Vec<i64>>("vision_feature_layer")?,
            Some(_) => vec![c.require::<i64>("vision_feature_layer")?],
        };
        let state = |layer: &i64| {
            let index = if *layer < 0 { layers + 1 + layer } else { *layer };
            let index = usize::try_from(index).ok().filter(|i| *i <= vision.layers);
            index.ok_or_else(|| Error::config(c.path("vision_feature_layer"), format!("{layer} is none of the tower's {layers} layers")))
        };
        let states = listed.iter().map(state).collect::<Result<Vec<_>>>()?;
        if states.is_empty() {
            return Err(Error::config(c.path("vision_feature_layer"), "names no layer"));
        }
        c.only("vision_feature_select_strategy", &[json!("default"), json!("full")])?;
        Ok(Self {
            states,
            full: c.get::<String>("vision_feature_select_strategy")?.as_deref() == Some("full"),
            act: nn::activation(c, "projector_hidden_act", Unary::Gelu)?,
            bias: c.get("multimodal_projector_bias")?.unwrap_or(true),
            vision,
        })
    }

    /// Tokens that a picture takes.
    fn tokens(&self) -> usize {
        self.vision.side().pow(2) + usize::from(self.full)
    }

    /// The entry `vision`: `pixel_values f32[images, channels, size, size]` to `image_features f32[images * tokens, hidden]`.
    fn graph<'g>(&self, g: &'g Builder<'g>, hidden_size: usize) {
        let v = &self.vision;
        let side = v.image_size;
        let pixels = g.input("pixel_values", DType::F32, [Dim::symbol("images"), v.channels.into(), side.into(), side.into()]);
        let last = self.states.iter().copied().max().unwrap_or(0);
        let states = v.hidden_states(g, g.weights("vision_tower.vision_model"), pixels, last);
        let w = g.weights("multi_modal_projector");
        let _scope = g.scope(w.path());
        let tokens = self.tokens();
        let seen = |x: Val<'g>| if self.full { x } else { g.slice(x, 1, 1, tokens) };
        let chosen: Vec<_> = self.states.iter().map(|i| seen(states[*i])).collect();
        let x = if let [one] = chosen[..] { one } else { g.concat(&chosen, 2) };
        let x = g.reshape(x, [&Dim::symbol("images") * tokens, (v.encoder.width * chosen.len()).into()]);
        let linear =
            |x: Val<'g>, name: &str| if self.bias { g.linear_bias(x, w / name, hidden_size) } else { g.linear(x, w / name, hidden_size) };
        g.output("image_features", linear(g.unary(self.act, linear(x, "linear_1")), "linear_2"));
    }
}

/// The decoder: Llama's, and Mistral's where it sees the whole context.
fn text_config(c: &Section<'_>) -> Result<Decoder> {
    let t = c.section_or_empty("text_config")?;
    t.only("model_type", &[json!("llama"), json!("mistral")])?;
    t.only("sliding_window", &[])?;
    t.only("attention_bias", &[json!(false)])?;
    t.only("mlp_bias", &[json!(false)])?;
    let text = Decoder::new(&t, Some(&LLAMA))?;
    match text.positions {
        Positions::Plain(_) => Ok(text),
        Positions::Mrope { .. } | Positions::Absolute { .. } => {
            Err(Error::config(t.path("rope_scaling"), "`mrope_section` is not supported here"))
        }
    }
}

fn lower(c: &Section<'_>, weights: &Weights<'_>, _: &SideFiles) -> Result<Lowered> {
    c.ignore(&["image_seq_length", "vocab_size"]);
    let text = text_config(c)?;
    let config = Config::new(c)?;
    let image_token_id = c.get::<i64>("image_token_index")?.or(c.get("image_token_id")?).unwrap_or(32000);
    let context = text.max_position_embeddings;
    let vision_graph = graph("vision", weights, |g| config.graph(g, text.hidden_size))?;
    let table = "language_model.model.embed_tokens";
    let embed_graph = graph("embed", weights, |g| {
        let here = |ids| nn::is_any(g, ids, &[image_token_id]);
        nn::embed(g, g.weights(table), [text.vocab_size, text.hidden_size], here);
    })?;
    let tied = text.tie_word_embeddings || c.get("tie_word_embeddings")?.unwrap_or(false);
    let tied = !weights.contains("language_model.lm_head.weight").unwrap_or(!tied);
    let head = if tied { table } else { "language_model.lm_head" };
    let decoder_graph = graph("decoder", weights, |g| text.graph(g, g.weights("language_model.model"), g.weights(head)))?;
    let mut symbols = nn::decoder_symbols(context);
    symbols.push(symbol("images", 1..=context));
    Ok(Lowered {
        symbols,
        graphs: vec![vision_graph, embed_graph, decoder_graph],
        task: Task::Generate(PromptRules {
            image_token_id: Some(image_token_id),
            video_token_id: None,
            hidden_size: text.hidden_size,
            vocab_size: text.vocab_size,
            max_positions: context,
            positions: vlmc_artifact::Positions::Sequential,
            tile_side: None,
            template: None,
        }),
    })
}

fn processor(c: &Section<'_>, files: &SideFiles) -> Result<Option<Processor>> {
    let tokens = Config::new(c)?.tokens();
    images::read(files, |c| images::standard(c, &images::CLIP, tokens))
}
