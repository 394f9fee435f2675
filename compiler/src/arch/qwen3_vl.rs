//! Qwen3-VL, the dense models (Bai et al., 2025, arXiv 2511.21631). Reference: transformers `modeling_qwen3_vl.py`. Its tower has
//! a learned position table stretched over each picture, and gives features of inner layers too, which the decoder adds after
//! its first layers (deepstack).

use super::{
    Architecture, Lowered, Preset, SideFiles,
    config::Section,
    decoder::{Decoder, Positions, WIDTH},
    graph, nn,
    qwen2_vl::{self, Patches, Tower, VISION_EPS},
};
use crate::{Error, Result};
use serde_json::{Value, json};
use vlmc_artifact::{FrameText, Processor, program::Unary};
use vlmc_ir::{Builder, Weights};

pub(super) const ARCHITECTURE: Architecture = Architecture {
    model_types: &["qwen3_vl"],
    alias: "qwen3-vl",
    title: "Qwen3-VL",
    reference: "arXiv 2511.21631; transformers Qwen3VLForConditionalGeneration",
    notes: "The dense sizes: interleaved M-RoPE, deepstack features added after the first decoder layers, a position table stretched over \
        each picture's grid, and videos as frames with their times in the prompt. The mixture-of-experts sizes are not supported.",
    canonical_name: qwen2_vl::canonical_name,
    ignored: qwen2_vl::ignored,
    presets: &[
        Preset { name: "qwen3-vl-2b", hub: "Qwen/Qwen3-VL-2B-Instruct", parameters: 2_127_532_032, config: || config(&B2), files },
        Preset { name: "qwen3-vl-4b", hub: "Qwen/Qwen3-VL-4B-Instruct", parameters: 4_437_815_808, config: || config(&B4), files },
        Preset { name: "qwen3-vl-8b", hub: "Qwen/Qwen3-VL-8B-Instruct", parameters: 8_767_123_696, config: || config(&B8), files },
        Preset { name: "qwen3-vl-32b", hub: "Qwen/Qwen3-VL-32B-Instruct", parameters: 33_357_390_064, config: || config(&B32), files },
    ],
    lower,
    processor: |_, files| processor(files),
};

/// What the published sizes differ in.
struct Size {
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    tie_word_embeddings: bool,
    vision: Vision,
}

/// A vision tower.
struct Vision {
    depth: usize,
    hidden_size: usize,
    intermediate_size: usize,
    deepstack_visual_indexes: [usize; 3],
}

const SMALL: Vision = Vision { depth: 24, hidden_size: 1024, intermediate_size: 4096, deepstack_visual_indexes: [5, 11, 17] };
/// SigLIP 2 so400m's sizes.
const LARGE: Vision = Vision { depth: 27, hidden_size: 1152, intermediate_size: 4304, deepstack_visual_indexes: [8, 16, 24] };

const B2: Size = Size {
    hidden_size: 2048,
    intermediate_size: 6144,
    num_hidden_layers: 28,
    num_attention_heads: 16,
    tie_word_embeddings: true,
    vision: SMALL,
};
const B4: Size = Size {
    hidden_size: 2560,
    intermediate_size: 9728,
    num_hidden_layers: 36,
    num_attention_heads: 32,
    tie_word_embeddings: true,
    vision: SMALL,
};
const B8: Size = Size {
    hidden_size: 4096,
    intermediate_size: 12288,
    num_hidden_layers: 36,
    num_attention_heads: 32,
    tie_word_embeddings: false,
    vision: LARGE,
};
const B32: Size = Size {
    hidden_size: 5120,
    intermediate_size: 25600,
    num_hidden_layers: 64,
    num_attention_heads: 64,
    tie_word_embeddings: false,
    vision: LARGE,
};

/// `config.json` as published on the hub.
fn config(p: &Size) -> Value {
    json!({
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "image_token_id": 151_655,
        "model_type": "qwen3_vl",
        "text_config": {
            "attention_bias": false,
            "attention_dropout": 0.0,
            "bos_token_id": 151_643,
            "dtype": "bfloat16",
            "eos_token_id": 151_645,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": p.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": p.intermediate_size,
            "max_position_embeddings": 262_144,
            "model_type": "qwen3_vl_text",
            "num_attention_heads": p.num_attention_heads,
            "num_hidden_layers": p.num_hidden_layers,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-6,
            "rope_scaling": {"mrope_interleaved": true, "mrope_section": [24, 20, 20], "rope_type": "default"},
            "rope_theta": 5_000_000.0,
            "tie_word_embeddings": p.tie_word_embeddings,
            "use_cache": true,
            "vocab_size": 151_936
        },
        "tie_word_embeddings": p.tie_word_embeddings,
        "transformers_version": "4.57.0",
        "video_token_id": 151_656,
        "vision_config": {
            "deepstack_visual_indexes": p.vision.deepstack_visual_indexes,
            "depth": p.vision.depth,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": p.vision.hidden_size,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": p.vision.intermediate_size,
            "model_type": "qwen3_vl",
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "out_hidden_size": p.hidden_size,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2
        },
        "vision_end_token_id": 151_653,
        "vision_start_token_id": 151_652
    })
}

/// Qwen2-VL's, but for the processors' settings, and a template without a system message of its own.
fn files() -> Vec<(&'static str, Value)> {
    let template = "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let processor = |class: &str, field: &str, shortest_edge: usize, longest_edge: usize| {
        json!({"size": {"shortest_edge": shortest_edge, "longest_edge": longest_edge}, "patch_size": 16, "temporal_patch_size": 2,
            "merge_size": 2, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], field: class, "processor_class": "Qwen3VLProcessor"})
    };
    let mut files = qwen2_vl::files();
    for (name, file) in &mut files {
        match *name {
            "generation_config.json" => {
                *file = json!({"bos_token_id": 151_643, "pad_token_id": 151_643, "do_sample": true, "eos_token_id": [151_645, 151_643],
                    "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.0});
            }
            "preprocessor_config.json" => *file = processor("Qwen2VLImageProcessorFast", "image_processor_type", 65_536, 16_777_216),
            "tokenizer_config.json" => {
                file["chat_template"] = template.into();
                file["model_max_length"] = 262_144.into();
            }
            _ => {}
        }
    }
    files.push(("video_preprocessor_config.json", processor("Qwen3VLVideoProcessor", "video_processor_type", 4096, 25_165_824)));
    files
}

/// Qwen3's decoder: Llama's with norms of queries and keys, and interleaved multimodal positions.
fn text_config(c: &Section<'_>) -> Result<Decoder> {
    let c = c.section_or_self("text_config")?;
    c.only("attention_bias", &[json!(false)])?;
    let mut text = Decoder::new(&c, None)?;
    let Positions::Mrope { interleaved, .. } = &mut text.positions else {
        return Err(Error::config(c.path("rope_scaling"), "must hold `mrope_section`"));
    };
    // The reference does not ask.
    *interleaved = true;
    text.attention.qk_norm = Some(text.rms_norm_eps);
    Ok(text)
}

/// What is this tower's own.
struct Own {
    intermediate_size: usize,
    act: Unary,
    /// Side of the table of positions.
    side: usize,
    /// Layers whose outputs are features too.
    deepstack: Vec<usize>,
}

fn lower(c: &Section<'_>, weights: &Weights<'_>, files: &SideFiles) -> Result<Lowered> {
    let mut text = text_config(c)?;
    let vision = c.section("vision_config")?.ok_or_else(|| Error::config("vision_config", "is missing"))?;
    let tower = Tower::new(&vision, "hidden_size", "out_hidden_size", text.hidden_size, Some(16))?;
    let table = vision.opt_int("num_position_embeddings", 1..=1 << 24)?.unwrap_or(2304);
    let side = table.isqrt();
    if side * side != table {
        return Err(Error::config(vision.path("num_position_embeddings"), format!("{table} is not the square of a number")));
    }
    let deepstack: Vec<usize> = vision.get("deepstack_visual_indexes")?.unwrap_or_else(|| vec![8, 16, 24]);
    let field = || vision.path("deepstack_visual_indexes");
    if let Some(layer) = deepstack.iter().find(|i| **i >= tower.depth) {
        return Err(Error::config(field(), format!("the tower has no layer {layer}")));
    }
    if !deepstack.is_sorted_by(|a, b| a < b) || deepstack.len() > text.num_hidden_layers {
        let message = format!("{deepstack:?} must rise, and be no more than the decoder's {} layers", text.num_hidden_layers);
        return Err(Error::config(field(), message));
    }
    text.deepstack = deepstack.len();
    let own = Own {
        intermediate_size: vision.int("intermediate_size", WIDTH)?,
        act: nn::activation(&vision, "hidden_act", Unary::GeluTanh)?,
        side,
        deepstack,
    };
    // Each group of frames stands in the prompt on its own, after its time.
    let token = |field: &str, default: &str| -> Result<String> {
        let id: Option<i64> = c.get(field)?;
        Ok(id.and_then(|id| files.token(id)).unwrap_or_else(|| default.into()))
    };
    let [start, video, end] = [
        token("vision_start_token_id", "<|vision_start|>")?,
        token("video_token_id", "<|video_pad|>")?,
        token("vision_end_token_id", "<|vision_end|>")?,
    ];
    let video = format!("{start}{video}{end}");
    let positions = vlmc_artifact::Positions::Mrope {
        spatial_merge_size: tower.merge,
        tokens_per_second: None,
        frame_text: Some(FrameText { frame: format!("<{{seconds}} seconds>{video}"), video }),
    };
    let graph = graph("vision", weights, |g| vision_tower(g, &tower, &own, text.hidden_size))?;
    qwen2_vl::family(c, weights, &text, positions, graph)
}

/// Patches of any number of pictures and videos to rows for the decoder, one per `spatial_merge_size`² patches; beside them the
/// rows for its first layers, `deepstack_features f32[image_tokens, levels * hidden]`.
fn vision_tower<'g>(g: &'g Builder<'g>, t: &Tower, c: &Own, hidden_size: usize) {
    let w = g.weights("visual");
    let Patches { tokens, grid, frame, rope, x, .. } = t.patches(g, w, true);
    let mut x = {
        let _scope = g.scope("visual.pos_embed");
        let table = g.table(w / "pos_embed" / "weight", &[c.side * c.side, t.width]);
        x + g.stretched_positions(table, grid, x.dim(0), t.merge, c.side)
    };
    let mut levels = vec![];
    for i in 0..t.depth {
        let w_block = w / "blocks" / i;
        let _scope = g.scope(w_block.path());
        let h = g.layer_norm(x, w_block / "norm1", VISION_EPS);
        x = x + t.attention(g, w_block / "attn", h, rope, frame);
        let h = g.layer_norm(x, w_block / "norm2", VISION_EPS);
        let h = g.unary(c.act, g.linear_bias(h, w_block / "mlp" / "linear_fc1", c.intermediate_size));
        x = x + g.linear_bias(h, w_block / "mlp" / "linear_fc2", t.width);
        if let Some(level) = c.deepstack.iter().position(|layer| *layer == i) {
            let w = w / "deepstack_merger_list" / level;
            let _scope = g.scope(w.path());
            // Here the norm is over the patches of a token together.
            let h = g.reshape(x, [tokens.clone(), (t.width * t.merge_area()).into()]);
            let h = g.layer_norm(h, w / "norm", VISION_EPS);
            levels.push(t.merged(g, [w / "linear_fc1", w / "linear_fc2"], h, &tokens, hidden_size));
        }
    }
    let w = w / "merger";
    let _scope = g.scope(w.path());
    let x = g.layer_norm(x, w / "norm", VISION_EPS);
    g.output("image_features", t.merged(g, [w / "linear_fc1", w / "linear_fc2"], x, &tokens, hidden_size));
    if !levels.is_empty() {
        g.output("deepstack_features", g.concat(&levels, 1));
    }
}

/// Qwen2-VL's, with the budget of a video's pixels for all its frames.
fn processor(files: &SideFiles) -> Result<Option<Processor>> {
    let Some(Processor::Qwen2Vl(mut p)) = qwen2_vl::image_processor(files, [0.5; 3], [0.5; 3], 16)? else { return Ok(None) };
    p.video_budget_of_clip = true;
    if files.video_preprocessor.is_none() {
        // The class's own.
        (p.video_min_pixels, p.video_max_pixels) = (128 * 32 * 32, 768 * 32 * 32);
    }
    Ok(Some(Processor::Qwen2Vl(p)))
}
