//! Pictures to squares: `VLMImageProcessor` of github.com/deepseek-ai/DeepSeek-VL, `DeepseekVLImageProcessor` and
//! `DeepseekVLHybridImageProcessor` of transformers, on Pillow.

use super::{Outline, Pixels, channel_tables};
use crate::{Error, Result, Tensor, image::Rgb, prompt::Clip, resize::resize};
use vlmc_artifact::{DeepseekVlProcessor, DeepseekVlView};

/// `picture` with its longer side of the view's size, in the middle of a square of one colour.
fn square(p: &DeepseekVlProcessor, view: &DeepseekVlView, picture: &Rgb) -> Result<Rgb> {
    let (width, height) = (picture.width(), picture.height());
    let (longest, size) = (width.max(height) as f64, view.size as f64);
    let scaled = |side: usize| {
        let side = if p.round { (side as f64 * (size / longest)).round_ties_even() } else { side as f64 / longest * size };
        (side as usize).max(p.min_size)
    };
    let inner = resize(picture, scaled(width), scaled(height), view.resample);
    let (width, height) = (inner.width(), inner.height());
    let side = width.max(height);
    if side != view.size {
        return Err(Error::Input(format!("a picture becomes {side} pixels wide, the model takes {}", view.size)));
    }
    let (left, top) = ((side - width) / 2, (side - height) / 2);
    let mut data = view.background.repeat(side * side);
    for (y, row) in inner.data().chunks_exact(width * 3).enumerate() {
        let at = ((top + y) * side + left) * 3;
        data[at..at + row.len()].copy_from_slice(row);
    }
    Rgb::new(side, side, data).ok_or_else(|| Error::Input("a picture has no pixels".into()))
}

/// `f32[1, 3, size, size]`.
fn tensor(p: &DeepseekVlProcessor, view: &DeepseekVlView, picture: &Rgb) -> Result<Tensor> {
    let table = channel_tables(p.rescale_factor, view.image_mean, view.image_std);
    let channel = |c: usize| picture.data().iter().skip(c).step_by(3).map(|v| usize::from(*v)).collect::<Vec<_>>();
    let values: Vec<f32> = (0..3).flat_map(|c| channel(c).into_iter().map(|v| table[c][v]).collect::<Vec<_>>()).collect();
    Tensor::new([1, 3, view.size, view.size], values)
}

/// See [`super::outline`].
pub(super) fn outline(p: &DeepseekVlProcessor) -> Outline {
    let shape = |view: &DeepseekVlView| vec![1, 3, view.size, view.size];
    match &p.second {
        None => Outline::new([("pixel_values", shape(&p.first))], p.tokens),
        Some(view) => Outline::new([("pixel_values", shape(view)), ("high_res_pixel_values", shape(&p.first))], p.tokens),
    }
}

/// `pixel_values`; where the model takes two sizes, those of the smaller, made from the larger, which are
/// `high_res_pixel_values`.
pub(super) fn image(p: &DeepseekVlProcessor, picture: &Rgb) -> Result<Pixels> {
    let first = square(p, &p.first, picture)?;
    let inputs = match &p.second {
        None => [("pixel_values".into(), tensor(p, &p.first, &first)?)].into(),
        Some(view) => {
            let second = square(p, view, &first)?;
            let high = ("high_res_pixel_values".into(), tensor(p, &p.first, &first)?);
            [("pixel_values".into(), tensor(p, view, &second)?), high].into()
        }
    };
    Ok(Pixels { inputs, tokens: p.tokens, clip: Clip::picture([1, 1, 1]) })
}
