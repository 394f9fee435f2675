//! Pictures to tensors, as the image processors of transformers (and of models outside it) do it on Pillow. One file each.

mod deepseek_vl;
pub(crate) mod deepseek_vl2;
mod mllama;
mod naflex;
mod qwen2_vl;
mod standard;

pub use qwen2_vl::smart_resize;

use crate::{Error, Result, forward::Tensors, image::Rgb, prompt::Clip};
use std::collections::BTreeMap;
use vlmc_artifact::Processor;

/// A picture or video as the model takes it.
#[derive(Clone, Debug, PartialEq)]
pub struct Pixels {
    /// Inputs of the entry that sees.
    pub inputs: Tensors,
    /// Tokens that it takes in a prompt.
    pub tokens: usize,
    /// Where its tokens stand, for models with positions in time and space.
    pub clip: Clip,
}

/// A picture.
///
/// # Errors
/// It is of a shape that the processor does not take.
pub fn image(p: &Processor, picture: &Rgb) -> Result<Pixels> {
    image_among(p, picture, 1)
}

/// One of `pictures` of a conversation, which may become another tensor than it would alone.
///
/// # Errors
/// As [`image`].
pub fn image_among(p: &Processor, picture: &Rgb, pictures: usize) -> Result<Pixels> {
    match p {
        Processor::DeepseekVl(p) => deepseek_vl::image(p, picture),
        Processor::DeepseekVl2(p) => deepseek_vl2::image(p, picture, pictures),
        Processor::Qwen2Vl(p) => qwen2_vl::image(p, picture),
        Processor::Mllama(p) => mllama::image(p, picture),
        Processor::Standard(p) => standard::image(p, picture),
        Processor::Naflex(p) => naflex::image(p, picture),
    }
}

/// What a picture becomes, without its pixels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outline {
    /// Shapes of [`Pixels::inputs`].
    pub inputs: BTreeMap<String, Vec<usize>>,
    /// Tokens that it takes in a prompt.
    pub tokens: usize,
}

impl Outline {
    fn new<const N: usize>(inputs: [(&str, Vec<usize>); N], tokens: usize) -> Self {
        Self { inputs: inputs.map(|(name, shape)| (name.into(), shape)).into(), tokens }
    }
}

/// The outline of a picture of that size among `pictures`.
///
/// # Errors
/// As [`image`].
pub fn outline(p: &Processor, width: usize, height: usize, pictures: usize) -> Result<Outline> {
    if width == 0 || height == 0 {
        return Err(Error::Input(format!("a picture of {width}x{height} has no pixels")));
    }
    match p {
        Processor::DeepseekVl(p) => Ok(deepseek_vl::outline(p)),
        Processor::DeepseekVl2(p) => Ok(deepseek_vl2::outline(p, width, height, pictures)),
        Processor::Qwen2Vl(p) => qwen2_vl::outline(p, width, height),
        Processor::Mllama(p) => Ok(mllama::outline(p)),
        Processor::Standard(p) => standard::outline(p, width, height),
        Processor::Naflex(p) => Ok(naflex::outline(p, width, height)),
    }
}

/// A video, frame by frame.
///
/// # Errors
/// As [`image`], there are no frames, or the model takes no videos.
pub fn video(p: &Processor, frames: &[Rgb]) -> Result<Pixels> {
    match p {
        Processor::Qwen2Vl(p) => qwen2_vl::video(p, frames),
        _ => Err(Error::Unsupported("the model takes no videos".into())),
    }
}

/// Seconds of each group of frames of a video of `frames`: the mean of its first and its last one.
pub fn times(p: &Processor, frames: usize) -> Vec<f64> {
    match p {
        Processor::Qwen2Vl(p) => qwen2_vl::times(p, frames),
        _ => vec![],
    }
}

/// Whether pictures become other tensors when a conversation goes from `before` pictures to `after`.
pub(crate) fn changes(p: &Processor, before: usize, after: usize) -> bool {
    matches!(p, Processor::DeepseekVl2(_)) && deepseek_vl2::crops(before) != deepseek_vl2::crops(after)
}

/// What each of the 256 values of each channel becomes, `(v * rescale_factor - mean) / std`, computed as numpy does: the product
/// in f64, the rest in f32.
fn channel_tables(rescale_factor: f64, mean: [f32; 3], std: [f32; 3]) -> [[f32; 256]; 3] {
    std::array::from_fn(|c| std::array::from_fn(|v| ((v as f64 * rescale_factor) as f32 - mean[c]) / std[c]))
}
