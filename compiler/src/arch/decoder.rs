//! The decoder that most models share: Llama's (Touvron et al., 2023), with grouped heads, and its variants by options.

use super::{config::Section, nn};
use crate::{Error, Result};
use serde_json::{Value, json};
use vlmc_artifact::program::Unary;
use vlmc_ir::{
    Builder, DType, Dim, Val, W,
    ops::{Mask, NtkRope, RopeScaling},
};

/// Widths that a config may name.
pub(super) const WIDTH: std::ops::RangeInclusive<usize> = 1..=1 << 20;
/// Numbers of layers that a config may name.
pub(super) const LAYERS: std::ops::RangeInclusive<usize> = 1..=1000;

/// Which rotary positions a decoder has.
#[derive(Clone, Copy)]
pub(super) enum Positions {
    /// `position_ids i64[batch, seq]`.
    Plain(RopeScaling),
    /// `position_ids i64[3, batch, seq]`.
    Mrope {
        /// How many angles each kind has.
        section: [usize; 3],
        /// Whether the kinds take turns.
        interleaved: bool,
    },
    /// Places in the sequence, padding included; `prompt_length i64[1]` decides the frequencies (Qwen-VL).
    Absolute {
        /// Tokens of the training.
        trained: usize,
        /// How many bases there are.
        levels: usize,
    },
}

/// A decoder's `text_config`.
pub(super) struct Decoder {
    pub(super) hidden_size: usize,
    pub(super) intermediate_size: usize,
    pub(super) num_hidden_layers: usize,
    pub(super) attention: CachedAttention,
    pub(super) rms_norm_eps: f64,
    pub(super) rope_theta: f64,
    pub(super) positions: Positions,
    pub(super) vocab_size: usize,
    pub(super) max_position_embeddings: usize,
    pub(super) act: Unary,
    pub(super) tie_word_embeddings: bool,
    /// Layers that features of pictures are added after (Qwen3-VL's deepstack).
    pub(super) deepstack: usize,
}

/// What a config leaves out means these: the defaults of the config's class.
pub(super) struct Defaults {
    pub(super) hidden_size: usize,
    pub(super) intermediate_size: usize,
    pub(super) num_hidden_layers: usize,
    pub(super) num_attention_heads: usize,
    pub(super) vocab_size: usize,
    pub(super) max_position_embeddings: usize,
    pub(super) rms_norm_eps: f64,
}

/// `LlamaConfig` of transformers, which published files rely on.
pub(super) const LLAMA: Defaults = Defaults {
    hidden_size: 4096,
    intermediate_size: 11008,
    num_hidden_layers: 32,
    num_attention_heads: 32,
    vocab_size: 32000,
    max_position_embeddings: 2048,
    rms_norm_eps: 1e-6,
};

impl Decoder {
    /// From a config in which only what `defaults` has may be missing; without `defaults`, nothing may.
    pub(super) fn new(c: &Section<'_>, defaults: Option<&Defaults>) -> Result<Self> {
        Self::with_head_dim(c, defaults, c.opt_int("head_dim", WIDTH)?)
    }

    /// As [`Self::new`], with a width of heads that the config has under a name of its own.
    pub(super) fn with_head_dim(c: &Section<'_>, defaults: Option<&Defaults>, head_dim: Option<usize>) -> Result<Self> {
        c.only("use_sliding_window", &[json!(false)])?;
        if let Some(types) = c.get::<Vec<Value>>("layer_types")?
            && let Some(other) = types.iter().find(|t| **t != json!("full_attention"))
        {
            return Err(Error::config(c.path("layer_types"), format!("{other} is not supported; supported: \"full_attention\"")));
        }
        let int = |field: &str, range: std::ops::RangeInclusive<usize>, default: fn(&Defaults) -> usize| match defaults {
            Some(d) => Ok(c.opt_int(field, range)?.unwrap_or(default(d))),
            None => c.int(field, range),
        };
        let hidden_size = int("hidden_size", WIDTH, |d| d.hidden_size)?;
        let heads = int("num_attention_heads", WIDTH, |d| d.num_attention_heads)?;
        let head_dim = match head_dim {
            Some(d) => d,
            None => nn::head_dim(c, "hidden_size", hidden_size, "num_attention_heads", heads)?,
        };
        if !head_dim.is_multiple_of(2) {
            return Err(Error::config(
                c.path("num_attention_heads"),
                format!("a head width of {head_dim} is odd, rotary positions need pairs"),
            ));
        }
        let kv_heads = c.opt_int("num_key_value_heads", WIDTH)?.unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            let message = format!("{kv_heads} kv heads do not divide num_attention_heads {heads}");
            return Err(Error::config(c.path("num_key_value_heads"), message));
        }
        let (rope_theta, positions) = rope(c, head_dim)?;
        let missing = |field: &str| Error::config(c.path(field), "is missing");
        Ok(Self {
            hidden_size,
            intermediate_size: int("intermediate_size", WIDTH, |d| d.intermediate_size)?,
            num_hidden_layers: int("num_hidden_layers", LAYERS, |d| d.num_hidden_layers)?,
            attention: CachedAttention {
                hidden_size,
                heads,
                kv_heads,
                head_dim,
                qkv_bias: c.get("attention_bias")?.unwrap_or(false),
                qk_norm: None,
                fused: false,
                log_n: None,
            },
            rms_norm_eps: c.positive("rms_norm_eps")?.or(defaults.map(|d| d.rms_norm_eps)).ok_or_else(|| missing("rms_norm_eps"))?,
            rope_theta: rope_theta.or(defaults.map(|_| 10_000.0)).ok_or_else(|| missing("rope_theta"))?,
            positions,
            vocab_size: int("vocab_size", 1..=1 << 24, |d| d.vocab_size)?,
            max_position_embeddings: c
                .opt_int("max_position_embeddings", 1..=1 << 24)?
                .unwrap_or(defaults.map_or(32768, |d| d.max_position_embeddings)),
            act: nn::activation(c, "hidden_act", Unary::Silu)?,
            tie_word_embeddings: c.get("tie_word_embeddings")?.unwrap_or(false),
            deepstack: 0,
        })
    }

    /// The entry `decoder`: `inputs_embeds f32[batch, seq, hidden]`, `position_ids`, `attention_mask i64[batch, past + seq]`,
    /// `logit_positions i64[scored]` to `logits f32[batch, scored, vocab]`, only of the positions asked for. `w` is the path of the
    /// layers and the norm, `head` that of the last matrix. With deepstack also `deepstack_embeds f32[batch, seq, levels * hidden]`:
    /// what is added to the outputs of the first layers.
    pub(super) fn graph<'g>(&self, g: &'g Builder<'g>, w: W<'g>, head: W<'g>) {
        self.graph_of(g, w, head, |i, w, x, rope, mask| self.layer(g, w, i, x, rope, mask));
    }

    /// [`Self::graph`] with layers of another kind: `layer(i, w, x, rope, attention_mask)`.
    pub(super) fn graph_of<'g>(
        &self,
        g: &'g Builder<'g>,
        w: W<'g>,
        head: W<'g>,
        layer: impl Fn(usize, W<'g>, Val<'g>, (Val<'g>, Val<'g>), Val<'g>) -> Val<'g>,
    ) {
        let [batch, seq, past, scored] = ["batch", "seq", "past", "scored"].map(Dim::symbol);
        let mut x = g.input("inputs_embeds", DType::F32, [batch.clone(), seq.clone(), self.hidden_size.into()]);
        let position_ids = match self.positions {
            Positions::Plain(_) => g.input("position_ids", DType::I64, [batch.clone(), seq.clone()]),
            Positions::Mrope { .. } => g.input("position_ids", DType::I64, [3.into(), batch.clone(), seq.clone()]),
            Positions::Absolute { .. } => g.input("prompt_length", DType::I64, [1]),
        };
        let width = self.deepstack * self.hidden_size;
        let deep = (width > 0).then(|| g.input("deepstack_embeds", DType::F32, [batch.clone(), seq.clone(), width.into()]));
        let attention_mask = g.input("attention_mask", DType::I64, [batch, &past + seq]);
        let logit_positions = g.input("logit_positions", DType::I64, [scored]);

        let _scope = g.scope(w.path());
        let rope = self.rope(g, position_ids);
        for i in 0..self.num_hidden_layers {
            x = layer(i, w / "layers" / i, x, rope, attention_mask);
            if let Some(deep) = deep.filter(|_| i < self.deepstack) {
                x = x + g.slice(deep, 2, i * self.hidden_size, self.hidden_size);
            }
        }
        let x = g.rms_norm(g.gather(x, logit_positions, 1), w / "norm", self.rms_norm_eps);
        g.output("logits", g.linear(x, head, self.vocab_size));
    }

    /// Cos and sin of the positions, or of what [`Self::graph`] takes instead.
    pub(super) fn rope<'g>(&self, g: &'g Builder<'g>, position_ids: Val<'g>) -> (Val<'g>, Val<'g>) {
        match self.positions {
            Positions::Plain(scaling) => g.rope(position_ids, self.attention.head_dim, self.rope_theta, scaling),
            Positions::Mrope { section, interleaved } => {
                g.mrope(position_ids, self.attention.head_dim, self.rope_theta, section, interleaved)
            }
            Positions::Absolute { trained, levels } => {
                let op = NtkRope { head_dim: self.attention.head_dim, theta: self.rope_theta, trained, levels };
                g.ntk_rope(op, places(g), position_ids)
            }
        }
    }

    /// A layer: attention and MLP, each after a norm and added to what comes in.
    pub(super) fn layer<'g>(&self, g: &'g Builder<'g>, w: W<'g>, i: usize, x: Val<'g>, rope: (Val<'g>, Val<'g>), mask: Val<'g>) -> Val<'g> {
        let _scope = g.scope(w.path());
        let h = g.rms_norm(x, w / "input_layernorm", self.rms_norm_eps);
        let x = x + self.attention.apply(g, w / "self_attn", i, h, rope, mask);
        let h = g.rms_norm(x, w / "post_attention_layernorm", self.rms_norm_eps);
        x + nn::gated_mlp(g, w / "mlp", h, self.act, self.intermediate_size, self.hidden_size)
    }
}

/// `rope_theta` and the kind of positions. Old files have `rope_theta` beside `rope_scaling`, new ones all of it in
/// `rope_parameters`.
fn rope(c: &Section<'_>, head_dim: usize) -> Result<(Option<f64>, Positions)> {
    let section = match c.section("rope_parameters")? {
        Some(rope) => Some(rope),
        None => c.section("rope_scaling")?,
    };
    let Some(rope) = section else { return Ok((c.positive("rope_theta")?, Positions::Plain(RopeScaling::None))) };
    let theta = rope.positive("rope_theta")?.or(c.positive("rope_theta")?);
    if let Some(section) = rope.get::<[usize; 3]>("mrope_section")? {
        for kind in ["type", "rope_type"] {
            rope.only(kind, &[json!("mrope"), json!("default")])?;
        }
        if section.iter().try_fold(0usize, |n, s| n.checked_add(*s)) != Some(head_dim / 2) {
            let message = format!("{section:?} must sum to half of the head width {head_dim}");
            return Err(Error::config(rope.path("mrope_section"), message));
        }
        let interleaved = rope.get("mrope_interleaved")?.unwrap_or(false);
        return Ok((theta, Positions::Mrope { section, interleaved }));
    }
    let (kind_field, kind) = match rope.get::<String>("rope_type")? {
        Some(kind) => ("rope_type", Some(kind)),
        None => ("type", rope.get::<String>("type")?),
    };
    let number = |field: &str| rope.positive(field)?.ok_or_else(|| Error::config(rope.path(field), "is missing"));
    let scaling = match kind.as_deref() {
        None | Some("default") => RopeScaling::None,
        Some("linear") => RopeScaling::Linear { factor: number("factor")? },
        Some("llama3") => RopeScaling::Llama3 {
            factor: number("factor")?,
            low_freq: number("low_freq_factor")?,
            high_freq: number("high_freq_factor")?,
            original: number("original_max_position_embeddings")?,
        },
        Some(other) => {
            return Err(Error::config(
                rope.path(kind_field),
                format!("'{other}' is not supported here; supported: default, linear, llama3, and mrope with `mrope_section`"),
            ));
        }
    };
    Ok((theta, Positions::Plain(scaling)))
}

/// Shape of a decoder's attention.
pub(super) struct CachedAttention {
    pub(super) hidden_size: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    /// Whether q, k and v have biases.
    pub(super) qkv_bias: bool,
    /// Epsilon of the norms of each head's queries and keys, if there are such (Qwen3).
    pub(super) qk_norm: Option<f64>,
    /// Whether one layer `qkv_proj` makes q, k and v.
    pub(super) fused: bool,
    /// Tokens of the training, if queries beyond them are scaled (Qwen-VL).
    pub(super) log_n: Option<usize>,
}

impl CachedAttention {
    /// Causal self-attention with grouped heads over the cache of `layer`: `x f32[batch, seq, hidden]`,
    /// `attention_mask i64[batch, past + seq]`. Keys are cached after the rotation.
    pub(super) fn apply<'g>(
        &self,
        g: &'g Builder<'g>,
        w: W<'g>,
        layer: usize,
        x: Val<'g>,
        rope: (Val<'g>, Val<'g>),
        attention_mask: Val<'g>,
    ) -> Val<'g> {
        let linear = |name: &str, width: usize| {
            if self.qkv_bias { g.linear_bias(x, w / name, width) } else { g.linear(x, w / name, width) }
        };
        let fused = self.fused.then(|| linear("qkv_proj", (self.heads + 2 * self.kv_heads) * self.head_dim));
        let project = |name: &str, before: usize, heads: usize| {
            let width = heads * self.head_dim;
            let y = fused.map_or_else(|| linear(name, width), |y| g.slice(y, 2, before * self.head_dim, width));
            g.split_heads(y, heads)
        };
        let normed = |x: Val<'g>, name: &str| self.qk_norm.map_or(x, |eps| g.rms_norm(x, w / name, eps));
        let q = g.rotary(normed(project("q_proj", 0, self.heads), "q_norm"), rope);
        let k = g.rotary(normed(project("k_proj", self.heads, self.kv_heads), "k_norm"), rope);
        let v = project("v_proj", self.heads + self.kv_heads, self.kv_heads);
        let q = self.log_n.map_or(q, |trained| q * g.log_n(places(g), trained));
        let (k, v) = (cached(g, layer, "key", k), cached(g, layer, "value", v));
        let scale = 1.0 / (self.head_dim as f64).sqrt();
        let y = g.attention(q, k, v, scale, Mask::Causal, Some(attention_mask));
        g.linear(g.merge_heads(y), w / "o_proj", self.hidden_size)
    }
}

/// Places of the tokens in the sequence, what is in the cache and padding included: `i64[batch, seq]`.
fn places<'g>(g: &'g Builder<'g>) -> Val<'g> {
    let [batch, seq, past] = ["batch", "seq", "past"].map(Dim::symbol);
    g.broadcast(g.iota(seq.clone()) + g.dim(past), vec![batch, seq])
}

/// `new f32[batch, heads, seq, width]` appended to the cache of a layer's keys or values.
pub(super) fn cached<'g>(g: &'g Builder<'g>, layer: usize, kind: &str, new: Val<'g>) -> Val<'g> {
    let shape = [new.dim(0), new.dim(1), Dim::symbol("past"), new.dim(3)];
    let past = g.state(&format!("past_key_values.{layer}.{kind}"), &format!("present.{layer}.{kind}"), DType::F32, shape, 2);
    g.append(past, new, 2)
}
