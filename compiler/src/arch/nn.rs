//! Blocks that architectures share.

use super::config::Section;
use crate::{Error, Result};
use vlmc_artifact::program::{Binary, Unary};
use vlmc_ir::{Builder, DType, Dim, Literal, Val, W, ops::Mask};

/// An activation of transformers' `ACT2FN`.
pub(super) fn activation(c: &Section<'_>, field: &str, default: Unary) -> Result<Unary> {
    Ok(match c.get::<String>(field)?.as_deref() {
        None => default,
        Some("silu" | "swish") => Unary::Silu,
        Some("gelu") => Unary::Gelu,
        Some("gelu_new" | "gelu_pytorch_tanh") => Unary::GeluTanh,
        Some("quick_gelu") => Unary::QuickGelu,
        Some(other) => {
            let known = "silu, gelu, gelu_pytorch_tanh, quick_gelu";
            return Err(Error::config(c.path(field), format!("activation '{other}' is not supported; supported are: {known}")));
        }
    })
}

/// Width of a head: `hidden / heads`, which must be whole.
pub(super) fn head_dim(c: &Section<'_>, hidden_field: &str, hidden: usize, heads_field: &str, heads: usize) -> Result<usize> {
    if !hidden.is_multiple_of(heads) {
        return Err(Error::config(c.path(heads_field), format!("{heads} heads do not divide {} {hidden}", c.path(hidden_field))));
    }
    Ok(hidden / heads)
}

/// Where `ids i64[batch, seq]` are one of `tokens`: `bool[batch, seq]`.
pub(super) fn is_any<'g>(g: &'g Builder<'g>, ids: Val<'g>, tokens: &[i64]) -> Val<'g> {
    let is = |token: &i64| g.binary(Binary::Eq, ids, g.literal(Literal::scalar(DType::I64, *token as f64)));
    let any = tokens.iter().map(is).reduce(|a, b| g.binary(Binary::Or, a, b));
    any.unwrap_or_else(|| g.fail("no tokens to look for"))
}

/// `down(act(gate(x)) * up(x))`, without biases (Llama).
pub(super) fn gated_mlp<'g>(g: &'g Builder<'g>, w: W<'g>, x: Val<'g>, act: Unary, intermediate_size: usize, hidden_size: usize) -> Val<'g> {
    let gate = g.unary(act, g.linear(x, w / "gate_proj", intermediate_size));
    g.linear(gate * g.linear(x, w / "up_proj", intermediate_size), w / "down_proj", hidden_size)
}

/// Shape of a decoder's attention.
pub(super) struct CachedAttention {
    pub(super) hidden_size: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    /// Whether q, k and v have biases.
    pub(super) qkv_bias: bool,
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
        let project = |name: &str, heads: usize| {
            let width = heads * self.head_dim;
            let y = if self.qkv_bias { g.linear_bias(x, w / name, width) } else { g.linear(x, w / name, width) };
            g.split_heads(y, heads)
        };
        let q = g.rotary(project("q_proj", self.heads), rope);
        let k = g.rotary(project("k_proj", self.kv_heads), rope);
        let v = project("v_proj", self.kv_heads);
        let cached = |kind: &str, new: Val<'g>| {
            let shape = [x.dim(0), self.kv_heads.into(), Dim::symbol("past"), self.head_dim.into()];
            let past = g.state(&format!("past_key_values.{layer}.{kind}"), &format!("present.{layer}.{kind}"), DType::F32, shape, 2);
            g.append(past, new, 2)
        };
        let (k, v) = (cached("key", k), cached("value", v));
        let scale = 1.0 / (self.head_dim as f64).sqrt();
        let y = g.attention(q, k, v, scale, Mask::Causal, Some(attention_mask));
        g.linear(g.merge_heads(y), w / "o_proj", self.hidden_size)
    }
}
