//! SAM's vision encoder (Kirillov et al., 2023; Li et al., 2022, ViTDet) as DeepSeek-VL has it: with a second neck after the first
//! layer that attends to all, and convolutions down to the grid of a second tower. Reference: `deepseek_vl/models/sam.py`.

use super::{
    config::Section,
    decoder::{LAYERS, WIDTH},
    nn,
};
use crate::{Error, Result};
use serde_json::json;
use vlmc_artifact::program::Unary;
use vlmc_ir::{
    Builder, DType, Dim, Literal, Val, W,
    ops::{Filter, GridRelative, Mask},
};

/// Epsilon of its norms, fixed in the reference.
const EPS: f64 = 1e-6;

/// The encoder. What a config leaves out are the sizes of SAM-B.
pub(super) struct Sam {
    pub(super) image_size: usize,
    patch_size: usize,
    width: usize,
    layers: usize,
    heads: usize,
    mlp: usize,
    window: usize,
    /// Layers that attend to all of the picture.
    global: Vec<usize>,
    neck: usize,
    downsamples: Vec<usize>,
    eps: f64,
    act: Unary,
}

impl Sam {
    /// From the `high_res_cfg` of the official layout.
    pub(super) fn new(c: &Section<'_>) -> Result<Self> {
        c.only("model_name", &[json!("sam_b_downsample")])?;
        c.without_effect(&["ckpt_path", "output_dim", "select_feature", "select_layer"]);
        let width = c.opt_int("width", WIDTH)?.unwrap_or(768);
        let sam = Self {
            image_size: c.opt_int("image_size", 1..=1 << 16)?.unwrap_or(1024),
            patch_size: c.opt_int("patch_size", 1..=1024)?.unwrap_or(16),
            width,
            layers: c.opt_int("layers", LAYERS)?.unwrap_or(12),
            heads: c.opt_int("heads", WIDTH)?.unwrap_or(12),
            mlp: 4 * width,
            window: c.opt_int("window_size", 1..=1 << 16)?.unwrap_or(14),
            global: c.get("global_attn_indexes")?.unwrap_or_else(|| vec![2, 5, 8, 11]),
            neck: c.opt_int("prompt_embed_dim", WIDTH)?.unwrap_or(256),
            downsamples: c.get("downsample_channels")?.unwrap_or_else(|| vec![512, 1024]),
            eps: EPS,
            act: Unary::Gelu,
        };
        nn::head_dim(c, "width", sam.width, "heads", sam.heads)?;
        sam.checked(c)
    }

    /// From a `SamVisionConfig` of transformers.
    pub(super) fn transformers(c: &Section<'_>) -> Result<Self> {
        for flag in ["qkv_bias", "use_abs_pos", "use_rel_pos"] {
            c.only(flag, &[json!(true)])?;
        }
        c.only("num_channels", &[json!(3)])?;
        c.without_effect(&["num_pos_feats", "scale"]);
        let width = c.opt_int("hidden_size", WIDTH)?.unwrap_or(768);
        let mlp = (width as f64 * c.positive("mlp_ratio")?.unwrap_or(4.0)) as usize;
        let neck = c.opt_int("output_channels", WIDTH)?.unwrap_or(256);
        let sam = Self {
            image_size: c.opt_int("image_size", 1..=1 << 16)?.unwrap_or(1024),
            patch_size: c.opt_int("patch_size", 1..=1024)?.unwrap_or(16),
            width,
            layers: c.opt_int("num_hidden_layers", LAYERS)?.unwrap_or(12),
            heads: c.opt_int("num_attention_heads", WIDTH)?.unwrap_or(12),
            mlp: c.opt_int("mlp_dim", WIDTH)?.unwrap_or(mlp),
            window: c.opt_int("window_size", 1..=1 << 16)?.unwrap_or(14),
            global: c.get("global_attn_indexes")?.unwrap_or_else(|| vec![2, 5, 8, 11]),
            neck,
            downsamples: vec![2 * neck, 4 * neck],
            eps: c.positive("layer_norm_eps")?.unwrap_or(EPS),
            act: nn::activation(c, "hidden_act", Unary::Gelu)?,
        };
        nn::head_dim(c, "hidden_size", sam.width, "num_attention_heads", sam.heads)?;
        sam.checked(c)
    }

    fn checked(self, c: &Section<'_>) -> Result<Self> {
        let config = |field: &str, message: String| Err(Error::config(c.path(field), message));
        if self.patch_size > self.image_size {
            return config("patch_size", format!("{} is more than image_size {}", self.patch_size, self.image_size));
        }
        if !self.global.iter().any(|i| *i < self.layers) {
            return config("global_attn_indexes", format!("{:?} names none of the {} layers", self.global, self.layers));
        }
        if self.downsamples.len() != 2 {
            let message = format!("{:?} must be 2 widths, for halves of a grid 4 times too large", self.downsamples);
            return config("downsample_channels", message);
        }
        Ok(self)
    }

    /// Width of its features.
    pub(super) fn out(&self) -> usize {
        self.downsamples.last().copied().unwrap_or(self.neck)
    }

    fn grid(&self) -> usize {
        self.image_size / self.patch_size
    }

    /// The input `name f32[lead, 3, image_size, image_size]`.
    pub(super) fn input<'g>(&self, g: &'g Builder<'g>, name: &str, lead: Dim) -> Val<'g> {
        g.input(name, DType::F32, [lead, 3.into(), self.image_size.into(), self.image_size.into()])
    }

    /// `pixels f32[n, 3, image_size, image_size]` to `f32[n, side², out]`.
    pub(super) fn apply<'g>(&self, g: &'g Builder<'g>, w: W<'g>, pixels: Val<'g>, side: usize) -> Val<'g> {
        let _scope = g.scope(w.path());
        let (n, grid, width, patch) = (pixels.dim(0), self.grid(), self.width, self.patch_size);
        let (x, ..) = nn::patchify(g, pixels, patch);
        let proj = w / "patch_embed" / "proj";
        let kernel = g.weight_as(proj / "weight", &[width, 3, patch, patch], &[width, 3 * patch * patch]);
        let x = g.linear_with(x, kernel, Some(g.weight(proj / "bias", &[width])));
        let x = g.reshape(x, [n.clone(), grid.into(), grid.into(), width.into()]);
        let mut x = x + g.table(w / "pos_embed", &[1, grid, grid, width]);
        let mut first_global = None;
        for i in 0..self.layers {
            let is_global = self.global.contains(&i);
            x = self.layer(g, w / "blocks" / i, x, is_global);
            if is_global && first_global.is_none() {
                first_global = Some(x);
            }
        }
        let down = |neck: W<'g>, x: Val<'g>| {
            let mut x = resized(g, self.neck(g, neck, x), 4 * side, Filter::Bilinear);
            for (i, channels) in self.downsamples.iter().enumerate() {
                x = g.conv2d(x, w / "downsamples" / i, [*channels, 3], 2, 1, false);
            }
            x
        };
        let main = down(w / "neck", x);
        let x = first_global.map_or(main, |x| main + down(w / "neck_hd", x) * g.table(w / "hd_alpha_downsamples", &[1]));
        g.reshape(g.transpose(x, &[0, 2, 3, 1]), [n, (side * side).into(), self.out().into()])
    }

    /// `x f32[n, grid, grid, width]`.
    fn layer<'g>(&self, g: &'g Builder<'g>, w: W<'g>, x: Val<'g>, is_global: bool) -> Val<'g> {
        let _scope = g.scope(w.path());
        let h = g.layer_norm(x, w / "norm1", self.eps);
        let y = if is_global { self.attention(g, w / "attn", h, self.grid()) } else { self.in_windows(g, w / "attn", h) };
        let x = x + y;
        let h = g.layer_norm(x, w / "norm2", self.eps);
        let h = g.unary(self.act, g.linear_bias(h, w / "mlp" / "lin1", self.mlp));
        x + g.linear_bias(h, w / "mlp" / "lin2", self.width)
    }

    /// Attention within windows, which stand beyond the picture on the right and below if they do not fit: what is there is zeros,
    /// has keys and values from biases alone, and is attended to.
    fn in_windows<'g>(&self, g: &'g Builder<'g>, w: W<'g>, x: Val<'g>) -> Val<'g> {
        let (n, grid, size, width) = (x.dim(0), self.grid(), Dim::from(self.window), Dim::from(self.width));
        let windows = grid.div_ceil(self.window);
        let padded = windows * self.window;
        let mut x = x;
        for axis in [1, 2] {
            let mut shape = x.ty().shape;
            shape[axis] = (padded - grid).into();
            if padded > grid {
                x = g.concat(&[x, g.broadcast(g.literal(Literal::scalar(DType::F32, 0.0)), shape)], axis);
            }
        }
        let (count, order) = (Dim::from(windows), [0, 1, 3, 2, 4, 5]);
        let x = g.reshape(x, [n.clone(), count.clone(), size.clone(), count.clone(), size.clone(), width.clone()]);
        let x = g.reshape(g.transpose(x, &order), [&n * (windows * windows), size.clone(), size.clone(), width.clone()]);
        let x = self.attention(g, w, x, self.window);
        let x = g.transpose(g.reshape(x, [n.clone(), count.clone(), count, size.clone(), size, width.clone()]), &order);
        let x = g.reshape(x, [n, padded.into(), padded.into(), width]);
        [1, 2].into_iter().fold(x, |x, axis| if padded > grid { g.slice(x, axis, 0, grid) } else { x })
    }

    /// `x f32[n, side, side, width]`.
    fn attention<'g>(&self, g: &'g Builder<'g>, w: W<'g>, x: Val<'g>, side: usize) -> Val<'g> {
        let (shape, head_dim) = (x.ty().shape, self.width / self.heads);
        let cells = g.reshape(x, [shape[0].clone(), (side * side).into(), self.width.into()]);
        let qkv = g.linear_bias(cells, w / "qkv", 3 * self.width);
        let [q, k, v] = [0, 1, 2].map(|i| g.split_heads(g.slice(qkv, 2, i * self.width, self.width), self.heads));
        let table = |name: &str| g.table(w / name, &[2 * side - 1, head_dim]);
        let relative = GridRelative { side, scale: 1.0 / (head_dim as f64).sqrt() };
        let [q, k] = g.apply(relative, &[q, k, table("rel_pos_h"), table("rel_pos_w")]);
        let y = g.merge_heads(g.attention(q, k, v, 1.0, Mask::Full, None));
        g.reshape(g.linear_bias(y, w / "proj", self.width), shape)
    }

    /// `x f32[n, grid, grid, width]` to `f32[n, neck, grid, grid]`.
    fn neck<'g>(&self, g: &'g Builder<'g>, w: W<'g>, x: Val<'g>) -> Val<'g> {
        let _scope = g.scope(w.path());
        // A convolution of one pixel is a linear layer.
        let kernel = g.weight_as(w / 0 / "weight", &[self.neck, self.width, 1, 1], &[self.neck, self.width]);
        let x = g.layer_norm(g.linear_with(x, kernel, None), w / 1, EPS);
        let x = g.conv2d(g.transpose(x, &[0, 3, 1, 2]), w / 2, [self.neck, 3], 1, 1, false);
        g.transpose(g.layer_norm(g.transpose(x, &[0, 2, 3, 1]), w / 3, EPS), &[0, 3, 1, 2])
    }
}

/// `x f32[n, c, h, w]`, whose sides are numbers, as `f32[n, c, side, side]`.
pub(super) fn resized<'g>(g: &'g Builder<'g>, x: Val<'g>, side: usize, filter: Filter) -> Val<'g> {
    let (Some(h), Some(w)) = (x.dim(2).as_const(), x.dim(3).as_const()) else { return g.fail("the sides of a picture must be known") };
    if [h, w] == [side as i64; 2] {
        return x;
    }
    let weights = |from: i64| g.resize_weights(g.dim(side), side, from as usize, filter);
    g.matmul(weights(h), g.matmul(x, g.transpose(weights(w), &[1, 0])))
}
