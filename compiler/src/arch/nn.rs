//! Blocks that architectures share.

use super::{config::Section, symbol};
use crate::{Error, Result};
use vlmc_artifact::program::{Binary, Reduce, Unary};
use vlmc_ir::{
    Builder, DType, Dim, Literal, Symbol, Val, W,
    ops::{Filter, Mask},
};

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

/// The entry `embed`: `input_ids i64[batch, seq]` and `image_features f32[features, hidden]` to `inputs_embeds f32[batch, seq,
/// hidden]`, with the features in the places of the tokens that `here` finds.
pub(super) fn embed<'g>(g: &'g Builder<'g>, table: W<'g>, sizes: [usize; 2], here: impl FnOnce(Val<'g>) -> Val<'g>) {
    embed_at(g, table, sizes, here);
}

/// See [`embed`]; returns what `here` found.
pub(super) fn embed_at<'g>(
    g: &'g Builder<'g>,
    table: W<'g>,
    [vocab_size, hidden_size]: [usize; 2],
    here: impl FnOnce(Val<'g>) -> Val<'g>,
) -> Val<'g> {
    let ids = g.input("input_ids", DType::I64, ["batch", "seq"].map(Dim::symbol));
    let features = g.input("image_features", DType::F32, [Dim::symbol("features"), hidden_size.into()]);
    let embeds = g.embedding(ids, table, vocab_size, hidden_size);
    let here = here(ids);
    g.output("inputs_embeds", g.merge_features(embeds, here, features));
    here
}

/// As [`embed`], with the places given as `images_seq_mask bool[batch, seq]`.
pub(super) fn embed_masked<'g>(g: &'g Builder<'g>, table: W<'g>, size: [usize; 2]) {
    embed(g, table, size, |ids| g.input("images_seq_mask", DType::Bool, ids.ty().shape));
}

/// Symbols of the entries `embed` and `decoder`.
pub(super) fn decoder_symbols(context: usize) -> Vec<Symbol> {
    vec![
        symbol("batch", 1..=1024),
        symbol("seq", 1..=context),
        symbol("past", 0..=context),
        symbol("scored", 0..=context),
        symbol("features", 0..=context),
    ]
}

/// Square patches of `pixels f32[n, channels, height, width]` as rows `[n, rows * columns, channels * patch²]` (channel, row,
/// column), row by row; what does not fill a patch on the right and below is left out. Also gives `rows` and `columns`.
pub(super) fn patchify<'g>(g: &'g Builder<'g>, pixels: Val<'g>, patch: usize) -> (Val<'g>, Dim, Dim) {
    let [n, c, h, w] = [0, 1, 2, 3].map(|i| pixels.dim(i));
    let (rows, columns) = (h.floor_div(&patch.into()), w.floor_div(&patch.into()));
    let cut = |x: Val<'g>, axis: usize, count: &Dim| {
        let len = count * patch;
        if x.dim(axis) == len { x } else { g.slice(x, axis, 0, len) }
    };
    let x = cut(cut(pixels, 2, &rows), 3, &columns);
    let x = g.reshape(x, [n.clone(), c.clone(), rows.clone(), patch.into(), columns.clone(), patch.into()]);
    let x = g.transpose(x, &[0, 2, 4, 1, 3, 5]);
    (g.reshape(x, [n, &rows * &columns, &c * (patch * patch)]), rows, columns)
}

/// A table of positions `f32[from², width]` on a square grid, resized to `rows * columns` positions `f32[rows * columns,
/// width]` (transformers `interpolate_pos_encoding`). The identity where the grid is that of the table.
pub(super) fn resized_positions<'g>(g: &'g Builder<'g>, table: Val<'g>, from: usize, rows: &Dim, columns: &Dim, filter: Filter) -> Val<'g> {
    let from_dim = Dim::from(from);
    if *rows == from_dim && *columns == from_dim {
        return table;
    }
    let width = table.dim(1);
    let (down, across) = (
        g.resize_weights(g.dim(rows.clone()), rows.clone(), from, filter),
        g.resize_weights(g.dim(columns.clone()), columns.clone(), from, filter),
    );
    // Across each row of the table, then down its columns.
    let x = g.matmul(across, g.reshape(table, [from_dim.clone(), from_dim.clone(), width.clone()]));
    let x = g.matmul(down, g.reshape(x, [from_dim, columns * &width]));
    g.reshape(x, [rows * columns, width])
}

/// How an encoder layer's query, key and value weights are stored.
#[derive(Clone, Copy)]
pub(super) enum Qkv {
    /// Three layers of these names.
    Split([&'static str; 3]),
    /// Three layers of these names, without biases.
    Unbiased([&'static str; 3]),
    /// One layer of that name, the three one after the other.
    Fused(&'static str),
    /// As `torch.nn.MultiheadAttention` has them: `in_proj_weight` and `in_proj_bias` under that name.
    InProj(&'static str),
}

/// Names of an encoder layer's weights.
#[derive(Clone, Copy)]
pub(super) struct LayerNames {
    pub(super) norm1: &'static str,
    pub(super) qkv: Qkv,
    pub(super) out: &'static str,
    pub(super) norm2: &'static str,
    pub(super) fc1: &'static str,
    pub(super) fc2: &'static str,
}

/// CLIP and SigLIP of transformers.
pub(super) const CLIP_LAYER: LayerNames = LayerNames {
    norm1: "layer_norm1",
    qkv: Qkv::Split(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    out: "self_attn.out_proj",
    norm2: "layer_norm2",
    fc1: "mlp.fc1",
    fc2: "mlp.fc2",
};

/// timm's vision transformer: SigLIP of DeepSeek-VL, and Qwen2-VL.
pub(super) const TIMM_LAYER: LayerNames =
    LayerNames { norm1: "norm1", qkv: Qkv::Fused("attn.qkv"), out: "attn.proj", norm2: "norm2", fc1: "mlp.fc1", fc2: "mlp.fc2" };

/// OpenAI's CLIP.
pub(super) const OPENAI_LAYER: LayerNames =
    LayerNames { norm1: "ln_1", qkv: Qkv::InProj("attn"), out: "attn.out_proj", norm2: "ln_2", fc1: "mlp.c_fc", fc2: "mlp.c_proj" };

/// Layers of a transformer encoder with the norms first (Dosovitskiy et al., 2021): widths, heads and what they compute.
pub(super) struct Encoder {
    pub(super) width: usize,
    pub(super) heads: usize,
    pub(super) mlp: usize,
    pub(super) eps: f64,
    pub(super) act: Unary,
    pub(super) names: LayerNames,
}

impl Encoder {
    /// One layer: `x f32[..., seq, width]`; `mask` is the operand that `kind` asks for.
    pub(super) fn layer<'g>(&self, g: &'g Builder<'g>, w: W<'g>, x: Val<'g>, kind: Mask, mask: Option<Val<'g>>) -> Val<'g> {
        let _scope = g.scope(w.path());
        let n = &self.names;
        let h = g.layer_norm(x, w / n.norm1, self.eps);
        let [q, k, v] = self.qkv(g, w, h).map(|x| g.split_heads(x, self.heads));
        let scale = 1.0 / ((self.width / self.heads) as f64).sqrt();
        let y = g.merge_heads(g.attention(q, k, v, scale, kind, mask));
        let x = x + g.linear_bias(y, w / n.out, self.width);
        let h = g.layer_norm(x, w / n.norm2, self.eps);
        x + g.linear_bias(g.unary(self.act, g.linear_bias(h, w / n.fc1, self.mlp)), w / n.fc2, self.width)
    }

    fn qkv<'g>(&self, g: &'g Builder<'g>, w: W<'g>, x: Val<'g>) -> [Val<'g>; 3] {
        let thirds = |y: Val<'g>| {
            let axis = y.ty().rank() - 1;
            [0, 1, 2].map(|i| g.slice(y, axis, i * self.width, self.width))
        };
        match self.names.qkv {
            Qkv::Split(names) => names.map(|name| g.linear_bias(x, w / name, self.width)),
            Qkv::Unbiased(names) => names.map(|name| g.linear(x, w / name, self.width)),
            Qkv::Fused(name) => thirds(g.linear_bias(x, w / name, 3 * self.width)),
            Qkv::InProj(name) => thirds(in_proj(g, w / name, x, self.width, 0..3)),
        }
    }
}

/// Some of the projections (query 0, key 1, value 2) of `torch.nn.MultiheadAttention`, one after the other.
pub(super) fn in_proj<'g>(g: &'g Builder<'g>, w: W<'g>, x: Val<'g>, width: usize, parts: std::ops::Range<usize>) -> Val<'g> {
    let (weight, bias) = (g.weight(w / "in_proj_weight", &[3 * width, width]), g.weight(w / "in_proj_bias", &[3 * width]));
    let all = g.linear_with(x, weight, Some(bias));
    let axis = all.ty().rank() - 1;
    if parts == (0..3) { all } else { g.slice(all, axis, parts.start * width, parts.len() * width) }
}

/// `x / |x|` along the last axis.
pub(super) fn normalized<'g>(g: &'g Builder<'g>, x: Val<'g>) -> Val<'g> {
    let axis = x.ty().rank() - 1;
    x / g.unsqueeze(g.unary(Unary::Sqrt, g.reduce(Reduce::Sum, x * x, &[axis])), axis)
}

/// Symbols of a model that sees pictures of any size.
pub(super) fn picture_symbols(patch: usize) -> Vec<Symbol> {
    vec![symbol("images", 1..=4096), symbol("height", patch..=16384), symbol("width", patch..=16384)]
}

/// A convolution whose stride is its kernel, at `w`: patches of `pixels f32[n, channels, height, width]` to `f32[n, rows *
/// columns, width]`. Also gives `rows` and `columns`.
pub(super) fn patch_embedding<'g>(
    g: &'g Builder<'g>,
    w: W<'g>,
    pixels: Val<'g>,
    patch: usize,
    width: usize,
    bias: bool,
) -> (Val<'g>, Dim, Dim) {
    let channels = pixels.dim(1).as_const().unwrap_or(1) as usize;
    let (x, rows, columns) = patchify(g, pixels, patch);
    let kernel = g.weight_as(w / "weight", &[width, channels, patch, patch], &[width, channels * patch * patch]);
    let bias = bias.then(|| g.weight(w / "bias", &[width]));
    (g.linear_with(x, kernel, bias), rows, columns)
}

/// `patches f32[n, rows * columns, width]` with a class token before them, and with positions: `class` has `width` elements,
/// `positions f32[1 + from², width]` are those of the token and of a square grid.
pub(super) fn with_class_token<'g>(
    g: &'g Builder<'g>,
    (patches, rows, columns): (Val<'g>, Dim, Dim),
    class: Val<'g>,
    positions: Val<'g>,
    from: usize,
) -> Val<'g> {
    let (n, width) = (patches.dim(0), patches.dim(2));
    let class = g.broadcast(g.reshape(class, [1.into(), 1.into(), width.clone()]), vec![n, 1.into(), width]);
    let x = g.concat(&[class, patches], 1);
    if rows == from.into() && columns == from.into() {
        return x + positions;
    }
    let grid = resized_positions(g, g.slice(positions, 0, 1, from * from), from, &rows, &columns, Filter::Bicubic);
    x + g.concat(&[g.slice(positions, 0, 0, 1), grid], 0)
}

/// `image_size` and `patch_size`: a square of at least one patch.
pub(super) fn square_grid(c: &Section<'_>, image_size: usize, patch_size: usize) -> Result<(usize, usize)> {
    let side = |field: &str, default: usize| Ok::<_, Error>(c.opt_int(field, 1..=16384)?.unwrap_or(default));
    let (image, patch) = (side("image_size", image_size)?, side("patch_size", patch_size)?);
    if patch > image {
        return Err(Error::config(c.path("patch_size"), format!("{patch} is more than {} {image}", c.path("image_size"))));
    }
    Ok((image, patch))
}
