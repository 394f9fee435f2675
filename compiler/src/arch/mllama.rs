//! Llama 3.2 Vision (Grattafiori et al., 2024, arXiv 2407.21783, section 7). Reference: transformers `modeling_mllama.py`.
//!
//! Pictures are cut into tiles, and the decoder sees them only through cross-attention layers: their keys and values, of all
//! tiles so far, are states that grow with the pictures rather than with the text.

use super::{
    Architecture, Lowered, Preset, SideFiles,
    config::Section,
    decoder::{Decoder, LAYERS, Positions, WIDTH},
    graph, nn, symbol,
};
use crate::{Error, Result};
use serde_json::{Value, json};
use std::borrow::Cow;
use vlmc_artifact::{
    MllamaProcessor, Processor, PromptRules, Resample, Task,
    program::{Binary, Reduce, Unary},
};
use vlmc_ir::{Builder, DType, Dim, Literal, Val, W, Weights, ops::Mask};

pub(super) const ARCHITECTURE: Architecture = Architecture {
    model_types: &["mllama"],
    alias: "llama-3.2-vision",
    title: "Llama 3.2 Vision",
    reference: "arXiv 2407.21783; transformers MllamaForConditionalGeneration",
    notes: "Pictures as up to four tiles, several pictures to a prompt, batches whose rows have unlike numbers of them, text-only prompts. \
        The cross-attention layers keep keys and values of the pictures in a cache of their own; padded tiles and rows that see no \
        picture behave as in the reference. Llama 3 rotary scaling. Old and new layouts. One turn may add pictures to those before.",
    canonical_name,
    ignored: |name| name.ends_with("rotary_emb.inv_freq"),
    presets: &[
        Preset {
            name: "llama-3.2-11b-vision",
            hub: "meta-llama/Llama-3.2-11B-Vision-Instruct",
            parameters: 10_670_220_835,
            config: || config(&B11),
            files,
        },
        Preset {
            name: "llama-3.2-90b-vision",
            hub: "meta-llama/Llama-3.2-90B-Vision-Instruct",
            // Counted in the class of the reference; the hub shows 88.6 B.
            parameters: 88_593_355_323,
            config: || config(&B90),
            files,
        },
    ],
    lower,
    processor,
};

/// Sizes of a decoder.
struct Size {
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
}

const B11: Size = Size { hidden_size: 4096, intermediate_size: 14336, num_hidden_layers: 40, num_attention_heads: 32 };
const B90: Size = Size { hidden_size: 8192, intermediate_size: 28672, num_hidden_layers: 100, num_attention_heads: 64 };

/// First of the special tokens.
const FIRST_SPECIAL: usize = 128_000;
/// `<|image|>`, the first token that the decoder reads and cannot write.
const IMAGE: usize = 128_256;

/// `config.json` as published on the hub, for the models that follow instructions (560 pixels a tile; the base models have 448).
fn config(p: &Size) -> Value {
    json!({
        "architectures": ["MllamaForConditionalGeneration"],
        "image_token_index": IMAGE,
        "model_type": "mllama",
        "text_config": {
            "model_type": "mllama_text_model",
            "vocab_size": 128_256,
            "hidden_size": p.hidden_size,
            "hidden_act": "silu",
            "num_hidden_layers": p.num_hidden_layers,
            "num_attention_heads": p.num_attention_heads,
            "num_key_value_heads": 8,
            "intermediate_size": p.intermediate_size,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0,
            "rope_scaling": {
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3"
            },
            "max_position_embeddings": 131_072,
            "cross_attention_layers": (3..p.num_hidden_layers).step_by(5).collect::<Vec<_>>(),
            "dropout": 0,
            "initializer_range": 0.02,
            "tie_word_embeddings": false,
            "bos_token_id": FIRST_SPECIAL,
            "eos_token_id": [128_001, 128_008, 128_009],
            "pad_token_id": 128_004,
            "torch_dtype": "bfloat16",
            "use_cache": true
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0",
        "vision_config": {
            "model_type": "mllama_vision_model",
            "attention_heads": 16,
            "hidden_act": "gelu",
            "hidden_size": 1280,
            "image_size": 560,
            "initializer_range": 0.02,
            "intermediate_layers_indices": [3, 7, 15, 23, 30],
            "intermediate_size": 5120,
            "max_num_tiles": 4,
            "norm_eps": 1e-5,
            "num_channels": 3,
            "num_global_layers": 8,
            "num_hidden_layers": 32,
            "patch_size": 14,
            "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
            "torch_dtype": "bfloat16",
            "vision_output_dim": 7680
        }
    })
}

/// The other files of a synthetic checkpoint; the chat template gives the published one's text for users, in our own words.
fn files() -> Vec<(&'static str, Value)> {
    let mut specials: Vec<String> = (0..=IMAGE - FIRST_SPECIAL).map(|i| format!("<|reserved_special_token_{i}|>")).collect();
    for (id, name) in [
        (128_000, "begin_of_text"),
        (128_001, "end_of_text"),
        (128_004, "finetune_right_pad_id"),
        (128_006, "start_header_id"),
        (128_007, "end_header_id"),
        (128_008, "eom_id"),
        (128_009, "eot_id"),
        (128_010, "python_tag"),
        (IMAGE, "image"),
    ] {
        specials[id - FIRST_SPECIAL] = format!("<|{name}|>");
    }
    let specials: Vec<&str> = specials.iter().map(String::as_str).collect();
    let template = "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}<|image|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}";
    vec![
        (
            "generation_config.json",
            json!({"bos_token_id": FIRST_SPECIAL, "do_sample": true, "eos_token_id": [128_001, 128_008, 128_009],
                "pad_token_id": 128_004, "temperature": 0.6, "top_p": 0.9}),
        ),
        (
            "preprocessor_config.json",
            json!({"do_convert_rgb": true, "do_normalize": true, "do_pad": true, "do_rescale": true, "do_resize": true,
                "image_mean": [0.481_454_66, 0.457_827_5, 0.408_210_73], "image_std": [0.268_629_54, 0.261_302_58, 0.275_777_11],
                "image_processor_type": "MllamaImageProcessor", "max_image_tiles": 4, "resample": 2,
                "rescale_factor": 0.003_921_568_627_450_98, "size": {"height": 560, "width": 560}}),
        ),
        ("tokenizer.json", crate::synth::tokenizer(FIRST_SPECIAL, &specials)),
        (
            "tokenizer_config.json",
            json!({"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|finetune_right_pad_id|>",
                "model_max_length": 131_072, "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}),
        ),
    ]
}

/// transformers since 4.52 may write `model.language_model.` and `lm_head` for `language_model.model.` and
/// `language_model.lm_head`, and `model.` before the rest.
fn canonical_name(name: &str) -> Cow<'_, str> {
    if let Some(rest) = name.strip_prefix("model.language_model.") {
        return format!("language_model.model.{rest}").into();
    }
    if name.starts_with("lm_head.") {
        return format!("language_model.{name}").into();
    }
    name.strip_prefix("model.").unwrap_or(name).into()
}

/// Tokens of a tile are filled up to a multiple of this, fixed in the reference.
const TOKEN_MULTIPLE: usize = 8;
/// Epsilon of the norms outside the layers: torch's default.
const OUTER_EPS: f64 = 1e-5;
/// Most pictures of a request, for the ranges of symbols.
const MAX_IMAGES: usize = 4096;

struct VisionConfig {
    hidden_size: usize,
    heads: usize,
    intermediate_size: usize,
    layers: usize,
    global_layers: usize,
    channels: usize,
    image_size: usize,
    patch_size: usize,
    eps: f64,
    max_tiles: usize,
    /// Number of aspect ratios, without that of no picture.
    ratios: usize,
    /// Layers whose results go into the features.
    intermediate: Vec<usize>,
    act: Unary,
}

impl VisionConfig {
    fn new(c: &Section<'_>) -> Result<Self> {
        let hidden_size = c.int("hidden_size", WIDTH)?;
        let heads = match c.opt_int("attention_heads", WIDTH)? {
            Some(heads) => heads,
            None => c.int("num_attention_heads", WIDTH)?,
        };
        nn::head_dim(c, "hidden_size", hidden_size, "attention_heads", heads)?;
        let layers = c.int("num_hidden_layers", LAYERS)?;
        let intermediate = c.get::<Vec<usize>>("intermediate_layers_indices")?.unwrap_or_else(|| vec![3, 7, 15, 23, 30]);
        if let Some(bad) = intermediate.iter().find(|i| **i >= layers) {
            let message = format!("{bad} is not one of the {layers} layers");
            return Err(Error::config(c.path("intermediate_layers_indices"), message));
        }
        let output = c.int("vision_output_dim", WIDTH)?;
        let wanted = hidden_size * (1 + intermediate.len());
        if output != wanted {
            let message = format!("is {output}, but the last layer and {} others of {hidden_size} make {wanted}", intermediate.len());
            return Err(Error::config(c.path("vision_output_dim"), message));
        }
        let max_tiles = c.opt_int("max_num_tiles", 1..=64)?.unwrap_or(4);
        let ratios = c.get::<Vec<[usize; 2]>>("supported_aspect_ratios")?.unwrap_or_else(|| aspect_ratios(4));
        if let Some([h, w]) = ratios.iter().find(|[h, w]| h * w == 0 || h * w > max_tiles) {
            let message = format!("[{h}, {w}] must be at least one tile and at most max_num_tiles {max_tiles}");
            return Err(Error::config(c.path("supported_aspect_ratios"), message));
        }
        let (image_size, patch_size) = (c.int("image_size", 1..=1 << 14)?, c.int("patch_size", 1..=1024)?);
        if patch_size > image_size {
            return Err(Error::config(c.path("patch_size"), format!("{patch_size} is more than image_size {image_size}")));
        }
        Ok(Self {
            hidden_size,
            heads,
            intermediate_size: c.int("intermediate_size", WIDTH)?,
            layers,
            global_layers: c.int("num_global_layers", 0..=1000)?,
            channels: c.opt_int("num_channels", 1..=64)?.unwrap_or(3),
            image_size,
            patch_size,
            eps: c.positive("norm_eps")?.unwrap_or(1e-5),
            max_tiles,
            ratios: ratios.len(),
            intermediate,
            act: nn::activation(c, "hidden_act", Unary::Gelu)?,
        })
    }

    /// Tokens of a tile: its patches and the class token.
    fn tokens(&self) -> usize {
        (self.image_size / self.patch_size).pow(2) + 1
    }
}

/// Arrangements of tiles `[rows, columns]`, in the order of their ids, which start at 1.
fn aspect_ratios(max_tiles: usize) -> Vec<[usize; 2]> {
    (1..=max_tiles).flat_map(|h| (1..=max_tiles / h).map(move |w| [h, w])).collect()
}

fn lower(c: &Section<'_>, weights: &Weights<'_>, _: &SideFiles) -> Result<Lowered> {
    let section = |name: &str| c.section(name)?.ok_or_else(|| Error::config(name, "is missing"));
    let (t, v) = (section("text_config")?, section("vision_config")?);
    let text = Decoder::new(&t, None)?;
    if !matches!(text.positions, Positions::Plain(_)) {
        return Err(Error::config(t.path("rope_scaling"), "`mrope_section` is not supported here"));
    }
    if text.attention.qkv_bias {
        return Err(Error::config(t.path("attention_bias"), "true is not supported here"));
    }
    if text.tie_word_embeddings {
        return Err(Error::config(t.path("tie_word_embeddings"), "true is not supported: the tables have unlike numbers of rows"));
    }
    let cross = t.get::<Vec<usize>>("cross_attention_layers")?.unwrap_or_else(|| (3..40).step_by(5).collect());
    if let Some(bad) = cross.iter().find(|i| **i >= text.num_hidden_layers) {
        let message = format!("{bad} is not one of the {} layers", text.num_hidden_layers);
        return Err(Error::config(t.path("cross_attention_layers"), message));
    }
    if cross.is_empty() {
        return Err(Error::config(t.path("cross_attention_layers"), "is empty: the model would see no pictures"));
    }
    let vision = VisionConfig::new(&v)?;
    let image_token = match c.get::<i64>("image_token_index")? {
        Some(id) => id,
        None => c.get("image_token_id")?.unwrap_or(IMAGE as i64),
    };
    // Eight more rows than there are logits: of tokens that the model reads but does not write.
    let (entries, hidden_size) = (text.vocab_size + 8, text.hidden_size);

    let vision_graph = graph("vision", weights, |g| vision_tower(g, &vision, hidden_size))?;
    let embed_graph = graph("embed", weights, |g| {
        let ids = g.input("input_ids", DType::I64, ["batch", "seq"].map(Dim::symbol));
        g.output("inputs_embeds", g.embedding(ids, g.weights("language_model.model.embed_tokens"), entries, hidden_size));
    })?;
    let decoder_graph = graph("decoder", weights, |g| {
        let seen = CrossAttention::new(g, vision.tokens(), hidden_size);
        let w = g.weights("language_model");
        text.graph_of(g, w / "model", w / "lm_head", |i, w, x, rope, mask| {
            if cross.contains(&i) { seen.layer(g, &text, w, i, x) } else { text.layer(g, w, i, x, rope, mask) }
        });
    })?;

    let context = text.max_position_embeddings;
    let tiles = 0..=vision.max_tiles * MAX_IMAGES;
    Ok(Lowered {
        symbols: vec![
            symbol("batch", 1..=1024),
            symbol("seq", 1..=context),
            symbol("past", 0..=context),
            symbol("scored", 0..=context),
            symbol("images", 1..=MAX_IMAGES),
            symbol("tiles", tiles.clone()),
            symbol("tiles_past", tiles),
        ],
        graphs: vec![vision_graph, embed_graph, decoder_graph],
        task: Task::Generate(PromptRules {
            image_token_id: Some(image_token),
            video_token_id: None,
            hidden_size,
            vocab_size: entries,
            max_positions: context,
            positions: vlmc_artifact::Positions::Sequential,
            tile_side: None,
            template: None,
        }),
    })
}

/// Pictures in tiles to what the decoder attends to: `pixel_values f32[images, max_tiles, channels, size, size]`,
/// `aspect_ratio_ids i64[images]` (0 for a picture that only fills a batch) and `aspect_ratio_mask i64[images, max_tiles]` (1 for
/// tiles in use) to `cross_attention_states f32[images * max_tiles, tokens, hidden]`.
fn vision_tower<'g>(g: &'g Builder<'g>, c: &VisionConfig, text_hidden_size: usize) {
    let (images, tiles, d, tokens) = (Dim::symbol("images"), c.max_tiles, c.hidden_size, c.tokens());
    let all_tiles = &images * tiles;
    let side = Dim::from(c.image_size);
    let pixels = g.input("pixel_values", DType::F32, [images.clone(), tiles.into(), c.channels.into(), side.clone(), side.clone()]);
    let ratio = g.input("aspect_ratio_ids", DType::I64, [images.clone()]);
    let used = g.input("aspect_ratio_mask", DType::I64, [images.clone(), tiles.into()]);
    let w = g.weights("vision_model");
    let _scope = g.scope(w.path());

    // A convolution whose stride is its kernel is a matrix product.
    let (patches, ..) = nn::patchify(g, g.reshape(pixels, [all_tiles.clone(), c.channels.into(), side.clone(), side]), c.patch_size);
    let kernel = [d, c.channels, c.patch_size, c.patch_size];
    let proj = g.weight_as(w / "patch_embedding" / "weight", &kernel, &[d, kernel[1..].iter().product()]);
    let x = g.reshape(g.linear_with(patches, proj, None), dims(&images, [tiles, tokens - 1, d]));
    let x = x + tile_embedding(g, c, w / "pre_tile_positional_embedding", ratio);
    let class = g.broadcast(g.table(w / "class_embedding", &[d]), dims(&images, [tiles, 1, d]));
    let x = g.concat(&[class, x], 2);
    let x = position_embedding(g, c, w / "gated_positional_embedding", x, ratio);
    let x = g.layer_norm(x, w / "layernorm_pre", OUTER_EPS);

    let padded = tokens.next_multiple_of(TOKEN_MULTIPLE);
    let padding = g.broadcast(g.literal(Literal::scalar(DType::F32, 0.0)), dims(&images, [tiles, padded - tokens, d]));
    let mut x = g.reshape(g.concat(&[x, padding], 2), dims(&images, [tiles * padded, d]));
    let seen = vision_mask(g, used, tokens, padded);
    let mut intermediate = vec![];
    for i in 0..c.layers {
        x = vision_layer(g, c, w / "transformer.layers" / i, x, seen, false);
        if c.intermediate.contains(&i) {
            intermediate.push((i, x));
        }
    }
    x = g.layer_norm(x, w / "layernorm_post", OUTER_EPS);
    let tile = tile_embedding(g, c, w / "post_tile_positional_embedding", ratio);
    x = g.reshape(g.reshape(x, dims(&images, [tiles, padded, d])) + tile, dims(&images, [tiles * padded, d]));
    for i in 0..c.global_layers {
        x = vision_layer(g, c, w / "global_transformer.layers" / i, x, seen, true);
    }

    let unpadded = |x: Val<'g>, width: usize| g.slice(g.reshape(x, dims(&images, [tiles, padded, width])), 2, 0, tokens);
    let mut features = vec![unpadded(x, d)];
    // Element by element side by side: the first of each layer, the second of each, ...
    let columns: Vec<Val<'g>> =
        c.intermediate.iter().filter_map(|i| Some(g.unsqueeze(intermediate.iter().find(|(layer, _)| layer == i)?.1, 3))).collect();
    if !columns.is_empty() {
        let n = columns.len();
        features.push(unpadded(g.concat(&columns, 3), d * n));
    }
    let features = g.concat(&features, 3);
    let states = g.linear_bias(features, g.weights("multi_modal_projector"), text_hidden_size);
    g.output("cross_attention_states", g.reshape(states, [all_tiles, tokens.into(), text_hidden_size.into()]));
}

fn dims<const N: usize>(first: &Dim, rest: [usize; N]) -> Vec<Dim> {
    std::iter::once(first.clone()).chain(rest.map(Dim::from)).collect()
}

/// `tanh` of a scalar of the checkpoint: what a learned branch counts.
fn gate<'g>(g: &'g Builder<'g>, w: W<'g>) -> Val<'g> {
    g.unary(Unary::Tanh, g.table(w, &[1]))
}

/// Of each tile by its place in the picture: `f32[images, max_tiles, 1, width]`.
fn tile_embedding<'g>(g: &'g Builder<'g>, c: &VisionConfig, w: W<'g>, ratio: Val<'g>) -> Val<'g> {
    let _scope = g.scope(w.path());
    let rows = g.embedding(ratio, w / "embedding", c.ratios + 1, c.max_tiles * c.hidden_size);
    g.reshape(rows, dims(&ratio.dim(0), [c.max_tiles, 1, c.hidden_size])) * gate(g, w / "gate")
}

/// `x f32[images, max_tiles, tokens, width]` with embeddings of the tokens by their places in the tile, and in the picture.
fn position_embedding<'g>(g: &'g Builder<'g>, c: &VisionConfig, w: W<'g>, x: Val<'g>, ratio: Val<'g>) -> Val<'g> {
    let _scope = g.scope(w.path());
    let (tiles, tokens, d) = (c.max_tiles, c.tokens(), c.hidden_size);
    let share = gate(g, w / "gate");
    let rest = g.literal(Literal::vector(DType::F32, vec![1.0])) - share;
    let in_tile = g.table(w / "embedding", &[tokens, d]) * rest;
    let in_picture = g.embedding(ratio, w / "tile_embedding", c.ratios + 1, tiles * tokens * d);
    x + in_tile + g.reshape(in_picture, dims(&ratio.dim(0), [tiles, tokens, d])) * share
}

/// Which tokens see which, `bool[images, 1, t, t]` for all `t = max_tiles * padded` tokens of a picture: all but padding (of
/// tiles and in tiles) that looks at padding. So tokens of the picture do see padding, as in the reference.
fn vision_mask<'g>(g: &'g Builder<'g>, used: Val<'g>, tokens: usize, padded: usize) -> Val<'g> {
    let (images, tiles) = (used.dim(0), used.ty().shape.get(1).and_then(Dim::as_const).unwrap_or(1) as usize);
    let token = g.binary(Binary::Lt, g.iota(padded), g.literal(Literal::scalar(DType::I64, tokens as f64)));
    let live = g.binary(Binary::And, g.unsqueeze(g.cast(used, DType::Bool), 2), token);
    let padding = g.reshape(g.unary(Unary::Not, live), dims(&images, [1, tiles * padded]));
    let hidden = g.binary(Binary::And, g.unsqueeze(padding, 3), g.unsqueeze(padding, 2));
    g.unary(Unary::Not, hidden)
}

fn vision_layer<'g>(g: &'g Builder<'g>, c: &VisionConfig, w: W<'g>, x: Val<'g>, seen: Val<'g>, gated: bool) -> Val<'g> {
    let _scope = g.scope(w.path());
    let weighted = |y: Val<'g>, name: &str| if gated { y * gate(g, w / name) } else { y };
    let h = g.layer_norm(x, w / "input_layernorm", c.eps);
    let a = w / "self_attn";
    let [q, k, v] = ["q_proj", "k_proj", "v_proj"].map(|name| g.split_heads(g.linear(h, a / name, c.hidden_size), c.heads));
    let scale = 1.0 / ((c.hidden_size / c.heads) as f64).sqrt();
    let y = g.merge_heads(g.attention(q, k, v, scale, Mask::Given, Some(seen)));
    let x = x + weighted(g.linear(y, a / "o_proj", c.hidden_size), "gate_attn");
    let h = g.layer_norm(x, w / "post_attention_layernorm", c.eps);
    let h = g.unary(c.act, g.linear_bias(h, w / "mlp.fc1", c.intermediate_size));
    x + weighted(g.linear_bias(h, w / "mlp.fc2", c.hidden_size), "gate_ffn")
}

/// What all cross-attention layers share.
struct CrossAttention<'g> {
    /// Of the new tiles: `f32[batch, tiles * tokens, hidden]`.
    states: Val<'g>,
    /// `tokens * tiles_past`.
    past: Dim,
    /// `bool[batch, 1, seq, tokens * (tiles_past + tiles)]`.
    seen: Val<'g>,
    /// 1 where a token may see a tile, else 0: `f32[batch, seq, 1]`.
    sees_any: Val<'g>,
}

impl<'g> CrossAttention<'g> {
    /// From the decoder's inputs `cross_attention_states f32[batch, tiles, tokens, hidden]` (of the tiles that are new in this
    /// call) and `cross_attention_mask i64[batch, seq, tiles_past + tiles]` (not 0 where a token may see a tile).
    fn new(g: &'g Builder<'g>, tokens: usize, hidden_size: usize) -> Self {
        let [batch, seq, tiles, tiles_past] = ["batch", "seq", "tiles", "tiles_past"].map(Dim::symbol);
        let all = &tiles_past + &tiles;
        let states = g.input("cross_attention_states", DType::F32, [batch.clone(), tiles.clone(), tokens.into(), hidden_size.into()]);
        let mask = g.input("cross_attention_mask", DType::I64, [batch.clone(), seq.clone(), all.clone()]);
        let _scope = g.scope("cross_attention");
        let states = g.reshape(states, [batch.clone(), &tiles * tokens, hidden_size.into()]);
        let mask = g.cast(mask, DType::Bool);
        let count = g.reduce(Reduce::Sum, g.cast(mask, DType::I64), &[2]);
        let any = g.unsqueeze(g.binary(Binary::Lt, g.literal(Literal::scalar(DType::I64, 0.0)), count), 2);
        // A token that may see nothing attends to everything: that is how the models were trained.
        let open = g.binary(Binary::Or, mask, g.unary(Unary::Not, any));
        let per_token = g.broadcast(g.unsqueeze(open, 3), vec![batch.clone(), seq.clone(), all.clone(), tokens.into()]);
        let seen = g.reshape(per_token, [batch, 1.into(), seq, &all * tokens]);
        Self { states, past: &tiles_past * tokens, seen, sees_any: g.cast(any, DType::F32) }
    }

    /// A gated layer of `x f32[batch, seq, hidden]`. Without any tiles it adds nothing, as in the reference, which skips it then:
    /// attention to no keys gives zeros, and the MLP counts only for tokens that may see a tile.
    fn layer(&self, g: &'g Builder<'g>, text: &Decoder, w: W<'g>, i: usize, x: Val<'g>) -> Val<'g> {
        let _scope = g.scope(w.path());
        let (shape, eps, c) = (&text.attention, text.rms_norm_eps, w / "cross_attn");
        let heads = |x: Val<'g>, name: &str, n: usize| g.split_heads(g.linear(x, c / name, n * shape.head_dim), n);
        let h = g.rms_norm(x, w / "input_layernorm", eps);
        let q = g.rms_norm(heads(h, "q_proj", shape.heads), c / "q_norm", eps);
        let k = g.rms_norm(heads(self.states, "k_proj", shape.kv_heads), c / "k_norm", eps);
        let v = heads(self.states, "v_proj", shape.kv_heads);
        let (k, v) = (self.cached(g, i, "key", k), self.cached(g, i, "value", v));
        let y = g.attention(q, k, v, 1.0 / (shape.head_dim as f64).sqrt(), Mask::Given, Some(self.seen));
        let y = g.linear(g.merge_heads(y), c / "o_proj", shape.hidden_size);
        let x = x + y * gate(g, w / "cross_attn_attn_gate");
        let h = g.rms_norm(x, w / "post_attention_layernorm", eps);
        let y = nn::gated_mlp(g, w / "mlp", h, text.act, text.intermediate_size, text.hidden_size);
        x + y * self.sees_any * gate(g, w / "cross_attn_mlp_gate")
    }

    /// `new f32[batch, heads, rows, width]` of the new tiles after those of the tiles before.
    fn cached(&self, g: &'g Builder<'g>, layer: usize, kind: &str, new: Val<'g>) -> Val<'g> {
        let shape = [new.dim(0), new.dim(1), self.past.clone(), new.dim(3)];
        let past = g.state(&format!("past_key_values.{layer}.{kind}"), &format!("present.{layer}.{kind}"), DType::F32, shape, 2);
        g.append(past, new, 2)
    }
}

fn processor(c: &Section<'_>, files: &SideFiles) -> Result<Option<Processor>> {
    let Some(image) = &files.preprocessor else { return Ok(None) };
    let file = |e: Error| match e {
        Error::Config { field, message } => {
            Error::File { path: "preprocessor_config.json".into(), message: format!("`{field}`: {message}") }
        }
        e => e,
    };
    let vision = c.section("vision_config")?.ok_or_else(|| Error::config("vision_config", "is missing"))?;
    let vision = VisionConfig::new(&vision)?;
    let read = || {
        let c = Section::root(image)?;
        for field in ["do_resize", "do_pad", "do_rescale", "do_normalize"] {
            c.only(field, &[json!(true)])?;
        }
        let size = c.section("size")?.ok_or_else(|| Error::config("size", "is missing"))?;
        let (height, width) = (size.int("height", 1..=1 << 14)?, size.int("width", 1..=1 << 14)?);
        if [height, width] != [vision.image_size; 2] {
            let message = format!("tiles of {height}x{width} pixels are not those of the model, {0}x{0}", vision.image_size);
            return Err(Error::config("size", message));
        }
        let max_image_tiles = c.opt_int("max_image_tiles", 1..=64)?.unwrap_or(4);
        if max_image_tiles != vision.max_tiles {
            let message = format!("{max_image_tiles} is not the model's max_num_tiles, {}", vision.max_tiles);
            return Err(Error::config("max_image_tiles", message));
        }
        let rgb = |field: &str| Ok::<_, Error>(c.get::<[f32; 3]>(field)?.unwrap_or([0.5; 3]));
        Ok(Processor::Mllama(MllamaProcessor {
            tile_size: height,
            max_image_tiles,
            // ImageNet's standard statistics, the class defaults.
            image_mean: rgb("image_mean")?,
            image_std: rgb("image_std")?,
            rescale_factor: c.positive("rescale_factor")?.unwrap_or(1.0 / 255.0),
            resample: match c.get::<u32>("resample")? {
                None | Some(2) => Resample::Bilinear,
                Some(3) => Resample::Bicubic,
                Some(1) => Resample::Lanczos,
                Some(n) => {
                    let message = format!("{n} is not supported; supported: 1 (lanczos), 2 (bilinear), 3 (bicubic)");
                    return Err(Error::config("resample", message));
                }
            },
        }))
    };
    read().map(Some).map_err(file)
}
