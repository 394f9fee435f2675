//! Pictures to patches: `Qwen2VLImageProcessor` of transformers, on Pillow.

use crate::{Error, Result, Tensor, image::Rgb, prompt::Grid, resize::resize};
use vlmc_artifact::Qwen2VlProcessor;

/// Patches of one picture or video.
#[derive(Clone, Debug, PartialEq)]
pub struct Patches {
    /// `[t * h * w, 3 * temporal_patch_size * patch_size²]`.
    pub values: Vec<f32>,
    /// Frames (in groups of `temporal_patch_size`), rows and columns of patches.
    pub grid: Grid,
}

/// Height and width in whole multiples of `factor`, with a product between `min_pixels` and `max_pixels` and about the same
/// aspect ratio (`smart_resize` of transformers; halves are rounded to even).
///
/// # Errors
/// The longer side is more than 200 times the shorter.
pub fn smart_resize(height: usize, width: usize, factor: usize, min_pixels: usize, max_pixels: usize) -> Result<(usize, usize)> {
    let (h, w, f) = (height as f64, width as f64, factor as f64);
    if h.max(w) / h.min(w) > 200.0 {
        return Err(Error::Input(format!("a picture of {width}x{height} is too narrow: one side may be at most 200 times the other")));
    }
    let nearest = |x: f64| ((x / f).round_ties_even() * f) as usize;
    let (h_bar, w_bar) = (nearest(h), nearest(w));
    Ok(if h_bar * w_bar > max_pixels {
        let beta = (h * w / max_pixels as f64).sqrt();
        let below = |x: f64| factor.max((x / beta / f).floor() as usize * factor);
        (below(h), below(w))
    } else if h_bar * w_bar < min_pixels {
        let beta = (min_pixels as f64 / (h * w)).sqrt();
        let above = |x: f64| (x * beta / f).ceil() as usize * factor;
        (above(h), above(w))
    } else {
        (h_bar, w_bar)
    })
}

/// Patches of a picture, which stands for `temporal_patch_size` equal frames.
///
/// # Errors
/// As [`smart_resize`].
pub fn image(p: &Qwen2VlProcessor, picture: &Rgb) -> Result<Patches> {
    patches(p, std::slice::from_ref(picture), p.min_pixels, p.max_pixels)
}

/// Patches of a video; the last frame is repeated to fill the last group.
///
/// # Errors
/// As [`smart_resize`], or there are no frames.
pub fn video(p: &Qwen2VlProcessor, frames: &[Rgb]) -> Result<Patches> {
    patches(p, frames, p.video_min_pixels, p.video_max_pixels)
}

fn patches(p: &Qwen2VlProcessor, frames: &[Rgb], min_pixels: usize, max_pixels: usize) -> Result<Patches> {
    let first = frames.first().ok_or_else(|| Error::Input("a video needs at least one frame".into()))?;
    let (patch, merge, depth) = (p.patch_size, p.merge_size, p.temporal_patch_size);
    let (height, width) = smart_resize(first.height(), first.width(), patch * merge, min_pixels, max_pixels)?;
    // All 256 values of each channel, computed as numpy does: the product in f64, the rest in f32.
    let table: [[f32; 256]; 3] =
        std::array::from_fn(|c| std::array::from_fn(|v| ((v as f64 * p.rescale_factor) as f32 - p.image_mean[c]) / p.image_std[c]));
    let resized: Vec<Rgb> = frames.iter().map(|f| resize(f, width, height, p.resample)).collect();
    let (t, h, w) = (frames.len().div_ceil(depth), height / patch, width / patch);
    let mut values = Vec::with_capacity(t * h * w * 3 * depth * patch * patch);
    for group in 0..t {
        for (block_row, block_col, row, col) in (0..h / merge)
            .flat_map(|a| (0..w / merge).flat_map(move |b| (0..merge).flat_map(move |c| (0..merge).map(move |d| (a, b, c, d)))))
        {
            let (y0, x0) = ((block_row * merge + row) * patch, (block_col * merge + col) * patch);
            for (c, table) in table.iter().enumerate() {
                for frame in 0..depth {
                    let data = resized[(group * depth + frame).min(resized.len() - 1)].data();
                    for y in y0..y0 + patch {
                        let pixels = &data[(y * width + x0) * 3..(y * width + x0 + patch) * 3];
                        values.extend(pixels.iter().skip(c).step_by(3).map(|v| table[usize::from(*v)]));
                    }
                }
            }
        }
    }
    Ok(Patches { values, grid: [t as i64, h as i64, w as i64] })
}

/// Patches of several pictures one after the other, `f32[patches, patch]`, and their grids, `i64[n, 3]`; `None` of none.
///
/// # Errors
/// The patches are of different sizes.
pub fn batch(all: &[Patches]) -> Result<Option<(Tensor, Tensor)>> {
    if all.is_empty() {
        return Ok(None);
    }
    let rows: i64 = all.iter().map(|p| p.grid.iter().product::<i64>()).sum();
    let values: Vec<f32> = all.iter().flat_map(|p| p.values.iter().copied()).collect();
    let grids: Vec<i64> = all.iter().flat_map(|p| p.grid).collect();
    let width = values.len().checked_div(rows as usize).unwrap_or(0);
    Ok(Some((Tensor::new([rows as usize, width], values)?, Tensor::new([all.len(), 3], grids)?)))
}
