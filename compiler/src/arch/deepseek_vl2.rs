//! DeepSeek-VL2 (Wu et al., 2024, arXiv 2412.10302). Reference: `deepseek_vl2` of github.com/deepseek-ai/DeepSeek-VL2.

use super::{
    Architecture, Lowered, Preset, SideFiles,
    config::Section,
    decoder::{Decoder, Defaults, LAYERS, Positions, WIDTH, cached},
    deepseek_vl, graph, nn, symbol,
    timm::{self, Tower},
};
use crate::{Error, Result};
use serde_json::{Value, json};
use vlmc_artifact::{DeepseekVl2Processor, Processor, PromptRules, Task, program::Unary};
use vlmc_ir::{
    Builder, DType, Dim, Literal, Val, W, Weights,
    ops::{Mask, Route, TileRows},
};

pub(super) const ARCHITECTURE: Architecture = Architecture {
    model_types: &["deepseek_vl_v2"],
    alias: "deepseek-vl2",
    title: "DeepSeek-VL2",
    reference: "arXiv 2412.10302; github.com/deepseek-ai/DeepSeek-VL2",
    notes: "Dynamic tiling: the global view, a separator, and the tiles put together with newlines; without tiles from three pictures on. \
        Decoders with multi-head or latent attention, with or without a low rank of queries; routed and shared experts, softmax or sigmoid \
        scores, greedy, group-limited and loss-free routing. The cache holds expanded keys and values. Yarn scaling is not supported.",
    canonical_name: |name| name.into(),
    ignored: |name| name.starts_with("vision.attn_pool.") || name.ends_with("rotary_emb.inv_freq"),
    presets: &[
        Preset {
            name: "deepseek-vl2-tiny",
            hub: "deepseek-ai/deepseek-vl2-tiny",
            parameters: 3_355_263_088,
            config: || config(&TINY),
            files,
        },
        Preset {
            name: "deepseek-vl2-small",
            hub: "deepseek-ai/deepseek-vl2-small",
            parameters: 16_175_619_952,
            config: || config(&SMALL),
            files,
        },
        Preset { name: "deepseek-vl2", hub: "deepseek-ai/deepseek-vl2", parameters: 27_394_163_096, config: || config(&BASE), files },
    ],
    lower,
    processor,
};

/// Sizes of a published decoder; those of the vision tower are the same in all. They could not be compared with the published
/// files. With SigLIP's pooling (15.5 M), which those have and nothing uses, the numbers of weights are 3.37, 16.19 and 27.41 B; the
/// paper gives 3.37, 16.1 and 27.5 B.
struct Size {
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    moe_intermediate_size: usize,
    n_routed_experts: usize,
    vocab_size: usize,
    use_mla: bool,
    /// Sigmoid scores with a correction bias, normalised and scaled by 2, instead of a softmax.
    no_aux_loss: bool,
}

const TINY: Size = Size {
    hidden_size: 1280,
    intermediate_size: 6848,
    num_hidden_layers: 12,
    num_attention_heads: 10,
    moe_intermediate_size: 896,
    n_routed_experts: 64,
    vocab_size: 129_280,
    use_mla: false,
    no_aux_loss: false,
};
const SMALL: Size = Size {
    hidden_size: 2048,
    intermediate_size: 10944,
    num_hidden_layers: 27,
    num_attention_heads: 16,
    moe_intermediate_size: 1408,
    vocab_size: 102_400,
    use_mla: true,
    ..TINY
};
const BASE: Size = Size {
    hidden_size: 2560,
    intermediate_size: 12288,
    num_hidden_layers: 30,
    num_attention_heads: 32,
    moe_intermediate_size: 1536,
    n_routed_experts: 72,
    vocab_size: 129_280,
    no_aux_loss: true,
    ..SMALL
};

/// Sizes in pixels that a picture may be cut into tiles from: up to 9 tiles of 384, none a multiple in shape of another but the
/// squares and 1 : 2.
const CANDIDATES: [[usize; 2]; 23] = [
    [384, 384],
    [384, 768],
    [768, 384],
    [384, 1152],
    [1152, 384],
    [384, 1536],
    [1536, 384],
    [768, 768],
    [384, 1920],
    [1920, 384],
    [384, 2304],
    [2304, 384],
    [768, 1152],
    [1152, 768],
    [384, 2688],
    [2688, 384],
    [384, 3072],
    [3072, 384],
    [768, 1536],
    [1536, 768],
    [384, 3456],
    [3456, 384],
    [1152, 1152],
];

/// `config.json` as published on the hub, which leaves most fields to the defaults of its classes.
fn config(p: &Size) -> Value {
    let mut language = json!({
        "architectures": ["DeepseekV2ForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "first_k_dense_replace": 1,
        "hidden_size": p.hidden_size,
        "intermediate_size": p.intermediate_size,
        "kv_lora_rank": if p.use_mla { Some(512) } else { None },
        "lm_head": true,
        "max_position_embeddings": 4096,
        "model_type": "deepseek_v2",
        "moe_intermediate_size": p.moe_intermediate_size,
        "n_group": 1,
        "n_routed_experts": p.n_routed_experts,
        "n_shared_experts": 2,
        "num_attention_heads": p.num_attention_heads,
        "num_experts_per_tok": 6,
        "num_hidden_layers": p.num_hidden_layers,
        "num_key_value_heads": p.num_attention_heads,
        "q_lora_rank": null,
        "qk_nope_head_dim": if p.use_mla { 128 } else { 0 },
        "qk_rope_head_dim": if p.use_mla { 64 } else { 0 },
        "rm_head": false,
        "topk_group": 1,
        "topk_method": if p.no_aux_loss { "noaux_tc" } else { "greedy" },
        "torch_dtype": "bfloat16",
        "use_mla": p.use_mla,
        "v_head_dim": if p.use_mla { 128 } else { 0 },
        "vocab_size": p.vocab_size
    });
    if p.no_aux_loss {
        language["scoring_func"] = json!("sigmoid");
        language["norm_topk_prob"] = json!(true);
        language["routed_scaling_factor"] = json!(2.0);
    }
    json!({
        "candidate_resolutions": CANDIDATES,
        "global_view_pos": "head",
        "language_config": language,
        "model_type": "deepseek_vl_v2",
        "projector_config": {"model_type": "mlp_projector", "n_embed": p.hidden_size},
        "tile_tag": "2D",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.38.2",
        "vision_config": {
            "layers": timm::SO400M.layers,
            "mlp_ratio": timm::SO400M.mlp_ratio,
            "model_name": "siglip_so400m_patch14_384",
            "model_type": "vision",
            "patch_size": timm::SO400M.patch_size,
            "width": timm::SO400M.width
        }
    })
}

/// Special tokens of a synthetic tokenizer, after those of its vocabulary.
const SPECIALS: [&str; 9] =
    ["<｜▁pad▁｜>", IMAGE_TOKEN, "<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>", "<|User|>", "<|Assistant|>"];

/// The other files of a synthetic checkpoint. The published vocabularies have their special tokens elsewhere.
fn files() -> Vec<(&'static str, Value)> {
    vec![
        (
            "processor_config.json",
            json!({"candidate_resolutions": CANDIDATES, "downsample_ratio": 2, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
                "image_token": IMAGE_TOKEN, "normalize": true, "pad_token": SPECIALS[0], "patch_size": 14, "sft_format": "deepseek",
                "processor_class": "DeepseekVLV2Processor"}),
        ),
        ("tokenizer.json", crate::synth::tokenizer(100_000, &SPECIALS)),
        (
            "tokenizer_config.json",
            json!({"bos_token": null, "eos_token": null, "pad_token": SPECIALS[0], "model_max_length": 4096,
                "tokenizer_class": "LlamaTokenizerFast"}),
        ),
    ]
}

/// Placeholder of a picture, unless the processor has another.
const IMAGE_TOKEN: &str = "<image>";

/// `DeepseekV2Config` of the reference.
const DEEPSEEK_V2: Defaults = Defaults {
    hidden_size: 4096,
    intermediate_size: 11008,
    num_hidden_layers: 30,
    num_attention_heads: 32,
    vocab_size: 102_400,
    max_position_embeddings: 2048,
    rms_norm_eps: 1e-6,
};

/// The DeepSeek-V2 decoder: Llama's, with latent attention and a mixture of experts where the config says so.
struct Language {
    decoder: Decoder,
    latent: Option<LatentAttention>,
    experts: Option<Experts>,
}

impl Language {
    fn new(c: &Section<'_>, root: &str, weights: &Weights<'_>) -> Result<Self> {
        c.only("attention_bias", &[json!(false)])?;
        // How it was trained and spread over machines, and sizes of parts that a config may describe and not have.
        c.without_effect(&["aux_loss_alpha", "seq_aux", "ep_size", "lm_head", "rm_head", "n_group", "topk_group"]);
        c.without_effect(&["kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "num_key_value_heads"]);
        if let Some(rope) = c.section("rope_scaling")? {
            for field in ["type", "rope_type"] {
                rope.only(field, &[json!("linear"), json!("default")])?;
            }
        }
        let latent = if c.get("use_mla")?.unwrap_or(true) { Some(LatentAttention::new(c, root, weights)?) } else { None };
        let decoder = match &latent {
            // Only a part of each head turns.
            Some(latent) => Decoder::with_head_dim(c, Some(&DEEPSEEK_V2), Some(latent.rope))?,
            None => Decoder::new(c, Some(&DEEPSEEK_V2))?,
        };
        if !matches!(decoder.positions, Positions::Plain(_)) {
            return Err(Error::config(c.path("rope_scaling"), "multimodal positions are not supported here"));
        }
        Ok(Self { experts: Experts::new(c, &decoder)?, decoder, latent })
    }

    fn layer<'g>(&self, g: &'g Builder<'g>, w: W<'g>, i: usize, x: Val<'g>, rope: (Val<'g>, Val<'g>), mask: Val<'g>) -> Val<'g> {
        let _scope = g.scope(w.path());
        let d = &self.decoder;
        let h = g.rms_norm(x, w / "input_layernorm", d.rms_norm_eps);
        let x = x + match &self.latent {
            Some(latent) => latent.apply(g, w / "self_attn", i, h, rope, mask),
            None => d.attention.apply(g, w / "self_attn", i, h, rope, mask),
        };
        let h = g.rms_norm(x, w / "post_attention_layernorm", d.rms_norm_eps);
        x + match &self.experts {
            Some(experts) if experts.serve(i) => experts.apply(g, w / "mlp", h, d.act),
            _ => nn::gated_mlp(g, w / "mlp", h, d.act, d.intermediate_size, d.hidden_size),
        }
    }
}

/// Multi-head latent attention (DeepSeek-V2, Liu et al., 2024, section 2.1): keys and values of all heads come from one narrow
/// vector, and one rotated key part serves all heads.
struct LatentAttention {
    hidden_size: usize,
    heads: usize,
    q_lora: Option<usize>,
    kv_lora: usize,
    /// Width of the part of a head without positions.
    nope: usize,
    /// Width of the part of a head with them.
    rope: usize,
    v: usize,
}

/// Epsilon of the norms inside the attention, fixed in the reference.
const LATENT_EPS: f64 = 1e-6;

impl LatentAttention {
    fn new(c: &Section<'_>, root: &str, weights: &Weights<'_>) -> Result<Self> {
        let width = |field: &str, default: usize| Ok::<_, Error>(c.opt_int(field, WIDTH)?.unwrap_or(default));
        let stored = weights.contains(&format!("{root}.layers.0.self_attn.q_a_proj.weight"));
        // A missing rank has the default of the class, `null` means none.
        let q_lora = if stored.unwrap_or(!c.mentions("q_lora_rank") || c.opt_int("q_lora_rank", WIDTH)?.is_some()) {
            Some(width("q_lora_rank", 1536)?)
        } else {
            None
        };
        let rope = width("qk_rope_head_dim", 64)?;
        if !rope.is_multiple_of(2) {
            return Err(Error::config(c.path("qk_rope_head_dim"), format!("{rope} is odd, rotary positions need pairs")));
        }
        Ok(Self {
            hidden_size: width("hidden_size", DEEPSEEK_V2.hidden_size)?,
            heads: width("num_attention_heads", DEEPSEEK_V2.num_attention_heads)?,
            q_lora,
            kv_lora: width("kv_lora_rank", 512)?,
            nope: width("qk_nope_head_dim", 128)?,
            rope,
            v: width("v_head_dim", 128)?,
        })
    }

    fn apply<'g>(
        &self,
        g: &'g Builder<'g>,
        w: W<'g>,
        layer: usize,
        x: Val<'g>,
        rope: (Val<'g>, Val<'g>),
        attention_mask: Val<'g>,
    ) -> Val<'g> {
        let width = self.nope + self.rope;
        let q = match self.q_lora {
            Some(rank) => {
                let low = g.rms_norm(g.linear(x, w / "q_a_proj", rank), w / "q_a_layernorm", LATENT_EPS);
                g.linear(low, w / "q_b_proj", self.heads * width)
            }
            None => g.linear(x, w / "q_proj", self.heads * width),
        };
        let q = g.split_heads(q, self.heads);
        let latent = g.linear(x, w / "kv_a_proj_with_mqa", self.kv_lora + self.rope);
        let low = g.rms_norm(g.slice(latent, 2, 0, self.kv_lora), w / "kv_a_layernorm", LATENT_EPS);
        let kv = g.split_heads(g.linear(low, w / "kv_b_proj", self.heads * (self.nope + self.v)), self.heads);
        let k_rope = g.split_heads(g.slice(latent, 2, self.kv_lora, self.rope), 1);

        // The pairs that turn lie side by side here, and half a head apart where `rotary` looks for them.
        let order = (0..self.rope).step_by(2).chain((1..self.rope).step_by(2)).map(|i| i as f64).collect();
        let order = g.literal(Literal::vector(DType::I64, order));
        let turned = |x: Val<'g>| g.rotary(g.gather(x, order, 3), rope);
        let q = g.concat(&[g.slice(q, 3, 0, self.nope), turned(g.slice(q, 3, self.nope, self.rope))], 3);
        let shared = g.broadcast(turned(k_rope), vec![x.dim(0), self.heads.into(), x.dim(1), self.rope.into()]);
        let k = g.concat(&[g.slice(kv, 3, 0, self.nope), shared], 3);
        let v = g.slice(kv, 3, self.nope, self.v);
        let (k, v) = (cached(g, layer, "key", k), cached(g, layer, "value", v));
        let y = g.attention(q, k, v, 1.0 / (width as f64).sqrt(), Mask::Causal, Some(attention_mask));
        g.linear(g.merge_heads(y), w / "o_proj", self.hidden_size)
    }
}

/// DeepSeekMoE (Dai et al., 2024): routed experts, of which each token takes a few, and shared ones that all tokens take.
struct Experts {
    hidden_size: usize,
    intermediate_size: usize,
    count: usize,
    /// Shared experts, which are one MLP of their joint width.
    shared: usize,
    route: Route,
    /// Whether experts are chosen with a bias that balances their loads.
    bias: bool,
    first_layer: usize,
    every: usize,
}

impl Experts {
    fn new(c: &Section<'_>, decoder: &Decoder) -> Result<Option<Self>> {
        const COUNT: std::ops::RangeInclusive<usize> = 1..=1 << 16;
        let Some(count) = c.opt_int("n_routed_experts", COUNT)? else { return Ok(None) };
        let text = |field: &str| c.get::<String>(field);
        let sigmoid = match text("scoring_func")?.as_deref() {
            None | Some("softmax") => false,
            Some("sigmoid") => true,
            Some(other) => {
                let message = format!("'{other}' is not supported; supported: softmax, sigmoid");
                return Err(Error::config(c.path("scoring_func"), message));
            }
        };
        let (grouped, bias) = match text("topk_method")?.as_deref() {
            None | Some("greedy") => (false, false),
            Some("group_limited_greedy") => (true, false),
            Some("noaux_tc") => (true, true),
            Some(other) => {
                let message = format!("'{other}' is not supported; supported: greedy, group_limited_greedy, noaux_tc");
                return Err(Error::config(c.path("topk_method"), message));
            }
        };
        let (groups, kept_groups) = if grouped { (c.int("n_group", COUNT)?, c.int("topk_group", COUNT)?) } else { (1, 1) };
        if !count.is_multiple_of(groups) || kept_groups > groups {
            let message = format!("{kept_groups} of {groups} groups of {count} experts");
            return Err(Error::config(c.path("n_group"), message));
        }
        let k = c.int("num_experts_per_tok", COUNT)?;
        if k > count {
            return Err(Error::config(c.path("num_experts_per_tok"), format!("{k} is more than n_routed_experts {count}")));
        }
        let normalize = c.get("norm_topk_prob")?.unwrap_or(false);
        let scale = c.positive("routed_scaling_factor")?.unwrap_or(1.0);
        Ok(Some(Self {
            hidden_size: decoder.hidden_size,
            intermediate_size: c.opt_int("moe_intermediate_size", WIDTH)?.unwrap_or(1407),
            count,
            shared: c.opt_int("n_shared_experts", 0..=1 << 10)?.unwrap_or(0),
            route: Route { k, sigmoid, groups, kept_groups, normalize, scale },
            bias,
            first_layer: c.opt_int("first_k_dense_replace", 0..=1 << 10)?.unwrap_or(0),
            every: c.opt_int("moe_layer_freq", LAYERS)?.unwrap_or(1),
        }))
    }

    /// Whether layer `i` has them.
    fn serve(&self, i: usize) -> bool {
        i >= self.first_layer && i.is_multiple_of(self.every)
    }

    fn apply<'g>(&self, g: &'g Builder<'g>, w: W<'g>, x: Val<'g>, act: Unary) -> Val<'g> {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let rows = g.reshape(x, [&x.dim(0) * &x.dim(1), hidden.into()]);
        let bias = self.bias.then(|| g.table(w / "gate" / "e_score_correction_bias", &[self.count]));
        let (experts, shares) = g.route(self.route.clone(), g.linear(rows, w / "gate", self.count), bias);
        let stacked = |part: &str, shape: [usize; 2]| g.stacked(w / "experts", &format!("{part}.weight"), self.count, &shape);
        let matrices = [stacked("gate_proj", [inner, hidden]), stacked("up_proj", [inner, hidden]), stacked("down_proj", [hidden, inner])];
        let y = g.reshape(g.moe(rows, experts, shares, matrices, act), x.ty().shape);
        if self.shared == 0 {
            return y;
        }
        y + nn::gated_mlp(g, w / "shared_experts", x, act, self.shared * inner, hidden)
    }
}

/// From the vision tower's cells to the decoder's features: squares of cells side by side, then an MLP.
struct Projector {
    ratio: usize,
    depth: usize,
    inner: usize,
    out: usize,
}

impl Projector {
    fn new(c: &Section<'_>, tower: &Tower, hidden_size: usize) -> Result<Self> {
        c.only("projector_type", &[json!("downsample_mlp_gelu")])?;
        c.only("token_pooling", &[json!(false)])?;
        let equal = |field: &str, default: usize, what: &str, wanted: usize| {
            let have = c.opt_int(field, WIDTH)?.unwrap_or(default);
            if have == wanted { Ok(have) } else { Err(Error::config(c.path(field), format!("{have} must equal {what} {wanted}"))) }
        };
        equal("input_dim", 1152, "the vision tower's width", tower.width())?;
        let out = equal("n_embed", 2048, "the decoder's hidden_size", hidden_size)?;
        Ok(Self {
            ratio: c.opt_int("downsample_ratio", 1..=64)?.unwrap_or(2),
            depth: c.opt_int("depth", 2..=64)?.unwrap_or(2),
            inner: out * c.opt_int("mlp_ratio", 1..=64)?.unwrap_or(1),
            out,
        })
    }

    /// Rows, and columns, of features of a tile.
    fn side(&self, grid: usize) -> usize {
        grid.div_ceil(self.ratio)
    }

    /// `x f32[n, grid², width]` to `f32[n * side², out]`.
    fn apply<'g>(&self, g: &'g Builder<'g>, w: W<'g>, x: Val<'g>, grid: usize) -> Val<'g> {
        let _scope = g.scope(w.path());
        let (n, width, side, r) = (x.dim(0), x.dim(2), self.side(grid), self.ratio);
        let mut x = g.reshape(x, [n.clone(), grid.into(), grid.into(), width.clone()]);
        for axis in [1, 2] {
            let mut shape = x.ty().shape;
            shape[axis] = (side * r - grid).into();
            if side * r > grid {
                x = g.concat(&[x, g.broadcast(g.literal(Literal::scalar(DType::F32, 0.0)), shape)], axis);
            }
        }
        // Of a square's cells, the first channels of all come first (torch's `unfold`).
        let x = g.reshape(x, [n.clone(), side.into(), r.into(), side.into(), r.into(), width.clone()]);
        let x = g.transpose(x, &[0, 1, 3, 5, 2, 4]);
        let mut x = g.reshape(x, [&n * (side * side), &width * (r * r)]);
        for i in 0..self.depth {
            let width = if i + 1 < self.depth { self.inner } else { self.out };
            x = if i == 0 { x } else { g.unary(Unary::Gelu, x) };
            x = g.linear_bias(x, w / "layers" / (2 * i), width);
        }
        x
    }
}

fn lower(c: &Section<'_>, weights: &Weights<'_>, files: &SideFiles) -> Result<Lowered> {
    c.only("tile_tag", &[json!("2D")])?;
    c.only("global_view_pos", &[json!("head"), json!("tail")])?;
    let vision = c.require_section("vision_config")?;
    vision.only("class_token", &[json!(false)])?;
    vision.only("global_pool", &[json!("map")])?;
    vision.only("ignore_head", &[json!(true)])?;
    vision.without_effect(&["model_name", "num_classes", "use_checkpoint", "weight_init", "deterministic", "num_recomputing_layers"]);
    c.without_effect(&["candidate_resolutions"]);
    // What the config leaves out are the sizes of SigLIP-L, whatever its `model_name`.
    let tower = Tower::new(&vision, &timm::LARGE, Unary::GeluTanh)?;
    let language = Language::new(&c.require_section("language_config")?, "language.model", weights)?;
    let (hidden_size, vocab_size) = (language.decoder.hidden_size, language.decoder.vocab_size);
    let projector = Projector::new(&c.require_section("projector_config")?, &tower, hidden_size)?;
    let global_first = c.get::<String>("global_view_pos")?.is_none_or(|pos| pos == "head");

    let vision_graph = graph("vision", weights, |g| {
        let [batch, tiles, pictures, features] = ["batch", "tiles", "pictures", "features"].map(Dim::symbol);
        let images = tower.input(g, "images", &[batch.clone(), tiles.clone()]);
        let crop = g.input("images_spatial_crop", DType::I64, [batch.clone(), pictures, 2.into()]);
        let positions = g.input("feature_positions", DType::I64, [features]);
        let side = Dim::from(tower.image_size);
        let images = g.reshape(images, [&batch * &tiles, 3.into(), side.clone(), side]);
        let cells = projector.apply(g, g.weights("projector"), tower.apply(g, g.weights("vision"), images), tower.grid());
        let row = |name: &str| g.reshape(g.table(g.weights(name), &[hidden_size]), [1, hidden_size]);
        let rows = g.concat(&[cells, row("image_newline"), row("view_seperator")], 0);
        let [index] = g.apply(TileRows { tiles, side: projector.side(tower.grid()), global_first }, &[crop, positions]);
        g.output("image_features", g.gather(rows, index, 0));
    })?;
    let embed_graph =
        graph("embed", weights, |g| nn::embed_masked(g, g.weights("language.model.embed_tokens"), [vocab_size, hidden_size]))?;
    let tied = !weights.contains("language.lm_head.weight").unwrap_or(!language.decoder.tie_word_embeddings);
    let head = if tied { "language.model.embed_tokens" } else { "language.lm_head" };
    let decoder_graph = graph("decoder", weights, |g| {
        let layer = |i, w, x, rope, mask| language.layer(g, w, i, x, rope, mask);
        language.decoder.graph_of(g, g.weights("language.model"), g.weights(head), layer);
    })?;

    let context = language.decoder.max_position_embeddings;
    let mut symbols = nn::decoder_symbols(context);
    symbols.extend([symbol("tiles", 0..=context), symbol("pictures", 0..=context)]);
    let image_token = files.processor.as_ref().and_then(|p| p.get("image_token")?.as_str()).unwrap_or(IMAGE_TOKEN);
    Ok(Lowered {
        symbols,
        graphs: vec![vision_graph, embed_graph, decoder_graph],
        task: Task::Generate(PromptRules {
            image_token_id: files.token_id(image_token),
            video_token_id: None,
            hidden_size,
            vocab_size,
            max_positions: context,
            positions: vlmc_artifact::Positions::Sequential,
            tile_side: Some(projector.side(tower.grid())),
            template: Some(deepseek_vl::template("", "<|User|>", "<|Assistant|>", &format!("{image_token}\\n"))),
        }),
    })
}

fn processor(c: &Section<'_>, files: &SideFiles) -> Result<Option<Processor>> {
    let Some(file) = &files.processor else { return Ok(None) };
    let read = || {
        let p = Section::root(file)?;
        p.only("normalize", &[json!(true)])?;
        let candidate_resolutions: Vec<[usize; 2]> = p.require("candidate_resolutions")?;
        let tile_size = candidate_resolutions.first().map_or(0, |first| first[0]);
        let whole = |side: &usize| (1..=1 << 16).contains(side) && side.is_multiple_of(tile_size);
        if tile_size == 0 || !candidate_resolutions.iter().flatten().all(whole) {
            let message = format!("{candidate_resolutions:?} must be multiples of the first width");
            return Err(Error::config("candidate_resolutions", message));
        }
        let rgb = |field: &str| Ok::<_, Error>(p.get::<[f32; 3]>(field)?.unwrap_or([0.5; 3]));
        let ratio = p.int("downsample_ratio", 1..=64)?;
        let grid = tile_size / p.int("patch_size", 1..=tile_size)?;
        Ok(Processor::DeepseekVl2(DeepseekVl2Processor {
            tile_size,
            tile_side: grid.div_ceil(ratio),
            candidate_resolutions,
            image_mean: rgb("image_mean")?,
            image_std: rgb("image_std")?,
        }))
    };
    let in_file = |e: Error| match e {
        Error::Config { field, message } => Error::File { path: "processor_config.json".into(), message: format!("`{field}`: {message}") },
        e => e,
    };
    let processor = read().map_err(in_file)?;
    let image_size = c.section("vision_config")?.map(|v| v.opt_int("image_size", 1..=1 << 16)).transpose()?.flatten().unwrap_or(384);
    match &processor {
        Processor::DeepseekVl2(p) if p.tile_size != image_size => {
            let message = format!("`candidate_resolutions`: tiles of {} do not fit image_size {image_size} of the model", p.tile_size);
            Err(Error::File { path: "processor_config.json".into(), message })
        }
        _ => Ok(Some(processor)),
    }
}
