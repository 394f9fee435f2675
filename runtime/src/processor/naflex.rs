//! Pictures to patches at their own aspect ratio: `Siglip2ImageProcessor` of transformers, on Pillow.

use super::{Outline, Pixels, channel_tables};
use crate::{Result, Tensor, image::Rgb, prompt::Clip, resize::resize};
use vlmc_artifact::NaflexProcessor;

/// See [`super::outline`].
pub(super) fn outline(p: &NaflexProcessor, width: usize, height: usize) -> Outline {
    let (rows, columns) = grid(height, width, p.patch_size, p.max_num_patches);
    let padded = p.max_num_patches.max(rows * columns);
    let pixels = vec![1, padded, p.patch_size * p.patch_size * 3];
    Outline::new([("pixel_values", pixels), ("pixel_attention_mask", vec![1, padded]), ("spatial_shapes", vec![1, 2])], 0)
}

/// `pixel_values f32[1, max_num_patches, patch_size² * 3]` (row, column, channel of a patch; zeros after the last patch),
/// `pixel_attention_mask i64[1, max_num_patches]` and `spatial_shapes i64[1, 2]`: rows and columns of patches.
pub(super) fn image(p: &NaflexProcessor, picture: &Rgb) -> Result<Pixels> {
    let patch = p.patch_size;
    let (rows, columns) = grid(picture.height(), picture.width(), patch, p.max_num_patches);
    let resized = resize(picture, columns * patch, rows * patch, p.resample);
    let table = channel_tables(p.rescale_factor, p.image_mean, p.image_std);
    let count = rows * columns;
    let width = patch * patch * 3;
    let mut values = Vec::with_capacity(p.max_num_patches.max(count) * width);
    for (row, column, y) in (0..rows).flat_map(|r| (0..columns).flat_map(move |c| (0..patch).map(move |y| (r, c, y)))) {
        let start = ((row * patch + y) * columns + column) * patch * 3;
        let line = resized.data()[start..start + patch * 3].iter().enumerate();
        values.extend(line.map(|(i, v)| table[i % 3][usize::from(*v)]));
    }
    let padded = p.max_num_patches.max(count);
    values.resize(padded * width, 0.0);
    let mask: Vec<i64> = (0..padded).map(|i| i64::from(i < count)).collect();
    let inputs = [
        ("pixel_values".into(), Tensor::new([1, padded, width], values)?),
        ("pixel_attention_mask".into(), Tensor::new([1, padded], mask)?),
        ("spatial_shapes".into(), Tensor::new([1, 2], vec![rows as i64, columns as i64])?),
    ];
    Ok(Pixels { inputs: inputs.into(), tokens: 0, clip: Clip::picture([1, rows as i64, columns as i64]) })
}

/// Rows and columns of patches: the largest scale at which they are at most `max`, found by halving as in the reference
/// (`get_image_size_for_max_num_patches`), so that it ends at the very same one.
fn grid(height: usize, width: usize, patch: usize, max: usize) -> (usize, usize) {
    const EPS: f64 = 1e-5;
    let patches = |scale: f64, size: usize| ((size as f64 * scale / patch as f64).ceil() as usize).max(1);
    let (mut low, mut high) = (EPS / 10.0, 100.0);
    while high - low >= EPS {
        let scale = (low + high) / 2.0;
        if patches(scale, height) * patches(scale, width) <= max {
            low = scale;
        } else {
            high = scale;
        }
    }
    (patches(low, height), patches(low, width))
}
