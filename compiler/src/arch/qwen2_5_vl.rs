//! Qwen2.5-VL (Bai et al., 2025, arXiv 2502.13923). Reference: transformers `modeling_qwen2_5_vl.py`. Qwen2-VL with another
//! vision tower: RMS norms, gated MLPs, and attention within windows in most layers.

use super::{
    Architecture, Lowered, Preset, SideFiles,
    config::Section,
    decoder::{LAYERS, WIDTH},
    graph, nn,
    qwen2_vl::{self, Patches, Tower, VISION_EPS},
};
use crate::{Error, Result};
use serde_json::{Value, json};
use vlmc_artifact::program::Unary;
use vlmc_ir::{Builder, Val, Weights};

pub(super) const ARCHITECTURE: Architecture = Architecture {
    model_types: &["qwen2_5_vl"],
    alias: "qwen2.5-vl",
    title: "Qwen2.5-VL",
    reference: "arXiv 2502.13923; transformers Qwen2_5_VLForConditionalGeneration",
    notes: "What Qwen2-VL has, with windows and full attention in the tower (windows are segments of one attention, so partial ones need no \
        padding) and temporal positions that follow a video's time (`second_per_grid_ts`). Positions as in the paper: each modality \
        starts at the previous one's maximum plus 1; transformers 5.x starts earlier after long videos: give `position_ids` to have \
        its numbers.",
    canonical_name: qwen2_vl::canonical_name,
    ignored: qwen2_vl::ignored,
    presets: &[
        Preset { name: "qwen2.5-vl-3b", hub: "Qwen/Qwen2.5-VL-3B-Instruct", parameters: 3_754_622_976, config: || config(&B3), files },
        Preset { name: "qwen2.5-vl-7b", hub: "Qwen/Qwen2.5-VL-7B-Instruct", parameters: 8_292_166_656, config: || config(&B7), files },
        Preset { name: "qwen2.5-vl-32b", hub: "Qwen/Qwen2.5-VL-32B-Instruct", parameters: 33_452_718_336, config: || config(&B32), files },
        Preset { name: "qwen2.5-vl-72b", hub: "Qwen/Qwen2.5-VL-72B-Instruct", parameters: 73_410_777_344, config: || config(&B72), files },
    ],
    lower,
    processor: qwen2_vl::processor,
};

/// What the published sizes differ in.
struct Size {
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    vocab_size: usize,
    tie_word_embeddings: bool,
    vision_intermediate_size: usize,
}

const B3: Size = Size {
    hidden_size: 2048,
    intermediate_size: 11008,
    num_hidden_layers: 36,
    num_attention_heads: 16,
    num_key_value_heads: 2,
    vocab_size: 151_936,
    tie_word_embeddings: true,
    vision_intermediate_size: 3420,
};
const B7: Size = Size {
    hidden_size: 3584,
    intermediate_size: 18944,
    num_hidden_layers: 28,
    num_attention_heads: 28,
    num_key_value_heads: 4,
    vocab_size: 152_064,
    tie_word_embeddings: false,
    vision_intermediate_size: 3420,
};
const B32: Size = Size {
    hidden_size: 5120,
    intermediate_size: 27648,
    num_hidden_layers: 64,
    num_attention_heads: 40,
    num_key_value_heads: 8,
    vision_intermediate_size: 3456,
    ..B7
};
const B72: Size = Size { hidden_size: 8192, intermediate_size: 29568, num_hidden_layers: 80, num_attention_heads: 64, ..B32 };

/// `config.json` as published on the hub.
fn config(p: &Size) -> Value {
    let vision = json!({
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": p.vision_intermediate_size,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": p.hidden_size,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2
    });
    json!({
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": 151_643,
        "eos_token_id": 151_645,
        "vision_start_token_id": 151_652,
        "vision_end_token_id": 151_653,
        "vision_token_id": 151_654,
        "image_token_id": 151_655,
        "video_token_id": 151_656,
        "hidden_act": "silu",
        "hidden_size": p.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": p.intermediate_size,
        "max_position_embeddings": 128_000,
        "max_window_layers": p.num_hidden_layers,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": p.num_attention_heads,
        "num_hidden_layers": p.num_hidden_layers,
        "num_key_value_heads": p.num_key_value_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": p.tie_word_embeddings,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": true,
        "use_sliding_window": false,
        "vision_config": vision,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vocab_size": p.vocab_size
    })
}

/// Qwen2-VL's, with the repetition penalty of this generation.
fn files() -> Vec<(&'static str, Value)> {
    let mut files = qwen2_vl::files();
    for (name, file) in &mut files {
        match *name {
            "generation_config.json" => {
                file["repetition_penalty"] = json!(1.05);
                file["temperature"] = json!(1e-6);
            }
            "preprocessor_config.json" => file["processor_class"] = json!("Qwen2_5_VLProcessor"),
            _ => {}
        }
    }
    files
}

/// What is this tower's own.
struct Windows {
    intermediate_size: usize,
    act: Unary,
    /// Side of a window in blocks of `merge` x `merge` patches.
    side: usize,
    /// Layers that attend to the whole frame.
    full: Vec<usize>,
}

fn lower(c: &Section<'_>, weights: &Weights<'_>, _: &SideFiles) -> Result<Lowered> {
    let text = qwen2_vl::text_config(c)?;
    let vision = c.section("vision_config")?.ok_or_else(|| Error::config("vision_config", "is missing"))?;
    let tower = Tower::new(&vision, "hidden_size", "out_hidden_size", text.hidden_size, Some(14))?;
    // What is left out has the class default.
    let window = vision.opt_int("window_size", 1..=1 << 20)?.unwrap_or(112);
    let side = window / tower.merge / tower.patch_size;
    if side == 0 {
        let message = format!("{window} is less than a token's {} pixels", tower.merge * tower.patch_size);
        return Err(Error::config(vision.path("window_size"), message));
    }
    let full: Vec<usize> = vision.get("fullatt_block_indexes")?.unwrap_or_else(|| vec![7, 15, 23, 31]);
    if let Some(layer) = full.iter().find(|i| **i >= *LAYERS.end()) {
        return Err(Error::config(vision.path("fullatt_block_indexes"), format!("there can be no layer {layer}")));
    }
    let windows = Windows {
        intermediate_size: vision.opt_int("intermediate_size", WIDTH)?.unwrap_or(3420),
        act: nn::activation(&vision, "hidden_act", Unary::Silu)?,
        side,
        full,
    };
    let positions = vlmc_artifact::Positions::Mrope {
        spatial_merge_size: tower.merge,
        tokens_per_second: Some(vision.positive("tokens_per_second")?.unwrap_or(4.0)),
        frame_text: None,
    };
    let graph = graph("vision", weights, |g| vision_tower(g, &tower, &windows, text.hidden_size))?;
    qwen2_vl::family(c, weights, &text, positions, graph)
}

/// Patches of any number of pictures and videos to rows for the decoder, one per `spatial_merge_size`² patches. Between
/// the two they stand in the order of their windows, so that each window is one piece.
fn vision_tower<'g>(g: &'g Builder<'g>, t: &Tower, c: &Windows, hidden_size: usize) {
    let w = g.weights("visual");
    let Patches { tokens, grid, frame, rope: (cos, sin), x, .. } = t.patches(g, w, false);
    let (mut x, rope, window, place) = {
        let _scope = g.scope("visual.windows");
        let [patch, window, place] = g.window_order(grid, tokens.clone(), t.merge, c.side);
        let ordered = |v: Val<'g>| g.gather(v, patch, 0);
        (ordered(x), (ordered(cos), ordered(sin)), window, place)
    };
    for i in 0..t.depth {
        let w = w / "blocks" / i;
        let _scope = g.scope(w.path());
        let h = g.rms_norm(x, w / "norm1", VISION_EPS);
        x = x + t.attention(g, w / "attn", h, rope, if c.full.contains(&i) { frame } else { window });
        let h = g.rms_norm(x, w / "norm2", VISION_EPS);
        let w = w / "mlp";
        let gate = g.unary(c.act, g.linear_bias(h, w / "gate_proj", c.intermediate_size));
        x = x + g.linear_bias(gate * g.linear_bias(h, w / "up_proj", c.intermediate_size), w / "down_proj", t.width);
    }
    let w = w / "merger";
    let _scope = g.scope(w.path());
    let x = g.rms_norm(x, w / "ln_q", VISION_EPS);
    let x = t.merged(g, [w / "mlp" / 0, w / "mlp" / 2], x, &tokens, hidden_size);
    g.output("image_features", g.gather(x, place, 0));
}
