//! SigLIP's vision transformer (Zhai et al., 2023) as the DeepSeek models have it: timm's names, no pooling.

use super::{
    config::Section,
    decoder::{LAYERS, WIDTH},
    nn,
};
use crate::{Error, Result};
use vlmc_artifact::program::Unary;
use vlmc_ir::{Builder, DType, Dim, Val, W, ops::Mask};

/// Epsilon of its norms, fixed in the reference.
const EPS: f64 = 1e-6;

/// Sizes of a tower, as `SigLIP_MODEL_CONFIG` of the reference has them.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub(super) patch_size: usize,
    pub(super) width: usize,
    pub(super) layers: usize,
    pub(super) heads: usize,
    pub(super) mlp_ratio: f64,
}

/// `siglip_large_patch16_384`.
pub(super) const LARGE: Sizes = Sizes { patch_size: 16, width: 1024, layers: 24, heads: 16, mlp_ratio: 4.0 };
/// `siglip_so400m_patch14_384`.
pub(super) const SO400M: Sizes = Sizes { patch_size: 14, width: 1152, layers: 27, heads: 16, mlp_ratio: 3.7362 };

/// A tower.
pub(super) struct Tower {
    pub(super) image_size: usize,
    patch_size: usize,
    layers: usize,
    encoder: nn::Encoder,
    /// Whether query, key and value are layers of their own and the positions a matrix, as transformers has it.
    split: bool,
}

/// Names of a layer with query, key and value of its own.
const SPLIT_LAYER: nn::LayerNames = nn::LayerNames { qkv: nn::Qkv::Split(["attn.q_proj", "attn.k_proj", "attn.v_proj"]), ..nn::TIMM_LAYER };

impl Tower {
    /// From a config in which everything may be missing that `sizes` has. The kind of GELU stands in the code of the reference.
    pub(super) fn new(c: &Section<'_>, sizes: &Sizes, act: Unary) -> Result<Self> {
        let width = c.opt_int("width", WIDTH)?.unwrap_or(sizes.width);
        // Truncated, as the reference does.
        let mlp = (width as f64 * c.positive("mlp_ratio")?.unwrap_or(sizes.mlp_ratio)) as usize;
        let heads = c.opt_int("heads", WIDTH)?.unwrap_or(sizes.heads);
        nn::head_dim(c, "width", width, "heads", heads)?;
        let tower = Self {
            image_size: c.opt_int("image_size", 1..=1 << 16)?.unwrap_or(384),
            patch_size: c.opt_int("patch_size", 1..=1024)?.unwrap_or(sizes.patch_size),
            layers: c.opt_int("layers", LAYERS)?.unwrap_or(sizes.layers),
            encoder: nn::Encoder { width, heads, mlp, eps: EPS, act, names: nn::TIMM_LAYER },
            split: false,
        };
        tower.checked(c)
    }

    /// From a `SiglipVisionConfig` of transformers; what it leaves out has the values of that class.
    pub(super) fn transformers(c: &Section<'_>) -> Result<Self> {
        let width = c.opt_int("hidden_size", WIDTH)?.unwrap_or(768);
        let heads = c.opt_int("num_attention_heads", WIDTH)?.unwrap_or(12);
        nn::head_dim(c, "hidden_size", width, "num_attention_heads", heads)?;
        let tower = Self {
            image_size: c.opt_int("image_size", 1..=1 << 16)?.unwrap_or(224),
            patch_size: c.opt_int("patch_size", 1..=1024)?.unwrap_or(16),
            layers: c.opt_int("num_hidden_layers", LAYERS)?.unwrap_or(12),
            encoder: nn::Encoder {
                width,
                heads,
                mlp: c.opt_int("intermediate_size", WIDTH)?.unwrap_or(3072),
                eps: c.positive("layer_norm_eps")?.unwrap_or(EPS),
                act: nn::activation(c, "hidden_act", Unary::GeluTanh)?,
                names: SPLIT_LAYER,
            },
            split: true,
        };
        tower.checked(c)
    }

    fn checked(self, c: &Section<'_>) -> Result<Self> {
        if self.patch_size > self.image_size {
            let message = format!("{} is more than image_size {}", self.patch_size, self.image_size);
            return Err(Error::config(c.path("patch_size"), message));
        }
        Ok(self)
    }

    /// Leaves out the layers after the one that is `select_layer`: counted from the end if it is not above 0.
    pub(super) fn cut_to(mut self, c: &Section<'_>, select_layer: i64) -> Result<Self> {
        let all = self.layers as i64;
        let kept = if select_layer <= 0 { all + select_layer + 1 } else { select_layer };
        let message = || format!("{select_layer} is not one of {all} layers");
        let kept = usize::try_from(kept.min(all)).ok().filter(|kept| *kept > 0);
        self.layers = kept.ok_or_else(|| Error::config(c.path("select_layer"), message()))?;
        Ok(self)
    }

    /// Width of its features.
    pub(super) fn width(&self) -> usize {
        self.encoder.width
    }

    /// Rows, and columns, of patches of a picture.
    pub(super) fn grid(&self) -> usize {
        self.image_size / self.patch_size
    }

    /// `pixels f32[n, 3, image_size, image_size]` to `f32[n, grid², width]`, after the last norm.
    pub(super) fn apply<'g>(&self, g: &'g Builder<'g>, w: W<'g>, pixels: Val<'g>) -> Val<'g> {
        let _scope = g.scope(w.path());
        let (width, patch, n) = (self.encoder.width, self.patch_size, self.grid() * self.grid());
        let (x, ..) = nn::patchify(g, pixels, patch);
        let proj = w / "patch_embed" / "proj";
        // A convolution whose stride is its kernel is a matrix product.
        let kernel = g.weight_as(proj / "weight", &[width, 3, patch, patch], &[width, 3 * patch * patch]);
        let x = g.linear_with(x, kernel, Some(g.weight(proj / "bias", &[width])));
        let positions = if self.split { g.table(w / "pos_embed", &[n, width]) } else { g.table(w / "pos_embed", &[1, n, width]) };
        let mut x = x + positions;
        for i in 0..self.layers {
            x = self.encoder.layer(g, w / "blocks" / i, x, Mask::Full, None);
        }
        g.layer_norm(x, w / "norm", EPS)
    }

    /// The input `name f32[n..., 3, image_size, image_size]`.
    pub(super) fn input<'g>(&self, g: &'g Builder<'g>, name: &str, lead: &[Dim]) -> Val<'g> {
        let side = Dim::from(self.image_size);
        g.input(name, DType::F32, lead.iter().cloned().chain([3.into(), side.clone(), side]))
    }
}
