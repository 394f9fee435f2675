//! Qwen-VL (Bai et al., 2023, arXiv 2308.12966), the first one. Reference: the code that comes with the model
//! (`modeling_qwen.py`, `visual.py`). OpenCLIP's ViT-bigG, a resampler to 256 tokens per picture, and Qwen-7B.

use super::{
    Architecture, Lowered, Preset, SideFiles,
    config::Section,
    decoder::{CachedAttention, Decoder, LAYERS, Positions, WIDTH},
    graph, nn, symbol,
};
use crate::{Error, Result};
use serde_json::{Value, json};
use std::borrow::Cow;
use vlmc_artifact::{Processor, PromptRules, Resample, Resize, StandardProcessor, Task, program::Unary};
use vlmc_ir::{
    Builder, DType, Dim, Literal, Val, W, Weights,
    ops::{Filter, Mask},
};

pub(super) const ARCHITECTURE: Architecture = Architecture {
    model_types: &["qwen"],
    alias: "qwen-vl",
    title: "Qwen-VL",
    reference: "arXiv 2308.12966; modeling_qwen.py and visual.py of Qwen/Qwen-VL",
    notes: "Pictures, several per prompt; dynamic NTK and log-n attention; `qwen.tiktoken` is converted, there need be no \
            `tokenizer.json`. Boxes and quadrangles in an answer are parsed: see `regions` of `vlmc run --json`. Text-only Qwen, which has the same \
            `model_type`, and GPTQ weights are refused.",
    canonical_name,
    ignored: |name| name.ends_with("rotary_emb.inv_freq") || name.ends_with("masked_bias") || name.ends_with("logn_tensor"),
    presets: &[
        Preset {
            name: "qwen-vl-chat",
            hub: "Qwen/Qwen-VL-Chat",
            parameters: 9_656_935_168,
            config,
            files: || vec![("generation_config.json", generation("chatml", 0.3)), tokenizer_config()],
        },
        Preset {
            name: "qwen-vl",
            hub: "Qwen/Qwen-VL",
            parameters: 9_656_935_168,
            config,
            files: || vec![("generation_config.json", generation("raw", 0.5)), tokenizer_config()],
        },
    ],
    lower,
    processor: |c, _| processor(c),
};

/// `config.json` as published on the hub.
fn config() -> Value {
    let visual = json!({"heads": 16, "image_size": 448, "image_start_id": 151_857, "layers": 48, "mlp_ratio": 4.9231, "output_dim": 4096,
        "patch_size": 14, "width": 1664});
    json!({
        "architectures": ["QWenLMHeadModel"],
        "attn_dropout_prob": 0.0,
        "bf16": false,
        "emb_dropout_prob": 0.0,
        "fp16": false,
        "fp32": false,
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 22016,
        "kv_channels": 128,
        "layer_norm_epsilon": 1e-6,
        "max_position_embeddings": 8192,
        "model_type": "qwen",
        "no_bias": true,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "onnx_safe": null,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "scale_attn_weights": true,
        "seq_length": 2048,
        "tie_word_embeddings": false,
        "tokenizer_type": "QWenTokenizer",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.31.0",
        "use_cache": true,
        "use_dynamic_ntk": true,
        "use_flash_attn": false,
        "use_logn_attn": true,
        "visual": visual,
        "vocab_size": 151_936
    })
}

/// Of the base model `top_p` could not be confirmed.
fn generation(chat_format: &str, top_p: f64) -> Value {
    json!({"chat_format": chat_format, "do_sample": true, "eos_token_id": 151_643, "max_new_tokens": 512, "max_window_size": 6144,
        "pad_token_id": 151_643, "top_k": 0, "top_p": top_p})
}

/// A synthetic checkpoint has no ranks; its tokenizer has a name for each token.
fn tokenizer_config() -> (&'static str, Value) {
    let specials = crate::tiktoken::qwen_specials();
    ("tokenizer.json", crate::synth::tokenizer(151_643, &specials.iter().map(String::as_str).collect::<Vec<_>>()))
}

/// The decoder's tensors under the names of Llama's, which the shared decoder has.
fn canonical_name(name: &str) -> Cow<'_, str> {
    let Some(rest) = name.strip_prefix("transformer.") else { return name.into() };
    if rest.starts_with("visual.") {
        return rest.into();
    }
    let rest = rest.replace("wte.", "embed_tokens.").replace("ln_f.", "norm.");
    let Some(rest) = rest.strip_prefix("h.") else { return format!("model.{rest}").into() };
    let renamed = [
        (".attn.c_attn.", ".self_attn.qkv_proj."),
        (".attn.c_proj.", ".self_attn.o_proj."),
        (".ln_1.", ".input_layernorm."),
        (".ln_2.", ".post_attention_layernorm."),
        (".mlp.w1.", ".mlp.up_proj."),
        (".mlp.w2.", ".mlp.gate_proj."),
        (".mlp.c_proj.", ".mlp.down_proj."),
    ];
    let rest = renamed.iter().fold(rest.to_string(), |name, (from, to)| name.replace(from, to));
    format!("model.layers.{rest}").into()
}

/// Epsilon of the vision tower's norms, fixed in the reference.
const VISION_EPS: f64 = 1e-6;

/// `visual` of the config.
struct Vision {
    image_size: usize,
    patch_size: usize,
    width: usize,
    layers: usize,
    heads: usize,
    mlp: usize,
    output_dim: usize,
    /// Tokens of a picture, a square number.
    queries: usize,
}

impl Vision {
    fn new(c: &Section<'_>) -> Result<Self> {
        let (width, heads) = (c.int("width", WIDTH)?, c.int("heads", WIDTH)?);
        nn::head_dim(c, "width", width, "heads", heads)?;
        let output_dim = c.int("output_dim", WIDTH)?;
        // The resampler's heads are 128 wide.
        if output_dim % 128 != 0 {
            return Err(Error::config(c.path("output_dim"), format!("{output_dim} is not a multiple of 128")));
        }
        let queries = c.opt_int("n_queries", 1..=1 << 16)?.unwrap_or(256);
        if queries.isqrt().pow(2) != queries {
            return Err(Error::config(c.path("n_queries"), format!("{queries} is not the square of a number")));
        }
        let ratio = c.positive("mlp_ratio")?.ok_or_else(|| Error::config(c.path("mlp_ratio"), "is missing"))?;
        let mlp = (width as f64 * ratio) as usize;
        if !WIDTH.contains(&mlp) {
            return Err(Error::config(c.path("mlp_ratio"), format!("{ratio} makes a width of {mlp}")));
        }
        let (image_size, patch_size) = (c.int("image_size", 1..=1 << 14)?, c.int("patch_size", 1..=1024)?);
        if patch_size > image_size {
            return Err(Error::config(c.path("patch_size"), format!("{patch_size} is more than the picture's {image_size}")));
        }
        Ok(Self { image_size, patch_size, width, layers: c.int("layers", LAYERS)?, heads, mlp, output_dim, queries })
    }
}

fn text_config(c: &Section<'_>) -> Result<Decoder> {
    for (field, value) in [("no_bias", json!(true)), ("scale_attn_weights", json!(true)), ("rotary_pct", json!(1.0))] {
        c.only(field, &[value])?;
    }
    c.only("use_cache_quantization", &[json!(false)])?;
    // How the reference computes, not what.
    for field in ["bf16", "fp16", "fp32", "onnx_safe", "use_flash_attn", "emb_dropout_prob", "attn_dropout_prob", "tokenizer_type"] {
        let _: Option<Value> = c.get(field)?;
    }
    let (hidden_size, heads, head_dim) = (c.int("hidden_size", WIDTH)?, c.int("num_attention_heads", WIDTH)?, c.int("kv_channels", WIDTH)?);
    if head_dim < 4 || head_dim % 2 != 0 {
        return Err(Error::config("kv_channels", format!("{head_dim} must be even, and at least 4")));
    }
    // Of which the two layers of the MLP have one half each.
    let intermediate_size = c.int("intermediate_size", 2..=1 << 20)?;
    if intermediate_size % 2 != 0 {
        return Err(Error::config("intermediate_size", format!("{intermediate_size} is odd")));
    }
    let trained = c.int("seq_length", 2..=1 << 24)?;
    let longest = c.opt_int("max_position_embeddings", 1..=1 << 24)?.unwrap_or(8192);
    let dynamic = c.get("use_dynamic_ntk")?.unwrap_or(true);
    let levels = if dynamic { 1 + (0..31).take_while(|n| trained << n < longest).count() } else { 1 };
    Ok(Decoder {
        hidden_size,
        intermediate_size: intermediate_size / 2,
        num_hidden_layers: c.int("num_hidden_layers", LAYERS)?,
        attention: CachedAttention {
            hidden_size,
            heads,
            kv_heads: heads,
            head_dim,
            qkv_bias: true,
            qk_norm: None,
            fused: true,
            log_n: c.get("use_logn_attn")?.unwrap_or(true).then_some(trained),
        },
        rms_norm_eps: c.positive("layer_norm_epsilon")?.unwrap_or(1e-6),
        rope_theta: c.positive("rotary_emb_base")?.unwrap_or(10_000.0),
        positions: Positions::Absolute { trained, levels },
        vocab_size: c.int("vocab_size", 1..=1 << 24)?,
        max_position_embeddings: longest,
        act: Unary::Silu,
        tie_word_embeddings: c.get("tie_word_embeddings")?.unwrap_or(false),
        deepstack: 0,
    })
}

fn visual<'a>(c: &Section<'a>) -> Result<Section<'a>> {
    c.section("visual")?.ok_or_else(|| Error::config("visual", "is missing: this is text-only Qwen, and no vision-language model"))
}

fn lower(c: &Section<'_>, weights: &Weights<'_>, files: &SideFiles) -> Result<Lowered> {
    let section = visual(c)?;
    let vision = Vision::new(&section)?;
    let text = text_config(c)?;
    if vision.output_dim != text.hidden_size {
        let message = format!("{} must equal the decoder's hidden_size {}", vision.output_dim, text.hidden_size);
        return Err(Error::config(section.path("output_dim"), message));
    }
    // `<img>`, `</img>` and `<imgpad>` follow each other.
    let start = section.int("image_start_id", 0..=1 << 24)? as i64;
    let span = [start, start + 1];
    let Positions::Absolute { trained, levels } = text.positions else {
        return Err(Error::config("rotary_emb_base", "makes positions of another kind"));
    };
    let tied = !weights.contains("lm_head.weight").unwrap_or(!text.tie_word_embeddings);
    let head = if tied { "model.embed_tokens" } else { "lm_head" };
    let graphs = vec![
        graph("vision", weights, |g| vision_tower(g, &vision))?,
        graph("embed", weights, |g| {
            nn::embed(g, g.weights("model.embed_tokens"), [text.vocab_size, text.hidden_size], |ids| between(g, ids, span));
        })?,
        graph("decoder", weights, |g| text.graph(g, g.weights("model"), g.weights(head)))?,
    ];
    let context = text.max_position_embeddings;
    let mut symbols = nn::decoder_symbols(context);
    symbols.push(symbol("images", 1..=context));
    Ok(Lowered {
        symbols,
        graphs,
        task: Task::Generate(PromptRules {
            image_token_id: Some(start + 2),
            video_token_id: None,
            hidden_size: text.hidden_size,
            vocab_size: text.vocab_size,
            max_positions: context,
            positions: vlmc_artifact::Positions::Absolute { trained, levels, image_span: span },
            tile_side: None,
            template: Some(template(files)),
        }),
    })
}

/// Chat format of `qwen_generation_utils.py`: "chatml", or "raw" for a base model, which has no turns.
fn template(files: &SideFiles) -> String {
    let parts = "{% set seen = namespace(images=0) %}{% macro parts(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}{% if part['type'] == 'image' %}{% set seen.images = seen.images + 1 %}Picture {{ seen.images }}: <img><imgpad></img>\n{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endmacro %}";
    let raw = files.generation.as_ref().is_some_and(|g| g["chat_format"] == "raw");
    let turns = if raw {
        "{% for turn in messages %}{{ parts(turn['content']) }}{% endfor %}"
    } else {
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}{% for turn in messages %}{{ '<|im_start|>' ~ turn['role'] ~ '\n' ~ parts(turn['content']) ~ '<|im_end|>' }}{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    };
    format!("{parts}{turns}")
}

/// Where `ids i64[batch, seq]` stand between a `start` and its `end`.
fn between<'g>(g: &'g Builder<'g>, ids: Val<'g>, [start, end]: [i64; 2]) -> Val<'g> {
    let is = |token: i64| g.cast(nn::is_any(g, ids, &[token]), DType::I64);
    let start = is(start);
    // Those that began before this token, less those that have ended.
    let open = g.cumsum(start, 1) - start - g.cumsum(is(end), 1);
    g.binary(vlmc_artifact::program::Binary::Lt, g.literal(Literal::scalar(DType::I64, 0.0)), open)
}

/// `pixel_values f32[images, 3, side, side]` to `image_features f32[images, queries, output_dim]`.
fn vision_tower<'g>(g: &'g Builder<'g>, c: &Vision) {
    let images = Dim::symbol("images");
    let side = Dim::from(c.image_size);
    let pixels = g.input("pixel_values", DType::F32, [images.clone(), 3.into(), side.clone(), side]);
    let w = g.weights("visual");
    let _scope = g.scope("visual");
    let (patches, rows, columns) = nn::patchify(g, pixels, c.patch_size);
    // A convolution whose stride is its kernel is a matrix product.
    let kernel = [c.width, 3, c.patch_size, c.patch_size];
    let weight = g.weight_as(w / "conv1" / "weight", &kernel, &[c.width, 3 * c.patch_size * c.patch_size]);
    // The table is that of CLIP's 224 pixels, whatever the size of the pictures.
    let table = g.table(w / "positional_embedding", &[256, c.width]);
    let x = g.linear_with(patches, weight, None) + nn::resized_positions(g, table, 16, &rows, &columns, Filter::Bicubic);
    let mut x = g.layer_norm(x, w / "ln_pre", VISION_EPS);
    for i in 0..c.layers {
        let w = w / "transformer" / "resblocks" / i;
        let _scope = g.scope(w.path());
        x = x + vision_attention(g, w / "attn", c, g.layer_norm(x, w / "ln_1", VISION_EPS));
        let h = g.layer_norm(x, w / "ln_2", VISION_EPS);
        let h = g.unary(Unary::Gelu, g.linear_bias(h, w / "mlp" / "c_fc", c.mlp));
        x = x + g.linear_bias(h, w / "mlp" / "c_proj", c.width);
    }
    let x = resampler(g, w / "attn_pool", c, x, [&rows, &columns]);
    let x = g.layer_norm(x, w / "ln_post", VISION_EPS);
    let proj = g.transposed(w / "proj", [c.output_dim, c.output_dim]);
    g.output("image_features", g.linear_with(x, proj, None));
}

/// Attention between all patches: `x f32[images, patches, width]`. The rows of `in_proj` are ordered by head, and by query, key
/// and value within a head (Megatron).
fn vision_attention<'g>(g: &'g Builder<'g>, w: W<'g>, c: &Vision, x: Val<'g>) -> Val<'g> {
    let (images, patches, head_dim) = (x.dim(0), x.dim(1), c.width / c.heads);
    let qkv = g.linear_bias(x, w / "in_proj", 3 * c.width);
    let qkv = g.reshape(qkv, [images.clone(), patches.clone(), c.heads.into(), 3.into(), head_dim.into()]);
    let qkv = g.transpose(qkv, &[3, 0, 2, 1, 4]);
    let part = |i: usize| g.reshape(g.slice(qkv, 0, i, 1), [images.clone(), c.heads.into(), patches.clone(), head_dim.into()]);
    let y = g.attention(part(0), part(1), part(2), 1.0 / (head_dim as f64).sqrt(), Mask::Full, None);
    g.linear_bias(g.merge_heads(y), w / "out_proj", c.width)
}

/// Cross-attention of learned queries to `x f32[images, patches, width]`: `f32[images, queries, output_dim]`. Positions are added
/// to queries and keys, not to values.
fn resampler<'g>(g: &'g Builder<'g>, w: W<'g>, c: &Vision, x: Val<'g>, [rows, columns]: [&Dim; 2]) -> Val<'g> {
    let _scope = g.scope(w.path());
    let (d, heads) = (c.output_dim, c.output_dim / 128);
    let x = if c.width == d { x } else { g.linear(x, w / "kv_proj", d) };
    let x = g.layer_norm(x, w / "ln_kv", VISION_EPS);
    let positions = g.table(w / "pos_embed", &[c.queries, d]);
    let queries = g.layer_norm(g.table(w / "query", &[c.queries, d]), w / "ln_q", VISION_EPS) + positions;
    let keys = x + nn::resized_positions(g, positions, c.queries.isqrt(), rows, columns, Filter::Bicubic);
    let w = w / "attn";
    let project = |x: Val<'g>, part: usize| g.split_heads(nn::in_proj(g, w, x, d, part..part + 1), heads);
    let q = project(queries, 0);
    let q = g.broadcast(q, vec![x.dim(0), q.dim(0), q.dim(1), q.dim(2)]);
    let y = g.attention(q, project(keys, 1), project(x, 2), 1.0 / 128f64.sqrt(), Mask::Full, None);
    g.linear_bias(g.merge_heads(y), w / "out_proj", d)
}

/// `visual.image_transform`: to a square, whatever the picture's shape.
fn processor(c: &Section<'_>) -> Result<Option<Processor>> {
    let vision = Vision::new(&visual(c)?)?;
    Ok(Some(Processor::Standard(StandardProcessor {
        resize: Some(Resize::Exact { height: vision.image_size, width: vision.image_size }),
        crop: None,
        resample: Resample::Bicubic,
        // OpenAI CLIP's.
        image_mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
        image_std: [0.268_629_54, 0.261_302_6, 0.275_777_1],
        rescale_factor: 1.0 / 255.0,
        tokens: vision.queries,
    })))
}
