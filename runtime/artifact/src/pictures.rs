//! Settings of processors that several models share.

use crate::Resample;
use serde::{Deserialize, Serialize};

/// Settings of processors that make every picture one size: `pixel_values f32[1, 3, height, width]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StandardProcessor {
    /// First step; absent if pictures keep their size.
    pub resize: Option<Resize>,
    /// Second step.
    pub crop: Option<CenterCrop>,
    /// Pillow filter of the resize.
    pub resample: Resample,
    /// Mean per channel, after `rescale_factor`.
    pub image_mean: [f32; 3],
    /// Standard deviation per channel, after `rescale_factor`.
    pub image_std: [f32; 3],
    /// Usually 1/255.
    pub rescale_factor: f64,
    /// Tokens that a picture takes in a prompt; 0 for models without prompts.
    pub tokens: usize,
}

/// How a picture is made smaller or larger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Resize {
    /// To this size, whatever its shape.
    Exact {
        /// Rows.
        height: usize,
        /// Columns.
        width: usize,
    },
    /// Its shorter side to this length, the other in proportion, rounded down.
    ShortestEdge {
        /// Pixels.
        edge: usize,
    },
}

/// The middle of a picture; what lies outside of it is black.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CenterCrop {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// Where it cannot be in the middle: at the nearest even offset (torchvision), or at the smaller one (transformers).
    pub nearest_even: bool,
}

/// Settings of `Siglip2ImageProcessor`; names as in `preprocessor_config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NaflexProcessor {
    /// Pixels per patch side.
    pub patch_size: usize,
    /// Most patches of a picture, and the number to which they are padded.
    pub max_num_patches: usize,
    /// Pillow filter of the resize.
    pub resample: Resample,
    /// Mean per channel, after `rescale_factor`.
    pub image_mean: [f32; 3],
    /// Standard deviation per channel, after `rescale_factor`.
    pub image_std: [f32; 3],
    /// Usually 1/255.
    pub rescale_factor: f64,
}
